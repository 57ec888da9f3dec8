//! The part of `tern-metal` that runs inside a host: its first process ([`init()`]), and the server
//! that runs commands there ([`serve()`]).

mod child;
mod group;
mod init;
mod server;
mod streams;

pub use init::init;
pub use server::serve;

use std::fs::{File, OpenOptions};
use std::io::Write;

use anyhow::{Context, Result};

use crate::plan::{Event, Plan};

/// Reports to the `tern-metal` outside.
#[derive(Debug)]
pub struct Reporter {
    line: File,
}

impl Reporter {
    /// Opens the plan's event line.
    pub fn open(plan: &Plan) -> Result<Self> {
        let line = OpenOptions::new()
            .append(true)
            .open(&plan.events)
            .with_context(|| format!("cannot open {}", plan.events.display()))?;
        Ok(Self { line })
    }

    /// Writes one event.
    pub fn report(&mut self, event: &Event) -> Result<()> {
        let mut text = serde_json::to_string(event)?;
        text.push('\n');
        self.line
            .write_all(text.as_bytes())
            .context("cannot report to the outer machine")
    }

    /// Reports that a step is done.
    pub fn phase(&mut self, name: &str) -> Result<()> {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime = uptime
            .split(' ')
            .next()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0.0);
        self.report(&Event::Phase {
            name: name.to_owned(),
            uptime,
        })
    }
}
