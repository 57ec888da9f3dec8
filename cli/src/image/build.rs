//! Builds an image with `buildah`.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

use super::Layout;
use crate::appconfig::Build;

/// Builds the Dockerfile in `context` and writes the image to the empty directory `output`. What
/// `buildah` says goes to standard error as it comes.
pub async fn build(context: &Path, build: &Build, name: &str, output: &Path) -> Result<Layout> {
    let dockerfile = context.join(build.dockerfile.as_deref().unwrap_or("Dockerfile"));
    if !dockerfile.is_file() {
        bail!(
            "there is no {}; write one, name it in [build] dockerfile, or give --image",
            dockerfile.display()
        );
    }
    let reference = format!("localhost/tern/{name}");
    let mut command = buildah();
    command.args([
        "build",
        "--isolation",
        "chroot",
        "--layers",
        "--format",
        "oci",
        "--tag",
        &reference,
    ]);
    command.arg("--file").arg(&dockerfile);
    if let Some(ignorefile) = &build.ignorefile {
        command.arg("--ignorefile").arg(context.join(ignorefile));
    }
    if let Some(target) = &build.build_target {
        command.args(["--target", target]);
    }
    for (key, value) in &build.args {
        command.args(["--build-arg", &format!("{key}={value}")]);
    }
    command.arg(context);
    run(command, "build the image").await?;

    let mut command = buildah();
    // Uncompressed layers: the registry is near, and compressing would be the longest step.
    command.args([
        "push",
        "--quiet",
        "--format",
        "oci",
        "--disable-compression",
        &reference,
    ]);
    command.arg(format!("oci:{}:latest", output.display()));
    run(command, "write the image").await?;
    Layout::open(output, None)
}

fn buildah() -> Command {
    let mut command = Command::new("buildah");
    // What it says goes to people; standard output stays for `--json`.
    command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .kill_on_drop(true);
    command
}

async fn run(mut command: Command, what: &str) -> Result<()> {
    let status = match command.status().await {
        Ok(status) => status,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!(
                "buildah is needed to build images and is not installed; run `apt-get install buildah`"
            )
        }
        Err(e) => return Err(e).context("buildah cannot be started"),
    };
    if !status.success() {
        bail!("buildah could not {what} ({status}); what it said is above");
    }
    Ok(())
}
