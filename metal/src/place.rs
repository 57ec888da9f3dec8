//! Where `tern-metal` was called: the checkout, what was built in it, and what of the caller's
//! environment goes along.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::share::{Share, check_inner};

/// Variables that go along by themselves: what Cargo, its test runners and our own programs read
/// (except `TERN_METAL*`, which are about this program out here).
const PASSED: [&str; 6] = [
    "CARGO_BIN_EXE_",
    "CARGO_MANIFEST_",
    "CARGO_PKG_",
    "NEXTEST",
    "RUST_",
    "TERN_",
];

/// The caller's surroundings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Working directory.
    pub cwd: PathBuf,
    /// Root of the workspace that the caller is in; else the working directory.
    pub checkout: PathBuf,
    /// Where Cargo puts what it builds.
    pub target: PathBuf,
    /// The directory of this very program.
    pub own: Option<PathBuf>,
}

impl Place {
    /// Looks around.
    pub fn discover() -> Result<Self> {
        let cwd = env::current_dir().context("the working directory is gone")?;
        let checkout = checkout(&cwd);
        let target = match env::var_os("CARGO_TARGET_DIR").filter(|path| !path.is_empty()) {
            Some(path) => cwd.join(path),
            None => checkout.join("target"),
        };
        let own = env::current_exe()
            .ok()
            .and_then(|exe| exe.parent().map(Path::to_owned));
        Ok(Self {
            cwd,
            checkout,
            target,
            own,
        })
    }

    /// What is shared without being asked for: the checkout, what was built, this program's own
    /// directory; all read-only.
    pub fn shares(&self) -> Vec<Share> {
        let mut shares: Vec<Share> = Vec::new();
        let wanted = [Some(&self.checkout), Some(&self.target), self.own.as_ref()];
        for path in wanted.into_iter().flatten() {
            let seen = shares.iter().any(|share| path.starts_with(&share.outer));
            // An installed tern-metal is in /usr/bin, which is another one inside.
            if path.is_dir() && !seen && check_inner(path).is_ok() {
                shares.push(Share::same(path, true));
            }
        }
        shares
    }

    /// Where results go that no one gave a directory for.
    pub fn results(&self) -> PathBuf {
        self.target.join("metal/results")
    }
}

/// The nearest workspace around `from`; else `from` itself.
fn checkout(from: &Path) -> PathBuf {
    let is_workspace = |path: &&Path| {
        std::fs::read_to_string(path.join("Cargo.toml"))
            .is_ok_and(|manifest| manifest.lines().any(|line| line.trim() == "[workspace]"))
    };
    from.ancestors()
        .find(is_workspace)
        .unwrap_or(from)
        .to_owned()
}

/// The environment of a command: what goes along by itself, and what was asked for: `NAME=VALUE`, or
/// `NAME` alone with the caller's value.
pub fn environment(
    asked: &[String],
    callers: impl IntoIterator<Item = (String, String)>,
) -> Result<BTreeMap<String, String>> {
    let callers: BTreeMap<String, String> = callers.into_iter().collect();
    let mut environment: BTreeMap<String, String> = callers
        .iter()
        .filter(|(name, _)| {
            PASSED.iter().any(|prefix| name.starts_with(prefix)) && !name.starts_with("TERN_METAL")
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    for asked in asked {
        let (name, value) = match asked.split_once('=') {
            Some((name, value)) => (name, value),
            None => match callers.get(asked) {
                Some(value) => (asked.as_str(), value.as_str()),
                None => bail!("--env {asked}: this variable is not set here; give it as {asked}=…"),
            },
        };
        ensure!(!name.is_empty(), "--env {asked}: a variable needs a name");
        environment.insert(name.to_owned(), value.to_owned());
    }
    Ok(environment)
}

/// Variables of this process that are text; others cannot be what a test runner set.
pub fn own_environment() -> impl Iterator<Item = (String, String)> {
    env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn the_environment_is_what_runners_set_and_what_was_asked_for() {
        let callers = pairs(&[
            ("HOME", "/home/u"),
            ("NEXTEST_RUN_ID", "1"),
            ("RUST_LOG", "debug"),
            ("CARGO_REGISTRY_TOKEN", "secret"),
            ("TERN_METAL", "qemu"),
        ]);
        let asked = [
            "HOME".to_owned(),
            "RUST_LOG=a=b".to_owned(),
            "EMPTY=".to_owned(),
        ];
        assert_eq!(
            environment(&asked, callers.clone())
                .unwrap()
                .into_iter()
                .collect::<Vec<_>>(),
            pairs(&[
                ("EMPTY", ""),
                ("HOME", "/home/u"),
                ("NEXTEST_RUN_ID", "1"),
                ("RUST_LOG", "a=b")
            ])
        );
        for bad in ["UNSET", "=value"] {
            assert!(
                environment(&[bad.to_owned()], callers.clone()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn the_checkout_is_the_nearest_workspace() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("checkout");
        let member = root.join("member/src");
        std::fs::create_dir_all(&member).unwrap();
        std::fs::write(root.join("Cargo.toml"), "[workspace]\nmembers = []\n").unwrap();
        std::fs::write(root.join("member/Cargo.toml"), "[package]\n").unwrap();
        assert_eq!(checkout(&member), root);
        assert_eq!(checkout(dir.path()), dir.path());
    }

    #[test]
    fn shares_no_directory_twice() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("checkout/target/debug")).unwrap();
        std::fs::create_dir_all(at("elsewhere/debug")).unwrap();
        let mut place = Place {
            cwd: at("checkout"),
            checkout: at("checkout"),
            target: at("checkout/target"),
            own: Some(at("checkout/target/debug")),
        };
        assert_eq!(place.shares(), [Share::same(&at("checkout"), true)]);
        place.target = at("elsewhere");
        place.own = Some(at("elsewhere/debug"));
        assert_eq!(
            place.shares(),
            [
                Share::same(&at("checkout"), true),
                Share::same(&at("elsewhere"), true)
            ]
        );
        place.own = Some("/usr/bin".into());
        place.checkout = "/".into();
        assert_eq!(place.shares(), [Share::same(&at("elsewhere"), true)]);
    }
}
