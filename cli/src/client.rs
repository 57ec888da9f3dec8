//! The API, spoken to over HTTP.

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::settings::Target;

/// A request body.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The API at one address, with one token.
#[derive(Clone)]
pub struct Client {
    target: Target,
    http: HyperClient<HttpsConnector<HttpConnector>, Body>,
}

/// What the API answered instead of doing it.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ApiError {
    /// Its HTTP status.
    pub status: StatusCode,
    /// Its own words.
    pub text: String,
}

/// An answer longer than this is not the API's.
const MAX_ANSWER_BYTES: usize = 64 << 20;

impl Client {
    /// Speaks to this API.
    pub fn new(target: Target) -> Result<Self> {
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .context("the system's root certificates cannot be read")?
            .https_or_http()
            .enable_http1()
            .build();
        let http = HyperClient::builder(TokioExecutor::new()).build(https);
        Ok(Self { target, http })
    }

    /// `GET`, answered as JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.json(Method::GET, path, empty()).await
    }

    /// `POST` of JSON, answered as JSON.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + ?Sized),
    ) -> Result<T> {
        self.json(Method::POST, path, full(serde_json::to_vec(body)?))
            .await
    }

    /// `PUT` of JSON, answered as JSON.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + ?Sized),
    ) -> Result<T> {
        self.json(Method::PUT, path, full(serde_json::to_vec(body)?))
            .await
    }

    /// `DELETE`; what is answered does not matter.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.call(self.request(Method::DELETE, path).body(empty())?)
            .await
            .map(drop)
    }

    /// `DELETE`, answered as JSON.
    pub async fn remove<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.json(Method::DELETE, path, empty()).await
    }

    /// A request with its method, address and token.
    pub fn request(&self, method: Method, path: &str) -> http::request::Builder {
        let uri = if path.starts_with("http") {
            path.to_owned()
        } else {
            format!("{}{path}", self.target.url)
        };
        Request::builder()
            .method(method)
            .uri(uri)
            .header(
                header::AUTHORIZATION,
                format!("Bearer {}", self.target.token),
            )
            .header(
                header::USER_AGENT,
                concat!("tern/", env!("CARGO_PKG_VERSION")),
            )
    }

    /// Sends a request; a status that is not a success is an [`ApiError`].
    pub async fn call(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let answer = self.http.request(request).await.with_context(|| {
            format!(
                "{} does not answer; is `tern serve` running there, and is --api-url right?",
                self.target.url
            )
        })?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let body = read(answer.into_body()).await.unwrap_or_default();
        Err(ApiError {
            status,
            text: error_text(status, &body),
        }
        .into())
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, body: Body) -> Result<T> {
        let request = self
            .request(method, path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)?;
        let answer = self.call(request).await?;
        let body = read(answer.into_body()).await?;
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body).with_context(|| {
            format!(
                "{} answered {path} with something else than expected",
                self.target.url
            )
        })
    }
}

/// Whether an error is the API's answer with this status.
pub fn is_status(error: &anyhow::Error, status: StatusCode) -> bool {
    error
        .downcast_ref::<ApiError>()
        .is_some_and(|e| e.status == status)
}

/// An empty body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body that is all there.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

async fn read(body: Incoming) -> Result<Bytes> {
    let limited = Limited::new(body, MAX_ANSWER_BYTES);
    let collected = limited
        .collect()
        .await
        .map_err(|e| anyhow::anyhow!("the answer broke off: {e}"))?;
    Ok(collected.to_bytes())
}

/// The API's error as a sentence with a next step.
fn error_text(status: StatusCode, body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Wire {
        error: String,
        message: Option<String>,
    }
    let said = match serde_json::from_slice::<Wire>(body) {
        Ok(wire) => wire.message.unwrap_or(wire.error),
        Err(_) => format!("the server answered {status}"),
    };
    match status {
        StatusCode::UNAUTHORIZED => {
            format!("{said}. Save a good token with `tern auth login`, or give --token")
        }
        StatusCode::FORBIDDEN => {
            format!(
                "{said}. Who may more makes one with `tern tokens create`; give it with --token"
            )
        }
        _ => said,
    }
}
