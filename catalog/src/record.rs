//! How a noun is kept: its key, and its value as JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A noun that the catalog keeps.
pub trait Record: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// What its keys start with, a trailing slash included.
    const PREFIX: &'static str;

    /// Its key after the prefix.
    fn id(&self) -> String;

    /// Its whole key.
    fn key(&self) -> String {
        Self::key_of(&self.id())
    }

    /// The key of the record with this id.
    fn key_of(id: &str) -> String {
        format!("{}{id}", Self::PREFIX)
    }
}
