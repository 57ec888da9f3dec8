use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use tar::EntryType;

use super::pax::time;
use super::*;

use crate::test_layer::Layer;

fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, Error> {
    let mut archive = Archive::new(bytes, &Limits::default());
    let mut entries = Vec::new();
    while let Some(entry) = archive.next()? {
        let mut content = Vec::new();
        archive.read_to_end(&mut content)?;
        assert_eq!(content.len() as u64, entry.size);
        entries.push((entry, content));
    }
    Ok(entries)
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes)
        .expect_err("the archive was accepted")
        .to_string()
}

/// One of everything.
fn sample() -> Vec<u8> {
    Layer::new()
        .mode(0o4755)
        .owner(1000, 2_000_000)
        .file("bin/su", b"content")
        .dir("etc/")
        .symlink("etc/link", "../target")
        .hard_link("etc/hard", "bin/su")
        .device("dev/null", true, 1, 3)
        .device("dev/vda", false, 254, 0)
        .fifo("run/pipe")
        .file(&format!("long/{}", "n".repeat(200)), b"x")
        .symlink("long/link", &"t".repeat(300))
        .pax(&[
            ("SCHILY.xattr.user.raw", b"a\nb\0c=d"),
            ("mtime", b"1234567890.5"),
        ])
        .file("with/xattr", vec![7; 1024])
        .bytes()
}

#[test]
fn reads_one_of_everything() {
    let entries = read(&sample()).unwrap();
    let kinds: Vec<&Kind> = entries.iter().map(|(entry, _)| &entry.kind).collect();
    assert_eq!(
        kinds,
        [
            &Kind::File,
            &Kind::Directory,
            &Kind::Symlink(b"../target".to_vec()),
            &Kind::HardLink(b"bin/su".to_vec()),
            &Kind::Device {
                character: true,
                major: 1,
                minor: 3
            },
            &Kind::Device {
                character: false,
                major: 254,
                minor: 0
            },
            &Kind::Fifo,
            &Kind::File,
            &Kind::Symlink(vec![b't'; 300]),
            &Kind::File,
        ]
    );
    let (su, content) = &entries[0];
    assert_eq!(
        (su.mode, su.uid, su.gid, &**content),
        (0o4755, 1000, 2_000_000, &b"content"[..])
    );
    assert_eq!(
        su.mtime,
        Time {
            seconds: 1_700_000_000,
            nanos: 0
        }
    );
    assert_eq!(entries[7].0.path.len(), 205);
    let (last, content) = &entries[9];
    assert_eq!(last.xattrs[&b"user.raw"[..]], b"a\nb\0c=d");
    assert_eq!(
        last.mtime,
        Time {
            seconds: 1_234_567_890,
            nanos: 500_000_000
        }
    );
    assert_eq!(content, &[7; 1024]);
}

#[test]
fn agrees_with_gnu_tar_in_every_format_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let long = format!("{}/{}", "d".repeat(80), "f".repeat(90));
    std::fs::create_dir(root.join("d".repeat(80))).unwrap();
    for (name, content) in [("a", &b"hello"[..]), ("empty", b""), (&long, &[1; 513])] {
        std::fs::write(root.join(name), content).unwrap();
    }
    std::os::unix::fs::symlink("a", root.join("link")).unwrap();
    std::fs::hard_link(root.join("a"), root.join("hard")).unwrap();

    for format in ["v7", "ustar", "gnu", "oldgnu", "pax"] {
        let names = if format == "v7" {
            vec!["a", "empty", "link"]
        } else {
            vec!["."]
        };
        let output = Command::new("tar")
            .args([
                "-C",
                path(root),
                "--sort=name",
                &format!("--format={format}"),
                "-cf",
                "-",
            ])
            .args(names)
            .output()
            .expect("GNU tar is needed: apt-get install tar");
        assert!(
            output.status.success(),
            "{format}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let entries = read(&output.stdout).unwrap();
        assert!(entries.len() >= 3, "{format}: {entries:?}");
        for (entry, content) in entries {
            let there = root.join(std::str::from_utf8(&entry.path).unwrap());
            match entry.kind {
                Kind::File => assert_eq!(content, std::fs::read(there).unwrap(), "{format}"),
                Kind::Directory => assert!(there.is_dir()),
                Kind::Symlink(target) => assert_eq!(target, b"a"),
                Kind::HardLink(target) => assert!(target == b"./a" || target == b"./hard"),
                other => panic!("{format}: {other:?}"),
            }
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn an_archive_may_end_without_its_end_mark_but_not_within_an_entry() {
    let whole = sample();
    let end = whole.len() - 1024;
    assert_eq!(read(&whole[..end]).unwrap().len(), 10);
    for cut in (1..end).step_by(97).chain([end - 1, end - 1023]) {
        if let Ok(entries) = read(&whole[..cut]) {
            assert!(cut % BLOCK == 0 && entries.len() < 10, "cut at {cut}");
        }
    }
}

#[test]
fn only_files_have_content() {
    let layer = Layer::new()
        .entry(EntryType::Link, "b", "a", b"", |header| {
            header.set_size(4096)
        })
        .file("c", b"next");
    let entries = read(&layer.bytes()).unwrap();
    assert_eq!(entries[1].0.path, b"c");
}

#[test]
fn pax_sizes_count_and_empty_records_do_not() {
    let pax = |records: &[(&str, &[u8])]| {
        Layer::new()
            .pax(records)
            .entry(EntryType::Regular, "short", "", b"12345", |header| {
                header.set_size(1)
            })
            .file("next", b"")
            .bytes()
    };
    let entries = read(&pax(&[("size", b"5"), ("path", b"renamed")])).unwrap();
    assert_eq!(
        (&*entries[0].0.path, &*entries[0].1),
        (&b"renamed"[..], &b"12345"[..])
    );
    let entries = read(&pax(&[
        ("path", b""),
        ("uid", b"4000000000"),
        ("size", b""),
    ]))
    .unwrap();
    assert_eq!(
        (&*entries[0].0.path, entries[0].0.uid),
        (&b"short"[..], 4_000_000_000)
    );
}

#[test]
fn refuses_what_it_cannot_read_faithfully() {
    let pax = |key, value| Layer::new().pax(&[(key, value)]).file("x", b"").bytes();
    let of_type = |kind| {
        Layer::new()
            .entry(EntryType::new(kind), "x", "", b"", |_| ())
            .bytes()
    };
    for (archive, reason) in [
        (pax("GNU.sparse.major", b"1"), "a sparse file"),
        (of_type(b'S'), "a sparse file"),
        (of_type(b'M'), "multi-volume"),
        (of_type(b'Z'), "unknown type"),
        (pax("path", b"a\0b"), "NUL"),
        (pax("size", b"-1"), "not one"),
        (pax("size", b"+1"), "not one"),
        (pax("uid", b"4294967296"), "owner is out of range"),
        (pax("mtime", b"1.x"), "not one"),
        (Layer::new().symlink("x", "").bytes(), "no target"),
        (
            Layer::new().device("x", true, 4096, 0).bytes(),
            "device number",
        ),
        (pax("SCHILY.xattr.user.x", &[0; 70_000]), "too long"),
        (Layer::new().pax(&[("path", b"x")]).bytes(), "truncated"),
        (
            Layer::new()
                .pax(&[("comment", &[0; 2 << 20])])
                .file("x", b"")
                .bytes(),
            "1 MiB",
        ),
        (
            Layer::new()
                .entry(EntryType::Regular, "x", "", b"", |h| {
                    h.set_size(u64::MAX >> 2)
                })
                .bytes(),
            "truncated",
        ),
    ] {
        let refusal = refusal(&archive);
        assert!(
            refusal.contains(reason),
            "{refusal:?} does not say {reason:?}"
        );
    }

    let mut broken = sample();
    broken[0] ^= 1;
    assert!(refusal(&broken).contains("checksum"));
    let mut lone_zero_block = vec![0; BLOCK];
    lone_zero_block.extend(sample());
    assert!(refusal(&lone_zero_block).contains("end mark"));
}

#[test]
fn broken_pax_records_are_refused() {
    for text in [
        "9",
        "99999999999999999999 a=b\n",
        "3 \n",
        "6 a=b",
        "7 a=bb",
        "0 a=b\n",
        "-6 a=b\n",
        "5 ab\n",
    ] {
        let parsed = Pax::parse(text.as_bytes(), 100);
        assert!(parsed.is_err(), "{text:?}");
    }
    assert!(Pax::parse(b"6 a=b\n", 100).is_ok());
}

#[test]
fn numbers_are_octal_or_binary() {
    for (field, value) in [
        (&b"0000644\0"[..], Some(0o644)),
        (b"   644 \0", Some(0o644)),
        (b"\0\0\0\0", Some(0)),
        (b"        ", Some(0)),
        (b"77777777777", Some(0o77_777_777_777)),
        (b"\x80\0\0\x01\0", Some(256)),
        (b"\xff\xff\xff\xfe", Some(-2)),
        (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff", None),
        (b"648", None),
        (b"-1", None),
    ] {
        assert_eq!(numeric(field), value, "{field:?}");
    }
}

#[test]
fn times_have_fractions_and_may_lie_before_1970() {
    let at = |seconds, nanos| Some(Time { seconds, nanos });
    assert_eq!(time(b"12"), at(12, 0));
    assert_eq!(time(b"12.000000001999"), at(12, 1));
    assert_eq!(time(b"-1.25"), at(-2, 750_000_000));
    assert_eq!(time(b"-0.5"), at(-1, 500_000_000));
    assert_eq!(time(b"1.2.3"), None);
    assert_eq!(time(b""), None);
}

proptest! {
    #[test]
    fn a_damaged_archive_never_panics(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        fix_checksums in any::<bool>(),
    ) {
        let mut bytes = sample();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if fix_checksums {
            // So that damage gets past the first check.
            for block in bytes.chunks_exact_mut(BLOCK).filter(|block| &block[257..262] == b"ustar") {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let _ = read(&bytes);
    }

    #[test]
    fn pax_garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _ = Pax::parse(&bytes, 64);
        let _ = time(&bytes);
        let _ = numeric(&bytes);
    }

    #[test]
    fn pax_records_are_read_back(
        key in "[a-z]{1,20}",
        value in proptest::collection::vec(any::<u8>(), 1..200),
    ) {
        let bytes = Layer::new().pax(&[(&format!("SCHILY.xattr.user.{key}"), &value)]).file("x", b"").bytes();
        let entries = read(&bytes).unwrap();
        prop_assert_eq!(&entries[0].0.xattrs[format!("user.{key}").as_bytes()], &value);
    }
}
