//! The two ways by which bytes come in, for the fuzzer: a question, and an upstream's answer.

use std::net::SocketAddr;

use hickory_proto::op::Message;
use tern_catalog::{NetworkId, Snapshot};

use crate::reply::{Decision, Responder, Transport};
use crate::wire::{self, Edns, Header};

/// What becomes of a question.
#[derive(Debug)]
pub enum Outcome {
    /// No answer at all.
    Ignored,
    /// An answer, which a client can read.
    Answered(Vec<u8>),
    /// A question to an upstream, in the name of this network.
    Forwarded(NetworkId, Vec<u8>),
}

/// Decides about `message`. Panics if an answer is made that nobody can read.
pub fn ask(snapshot: &Snapshot, from: SocketAddr, tcp: bool, message: &[u8]) -> Outcome {
    let transport = if tcp { Transport::Tcp } else { Transport::Udp };
    match Responder::new(None).decide(snapshot, from, transport, message) {
        Decision::Ignore => Outcome::Ignored,
        Decision::Answer(answer) => {
            if let Err(error) = Message::from_vec(&answer) {
                panic!("an answer that cannot be read: {error}");
            }
            Outcome::Answered(answer)
        }
        Decision::Forward(question) => Outcome::Forwarded(
            question.network,
            wire::query(1, 0, &question.bytes, question.edns),
        ),
    }
}

/// Does with an upstream's `answer` to a forwarded `query` what the forwarder does.
pub fn answer(query: &[u8], answer: &[u8]) -> Option<Vec<u8>> {
    let question = wire::question(query)?;
    let id = Header::read(query)?.id;
    if !wire::answers(answer, id, question) {
        return None;
    }
    let mut kept = answer.to_vec();
    if let Some(seconds) = wire::lifetime(&kept) {
        wire::age(&mut kept, seconds / 2);
    }
    wire::readdress(&mut kept, id, question);
    let edns = Edns {
        size: wire::MAX_UDP,
        dnssec_ok: false,
    };
    wire::truncated(&kept, question, Some(edns))?;
    Some(kept)
}
