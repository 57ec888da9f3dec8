//! An HTTP/2 client that keeps to the rules, over TLS.

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::ext::Protocol;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::client::{Answer, PATIENCE, tls_with};
use crate::world::{HOST, World};

/// A connection.
pub struct H2 {
    sender: SendRequest<Bytes>,
    _connection: JoinSet<()>,
}

impl H2 {
    pub async fn new(world: &World) -> Self {
        let stream = tls_with(world, b"h2").await;
        let (sender, mut connection) = h2::client::handshake(stream).await.unwrap();
        // The first frame of the other side says what may be asked for.
        let settled = std::future::poll_fn(|cx| {
            use std::task::Poll;
            if let Poll::Ready(ended) = std::pin::Pin::new(&mut connection).poll(cx) {
                panic!("{ended:?}");
            }
            if sender.is_extended_connect_protocol_enabled() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        timeout(PATIENCE, settled).await.unwrap();
        let mut running = JoinSet::new();
        running.spawn(async move {
            let _ = connection.await;
        });
        Self {
            sender,
            _connection: running,
        }
    }

    /// Begins a stream.
    pub async fn begin(
        &self,
        request: http::request::Builder,
        ends: bool,
    ) -> (ResponseFuture, SendStream<Bytes>) {
        let mut sender = self.sender.clone().ready().await.unwrap();
        sender
            .send_request(request.body(()).unwrap(), ends)
            .unwrap()
    }

    pub async fn get(&self, path: &str, nonce: &str) -> Answer {
        self.try_get(path, nonce).await.unwrap()
    }

    pub async fn try_get(&self, path: &str, nonce: &str) -> Result<Answer, h2::Error> {
        let (reply, _) = self.begin(request("GET", path, nonce), true).await;
        whole(reply).await
    }

    /// With a method and to a host.
    pub async fn request(&self, method: &str, host: &str, path: &str) -> Answer {
        let uri = format!("https://{host}{path}");
        let (reply, _) = self
            .begin(Request::builder().method(method).uri(uri), true)
            .await;
        whole(reply).await.unwrap()
    }

    /// POST of so many DATA frames, the last of which ends the stream.
    pub async fn upload(&self, path: &str, nonce: &str, parts: &[&[u8]]) -> Answer {
        let (reply, mut send) = self.begin(request("POST", path, nonce), false).await;
        for (n, part) in parts.iter().enumerate() {
            // An answer that comes early stops it.
            let last = n + 1 == parts.len();
            if send.send_data(Bytes::copy_from_slice(part), last).is_err() {
                break;
            }
        }
        whole(reply).await.unwrap()
    }

    /// Extended CONNECT (RFC 8441).
    pub async fn connect(&self, path: &str) -> (RecvStream, SendStream<Bytes>) {
        let request = request("CONNECT", path, "tunnel")
            .header("sec-websocket-version", "13")
            .extension(Protocol::from_static("websocket"));
        let (reply, send) = self.begin(request, false).await;
        let reply = timeout(PATIENCE, reply).await.unwrap().unwrap();
        assert_eq!(reply.status(), 200);
        (reply.into_body(), send)
    }
}

pub fn request(method: &str, path: &str, nonce: &str) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(format!("https://{HOST}{path}"))
        .header("x-nonce", nonce)
}

/// An answer to its end, as HTTP/1 would write it.
pub async fn whole(reply: ResponseFuture) -> Result<Answer, h2::Error> {
    let reading = async {
        let (parts, mut receive) = reply.await?.into_parts();
        let mut body = Vec::new();
        while let Some(data) = receive.data().await {
            let data = data?;
            receive.flow_control().release_capacity(data.len())?;
            body.extend_from_slice(&data);
        }
        let trailers = receive.trailers().await?.unwrap_or_default();
        Ok(Answer {
            head: format!(
                "HTTP/2 {} \r\n{}\r\n",
                parts.status.as_u16(),
                lines(&parts.headers)
            ),
            body: String::from_utf8_lossy(&body).into_owned(),
            trailers: lines(&trailers),
        })
    };
    timeout(PATIENCE, reading)
        .await
        .expect("an answer within a minute")
}

pub fn lines(map: &HeaderMap) -> String {
    map.iter()
        .map(|(name, value)| format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes())))
        .collect()
}
