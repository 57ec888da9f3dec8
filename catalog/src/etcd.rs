//! The store of many hosts: an etcd cluster, version 3.4 or later.
//!
//! Keys are kept under [`PREFIX`]; revisions are etcd's own. What the contract promises beyond etcd is
//! made here: another member is found when one dies or hangs, a watch knows that it is current and goes on
//! where it was, and a write without an answer is told as unknown ([`StoreError::Unknown`]), never as failed.
//!
//! The client is our own: hyper and rustls, which Tern has anyway, prost's derive for a dozen messages, and
//! gRPC's framing, which is two pages. `etcd-client` would bring tonic, prost's generator and `protoc`, and
//! its watches and keep-alives live and die with one connection whose state it hides; what is left to
//! write around it is more than what is here. Each call says which member it went to and for how
//! long, and nothing retries behind our back.

mod connection;
#[cfg(test)]
mod fake;
mod members;
mod messages;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::store::{
    Entry, LeaseId, Listing, Op, Revision, Store, StoreError, Transaction, Watch, limits,
};
use crate::transfer;
pub use members::EtcdConfig;
use members::{Failure, Kind, Members};
use messages::{
    Compare, DeleteRangeRequest, KeyValue, LeaseGrantRequest, LeaseRequest, LeaseResponse,
    PutRequest, RangeRequest, RangeResponse, Request, RequestOp, TxnRequest, TxnResponse,
};

/// What our keys in etcd start with.
const PREFIX: &str = "tern/";
/// Entries that are asked for at once; the longest of them make a message of 128 MiB, usual ones of 256 KiB.
const PAGE_KEYS: i64 = 128;
/// How often a listing is begun anew because its revision was compacted under it.
const LISTINGS: u32 = 3;
/// etcd's comparison target for mod revisions.
const MOD_REVISION: i32 = 2;
/// gRPC's codes.
const NOT_FOUND: u32 = 5;
const OUT_OF_RANGE: u32 = 11;

/// A store in an etcd cluster. Clones share it.
#[derive(Clone)]
pub struct EtcdStore {
    members: Arc<Members>,
}

/// A range of etcd's keys: from the first up to the end, not included.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Keys {
    first: Vec<u8>,
    end: Vec<u8>,
}

impl EtcdStore {
    /// Connects to a member, so that wrong addresses, certificates and passwords are told at once.
    pub async fn connect(config: EtcdConfig) -> Result<Self, StoreError> {
        let members = Arc::new(Members::new(config)?);
        members.connection().await?;
        Ok(Self { members })
    }

    async fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Failure> {
        self.members.call("KV/Range", request, Kind::Read).await
    }

    async fn try_list(&self, prefix: &str) -> Result<Listing, Failure> {
        let keys = Keys::under(prefix);
        let mut request = RangeRequest {
            key: keys.first,
            range_end: keys.end,
            limit: PAGE_KEYS,
            revision: 0,
            keys_only: false,
        };
        let mut entries = Vec::new();
        loop {
            let page = self.range(&request).await?;
            if request.revision == 0 {
                request.revision = page.header.map_or(0, |h| h.revision);
            }
            if let Some(last) = page.kvs.last() {
                request.key.clone_from(&last.key);
                request.key.push(0);
            }
            let more = page.more && !page.kvs.is_empty();
            entries.extend(page.kvs.into_iter().filter_map(entry));
            if !more {
                return Ok(Listing {
                    entries,
                    revision: request.revision.cast_unsigned(),
                });
            }
        }
    }

    /// Which of a transaction's leases has ended.
    async fn gone(&self, transaction: &Transaction) -> Result<LeaseId, StoreError> {
        let mut leases: Vec<LeaseId> = transaction.ops.iter().filter_map(lease_of).collect();
        leases.sort_unstable();
        leases.dedup();
        for lease in &leases {
            let request = LeaseRequest { id: lease.0 };
            let answer: LeaseResponse = self
                .members
                .call("Lease/LeaseTimeToLive", &request, Kind::Read)
                .await?;
            if answer.ttl <= 0 {
                return Ok(*lease);
            }
        }
        // It was there again: etcd has refused for another reason than it said.
        Err(StoreError::Unavailable(
            "etcd knows a lease and does not".to_owned(),
        ))
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let request = RangeRequest {
            key: etcd_key(key),
            ..RangeRequest::default()
        };
        let answer = self.range(&request).await?;
        Ok(answer.kvs.into_iter().next().and_then(entry))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        for _ in 1..LISTINGS {
            match self.try_list(prefix).await {
                Err(Failure::Refused(OUT_OF_RANGE, _)) => {}
                other => return Ok(other?),
            }
        }
        Ok(self.try_list(prefix).await?)
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        limits::check(&transaction)?;
        let fenced = !transaction
            .ops
            .iter()
            .any(|op| key_of(op) == transfer::MOVED);
        let request = txn(&transaction, fenced);
        let answer: Result<TxnResponse, _> =
            self.members.call("KV/Txn", &request, Kind::Write).await;
        let answer = match answer {
            Err(Failure::Refused(NOT_FOUND, text)) if text.contains("lease not found") => {
                return Err(StoreError::LeaseGone(self.gone(&transaction).await?));
            }
            other => other?,
        };
        if answer.succeeded {
            return Ok(answer.header.map_or(0, |h| h.revision.cast_unsigned()));
        }
        // What was found under each key, asked for in the same transaction.
        let mut found: Vec<Option<KeyValue>> = answer
            .responses
            .into_iter()
            .map(|response| response.range.unwrap_or_default().kvs.into_iter().next())
            .collect();
        if fenced && let Some(mark) = found.pop().flatten() {
            return Err(transfer::moved(&mark.value));
        }
        let found = found
            .into_iter()
            .map(|kv| kv.map(|kv| kv.mod_revision.cast_unsigned()));
        let mut compares = transaction.compares.into_iter().zip(found);
        match compares.find(|(compare, found)| compare.revision != *found) {
            Some((compare, _)) => Err(StoreError::Conflict { key: compare.key }),
            None => Err(StoreError::Unavailable(
                "etcd refuses comparisons that hold".to_owned(),
            )),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let members = Arc::clone(&self.members);
        Ok(watch::Feed::start(members, Keys::under(prefix), after))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        limits::check_lease(ttl)?;
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let request = LeaseGrantRequest {
            ttl: i64::try_from(seconds).unwrap_or(i64::MAX),
            // Ours, and random: a lease that was made without an answer ends by itself.
            id: rand::random_range(1..=i64::MAX),
        };
        let answer: LeaseResponse = self
            .members
            .call("Lease/LeaseGrant", &request, Kind::Write)
            .await?;
        Ok(LeaseId(answer.id))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let request = LeaseRequest { id: lease.0 };
        // One question and the stream's end: a stream of its own that lives on would die with its member unseen.
        let answer: LeaseResponse = self
            .members
            .call("Lease/LeaseKeepAlive", &request, Kind::Read)
            .await?;
        if answer.ttl > 0 {
            return Ok(());
        }
        Err(StoreError::LeaseGone(lease))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let request = LeaseRequest { id: lease.0 };
        let answer: Result<LeaseResponse, _> = self
            .members
            .call("Lease/LeaseRevoke", &request, Kind::Write)
            .await;
        match answer {
            Ok(_) => Ok(()),
            Err(Failure::Refused(NOT_FOUND, _)) => Err(StoreError::LeaseGone(lease)),
            Err(other) => Err(other.into()),
        }
    }
}

impl Keys {
    fn under(prefix: &str) -> Self {
        let first = etcd_key(prefix);
        let mut end = first.clone();
        // Text has no byte 255, and the prefix of all is not empty.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self { first, end }
    }
}

fn etcd_key(key: &str) -> Vec<u8> {
    [PREFIX.as_bytes(), key.as_bytes()].concat()
}

/// Our entry, unless somebody has put bytes there that are no key of ours.
fn entry(kv: KeyValue) -> Option<Entry> {
    let text = String::from_utf8(kv.key).ok();
    let Some(key) = text.as_deref().and_then(|text| text.strip_prefix(PREFIX)) else {
        tracing::error!("a key in etcd is not text and is left out");
        return None;
    };
    Some(Entry {
        key: key.to_owned(),
        value: kv.value,
        revision: kv.mod_revision.cast_unsigned(),
    })
}

fn key_of(op: &Op) -> &str {
    match op {
        Op::Put { key, .. } | Op::Delete { key } => key,
    }
}

fn lease_of(op: &Op) -> Option<LeaseId> {
    match op {
        Op::Put { lease, .. } => *lease,
        Op::Delete { .. } => None,
    }
}

/// The request for a transaction. One that is fenced is refused by a catalog that was left for another: whoever
/// still serves from it must not take writes that nobody will see.
fn txn(transaction: &Transaction, fenced: bool) -> TxnRequest {
    let compare = |key: &str, revision: Option<Revision>| Compare {
        target: MOD_REVISION,
        key: etcd_key(key),
        // A key that does not exist has 0.
        mod_revision: Some(revision.unwrap_or(0).cast_signed()),
    };
    let look = |compare: &crate::store::Compare| {
        Request::Range(RangeRequest {
            key: etcd_key(&compare.key),
            keys_only: true,
            ..RangeRequest::default()
        })
    };
    let write = |op: &Op| match op {
        Op::Put { key, value, lease } => Request::Put(PutRequest {
            key: etcd_key(key),
            value: value.clone(),
            lease: lease.map_or(0, |lease| lease.0),
        }),
        Op::Delete { key } => Request::Delete(DeleteRangeRequest { key: etcd_key(key) }),
    };
    let op = |request| RequestOp {
        request: Some(request),
    };
    let mut request = TxnRequest {
        compare: transaction
            .compares
            .iter()
            .map(|c| compare(&c.key, c.revision))
            .collect(),
        success: transaction.ops.iter().map(write).map(op).collect(),
        failure: transaction.compares.iter().map(look).map(op).collect(),
    };
    if fenced {
        request.compare.push(compare(transfer::MOVED, None));
        request.failure.push(op(Request::Range(RangeRequest {
            key: etcd_key(transfer::MOVED),
            ..RangeRequest::default()
        })));
    }
    request
}

#[cfg(test)]
mod tests;
