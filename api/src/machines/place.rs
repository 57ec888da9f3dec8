//! Which host a new Machine goes to.

use tern_catalog::{Host, Snapshot};

use crate::error::ApiError;

/// The host of the region with the fewest Machines' memory on it; ties go to the lowest number.
pub fn choose<'a>(snapshot: &'a Snapshot, region: &str) -> Result<&'a Host, ApiError> {
    let load = |host: &Host| -> u64 {
        let on_it = snapshot.machines.values().filter(|m| m.host == host.id);
        on_it.map(|m| u64::from(m.config.guest.memory_mb)).sum()
    };
    let candidates = snapshot.hosts.values().filter(|h| h.region == region);
    candidates
        .min_by_key(|h| (load(h), h.id))
        .map(|h| &**h)
        .ok_or_else(|| {
            let mut regions: Vec<&str> =
                snapshot.hosts.values().map(|h| h.region.as_str()).collect();
            regions.sort_unstable();
            regions.dedup();
            ApiError::no_capacity(format!(
                "no host is in region \"{region}\"; there is {}",
                regions.join(", ")
            ))
        })
}
