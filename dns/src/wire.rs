//! As much of a DNS message as forwarding needs (RFC 1035 section 4): the header, the question, and
//! where the times to live are. A forwarded answer is passed on byte for byte, so that record types
//! nobody here has heard of arrive too.

use std::ops::Range;

/// Bytes of a header.
pub(crate) const HEADER: usize = 12;
/// Largest UDP answer: unfragmented on any path (the "DNS flag day" of 2020).
pub(crate) const MAX_UDP: u16 = 1232;
/// Largest UDP answer for who does not say (RFC 1035 section 4.2.1).
pub(crate) const MAX_UDP_WITHOUT_EDNS: u16 = 512;

/// Bits of the header's second word.
pub(crate) mod flag {
    pub(crate) const RESPONSE: u16 = 1 << 15;
    pub(crate) const OPCODE: u16 = 0b1111 << 11;
    pub(crate) const TRUNCATED: u16 = 1 << 9;
    pub(crate) const RECURSION_DESIRED: u16 = 1 << 8;
    pub(crate) const RECURSION_AVAILABLE: u16 = 1 << 7;
    pub(crate) const CHECKING_DISABLED: u16 = 1 << 4;
    pub(crate) const RCODE: u16 = 0b1111;
}

/// Response codes that are made without `hickory-proto`.
pub(crate) mod rcode {
    pub(crate) const NO_ERROR: u16 = 0;
    pub(crate) const FORMAT_ERROR: u16 = 1;
    pub(crate) const SERVER_FAILURE: u16 = 2;
    pub(crate) const NO_SUCH_NAME: u16 = 3;
    pub(crate) const NOT_IMPLEMENTED: u16 = 4;
}

const OPT: u16 = 41;
const SOA: u16 = 6;
/// The root's name, `OPT`, size, extended code and version, flags, no data.
const OPT_LENGTH: usize = 11;
const DNSSEC_OK: u16 = 1 << 15;

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: u16,
    pub(crate) flags: u16,
    /// Questions, answers, authorities, additionals.
    pub(crate) counts: [u16; 4],
}

/// What a client says of itself in EDNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Edns {
    /// The largest answer it takes over UDP.
    pub(crate) size: u16,
    pub(crate) dnssec_ok: bool,
}

/// A record, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    kind: u16,
    ttl: Range<usize>,
    data: Range<usize>,
}

impl Header {
    pub(crate) fn read(message: &[u8]) -> Option<Self> {
        message.get(..HEADER)?;
        let counts = [4, 6, 8, 10].map(|at| u16_at(message, at).unwrap_or_default());
        Some(Self {
            id: u16_at(message, 0)?,
            flags: u16_at(message, 2)?,
            counts,
        })
    }

    pub(crate) fn rcode(self) -> u16 {
        self.flags & flag::RCODE
    }
}

/// The question's bytes, where there is exactly one. Names in questions are written out.
pub(crate) fn question(message: &[u8]) -> Option<&[u8]> {
    if Header::read(message)?.counts[0] != 1 {
        return None;
    }
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => break,
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    message.get(HEADER..at + 5)
}

/// An error as the answer to a message, with its question if that could be read.
pub(crate) fn error(asked: Header, question: &[u8], edns: Option<Edns>, code: u16) -> Vec<u8> {
    let kept = asked.flags & (flag::OPCODE | flag::RECURSION_DESIRED | flag::CHECKING_DISABLED);
    let flags = flag::RESPONSE | flag::RECURSION_AVAILABLE | kept | code;
    message(
        asked.id,
        flags,
        question,
        edns.map(|e| Edns { size: MAX_UDP, ..e }),
    )
}

/// A question to another resolver.
pub(crate) fn query(id: u16, flags: u16, question: &[u8], edns: Option<Edns>) -> Vec<u8> {
    message(id, flags, question, edns)
}

/// Whether a message answers a question that was asked as `query` writes it.
pub(crate) fn answers(message: &[u8], id: u16, asked: &[u8]) -> bool {
    Header::read(message).is_some_and(|h| h.id == id && h.flags & flag::RESPONSE != 0)
        && question(message).is_some_and(|q| q.eq_ignore_ascii_case(asked))
}

/// Gives an answer the number and the question's spelling of somebody else who asks the same.
pub(crate) fn readdress(message: &mut [u8], id: u16, question: &[u8]) {
    message[..2].copy_from_slice(&id.to_be_bytes());
    if let Some(place) = message.get_mut(HEADER..HEADER + question.len()) {
        place.copy_from_slice(question);
    }
}

/// An answer that was cut to nothing: ask again over TCP.
pub(crate) fn truncated(message: &[u8], question: &[u8], edns: Option<Edns>) -> Option<Vec<u8>> {
    let header = Header::read(message)?;
    let flags = header.flags | flag::TRUNCATED;
    Some(self::message(header.id, flags, question, edns))
}

/// How many seconds an answer may be kept: the least of its records, or what the zone says of names
/// that do not exist (RFC 2308 section 5). `None` when it cannot be kept, or read.
pub(crate) fn lifetime(message: &[u8]) -> Option<u32> {
    let header = Header::read(message)?;
    let negative = header.rcode() == rcode::NO_SUCH_NAME || header.counts[1] == 0;
    if header.flags & flag::TRUNCATED != 0
        || !matches!(header.rcode(), rcode::NO_ERROR | rcode::NO_SUCH_NAME)
    {
        return None;
    }
    let records = records(message)?;
    let ttl = |r: &Record| u32_at(message, r.ttl.start);
    if negative {
        let soa = records.iter().find(|r| r.kind == SOA)?;
        let minimum = u32_at(message, soa.data.end.checked_sub(4)?)?;
        return Some(ttl(soa)?.min(minimum));
    }
    records
        .iter()
        .filter(|r| r.kind != OPT)
        .filter_map(ttl)
        .min()
}

/// Takes the seconds that an answer was kept off its times to live.
pub(crate) fn age(message: &mut [u8], seconds: u32) {
    for record in records(message).unwrap_or_default() {
        if record.kind != OPT
            && let Some(place) = message.get_mut(record.ttl)
        {
            let ttl = place.try_into().map_or(0, u32::from_be_bytes);
            place.copy_from_slice(&ttl.saturating_sub(seconds).to_be_bytes());
        }
    }
}

fn message(id: u16, flags: u16, question: &[u8], edns: Option<Edns>) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + question.len() + OPT_LENGTH);
    let counts = [
        u16::from(!question.is_empty()),
        0,
        0,
        u16::from(edns.is_some()),
    ];
    for word in [id, flags].into_iter().chain(counts) {
        message.extend(word.to_be_bytes());
    }
    message.extend(question);
    if let Some(edns) = edns {
        message.push(0);
        let flags = if edns.dnssec_ok { DNSSEC_OK } else { 0 };
        for word in [OPT, edns.size, 0, flags, 0] {
            message.extend(word.to_be_bytes());
        }
    }
    message
}

/// All records after the question.
fn records(message: &[u8]) -> Option<Vec<Record>> {
    let header = Header::read(message)?;
    let mut at = HEADER + question(message)?.len();
    let mut records = Vec::new();
    for _ in 0..header.counts[1..].iter().map(|n| usize::from(*n)).sum() {
        at = after_name(message, at)?;
        let kind = u16_at(message, at)?;
        let data = at + 10;
        let end = data + usize::from(u16_at(message, at + 8)?);
        message.get(data..end)?;
        records.push(Record {
            kind,
            ttl: at + 4..at + 8,
            data: data..end,
        });
        at = end;
    }
    Some(records)
}

/// Where a name ends, which may do so by pointing elsewhere.
fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv6Addr;
    use std::str::FromStr as _;

    use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::{AAAA, SOA};
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;

    use super::*;

    /// A question for a name's addresses.
    pub(crate) fn asked(name: &str) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(
            Name::from_str(name).unwrap(),
            RecordType::AAAA,
        ));
        message.to_vec().unwrap()
    }

    /// An answer with addresses of these times to live, or none.
    pub(crate) fn answered(name: &str, ttls: &[u32], code: ResponseCode) -> Vec<u8> {
        let name = Name::from_str(name).unwrap();
        let mut message = Message::response(7, OpCode::Query);
        message.metadata.response_code = code;
        message.add_query(Query::query(name.clone(), RecordType::AAAA));
        for ttl in ttls {
            let data = RData::AAAA(AAAA(Ipv6Addr::LOCALHOST));
            message.add_answer(Record::from_rdata(name.clone(), *ttl, data));
        }
        if ttls.is_empty() {
            let soa = SOA::new(name.clone(), name.clone(), 1, 2, 3, 4, 60);
            message.add_authority(Record::from_rdata(name, 900, RData::SOA(soa)));
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn an_answer_lives_as_long_as_its_shortest_record() {
        let code = ResponseCode::NoError;
        assert_eq!(
            lifetime(&answered("a.example.", &[300, 20, 60], code)),
            Some(20)
        );
        assert_eq!(lifetime(&answered("a.example.", &[], code)), Some(60));
        let gone = answered("a.example.", &[], ResponseCode::NXDomain);
        assert_eq!(lifetime(&gone), Some(60));
        let failed = answered("a.example.", &[300], ResponseCode::ServFail);
        assert_eq!(lifetime(&failed), None);
    }

    #[test]
    fn aging_touches_times_and_nothing_else() {
        let mut message = answered("a.example.", &[300, 20], ResponseCode::NoError);
        age(&mut message, 50);
        assert_eq!(
            message,
            answered("a.example.", &[250, 0], ResponseCode::NoError)
        );
    }

    #[test]
    fn what_we_write_others_read() {
        let asked = asked("a.example.");
        let question = question(&asked).unwrap();
        let edns = Some(Edns {
            size: 1232,
            dnssec_ok: true,
        });
        let sent = Message::from_vec(&query(9, flag::RECURSION_DESIRED, question, edns)).unwrap();
        assert_eq!(sent.queries[0].name().to_ascii(), "a.example.");
        assert!(sent.edns.as_ref().unwrap().flags().dnssec_ok);
        assert_eq!(sent.max_payload(), 1232);
        let header = Header::read(&asked).unwrap();
        let failed = error(header, question, edns, rcode::SERVER_FAILURE);
        assert!(answers(&failed, 7, question) && !answers(&failed, 8, question));
        let failed = Message::from_vec(&failed).unwrap();
        assert_eq!(failed.response_code, ResponseCode::ServFail);
        assert!(failed.recursion_desired && failed.recursion_available);
    }

    #[test]
    fn an_answer_to_another_question_is_none() {
        let asked = asked("a.example.");
        let question = question(&asked).unwrap();
        let code = ResponseCode::NoError;
        assert!(answers(&answered("A.Example.", &[1], code), 7, question));
        assert!(!answers(&answered("b.example.", &[1], code), 7, question));
        assert!(!answers(&asked, 7, question), "it is a question itself");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
            let mut real = answered("a.example.", &[300, 20], ResponseCode::NoError);
            for (at, value) in flips {
                *at.get_mut(&mut real) = value;
            }
            for message in [&mut bytes, &mut real] {
                let _ = (lifetime(message), question(message), answers(message, 0, &[]));
                age(message, 1);
            }
        }
    }
}
