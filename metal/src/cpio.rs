//! Writes "newc" cpio archives, as the kernel takes them for initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Several may be concatenated.

use std::io::{self, Write};

/// Appends one regular file, owned by root.
pub fn file(to: &mut impl Write, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
    const REGULAR: u32 = 0o100_000;
    entry(to, name, REGULAR | (mode & 0o7777), contents)
}

/// Ends the archive.
pub fn end(to: &mut impl Write) -> io::Result<()> {
    entry(to, "TRAILER!!!", 0, &[])
}

fn entry(to: &mut impl Write, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
    let size = u32::try_from(contents.len())
        .map_err(|_| io::Error::other(format!("{name} is too large for a cpio archive")))?;
    let name_size = name.len() + 1;
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
    // namesize, check
    let fields = [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size as u32, 0];
    to.write_all(b"070701")?;
    for field in fields {
        write!(to, "{field:08X}")?;
    }
    to.write_all(name.as_bytes())?;
    // Header (110 bytes) and name together, then the contents, end on multiples of four.
    to.write_all(&[0; 4][..1 + (4 - (110 + name_size) % 4) % 4])?;
    to.write_all(contents)?;
    to.write_all(&[0; 3][..(4 - contents.len() % 4) % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_program_reads_the_archive() {
        let mut archive = Vec::new();
        let files: [(&str, &[u8]); 4] = [
            ("a", b"1"),
            ("bc", b"22"),
            ("def", b"333"),
            ("ghij", b"4444"),
        ];
        for (name, contents) in files {
            file(&mut archive, name, 0o640, contents).unwrap();
        }
        end(&mut archive).unwrap();
        assert_eq!(archive.len() % 4, 0);

        let dir = tempfile::tempdir().unwrap();
        let mut cpio = std::process::Command::new("cpio")
            .args(["-i", "--quiet"])
            .current_dir(dir.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("this test needs cpio: apt-get install cpio");
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(cpio.wait().unwrap().success());
        for (name, contents) in files {
            let path = dir.path().join(name);
            assert_eq!(std::fs::read(&path).unwrap(), contents);
            let mode = std::os::unix::fs::PermissionsExt::mode(
                &std::fs::metadata(&path).unwrap().permissions(),
            );
            assert_eq!(mode & 0o7777, 0o640);
        }
    }
}
