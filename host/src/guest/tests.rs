use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream as Blocking};
use std::time::Duration;

use super::*;

/// More than all buffers between a host and its guest hold; the most that the API takes.
const LARGE: usize = 4 << 20;

/// A guest that serves one `exec` by this, with reads and writes that block.
fn guest(serve: impl FnOnce(Blocking, Decoder) + Send + 'static) -> (tempfile::TempDir, Guest) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; "CONNECT 10000\n".len()];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(b"OK 1073741824\n").unwrap();
        let mut decoder = Decoder::new();
        let request: Request = frame(&mut stream, &mut decoder).unwrap().parse().unwrap();
        assert!(matches!(request, Request::Exec(_)));
        serve(stream, decoder);
    });
    let guest = Guest::new(&socket);
    (dir, guest)
}

/// The next frame; `None` when the host has closed.
fn frame(stream: &mut Blocking, decoder: &mut Decoder) -> Option<Frame> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(frame) = decoder.next_frame().unwrap() {
            return Some(frame);
        }
        match stream.read(&mut buffer).unwrap() {
            0 => return None,
            length => decoder.feed(&buffer[..length]),
        }
    }
}

fn exit(code: i32) -> Vec<u8> {
    let status = ExitStatus {
        code,
        ..ExitStatus::default()
    };
    let mut wire = Encoder::new();
    wire.json(&Reply::Exit(status)).unwrap();
    wire.take()
}

/// How a command ended that got this input, and what it wrote.
async fn run(guest: &Guest, stdin: &[u8]) -> (Option<i32>, Vec<u8>) {
    let exec = guest.exec(ExecRequest::default()).await.unwrap();
    let mut written = Vec::new();
    let said = |output| match output {
        ExecOutput::Stdout(bytes) => written.extend(bytes),
        other => panic!("{other:?}"),
    };
    let ended = tokio::time::timeout(Duration::from_secs(120), exec.run(stdin, said)).await;
    let ended = ended.expect("it hangs").unwrap();
    (ended.map(|status| status.code), written)
}

#[tokio::test]
async fn a_command_that_gives_back_what_it_gets_ends() {
    let (_dir, guest) = guest(|mut stream, mut decoder| {
        loop {
            let got = frame(&mut stream, &mut decoder).unwrap();
            assert_eq!(got.kind, FrameKind::Stdin);
            if got.payload.is_empty() {
                break;
            }
            let mut wire = Encoder::new();
            wire.raw(FrameKind::Stdout, &got.payload);
            stream.write_all(wire.wire()).unwrap();
        }
        // Init takes an end of the connection for the wish to end the command, also when all input is there.
        stream.set_nonblocking(true).unwrap();
        let goodbye = stream.read(&mut [0]).is_ok();
        stream.set_nonblocking(false).unwrap();
        stream.write_all(&exit(i32::from(goodbye))).unwrap();
    });
    let stdin: Vec<u8> = (0..LARGE).map(|n| (n % 251) as u8).collect();
    let (code, written) = run(&guest, &stdin).await;
    assert_eq!(code, Some(0));
    assert!(written == stdin, "{} bytes", written.len());
}

#[tokio::test]
async fn the_end_of_a_command_that_reads_nothing_is_told() {
    let (_dir, guest) = guest(|mut stream, _| {
        stream.write_all(&exit(7)).unwrap();
        stream.shutdown(Shutdown::Read).unwrap();
    });
    assert_eq!(run(&guest, &[7; LARGE]).await, (Some(7), Vec::new()));
}

#[tokio::test]
async fn a_guest_that_goes_away_has_not_ended_its_command() {
    let (_dir, guest) =
        guest(
            |mut stream, mut decoder| {
                while !frame(&mut stream, &mut decoder).unwrap().payload.is_empty() {}
            },
        );
    assert_eq!(run(&guest, b"some").await, (None, Vec::new()));
}
