//! `tern machine`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use http::StatusCode;
use serde_json::{Value, json};
use tern_catalog::{AppName, MachineId};

use super::wire::Machine as WireMachine;
use super::{app_of, config_path, exec, load, status};
use crate::args::{Machine, MachineArg};
use crate::client::{Client, is_status};
use crate::output;

/// Longest one call of the API's `wait` may take.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Longest wait of `tern machine start` and the like.
const PATIENCE: Duration = Duration::from_secs(300);

pub async fn run(client: &Client, args: Machine) -> Result<ExitCode> {
    match args {
        Machine::List(arg) => {
            let app = app_of(&arg)?;
            let machines: Vec<WireMachine> =
                client.get(&format!("/v1/apps/{app}/machines")).await?;
            if arg.json {
                output::json(&machines)?;
            } else {
                status::table(&machines);
            }
        }
        Machine::Status { machine, json } => show(client, &machine, json).await?,
        Machine::BootTrace { machine, json } => boot_trace(client, &machine, json).await?,
        Machine::Start(arg) => act(client, &arg, "start", "started").await?,
        Machine::Stop(arg) => rest(client, &arg, "stop", "stopped").await?,
        Machine::Suspend(arg) => rest(client, &arg, "suspend", "suspended").await?,
        Machine::Restart(arg) => act(client, &arg, "restart", "started").await?,
        Machine::Destroy { machine, force } => {
            let path = path_of(client, &machine).await?;
            client.delete(&format!("{path}?force={force}")).await?;
            println!("Machine {} is destroyed.", machine.id);
        }
        Machine::Exec {
            machine,
            stdin,
            command,
            timeout,
        } => {
            let path = path_of(client, &machine).await?;
            let input = stdin.then(|| exec::read_ahead(std::io::stdin()));
            let outputs = (std::io::stdout().lock(), std::io::stderr().lock());
            let code = exec::run(client, &path, command, timeout, input, outputs).await?;
            return Ok(ExitCode::from(code));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn act(client: &Client, arg: &MachineArg, verb: &str, state: &str) -> Result<()> {
    let path = path_of(client, arg).await?;
    let before: WireMachine = client.get(&path).await?;
    let _: Value = client.post(&format!("{path}/{verb}"), &json!({})).await?;
    wait(client, &path, state, &before.instance_id, PATIENCE).await?;
    println!("Machine {} is {state}.", arg.id);
    Ok(())
}

/// Has a Machine stop or suspend, and says what came of it: a request may have woken it at once.
async fn rest(client: &Client, arg: &MachineArg, verb: &str, state: &str) -> Result<()> {
    let path = path_of(client, arg).await?;
    let before: WireMachine = client.get(&path).await?;
    let _: Value = client.post(&format!("{path}/{verb}"), &json!({})).await?;
    wait(client, &path, "settled", &before.instance_id, PATIENCE).await?;
    let now: WireMachine = client.get(&path).await?;
    println!("{}", rested(&now, &before.newest_event(), verb, state)?);
    Ok(())
}

/// What came of a stop or a suspend, by what has happened since the event `since`.
fn rested(machine: &WireMachine, since: &str, verb: &str, state: &str) -> Result<String> {
    let news = machine.events.iter().filter(|e| e.id.as_str() > since);
    let done = news
        .filter(|e| e.kind == verb)
        .max_by(|a, b| a.id.cmp(&b.id));
    let id = &machine.id;
    if let Some(error) = done.and_then(|event| event.request["error"].as_str()) {
        bail!("Machine {id} is {} still: {error}", machine.state);
    }
    match done {
        _ if machine.state == state => Ok(format!("Machine {id} is {state}.")),
        Some(_) => Ok(format!(
            "Machine {id} was {state}, and is {} again: somebody called it.",
            machine.state
        )),
        None => {
            let reason = machine.last_reason();
            let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
            bail!(
                "Machine {id} is {}, and was not {state}{reason}",
                machine.state
            )
        }
    }
}

/// Waits until a Machine is in a state. A Machine that fails ends the wait at once, with its reason.
pub async fn wait(
    client: &Client,
    path: &str,
    state: &str,
    instance: &str,
    patience: Duration,
) -> Result<()> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let left = deadline
            .saturating_duration_since(tokio::time::Instant::now())
            .min(MAX_WAIT);
        let seconds = left.as_secs().max(1);
        let query = format!("state={state}&state=failed&instance_id={instance}&timeout={seconds}");
        match client.get::<Value>(&format!("{path}/wait?{query}")).await {
            Ok(_) => {
                let machine: WireMachine = client.get(path).await?;
                if machine.state == "failed" && state != "failed" {
                    let reason = machine
                        .last_reason()
                        .unwrap_or_else(|| "no reason was given".to_owned());
                    bail!(
                        "Machine {} failed: {reason}. Its output: `tern logs --machine {}`",
                        machine.id,
                        machine.id
                    );
                }
                return Ok(());
            }
            Err(e) if is_status(&e, StatusCode::REQUEST_TIMEOUT) && left < MAX_WAIT => {
                let machine: WireMachine = client.get(path).await?;
                bail!(
                    "Machine {} is still {} after {} s",
                    machine.id,
                    machine.state,
                    patience.as_secs()
                );
            }
            Err(e) if is_status(&e, StatusCode::REQUEST_TIMEOUT) => {}
            Err(e) => return Err(e),
        }
    }
}

async fn show(client: &Client, arg: &MachineArg, json: bool) -> Result<()> {
    let machine: WireMachine = client.get(&path_of(client, arg).await?).await?;
    if json {
        return output::json(&machine);
    }
    println!("ID        {}", machine.id);
    println!("Name      {}", machine.name);
    println!("State     {}", machine.state);
    println!("Region    {}", machine.region);
    println!("Address   {}", machine.private_ip);
    println!("Image     {}", machine.config.image);
    println!(
        "Memory    {} MiB, {} vCPU",
        machine.config.guest.memory_mb, machine.config.guest.cpus
    );
    for check in &machine.checks {
        println!("Check     {} {} {}", check.name, check.status, check.output);
    }
    println!();
    let row = |e: &super::wire::Event| {
        let time = jiff::Timestamp::from_millisecond(e.timestamp).unwrap_or_default();
        let detail = if e.request.is_null() {
            String::new()
        } else {
            e.request.to_string()
        };
        vec![
            format!("{time:.3}"),
            e.kind.clone(),
            e.status.clone(),
            e.source.clone(),
            detail,
        ]
    };
    let rows: Vec<_> = machine.events.iter().map(row).collect();
    output::table(
        &["TIME", "EVENT", "STATE", "SOURCE", "DETAIL"],
        &rows,
        "No events yet.",
    );
    Ok(())
}

async fn boot_trace(client: &Client, arg: &MachineArg, json: bool) -> Result<()> {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Trace {
        began_unix_us: i64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cold: Option<bool>,
        phases: Vec<Phase>,
    }
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Phase {
        side: String,
        name: String,
        at_us: u64,
    }
    let path = path_of(client, arg).await?;
    let trace: Trace = client.get(&format!("{path}/boot-trace")).await?;
    if json {
        return output::json(&trace);
    }
    let what = match trace.cold {
        Some(true) => "Cold start",
        Some(false) => "Wake from a snapshot",
        None => "Start (before `tern serve` did)",
    };
    let began = jiff::Timestamp::from_microsecond(trace.began_unix_us).unwrap_or_default();
    println!("{what} at {began:.3}\n");
    let millis = |us: u64| format!("{:.1}", us as f64 / 1000.0);
    let mut before = 0;
    let row = |phase: &Phase| {
        let took = phase.at_us.saturating_sub(before);
        before = phase.at_us;
        vec![
            millis(phase.at_us),
            millis(took),
            phase.side.clone(),
            phase.name.replace('_', " "),
        ]
    };
    let rows: Vec<_> = trace.phases.iter().map(row).collect();
    output::table(
        &["AT MS", "STEP MS", "BY", "WHAT HAD ENDED"],
        &rows,
        "Nothing is known of its start.",
    );
    Ok(())
}

/// The Machine's path in the API; its app is found where none is named.
async fn path_of(client: &Client, arg: &MachineArg) -> Result<String> {
    let app = match &arg.app {
        Some(app) => app.clone(),
        None => find_app(client, &arg.id).await?,
    };
    Ok(format!("/v1/apps/{app}/machines/{}", arg.id))
}

async fn find_app(client: &Client, id: &MachineId) -> Result<AppName> {
    let here = config_path(std::path::Path::new("fly.toml"));
    if here.exists() {
        let app = super::app_named_by(&load(&here)?)?;
        match client
            .get::<Value>(&format!("/v1/apps/{app}/machines/{id}"))
            .await
        {
            Ok(_) => return Ok(app),
            Err(e) if is_status(&e, StatusCode::NOT_FOUND) => {}
            Err(e) => return Err(e),
        }
    }
    let apps: Value = client.get("/v1/apps").await?;
    for app in apps["apps"].as_array().into_iter().flatten() {
        let name = app["name"]
            .as_str()
            .context("the server named an app that has no name")?;
        match client
            .get::<Value>(&format!("/v1/apps/{name}/machines/{id}"))
            .await
        {
            Ok(_) => return Ok(name.parse()?),
            Err(e) if is_status(&e, StatusCode::NOT_FOUND) => {}
            Err(e) => return Err(e),
        }
    }
    bail!("no app has a Machine {id}; see `tern machine list --app NAME`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_of_a_suspend_is_told() {
        let of = |state: &str, events: &[(&str, &str, Value)]| {
            let events: Vec<Value> = events
                .iter()
                .map(|(id, kind, request)| {
                    json!({"id": id, "type": kind, "status": "started", "timestamp": 0, "request": request})
                })
                .collect();
            let machine =
                json!({"id": "1", "state": state, "config": {"image": "x"}, "events": events});
            let machine: WireMachine = serde_json::from_value(machine).unwrap();
            rested(&machine, "2", "suspend", "suspended").map_err(|e| e.to_string())
        };
        let slept = ("3", "suspend", json!({"took_ms": 9}));
        let woken = ("4", "start", json!({"cold": false}));
        assert_eq!(
            of("suspended", std::slice::from_ref(&slept)).unwrap(),
            "Machine 1 is suspended."
        );
        assert_eq!(of("suspended", &[]).unwrap(), "Machine 1 is suspended.");
        let told = of("started", &[slept, woken]).unwrap();
        assert!(
            told.contains("was suspended, and is started again"),
            "{told}"
        );
        let refused = of("started", &[("3", "suspend", json!({"error": "no space"}))]).unwrap_err();
        assert!(refused.contains("no space"), "{refused}");
        // A sleep of before is none of this one's.
        let early = of("stopped", &[("2", "suspend", json!(null))]).unwrap_err();
        assert!(early.contains("is stopped"), "{early}");
    }

    #[tokio::test]
    async fn a_suspend_ends_whether_or_not_the_machine_stays_so() {
        let world = crate::commands::testing::World::new().await;
        for (app, image) in [("quiet", "example.com/good"), ("busy", "example.com/woken")] {
            world.app(app, "").await;
            let path = format!("/v1/apps/{app}/machines");
            let body = json!({"config": {"image": image}});
            let made: WireMachine = world.client.post(&path, &body).await.unwrap();
            let path = format!("{path}/{}", made.id);
            let instance = &made.instance_id;
            wait(&world.client, &path, "started", instance, PATIENCE)
                .await
                .unwrap();
            let arg = MachineArg {
                id: made.id.parse().unwrap(),
                app: Some(app.parse().unwrap()),
            };
            rest(&world.client, &arg, "suspend", "suspended")
                .await
                .unwrap();
            let _: Value = world
                .client
                .post(&format!("{path}/stop"), &json!({}))
                .await
                .unwrap();
            wait(&world.client, &path, "stopped", instance, PATIENCE)
                .await
                .unwrap();
            let refused = rest(&world.client, &arg, "suspend", "suspended").await;
            let refused = refused.unwrap_err().to_string();
            assert!(refused.contains("stopped"), "{refused}");
        }
    }
}
