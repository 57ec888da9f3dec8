//! Software that nobody here wrote, from Debian's packages, as the examples put it into Machines.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use tern_e2e::process::{Background, wait_for};
use tern_e2e::sql::Session;
use tern_e2e::world::PATIENCE;
use tern_e2e::{App, Laptop, World};

/// An example, as its directory has it.
macro_rules! example {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../examples/",
                $name,
                "/fly.toml"
            )),
        )
    };
}

fn deploy<'a>(world: &'a World, (name, fly_toml): (&str, &str)) -> Result<App<'a>> {
    world.launch_with(name, "personal", name, fly_toml)
}

/// A connection from the laptop to a port of the app's Machine.
fn connect(laptop: &Laptop, app: &App<'_>, port: u16) -> Result<TcpStream> {
    let to = SocketAddr::new(app.address()?.parse()?, port);
    laptop.connect(to, PATIENCE)
}

/// Puts it to sleep and says how often it was started until now.
fn suspend(app: &App<'_>) -> Result<usize> {
    app.machine("suspend")?;
    app.wait_for_state("suspended")?;
    Ok(app.events("start")?.len())
}

/// The newest start was asked for by traffic, and no cold one.
fn assert_woken(app: &App<'_>, starts_before: usize) -> Result<()> {
    // What traffic has woken may answer before the catalog tells of it.
    app.wait_for_state("started")?;
    let starts = app.events("start")?;
    ensure!(starts.len() == starts_before + 1, "{starts:#?}");
    let last = starts.last().context("no start")?;
    ensure!(last["source"] == "proxy", "{last:#}");
    ensure!(last["request"]["cold"] == false, "no resume: {last:#}");
    Ok(())
}

#[test]
fn nginx_serves_before_and_after_a_sleep() -> Result<()> {
    let world = World::new("nginx")?;
    let app = deploy(&world, example!("debian-nginx"))?;
    app.wait_for_https()?;
    let starts = suspend(&app)?;
    let page = app.body("/")?;
    assert!(page.contains("nginx on Debian"), "{page}");
    assert_woken(&app, starts)
}

#[test]
fn python_keeps_what_it_remembers() -> Result<()> {
    let world = World::new("python")?;
    // Flask, which is told to listen on 0.0.0.0 as its manual has it.
    let (name, fly_toml) = example!("debian-python");
    let app = deploy(&world, (name, fly_toml))?;
    remembers(&app)?;
    // Python's own http.server, from the same image.
    let text = fly_toml.replace(name, "files");
    let text = format!("{text}\n[processes]\n  app = \"python3 -m http.server 8080\"\n");
    let app = world.launch_with("files", "personal", name, &text)?;
    app.wait_for_https()?;
    let starts = suspend(&app)?;
    let listing = app.body("/")?;
    assert!(listing.contains("app.py"), "{listing}");
    assert_woken(&app, starts)
}

#[test]
fn node_keeps_what_it_remembers() -> Result<()> {
    let world = World::new("node")?;
    remembers(&deploy(&world, example!("debian-node"))?)
}

/// Its memory outlasts a sleep: it goes on counting requests.
fn remembers(app: &App<'_>) -> Result<()> {
    app.wait_for_https()?;
    let count = || -> Result<u32> {
        let reply = app.body("/")?;
        let number = reply.trim().strip_prefix("request ");
        Ok(number.with_context(|| reply.clone())?.parse()?)
    };
    for _ in 0..3 {
        let before = count()?;
        let starts = suspend(app)?;
        assert!(count()? > before, "it was started anew");
        assert_woken(app, starts)?;
    }
    Ok(())
}

#[test]
fn redis_answers_an_open_connection_after_a_sleep() -> Result<()> {
    let world = World::new("redis")?;
    let app = deploy(&world, example!("debian-redis"))?;
    let laptop = world.joined_laptop(0, "personal")?;
    let mut stream = BufReader::new(connect(&laptop, &app, 6379)?);
    // Inline commands of RESP, each with a reply of one line.
    let mut ask = |command: &str| -> Result<String> {
        stream
            .get_mut()
            .write_all(format!("{command}\r\n").as_bytes())?;
        let mut reply = String::new();
        stream
            .read_line(&mut reply)
            .with_context(|| command.to_owned())?;
        Ok(reply.trim().to_owned())
    };
    assert_eq!(ask("SET visits 40")?, "+OK");
    for visits in 41..44 {
        let starts = suspend(&app)?;
        assert_eq!(ask("INCR visits")?, format!(":{visits}"));
        assert_woken(&app, starts)?;
    }
    Ok(())
}

#[test]
fn postgres_answers_an_open_session_after_a_sleep() -> Result<()> {
    let world = World::new("postgres")?;
    let app = deploy(&world, example!("debian-postgres"))?;
    let laptop = world.joined_laptop(0, "personal")?;
    let mut session = Session::begin(connect(&laptop, &app, 5432)?)?;
    // Of this session alone.
    session.query("create temporary table visits as select 40 as n")?;
    for visits in 41..44 {
        let starts = suspend(&app)?;
        let seen = session.one("update visits set n = n + 1 returning n")?;
        assert_eq!(seen, visits.to_string());
        assert_woken(&app, starts)?;
    }
    exec_carries_every_byte(&world, &app)
}

/// Into the guest and out of it, and tells how it ended.
fn exec_carries_every_byte(world: &World, app: &App<'_>) -> Result<()> {
    let bytes: Vec<u8> = (0..=255).cycle().take(16 << 20).collect();
    let file = world.dir().join("bytes");
    std::fs::write(&file, &bytes)?;
    let mut exec = world.server.command(&[
        "machine",
        "exec",
        &app.machine,
        "--app",
        &app.name,
        "-i",
        "--",
        "sh",
        "-c",
        "cat; kill -KILL $$",
    ]);
    let told = exec.stdin(std::fs::File::open(&file)?).output()?;
    let said = String::from_utf8_lossy(&told.stderr).into_owned();
    assert_eq!(told.status.code(), Some(128 + 9), "{said}");
    assert!(told.stdout == bytes, "{} bytes: {said}", told.stdout.len());
    Ok(())
}

/// The monitor is killed under pgbench. `TERN_DEEP=1` (`make check-deep`) kills it fifty times.
#[test]
fn postgres_loses_nothing_that_it_acknowledged() -> Result<()> {
    let kills = match std::env::var_os("TERN_DEEP") {
        Some(_) => 50,
        None => 2,
    };
    let world = World::new("postgres-kill")?;
    let app = deploy(&world, example!("debian-postgres"))?;
    let laptop = world.joined_laptop(0, "personal")?;
    let begin = || {
        wait_for("PostgreSQL answers", PATIENCE, || {
            let session = Session::begin(connect(&laptop, &app, 5432)?)?;
            Ok(Some(session))
        })
    };
    in_guest(&world, &app, &["pgbench", "--initialize", "--quiet"])?;
    begin()?.query("create table ledger (n int primary key)")?;
    let mut acknowledged = 0_u32;
    for round in 1..=kills {
        let mut session = begin()?;
        // With its vacuum it would begin by emptying the history, which the balances are held against.
        let args = ["pgbench", "--no-vacuum", "--client=4", "--time=3600"];
        let mut pgbench = tern_exec(&world, &app, &args);
        let log = world.dir().join(format!("pgbench-{round}.log"));
        let mut pgbench = Background::start("pgbench", &mut pgbench, &log)?;
        let before = commits(&mut session)?;
        wait_for("pgbench has committed something", PATIENCE, || {
            pgbench.must_run()?;
            Ok((commits(&mut session)? > before).then_some(()))
        })?;
        // The kill comes while this connection commits too: the last one may be lost, or not told.
        let monitor = app.monitor()?;
        let enough = acknowledged + 20;
        let killer = std::thread::scope(|scope| -> Result<()> {
            let (ring, rung) = std::sync::mpsc::channel();
            let killer = scope.spawn(move || -> Result<()> {
                rung.recv()?;
                Ok(kill(monitor, Signal::SIGKILL)?)
            });
            loop {
                let sql = format!("insert into ledger values ({})", acknowledged + 1);
                if session.query(&sql).is_err() {
                    break;
                }
                acknowledged += 1;
                if acknowledged == enough {
                    ring.send(())?;
                }
                ensure!(acknowledged < enough + 10_000, "the kill does nothing");
            }
            // Where it was never rung, the thread must not wait for ever.
            drop(ring);
            killer.join().map_err(|_| anyhow::anyhow!("no kill"))?
        });
        killer?;
        drop(pgbench);
        app.machine("start")?;
        let mut session = begin()?;
        let last: u32 = session.one("select max(n) from ledger")?.parse()?;
        let count: u32 = session.one("select count(*) from ledger")?.parse()?;
        ensure!(
            count == last && (acknowledged..=acknowledged + 1).contains(&last),
            "round {round}: {acknowledged} were acknowledged, the last is {last}, and {count} are there"
        );
        acknowledged = last;
        let sums = session.query(
            "select sum(abalance) from pgbench_accounts union all \
             select sum(bbalance) from pgbench_branches union all \
             select sum(tbalance) from pgbench_tellers union all \
             select coalesce(sum(delta), 0) from pgbench_history",
        )?;
        ensure!(
            sums.iter().all(|sum| *sum == sums[0]),
            "round {round}: {sums:?}"
        );
        check(&world, &app).with_context(|| format!("round {round}"))?;
        let pgbenchs = commits(&mut session)?;
        println!(
            "kill {round}: of {acknowledged} commits of ours and {pgbenchs} of pgbench's none is lost"
        );
    }
    Ok(())
}

/// Transactions of pgbench's that are there.
fn commits(session: &mut Session) -> Result<u64> {
    Ok(session
        .one("select count(*) from pgbench_history")?
        .parse()?)
}

/// PostgreSQL's own check: every page, row and index of all tables.
fn check(world: &World, app: &App<'_>) -> Result<()> {
    let args = [
        "pg_amcheck",
        "--install-missing",
        "--heapallindexed",
        "postgres",
    ];
    let told = in_guest(world, app, &args)?;
    if !told.trim().is_empty() {
        bail!("pg_amcheck: {told}");
    }
    Ok(())
}

fn in_guest(world: &World, app: &App<'_>, command: &[&str]) -> Result<String> {
    tern_e2e::process::checked(&mut tern_exec(world, app, command))
}

fn tern_exec(world: &World, app: &App<'_>, command: &[&str]) -> std::process::Command {
    let program = format!("/usr/lib/postgresql/15/bin/{}", command[0]);
    let mut args = vec!["machine", "exec", &app.machine, "--app", &app.name];
    args.extend(["--timeout", "600s", "--"]);
    args.extend([
        "setpriv",
        "--reuid=postgres",
        "--regid=postgres",
        "--clear-groups",
    ]);
    args.push(&program);
    args.extend(&command[1..]);
    world.server.command(&args)
}
