//! What is to be written to a connection: small parts gathered, a large one passed on as it is, all in one
//! system call where the transport can.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// Bytes that wait to be written, in this order: the gathered, the large part, the end of its chunk.
#[derive(Debug, Default)]
pub struct Out {
    gathered: BytesMut,
    large: Bytes,
    chunk_end: &'static [u8],
    framing: Framing,
    /// Something was handed to the transport that it may still hold.
    unflushed: bool,
}

/// How content is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Framing {
    /// As it is.
    #[default]
    Plain,
    Chunked,
}

/// A piece up to this size is copied: that costs less than a vector's second part, in TLS a second record.
const COPIED: usize = 8 << 10;
/// Gathered bytes from which on they are written before more is taken.
const FULL: usize = 16 << 10;
/// A buffer that has grown larger is given back rather than kept.
const KEPT: usize = 32 << 10;

impl Out {
    /// Where a head is written; content after it is framed so.
    pub fn head(&mut self, framing: Framing) -> &mut BytesMut {
        debug_assert!(self.large.is_empty(), "a head after content that waits");
        self.framing = framing;
        &mut self.gathered
    }

    /// Changes how content is written from here on.
    pub fn frame(&mut self, framing: Framing) {
        self.framing = framing;
    }

    /// Whether more may be given before it is flushed.
    pub fn has_room(&self) -> bool {
        self.large.is_empty() && self.gathered.len() < FULL
    }

    pub fn is_empty(&self) -> bool {
        self.gathered.is_empty()
            && self.large.is_empty()
            && self.chunk_end.is_empty()
            && !self.unflushed
    }

    /// Adds content; there must be room.
    pub fn give(&mut self, data: Bytes) {
        if data.is_empty() {
            // As a chunk it would be the last one.
            return;
        }
        debug_assert!(self.large.is_empty(), "content is given when there is room");
        let chunked = self.framing == Framing::Chunked;
        if chunked {
            self.chunk_size(data.len());
        }
        let end: &'static [u8] = if chunked { b"\r\n" } else { b"" };
        if data.len() <= COPIED {
            self.gathered.extend_from_slice(&data);
            self.gathered.extend_from_slice(end);
        } else {
            self.large = data;
            self.chunk_end = end;
        }
    }

    /// Ends content; there must be room. `trailers` is called with where to write them.
    pub fn finish(&mut self, trailers: impl FnOnce(&mut BytesMut)) {
        if self.framing == Framing::Chunked {
            self.settle();
            self.gathered.extend_from_slice(b"0\r\n");
            trailers(&mut self.gathered);
            self.gathered.extend_from_slice(b"\r\n");
        }
    }

    /// Moves what waits behind the gathered bytes to them, so that more can follow.
    fn settle(&mut self) {
        if !self.large.is_empty() || !self.chunk_end.is_empty() {
            self.gathered.extend_from_slice(&self.large);
            self.gathered.extend_from_slice(self.chunk_end);
            self.large = Bytes::new();
            self.chunk_end = b"";
        }
    }

    fn chunk_size(&mut self, size: usize) {
        let mut digits = [0; 16];
        let mut at = digits.len();
        let mut left = size;
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[left & 15];
            left >>= 4;
            if left == 0 {
                break;
            }
        }
        self.gathered.extend_from_slice(&digits[at..]);
        self.gathered.extend_from_slice(b"\r\n");
    }

    /// Writes everything.
    pub fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let written = if !self.large.is_empty() {
                let parts = [
                    IoSlice::new(&self.gathered),
                    IoSlice::new(&self.large),
                    IoSlice::new(self.chunk_end),
                ];
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &parts))?
            } else {
                self.settle();
                if self.gathered.is_empty() {
                    break;
                }
                ready!(Pin::new(&mut *io).poll_write(cx, &self.gathered))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.written(written);
        }
        if self.gathered.capacity() > KEPT {
            self.gathered = BytesMut::new();
        }
        if self.unflushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn written(&mut self, mut count: usize) {
        let gathered = count.min(self.gathered.len());
        self.gathered.advance(gathered);
        count -= gathered;
        let large = count.min(self.large.len());
        self.large.advance(large);
        self.chunk_end = &self.chunk_end[(count - large).min(self.chunk_end.len())..];
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use proptest::prelude::*;
    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::h1::body::Decoder;
    use crate::message::{Length, Piece};

    proptest! {
        /// What is written is what was given, however little the transport takes at once.
        #[test]
        fn what_was_given_is_written(sizes in prop::collection::vec(0usize..20_000, 0..6), takes in 1usize..9000) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (content, received) = runtime.block_on(async {
                let (mut near, mut far) = tokio::io::duplex(takes);
                let reader = tokio::spawn(async move {
                    let mut all = Vec::new();
                    far.read_to_end(&mut all).await.unwrap();
                    all
                });
                let mut out = Out::default();
                out.head(Framing::Chunked).extend_from_slice(b"HEAD");
                let mut content = Vec::new();
                for (n, size) in sizes.iter().enumerate() {
                    while !out.has_room() {
                        poll_fn(|cx| out.poll_flush(&mut near, cx)).await.unwrap();
                    }
                    let data = vec![n as u8 + b'a'; *size];
                    content.extend_from_slice(&data);
                    out.give(data.into());
                }
                out.finish(|_| {});
                poll_fn(|cx| out.poll_flush(&mut near, cx)).await.unwrap();
                assert!(out.is_empty());
                drop(near);
                (content, reader.await.unwrap())
            });
            prop_assert_eq!(&received[..4], b"HEAD");
            let mut input = BytesMut::from(&received[4..]);
            let mut decoder = Decoder::new(Length::Unknown);
            let mut decoded = Vec::new();
            while let Some(Piece::Data(data, _)) = decoder.next(&mut input).unwrap() {
                decoded.extend_from_slice(&data);
            }
            prop_assert_eq!(decoded, content);
            prop_assert!(input.is_empty() && decoder.is_done());
        }
    }
}
