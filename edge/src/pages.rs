//! What the edge itself answers. Short, safe, and with the next step for whoever runs the app.

use std::future::poll_fn;
use std::task::Poll;

use bytes::Bytes;

use crate::gate::Refused;
use crate::h1::head::BadHead;
use crate::message::Length;
use crate::relay::{Client, Ended, Gone, Reply, ReplyFields};
use crate::site::NoSite;
use crate::timer::Timer;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Page {
    pub status: u16,
    pub body: String,
    pub location: Option<String>,
    /// Seconds after which trying again may help.
    pub retry_after: Option<u32>,
}

impl Page {
    pub fn new(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            body: body.into(),
            location: None,
            retry_after: None,
        }
    }

    /// 301 to the same place over https.
    pub fn redirect(location: String) -> Self {
        Self {
            location: Some(location),
            ..Self::new(301, "Moved to https.\n")
        }
    }

    /// Gives it to a client, within the timer.
    pub async fn send<C: Client>(
        self,
        client: &mut C,
        timer: &mut Timer,
        request_id: &str,
    ) -> Ended {
        let sent = self.begin(client, request_id);
        let flushed = poll_fn(|cx| match client.poll_flush(cx) {
            Poll::Pending => timer.poll(cx).map(|()| Err(Gone::Closed)),
            flushed => flushed,
        });
        match sent {
            Ok(()) if flushed.await.is_ok() => Ended::Whole,
            _ => Ended::Broken,
        }
    }

    fn begin<C: Client>(self, client: &mut C, request_id: &str) -> Result<(), Gone> {
        let retry_after = self.retry_after.map(|s| s.to_string());
        let mut fields = vec![
            ("content-type", "text/plain; charset=utf-8"),
            ("server", "tern"),
        ];
        if !request_id.is_empty() {
            fields.push(("fly-request-id", request_id));
        }
        fields.extend(self.location.as_deref().map(|to| ("location", to)));
        fields.extend(retry_after.as_deref().map(|s| ("retry-after", s)));
        let reply = Reply {
            status: self.status,
            reason: b"",
            fields: ReplyFields::Page(&fields),
            length: Length::Exact(self.body.len() as u64),
        };
        client.begin(&reply)?;
        if self.body.is_empty() {
            return Ok(());
        }
        client.give(Bytes::from(self.body), true)
    }
}

impl From<BadHead> for Page {
    fn from(bad: BadHead) -> Self {
        match bad {
            BadHead::TargetTooLong => Self::new(414, "The request's URL is longer than 64 KiB.\n"),
            BadHead::TooLarge => Self::new(
                431,
                "The request's head is larger than 64 KiB, or has more than 256 fields.\n",
            ),
            BadHead::Ambiguous => Self::new(400, "The request can be read in two ways.\n"),
            BadHead::UnknownCoding => {
                Self::new(501, "The request's transfer coding is not `chunked`.\n")
            }
            BadHead::Malformed => Self::new(400, "The request is not HTTP as RFC 9112 has it.\n"),
            BadHead::NoHost => Self::new(400, "The request names no host.\n"),
            BadHead::Connect => Self::new(405, "This is no forward proxy.\n"),
        }
    }
}

impl From<NoSite> for Page {
    fn from(none: NoSite) -> Self {
        match none {
            NoSite::UnknownHost => Self::new(404, "No app answers to this host name.\n"),
            NoSite::NoMachines(app) => Self {
                retry_after: Some(10),
                ..Self::new(
                    503,
                    format!("App {app} has no Machines yet; deploy it with `tern deploy`.\n"),
                )
            },
            NoSite::NoService(app) => Self::new(
                404,
                format!("App {app} has no HTTP service on this port.\n"),
            ),
        }
    }
}

impl From<&Refused> for Page {
    fn from(refused: &Refused) -> Self {
        // Reasons of a failed start are for the app's owner, who finds them in its events.
        let (status, body) = match refused {
            Refused::Nobody => (
                503,
                "No Machine of this app runs, and none may be started by a request.\n",
            ),
            Refused::AtCapacity => (503, "All Machines of this app are at their limit.\n"),
            Refused::NotStarted(_) => (
                503,
                "The app could not be started; see `tern logs` and `tern machine status`.\n",
            ),
        };
        Self {
            retry_after: Some(5),
            ..Self::new(status, body)
        }
    }
}
