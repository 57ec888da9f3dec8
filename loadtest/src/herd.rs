//! Many requests at one moment, each on a connection of its own.

use std::sync::Arc;
use std::time::Instant;

use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::args::Barrier;
use crate::exchange::{Answer, Expectation, Failure, connect, exchange};
use crate::tally::Tally;
use crate::target::{Connection, Target};

/// Connections that are being made at a time, where they are made ahead: as many as a listening
/// socket's usual backlog takes.
const CONNECTING: usize = 128;

/// Sends `count` requests at the same moment and waits for all outcomes.
pub async fn herd(
    target: &Arc<Target>,
    expected: &Expectation,
    count: u64,
    barrier: Barrier,
) -> Tally {
    let mut tally = Tally::default();
    let mut ready: Vec<Option<Connection>> = Vec::new();
    match barrier {
        Barrier::Connect => ready.extend((0..count).map(|_| None)),
        Barrier::Request => {
            let attempts = stream::iter(0..count).map(|_| connect(target, expected.timeout));
            let mut attempts = attempts.buffer_unordered(CONNECTING);
            while let Some(attempt) = attempts.next().await {
                match attempt {
                    Ok(connection) => ready.push(Some(connection)),
                    Err(failure) => tally.add(&Err(failure)),
                }
            }
        }
    }
    let (start, started) = watch::channel(None);
    let mut requests = JoinSet::new();
    for connection in ready {
        let (target, expected) = (Arc::clone(target), expected.clone());
        let mut started = started.clone();
        requests.spawn(async move {
            let intended = match started.wait_for(Option::is_some).await {
                Ok(start) => start.unwrap_or_else(Instant::now),
                Err(_) => Instant::now(), // the sender outlives all requests
            };
            one(&target, connection, &expected, intended).await
        });
    }
    // All tasks are polled up to their wait before the moment is taken.
    tokio::task::yield_now().await;
    start.send_replace(Some(Instant::now()));
    while let Some(outcome) = requests.join_next().await {
        match outcome {
            Ok(outcome) => tally.add(&outcome),
            Err(error) => std::panic::resume_unwind(error.into_panic()), // none is ever aborted
        }
    }
    tally
}

async fn one(
    target: &Target,
    connection: Option<Connection>,
    expected: &Expectation,
    intended: Instant,
) -> Result<Answer, Failure> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => connect(target, expected.timeout).await?,
    };
    exchange(target, &mut connection, expected, intended).await
}
