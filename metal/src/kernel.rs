//! Which kernel a virtual host runs, and how the ELF is taken out of its bzImage.
//!
//! Under emulation the kernel's own decompressor takes three seconds; done once, outside, it takes
//! one. QEMU starts an ELF with a PVH note directly. The layout of a bzImage's setup header is the
//! kernel's Documentation/arch/x86/boot.rst.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

/// Where the kernel of a virtual host comes from. Each is what `linux-image-amd64` stands for there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Origin {
    /// That of the Debian release
    // An empty variable is an unset one, as with TERN_METAL.
    #[default]
    #[value(alias = "")]
    Stable,
    /// The newer one of its backports
    Backports,
}

impl Origin {
    /// As it is chosen on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Backports => "backports",
        }
    }
}

/// Compression formats Debian and others use: first bytes, the program that undoes it, the package
/// that has the program.
const FORMATS: [(&[u8], &[&str], &str); 4] = [
    (b"\xfd7zXZ\0", &["xz", "-dc"], "xz-utils"),
    (b"\x02\x21\x4c\x18", &["lz4", "-dc"], "lz4"),
    (b"\x28\xb5\x2f\xfd", &["zstd", "-dc"], "zstd"),
    (b"\x1f\x8b", &["gzip", "-dc"], "gzip"),
];

/// The compressed ELF inside a bzImage.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let byte = |at: usize| image.get(at).copied().context("it is too short");
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("it is too short")?;
        Ok(u32::from_le_bytes(bytes.try_into().context("four bytes")?) as usize)
    };
    ensure!(
        image.get(0x202..0x206) == Some(b"HdrS".as_slice()),
        "it has no setup header"
    );
    let setup_sectors = match byte(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let end = start
        .checked_add(word(0x24c)?)
        .context("its payload is out of range")?;
    image.get(start..end).context("its payload is cut off")
}

/// The ELF kernel of a bzImage.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("this is no bzImage")?;
    let Some((_, command, package)) = FORMATS
        .iter()
        .find(|(magic, ..)| payload.starts_with(magic))
    else {
        bail!("the kernel is compressed in a way that is not known here");
    };
    // The last four bytes are the uncompressed size, added by the kernel's build.
    let stream = &payload[..payload.len() - 4];
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {0}: apt-get install {package}", command[0]))?;
    let mut stdin = child.stdin.take().context("its input is a pipe")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(stream));
        child.wait_with_output()
    })?;
    ensure!(
        output.status.success() && output.stdout.starts_with(b"\x7fELF"),
        "{} found no ELF kernel in the bzImage: {}",
        command[0],
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage around `payload`, with two setup sectors.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn finds_and_decompresses_the_kernel() {
        let mut gzip = Command::new("gzip")
            .arg("-c")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        gzip.stdin
            .take()
            .unwrap()
            .write_all(b"\x7fELF and more")
            .unwrap();
        let mut payload = gzip.wait_with_output().unwrap().stdout;
        payload.extend_from_slice(&13u32.to_le_bytes());
        assert_eq!(unpack(&image(&payload)).unwrap(), b"\x7fELF and more");
    }

    #[test]
    fn says_what_is_wrong_with_an_image() {
        for (image, reason) in [
            (vec![0; 4096], "no setup header"),
            (b"short".to_vec(), "no setup header"),
            (image(b"????????"), "not known here"),
            (image(b"\x1f\x8bnot really gzip"), "no ELF kernel"),
        ] {
            let error = format!("{:#}", unpack(&image).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
        let mut cut = image(b"\x1f\x8b....");
        cut.truncate(cut.len() - 1);
        assert!(format!("{:#}", unpack(&cut).unwrap_err()).contains("cut off"));
    }
}
