//! Writes what was seen of a Machine into the catalog.
//!
//! The task hands over whole statuses and goes on; a status that is overtaken before it was written
//! is not written. Events are part of the status, so none is lost by that.

use std::time::Duration;

use jiff::Timestamp;
use tern_catalog::{
    Catalog, CheckStatus, Machine, MachineEvent, MachineId, MachineState, MachineStatus, Op,
    Record, Transaction,
};
use tokio::sync::watch;
use ulid::Generator;

use super::core::{Core, Event};

/// Makes statuses out of what the core says.
pub(crate) struct Recorder {
    out: watch::Sender<Option<Page>>,
    events: Vec<MachineEvent>,
    ids: Generator,
    writer: tokio::task::JoinHandle<()>,
}

/// What the catalog should hold.
#[derive(Debug, Clone)]
enum Page {
    Status(Box<MachineStatus>),
    Nothing,
}

impl Recorder {
    /// Goes on from what was last written.
    pub(crate) fn new(catalog: Catalog, id: MachineId, events: Vec<MachineEvent>) -> Self {
        let (out, pages) = watch::channel(None);
        let writer = tokio::spawn(write_all(catalog, id, pages));
        Self {
            out,
            events,
            ids: Generator::new(),
            writer,
        }
    }

    /// Records the state of things, with one more event if there is one.
    pub(crate) fn record(&mut self, core: &Core, event: Option<Event>, checks: Vec<CheckStatus>) {
        let now = Timestamp::now();
        if let Some(event) = event {
            tracing::info!(
                machine = %core.wanted().id, event = event.kind, state = %event.status,
                source = %event.source, detail = %event.detail, "event"
            );
            // The generator only fails after 2^80 ids in one millisecond.
            let id = self
                .ids
                .generate()
                .unwrap_or_else(|_| ulid::Ulid::generate());
            self.events.push(MachineEvent {
                id: id.to_string(),
                kind: event.kind.to_owned(),
                status: event.status,
                source: event.source.as_str().to_owned(),
                timestamp: now.as_millisecond(),
                request: event.detail,
            });
            let surplus = self.events.len().saturating_sub(MachineStatus::MAX_EVENTS);
            self.events.drain(..surplus);
        }
        let status = MachineStatus {
            id: core.wanted().id.clone(),
            state: core.state(),
            reason: core.reason().map(str::to_owned),
            generation: core.generation(),
            instance_id: core.instance().to_owned(),
            image_digest: core.digest().map(str::to_owned),
            events: self.events.clone(),
            checks: match core.state() {
                MachineState::Started | MachineState::Suspending | MachineState::Suspended => {
                    checks
                }
                _ => Vec::new(),
            },
            updated_at: now,
        };
        self.out.send_replace(Some(Page::Status(Box::new(status))));
    }

    /// Removes the Machine's records.
    pub(crate) fn forget(&mut self) {
        self.out.send_replace(Some(Page::Nothing));
    }

    /// Waits until all is written.
    pub(crate) async fn finish(self) {
        drop(self.out);
        if let Err(error) = self.writer.await {
            tracing::error!(%error, "a recorder has failed");
        }
    }
}

async fn write_all(catalog: Catalog, id: MachineId, mut pages: watch::Receiver<Option<Page>>) {
    let mut last_chances = LAST_CHANCES;
    while pages.changed().await.is_ok() {
        let mut wait = RETRY_FIRST;
        loop {
            let Some(page) = pages.borrow_and_update().clone() else {
                break;
            };
            let Err(error) = write(&catalog, &id, &page).await else {
                break;
            };
            tracing::warn!(machine = %id, %error, "a status cannot be written");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // A newer one is tried at once.
                changed = pages.changed() => if changed.is_err() {
                    // Nobody waits for a store for ever: the next agent finds things out anew.
                    last_chances -= 1;
                    if last_chances == 0 {
                        return;
                    }
                    tokio::time::sleep(wait).await;
                },
            }
            wait = (wait * 2).min(RETRY_MOST);
        }
    }
}

async fn write(
    catalog: &Catalog,
    id: &MachineId,
    page: &Page,
) -> Result<(), tern_catalog::CatalogError> {
    match page {
        Page::Status(status) => catalog.put(&**status).await.map(drop),
        Page::Nothing => {
            let keys = [
                Machine::key_of(id.as_str()),
                MachineStatus::key_of(id.as_str()),
            ];
            // Also where it lands late: no other Machine has this id.
            let ops = keys.map(|key| Op::Delete { key }).into();
            catalog.store().commit(Transaction::of(ops)).await?;
            Ok(())
        }
    }
}

/// Attempts to write what is left when the agent ends.
const LAST_CHANCES: u32 = 4;
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(10);
