//! What `make install`, `make uninstall` and `make deb` do, with the development build, into a directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `packaging/package`, with the tree as DESTDIR.
fn package(what: &str, tree: &Path) -> Output {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target = Path::new(env!("CARGO_BIN_EXE_tern")).ancestors().nth(2);
    let output = Command::new(checkout.join("packaging/package"))
        .arg(what)
        .env("DESTDIR", tree)
        .env("PREFIX", "/usr/local")
        .env("TERN_PROFILE", "debug")
        .env("TERN_DEB_COMPRESSION", "none")
        .env("CARGO_TARGET_DIR", target.unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{what}: {}", said(&output));
    output
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}; `.ci/setup test` installs it"))
}

/// All files below, as paths from there.
fn files(tree: &Path) -> BTreeSet<String> {
    let (mut found, mut dirs) = (BTreeSet::new(), vec![tree.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => dirs.push(path),
                false => {
                    let below = path.strip_prefix(tree).unwrap();
                    found.insert(format!("/{}", below.display()));
                }
            }
        }
    }
    found
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// One test: the parts share the tree, and the directory that they are staged in.
#[test]
fn what_is_installed_runs_is_a_unit_and_a_package_and_goes_away() {
    let tree = tempfile::tempdir().unwrap();
    let tree = tree.path();
    package("build", tree);
    package("install", tree);
    let at = |path: &str| -> PathBuf { tree.join(path) };
    let found = files(tree);
    for file in [
        "/etc/tern/tern.toml",
        "/usr/local/bin/tern",
        "/usr/local/lib/tern/tern-vmm",
        "/usr/local/lib/tern/guest/vmlinux",
        "/usr/local/lib/tern/guest/initramfs.cpio",
        "/usr/local/lib/systemd/system/tern.service",
        "/usr/local/share/man/man1/tern.1.gz",
        "/usr/local/share/man/man1/tern-serve.1.gz",
        "/usr/local/share/bash-completion/completions/tern",
        "/usr/local/share/doc/tern/install.md",
    ] {
        assert!(found.contains(file), "no {file} in {found:#?}");
    }
    assert_eq!(mode(&at("usr/local/bin/tern")), 0o755);
    assert_eq!(mode(&at("etc/tern/tern.toml")), 0o644);

    // The installed program takes the installed configuration; what is wrong in it is told, and by a status of its own.
    let tern = at("usr/local/bin/tern");
    let config = at("etc/tern/tern.toml");
    let check = || {
        let arguments = ["serve", "--check-config", "--config"];
        Command::new(&tern)
            .args(arguments)
            .arg(&config)
            .output()
            .unwrap()
    };
    let right = check();
    assert!(right.status.success(), "{}", said(&right));
    std::fs::write(&config, "\nautostop_aftr = \"1m\"\n").unwrap();
    let wrong = check();
    assert_eq!(wrong.status.code(), Some(2));
    let told = said(&wrong);
    assert!(
        told.contains("line 2: there is no key `autostop_aftr`; did you mean `autostop_after`?"),
        "{told}"
    );

    // What an administrator wrote stays at the next installation.
    package("install", tree);
    let kept = std::fs::read_to_string(&config).unwrap();
    assert!(kept.contains("autostop_aftr"), "{kept}");
    assert!(at("etc/tern/tern.toml.new").exists());

    the_unit_is_accepted(tree);
    the_package_is_whole(tree);

    package("uninstall", tree);
    assert_eq!(
        files(tree),
        BTreeSet::from(["/etc/tern/tern.toml".to_owned()])
    );
    assert!(!at("usr/local/lib/tern").exists());
}

fn the_unit_is_accepted(tree: &Path) {
    let unit = tree.join("usr/local/lib/systemd/system/tern.service");
    let text = std::fs::read_to_string(&unit).unwrap();
    assert!(
        text.contains("ExecStart=/usr/local/bin/tern serve"),
        "{text}"
    );
    // Where the program is now, for systemd wants to see it.
    let program = tree.join("usr/local/bin/tern");
    let judged = tempfile::tempdir().unwrap();
    let judged = judged.path().join("tern.service");
    let here = text.replace("/usr/local/bin/tern", program.to_str().unwrap());
    std::fs::write(&judged, here).unwrap();
    let judged = judged.to_str().unwrap();
    let verified = run("systemd-analyze", &["verify", "--man=no", judged]);
    // A key that it does not know is a warning to systemd, and a mistake to us.
    assert!(
        verified.status.success() && said(&verified).is_empty(),
        "{}",
        said(&verified)
    );
    // In tenths; 5.5 with systemd 252. It is to be shown, and never to get much worse.
    let security = run(
        "systemd-analyze",
        &["security", "--offline=true", "--threshold=60", judged],
    );
    println!("{}", said(&security));
    assert!(security.status.success(), "{}", said(&security));
}

fn the_package_is_whole(tree: &Path) {
    let made = package("deb", tree);
    let deb = String::from_utf8(made.stdout).unwrap();
    let deb = deb.trim();
    let contents = said(&run("dpkg-deb", &["--contents", deb]));
    for file in [
        "./etc/tern/tern.toml",
        "./usr/bin/tern",
        "./usr/lib/tern/tern-vmm",
        "./usr/lib/tern/guest/initramfs.cpio",
        "./usr/lib/systemd/system/tern.service",
    ] {
        let line = contents.lines().find(|line| line.ends_with(file));
        let line = line.unwrap_or_else(|| panic!("no {file} in {contents}"));
        assert!(line.contains("root/root"), "{line}");
    }
    assert!(!contents.contains("/usr/local"), "{contents}");
    let field = |name: &str| said(&run("dpkg-deb", &["--field", deb, name]));
    assert_eq!(field("Version").trim(), env!("CARGO_PKG_VERSION"));
    assert!(field("Depends").contains("libc6"), "{}", field("Depends"));
    assert!(!field("Description").contains('@'));
    let info = |file: &str| said(&run("dpkg-deb", &["--info", deb, file]));
    assert_eq!(info("conffiles").trim(), "/etc/tern/tern.toml");
    for script in ["postinst", "prerm", "postrm"] {
        assert!(info(script).starts_with("#!/bin/sh"), "{}", info(script));
    }
    std::fs::remove_file(deb).unwrap();
}
