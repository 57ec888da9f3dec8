//! `tern auth`.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::Value;

use super::tokens;
use crate::args::{Auth, Global};
use crate::client::Client;
use crate::settings::{Settings, Target};

pub async fn run(auth: &Auth, global: &Global) -> Result<ExitCode> {
    let target = Target::find(global)?;
    let client = Client::new(target.clone())?;
    // Tells whether it is good, before it is saved.
    let own: Value = client.get("/v1/tokens/current").await?;
    match auth {
        Auth::Login => {
            let path = Settings::path()?;
            Settings {
                api_url: Some(target.url.clone()),
                token: Some(target.token),
            }
            .save(&path)?;
            eprintln!("Saved to {}", path.display());
        }
        Auth::Whoami => {
            println!("{} accepts the token", target.url);
            tokens::table(&own["tokens"]);
        }
    }
    Ok(ExitCode::SUCCESS)
}
