//! What the edge itself answers. Short, safe, and with the next step for whoever runs the app.

use bytes::Bytes;
use pingora_core::Result;
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use crate::gate::Refused;
use crate::headers::{BadHead, REQUEST_ID};
use crate::route::NoRoute;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Page {
    pub status: u16,
    pub body: String,
    pub location: Option<String>,
    /// Seconds after which trying again may help.
    pub retry_after: Option<u32>,
    /// The connection cannot be trusted to be in step any more.
    pub close: bool,
}

impl Page {
    pub fn new(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            body: body.into(),
            location: None,
            retry_after: None,
            close: false,
        }
    }

    /// 301 to the same place over https.
    pub fn redirect(location: String) -> Self {
        Self {
            location: Some(location),
            ..Self::new(301, "Moved to https.\n")
        }
    }

    pub async fn send(self, session: &mut Session, request_id: &str) -> Result<()> {
        let mut head = ResponseHeader::build(self.status, Some(6))?;
        head.insert_header("content-type", "text/plain; charset=utf-8")?;
        head.insert_header("content-length", self.body.len())?;
        head.insert_header("server", "tern")?;
        head.insert_header(REQUEST_ID, request_id)?;
        if let Some(location) = self.location {
            head.insert_header("location", location)?;
        }
        if let Some(seconds) = self.retry_after {
            head.insert_header("retry-after", seconds)?;
        }
        if self.close {
            session.set_keepalive(None);
        }
        let is_head = session.req_header().method == http::Method::HEAD;
        session
            .write_response_header(Box::new(head), is_head || self.body.is_empty())
            .await?;
        if !is_head && !self.body.is_empty() {
            session
                .write_response_body(Some(Bytes::from(self.body)), true)
                .await?;
        }
        Ok(())
    }
}

impl From<BadHead> for Page {
    fn from(bad: BadHead) -> Self {
        let page = match bad {
            BadHead::TooLarge => Self::new(431, "The request's head is larger than 64 KiB.\n"),
            BadHead::Ambiguous => Self::new(400, "The request can be read in two ways.\n"),
        };
        Self {
            close: true,
            ..page
        }
    }
}

impl From<NoRoute> for Page {
    fn from(none: NoRoute) -> Self {
        match none {
            NoRoute::UnknownHost => Self::new(404, "No app answers to this host name.\n"),
            NoRoute::NoMachines(app) => Self {
                retry_after: Some(10),
                ..Self::new(
                    503,
                    format!("App {app} has no Machines yet; deploy it with `tern deploy`.\n"),
                )
            },
            NoRoute::NoService(app) => Self::new(
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
