use super::*;
use crate::virtio::testing::{Descriptor, Driver, READ, Rings, WRITE};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
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

impl Disk {
    fn new(read_only: bool) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * SECTOR).unwrap();
        let config = DiskConfig {
            path: file.path().to_owned(),
            read_only,
        };
        let block = Block::open(&config, 0).unwrap();
        let driver = Driver::new(16);
        let (rings, queue) = Rings::new(driver.ram.clone(), 0x2_0000, 16);
        Self {
            file,
            block,
            cx: Context::for_test(driver.ram, vec![queue], 0),
            rings,
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
        self.block.on_queue(&mut self.cx, 0);
        let used = self.rings.take_used();
        assert_eq!(used.len(), 1);
        (
            used[0].1,
            self.cx.ram.read_obj(GuestAddress(STATUS)).unwrap(),
        )
    }
}

#[test]
fn reads_writes_and_flushes() {
    let mut disk = Disk::new(false);
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
    disk.cx
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA + 0x4000))
        .unwrap();
    assert_eq!(bytes, [7; 1024]);
}

#[test]
fn a_ring_of_long_requests_takes_more_than_one_round() {
    let mut disk = Disk::new(false);
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
    fn full(sectors: u64) -> Self {
        let mut disk = Self::new(false);
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

#[test]
fn what_is_discarded_takes_no_room() {
    use std::os::unix::fs::MetadataExt;
    let mut disk = Disk::full(2048);
    let blocks = |disk: &Disk| disk.file.as_file().metadata().unwrap().blocks();
    let before = blocks(&disk);
    let ranges = [range(8, 1024, 0), range(1536, 8, 0)];
    assert_eq!(disk.zero(VIRTIO_BLK_T_DISCARD, &ranges), 0);
    let expected: Vec<u64> = (8..1032).chain(1536..1544).collect();
    assert_eq!(disk.zeroes(), expected);
    assert_eq!(before - blocks(&disk), 1024 + 8);
    assert_eq!(disk.file.as_file().metadata().unwrap().len(), 2048 * SECTOR);
}

#[test]
fn zeroes_are_written_with_and_without_room() {
    let mut disk = Disk::full(64);
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    let ranges = [range(3, 2, 0), range(9, 1, unmap), range(63, 0, 0)];
    assert_eq!(disk.zero(VIRTIO_BLK_T_WRITE_ZEROES, &ranges), 0);
    assert_eq!(disk.zeroes(), [3, 4, 9]);
}

#[test]
fn senseless_ranges_get_an_error_and_change_nothing() {
    let (ioerr, unsupported) = (VIRTIO_BLK_S_IOERR as u8, VIRTIO_BLK_S_UNSUPP as u8);
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let mut disk = Disk::full(64);
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
    let mut disk = Disk::new(true);
    assert_eq!(disk.zero(discard, &[good]), ioerr);
}

#[test]
fn a_round_has_one_discard() {
    let mut disk = Disk::full(64);
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

#[test]
fn only_a_writable_disk_tells_of_discards() {
    let word = |config: &[u8], at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&config[at..at + 4]);
        u32::from_le_bytes(word)
    };
    let config = Disk::new(false).block.config();
    assert_eq!(config.len(), 60);
    assert_eq!([36, 40, 44].map(|at| word(&config, at)), [1 << 21, 16, 8]);
    assert_eq!([48, 52].map(|at| word(&config, at)), [1 << 21, 16]);
    assert_eq!(config[56], 1);
    let block = Disk::new(true).block;
    assert_eq!(block.features() & (1 << VIRTIO_BLK_F_DISCARD), 0);
    assert_eq!(block.config()[36..], [0; 24]);
}

#[test]
fn tells_its_serial_number() {
    let mut disk = Disk::new(true);
    let target = [Descriptor::at(DATA, 20, WRITE)];
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &target), (21, 0));
    let mut bytes = [0; 11];
    disk.cx
        .ram
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&bytes, b"tern-disk-0");
}

#[test]
fn senseless_requests_get_an_error_and_change_nothing() {
    let (ioerr, unsupported) = (VIRTIO_BLK_S_IOERR as u8, VIRTIO_BLK_S_UNSUPP as u8);
    let mut disk = Disk::new(false);
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
    let mut bytes = [0; 8 * 512];
    disk.file.as_file().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 8 * 512]);
    assert_eq!(disk.block.file.metadata().unwrap().len(), 8 * 512);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut disk = Disk::new(true);
    let data = [Descriptor::at(DATA, 512, READ)];
    assert_eq!(
        disk.request(VIRTIO_BLK_T_OUT, 0, &data),
        (1, VIRTIO_BLK_S_IOERR as u8)
    );
}

#[test]
fn a_shrunk_file_is_an_error_not_zeroes() {
    let mut disk = Disk::new(false);
    disk.file.as_file().set_len(512).unwrap();
    let target = [Descriptor::at(DATA, 1024, WRITE)];
    assert_eq!(
        disk.request(VIRTIO_BLK_T_IN, 0, &target),
        (1, VIRTIO_BLK_S_IOERR as u8)
    );
}

#[test]
fn a_snapshot_of_another_size_is_refused() {
    let disk = Disk::new(false);
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

proptest! {
    /// Any header and any buffers: the request comes back, and the file keeps its length.
    #[test]
    fn any_request_is_answered(
        kind in prop_oneof![0..14_u32, any::<u32>()],
        sector in prop_oneof![0..12_u64, any::<u64>()],
        table in prop::collection::vec(
            (prop_oneof![0x8000..0xa000_u64, any::<u64>()],
             prop_oneof![0..1040_u32, any::<u32>()], 0..8_u16, 0..18_u16),
            1..12)
    ) {
        let mut disk = Disk::new(false);
        disk.header(kind, sector);
        disk.rings.offer_raw(&table);
        disk.block.on_queue(&mut disk.cx, 0);
        prop_assert_eq!(disk.rings.take_used().len(), 1);
        prop_assert_eq!(disk.file.as_file().metadata().unwrap().len(), 8 * SECTOR);
        // And the device still works.
        let (rings, queue) = Rings::new(disk.cx.ram.clone(), 0x4_0000, 16);
        disk.rings = rings;
        disk.cx.queues[0] = queue;
        let target = [Descriptor::at(DATA, 512, WRITE)];
        prop_assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &target), (513, 0));
    }
}
