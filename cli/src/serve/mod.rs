//! `tern serve`: the roles of one host, put together.
//!
//! The order is that of need: the catalog and its view; the agent, which takes up Machines that run; the
//! mesh, whose device DNS answers on; certificates; the edge, open to the public once all behind it is
//! there; the API last. It ends the other way round.

pub(crate) mod adapters;
mod bootstrap;
mod identity;
mod join;
mod metrics;
mod systemd;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum as _;
use tern_api::{ApiConfig, ApiServer, REGISTRY_NAME};
use tern_catalog::{Catalog, Host, HostId, PortRanges, View};
use tern_certs::{CertsConfig, Issuer, Sealer};
use tern_dns::{Dns, DnsConfig};
use tern_edge::{AccessLogConfig, Edge, EdgeConfig, Limits};
use tern_host::{Agent, HostConfig, Presence, RateLimits, Registry};
use tern_mesh::{Mesh, MeshConfig, MeshKey};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::args::{CpuTemplate, Serve};
use adapters::{HostAdapter, SecretKey};
pub use join::Ticket;

/// What to look for where there is no KVM.
const WHERE_KVM_IS: &str = "Tern needs a bare-metal server with virtualization (VT-x, AMD-V) on in its firmware, or a virtual \
     server that is given nested virtualization: docs/install.md names both kinds, and `tern doctor` looks closer";

/// Longest that requests under way may take once the server is told to end.
const DRAIN: Duration = Duration::from_secs(20);
const TUN: &str = "tern0";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Held while a server runs on a data directory.
const LOCK: &str = "serve.lock";
const VHOST_NET: &str = "/dev/vhost-net";

/// Runs the server until a signal ends it.
pub fn run(args: Serve) -> Result<ExitCode> {
    if args.print_config {
        print!("{}", crate::config::print());
        return Ok(ExitCode::SUCCESS);
    }
    if args.check_config {
        println!("flags and configuration are right");
        return Ok(ExitCode::SUCCESS);
    }
    log(args.log_json);
    ensure!(
        nix_root(),
        "tern serve makes network devices and virtual machines: run it as root"
    );
    if let Err(error) = tern_host::protect_this_process() {
        tracing::warn!(%error, "this server may be killed where the host is out of memory");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(mut args: Serve) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let manager = systemd::Manager::find();
    let descriptors = raise_descriptors()?;
    // Early: an address that is taken is told before anything has begun.
    let measured = match args.metrics.0 {
        Some(address) => Some(
            metrics::listen(address)
                .await
                .context("--metrics (give it another address, or `none`)")?,
        ),
        None => None,
    };
    let files = Files::find(&args)?;
    make_private_dir(&args.data_dir)?;
    probe(&files.vmm, args.cpu_template).await?;
    if args.machine_vhost_net {
        probe_vhost_net(Path::new(VHOST_NET))?;
    }

    let _lock = lock(&args.data_dir)?;
    let key = MeshKey::load_or_create(&args.data_dir.join("keys/wireguard.key"))?;
    let region = settle_cloud(&mut args, &key).await?;
    let store = crate::catalog::open(&args.data_dir, &args.etcd).await?;
    let own_catalog = args.etcd.members.is_empty();
    let catalog = Catalog::new(Arc::clone(&store));
    let seal_key = args.data_dir.join("keys/seal.key");
    let sealer = Sealer::load_or_create(&seal_key)?;
    let asker = identity::Asker {
        host: this_host(&args, &region, &key),
        data_dir: &args.data_dir,
        sealer: &sealer,
        own_catalog,
    };
    let host = asker.settle(&catalog).await?;
    let view = View::follow(store).await?;
    // Before anything of this host's is touched: what has its number elsewhere is still using it.
    let mut presence = Presence::claim(&catalog, &view, host, own_catalog).await?;
    bootstrap::run(&catalog, &args.data_dir).await?;

    let internal_token = bootstrap::new_token();
    let sealer = Arc::new(SecretKey(sealer));
    let mut config = host_config(&args, host, &files, &internal_token);
    config.secrets = Some(sealer.clone());
    let mut agent = Agent::start(config, catalog.clone(), view.clone())
        .await
        .context("the agent")?;
    let handle = agent.handle();
    // Before the API places Machines; if the store fails now it is told by and by.
    if let Err(error) = presence.tell(&catalog, VERSION, handle.room()).await {
        tracing::warn!(%error, "what this host has cannot be told");
    }
    let adapter = Arc::new(HostAdapter::new(agent.handle()));
    let mesh = MeshConfig {
        listen: args.wireguard,
        tun_name: TUN.to_owned(),
        ..MeshConfig::new(host, key)
    };
    let mesh = Mesh::start(mesh, view.clone()).await.context("the mesh")?;
    let upstreams = (!args.upstream_dns.is_empty()).then(|| args.upstream_dns.clone());
    let dns = DnsConfig {
        upstreams,
        ..DnsConfig::new(host)
    };
    let dns = Dns::start(dns, view.clone()).await.context("DNS")?;
    let certs = CertsConfig {
        directory: args.acme_directory.clone(),
        root_ca: args.acme_root_ca.clone(),
        contact: args.acme_contact.clone(),
        seal_key,
    };
    let issuer = Issuer::start(certs, catalog.clone(), view.clone())?;
    let service_ports = service_ports(&args);
    let edge = EdgeConfig {
        http: args.http.clone(),
        https: args.https.clone(),
        service_addresses: service_addresses(&args),
        service_ports: service_ports.clone(),
        region: region.clone(),
        host,
        autostop_after: args.autostop_after,
        wake_timeout: args.wake_timeout,
        threads: EdgeConfig::threads_of_this_host(),
        http3: !args.no_http3,
        early_wake: !args.no_early_wake,
        limits: Limits {
            connections: edge_connections(&args, descriptors),
            connections_of_client: args.max_client_connections,
            ..Limits::default()
        },
        access_log: access_log(&args),
    };
    let edge = Edge::start(edge, view.clone(), issuer.resolver(), adapter.clone())
        .await
        .context("the edge")?;
    let measured_view = view.clone();
    let present = (catalog.clone(), view.clone());
    let door = join::DoorConfig {
        host,
        data_dir: args.data_dir.clone(),
        etcd: args.etcd.clone(),
        region: region.clone(),
        listen: args.join_listen,
        announced: endpoint(&args).ip(),
    };
    let door = join::Door::new(catalog.clone(), door)
        .await
        .context("the door for new servers")?;
    let api = ApiConfig {
        listen: args.api,
        host,
        shared: !own_catalog,
        inviter: Arc::new(join::Invites(door)),
        registry_dir: args.data_dir.join("registry"),
        region,
        domain: args.domain.clone(),
        service_ports,
        internal_token,
        sealer,
    };
    let api = ApiServer::bind(api, catalog, view, adapter)
        .await
        .with_context(|| format!("the API on {}", args.api))?;
    let end = CancellationToken::new();
    let mut api = tokio::spawn(api.run(end.clone()));
    if let Some(listener) = measured {
        let sources = metrics::Sources {
            edge: Arc::clone(edge.metrics()),
            agent: agent.handle().metrics(),
            view: measured_view,
        };
        tokio::spawn(metrics::serve(listener, sources, end.clone()));
    }
    tracing::info!(api = %args.api, data = %args.data_dir.display(), "serving");
    manager.ready();

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        error = mesh.ended() => Some(anyhow::Error::from(error).context("the mesh ended by itself")),
        error = presence.keep(&present.0, &present.1, VERSION, || handle.room()) => {
            Some(anyhow::Error::from(error))
        }
        error = agent.failed() => Some(anyhow::Error::from(error).context("the agent has failed")),
        ended = &mut api => {
            let error = ended.err().map_or_else(|| anyhow::anyhow!("nobody asked it to"), anyhow::Error::from);
            Some(error.context("the API has ended by itself"))
        }
        () = manager.stay_alive() => None,
    };
    manager.stopping();
    tracing::info!("ending; Machines go on");
    end.cancel();
    edge.drain(DRAIN).await;
    issuer.shutdown().await;
    dns.shutdown().await;
    mesh.shutdown().await;
    agent.shutdown().await;
    presence.leave(&present.0).await;
    // One that has ended by itself has been told of.
    if !api.is_finished()
        && let Err(error) = api.await
    {
        tracing::error!(%error, "the API ended badly");
    }
    ended.map_or(Ok(()), Err)
}

/// What is run, and what Machines boot.
struct Files {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Files {
    fn find(args: &Serve) -> Result<Self> {
        let own = std::env::current_exe().context("this program does not know where it is")?;
        let beside = &files_dir(&own);
        let find = |given: &Option<PathBuf>, name: &str, flag: &str| {
            let path = given.clone().unwrap_or_else(|| beside.join(name));
            if !path.exists() {
                bail!(
                    "there is no {}; build it with `make build`, install it with `make install`, or say where it is with --{flag}",
                    path.display()
                );
            }
            std::path::absolute(&path).with_context(|| format!("{}", path.display()))
        };
        Ok(Self {
            vmm: find(&args.vmm, "tern-vmm", "vmm")?,
            kernel: find(&args.kernel, "guest/vmlinux", "kernel")?,
            initramfs: find(&args.initramfs, "guest/initramfs.cpio", "initramfs")?,
        })
    }
}

/// Where the monitor is and what Machines boot: `../lib/tern` of an installed program, else beside it, where it was built.
fn files_dir(program: &Path) -> PathBuf {
    let beside = program.parent().unwrap_or(Path::new("/"));
    let installed = beside.with_file_name("lib").join("tern");
    match installed.is_dir() {
        true => installed,
        false => beside.to_owned(),
    }
}

/// Refuses to serve where no Machine could run, rather than failing at the first deploy.
async fn probe(vmm: &Path, template: CpuTemplate) -> Result<()> {
    let template = template.to_possible_value().context("a template")?;
    let output = tokio::process::Command::new(vmm)
        .args(["probe", "--cpu-template", template.get_name()])
        .output()
        .await;
    let output = output.with_context(|| format!("{} cannot be started", vmm.display()))?;
    if !output.status.success() {
        bail!(
            "this machine cannot run Machines: {}\n{WHERE_KVM_IS}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The same for `--machine-vhost-net`: by opening it, which loads the module where the kernel finds it.
fn probe_vhost_net(device: &Path) -> Result<()> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map(drop)
        .with_context(|| {
            format!(
                "--machine-vhost-net needs {}: load its module (modprobe vhost_net), or leave the flag out",
                device.display()
            )
        })
}

fn host_config(args: &Serve, host: HostId, files: &Files, internal_token: &str) -> HostConfig {
    let mut config = HostConfig::new(host, &args.data_dir);
    config.vmm_binary.clone_from(&files.vmm);
    config.kernel.clone_from(&files.kernel);
    config.initramfs.clone_from(&files.initramfs);
    config.image_budget = args.image_budget;
    config.private_registries = args.private_registries;
    config.cpu_template = match args.cpu_template {
        CpuTemplate::Host => tern_host::CpuTemplate::Host,
        CpuTemplate::X86_64V2 => tern_host::CpuTemplate::X86_64V2,
        CpuTemplate::X86_64V3 => tern_host::CpuTemplate::X86_64V3,
    };
    config.overcommit = tern_host::Overcommit {
        memory: args.memory_overcommit,
        cpus: args.cpu_overcommit,
    };
    config.vhost_net = args.machine_vhost_net;
    config.machine_allow.clone_from(&args.machine_allow);
    config.public = args.http.iter().chain(&args.https).copied().collect();
    config.snapshot_cache = args.snapshot_cache;
    config.rate_limits = RateLimits {
        disk_bytes: args.machine_disk_bandwidth,
        disk_operations: args.machine_disk_iops,
        network_bytes: args.machine_net_bandwidth,
    };
    let registry = Registry {
        address: reachable(args.api).to_string(),
        credentials: Some(("host".to_owned(), internal_token.to_owned())),
        insecure: true,
    };
    config.registries.insert(REGISTRY_NAME.to_owned(), registry);
    config
}

/// Where the ports are open that services name: wherever 80 and 443 are.
fn service_addresses(args: &Serve) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = args
        .http
        .iter()
        .chain(&args.https)
        .map(|a| a.ip())
        .collect();
    all.sort();
    all.dedup();
    // One that takes both families' connections needs none beside it.
    if all.contains(&IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)) {
        all.retain(|ip| ip.is_ipv6());
    }
    all
}

/// Raises the soft limit of descriptors to the hard one, and tells it. A service is started with a soft limit of 1,024,
/// for the sake of old programs that use select(2).
fn raise_descriptors() -> Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        .with_context(|| format!("the limit of descriptors cannot be raised to {hard}"))?;
    Ok(hard)
}

/// Connections that the edge takes: as many as there are descriptors for, two each (one to the app), when a quarter is
/// kept for the agent, the API and the catalog.
fn edge_connections(args: &Serve, descriptors: u64) -> usize {
    let room = usize::try_from(descriptors / 4 * 3 / 2).unwrap_or(usize::MAX);
    let wanted = args.max_connections;
    if room < wanted {
        tracing::warn!(
            descriptors,
            connections = room,
            "the limit of descriptors allows the edge fewer connections than the {wanted} of --max-connections; \
             raise it (systemd: LimitNOFILE=)"
        );
    }
    wanted.min(room)
}

/// Where requests are written down.
fn access_log(args: &Serve) -> Option<AccessLogConfig> {
    let path = match args.access_log.as_deref()? {
        "stdout" => None,
        path => Some(PathBuf::from(path)),
    };
    Some(AccessLogConfig {
        path,
        sample: args.access_log_sample,
    })
}

/// The ports that services may have: never those that this server itself listens on. A service of that port would
/// keep it from its next start.
fn service_ports(args: &Serve) -> PortRanges {
    let public = args.http.iter().chain(&args.https);
    let own = public
        .chain([&args.api, &args.wireguard, &args.join_listen])
        .chain(&args.metrics.0);
    let own: Vec<u16> = own.map(SocketAddr::port).collect();
    args.service_ports.clone().without(&own)
}

/// An address to connect to for one that is listened on.
fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        ip if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listen.port()),
        _ => listen,
    }
}

/// Where WireGuard clients are told to connect: as given, or the address that leads outside.
fn endpoint(args: &Serve) -> SocketAddr {
    let port = args.wireguard.port();
    let outside = || {
        // Connecting a UDP socket sends nothing; it asks the routing table for a source address.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
        socket.local_addr().ok().map(|a| a.ip())
    };
    let listen = Some(args.wireguard.ip()).filter(|ip| !ip.is_unspecified());
    let ip = listen
        .or_else(outside)
        .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    args.wireguard_endpoint.unwrap_or(SocketAddr::new(ip, port))
}

/// This server, as the catalog should know it; its number is not known yet.
fn this_host(args: &Serve, region: &str, key: &MeshKey) -> Host {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = Some(name.trim()).filter(|name| !name.is_empty());
    Host {
        id: HostId(0),
        name: name.unwrap_or("host").to_owned(),
        region: region.to_owned(),
        public_key: key.public_key().to_string(),
        endpoint: endpoint(args),
        started_at: jiff::Timestamp::now(),
    }
}

/// Joins a cloud where that is asked for, takes etcd from an earlier time where no flag says, and tells the region.
async fn settle_cloud(args: &mut Serve, key: &MeshKey) -> Result<String> {
    let mut joined = join::remembered(&args.data_dir)?;
    if let Some(ticket) = &args.join {
        match joined {
            Some(_) => {
                tracing::info!("this data directory has joined before: --join is left aside")
            }
            None => {
                let public_key = key.public_key().to_string();
                join::join(&args.data_dir, ticket, &public_key).await?;
                joined = join::remembered(&args.data_dir)?;
            }
        }
    }
    let (etcd, region) = joined.unzip();
    if let Some(etcd) = etcd.filter(|_| args.etcd.members.is_empty()) {
        args.etcd = etcd;
    }
    let region = args.region.clone().or(region);
    Ok(region.unwrap_or_else(|| "local".to_owned()))
}

/// One server a data directory. Whoever has the lock knows that its host's former life here has ended.
fn lock(data_dir: &Path) -> Result<std::fs::File> {
    let path = data_dir.join(LOCK);
    let file = std::fs::File::create(&path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => bail!(
            "another `tern serve` runs on {}: stop it first, or give this one a --data-dir of its own",
            data_dir.display()
        ),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("{} cannot be locked", path.display()))
        }
    }
}

fn make_private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("{} cannot be made", path.display()))
}

/// Whether this process is root: the owner of its own entry in /proc tells.
fn nix_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

fn log(json: bool) {
    use std::io::IsTerminal as _;
    let filter = EnvFilter::try_from_env("TERN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match json {
        true => log.json().init(),
        false if systemd::logs_to_journal() => log.event_format(systemd::Journal::new()).init(),
        false => log.init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installed_program_finds_its_files_in_lib() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("bin/tern");
        assert_eq!(files_dir(&program), root.path().join("bin"));
        std::fs::create_dir_all(root.path().join("lib/tern")).unwrap();
        assert_eq!(files_dir(&program), root.path().join("lib/tern"));
    }

    #[test]
    fn a_host_without_vhost_net_says_what_to_do() {
        let error = probe_vhost_net(Path::new("/dev/nothing-like-it")).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("modprobe vhost_net"), "{error}");
        probe_vhost_net(Path::new("/dev/null")).unwrap();
    }
}
