//! The configuration of a stock WireGuard client, as `wg-quick(8)` and the apps read it.

use std::fmt;
use std::net::Ipv6Addr;

use tern_catalog::NetworkId;

use crate::{MTU, PrivateKey, PublicKey};

/// What a client needs to join a network. Its `Display` is the file.
///
/// A packet every 15 seconds keeps the way through address translation open: the client can be
/// called, not only call.
#[derive(Debug)]
pub struct ClientConfig<'a> {
    /// The client's own key; a placeholder is written where only the client knows it.
    pub private_key: Option<&'a PrivateKey>,
    /// The client's address.
    pub address: Ipv6Addr,
    /// The network it joins.
    pub network: NetworkId,
    /// The key of the server it connects to.
    pub server_key: PublicKey,
    /// Where that server is, as `host:port`.
    pub endpoint: &'a str,
}

impl fmt::Display for ClientConfig<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let private_key = self.private_key.map(PrivateKey::to_base64);
        let private_key = private_key.as_ref().map_or("<your private key>", |k| k);
        let (address, network) = (self.address, self.network.prefix());
        writeln!(f, "[Interface]")?;
        writeln!(f, "PrivateKey = {private_key}")?;
        writeln!(f, "Address = {address}/120")?;
        writeln!(f, "DNS = {}", self.network.resolver())?;
        writeln!(f, "MTU = {MTU}")?;
        writeln!(f)?;
        writeln!(f, "[Peer]")?;
        writeln!(f, "PublicKey = {}", self.server_key)?;
        writeln!(f, "AllowedIPs = {network}")?;
        writeln!(f, "Endpoint = {}", self.endpoint)?;
        writeln!(f, "PersistentKeepalive = 15")
    }
}

#[cfg(test)]
mod tests {
    use tern_catalog::{HostId, MachineNumber, PrivateAddress};

    use super::*;

    #[test]
    fn a_stock_client_can_read_it() {
        let private: PrivateKey = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
            .parse()
            .unwrap();
        let config = ClientConfig {
            private_key: Some(&private),
            address: PrivateAddress::of_peer(NetworkId(7), HostId(1), MachineNumber(5)),
            network: NetworkId(7),
            server_key: private.public_key(),
            endpoint: "203.0.113.7:51820",
        };
        assert_eq!(
            config.to_string(),
            "[Interface]\n\
             PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n\
             Address = fdaa:0:7:0:1:0:5:2/120\n\
             DNS = fdaa:0:7::3\n\
             MTU = 1420\n\
             \n\
             [Peer]\n\
             PublicKey = HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=\n\
             AllowedIPs = fdaa:0:7::/48\n\
             Endpoint = 203.0.113.7:51820\n\
             PersistentKeepalive = 15\n"
        );
        let unknown = ClientConfig {
            private_key: None,
            ..config
        };
        assert!(
            unknown
                .to_string()
                .contains("PrivateKey = <your private key>\n")
        );
    }
}
