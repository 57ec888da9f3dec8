//! From a request's authority and port to an app's service. No I/O.

use tern_catalog::{AppName, Handler, Hostname, HttpOptions, Machine, Port, Service, Snapshot};

/// Where a request goes.
#[derive(Debug, Clone)]
pub struct Route {
    /// The app.
    pub app: AppName,
    /// The port its Machines listen on.
    pub internal_port: u16,
    /// Speak HTTP/2 without TLS to them.
    pub h2_backend: bool,
    /// Changes to responses.
    pub options: HttpOptions,
    /// Redirect to https.
    pub force_https: bool,
}

/// Why a request goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoRoute {
    /// No app answers to the name.
    UnknownHost,
    /// The app has no Machines.
    NoMachines(AppName),
    /// The app has no service on this port.
    NoService(AppName),
}

/// Whether a listener ends TLS; its public port follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    /// Plain HTTP, known to apps as port 80.
    Http,
    /// HTTPS, known to apps as port 443.
    Https,
}

impl Entrance {
    /// The port as apps name it, wherever the listener is bound.
    pub fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }

    /// `http` or `https`.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    fn serves(self, port: &Port) -> bool {
        let tls = port.handlers.contains(&Handler::Tls);
        let http = port.handlers.contains(&Handler::Http);
        port.port == self.port() && http && tls == (self == Self::Https)
    }
}

/// The host name of an authority (`host[:port]`), as the catalog writes it.
pub fn hostname(authority: &str) -> Option<Hostname> {
    // An address literal names no app.
    let host = if authority.starts_with('[') {
        return None;
    } else {
        authority
    };
    let host = match host.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        Some(_) => return None,
        None => host,
    };
    host.strip_suffix('.')
        .unwrap_or(host)
        .to_ascii_lowercase()
        .parse()
        .ok()
}

/// Finds the service of the app that answers to this name.
pub fn find(
    snapshot: &Snapshot,
    hostname: &Hostname,
    entrance: Entrance,
) -> Result<Route, NoRoute> {
    let app = &snapshot
        .hostnames
        .get(hostname)
        .ok_or(NoRoute::UnknownHost)?
        .app;
    let mut machines = snapshot
        .machines_of(app)
        .map(|(machine, _)| machine)
        .peekable();
    if machines.peek().is_none() {
        return Err(NoRoute::NoMachines(app.clone()));
    }
    let found = machines.find_map(|machine| service(machine, entrance));
    let (service, port) = found.ok_or_else(|| NoRoute::NoService(app.clone()))?;
    let options = port.http_options.clone().unwrap_or_default();
    Ok(Route {
        app: app.clone(),
        internal_port: service.internal_port,
        h2_backend: options.h2_backend,
        options,
        force_https: port.force_https && entrance == Entrance::Http,
    })
}

fn service(machine: &Machine, entrance: Entrance) -> Option<(&Service, &Port)> {
    machine.config.services.iter().find_map(|service| {
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
            "localhost",
            "ex\u{e4}mple.org",
            "a.b/c",
        ] {
            assert_eq!(name(bad), None, "{bad}");
        }
    }
}
