//! A watch that outlives the members it is fed by.
//!
//! Each second the member is asked for progress; one that is silent for [`SILENCE`] is left and another
//! goes on from the revision that was told last. What a member says of itself is no proof of being current: cut
//! off from the others, or with a disk that hangs, it has its own past. So the cluster is asked too, by a
//! read that is ordered after all that was acknowledged before it; once all up to the revision that it
//! answers has been told, the watch is known to be as new as the question. A member that does not get there
//! is left, and a cluster that is behind what was told has another history: it was restored from a backup.
//!
//! The watch is asked for from the revision itself that was told last and what was told is dropped: etcd before
//! 3.5.17 accepts a start at the compacted revision and then leaves out its deletions, while one below it is
//! refused on every version.
//!
//! A member's progress says that it has sent all up to it only with some versions. With others that is known once
//! the last revision of the cluster has come itself, which needs an etcd that nobody else writes to.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, OptionFuture};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::connection::{CallError, Connection, Stream};
use super::members::{self, ANSWER, Failure, Kind, Members, Next};
use super::messages::{
    Empty, Event, Header, RangeResponse, WatchCommand, WatchCreate, WatchRequest, WatchResponse,
};
use super::{Keys, entry};
use crate::store::{Change, PROGRESS_EVERY, Revision, StoreError, Watch, WatchBatch, WatchEvent};

/// Longest that a member may say nothing though it is asked every second.
const SILENCE: Duration = Duration::from_secs(4);
/// Events ahead of the watcher; more stay with etcd.
const AHEAD: usize = 32;
/// Waits between two attempts to find a member, with jitter.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);
/// Answers of the cluster that wait until all up to them has been told.
const PROOFS: usize = 8;

/// Feeds one watch.
pub(super) struct Feed {
    members: Arc<Members>,
    keys: Keys,
    /// All up to here has been told.
    told: Revision,
    events: mpsc::Sender<Result<WatchEvent, StoreError>>,
    /// The cluster whose revisions these are.
    cluster: Option<u64>,
    /// When a member refused the watch, and none has accepted it since.
    denied: Option<Instant>,
}

/// Why a stream ended.
enum End {
    /// Another member is to go on.
    Stream(String, Next),
    /// Its login may not watch.
    Denied(String),
    /// The watch itself is over.
    Watch(StoreError),
    /// Nobody listens.
    Closed,
}

/// What has come over one stream.
#[derive(Default)]
struct Received {
    /// The last revision's events of a response that etcd has cut into pieces.
    pieces: Vec<Event>,
    /// The last revision that the member has named.
    reached: Revision,
    /// Whether it says by that that it has sent all up to it.
    progress_is_proof: bool,
    /// What the cluster has answered and we have not told yet, in order.
    proofs: VecDeque<Proof>,
    /// Since when the member is behind the cluster, and does not catch up.
    behind: Option<Instant>,
}

/// What the cluster had when it was asked.
#[derive(Clone, Copy)]
struct Proof {
    revision: Revision,
    asked: Instant,
}

/// A question to the cluster.
struct Asked {
    at: Instant,
    /// What had been told by then.
    told: Revision,
    answer: Result<RangeResponse, Failure>,
}

impl Feed {
    /// Starts a watch after this revision.
    pub(super) fn start(members: Arc<Members>, keys: Keys, after: Revision) -> Watch {
        let (events, receiver) = mpsc::channel(AHEAD);
        let feed = Self {
            members,
            keys,
            told: after,
            events,
            cluster: None,
            denied: None,
        };
        tokio::spawn(feed.run());
        Watch::new(receiver)
    }

    async fn run(mut self) {
        let mut wait = RETRY_FIRST;
        loop {
            let closed = self.events.clone();
            let before = Instant::now();
            let end = tokio::select! {
                end = self.one_member() => end,
                () = closed.closed() => return,
            };
            match end {
                End::Closed => return,
                End::Watch(error) => {
                    let _ = self.events.send(Err(error)).await;
                    return;
                }
                End::Stream(why, _) | End::Denied(why) => {
                    tracing::info!(why, "a watch goes on over another connection to etcd")
                }
            }
            if before.elapsed() > RETRY_MOST {
                wait = RETRY_FIRST;
            }
            let jittered = wait.mul_f64(rand::random_range(0.5..1.5));
            tokio::select! {
                () = tokio::time::sleep(jittered) => {}
                () = closed.closed() => return,
            }
            wait = (wait * 2).min(RETRY_MOST);
        }
    }

    /// Follows one member until that ends.
    async fn one_member(&mut self) -> End {
        let connection = match self.members.connection().await {
            Ok(connection) => connection,
            Err(error) => return End::Stream(error.to_string(), Next::Other),
        };
        let end = match self.open(&connection).await {
            Ok(stream) => self.follow(stream, &connection).await,
            Err(CallError::Status(7, text)) => End::Denied(text),
            Err(error) => End::Stream(error.to_string(), members::next(&connection, &error)),
        };
        match &end {
            End::Stream(why, next) => self.members.leave(&connection, why, *next),
            End::Denied(why) => {
                // etcd says so also of a login that has ended. Only one that was made since is believed.
                let since = *self.denied.get_or_insert_with(Instant::now);
                if connection.opened > since {
                    return End::Watch(StoreError::Unavailable(why.clone()));
                }
                self.members.leave(&connection, why, Next::Same);
            }
            End::Watch(_) | End::Closed => {}
        }
        end
    }

    async fn open(&self, connection: &Connection) -> Result<Stream, CallError> {
        let create = WatchCreate {
            key: self.keys.first.clone(),
            range_end: self.keys.end.clone(),
            // 0 would be from now on; 1 is before every commit.
            start_revision: self.told.max(1).cast_signed(),
            progress_notify: true,
            fragment: true,
        };
        let create = WatchRequest {
            command: Some(WatchCommand::Create(create)),
        };
        connection.stream("Watch/Watch", &create, ANSWER).await
    }

    async fn follow(&mut self, mut stream: Stream, connection: &Connection) -> End {
        let mut ask = tokio::time::interval(PROGRESS_EVERY);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut received = Received {
            progress_is_proof: connection.progress_is_proof,
            ..Received::default()
        };
        let mut asking: OptionFuture<BoxFuture<'static, Asked>> = None.into();
        let mut is_asking = false;
        let mut heard = Instant::now();
        loop {
            let late = received.behind.unwrap_or(heard).min(heard) + SILENCE;
            let outcome = tokio::select! {
                response = stream.next::<WatchResponse>() => match response {
                    Ok(response) => self.take(response, &mut received).await,
                    Err(error) => Err(End::Stream(error.to_string(), members::next(connection, &error))),
                },
                _ = ask.tick() => {
                    let progress = WatchRequest { command: Some(WatchCommand::Progress(Empty {})) };
                    // One that does not fit waits behind others that were not sent either.
                    let _ = stream.send(&progress);
                    if !is_asking && received.proofs.len() < PROOFS {
                        asking = Some(self.ask()).into();
                        is_asking = true;
                    }
                    continue;
                }
                Some(asked) = &mut asking => {
                    (asking, is_asking) = (None.into(), false);
                    match self.learn(asked, &mut received).await {
                        Ok(()) => continue,
                        Err(end) => return end,
                    }
                }
                () = connection.replaced() => {
                    return End::Stream("its connection was left".to_owned(), Next::Other);
                }
                () = tokio::time::sleep_until(late) => {
                    let why = match received.behind {
                        Some(_) => "it is behind the others and has not caught up",
                        None => "it has said nothing",
                    };
                    return End::Stream(format!("{why} for {SILENCE:?}"), Next::Other);
                }
            };
            if let Err(end) = outcome {
                return end;
            }
            // After the watcher has taken it: its slowness is not the member's.
            heard = Instant::now();
        }
    }

    /// Asks the cluster for its revision.
    fn ask(&self) -> BoxFuture<'static, Asked> {
        let (members, told) = (Arc::clone(&self.members), self.told);
        Box::pin(async move {
            let question = members::probe();
            let at = Instant::now();
            let answer = members.call("KV/Range", &question, Kind::Read).await;
            Asked { at, told, answer }
        })
    }

    /// Takes the cluster's answer.
    async fn learn(&mut self, asked: Asked, received: &mut Received) -> Result<(), End> {
        let answer = match asked.answer {
            Ok(answer) => answer,
            Err(error) => {
                // The view grows old by it, and says so.
                let error = StoreError::from(error);
                tracing::debug!(%error, "etcd was not asked how far it is");
                return Ok(());
            }
        };
        let revision = self.same_cluster(answer.header)?;
        if revision < asked.told {
            return Err(self.another_history(revision));
        }
        received.proofs.push_back(Proof {
            revision,
            asked: asked.at,
        });
        if revision > received.reached.max(self.told) && received.behind.is_none() {
            received.behind = Some(Instant::now());
        }
        self.prove(received).await
    }

    async fn take(&mut self, response: WatchResponse, received: &mut Received) -> Result<(), End> {
        if response.compact_revision > 0 {
            return Err(End::Watch(StoreError::Compacted {
                wanted: self.told,
                oldest: response.compact_revision.cast_unsigned(),
            }));
        }
        if response.canceled {
            return Err(match response.cancel_reason {
                reason if reason.contains("permission denied") => End::Denied(reason),
                reason => End::Stream(format!("it has cancelled: {reason}"), Next::Other),
            });
        }
        self.denied = None;
        let named = self.same_cluster(response.header)?;
        let before = (received.reached, self.told);
        let is_progress = response.events.is_empty() && !response.created && !response.fragment;
        let mut events = std::mem::take(&mut received.pieces);
        events.extend(response.events);
        if response.fragment {
            // The last revision may have more in the next piece; what is before it is whole.
            let last = events.last().map_or(0, revision_of);
            received.pieces = events.split_off(events.partition_point(|e| revision_of(e) < last));
        }
        for batch in batches(events, self.told) {
            self.told = batch.revision;
            self.tell(WatchEvent::Batch(batch)).await?;
        }
        if is_progress && received.progress_is_proof {
            self.told = self.told.max(named);
        }
        received.reached = before.0.max(named).max(self.told);
        let wanted = received.proofs.back().map_or(0, |proof| proof.revision);
        if received.reached >= wanted {
            received.behind = None;
        } else if (received.reached, self.told) != before {
            received.behind = Some(Instant::now());
        }
        self.prove(received).await
    }

    /// Tells that all up to what the cluster has answered has been told.
    async fn prove(&mut self, received: &mut Received) -> Result<(), End> {
        let mut proven = None;
        while let Some(proof) = received.proofs.front().filter(|p| p.revision <= self.told) {
            proven = Some(*proof);
            received.proofs.pop_front();
        }
        let Some(proof) = proven else { return Ok(()) };
        self.tell(WatchEvent::Progress {
            revision: self.told,
            asked: proof.asked.into_std(),
        })
        .await
    }

    /// The revision that an answer names, if it is of the cluster that was spoken to before.
    fn same_cluster(&mut self, header: Option<Header>) -> Result<Revision, End> {
        let Some(header) = header else {
            return Err(End::Stream(
                "an answer has no header".to_owned(),
                Next::Other,
            ));
        };
        let revision = header.revision.cast_unsigned();
        if header.cluster != *self.cluster.get_or_insert(header.cluster) {
            return Err(self.another_history(revision));
        }
        Ok(revision)
    }

    /// What was told is not what etcd has: all must be read anew.
    fn another_history(&self, revision: Revision) -> End {
        End::Watch(StoreError::Compacted {
            wanted: self.told,
            oldest: revision,
        })
    }

    async fn tell(&self, event: WatchEvent) -> Result<(), End> {
        self.events.send(Ok(event)).await.map_err(|_| End::Closed)
    }
}

fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

/// Events, commit by commit, but for those already told.
fn batches(events: Vec<Event>, told: Revision) -> Vec<WatchBatch> {
    let mut batches: Vec<WatchBatch> = Vec::new();
    for event in events {
        let Some(kv) = event.kv else { continue };
        let revision = kv.mod_revision.cast_unsigned();
        if revision <= told {
            continue;
        }
        let Some(entry) = entry(kv) else { continue };
        let change = match event.kind {
            0 => Change::Put(entry),
            _ => Change::Delete { key: entry.key },
        };
        match batches.last_mut().filter(|b| b.revision == revision) {
            Some(batch) => batch.changes.push(change),
            None => batches.push(WatchBatch {
                revision,
                changes: vec![change],
            }),
        }
    }
    batches
}
