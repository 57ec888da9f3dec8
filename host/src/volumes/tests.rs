use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use jiff::Timestamp;
use tern_catalog::HostId;

use super::*;

fn volumes(dir: &tempfile::TempDir) -> Volumes {
    Volumes::open(dir.path().join("volumes")).unwrap()
}

fn volume(size_gb: u32, source: Option<VolumeSource>) -> Volume {
    Volume {
        id: VolumeId::random(),
        name: "data".parse().unwrap(),
        app: "shop".parse().unwrap(),
        host: HostId(1),
        region: "local".into(),
        size_gb,
        source,
        machine: None,
        snapshots: Default::default(),
        destroyed: false,
        created_at: Timestamp::UNIX_EPOCH,
    }
}

/// What a guest does to its disk.
fn write(path: &Path, text: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(text, AT).unwrap();
}

fn read(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 5];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, AT)
        .unwrap();
    bytes
}

const AT: u64 = 700 << 20;

#[test]
fn a_volume_is_a_sparse_disk_and_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let (volumes, volume) = (volumes(&dir), volume(1, None));
    volumes.make(&volume).unwrap();
    let disk = volumes.disk(&volume.id);
    let metadata = fs::metadata(&disk).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 64 << 20, "{metadata:?}");
    write(&disk, b"mine!");
    volumes.make(&volume).unwrap();
    assert_eq!(
        read(&disk),
        b"mine!",
        "made twice, and the data is still there"
    );
}

#[test]
fn a_disk_grows_for_a_cold_start_only_and_never_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let (volumes, mut volume) = (volumes(&dir), volume(1, None));
    volumes.make(&volume).unwrap();
    volume.size_gb = 3;
    volumes.make(&volume).unwrap();
    assert_eq!(volumes.size(&volume.id).unwrap(), 1 << 30);
    volumes.ready(&volume).unwrap();
    assert_eq!(volumes.size(&volume.id).unwrap(), 3 << 30);
    volume.size_gb = 2;
    volumes.ready(&volume).unwrap();
    assert_eq!(volumes.size(&volume.id).unwrap(), 3 << 30);
}

#[test]
fn a_lost_disk_is_told_and_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (volumes, volume) = (volumes(&dir), volume(1, None));
    assert!(matches!(volumes.ready(&volume), Err(VolumeError::Gone(_))));
    assert!(matches!(
        volumes.size(&volume.id),
        Err(VolumeError::Gone(_))
    ));
    assert!(!volumes.disk(&volume.id).exists());
}

#[test]
fn snapshots_and_forks_keep_what_was_when_they_were_made() {
    let dir = tempfile::tempdir().unwrap();
    let (volumes, origin) = (volumes(&dir), volume(1, None));
    volumes.make(&origin).unwrap();
    let disk = volumes.disk(&origin.id);
    write(&disk, b"first");
    let snapshot = SnapshotId::random();
    let bytes = volumes.take_snapshot(&origin.id, &snapshot).unwrap();
    assert!((1..1 << 28).contains(&bytes), "{bytes}");
    write(&disk, b"later");
    let of = |snapshot: Option<SnapshotId>| {
        Some(VolumeSource {
            volume: origin.id.clone(),
            snapshot,
        })
    };
    let (restored, forked) = (volume(2, of(Some(snapshot.clone()))), volume(1, of(None)));
    volumes.make(&restored).unwrap();
    volumes.make(&forked).unwrap();
    assert_eq!(read(&volumes.disk(&restored.id)), b"first");
    assert_eq!(volumes.size(&restored.id).unwrap(), 2 << 30);
    assert_eq!(read(&volumes.disk(&forked.id)), b"later");
    write(&volumes.disk(&forked.id), b"other");
    assert_eq!(read(&disk), b"later");
    volumes.remove_snapshot(&origin.id, &snapshot).unwrap();
    volumes.remove_snapshot(&origin.id, &snapshot).unwrap();
    let lost = volumes.make(&volume(1, of(Some(snapshot))));
    assert!(matches!(lost, Err(VolumeError::Gone(_))), "{lost:?}");
}

#[test]
fn nothing_is_done_to_a_disk_that_a_monitor_has() {
    let dir = tempfile::tempdir().unwrap();
    let (volumes, volume) = (volumes(&dir), volume(1, None));
    volumes.make(&volume).unwrap();
    let monitor = File::options()
        .write(true)
        .open(volumes.disk(&volume.id))
        .unwrap();
    monitor.try_lock().unwrap();
    let snapshot = volumes.take_snapshot(&volume.id, &SnapshotId::random());
    assert!(matches!(snapshot, Err(VolumeError::Busy)));
    assert!(matches!(
        volumes.destroy(&volume.id),
        Err(VolumeError::Busy)
    ));
    assert!(matches!(volumes.ready(&volume), Err(VolumeError::Busy)));
    drop(monitor);
    volumes.destroy(&volume.id).unwrap();
    volumes.destroy(&volume.id).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("volumes")).unwrap().count(), 0);
}

#[test]
fn what_a_crash_left_half_done_is_removed_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (kept, half) = (volume(1, None), volume(1, None));
    let first = volumes(&dir);
    first.make(&kept).unwrap();
    write(&first.disk(&kept.id), b"mine!");
    let snapshot = first.snapshot(&kept.id, &SnapshotId::random());
    fs::write(snapshot.with_extension(UNFINISHED), b"half").unwrap();
    fs::create_dir_all(first.home(&half.id)).unwrap();
    fs::write(first.disk(&half.id).with_extension(UNFINISHED), b"half").unwrap();
    let gone = first.home(&VolumeId::random()).with_extension(GONE);
    fs::create_dir_all(gone.join("snapshots")).unwrap();
    let second = volumes(&dir);
    assert_eq!(read(&second.disk(&kept.id)), b"mine!");
    assert!(!snapshot.with_extension(UNFINISHED).exists() && !gone.exists());
    assert!(!second.disk(&half.id).with_extension(UNFINISHED).exists());
}

#[tokio::test]
async fn turns_are_taken_one_after_the_other_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = volumes(&dir);
    let (one, two) = (VolumeId::random(), VolumeId::random());
    let turn = volumes.turn(&one).await;
    let _other = volumes.turn(&two).await;
    let second = volumes.turn(&one);
    tokio::pin!(second);
    assert!(futures::poll!(&mut second).is_pending());
    drop(turn);
    drop(second.await);
    drop(volumes.turn(&VolumeId::random()).await);
    assert!(volumes.turns.lock().len() <= 2);
}
