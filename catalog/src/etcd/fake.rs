//! A member of etcd that says what a test wants.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::connection::{framed, next_message};
use super::messages::{
    AuthenticateResponse, Header, RangeResponse, StatusResponse, WatchRequest, WatchResponse,
};

/// Listens until it is dropped.
pub(super) struct Fake {
    pub(super) address: String,
    task: JoinHandle<()>,
}

/// What it is asked.
pub(super) struct Call {
    pub(super) method: String,
    pub(super) token: Option<String>,
}

/// What it answers.
pub(super) enum Reply {
    Answer(Bytes),
    Refused(u32, &'static str),
    Never,
    /// In parts of this length, each after this time.
    Slowly(Bytes, usize, Duration),
    /// It has not begun with it.
    NotBegun,
}

type Unary = dyn Fn(&Call) -> Reply + Send + Sync;
type Watch = dyn Fn(&Call, WatchRequest) -> Vec<WatchResponse> + Send + Sync;
type Frames = Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>>;

impl Fake {
    /// Answers calls by the one, and each message of a watch by the other.
    pub(super) async fn start(
        unary: impl Fn(&Call) -> Reply + Send + Sync + 'static,
        watch: impl Fn(&Call, WatchRequest) -> Vec<WatchResponse> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (unary, watch): (Arc<Unary>, Arc<Watch>) = (Arc::new(unary), Arc::new(watch));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (unary, watch) = (Arc::clone(&unary), Arc::clone(&watch));
                let service = service_fn(move |request| {
                    answer(Arc::clone(&unary), Arc::clone(&watch), request)
                });
                let connection = http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service);
                connections.spawn(async move { drop(connection.await) });
            }
        });
        Self { address, task }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reply {
    pub(super) fn answer(message: &impl Message) -> Self {
        Self::Answer(framed(message))
    }

    /// What a member that is well answers, as one of a cluster with this revision.
    pub(super) fn well(call: &Call, revision: i64) -> Self {
        match call.method.as_str() {
            "Auth/Authenticate" => Self::answer(&AuthenticateResponse {
                token: "token".to_owned(),
            }),
            "Maintenance/Status" => Self::answer(&StatusResponse {
                version: "3.5.20".to_owned(),
            }),
            "KV/Range" => Self::answer(&RangeResponse {
                header: header(revision),
                ..RangeResponse::default()
            }),
            other => panic!("{other} is not expected"),
        }
    }
}

pub(super) fn header(revision: i64) -> Option<Header> {
    Some(Header {
        cluster: 1,
        revision,
    })
}

async fn answer(
    unary: Arc<Unary>,
    watch: Arc<Watch>,
    request: Request<Incoming>,
) -> Result<Response<StreamBody<Frames>>, h2::Error> {
    let path = request.uri().path();
    let method = path.trim_start_matches("/etcdserverpb.").to_owned();
    let token = request.headers().get("token");
    let token = token.map(|t| t.to_str().unwrap().to_owned());
    let call = Call { method, token };
    let mut body = request.into_body();
    if call.method == "Watch/Watch" {
        let (send, queue) = mpsc::channel(64);
        tokio::spawn(async move {
            let mut read = BytesMut::new();
            while let Some(Ok(frame)) = body.frame().await {
                read.extend_from_slice(&frame.into_data().unwrap_or_default());
                while let Some(question) = next_message::<WatchRequest>(&mut read).unwrap() {
                    for response in watch(&call, question) {
                        if send.send(framed(&response)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        let frames = futures::stream::unfold(queue, async |mut queue| {
            let frame = queue.recv().await?;
            Some((Ok(Frame::data(frame)), queue))
        });
        return Ok(Response::new(StreamBody::new(Box::pin(frames))));
    }
    let _ = body.collect().await;
    let (message, part, pause) = match unary(&call) {
        Reply::Never => return std::future::pending().await,
        Reply::NotBegun => return Err(h2::Reason::REFUSED_STREAM.into()),
        Reply::Refused(code, text) => {
            let none: Frames = Box::pin(futures::stream::empty());
            let response = Response::builder()
                .header("grpc-status", code)
                .header("grpc-message", text)
                .body(StreamBody::new(none));
            return Ok(response.unwrap());
        }
        Reply::Answer(message) => (message, usize::MAX, Duration::ZERO),
        Reply::Slowly(message, part, pause) => (message, part, pause),
    };
    let parts: Vec<Bytes> = message
        .chunks(part.min(message.len()))
        .map(Bytes::copy_from_slice)
        .collect();
    let data = futures::stream::iter(parts).then(move |part| async move {
        tokio::time::sleep(pause).await;
        Ok(Frame::data(part))
    });
    let trailers = HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    let end = futures::stream::iter([Ok(Frame::trailers(trailers))]);
    Ok(Response::new(StreamBody::new(Box::pin(data.chain(end)))))
}
