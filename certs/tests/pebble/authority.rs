//! Debian's `pebble`, with its bad-nonce and random-wait behaviours left on, and a name server that says
//! `127.0.0.1` for every name.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::site;

/// Where the authority and the site that it checks are.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    pub directory: u16,
    pub management: u16,
    pub names: u16,
    pub names_management: u16,
    pub http: u16,
    pub tls: u16,
}

/// A running authority; it forgets everything when it is dropped.
pub struct Authority {
    _processes: [Process; 2],
    ports: Ports,
    own_root: PathBuf,
}

struct Process(Child);

/// Longest that a program may take to listen.
const START: Duration = Duration::from_secs(30);

impl Ports {
    /// Ports that are free now.
    pub fn find() -> Self {
        let held: [TcpListener; 6] =
            std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let [directory, management, names, names_management, http, tls] =
            held.each_ref().map(|l| l.local_addr().unwrap().port());
        Self {
            directory,
            management,
            names,
            names_management,
            http,
            tls,
        }
    }

    /// The directory's URL.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}/dir", self.directory)
    }
}

/// Writes the certificate of the authority's own HTTPS; answers the file to trust.
pub fn own_root(dir: &Path) -> PathBuf {
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
    std::fs::write(dir.join("directory.key"), signing_key.serialize_pem()).unwrap();
    let root = dir.join("directory.pem");
    std::fs::write(&root, cert.pem()).unwrap();
    root
}

impl Authority {
    /// Starts it; what it issues is good for `life`.
    pub fn start(dir: &Path, ports: Ports, own_root: &Path, life: Duration) -> Self {
        let config = serde_json::json!({"pebble": {
            "listenAddress": format!("127.0.0.1:{}", ports.directory),
            "managementListenAddress": format!("127.0.0.1:{}", ports.management),
            "certificate": own_root,
            "privateKey": dir.join("directory.key"),
            "httpPort": ports.http,
            "tlsPort": ports.tls,
            "certificateValidityPeriod": life.as_secs(),
        }});
        let path = dir.join("pebble.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let local = |port: u16| format!("127.0.0.1:{port}");
        let mut names = Command::new("pebble-challtestsrv");
        names.args([
            "-defaultIPv6",
            "",
            "-http01",
            "",
            "-https01",
            "",
            "-tlsalpn01",
            "",
        ]);
        names.args(["-dns01", &local(ports.names)]);
        names.args(["-management", &local(ports.names_management)]);
        let mut pebble = Command::new("pebble");
        pebble
            .arg("-config")
            .arg(&path)
            .args(["-dnsserver", &local(ports.names)]);
        let names = Process::start(names, dir, ports.names_management);
        let pebble = Process::start(pebble, dir, ports.directory);
        Self {
            _processes: [names, pebble],
            ports,
            own_root: own_root.to_owned(),
        }
    }

    /// What a browser must trust to trust what it issues.
    pub async fn issued_root(&self) -> Arc<RootCertStore> {
        let mut own = RootCertStore::empty();
        own.add(CertificateDer::from_pem_file(&self.own_root).unwrap())
            .unwrap();
        let pem = site::get(self.ports.management, "127.0.0.1", own.into(), "/roots/0").await;
        let mut issued = RootCertStore::empty();
        issued
            .add(CertificateDer::from_pem_slice(&pem).unwrap())
            .unwrap();
        issued.into()
    }
}

impl Process {
    fn start(mut command: Command, dir: &Path, port: u16) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let log = dir.join(format!("{name}.log"));
        let out = std::fs::File::create(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap_or_else(|e| panic!("{name} cannot be started ({e}): apt install pebble"));
        let mut process = Self(child);
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(
                process.0.try_wait().unwrap().is_none(),
                "{name} has ended:\n{}",
                log()
            );
            assert!(
                began.elapsed() < START,
                "{name} does not listen:\n{}",
                log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
