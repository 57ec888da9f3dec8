//! What a guest has to mend after it was asleep: its clock, and its random numbers.
//!
//! While the guest sleeps its wall clock stands still, which breaks TLS and every token with a date. The monitor sets
//! it on before the guest runs, by KVM's clock; here it is mended where a guest goes by another.
//! And two guests restored from one snapshot would draw the same random numbers, unless something
//! that only one of them knows is stirred in.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use tern_guest::message::MIN_ENTROPY;

/// Sets the clock to `unix_nanos`, unless it is about right, and reseeds the kernel's random number generator.
pub fn resumed(unix_nanos: u64, entropy: &[u8]) -> io::Result<()> {
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy.len()) {
        let message = format!(
            "{} bytes of entropy are not from {MIN_ENTROPY} to {MAX_ENTROPY}",
            entropy.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let right = Duration::from_nanos(unix_nanos);
    let own = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
    // A step under an app that is at work already costs more than it mends.
    if right.abs_diff(own) >= TOLERANCE {
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(right))?;
    }
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    add_entropy(&random, entropy)
}

/// See `random(4)`: what is added counts as unpredictable, and the generator takes it up at once.
fn add_entropy(random: &File, entropy: &[u8]) -> io::Result<()> {
    let length = i32::try_from(entropy.len()).map_err(io::Error::other)?;
    // `struct rand_pool_info`: how many bits to count, how many bytes follow, the bytes as words.
    let mut info = Vec::with_capacity(8 + entropy.len());
    info.extend_from_slice(&(length * 8).to_ne_bytes());
    info.extend_from_slice(&length.to_ne_bytes());
    info.extend_from_slice(entropy);
    // SAFETY: the kernel reads the two numbers and then as many bytes as the second one says, all of
    // which are in `info`; it copies byte-wise, so their alignment does not matter.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) };
    if added < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this request takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What a guest's clock may be off: the host's word for it takes some milliseconds, too.
const TOLERANCE: Duration = Duration::from_millis(10);
/// `_IOW('R', 0x03, int[2])` of `linux/random.h`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// More than the generator's whole state.
const MAX_ENTROPY: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_entropy_changes_nothing() {
        let error = resumed(0, &[0; MIN_ENTROPY - 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(resumed(0, &[0; MAX_ENTROPY + 1]).is_err());
    }

    #[test]
    fn the_kernel_understands_how_entropy_is_added() {
        let random = OpenOptions::new().write(true).open("/dev/urandom").unwrap();
        match add_entropy(&random, b"anything does no harm, as it is only stirred in") {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
        }
    }
}
