//! Which host a new Machine goes to.

use std::collections::BTreeSet;

use tern_catalog::{Host, Snapshot};

use crate::error::ApiError;

/// The host of the region with the fewest Machines' memory on it; ties go to the lowest number. Where there is but
/// one region, it stands for any: files that were written for another cloud name that one's.
pub fn choose<'a>(snapshot: &'a Snapshot, region: &str) -> Result<&'a Host, ApiError> {
    let load = |host: &Host| -> u64 {
        let on_it = snapshot.machines.values().filter(|m| m.host == host.id);
        on_it.map(|m| u64::from(m.config.guest.memory_mb)).sum()
    };
    let hosts = || snapshot.hosts.values();
    let regions: BTreeSet<&str> = hosts().map(|h| h.region.as_str()).collect();
    let candidates = hosts().filter(|h| h.region == region || regions.len() == 1);
    candidates
        .min_by_key(|h| (load(h), h.id))
        .map(|h| &**h)
        .ok_or_else(|| {
            let regions: Vec<&str> = regions.into_iter().collect();
            ApiError::no_capacity(format!(
                "no host is in region \"{region}\"; there is {}",
                regions.join(", ")
            ))
        })
}
