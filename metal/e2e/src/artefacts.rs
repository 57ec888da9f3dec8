//! The programs under test and what they run: built before, found beside this test's own executable.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Artefacts {
    bin: PathBuf,
    guest: PathBuf,
    images: PathBuf,
}

impl Artefacts {
    /// Finds them; the error says which make target builds them.
    pub fn find() -> Result<Self> {
        let own = std::env::current_exe().context("this test does not know where it is")?;
        // Tests are in `debug/deps`, the demo in `debug`, and what `.ci/bench` runs in `bench`: `images` is
        // beside both.
        let bin = own
            .ancestors()
            .skip(1)
            .find(|dir| dir.join("tern").is_file())
            .with_context(|| {
                format!(
                    "there is no `tern` above {}; run `make build`",
                    own.display()
                )
            })?
            .to_owned();
        let target = bin
            .parent()
            .context("the programs are not in a target directory")?
            .to_owned();
        let found = Self {
            guest: bin.join("guest"),
            images: target.join("images"),
            bin,
        };
        for needed in [
            found.program("tern-vmm"),
            found.guest.join("vmlinux"),
            found.guest.join("initramfs.cpio"),
        ] {
            ensure!(
                needed.exists(),
                "there is no {}; run `make build`",
                needed.display()
            );
        }
        Ok(found)
    }

    /// A program of ours.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// An example's image, as an OCI layout.
    pub fn image(&self, name: &str) -> Result<PathBuf> {
        let path = self.images.join(name);
        ensure!(
            path.join("index.json").is_file(),
            "there is no image {}; run `make images`",
            path.display()
        );
        Ok(path)
    }

    /// The directory of the programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }
}
