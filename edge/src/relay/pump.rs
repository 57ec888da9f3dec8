//! Both directions of one request at once, with back-pressure: nothing is taken from one side that the other
//! has no room for.

use std::task::{Context, Poll, ready};
use std::time::Instant;

use super::sides::{App, Client, Gone, Lost, Reply, ReplyFields};
use crate::headers::Facts;
use crate::message::{Length, Piece, ReplyHead, RequestHead, Upgrade};
use crate::metrics::Metrics;
use crate::site::Site;
use crate::timer::Timer;

/// Interim replies of one app to one request. A few are usual; more is a loop.
const MAX_INTERIM: u32 = 32;

/// One request between its client and its app.
pub struct Pump<'a, C> {
    pub client: &'a mut C,
    pub app: &'a mut App,
    pub head: &'a RequestHead,
    pub site: &'a Site,
    pub facts: &'a Facts<'a>,
    pub metrics: &'a Metrics,
    up: Up,
    down: Down,
    interim: u32,
    /// The status that the client was given; 0 before.
    status: u16,
    /// Bytes of content that the app and the client were given.
    up_bytes: u64,
    down_bytes: u64,
    /// When the app's final head was there.
    answered: Option<Instant>,
    /// Something moved since this was last asked.
    moved: bool,
}

/// The request's content, on its way to the app.
#[derive(Debug)]
enum Up {
    Content,
    Flush,
    Done,
    /// The app takes no more of it. It may have answered all the same.
    Refused,
}

/// The reply, on its way to the client.
#[derive(Debug, PartialEq, Eq)]
enum Down {
    Head,
    Content,
    Flush,
    Done,
}

/// Why a request did not end well.
#[derive(Debug)]
pub enum Failure {
    Client(Gone),
    App(Lost),
    /// Nothing moved for the service's idle time; whether it was the client's turn.
    Idle {
        of_client: bool,
    },
}

impl<'a, C: Client> Pump<'a, C> {
    /// For a request whose head was given to `app`.
    pub fn new(
        client: &'a mut C,
        app: &'a mut App,
        head: &'a RequestHead,
        site: &'a Site,
        facts: &'a Facts<'a>,
        metrics: &'a Metrics,
    ) -> Self {
        let no_content = matches!(head.length, Length::None | Length::Exact(0));
        Self {
            client,
            app,
            head,
            site,
            facts,
            metrics,
            up: if no_content { Up::Flush } else { Up::Content },
            down: Down::Head,
            interim: 0,
            status: 0,
            up_bytes: 0,
            down_bytes: 0,
            answered: None,
            moved: true,
        }
    }

    /// The status that the client was given; 0 if none.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Bytes of content that the app and the client were given, and when the app's head was there.
    pub fn moved(&self) -> (u64, u64, Option<Instant>) {
        (self.up_bytes, self.down_bytes, self.answered)
    }

    /// Runs until the reply is with the client, and in a tunnel until both directions have ended.
    pub fn poll(&mut self, cx: &mut Context<'_>, timer: &mut Timer) -> Poll<Result<(), Failure>> {
        loop {
            let status = self.status;
            let _ = self.poll_up(cx)?;
            let down = self.poll_down(cx)?;
            let tunnels = self.status == 101;
            if down.is_ready() && (!tunnels || matches!(self.up, Up::Done | Up::Refused)) {
                return Poll::Ready(Ok(()));
            }
            // A tunnel has begun: the client's direction starts anew.
            if tunnels && status != 101 {
                continue;
            }
            // Content that waits for room keeps the client from being read, so look whether it is there.
            let unread = !matches!(self.up, Up::Content) || self.app.poll_room(cx).is_pending();
            if unread && let Poll::Ready(gone) = self.client.poll_gone(cx) {
                return Poll::Ready(Err(Failure::Client(gone)));
            }
            if std::mem::take(&mut self.moved) {
                timer.set(self.site.idle_timeout);
            }
            ready!(timer.poll(cx));
            let wants_content = matches!(self.up, Up::Content) && self.app.poll_room(cx).is_ready();
            return Poll::Ready(Err(Failure::Idle {
                of_client: wants_content,
            }));
        }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        loop {
            match self.up {
                Up::Content => {
                    match self.app.poll_room(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(_)) => {
                            self.up = Up::Refused;
                            continue;
                        }
                        Poll::Pending => return Poll::Pending,
                    }
                    let given = match self.client.poll_content(cx) {
                        Poll::Ready(Ok(Piece::Data(data, last))) => {
                            self.up = if last { Up::Flush } else { Up::Content };
                            self.up_bytes += data.len() as u64;
                            self.app.give(data, last)
                        }
                        Poll::Ready(Ok(Piece::End(trailers))) => {
                            self.up = Up::Flush;
                            self.app.finish(trailers)
                        }
                        Poll::Ready(Err(gone)) => return Poll::Ready(Err(Failure::Client(gone))),
                        Poll::Pending => {
                            if let Poll::Ready(Err(_)) = self.app.poll_flush(cx) {
                                self.up = Up::Refused;
                            }
                            return Poll::Pending;
                        }
                    };
                    self.moved = true;
                    if given.is_err() {
                        self.up = Up::Refused;
                    }
                }
                Up::Flush => {
                    self.up = match ready!(self.app.poll_flush(cx)) {
                        Ok(()) => Up::Done,
                        Err(_) => Up::Refused,
                    };
                    self.moved = true;
                }
                Up::Done | Up::Refused => return Poll::Ready(Ok(())),
            }
        }
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        loop {
            match self.down {
                Down::Head => {
                    let head = match self.app.poll_head(cx) {
                        Poll::Ready(head) => head.map_err(Failure::App)?,
                        Poll::Pending => {
                            // An interim reply may still be on its way.
                            if self.interim > 0 {
                                let _ = self.client.poll_flush(cx).map_err(Failure::Client)?;
                            }
                            return Poll::Pending;
                        }
                    };
                    self.moved = true;
                    self.begin(&head)?;
                }
                Down::Content => {
                    ready!(self.client.poll_room(cx)).map_err(Failure::Client)?;
                    match self.app.poll_content(cx) {
                        Poll::Ready(Ok(Piece::Data(data, last))) => {
                            self.down_bytes += data.len() as u64;
                            self.client.give(data, last).map_err(Failure::Client)?;
                            if last {
                                self.down = Down::Flush;
                            }
                        }
                        Poll::Ready(Ok(Piece::End(trailers))) => {
                            self.client.finish(trailers).map_err(Failure::Client)?;
                            self.down = Down::Flush;
                        }
                        Poll::Ready(Err(lost)) => return Poll::Ready(Err(Failure::App(lost))),
                        Poll::Pending => {
                            let _ = self.client.poll_flush(cx).map_err(Failure::Client)?;
                            return Poll::Pending;
                        }
                    }
                    self.moved = true;
                }
                Down::Flush => {
                    ready!(self.client.poll_flush(cx)).map_err(Failure::Client)?;
                    self.moved = true;
                    self.down = Down::Done;
                }
                Down::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    fn begin(&mut self, head: &ReplyHead) -> Result<(), Failure> {
        let reply = Reply {
            status: head.status,
            reason: &head.reason,
            fields: ReplyFields::App {
                head,
                changes: &self.site.changes,
                facts: self.facts,
            },
            length: head.length,
        };
        if reply.is_interim() {
            self.interim += 1;
            if self.interim > MAX_INTERIM {
                return Err(Failure::App(Lost::Reply("it has too many interim heads")));
            }
            if self.client.takes_interim() {
                self.client.begin(&reply).map_err(Failure::Client)?;
            }
            return Ok(());
        }
        if head.status == 101 && self.head.upgrade.is_none() {
            return Err(Failure::App(Lost::Reply("it changes protocols unasked")));
        }
        if head.status != 101
            && matches!(self.head.upgrade, Some(Upgrade::Connect(_)))
            && head.status < 300
        {
            return Err(Failure::App(Lost::Reply(
                "it does not change protocols, and says all is well",
            )));
        }
        self.metrics.proxied.add();
        self.answered = Some(Instant::now());
        self.client.begin(&reply).map_err(Failure::Client)?;
        self.status = head.status;
        self.down = if reply.ends_here() {
            Down::Flush
        } else {
            Down::Content
        };
        if head.status == 101 {
            self.app.tunnel();
            self.up = Up::Content;
        }
        Ok(())
    }
}
