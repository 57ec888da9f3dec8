//! What all hands of one Machine on this host share: there may be two for a while. Those of a task that has failed,
//! or whose record was gone for a moment, may still have work under way in the background when the next are made.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tern_catalog::MachineId;

/// Who is at the files of one Machine.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// Held by whoever changes the disk or the snapshot, also where nobody waits for it any more.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
    /// Counts seals, so that one that was broken meanwhile is not written anew.
    pub(super) seals: Mutex<u64>,
}

/// Those of all Machines that have hands.
#[derive(Debug, Default)]
pub(crate) struct AllFiles(Mutex<HashMap<MachineId, Weak<Files>>>);

impl AllFiles {
    /// Those of one Machine, which are the same for as long as anybody has them.
    pub(super) fn of(&self, id: &MachineId) -> Arc<Files> {
        let mut all = self.0.lock();
        if let Some(files) = all.get(id).and_then(Weak::upgrade) {
            return files;
        }
        all.retain(|_, files| files.strong_count() > 0);
        let files = Arc::default();
        all.insert(id.clone(), Arc::downgrade(&files));
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_that_the_next_hands_break_is_not_written_anew_by_those_before() {
        let all = AllFiles::default();
        let [one, other] = [MachineId::random(), MachineId::random()];
        let before = all.of(&one);
        let number = *before.seals.lock();
        // Its hands are gone, and what they do in the background is not.
        let next = all.of(&one);
        *next.seals.lock() += 1;
        assert_ne!(*before.seals.lock(), number);
        assert!(!Arc::ptr_eq(&all.of(&other), &next));
        drop((before, next));
        all.of(&other);
        assert_eq!(all.0.lock().len(), 1, "those of nobody are forgotten");
    }
}
