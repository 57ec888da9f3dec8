//! From a name and a port to an app's service. No I/O.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::ServerConfig;
use tern_catalog::{
    AppName, Exclusive, Hostname, Machine, Port, PortKind, ProxyProtocol, Revision, Service,
    ServiceProtocol, Snapshot,
};

use crate::entrance::Entrance;
use crate::headers::Changes;
use crate::metrics::{AppMetrics, Metrics};
use crate::tls;

/// What answers to a host name at an entrance: all that a request needs to know of its service, made once per
/// revision of the catalog.
#[derive(Debug)]
pub struct Site {
    /// The name, as the catalog writes it.
    pub hostname: Hostname,
    /// The app.
    pub app: AppName,
    /// The port its Machines listen on.
    pub internal_port: u16,
    /// Speak HTTP/2 without TLS to them.
    pub h2_backend: bool,
    /// Redirect to https.
    pub force_https: bool,
    /// Longest time in which nothing moves, in either direction.
    pub idle_timeout: Duration,
    /// Changes to replies.
    pub changes: Changes,
    /// What is counted of its app.
    pub metrics: Arc<AppMetrics>,
}

/// Why a request goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoSite {
    /// No app answers to the name.
    UnknownHost,
    /// The app has no Machines.
    NoMachines(AppName),
    /// The app has no service on this port.
    NoService(AppName),
}

/// Where the bytes of a connection go that is not HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The app.
    pub app: AppName,
    /// The port its Machines listen on.
    pub internal_port: u16,
    /// The header by which they are told who connected.
    pub proxy: Option<ProxyProtocol>,
}

/// What a TLS handshake's server name leads to at a port.
#[derive(Debug, Clone)]
pub struct Secure {
    /// How TLS is spoken.
    pub config: Arc<ServerConfig>,
    /// Where the bytes within go, and how the handshake may begin; `None` is HTTP.
    pub stream: Option<(Rc<Target>, PortKind)>,
    /// The app and its port that are likely to be asked for, HTTP's too.
    pub likely: Option<Rc<(AppName, u16)>>,
}

/// Names remembered, in all the ways that clients write them.
const REMEMBERED: usize = 4096;

/// The sites that one thread has been asked for.
#[derive(Debug)]
pub struct Sites {
    /// Where a service says nothing.
    idle_timeout: Duration,
    configs: Arc<tls::Configs>,
    metrics: Arc<Metrics>,
    revision: Revision,
    known: HashMap<(Entrance, Bytes), Rc<Site>>,
    secure: HashMap<(u16, String), Secure>,
}

impl Sites {
    pub fn new(idle_timeout: Duration, configs: Arc<tls::Configs>, metrics: Arc<Metrics>) -> Self {
        Self {
            idle_timeout,
            configs,
            metrics,
            revision: Revision::default(),
            known: HashMap::new(),
            secure: HashMap::new(),
        }
    }

    /// Forgets what may have changed.
    fn refresh(&mut self, snapshot: &Snapshot) {
        let remembered = self.known.len().max(self.secure.len());
        if self.revision != snapshot.revision || remembered >= REMEMBERED {
            self.known.clear();
            self.secure.clear();
            self.revision = snapshot.revision;
        }
    }

    /// How TLS is spoken with a client that asks for this name at this port, and where it leads.
    pub fn secure(&mut self, snapshot: &Snapshot, name: Option<&str>, port: u16) -> Secure {
        self.refresh(snapshot);
        let Some(name) = name else {
            return Secure::unknown(&self.configs);
        };
        let key = (port, name.to_owned());
        if let Some(known) = self.secure.get(&key) {
            return known.clone();
        }
        let found = secure(snapshot, name, port, &self.configs);
        self.secure.insert(key, found.clone());
        found
    }

    /// Finds the service of the app that answers to an authority.
    pub fn find(
        &mut self,
        snapshot: &Snapshot,
        authority: &Bytes,
        entrance: Entrance,
    ) -> Result<Rc<Site>, NoSite> {
        self.refresh(snapshot);
        // Cloning `Bytes` counts a reference.
        let key = (entrance, authority.clone());
        if let Some(site) = self.known.get(&key) {
            return Ok(Rc::clone(site));
        }
        let name = std::str::from_utf8(authority).ok().and_then(hostname);
        let name = name.ok_or(NoSite::UnknownHost)?;
        let site = Rc::new(find(
            snapshot,
            &name,
            entrance,
            self.idle_timeout,
            &self.metrics,
        )?);
        // A copy of its own: the request's buffer is not to be kept for it.
        let key = (entrance, Bytes::copy_from_slice(authority));
        self.known.insert(key, Rc::clone(&site));
        Ok(site)
    }
}

/// The host name of an authority (`host[:port]`), as the catalog writes it.
pub fn hostname(authority: &str) -> Option<Hostname> {
    // An address literal names no app.
    if authority.starts_with('[') {
        return None;
    }
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) => host,
        Some(_) => return None,
        None => authority,
    };
    host.strip_suffix('.')
        .unwrap_or(host)
        .to_ascii_lowercase()
        .parse()
        .ok()
}

fn find(
    snapshot: &Snapshot,
    hostname: &Hostname,
    entrance: Entrance,
    idle_timeout: Duration,
    metrics: &Metrics,
) -> Result<Site, NoSite> {
    let route = snapshot.hostnames.get(hostname);
    let app = &route.ok_or(NoSite::UnknownHost)?.app;
    let mut machines = snapshot
        .machines_of(app)
        .map(|(machine, _)| machine)
        .peekable();
    if machines.peek().is_none() {
        return Err(NoSite::NoMachines(app.clone()));
    }
    let found = machines.find_map(|machine| service(machine, entrance));
    let (service, port) = found.ok_or_else(|| NoSite::NoService(app.clone()))?;
    let options = port.http_options.as_ref();
    let seconds = options.and_then(|o| o.idle_timeout).filter(|s| *s > 0);
    Ok(Site {
        hostname: hostname.clone(),
        app: app.clone(),
        metrics: metrics.app(app),
        internal_port: service.internal_port,
        h2_backend: options.is_some_and(|o| o.h2_backend),
        force_https: port.force_https && !entrance.tls,
        idle_timeout: seconds.map_or(idle_timeout, |s| Duration::from_secs(s.into())),
        changes: Changes::new(options.and_then(|o| o.response.as_ref())),
    })
}

/// A name that cannot be read, or leads nowhere, is left to the certificates, and to the requests' own.
fn secure(snapshot: &Snapshot, name: &str, port: u16, configs: &tls::Configs) -> Secure {
    let found = hostname(name).and_then(|name| {
        let route = snapshot.hostnames.get(&name)?;
        let mut machines = snapshot.machines_of(&route.app);
        machines.find_map(|(machine, _)| {
            let tcp = |s: &&Service| s.protocol == ServiceProtocol::Tcp;
            let services = machine.config.services.iter().filter(tcp);
            let mut ports = services.flat_map(|s| s.ports.iter().map(move |p| (s, p)));
            ports.find_map(|(service, found)| {
                let kind = found.kind().filter(|k| k.is_tls())?;
                let options = found.tls_options.as_ref();
                let likely = Rc::new((route.app.clone(), service.internal_port));
                found.has(port).then(|| Secure {
                    likely: Some(likely),
                    config: configs.get(options, kind),
                    stream: (!kind.is_http()).then(|| {
                        let target = Target {
                            app: route.app.clone(),
                            internal_port: service.internal_port,
                            proxy: found.proxy_protocol(),
                        };
                        (Rc::new(target), kind)
                    }),
                })
            })
        })
    });
    found.unwrap_or_else(|| Secure::unknown(configs))
}

impl Secure {
    fn unknown(configs: &tls::Configs) -> Self {
        Self {
            config: configs.usual(),
            stream: None,
            likely: None,
        }
    }
}

impl From<&Exclusive> for Target {
    fn from(owner: &Exclusive) -> Self {
        Self {
            app: owner.app.clone(),
            internal_port: owner.internal_port,
            proxy: owner.proxy,
        }
    }
}

fn service(machine: &Machine, entrance: Entrance) -> Option<(&Service, &Port)> {
    let tcp = |service: &&Service| service.protocol == ServiceProtocol::Tcp;
    let mut services = machine.config.services.iter().filter(tcp);
    services.find_map(|service| {
        let port = service.ports.iter().find(|port| entrance.serves(port))?;
        Some((service, port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_become_names() {
        let name = |a: &str| hostname(a).map(String::from);
        assert_eq!(name("Hello.Example:8443").as_deref(), Some("hello.example"));
        assert_eq!(name("hello.example.").as_deref(), Some("hello.example"));
        for bad in [
            "",
            ":80",
            "[::1]:80",
            "a b.c",
            "x..y",
            "a.b:80x",
            "a.b:000080",
            "localhost",
            "ex\u{e4}mple.org",
            "a.b/c",
        ] {
            assert_eq!(name(bad), None, "{bad}");
        }
    }
}
