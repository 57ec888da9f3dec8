//! What went wrong, and the status and words it is answered with. Decided here and nowhere else.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;
use tern_catalog::{CatalogError, NameError, StoreError};

use crate::gateway::GatewayError;
use crate::rights::Denied;

/// An answer that is not a success: `{"error": "…", "status": "…"}`.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    /// For people.
    text: String,
    /// For programs, where the Machines API has a word for it.
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
            code: None,
        }
    }

    /// What an extractor of axum's refused.
    pub(crate) fn of_status(status: StatusCode, text: impl Into<String>) -> Self {
        Self::new(status, text)
    }

    /// 400.
    pub fn bad_request(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    /// 403.
    pub fn forbidden(text: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, text)
    }

    /// 404.
    pub fn not_found(what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("{what} not found"))
    }

    /// 502: another host, which must answer, does not.
    pub fn unreachable(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, text)
    }

    /// 408: a wait that was in vain.
    pub fn timeout(text: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, text)
    }

    /// 409: a lease is held by somebody else.
    pub fn locked() -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "failed to acquire lease: machine is already locked",
        )
    }

    /// 409.
    pub fn conflict(text: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, text)
    }

    /// 412.
    pub fn precondition(text: impl Into<String>) -> Self {
        Self::new(StatusCode::PRECONDITION_FAILED, text)
    }

    /// 422.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, text)
    }

    /// 422: a name that somebody else has.
    pub fn name_taken(what: impl std::fmt::Display) -> Self {
        Self {
            code: Some("name_taken"),
            ..Self::invalid(format!("{what} has already been taken"))
        }
    }

    /// 422: no host can take the Machine.
    pub fn no_capacity(text: impl Into<String>) -> Self {
        Self {
            code: Some("insufficient_capacity"),
            ..Self::invalid(text)
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = match self.code {
            Some(code) => json!({"error": self.text, "status": code}),
            None => json!({"error": self.text}),
        };
        (self.status, Json(body)).into_response()
    }
}

impl From<CatalogError> for ApiError {
    fn from(error: CatalogError) -> Self {
        match error {
            CatalogError::Exists(key) => Self::conflict(format!("{key} exists already")),
            CatalogError::Store(StoreError::Conflict { key }) => {
                Self::conflict(format!("{key} was changed by somebody else; try again"))
            }
            CatalogError::Store(StoreError::Invalid(text)) => Self::invalid(text),
            CatalogError::Store(error @ StoreError::TooLarge { .. }) => {
                Self::invalid(error.to_string())
            }
            CatalogError::Store(StoreError::Unknown(text)) => {
                tracing::error!(error = text, "a write to the catalog was not answered");
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "the catalog has not answered; it may have been done or not: look before you repeat it",
                )
            }
            other => {
                // The caller learns that it failed; why is for the operator.
                tracing::error!(error = %other, "the catalog failed");
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "the catalog does not answer; try again",
                )
            }
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        CatalogError::from(error).into()
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Unknown => Self::new(
                StatusCode::UNAUTHORIZED,
                "Authenticate: token validation error",
            ),
            Denied::Expired(text) => {
                Self::new(StatusCode::UNAUTHORIZED, format!("Authenticate: {text}"))
            }
            Denied::NotFound(what) => Self::not_found(what),
            Denied::Forbidden(text) => Self::forbidden(text),
            Denied::Malformed(text) => Self::bad_request(text),
        }
    }
}

impl From<NameError> for ApiError {
    fn from(error: NameError) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<GatewayError> for ApiError {
    fn from(error: GatewayError) -> Self {
        match error {
            GatewayError::NotRunning(text) => Self::precondition(text),
            GatewayError::Timeout(text) => Self::timeout(text),
            GatewayError::Failed(text) => Self::new(StatusCode::BAD_GATEWAY, text),
        }
    }
}
