//! What tests of several modules need.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::args::{Etcd, StoreKind};
use crate::catalog::open_kind;

/// An etcd of one member, without TLS: that is what the catalog's own tests are for.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub async fn etcd(dir: &Path) -> (Server, Etcd) {
    let held = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [client, peer] =
        held.map(|l| format!("http://127.0.0.1:{}", l.local_addr().unwrap().port()));
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(["--heartbeat-interval", "10", "--election-timeout", "50"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let server = Server(child.unwrap_or_else(|e| {
        panic!("etcd cannot be started ({e}); install it: apt-get install etcd-server")
    }));
    let etcd = Etcd {
        members: vec![client],
        ..Etcd::default()
    };
    let began = Instant::now();
    while let Err(error) = open_kind(StoreKind::Etcd, dir, &etcd).await {
        assert!(began.elapsed() < Duration::from_secs(60), "{error:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (server, etcd)
}
