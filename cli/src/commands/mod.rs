//! What each user command does.

mod apps;
mod auth;
mod certs;
mod deploy;
mod exec;
mod hosts;
mod launch;
mod logs;
mod machine;
mod orgs;
mod scale;
mod secrets;
mod status;
#[cfg(test)]
mod testing;
mod tokens;
mod volumes;
mod wire;
mod wireguard;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use tern_catalog::AppName;

use crate::appconfig::{AppConfig, Loaded};
use crate::args::{AppArg, Command, Config, Global};
use crate::client::Client;
use crate::settings::Target;

/// Runs a user command.
pub fn run(command: Command, global: &Global) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let outcome = tokio::select! {
            outcome = dispatch(command, global) => outcome,
            // Exit as a shell expects of a program that was interrupted; children end by kill_on_drop.
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
        };
        deploy::cleaned_up().await;
        outcome
    })
}

async fn dispatch(command: Command, global: &Global) -> Result<ExitCode> {
    match &command {
        Command::Auth(auth) => return auth::run(auth, global).await,
        Command::Config(Config::Validate(app)) => return validate(app),
        _ => {}
    }
    let client = Client::new(Target::find(global)?)?;
    match command {
        Command::Launch(args) => Box::pin(launch::run(&client, args)).await,
        Command::Deploy(args) => Box::pin(deploy::run(&client, args)).await,
        Command::Releases(args) => deploy::releases(&client, &args).await,
        Command::Rollback(args) => Box::pin(deploy::rollback(&client, &args)).await,
        Command::Secrets(args) => Box::pin(secrets::run(&client, args)).await,
        Command::Scale(args) => Box::pin(scale::run(&client, args)).await,
        Command::Status(args) => status::run(&client, &args).await,
        Command::Logs(args) => logs::run(&client, &args).await,
        Command::Apps(args) => apps::run(&client, args).await,
        Command::Machine(args) => machine::run(&client, args).await,
        Command::Volumes(args) => volumes::run(&client, args).await,
        Command::Wireguard(args) => wireguard::run(&client, args).await,
        Command::Certs(args) => certs::run(&client, args).await,
        Command::Hosts(args) => hosts::run(&client, args).await,
        Command::Orgs(args) => orgs::orgs(&client, args).await,
        Command::Tokens(args) => tokens::run(&client, args).await,
        Command::Serve(_)
        | Command::Doctor(_)
        | Command::Host(_)
        | Command::Catalog(_)
        | Command::Auth(_)
        | Command::Config(_)
        | Command::Completion { .. }
        | Command::ManPages { .. } => {
            unreachable!("handled before")
        }
    }
}

/// The app that a command is about: named by flag, or by `fly.toml`.
fn app_of(arg: &AppArg) -> Result<AppName> {
    if let Some(app) = &arg.app {
        return Ok(app.clone());
    }
    let path = config_path(&arg.config);
    if !path.exists() {
        bail!("which app? Give --app, or run this where a fly.toml is");
    }
    app_named_by(&load(&path)?)
}

fn app_named_by(loaded: &Loaded) -> Result<AppName> {
    let name = loaded.config.app.as_deref().with_context(|| {
        format!(
            "{} names no app; write `app = \"NAME\"` into it, or give --app",
            loaded.path.display()
        )
    })?;
    Ok(name.parse()?)
}

/// Reads a fly.toml and tells its warnings.
fn load(path: &Path) -> Result<Loaded> {
    let loaded = AppConfig::load(path)?;
    for warning in &loaded.warnings {
        eprintln!("Warning: {}: {warning}", path.display());
    }
    Ok(loaded)
}

/// A fly.toml given as itself or by its directory.
fn config_path(given: &Path) -> PathBuf {
    if given.is_dir() {
        given.join("fly.toml")
    } else {
        given.to_owned()
    }
}

fn validate(arg: &AppArg) -> Result<ExitCode> {
    let path = config_path(&arg.config);
    let loaded = load(&path)?;
    let base = path.parent().unwrap_or(Path::new("."));
    crate::appconfig::machine::release_config(&loaded.config, "image", base)?;
    for group in loaded.config.groups() {
        crate::appconfig::machine::machine_config(&loaded.config, &group, "image", base)?;
    }
    println!("{} is right", path.display());
    Ok(ExitCode::SUCCESS)
}
