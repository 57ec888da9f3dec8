//! Which host of which cloud this server is.
//!
//! A cloud is its catalog's `cloud/this`: an id, and a digest under its sealing key. A host is a number and a
//! WireGuard key, in the catalog's `hosts/<number>`. Numbers are counted up by compare-and-swap and never given out
//! again: they stand in addresses. The data directory remembers both in `host.json`; whoever comes with a data
//! directory of another cloud, with a number that is another key's, or with another sealing key, is refused before
//! anything has begun.
//!
//! The key is what counts: a server that crashed between the catalog's answer and the file finds its number by it.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tern_catalog::{
    Catalog, CatalogError, Cloud, Compare, Host, HostId, Op, StoreError, Transaction,
};
use tern_certs::Sealer;

use crate::settings::write_secret;

/// Where a data directory remembers whose it is.
const FILE: &str = "host.json";
/// The last number that was given out.
const COUNTER: &str = "counters/hosts";
/// How often a number is tried for that others take at the same time: far more than servers that join at once.
const ATTEMPTS: u32 = 256;
/// What the digest in the cloud's record is for.
const SEAL_PURPOSE: &str = "tern cloud";

/// What a data directory remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    cloud: String,
    host: HostId,
}

/// Who asks to be a host.
pub struct Asker<'a> {
    /// What to write of it; the number is not looked at.
    pub host: Host,
    pub data_dir: &'a Path,
    pub sealer: &'a Sealer,
    /// Whether the catalog is in that data directory, and so nobody else's.
    pub own_catalog: bool,
}

impl Asker<'_> {
    /// Finds this server's number, or gets one, and writes its record anew.
    pub async fn settle(self, catalog: &Catalog) -> Result<HostId> {
        let file = self.data_dir.join(FILE);
        let remembered = read(&file)?;
        let cloud = self.cloud(catalog, remembered.as_ref(), &file).await?;
        let id = match &remembered {
            Some(remembered) => remembered.host,
            None => self.number(catalog).await?,
        };
        self.write(catalog, id, &file).await?;
        let now = Remembered {
            cloud: cloud.id,
            host: id,
        };
        if remembered.as_ref() != Some(&now) {
            write_secret(&file, &serde_json::to_vec_pretty(&now)?)
                .with_context(|| format!("{} cannot be written", file.display()))?;
        }
        Ok(id)
    }

    /// The catalog's cloud; made where the catalog has none and the data directory remembers none.
    async fn cloud(
        &self,
        catalog: &Catalog,
        remembered: Option<&Remembered>,
        file: &Path,
    ) -> Result<Cloud> {
        let file = file.display();
        let found = catalog.get::<Cloud>(Cloud::ONLY).await?;
        if found.is_none()
            && let Some(remembered) = remembered
        {
            bail!(
                "this data directory is host {} of cloud {}, and the catalog is of none: was it lost? Restore it; or remove \
                 {file} to begin a new cloud, in which Machines on this disk are strangers",
                remembered.host,
                remembered.cloud
            );
        }
        let cloud = match found {
            Some((cloud, _)) => cloud,
            None => self.make_cloud(catalog).await?,
        };
        if let Some(remembered) = remembered.filter(|r| r.cloud != cloud.id) {
            bail!(
                "this data directory is host {} of cloud {}, and the catalog is cloud {}'s: serve with the catalog that it \
                 belongs to, or give this cloud a data directory of its own (--data-dir)",
                remembered.host,
                remembered.cloud,
                cloud.id
            );
        }
        if cloud.seal != self.sealer.digest(SEAL_PURPOSE, cloud.id.as_bytes()) {
            bail!(
                "keys/seal.key in this data directory is not this cloud's: secrets and certificates that the others seal \
                 would not open here. Join with `tern hosts invite`, which brings it, or restore the file from a backup"
            );
        }
        Ok(cloud)
    }

    async fn make_cloud(&self, catalog: &Catalog) -> Result<Cloud> {
        let id = format!("{:016x}", rand::random::<u64>());
        let cloud = Cloud {
            seal: self.sealer.digest(SEAL_PURPOSE, id.as_bytes()),
            id,
            created_at: Timestamp::now(),
        };
        match catalog.create(&cloud).await {
            Ok(_) => Ok(cloud),
            Err(CatalogError::Exists(_)) => {
                let found = catalog.get::<Cloud>(Cloud::ONLY).await?;
                Ok(found.context("the cloud's record is gone")?.0)
            }
            Err(other) => Err(other.into()),
        }
    }

    /// The number of a server that remembers none: its key's, or the next.
    async fn number(&self, catalog: &Catalog) -> Result<HostId> {
        for _ in 0..ATTEMPTS {
            let hosts = catalog.list::<Host>().await?;
            if let Some(own) = hosts.iter().find(|h| h.public_key == self.host.public_key) {
                return Ok(own.id);
            }
            // From before data directories remembered: the catalog's only host is this one, with another key.
            if let ([only], true) = (&hosts[..], self.own_catalog) {
                return Ok(only.id);
            }
            let entry = catalog.store().get(COUNTER).await?;
            let last: u32 = match &entry {
                Some(entry) => serde_json::from_slice(&entry.value)
                    .with_context(|| format!("{COUNTER} in the catalog cannot be read"))?,
                None => 0,
            };
            let highest = hosts.iter().map(|h| h.id.0).fold(last, u32::max);
            let number = highest
                .checked_add(1)
                .context("there are no more numbers")?;
            let host = Host {
                id: HostId(number),
                ..self.host.clone()
            };
            let counter = Compare {
                key: COUNTER.to_owned(),
                revision: entry.map(|e| e.revision),
            };
            let count = Op::Put {
                key: COUNTER.to_owned(),
                value: number.to_string().into_bytes(),
                lease: None,
            };
            let transaction = Transaction {
                compares: vec![counter, Compare::absent(&host)],
                ops: vec![count, Op::put(&host)],
            };
            match catalog.store().commit(transaction).await {
                Ok(_) => {
                    tracing::info!(host = number, "this server is a host of this cloud now");
                    return Ok(host.id);
                }
                // Somebody else has that number; or this one has, unanswered, and finds it by its key.
                Err(StoreError::Conflict { .. } | StoreError::Unknown(_)) => {}
                Err(other) => return Err(other.into()),
            }
        }
        bail!("too many servers join at once; start this one again")
    }

    /// Writes the record of this start, where the number is this key's.
    async fn write(&self, catalog: &Catalog, id: HostId, file: &Path) -> Result<()> {
        let written = catalog
            .update(&id.to_string(), |host: &mut Host| {
                if host.public_key != self.host.public_key {
                    if !self.own_catalog {
                        return Err(host.name.clone());
                    }
                    tracing::warn!(
                        "this host has a new WireGuard key: clients need a new configuration"
                    );
                }
                *host = Host {
                    id,
                    ..self.host.clone()
                };
                Ok(())
            })
            .await?;
        match written {
            Ok(Some(_)) => Ok(()),
            Ok(None) => bail!(
                "host {id} was removed from this cloud, and its number is not used again. To join anew move {} away",
                self.data_dir.display()
            ),
            Err(name) => bail!(
                "host {id} (\"{name}\") has another WireGuard key than keys/wireguard.key here. Restore that file from a \
                 backup; or, to join as a new host, remove {}: Machines and volumes of host {id} are then strangers on this \
                 disk",
                file.display()
            ),
        }
    }
}

fn read(file: &Path) -> Result<Option<Remembered>> {
    match std::fs::read(file) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is damaged: restore it from a backup, or remove it, and this server is found by its WireGuard key",
                file.display()
            )
        })?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("{} cannot be read", file.display())),
    }
}

#[cfg(test)]
mod tests;
