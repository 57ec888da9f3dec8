//! Good images.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tern_image::{Digest, ImageStore, Limits, Progress, Source};

use crate::support::compare::{assert_same, list};
use crate::support::{Layer, Packing, TestImage, Workshop, dump, mode, run};

/// Something of everything, in two layers.
pub fn rich_image() -> [Layer; 2] {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let many = (0..400).fold(
        Layer::new().mode(0o755).dir("./").dir("many"),
        |layer, n| {
            layer.file(
                &format!("many/a-rather-long-file-name-to-fill-blocks-{n:04}"),
                n.to_string(),
            )
        },
    );
    let sizes = [
        0, 1, 31, 4000, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 100_000, 3_000_000,
    ];
    let sized = sizes.iter().fold(many.dir("sizes"), |layer, &size| {
        let content: Vec<u8> = (0..size).map(|n: u32| (n ^ (n >> 8)) as u8).collect();
        layer.file(&format!("sizes/{size}"), content)
    });
    let lower = sized
        .mode(0o4711)
        .owner(1000, 70_000)
        .mtime(1)
        .file("bin/setuid", "x")
        .mode(0o1777)
        .dir("tmp")
        .mode(0o644)
        .owner(0, 0)
        .pax(&[("SCHILY.xattr.security.capability", capability)])
        .file("bin/ping", "ping")
        .pax(&[
            ("SCHILY.xattr.user.a", b"1"),
            ("SCHILY.xattr.user.bb", &[b'x'; 3000]),
        ])
        .file("bin/attributes", [1; 2000])
        .pax(&[("SCHILY.xattr.user.long", &[b'y'; 20_000])])
        .file("bin/long-attribute", [2; 2000])
        .pax(&[("SCHILY.xattr.trusted.on", b"directory")])
        .dir("srv")
        .pax(&[("mtime", b"1234567890.123456789")])
        .file("bin/nanos", "")
        .hard_link("bin/ping6", "bin/ping")
        .hard_link("srv/ping", "bin/ping")
        .symlink("lib", "usr/lib")
        .symlink("long-link", &"t/".repeat(2030))
        .file("usr/lib/libc.so", "elf")
        .device("dev/null", true, 1, 3)
        .device("dev/big", false, 259, 70_000)
        .fifo("run/pipe")
        .file(".-sorts-before-dots", "")
        .file("!first", "")
        .file(&format!("{}/{}", "d".repeat(255), "f".repeat(255)), "long")
        .file("gone/x", "")
        .file("opaque/x", "");
    let upper = Layer::new()
        .file(".wh.gone", "")
        .dir("opaque")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/y", "y")
        .file("lib/written-through-a-link", "z")
        .file("bin/setuid", "replaced");
    [lower, upper]
}

#[tokio::test]
async fn an_independent_reader_finds_the_tree_that_was_put_in() {
    let workshop = Workshop::new();
    let image = workshop
        .convert(TestImage::new(rich_image()))
        .await
        .unwrap();
    let listing = list(&workshop.extract_disk(&image.disk));

    let line = |name: &str| listing.get(name).map(String::as_str).unwrap_or("missing");
    let digest = |content: &[u8]| Digest::of(content).to_string();
    let x = digest(b"replaced");
    assert_eq!(
        line("bin/setuid"),
        format!("file {x} mode=644 owner=0:0 mtime=1700000000.000000000")
    );
    assert_eq!(
        line("tmp"),
        "directory mode=1777 owner=1000:70000 mtime=1.000000000"
    );
    assert!(
        line("bin/nanos").contains("mtime=1234567890.123456789"),
        "{}",
        line("bin/nanos")
    );
    let ping = dump(&image.disk, "/bin/ping", "NID:");
    for name in ["/bin/ping", "/bin/ping6", "/srv/ping"] {
        assert_eq!(dump(&image.disk, name, "NID:"), ping);
        assert_eq!(dump(&image.disk, name, "Links:"), "3");
    }
    assert!(line("lib").starts_with("-> usr/lib "));
    assert!(line("long-link").contains(&"t/".repeat(2030)));
    assert!(line("dev/null").starts_with("character 1:3 "));
    assert!(line("dev/big").starts_with("block 259:70000 "));
    assert!(line("run/pipe").starts_with("fifo "));
    assert!(line("usr/lib/written-through-a-link").starts_with("file "));
    assert!(line(&format!("{}/{}", "d".repeat(255), "f".repeat(255))).contains(&digest(b"long")));
    assert_eq!(line("gone"), "missing");
    assert_eq!(line("opaque/x"), "missing");
    assert!(line("opaque/y").starts_with("file "));
    for n in 0..400 {
        let name = format!("many/a-rather-long-file-name-to-fill-blocks-{n:04}");
        assert!(
            line(&name).contains(&digest(n.to_string().as_bytes())),
            "{name}"
        );
    }
    for size in [
        0,
        1,
        31,
        4000,
        4031,
        4032,
        4033,
        4095,
        4096,
        4097,
        8191,
        8192,
        100_000,
        3_000_000u32,
    ] {
        let content: Vec<u8> = (0..size).map(|n| (n ^ (n >> 8)) as u8).collect();
        assert!(
            line(&format!("sizes/{size}")).contains(&digest(&content)),
            "{size}"
        );
    }
}

#[tokio::test]
async fn every_packing_gives_the_same_disk() {
    let layers = rich_image().map(Layer::bytes);
    let mut disks = Vec::new();
    for packing in [
        Packing::Plain,
        Packing::Gzip,
        Packing::GzipMembers,
        Packing::Zstd,
    ] {
        let workshop = Workshop::new();
        let image = workshop
            .convert(TestImage::packed(&layers, packing))
            .await
            .unwrap();
        let mut disk = std::fs::read(&image.disk).unwrap();
        assert_eq!(disk.len() as u64, image.size);
        // The checksum and the UUID, which follows the manifest.
        disk[1024 + 4..1024 + 8].fill(0);
        disk[1024 + 48..1024 + 64].fill(0);
        disks.push(disk);
    }
    assert!(disks.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test]
async fn the_same_image_gives_the_same_bytes() {
    let (one, two) = (Workshop::new(), Workshop::new());
    let first = one.convert(TestImage::new(rich_image())).await.unwrap();
    let second = two.convert(TestImage::new(rich_image())).await.unwrap();
    assert_eq!(first.digest, second.digest);
    assert!(std::fs::read(first.disk).unwrap() == std::fs::read(second.disk).unwrap());
}

#[tokio::test]
async fn an_empty_image_is_an_empty_disk() {
    let workshop = Workshop::new();
    let extracted = workshop.extract(TestImage::new([])).await;
    assert_eq!(list(&extracted).len(), 1);
}

#[tokio::test]
async fn the_store_describes_and_remembers_what_it_has() {
    let workshop = Workshop::new();
    let image = workshop
        .convert(TestImage::new([Layer::new().file("a", "b")]))
        .await
        .unwrap();
    assert_eq!(image.config.argv(), ["/bin/app", "--serve"]);
    assert_eq!(
        (&*image.config.user, &*image.config.working_dir),
        ("app", "/srv")
    );

    let store = workshop.store();
    assert_eq!(store.get(&image.digest).unwrap().as_ref(), Some(&image));
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&image));
    assert_eq!(store.get(&Digest::of(b"another")).unwrap(), None);

    // A disk that was cut short is made again.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image.disk)
        .unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(store.get(&image.digest).unwrap(), None);
    let source = Source::Layout {
        path: workshop.path("layout"),
        tag: None,
    };
    assert_eq!(store.ensure(&source, |_| ()).await.unwrap(), image);
    assert_eq!(store.get(&image.digest).unwrap(), Some(image));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_conversion_serves_all_who_ask_at_once() {
    let workshop = Workshop::new();
    let source = workshop.layout(TestImage::new(rich_image()));
    let store = workshop.store();
    let conversions = Arc::new(AtomicUsize::new(0));
    let asking: Vec<_> = (0..16)
        .map(|_| {
            let (store, source, conversions) = (store.clone(), source.clone(), conversions.clone());
            tokio::spawn(async move {
                let count = move |progress| {
                    if matches!(progress, Progress::Resolved { .. }) {
                        conversions.fetch_add(1, Ordering::Relaxed);
                    }
                };
                store.ensure(&source, count).await.unwrap()
            })
        })
        .collect();
    let mut images = Vec::new();
    for task in asking {
        images.push(task.await.unwrap());
    }
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(conversions.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn progress_goes_up_to_the_end() {
    let workshop = Workshop::new();
    let source = workshop.layout(TestImage::new(rich_image()));
    let (sender, receiver) = std::sync::mpsc::channel();
    let image = workshop
        .store()
        .ensure(&source, move |p| sender.send(p).unwrap())
        .await
        .unwrap();
    let seen: Vec<Progress> = receiver.iter().collect();
    let Progress::Resolved {
        digest,
        layers: 2,
        bytes: expected,
    } = seen[0]
    else {
        panic!("{:?}", seen[0])
    };
    assert_eq!(digest, image.digest);
    let read = seen.iter().rev().find_map(|p| match p {
        Progress::Reading { layer: 2, bytes } => Some(*bytes),
        _ => None,
    });
    assert_eq!(read, Some(expected));
    let end = Progress::Writing {
        bytes: image.size,
        total: image.size,
    };
    assert_eq!(seen.last(), Some(&end));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_conversion_ends_and_leaves_nothing() {
    let workshop = Workshop::new();
    let source = workshop.layout(TestImage::new(rich_image()));
    let store = workshop.store();
    let (sender, mut started) = tokio::sync::mpsc::unbounded_channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let task = tokio::spawn({
        let (store, source) = (store.clone(), source.clone());
        async move {
            let progress = move |_| {
                let _ = sender.send(());
                let _ = released.lock().unwrap().recv(); // hold it here until it is abandoned
            };
            store.ensure(&source, progress).await
        }
    });
    started.recv().await.unwrap();
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    drop(release);
    // The conversion's own end of the channel goes when it has ended.
    while started.recv().await.is_some() {}
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(
        std::fs::read_dir(workshop.path("store")).unwrap().count(),
        0
    );
    assert!(store.ensure(&source, |_| ()).await.is_ok());
}

#[test]
fn opening_a_store_removes_what_a_crash_left_but_not_what_is_in_use() {
    let workshop = Workshop::new();
    drop(workshop.store());
    let dead = workshop.path("store/.tmp-dead");
    let alive = workshop.path("store/.tmp-alive");
    std::fs::write(&dead, "x").unwrap();
    let file = std::fs::File::create(&alive).unwrap();
    file.lock().unwrap();
    drop(workshop.store());
    assert!(!dead.exists() && alive.exists());
}

#[tokio::test]
async fn a_layout_may_be_an_archive() {
    let workshop = Workshop::new();
    workshop.layout(TestImage::new(rich_image()));
    let archive = workshop.path("image.tar");
    run(Command::new("tar")
        .arg("-C")
        .arg(workshop.path("layout"))
        .arg("-cf")
        .arg(&archive)
        .arg("."));
    let source = Source::Layout {
        path: archive.clone(),
        tag: None,
    };
    let image = workshop.store().ensure(&source, |_| ()).await.unwrap();

    let other = Workshop::new();
    let expected = other.convert(TestImage::new(rich_image())).await.unwrap();
    assert!(std::fs::read(image.disk).unwrap() == std::fs::read(expected.disk).unwrap());

    let bytes = std::fs::read(&archive).unwrap();
    std::fs::write(&archive, &bytes[..bytes.len() / 2]).unwrap();
    let fresh = Workshop::new();
    assert!(fresh.refusal_of(&source).await.contains("truncated"));
}

#[tokio::test]
async fn tags_and_platforms_choose_the_image() {
    let workshop = Workshop::new();
    let mut image = TestImage::new([Layer::new().file("which", "ours")]);
    let mut ours = image.manifest();
    image.config["architecture"] = "arm64".into();
    let mut theirs = image.manifest();
    ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
    theirs["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let mut both = image.index(&[theirs.clone(), ours.clone()]);
    both["annotations"] = json!({"org.opencontainers.image.ref.name": "both"});
    theirs["annotations"] = json!({"org.opencontainers.image.ref.name": "arm"});
    let Source::Layout { path, .. } = image.write(&workshop.path("layout"), &[theirs, both]) else {
        unreachable!()
    };
    let source = |tag: Option<&str>| Source::Layout {
        path: path.clone(),
        tag: tag.map(str::to_owned),
    };

    assert!(
        workshop
            .refusal_of(&source(None))
            .await
            .contains("arm, both")
    );
    assert!(
        workshop
            .refusal_of(&source(Some("none")))
            .await
            .contains("\"none\"")
    );
    assert!(
        workshop
            .refusal_of(&source(Some("arm")))
            .await
            .contains("linux/arm64")
    );
    let found = workshop
        .store()
        .ensure(&source(Some("both")), |_| ())
        .await
        .unwrap();
    assert_eq!(json!(found.digest), ours["digest"]);
}

/// Runs `buildah` with a storage of its own.
fn buildah(storage: &Path, arguments: &[&str]) -> String {
    let output = run(Command::new("buildah")
        .arg("--root")
        .arg(storage.join("root"))
        .arg("--runroot")
        .arg(storage.join("run"))
        .args(["--storage-driver", "vfs"])
        .args(arguments));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn an_image_built_by_buildah_comes_out_as_buildah_shows_it() {
    let workshop = Workshop::new();
    let storage = workshop.path("buildah");
    let buildah = |arguments: &[&str]| buildah(&storage, arguments);
    let sh = |at: &str, script: &str| {
        run(Command::new("sh").args(["-euc", script]).current_dir(at));
    };

    let container = buildah(&["from", "scratch"]);
    let mounted = buildah(&["mount", &container]);
    sh(
        &mounted,
        "mkdir -p usr/bin etc/app var/lib/data
         ln -s usr/bin bin
         echo one > etc/app/one; echo two > etc/app/two; echo data > var/lib/data/file
         head -c 300000 /dev/urandom > usr/bin/app; chmod 4755 usr/bin/app
         ln usr/bin/app usr/bin/app2; mkfifo var/pipe; chown 12:34 etc/app/one",
    );
    buildah(&["commit", &container, "base"]);

    let container = buildah(&["from", "base"]);
    let mounted = buildah(&["mount", &container]);
    sh(
        &mounted,
        "rm etc/app/two; rm -r var/lib/data; mkdir var/lib/data; echo new > var/lib/data/new
         rm bin; mkdir bin; echo x > bin/x; echo changed > etc/app/one; rm usr/bin/app2",
    );
    buildah(&[
        "config",
        "--entrypoint",
        r#"["/usr/bin/app"]"#,
        "--port",
        "8080/tcp",
        &container,
    ]);
    buildah(&["commit", &container, "top"]);
    let layout = workshop.path("layout");
    buildah(&["push", "top", &format!("oci:{}:v1", layout.display())]);

    // What buildah itself makes of the image.
    let fresh = buildah(&["from", "top"]);
    let mounted = buildah(&["mount", &fresh]);
    let expected = list(Path::new(&mounted));

    let source = Source::Layout {
        path: layout,
        tag: Some("v1".to_owned()),
    };
    let image = workshop.store().ensure(&source, |_| ()).await.unwrap();
    assert_eq!(image.config.entrypoint, ["/usr/bin/app"]);
    assert!(image.config.exposed_ports.contains("8080/tcp"));
    let found = list(&workshop.extract_disk(&image.disk));
    // Times of directories are buildah's own when it unpacks: those that no layer describes.
    let without_times = |listing: &crate::support::compare::Listing| {
        let strip = |(name, line): (&String, &String)| {
            let mtime = line
                .split(' ')
                .find(|word| word.starts_with("mtime="))
                .unwrap_or_default();
            let line = if line.starts_with("directory") {
                line.replace(mtime, "")
            } else {
                line.clone()
            };
            // Sub-second parts are not in the archive.
            (
                name.clone(),
                line.replace(mtime, mtime.split('.').next().unwrap_or_default()),
            )
        };
        // The root's mode is the storage driver's, if no layer describes it.
        listing
            .iter()
            .filter(|(name, _)| *name != ".")
            .map(strip)
            .collect()
    };
    assert_eq!(mode(&image.disk, "/usr/bin/app"), 0o104_755);
    assert_eq!(dump(&image.disk, "/usr/bin/app", "Links:"), "1"); // its other name is whited out
    assert_same(&without_times(&found), &without_times(&expected));
}

#[tokio::test]
async fn a_store_needs_a_directory_it_can_make() {
    let workshop = Workshop::new();
    std::fs::write(workshop.path("file"), "").unwrap();
    let error = ImageStore::open(workshop.path("file"), Limits::default()).unwrap_err();
    assert!(error.to_string().contains("cannot create"), "{error}");
}
