//! Read buffers, shared by the connections of a thread: one that waits for its next message holds none.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// Size of a buffer for heads and small content: most of both fit.
pub const SMALL: usize = 16 << 10;
/// What is read at once of large content.
pub const LARGE: usize = 64 << 10;
/// Buffers kept by a thread.
const KEPT: usize = 256;

thread_local! {
    static FREE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Reads what is there into `input`, at most about `size`. `Ok(0)` is the end.
pub fn poll_fill<S: AsyncRead + Unpin>(
    io: &mut S,
    cx: &mut Context<'_>,
    input: &mut BytesMut,
    size: usize,
) -> Poll<io::Result<usize>> {
    if input.capacity() == 0
        && let Some(free) = FREE.with_borrow_mut(Vec::pop)
    {
        *input = free;
    }
    if input.capacity() - input.len() < size / 4 {
        input.reserve(size);
    }
    let read = poll_read_buf(Pin::new(io), cx, input);
    if read.is_pending() {
        release(input);
    }
    read
}

/// Gives an empty buffer back.
pub fn release(input: &mut BytesMut) {
    if !input.is_empty() || input.capacity() == 0 {
        return;
    }
    let mut free = std::mem::take(input);
    // Whoever still holds a part of it keeps it; then there is nothing to give back.
    if free.try_reclaim(SMALL) && free.capacity() <= LARGE {
        FREE.with_borrow_mut(|all| {
            if all.len() < KEPT {
                all.push(free);
            }
        });
    }
}
