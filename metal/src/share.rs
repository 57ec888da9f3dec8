//! Which directories of the outer machine are seen inside, and where.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// A directory of the outer machine, made visible inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Directory outside.
    pub outer: PathBuf,
    /// Where it is inside.
    pub inner: PathBuf,
    /// Whether the host may not write to it.
    pub read_only: bool,
}

impl Share {
    /// A directory at the same path inside.
    pub fn same(path: &Path, read_only: bool) -> Self {
        Self {
            outer: path.to_owned(),
            inner: path.to_owned(),
            read_only,
        }
    }
}

impl FromStr for Share {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (paths, read_only) = match text.rsplit_once(':') {
            Some((paths, "ro")) => (paths, true),
            Some((paths, "rw")) => (paths, false),
            _ => (text, false),
        };
        let (outer, inner) = paths.split_once(':').unwrap_or((paths, paths));
        ensure!(!outer.is_empty(), "expected HOSTDIR[:GUESTDIR][:ro]");
        ensure!(
            !inner.contains(':'),
            "expected HOSTDIR[:GUESTDIR][:ro], with no other colons"
        );
        let outer = std::path::absolute(outer).context("cannot make the path absolute")?;
        let inner = if paths.contains(':') {
            PathBuf::from(inner)
        } else {
            outer.clone()
        };
        check_inner(&inner)?;
        Ok(Self {
            outer,
            inner,
            read_only,
        })
    }
}

/// Refuses mount points that would take the host apart.
pub fn check_inner(path: &Path) -> Result<()> {
    let shown = path.display();
    ensure!(
        path.is_absolute(),
        "the directory inside, {shown}, must be absolute"
    );
    ensure!(
        path.components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_))),
        "the directory inside, {shown}, must not contain `..`"
    );
    let own = "is the host's own: choose another directory";
    for taken in ["/", "/root", "/run", "/tmp", "/var", "/var/lib"] {
        ensure!(path != Path::new(taken), "{taken} {own}");
    }
    for taken in [
        "/bin",
        "/dev",
        "/etc",
        "/lib",
        "/lib64",
        "/proc",
        "/run/tern-metal",
        "/sbin",
        "/sys",
        "/usr",
        "/var/lib/tern",
    ] {
        ensure!(!path.starts_with(taken), "{taken} {own}");
    }
    Ok(())
}

/// All shares of one host: later ones replace earlier ones with the same place inside, and each
/// comes after those it lies in, which is the order to mount them.
pub fn arrange(shares: impl IntoIterator<Item = Share>) -> Result<Vec<Share>> {
    let mut arranged: Vec<Share> = Vec::new();
    for share in shares {
        let outer = share.outer.display();
        let metadata = std::fs::metadata(&share.outer)
            .with_context(|| format!("cannot share {outer} (missing? then make it first)"))?;
        if !metadata.is_dir() {
            bail!("cannot share {outer}: it is not a directory");
        }
        arranged.retain(|other| other.inner != share.inner);
        arranged.push(share);
    }
    arranged.sort_by_key(|share| share.inner.components().count());
    Ok(arranged)
}

/// Where `path` of the outer machine is inside, if it is.
pub fn inside(shares: &[Share], path: &Path) -> Option<PathBuf> {
    shares
        .iter()
        .filter_map(|share| Some((share, path.strip_prefix(&share.outer).ok()?)))
        .min_by_key(|(_, rest)| rest.components().count())
        .map(|(share, rest)| share.inner.join(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(outer: &str, inner: &str, read_only: bool) -> Share {
        Share {
            outer: outer.into(),
            inner: inner.into(),
            read_only,
        }
    }

    #[test]
    fn reads_what_users_write() {
        for (text, expected) in [
            ("/a:/b", share("/a", "/b", false)),
            ("/a:/b:ro", share("/a", "/b", true)),
            ("/a:/b:rw", share("/a", "/b", false)),
            ("/a", share("/a", "/a", false)),
            ("/a:ro", share("/a", "/a", true)),
        ] {
            assert_eq!(text.parse::<Share>().unwrap(), expected, "{text}");
        }
        let relative: Share = "x:/b".parse().unwrap();
        assert_eq!(relative.outer, std::env::current_dir().unwrap().join("x"));
    }

    #[test]
    fn refuses_what_would_break_the_host() {
        for text in [
            "",
            ":/b",
            "/a:b",
            "/a:/",
            "/a:/usr/bin",
            "/a:/proc/x",
            "/a:/b/../etc",
            "/a:/b:c",
            "/a:",
        ] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }

    #[test]
    fn outer_directories_are_mounted_first_and_later_shares_win() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_str().unwrap();
        let arranged = arrange([
            share(at, "/x/y/z", true),
            share(at, "/x", true),
            share(at, "/x/y/z", false),
        ])
        .unwrap();
        assert_eq!(
            arranged,
            [share(at, "/x", true), share(at, "/x/y/z", false)]
        );
        assert!(arrange([share("/nonexistent", "/x", true)]).is_err());
    }

    #[test]
    fn finds_the_place_of_a_directory_inside() {
        let shares = [
            share("/work", "/w", true),
            share("/work/out", "/results", false),
        ];
        let find = |path| inside(&shares, Path::new(path));
        assert_eq!(find("/work/a"), Some("/w/a".into()));
        assert_eq!(find("/work/out/b"), Some("/results/b".into()));
        assert_eq!(find("/elsewhere"), None);
    }
}
