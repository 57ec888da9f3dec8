//! Who runs the program: `user[:group]` looked up in the guest's own files.
//!
//! As OCI runtimes do: names come from the image's `/etc/passwd` and `/etc/group`, a missing name is
//! an error, a number needs no entry. A named user without a group brings all its groups along.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A user as the kernel knows it, and its home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The home directory.
    pub home: String,
}

/// Why there is no such user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No line in `/etc/passwd`.
    #[error("user {0:?} is not in the image's /etc/passwd")]
    NoUser(String),
    /// No line in `/etc/group`.
    #[error("group {0:?} is not in the image's /etc/group")]
    NoGroup(String),
    /// A file that cannot be read.
    #[error("{0}: {1}")]
    Read(&'static str, #[source] io::Error),
}

/// Looks up `user[:group]` in the files under `root`. Empty means root.
pub fn lookup(root: &Path, spec: &str) -> Result<Account, UserError> {
    let passwd = read(root, "etc/passwd")?;
    let group = read(root, "etc/group")?;
    resolve(spec, &passwd, &group)
}

fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Account, UserError> {
    let (user, group_name) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = passwd.lines().filter_map(PasswdEntry::parse).find(|entry| {
        // A name that looks like a number is taken for the name first.
        entry.name == user
    });
    let entry = entry.or_else(|| {
        let uid: u32 = user.parse().ok()?;
        passwd
            .lines()
            .filter_map(PasswdEntry::parse)
            .find(|entry| entry.uid == uid)
    });
    let (uid, primary, name, home) = match &entry {
        Some(entry) => (entry.uid, entry.gid, Some(entry.name), entry.home),
        None => match user.parse() {
            Ok(uid) => (uid, 0, None, ""),
            Err(_) => return Err(UserError::NoUser(user.to_string())),
        },
    };
    let (gid, groups) = match group_name {
        Some(name) => (find_group(name, group)?, Vec::new()),
        None => (
            primary,
            name.map(|name| groups_of(name, group)).unwrap_or_default(),
        ),
    };
    let home = if home.starts_with('/') { home } else { "/" };
    Ok(Account {
        uid,
        gid,
        groups,
        home: home.to_string(),
    })
}

fn find_group(name: &str, group: &str) -> Result<u32, UserError> {
    let entries = || group.lines().filter_map(GroupEntry::parse);
    entries()
        .find(|entry| entry.name == name)
        .map(|entry| entry.gid)
        .or_else(|| name.parse().ok())
        .ok_or_else(|| UserError::NoGroup(name.to_string()))
}

fn groups_of(user: &str, group: &str) -> Vec<u32> {
    let entries = group.lines().filter_map(GroupEntry::parse);
    let member = entries.filter(|entry| entry.members.split(',').any(|member| member == user));
    let mut groups: Vec<u32> = member.map(|entry| entry.gid).collect();
    groups.truncate(MAX_GROUPS);
    groups
}

/// A line of `passwd(5)`.
struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> PasswdEntry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let _comment = fields.next();
        Some(Self {
            name,
            uid,
            gid,
            home: fields.next().unwrap_or_default(),
        })
    }
}

/// A line of `group(5)`.
struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> GroupEntry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    }
}

/// The text of a file under `root`; a missing one is empty.
fn read(root: &Path, path: &'static str) -> Result<String, UserError> {
    let mut bytes = Vec::new();
    // A FIFO would be waited for: O_NONBLOCK opens it, to find what it is.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    match options.open(root.join(path)) {
        Ok(file) => match file.metadata() {
            Ok(found) if found.is_file() => file.take(MAX_FILE).read_to_end(&mut bytes),
            Ok(_) => Err(io::Error::other("not a regular file")),
            Err(error) => Err(error),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
    .map_err(|error| UserError::Read(path, error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `NGROUPS_MAX` of the kernel.
const MAX_GROUPS: usize = 65_536;

/// More users than any image has.
const MAX_FILE: u64 = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        # a comment\nbroken line\n+::::::\n\
        www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
        app:x:1000:1001::/home/app:\n77:x:78:79::relative:\nshort:x:5:6\n";
    const GROUP: &str =
        "root:x:0:\nwww-data:x:33:app\nadm:x:4:syslog,app\napp:x:1001:\nbad:x:y:app\n";

    fn account(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let account = resolve(spec, PASSWD, GROUP).unwrap();
        (account.uid, account.gid, account.groups, account.home)
    }

    #[test]
    fn names_bring_their_groups() {
        assert_eq!(
            account("app"),
            (1000, 1001, vec![33, 4], "/home/app".into())
        );
        assert_eq!(
            account("1000"),
            (1000, 1001, vec![33, 4], "/home/app".into())
        );
        assert_eq!(account(""), (0, 0, vec![], "/root".into()));
        assert_eq!(account("short"), (5, 6, vec![], "/".into()));
    }

    #[test]
    fn an_explicit_group_stands_alone() {
        assert_eq!(account("app:adm"), (1000, 4, vec![], "/home/app".into()));
        assert_eq!(
            account("app:1234"),
            (1000, 1234, vec![], "/home/app".into())
        );
        assert_eq!(account("app:"), account("app"));
        assert_eq!(account(":adm"), (0, 4, vec![], "/root".into()));
    }

    #[test]
    fn numbers_need_no_entry() {
        assert_eq!(account("4242"), (4242, 0, vec![], "/".into()));
        assert_eq!(account("4242:4243"), (4242, 4243, vec![], "/".into()));
        assert_eq!(
            account("77"),
            (78, 79, vec![], "/".into()),
            "a name that looks like a number"
        );
    }

    #[test]
    fn missing_names_are_errors() {
        for spec in ["nobody", "-1", "4294967296", "app:nogroup", "a b"] {
            assert!(resolve(spec, PASSWD, GROUP).is_err(), "{spec}");
        }
        let error = resolve("nobody", PASSWD, GROUP).unwrap_err().to_string();
        assert_eq!(error, "user \"nobody\" is not in the image's /etc/passwd");
    }

    #[test]
    fn what_is_no_file_is_an_error_and_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let path = root.path().join("etc/group");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(lookup(root.path(), "0")));
        let outcome = told.recv_timeout(Duration::from_secs(20)).unwrap();
        let error = outcome.unwrap_err().to_string();
        assert_eq!(error, "etc/group: not a regular file");
    }

    #[test]
    fn an_image_without_files_has_only_numbers() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(lookup(empty.path(), "").unwrap().home, "/");
        assert_eq!(lookup(empty.path(), "65532:65532").unwrap().gid, 65532);
        assert!(lookup(empty.path(), "app").is_err());
    }
}
