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
        Self::choose(global, Settings::load(&Settings::path()?)?, admin_token)
    }

    /// A token is sent to no address but the one it is for: a saved one to that which was saved with it, this
    /// server's own to this machine.
    fn choose(
        global: &Global,
        saved: Settings,
        admin_token: impl FnOnce() -> Option<String>,
    ) -> Result<Self> {
        let known = saved.api_url.as_deref().unwrap_or(DEFAULT_URL).to_owned();
        let url = global.api_url.clone().unwrap_or_else(|| known.clone());
        let origin = origin(&url)?;
        let its_own = self::origin(&known).is_ok_and(|known| known == origin);
        let saved_for_another = saved.token.is_some() && !its_own;
        let token = global
            .token
            .clone()
            .or(saved.token.filter(|_| its_own))
            .or_else(|| is_this_machine(&origin.1).then(admin_token)?);
        let Some(token) = token else {
            let not_sent = if saved_for_another {
                format!(" (the saved one is for {known} and goes nowhere else)")
            } else {
                String::new()
            };
            bail!(
                "no token for {url}{not_sent}: give --token or TERN_API_TOKEN, or save one with `tern auth login`. \
                 The server's first token is in {DEFAULT_DATA_DIR}/{ADMIN_TOKEN_FILE} there"
            );
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

/// Scheme, host and port of an API's address. One that has none would fail at the first call, with words that name
/// neither the setting nor its form.
fn origin(url: &str) -> Result<(String, String, u16)> {
    let parsed: Option<http::Uri> = url.parse().ok();
    let origin = parsed.and_then(|uri| {
        let scheme = uri
            .scheme_str()
            .filter(|s| matches!(*s, "http" | "https"))?;
        let host = uri.host().filter(|host| !host.is_empty())?;
        let usual = if scheme == "https" { 443 } else { 80 };
        let port = uri.port_u16().unwrap_or(usual);
        Some((scheme.to_owned(), host.to_ascii_lowercase(), port))
    });
    if let Some(origin) = origin {
        return Ok(origin);
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

/// Whether a host of an address can only be this machine.
fn is_this_machine(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address: Option<std::net::IpAddr> = bare.parse().ok();
    host == "localhost" || address.is_some_and(|ip| ip.to_canonical().is_loopback())
}

fn admin_token() -> Option<String> {
    let data = std::env::var_os("TERN_DATA_DIR")
        .or_else(|| crate::config::data_dir().map(Into::into))
        .unwrap_or_else(|| DEFAULT_DATA_DIR.into());
    std::fs::read_to_string(Path::new(&data).join(ADMIN_TOKEN_FILE)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_its_scheme_is_told_with_the_variable_and_the_form() {
        for good in [DEFAULT_URL, "https://tern.example", "http://[::1]:4280/"] {
            assert!(origin(good).is_ok(), "{good}");
        }
        let error = origin("127.0.0.1:14280").unwrap_err().to_string();
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
            assert!(origin(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_sent_to_no_address_but_its_own() {
        let saved = |url: Option<&str>| Settings {
            api_url: url.map(str::to_owned),
            token: Some("saved".to_owned()),
        };
        let sent = |url: Option<&str>, token: Option<&str>, saved| {
            let global = Global {
                api_url: url.map(str::to_owned),
                token: token.map(str::to_owned),
            };
            let target = Target::choose(&global, saved, || Some("admin".to_owned()));
            target.map(|target| target.token).map_err(|e| e.to_string())
        };
        let ours = Some("https://tern.example");
        let of = |token: &str| Ok(token.to_owned());
        assert_eq!(sent(None, None, saved(ours)), of("saved"));
        assert_eq!(
            sent(Some("https://TERN.example:443/"), None, saved(ours)),
            of("saved")
        );
        for elsewhere in [
            "https://evil.example",
            "http://tern.example",
            "https://tern.example:8443",
            "https://tern.example@evil.example",
            "http://127.0.0.1.evil.example:4280",
        ] {
            let error = sent(Some(elsewhere), None, saved(ours)).unwrap_err();
            assert!(error.contains("is for https://tern.example"), "{error}");
            assert_eq!(
                sent(Some(elsewhere), Some("given"), saved(ours)),
                of("given")
            );
            assert!(sent(Some(elsewhere), None, Settings::default()).is_err());
        }
        for here in [
            "http://127.0.0.1:4280",
            "http://[::1]:1",
            "http://localhost",
        ] {
            assert_eq!(sent(Some(here), None, Settings::default()), of("admin"));
        }
        assert_eq!(sent(None, None, Settings::default()), of("admin"));
    }
}
