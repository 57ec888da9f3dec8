//! A Machine in two files: `memory`, its RAM byte for byte, and `state`, everything else.
//!
//! ```text
//! state:   magic 8 │ version 4 │ reserved 4 │ payload length 8 │ payload checksum 8 │ header checksum 8
//!          payload: whose snapshot it is, the memory file's checksums and seal, processors, devices
//! memory:  guest RAM, range after range; pages of zeroes are holes
//! working_set:  advice for the next restore, not always there; see `working_set.rs`
//! ```
//!
//! A restore maps `memory` privately and runs at once: pages come from the page cache when the guest
//! touches them. So that a damaged file is refused all the same, `state` holds a checksum for each
//! [`CHUNK_BYTES`] of `memory`, and a *seal*: what the kernel says of the file that has just been
//! written (device, inode, size, modification and change time, in this boot of the host). A file that
//! still has its seal has not been written to since, and its pages are those that were written or their
//! copies on the host's disk; it is not read before it is needed. A file without it (copied, touched,
//! from before a restart of the host, which is when a crash may have left a part of it) is read and
//! checked whole before the guest runs.
//!
//! # The next snapshot
//!
//! The first one of a guest that was booted is a new directory, which takes its place by a rename. A guest
//! that was restored has `memory` under its memory, and its next snapshot writes to that very file
//! what has changed since (`writer.rs` says why the guest does not notice). So there is *none or the new
//! one*: `state` is removed first, then `memory` is updated, and the new `state` is renamed to its place
//! last. Whatever happens in between, a restore is refused, and the Machine starts cold. Nothing is lost
//! by that: the old snapshot is of a guest that has written to its disk since, and must not run again.
//! (The agent removes its own seal before it wakes a Machine, for the same reason.)
//!
//! A file that is not the mapped one any more, has a second name or cannot be opened for writing is left
//! alone, and the snapshot is a new directory again.
//!
//! # Damage
//!
//! Checksums are XXH3 of 64 bits: they find damage, not forgery. Whoever can write these files is the
//! user who runs the monitor, and a monitor that was taken over can forge its own Machine's. An update takes
//! a chunk with the checksum of before for the same; a guest that makes two that collide fools itself.

mod memory_file;
mod pagemap;
mod seal;
mod single_faults;
mod working_set;
mod writer;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::config::VmConfig;
use crate::kvm::VmState;
use crate::memory::Memory;
use crate::serial::SerialPortState;
use crate::trace::Trace;
use crate::vcpu::state::VcpuState;
use crate::virtio::transport::TransportState;
use writer::Target;

pub use memory_file::{CHUNK_BYTES, MemoryIndex};
pub use single_faults::SingleFaults;
pub use working_set::WorkingSet;

/// Everything of a Machine but its memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// Interrupt controllers, timer, clock.
    pub vm: VmState,
    /// Each processor.
    pub vcpus: Vec<VcpuState>,
    /// The serial port.
    pub serial: SerialPortState,
    /// Each virtio device, in the order of their windows.
    pub devices: Vec<TransportState>,
}

#[derive(Serialize)]
struct PayloadRef<'a> {
    identity: Identity,
    memory: &'a MemoryIndex,
    machine: &'a MachineState,
}

#[derive(Deserialize)]
struct Payload {
    identity: Identity,
    memory: MemoryIndex,
    machine: MachineState,
}

/// Whose snapshot it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    id: String,
    vcpus: u8,
    memory_bytes: u64,
}

/// Why a snapshot is not run. Each says what to do about it by being one: the Machine starts cold.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// A file is not there or cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state file, which is written last, is not there.
    #[error("there is no snapshot, or writing it was broken off: {0} is missing")]
    Incomplete(PathBuf),
    /// Not a snapshot at all.
    #[error("{0} is not a snapshot's state file")]
    NotASnapshot(PathBuf),
    /// Written by another version of this program.
    #[error("the snapshot has format {found}, this monitor reads format {FORMAT}")]
    Format {
        /// What it says.
        found: u32,
    },
    /// The state file is shorter or longer than it says.
    #[error(
        "the state file has {found} bytes, its header says {expected}: it is truncated or not complete"
    )]
    StateLength {
        /// What is there.
        found: u64,
        /// What should be.
        expected: u64,
    },
    /// Some byte of the state file is not what was written.
    #[error("the state file is damaged: its {0} does not match its checksum")]
    StateDamaged(&'static str),
    /// The checksum is right, and the content makes no sense.
    #[error("the state file cannot be understood: {0}")]
    StateFormat(postcard::Error),
    /// Taken of another Machine, or of this one with another size.
    #[error("the snapshot is of {found}, this is {expected}")]
    Foreign {
        /// What it was taken of.
        found: String,
        /// What the configuration says.
        expected: String,
    },
    /// The memory file is shorter or longer than what was written.
    #[error(
        "the memory file has {found} bytes, the snapshot has {expected}: it is truncated or not complete"
    )]
    MemoryLength {
        /// What is there.
        found: u64,
        /// What should be.
        expected: u64,
    },
    /// Some byte of the memory file is not what was written.
    #[error("the memory file is damaged near offset {offset:#x}: it does not match its checksum")]
    MemoryDamaged {
        /// Where the chunk starts.
        offset: u64,
    },
    /// Guest memory could not be mapped.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// Taken on a processor with features that this host's does not have.
    #[error("the snapshot was taken on another kind of processor: {0}")]
    Processor(String),
    /// KVM would not take the state.
    #[error("this host's KVM does not take the snapshot's state: {0}")]
    Kvm(crate::kvm::KvmError),
    /// A device would not take its state.
    #[error("device {index} ({kind}): {source}")]
    Device {
        /// Which.
        index: usize,
        /// What it is.
        kind: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The Machine has other devices than it had.
    #[error(
        "the snapshot has {found} devices and {found_vcpus} processors, this Machine {expected} and {expected_vcpus}"
    )]
    Shape {
        /// Devices in the snapshot.
        found: usize,
        /// Devices in the configuration.
        expected: usize,
        /// Processors in the snapshot.
        found_vcpus: usize,
        /// Processors in the configuration.
        expected_vcpus: usize,
    },
}

const MAGIC: [u8; 8] = *b"TERNSNAP";
/// Raised with every change of what is in `state`, which is read by the version that wrote it.
const FORMAT: u32 = 2;
const HEADER_BYTES: usize = 40;
/// Some 100 KiB per processor, and 8 bytes per chunk of memory: 256 GiB take 32 MiB.
const MAX_STATE_BYTES: u64 = 64 << 20;
const STATE: &str = "state";
/// What becomes [`STATE`] when all is written.
const NEW_STATE: &str = "state.new";
const MEMORY: &str = "memory";
const WORKING_SET: &str = "working_set";

/// Writes a snapshot of a paused Machine: whole, or not at all. With the `index` of the file under its
/// memory that file is updated, and there is no snapshot until that is done; else a new one takes the place
/// of what is there.
///
/// Nothing is flushed to the disk: after a crash of the host its seal is void, and a file that did
/// not get there whole does not pass its checksums.
pub fn write(
    config: &VmConfig,
    machine: &MachineState,
    memory: &Memory,
    index: Option<&mut MemoryIndex>,
    working_set: Option<&WorkingSet>,
) -> io::Result<()> {
    if let Some(index) = index {
        match memory_file::reopen(&config.snapshot_dir.join(MEMORY), memory) {
            Ok(file) => return update(&file, config, machine, memory, index, working_set),
            Err(error) => tracing::info!(%error, "the memory file is not updated but written anew"),
        }
    }
    write_whole(config, machine, memory, working_set)
}

/// Updates the memory file, with no snapshot around it before it is done.
fn update(
    file: &impl Target,
    config: &VmConfig,
    machine: &MachineState,
    memory: &Memory,
    index: &mut MemoryIndex,
    working_set: Option<&WorkingSet>,
) -> io::Result<()> {
    let dir = &config.snapshot_dir;
    for name in [STATE, NEW_STATE, WORKING_SET] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    writer::update(file, memory, index)?;
    let state = state_file(&payload(config, machine, index)?);
    write_beside(dir, NEW_STATE, &state, working_set)?;
    fs::rename(dir.join(NEW_STATE), dir.join(STATE))
}

fn write_whole(
    config: &VmConfig,
    machine: &MachineState,
    memory: &Memory,
    working_set: Option<&WorkingSet>,
) -> io::Result<()> {
    let temporary = sibling(&config.snapshot_dir, ".tmp");
    remove(&temporary)?;
    fs::create_dir(&temporary)?;
    let written = (|| {
        let index = writer::write_whole(&temporary.join(MEMORY), memory)?;
        let state = state_file(&payload(config, machine, &index)?);
        write_beside(&temporary, STATE, &state, working_set)?;
        replace(&temporary, &config.snapshot_dir)
    })();
    if written.is_err() {
        let _ = remove(&temporary);
    }
    written
}

fn payload(config: &VmConfig, machine: &MachineState, memory: &MemoryIndex) -> io::Result<Vec<u8>> {
    let payload = PayloadRef {
        identity: Identity::of(config),
        memory,
        machine,
    };
    postcard::to_stdvec(&payload).map_err(io::Error::other)
}

/// Writes what is beside a memory file that is complete.
fn write_beside(
    dir: &Path,
    name: &str,
    state: &[u8],
    working_set: Option<&WorkingSet>,
) -> io::Result<()> {
    if let Some(set) = working_set {
        fs::write(dir.join(WORKING_SET), set.to_bytes())?;
    }
    File::create_new(dir.join(name))?.write_all(state)
}

/// Opens what [`write()`] needs of `/proc`, for a process that will soon be without it, or may not open it.
pub fn prepare() -> io::Result<()> {
    pagemap::pagemap()?;
    seal::boot_id().map(drop)
}

/// Opens a file of a snapshot: a plain file, in a directory that is one.
///
/// The directory belongs to the Machine's own monitor, and who reads it next may still be root: a link
/// out of it is not followed.
fn open_plain(path: &Path, access: OFlag) -> io::Result<File> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(dir, flags | OFlag::O_DIRECTORY, Mode::empty())?;
    let file = File::from(openat(dir, name, flags | access, Mode::empty())?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a plain file"))
    }
}

/// A snapshot that has been checked, with its memory mapped.
pub struct Opened {
    /// Everything but the memory.
    pub machine: MachineState,
    /// The memory.
    pub memory: Memory,
    /// The checksums of the file under it, for the next snapshot.
    pub index: MemoryIndex,
    /// What the guest touched when it last woke, if that is known.
    pub working_set: Option<WorkingSet>,
}

/// Reads and checks the snapshot in `config.snapshot_dir`.
pub fn open(config: &VmConfig, trace: &Trace) -> Result<Opened, Refused> {
    let state_path = config.snapshot_dir.join(STATE);
    let payload = read_state(&state_path)?;
    let payload: Payload = postcard::from_bytes(&payload).map_err(Refused::StateFormat)?;
    let expected = Identity::of(config);
    if payload.identity != expected {
        return Err(Refused::Foreign {
            found: payload.identity.to_string(),
            expected: expected.to_string(),
        });
    }
    trace.mark("state_read");
    let path = config.snapshot_dir.join(MEMORY);
    let file = memory_file::open(&path, config.memory_bytes(), &payload.memory)?;
    trace.mark("memory_checked");
    let memory = Memory::from_file(file, config.memory_bytes())?;
    trace.mark("memory_mapped");
    let path = config.snapshot_dir.join(WORKING_SET);
    let working_set = WorkingSet::read(&path, config.memory_bytes()).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "the working set is ignored");
        None
    });
    Ok(Opened {
        machine: payload.machine,
        memory,
        index: payload.memory,
        working_set,
    })
}

impl Identity {
    fn of(config: &VmConfig) -> Self {
        Self {
            id: config.id.clone(),
            vcpus: config.vcpus,
            memory_bytes: config.memory_bytes(),
        }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            id,
            vcpus,
            memory_bytes,
        } = self;
        write!(
            f,
            "Machine {id:?} with {vcpus} vCPUs and {} MiB",
            memory_bytes >> 20
        )
    }
}

/// A state file that holds `payload`. Public for the fuzzer, which would not guess checksums.
#[doc(hidden)]
pub fn state_file(payload: &[u8]) -> Vec<u8> {
    [&header(payload), payload].concat()
}

fn header(payload: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    header[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    header[24..32].copy_from_slice(&xxh3_64(payload).to_le_bytes());
    let checksum = xxh3_64(&header[..32]);
    header[32..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Reads the state file and returns its payload, checked against the header.
fn read_state(path: &Path) -> Result<Vec<u8>, Refused> {
    let read = |source| Refused::Read {
        path: path.to_owned(),
        source,
    };
    let file = open_plain(path, OFlag::O_RDONLY).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Refused::Incomplete(path.to_owned()),
        _ => read(error),
    })?;
    let found = file.metadata().map_err(read)?.len();
    if found > MAX_STATE_BYTES {
        return Err(Refused::NotASnapshot(path.to_owned()));
    }
    let mut bytes = Vec::with_capacity(found as usize + 1);
    file.take(MAX_STATE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    let Some((head, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(Refused::StateLength {
            found,
            expected: HEADER_BYTES as u64,
        });
    };
    if head[..8] != MAGIC {
        return Err(Refused::NotASnapshot(path.to_owned()));
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&head[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if number(32) != xxh3_64(&head[..32]) {
        return Err(Refused::StateDamaged("header"));
    }
    let format = number(8) as u32; // the low half
    if format != FORMAT {
        return Err(Refused::Format { found: format });
    }
    if number(16) != payload.len() as u64 {
        let expected = number(16).saturating_add(HEADER_BYTES as u64);
        return Err(Refused::StateLength { found, expected });
    }
    if number(24) != xxh3_64(payload) {
        return Err(Refused::StateDamaged("content"));
    }
    Ok(payload.to_vec())
}

fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(dir.as_os_str());
    name.push(suffix);
    name.into()
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Puts `temporary` in the place of `dir` in one step, whether or not something is there.
fn replace(temporary: &Path, dir: &Path) -> io::Result<()> {
    match renameat2(
        AT_FDCWD,
        temporary,
        AT_FDCWD,
        dir,
        RenameFlags::RENAME_EXCHANGE,
    ) {
        Ok(()) => remove(temporary),
        Err(nix::errno::Errno::ENOENT) => fs::rename(temporary, dir),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests;
