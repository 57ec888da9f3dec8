//! That this host is there: one lease, however many Machines it has, and what it has for them.
//!
//! ```text
//! claim ─► held ──(lease lost, or its key gone)──► claim again ─► held
//!             └──(another boot's session is there)──► superseded: the end
//! ```
//!
//! `host_alive/<id>` goes when the host does, by its lease. A number has one holder: whoever starts with a data
//! directory whose host is alive on another server waits until that lease must have ended, and is refused if it has
//! not. A former life on this very boot is taken over at once: the data directory's lock says that it has ended.

use std::time::Duration;

use jiff::Timestamp;
use tern_catalog::{
    Catalog, CatalogError, Compare, HeldLease, HostAlive, HostId, HostStatus, Op, Record as _,
    Revision, StoreError, Transaction, View,
};
use thiserror::Error;
use tokio::time::Instant;

use crate::Room;

/// How long a host is taken to be there after it was last heard. Renewed in about a third of it.
pub const LEASE: Duration = Duration::from_secs(10);
/// In lease times: how long another's lease is waited for. etcd's leader may extend it when it changes.
const PATIENCE: u32 = 3;
/// How often what the host has is looked at. Written only where it has changed: heartbeats are what a store can least take.
const LOOK: Duration = Duration::from_secs(5);
/// It is written this often in any case, so that "last heard" is right to the minute.
const TELL: Duration = Duration::from_secs(60);
/// Until the next attempt where the store does not answer.
const RETRY: Duration = Duration::from_secs(1);

/// Why this host is not the one that its number says.
#[derive(Debug, Error)]
pub enum PresenceError {
    /// Its number is held by a living server.
    #[error(
        "host {host} is alive on another server since {since}: a data directory is good for one server at a time. Stop \
         `tern serve` there, or give this one a data directory of its own"
    )]
    Elsewhere {
        /// The number.
        host: HostId,
        /// Since when.
        since: Timestamp,
    },
    /// The catalog's answer.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<StoreError> for PresenceError {
    fn from(error: StoreError) -> Self {
        Self::Catalog(error.into())
    }
}

/// This host's presence in the catalog; given up by [`Presence::leave`], and by its lease's end.
#[derive(Debug)]
pub struct Presence {
    host: HostId,
    boot: String,
    /// Nobody else can have this catalog open.
    exclusive: bool,
    lease_time: Duration,
    held: Held,
    told: Option<(Room, Instant)>,
}

#[derive(Debug)]
struct Held {
    session: String,
    lease: HeldLease,
    at: Revision,
}

impl Presence {
    /// Says that this host is there; waits for the lease of one that was, on another server. `exclusive` is a catalog
    /// that this process alone has open: whoever is in it is a former life.
    pub async fn claim(
        catalog: &Catalog,
        view: &View,
        host: HostId,
        exclusive: bool,
    ) -> Result<Self, PresenceError> {
        Self::claim_with(catalog, view, host, exclusive, &boot_id(), LEASE).await
    }

    async fn claim_with(
        catalog: &Catalog,
        view: &View,
        host: HostId,
        exclusive: bool,
        boot: &str,
        lease_time: Duration,
    ) -> Result<Self, PresenceError> {
        let held = hold(catalog, view, host, exclusive, boot, lease_time).await?;
        Ok(Self {
            host,
            boot: boot.to_owned(),
            exclusive,
            lease_time,
            held,
            told: None,
        })
    }

    /// Writes what this host has, where it has changed or was not written for a while.
    pub async fn tell(
        &mut self,
        catalog: &Catalog,
        version: &str,
        room: Room,
    ) -> Result<(), CatalogError> {
        let current = |(told, at): &(Room, Instant)| *told == room && at.elapsed() < TELL;
        if self.told.as_ref().is_some_and(current) {
            return Ok(());
        }
        let status = HostStatus {
            id: self.host,
            version: version.to_owned(),
            all: room.all,
            taken: room.taken,
            seen_at: Timestamp::now(),
        };
        catalog.put(&status).await?;
        self.told = Some((room, Instant::now()));
        Ok(())
    }

    /// Keeps it up. Returns only when another server has this host's number.
    pub async fn keep(
        &mut self,
        catalog: &Catalog,
        view: &View,
        version: &str,
        room: impl Fn() -> Room,
    ) -> PresenceError {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = look.tick() => {
                    if let Err(error) = self.tell(catalog, version, room()).await {
                        tracing::warn!(%error, "what this host has cannot be told");
                    }
                }
                () = self.held.lease.lost() => {}
                () = gone(view, self.host, &self.held) => {}
            }
            while self.held.lease.is_lost() || !is_there(view, self.host, &self.held) {
                let again = hold(
                    catalog,
                    view,
                    self.host,
                    self.exclusive,
                    &self.boot,
                    self.lease_time,
                );
                match again.await {
                    Ok(held) => {
                        self.held = held;
                        break;
                    }
                    Err(error @ PresenceError::Elsewhere { .. }) => return error,
                    Err(error) => {
                        tracing::warn!(%error, "that this host is there cannot be told");
                        tokio::time::sleep(RETRY).await;
                    }
                }
            }
        }
    }

    /// Says that this host is there no more; its lease would in a while.
    pub async fn leave(self, catalog: &Catalog) {
        let revoked = catalog.store().revoke(self.held.lease.id());
        if !matches!(
            tokio::time::timeout(self.lease_time, revoked).await,
            Ok(Ok(()))
        ) {
            tracing::debug!("this host's lease is left to end by itself");
        }
    }
}

/// Takes the host's key under a new lease.
async fn hold(
    catalog: &Catalog,
    view: &View,
    host: HostId,
    exclusive: bool,
    boot: &str,
    lease_time: Duration,
) -> Result<Held, PresenceError> {
    let patience = Instant::now() + lease_time * PATIENCE;
    let store = catalog.store();
    loop {
        let found = catalog.get::<HostAlive>(&host.to_string()).await?;
        if let Some((other, revision)) = &found
            && !exclusive
            && other.boot != boot
        {
            tracing::info!(%host, since = %other.since, "waiting for the lease of this host's former server");
            let gone = view.wait_for(|s| {
                (s.revision >= *revision && !s.host_alive.contains_key(&host)).then_some(())
            });
            if tokio::time::timeout_at(patience, gone).await.is_err() {
                let since = other.since;
                return Err(PresenceError::Elsewhere { host, since });
            }
        }
        let lease = HeldLease::grant(store.clone(), lease_time).await?;
        let alive = HostAlive {
            id: host,
            session: hex_id(),
            boot: boot.to_owned(),
            since: Timestamp::now(),
        };
        let expected = match found {
            Some((other, revision)) if exclusive || other.boot == boot => Some(revision),
            _ => None,
        };
        let transaction = Transaction {
            compares: vec![Compare {
                key: alive.key(),
                revision: expected,
            }],
            ops: vec![Op::Put {
                key: alive.key(),
                value: serde_json::to_vec(&alive).expect("plain data"),
                lease: Some(lease.id()),
            }],
        };
        match store.commit(transaction).await {
            Ok(at) => {
                return Ok(Held {
                    session: alive.session,
                    lease,
                    at,
                });
            }
            // Somebody was faster, or the former lease has just ended.
            Err(StoreError::Conflict { .. }) if Instant::now() < patience => {}
            Err(other) => return Err(other.into()),
        }
    }
}

/// Whether the view shows our own session, as far as it has come.
fn is_there(view: &View, host: HostId, held: &Held) -> bool {
    let snapshot = view.snapshot();
    snapshot.revision < held.at
        || snapshot
            .host_alive
            .get(&host)
            .is_some_and(|alive| alive.session == held.session)
}

/// Returns when the view shows that our key is gone or another's.
async fn gone(view: &View, host: HostId, held: &Held) {
    view.wait_for(|snapshot| {
        let ours = snapshot.host_alive.get(&host);
        let there = ours.is_some_and(|alive| alive.session == held.session);
        (snapshot.revision >= held.at && !there).then_some(())
    })
    .await;
}

fn hex_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Tells one boot of a server from every other (random(4)). Where it cannot be read nothing is taken over.
fn boot_id() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => id.trim().to_owned(),
        Err(_) => hex_id(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tern_catalog::{Resources, SqliteStore, Store};

    use super::*;

    const HOST: HostId = HostId(7);
    const SHORT: Duration = Duration::from_millis(600);
    const LONG: Duration = Duration::from_secs(3600);
    const LIMIT: Duration = Duration::from_secs(60);

    async fn world() -> (tempfile::TempDir, Catalog, View) {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&dir.path().join("catalog.db")).unwrap());
        let view = View::follow(Arc::clone(&store)).await.unwrap();
        (dir, Catalog::new(store), view)
    }

    fn room() -> Room {
        let all = Resources {
            memory_mib: 1024,
            cpu_sixteenths: 32,
        };
        Room {
            all,
            taken: Resources::default(),
        }
    }

    async fn claim(
        catalog: &Catalog,
        view: &View,
        boot: &str,
        time: Duration,
    ) -> Result<Presence, PresenceError> {
        Presence::claim_with(catalog, view, HOST, false, boot, time).await
    }

    #[tokio::test]
    async fn a_number_has_one_holder_and_a_former_life_is_taken_over() {
        let (_dir, catalog, view) = world().await;
        let first = claim(&catalog, &view, "here", LONG).await.unwrap();
        // The patience is the asker's own lease time's.
        let refused = claim(&catalog, &view, "there", SHORT).await.unwrap_err();
        let told = refused.to_string();
        assert!(told.contains("alive on another server"), "{told}");
        let again = claim(&catalog, &view, "here", LONG).await.unwrap();
        assert_ne!(first.held.session, again.held.session);
        again.leave(&catalog).await;
        claim(&catalog, &view, "there", LONG).await.unwrap();
    }

    #[tokio::test]
    async fn one_that_ended_without_a_word_is_waited_for() {
        let (_dir, catalog, view) = world().await;
        let first = claim(&catalog, &view, "here", SHORT).await.unwrap();
        let other = claim(&catalog, &view, "there", LONG);
        let (other, ()) = tokio::join!(other, async {
            // Dropping it gives its lease up, as its end would.
            drop(first);
        });
        other.unwrap();
    }

    #[tokio::test]
    async fn a_key_that_is_gone_is_put_again_and_what_there_is_is_told() {
        let (_dir, catalog, view) = world().await;
        let mut presence = claim(&catalog, &view, "here", LONG).await.unwrap();
        let first = presence.held.session.clone();
        let lease = presence.held.lease.id();
        let keep = presence.keep(&catalog, &view, "1.2.3", room);
        let look = async {
            let status = view.wait_for(|s| s.host_status.get(&HOST).cloned()).await;
            assert_eq!((status.all, status.version.as_str()), (room().all, "1.2.3"));
            catalog.store().revoke(lease).await.unwrap();
            view.wait_for(|s| {
                let alive = s.host_alive.get(&HOST)?;
                (alive.session != first).then_some(())
            })
            .await;
        };
        tokio::select! {
            error = keep => panic!("{error}"),
            () = look => {}
            () = tokio::time::sleep(LIMIT) => panic!("not put again"),
        }
    }

    #[tokio::test]
    async fn one_whose_number_another_server_has_ends() {
        let (_dir, catalog, view) = world().await;
        let mut first = claim(&catalog, &view, "here", SHORT).await.unwrap();
        catalog.store().revoke(first.held.lease.id()).await.unwrap();
        let _second = claim(&catalog, &view, "there", LONG).await.unwrap();
        let ended = first.keep(&catalog, &view, "1", room);
        let error = tokio::time::timeout(LIMIT, ended).await.unwrap();
        assert!(matches!(error, PresenceError::Elsewhere { .. }), "{error}");
    }
}
