//! The image registry: OCI distribution specification v1.1, pull and push.
//!
//! A repository is an app's; whoever may deploy the app may push to it, and whoever may see it, pull. Blobs are kept once under their
//! digest; a repository lists the manifests and blobs it was given, so that knowing a digest is not
//! enough to read what another app pushed.

pub mod blobs;
mod collect;
pub mod manifests;
mod store;
pub mod uploads;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;
use tern_catalog::AppName;

pub use collect::{Grace, in_use};
pub use store::{Digest, Registry};

use crate::auth::Caller;
use crate::rights::Denied;
use crate::server::Shared;

/// The registry's name in image references; hosts know how to reach it.
pub const REGISTRY_NAME: &str = "registry.internal";

/// `GET /v2/`: clients ask this first, and learn here that they must say who they are.
pub async fn version() -> impl IntoResponse {
    (
        [("docker-distribution-api-version", "registry/2.0")],
        Json(json!({})),
    )
}

/// An error unless the caller may use an app's repository. What comes to one that is being removed would be its next
/// owner's.
fn permit(shared: &Shared, caller: &Caller, app: &AppName) -> Result<(), Refusal> {
    let snapshot = shared.view.snapshot();
    if caller.app(&snapshot, app)?.deleting {
        return Err(Denied::NotFound(format!("app {app}")).into());
    }
    Ok(())
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

    fn unauthorized(text: impl Into<String>) -> Self {
        Self {
            challenge: true,
            ..Self::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", text)
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

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Unknown => Self::unauthorized("a token of this API is needed, as password"),
            Denied::Expired(text) => Self::unauthorized(text),
            Denied::NotFound(what) => Self::new(
                StatusCode::NOT_FOUND,
                "NAME_UNKNOWN",
                format!(
                    "there is no {what} that this token may use; make it with `tern apps create`"
                ),
            ),
            Denied::Forbidden(text) => Self::new(StatusCode::FORBIDDEN, "DENIED", text),
            Denied::Malformed(text) => Self::new(StatusCode::BAD_REQUEST, "NAME_INVALID", text),
        }
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
