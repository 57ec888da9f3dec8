use proptest::prelude::*;

use super::*;
use crate::tar::Archive;

use crate::test_layer::Layer;

fn apply_with(layers: &[Vec<u8>], limits: &Limits) -> Result<Tree, Refusal> {
    let dir = std::env::temp_dir();
    let mut applier = Applier::new(Spool::create(&dir).unwrap(), limits);
    for (n, layer) in layers.iter().enumerate() {
        applier.begin_layer(n + 1);
        let mut archive = Archive::new(&**layer, limits);
        while let Some(entry) = archive.next()? {
            applier.apply(entry, &mut archive)?;
        }
    }
    Ok(applier.finish().0)
}

/// The tree as sorted lines: `path`, with `/` for directories, `-> target` for links, `=bytes` for
/// contents' sizes, `*n` for what has several names.
fn list(tree: &Tree) -> Vec<String> {
    fn walk(tree: &Tree, id: InodeId, path: &str, lines: &mut Vec<String>) {
        for (name, child) in tree.children(id) {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            let inode = tree.get(child);
            let names = if inode.names > 1 {
                format!("*{}", inode.names)
            } else {
                String::new()
            };
            lines.push(match &inode.node {
                Node::Directory(_) => format!("{path}/"),
                Node::File(extent) => format!("{path}={}{names}", extent.length),
                Node::Symlink(to) => format!("{path} -> {}{names}", String::from_utf8_lossy(to)),
                Node::Device { major, minor, .. } => format!("{path} {major}:{minor}{names}"),
                Node::Fifo => format!("{path}|{names}"),
            });
            walk(tree, child, &format!("{path}/"), lines);
        }
    }
    let mut lines = Vec::new();
    walk(tree, InodeId::ROOT, "", &mut lines);
    lines
}

fn apply(layers: impl IntoIterator<Item = Layer>) -> Result<Vec<String>, Refusal> {
    let layers: Vec<Vec<u8>> = layers.into_iter().map(Layer::bytes).collect();
    apply_with(&layers, &Limits::default()).map(|tree| list(&tree))
}

fn result(layers: impl IntoIterator<Item = Layer>) -> Vec<String> {
    apply(layers).unwrap()
}

fn refusal(layer: Layer) -> String {
    match apply([layer]).expect_err("the layer was accepted") {
        Refusal::Entry { path, reason } => format!("{}: {reason}", String::from_utf8_lossy(&path)),
        Refusal::Image(error) => error.to_string(),
        Refusal::Tar(error) => error.to_string(),
    }
}

#[test]
fn missing_parents_are_made_and_absolute_names_start_at_the_root() {
    let lines = result([Layer::new().file("a/b/c", "x").file("/d/./e//f", "xy")]);
    assert_eq!(lines, ["a/", "a/b/", "a/b/c=1", "d/", "d/e/", "d/e/f=2"]);
}

#[test]
fn a_directory_is_described_again_without_losing_what_is_in_it() {
    let layers = [
        Layer::new().mode(0o700).dir("a/").file("a/b", "x"),
        Layer::new().mode(0o1777).owner(7, 8).dir("a"),
    ]
    .map(Layer::bytes);
    let tree = apply_with(&layers, &Limits::default()).unwrap();
    assert_eq!(list(&tree), ["a/", "a/b=1"]);
    let a = tree.child(InodeId::ROOT, b"a").unwrap().inode;
    let metadata = &tree.get(a).metadata;
    assert_eq!((metadata.mode, metadata.uid, metadata.gid), (0o1777, 7, 8));
}

#[test]
fn the_root_can_be_described_but_not_replaced() {
    let layers = [Layer::new().mode(0o700).owner(5, 6).dir("./").bytes()];
    let tree = apply_with(&layers, &Limits::default()).unwrap();
    assert_eq!(tree.get(InodeId::ROOT).metadata.mode, 0o700);
    assert!(refusal(Layer::new().symlink("/", "x")).contains("root"));
    assert!(refusal(Layer::new().file(".", "x")).contains("root"));
}

#[test]
fn what_is_not_two_directories_is_replaced() {
    let below = || {
        Layer::new()
            .file("a/deep/er", "x")
            .file("b", "x")
            .symlink("c", "a")
    };
    let above = Layer::new().file("a", "xy").dir("b").dir("c");
    assert_eq!(result([below(), above]), ["a=2", "b/", "c/"]);
    assert!(refusal(Layer::new().file("a", "x").file("a/b", "x")).contains("not a directory"));
}

#[test]
fn whiteouts_hide_what_lower_layers_put_there() {
    let below = || {
        Layer::new()
            .file("keep", "x")
            .file("gone", "x")
            .file("d/deep/er", "x")
    };
    let above = Layer::new()
        .file(".wh.gone", "")
        .file(".wh.d", "")
        .file("d/.wh.nothing", "");
    assert_eq!(result([below(), above]), ["keep=1"]);
    assert_eq!(
        result([
            below(),
            Layer::new().file("nowhere/.wh.x", "").file(".wh.y", "")
        ])
        .len(),
        5
    );
}

#[test]
fn whiteouts_do_not_touch_their_own_layer_in_either_order() {
    let below = || {
        Layer::new()
            .file("d/old", "x")
            .file("d/sub/old", "x")
            .file("f", "x")
    };
    let expected = ["d/", "d/new=1", "d/sub/", "d/sub/new=1", "f=2"];
    let fresh = |layer: Layer| {
        layer
            .file("d/new", "x")
            .file("d/sub/new", "x")
            .file("f", "xy")
    };
    let hide = |layer: Layer| layer.file(".wh.d", "").file(".wh.f", "");
    assert_eq!(result([below(), fresh(hide(Layer::new()))]), expected);
    assert_eq!(result([below(), hide(fresh(Layer::new()))]), expected);
}

#[test]
fn opaque_directories_keep_only_their_own_layer() {
    let below = || {
        Layer::new()
            .file("d/old", "x")
            .file("d/sub/old", "x")
            .file("e/old", "x")
    };
    let expected = ["d/", "d/new=1", "e/", "e/old=1"];
    let opaque = |layer: Layer| layer.file("d/.wh..wh..opq", "");
    assert_eq!(
        result([below(), opaque(Layer::new().dir("d")).file("d/new", "x")]),
        expected
    );
    assert_eq!(
        result([below(), opaque(Layer::new().file("d/new", "x"))]),
        expected
    );
    // And of a third layer's, too.
    let third = opaque(Layer::new().file("d/third", "x"));
    let layers = [below(), opaque(Layer::new().file("d/new", "x")), third];
    assert_eq!(result(layers), ["d/", "d/third=1", "e/", "e/old=1"]);
    assert_eq!(
        result([below(), Layer::new().file(".wh..wh..opq", "").file("x", "")]),
        ["x=0"]
    );
}

#[test]
fn whiteouts_of_nothing_or_of_everything_are_refused() {
    for name in [".wh.", ".wh..", ".wh..."] {
        assert!(
            refusal(Layer::new().file(name, "")).contains("names no file"),
            "{name}"
        );
    }
    assert!(refusal(Layer::new().file(".wh.d/x", "")).contains("through a whiteout"));
    let link = Layer::new().symlink("s", ".wh.d").file("s/x", "");
    assert!(refusal(link).contains("through a whiteout"));
    assert!(
        result([Layer::new()
            .file(".wh..wh.plnk/1.2", "x")
            .dir(".wh..wh.orph")])
        .is_empty()
    );
}

#[test]
fn hard_links_share_an_inode_until_one_is_replaced() {
    let below = || {
        Layer::new()
            .file("a", "x")
            .hard_link("d/b", "/a")
            .symlink("s", "a")
            .hard_link("t", "s")
    };
    assert_eq!(
        result([below()]),
        ["a=1*2", "d/", "d/b=1*2", "s -> a*2", "t -> a*2"]
    );
    let above = Layer::new()
        .file("a", "xyz")
        .hard_link("c", "d/b")
        .file(".wh.t", "");
    assert_eq!(
        result([below(), above]),
        ["a=3", "c=1*2", "d/", "d/b=1*2", "s -> a"]
    );
    assert_eq!(
        result([Layer::new().file("a", "x").hard_link("a", "a")]),
        ["a=1"]
    );
}

#[test]
fn hard_links_to_directories_to_nothing_or_upwards_are_refused() {
    assert!(refusal(Layer::new().dir("d").hard_link("l", "d")).contains("to a directory"));
    assert!(refusal(Layer::new().hard_link("l", "none")).contains("does not exist"));
    assert!(refusal(Layer::new().hard_link("l", "/")).contains("does not exist"));
    assert!(refusal(Layer::new().file("a", "").hard_link("l", "x/../a")).contains("\"..\""));
}

#[test]
fn symlinked_directories_are_written_through_inside_the_image() {
    let below = Layer::new()
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("abs", "/usr/lib");
    let above = Layer::new().file("lib/x", "1").file("abs/y", "1");
    let lines = result([below, above]);
    assert_eq!(
        lines,
        [
            "abs -> /usr/lib",
            "lib -> usr/lib",
            "usr/",
            "usr/lib/",
            "usr/lib/x=1",
            "usr/lib/y=1"
        ]
    );
    // Whiteouts and hard links take the same way.
    let below = Layer::new()
        .file("usr/lib/x", "1")
        .file("usr/lib/y", "1")
        .symlink("lib", "usr/lib");
    let above = Layer::new().file("lib/.wh.x", "").hard_link("z", "lib/y");
    assert_eq!(
        result([below, above]),
        [
            "lib -> usr/lib",
            "usr/",
            "usr/lib/",
            "usr/lib/y=1*2",
            "z=1*2"
        ]
    );
}

#[test]
fn no_symlink_leads_out_of_the_image() {
    let lines = result([Layer::new()
        .symlink("up", "../../../../../../tmp")
        .symlink("abs", "/etc")
        .symlink("dangling", "no/where")
        .file("up/a", "1")
        .file("abs/b", "1")
        .file("dangling/c", "1")]);
    assert_eq!(
        lines,
        [
            "abs -> /etc",
            "dangling -> no/where",
            "etc/",
            "etc/b=1",
            "no/",
            "no/where/",
            "no/where/c=1",
            "tmp/",
            "tmp/a=1",
            "up -> ../../../../../../tmp",
        ]
    );
}

#[test]
fn symlink_loops_end() {
    let layer = Layer::new()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/x", "");
    assert!(refusal(layer).contains("too many symbolic links"));
    let layer = Layer::new().symlink("s", "s/s").file("s/x", "");
    assert!(refusal(layer).contains("too many symbolic links"));
}

#[test]
fn names_that_lead_upwards_or_are_too_long_are_refused() {
    for path in ["../x", "a/../../x", "/..", "a/.."] {
        assert!(
            refusal(Layer::new().file(path, "")).contains("\"..\""),
            "{path}"
        );
    }
    assert!(refusal(Layer::new().file(&"n".repeat(256), "")).contains("255 bytes"));
    let link = Layer::new().symlink("s", &"n".repeat(256)).file("s/x", "");
    assert!(refusal(link).contains("255 bytes"));
}

#[test]
fn attributes_of_no_known_kind_and_those_of_overlayfs_are_left_out() {
    let layer = Layer::new()
        .pax(&[
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
            ("SCHILY.xattr.user.note", b""),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.com.apple.provenance", b"x"),
        ])
        .file("x", "");
    let tree = apply_with(&[layer.bytes()], &Limits::default()).unwrap();
    let x = tree.child(InodeId::ROOT, b"x").unwrap().inode;
    let names: Vec<&[u8]> = tree
        .get(x)
        .metadata
        .xattrs
        .keys()
        .map(|name| &**name)
        .collect();
    assert_eq!(names, [&b"security.capability"[..], b"user.note"]);
}

#[test]
fn limits_hold() {
    let limits = |change: fn(&mut Limits)| {
        let mut limits = Limits::default();
        change(&mut limits);
        limits
    };
    let deep = "d/".repeat(20);
    let many_files = (0..20).fold(Layer::new(), |layer, n| layer.file(&n.to_string(), ""));
    let winding = Layer::new().dir("d").symlink("s", &"d/../".repeat(600));
    for (layer, limits) in [
        (Layer::new().dir(&deep), limits(|limits| limits.depth = 10)),
        (many_files, limits(|limits| limits.entries = 10)),
        (
            Layer::new().dir(&deep),
            limits(|limits| limits.entries = 10),
        ),
        (
            Layer::new().symlink("s", &deep).file("s/x", ""),
            limits(|limits| limits.entries = 10),
        ),
        (
            Layer::new().file(&deep, ""),
            limits(|limits| limits.path_bytes = 30),
        ),
        (
            Layer::new().symlink("s", &deep),
            limits(|limits| limits.path_bytes = 30),
        ),
        (
            Layer::new().file(&deep, ""),
            limits(|limits| limits.metadata_bytes = 30),
        ),
        (
            winding.file("s/x", "").file("s/y", ""),
            limits(|limits| limits.entries = 20),
        ),
    ] {
        let outcome = apply_with(&[layer.bytes()], &limits);
        assert!(
            matches!(outcome, Err(Refusal::Image(ImageError::Limit { .. }))),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_thousand_whiteouts_of_one_large_directory_are_cheap() {
    // Each whiteout would otherwise look at each name: 4e8 steps.
    let files = (0..20_000).fold(Layer::new(), |layer, n| layer.file(&format!("d/{n}"), ""));
    let layer = (0..20_000).fold(files, |layer, _| {
        layer.file(".wh.d", "").file("d/.wh..wh..opq", "")
    });
    let started = std::time::Instant::now();
    assert_eq!(result([layer]).len(), 20_001);
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

/// Names from a small set, so that entries meet.
fn any_path() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        4 => "[abc]",
        1 => Just("..".to_owned()),
        1 => "\\.wh\\.[abc]",
        1 => Just(".wh..wh..opq".to_owned()),
    ];
    proptest::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
}

proptest! {
    #[test]
    fn any_sequence_of_entries_leaves_a_sound_tree(
        layers in proptest::collection::vec(
            proptest::collection::vec((0..5u8, any_path(), any_path()), 1..12), 1..4)
    ) {
        let limits = Limits::default();
        let spool = Spool::create(&std::env::temp_dir()).unwrap();
        let mut applier = Applier::new(spool, &limits);
        for (n, entries) in layers.into_iter().enumerate() {
            applier.begin_layer(n + 1);
            for (kind, path, target) in entries {
                let layer = match kind {
                    0 => Layer::new().dir(&path),
                    1 => Layer::new().symlink(&path, &target),
                    2 => Layer::new().hard_link(&path, &target),
                    3 => Layer::new().fifo(&path),
                    _ => Layer::new().file(&path, &target),
                };
                let bytes = layer.bytes();
                let mut archive = Archive::new(&*bytes, &limits);
                let entry = archive.next().unwrap().unwrap();
                let _ = applier.apply(entry, &mut archive);
            }
        }
        let tree = applier.finish().0;
        // Every inode in the tree is reached as often as it says; directories once.
        let mut seen = std::collections::HashMap::new();
        let mut ahead = vec![InodeId::ROOT];
        while let Some(id) = ahead.pop() {
            for (name, child) in tree.children(id) {
                prop_assert!(!matches!(name, b"" | b"." | b".."));
                prop_assert!(!name.starts_with(WHITEOUT));
                *seen.entry(child).or_insert(0) += 1;
                if tree.is_directory(child) {
                    prop_assert_eq!(seen[&child], 1);
                    ahead.push(child);
                }
            }
        }
        for (id, times) in seen {
            prop_assert_eq!(tree.get(id).names, times);
        }
    }
}
