//! Which addresses a registry may be at.
//!
//! An image reference is text that a user gives, and the host connects to where it points. So unless the
//! operator allows it, a reference (or a redirect, or a token service that a registry names) must not
//! make the host speak to itself, to its neighbours, or to the platform's private network
//! (`fdaa::/16`). Names are judged by the addresses that are then connected to, so a name that
//! resolves differently the second time gains nothing.
//!
//! Special blocks: [IANA IPv4](https://www.iana.org/assignments/iana-ipv4-special-registry) and
//! [IANA IPv6](https://www.iana.org/assignments/iana-ipv6-special-registry) special-purpose registries.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::{io, vec};

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tower_service::Service;
use url::{Host, Url};

/// Resolves names, and keeps of their addresses those that may be visited.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    inner: GaiResolver,
    anywhere: bool,
}

impl Resolver {
    /// `anywhere` allows what is not on the public Internet too.
    pub(super) fn new(anywhere: bool) -> Self {
        Self {
            inner: GaiResolver::new(),
            anywhere,
        }
    }
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolving = self.inner.call(name);
        let anywhere = self.anywhere;
        Box::pin(async move {
            let found: Vec<SocketAddr> = resolving.await?.collect();
            let allowed: Vec<SocketAddr> = found
                .iter()
                .copied()
                .filter(|address| anywhere || is_public(address.ip()))
                .collect();
            if allowed.is_empty() && !found.is_empty() {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, REFUSAL));
            }
            Ok(allowed.into_iter())
        })
    }
}

/// What is said of an address that may not be visited.
pub(super) const REFUSAL: &str = "no address of it is on the public Internet";

/// Whether `url` does not name an address that may not be visited. Connectors do not ask a resolver
/// about addresses, so they are judged here.
pub(super) fn may_be_public(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => is_public(address.into()),
        Some(Host::Ipv6(address)) => is_public(address.into()),
        Some(Host::Domain(_)) => true,
        None => false,
    }
}

/// Whether an address is one of the public Internet's. In doubt it is not.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(a == 0 // this network
        || a == 10
        || a == 127
        || (a == 100 && b & 0xc0 == 64) // shared by carriers, RFC 6598
        || (a == 169 && b == 254) // link-local; clouds keep their metadata there
        || (a == 172 && b & 0xf0 == 16)
        || (a == 192 && b == 168)
        || (a == 192 && b == 0 && matches!(c, 0 | 2))
        || (a == 192 && b == 88 && c == 99) // the way to 6to4
        || (a == 198 && b & 0xfe == 18) // benchmarks
        || (a == 198 && b == 51 && c == 100)
        || (a == 203 && b == 0 && c == 113)
        || a >= 224) // multicast, reserved, broadcast
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    if let Some(mapped) = address.to_ipv4_mapped() {
        return is_public_v4(mapped);
    }
    let segments = address.segments();
    let v4 = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // NAT64 and 6to4 lead to the IPv4 address within.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        [0x2002, high, low, ..] => v4(high, low),
        // Protocols' own addresses (Teredo and others), documentation.
        [0x2001, second, ..] if second < 0x200 || second == 0xdb8 => false,
        [0x3fff, second, ..] if second < 0x1000 => false,
        // All global unicast there is; fc00::/7 (with fdaa::/16), fe80::/10 and ::1 are not in it.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_public_addresses_from_others() {
        for public in [
            "1.1.1.1",
            "172.32.0.1",
            "100.128.0.1",
            "192.0.1.1",
            "2606:4700::1111",
            "2001:4860::8888",
            "64:ff9b::808:808",
            "::ffff:8.8.8.8",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for other in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.0.3",
            "169.254.169.254",
            "172.16.0.1",
            "172.19.0.2",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fdaa:0:0:1::1",
            "fdaa::3",
            "ff02::1",
        ] {
            assert!(!is_public(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn sees_through_the_spellings_of_an_address() {
        for hidden in [
            "https://127.1/v2/",
            "https://0x7f000001/v2/",
            "https://2130706433/v2/",
            "https://0177.0.0.1/v2/",
            "https://[::ffff:7f00:1]/v2/",
        ] {
            assert!(!may_be_public(&Url::parse(hidden).unwrap()), "{hidden}");
        }
        assert!(may_be_public(&Url::parse("https://ghcr.io/v2/").unwrap()));
    }

    #[tokio::test]
    async fn a_name_is_judged_by_its_addresses() {
        let resolve = |anywhere| {
            let name: Name = "localhost".parse().unwrap();
            Resolver::new(anywhere).call(name)
        };
        let refused = resolve(false).await.map(|_| ()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(resolve(true).await.unwrap().len() > 0);
    }
}
