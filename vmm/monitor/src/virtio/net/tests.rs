use super::segment::HEAD_BYTES;
use super::segment::tests::Frame;
use super::*;
use crate::config::RateLimit;
use crate::trace::Trace;
use crate::virtio::testing::{Descriptor, Driver, READ, Rings, WRITE, trace};
use proptest::prelude::*;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU32, Ordering};
use vm_memory::{Bytes, GuestAddress};

/// A cable of datagrams: like a TAP, one read or write is one frame.
#[derive(Debug)]
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}

struct Card {
    net: Net<Cable>,
    host: UnixDatagram,
    cx: Context,
    receive: Rings,
    transmit: Rings,
}

const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

fn card(features: u64) -> Card {
    let (host, guest) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    guest.set_nonblocking(true).unwrap();
    let driver = Driver::new(16);
    let (receive, one) = Rings::new(driver.ram.clone(), 0x2_0000, 16);
    let (transmit, two) = Rings::new(driver.ram.clone(), 0x4_0000, 16);
    let mut cx = Context::for_test(driver.ram, vec![one, two], features);
    let mut net = Net::new(Cable(guest), MAC);
    net.start(&mut cx).unwrap();
    Card {
        net,
        host,
        cx,
        receive,
        transmit,
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| if i < VNET_HEADER_BYTES { 0 } else { i as u8 })
        .collect()
}

#[test]
fn a_limited_card_takes_its_time_and_loses_nothing() {
    let limit = |frames| {
        Some(RateLimit {
            bytes_per_second: None,
            burst_bytes: None,
            operations_per_second: Some(frames),
            burst_operations: Some(1),
        })
    };
    let config = NetConfig {
        tap: String::new(),
        mac: MAC,
        receive_limit: limit(50),
        transmit_limit: limit(100),
        vhost: false,
    };
    let mut card = card(0);
    card.net = card.net.limited(&config);
    for at in 0..3 {
        let buffer = Descriptor::at(0x8000 + 0x1000 * at, 2048, WRITE);
        card.receive.offer(&[buffer]);
        card.host.send(&frame(100)).unwrap();
        card.transmit.offer(&[Descriptor::at(0x8000, 100, READ)]);
    }
    let began = Instant::now();
    card.net.on_io(&mut card.cx, LINK, Ready::default());
    card.net.on_queue(&mut card.cx, TRANSMIT);
    let (mut received, mut sent) = (0, 0);
    loop {
        received += card.receive.take_used().len();
        sent += card.transmit.take_used().len();
        if (received, sent) == (3, 3) {
            break;
        }
        let until = card.net.deadline().expect("it has a reason to wait");
        // A driver that kicks does not get more by it.
        card.net.on_queue(&mut card.cx, TRANSMIT);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        card.net.on_deadline(&mut card.cx, Instant::now());
    }
    // The burst is one; a frame begins when a part of the last one's debt is paid.
    assert!(began.elapsed() >= std::time::Duration::from_millis(20));
    while let Some(until) = card.net.deadline() {
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        card.net.on_deadline(&mut card.cx, Instant::now());
    }
    assert!(card.net.watching, "what comes next is heard of");
    let counts = &card.net.metrics;
    let frames = (counts.received_frames.get(), counts.sent_frames.get());
    let bytes = (counts.received_bytes.get(), counts.sent_bytes.get());
    let each = 100 - VNET_HEADER_BYTES as u64;
    assert_eq!((frames, bytes), ((3, 3), (3 * each, 3 * each)));
    assert!(counts.limited.get() > 0);
}

#[test]
fn frames_go_both_ways() {
    let mut card = card(0);
    card.receive.offer(&[Descriptor::at(0x8000, 2048, WRITE)]);
    card.host.send(&frame(100)).unwrap();
    card.net.on_io(&mut card.cx, LINK, Ready::default());
    assert_eq!(card.receive.take_used(), [(0, 100)]);
    let mut bytes = vec![0; 100];
    card.cx
        .ram
        .read_slice(&mut bytes, GuestAddress(0x8000))
        .unwrap();
    let mut expected = frame(100);
    expected[NUM_BUFFERS] = 1;
    assert_eq!(bytes, expected);

    card.transmit.offer(&[
        Descriptor::at(0x8000, 12, READ),
        Descriptor::at(0x800c, 88, READ),
    ]);
    card.net.on_queue(&mut card.cx, TRANSMIT);
    assert_eq!(card.transmit.take_used(), [(0, 0)]);
    let mut sent = [0; 200];
    assert_eq!(card.host.recv(&mut sent).unwrap(), 100);
    assert_eq!(sent[..100], expected);
}

#[test]
fn a_long_frame_spans_buffers_if_the_driver_merges() {
    let mut card = card(1 << VIRTIO_NET_F_MRG_RXBUF);
    card.host.send(&frame(3000)).unwrap();
    for index in 0..2 {
        card.receive
            .offer(&[Descriptor::at(0x8000 + 0x1000 * index, 1000, WRITE)]);
    }
    card.net.on_queue(&mut card.cx, RECEIVE);
    assert_eq!(card.receive.take_used(), [], "it waits for a third buffer");
    assert!(!card.net.watching);
    card.receive.offer(&[Descriptor::at(0xa000, 1500, WRITE)]);
    card.net.on_queue(&mut card.cx, RECEIVE);
    assert_eq!(card.receive.take_used(), [(0, 1000), (1, 1000), (2, 1000)]);
    assert!(card.net.watching);
    let buffers: u16 = card
        .cx
        .ram
        .read_obj(GuestAddress(0x8000 + NUM_BUFFERS as u64))
        .unwrap();
    assert_eq!(buffers, 3);
}

#[test]
fn a_frame_too_long_for_its_buffer_is_dropped() {
    let mut card = card(0);
    card.host.send(&frame(3000)).unwrap();
    card.host.send(&frame(64)).unwrap();
    card.receive.offer(&[Descriptor::at(0x8000, 1000, WRITE)]);
    card.receive.offer(&[Descriptor::at(0x9000, 1000, WRITE)]);
    card.net.on_queue(&mut card.cx, RECEIVE);
    assert_eq!(card.receive.take_used(), [(0, 0), (1, 64)]);
    assert_eq!(card.net.metrics.dropped_frames.get(), 1);
}

const CLIENT: &str = "192.0.2.1:50000";
const SERVER: &str = "192.0.2.2:80";

/// A card of a guest that wakes.
struct WakingCard {
    card: Card,
    wake: Arc<SharedWake>,
    trace: Arc<Trace>,
    /// How often main has been told of an earlier end.
    told: Arc<AtomicU32>,
}

impl WakingCard {
    fn new() -> Self {
        let (mut card, trace, told) = (card(0), trace(), Arc::new(AtomicU32::new(0)));
        let count = told.clone();
        let sooner = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        let wake = Arc::new(SharedWake::new(trace.clone(), Box::new(sooner)));
        card.net = card.net.waking(wake.clone());
        Self {
            card,
            wake,
            trace,
            told,
        }
    }

    fn give(&mut self, frame: &Frame) {
        let frame = [vec![0; VNET_HEADER_BYTES], frame.bytes()].concat();
        let card = &mut self.card;
        card.receive.offer(&[Descriptor::at(0x8000, 2048, WRITE)]);
        card.host.send(&frame).unwrap();
        card.net.on_io(&mut card.cx, LINK, Ready::default());
        assert_eq!(card.receive.take_used().len(), 1);
    }

    /// The guest sends a frame out of buffers of `each` bytes.
    fn take(&mut self, frame: &Frame, each: usize) {
        let frame = [vec![0; VNET_HEADER_BYTES], frame.bytes()].concat();
        let card = &mut self.card;
        card.cx
            .ram
            .write_slice(&frame, GuestAddress(0x9000))
            .unwrap();
        let buffers: Vec<_> = (0..frame.len())
            .step_by(each)
            .map(|at| {
                let len = each.min(frame.len() - at);
                Descriptor::at(0x9000 + at as u64, len as u32, READ)
            })
            .collect();
        card.transmit.offer(&buffers);
        card.net.on_queue(&mut card.cx, TRANSMIT);
        assert_eq!(card.transmit.take_used().len(), 1);
        assert_eq!(card.host.recv(&mut [0; 4096]).unwrap(), frame.len());
    }

    fn marks(&self) -> Vec<&'static str> {
        self.trace.phases().iter().map(|phase| phase.0).collect()
    }
}

#[test]
fn a_waking_guests_first_reply_is_seen_and_the_card_looks_no_further() {
    for each in [VNET_HEADER_BYTES, 30, HEAD_BYTES, 2000] {
        let mut waking = WakingCard::new();
        waking.give(&Frame::new(CLIENT, SERVER, 0));
        waking.take(&Frame::new(SERVER, CLIENT, 0), each);
        assert!(waking.marks().is_empty());
        waking.give(&Frame::new(CLIENT, SERVER, 80));
        assert_eq!(waking.marks(), ["first_request_in"]);
        assert_eq!(waking.told.load(Ordering::SeqCst), 0);
        waking.take(&Frame::new(SERVER, CLIENT, 0), each);
        waking.take(&Frame::new(SERVER, CLIENT, 100), each);
        assert_eq!(waking.marks(), ["first_request_in", "first_reply_out"]);
        assert_eq!(waking.told.load(Ordering::SeqCst), 1);
        assert!(!waking.card.net.first_reply.is_looked_for());
        // What comes next passes as before.
        waking.give(&Frame::new(CLIENT, SERVER, 80));
        waking.take(&Frame::new(SERVER, CLIENT, 100), each);
        assert_eq!(waking.told.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn a_frame_that_was_dropped_is_no_reply() {
    let mut waking = WakingCard::new();
    waking.give(&Frame::new(CLIENT, SERVER, 80));
    let card = &mut waking.card;
    // Longer than the cable takes: like a TAP's refusal.
    let frame = Frame::new(SERVER, CLIENT, 100).bytes();
    card.cx
        .ram
        .write_slice(&frame, GuestAddress(0x900c))
        .unwrap();
    card.transmit
        .offer(&[Descriptor::at(0x9000, 0x2_0000, READ)]);
    card.net.on_queue(&mut card.cx, TRANSMIT);
    assert_eq!(card.transmit.take_used().len(), 1);
    assert_eq!(card.net.metrics.dropped_frames.get(), 1);
    assert_eq!(waking.marks(), ["first_request_in"]);
    waking.take(&Frame::new(SERVER, CLIENT, 100), 2000);
    assert_eq!(waking.marks(), ["first_request_in", "first_reply_out"]);
}

#[test]
fn a_wake_that_is_over_has_no_reply() {
    let mut waking = WakingCard::new();
    waking.give(&Frame::new(CLIENT, SERVER, 80));
    waking.wake.end();
    assert!(waking.card.net.first_reply.is_looked_for());
    waking.take(&Frame::new(SERVER, CLIENT, 100), 2000);
    assert_eq!(waking.marks(), ["first_request_in"]);
    assert!(!waking.card.net.first_reply.is_looked_for());
}

#[test]
fn a_snapshot_of_another_address_is_refused() {
    let state = NetState { mac: MAC };
    state.check(MAC).unwrap();
    let error = state.check(MacAddr([2, 0, 0, 0, 0, 9])).unwrap_err();
    assert!(error.to_string().contains("02:00:00:00:00:09"), "{error}");
}

#[test]
fn a_missing_tap_is_an_error_and_is_not_made() {
    let error = Tap::open("tern-none").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

proptest! {
    /// Any descriptors in both rings: each chain comes back once at most, and frames still pass after.
    #[test]
    fn any_rings_are_survived(
        table in prop::collection::vec(
            (prop_oneof![0x8000..0xa000_u64, any::<u64>()],
             prop_oneof![0..2000_u32, any::<u32>()], 0..8_u16, 0..18_u16), 1..14),
        merge in any::<bool>(),
        len in 13..4000_usize,
    ) {
        let mut card = card(if merge { 1 << VIRTIO_NET_F_MRG_RXBUF } else { 0 });
        card.net = card.net.waking(Arc::new(SharedWake::new(trace(), Box::new(|| ()))));
        card.host.send(&frame(len)).unwrap();
        card.receive.offer_raw(&table);
        card.transmit.offer_raw(&table);
        card.net.on_queue(&mut card.cx, RECEIVE);
        card.net.on_queue(&mut card.cx, TRANSMIT);
        prop_assert!(card.receive.take_used().len() <= 1);
        prop_assert_eq!(card.transmit.take_used().len(), 1);
        let (receive, queue) = Rings::new(card.cx.ram.clone(), 0x6_0000, 16);
        card.receive = receive;
        card.cx.queues[RECEIVE] = queue;
        card.net.reset();
        card.host.send(&frame(64)).unwrap();
        card.receive.offer(&[Descriptor::at(0x8000, 1000, WRITE)]);
        card.net.on_queue(&mut card.cx, RECEIVE);
        prop_assert_eq!(card.receive.take_used(), [(0, 64)]);
    }
}
