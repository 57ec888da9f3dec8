//! Which API to speak to, and with which token: flags, then what was saved, then this server's own.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::args::Global;

/// Where `tern serve` leaves the admin token of its server, in its data directory.
pub const ADMIN_TOKEN_FILE: &str = "admin-token";

const DEFAULT_URL: &str = "http://127.0.0.1:4280";
const DEFAULT_DATA_DIR: &str = "/var/lib/tern";

/// What `tern auth login` saves.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where the API is.
    pub api_url: Option<String>,
    /// The token.
    pub token: Option<String>,
}

/// The API to speak to.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its address, without a trailing slash.
    pub url: String,
    /// The token.
    pub token: String,
}

impl Target {
    /// Finds out from flags, saved settings and this server's admin token, in this order.
    pub fn find(global: &Global) -> Result<Self> {
        let saved = Settings::load(&Settings::path()?)?;
        let url = global
            .api_url
            .clone()
            .or(saved.api_url)
            .unwrap_or_else(|| DEFAULT_URL.to_owned());
        check_url(&url)?;
        let token = match global.token.clone().or(saved.token).or_else(admin_token) {
            Some(token) => token,
            None => bail!(
                "no token for {url}: give --token or TERN_API_TOKEN, or save one with `tern auth login`. \
                 The server's first token is in {DEFAULT_DATA_DIR}/{ADMIN_TOKEN_FILE} there"
            ),
        };
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            token: token.trim().to_owned(),
        })
    }
}

impl Settings {
    /// Where they are kept.
    pub fn path() -> Result<PathBuf> {
        let base = match std::env::var_os("XDG_CONFIG_HOME") {
            Some(dir) => PathBuf::from(dir),
            None => {
                Path::new(&std::env::var_os("HOME").context("HOME is not set")?).join(".config")
            }
        };
        Ok(base.join("tern/config.toml"))
    }

    fn load(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                toml::from_str(&text).with_context(|| format!("{} is not right", path.display()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e).with_context(|| format!("{} cannot be read", path.display())),
        }
    }

    /// Writes them, readable by this user alone.
    pub fn save(&self, path: &Path) -> Result<()> {
        let parent = path.parent().context("the settings have no directory")?;
        std::fs::create_dir_all(parent)
            .with_context(|| format!("{} cannot be made", parent.display()))?;
        write_secret(path, toml::to_string(self)?.as_bytes())
            .with_context(|| format!("{} cannot be written", path.display()))
    }
}

/// Writes a file that only its owner may read, whole or not at all.
pub fn write_secret(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// What would otherwise fail at the first call, with words that name neither the setting nor its form.
fn check_url(url: &str) -> Result<()> {
    let parsed: Option<http::Uri> = url.parse().ok();
    let good = parsed.as_ref().is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty())
    });
    if good {
        return Ok(());
    }
    let form = if url.contains("://") {
        DEFAULT_URL.to_owned()
    } else {
        format!("http://{url}")
    };
    bail!(
        "\"{url}\" is not where an API can be (TERN_API_URL, --api-url, or what `tern auth login` saved); write it \
         with its scheme, as in {form}"
    )
}

fn admin_token() -> Option<String> {
    let data = std::env::var_os("TERN_DATA_DIR").unwrap_or_else(|| DEFAULT_DATA_DIR.into());
    std::fs::read_to_string(Path::new(&data).join(ADMIN_TOKEN_FILE)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_its_scheme_is_told_with_the_variable_and_the_form() {
        for good in [DEFAULT_URL, "https://tern.example", "http://[::1]:4280/"] {
            assert!(check_url(good).is_ok(), "{good}");
        }
        let error = check_url("127.0.0.1:14280").unwrap_err().to_string();
        assert!(
            error.contains("TERN_API_URL") && error.contains("http://127.0.0.1:14280"),
            "{error}"
        );
        for bad in [
            "",
            "localhost",
            "ftp://x",
            "http://",
            "tern.example/api",
            "http:// x",
        ] {
            assert!(check_url(bad).is_err(), "{bad}");
        }
    }
}
