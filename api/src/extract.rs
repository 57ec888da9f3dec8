//! What a call is made of. As axum's own, but what cannot be read is answered with the API's JSON error, and a
//! body is JSON whatever its content type says: `curl -d` says that it is a form.

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::error::Category;

use crate::error::ApiError;

/// A JSON body, of a call or an answer. In a call a key whose value is `null` is as good as absent: clients in
/// languages with optional fields send all of them.
pub struct Json<T>(pub T);

/// A JSON body of a call in which `null` says something.
pub struct JsonWithNulls<T>(pub T);

/// Parameters in the path.
pub struct Path<T>(pub T);

/// Parameters in the query.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        read(&body(request, state).await?).map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonWithNulls<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        parse(&body(request, state).await?).map(Self)
    }
}

pub async fn body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, ApiError> {
    let body = Bytes::from_request(request, state).await;
    body.map_err(|e| ApiError::of_status(e.status(), e.body_text()))
}

/// Reads a JSON body, without its nulls: 400 where it is not JSON, 422 where it is not what the call takes.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut value = parse(body)?;
    drop_nulls(&mut value);
    T::deserialize(value).map_err(refused)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| match error.classify() {
        Category::Data => refused(error),
        _ => ApiError::bad_request(format!("the body is not JSON: {error}")),
    })
}

fn refused(error: serde_json::Error) -> ApiError {
    ApiError::invalid(format!("the body is not what this call takes: {error}"))
}

/// As deep as the parser went, which has a limit.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(path) => Ok(Self(path.0)),
            Err(e) => Err(ApiError::of_status(e.status(), e.body_text())),
        }
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(query) => Ok(Self(query.0)),
            Err(e) => Err(ApiError::of_status(e.status(), e.body_text())),
        }
    }
}
