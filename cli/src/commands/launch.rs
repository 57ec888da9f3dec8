//! `tern launch`: from a directory with a Dockerfile to a running app.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use http::StatusCode;
use serde_json::Value;
use tern_catalog::AppName;

use super::{app_named_by, apps, config_path, deploy, load};
use crate::appconfig::Build;
use crate::args::{Deploy, Launch};
use crate::client::{Client, is_status};
use crate::image::{self, Layout, of_dockerfile};
use crate::output;

pub async fn run(client: &Client, mut args: Launch) -> Result<ExitCode> {
    // Holds an image that is built here, until it is deployed.
    let scratch = tempfile::tempdir().context("no temporary directory can be made")?;
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
        let port = match args.internal_port {
            Some(port) => port,
            None => {
                let mut exposed = exposed(&args.deploy)?;
                if exposed.is_empty() && args.deploy.image.is_none() && !args.no_deploy {
                    // What it is made from may expose one; that shows once it is built.
                    let directory = &args.deploy.directory;
                    let (build, name) = (Build::default(), app.as_str());
                    let built = image::build(directory, &build, name, scratch.path()).await?;
                    exposed = built.exposed;
                    args.deploy.image = Some(format!("oci:{}", scratch.path().display()));
                }
                port(&exposed)
            }
        };
        std::fs::write(&path, template(&app, port, args.deploy.image.as_deref()))
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

/// The ports that the image says its app listens on, before it is built: by its layout, or its Dockerfile.
fn exposed(deploy: &Deploy) -> Result<BTreeSet<u16>> {
    match &deploy.image {
        Some(image) => match Layout::named(image)? {
            Some(layout) => Ok(layout.exposed),
            None => Ok(BTreeSet::new()),
        },
        None => {
            let path = deploy.directory.join("Dockerfile");
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            Ok(of_dockerfile(&text, None))
        }
    }
}

/// The port to write, of those: the only one, or the one that somebody chooses.
fn port(exposed: &BTreeSet<u16>) -> u16 {
    let (port, why) = match guess(exposed) {
        Guess::Only(port) => (port, "the port that the image exposes".to_owned()),
        Guess::None(port) => (port, "the image names no port".to_owned()),
        Guess::OneOf(port) => {
            let all: Vec<String> = exposed.iter().map(u16::to_string).collect();
            let all = all.join(", ");
            let asked = output::ask(
                &format!("The image exposes {all}. Which one serves HTTP?"),
                port,
            );
            (asked, format!("the image exposes {all}"))
        }
    };
    eprintln!(
        "The app is taken to listen on {port} ({why}); internal_port in fly.toml, or --internal-port, says otherwise."
    );
    port
}

#[derive(Debug, PartialEq, Eq)]
enum Guess {
    /// There is one.
    Only(u16),
    /// There is none.
    None(u16),
    /// There are others, less likely.
    OneOf(u16),
}

fn guess(exposed: &BTreeSet<u16>) -> Guess {
    let mut ports = exposed.iter();
    match (ports.next(), ports.next()) {
        (None, _) => Guess::None(DEFAULT_PORT),
        (Some(only), None) => Guess::Only(*only),
        (Some(first), Some(_)) => {
            let usual = [DEFAULT_PORT, 80, 3000, 8000, 5000];
            let usual = usual.into_iter().find(|port| exposed.contains(port));
            Guess::OneOf(usual.unwrap_or(*first))
        }
    }
}

/// As fly.toml's own default.
const DEFAULT_PORT: u16 = 8080;

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
    fn the_port_is_the_images() {
        let of = |ports: &[u16]| guess(&ports.iter().copied().collect());
        assert_eq!(of(&[]), Guess::None(8080));
        assert_eq!(of(&[3000]), Guess::Only(3000));
        assert_eq!(of(&[3000, 9229]), Guess::OneOf(3000));
        assert_eq!(of(&[80, 443, 8080]), Guess::OneOf(8080));
        assert_eq!(of(&[1883, 9001]), Guess::OneOf(1883));
    }

    #[test]
    fn a_dockerfile_tells_the_port_before_anything_is_built() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("Dockerfile"), "FROM node\nEXPOSE 3000\n").unwrap();
        let deploy = Deploy {
            directory: dir.path().to_owned(),
            ..Deploy::default()
        };
        assert_eq!(exposed(&deploy).unwrap(), [3000].into());
    }

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
