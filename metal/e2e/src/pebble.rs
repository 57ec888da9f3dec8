//! Debian's `pebble`: a real ACME server, with its bad-nonce and random-wait behaviours left on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rcgen::{CertifiedKey, generate_simple_self_signed};

use crate::process::{Background, run, wait_for};
use crate::world::PATIENCE;

/// Where the directory is.
pub const DIRECTORY: &str = "https://localhost:14000/dir";
const MANAGEMENT: &str = "https://localhost:15000";

/// A running CA.
#[derive(Debug)]
pub struct Pebble {
    process: Background,
    /// Certificate of the directory's own TLS: what an ACME client must trust.
    pub directory_ca: PathBuf,
    /// Root of the certificates it issues: what a browser must trust.
    pub issued_root: PathBuf,
}

impl Pebble {
    /// Starts it; it validates names on ports 80 and 443 of the addresses that `/etc/hosts` gives.
    /// `validity` is that of the certificates it issues.
    pub fn start(dir: &Path, validity: Duration) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        let directory_ca = dir.join("directory.pem");
        let key = dir.join("directory.key");
        std::fs::write(&directory_ca, cert.pem())?;
        std::fs::write(&key, signing_key.serialize_pem())?;
        let config = dir.join("pebble.json");
        let text = serde_json::json!({"pebble": {
            "listenAddress": "127.0.0.1:14000",
            "managementListenAddress": "127.0.0.1:15000",
            "certificate": directory_ca,
            "privateKey": key,
            "httpPort": 80,
            "tlsPort": 443,
            "certificateValidityPeriod": validity.as_secs(),
        }});
        std::fs::write(&config, text.to_string())?;
        let mut process = Background::start(
            "pebble",
            Command::new("pebble").arg("-config").arg(&config),
            &dir.join("pebble.log"),
        )?;
        let issued_root = dir.join("root.pem");
        let pem = wait_for("pebble answers", PATIENCE, || {
            process.must_run()?;
            let url = format!("{MANAGEMENT}/roots/0");
            let ca = directory_ca.to_str().context("a path that is not UTF-8")?;
            run("curl", ["-sf", "--max-time", "5", "--cacert", ca, &url]).map(Some)
        })?;
        std::fs::write(&issued_root, pem)?;
        Ok(Self {
            process,
            directory_ca,
            issued_root,
        })
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        self.process.log()
    }
}
