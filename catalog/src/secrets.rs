//! The secrets of apps. Written by the API; hosts read them when they start a Machine. Nobody sees a value but the
//! Machines: the catalog holds ciphertexts.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{AppName, Record, SealedKey, SecretName};

/// All secrets of one app. One record, so that a Machine gets those of one version and never a mixture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSecrets {
    /// The app.
    pub app: AppName,
    /// Raised by one with every change.
    pub version: u64,
    /// By name.
    pub secrets: BTreeMap<SecretName, AppSecret>,
}

/// One secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSecret {
    /// Its value, encrypted for [`AppSecrets::purpose`].
    pub sealed: SealedKey,
    /// Tells equal values from others and nothing else: it is made with the deployment's own key.
    pub digest: String,
    /// When its name was first set.
    pub created_at: Timestamp,
    /// When its value was.
    pub updated_at: Timestamp,
}

impl AppSecrets {
    /// What a value is encrypted for: this app and this name. Under another name it does not open.
    pub fn purpose(app: &AppName, name: &SecretName) -> String {
        format!("{}{app}/{name}", Self::PREFIX)
    }
}

impl Record for AppSecrets {
    const PREFIX: &'static str = "secrets/";
    fn id(&self) -> String {
        self.app.to_string()
    }
}
