//! Bad images: each is refused with a reason, and nothing is left of it.

use proptest::prelude::*;
use serde_json::{Value, json};
use tern_image::{Digest, Source};

use crate::support::{Layer, Packing, TestImage, Workshop};

fn simple() -> TestImage {
    TestImage::new([
        Layer::new().file("a", "b"),
        Layer::new().file("c", vec![7; 100_000]),
    ])
}

/// Changes the blob that `descriptor` points to, without telling.
fn spoil(image: &mut TestImage, descriptor: &Value, change: impl FnOnce(&mut Vec<u8>)) {
    let digest: Digest = serde_json::from_value(descriptor["digest"].clone()).unwrap();
    change(image.blobs.get_mut(&digest).unwrap());
}

#[tokio::test]
async fn layers_whose_entries_lead_out_of_the_image() {
    for (layer, reason) in [
        (Layer::new().file("../escape", "x"), "\"..\""),
        (Layer::new().file("a/../../escape", "x"), "\"..\""),
        (
            Layer::new()
                .file("a", "x")
                .hard_link("b", "../../etc/shadow"),
            "\"..\"",
        ),
        (Layer::new().hard_link("b", "/etc/shadow"), "does not exist"),
        (Layer::new().file("a/../.wh.b", "x"), "\"..\""),
    ] {
        let message = Workshop::new().refusal(TestImage::new([layer])).await;
        assert!(message.starts_with("layer 1 (sha256:"), "{message}");
        assert!(message.contains(reason), "{message}");
    }
}

#[tokio::test]
async fn absolute_symlinks_are_followed_inside_the_image_only() {
    let workshop = Workshop::new();
    let target = workshop.path("outside");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("victim"), "untouched").unwrap();
    let absolute = target.to_str().unwrap();
    let image = TestImage::new([
        Layer::new()
            .symlink("link", absolute)
            .symlink("up", &format!("../../../../../..{absolute}")),
        Layer::new()
            .file("link/victim", "overwritten")
            .file("up/new", "x")
            .file("link/.wh.victim2", "")
            .file("/absolute", "x"),
    ]);
    let extracted = workshop.extract(image).await;
    // On the host nothing happened; in the image, the path below the image's own root was used.
    let names: Vec<_> = std::fs::read_dir(&target).unwrap().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(
        std::fs::read_to_string(target.join("victim")).unwrap(),
        "untouched"
    );
    let inside = extracted.join(absolute.trim_start_matches('/'));
    assert_eq!(
        std::fs::read_to_string(inside.join("victim")).unwrap(),
        "overwritten"
    );
    assert!(inside.join("new").exists() && extracted.join("absolute").exists());
}

#[tokio::test]
async fn content_that_is_not_what_its_digest_says() {
    let mut image = simple();
    let layer = image.layers[1].clone();
    spoil(&mut image, &layer, |blob| {
        let last = blob.len() - 20;
        blob[last] ^= 1;
    });
    let message = Workshop::new().refusal(image).await;
    assert!(message.starts_with("layer 2 ("), "{message}");
    assert!(message.contains("its digest should be"), "{message}");

    let mut image = simple();
    let config = json!(image.config);
    let config = image.describe("", &config);
    spoil(&mut image, &config, |blob| blob[0] = b'[');
    let workshop = Workshop::new();
    let source = {
        // The good configuration is added again by `manifest`; spoil it afterwards.
        let manifest = image.manifest();
        spoil(&mut image, &config, |blob| blob[0] = b'[');
        image.write(&workshop.path("layout"), &[manifest])
    };
    assert!(
        workshop
            .refusal_of(&source)
            .await
            .contains("configuration is damaged")
    );

    let mut image = simple();
    let manifest = image.manifest();
    spoil(&mut image, &manifest, |blob| blob.swap(1, 2));
    let workshop = Workshop::new();
    let source = image.write(&workshop.path("layout"), &[manifest]);
    assert!(
        workshop
            .refusal_of(&source)
            .await
            .contains("manifest is damaged")
    );
}

#[tokio::test]
async fn layers_that_unpack_to_something_else() {
    let mut image = simple();
    image.config["rootfs"]["diff_ids"][1] = json!(Digest::of(b"else"));
    let message = Workshop::new().refusal(image).await;
    assert!(message.contains("the unpacked layer 2"), "{message}");

    let mut image = simple();
    image.config["rootfs"]["diff_ids"]
        .as_array_mut()
        .unwrap()
        .pop();
    assert!(
        Workshop::new()
            .refusal(image)
            .await
            .contains("lists 1 layers, the manifest 2")
    );
}

#[tokio::test]
async fn layers_that_are_shorter_or_longer_than_they_say() {
    let mut image = simple();
    let layer = image.layers[1].clone();
    spoil(&mut image, &layer, |blob| blob.truncate(blob.len() / 2));
    let message = Workshop::new().refusal(image).await;
    assert!(message.contains("should have"), "{message}");

    for difference in [-1, 1] {
        let mut image = simple();
        let size = image.layers[0]["size"].as_i64().unwrap() + difference;
        image.layers[0]["size"] = size.into();
        let message = Workshop::new().refusal(image).await;
        assert!(
            message.contains(&format!("should have {size} bytes")),
            "{message}"
        );
    }
}

#[tokio::test]
async fn truncated_archives_whose_digests_are_right() {
    let whole = Layer::new().file("a", vec![1; 10_000]).bytes();
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let image = TestImage::packed(&[whole[..6000].to_vec()], packing);
        let message = Workshop::new().refusal(image).await;
        assert!(message.contains("truncated"), "{packing:?}: {message}");
    }
    for packing in [Packing::Gzip, Packing::Zstd] {
        let mut packed = packing.pack(&whole);
        packed.truncate(packed.len() - 4);
        let mut image = TestImage::packed(&[packed], Packing::Plain);
        image.config["rootfs"]["diff_ids"][0] = json!(Digest::of(&whole));
        let message = Workshop::new().refusal(image).await;
        assert!(message.starts_with("layer 1 ("), "{packing:?}: {message}");
    }
}

#[tokio::test]
async fn missing_blobs_and_files_that_are_none() {
    let mut image = simple();
    let manifest = image.manifest();
    let layer: Digest = serde_json::from_value(image.layers[0]["digest"].clone()).unwrap();
    image.blobs.remove(&layer);
    let workshop = Workshop::new();
    let source = image.write(&workshop.path("layout"), std::slice::from_ref(&manifest));
    assert!(workshop.refusal_of(&source).await.contains(&layer.hex()));

    // Opening a pipe for reading would wait for a writer.
    let blob = workshop.path(&format!("layout/blobs/sha256/{}", layer.hex()));
    crate::support::run(std::process::Command::new("mkfifo").arg(blob));
    assert!(workshop.refusal_of(&source).await.contains("cannot open"));

    let nowhere = Source::Layout {
        path: workshop.path("nowhere"),
        tag: None,
    };
    assert!(workshop.refusal_of(&nowhere).await.contains("cannot open"));
    let empty = Source::Layout {
        path: workshop.path(""),
        tag: None,
    };
    assert!(workshop.refusal_of(&empty).await.contains("no index.json"));
}

#[tokio::test]
async fn bombs() {
    let megabytes = |count: usize| Layer::new().file("zeros", vec![0; count << 20]);

    // Small when it travels, too large when it is unpacked.
    let mut workshop = Workshop::new();
    workshop.limits.unpacked_bytes = 32 << 20;
    let message = workshop
        .refusal(TestImage::new([megabytes(20), megabytes(20)]))
        .await;
    assert!(message.contains("33554432 unpacked bytes"), "{message}");

    // Within the limit, but out of all proportion.
    let workshop = Workshop::new();
    let zeros = [megabytes(300).bytes()];
    let message = workshop
        .refusal(TestImage::packed(&zeros, Packing::Zstd))
        .await;
    assert!(message.contains("times the compressed size"), "{message}");

    // Behind the archive's end mark, where no entry shows it.
    let mut workshop = Workshop::new();
    workshop.limits.unpacked_bytes = 32 << 20;
    let hidden = [vec![0; 64 << 20]];
    let message = workshop
        .refusal(TestImage::packed(&hidden, Packing::Gzip))
        .await;
    assert!(message.contains("unpacked bytes"), "{message}");

    // Many entries, each of them nothing.
    let mut workshop = Workshop::new();
    workshop.limits.entries = 1000;
    let many = (0..1001).fold(Layer::new(), |layer, _| layer.dir("x"));
    let message = workshop.refusal(TestImage::new([many])).await;
    assert!(message.contains("1000 entries"), "{message}");

    // A layer that claims to be large.
    let mut image = simple();
    image.layers[0]["size"] = u64::MAX.into();
    assert!(
        Workshop::new()
            .refusal(image)
            .await
            .contains("exceeds the limit")
    );

    // Documents that are.
    let mut image = simple();
    image.config["padding"] = "x".repeat(5 << 20).into();
    assert!(
        Workshop::new()
            .refusal(image)
            .await
            .contains("bytes of a document")
    );
}

#[tokio::test]
async fn documents_that_make_no_sense() {
    let workshop = Workshop::new();
    let source = workshop.layout(simple());
    for text in [
        "",
        "{",
        "null",
        "[]",
        "{}",
        r#"{"schemaVersion":1}"#,
        &"[".repeat(100_000),
    ] {
        std::fs::write(workshop.path("layout/index.json"), text).unwrap();
        let message = workshop.refusal_of(&source).await;
        assert!(message.contains("malformed"), "{text:.20}: {message}");
    }
    let mut image = simple();
    image.config["config"]["Env"] = json!({"not": "a list"});
    assert!(
        Workshop::new()
            .refusal(image)
            .await
            .contains("configuration is malformed")
    );
    let mut image = simple();
    image.config["architecture"] = "s390x".into();
    assert!(Workshop::new().refusal(image).await.contains("linux/s390x"));
}

#[tokio::test]
async fn indexes_within_indexes_without_end() {
    let mut image = simple();
    let mut entry = image.manifest();
    for _ in 0..10 {
        entry = image.index(&[entry]);
    }
    let workshop = Workshop::new();
    let source = image.write(&workshop.path("layout"), &[entry]);
    assert!(
        workshop
            .refusal_of(&source)
            .await
            .contains("nested indexes")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Right digests around damaged archives: whatever comes of it, it is no panic, and if it is a
    /// disk, then one that `fsck.erofs` has nothing against.
    #[test]
    fn damaged_layers_give_sound_disks_or_none(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut layers = small_image().map(Layer::bytes);
        for (at, byte) in damage {
            let layer = &mut layers[at.index(2)];
            let at = at.index(layer.len());
            layer[at] = byte;
            let header = at / 512 * 512;
            if layer[header + 257..].starts_with(b"ustar") {
                layer[header + 148..header + 156].fill(b' ');
                let sum: u32 = layer[header..header + 512].iter().map(|&b| u32::from(b)).sum();
                layer[header + 148..header + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        if let Some(cut) = cut {
            let length = cut.index(layers[1].len());
            layers[1].truncate(length);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let workshop = Workshop::new();
        let converted = runtime.block_on(workshop.convert(TestImage::packed(&layers, Packing::Plain)));
        if let Ok(image) = converted {
            crate::support::run(std::process::Command::new("fsck.erofs").arg(image.disk));
        }
    }
}

fn small_image() -> [Layer; 2] {
    [
        Layer::new()
            .dir("d")
            .file("d/a", "1")
            .symlink("l", "d")
            .hard_link("d/b", "l/a")
            .fifo("p"),
        Layer::new()
            .pax(&[("SCHILY.xattr.user.x", b"y"), ("path", b"d/c")])
            .file("x", "2")
            .file("d/.wh.a", "")
            .file("l/.wh..wh..opq", "")
            .device("n", true, 1, 3)
            .file(&"long/".repeat(40), "3"),
    ]
}
