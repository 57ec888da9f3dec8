//! Layers of an image, to an EROFS disk: as they come, and as tar entries whose checksums are right.
//!
//! Promised: a disk within its limits, the same for the same layers, or an error.

use tern_image::{Limits, fuzzing};

use crate::input::{Input, Program};

const BLOCK: usize = 512;

fn limits() -> Limits {
    Limits {
        unpacked_bytes: 1 << 20,
        entries: 200,
        metadata_bytes: 64 << 10,
        path_bytes: 1024,
        depth: 16,
        xattr_bytes: 4 << 10,
        ..Limits::default()
    }
}

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let layers = match input.byte() % 3 {
        0 => vec![input.rest().to_vec()],
        1 => {
            let first = input.u16();
            let first = input.bytes(first.into()).to_vec();
            vec![repaired(first), repaired(input.rest().to_vec())]
        }
        _ => written(&mut input),
    };
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let limits = limits();
    let Ok(disk) = fuzzing::convert(&layers, &limits) else {
        return;
    };
    assert!(disk.len().is_multiple_of(4096));
    assert_eq!(disk[1024..1028], [0xe2, 0xe1, 0xf5, 0xe0], "EROFS's magic");
    // Contents, and for each entry, the directories above it included, some blocks at the very most.
    let most = limits.unpacked_bytes as usize * 2 + limits.entries as usize * 16 * 8 * 4096;
    assert!(disk.len() <= most, "{} bytes", disk.len());
    assert!(
        fuzzing::convert(&layers, &limits).unwrap() == disk,
        "another disk"
    );
}

/// Puts the right checksum into whatever stands where a header may.
fn repaired(mut archive: Vec<u8>) -> Vec<u8> {
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    for block in archive.chunks_mut(BLOCK) {
        if block[257..262] == *b"ustar" {
            seal(block);
        }
    }
    archive
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Archives of entries, each a few bytes of the input.
fn written(input: &mut Input<'_>) -> Vec<Vec<u8>> {
    let mut layers = vec![Vec::new()];
    while let Some(kind) = input.step() {
        if kind == 0xff {
            if layers.len() < 4 {
                layers.push(Vec::new());
            }
            continue;
        }
        let name_len = input.byte() % 100;
        let name = input.bytes(name_len.into());
        let link_len = input.byte() % 100;
        let link = input.bytes(link_len.into());
        let content_len = input.byte();
        let content = input.bytes(content_len.into());
        let layer = layers.last_mut().unwrap();
        layer.extend(header(kind, name, link, content.len()));
        layer.extend(content);
        layer.resize(layer.len().next_multiple_of(BLOCK), 0);
    }
    layers
}

fn header(kind: u8, name: &[u8], link: &[u8], size: usize) -> [u8; BLOCK] {
    const KINDS: &[u8] = b"01234567gxLKS\0";
    let mut block = [0; BLOCK];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0004755");
    block[108..115].copy_from_slice(b"0000001");
    block[116..123].copy_from_slice(b"0000002");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[136..147].copy_from_slice(b"14530340000");
    block[156] = KINDS[usize::from(kind) % KINDS.len()];
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[329..336].copy_from_slice(b"0000001");
    block[337..344].copy_from_slice(b"0000003");
    seal(&mut block);
    block
}

pub fn seeds() -> Vec<Vec<u8>> {
    let entry = |program: Program, kind: u8, name: &[u8], link: &[u8], content: &[u8]| {
        let program = program.bytes(&[kind, name.len() as u8]).bytes(name);
        let program = program.byte(link.len() as u8).bytes(link);
        program.byte(content.len() as u8).bytes(content)
    };
    let tree = entry(Program::default(), 5, b"a/", b"", b"");
    let tree = entry(tree, 0, b"a/b", b"", b"hello");
    let tree = entry(tree, 1, b"c", b"a/b", b"");
    let tree = entry(tree, 2, b"d", b"/a/../a", b"");
    let tree = entry(tree, 0, b"d/e", b"", b"through a link");
    let tree = entry(tree, 3, b"null", b"", b"");
    let tree = entry(tree, 6, b"fifo", b"", b"");
    let tree = entry(
        tree,
        9,
        b"pax",
        b"",
        b"12 path=x/y\n27 SCHILY.xattr.user.a=b\xff\0c\n",
    );
    let tree = entry(tree, 0, b"short", b"", b"x");
    let tree = entry(tree, 10, b"././@LongLink", b"", b"a/long/name\0");
    let tree = entry(tree, 0, b"short", b"", b"y");
    let tree = tree.byte(0xff);
    let tree = entry(tree, 0, b"a/.wh.b", b"", b"");
    let tree = entry(tree, 0, b"a/.wh..wh..opq", b"", b"");
    let tree = entry(tree, 0, b"c", b"", b"new").0;
    let layers = written(&mut Input::new(&tree));
    let raw = [&[0], layers[0].as_slice(), &[0; 1024]].concat();
    let length = (layers[0].len().min(2048) as u16).to_le_bytes();
    let repaired = [&[1], &length[..], &layers[0][..2048], &layers[1]].concat();
    vec![[&[2], &tree[..]].concat(), raw, repaired]
}
