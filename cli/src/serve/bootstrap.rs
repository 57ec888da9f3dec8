//! What a server's first start leaves behind: an organization, its network, an admin token.

use std::path::Path;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use tern_catalog::{
    Catalog, CatalogError, Network, NetworkId, OrgSlug, Organization, Scope, Token,
};

use crate::settings::{ADMIN_TOKEN_FILE, write_secret};

/// The organization that a first `tern launch` uses.
const FIRST_ORG: &str = "personal";
/// Its network. 0 is the hosts'.
const FIRST_NETWORK: NetworkId = NetworkId(1);
/// Last characters of a token that are kept, to know it by.
const TOKEN_TAIL: usize = 4;
/// Bytes of randomness in a token.
const TOKEN_BYTES: usize = 32;

/// Makes what is missing.
pub async fn run(catalog: &Catalog, data_dir: &Path) -> Result<()> {
    let now = Timestamp::now();
    let slug: OrgSlug = FIRST_ORG.parse().context("the first organization's name")?;
    if catalog.list::<Organization>().await?.is_empty() {
        let network = Network {
            id: FIRST_NETWORK,
            organization: slug.clone(),
            name: "default".to_owned(),
        };
        let organization = Organization {
            slug,
            name: "Personal".to_owned(),
            default_network: FIRST_NETWORK,
            created_at: now,
        };
        exists_is_fine(catalog.create(&network).await)?;
        exists_is_fine(catalog.create(&organization).await)?;
    }
    admin_token(catalog, &data_dir.join(ADMIN_TOKEN_FILE), now).await
}

/// A token that may do everything, in a file that only root may read. Made once; a removed file is made
/// anew, with a new token.
async fn admin_token(catalog: &Catalog, path: &Path, now: Timestamp) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let token = new_token();
    let record = Token {
        hash: token_hash(&token),
        name: "admin".to_owned(),
        organization: None,
        scope: Scope::Full,
        created_at: now,
        expires_at: None,
        parent: None,
        tail: token.chars().skip(token.len() - TOKEN_TAIL).collect(),
    };
    // The file first: a token that nobody can read would stay good for ever.
    write_secret(path, token.as_bytes())
        .with_context(|| format!("{} cannot be written", path.display()))?;
    catalog.create(&record).await?;
    tracing::info!(file = %path.display(), "wrote the admin token");
    Ok(())
}

/// A new random token.
pub fn new_token() -> String {
    format!("tern_{}", hex::encode(rand::random::<[u8; TOKEN_BYTES]>()))
}

fn token_hash(token: &str) -> String {
    hex::encode(Sha256::digest(token))
}

fn exists_is_fine(outcome: Result<u64, CatalogError>) -> Result<()> {
    match outcome {
        Ok(_) | Err(CatalogError::Exists(_)) => Ok(()),
        Err(other) => Err(other.into()),
    }
}
