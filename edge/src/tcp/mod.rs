//! A connection that is not HTTP: from its first byte to its last, one future.
//!
//! ```text
//! door ─► (TLS, its name) ─► gate: a place at a Machine ─► a connection of its own ─► pump: both ways
//! ```
//!
//! It holds its place as long as it lives, so that a Machine with an open connection is not put to sleep. What its
//! client says meanwhile waits: in the kernel, but for the little that tells whether the client is still there.

pub mod postgres;
mod proxy;
mod pump;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use bytes::BytesMut;
use tern_catalog::ServiceProtocol;
use tokio::net::TcpStream;

use crate::gate::Admission;
use crate::h1::buffer::{self, SMALL};
use crate::h1::client::Transport;
use crate::site::Target;
use crate::worker::Worker;
use pump::Pump;

/// Both ends of a client's connection, as the app is told them.
#[derive(Debug, Clone, Copy)]
pub struct Ends {
    pub client: SocketAddr,
    /// The address it came to, with the port as apps name it.
    pub local: SocketAddr,
}

/// Connections tried for one of a client's before it is given up.
const MAX_CONNECTS: u32 = 4;

/// Serves a connection until it ends.
pub async fn serve<C: Transport>(io: C, ends: Ends, target: &Target, worker: &Worker) {
    let mut client = Caller {
        io,
        said: BytesMut::new(),
        ended: false,
    };
    let Some((app, _place)) = client.reach(target, worker).await else {
        // It gets no answer that it could take for the app's.
        client.io.reset_when_closed();
        return;
    };
    worker.metrics.tcp_relayed.add();
    let mut first = BytesMut::new();
    if let Some(version) = target.proxy {
        proxy::header(&mut first, version, ends);
    }
    first.extend_from_slice(&client.said);
    buffer::release(&mut client.said);
    let mut pump = Pump::new(client.io, app, first, client.ended, worker.limits.idle);
    tokio::select! {
        outcome = poll_fn(|cx| pump.poll(cx)) => {
            if let Err(error) = outcome {
                tracing::debug!(%error, app = %target.app, client = %ends.client, "a connection broke");
            }
        }
        () = worker.ended.cancelled() => {}
    }
}

/// A client that waits for its app.
struct Caller<C> {
    io: C,
    /// What it has said.
    said: BytesMut,
    /// It says no more.
    ended: bool,
}

impl<C: Transport> Caller<C> {
    /// A connection to the app, and its place there; nothing if there is none, or the client is gone.
    async fn reach(&mut self, target: &Target, worker: &Worker) -> Option<(TcpStream, Admission)> {
        for _ in 0..MAX_CONNECTS {
            let admitted =
                worker
                    .gate
                    .admit(&target.app, target.internal_port, ServiceProtocol::Tcp);
            let mut place = match self.meanwhile(admitted).await? {
                Ok(place) => place,
                Err(refused) => {
                    tracing::debug!(app = %target.app, %refused, "a connection was refused");
                    return None;
                }
            };
            match self.meanwhile(place.connect()).await? {
                Ok(app) => return Some((app, place)),
                Err(error) => {
                    tracing::debug!(machine = %place.machine, %error, "no connection to the app");
                }
            }
        }
        None
    }

    /// Waits for something, unless the client goes away first.
    async fn meanwhile<T>(&mut self, awaited: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(awaited);
        poll_fn(|cx| {
            // First: whoever has gone before its turn came does not reach the app.
            if self.poll_gone(cx).is_ready() {
                return Poll::Ready(None);
            }
            awaited.as_mut().poll(cx).map(Some)
        })
        .await
    }

    /// Ready when it has broken its connection. One that only says no more may wait for an answer.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.ended && self.said.len() < SMALL {
            match std::task::ready!(buffer::poll_fill(&mut self.io, cx, &mut self.said, SMALL)) {
                Ok(read) => self.ended = read == 0,
                Err(_) => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }
}
