//! Tokens for the API: for whom one speaks, what it may do there, and until when.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{AppName, OrgSlug, Record};

/// A bearer token; only its hash is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// SHA-256 of the token, hexadecimal.
    pub hash: String,
    /// Its name, for people.
    pub name: String,
    /// The organization it speaks for; `None` with [`Scope::Full`] may do everything.
    pub organization: Option<OrgSlug>,
    /// What it may do there. Records from before there were scopes have none: those may do all.
    #[serde(default)]
    pub scope: Scope,
    /// When it was made.
    pub created_at: Timestamp,
    /// From when on it is good no more; `None` is never.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// The hash of the token that asked for this one, which is good no longer than that.
    #[serde(default)]
    pub parent: Option<String>,
    /// Its last characters, by which its owner knows it in a list; too few to guess the rest by.
    #[serde(default)]
    pub tail: String,
}

/// What a token may do in its organization.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Scope {
    /// Everything.
    #[default]
    Full,
    /// See everything, change nothing.
    Read,
    /// Deploy these apps and see them.
    Deploy {
        /// Which.
        apps: TokenApps,
    },
    /// Run commands in the Machines of these apps, and see them.
    MachineExec {
        /// Which.
        apps: TokenApps,
    },
}

/// Apps of the token's organization, and when each was made: a later one of the same name is not meant.
pub type TokenApps = BTreeMap<AppName, Timestamp>;

impl Token {
    /// Whether it has ended.
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }
}

impl Scope {
    /// The apps that it is limited to, where it is.
    pub fn apps(&self) -> Option<&TokenApps> {
        match self {
            Self::Full | Self::Read => None,
            Self::Deploy { apps } | Self::MachineExec { apps } => Some(apps),
        }
    }
}

impl Record for Token {
    const PREFIX: &'static str = "tokens/";
    fn id(&self) -> String {
        self.hash.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_from_before_there_were_scopes_means_what_it_meant() {
        let old = r#"{"hash":"ab","name":"ci","organization":"personal","created_at":"2026-01-01T00:00:00Z"}"#;
        let token: Token = serde_json::from_str(old).unwrap();
        assert_eq!(token.scope, Scope::Full);
        assert!(!token.has_expired(Timestamp::MAX));
        assert_eq!((token.parent, token.tail), (None, String::new()));
    }

    #[test]
    fn a_scope_that_is_not_known_is_no_token() {
        for scope in [
            r#"{"kind":"everything"}"#,
            r#"{"kind":"deploy"}"#,
            "{}",
            "null",
        ] {
            let new = format!(
                r#"{{"hash":"ab","name":"ci","organization":"personal","scope":{scope},"created_at":"2026-01-01T00:00:00Z"}}"#
            );
            assert!(serde_json::from_str::<Token>(&new).is_err(), "{scope}");
        }
    }

    #[test]
    fn a_token_ends_at_its_end() {
        let mut token: Token = serde_json::from_str(
            r#"{"hash":"ab","name":"ci","organization":null,"created_at":"2026-01-01T00:00:00Z"}"#,
        )
        .unwrap();
        let end = Timestamp::from_second(100).unwrap();
        token.expires_at = Some(end);
        assert!(!token.has_expired(Timestamp::from_second(99).unwrap()));
        assert!(token.has_expired(end));
    }
}
