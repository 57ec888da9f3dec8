//! The filter of a meter, in classic BPF (`Documentation/networking/filter.rst`): passes Ethernet frames that
//! tell of a call, and no others.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use libc::sock_filter;

/// A piece of a program. It returns, or goes on behind itself.
type Code = Vec<sock_filter>;

const ETHER_TYPE: u32 = 12;
// IPv6 (RFC 8200) behind the Ethernet header, and what comes behind that.
const PAYLOAD_LENGTH: u32 = 14 + 4;
const NEXT_HEADER: u32 = 14 + 6;
const SOURCE: u32 = 14 + 8;
const DESTINATION: u32 = 14 + 24;
const SOURCE_PORT: u32 = 14 + 40;
const DESTINATION_PORT: u32 = 14 + 42;
const DATA_OFFSET: u32 = 14 + 40 + 12;
const FLAGS: u32 = 14 + 40 + 13;

const PASS: sock_filter = statement(0x06, 1);
const PASS_NOT: sock_filter = statement(0x06, 0);
const AND: u16 = 0x54;
const SHIFT_RIGHT: u16 = 0x74;
const KEEP: sock_filter = statement(0x07, 0);
const SUBTRACT_KEPT: sock_filter = statement(0x1c, 0);
// Conditions, unsigned.
const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
const ANY_BIT: u16 = 0x45;

/// A frame passes that calls the Machine at `address` at one of these ports, or is data of its own over a
/// connection to one. Its host's frames do not.
pub(super) fn calls(address: Ipv6Addr, tcp: &BTreeSet<u16>, udp: &BTreeSet<u16>) -> Code {
    let datagram = at_port(DESTINATION_PORT, udp, vec![PASS]);
    let to_it = [
        vec![load8(NEXT_HEADER)],
        when(EQUAL, libc::IPPROTO_UDP as u32, datagram),
        when(EQUAL, libc::IPPROTO_TCP as u32, {
            let begins = [
                vec![load8(FLAGS), statement(AND, SYN | ACK)],
                when(EQUAL, SYN, vec![PASS]),
            ];
            let segment = [begins.concat(), has_data()].concat();
            at_port(DESTINATION_PORT, tcp, unless_reset(segment))
        }),
    ];
    let by_it = [
        vec![load8(NEXT_HEADER)],
        when(
            EQUAL,
            libc::IPPROTO_TCP as u32,
            at_port(SOURCE_PORT, tcp, unless_reset(has_data())),
        ),
    ];
    let packet = [
        is_address(DESTINATION, address, not_a_host(SOURCE, to_it.concat())),
        is_address(SOURCE, address, not_a_host(DESTINATION, by_it.concat())),
    ];
    [
        vec![load16(ETHER_TYPE)],
        when(EQUAL, libc::ETH_P_IPV6 as u32, packet.concat()),
        vec![PASS_NOT],
    ]
    .concat()
}

const SYN: u32 = 0x02;
const RST: u32 = 0x04;
const ACK: u32 = 0x10;

fn unless_reset(then: Code) -> Code {
    [vec![load8(FLAGS)], when(ANY_BIT, RST, vec![PASS_NOT]), then].concat()
}

/// Whether a TCP segment carries data.
fn has_data() -> Code {
    let header = [
        load8(DATA_OFFSET),
        statement(AND, 0xf0),
        statement(SHIFT_RIGHT, 2),
    ];
    [
        header.to_vec(),
        when(GREATER, 19, {
            let data = [
                vec![KEEP, load16(PAYLOAD_LENGTH), SUBTRACT_KEPT],
                // It would be less than nothing.
                when(GREATER, i32::MAX as u32, vec![PASS_NOT]),
                when(GREATER, 0, vec![PASS]),
            ];
            data.concat()
        }),
        vec![PASS_NOT],
    ]
    .concat()
}

/// A filter has a length that the kernel takes. Who has more services than this is called at any port.
pub(super) const MOST_PORTS: usize = 256;

/// Always returns, if `then` does.
fn at_port(at: u32, ports: &BTreeSet<u16>, then: Code) -> Code {
    if ports.len() > MOST_PORTS {
        return then;
    }
    let mut code = vec![load16(at)];
    for (left, &port) in (0..ports.len()).rev().zip(ports) {
        // Over the tests of the other ports, and the end of those that are at none.
        code.extend([branch(EQUAL, port.into(), 0, 1), jump(2 * left + 1)]);
    }
    code.push(PASS_NOT);
    code.extend(then);
    code
}

fn is_address(at: u32, address: Ipv6Addr, then: Code) -> Code {
    let address = u128::from(address);
    (0..4_u32).rev().fold(then, |then, word| {
        let value = (address >> (96 - 32 * word)) as u32;
        [vec![load32(at + 4 * word)], when(EQUAL, value, then)].concat()
    })
}

/// Network 0 is the hosts' own.
fn not_a_host(at: u32, then: Code) -> Code {
    let of_a_network = [vec![load32(at + 2)], when(EQUAL, 0, vec![PASS_NOT]), then];
    [
        vec![load16(at)],
        when(EQUAL, 0xfdaa, of_a_network.concat()),
        vec![PASS_NOT],
    ]
    .concat()
}

fn when(condition: u16, value: u32, then: Code) -> Code {
    let mut code = vec![branch(condition, value, 1, 0), jump(then.len())];
    code.extend(then);
    code
}

fn branch(condition: u16, value: u32, over_if: u8, over_else: u8) -> sock_filter {
    sock_filter {
        jt: over_if,
        jf: over_else,
        ..statement(condition, value)
    }
}

/// Over so many: as far as need be, which a branch cannot.
fn jump(over: usize) -> sock_filter {
    statement(0x05, over as u32)
}

fn load32(at: u32) -> sock_filter {
    statement(0x20, at)
}

fn load16(at: u32) -> sock_filter {
    statement(0x28, at)
}

fn load8(at: u32) -> sock_filter {
    statement(0x30, at)
}

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}
