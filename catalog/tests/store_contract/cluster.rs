//! Real etcd clusters: TLS both ways, users, every file in a temporary directory, ended with their handle.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tern_catalog::{EtcdConfig, EtcdStore};

/// Longest wait for a cluster to do what it will do in a second on an idle machine.
pub const LIMIT: Duration = Duration::from_secs(60);
const PASSWORD: &str = "not-the-one-of-root";

pub struct Cluster {
    files: tempfile::TempDir,
    pub members: Vec<Member>,
}

pub struct Member {
    pub client: String,
    arguments: Vec<String>,
    log: PathBuf,
    process: Option<Child>,
}

impl Cluster {
    /// A cluster with the user `tern`, who may read and write Tern's keys and nothing else.
    pub async fn start(size: usize) -> Self {
        let files = tempfile::tempdir().unwrap();
        certificates(files.path());
        std::fs::write(files.path().join("password"), format!("{PASSWORD}\n")).unwrap();
        let ports = free_ports(2 * size);
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let name = |n: usize| format!("m{n}");
        let peers: Vec<_> = (0..size)
            .map(|n| format!("{}={}", name(n), url(ports[size + n])))
            .collect();
        let peers = peers.join(",");
        let members = (0..size).map(|n| {
            let at = |name: &str| files.path().join(name).display().to_string();
            let (client, peer) = (url(ports[n]), url(ports[size + n]));
            // One member elects itself and need not wait; three on a busy machine must not give each other up.
            let (heartbeat, election) = if size == 1 {
                ("10", "50")
            } else {
                ("150", "1500")
            };
            let name = name(n);
            let arguments = [
                ("name", name.as_str()),
                ("data-dir", &at(&name)),
                ("listen-client-urls", &client),
                ("advertise-client-urls", &client),
                ("listen-peer-urls", &peer),
                ("initial-advertise-peer-urls", &peer),
                ("initial-cluster", &peers),
                ("heartbeat-interval", heartbeat),
                ("election-timeout", election),
                ("bcrypt-cost", "4"),
                ("cert-file", &at("server.pem")),
                ("key-file", &at("server.key")),
                ("trusted-ca-file", &at("ca.pem")),
                ("client-cert-auth", "true"),
                ("peer-cert-file", &at("server.pem")),
                ("peer-key-file", &at("server.key")),
                ("peer-trusted-ca-file", &at("ca.pem")),
                ("peer-client-cert-auth", "true"),
            ];
            let arguments = arguments.map(|(name, value)| format!("--{name}={value}"));
            Member {
                arguments: arguments.to_vec(),
                log: files.path().join(format!("{name}.log")),
                process: None,
                client,
            }
        });
        let mut cluster = Self {
            members: members.collect(),
            files,
        };
        for member in &mut cluster.members {
            member.start();
        }
        cluster.ready().await;
        for command in [
            "user add root:root",
            "user grant-role root root",
            "role add tern",
            "role grant-permission tern --prefix=true readwrite tern/",
            &format!("user add tern --new-user-password={}", PASSWORD),
            "user grant-role tern tern",
            "auth enable",
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            let output = cluster.ctl(0, &words, false);
            assert!(output.status.success(), "{command}: {output:?}");
        }
        cluster
    }

    /// Waits until a write is possible through the first member.
    async fn ready(&self) {
        let began = Instant::now();
        loop {
            let output = self.ctl(0, &["endpoint", "health"], false);
            if output.status.success() {
                return;
            }
            let log = std::fs::read_to_string(&self.members[0].log).unwrap_or_default();
            assert!(
                began.elapsed() < LIMIT,
                "etcd does not get ready: {output:?}\n{log}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// As a client of the cluster is configured that has all of it.
    pub fn config(&self) -> EtcdConfig {
        let at = |name: &str| Some(self.files.path().join(name));
        EtcdConfig {
            endpoints: self.members.iter().map(|m| m.client.clone()).collect(),
            ca: at("ca.pem"),
            certificate: at("client.pem"),
            key: at("client.key"),
            user: Some("tern".to_owned()),
            password_file: at("password"),
        }
    }

    /// A file that the cluster was made with.
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    pub async fn store(&self) -> EtcdStore {
        EtcdStore::connect(self.config()).await.unwrap()
    }

    /// A store that speaks to this member first.
    pub async fn store_at(&self, member: usize) -> EtcdStore {
        let mut config = self.config();
        config.endpoints.rotate_left(member);
        EtcdStore::connect(config).await.unwrap()
    }

    fn ctl(&self, member: usize, words: &[&str], root: bool) -> Output {
        let at = |name: &str| self.files.path().join(name);
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(words);
        command.arg(format!("--endpoints={}", self.members[member].client));
        command.arg("--cacert").arg(at("ca.pem"));
        command.arg("--cert").arg(at("client.pem"));
        command.arg("--key").arg(at("client.key"));
        if root {
            command.arg("--user=root:root");
        }
        command.output().unwrap_or_else(|e| {
            panic!("etcdctl cannot be started ({e}); install it: apt-get install etcd-client")
        })
    }

    /// A command to one member, as root.
    pub fn etcdctl(&self, member: usize, words: &[&str]) -> String {
        let output = self.ctl(member, words, true);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Saves a snapshot of a cluster of one.
    pub fn save(&self) {
        let to = self.file("snapshot").display().to_string();
        self.etcdctl(0, &["snapshot", "save", &to]);
    }

    /// Starts a cluster of one again from its snapshot, as its operator would.
    pub fn restore(&mut self) {
        self.members[0].kill();
        let data = self.file("m0");
        std::fs::remove_dir_all(&data).unwrap();
        let arguments = self.members[0].arguments.iter();
        let needed = [
            "name",
            "data-dir",
            "initial-cluster",
            "initial-advertise-peer-urls",
        ];
        let needed = needed.map(|name| format!("--{name}="));
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["snapshot", "restore"])
            .arg(self.file("snapshot"))
            .args(arguments.filter(|a| needed.iter().any(|n| a.starts_with(n))))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        self.members[0].start();
    }

    /// The member that leads, and the ids of all.
    pub fn leader(&self) -> (usize, Vec<String>) {
        let mut ids = Vec::new();
        let mut leads = None;
        for n in 0..self.members.len() {
            let status = self.etcdctl(n, &["endpoint", "status", "--write-out=fields"]);
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name));
                line.and_then(|line| line.split_once(" : "))
                    .map(|(_, value)| value.to_owned())
            };
            let id: u64 = field("\"MemberID\"").unwrap().parse().unwrap();
            let leader: u64 = field("\"Leader\"").unwrap().parse().unwrap();
            ids.push(format!("{id:x}"));
            if id == leader {
                leads = Some(n);
            }
        }
        (leads.expect("a leader"), ids)
    }
}

impl Member {
    pub fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let child = Command::new("etcd")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.process = Some(child.unwrap_or_else(|e| {
            panic!("etcd cannot be started ({e}); install it: apt-get install etcd-server")
        }));
    }

    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.process.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Ports that nobody listens on.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<_> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    held.iter()
        .map(|l| l.local_addr().unwrap().port())
        .collect()
}

fn certificates(at: &Path) {
    let write = |name: &str, text: String| std::fs::write(at.join(name), text).unwrap();
    let authority = |file: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        write(file, params.self_signed(&key).unwrap().pem());
        Issuer::new(params, key)
    };
    let ca = authority("ca.pem");
    let _ = authority("other-ca.pem");
    for (file, purposes) in [
        (
            "server",
            &[
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ][..],
        ),
        ("client", &[ExtendedKeyUsagePurpose::ClientAuth][..]),
    ] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = purposes.to_vec();
        // No common name: etcd would take it for the user's.
        params.distinguished_name = rcgen::DistinguishedName::new();
        write(
            &format!("{file}.pem"),
            params.signed_by(&key, &ca).unwrap().pem(),
        );
        write(&format!("{file}.key"), key.serialize_pem());
    }
}
