//! A watch that outlives the members it is fed by.
//!
//! Each second the member is asked for progress; one that is silent for [`SILENCE`] is left and another
//! goes on from the revision that was told last. The watch is asked for from that revision itself and what
//! was told is dropped: etcd before 3.5.17 accepts a start at the compacted revision and then leaves out its
//! deletions, while one below it is refused on every version.
//!
//! Progress is proof that nothing is missing only with some versions. With others it is told once all up to
//! the revision that the member named has come, which needs an etcd that nobody else writes to.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::connection::{CallError, Connection, Stream};
use super::members::{ANSWER, Members};
use super::messages::{Empty, Event, WatchCommand, WatchCreate, WatchRequest, WatchResponse};
use super::{Keys, entry};
use crate::store::{Change, PROGRESS_EVERY, Revision, StoreError, Watch, WatchBatch, WatchEvent};

/// Longest that a member may say nothing though it is asked every second.
const SILENCE: Duration = Duration::from_secs(4);
/// Events ahead of the watcher; more stay with etcd.
const AHEAD: usize = 32;
/// Waits between two attempts to find a member, with jitter.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);
/// Progress below what was told, this often in a row, is no member that lags but one with another history.
const BEHIND: u32 = 3;

/// Feeds one watch.
pub(super) struct Feed {
    members: Arc<Members>,
    keys: Keys,
    /// All up to here has been told.
    told: Revision,
    events: mpsc::Sender<Result<WatchEvent, StoreError>>,
}

/// Why a stream ended.
enum End {
    /// Another member is to go on.
    Stream(String),
    /// The watch itself is over.
    Watch(StoreError),
    /// Nobody listens.
    Closed,
}

/// What has come over one stream.
struct Received {
    /// Events of responses that etcd has cut into pieces.
    pieces: Vec<Event>,
    /// What the member named last and has not been told yet.
    promised: Option<Revision>,
    behind: u32,
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
                End::Stream(why) => {
                    tracing::info!(why, "a watch goes on with another member of etcd")
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
            Err(error) => return End::Stream(error.to_string()),
        };
        let end = match self.open(&connection).await {
            Ok(stream) => self.follow(stream, connection.progress_is_proof).await,
            Err(CallError::Status(7, text)) => End::Watch(StoreError::Unavailable(text)),
            Err(error) => End::Stream(error.to_string()),
        };
        if let End::Stream(why) = &end {
            self.members.leave(&connection, why).await;
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

    async fn follow(&mut self, mut stream: Stream, progress_is_proof: bool) -> End {
        let mut ask = tokio::time::interval(PROGRESS_EVERY);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut received = Received {
            pieces: Vec::new(),
            promised: None,
            behind: 0,
        };
        let mut heard = Instant::now();
        loop {
            let response = tokio::select! {
                response = stream.next::<WatchResponse>() => response,
                _ = ask.tick() => {
                    let progress = WatchRequest { command: Some(WatchCommand::Progress(Empty {})) };
                    // One that does not fit waits behind others that were not sent either.
                    let _ = stream.send(&progress);
                    continue;
                }
                () = tokio::time::sleep_until(heard + SILENCE) => {
                    return End::Stream(format!("it has said nothing for {SILENCE:?}"));
                }
            };
            let told = match response {
                Ok(response) => self.take(response, &mut received, progress_is_proof).await,
                Err(error) => return End::Stream(error.to_string()),
            };
            if let Err(end) = told {
                return end;
            }
            // After the watcher has taken it: its slowness is not the member's.
            heard = Instant::now();
        }
    }

    async fn take(
        &mut self,
        response: WatchResponse,
        received: &mut Received,
        progress_is_proof: bool,
    ) -> Result<(), End> {
        if response.compact_revision > 0 {
            return Err(End::Watch(StoreError::Compacted {
                wanted: self.told,
                oldest: response.compact_revision.cast_unsigned(),
            }));
        }
        if response.canceled {
            return Err(match response.cancel_reason.as_str() {
                reason if reason.contains("permission denied") => {
                    End::Watch(StoreError::Unavailable(reason.to_owned()))
                }
                reason => End::Stream(format!("it has cancelled: {reason}")),
            });
        }
        let is_progress = response.events.is_empty() && !response.created && !response.fragment;
        received.pieces.extend(response.events);
        if response.fragment {
            return Ok(());
        }
        for batch in batches(std::mem::take(&mut received.pieces), self.told) {
            self.told = batch.revision;
            self.tell(WatchEvent::Batch(batch)).await?;
        }
        let named = response.header.map_or(0, |h| h.revision.cast_unsigned());
        if is_progress && named < self.told {
            received.behind += 1;
            if received.behind >= BEHIND {
                return Err(End::Watch(StoreError::Compacted {
                    wanted: self.told,
                    oldest: named,
                }));
            }
        } else if is_progress {
            received.behind = 0;
            if progress_is_proof {
                self.told = named;
            }
            received.promised = Some(named);
        }
        if received
            .promised
            .is_some_and(|promised| promised <= self.told)
        {
            received.promised = None;
            self.tell(WatchEvent::Progress(self.told)).await?;
        }
        Ok(())
    }

    async fn tell(&self, event: WatchEvent) -> Result<(), End> {
        self.events.send(Ok(event)).await.map_err(|_| End::Closed)
    }
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
