//! `tern launch`: from a directory with a Dockerfile to a running app.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use http::StatusCode;
use serde_json::Value;
use tern_catalog::AppName;

use super::{app_named_by, apps, config_path, deploy, load};
use crate::args::Launch;
use crate::client::{Client, is_status};

pub async fn run(client: &Client, args: Launch) -> Result<ExitCode> {
    let path = args
        .deploy
        .config
        .clone()
        .unwrap_or_else(|| config_path(&args.deploy.directory));
    let app = if path.exists() {
        let loaded = load(&path)?;
        args.deploy
            .app
            .clone()
            .map_or_else(|| app_named_by(&loaded), Ok)?
    } else {
        let app = match &args.deploy.app {
            Some(app) => app.clone(),
            None => name_from(&args.deploy.directory)?,
        };
        if args.deploy.image.is_none() && !args.deploy.directory.join("Dockerfile").is_file() {
            bail!(
                "{} has neither a fly.toml nor a Dockerfile; write a Dockerfile, or give --image",
                args.deploy.directory.display()
            );
        }
        std::fs::write(
            &path,
            template(&app, args.internal_port, args.deploy.image.as_deref()),
        )
        .with_context(|| format!("{} cannot be written", path.display()))?;
        eprintln!("Wrote {}", path.display());
        app
    };
    match client.get::<Value>(&format!("/v1/apps/{app}")).await {
        Ok(_) => eprintln!("App {app} exists already"),
        Err(e) if is_status(&e, StatusCode::NOT_FOUND) => {
            apps::create(client, app.as_str(), args.org.as_str()).await?;
            eprintln!("Made app {app}");
        }
        Err(e) => return Err(e),
    }
    if args.no_deploy {
        eprintln!("Deploy it with `tern deploy`.");
        return Ok(ExitCode::SUCCESS);
    }
    deploy::run(client, args.deploy).await
}

/// An app name made of the directory's.
fn name_from(directory: &Path) -> Result<AppName> {
    let absolute = directory
        .canonicalize()
        .with_context(|| format!("{} is not there", directory.display()))?;
    let raw = absolute
        .file_name()
        .map(|n| n.to_string_lossy().to_lowercase())
        .unwrap_or_default();
    let label: String = raw
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    label
        .trim_matches('-')
        .parse()
        .context("the directory's name makes no app name; give one with --app")
}

fn template(app: &AppName, port: u16, image: Option<&str>) -> String {
    let mut text = format!("app = \"{app}\"\n");
    // Writing to a String cannot fail.
    if let Some(image) = image.filter(|i| !i.starts_with("oci:")) {
        let _ = write!(text, "\n[build]\n  image = {image:?}\n");
    }
    let _ = write!(
        text,
        "\n[http_service]\n  internal_port = {port}\n  force_https = true\n  auto_stop_machines = \"suspend\"\n  \
         auto_start_machines = true\n  min_machines_running = 0\n\n[[vm]]\n  memory = \"256mb\"\n  cpus = 1\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::appconfig::AppConfig;

    #[test]
    fn the_file_it_writes_is_right() {
        let text = template(
            &"shop".parse().unwrap(),
            3000,
            Some("registry.internal/x:1"),
        );
        let (config, warnings) = AppConfig::parse(&text).unwrap();
        assert_eq!(warnings, []);
        assert_eq!(config.app.as_deref(), Some("shop"));
        assert_eq!(config.http_service.unwrap().internal_port, 3000);
    }
}
