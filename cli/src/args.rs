//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use tern_catalog::{
    AppName, GoDuration, Hostname, MachineId, OrgSlug, PeerName, PortRanges, SecretName,
    SnapshotId, VolumeId, VolumeName,
};
use tern_host::{AllowedPrefix, SnapshotCache};

use crate::serve::Ticket;

/// Run apps on your own servers: KVM Machines behind HTTPS, asleep while nobody calls.
///
/// Describe an app in a `fly.toml` beside its Dockerfile, run `tern launch` once and `tern deploy`
/// after each change. `tern serve` turns a Linux server into a host for them.
#[derive(Debug, Parser)]
#[command(name = "tern", version, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every user command takes.
#[derive(Debug, Clone, ClapArgs)]
pub struct Global {
    /// Where the API is. Default: what `tern auth login` saved, else http://127.0.0.1:4280.
    #[arg(long, env = "TERN_API_URL", global = true)]
    pub api_url: Option<String>,
    /// The token to speak with. Default: what `tern auth login` saved, else this server's own
    /// admin token, where it may be read.
    #[arg(long, env = "TERN_API_TOKEN", global = true, hide_env_values = true)]
    pub token: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make this machine a host: run the agent, edge, mesh, DNS, certificates and API
    Serve(Box<Serve>),
    /// Tell whether this host is safe and able to run Machines, and what to do where it is not
    Doctor(Doctor),
    /// Look after the disks of this host, with or without `tern serve`
    #[command(subcommand)]
    Host(Host),
    /// The servers of this cloud: see them, keep new Machines off them, take them out
    #[command(subcommand)]
    Hosts(Hosts),
    /// Look after where this cloud's facts are kept, while no `tern serve` runs
    #[command(subcommand)]
    Catalog(Catalog),
    /// Save where the API is and the token to speak with
    #[command(subcommand)]
    Auth(Auth),
    /// Make a new app from the directory's Dockerfile and fly.toml, and deploy it
    Launch(Launch),
    /// Build the app's image, put it on Machines and wait until they are healthy
    Deploy(Deploy),
    /// Show what was deployed of an app, by whom, and what came of it
    Releases(AppArg),
    /// Deploy what an earlier release was, as a new release
    Rollback(Rollback),
    /// An app's secrets: its Machines get them as environment, and nobody sees them again
    #[command(subcommand)]
    Secrets(Secrets),
    /// How many Machines an app has, and of what size
    #[command(subcommand)]
    Scale(Scale),
    /// Show an app and its Machines
    Status(AppArg),
    /// Show what an app's Machines print
    Logs(Logs),
    /// List, create and destroy apps
    #[command(subcommand)]
    Apps(Apps),
    /// Look at and drive single Machines
    #[command(subcommand, visible_alias = "machines")]
    Machine(Machine),
    /// Disks that outlive Machines: list, make, grow, copy and destroy them
    #[command(subcommand, visible_alias = "volume")]
    Volumes(Volumes),
    /// Join the private network with any WireGuard client
    #[command(subcommand)]
    Wireguard(Wireguard),
    /// The certificates of an app's host names
    #[command(subcommand)]
    Certs(Certs),
    /// Organizations: whoever shares one shares a private network
    #[command(subcommand)]
    Orgs(Orgs),
    /// Tokens for the API
    #[command(subcommand)]
    Tokens(Tokens),
    /// Look at a `fly.toml`
    #[command(subcommand)]
    Config(Config),
    /// Print what has a shell complete this program's commands and flags
    ///
    /// For bash: `tern completion bash > ~/.local/share/bash-completion/completions/tern`. An installed Tern has brought them.
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual's pages into a directory
    #[command(hide = true)]
    ManPages {
        /// Where to
        directory: PathBuf,
    },
}

/// `tern doctor`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Doctor {
    #[command(flatten)]
    pub at: DataDir,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `tern host`.
#[derive(Debug, Clone, Subcommand)]
pub enum Host {
    /// Machines on this host's disk that its catalog does not know
    #[command(subcommand)]
    Quarantine(Quarantine),
}

/// `tern hosts`.
#[derive(Debug, Clone, Subcommand)]
pub enum Hosts {
    /// List servers: whether they are there, and what they have
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a server and what is on it
    Show {
        /// Its number, from `tern hosts list`
        id: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what lets one more server into this cloud: a command line that is good once, and for a while
    Invite {
        /// The region of the new server. Default: this one's
        #[arg(long)]
        region: Option<String>,
        /// How long it is good, a day at most
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: Duration,
    },
    /// Put no new Machines on a server; those that are there go on
    Cordon {
        /// Its number
        id: u32,
    },
    /// Put new Machines on a server again
    Uncordon {
        /// Its number
        id: u32,
    },
    /// Forget a server that is cordoned, stopped and empty; its number is not used again
    Remove {
        /// Its number
        id: u32,
    },
}

/// `tern catalog`.
#[derive(Debug, Clone, Subcommand)]
pub enum Catalog {
    /// Move all records into another store, which must be empty, and read them back
    ///
    /// Stop every `tern serve` first, and back up the data directory. The source keeps its records, marked so that no
    /// `tern serve` goes on with them; start it on the target from then on.
    Move {
        /// Where the catalog is
        #[arg(long, value_enum)]
        from: StoreKind,
        /// Where it is to be
        #[arg(long, value_enum)]
        to: StoreKind,
        #[command(flatten)]
        at: DataDir,
        #[command(flatten)]
        etcd: Etcd,
    },
}

/// What a catalog can be kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoreKind {
    /// The file `catalog.db` in the data directory
    Sqlite,
    /// The etcd cluster that --etcd names
    Etcd,
}

/// Where etcd is, and how to be let in.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Etcd {
    /// Keep the catalog in this etcd cluster (3.4 or later) instead of a file: its members, as in
    /// https://a:2379,https://b:2379, tried in this order
    #[arg(
        id = "etcd",
        long = "etcd",
        env = "TERN_ETCD",
        value_name = "URLS",
        value_delimiter = ','
    )]
    pub members: Vec<String>,
    /// The authority that signed the certificates of etcd's members (PEM)
    #[arg(
        id = "etcd_ca",
        long = "etcd-ca",
        env = "TERN_ETCD_CA",
        value_name = "FILE",
        requires = "etcd"
    )]
    pub ca: Option<PathBuf>,
    /// The certificate that etcd knows this host by (PEM)
    #[arg(
        id = "etcd_cert",
        long = "etcd-cert",
        env = "TERN_ETCD_CERT",
        value_name = "FILE",
        requires = "etcd_key"
    )]
    pub cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(
        id = "etcd_key",
        long = "etcd-key",
        env = "TERN_ETCD_KEY",
        value_name = "FILE",
        requires = "etcd_cert"
    )]
    pub key: Option<PathBuf>,
    /// The user to log in to etcd as
    #[arg(
        id = "etcd_user",
        long = "etcd-user",
        env = "TERN_ETCD_USER",
        value_name = "NAME",
        requires = "etcd_password_file"
    )]
    pub user: Option<String>,
    /// The file with that user's password
    #[arg(
        id = "etcd_password_file",
        long = "etcd-password-file",
        env = "TERN_ETCD_PASSWORD_FILE",
        value_name = "FILE",
        requires = "etcd_user"
    )]
    pub password_file: Option<PathBuf>,
}

/// `tern host quarantine`.
#[derive(Debug, Clone, Subcommand)]
pub enum Quarantine {
    /// List them
    List {
        #[command(flatten)]
        at: DataDir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove some for good: their disks, and their memory
    Purge {
        #[command(flatten)]
        at: DataDir,
        /// Which
        #[arg(required = true, value_name = "ID")]
        ids: Vec<MachineId>,
    },
}

/// The file with what is given neither as a flag nor in the environment (see [`crate::config`]).
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct ConfigFile {
    /// The server's configuration: what is given neither here nor in the environment is read from it. Default:
    /// /etc/tern/tern.toml, if there is one
    #[arg(
        id = "config_file",
        long = "config",
        env = "TERN_CONFIG",
        value_name = "FILE"
    )]
    pub path: Option<PathBuf>,
}

/// The data directory of a host.
#[derive(Debug, Clone, ClapArgs)]
pub struct DataDir {
    #[command(flatten)]
    pub config: ConfigFile,
    /// What `tern serve` was given as --data-dir
    #[arg(long, env = "TERN_DATA_DIR", default_value = "/var/lib/tern")]
    pub data_dir: PathBuf,
}

/// An address, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsAddress(pub Option<SocketAddr>);

impl std::str::FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let address = text.parse().map(|address| Self(Some(address)));
        address
            .map_err(|_| "write an address and a port, as in 127.0.0.1:9464, or `none`".to_owned())
    }
}

fn fraction(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n| (0.0..=1.0).contains(n));
    number.ok_or_else(|| "write a number from 0 to 1".to_owned())
}

/// `tern serve`. Each flag is a key of the configuration file too, by its id.
#[derive(Debug, Clone, ClapArgs)]
pub struct Serve {
    #[command(flatten)]
    pub config: ConfigFile,
    /// Print a configuration file with every key, its default and what it does, and do nothing else
    #[arg(long)]
    pub print_config: bool,
    /// Say whether flags and configuration file are right, and do nothing else
    #[arg(long, conflicts_with = "print_config")]
    pub check_config: bool,
    /// Where everything is kept
    #[arg(long, env = "TERN_DATA_DIR", default_value = "/var/lib/tern")]
    pub data_dir: PathBuf,
    #[command(flatten)]
    pub etcd: Etcd,
    /// Join the cloud of another server, by what `tern hosts invite` printed there: etcd, keys and region come from it.
    /// Good once; a data directory that has joined needs it no more, and leaves it aside
    #[arg(
        long,
        env = "TERN_JOIN",
        hide_env_values = true,
        value_name = "INVITE",
        conflicts_with = "etcd"
    )]
    pub join: Option<Ticket>,
    /// Where servers that join are let in, while there is an invite that may be used
    #[arg(long, default_value = "[::]:4281", value_name = "ADDRESS")]
    pub join_listen: SocketAddr,
    /// This host's region. Default: what its invite said, else `local`
    #[arg(long, env = "TERN_REGION")]
    pub region: Option<String>,
    /// Apps get the host name APP.DOMAIN; point *.DOMAIN at this server
    #[arg(long, env = "TERN_DOMAIN")]
    pub domain: Option<String>,
    /// Where the API listens
    #[arg(long, default_value = "127.0.0.1:4280")]
    pub api: SocketAddr,
    /// Where HTTP is served; give it several times for several addresses
    #[arg(long, default_value = "[::]:80")]
    pub http: Vec<SocketAddr>,
    /// Where HTTPS is served; give it several times for several addresses
    #[arg(long, default_value = "[::]:443")]
    pub https: Vec<SocketAddr>,
    /// Public ports that services may have beside 80 and 443, at the same addresses: `25,465,1024-65535`, or `none`.
    /// They are open while an app names them
    #[arg(long, default_value_t, value_name = "RANGES")]
    pub service_ports: PortRanges,
    /// Connections that the edge takes at once; fewer where the limit of descriptors allows no more. When there are so
    /// many, those that have been idle the longest end
    #[arg(long, default_value_t = 32_768, value_name = "NUMBER")]
    pub max_connections: usize,
    /// The same of one client (an IPv4 address, or a /64 of IPv6). Behind a proxy or CDN all its users are one
    #[arg(long, default_value_t = 4096, value_name = "NUMBER")]
    pub max_client_connections: usize,
    /// Where Prometheus finds what this server counts (`/metrics`, documented in docs/metrics.md); `none` serves it nowhere.
    /// Who can reach it may read it: keep it private
    #[arg(long, default_value = "127.0.0.1:9464", value_name = "ADDRESS")]
    pub metrics: MetricsAddress,
    /// Write a line of JSON for each request to this file, or to `stdout` (fields: docs/edge.md). The file may be moved
    /// away at any time, by logrotate say
    #[arg(long, value_name = "PATH")]
    pub access_log: Option<String>,
    /// The part of all requests that the access log has, from 0 to 1
    #[arg(long, default_value_t = 1.0, value_parser = fraction, requires = "access_log")]
    pub access_log_sample: f64,
    /// Serve no HTTP/3. It takes the same ports of UDP as HTTPS takes of TCP
    #[arg(long)]
    pub no_http3: bool,
    /// Do not wake a suspended Machine when a client's TLS handshake names its app, but only when its request comes
    #[arg(long)]
    pub no_early_wake: bool,
    /// Where WireGuard listens (UDP)
    #[arg(long, default_value = "[::]:51820")]
    pub wireguard: SocketAddr,
    /// The address that WireGuard clients are told to connect to. Default: found by route
    #[arg(long)]
    pub wireguard_endpoint: Option<SocketAddr>,
    /// Resolvers for names other than .internal. Default: those of /etc/resolv.conf
    #[arg(long)]
    pub upstream_dns: Vec<SocketAddr>,
    /// The ACME directory that certificates come from
    #[arg(
        long,
        env = "TERN_ACME_DIRECTORY",
        default_value = "https://acme-v02.api.letsencrypt.org/directory"
    )]
    pub acme_directory: String,
    /// A root certificate (PEM) to trust for the ACME directory, instead of the system's
    #[arg(long)]
    pub acme_root_ca: Option<PathBuf>,
    /// Mail address for the ACME account
    #[arg(long)]
    pub acme_contact: Option<String>,
    /// Idle time after which a Machine is stopped or suspended, where its fly.toml says so
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub autostop_after: Duration,
    /// Longest wait of a request for its Machine to wake
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub wake_timeout: Duration,
    /// Bytes of images and their layers to keep on this host, as in 20GiB; what Machines use stays in any
    /// case. Default: a quarter of the file system
    #[arg(long, value_parser = bytes)]
    pub image_budget: Option<u64>,
    /// Bytes that a Machine may read and write in a second at each of its disks, as in 100MiB. As many may all
    /// of its monitor read from this host's disk, and write to it (suspends and wakes too): that applies from its
    /// next start, and the disks' own limit from its next cold start. Default: no limit
    #[arg(long, value_name = "BYTES", value_parser = rate_of_bytes)]
    pub machine_disk_bandwidth: Option<u64>,
    /// Reads and writes that a Machine may make in a second at each of its disks, and its monitor at this
    /// host's. Applies from the Machine's next cold start. Default: no limit
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub machine_disk_iops: Option<u64>,
    /// Bytes that a Machine may receive in a second, and as many that it may send, as in 50MiB. Applies from
    /// the Machine's next cold start. Default: no limit
    #[arg(long, value_name = "BYTES", value_parser = rate_of_bytes)]
    pub machine_net_bandwidth: Option<u64>,
    /// Memory of Machines that run here, as a multiple of what this host has for them
    ///
    /// A start or a wake that does not fit is refused. Machines that sleep take none. With more than 1 the host counts on
    /// Machines that do not use all of theirs; where they all do, the kernel kills some.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    pub memory_overcommit: f64,
    /// The same for processors, of which a shared one counts as a sixteenth. Where all are busy, each Machine has its share
    #[arg(long, value_name = "FACTOR", default_value_t = 4.0, value_parser = factor)]
    pub cpu_overcommit: f64,
    /// Have this host's kernel move the frames of Machines (vhost-net) rather than a thread of each monitor
    ///
    /// Less of the host's processors per frame, and sooner at the guest. Applies from a Machine's next cold
    /// start, and then as long as it sleeps and wakes: keep the module vhost_net loaded. The kernel keeps no
    /// limit, and the monitor does not count what it moves.
    // The rule is the agent's (`tern_host::HostConfig::check`); here it is told before anything is opened.
    #[arg(long, conflicts_with = "machine_net_bandwidth")]
    pub machine_vhost_net: bool,
    /// An IPv4 prefix or address that Machines may reach although it is private or special; give it several times for several
    ///
    /// Machines reach the public Internet. Private networks (10/8, 172.16/12, 192.168/16, 100.64/10), link-local addresses with
    /// a cloud's credentials and whatever else RFC 6890 calls special are refused to them unless they are allowed here. This
    /// host's own addresses stay closed in any case but for the ports of --http and --https.
    #[arg(long, value_name = "PREFIX")]
    pub machine_allow: Vec<AllowedPrefix>,
    /// Whether the memory of a suspended Machine stays in this host's page cache: keep (wakes read nothing from
    /// the disk), drop (it is free for others), or auto (dropped while less than a tenth of the host's
    /// memory is available)
    #[arg(
        long,
        value_name = "POLICY",
        default_value = "auto",
        value_parser = PossibleValuesParser::new(SnapshotCache::NAMES).try_map(|name| name.parse::<SnapshotCache>())
    )]
    pub snapshot_cache: SnapshotCache,
    /// Let users' image references lead to addresses that are not on the public Internet
    #[arg(long)]
    pub private_registries: bool,
    /// What Machines see of this host's processors, from their next cold start on
    ///
    /// With a template a suspended Machine can be resumed on any host of the same maker that has all of
    /// it; what Machines could use beyond is hidden from them. A host that lacks some of it is refused.
    #[arg(long, env = "TERN_CPU_TEMPLATE", value_enum, default_value_t)]
    pub cpu_template: CpuTemplate,
    /// The guests' kernel (uncompressed ELF or bzImage). Default: `guest/vmlinux` in ../lib/tern of this program, or beside it
    #[arg(long, env = "TERN_GUEST_KERNEL")]
    pub kernel: Option<PathBuf>,
    /// The guests' initramfs. Default: `guest/initramfs.cpio` in ../lib/tern of this program, or beside it
    #[arg(long, env = "TERN_GUEST_INITRAMFS")]
    pub initramfs: Option<PathBuf>,
    /// The monitor. Default: `tern-vmm` in ../lib/tern of this program, or beside it
    #[arg(long, env = "TERN_VMM")]
    pub vmm: Option<PathBuf>,
    /// Write the log as JSON
    #[arg(long)]
    pub log_json: bool,
}

/// What Machines see of a processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum CpuTemplate {
    /// All that it has
    #[default]
    Host,
    /// SSE4.2 and what came before: Intel since Nehalem, AMD since Jaguar
    #[value(name = "x86-64-v2")]
    X86_64V2,
    /// AVX2, FMA, BMI2, AES too: Intel since Haswell, AMD since Excavator
    #[value(name = "x86-64-v3")]
    X86_64V3,
}

#[derive(Debug, Subcommand)]
pub enum Auth {
    /// Save the API's address and a token, for this user
    Login,
    /// Show which API is spoken to, and whether the token is good
    Whoami,
}

/// Which app.
#[derive(Debug, Clone, ClapArgs)]
pub struct AppArg {
    /// The app. Default: the one fly.toml names
    #[arg(short, long, env = "FLY_APP")]
    pub app: Option<AppName>,
    /// The fly.toml, or the directory it is in
    #[arg(short, long, default_value = "fly.toml")]
    pub config: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `tern deploy`.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Deploy {
    /// Directory with the Dockerfile and fly.toml
    #[arg(default_value = ".")]
    pub directory: PathBuf,
    /// The app. Default: the one fly.toml names
    #[arg(short, long, env = "FLY_APP")]
    pub app: Option<AppName>,
    /// The fly.toml. Default: the one in the directory
    #[arg(short, long)]
    pub config: Option<PathBuf>,
    /// Deploy this image instead of building one: a reference, or `oci:DIRECTORY[:TAG]`
    #[arg(short, long)]
    pub image: Option<String>,
    /// Longest wait for a Machine to become healthy [default: 5m, or fly.toml's]
    #[arg(long, value_parser = duration)]
    pub wait_timeout: Option<Duration>,
    /// Do not ask for Machines that run: only replace their configuration at the next start
    #[arg(long)]
    pub detach: bool,
    /// Print what would be done to the app's Machines, and do nothing
    #[arg(long)]
    pub plan: bool,
    /// Print JSON at the end
    #[arg(long)]
    pub json: bool,
}

/// `tern rollback`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Rollback {
    /// The release's number. Default: the last that went well before the one that serves now
    #[arg(value_parser = release_number)]
    pub version: Option<u64>,
    /// Longest wait for a Machine to become healthy [default: 5m]
    #[arg(long, value_parser = duration)]
    pub wait_timeout: Option<Duration>,
    #[command(flatten)]
    pub app: AppArg,
}

/// `tern secrets`.
#[derive(Debug, Clone, Subcommand)]
pub enum Secrets {
    /// Set secrets, and give them to the app's Machines
    Set {
        /// What to set
        #[arg(required = true, value_name = "NAME=VALUE")]
        pairs: Vec<String>,
        /// Give them to Machines only at their next start
        #[arg(long)]
        stage: bool,
        /// Do not wait until Machines are healthy
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        app: AppArg,
    },
    /// Set secrets from standard input: NAME=VALUE lines, longer values between \"\"\"
    Import {
        /// Give them to Machines only at their next start
        #[arg(long)]
        stage: bool,
        /// Do not wait until Machines are healthy
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        app: AppArg,
    },
    /// List secrets: names and digests
    List(AppArg),
    /// Take secrets away
    Unset {
        /// Which
        #[arg(required = true)]
        names: Vec<SecretName>,
        /// Take them from Machines only at their next start
        #[arg(long)]
        stage: bool,
        /// Do not wait until Machines are healthy
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        app: AppArg,
    },
    /// Give the secrets that are staged to the app's Machines
    Deploy {
        /// Do not wait until Machines are healthy
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        app: AppArg,
    },
}

/// `tern scale`.
#[derive(Debug, Clone, Subcommand)]
pub enum Scale {
    /// Show how many Machines there are, and of what size
    Show(AppArg),
    /// Make or destroy Machines until there are so many
    Count {
        /// How many: 3, or of a process group, worker=3
        #[arg(required = true, value_name = "[GROUP=]COUNT")]
        counts: Vec<String>,
        #[command(flatten)]
        app: AppArg,
    },
    /// Give Machines another size
    Vm {
        /// As shared-cpu-2x
        size: String,
        /// Memory in MB. Default: the size's own
        #[arg(long, visible_alias = "vm-memory")]
        memory: Option<u32>,
        /// Only Machines of this process group
        #[arg(short = 'g', long = "process-group")]
        group: Option<String>,
        #[command(flatten)]
        app: AppArg,
    },
    /// Give Machines other memory
    Memory {
        /// In MB
        memory: u32,
        /// Only Machines of this process group
        #[arg(short = 'g', long = "process-group")]
        group: Option<String>,
        #[command(flatten)]
        app: AppArg,
    },
}

/// `tern launch`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Launch {
    #[command(flatten)]
    pub deploy: Deploy,
    /// The organization that will own the app
    #[arg(short, long, default_value = "personal")]
    pub org: OrgSlug,
    /// Port the app listens on, for a new fly.toml. Default: the one that the image exposes, else 8080
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub internal_port: Option<u16>,
    /// Write fly.toml and make the app, but do not deploy
    #[arg(long)]
    pub no_deploy: bool,
}

/// `tern logs`.
#[derive(Debug, Clone, ClapArgs)]
pub struct Logs {
    #[command(flatten)]
    pub app: AppArg,
    /// Go on as new lines come
    #[arg(short, long)]
    pub follow: bool,
    /// Only this Machine
    #[arg(long)]
    pub machine: Option<MachineId>,
}

#[derive(Debug, Subcommand)]
pub enum Apps {
    /// List apps
    List {
        /// Only this organization's
        #[arg(short, long)]
        org: Option<OrgSlug>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make an app without Machines
    Create {
        /// Its name
        name: AppName,
        /// Its organization
        #[arg(short, long, default_value = "personal")]
        org: OrgSlug,
    },
    /// Destroy an app and all its Machines
    Destroy {
        /// Its name
        name: AppName,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// Which Machine of which app.
#[derive(Debug, Clone, ClapArgs)]
pub struct MachineArg {
    /// The Machine
    pub id: MachineId,
    /// Its app. Default: the one fly.toml names, else found by the Machine
    #[arg(short, long, env = "FLY_APP")]
    pub app: Option<AppName>,
}

#[derive(Debug, Subcommand)]
pub enum Machine {
    /// List an app's Machines
    List(AppArg),
    /// Show one Machine, its checks and events
    Status {
        #[command(flatten)]
        machine: MachineArg,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where the time of a Machine's last start went, phase by phase
    BootTrace {
        #[command(flatten)]
        machine: MachineArg,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Start a Machine and wait until it runs
    Start(MachineArg),
    /// Stop a Machine and wait until it has
    Stop(MachineArg),
    /// Stop and start a Machine
    Restart(MachineArg),
    /// Write a Machine's memory to disk and free it
    Suspend(MachineArg),
    /// Destroy a Machine and its disk
    Destroy {
        #[command(flatten)]
        machine: MachineArg,
        /// Even when it is running
        #[arg(short, long)]
        force: bool,
    },
    /// Run a command in a Machine: its output comes byte for byte, its exit code is this one's
    Exec {
        #[command(flatten)]
        machine: MachineArg,
        /// Give it what this command reads, until that ends
        #[arg(short = 'i', long)]
        stdin: bool,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
        /// Longest time it may take [default: a day]
        #[arg(long, value_parser = duration)]
        timeout: Option<Duration>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Wireguard {
    /// Add a peer and print its configuration, for `wg-quick` and other clients
    ///
    /// The private key is made here and never leaves this machine but in that output.
    Create {
        /// Its name
        name: PeerName,
        /// The organization whose network it joins
        #[arg(short, long, default_value = "personal")]
        org: OrgSlug,
        /// Write the configuration to this file (mode 0600) instead of printing it
        #[arg(short, long)]
        file: Option<PathBuf>,
    },
    /// List peers
    List {
        /// The organization
        #[arg(short, long, default_value = "personal")]
        org: OrgSlug,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a peer
    Remove {
        /// Its name
        name: PeerName,
        /// The organization
        #[arg(short, long, default_value = "personal")]
        org: OrgSlug,
    },
}

#[derive(Debug, Subcommand)]
pub enum Volumes {
    /// List an app's volumes
    List(AppArg),
    /// Make a volume; `tern deploy` makes those that fly.toml names by itself
    Create {
        /// Its name, as `source` in fly.toml
        name: VolumeName,
        /// Its size in GB
        #[arg(short, long, default_value_t = 1)]
        size: u32,
        /// Its region. Default: the server's
        #[arg(short, long)]
        region: Option<String>,
        /// Restore this snapshot into it
        #[arg(long)]
        snapshot: Option<SnapshotId>,
        #[command(flatten)]
        app: AppArg,
    },
    /// Make a volume larger; a Machine sees it at its next cold start
    Extend {
        /// The volume
        id: VolumeId,
        /// Its new size in GB
        #[arg(short, long)]
        size: u32,
        #[command(flatten)]
        app: AppArg,
    },
    /// Make a new volume with the data of another, whose Machine must not be running
    Fork {
        /// The volume to copy
        id: VolumeId,
        /// The new one's name. Default: the same
        #[arg(short, long)]
        name: Option<VolumeName>,
        #[command(flatten)]
        app: AppArg,
    },
    /// Destroy a volume, its data and its snapshots
    Destroy {
        /// The volume
        id: VolumeId,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
        #[command(flatten)]
        app: AppArg,
    },
    /// What a volume held at some time
    #[command(subcommand)]
    Snapshots(Snapshots),
}

#[derive(Debug, Subcommand)]
pub enum Snapshots {
    /// List a volume's snapshots
    List {
        /// The volume
        id: VolumeId,
        #[command(flatten)]
        app: AppArg,
    },
    /// Make a snapshot of a volume, whose Machine must not be running
    Create {
        /// The volume
        id: VolumeId,
        #[command(flatten)]
        app: AppArg,
    },
    /// Remove a snapshot
    Destroy {
        /// The volume
        id: VolumeId,
        /// The snapshot
        snapshot: SnapshotId,
        #[command(flatten)]
        app: AppArg,
    },
}

#[derive(Debug, Subcommand)]
pub enum Certs {
    /// List an app's host names and their certificates
    List(AppArg),
    /// Show where the certificate of one host name stands: until when it is valid, what is waited for, when it is tried next
    Show {
        /// The host name
        #[arg(value_parser = Hostname::typed)]
        hostname: Hostname,
        #[command(flatten)]
        app: AppArg,
    },
    /// Serve the app under another host name too
    Add {
        /// The host name; it must point at this server
        #[arg(value_parser = Hostname::typed)]
        hostname: Hostname,
        #[command(flatten)]
        app: AppArg,
    },
    /// Stop serving a host name
    Remove {
        /// The host name
        #[arg(value_parser = Hostname::typed)]
        hostname: Hostname,
        /// Also where it is the name that the app has from its creation; `tern certs add` brings that back
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        app: AppArg,
    },
}

#[derive(Debug, Subcommand)]
pub enum Orgs {
    /// List organizations
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make an organization, with a private network of its own
    Create {
        /// Its slug
        slug: OrgSlug,
    },
}

#[derive(Debug, Subcommand)]
pub enum Tokens {
    /// Make a token and print it; it is shown only once
    Create(CreateToken),
    /// List tokens: what each may do, until when, and its last characters
    List {
        /// Of this organization only
        #[arg(short, long)]
        org: Option<OrgSlug>,
        /// Print JSON
        #[arg(short, long)]
        json: bool,
    },
    /// Take tokens back, with all that were made with them
    Revoke {
        /// Their ids, from `tern tokens list`
        #[arg(required = true)]
        ids: Vec<String>,
        /// Leave those that were made with them good
        #[arg(long)]
        keep_made: bool,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// `tern tokens create`.
#[derive(Debug, Clone, ClapArgs)]
pub struct CreateToken {
    /// What it may do
    #[arg(value_enum, required_unless_present = "scope")]
    pub kind: Option<TokenScope>,
    /// The same, as an option
    #[arg(short, long, value_enum, conflicts_with = "kind")]
    pub scope: Option<TokenScope>,
    /// Its name, to know it by later
    #[arg(short, long)]
    pub name: Option<String>,
    /// The apps that it is for (deploy, machine-exec). Default: the one fly.toml names
    #[arg(short, long, env = "FLY_APP", value_delimiter = ',')]
    pub app: Vec<AppName>,
    /// The fly.toml, or the directory it is in
    #[arg(short, long, default_value = "fly.toml")]
    pub config: PathBuf,
    /// The organization that it is for (org, readonly). Default: the only one there is
    #[arg(short, long)]
    pub org: Option<OrgSlug>,
    /// How long it is good, as in 720h. Default: for ever
    #[arg(short = 'x', long, value_parser = duration)]
    pub expiry: Option<Duration>,
    /// Print JSON
    #[arg(short, long)]
    pub json: bool,
}

/// What a token may do. Named as flyctl's `tokens create` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokenScope {
    /// Deploy some apps
    Deploy,
    /// Everything in an organization
    #[value(alias = "full")]
    Org,
    /// See everything in an organization
    #[value(alias = "read")]
    Readonly,
    /// Run commands in the Machines of some apps
    #[value(alias = "machine_exec")]
    MachineExec,
    /// Everything there is
    Admin,
}

#[derive(Debug, Subcommand)]
pub enum Config {
    /// Say whether a fly.toml is right, and what in it is not acted on yet
    Validate(AppArg),
}

/// `12`, or `v12` as it is shown.
fn release_number(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix('v').unwrap_or(text);
    digits
        .parse()
        .map_err(|_| "a release is a number, as in `tern releases`".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    GoDuration::parse(text).map(|d| d.0)
}

/// A number of bytes, with or without a binary unit.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err("a size is a number and B, KiB, MiB, GiB or TiB, as in 20GiB".to_owned()),
    };
    let number: u64 = number.parse().map_err(|e| format!("{e}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than there is".to_owned())
}

/// A multiple of what there is.
fn factor(text: &str) -> Result<f64, String> {
    let factor: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match factor.is_finite() && factor > 0.0 {
        true => Ok(factor),
        false => Err("must be more than 0".to_owned()),
    }
}

/// A number of bytes in a second.
fn rate_of_bytes(text: &str) -> Result<u64, String> {
    match bytes(text)? {
        0 => Err(
            "a rate of 0 would stop every Machine; leave the option out for no limit".to_owned(),
        ),
        rate => Ok(rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(bytes("20GiB"), Ok(20 << 30));
        assert_eq!(bytes("4096"), Ok(4096));
        for bad in ["", "GiB", "20GB", "-1", "99999999999TiB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_more_than_nothing() {
        let serve = |options: &[&str]| {
            let words = ["tern", "serve"].iter().chain(options);
            match Args::try_parse_from(words)?.command {
                Command::Serve(serve) => Ok::<_, clap::Error>(serve),
                _ => panic!("not serve"),
            }
        };
        let unlimited = serve(&[]).unwrap();
        assert_eq!(unlimited.machine_disk_bandwidth, None);
        let limited = serve(&[
            "--machine-disk-bandwidth=100MiB",
            "--machine-disk-iops=500",
            "--machine-net-bandwidth=50MiB",
        ]);
        let limited = limited.unwrap();
        assert_eq!(limited.machine_disk_bandwidth, Some(100 << 20));
        assert_eq!(limited.machine_disk_iops, Some(500));
        assert_eq!(limited.machine_net_bandwidth, Some(50 << 20));
        for bad in [
            "--machine-disk-bandwidth=0",
            "--machine-disk-iops=0",
            "--machine-net-bandwidth=0MiB",
            "--machine-net-bandwidth=fast",
        ] {
            assert!(serve(&[bad]).is_err(), "{bad}");
        }
        let allowed = serve(&["--machine-allow=10.1.0.0/16", "--machine-allow=192.168.1.5"]);
        assert_eq!(allowed.unwrap().machine_allow.len(), 2);
        let refused = serve(&["--machine-allow=172.19.0.0/24"]).unwrap_err();
        assert!(refused.to_string().contains("never outside"), "{refused}");
        assert!(!limited.machine_vhost_net);
        assert!(serve(&["--machine-vhost-net"]).unwrap().machine_vhost_net);
        let both = serve(&["--machine-vhost-net", "--machine-net-bandwidth=50MiB"]);
        let error = both.err().map(|error| error.to_string());
        assert!(
            error
                .as_ref()
                .is_some_and(|e| e.contains("cannot be used with")),
            "{error:?}"
        );
    }

    #[test]
    fn etcd_is_named_by_its_members_with_all_that_it_takes() {
        let serve = |options: &[&str]| {
            let words = ["tern", "serve"].iter().chain(options);
            match Args::try_parse_from(words)?.command {
                Command::Serve(serve) => Ok::<_, clap::Error>(serve.etcd),
                _ => panic!("not serve"),
            }
        };
        assert!(serve(&[]).unwrap().members.is_empty());
        let etcd = serve(&[
            "--etcd=https://a:2379,https://b:2379",
            "--etcd-ca=ca.pem",
            "--etcd-cert=c.pem",
            "--etcd-key=c.key",
            "--etcd-user=tern",
            "--etcd-password-file=password",
        ]);
        assert_eq!(etcd.unwrap().members, ["https://a:2379", "https://b:2379"]);
        for half in [
            &["--etcd-ca=ca.pem"][..],
            &["--etcd=https://a:2379", "--etcd-cert=c.pem"],
            &["--etcd=https://a:2379", "--etcd-user=tern"],
        ] {
            assert!(serve(half).is_err(), "{half:?}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    #[test]
    fn a_token_is_asked_for_as_flyctl_does_or_by_options() {
        let create = |options: &[&str]| {
            let words = ["tern", "tokens", "create"].iter().chain(options);
            match Args::try_parse_from(words)?.command {
                Command::Tokens(Tokens::Create(create)) => Ok::<_, clap::Error>(create),
                _ => panic!("not create"),
            }
        };
        let flyctl = create(&["deploy", "-a", "shop", "-x", "720h", "-n", "ci"]).unwrap();
        assert_eq!(flyctl.kind, Some(TokenScope::Deploy));
        assert_eq!(flyctl.expiry, Some(Duration::from_secs(720 * 3600)));
        let exec = create(&["--scope", "machine-exec", "--app", "shop,blog"]).unwrap();
        assert_eq!(exec.scope, Some(TokenScope::MachineExec));
        assert_eq!(exec.app.len(), 2);
        for bad in [
            &[][..],
            &["ci"],
            &["deploy", "--scope=org"],
            &["org", "--expiry=soon"],
        ] {
            assert!(create(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn exec_takes_options_of_its_command() {
        let args = [
            "tern",
            "machine",
            "exec",
            "0123456789abcd",
            "ls",
            "-l",
            "--all",
        ];
        let Command::Machine(Machine::Exec { command, .. }) = Args::parse_from(args).command else {
            panic!("not exec");
        };
        assert_eq!(command, ["ls", "-l", "--all"]);
    }
}
