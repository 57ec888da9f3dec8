//! A request's way: checked, routed, admitted, proxied (pingora's phases in this order).

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::protocols::TcpKeepalive;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};
use tern_catalog::{ChallengeKind, Hostname, View};

use crate::gate::{Admission, Gate};
use crate::headers;
use crate::listen;
use crate::metrics::Metrics;
use crate::pages::Page;
use crate::route::{self, Entrance, Route};

/// The proxy of one entrance.
pub struct Ingress {
    pub view: View,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub region: String,
    pub entrance: Entrance,
}

/// What is known of one request.
pub struct Ctx {
    id: String,
    route: Option<Route>,
    /// The place at a Machine, held until the reply has been sent.
    admission: Option<Admission>,
    /// What to answer when it goes wrong.
    failure: Option<Page>,
    connects: u32,
    /// Whether it was lost with a Machine once, and sent again.
    replayed: bool,
}

/// RFC 8555 section 8.3.
const HTTP_01: &str = "/.well-known/acme-challenge/";
/// A Machine that runs answers a connection at once.
const CONNECT: Duration = Duration::from_secs(2);
/// Idle connections to Machines are kept this long.
const KEEP: Duration = Duration::from_secs(30);
/// A Machine that ends with requests under way says nothing: its kernel is gone, and nobody speaks for its
/// address until it runs again. Probes find that out, or meet the new kernel, which resets them.
const PROBES: TcpKeepalive = TcpKeepalive {
    idle: Duration::from_secs(5),
    interval: Duration::from_secs(1),
    count: 5,
    user_timeout: Duration::ZERO,
};
/// Connections tried for one request before it is given up.
const MAX_CONNECTS: u32 = 4;

#[async_trait]
impl ProxyHttp for Ingress {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        let id = hex::encode(rand::random::<[u8; 13]>());
        Ctx {
            id,
            route: None,
            admission: None,
            failure: None,
            connects: 0,
            replayed: false,
        }
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> Result<bool> {
        listen::head_is_read();
        match self.route(session.req_header()) {
            Ok(route) => {
                ctx.route = Some(route);
                Ok(false)
            }
            Err(page) => {
                self.metrics.refused.add();
                page.send(session, &ctx.id).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Ctx) -> Result<Box<HttpPeer>> {
        let refuse = |page: Page| Error::explain(ErrorType::HTTPStatus(page.status), page.body);
        let Some(route) = &ctx.route else {
            return Err(refuse(Page::new(500, "The request was not routed.\n")));
        };
        // A place of an attempt that failed is given back first.
        ctx.admission = None;
        let _ = session;
        let admission = match self.gate.admit(&route.app, route.internal_port).await {
            Ok(admission) => admission,
            Err(refused) => {
                let page = Page::from(&refused);
                ctx.failure = Some(page.clone());
                return Err(refuse(page));
            }
        };
        let mut peer = HttpPeer::new(admission.address, false, String::new());
        peer.group_key = admission.epoch;
        peer.options.connection_timeout = Some(CONNECT);
        peer.options.idle_timeout = Some(KEEP);
        peer.options.tcp_keepalive = Some(PROBES);
        if route.h2_backend {
            peer.options.set_http_version(2, 2);
        }
        ctx.admission = Some(admission);
        Ok(Box::new(peer))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        upstream: &mut RequestHeader,
        ctx: &mut Ctx,
    ) -> Result<()> {
        let client = session
            .client_addr()
            .and_then(|a| a.as_inet())
            .map(|a| a.ip());
        let version = session.req_header().version;
        let set = headers::for_app(
            &session.req_header().headers,
            client,
            self.entrance,
            &self.region,
            version,
            &ctx.id,
        );
        for name in headers::of_this_hop(&session.req_header().headers) {
            upstream.remove_header(&name);
        }
        for (name, value) in set {
            upstream.insert_header(name, value)?;
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> Result<()> {
        self.metrics.proxied.add();
        let options = ctx.route.as_ref().and_then(|r| r.options.response.as_ref());
        for (name, value) in headers::for_client(
            &response.headers,
            options,
            session.req_header().version,
            &ctx.id,
        ) {
            match value {
                Some(value) => response.insert_header(name, value)?,
                None => drop(response.remove_header(&name)),
            }
        }
        Ok(())
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        ctx: &mut Ctx,
        mut error: Box<Error>,
    ) -> Box<Error> {
        if let Some(admission) = &ctx.admission {
            self.gate.doubt(&admission.machine);
        }
        // Nothing was sent yet: trying again is safe whatever the method.
        ctx.connects += 1;
        error.set_retry(ctx.connects < MAX_CONNECTS);
        error
    }

    /// A request that was lost with its connection is sent again, once, if that may be done without asking
    /// (RFC 9110, section 9.2.2) and can be: the client has seen nothing of a reply, its body is at hand.
    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        ctx: &mut Ctx,
        reused: bool,
    ) -> Box<Error> {
        let repeatable = session.req_header().method.is_idempotent()
            && session.response_written().is_none()
            && !session.as_ref().retry_buffer_truncated();
        let lost = error.esource() == &ErrorSource::Upstream
            && matches!(
                error.etype(),
                ErrorType::ReadError | ErrorType::WriteError | ErrorType::ConnectionClosed
            );
        if !repeatable {
            error.set_retry(false);
        } else if lost && !ctx.replayed {
            ctx.replayed = true;
            self.metrics.replayed.add();
            error.set_retry(true);
        } else {
            error.retry.decide_reuse(reused);
        }
        error
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        ctx: &mut Ctx,
    ) -> FailToProxy {
        let page = ctx.failure.take().or_else(|| page_of(error));
        let code = page.as_ref().map_or(0, |p| p.status);
        if let Some(page) = page {
            let started = session.response_written().is_some();
            let page = Page {
                close: true,
                ..page
            };
            if started || page.send(session, &ctx.id).await.is_err() {
                tracing::debug!(request = ctx.id, "the client could not be told");
            }
        }
        FailToProxy {
            error_code: code,
            can_reuse_downstream: false,
        }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Ctx) {
        listen::request_is_done();
        let status = session.response_written().map_or(0, |r| r.status.as_u16());
        let head = session.req_header();
        let machine = ctx
            .admission
            .as_ref()
            .map(|a| a.machine.as_str())
            .unwrap_or_default();
        let error = error.map(ToString::to_string);
        tracing::debug!(method = %head.method, path = head.uri.path(), status, machine, request = ctx.id, error, "request");
    }

    fn suppress_error_log(&self, _: &Session, _: &Ctx, _: &Error) -> bool {
        // `logging` tells of every request, failed ones included; clients that go away are no errors.
        true
    }
}

impl Ingress {
    /// Where a request goes, or what it is answered instead.
    fn route(&self, head: &RequestHeader) -> Result<Route, Page> {
        headers::check(head.raw_path().len(), &head.headers)?;
        let authority = head.uri.authority().map(|a| a.as_str());
        let host = head
            .headers
            .get(http::header::HOST)
            .and_then(|h| h.to_str().ok());
        let authority = authority.or(host).ok_or_else(|| Page {
            close: true,
            ..Page::new(400, "The request names no host.\n")
        })?;
        let Some(hostname) = route::hostname(authority) else {
            return Err(Page::from(route::NoRoute::UnknownHost));
        };
        let snapshot = self.view.snapshot();
        if self.entrance == Entrance::Http
            && let Some(token) = head.uri.path().strip_prefix(HTTP_01)
        {
            return Err(self.challenge(&hostname, token));
        }
        let route = route::find(&snapshot, &hostname, self.entrance)?;
        if route.force_https {
            let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
            return Err(Page::redirect(format!("https://{hostname}{path}")));
        }
        Ok(route)
    }

    fn challenge(&self, hostname: &Hostname, token: &str) -> Page {
        let key = format!("{hostname}/{}", ChallengeKind::Http01.as_str());
        match self
            .view
            .snapshot()
            .challenges
            .get(&key)
            .filter(|c| c.token == token)
        {
            Some(challenge) => Page::new(200, challenge.key_authorization.clone()),
            None => Page::new(404, "There is no such challenge.\n"),
        }
    }
}

/// What a failure of the proxy means to the client; nothing where it has gone.
fn page_of(error: &Error) -> Option<Page> {
    match (error.etype(), error.esource()) {
        (ErrorType::HTTPStatus(status), _) => Some(Page::new(*status, "")),
        (ErrorType::ReadTimedout | ErrorType::ConnectTimedout, ErrorSource::Upstream) => {
            Some(Page::new(504, "The app did not answer in time.\n"))
        }
        (_, ErrorSource::Upstream) => Some(Page::new(
            502,
            "The app closed the connection without an answer.\n",
        )),
        (
            ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed,
            ErrorSource::Downstream,
        ) => None,
        (_, ErrorSource::Downstream) => Some(Page::new(400, "The request is not right.\n")),
        _ => Some(Page::new(500, "The edge failed.\n")),
    }
}
