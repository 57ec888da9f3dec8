use std::sync::Arc;

use tern_catalog::{SqliteStore, Store};
use tern_mesh::MeshKey;

use super::*;
use crate::args::StoreKind;
use crate::catalog::open_kind;
use crate::testing::etcd;

/// A server: a data directory with its own WireGuard key, and the cloud's sealing key.
struct Server {
    dir: tempfile::TempDir,
    sealer: Sealer,
    own_catalog: bool,
}

impl Server {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::load_or_create(&dir.path().join("keys/seal.key")).unwrap();
        Self {
            dir,
            sealer,
            own_catalog: false,
        }
    }

    /// One that was given this one's sealing key.
    fn invited(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (self.path("keys/seal.key"), dir.path().join("keys"));
        std::fs::create_dir(&to).unwrap();
        std::fs::copy(from, to.join("seal.key")).unwrap();
        let sealer = Sealer::load_or_create(&to.join("seal.key")).unwrap();
        Self {
            dir,
            sealer,
            own_catalog: false,
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    async fn settle(&self, catalog: &Catalog) -> Result<HostId> {
        let key = MeshKey::load_or_create(&self.path("keys/wireguard.key")).unwrap();
        let host = Host {
            id: HostId(0),
            name: "server".into(),
            region: "ams".into(),
            public_key: key.public_key().to_string(),
            endpoint: "192.0.2.1:51820".parse().unwrap(),
            started_at: Timestamp::now(),
        };
        let asker = Asker {
            host,
            data_dir: self.dir.path(),
            sealer: &self.sealer,
            own_catalog: self.own_catalog,
        };
        asker.settle(catalog).await
    }

    async fn refused(&self, catalog: &Catalog) -> String {
        let error = self.settle(catalog).await.unwrap_err();
        format!("{error:#}")
    }
}

fn sqlite() -> (tempfile::TempDir, Catalog) {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> =
        Arc::new(SqliteStore::open(&dir.path().join("catalog.db")).unwrap());
    (dir, Catalog::new(store))
}

#[tokio::test]
async fn servers_that_join_one_etcd_at_once_get_different_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, etcd) = etcd(dir.path()).await;
    // A connection each, as servers have.
    let open = async || {
        let store = open_kind(StoreKind::Etcd, dir.path(), &etcd).await;
        Catalog::new(store.unwrap())
    };
    let first = Server::new();
    let others: Vec<Server> = (0..8).map(|_| first.invited()).collect();
    // The cloud is made by whoever comes first; all have its sealing key.
    let settle = async |server: &Server| server.settle(&open().await).await.unwrap().0;
    let mut all = futures::future::join_all(others.iter().map(settle)).await;
    all.sort_unstable();
    assert_eq!(all, [1, 2, 3, 4, 5, 6, 7, 8]);
    // Each comes back as who it is.
    let mut again = futures::future::join_all(others.iter().map(settle)).await;
    again.sort_unstable();
    assert_eq!(again, all);
    assert_eq!(settle(&first).await, 9);
}

#[tokio::test]
async fn a_number_is_its_keys_and_is_found_by_it() {
    let (_dir, catalog) = sqlite();
    let mut server = Server::new();
    assert_eq!(server.settle(&catalog).await.unwrap(), HostId(1));
    // As after a crash between the catalog's answer and the file.
    std::fs::remove_file(server.path(FILE)).unwrap();
    assert_eq!(server.settle(&catalog).await.unwrap(), HostId(1));
    std::fs::remove_file(server.path("keys/wireguard.key")).unwrap();
    let refused = server.refused(&catalog).await;
    assert!(refused.contains("has another WireGuard key"), "{refused}");
    // A catalog in the same directory is nobody else's: the key was replaced by its owner.
    server.own_catalog = true;
    assert_eq!(server.settle(&catalog).await.unwrap(), HostId(1));
}

#[tokio::test]
async fn another_clouds_data_directory_is_refused() {
    let ((_a, ours), (_b, theirs)) = (sqlite(), sqlite());
    let server = Server::new();
    server.settle(&ours).await.unwrap();
    let lost = server.refused(&theirs).await;
    assert!(lost.contains("the catalog is of none"), "{lost}");
    assert!(theirs.get::<Cloud>(Cloud::ONLY).await.unwrap().is_none());
    let other = Server::new();
    other.settle(&theirs).await.unwrap();
    let refused = server.refused(&theirs).await;
    assert!(refused.contains("data directory of its own"), "{refused}");
    // Nothing was written for it.
    assert_eq!(theirs.list::<Host>().await.unwrap().len(), 1);
}

#[tokio::test]
async fn another_sealing_key_is_refused_before_a_number_is_given() {
    let (_dir, catalog) = sqlite();
    Server::new().settle(&catalog).await.unwrap();
    let refused = Server::new().refused(&catalog).await;
    assert!(refused.contains("tern hosts invite"), "{refused}");
    assert_eq!(catalog.list::<Host>().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_number_that_was_removed_is_not_given_again() {
    let (_dir, catalog) = sqlite();
    let first = Server::new();
    first.settle(&catalog).await.unwrap();
    let second = first.invited();
    assert_eq!(second.settle(&catalog).await.unwrap(), HostId(2));
    catalog.delete::<Host>("2").await.unwrap();
    let refused = second.refused(&catalog).await;
    assert!(refused.contains("was removed from this cloud"), "{refused}");
    let third = first.invited();
    assert_eq!(third.settle(&catalog).await.unwrap(), HostId(3));
}

#[tokio::test]
async fn a_catalog_from_before_keeps_its_number() {
    let (_dir, catalog) = sqlite();
    let mut server = Server::new();
    server.own_catalog = true;
    let host = Host {
        id: HostId(7),
        name: "old".into(),
        region: "ams".into(),
        public_key: "a key that was replaced since".into(),
        endpoint: "192.0.2.1:51820".parse().unwrap(),
        started_at: Timestamp::now(),
    };
    catalog.create(&host).await.unwrap();
    assert_eq!(server.settle(&catalog).await.unwrap(), HostId(7));
    assert_eq!(server.invited().settle(&catalog).await.unwrap(), HostId(8));
}
