//! One request's tries.

use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use http::Version;
use jiff::{SignedDuration, Timestamp};
use tern_catalog::{ChallengeKind, MachineId, ServiceProtocol};

use super::pool::{self, Key};
use super::pump::{Failure, Pump};
use super::sides::{App, Client, Gone, Lost};
use crate::access::{self, AccessLog};
use crate::entrance::{self, Entrance};
use crate::gate::{Admission, is_shortage};
use crate::headers::Facts;
use crate::message::RequestHead;
use crate::pages::Page;
use crate::site::{self, Site};
use crate::timer::Timer;
use crate::worker::Worker;

/// What is known of a client's connection.
pub struct Connection {
    /// The client's address, as apps are told.
    client: String,
    entrance: Entrance,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its client was given a whole reply.
    Whole,
    /// It was not, and may have to be told so.
    Broken,
}

/// RFC 8555 section 8.3.
const HTTP_01: &[u8] = b"/.well-known/acme-challenge/";
/// Connections tried for one request before it is given up.
const MAX_CONNECTS: u32 = 4;
/// Longest a page may take to be written.
const PAGE: Duration = Duration::from_secs(30);

impl Connection {
    pub fn new(client: IpAddr, entrance: Entrance) -> Self {
        let client = client.to_canonical().to_string();
        Self { client, entrance }
    }
}

/// Serves one request, whose head has been read: with an app's reply, or a page of the edge's own.
pub async fn exchange<C: Client>(
    worker: &Worker,
    connection: &Connection,
    client: &mut C,
    timer: &mut Timer,
    head: &RequestHead,
) -> Ended {
    let request_id = worker.request_id();
    let facts = Facts {
        client: &connection.client,
        entrance: connection.entrance,
        region: &worker.region,
        request_id: &request_id,
        version: head.version,
        alt_svc: worker.alt_svc(connection.entrance, head.version),
    };
    let site = route(worker, connection.entrance, head);
    let mut record = Record {
        worker,
        head,
        facts: &facts,
        site: site.as_ref().ok().map(|site| &**site),
        begun: Instant::now(),
        tally: Tally::default(),
        outcome: (Ended::Broken, 0),
    };
    record.outcome = match &site {
        Ok(site) => {
            let mut request = Attempts {
                worker,
                client,
                timer,
                head,
                site,
                facts: &facts,
                tally: &mut record.tally,
                connects: 0,
                replayed: false,
            };
            request.run().await
        }
        Err(page) => {
            worker.metrics.refused.add();
            timer.set(PAGE);
            let status = page.status;
            let request = Some((head, request_id.as_str()));
            (page.clone().send(client, timer, request).await, status)
        }
    };
    record.outcome.0
}

/// A request's entry in metrics and logs, made however it ends: its connection may end first, and takes it along.
struct Record<'a> {
    worker: &'a Worker,
    head: &'a RequestHead,
    facts: &'a Facts<'a>,
    site: Option<&'a Site>,
    begun: Instant,
    tally: Tally,
    outcome: (Ended, u16),
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let (took, (ended, status)) = (self.begun.elapsed(), self.outcome);
        if let Some(site) = self.site {
            let (received, sent) = (self.tally.received, self.tally.sent);
            site.metrics.ended(status, received, sent, took);
        }
        if let Some(log) = self.worker.access.as_ref().filter(|log| log.takes()) {
            self.tally
                .write(log, self.head, self.site, self.facts, took, self.outcome);
        }
        tracing::debug!(
            method = %self.head.method,
            target = %String::from_utf8_lossy(&self.head.target),
            status,
            request = self.facts.request_id,
            ?ended,
            "request"
        );
    }
}

/// What is told of a request when it is over.
#[derive(Debug, Default)]
struct Tally {
    /// The Machine that had it last.
    machine: Option<MachineId>,
    /// For places at Machines.
    waited: Duration,
    /// From when the app was sent the request to its head.
    app: Option<Duration>,
    /// Bytes of content, both ways.
    received: u64,
    sent: u64,
}

impl Tally {
    fn write(
        &self,
        log: &AccessLog,
        head: &RequestHead,
        site: Option<&Site>,
        facts: &Facts<'_>,
        took: Duration,
        (ended, status): (Ended, u16),
    ) {
        let millis = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        let first = |name| head.fields.all(name).next();
        let agent = first("user-agent").map(access::shortened);
        let begun = Timestamp::now() - SignedDuration::try_from(took).unwrap_or_default();
        log.give(&access::Line {
            time: format!("{begun:.3}"),
            request_id: facts.request_id,
            client: facts.client,
            host: &access::shortened(&head.authority),
            app: site.map(|site| site.app.as_str()),
            machine: self.machine.as_ref().map(MachineId::as_str),
            method: head.method.as_str(),
            path: &access::shortened(&head.target),
            protocol: match head.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_11 => "HTTP/1.1",
                Version::HTTP_2 => "HTTP/2",
                _ => "HTTP/3",
            },
            port: facts.entrance.port,
            tls: facts.entrance.tls,
            status,
            received: self.received,
            sent: self.sent,
            duration_ms: millis(took),
            waited_ms: millis(self.waited),
            app_ms: self.app.map(millis),
            whole: ended == Ended::Whole,
            user_agent: agent.as_deref(),
            trace_id: first("traceparent").and_then(access::trace_id),
        });
    }
}

/// Where a request goes, or what it is answered instead.
fn route(worker: &Worker, entrance: Entrance, head: &RequestHead) -> Result<Rc<Site>, Page> {
    let snapshot = worker.view.snapshot();
    if entrance.port == entrance::HTTP
        && !entrance.tls
        && let Some(token) = head.target.strip_prefix(HTTP_01)
    {
        return Err(challenge(&snapshot, head, token));
    }
    let site = worker.sites().find(&snapshot, &head.authority, entrance)?;
    if site.force_https {
        let target = String::from_utf8_lossy(&head.target);
        let path = if target.starts_with('/') {
            &target
        } else {
            "/"
        };
        return Err(Page::redirect(format!("https://{}{path}", site.hostname)));
    }
    Ok(site)
}

fn challenge(snapshot: &tern_catalog::Snapshot, head: &RequestHead, token: &[u8]) -> Page {
    let name = std::str::from_utf8(&head.authority).ok();
    let found = name.and_then(site::hostname).and_then(|hostname| {
        let key = format!("{hostname}/{}", ChallengeKind::Http01.as_str());
        let challenge = snapshot.challenges.get(&key)?;
        (challenge.token.as_bytes() == token).then(|| challenge.key_authorization.clone())
    });
    found.map_or_else(
        || Page::new(404, "There is no such challenge.\n"),
        |key| Page::new(200, key),
    )
}

struct Attempts<'a, C> {
    worker: &'a Worker,
    client: &'a mut C,
    timer: &'a mut Timer,
    head: &'a RequestHead,
    site: &'a Site,
    facts: &'a Facts<'a>,
    tally: &'a mut Tally,
    connects: u32,
    /// It was lost with a Machine once, and sent again.
    replayed: bool,
}

/// What one try came to.
enum Tried {
    Ended(Ended, u16),
    Again,
    Page(Page),
}

impl<C: Client> Attempts<'_, C> {
    async fn run(&mut self) -> (Ended, u16) {
        loop {
            match self.once().await {
                Tried::Ended(ended, status) => return (ended, status),
                Tried::Again => {}
                Tried::Page(page) => {
                    self.timer.set(PAGE);
                    let status = page.status;
                    let request = Some((self.head, self.facts.request_id));
                    let sent = page.send(self.client, self.timer, request);
                    return (sent.await, status);
                }
            }
        }
    }

    async fn once(&mut self) -> Tried {
        let begun = Instant::now();
        let admitted = self.admit().await;
        self.tally.waited += begun.elapsed();
        let mut admission = match admitted {
            Ok(admission) => admission,
            Err(tried) => return tried,
        };
        if self.worker.access.is_some() {
            self.tally.machine = Some(MachineId::clone(&admission.machine));
        }
        let (app, reused) = match self.connect(&mut admission).await {
            Ok(app) => app,
            Err(error) => {
                // What this host has too little of says nothing of the Machine.
                if is_shortage(&error) {
                    tracing::error!(%error, "no more connections to apps can be made");
                    return Tried::Page(Page::new(503, "The edge has no connection left.\n"));
                }
                // Nothing was sent yet: trying again is safe whatever the method.
                self.connects += 1;
                tracing::debug!(machine = %admission.machine, %error, "no connection to the app");
                if self.connects < MAX_CONNECTS {
                    return Tried::Again;
                }
                return Tried::Page(unreachable(&error));
            }
        };
        let key = key(&admission);
        let (outcome, status, app) = self.relay(app).await;
        match outcome {
            Ok(()) => {
                if let App::H1(app) = app {
                    self.worker.pool().put(key, app);
                }
                Tried::Ended(Ended::Whole, status)
            }
            Err(failure) => {
                if reused && matches!(failure, Failure::App(Lost::Connection(_))) {
                    // Others of that time are likely to be lost too.
                    self.worker.pool().forget(&key);
                }
                drop(admission);
                self.failed(failure, status, app.is_silent()).await
            }
        }
    }

    /// A place at a Machine, unless the client goes away first.
    async fn admit(&mut self) -> Result<Admission, Tried> {
        let admitted = self.worker.gate.admit(
            &self.site.app,
            self.site.internal_port,
            ServiceProtocol::Tcp,
        );
        tokio::pin!(admitted);
        let client = &mut *self.client;
        let mut waited = false;
        let admitted = poll_fn(|cx| {
            // Whoever has gone while it waited does not reach the app. Who need not wait is not asked: it costs a read.
            if waited && client.poll_gone(cx).is_ready() {
                return Poll::Ready(None);
            }
            if let Poll::Ready(admitted) = admitted.as_mut().poll(cx) {
                return Poll::Ready(Some(admitted));
            }
            if !waited {
                waited = true;
                return client.poll_gone(cx).map(|_| None);
            }
            Poll::Pending
        });
        match admitted.await {
            Some(Ok(admission)) => Ok(admission),
            Some(Err(refused)) => Err(Tried::Page(Page::from(&refused))),
            None => Err(Tried::Ended(Ended::Broken, 0)),
        }
    }

    /// A connection to the app, and whether it was used before.
    async fn connect(&self, place: &mut Admission) -> std::io::Result<(App, bool)> {
        // An upgrade is HTTP/1.1's, whatever else the app speaks.
        if self.site.h2_backend && self.head.upgrade.is_none() {
            let pool = self.worker.shared_pool();
            return match pool::h2(pool, key(place), place).await {
                // It had ended since: the next try makes a new one.
                Err(_) if self.connects == 0 => pool::h2(pool, key(place), place).await,
                app => app,
            };
        }
        let idle = self.worker.pool().take(&key(place));
        match idle {
            Some(app) => Ok((App::H1(app), true)),
            None => Ok((pool::h1(place).await?, false)),
        }
    }

    async fn relay(&mut self, mut app: App) -> (Result<(), Failure>, u16, App) {
        if let Err(lost) = app.begin(self.head, self.facts) {
            return (Err(Failure::App(lost)), 0, app);
        }
        let mut pump = Pump::new(
            self.client,
            &mut app,
            self.head,
            self.site,
            self.facts,
            &self.worker.metrics,
        );
        let begun = Instant::now();
        let timer = &mut *self.timer;
        let outcome = poll_fn(|cx| pump.poll(cx, timer)).await;
        let status = pump.status();
        let (up, down, answered) = pump.moved();
        self.tally.received += up;
        self.tally.sent += down;
        self.tally.app = answered.map(|at| at - begun);
        (outcome, status, app)
    }

    /// What a failure means to the client.
    async fn failed(&mut self, failure: Failure, status: u16, silent: bool) -> Tried {
        tracing::debug!(
            request = self.facts.request_id,
            ?failure,
            status,
            "not relayed to its end"
        );
        if status > 0 {
            if matches!(failure, Failure::App(_)) {
                // What there is of the reply is the client's.
                self.timer.set(PAGE);
                let (client, timer) = (&mut *self.client, &mut *self.timer);
                poll_fn(|cx| match client.poll_flush(cx) {
                    Poll::Pending => timer.poll(cx),
                    Poll::Ready(_) => Poll::Ready(()),
                })
                .await;
            }
            return Tried::Ended(Ended::Broken, status);
        }
        Tried::Page(match failure {
            Failure::Client(Gone::Closed) => return Tried::Ended(Ended::Broken, 0),
            Failure::Client(Gone::Malformed) => {
                Page::new(400, "The request's content is not as its head says.\n")
            }
            // It may be sent again without asking (RFC 9110 section 9.2.2), and there is no content to send anew.
            Failure::App(Lost::Connection(_))
                if silent && !self.replayed && self.head.is_repeatable() =>
            {
                self.replayed = true;
                self.worker.metrics.replayed.add();
                return Tried::Again;
            }
            // Nothing was done with it (RFC 9113 section 8.7).
            Failure::App(Lost::Refused) if !self.replayed && self.head.has_no_content() => {
                self.replayed = true;
                self.worker.metrics.replayed.add();
                return Tried::Again;
            }
            Failure::App(Lost::Connection(_) | Lost::Refused | Lost::Reset) => {
                Page::new(502, "The app closed the connection without an answer.\n")
            }
            Failure::App(Lost::Reply(what)) => Page::new(
                502,
                format!("The app's reply cannot be passed on: {what}.\n"),
            ),
            Failure::Idle { of_client: false } => {
                Page::new(504, "The app did not answer in time.\n")
            }
            Failure::Idle { of_client: true } => {
                Page::new(408, "The request's content did not come in time.\n")
            }
        })
    }
}

fn key(place: &Admission) -> Key {
    Key {
        address: place.address,
        epoch: place.epoch,
    }
}

fn unreachable(error: &std::io::Error) -> Page {
    if error.kind() == std::io::ErrorKind::TimedOut {
        return Page::new(504, "The app did not answer in time.\n");
    }
    Page::new(502, "The app accepts no connections.\n")
}

/// Whether replies of this version may say where HTTP/3 is to be had: beside HTTPS's own port, and HTTP/3 itself
/// need not.
pub fn tells_of_h3(entrance: Entrance, version: Version) -> bool {
    entrance.tls && entrance.port == entrance::HTTPS && version != Version::HTTP_3
}
