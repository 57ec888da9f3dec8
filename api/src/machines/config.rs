//! What a Machine's configuration must be before it is taken.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tern_catalog::{AppName, MachineConfig};

use super::wire;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::server::Shared;

/// Largest memory of a Machine.
const MAX_MEMORY_MB: u32 = 64 << 10;
/// Smallest: Debian's kernel and an init need some 60 MiB.
const MIN_MEMORY_MB: u32 = 128;

/// Longest key of metadata, in bytes.
const MAX_METADATA_KEY: usize = 128;
/// Longest value of metadata, in bytes. Every copy of the catalog holds it in memory.
const MAX_METADATA_VALUE: usize = 4 << 10;
/// Most keys of metadata.
const MAX_METADATA: usize = 100;

/// A configuration that can be run, its image pinned to a digest where it is in our registry, and what of it is
/// not acted on.
pub(super) fn accept(
    shared: &Shared,
    caller: &Caller,
    config: Value,
) -> Result<(MachineConfig, Vec<String>), ApiError> {
    let (mut config, warnings) = wire::read(config)?;
    let guest = &config.guest;
    if !(1..=8).contains(&guest.cpus) {
        return Err(ApiError::invalid(format!(
            "config.guest.cpus is {}; 1 to 8 are possible",
            guest.cpus
        )));
    }
    if !(MIN_MEMORY_MB..=MAX_MEMORY_MB).contains(&guest.memory_mb) {
        return Err(ApiError::invalid(format!(
            "config.guest.memory_mb is {}; {MIN_MEMORY_MB} to {MAX_MEMORY_MB} are possible",
            guest.memory_mb
        )));
    }
    if let Some(signal) = &config.stop_config.signal {
        super::SignalName::Name(signal.clone()).number()?;
    }
    for (name, value) in &config.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ApiError::invalid(format!(
                "config.env: {name:?} cannot be set; names are not empty and hold no `=`, and neither \
                 name nor value holds a NUL"
            )));
        }
    }
    check_metadata(&config.metadata)?;
    for (n, service) in config.services.iter().enumerate() {
        if service.internal_port == 0 {
            return Err(ApiError::invalid(format!(
                "config.services[{n}].internal_port is 0; write the port that the app listens on"
            )));
        }
    }
    for check in config
        .checks
        .values()
        .chain(config.services.iter().flat_map(|s| &s.checks))
    {
        for (name, value) in check.sent() {
            let named = http::HeaderName::from_bytes(name.as_bytes());
            if named.is_err() || http::HeaderValue::from_str(value).is_err() {
                return Err(ApiError::invalid(format!(
                    "config: a check cannot send the header {name:?}: {value:?}"
                )));
            }
        }
    }
    if config.mounts.len() > 1 {
        return Err(ApiError::invalid(
            "config.mounts: a machine has one volume at most",
        ));
    }
    for mount in &config.mounts {
        let path = &mount.path;
        let clean = path.starts_with('/') && path.len() > 1 && !path.contains('\0');
        if !clean || path.split('/').any(|step| step == "..") {
            return Err(ApiError::invalid(format!(
                "config.mounts: {path:?} is no place for a volume; give an absolute path other than /"
            )));
        }
    }
    for file in &config.files {
        if !file.guest_path.starts_with('/') {
            return Err(ApiError::invalid(format!(
                "config.files: \"{}\" is not absolute",
                file.guest_path
            )));
        }
        if file.secret_name.is_some() && !file.raw_value.is_empty() {
            return Err(ApiError::invalid(format!(
                "config.files: {} has both a raw_value and a secret_name; write one of them",
                file.guest_path
            )));
        }
        if let Err(error) = STANDARD.decode(&file.raw_value) {
            return Err(ApiError::invalid(format!(
                "config.files: the raw_value of {} is not base64: {error}",
                file.guest_path
            )));
        }
    }
    config.image = shared.registry.pin(&config.image, |app| {
        // An image that the caller may not have must not be had by naming it.
        let app: AppName = app.parse()?;
        Ok(caller.must_pull(&shared.view.snapshot(), &app)?)
    })?;
    Ok((config, warnings))
}

/// An error unless a Machine may have this metadata.
pub(super) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if metadata.len() > MAX_METADATA {
        return Err(ApiError::invalid(format!(
            "metadata has {} keys; {MAX_METADATA} are possible",
            metadata.len()
        )));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_METADATA_KEY || value.len() > MAX_METADATA_VALUE {
            return Err(ApiError::invalid(format!(
                "metadata {key:?}: a key has 1 to {MAX_METADATA_KEY} bytes, a value at most {MAX_METADATA_VALUE}"
            )));
        }
    }
    Ok(())
}
