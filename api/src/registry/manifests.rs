//! Manifests and tags.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::AppName;

use super::store::is_tag;
use super::{Digest, Refusal, permit, uploads};
use crate::auth::Caller;
use crate::server::Shared;

/// As much of a manifest as tells what it needs.
#[derive(Debug, Deserialize)]
struct Manifest {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Descriptor {
    digest: String,
}

/// `HEAD /v2/{app}/manifests/{reference}`.
pub async fn head(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, reference)): Path<(AppName, String)>,
) -> Result<Response, Refusal> {
    let (headers, _) = read(&shared, &caller, &app, &reference).await?;
    Ok((headers, Body::empty()).into_response())
}

/// `GET /v2/{app}/manifests/{reference}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, reference)): Path<(AppName, String)>,
) -> Result<Response, Refusal> {
    let (headers, content) = read(&shared, &caller, &app, &reference).await?;
    Ok((headers, content).into_response())
}

/// `PUT /v2/{app}/manifests/{reference}`: kept only when all it names is there.
pub async fn put(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, reference)): Path<(AppName, String)>,
    headers: HeaderMap,
    content: Bytes,
) -> Result<Response, Refusal> {
    permit(&shared, &caller, &app)?;
    let invalid = |text: String| Refusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", text);
    let manifest: Manifest = serde_json::from_slice(&content)
        .map_err(|e| invalid(format!("the manifest is not right: {e}")))?;
    for needed in manifest.config.iter().chain(&manifest.layers) {
        let known = needed
            .digest
            .parse()
            .is_ok_and(|d| shared.registry.has_blob(&app, &d));
        if !known {
            let text = format!("{} was not pushed to this repository", needed.digest);
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "MANIFEST_BLOB_UNKNOWN",
                text,
            ));
        }
    }
    for needed in &manifest.manifests {
        if shared
            .registry
            .find_manifest(&app, &needed.digest)?
            .is_none()
        {
            let text = format!("{} was not pushed to this repository", needed.digest);
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                "MANIFEST_BLOB_UNKNOWN",
                text,
            ));
        }
    }
    let media_type = headers.get(CONTENT_TYPE).and_then(|t| t.to_str().ok());
    let media_type = media_type
        .unwrap_or("application/vnd.oci.image.manifest.v1+json")
        .to_owned();
    let tag = match reference.parse::<Digest>() {
        Ok(digest) if digest == Digest::of(&content) => None,
        Ok(_) => {
            return Err(Refusal::digest(
                "the manifest does not have the digest it was put under",
            ));
        }
        Err(()) if is_tag(&reference) => Some(reference),
        Err(()) => {
            return Err(invalid(format!(
                "\"{}\" is neither a tag nor a digest",
                reference.escape_debug()
            )));
        }
    };
    let (registry, name) = (shared.registry.clone(), app.clone());
    let kept = tokio::task::spawn_blocking(move || {
        registry.put_manifest(&name, tag.as_deref(), &media_type, &content)
    });
    let digest = kept.await.map_err(std::io::Error::other)??;
    Ok(uploads::created(&app, "manifests", &digest))
}

/// `GET /v2/{app}/tags/list`.
pub async fn tags(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
) -> Result<Json<Value>, Refusal> {
    permit(&shared, &caller, &app)?;
    Ok(Json(
        json!({"name": app, "tags": shared.registry.tags(&app)?}),
    ))
}

async fn read(
    shared: &Shared,
    caller: &Caller,
    app: &AppName,
    reference: &str,
) -> Result<([(HeaderName, String); 3], Vec<u8>), Refusal> {
    permit(shared, caller, app)?;
    let unknown = || {
        let text = format!(
            "this repository has no manifest \"{}\"",
            reference.escape_debug()
        );
        Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", text)
    };
    let (digest, media_type) = shared
        .registry
        .find_manifest(app, reference)?
        .ok_or_else(unknown)?;
    let content = tokio::fs::read(shared.registry.blob(&digest)).await?;
    let headers = [
        (CONTENT_LENGTH, content.len().to_string()),
        (CONTENT_TYPE, media_type),
        (
            HeaderName::from_static("docker-content-digest"),
            digest.to_string(),
        ),
    ];
    Ok((headers, content))
}
