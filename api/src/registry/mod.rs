//! The image registry: OCI distribution specification v1.1, pull and push.
//!
//! A repository is an app's; whoever may change the app may push to it. Blobs are kept once under their
//! digest; a repository lists the manifests and blobs it was given, so that knowing a digest is not
//! enough to read what another app pushed.

mod blobs;
mod collect;
mod manifests;
mod store;
mod uploads;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use http::request::Parts;
use http::{HeaderValue, StatusCode, header};
use serde_json::json;
use tern_catalog::AppName;

pub use collect::{Grace, in_use};
pub use store::{Digest, Registry};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::server::Shared;

/// The registry's name in image references; hosts know how to reach it.
pub const REGISTRY_NAME: &str = "registry.internal";

/// Largest manifest (the specification asks for at least 4 MiB).
const MAX_MANIFEST_BYTES: usize = 4 << 20;

pub fn router() -> Router<Shared> {
    Router::new()
        .route("/v2/", get(version))
        .route("/v2/{app}/blobs/uploads/", post(uploads::begin))
        .route(
            "/v2/{app}/blobs/uploads/{id}",
            patch(uploads::append)
                .put(uploads::finish)
                .get(uploads::progress)
                .delete(uploads::cancel),
        )
        .route(
            "/v2/{app}/blobs/{digest}",
            get(blobs::get).head(blobs::head),
        )
        .route(
            "/v2/{app}/manifests/{reference}",
            get(manifests::get)
                .head(manifests::head)
                .put(manifests::put)
                .layer(DefaultBodyLimit::max(MAX_MANIFEST_BYTES)),
        )
        .route("/v2/{app}/tags/list", get(manifests::tags))
}

/// `GET /v2/`: clients ask this first, and learn here that they must say who they are.
async fn version(State(_): State<Shared>, _: Client) -> impl IntoResponse {
    (
        [("docker-distribution-api-version", "registry/2.0")],
        Json(json!({})),
    )
}

/// A [`Caller`], refused in the words of registries.
pub(crate) struct Client(pub Caller);

impl Client {
    /// An error unless this client may use the app's repository.
    fn must(&self, shared: &Shared, app: &AppName) -> Result<(), Refusal> {
        match self.0.app(&shared.view.snapshot(), app) {
            // What comes to one that is being removed would be its next owner's.
            Ok(app) if !app.deleting => Ok(()),
            _ => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                "NAME_UNKNOWN",
                format!(
                    "there is no app {app} that this token may use; make it with `tern apps create {app}`"
                ),
            )),
        }
    }
}

impl FromRequestParts<Shared> for Client {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, Refusal> {
        let unauthorized = |_: ApiError| Refusal {
            challenge: true,
            ..Refusal::new(
                StatusCode::UNAUTHORIZED,
                "UNAUTHORIZED",
                "a token of this API is needed, as password",
            )
        };
        Caller::from_request_parts(parts, shared)
            .await
            .map(Client)
            .map_err(unauthorized)
    }
}

/// An error as registries tell it.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    code: &'static str,
    text: String,
    challenge: bool,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, text: impl Into<String>) -> Self {
        Self {
            status,
            code,
            text: text.into(),
            challenge: false,
        }
    }

    fn digest(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", text)
    }

    fn unknown_blob() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "BLOB_UNKNOWN",
            "this repository has no such blob",
        )
    }

    fn unknown_upload() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "BLOB_UPLOAD_UNKNOWN",
            "there is no such upload; begin it anew",
        )
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        tracing::error!(%error, "the registry's files failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            "the registry cannot read or write its files",
        )
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = json!({"errors": [{"code": self.code, "message": self.text}]});
        let mut response = (self.status, Json(body)).into_response();
        if self.challenge {
            let realm = HeaderValue::from_static("Basic realm=\"tern\"");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, realm);
        }
        response
    }
}

#[cfg(test)]
mod tests;
