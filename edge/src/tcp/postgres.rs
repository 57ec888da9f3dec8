//! What comes before TLS where PostgreSQL is spoken ("Frontend/Backend Protocol", "SSL Session Encryption").

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Length and code of the messages that a client may begin with.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
/// Fields of an ErrorResponse: severity in two ways, SQLSTATE "invalid authorization specification", and text.
const ONLY_TLS: &[u8] =
    b"SFATAL\0VFATAL\0C28000\0Mconnections are taken over TLS alone: connect with sslmode=require\0\0";

/// Answers until TLS begins. A client that wants none is told so.
pub async fn begin(stream: &mut TcpStream) -> io::Result<()> {
    let mut message = [0; 8];
    // Exactly it: were more taken, a stranger in between could put plain text before what is encrypted
    // (CVE-2021-23214).
    stream.read_exact(&mut message).await?;
    if message == GSSENC_REQUEST {
        stream.write_all(b"N").await?;
        stream.read_exact(&mut message).await?;
    }
    if message == SSL_REQUEST {
        return stream.write_all(b"S").await;
    }
    let length = u32::try_from(ONLY_TLS.len() + 4).unwrap_or_default();
    let error = [b"E", &length.to_be_bytes()[..], ONLY_TLS].concat();
    stream.write_all(&error).await?;
    Err(io::Error::other("the client asked for no TLS"))
}

/// Whether a connection's first byte is that of a PostgreSQL message, rather than of TLS.
pub fn begins(first: u8) -> bool {
    first == SSL_REQUEST[0]
}
