use std::cell::Cell;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::memory_file::{open, reopen, verify};
use super::*;
use crate::memory::discard;

/// Sixteen chunks.
const BYTES: u64 = 1 << 20;
const PAGES: usize = BYTES as usize / PAGE_SIZE;

fn put(memory: &Memory, page: usize, at: usize, text: &[u8]) {
    let address = GuestAddress((page * PAGE_SIZE + at) as u64);
    memory.ram().write_slice(text, address).unwrap();
}

fn content(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.size() as usize];
    memory
        .ram()
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    bytes
}

/// A memory file of a guest with `text` at the start of each of `pages`, mapped.
fn restored(pages: impl IntoIterator<Item = usize>, text: &[u8]) -> (TempDir, Memory, MemoryIndex) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("memory");
    let memory = Memory::anonymous(BYTES).unwrap();
    for page in pages {
        put(&memory, page, 0, text);
    }
    let index = write_whole(&path, &memory).unwrap();
    let memory = Memory::from_file(open(&path, BYTES, &index).unwrap(), BYTES).unwrap();
    (dir, memory, index)
}

/// Pages of `file` that are no holes.
fn data_pages(file: &File) -> Vec<usize> {
    let mut pages = Vec::new();
    let mut at = 0;
    loop {
        let data = next_data(file, at, BYTES).unwrap();
        if data.is_empty() {
            return pages;
        }
        pages.extend(data.start as usize / PAGE_SIZE..(data.end as usize).div_ceil(PAGE_SIZE));
        at = data.end;
    }
}

/// A file that fails after so many calls.
struct Failing {
    file: File,
    calls: Cell<u64>,
}

impl Failing {
    fn count(&self) -> Result<(), Errno> {
        let left = self.calls.get().checked_sub(1).ok_or(Errno::ENOSPC)?;
        self.calls.set(left);
        Ok(())
    }
}

impl Target for Failing {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Err(errno) = self.count() {
            // As a disk that fills up in the middle.
            self.file.write(&bytes[..bytes.len() / 2], offset)?;
            return Err(errno.into());
        }
        self.file.write(bytes, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> nix::Result<()> {
        self.count()?;
        self.file.punch(offset, len)
    }

    fn seal(&self) -> io::Result<Option<Seal>> {
        self.file.seal()
    }
}

/// A file system that cannot make holes.
struct Holeless(File);

impl Target for Holeless {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write(bytes, offset)
    }

    fn punch(&self, _offset: u64, _len: u64) -> nix::Result<()> {
        Err(Errno::EOPNOTSUPP)
    }

    fn seal(&self) -> io::Result<Option<Seal>> {
        self.0.seal()
    }
}

#[test]
fn only_pages_that_hold_something_take_room() {
    const BYTES: u64 = 32 << 20;
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("memory");
    let memory = Memory::anonymous(BYTES).unwrap();
    put(&memory, 5, 0, b"here");
    put(&memory, 0x800, 0, &[0; 4096]); // touched, and zero
    put(&memory, BYTES as usize / PAGE_SIZE - 1, 4092, b"last");
    let index = write_whole(&path, &memory).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), BYTES);
    let blocks = metadata.blocks();
    assert!(blocks * 512 <= 4 * 4096, "{blocks} blocks");
    let restored = Memory::from_file(open(&path, BYTES, &index).unwrap(), BYTES).unwrap();
    assert!(content(&restored) == content(&memory));
    verify(&File::open(&path).unwrap(), &index)
        .unwrap()
        .unwrap();
}

#[test]
fn a_restored_guest_is_written_whole_with_old_and_new_pages() {
    let (dir, memory, _) = restored([1, 18, 99, 200], b"old ");
    put(&memory, 1, 0, b"new ");
    put(&memory, 19, 0, b"new ");
    put(&memory, 200, 0, &[0; 4]); // a page that held something is all zero now
    let path = dir.path().join("second");
    let index = write_whole(&path, &memory).unwrap();
    let file = File::open(&path).unwrap();
    verify(&file, &index).unwrap().unwrap();
    assert_eq!(data_pages(&file), [1, 18, 19, 99]);
    let again = Memory::from_file(file, BYTES).unwrap();
    assert!(content(&again) == content(&memory));
    assert_eq!(&content(&again)[19 * PAGE_SIZE..][..4], b"new ");
}

#[test]
fn an_update_writes_private_pages_of_changed_chunks_and_nothing_else() {
    let (dir, memory, mut index) = restored(0..PAGES, b"old ");
    put(&memory, 3, 8, b"changed");
    put(&memory, 4, 8, b"changed");
    // The same as before, and mapped as if it had been written.
    put(&memory, 40, 0, b"old ");
    memory.populate(50 * 4096, 4096, true).unwrap();
    put(&memory, PAGES - 1, 8, b"changed");
    let file = reopen(&dir.path().join("memory"), &memory).unwrap();
    // Emptied behind everybody's back, but for what lies under pages of two chunks that the guest has no
    // copies of: what the file holds later was written by the update.
    let under: Vec<_> = (32..64).filter(|page| ![40, 50].contains(page)).collect();
    for page in (0..PAGES).filter(|page| !under.contains(page)) {
        file.punch((page * PAGE_SIZE) as u64, PAGE_SIZE as u64)
            .unwrap();
    }
    update(&file, &memory, &mut index).unwrap();
    let mut expected = vec![3, 4];
    expected.extend(under);
    expected.push(PAGES - 1);
    assert_eq!(data_pages(&file), expected);
}

#[test]
fn pages_that_became_zero_become_holes() {
    let (dir, memory, mut index) = restored(0..PAGES, b"old ");
    for page in [7, 8, 9, 31, 100] {
        put(&memory, page, 0, &[0; PAGE_SIZE]);
    }
    let file = reopen(&dir.path().join("memory"), &memory).unwrap();
    update(&file, &memory, &mut index).unwrap();
    let holes: Vec<_> = (0..PAGES)
        .filter(|page| !data_pages(&file).contains(page))
        .collect();
    assert_eq!(holes, [7, 8, 9, 31, 100]);
    verify(&file, &index).unwrap().unwrap();
    // Where there are no holes to be had, they are zeroes.
    put(&memory, 60, 0, &[0; PAGE_SIZE]);
    update(&Holeless(file.try_clone().unwrap()), &memory, &mut index).unwrap();
    assert!(data_pages(&file).contains(&60));
    verify(&file, &index).unwrap().unwrap();
    assert_eq!(content(&memory)[60 * PAGE_SIZE..][..4], [0; 4]);
    assert_eq!(&content(&memory)[61 * PAGE_SIZE..][..4], b"old ");
}

#[test]
fn only_the_mapped_file_with_one_name_is_updated() {
    let (dir, memory, _) = restored([1], b"old ");
    let path = dir.path().join("memory");
    let refusal = |path: &Path, memory: &Memory| reopen(path, memory).unwrap_err().to_string();
    let anonymous = Memory::anonymous(BYTES).unwrap();
    assert!(refusal(&path, &anonymous).contains("no memory"));
    let copy = dir.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    assert!(refusal(&copy, &memory).contains("not the one"));
    let second = dir.path().join("second");
    std::fs::hard_link(&path, &second).unwrap();
    assert!(refusal(&path, &memory).contains("more than one name"));
    std::fs::remove_file(&second).unwrap();
    reopen(&path, &memory).unwrap();
    std::fs::rename(&path, &second).unwrap();
    std::os::unix::fs::symlink(&second, &path).unwrap();
    reopen(&path, &memory).unwrap_err(); // no link is followed
}

/// What happens to a guest.
#[derive(Debug, Clone)]
enum Step {
    Write(usize, u8),
    Zero(usize),
    /// A private copy that is the same.
    Touch(usize),
    /// The balloon gives it back.
    GiveBack(usize),
    Update,
    /// An update that fails after so many calls.
    Fail(u64),
    /// An update, and the next monitor.
    Restore,
}

fn step() -> impl Strategy<Value = Step> {
    let page = || 0..PAGES;
    prop_oneof![
        8 => (page(), 1..255_u8).prop_map(|(page, byte)| Step::Write(page, byte)),
        4 => page().prop_map(Step::Zero),
        2 => page().prop_map(Step::Touch),
        2 => page().prop_map(Step::GiveBack),
        2 => Just(Step::Update),
        2 => (0..8_u64).prop_map(Step::Fail),
        1 => Just(Step::Restore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// The guest never sees an update, whole or broken off; and after each that did not fail the file holds
    /// what the guest has and its index says so.
    #[test]
    fn a_file_follows_its_guest(
        pages in prop::collection::btree_set(0..PAGES, 0..40),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let (dir, mut memory, mut index) = restored(pages, b"old ");
        let path = dir.path().join("memory");
        let mut guest = content(&memory);
        for step in steps {
            let page = |page: usize| page * PAGE_SIZE..(page + 1) * PAGE_SIZE;
            match step {
                Step::Write(at, byte) => {
                    put(&memory, at, 0, &[byte; 16]);
                    guest[page(at)][..16].fill(byte);
                }
                Step::Zero(at) => {
                    put(&memory, at, 0, &[0; PAGE_SIZE]);
                    guest[page(at)].fill(0);
                }
                Step::Touch(at) => {
                    memory.populate(page(at).start as u64, PAGE_SIZE as u64, true).unwrap();
                }
                Step::GiveBack(at) => {
                    discard(memory.ram(), page(at).start as u64, PAGE_SIZE).unwrap();
                    let file = std::fs::read(&path).unwrap();
                    guest[page(at)].copy_from_slice(&file[page(at)]);
                }
                Step::Update | Step::Restore => {
                    let file = reopen(&path, &memory).unwrap();
                    update(&file, &memory, &mut index).unwrap();
                    prop_assert!(std::fs::read(&path).unwrap() == guest);
                    verify(&file, &index).unwrap().unwrap();
                    prop_assert!(index.seal.is_some() && index.doubtful.is_empty());
                    if matches!(step, Step::Restore) {
                        let file = open(&path, BYTES, &index).unwrap();
                        memory = Memory::from_file(file, BYTES).unwrap();
                    }
                }
                Step::Fail(calls) => {
                    let file = reopen(&path, &memory).unwrap();
                    let failing = Failing { file, calls: Cell::new(calls) };
                    if update(&failing, &memory, &mut index).is_err() {
                        prop_assert!(index.seal.is_none() && !index.doubtful.is_empty());
                    }
                }
            }
            prop_assert!(content(&memory) == guest);
        }
    }
}
