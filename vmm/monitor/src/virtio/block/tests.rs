use super::*;
use crate::config::RateLimit;
use crate::virtio::testing::{Descriptor, Driver, READ, Rings, WRITE};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10_0000;
const STATUS: u64 = 0x9000;

struct Disk {
    file: NamedTempFile,
    block: Block,
    cx: Context,
    rings: Rings,
}

/// Every way of moving the data keeps the same contract.
macro_rules! by_every_way {
    ($($test:ident),* $(,)?) => {
        mod ring { $(#[test] fn $test() { super::$test(super::Way::Ring); })* }
        mod threads { $(#[test] fn $test() { super::$test(super::Way::Threads); })* }
        mod inline { $(#[test] fn $test() { super::$test(super::Way::Inline); })* }
    };
}

impl Disk {
    fn new(read_only: bool, way: Way) -> Self {
        Self::limited(read_only, way, None)
    }

    fn limited(read_only: bool, way: Way, rate_limit: Option<RateLimit>) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * SECTOR).unwrap();
        let config = DiskConfig {
            path: file.path().to_owned(),
            read_only,
            rate_limit,
            engine: None,
        };
        let mut block = Block::open_by(&config, 0, way).unwrap();
        let driver = Driver::new(16);
        let (rings, queue) = Rings::new(driver.ram.clone(), 0x2_0000, 256);
        let mut cx = Context::for_test(driver.ram, vec![queue], 0);
        block.start(&mut cx).unwrap();
        Self {
            file,
            block,
            cx,
            rings,
        }
    }

    /// Serves the disk until it has nothing under way, as its worker would.
    fn settle(&mut self) {
        self.block.on_queue(&mut self.cx, 0);
        while self.block.pending.iter().any(Option::is_some) {
            self.block.engine.wait();
            self.block.on_io(&mut self.cx, ENGINE, Ready::default());
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.cx.ram.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.cx
            .ram
            .write_obj(sector, GuestAddress(HEADER + 8))
            .unwrap();
        self.cx
            .ram
            .write_obj(0xee_u8, GuestAddress(STATUS))
            .unwrap();
    }

    /// Runs one request and returns (bytes given back, status byte).
    fn request(&mut self, kind: u32, sector: u64, data: &[Descriptor]) -> (u32, u8) {
        self.header(kind, sector);
        let mut chain = vec![Descriptor::at(HEADER, 16, READ)];
        chain.extend_from_slice(data);
        chain.push(Descriptor::at(STATUS, 1, WRITE));
        self.rings.offer(&chain);
        self.settle();
        let used = self.rings.take_used();
        assert_eq!(used.len(), 1);
        (
            used[0].1,
            self.cx.ram.read_obj(GuestAddress(STATUS)).unwrap(),
        )
    }
}

fn reads_writes_and_flushes(way: Way) {
    let mut disk = Disk::new(false, way);
    disk.cx
        .ram
        .write_slice(&[7; 1024], GuestAddress(DATA))
        .unwrap();
    let data = [
        Descriptor::at(DATA, 512, READ),
        Descriptor::at(DATA + 512, 512, READ),
    ];
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 2, &data), (1, 0));
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (1, 0));
    let mut bytes = [0; 1024];
    disk.file.as_file().read_exact_at(&mut bytes, 1024).unwrap();
    assert_eq!(bytes, [7; 1024]);
    let target = [Descriptor::at(DATA + 0x4000, 1024, WRITE)];
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 2, &target), (1025, 0));
    let counts = disk.block.metrics.clone();
    let (reads, writes) = (counts.reads.get(), counts.writes.get());
    assert_eq!((reads, writes, counts.flushes.get()), (1, 1, 1));
    let (read, written) = (counts.read_bytes.get(), counts.written_bytes.get());
    assert_eq!((read, written, counts.errors.get()), (1024, 1024, 0));
    disk.cx
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA + 0x4000))
        .unwrap();
    assert_eq!(bytes, [7; 1024]);
}

fn a_ring_of_long_requests_takes_more_than_one_round(way: Way) {
    let mut disk = Disk::new(false, way);
    disk.header(VIRTIO_BLK_T_IN, 0);
    let mib16 = Descriptor::at(DATA, 16 << 20, WRITE);
    // Longer than the disk: refused, but the device could not know before it has looked.
    let chain = [
        Descriptor::at(HEADER, 16, READ),
        mib16,
        mib16,
        mib16,
        mib16,
        Descriptor::at(STATUS, 1, WRITE),
    ];
    disk.rings.offer(&chain);
    disk.rings.offer(&chain);
    disk.block.on_queue(&mut disk.cx, 0);
    assert_eq!(disk.rings.take_used().len(), 1);
    // It has asked to be called again, as by a driver.
    assert!(disk.cx.queues[0].kick().read().is_ok());
    disk.block.on_queue(&mut disk.cx, 0);
    assert_eq!(disk.rings.take_used().len(), 1);
    assert!(disk.cx.queues[0].kick().read().is_err());
}

/// A range of a discard.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&sectors.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes
}

impl Disk {
    /// A disk of `sectors`, all of them written.
    fn full(sectors: u64, way: Way) -> Self {
        let mut disk = Self::new(false, way);
        let content = vec![0x5a; (sectors * SECTOR) as usize];
        disk.file.as_file().write_all_at(&content, 0).unwrap();
        disk.file.as_file().sync_all().unwrap();
        disk.block.sectors = sectors;
        disk
    }

    fn zero(&mut self, kind: u32, ranges: &[Vec<u8>]) -> u8 {
        let bytes = ranges.concat();
        self.cx.ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let data = [Descriptor::at(DATA, bytes.len() as u32, READ)];
        let (len, status) = self.request(kind, 0, &data);
        assert_eq!(len, 1);
        status
    }

    /// Which sectors read as zeroes; the others are as they were.
    fn zeroes(&self) -> Vec<u64> {
        let mut bytes = vec![0; (self.block.sectors * SECTOR) as usize];
        self.file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        let sectors = bytes.chunks(SECTOR as usize).enumerate();
        sectors
            .filter(|(_, sector)| {
                assert!([0, 0x5a].contains(&sector[0]));
                assert!(sector.iter().all(|byte| *byte == sector[0]));
                sector[0] == 0
            })
            .map(|(index, _)| index as u64)
            .collect()
    }
}

fn what_is_discarded_takes_no_room(way: Way) {
    use std::os::unix::fs::MetadataExt;
    let mut disk = Disk::full(2048, way);
    let blocks = |disk: &Disk| disk.file.as_file().metadata().unwrap().blocks();
    let before = blocks(&disk);
    let ranges = [range(8, 1024, 0), range(1536, 8, 0)];
    assert_eq!(disk.zero(VIRTIO_BLK_T_DISCARD, &ranges), 0);
    assert_eq!(disk.block.metrics.zeroes.get(), 1);
    let expected: Vec<u64> = (8..1032).chain(1536..1544).collect();
    assert_eq!(disk.zeroes(), expected);
    assert_eq!(before - blocks(&disk), 1024 + 8);
    assert_eq!(disk.file.as_file().metadata().unwrap().len(), 2048 * SECTOR);
}

fn zeroes_are_written_with_and_without_room(way: Way) {
    let mut disk = Disk::full(64, way);
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    let ranges = [range(3, 2, 0), range(9, 1, unmap), range(63, 0, 0)];
    assert_eq!(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, &ranges), 0);
    assert_eq!(disk.zeroes(), [3, 4, 9]);
}

fn senseless_ranges_get_an_error_and_change_nothing(way: Way) {
    let (ioerr, unsupported) = (VIRTIO_BLK_S_IOERR as u8, VIRTIO_BLK_S_UNSUPP as u8);
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let mut disk = Disk::full(64, way);
    let good = range(0, 8, 0);
    for (kind, bad, status) in [
        (discard, range(64, 1, 0), ioerr),
        (discard, range(0, 65, 0), ioerr),
        (discard, range(u64::MAX, 8, 0), ioerr),
        (zeroes, range(u64::MAX / SECTOR + 1, 8, 0), ioerr),
        (zeroes, range(0, u32::MAX, 0), ioerr),
        (discard, vec![0; 15], ioerr),
        (zeroes, good.repeat(16), ioerr),
        (discard, range(0, 8, 1), unsupported),
        (zeroes, range(0, 8, 2), unsupported),
    ] {
        let ranges = [good.clone(), bad];
        assert_eq!(disk.zero(kind, &ranges), status, "{kind}: {ranges:?}");
    }
    assert!(disk.zeroes().is_empty());
    let mut disk = Disk::new(true, way);
    assert_eq!(disk.zero(discard, &[good]), ioerr);
}

fn a_round_has_one_discard(way: Way) {
    let mut disk = Disk::full(64, way);
    let bytes = range(0, 8, 0);
    disk.cx.ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
    disk.header(VIRTIO_BLK_T_DISCARD, 0);
    let chain = [
        Descriptor::at(HEADER, 16, READ),
        Descriptor::at(DATA, 16, READ),
        Descriptor::at(STATUS, 1, WRITE),
    ];
    disk.rings.offer(&chain);
    disk.rings.offer(&chain);
    disk.block.on_queue(&mut disk.cx, 0);
    assert_eq!(disk.rings.take_used().len(), 1);
    disk.block.on_queue(&mut disk.cx, 0);
    assert_eq!(disk.rings.take_used().len(), 1);
}

fn only_a_writable_disk_tells_of_discards(way: Way) {
    let word = |config: &[u8], at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&config[at..at + 4]);
        u32::from_le_bytes(word)
    };
    let config = Disk::new(false, way).block.config();
    assert_eq!(config.len(), 60);
    assert_eq!([36, 40, 44].map(|at| word(&config, at)), [1 << 21, 16, 8]);
    assert_eq!([48, 52].map(|at| word(&config, at)), [1 << 21, 16]);
    assert_eq!(config[56], 1);
    let block = Disk::new(true, way).block;
    assert_eq!(block.features() & (1 << VIRTIO_BLK_F_DISCARD), 0);
    assert_eq!(block.config()[36..], [0; 24]);
}

fn tells_its_serial_number(way: Way) {
    let mut disk = Disk::new(true, way);
    let target = [Descriptor::at(DATA, 20, WRITE)];
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &target), (21, 0));
    let mut bytes = [0; 11];
    disk.cx
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&bytes, b"tern-disk-0");
}

fn senseless_requests_get_an_error_and_change_nothing(way: Way) {
    let (ioerr, unsupported) = (VIRTIO_BLK_S_IOERR as u8, VIRTIO_BLK_S_UNSUPP as u8);
    let mut disk = Disk::new(false, way);
    let sector = [Descriptor::at(DATA, 512, READ)];
    disk.cx
        .ram
        .write_slice(&[7; 512], GuestAddress(DATA))
        .unwrap();
    for (kind, at, data, status) in [
        (VIRTIO_BLK_T_OUT, 8, &sector[..], ioerr),
        (VIRTIO_BLK_T_OUT, u64::MAX, &sector, ioerr),
        (VIRTIO_BLK_T_OUT, u64::MAX / 512 + 1, &sector, ioerr),
        (
            VIRTIO_BLK_T_OUT,
            0,
            &[Descriptor::at(DATA, 100, READ)],
            ioerr,
        ),
        (
            VIRTIO_BLK_T_IN,
            7,
            &[Descriptor::at(DATA, 1024, WRITE)],
            ioerr,
        ),
        (99, 0, &[], unsupported),
    ] {
        assert_eq!(disk.request(kind, at, data), (1, status), "{kind} at {at}");
    }
    assert_eq!(disk.block.metrics.errors.get(), 6);
    let mut bytes = [0; 8 * 512];
    disk.file.as_file().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 8 * 512]);
    assert_eq!(disk.block.file.metadata().unwrap().len(), 8 * 512);
}

fn a_read_only_disk_is_not_written(way: Way) {
    let mut disk = Disk::new(true, way);
    let data = [Descriptor::at(DATA, 512, READ)];
    assert_eq!(
        disk.request(VIRTIO_BLK_T_OUT, 0, &data),
        (1, VIRTIO_BLK_S_IOERR as u8)
    );
}

fn a_shrunk_file_is_an_error_not_zeroes(way: Way) {
    let mut disk = Disk::new(false, way);
    disk.file.as_file().set_len(512).unwrap();
    let target = [Descriptor::at(DATA, 1024, WRITE)];
    assert_eq!(
        disk.request(VIRTIO_BLK_T_IN, 0, &target),
        (1, VIRTIO_BLK_S_IOERR as u8)
    );
}

fn a_snapshot_of_another_size_is_refused(way: Way) {
    let disk = Disk::new(false, way);
    let state = disk.block.state();
    disk.block.check(&state).unwrap();
    let error = disk
        .block
        .check(&BlockState {
            sectors: 16,
            ..state
        })
        .unwrap_err();
    assert!(error.to_string().contains("16 sectors"), "{error}");
}

fn many_requests_are_under_way_at_once_and_each_is_answered(way: Way) {
    const REQUESTS: u64 = 80; // more than the engine takes at once
    let mut disk = Disk::full(REQUESTS, way);
    for sector in 0..REQUESTS {
        let mark = vec![sector as u8; SECTOR as usize];
        disk.file
            .as_file()
            .write_all_at(&mark, sector * SECTOR)
            .unwrap();
    }
    let place = |sector: u64| (HEADER + 32 * sector, DATA + SECTOR * sector);
    for sector in 0..REQUESTS {
        let (header, data) = place(sector);
        let ram = &disk.cx.ram;
        ram.write_obj(VIRTIO_BLK_T_IN, GuestAddress(header))
            .unwrap();
        ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
        ram.write_obj(0xee_u8, GuestAddress(header + 16)).unwrap();
        disk.rings.offer(&[
            Descriptor::at(header, 16, READ),
            Descriptor::at(data, SECTOR as u32, WRITE),
            Descriptor::at(header + 16, 1, WRITE),
        ]);
    }
    // A pause finishes what was taken, and takes no more.
    disk.block.on_queue(&mut disk.cx, 0);
    disk.block.stop(&mut disk.cx);
    assert!(disk.block.pending.iter().all(Option::is_none));
    let mut used = disk.rings.take_used();
    assert!(used.len() >= DEPTH, "{}", used.len());
    disk.block.start(&mut disk.cx).unwrap();
    disk.settle();
    used.extend(disk.rings.take_used());
    used.sort_unstable();
    used.dedup();
    assert_eq!(used.len() as u64, REQUESTS);
    for sector in 0..REQUESTS {
        let (header, data) = place(sector);
        let byte = |at| disk.cx.ram.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!((byte(header + 16), byte(data)), (0, sector as u8));
    }
}

fn a_limited_disk_waits_and_goes_on(way: Way) {
    let limit = RateLimit {
        bytes_per_second: None,
        burst_bytes: None,
        operations_per_second: Some(100),
        burst_operations: Some(2),
    };
    let mut disk = Disk::limited(false, way, Some(limit));
    disk.header(VIRTIO_BLK_T_IN, 0);
    for _ in 0..4 {
        disk.rings.offer(&[
            Descriptor::at(HEADER, 16, READ),
            Descriptor::at(DATA, SECTOR as u32, WRITE),
            Descriptor::at(STATUS, 1, WRITE),
        ]);
    }
    let before = Instant::now();
    disk.settle();
    let mut used = disk.rings.take_used().len();
    // However slow this machine is: what it was given is no more than it may have.
    assert!(used as f64 <= 3.0 + before.elapsed().as_secs_f64() * 100.0);
    while used < 4 {
        let deadline = disk.block.deadline().expect("it has a reason to wait");
        // A driver that kicks does not get more by it.
        disk.block.on_queue(&mut disk.cx, 0);
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
        disk.block.on_deadline(&mut disk.cx, Instant::now());
        disk.settle();
        used += disk.rings.take_used().len();
    }
    assert!(disk.block.metrics.limited.get() > 0);
    // Two for the burst, and a hundredth of a second for each of the others.
    assert!(before.elapsed() >= Duration::from_millis(10));
}

fn a_discard_costs_a_limited_disk_what_it_moves(way: Way) {
    let limit = RateLimit {
        bytes_per_second: Some(4096),
        burst_bytes: None,
        operations_per_second: None,
        burst_operations: None,
    };
    let mut disk = Disk::limited(false, way, Some(limit));
    for _ in 0..10 {
        assert_eq!(disk.zero(VIRTIO_BLK_T_DISCARD, &[range(0, 8, 0)]), 0);
    }
    assert!(disk.block.deadline().is_none(), "a gigabyte was not moved");
}

fn no_more_is_taken_while_much_is_under_way(way: Way) {
    let mut disk = Disk::full(8, way);
    disk.header(VIRTIO_BLK_T_IN, 0);
    disk.block.under_way = MAX_BYTES_UNDER_WAY;
    disk.rings.offer(&[
        Descriptor::at(HEADER, 16, READ),
        Descriptor::at(DATA, SECTOR as u32, WRITE),
        Descriptor::at(STATUS, 1, WRITE),
    ]);
    disk.settle();
    assert!(disk.rings.take_used().is_empty());
    disk.block.under_way = 0;
    disk.settle();
    assert_eq!(disk.rings.take_used().len(), 1);
    assert_eq!(disk.block.under_way, 0);
}

fn a_request_for_nothing_is_no_error(way: Way) {
    let mut disk = Disk::new(false, way);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        assert_eq!(disk.request(kind, 3, &[]), (1, 0));
    }
}

by_every_way! {
    a_discard_costs_a_limited_disk_what_it_moves,
    no_more_is_taken_while_much_is_under_way,
    a_request_for_nothing_is_no_error,
    many_requests_are_under_way_at_once_and_each_is_answered,
    a_limited_disk_waits_and_goes_on,
    reads_writes_and_flushes,
    a_ring_of_long_requests_takes_more_than_one_round,
    what_is_discarded_takes_no_room,
    zeroes_are_written_with_and_without_room,
    senseless_ranges_get_an_error_and_change_nothing,
    a_round_has_one_discard,
    only_a_writable_disk_tells_of_discards,
    tells_its_serial_number,
    senseless_requests_get_an_error_and_change_nothing,
    a_read_only_disk_is_not_written,
    a_shrunk_file_is_an_error_not_zeroes,
    a_snapshot_of_another_size_is_refused,
}

proptest! {
    /// Any header and any buffers: the request comes back, and the file keeps its length.
    #[test]
    fn any_request_is_answered(
        way in prop_oneof![Just(Way::Ring), Just(Way::Threads), Just(Way::Inline)],
        kind in prop_oneof![0..14_u32, any::<u32>()],
        sector in prop_oneof![0..12_u64, any::<u64>()],
        table in prop::collection::vec(
            (prop_oneof![0x8000..0xa000_u64, any::<u64>()],
             prop_oneof![0..1040_u32, any::<u32>()], 0..8_u16, 0..18_u16),
            1..12)
    ) {
        let mut disk = Disk::new(false, way);
        disk.header(kind, sector);
        disk.rings.offer_raw(&table);
        disk.settle();
        prop_assert_eq!(disk.rings.take_used().len(), 1);
        prop_assert_eq!(disk.file.as_file().metadata().unwrap().len(), 8 * SECTOR);
        // And the device still works.
        let (rings, queue) = Rings::new(disk.cx.ram.clone(), 0x4_0000, 256);
        disk.rings = rings;
        disk.cx.queues[0] = queue;
        let target = [Descriptor::at(DATA, 512, WRITE)];
        prop_assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &target), (513, 0));
    }
}
