//! A registry with one image of no layers, in the repository `app`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tern_image::Digest;

/// Where it is, and whether it is there.
pub struct Registry {
    pub address: SocketAddr,
    down: Arc<AtomicBool>,
}

impl Registry {
    /// Serves from a thread, in the network namespace of the caller.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let down = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&down);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                // One that breaks off has seen enough.
                let _ = answer(&stream.unwrap());
            }
        });
        Self { address, down }
    }

    /// Nobody reaches it any more.
    pub fn goes_down(&self) {
        self.down.store(true, Ordering::SeqCst);
        while TcpStream::connect(self.address).is_ok() {
            std::thread::yield_now();
        }
    }
}

/// The image's digest.
pub fn digest() -> Digest {
    Digest::of(manifest().as_bytes())
}

fn config() -> String {
    json!({
        "os": "linux", "architecture": "amd64", "config": {"Entrypoint": ["/app"]},
        "rootfs": {"type": "layers", "diff_ids": []},
    })
    .to_string()
}

fn manifest() -> String {
    let config = config();
    json!({
        "schemaVersion": 2, "layers": [],
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config.as_bytes()), "size": config.len(),
        },
    })
    .to_string()
}

fn answer(mut stream: &TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    let config = config();
    let (status, body) = if path == format!("/v2/app/manifests/{}", digest()) {
        ("200 OK", manifest())
    } else if path == format!("/v2/app/blobs/{}", Digest::of(config.as_bytes())) {
        ("200 OK", config)
    } else {
        ("404 Not Found", String::new())
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}
