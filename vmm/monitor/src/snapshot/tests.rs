use super::*;
use crate::config::VmConfig;
use proptest::prelude::*;
use tempfile::TempDir;

/// A snapshot of nothing in particular: what is checked before KVM sees any of it.
fn snapshot() -> (TempDir, VmConfig) {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = VmConfig {
        id: "m1".into(),
        vcpus: 1,
        memory_mib: 32,
        cpu_template: Default::default(),
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
    write(&config.snapshot_dir, config, machine, memory, None, None)
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

#[test]
fn a_whole_snapshot_opens_and_a_second_replaces_it() {
    let (dir, config) = snapshot();
    let opened = open(&config, &trace()).unwrap();
    assert_eq!(opened.memory.size(), 32 << 20);
    // While it is in use, as when a Machine is suspended for the second time.
    write(
        &config.snapshot_dir,
        &config,
        &machine(&dir),
        &opened.memory,
        Some(&opened.index),
        None,
    )
    .unwrap();
    open(&config, &trace()).unwrap();
    let names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}: the snapshot and the serial log");
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
    assert!(matches!(refusal(&config), Refused::Read { .. }));
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
