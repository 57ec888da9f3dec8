//! Writing blobs: begin, append, finish. What arrives is hashed when it is all there, before it counts.

use std::path::Path as FilePath;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse as _, Response};
use futures::TryStreamExt as _;
use http::header::{CONTENT_RANGE, LOCATION, RANGE};
use http::{HeaderMap, HeaderName, StatusCode};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tern_catalog::AppName;
use tokio::io::AsyncWriteExt as _;

use super::store::Upload;
use super::{Digest, Refusal, permit};
use crate::auth::Caller;
use crate::server::Shared;

/// Largest blob. A layer of a whole distribution has a gigabyte or two.
const MAX_BLOB_BYTES: u64 = 16 << 30;

#[derive(Debug, Default, Deserialize)]
pub struct Begin {
    digest: Option<String>,
    mount: Option<String>,
    from: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct Finish {
    digest: String,
}

/// `POST /v2/{app}/blobs/uploads/`: begins an upload; with `digest` it is all there; with `mount` the blob is
/// taken from another repository that the client may read.
pub async fn begin(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Query(begin): Query<Begin>,
    body: Body,
) -> Result<Response, Refusal> {
    permit(&shared, &caller, &app)?;
    if let (Some(mount), Some(from)) = (&begin.mount, &begin.from)
        && let (Ok(digest), Ok(from)) = (mount.parse::<Digest>(), from.parse::<AppName>())
        && caller.must_pull(&shared.view.snapshot(), &from).is_ok()
        && shared.registry.has_blob(&from, &digest)
    {
        shared.registry.link_blob(&app, &digest)?;
        return Ok(created(&app, "blobs", &digest));
    }
    let id = hex::encode(rand::random::<[u8; 16]>());
    let upload = shared
        .registry
        .upload(&app, &id)
        .ok_or_else(Refusal::unknown_upload)?;
    tokio::fs::File::create_new(&upload.path).await?;
    if let Some(digest) = begin.digest {
        return complete(&shared, &caller, &app, upload, &digest, body).await;
    }
    Ok(accepted(&app, &id, 0))
}

/// `PATCH …/uploads/{id}`: a chunk, at the end of what is there.
pub async fn append(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, id)): Path<(AppName, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    permit(&shared, &caller, &app)?;
    let upload = find(&shared, &app, &id)?;
    let length = tokio::fs::metadata(&upload.path).await?.len();
    if let Some(start) = headers
        .get(CONTENT_RANGE)
        .and_then(|r| r.to_str().ok()?.split('-').next()?.parse::<u64>().ok())
        && start != length
    {
        return Err(Refusal::new(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "BLOB_UPLOAD_INVALID",
            format!("the next byte is {length}, not {start}"),
        ));
    }
    let length = collect(&upload.path, body).await?;
    Ok(accepted(&app, &id, length))
}

/// `PUT …/uploads/{id}?digest=…`: the last chunk, which may be all of it or nothing.
pub async fn finish(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, id)): Path<(AppName, String)>,
    Query(finish): Query<Finish>,
    body: Body,
) -> Result<Response, Refusal> {
    permit(&shared, &caller, &app)?;
    let upload = find(&shared, &app, &id)?;
    complete(&shared, &caller, &app, upload, &finish.digest, body).await
}

/// `GET …/uploads/{id}`.
pub async fn progress(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, id)): Path<(AppName, String)>,
) -> Result<Response, Refusal> {
    permit(&shared, &caller, &app)?;
    let upload = find(&shared, &app, &id)?;
    let length = tokio::fs::metadata(&upload.path).await?.len();
    let mut response = accepted(&app, &id, length);
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

/// `DELETE …/uploads/{id}`.
pub async fn cancel(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, id)): Path<(AppName, String)>,
) -> Result<StatusCode, Refusal> {
    permit(&shared, &caller, &app)?;
    let upload = find(&shared, &app, &id)?;
    tokio::fs::remove_file(&upload.path).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn complete(
    shared: &Shared,
    caller: &Caller,
    app: &AppName,
    upload: Upload,
    wanted: &str,
    body: Body,
) -> Result<Response, Refusal> {
    let wanted: Digest = wanted
        .parse()
        .map_err(|()| Refusal::digest("that is not a sha256 digest"))?;
    collect(&upload.path, body).await?;
    // That took its time: the name may be its next owner's by now.
    permit(shared, caller, app)?;
    let (registry, app_name, expected) = (shared.registry.clone(), app.clone(), wanted.clone());
    let outcome = tokio::task::spawn_blocking(move || {
        // Held in here: a caller that goes away must not free the upload for another while it is hashed.
        let path = &upload.path;
        let found = hash(path)?;
        if found != expected {
            std::fs::remove_file(path)?;
            return Err(Refusal::digest(format!(
                "what arrived has digest {found}, not {expected}; send it again"
            )));
        }
        Ok(registry.finish(path, &app_name, &expected)?)
    });
    outcome.await.map_err(std::io::Error::other)??;
    Ok(created(app, "blobs", &wanted))
}

/// Appends a body to an upload and answers how long it is then.
async fn collect(path: &FilePath, body: Body) -> Result<u64, Refusal> {
    let mut file = tokio::fs::File::options().append(true).open(path).await?;
    let mut length = file.metadata().await?.len();
    let mut chunks = body.into_data_stream();
    let broken = |e: axum::Error| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            "BLOB_UPLOAD_INVALID",
            format!("the upload broke off: {e}"),
        )
    };
    while let Some(chunk) = chunks.try_next().await.map_err(broken)? {
        length += chunk.len() as u64;
        if length > MAX_BLOB_BYTES {
            let text = format!("a blob has {MAX_BLOB_BYTES} bytes at most");
            return Err(Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                text,
            ));
        }
        file.write_all(&chunk).await?;
    }
    file.flush().await?;
    Ok(length)
}

fn hash(path: &FilePath) -> std::io::Result<Digest> {
    let mut hash = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hash)?;
    Ok(Digest::from_hash(hash))
}

fn find(shared: &Shared, app: &AppName, id: &str) -> Result<Upload, Refusal> {
    let upload = shared.registry.upload(app, id);
    upload
        .filter(|upload| upload.path.exists())
        .ok_or_else(Refusal::unknown_upload)
}

fn accepted(app: &AppName, id: &str, length: u64) -> Response {
    let headers = [
        (LOCATION, format!("/v2/{app}/blobs/uploads/{id}")),
        (RANGE, format!("0-{}", length.saturating_sub(1))),
        (HeaderName::from_static("docker-upload-uuid"), id.to_owned()),
    ];
    (StatusCode::ACCEPTED, headers).into_response()
}

/// The answer to something kept under its digest.
pub(super) fn created(app: &AppName, kind: &str, digest: &Digest) -> Response {
    let headers = [
        (LOCATION, format!("/v2/{app}/{kind}/{digest}")),
        (
            HeaderName::from_static("docker-content-digest"),
            digest.to_string(),
        ),
    ];
    (StatusCode::CREATED, headers).into_response()
}
