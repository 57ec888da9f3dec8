//! From the bytes of a question to the bytes of an answer, or to a question for upstream.

use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;

use hickory_proto::op::{Edns as WireEdns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{AAAA, PTR, SOA, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tern_catalog::{INFRASTRUCTURE, NetworkId, PrivateAddress, Revision, Snapshot};

use crate::reverse;
use crate::wire::{self, Edns, Header, MAX_UDP, MAX_UDP_WITHOUT_EDNS, flag, rcode};
use crate::zone::{Asker, Found, Zone};

/// Seconds that an answer may be kept: Machines come and go in less than a minute.
const TTL: u32 = 5;
/// Bytes of one string in a TXT record (RFC 1035 section 3.3).
const STRING: usize = 255;

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// What becomes of a question.
#[derive(Debug)]
pub(crate) enum Decision {
    /// It is none, and gets no answer.
    Ignore,
    /// This is the answer.
    Answer(Vec<u8>),
    /// It is for upstream.
    Forward(Question),
}

/// A question for upstream.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    /// The network that asks.
    pub(crate) network: NetworkId,
    pub(crate) header: Header,
    /// The question section.
    pub(crate) bytes: Vec<u8>,
    pub(crate) edns: Option<Edns>,
    pub(crate) transport: Transport,
}

/// Answers questions.
#[derive(Debug)]
pub(crate) struct Responder {
    zone: Zone,
    /// The network of those who ask from outside the private network, or from a host.
    local_network: Option<NetworkId>,
}

static INTERNAL: LazyLock<Name> = LazyLock::new(|| name("internal."));
static REVERSE: LazyLock<Name> = LazyLock::new(|| name("a.a.d.f.ip6.arpa."));
static SERVER: LazyLock<Name> = LazyLock::new(|| name("_api.internal."));
static CONTACT: LazyLock<Name> = LazyLock::new(|| name("hostmaster.internal."));

impl Responder {
    pub(crate) fn new(local_network: Option<NetworkId>) -> Self {
        let zone = Zone::default();
        Self {
            zone,
            local_network,
        }
    }

    /// Decides about a message.
    pub(crate) fn decide(
        &self,
        snapshot: &Snapshot,
        from: SocketAddr,
        transport: Transport,
        message: &[u8],
    ) -> Decision {
        let Some(header) = Header::read(message) else {
            return Decision::Ignore;
        };
        if header.flags & flag::RESPONSE != 0 {
            // Answering answers is how two servers talk forever.
            return Decision::Ignore;
        }
        let error = |code| Decision::Answer(wire::error(header, &[], None, code));
        if header.flags & flag::OPCODE != 0 {
            return error(rcode::NOT_IMPLEMENTED);
        }
        // One question, and at most EDNS and a signature besides. What counts more is not even read.
        if !matches!(header.counts, [1, 0, 0, 0..=2]) {
            return error(rcode::FORMAT_ERROR);
        }
        let (Some(bytes), Ok(request)) = (wire::question(message), Message::from_vec(message))
        else {
            return error(rcode::FORMAT_ERROR);
        };
        let edns = request.edns.as_ref().map(|edns| Edns {
            size: edns.max_payload().clamp(MAX_UDP_WITHOUT_EDNS, MAX_UDP),
            dnssec_ok: edns.flags().dnssec_ok,
        });
        let question = |network| Question {
            network,
            header,
            bytes: bytes.to_vec(),
            edns,
            transport,
        };
        match self.answer(snapshot, from, &request) {
            Ok(answer) => Decision::Answer(encode(&answer, edns, transport)),
            Err(network) => Decision::Forward(question(network)),
        }
    }

    /// The answer, or the network for which somebody else has to be asked.
    fn answer(
        &self,
        snapshot: &Snapshot,
        from: SocketAddr,
        request: &Message,
    ) -> Result<Message, NetworkId> {
        let mut answer = begin(request);
        let query = &request.queries[0];
        let Some(asker) = self.asker(from.ip()) else {
            return Ok(refuse(answer, ResponseCode::Refused));
        };
        if request.version() > 0 {
            return Ok(refuse(answer, ResponseCode::BADVERS));
        }
        let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        if query.query_class() != DNSClass::IN || transfer {
            return Ok(refuse(answer, ResponseCode::Refused));
        }
        let lowercase = query.name().to_lowercase();
        let labels: Option<Vec<&str>> = lowercase
            .iter()
            .map(|label| std::str::from_utf8(label).ok())
            .collect();
        let in_zone = INTERNAL.zone_of(&lowercase);
        let in_reverse = REVERSE.zone_of(&lowercase);
        if !in_zone && !in_reverse {
            return match request.recursion_desired {
                true => Err(asker.network),
                false => Ok(refuse(answer, ResponseCode::Refused)),
            };
        }
        let apex = if in_zone { &*INTERNAL } else { &*REVERSE };
        let soa = soa(snapshot.revision);
        let data = labels.and_then(|labels| match in_zone {
            true => self.in_zone(snapshot, asker, &labels, &soa),
            false => in_reverse_zone(snapshot, asker, &labels, &soa),
        });
        fill(&mut answer, query, apex, soa, data);
        Ok(answer)
    }

    /// All that is at a name under `internal.`; `None` where there is no such name.
    fn in_zone(
        &self,
        snapshot: &Snapshot,
        asker: Asker,
        labels: &[&str],
        soa: &SOA,
    ) -> Option<Vec<RData>> {
        let (_internal, labels) = labels.split_last()?;
        match self.zone.find(snapshot, asker, labels) {
            Found::Nothing => None,
            Found::Empty if labels.is_empty() => Some(vec![RData::SOA(soa.clone())]),
            Found::Empty => Some(Vec::new()),
            Found::Addresses(all) => Some(all.into_iter().map(|a| RData::AAAA(AAAA(a))).collect()),
            Found::Text(text) if text.is_empty() => Some(Vec::new()),
            Found::Text(text) => {
                let strings = text.as_bytes().chunks(STRING).collect();
                Some(vec![RData::TXT(TXT::from_bytes(strings))])
            }
        }
    }

    /// Who asks from this address. A host is asked in the name of the configured network.
    fn asker(&self, from: IpAddr) -> Option<Asker> {
        let address = match from {
            IpAddr::V6(v6) => PrivateAddress::parse(v6),
            IpAddr::V4(_) => None,
        };
        match address {
            Some(a) if a.network != INFRASTRUCTURE => Some(Asker {
                network: a.network,
                host: Some(a.host),
            }),
            other => Some(Asker {
                network: self.local_network?,
                host: other.map(|a| a.host),
            }),
        }
    }
}

/// All that is at a reverse name inside the private network.
fn in_reverse_zone(
    snapshot: &Snapshot,
    asker: Asker,
    labels: &[&str],
    soa: &SOA,
) -> Option<Vec<RData>> {
    let nibbles = reverse::nibbles(labels)?;
    if labels.len() == usize::from(REVERSE.num_labels()) {
        return Some(vec![RData::SOA(soa.clone())]);
    }
    let pointer = reverse::find(snapshot, asker, nibbles)?;
    let pointer = Name::from_ascii(format!("{pointer}.")).ok()?;
    Some(vec![RData::PTR(PTR(pointer))])
}

fn begin(request: &Message) -> Message {
    let mut answer = Message::response(request.id, OpCode::Query);
    answer.metadata.recursion_desired = request.recursion_desired;
    answer.metadata.checking_disabled = request.checking_disabled;
    answer.metadata.recursion_available = true;
    answer.add_query(request.queries[0].clone());
    if let Some(edns) = &request.edns {
        let mut own = WireEdns::new();
        own.set_max_payload(MAX_UDP);
        own.set_dnssec_ok(edns.flags().dnssec_ok);
        answer.set_edns(own);
    }
    answer
}

fn refuse(mut answer: Message, code: ResponseCode) -> Message {
    answer.metadata.response_code = code;
    answer
}

/// Puts into the answer what was asked for of all there is. Who gets nothing learns from the SOA how
/// soon to ask again (RFC 2308).
fn fill(answer: &mut Message, query: &Query, apex: &Name, soa: SOA, data: Option<Vec<RData>>) {
    answer.metadata.authoritative = true;
    if data.is_none() {
        answer.metadata.response_code = ResponseCode::NXDomain;
    }
    let wanted = |data: &RData| {
        query.query_type() == RecordType::ANY || data.record_type() == query.query_type()
    };
    let data = data.into_iter().flatten().filter(wanted);
    answer.add_answers(data.map(|data| Record::from_rdata(query.name().clone(), TTL, data)));
    if answer.answers.is_empty() {
        answer.add_authority(Record::from_rdata(apex.clone(), TTL, RData::SOA(soa)));
    }
}

/// The serial is the catalog's revision, as far as 32 bits go.
fn soa(revision: Revision) -> SOA {
    let (server, contact) = (SERVER.clone(), CONTACT.clone());
    SOA::new(server, contact, revision as u32, 60, 5, 3600, TTL)
}

/// The answer's bytes, or as many as may be sent.
fn encode(answer: &Message, edns: Option<Edns>, transport: Transport) -> Vec<u8> {
    let most = match transport {
        Transport::Udp => usize::from(edns.map_or(MAX_UDP_WITHOUT_EDNS, |e| e.size)),
        Transport::Tcp => usize::from(u16::MAX),
    };
    let whole = answer.to_vec().ok().filter(|bytes| bytes.len() <= most);
    whole
        .or_else(|| answer.truncate().to_vec().ok())
        .unwrap_or_default()
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("the names in this file are names")
}

#[cfg(test)]
mod tests;
