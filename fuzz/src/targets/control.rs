//! Bytes at the monitor's control socket.
//!
//! Promised: every answer is HTTP; no more commands are carried out than there are requests that name
//! one with its method; the connection ends when its client has.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use tern_vmm::control::{Answer, Command, ControlError, serve_client};
use tern_vmm::run::Event;

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
}

pub fn run(bytes: &[u8]) {
    let (mut client, server) = UnixStream::pair().unwrap();
    // Inputs are shorter than a socket's buffer, and so are the answers to them.
    client.write_all(bytes).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    server.set_nonblocking(true).unwrap();
    let (send, receive) = channel();
    let mut commands = Vec::new();
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let server = tokio::net::UnixStream::from_std(server).unwrap();
            let mut served = std::pin::pin!(serve_client(server, send));
            loop {
                tokio::select! {
                    biased;
                    () = &mut served => break,
                    () = tokio::task::yield_now() => {}
                }
                while let Ok(Event::Request(request)) = receive.try_recv() {
                    commands.push(request.command);
                    request.reply.send(match request.command {
                        Command::Pause => Err(ControlError::Conflict("it is paused".into())),
                        _ => Ok(Answer::Done),
                    });
                }
            }
        });
    });
    let mut answers = Vec::new();
    client.read_to_end(&mut answers).unwrap();
    assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."));
    let count = |needle: &[u8]| bytes.windows(needle.len()).filter(|w| *w == needle).count();
    let stops = commands.iter().filter(|c| **c == Command::Stop).count();
    assert!(stops <= count(b"POST").min(count(b"/v1/vm/stop")).min(1));
    assert!(commands.len() <= count(b"/v1/vm"));
}

pub fn seeds() -> Vec<Vec<u8>> {
    [
        "GET /v1/vm HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /v1/vm/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\nPOST /v1/vm/resume HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /v1/vm/snapshot HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "POST /v1/vm/stop HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "DELETE /nowhere?x=1 HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
