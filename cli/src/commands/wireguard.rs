//! `tern wireguard`.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{NetworkId, OrgSlug, PeerName};
use tern_mesh::{ClientConfig, PrivateKey};

use super::orgs;
use crate::args::Wireguard;
use crate::client::Client;
use crate::settings::write_secret;

/// What the API answers to a new peer's public key.
#[derive(Debug, Deserialize)]
struct NewPeer {
    /// With its `/120`.
    address: String,
    endpoint: SocketAddr,
    server_public_key: String,
}

pub async fn run(client: &Client, args: Wireguard) -> Result<ExitCode> {
    match args {
        Wireguard::Create { name, org, file } => create(client, &name, &org, file).await?,
        Wireguard::List { org, json } => {
            let answer: Value = client
                .get(&format!("/v1/orgs/{org}/wireguard_peers"))
                .await?;
            orgs::list(
                &answer,
                "peers",
                json,
                &["name", "address", "region", "created_at"],
                "No peers yet.",
            )?;
        }
        Wireguard::Remove { name, org } => {
            client
                .delete(&format!("/v1/orgs/{org}/wireguard_peers/{name}"))
                .await?;
            println!("Peer {name} is removed.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(
    client: &Client,
    name: &PeerName,
    org: &OrgSlug,
    file: Option<PathBuf>,
) -> Result<()> {
    let key = PrivateKey::generate();
    let ask = json!({"name": name, "public_key": key.public_key().to_string()});
    let peer: NewPeer = client
        .post(&format!("/v1/orgs/{org}/wireguard_peers"), &ask)
        .await?;
    let odd = || {
        format!(
            "the server answered with an address that is not right: {}",
            peer.address
        )
    };
    let address: Ipv6Addr = peer
        .address
        .split('/')
        .next()
        .unwrap_or_default()
        .parse()
        .with_context(odd)?;
    let endpoint = peer.endpoint.to_string();
    let config = ClientConfig {
        private_key: Some(&key),
        address,
        network: NetworkId::of(address).with_context(odd)?,
        server_key: peer
            .server_public_key
            .parse()
            .context("the server's public key is not right")?,
        endpoint: &endpoint,
    };
    let text = config.to_string();
    match file {
        None => print!("{text}"),
        Some(path) => {
            write_secret(&path, text.as_bytes())
                .with_context(|| format!("{} cannot be written; the peer is made, remove it with `tern wireguard remove {name}`", path.display()))?;
            eprintln!(
                "Wrote {}. Join with `wg-quick up {}`.",
                path.display(),
                path.display()
            );
        }
    }
    Ok(())
}
