//! `tern-image`: converts OCI images to disks by hand, and shows what has been converted.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tern_image::{
    Credentials, Digest, Image, ImageStore, Limits, Progress, Reference, RegistryOptions, Source,
};

/// Turn OCI images into read-only EROFS disks.
#[derive(Debug, Parser)]
#[command(name = "tern-image", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert an image, unless the output directory has its disk already.
    Convert(Convert),
    /// Show the images that have been converted into a directory.
    Inspect(Inspect),
}

#[derive(Debug, Args)]
struct Convert {
    #[command(flatten)]
    from: From,
    /// Speak plain HTTP to the registry.
    #[arg(long, requires = "registry")]
    insecure: bool,
    /// User name and password for the registry.
    #[arg(
        long,
        value_name = "USER:PASSWORD",
        env = "TERN_REGISTRY_CREDS",
        hide_env_values = true
    )]
    creds: Option<String>,
    /// The directory to write `sha256-….erofs` and `sha256-….json` to.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Print the result as JSON and show no progress.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct From {
    /// An OCI image layout: a directory or a tar archive, with the image's tag if it has several.
    #[arg(long, value_name = "PATH[:TAG]")]
    layout: Option<String>,
    /// An image in a registry, like `127.0.0.1:5000/hello:1` or `debian@sha256:…`.
    #[arg(long, value_name = "REFERENCE")]
    registry: Option<Reference>,
}

#[derive(Debug, Args)]
struct Inspect {
    /// The directory that images were converted into.
    dir: PathBuf,
    /// Only the image whose manifest has this digest.
    digest: Option<Digest>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("TERN_LOG"))
        .with_writer(std::io::stderr)
        .init();
    match Arguments::parse().command {
        Command::Convert(arguments) => convert(arguments).await,
        Command::Inspect(arguments) => inspect(&arguments),
    }
}

async fn convert(arguments: Convert) -> Result<()> {
    let source = source(&arguments)?;
    let store = ImageStore::open(&arguments.output, Limits::default())?;
    let bar = progress_bar(arguments.json);
    let shown = bar.clone();
    let image = store
        .ensure(&source, move |progress| show(&shown, &progress))
        .await
        .with_context(|| format!("cannot convert {source}"))?;
    bar.finish_and_clear();
    print(&[image], arguments.json)
}

fn source(arguments: &Convert) -> Result<Source> {
    if let Some(reference) = &arguments.from.registry {
        let credentials = arguments.creds.as_deref().map(credentials).transpose()?;
        let options = RegistryOptions {
            insecure: arguments.insecure,
            anywhere: true, // whoever runs this chose the registry
            credentials,
            ..RegistryOptions::default()
        };
        return Ok(Source::Registry {
            reference: reference.clone(),
            options,
        });
    }
    let Some(layout) = &arguments.from.layout else {
        bail!("no image given")
    };
    // A path may contain colons itself.
    let (path, tag) = match layout.rsplit_once(':') {
        Some((path, tag)) if !Path::new(layout).exists() => (path, Some(tag.to_owned())),
        _ => (layout.as_str(), None),
    };
    Ok(Source::Layout {
        path: path.into(),
        tag,
    })
}

fn credentials(text: &str) -> Result<Credentials> {
    let (username, password) = text
        .split_once(':')
        .context("credentials are USER:PASSWORD, and this has no colon")?;
    Ok(Credentials {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

fn inspect(arguments: &Inspect) -> Result<()> {
    if !arguments.dir.is_dir() {
        bail!("{} is not a directory", arguments.dir.display());
    }
    let store = ImageStore::open(&arguments.dir, Limits::default())?;
    let images = match &arguments.digest {
        None => store.list()?,
        Some(digest) => vec![
            store
                .get(digest)?
                .with_context(|| format!("{digest} has not been converted here"))?,
        ],
    };
    print(&images, arguments.json)
}

fn progress_bar(hidden: bool) -> ProgressBar {
    let target = if hidden {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let style = ProgressStyle::with_template(
        "{msg:24} [{bar:40}] {bytes:>10}/{total_bytes} {bytes_per_sec}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(0), target)
        .with_style(style.progress_chars("=> "))
        .with_message("finding the image")
}

fn show(bar: &ProgressBar, progress: &Progress) {
    match progress {
        Progress::Resolved { bytes, .. } => bar.set_length(*bytes),
        Progress::Reading { layer, bytes } => {
            bar.set_message(format!("reading layer {layer}"));
            bar.set_position(*bytes);
        }
        Progress::Writing { bytes, total } => {
            bar.set_message("writing the disk");
            bar.set_length(*total);
            bar.set_position(*bytes);
        }
        _ => {}
    }
}

fn print(images: &[Image], as_json: bool) -> Result<()> {
    if as_json {
        for image in images {
            let object = json!({
                "digest": image.digest, "disk": image.disk, "size": image.size, "config": image.config,
            });
            println!("{object}");
        }
        return Ok(());
    }
    for image in images {
        println!("{}", image.digest);
        println!(
            "  disk        {} ({} bytes)",
            image.disk.display(),
            image.size
        );
        println!("  runs        {:?}", image.config.argv());
        let or = |text: &str, default: &str| {
            if text.is_empty() {
                default.to_owned()
            } else {
                text.to_owned()
            }
        };
        println!("  as          {}", or(&image.config.user, "root"));
        println!("  in          {}", or(&image.config.working_dir, "/"));
        let ports: Vec<&str> = image
            .config
            .exposed_ports
            .iter()
            .map(String::as_str)
            .collect();
        println!("  listens on  {}", or(&ports.join(" "), "-"));
        for variable in &image.config.env {
            println!("  env         {variable}");
        }
    }
    Ok(())
}
