//! One deploy of an app at a time: whoever deploys holds the app's lease, and shows signs of life while it does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tern_catalog::AppName;

use super::cleanup::Cleanup;
use crate::client::{Body, Client, empty, full, is_status};

/// What the holder shows.
pub const NONCE: &str = "fly-machine-lease-nonce";
/// How long a deploy that has gone silent keeps others out.
const TTL: Duration = Duration::from_secs(45);
/// Between two signs of life; several may be lost.
const EVERY: Duration = Duration::from_secs(10);

/// The lease of an app. Dropped, it is given back.
pub struct Lock {
    lease: Arc<Lease>,
    release: Cleanup,
}

struct Lease {
    client: Client,
    path: String,
    nonce: String,
}

impl Lock {
    /// Takes it; an error says who has it, and since when.
    pub async fn take(client: &Client, app: &AppName) -> Result<Self> {
        let path = format!("/v1/apps/{app}/lease");
        let body =
            json!({"ttl": TTL.as_secs(), "description": format!("tern deploy by {}", who())});
        let taken: Value = match client.post(&path, &body).await {
            Err(e) if is_status(&e, StatusCode::CONFLICT) => {
                return Err(e.context("another deploy is under way"));
            }
            other => other?,
        };
        let nonce = taken["data"]["nonce"].as_str();
        let nonce = nonce.context("the server gave a lease without a nonce")?;
        let lease = Arc::new(Lease {
            client: client.clone(),
            path,
            nonce: nonce.to_owned(),
        });
        let own = Arc::clone(&lease);
        let release = Cleanup::new(async move {
            // It ends by itself where this fails.
            let _ = own.call(Method::DELETE, empty()).await;
        });
        Ok(Self { lease, release })
    }

    /// What shows that it is held.
    pub fn nonce(&self) -> String {
        self.lease.nonce.clone()
    }

    /// Does something while the lease is held, and gives it back. Where it is lost, what is under way is broken off.
    pub async fn during<T>(self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = tokio::select! {
            outcome = Box::pin(work) => outcome,
            lost = Box::pin(self.lease.keep()) => Err(lost),
        };
        self.release.now().await;
        outcome
    }
}

impl Lease {
    /// Makes it last; returns when somebody else has it.
    async fn keep(&self) -> anyhow::Error {
        const LOST: &str =
            "this deploy was silent for too long, and was broken off where it was. Run it again";
        let mut lasts_until = Instant::now() + TTL;
        loop {
            tokio::time::sleep(EVERY).await;
            let asked = Instant::now();
            let body = json!({"ttl": TTL.as_secs()}).to_string();
            match tokio::time::timeout(EVERY, self.call(Method::POST, full(body))).await {
                Ok(Ok(())) => lasts_until = asked + TTL,
                Ok(Err(e)) if is_status(&e, StatusCode::CONFLICT) => return e.context(LOST),
                // Another time, while it is still ours.
                _ if Instant::now() < lasts_until => {}
                _ => return anyhow::anyhow!("the server cannot be reached").context(LOST),
            }
        }
    }

    async fn call(&self, method: Method, body: Body) -> Result<()> {
        let request = self.client.request(method, &self.path);
        let request = request.header(NONCE, &self.nonce).body(body)?;
        self.client.call(request).await.map(drop)
    }
}

/// `user@host`, for who waits.
pub fn who() -> String {
    let user = ["USER", "LOGNAME"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match (user, host.trim()) {
        (Some(user), "") => user,
        (Some(user), host) => format!("{user}@{host}"),
        (None, "") => "somebody".to_owned(),
        (None, host) => host.to_owned(),
    }
}
