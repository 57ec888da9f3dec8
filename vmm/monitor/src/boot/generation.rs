//! The generation of a guest: a number in its memory that is another one after every restore.
//!
//! A snapshot holds the state of the guest's random number generator. Resumed twice, it would give the
//! same "random" keys twice. Microsoft's "Virtual Machine Generation ID" is how a guest's own kernel
//! learns of that before its programs do: 16 random bytes that the DSDT's device `VGEN` points to, and an
//! event of the device `GED_` when they have changed (see [`super::acpi`]). Linux then mixes them into its
//! generator and reseeds it (`drivers/virt/vmgenid.c`, `CONFIG_VMGENID`).
//!
//! Guests whose kernel lacks that driver (Debian's for clouds) ignore both, and so does a guest that an
//! older monitor has booted, whose tables know nothing of it: the bytes are in memory that its e820 map
//! reserves too, and nobody has taken the interrupt line. These are reseeded by their init, which is told
//! of every resume. So the format of snapshots is the same with and without it.

use std::io;

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, layout};
use crate::kvm::{KvmError, call};
use crate::memory::GuestRam;

/// Bytes of it; as long as a GUID, but not laid out as one: guests take it as it is.
const BYTES: usize = 16;

/// Writes a new one. No processor may run yet: what it draws meanwhile could be drawn again.
pub fn renew(ram: &GuestRam) -> Result<(), BootError> {
    let mut id = [0; BYTES];
    // SAFETY: the pointer and length are those of a buffer of ours.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), BYTES, 0) };
    // Up to 256 bytes come whole, even if a signal arrives (getrandom(2)).
    if got != BYTES as isize {
        return Err(BootError::Random(io::Error::last_os_error()));
    }
    ram.write_slice(&id, GuestAddress(layout::GENERATION_ID))?;
    Ok(())
}

/// Tells the guest that it has changed. To be called when its interrupt controllers are what they were:
/// restoring these would take the edge back.
pub fn announce(vm: &VmFd) -> Result<(), KvmError> {
    // Not by an eventfd as devices do: KVM would deliver it at some later time, and this is done once, by
    // a thread that may still call what it likes.
    for level in [true, false] {
        vm.set_irq_line(layout::GENERATION_GSI, level)
            .map_err(call("KVM_IRQ_LINE"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    fn id(memory: &Memory) -> [u8; BYTES] {
        let at = GuestAddress(layout::GENERATION_ID);
        memory.ram().read_obj(at).unwrap()
    }

    #[test]
    fn every_generation_is_another_and_only_its_bytes_change() {
        let memory = Memory::anonymous(32 << 20).unwrap();
        let mut seen = vec![id(&memory)];
        for _ in 0..3 {
            renew(memory.ram()).unwrap();
            assert!(!seen.contains(&id(&memory)));
            seen.push(id(&memory));
        }
        let mut page = [0; 4096];
        let at = GuestAddress(layout::GENERATION_ID);
        memory.ram().read_slice(&mut page, at).unwrap();
        assert_eq!(page[BYTES..], [0; 4096 - BYTES]);
    }
}
