use super::*;
use crate::memory::Memory;
use crate::virtio::testing::{Descriptor, RAM_BYTES, READ, Rings, WRITE};
use proptest::prelude::*;
use std::io::Write;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

const REPORT: usize = 2;

struct Guest {
    balloon: Balloon,
    cx: Context,
    rings: Vec<Rings>,
}

impl Guest {
    /// A driver with its three queues in memory whose pages, from 1 MiB on, all hold their number.
    fn new(ram: Arc<GuestRam>) -> Self {
        let (rings, queues) = [0x1_0000, 0x2_0000, 0x3_0000]
            .map(|base| Rings::new(ram.clone(), base, 16))
            .into_iter()
            .unzip();
        for page in 256..RAM_BYTES / 4096 {
            ram.write_obj(page as u32, GuestAddress(page * 4096))
                .unwrap();
        }
        Self {
            balloon: Balloon::default(),
            cx: Context::for_test(ram, queues, 0),
            rings,
        }
    }

    fn offer(&mut self, queue: usize, descriptors: &[Descriptor]) {
        self.rings[queue].offer(descriptors);
        self.balloon.on_queue(&mut self.cx, queue);
        let used = self.rings[queue].take_used();
        assert!(matches!(used[..], [(_, 0)]), "{used:?}");
    }

    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.cx
            .ram
            .write_slice(&bytes, GuestAddress(0x8000))
            .unwrap();
        self.offer(INFLATE, &[Descriptor::at(0x8000, bytes.len() as u32, READ)]);
    }

    /// The pages from 1 MiB on that no longer hold their number.
    fn gone(&self) -> Vec<u32> {
        (256..(RAM_BYTES / 4096) as u32)
            .filter(|page| {
                let number: u32 = self
                    .cx
                    .ram
                    .read_obj(GuestAddress(u64::from(*page) * 4096))
                    .unwrap();
                number != *page
            })
            .collect()
    }
}

fn anonymous() -> Guest {
    Guest::new(Memory::anonymous(RAM_BYTES).unwrap().ram().clone())
}

#[test]
fn exactly_the_pages_that_were_given_away_are_gone() {
    let mut guest = anonymous();
    guest.inflate(&[1002, 1000, 1001, 1001, 300]);
    assert_eq!(guest.gone(), [300, 1000, 1001, 1002]);
    // Taken out of the balloon, they are the guest's, and others are not touched.
    guest.offer(DEFLATE, &[Descriptor::at(0x8000, 4, READ)]);
    guest
        .cx
        .ram
        .write_obj(300_u32, GuestAddress(300 * 4096))
        .unwrap();
    assert_eq!(guest.gone(), [1000, 1001, 1002]);
}

#[test]
fn reported_runs_go_back_in_whole_pages() {
    let mut guest = anonymous();
    guest.offer(
        REPORT,
        &[
            Descriptor::at(512 * 4096, 8192, WRITE),
            Descriptor::at(600 * 4096 + 1, 3 * 4096, WRITE), // two whole ones inside
            Descriptor::at(700 * 4096 + 1, 100, WRITE),      // none
        ],
    );
    // Before anybody looks, which gives a page of zeroes.
    assert_eq!(resident(&guest.cx.ram, 512), 0);
    assert_eq!(resident(&guest.cx.ram, 514), 1);
    assert_eq!(guest.gone(), [512, 513, 601, 602]);
}

/// Whether a page of an anonymous memory is in the host's memory: what all this is for.
fn resident(ram: &GuestRam, page: u64) -> u8 {
    use vm_memory::GuestMemoryBackend;
    let slice = ram.get_slice(GuestAddress(page * 4096), 4096).unwrap();
    let mut there = 0;
    // SAFETY: one whole page that is mapped, and one byte for the answer.
    let done =
        unsafe { libc::mincore(slice.ptr_guard_mut().as_ptr().cast(), 4096, &raw mut there) };
    assert_eq!(done, 0);
    there & 1
}

#[test]
fn over_a_snapshot_a_page_is_what_it_was_in_that() {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(RAM_BYTES).unwrap();
    for _ in 0..RAM_BYTES / 4096 {
        file.write_all(&[7; 4096]).unwrap();
    }
    let mut guest = Guest::new(Memory::from_file(file, RAM_BYTES).unwrap().ram().clone());
    guest.inflate(&[400]);
    assert_eq!(guest.gone(), [400]);
    let bytes: [u8; 4] = guest.cx.ram.read_obj(GuestAddress(400 * 4096)).unwrap();
    assert_eq!(bytes, [7; 4]);
}

#[test]
fn pages_outside_memory_are_nobodys() {
    let mut guest = anonymous();
    guest.inflate(&[
        u32::MAX,
        (RAM_BYTES / 4096) as u32,
        (RAM_BYTES / 4096) as u32 - 1,
    ]);
    assert_eq!(guest.gone(), [(RAM_BYTES / 4096) as u32 - 1]);
    guest.offer(REPORT, &[Descriptor::at(RAM_BYTES - 4096, 8192, WRITE)]);
    guest.offer(INFLATE, &[Descriptor::at(u64::MAX - 4, 4, READ)]);
    guest.offer(INFLATE, &[Descriptor::at(0x8000, 4096, WRITE)]);
    assert_eq!(guest.gone().len(), 1);
}

proptest! {
    /// Whatever numbers a guest writes: those pages and no others.
    #[test]
    fn any_page_numbers_take_those_pages_only(
        pages in prop::collection::vec(prop_oneof![any::<u32>(), 256..9000_u32], 0..64)
    ) {
        let mut guest = anonymous();
        guest.inflate(&pages);
        let mut expected: Vec<u32> = pages;
        expected.retain(|page| (256..(RAM_BYTES / 4096) as u32).contains(page));
        expected.sort_unstable();
        expected.dedup();
        // What holds the rings and the numbers themselves is below 1 MiB, and is not looked at.
        prop_assert_eq!(guest.gone(), expected);
    }
}
