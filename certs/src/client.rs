//! The HTTP client below ACME. What a directory says when it refuses (its reason, and `Retry-After`) reaches
//! whoever decides when to ask again.

use std::path::Path;
use std::pin::Pin;

use bytes::Bytes;
use http::header::{HeaderMap, RETRY_AFTER};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient, Problem};
use jiff::fmt::rfc2822;
use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error as ThisError;

/// A refusal's text is a problem document; a proxy's page is cut.
const MOST_OF_A_REFUSAL: usize = 64 * 1024;

/// An answer that is not a success.
#[derive(Debug, ThisError)]
#[error("{}", self.told())]
pub struct Refusal {
    pub status: StatusCode,
    pub problem: Option<Problem>,
    /// Not before this (RFC 8555 section 6.6).
    pub retry_after: Option<Timestamp>,
}

impl Refusal {
    fn told(&self) -> String {
        match &self.problem {
            Some(problem) => format!("{problem}, status {}", self.status),
            None => format!("it answered {}", self.status),
        }
    }

    /// The refusal that an error is of.
    pub fn of(error: &Error) -> Option<&Self> {
        match error {
            Error::Other(other) => other.downcast_ref(),
            _ => None,
        }
    }
}

/// Trusts the system's roots, or one root (PEM) alone.
pub fn client(root: Option<&Path>) -> Result<Box<dyn HttpClient>, Error> {
    let other = |e: Box<dyn std::error::Error + Send + Sync>| Error::Other(e);
    let builder = HttpsConnectorBuilder::new();
    let builder = match root {
        Some(path) => {
            let der = CertificateDer::from_pem_file(path).map_err(|e| other(Box::new(e)))?;
            let mut roots = RootCertStore::empty();
            roots.add(der).map_err(|e| other(Box::new(e)))?;
            let provider = rustls::crypto::ring::default_provider();
            let config = ClientConfig::builder_with_provider(provider.into())
                .with_safe_default_protocol_versions()
                .map_err(|e| other(Box::new(e)))?
                .with_root_certificates(roots)
                .with_no_client_auth();
            builder.with_tls_config(config)
        }
        None => builder
            .try_with_platform_verifier()
            .map_err(|e| other(Box::new(e)))?,
    };
    let connector = builder.https_only().enable_http1().enable_http2().build();
    Ok(Box::new(AcmeClient(
        Client::builder(TokioExecutor::new()).build(connector),
    )))
}

struct AcmeClient(Client<HttpsConnector<HttpConnector>, BodyWrapper<Bytes>>);

type Answer = Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>>;

impl HttpClient for AcmeClient {
    fn request(&self, request: Request<BodyWrapper<Bytes>>) -> Answer {
        let asked = self.0.request(request);
        Box::pin(async move {
            let answer = asked.await.map_err(|e| Error::Other(Box::new(e)))?;
            let status = answer.status();
            // 400 is for instant-acme to read: a bad nonce is one, and tried again with a good one.
            if status.as_u16() <= StatusCode::BAD_REQUEST.as_u16() {
                return Ok(BytesResponse::from(answer));
            }
            let retry_after = retry_after(answer.headers(), Timestamp::now());
            let body = Limited::new(answer.into_body(), MOST_OF_A_REFUSAL);
            let body = body.collect().await.map_err(Error::Other)?.to_bytes();
            Err(Error::Other(Box::new(Refusal {
                status,
                problem: serde_json::from_slice(&body).ok(),
                retry_after,
            })))
        })
    }
}

/// RFC 9110 section 10.2.3: seconds, or a date.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Timestamp> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match value.parse::<u32>() {
        Ok(seconds) => now
            .checked_add(SignedDuration::from_secs(seconds.into()))
            .ok(),
        Err(_) => Some(rfc2822::parse(value).ok()?.timestamp()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now: Timestamp = "2026-11-28T09:00:00Z".parse().unwrap();
        let read = |value: &'static str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]);
            retry_after(&headers, now)
        };
        let at = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        assert_eq!(read("3600"), at("2026-11-28T10:00:00Z"));
        assert_eq!(read(" 0 "), at("2026-11-28T09:00:00Z"));
        assert_eq!(
            read("Sat, 28 Nov 2026 09:30:00 GMT"),
            at("2026-11-28T09:30:00Z")
        );
        for nonsense in ["", "soon", "-5", "1e9"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
