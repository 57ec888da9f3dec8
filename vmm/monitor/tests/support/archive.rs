//! A newc archive with busybox, socat and an `/init` that serves a shell and an echo on vsock.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::which;

/// Loads the modules, starts the network, runs what is sent to port 1000, sends back what is sent to
/// port 1001 (a shell would read ahead of `exec cat`). Both have the connection itself (`nofork`): a
/// socat in between never ends when its shell does before what the shell left in the background.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod /lib/modules/$module; done < /lib/modules-list
ip link set lo up
ip addr add 192.0.2.2/24 dev eth0
ip link set eth0 up
socat VSOCK-LISTEN:1000,reuseaddr,fork,backlog=64 EXEC:/bin/sh,nofork &
socat VSOCK-LISTEN:1001,reuseaddr,fork,backlog=64 EXEC:/bin/cat,nofork &
echo "test guest is ready" > /dev/console
while :; do wait; sleep 1; done
"#;

/// The archive's bytes.
pub fn shell_archive() -> Vec<u8> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, INIT.as_bytes());
    let mut libraries = BTreeSet::new();
    for program in ["busybox", "socat"] {
        let path = which(program);
        archive.file(&format!("bin/{program}"), 0o755, &fs::read(&path).unwrap());
        libraries.extend(libraries_of(&path));
    }
    for library in libraries {
        let name = library.to_str().unwrap().trim_start_matches('/').to_owned();
        archive.file(&name, 0o755, &fs::read(&library).unwrap());
    }
    archive.finish()
}

fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .expect("ldd is part of libc-bin");
    String::from_utf8(output.stdout)
        .unwrap()
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

/// "New ASCII" cpio, as the kernel unpacks it.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        let parents: Vec<_> = name
            .match_indices('/')
            .map(|(at, _)| name[..at].to_owned())
            .collect();
        for parent in parents {
            if self.directories.insert(parent.clone()) {
                self.entry(&parent, 0o040_755, &[]);
            }
        }
        self.entry(name, 0o100_000 | mode, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
