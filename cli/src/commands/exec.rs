//! `tern machine exec`: a command in a Machine, told as it comes, byte for byte.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame as BodyFrame;
use tern_api::{EXEC_MEDIA_TYPE, ExecEnd, ExecStart};
use tern_guest::frame::MAX_PAYLOAD;
use tern_guest::{Decoder, Encoder, FrameKind};
use tokio::sync::mpsc;

use crate::client::{Body, Client, full};

/// What is read of the input before the Machine takes it: one frame is under way, another is being read.
const AHEAD: usize = 1;

/// Input as it is read.
pub type Input = mpsc::Receiver<std::io::Result<Vec<u8>>>;

/// Reads in a thread of its own, which nobody waits for: a terminal may never say another word.
pub fn read_ahead(mut from: impl Read + Send + 'static) -> Input {
    let (tell, told) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let read = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => Ok(buffer[..length].to_vec()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = read.is_err();
            if tell.blocking_send(read).is_err() || failed {
                return;
            }
        }
    });
    told
}

/// Runs a command in the Machine at `path` and returns what to exit with. An error where it is not known that all of
/// its output has come.
///
/// Whoever does not take the output here holds up all of this, and so in the end the command.
pub async fn run(
    client: &Client,
    path: &str,
    mut command: Vec<String>,
    timeout: Option<Duration>,
    input: Option<Input>,
    (mut stdout, mut stderr): (impl Write, impl Write),
) -> Result<u8> {
    let mut start = ExecStart {
        stdin: input.is_some(),
        timeout: timeout.map(|t| t.as_secs().max(1)),
        ..ExecStart::default()
    };
    match &mut command[..] {
        // One argument may hold a whole command, as with `fly machine exec`.
        [line] => start.cmd = Some(std::mem::take(line)),
        _ => start.command = command,
    }
    let request = client
        .request(Method::POST, &format!("{path}/exec/stream"))
        .header(header::CONTENT_TYPE, EXEC_MEDIA_TYPE)
        .body(body(&start, input)?)?;
    let mut answer = client.call(request).await?.into_body();
    let mut decoder = Decoder::new();
    while let Some(more) = answer.frame().await {
        let more = more.context(BROKEN_OFF)?;
        if let Some(bytes) = more.data_ref() {
            decoder.feed(bytes);
        }
        while let Some(frame) = decoder.next_frame().context(NONSENSE)? {
            let written = match frame.kind {
                FrameKind::Stdout => stdout.write_all(&frame.payload),
                FrameKind::Stderr => stderr.write_all(&frame.payload),
                FrameKind::Json => {
                    stdout.flush().context(UNWRITTEN)?;
                    stderr.flush().context(UNWRITTEN)?;
                    return ended(frame.parse().context(NONSENSE)?);
                }
                FrameKind::Stdin => bail!(NONSENSE),
            };
            written.context(UNWRITTEN)?;
        }
        stdout.flush().context(UNWRITTEN)?;
        stderr.flush().context(UNWRITTEN)?;
    }
    bail!(BROKEN_OFF)
}

/// The request: what to run, and then the input as it is read.
fn body(start: &ExecStart, input: Option<Input>) -> Result<Body> {
    let mut first = Encoder::new();
    first
        .json(start)
        .context("the command is too long; put it into a file in the Machine")?;
    let Some(input) = input else {
        return Ok(full(first.take()));
    };
    let first = futures::stream::iter([Ok(BodyFrame::data(Bytes::from(first.take())))]);
    // The end of the body is the end of the input. One that cannot be read breaks the request off instead, and ends the
    // command: half a file must not be taken for all of it.
    let rest = futures::stream::unfold(input, async |mut input| {
        let frame = input.recv().await?.map(|bytes| {
            let mut wire = Encoder::new();
            wire.raw(FrameKind::Stdin, &bytes);
            BodyFrame::data(Bytes::from(wire.take()))
        });
        Some((frame, input))
    });
    Ok(StreamBody::new(first.chain(rest)).boxed_unsync())
}

/// What to exit with: where a signal ended it, as a shell does. The guest says both, and may say anything.
fn ended(end: ExecEnd) -> Result<u8> {
    let code = match end {
        ExecEnd::Exited {
            exit_signal: Some(signal),
            ..
        } if signal > 0 => signal.saturating_add(128),
        ExecEnd::Exited { exit_code, .. } => exit_code,
        ExecEnd::Failed { error } => bail!("{error}. What was written is not all of its output"),
    };
    Ok(u8::try_from(code).unwrap_or(1))
}

const BROKEN_OFF: &str = "the connection broke before the command ended, and what was written is not all of its output; \
                          see `tern machine status`, and run it again";
const NONSENSE: &str =
    "the server's answer makes no sense; is this `tern` of the same version as the server's?";
const UNWRITTEN: &str = "the command's output cannot be written here";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::World;

    /// The world, and the path of a Machine in it.
    async fn machine() -> (World, String) {
        let world = World::new().await;
        world.app("shop", "").await;
        let made: serde_json::Value = world
            .client
            .post(
                "/v1/apps/shop/machines",
                &serde_json::json!({"config": {"image": "example.com/good"}}),
            )
            .await
            .unwrap();
        let id = made["id"].as_str().unwrap();
        let path = format!("/v1/apps/shop/machines/{id}");
        (world, path)
    }

    async fn exec(
        world: &World,
        path: &str,
        command: &[&str],
        input: Option<Input>,
    ) -> (Result<u8>, Vec<u8>, Vec<u8>) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let outputs = (&mut stdout, &mut stderr);
        let code = run(&world.client, path, command, None, input, outputs).await;
        (code, stdout, stderr)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_byte_arrives_in_order_however_many() {
        const MIB: usize = 64;
        let (world, path) = machine().await;
        let (code, stdout, stderr) = exec(&world, &path, &["bytes", &MIB.to_string()], None).await;
        assert_eq!(code.unwrap(), 0);
        assert_eq!(stdout.len(), MIB << 20);
        let in_order = |bytes: &[u8]| bytes.iter().enumerate().all(|(n, b)| *b == (n % 256) as u8);
        assert!(in_order(&stdout) && in_order(&stderr) && stderr.len() == 256);
    }

    #[tokio::test]
    async fn a_command_ends_as_in_a_shell() {
        let (world, path) = machine().await;
        for code in [0, 1, 7, 126, 127, 137, 143, 255] {
            let (ended, ..) = exec(&world, &path, &["exit", &code.to_string()], None).await;
            assert_eq!(i32::from(ended.unwrap()), code);
        }
        let exited = |exit_code, exit_signal| ExecEnd::Exited {
            exit_code,
            exit_signal,
            oom_killed: false,
        };
        assert_eq!(ended(exited(0, Some(9))).unwrap(), 137);
        assert_eq!(ended(exited(0, Some(i32::MAX))).unwrap(), 1);
        assert_eq!(ended(exited(-1, Some(i32::MIN))).unwrap(), 1);
    }

    #[tokio::test]
    async fn half_an_output_is_no_success() {
        let (world, path) = machine().await;
        let (ended, stdout, _) = exec(&world, &path, &["vanish", "now"], None).await;
        assert_eq!(stdout, b"half");
        let error = ended.unwrap_err().to_string();
        assert!(error.contains("not all of its output"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn input_is_given_to_its_end() {
        let (world, path) = machine().await;
        let given: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
        let input = read_ahead(std::io::Cursor::new(given.clone()));
        let (ended, stdout, _) = exec(&world, &path, &["cat", "-"], Some(input)).await;
        assert_eq!(ended.unwrap(), 0);
        assert!(stdout == given, "{} bytes", stdout.len());
    }

    #[tokio::test]
    async fn half_an_input_is_not_taken_for_all_of_it() {
        let (world, path) = machine().await;
        let (tell, input) = mpsc::channel(2);
        tell.send(Ok(b"half".to_vec())).await.unwrap();
        tell.send(Err(std::io::Error::other("a bad sector")))
            .await
            .unwrap();
        let (ended, ..) = exec(&world, &path, &["cat", "-"], Some(input)).await;
        assert!(ended.is_err());
    }
}
