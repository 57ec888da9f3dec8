//! Names that people and protocols write, checked once, where they enter.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} \"{given}\" is not valid: {rule}")]
pub struct NameError {
    what: &'static str,
    given: String,
    rule: &'static str,
}

impl NameError {
    /// A hostile name may be long: the error repeats only its beginning.
    pub(crate) fn new(what: &'static str, given: &str, rule: &'static str) -> Self {
        Self {
            what,
            given: given.chars().take(80).collect(),
            rule,
        }
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(given: &str) -> Result<Self, NameError> {
                let check: fn(&str) -> bool = $check;
                if check(given) {
                    Ok(Self(given.to_owned()))
                } else {
                    Err(NameError::new($what, given, $rule))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(given: String) -> Result<Self, NameError> {
                given.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name!(
    /// An app's name: one DNS label (RFC 1035 section 2.3.1), for it becomes `<app>.internal`.
    AppName, "app name", "use 1 to 63 lowercase letters, digits and dashes, starting and ending with a letter or digit",
    is_label
);
name!(
    /// An organization's slug.
    OrgSlug, "organization", "use 1 to 63 lowercase letters, digits and dashes, starting and ending with a letter or digit",
    is_label
);
name!(
    /// A WireGuard peer's name: one DNS label, for it becomes `<peer>._peer.internal`.
    PeerName, "peer name", "use 1 to 63 lowercase letters, digits and dashes, starting and ending with a letter or digit",
    is_label
);
name!(
    /// A Machine's id: 14 lowercase hexadecimal digits.
    MachineId, "machine id", "it is 14 hexadecimal digits",
    |s| s.len() == 14 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
);
name!(
    /// A volume's id: `vol_` and 16 lowercase letters and digits.
    VolumeId, "volume id", "it is vol_ and 16 lowercase letters and digits",
    |s| is_id(s, "vol_")
);
name!(
    /// A volume snapshot's id: `vs_` and 16 lowercase letters and digits.
    SnapshotId, "snapshot id", "it is vs_ and 16 lowercase letters and digits",
    |s| is_id(s, "vs_")
);
name!(
    /// A volume's name.
    VolumeName, "volume name", "use 1 to 30 lowercase letters, digits and underscores",
    |s| (1..=30).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
);
name!(
    /// A public host name, lowercase, without a trailing dot (RFC 1123 section 2.1).
    Hostname, "host name", "use lowercase DNS labels joined by dots, 253 characters at most",
    |s| s.len() <= 253 && s.contains('.') && s.split('.').all(is_label)
);
name!(
    /// A secret's name: an environment variable's (POSIX.1-2017 section 8.1, lowercase too).
    SecretName, "secret name", "use 1 to 128 letters, digits and underscores, not starting with a digit",
    |s| (1..=128).contains(&s.len())
        && !s.starts_with(|c: char| c.is_ascii_digit())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
);

impl MachineId {
    /// A new random id.
    pub fn random() -> Self {
        let bits: u64 = rand::random::<u64>() >> 8;
        Self(format!("{bits:014x}"))
    }
}

impl VolumeId {
    /// A new random id.
    pub fn random() -> Self {
        Self(random_id("vol_"))
    }
}

impl SnapshotId {
    /// A new random id.
    pub fn random() -> Self {
        Self(random_id("vs_"))
    }
}

/// Letters and digits after the prefix of an id.
const ID_DIGITS: usize = 16;

fn random_id(prefix: &str) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let bits: u128 = rand::random();
    let digits = (0..ID_DIGITS).map(|i| char::from(ALPHABET[(bits >> (i * 5) & 31) as usize]));
    prefix.chars().chain(digits).collect()
}

fn is_id(s: &str, prefix: &str) -> bool {
    let digit = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    s.strip_prefix(prefix)
        .is_some_and(|rest| rest.len() == ID_DIGITS && rest.bytes().all(digit))
}

fn is_label(s: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&s.len()) && s.bytes().all(inner) && !s.starts_with('-') && !s.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_names_are_dns_labels() {
        for good in ["a", "hello", "a-1", &"x".repeat(63)] {
            assert!(good.parse::<AppName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "a_b",
            "ä",
            "a/b",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<AppName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn machine_ids_are_fourteen_hex_digits() {
        let id = MachineId::random();
        assert_eq!(id.as_str().parse::<MachineId>().unwrap(), id);
        assert!("../../etc/pass".parse::<MachineId>().is_err());
    }

    #[test]
    fn secrets_are_named_as_environment_variables() {
        for good in ["A", "_", "DATABASE_URL", "a1", &"x".repeat(128)] {
            assert!(good.parse::<SecretName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "1A",
            "A-B",
            "A=B",
            "A/../B",
            "\u{c4}",
            "A B",
            &"x".repeat(129),
        ] {
            assert!(bad.parse::<SecretName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_of_volumes_are_theirs_alone() {
        let (volume, snapshot) = (VolumeId::random(), SnapshotId::random());
        assert_eq!(volume.as_str().parse::<VolumeId>().unwrap(), volume);
        assert_eq!(snapshot.as_str().parse::<SnapshotId>().unwrap(), snapshot);
        for bad in [
            snapshot.as_str(),
            "vol_",
            "vol_../../../../etc",
            "vol_0123456789abcdeF",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_error_names_the_rule_and_stays_short() {
        let error = "X"
            .repeat(10_000)
            .parse::<AppName>()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("lowercase letters") && error.len() < 300,
            "{error}"
        );
    }
}
