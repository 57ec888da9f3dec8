//! Tasks that are waited for by name: each one's end is told, and a panic is an end.

use std::collections::HashMap;
use std::hash::Hash;

use tokio::task::{self, JoinError, JoinSet};

/// Tasks, and whose they are.
#[derive(Debug)]
pub(crate) struct Watched<K, T> {
    tasks: JoinSet<T>,
    owners: HashMap<task::Id, K>,
}

impl<K: Eq + Hash, T: Send + 'static> Watched<K, T> {
    pub(crate) fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            owners: HashMap::new(),
        }
    }

    pub(crate) fn spawn(&mut self, owner: K, task: impl Future<Output = T> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.owners.insert(id, owner);
    }

    /// The next task that has ended; `None` where there is none. May be dropped.
    pub(crate) async fn next(&mut self) -> Option<(K, Result<T, JoinError>)> {
        let ended = self.tasks.join_next_with_id().await?;
        let (id, ended) = match ended {
            Ok((id, outcome)) => (id, Ok(outcome)),
            Err(error) => (error.id(), Err(error)),
        };
        let owner = self.owners.remove(&id).expect("all are spawned above");
        Some((owner, ended))
    }

    /// Whether this owner has a task that has not been told of.
    pub(crate) fn has(&self, owner: &K) -> bool {
        self.owners.values().any(|o| o == owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_told_with_its_owner() {
        let mut tasks = Watched::new();
        assert!(tasks.next().await.is_none());
        tasks.spawn("falls", async { panic!("on purpose") });
        let (owner, ended): (_, Result<u8, _>) = tasks.next().await.unwrap();
        assert!(owner == "falls" && ended.unwrap_err().is_panic());
        assert!(!tasks.has(&"falls"));
        tasks.spawn("ends", async { 7 });
        assert!(tasks.has(&"ends"));
        let (owner, ended) = tasks.next().await.unwrap();
        assert_eq!((owner, ended.unwrap()), ("ends", 7));
    }
}
