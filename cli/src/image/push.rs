//! Uploads an image to the registry (OCI distribution spec, "Pushing blobs": POST then PUT).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::io::AsyncReadExt as _;

use super::Layout;
use super::layout::Descriptor;
use crate::client::{Body, Client, empty, full, is_status};

/// Bytes read from disk at a time.
const CHUNK: usize = 256 << 10;

/// Uploads what the registry lacks of an image, then its manifest under `tag`. Answers the manifest's
/// digest.
pub async fn push(client: &Client, layout: &Layout, app: &str, tag: &str) -> Result<String> {
    let total = layout.blobs.iter().map(|b| b.size).sum();
    let bar = progress(total);
    for blob in &layout.blobs {
        if exists(client, app, &blob.digest).await? {
            bar.inc(blob.size);
        } else {
            upload(client, app, blob, &layout.blob(&blob.digest)?, &bar)
                .await
                .with_context(|| format!("{} could not be uploaded", blob.digest))?;
        }
    }
    let manifest = tokio::fs::read(layout.blob(&layout.manifest.digest)?).await?;
    let request = client
        .request(Method::PUT, &format!("/v2/{app}/manifests/{tag}"))
        .header(header::CONTENT_TYPE, &layout.manifest.media_type)
        .body(full(manifest))?;
    client
        .call(request)
        .await
        .context("the image's manifest was refused")?;
    bar.finish_and_clear();
    Ok(layout.manifest.digest.clone())
}

async fn exists(client: &Client, app: &str, digest: &str) -> Result<bool> {
    let request = client
        .request(Method::HEAD, &format!("/v2/{app}/blobs/{digest}"))
        .body(empty())?;
    match client.call(request).await {
        Ok(_) => Ok(true),
        Err(e) if is_status(&e, StatusCode::NOT_FOUND) => Ok(false),
        Err(e) => Err(e),
    }
}

async fn upload(
    client: &Client,
    app: &str,
    blob: &Descriptor,
    path: &Path,
    bar: &ProgressBar,
) -> Result<()> {
    let request = client
        .request(Method::POST, &format!("/v2/{app}/blobs/uploads/"))
        .body(empty())?;
    let answer = client.call(request).await?;
    let location = answer
        .headers()
        .get(header::LOCATION)
        .and_then(|l| l.to_str().ok())
        .context("the registry did not say where to upload")?;
    let separator = if location.contains('?') { '&' } else { '?' };
    let request = client
        .request(
            Method::PUT,
            &format!("{location}{separator}digest={}", blob.digest),
        )
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, blob.size)
        .body(file(path, bar.clone()).await?)?;
    client.call(request).await.map(drop)
}

/// A file as a request body, read as it is sent.
async fn file(path: &Path, bar: ProgressBar) -> Result<Body> {
    let file = tokio::fs::File::open(path)
        .await
        .with_context(|| format!("{}", path.display()))?;
    let chunks = futures::stream::try_unfold((file, bar), |(mut file, bar)| async move {
        let mut buffer = vec![0; CHUNK];
        let n = file.read(&mut buffer).await?;
        buffer.truncate(n);
        bar.inc(n as u64);
        Ok::<_, std::io::Error>((n > 0).then(|| (Bytes::from(buffer), (file, bar))))
    });
    Ok(StreamBody::new(chunks.map(|chunk| chunk.map(Frame::data))).boxed_unsync())
}

fn progress(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = "Uploading {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
