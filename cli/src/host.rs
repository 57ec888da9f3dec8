//! `tern host`: what an operator does to the disks of a server, on that server.

use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::args::{Host, Quarantine};
use crate::output;

/// Runs one of its commands.
pub fn run(command: Host) -> Result<ExitCode> {
    let Host::Quarantine(command) = command;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(quarantine(command))?;
    Ok(ExitCode::SUCCESS)
}

async fn quarantine(command: Quarantine) -> Result<()> {
    match command {
        Quarantine::List { at, json } => {
            let found = tern_host::quarantined(&at.data_dir)
                .await
                .with_context(|| format!("{} cannot be looked at", at.data_dir.display()))?;
            if json {
                return output::json(&found);
            }
            let row = |machine: &tern_host::Quarantined| {
                let process = machine.process.map(|pid| pid.to_string());
                vec![
                    machine.id.to_string(),
                    format!("{:.0}", machine.since),
                    machine.bytes.div_ceil(1 << 20).to_string(),
                    process.unwrap_or_else(|| "-".to_owned()),
                    machine.path.display().to_string(),
                ]
            };
            let rows: Vec<_> = found.iter().map(row).collect();
            output::table(
                &["ID", "SINCE", "MIB", "PROCESS", "DIRECTORY"],
                &rows,
                "The catalog knows all Machines on this disk.",
            );
        }
        Quarantine::Purge { at, ids } => {
            for id in ids {
                tern_host::purge(&at.data_dir, &id)
                    .await
                    .with_context(|| format!("Machine {id} is not removed"))?;
                println!("Machine {id} is removed.");
            }
        }
    }
    Ok(())
}
