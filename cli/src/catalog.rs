//! `tern catalog`: what an operator does to the catalog itself; and which store it is opened in.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use tern_catalog::{EtcdConfig, EtcdStore, SqliteStore, Store, transfer};

use crate::args::{Catalog, Etcd, StoreKind};

/// The catalog's file in a data directory.
const FILE: &str = "catalog.db";

/// Runs one of its commands.
pub fn run(command: Catalog) -> Result<ExitCode> {
    let Catalog::Move { from, to, at, etcd } = command;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let told = runtime.block_on(move_all(from, to, &at.data_dir, &etcd))?;
    println!("{told}");
    Ok(ExitCode::SUCCESS)
}

/// Opens the catalog that `tern serve` is told to use; one that was left for another store is refused.
pub async fn open(data_dir: &Path, etcd: &Etcd) -> Result<Arc<dyn Store>> {
    let kind = match etcd.members.is_empty() {
        true => StoreKind::Sqlite,
        false => StoreKind::Etcd,
    };
    let store = open_kind(kind, data_dir, etcd).await?;
    transfer::refuse_moved(&*store).await?;
    if kind == StoreKind::Etcd
        && data_dir.join(FILE).exists()
        && store.list("").await?.entries.is_empty()
    {
        // Serving from an empty store would have the agent take all Machines of this host for strangers.
        bail!(
            "this host has a catalog in {} and etcd has none: move it (`tern catalog move --from sqlite --to etcd`), or \
             remove the file to begin anew",
            data_dir.join(FILE).display()
        );
    }
    Ok(store)
}

pub(crate) async fn open_kind(
    kind: StoreKind,
    data_dir: &Path,
    etcd: &Etcd,
) -> Result<Arc<dyn Store>> {
    Ok(match kind {
        StoreKind::Sqlite => Arc::new(SqliteStore::open(&data_dir.join(FILE))?),
        StoreKind::Etcd => {
            let config = EtcdConfig {
                endpoints: etcd.members.clone(),
                ca: etcd.ca.clone(),
                certificate: etcd.cert.clone(),
                key: etcd.key.clone(),
                user: etcd.user.clone(),
                password_file: etcd.password_file.clone(),
            };
            Arc::new(EtcdStore::connect(config).await.context("etcd")?)
        }
    })
}

/// Moves everything and says what was moved.
async fn move_all(from: StoreKind, to: StoreKind, data_dir: &Path, etcd: &Etcd) -> Result<String> {
    ensure!(from != to, "--from and --to name the same store");
    ensure!(
        !etcd.members.is_empty(),
        "say where etcd is, with --etcd https://host:2379"
    );
    let file = data_dir.join(FILE);
    if from == StoreKind::Sqlite {
        // Opening it would make an empty one.
        ensure!(file.exists(), "there is no catalog in {}", file.display());
    }
    let source = open_kind(from, data_dir, etcd).await?;
    transfer::refuse_moved(&*source).await?;
    let target = open_kind(to, data_dir, etcd).await?;
    // A file is ours alone while it is open.
    let leave_for = match from {
        StoreKind::Sqlite => None,
        StoreKind::Etcd => Some(format!("SQLite, in {}", file.display())),
    };
    let moved = transfer::copy(&*source, &*target, leave_for.as_deref()).await?;
    let members = etcd.members.join(",");
    let next = match from {
        StoreKind::Sqlite => {
            // The file is let go of first, for the mark needs it alone.
            drop(source);
            SqliteStore::mark_moved(&file, &format!("etcd at {members}"))?;
            format!(
                "{} keeps its records and is not served from any more. Start `tern serve --etcd {members}` now.",
                file.display()
            )
        }
        StoreKind::Etcd => {
            "etcd keeps its records and is not served from any more. Start `tern serve` without --etcd now.".to_owned()
        }
    };
    Ok(format!(
        "{} records of revision {} are moved and were read back (sha256 {}).\n{next}",
        moved.records, moved.revision, moved.digest
    ))
}

#[cfg(test)]
mod tests {
    use tern_catalog::{Op, Transaction};

    use super::*;
    use crate::testing::etcd;

    #[tokio::test]
    async fn a_catalog_moves_to_etcd_and_back_and_is_served_from_one_place() {
        let dir = tempfile::tempdir().unwrap();
        let (_server, etcd) = etcd(dir.path()).await;
        let none = Etcd::default();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let refused = async |data: &Path, etcd: &Etcd| {
            let error = open(data, etcd).await.err().expect("refused");
            format!("{error:#}")
        };
        let (sqlite, cluster) = (StoreKind::Sqlite, StoreKind::Etcd);
        let error = move_all(sqlite, cluster, &data, &etcd).await.unwrap_err();
        assert!(error.to_string().contains("no catalog in"), "{error}");
        {
            let store = open(&data, &none).await.unwrap();
            let put = Op::Put {
                key: "apps/a".to_owned(),
                value: b"1".to_vec(),
                lease: None,
            };
            store.commit(Transaction::of(vec![put])).await.unwrap();
            // A server that runs keeps its catalog.
            let error = move_all(sqlite, cluster, &data, &etcd).await.unwrap_err();
            assert!(error.to_string().contains("another process"), "{error}");
        }
        let error = refused(&data, &etcd).await;
        assert!(error.contains("tern catalog move"), "{error}");

        let told = move_all(sqlite, cluster, &data, &etcd).await.unwrap();
        assert!(told.starts_with("1 records"), "{told}");
        let error = refused(&data, &none).await;
        assert!(
            error.contains("was moved to etcd at http://127.0.0.1"),
            "{error}"
        );
        let store = open(&data, &etcd).await.unwrap();
        assert_eq!(store.get("apps/a").await.unwrap().unwrap().value, b"1");
        drop(store);

        // Back, into a file of its own.
        let error = move_all(cluster, sqlite, &data, &etcd).await.unwrap_err();
        assert!(error.to_string().contains("was moved to"), "{error}");
        std::fs::rename(data.join(FILE), data.join("left.db")).unwrap();
        move_all(cluster, sqlite, &data, &etcd).await.unwrap();
        let error = refused(&data, &etcd).await;
        assert!(error.contains("was moved to SQLite"), "{error}");
        let store = open(&data, &none).await.unwrap();
        assert_eq!(store.list("").await.unwrap().entries.len(), 1);
    }
}
