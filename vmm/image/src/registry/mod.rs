//! Reads images from a registry.
//!
//! The pull half of the [OCI distribution
//! specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pull), over
//! HTTP/1.1. A blob is one long response: if it breaks off, the rest is asked for by `Range`.

mod address;
mod auth;
mod http;

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use ::http::{HeaderValue, StatusCode, header};
use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use url::Url;

use self::http::Client;
use crate::manifest::{Descriptor, MANIFESTS};
use crate::resolve::Blobs;
use crate::{Digest, ImageError, Limits, Reference, RegistryOptions};

/// How long a registry may be silent in the middle of a body.
const IDLE: Duration = Duration::from_secs(30);
/// How often a broken download is taken up again without having got anywhere in between.
const ATTEMPTS: u32 = 4;
/// Pause before the second attempt; doubled for each one after it.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Chunks of a body between the network and who unpacks it; they have some 16 to 400 KiB each.
const CHUNKS: usize = 16;

/// A registry, from the point of view of one image.
pub(crate) struct Registry {
    reference: Reference,
    base: Url,
    client: Arc<Client>,
    runtime: Handle,
}

impl Registry {
    /// Must be called, and used, on a blocking thread of a Tokio runtime.
    pub(crate) fn new(
        reference: &Reference,
        options: &RegistryOptions,
    ) -> Result<Self, ImageError> {
        // Docker Hub's registry does not live at Docker Hub's name.
        let host = match reference.host() {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            host => host,
        };
        let scheme = if options.insecure { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2/{}/", reference.repository()))
            .map_err(|_| ImageError::InvalidReference {
                value: reference.to_string(),
                reason: "it does not make a URL",
            })?;
        let client = Arc::new(Client::new(reference, options)?);
        Ok(Self {
            reference: reference.clone(),
            base,
            client,
            runtime: Handle::current(),
        })
    }

    /// The manifest or index that the reference names.
    pub(crate) fn start(&self, limits: &Limits) -> Result<(Digest, Vec<u8>), ImageError> {
        let pinned = self.reference.digest();
        let name = match (&pinned, self.reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => {
                return Err(ImageError::NotFound {
                    reference: self.reference.to_string(),
                });
            }
        };
        let mut bytes = Vec::new();
        self.stream(self.url("manifests", &name), Some(manifest_types()), None)
            .take(limits.document_bytes + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| ImageError::from_read(error, &name))?;
        if bytes.len() as u64 > limits.document_bytes {
            let limit = limits.document_bytes;
            return Err(ImageError::Limit {
                what: "bytes of a document",
                limit,
            });
        }
        let found = Digest::of(&bytes);
        match pinned {
            Some(expected) if expected != found => Err(ImageError::DigestMismatch {
                what: "the manifest".to_owned(),
                expected,
                found,
            }),
            _ => Ok((found, bytes)),
        }
    }

    fn url(&self, kind: &str, name: &str) -> Url {
        let mut url = self.base.clone();
        // Neither part needs escaping: see `Reference`'s grammar.
        url.set_path(&format!("{}{kind}/{name}", self.base.path()));
        url
    }

    fn stream(&self, url: Url, accept: Option<HeaderValue>, size: Option<u64>) -> Download {
        let (chunks, receiver) = mpsc::channel(CHUNKS);
        let client = Arc::clone(&self.client);
        self.runtime.spawn(async move {
            if let Err(error) = pump(&client, url, accept, size, &chunks).await {
                // If nobody listens any more, nobody needs to know.
                let _ = chunks.send(Err(error)).await;
            }
        });
        Download {
            receiver,
            chunk: Bytes::new(),
        }
    }
}

impl Blobs for Registry {
    fn may_read(&self, descriptor: &Descriptor) -> bool {
        let url = self.url("blobs", &descriptor.digest.to_string());
        let allowed = self.runtime.block_on(self.client.may_get(&url));
        // The download that follows a refusal says why.
        allowed.unwrap_or(false)
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, ImageError> {
        let url = self.url("manifests", &descriptor.digest.to_string());
        Ok(Box::new(self.stream(
            url,
            Some(manifest_types()),
            Some(descriptor.size),
        )))
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, ImageError> {
        let url = self.url("blobs", &descriptor.digest.to_string());
        Ok(Box::new(self.stream(url, None, Some(descriptor.size))))
    }
}

fn manifest_types() -> HeaderValue {
    HeaderValue::from_str(&MANIFESTS.join(", ")).expect("media types are plain ASCII")
}

/// The reading end of a response, for a thread that may block.
struct Download {
    receiver: mpsc::Receiver<Result<Bytes, ImageError>>,
    chunk: Bytes,
}

impl Read for Download {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                None => return Ok(0),
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(error)) => return Err(io::Error::other(error)),
            }
        }
        let length = buffer.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

type Chunks = mpsc::Sender<Result<Bytes, ImageError>>;

/// Sends the body found at `url` into `chunks`, taking it up again where it broke off.
async fn pump(
    client: &Client,
    url: Url,
    accept: Option<HeaderValue>,
    size: Option<u64>,
    chunks: &Chunks,
) -> Result<(), ImageError> {
    let mut offset = 0;
    let mut pause = FIRST_PAUSE;
    let mut attempt = 1;
    loop {
        let before = offset;
        let broken = match body_from(client, &url, accept.as_ref(), offset).await {
            Ok(body) => match forward(body, &mut offset, chunks).await {
                Ok(()) => return Ok(()),
                Err(error) => client.failure("the download broke off", Some(error)),
            },
            Err(error) => error,
        };
        // What came so far may be all there is, if only the end was lost.
        if size.is_some_and(|size| offset >= size) {
            return Ok(());
        }
        if offset > before {
            (attempt, pause) = (1, FIRST_PAUSE);
        }
        if attempt == ATTEMPTS || !http::is_worth_retrying(&broken) {
            return Err(broken);
        }
        tracing::debug!(%url, offset, attempt, error = %broken, "registry is asked again");
        tokio::time::sleep(pause).await;
        pause *= 2;
        attempt += 1;
    }
}

/// A response's body, and how many bytes at its start are already known.
struct Body {
    stream: Incoming,
    skip: u64,
}

async fn body_from(
    client: &Client,
    url: &Url,
    accept: Option<&HeaderValue>,
    offset: u64,
) -> Result<Body, ImageError> {
    let response = client
        .get(url, |headers| {
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT, accept.clone());
            }
            if offset > 0 {
                let range = HeaderValue::try_from(format!("bytes={offset}-"));
                headers.extend(range.ok().map(|range| (header::RANGE, range)));
            }
        })
        .await?;
    let skip = match response.status() {
        StatusCode::PARTIAL_CONTENT if starts_at(response.headers(), offset) => 0,
        StatusCode::OK => offset, // a registry without ranges starts over
        status => return Err(client.failure(&format!("unexpected answer {status}"), None)),
    };
    Ok(Body {
        stream: response.into_body(),
        skip,
    })
}

fn starts_at(headers: &::http::HeaderMap, offset: u64) -> bool {
    headers.get(header::CONTENT_RANGE).and_then(|range| {
        range
            .to_str()
            .ok()?
            .strip_prefix("bytes ")?
            .split('-')
            .next()?
            .parse()
            .ok()
    }) == Some(offset)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Passes a body on, chunk by chunk, and counts into `offset`.
async fn forward(mut body: Body, offset: &mut u64, chunks: &Chunks) -> Result<(), BoxError> {
    loop {
        let frame = tokio::time::timeout(IDLE, body.stream.frame())
            .await
            .map_err(|_| format!("nothing came for {} s", IDLE.as_secs()))?;
        let Some(frame) = frame else { return Ok(()) };
        let Ok(mut chunk) = frame?.into_data() else {
            continue;
        };
        let known = chunk
            .len()
            .min(usize::try_from(body.skip).unwrap_or(usize::MAX));
        chunk.advance(known);
        body.skip -= known as u64;
        if chunk.is_empty() {
            continue;
        }
        *offset += chunk.len() as u64;
        if chunks.send(Ok(chunk)).await.is_err() {
            return Ok(()); // the reader has seen enough
        }
    }
}
