//! The shared nouns of Tern, the store they are kept in and the view they are read from.
//!
//! Roles meet here and nowhere else. Each fact has one writer (see `ARCHITECTURE.md`); every other
//! role learns of it through the [`View`], which a watch on the [`Store`] keeps current.

mod address;
mod catalog;
mod certificate;
mod duration;
mod etcd;
mod held_lease;
mod host;
mod hostname;
mod machine;
mod machine_config;
mod names;
mod nouns;
mod port;
mod public_ports;
mod record;
mod release;
mod resources;
mod secrets;
mod sqlite;
mod store;
mod supervise;
mod token;
pub mod transfer;
mod view;
mod volume;

pub use address::{HostId, INFRASTRUCTURE, MachineNumber, NetworkId, PrivateAddress, RESOLVER};
pub use catalog::{Catalog, CatalogError};
pub use certificate::{
    AcmeAccount, AcmeChallenge, AcmeUsage, Certificate, CertificateState, ChallengeKind,
    PendingOrder, SealedKey,
};
pub use duration::GoDuration;
pub use etcd::{EtcdConfig, EtcdStore};
pub use held_lease::HeldLease;
pub use host::{Cloud, Host, HostAlive, HostCordon, HostStatus};
pub use machine::{
    CheckState, CheckStatus, Desired, DesiredState, Machine, MachineEvent, MachineState,
    MachineStatus,
};
pub use machine_config::{
    Autostop, Check, CheckHeader, CheckKind, Concurrency, ConcurrencyKind, FileConfig, Guest,
    InitConfig, MachineConfig, Mount, Restart, RestartPolicy, Service, ServiceProtocol, StopConfig,
};
pub use names::{
    AppName, Hostname, MachineId, NameError, OrgSlug, PeerName, SecretName, SnapshotId, VolumeId,
    VolumeName,
};
pub use nouns::{App, HostnameRoute, Network, Organization, Peer};
pub use port::{
    Handler, HttpOptions, Port, PortKind, ProxyProtoOptions, ProxyProtocol, ResponseOptions,
    TlsOptions,
};
pub use public_ports::{Exclusive, MAX_PORTS_OF_APP, PortClaim, PortRanges, PublicPorts};
pub use record::Record;
pub use release::{Release, ReleaseStatus};
pub use resources::{Resources, SIXTEENTHS};
pub use secrets::{AppSecret, AppSecrets};
pub use sqlite::SqliteStore;
pub use store::{
    Change, Compare, Entry, LeaseId, Listing, Op, PROGRESS_EVERY, Revision, Store, StoreError,
    Transaction, Watch, WatchBatch, WatchEvent, limits,
};
pub use supervise::{keep_running, restarts};
pub use token::{Scope, Token, TokenApps};
pub use view::{Snapshot, Unreadable, View};
pub use volume::{SnapshotStatus, Volume, VolumeSource, VolumeState, VolumeStatus};
