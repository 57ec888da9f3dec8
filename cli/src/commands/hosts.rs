//! `tern hosts`.

use std::process::ExitCode;

use anyhow::Result;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::Hosts;
use crate::client::Client;
use crate::output;

/// A host, as the API shows it.
#[derive(Debug, Serialize, Deserialize)]
struct Host {
    id: u32,
    name: String,
    region: String,
    state: String,
    alive_since: Option<Timestamp>,
    unreachable_since: Option<Timestamp>,
    cordoned_since: Option<Timestamp>,
    version: Option<String>,
    memory_mib: Option<Share<u64>>,
    cpus: Option<Share<f64>>,
    machine_count: usize,
    volume_count: usize,
    endpoint: String,
    public_key: String,
    started_at: Timestamp,
    /// Only of one that is shown alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    machines: Vec<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    volumes: Vec<Value>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Share<T> {
    all: T,
    taken: T,
}

#[derive(Debug, Deserialize)]
struct Invite {
    join: String,
    region: String,
    expires_at: Timestamp,
}

#[derive(Debug, Deserialize)]
struct All {
    hosts: Vec<Host>,
}

pub async fn run(client: &Client, args: Hosts) -> Result<ExitCode> {
    match args {
        Hosts::List { json } => {
            let All { hosts } = client.get("/v1/hosts").await?;
            if json {
                output::json(&hosts)?;
                return Ok(ExitCode::SUCCESS);
            }
            let rows: Vec<Vec<String>> = hosts.iter().map(Host::row).collect();
            output::table(
                &[
                    "ID",
                    "NAME",
                    "REGION",
                    "STATE",
                    "VERSION",
                    "MEMORY MIB",
                    "CPUS",
                    "MACHINES",
                    "VOLUMES",
                ],
                &rows,
                "No servers.",
            );
        }
        Hosts::Show { id, json } => {
            let host: Host = client.get(&format!("/v1/hosts/{id}")).await?;
            if json {
                output::json(&host)?;
            } else {
                host.show();
            }
        }
        Hosts::Invite { region, ttl } => {
            let ask = json!({"region": region, "ttl_seconds": ttl.as_secs()});
            let made: Invite = client.post("/v1/hosts/invites", &ask).await?;
            println!("tern serve --join {}", made.join);
            eprintln!(
                "Run it on the new server, once, until {:.0}. It will be in region {}. Whoever has this line has this cloud's \
                 secrets: keep it to yourself.",
                made.expires_at, made.region
            );
        }
        Hosts::Cordon { id } => {
            let left: Host = client
                .post(&format!("/v1/hosts/{id}/cordon"), &json!({}))
                .await?;
            println!(
                "Host {id} gets no new Machines. It has {} Machines and {} volumes.",
                left.machine_count, left.volume_count
            );
        }
        Hosts::Uncordon { id } => {
            let _: Host = client
                .post(&format!("/v1/hosts/{id}/uncordon"), &json!({}))
                .await?;
            println!("Host {id} gets new Machines.");
        }
        Hosts::Remove { id } => {
            client.delete(&format!("/v1/hosts/{id}")).await?;
            println!(
                "Host {id} is forgotten. Its data directory is of no use to this cloud any more."
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Host {
    fn row(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.region.clone(),
            self.state(),
            self.version.clone().unwrap_or_else(|| "-".to_owned()),
            share(self.memory_mib.as_ref()),
            share(self.cpus.as_ref()),
            self.machine_count.to_string(),
            self.volume_count.to_string(),
        ]
    }

    /// With since when, where that is what one asks next.
    fn state(&self) -> String {
        let cordoned = match self.cordoned_since {
            Some(_) if self.state == "unreachable" => ", cordoned",
            _ => "",
        };
        match self.unreachable_since {
            Some(since) => format!("unreachable since {since:.0}{cordoned}"),
            None => format!("{}{cordoned}", self.state),
        }
    }

    fn show(&self) {
        println!("Host      {} ({})", self.id, self.name);
        println!("Region    {}", self.region);
        println!("State     {}", self.state());
        println!("Version   {}", self.version.as_deref().unwrap_or("-"));
        println!("Started   {:.0}", self.started_at);
        println!("Endpoint  {} (WireGuard)", self.endpoint);
        println!("Memory    {} MiB taken", share(self.memory_mib.as_ref()));
        println!("CPUs      {} taken", share(self.cpus.as_ref()));
        let text = |value: &Value, name: &str| match &value[name] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let table = |title: &str, items: &[Value], fields: &[&str]| {
            if items.is_empty() {
                return;
            }
            println!("\n{title}");
            let headers: Vec<String> = fields.iter().map(|f| f.to_uppercase()).collect();
            let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
            let row = |item: &Value| fields.iter().map(|f| text(item, f)).collect();
            let rows: Vec<Vec<String>> = items.iter().map(row).collect();
            output::table(&headers, &rows, "");
        };
        table(
            "Machines",
            &self.machines,
            &["id", "app", "state", "memory_mb"],
        );
        table("Volumes", &self.volumes, &["id", "app", "name", "size_gb"]);
    }
}

/// `taken of all`.
fn share<T: std::fmt::Display>(share: Option<&Share<T>>) -> String {
    share.map_or_else(|| "-".to_owned(), |s| format!("{}/{}", s.taken, s.all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::World;

    #[tokio::test]
    async fn a_host_is_listed_cordoned_and_kept_while_it_is_of_use() {
        let world = World::new().await;
        let All { hosts } = world.client.get("/v1/hosts").await.unwrap();
        let row = hosts[0].row().join("|");
        assert_eq!(row, "1|one|local|alive|0|0/65536|0/64|0|0");
        run(&world.client, Hosts::Cordon { id: 1 }).await.unwrap();
        let host: Host = world.client.get("/v1/hosts/1").await.unwrap();
        assert_eq!(host.state(), "cordoned");
        let refused = run(&world.client, Hosts::Remove { id: 1 }).await;
        assert!(refused.unwrap_err().to_string().contains("is alive"));
        run(&world.client, Hosts::Uncordon { id: 1 }).await.unwrap();
        let host: Host = world.client.get("/v1/hosts/1").await.unwrap();
        assert_eq!(host.state(), "alive");
    }

    #[tokio::test]
    async fn on_etcd_machines_spread_and_a_host_that_dies_gets_no_more() {
        use std::sync::Arc;
        use std::time::Duration;
        use tern_catalog::{HostAlive, HostId, HostStatus, Op, Transaction};

        let files = tempfile::tempdir().unwrap();
        let (_server, etcd) = crate::testing::etcd(files.path()).await;
        let open = async || {
            let kind = crate::args::StoreKind::Etcd;
            crate::catalog::open_kind(kind, files.path(), &etcd)
                .await
                .unwrap()
        };
        let world = World::on(open().await, tempfile::tempdir().unwrap()).await;
        let theirs = open().await;
        let one = world.view.snapshot();
        let mut host = tern_catalog::Host::clone(&one.hosts[&HostId(1)]);
        (host.id, host.name) = (HostId(2), "two".to_owned());
        let mut status = HostStatus::clone(&one.host_status[&HostId(1)]);
        status.id = HostId(2);
        let mut alive = HostAlive::clone(&one.host_alive[&HostId(1)]);
        alive.id = HostId(2);
        let alive_for = async |seconds| {
            let lease = theirs.grant(Duration::from_secs(seconds)).await.unwrap();
            Op::Put {
                key: "host_alive/2".to_owned(),
                value: serde_json::to_vec(&alive).unwrap(),
                lease: Some(lease),
            }
        };
        let there = alive_for(3600).await;
        let joins = Transaction::of(vec![Op::put(&host), Op::put(&status), there]);
        theirs.commit(joins).await.unwrap();
        world
            .view
            .wait_for(|s| s.host_alive.get(&HostId(2)).map(Arc::clone))
            .await;

        let create = async || {
            let body = json!({"config": {"image": "example.com/x:1"}});
            let path = "/v1/apps/shop/machines";
            let made: Value = world.client.post(path, &body).await.unwrap();
            let id = made["id"].as_str().unwrap().parse().unwrap();
            world
                .view
                .wait_for(|s| {
                    s.machines
                        .get::<tern_catalog::MachineId>(&id)
                        .map(|m| m.host.0)
                })
                .await
        };
        super::super::apps::create(&world.client, "shop", "personal")
            .await
            .unwrap();
        let mut hosts = [create().await, create().await];
        hosts.sort_unstable();
        assert_eq!(hosts, [1, 2]);
        // From here on nobody renews its lease, as when it has died.
        let last = Transaction::of(vec![alive_for(2).await]);
        theirs.commit(last).await.unwrap();
        world
            .view
            .wait_for(|s| (!s.host_alive.contains_key(&HostId(2))).then_some(()))
            .await;
        for _ in 0..3 {
            assert_eq!(create().await, 1);
        }
        let two: Host = world.client.get("/v1/hosts/2").await.unwrap();
        assert!(two.state().starts_with("unreachable since"), "{two:?}");
    }
}
