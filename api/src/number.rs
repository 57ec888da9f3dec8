//! Numbers that are given out once: of Machines and peers in a network, of networks.

use tern_catalog::{
    Compare, MachineNumber, NetworkId, Op, Snapshot, Store, StoreError, Transaction,
};

use crate::error::ApiError;

/// How often a counter that others raise too is tried.
const ATTEMPTS: u32 = 32;

/// The next number in a network. Never given out again, so that an address never comes to mean another
/// Machine.
pub async fn next_in_network(
    store: &dyn Store,
    network: NetworkId,
) -> Result<MachineNumber, ApiError> {
    next(store, &format!("counters/numbers/{network}"), 1)
        .await
        .map(MachineNumber)
}

/// The next network.
pub async fn next_network(store: &dyn Store, snapshot: &Snapshot) -> Result<NetworkId, ApiError> {
    // The first network is made without the counter, which starts above all there are.
    let floor = snapshot
        .networks
        .keys()
        .map(|n| n.0)
        .max()
        .unwrap_or(0)
        .saturating_add(1);
    next(store, "counters/networks", floor).await.map(NetworkId)
}

async fn next(store: &dyn Store, key: &str, floor: u32) -> Result<u32, ApiError> {
    for _ in 0..ATTEMPTS {
        let entry = store.get(key).await?;
        let last: u32 = match &entry {
            Some(entry) => serde_json::from_slice(&entry.value)
                .map_err(|e| ApiError::conflict(format!("{key} cannot be read: {e}")))?,
            None => 0,
        };
        let number = last
            .checked_add(1)
            .ok_or_else(|| ApiError::no_capacity("the network is full"))?
            .max(floor);
        let compares = vec![Compare {
            key: key.to_owned(),
            revision: entry.map(|e| e.revision),
        }];
        let put = Op::Put {
            key: key.to_owned(),
            value: number.to_string().into_bytes(),
            lease: None,
        };
        match store
            .commit(Transaction {
                compares,
                ops: vec![put],
            })
            .await
        {
            Ok(_) => return Ok(number),
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict("too many others do the same; try again"))
}
