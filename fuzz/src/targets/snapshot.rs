//! A snapshot's state file: raw, and as the content of a file whose checksums are right.
//!
//! Promised: what is refused is refused by an error; what is opened can be given to devices, which take
//! it or refuse it, run, and stop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use tern_vmm::config::{DiskConfig, MacAddr, VmConfig, VsockConfig};
use tern_vmm::kvm::VmState;
use tern_vmm::memory::Memory;
use tern_vmm::serial::SerialPort;
use tern_vmm::snapshot::{self, MachineState};
use tern_vmm::trace::Trace;
use tern_vmm::virtio::balloon::Balloon;
use tern_vmm::virtio::block::{Block, Way};
use tern_vmm::virtio::net::tap::Offloads;
use tern_vmm::virtio::net::{Link, Net};
use tern_vmm::virtio::rng::Rng;
use tern_vmm::virtio::transport::Transport;
use tern_vmm::virtio::vsock::Vsock;
use tern_vmm::virtio::{Device, DeviceState};

use crate::input::{Input, Program};

const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const CID: u32 = 7;
/// Bytes before the payload of a state file.
const HEADER: usize = 40;
/// A state file names one for each window of the bus; more are not looked at here.
const MOST_DEVICES: usize = 8;

thread_local! {
    static PLACE: Place = Place::new();
}

/// A Machine's directory with a whole snapshot, of which inputs replace the state file.
struct Place {
    _dir: tempfile::TempDir,
    config: VmConfig,
    state: PathBuf,
    whole: Vec<u8>,
    trace: Arc<Trace>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let config = VmConfig {
            id: "m1".into(),
            vcpus: 1,
            memory_mib: 1,
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
        let trace = Arc::new(Trace::new(Instant::now()));
        let vsock = VsockConfig {
            cid: CID,
            path: at("v"),
        };
        let devices: [Box<dyn Device>; 5] = [
            Box::new(Rng::default()),
            Box::new(Balloon::default()),
            Box::new(disk()),
            Box::new(card()),
            Box::new(Vsock::new(&vsock).unwrap()),
        ];
        let devices = devices
            .into_iter()
            .map(|device| {
                let ram = memory.ram().clone();
                let transport = Transport::new(device, ram, trace.clone()).unwrap();
                transport.save().unwrap()
            })
            .collect();
        let machine = MachineState {
            vm: VmState::default(),
            vcpus: Vec::new(),
            serial: SerialPort::new(&config.serial_log).unwrap().save(),
            devices,
        };
        snapshot::write(&config, &machine, &memory, None, None).unwrap();
        let state = config.snapshot_dir.join("state");
        Self {
            whole: std::fs::read(&state).unwrap(),
            _dir: dir,
            config,
            state,
            trace,
        }
    }

    fn open(&self, file: &[u8]) {
        std::fs::write(&self.state, file).unwrap();
        let Ok(opened) = snapshot::open(&self.config, &self.trace) else {
            return;
        };
        assert_eq!(opened.memory.size(), self.config.memory_bytes());
        let _ = SerialPort::restore(&self.config.serial_log, &opened.machine.serial);
        for state in opened.machine.devices.iter().take(MOST_DEVICES) {
            let Some(device) = self.device(&state.device) else {
                continue;
            };
            let ram = opened.memory.ram().clone();
            if let Ok(mut transport) = Transport::restore(device, state, ram, self.trace.clone()) {
                transport.resume();
                transport.read(0x70, &mut [0; 4]);
                transport.pause();
                transport.save().unwrap();
                transport.write(0x70, &[0; 4]);
            }
        }
    }

    /// As `Machine::restore` makes them, if this Machine has such a device.
    fn device(&self, state: &DeviceState) -> Option<Box<dyn Device>> {
        Some(match state {
            DeviceState::Rng => Box::new(Rng::default()),
            DeviceState::Balloon(_) => Box::new(Balloon::default()),
            DeviceState::Block(state) => {
                let disk = disk();
                disk.check(state).ok()?;
                Box::new(disk)
            }
            DeviceState::Net(state) => {
                state.check(MAC).ok()?;
                Box::new(card())
            }
            DeviceState::Vsock(state) => {
                let config = VsockConfig {
                    cid: CID,
                    path: self.config.control.with_file_name("v"),
                };
                state.check(&config).ok()?;
                Box::new(Vsock::restore(&config).unwrap())
            }
        })
    }
}

#[derive(Debug)]
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}

fn card() -> Net<Cable> {
    let socket = UnixDatagram::unbound().unwrap();
    socket.set_nonblocking(true).unwrap();
    Net::new(Cable(socket), MAC)
}

fn disk() -> Block {
    let file = std::fs::File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(4096).unwrap();
    let config = DiskConfig {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        read_only: true,
        rate_limit: None,
        engine: None,
    };
    Block::open_by(&config, 0, Way::Inline).unwrap()
}

pub fn run(bytes: &[u8]) {
    PLACE.with(|place| {
        let mut input = Input::new(bytes);
        match input.byte() % 3 {
            0 => place.open(input.rest()),
            1 => place.open(&snapshot::state_file(input.rest())),
            _ => {
                // A whole state whose content is changed in some places.
                let mut payload = place.whole[HEADER..].to_vec();
                while let Some(low) = input.step() {
                    let at = usize::from(u16::from_le_bytes([low, input.byte()]));
                    let at = at % payload.len();
                    let count = input.byte() % 16;
                    let with = input.bytes(count.into());
                    let end = (at + with.len()).min(payload.len());
                    payload[at..end].copy_from_slice(&with[..end - at]);
                }
                place.open(&snapshot::state_file(&payload));
            }
        }
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    PLACE.with(|place| {
        let raw = Program::default().byte(0).bytes(&place.whole);
        let content = Program::default().byte(1).bytes(&place.whole[HEADER..]);
        let changed = Program::default().byte(2).bytes(&[0, 0, 1, 2]);
        // Devices are at the end.
        let near_the_end = (place.whole.len() - HEADER - 60) as u16;
        let device = Program::default().byte(2).u16(near_the_end).bytes(&[2, 1]);
        vec![raw.0, content.0, changed.0, device.0]
    })
}
