//! The kernel's own reading of the disks. Needs root, loop devices and erofs: run inside metal.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::convert::rich_image;
use crate::support::compare::{assert_same, list};
use crate::support::{Layer, TestImage, Workshop, run};

/// A mounted disk.
struct Mount(PathBuf);

impl Mount {
    fn new(disk: &Path, at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        if !Path::new("/dev/loop-control").exists() {
            run(Command::new("modprobe").arg("loop"));
        }
        run(Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .arg(disk)
            .arg(&at));
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test]
async fn metal_the_kernel_sees_what_fsck_sees() {
    let workshop = Workshop::new();
    let image = workshop
        .convert(TestImage::new(rich_image()))
        .await
        .unwrap();
    let mount = Mount::new(&image.disk, workshop.path("mount"));
    let mounted = list(&mount.0);
    let extracted = list(&workshop.extract_disk(&image.disk));
    assert_same(&mounted, &extracted);

    let ping = |name| std::fs::metadata(mount.0.join(name)).unwrap();
    let (one, two, three) = (ping("bin/ping"), ping("bin/ping6"), ping("srv/ping"));
    assert_eq!(
        (one.nlink(), one.ino(), one.ino()),
        (3, two.ino(), three.ino())
    );
    assert_eq!(ping("many").nlink(), 2);
}

#[tokio::test]
async fn metal_the_kernel_sees_the_attributes() {
    let workshop = Workshop::new();
    let image = workshop
        .convert(TestImage::new(rich_image()))
        .await
        .unwrap();
    let mount = Mount::new(&image.disk, workshop.path("mount"));
    let get = |path: &str, name: &str| xattr::get(mount.0.join(path), name).unwrap();
    assert_eq!(get("bin/attributes", "user.a").as_deref(), Some(&b"1"[..]));
    assert_eq!(get("bin/attributes", "user.bb"), Some(vec![b'x'; 3000]));
    assert_eq!(
        get("bin/long-attribute", "user.long"),
        Some(vec![b'y'; 20_000])
    );
    assert_eq!(get("srv", "trusted.on").as_deref(), Some(&b"directory"[..]));
    assert_eq!(
        get("bin/ping", "security.capability").map(|value| value.len()),
        Some(20)
    );
    assert_eq!(
        get("srv/ping", "security.capability").map(|value| value.len()),
        Some(20)
    );
    assert_eq!(xattr::list(mount.0.join("bin/nanos")).unwrap().count(), 0);
}

/// Lookups are binary searches over blocks and within them: each name of a large directory must be
/// found, and none that is not there.
#[tokio::test]
async fn metal_the_kernel_finds_every_name() {
    let workshop = Workshop::new();
    let names: Vec<String> = (0..3000)
        .map(|n| format!("{:x}-{n}", n * 2_654_435_761u64 % 65536))
        .collect();
    let layer = names.iter().fold(Layer::new(), |layer, name| {
        layer.file(&format!("d/{name}"), name)
    });
    let image = workshop.convert(TestImage::new([layer])).await.unwrap();
    let mount = Mount::new(&image.disk, workshop.path("mount"));
    for name in &names {
        assert_eq!(
            &std::fs::read_to_string(mount.0.join("d").join(name)).unwrap(),
            name
        );
        assert!(!mount.0.join("d").join(format!("{name}x")).exists());
    }
}
