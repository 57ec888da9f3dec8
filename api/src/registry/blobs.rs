//! Reading blobs.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use tern_catalog::AppName;
use tokio_util::io::ReaderStream;

use super::{Digest, Refusal, permit};
use crate::auth::Caller;
use crate::server::Shared;

/// `HEAD /v2/{app}/blobs/{digest}`.
pub async fn head(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, digest)): Path<(AppName, String)>,
) -> Result<Response, Refusal> {
    let (digest, file) = open(&shared, &caller, &app, &digest).await?;
    let length = file.metadata().await?.len();
    Ok((headers(&digest, length), Body::empty()).into_response())
}

/// `GET /v2/{app}/blobs/{digest}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, digest)): Path<(AppName, String)>,
) -> Result<Response, Refusal> {
    let (digest, file) = open(&shared, &caller, &app, &digest).await?;
    let length = file.metadata().await?.len();
    Ok((
        headers(&digest, length),
        Body::from_stream(ReaderStream::with_capacity(file, 256 << 10)),
    )
        .into_response())
}

async fn open(
    shared: &Shared,
    caller: &Caller,
    app: &AppName,
    digest: &str,
) -> Result<(Digest, tokio::fs::File), Refusal> {
    permit(shared, caller, app)?;
    let digest: Digest = digest
        .parse()
        .map_err(|()| Refusal::digest("that is not a sha256 digest"))?;
    if !shared.registry.has_blob(app, &digest) {
        return Err(Refusal::unknown_blob());
    }
    let file = tokio::fs::File::open(shared.registry.blob(&digest)).await?;
    Ok((digest, file))
}

fn headers(digest: &Digest, length: u64) -> [(http::HeaderName, String); 3] {
    [
        (CONTENT_LENGTH, length.to_string()),
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (
            http::HeaderName::from_static("docker-content-digest"),
            digest.to_string(),
        ),
    ]
}
