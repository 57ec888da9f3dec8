//! What host and guest say to each other: frames, messages, run archives.
//!
//! Promised: however the bytes are cut, the same frames come out; what was read can be written and read
//! again; a refused stream stays refused.

use tern_guest::archive::parse_run_json;
use tern_guest::{
    Decoder, Encoder, Event, ExecInput, Frame, FrameKind, Reply, Request, RunConfig, Status,
    read_run_archive, run_archive,
};

use crate::input::Input;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % 4 {
        0 => {
            let cut = usize::from(input.byte()) + 1;
            let wire = input.rest();
            let whole = decode(wire, wire.len().max(1));
            assert_eq!(whole, decode(wire, cut));
            whole.iter().for_each(message);
        }
        1 => message(&Frame {
            kind: FrameKind::Json,
            payload: input.rest().to_vec(),
        }),
        2 => {
            if let Ok(config) = parse_run_json(input.rest()) {
                again(&config);
            }
        }
        _ => {
            if let Ok(config) = read_run_archive(input.rest()) {
                again(&config);
            }
        }
    }
}

fn decode(wire: &[u8], cut: usize) -> Vec<Frame> {
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    for piece in wire.chunks(cut) {
        decoder.feed(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => {
                    decoder.feed(&[1, 0, 0, 0, 0]);
                    assert!(decoder.next_frame().is_err(), "an error is for good");
                    return frames;
                }
            }
        }
    }
    frames
}

fn message(frame: &Frame) {
    macro_rules! round_trip {
        ($($kind:ty),*) => {$(
            if let Ok(message) = frame.parse::<$kind>() {
                let mut encoder = Encoder::new();
                // Escapes may make it longer than a frame.
                if encoder.json(&message).is_ok() {
                    let frames = decode(encoder.wire(), 64);
                    assert_eq!(frames[0].parse::<$kind>().unwrap(), message);
                }
            }
        )*};
    }
    round_trip!(Request, Event, Reply, ExecInput, Status);
}

fn again(config: &RunConfig) {
    let archive = run_archive(config).unwrap();
    assert_eq!(read_run_archive(&archive).unwrap(), *config);
    let _ = (config.process.argv(), config.process.merged_env());
}

pub fn seeds() -> Vec<Vec<u8>> {
    let mut wire = Encoder::new();
    wire.json(&Request::Attach { from: 7 }).unwrap();
    wire.raw(FrameKind::Stdout, b"hello");
    wire.raw(FrameKind::Stdin, b"");
    let archive = run_archive(&RunConfig::default()).unwrap();
    let full = br#"{"process":{"exec":["/bin/sh"],"env":[["A","b"]]},"interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","addresses":["fdaa:0:1::2/112"]}],"files":[{"guest_path":"/etc/x","content":"aGk="}],"mounts":[{"device":"/dev/vdc","path":"/data"}],"hosts":[{"ip":"::1","names":["a"]}],"rlimits":[{"resource":"nofile","soft":1,"hard":1}]}"#;
    let messages: [&[u8]; 7] = [
        br#"{"request":"exec","cmd":["sh"],"env":[["A","b"]],"tty":{"rows":1,"cols":2}}"#,
        br#"{"request":"resumed","unix_nanos":1,"entropy":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#,
        br#"{"request":"stop","signo":15,"timeout_ms":10}"#,
        br#"{"event":"log","seq":1,"stream":"stdout","unix_ms":5,"line":"x"}"#,
        br#"{"event":"exited","code":1,"signal":null,"oom_killed":false}"#,
        br#"{"reply":"error","message":"no"}"#,
        br#"{"input":"resize","rows":1,"cols":2}"#,
    ];
    let mut seeds = vec![
        [&[0, 3], wire.wire()].concat(),
        [&[3], &archive[..]].concat(),
        [&[2], &full[..]].concat(),
    ];
    seeds.extend(messages.map(|text| [&[1], text].concat()));
    seeds
}
