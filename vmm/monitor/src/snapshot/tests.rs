use super::*;
use crate::config::VmConfig;
use proptest::prelude::*;
use std::os::unix::fs::{FileExt, MetadataExt};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// A snapshot of nothing in particular: what is checked before KVM sees any of it.
fn snapshot() -> (TempDir, VmConfig) {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = VmConfig {
        id: "m1".into(),
        vcpus: 1,
        memory_mib: 32,
        cpu_template: Default::default(),
        nested: false,
        kernel: at("kernel"),
        initramfs: Vec::new(),
        cmdline: String::new(),
        disks: Vec::new(),
        net: Vec::new(),
        vsock: None,
        control: at("vmm.sock"),
        pid_file: at("vmm.pid"),
        serial_log: at("serial.log"),
        snapshot_dir: at("snapshot"),
        exit_file: at("exit.json"),
        jail: None,
    };
    let memory = Memory::anonymous(config.memory_bytes()).unwrap();
    write_new(&config, &machine(&dir), &memory).unwrap();
    (dir, config)
}

fn write_new(config: &VmConfig, machine: &MachineState, memory: &Memory) -> io::Result<()> {
    write(config, machine, memory, None, None)
}

fn machine(dir: &TempDir) -> MachineState {
    let serial = crate::serial::SerialPort::new(&dir.path().join("serial.log")).unwrap();
    MachineState {
        vm: VmState::default(),
        vcpus: Vec::new(),
        serial: serial.save(),
        devices: Vec::new(),
    }
}

fn trace() -> Trace {
    Trace::new(std::time::Instant::now())
}

fn refusal(config: &VmConfig) -> Refused {
    match open(config, &trace()) {
        Ok(_) => panic!("it was taken"),
        Err(refused) => refused,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn word(memory: &Memory) -> [u8; 4] {
    memory.ram().read_obj(GuestAddress(0x5000)).unwrap()
}

fn remember(memory: &Memory, word: &[u8; 4]) {
    memory
        .ram()
        .write_slice(word, GuestAddress(0x5000))
        .unwrap();
}

fn inode(config: &VmConfig) -> u64 {
    fs::metadata(config.snapshot_dir.join(MEMORY))
        .unwrap()
        .ino()
}

#[test]
fn the_next_snapshot_of_a_restored_guest_is_in_the_same_file() {
    let (dir, config) = snapshot();
    let first = inode(&config);
    for round in 0..3_u8 {
        let mut opened = open(&config, &trace()).unwrap();
        assert_eq!(opened.memory.size(), 32 << 20);
        if round > 0 {
            assert_eq!(word(&opened.memory), [b'a', b'b', b'c', round - 1]);
        }
        let set = WorkingSet::observe(&opened.memory, opened.working_set.as_ref()).unwrap();
        // Twice, as when the agent cannot write its seal and the guest goes on.
        for last in [b'-', round] {
            remember(&opened.memory, &[b'a', b'b', b'c', last]);
            let (machine, index) = (machine(&dir), &mut opened.index);
            write(&config, &machine, &opened.memory, Some(index), Some(&set)).unwrap();
            assert_eq!(word(&open(&config, &trace()).unwrap().memory)[3], last);
        }
        assert_eq!(inode(&config), first);
        assert_eq!(names(&config.snapshot_dir), [MEMORY, STATE, WORKING_SET]);
    }
    assert_eq!(names(dir.path()), ["serial.log", "snapshot"]);
}

#[test]
fn a_file_that_is_not_this_machines_alone_is_replaced() {
    let (dir, config) = snapshot();
    let (first, kept) = (inode(&config), dir.path().join("kept"));
    fs::hard_link(config.snapshot_dir.join(MEMORY), &kept).unwrap();
    let mut opened = open(&config, &trace()).unwrap();
    remember(&opened.memory, b"next");
    let index = &mut opened.index;
    write(&config, &machine(&dir), &opened.memory, Some(index), None).unwrap();
    assert_ne!(inode(&config), first);
    assert_eq!(word(&open(&config, &trace()).unwrap().memory), *b"next");
    assert!(fs::read(&kept).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(names(dir.path()), ["kept", "serial.log", "snapshot"]);
}

/// A memory file on a disk that is full, half of the first write on.
struct Full(File);

impl Target for Full {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(&bytes[..bytes.len() / 2], offset)?;
        Err(io::ErrorKind::StorageFull.into())
    }

    fn punch(&self, _offset: u64, _len: u64) -> nix::Result<()> {
        Err(nix::errno::Errno::ENOSPC)
    }

    fn seal(&self) -> io::Result<Option<seal::Seal>> {
        panic!("what was not written is not sealed")
    }
}

#[test]
fn an_update_that_fails_leaves_no_snapshot_and_a_good_guest() {
    let (dir, config) = snapshot();
    let mut opened = open(&config, &trace()).unwrap();
    let (memory, index) = (&opened.memory, &mut opened.index);
    remember(memory, b"kept");
    let file = memory_file::reopen(&config.snapshot_dir.join(MEMORY), memory).unwrap();
    let full = Full(file);
    update(&full, &config, &machine(&dir), memory, index, None).unwrap_err();
    let refused = refusal(&config);
    assert!(matches!(refused, Refused::Incomplete(_)), "{refused}");
    assert!(refused.to_string().contains("broken off"), "{refused}");
    // The guest runs on, and when it is tried again, all is well.
    assert_eq!(word(memory), *b"kept");
    write(&config, &machine(&dir), memory, Some(index), None).unwrap();
    assert_eq!(word(&open(&config, &trace()).unwrap().memory), *b"kept");
}

#[test]
fn a_failed_write_leaves_the_old_one() {
    let (dir, config) = snapshot();
    let memory = Memory::anonymous(config.memory_bytes()).unwrap();
    let blocked = sibling(&config.snapshot_dir, ".tmp");
    fs::write(&blocked, b"in the way").unwrap();
    write_new(&config, &machine(&dir), &memory).unwrap_err();
    open(&config, &trace()).unwrap();
}

#[test]
fn other_versions_and_other_files_are_named() {
    let (_dir, config) = snapshot();
    let path = config.snapshot_dir.join(STATE);
    let whole = fs::read(&path).unwrap();
    let mut newer = whole.clone();
    newer[8] = 9;
    let checksum = xxh3_64(&newer[..32]);
    newer[32..40].copy_from_slice(&checksum.to_le_bytes());
    fs::write(&path, newer).unwrap();
    assert!(matches!(refusal(&config), Refused::Format { found: 9 }));
    fs::write(&path, b"#!/bin/sh").unwrap();
    assert!(matches!(refusal(&config), Refused::StateLength { .. }));
    fs::write(&path, [b'x'; 100]).unwrap();
    assert!(matches!(refusal(&config), Refused::NotASnapshot(_)));
    fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
    assert!(matches!(refusal(&config), Refused::StateLength { .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(refusal(&config), Refused::Incomplete(_)));
}

#[test]
fn a_right_checksum_over_nonsense_is_no_panic() {
    let (_dir, config) = snapshot();
    let path = config.snapshot_dir.join(STATE);
    for payload in [&[][..], &[0xff; 64], &[0; 1000]] {
        fs::write(&path, [&header(payload)[..], payload].concat()).unwrap();
        assert!(matches!(
            refusal(&config),
            Refused::StateFormat(_) | Refused::Foreign { .. }
        ));
    }
}

#[test]
fn another_machines_snapshot_is_refused() {
    let (_dir, config) = snapshot();
    for other in [
        VmConfig {
            id: "m2".into(),
            ..config.clone()
        },
        VmConfig {
            vcpus: 2,
            ..config.clone()
        },
        VmConfig {
            memory_mib: 64,
            ..config
        },
    ] {
        assert!(matches!(refusal(&other), Refused::Foreign { .. }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any flipped bit and any cut of the state file is refused.
    #[test]
    fn any_damage_to_the_state_file_is_found(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let (_dir, config) = snapshot();
        let path = config.snapshot_dir.join(STATE);
        let whole = fs::read(&path).unwrap();
        let at = at.index(whole.len());
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << bit;
        fs::write(&path, &flipped).unwrap();
        refusal(&config);
        fs::write(&path, &whole[..at]).unwrap();
        refusal(&config);
        fs::write(&path, &whole).unwrap();
        open(&config, &trace()).unwrap();
    }
}
