use std::os::unix::fs::PermissionsExt as _;

use tern_catalog::{SqliteStore, Store};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

/// A host with a door, and what keeps its files.
struct World {
    door: Arc<Door>,
    dir: tempfile::TempDir,
}

fn config(dir: &Path) -> DoorConfig {
    DoorConfig {
        host: HostId(1),
        data_dir: dir.to_owned(),
        etcd: Etcd {
            members: vec!["https://192.0.2.1:2379".to_owned()],
            ca: Some(dir.join("ca.pem")),
            user: Some("tern".to_owned()),
            password_file: Some(dir.join("password")),
            ..Etcd::default()
        },
        region: "ams".to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        announced: IpAddr::from([127, 0, 0, 1]),
    }
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&dir.path().join("other.db")).unwrap());
        std::fs::create_dir(dir.path().join("keys")).unwrap();
        for (name, text) in [
            ("ca.pem", "the authority"),
            ("password", "the password"),
            ("keys/seal.key", "0123456789abcdef0123456789abcdef"),
        ] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let door = Door::new(Catalog::new(store), config(dir.path()));
        let door = door.await.unwrap();
        Self { door, dir }
    }

    async fn invite(&self) -> Ticket {
        let made = self.door.make(None, HOUR).await.unwrap();
        made.join.parse().unwrap()
    }

    async fn change(&self, ticket: &Ticket, change: impl Fn(&mut Invite)) {
        let hash = hash_of(&ticket.secret);
        let changed = self.door.catalog.update(&hash, |invite: &mut Invite| {
            change(invite);
            Ok::<_, ()>(())
        });
        changed.await.unwrap().unwrap().unwrap();
    }
}

async fn refused(ticket: &Ticket) -> String {
    let dir = tempfile::tempdir().unwrap();
    let error = join(dir.path(), ticket, "key").await.unwrap_err();
    assert!(remembered(dir.path()).unwrap().is_none());
    assert!(!dir.path().join("keys/seal.key").exists());
    format!("{error:#}")
}

#[tokio::test]
async fn an_invite_brings_what_makes_a_host_and_is_good_once() {
    let world = World::new().await;
    let ticket = world.invite().await;
    let dir = tempfile::tempdir().unwrap();
    join(dir.path(), &ticket, "the joiner's key").await.unwrap();
    let (etcd, region) = remembered(dir.path()).unwrap().unwrap();
    assert_eq!(region, "ams");
    assert_eq!(etcd.members, ["https://192.0.2.1:2379"]);
    assert_eq!((etcd.cert, etcd.user.as_deref()), (None, Some("tern")));
    let read = |path: PathBuf| {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        std::fs::read_to_string(path).unwrap()
    };
    assert_eq!(read(etcd.ca.unwrap()), "the authority");
    assert_eq!(read(etcd.password_file.unwrap()), "the password");
    let (ours, theirs) = (world.dir.path(), dir.path());
    let seal = |dir: &Path| std::fs::read(dir.join("keys/seal.key")).unwrap();
    assert_eq!(seal(ours), seal(theirs));
    // Whoever comes second learns by whom it was used, and nothing else.
    let said = refused(&ticket).await;
    assert!(said.contains("was used at"), "{said}");
    assert!(said.contains("the joiner's key"), "{said}");
    // The catalog has no secret that a copy of it would give away.
    let all = world.door.catalog.store().list("").await.unwrap();
    let holds = |e: &tern_catalog::Entry| {
        let text = format!("{}{}", e.key, String::from_utf8_lossy(&e.value));
        text.contains(&ticket.secret)
    };
    assert!(!all.entries.iter().any(holds));
}

#[tokio::test]
async fn of_many_that_use_an_invite_at_once_one_is_let_in() {
    let world = World::new().await;
    let ticket = world.invite().await;
    let all = (0..8).map(async |_| {
        let dir = tempfile::tempdir().unwrap();
        join(dir.path(), &ticket, "key").await.is_ok()
    });
    let all = futures::future::join_all(all).await;
    assert_eq!(all.iter().filter(|ok| **ok).count(), 1);
}

#[tokio::test]
async fn an_expired_invite_is_refused_and_so_is_an_unknown_one() {
    let world = World::new().await;
    let ticket = world.invite().await;
    let past = Timestamp::now() - Duration::from_secs(1);
    world.change(&ticket, |i| i.expires_at = past).await;
    let said = refused(&ticket).await;
    assert!(said.contains("expired at"), "{said}");
    let unknown = Ticket {
        secret: "0".repeat(64),
        ..ticket
    };
    let said = refused(&unknown).await;
    assert!(said.contains("no such invite"), "{said}");
}

#[tokio::test]
async fn something_that_answers_in_the_hosts_place_learns_nothing() {
    let world = World::new().await;
    let ticket = world.invite().await;
    let wrong = Ticket {
        fingerprint: [7; 32],
        ..ticket.clone()
    };
    let said = refused(&wrong).await;
    assert!(said.contains("not the one that the invite names"), "{said}");
    // The secret was not said: the invite is still good.
    let dir = tempfile::tempdir().unwrap();
    join(dir.path(), &ticket, "key").await.unwrap();
}

#[tokio::test]
async fn a_data_directory_with_a_cloud_does_not_use_up_an_invite() {
    let world = World::new().await;
    let ticket = world.invite().await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("catalog.db"), "").unwrap();
    let error = join(dir.path(), &ticket, "key").await.unwrap_err();
    assert!(error.to_string().contains("has a cloud already"), "{error}");
    std::fs::remove_file(dir.path().join("catalog.db")).unwrap();
    join(dir.path(), &ticket, "key").await.unwrap();
}

#[tokio::test]
async fn an_invite_outlives_a_restart_of_its_host() {
    let World { door, dir } = World::new().await;
    let made = door.make(Some("fra".to_owned()), HOUR).await.unwrap();
    let mut ticket: Ticket = made.join.parse().unwrap();
    // The first one's port is still open in this process, so this one has another.
    let again = Door::new(door.catalog.clone(), config(dir.path()));
    let again = again.await.unwrap();
    let port = again.open.lock().await.as_ref().map(|open| open.port);
    ticket.address.set_port(port.expect("open again"));
    let joined = tempfile::tempdir().unwrap();
    join(joined.path(), &ticket, "key").await.unwrap();
    assert_eq!(remembered(joined.path()).unwrap().unwrap().1, "fra");
}

#[tokio::test]
async fn a_cloud_that_cannot_be_shared_invites_nobody() {
    let World { door, dir } = World::new().await;
    let refused = async |members: &[&str]| {
        let mut config = config(dir.path());
        config.etcd.members = members.iter().map(|m| (*m).to_owned()).collect();
        let door = Door::new(door.catalog.clone(), config).await.unwrap();
        door.make(None, HOUR).await.unwrap_err().to_string()
    };
    let said = refused(&[]).await;
    assert!(said.contains("tern catalog move"), "{said}");
    let said = refused(&["http://127.0.0.1:2379", "http://[::1]:2379"]).await;
    assert!(said.contains("this server alone"), "{said}");
}

#[test]
fn what_is_no_invite_is_refused_with_its_form() {
    let good = format!("192.0.2.1:4281/{}/{}", "ab".repeat(32), "cd".repeat(32));
    let ticket: Ticket = good.parse().unwrap();
    assert_eq!(ticket.fingerprint, [0xab; 32]);
    for bad in [
        "",
        "192.0.2.1:4281",
        &good[1..good.len() - 1],
        "x/y/z",
        &format!("{good}/1"),
    ] {
        let error = bad.parse::<Ticket>().unwrap_err();
        assert!(error.contains("tern hosts invite"), "{bad}");
    }
}
