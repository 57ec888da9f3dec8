//! What a store takes at most, and the check of it that every store makes.
//!
//! The numbers are etcd's defaults (`--max-txn-ops`, `--max-request-bytes`) where those are the narrower:
//! what one store has taken, the other takes too.

use std::collections::HashSet;
use std::time::Duration;

use super::{Op, StoreError, Transaction};

/// Longest key. Keys are made of names of at most 253 bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// Longest value. Facts are small; the largest is a Machine's configuration with files.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// Most operations of one transaction.
pub const MAX_OPS: usize = 128;
/// Most comparisons of one transaction; etcd makes one more, see [`crate::transfer`].
pub const MAX_COMPARES: usize = MAX_OPS - 1;
/// Longest transaction with its keys, values and comparisons: what etcd takes as one request.
pub const MAX_TRANSACTION_BYTES: usize = 3 << 19;
/// A shorter lease would end before its holder hears of it.
pub const SHORTEST_LEASE: Duration = Duration::from_millis(1);
/// A longer lease is none.
pub const LONGEST_LEASE: Duration = Duration::from_secs(30 * 24 * 3600);

/// What an operation or comparison takes in a request beside its key and value, rounded up: tags,
/// lengths, and the prefix that etcd's keys have. With one long value alone no transaction is too long, and what
/// two operations leave of this has room for etcd's own comparison.
const OVERHEAD: usize = 128;

/// Refuses what no noun of ours would ask for.
pub fn check(transaction: &Transaction) -> Result<(), StoreError> {
    if transaction.ops.is_empty() {
        return invalid("a transaction has at least one operation".to_owned());
    }
    at_most(
        "operations of one transaction",
        transaction.ops.len(),
        MAX_OPS,
    )?;
    at_most(
        "comparisons of one transaction",
        transaction.compares.len(),
        MAX_COMPARES,
    )?;
    let mut bytes = 0;
    for compare in &transaction.compares {
        check_key(&compare.key)?;
        if compare.revision == Some(0) {
            return invalid(format!(
                "{} was written at no revision 0; None says that it is absent",
                compare.key
            ));
        }
        // Twice: etcd is asked for the key again when the comparison fails.
        bytes += 2 * (compare.key.len() + OVERHEAD);
    }
    let mut seen = HashSet::new();
    for op in &transaction.ops {
        let (key, length) = match op {
            Op::Put { key, value, .. } => (key, value.len()),
            Op::Delete { key } => (key, 0),
        };
        check_key(key)?;
        if length > MAX_VALUE_BYTES {
            at_most(
                &format!("bytes of the value of {key}"),
                length,
                MAX_VALUE_BYTES,
            )?;
        }
        bytes += key.len() + length + OVERHEAD;
        if !seen.insert(key) {
            return invalid(format!("{key} is written twice in one transaction"));
        }
    }
    at_most("bytes of one transaction", bytes, MAX_TRANSACTION_BYTES)
}

/// Refuses a lease's time that makes no sense.
pub fn check_lease(ttl: Duration) -> Result<(), StoreError> {
    if (SHORTEST_LEASE..=LONGEST_LEASE).contains(&ttl) {
        return Ok(());
    }
    invalid(format!(
        "a lease lasts {SHORTEST_LEASE:?} to {LONGEST_LEASE:?}, not {ttl:?}"
    ))
}

fn check_key(key: &str) -> Result<(), StoreError> {
    if key.is_empty() || key.contains('\0') {
        return invalid("a key has at least one byte and no NUL".to_owned());
    }
    at_most("bytes of a key", key.len(), MAX_KEY_BYTES)
}

fn at_most(what: &str, found: usize, limit: usize) -> Result<(), StoreError> {
    if found <= limit {
        return Ok(());
    }
    Err(StoreError::TooLarge {
        what: what.to_owned(),
        found,
        limit,
    })
}

fn invalid(text: String) -> Result<(), StoreError> {
    Err(StoreError::Invalid(text))
}
