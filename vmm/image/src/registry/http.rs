//! GET requests: authentication, redirects, and what statuses mean.

use std::time::Duration;

use ::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::sync::Mutex;
use url::{Origin, Url};

use super::address::{self, Resolver};
use super::auth::{self, Challenge};
use crate::{Credentials, ImageError, Reference, RegistryOptions};

const CONNECT: Duration = Duration::from_secs(10);
/// From the request to the head of its response.
const RESPONSE: Duration = Duration::from_secs(30);
/// Registries send blobs from elsewhere: one hop, sometimes two.
const MAX_REDIRECTS: usize = 5;

type Connector = HttpsConnector<HttpConnector<Resolver>>;

/// An HTTP client that is allowed into one repository.
pub(super) struct Client {
    http: HyperClient<Connector, Empty<Bytes>>,
    host: String,
    repository: String,
    reference: String,
    insecure: bool,
    anywhere: bool,
    credentials: Option<Credentials>,
    /// The value of `Authorization` that the registry last took.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Client {
    pub(super) fn new(
        reference: &Reference,
        options: &RegistryOptions,
    ) -> Result<Self, ImageError> {
        let mut http = HttpConnector::new_with_resolver(Resolver::new(options.anywhere));
        http.enforce_http(false);
        http.set_connect_timeout(Some(CONNECT));
        http.set_nodelay(true);
        Ok(Self {
            http: HyperClient::builder(TokioExecutor::new())
                .build(connector(http, reference, options)?),
            host: reference.host().to_owned(),
            repository: reference.repository().to_owned(),
            reference: reference.to_string(),
            insecure: options.insecure,
            anywhere: options.anywhere,
            credentials: options.credentials.clone(),
            authorization: Mutex::default(),
        })
    }

    /// GETs `url`, logging in if the registry asks for it. Fails unless the answer is a success.
    pub(super) async fn get(
        &self,
        url: &Url,
        headers: impl Fn(&mut HeaderMap),
    ) -> Result<Response<Incoming>, ImageError> {
        let authorization = self.authorization.lock().await.clone();
        let response = self.follow(url, &headers, authorization.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.judge(response);
        }
        let authorization = self.answer(&response).await?;
        let response = self.follow(url, &headers, Some(&authorization)).await?;
        self.judge(response)
    }

    /// Whether the registry would let us GET `url`. Where it sends others on, it would: what a HEAD
    /// finds elsewhere says nothing, as such addresses are often signed for GET alone.
    pub(super) async fn may_get(&self, url: &Url) -> Result<bool, ImageError> {
        let head = async |authorization: Option<&HeaderValue>| {
            self.send(Method::HEAD, url, &|_| {}, authorization).await
        };
        let authorization = self.authorization.lock().await.clone();
        let mut response = head(authorization.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let authorization = self.answer(&response).await?;
            response = head(Some(&authorization)).await?;
        }
        Ok(response.status().is_success() || response.status().is_redirection())
    }

    /// Logs in as a 401 asks for, and remembers it.
    async fn answer(&self, response: &Response<Incoming>) -> Result<HeaderValue, ImageError> {
        let challenge = auth::challenge(response.headers()).ok_or_else(|| self.unauthorized())?;
        let authorization = self.log_in(&challenge).await?;
        *self.authorization.lock().await = Some(authorization.clone());
        Ok(authorization)
    }

    /// What to show the registry, according to what it asked for.
    async fn log_in(&self, challenge: &Challenge) -> Result<HeaderValue, ImageError> {
        let credentials = self.credentials.as_ref();
        match challenge {
            Challenge::Basic => credentials
                .map(auth::basic)
                .ok_or_else(|| self.unauthorized()),
            Challenge::Bearer(bearer) => {
                let url = bearer
                    .token_url(&self.repository)
                    .filter(|url| self.may_visit(url))
                    .ok_or_else(|| self.failure("its token service has no usable address", None))?;
                let basic = credentials.map(auth::basic);
                let response = self.follow(&url, &|_| {}, basic.as_ref()).await?;
                let response = self.judge(response)?;
                auth::token(response.into_body())
                    .await
                    .map_err(|error| self.failure("its token service gave no token", Some(error)))
            }
        }
    }

    /// GETs `url` and follows redirects. Only `url`'s own server gets to see `authorization`.
    async fn follow(
        &self,
        url: &Url,
        headers: &impl Fn(&mut HeaderMap),
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, ImageError> {
        let trusted: Origin = url.origin();
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let authorization = authorization.filter(|_| url.origin() == trusted);
            let response = self.send(Method::GET, &url, headers, authorization).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            url = response
                .headers()
                .get(header::LOCATION)
                .and_then(|location| url.join(location.to_str().ok()?).ok())
                .filter(|url| self.may_visit(url))
                .ok_or_else(|| self.failure("it redirects to where we cannot go", None))?;
        }
        Err(self.failure("it redirects too often", None))
    }

    async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: &impl Fn(&mut HeaderMap),
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, ImageError> {
        let uri: Uri = url
            .as_str()
            .parse()
            .map_err(|_| self.failure("an address it gave is not one", None))?;
        if !self.anywhere && !address::may_be_public(url) {
            return Err(self.not_public());
        }
        let mut request = Request::new(Empty::new());
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        headers(request.headers_mut());
        request
            .headers_mut()
            .insert(header::USER_AGENT, HeaderValue::from_static("tern"));
        if let Some(authorization) = authorization {
            request
                .headers_mut()
                .insert(header::AUTHORIZATION, authorization.clone());
        }
        tokio::time::timeout(RESPONSE, self.http.request(request))
            .await
            .map_err(|_| self.failure("it does not answer", None))?
            .map_err(|error| {
                if is_refused(&error) {
                    self.not_public()
                } else {
                    self.failure("it cannot be reached", Some(error.into()))
                }
            })
    }

    /// Secure registries lead to secure places.
    fn may_visit(&self, url: &Url) -> bool {
        match url.scheme() {
            "https" => true,
            "http" => self.insecure,
            _ => false,
        }
    }

    fn judge(&self, response: Response<Incoming>) -> Result<Response<Incoming>, ImageError> {
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.unauthorized()),
            StatusCode::NOT_FOUND => Err(ImageError::NotFound {
                reference: self.reference.clone(),
            }),
            status => Err(self.failure(&format!("it answered {status}"), None)),
        }
    }

    fn unauthorized(&self) -> ImageError {
        ImageError::Unauthorized {
            host: self.host.clone(),
            repository: self.repository.clone(),
        }
    }

    fn not_public(&self) -> ImageError {
        ImageError::NotPublic {
            host: self.host.clone(),
        }
    }

    pub(super) fn failure(
        &self,
        reason: &str,
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    ) -> ImageError {
        ImageError::Registry {
            host: self.host.clone(),
            reason: reason.to_owned(),
            source,
        }
    }
}

/// Whether the same request may well succeed a little later.
pub(super) fn is_worth_retrying(error: &ImageError) -> bool {
    matches!(error, ImageError::Registry { .. })
}

/// Whether [`Resolver`] did not let a connection be made.
fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|error| error.to_string() == address::REFUSAL) {
            return true;
        }
        next = error.source();
    }
    false
}

fn connector(
    http: HttpConnector<Resolver>,
    reference: &Reference,
    options: &RegistryOptions,
) -> Result<Connector, ImageError> {
    let provider = rustls::crypto::ring::default_provider();
    let no_tls = |source: Box<dyn std::error::Error + Send + Sync>| ImageError::Registry {
        host: reference.host().to_owned(),
        reason: "this host's certificate store cannot be read".to_owned(),
        source: Some(source),
    };
    if options.insecure {
        // Whoever asks for http needs no certificates to start with; https redirects then fail.
        let config = rustls::ClientConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()
            .map_err(|error| no_tls(error.into()))?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        return Ok(hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http));
    }
    Ok(hyper_rustls::HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(provider)
        .map_err(|error| no_tls(error.into()))?
        .https_only()
        .enable_http1()
        .wrap_connector(http))
}
