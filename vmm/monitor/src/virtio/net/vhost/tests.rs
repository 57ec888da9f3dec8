use std::process::Command;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;

use super::*;
use crate::virtio::net::tap::VNET_HEADER_BYTES;
use crate::virtio::net::{RECEIVE, TRANSMIT};
use crate::virtio::queue::VirtQueue;
use crate::virtio::testing::{Descriptor, Driver, READ, Rings, WRITE};

const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

/// A card on a TAP device in a network namespace of this thread's own.
fn card(cx: Context) -> (VhostNet, Context) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("this test needs root");
    for arguments in ["tuntap add tn0 mode tap", "link set tn0 up"] {
        let status = Command::new("ip").args(arguments.split(' ')).status();
        assert!(status.unwrap().success(), "ip {arguments}");
    }
    let card = VhostNet::open(Tap::open("tn0").unwrap(), MAC).unwrap();
    (card, cx)
}

fn start(card: &mut VhostNet, cx: &mut Context) {
    card.start(cx).unwrap();
    for index in [RECEIVE, TRANSMIT] {
        card.on_queue(cx, index);
    }
}

/// Waits for the event of a queue that cannot be used.
fn wait_error(cx: &Context) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !cx.poll_detached().unwrap().iter().any(|e| e.0 == ERRORS) {
        assert!(Instant::now() < deadline, "nothing was said");
        std::thread::yield_now();
    }
}

#[test]
fn without_the_device_it_says_what_to_do() {
    match Vhost::open() {
        Ok(kernel) => assert_eq!(
            kernel.features().unwrap() & KERNEL_FEATURES,
            KERNEL_FEATURES
        ),
        Err(error) => assert!(error.to_string().contains("modprobe"), "{error}"),
    }
}

#[test]
fn metal_what_a_queue_holds_is_the_kernels_to_judge_and_a_new_driver_begins_anew() {
    let Driver { ram, .. } = Driver::new(16);
    let rings = |at| Rings::new(ram.clone(), at, 16);
    let ((_, one), (mut transmit, two)) = (rings(0x2_0000), rings(0x4_0000));
    let cx = Context::for_test(ram.clone(), vec![one, two], VERSION_1);
    let (mut card, mut cx) = card(cx);
    start(&mut card, &mut cx);
    transmit.offer_raw(&[(u64::MAX - 99, 200, READ, 0)]);
    cx.again(TRANSMIT);
    wait_error(&cx);
    card.on_io(&mut cx, ERRORS, Ready::default());
    assert_eq!(cx.poll_detached().unwrap(), [], "said once");
    card.stop(&mut cx);
    assert_eq!(cx.queues[TRANSMIT].next_avail(), 0);

    // As after a reset, by a driver that behaves.
    card.reset();
    let ((mut receive, one), (mut transmit, two)) = (rings(0x6_0000), rings(0x8_0000));
    cx.queues = vec![one, two];
    start(&mut card, &mut cx);
    let frame = VNET_HEADER_BYTES as u32 + 60;
    for count in 1..=2 {
        receive.offer(&[Descriptor::at(0xa_0000, 2048, WRITE)]);
        transmit.offer(&[Descriptor::at(0xb_0000, frame, READ)]);
        cx.again(TRANSMIT);
        assert_eq!(transmit.wait_used(1).len(), 1);
        card.stop(&mut cx);
        // What comes next in either queue is what this process, or another, would go on with.
        assert_eq!(cx.queues[TRANSMIT].next_avail(), count);
        assert_eq!(cx.queues[TRANSMIT].save().next_used, count);
        start(&mut card, &mut cx);
    }
    card.stop(&mut cx);
}

#[test]
fn metal_rings_that_are_not_there_are_an_error_and_leave_nothing_behind() {
    let Driver { ram, .. } = Driver::new(16);
    let (_, one) = Rings::new(ram.clone(), 0x2_0000, 16);
    let (_, mut two) = Rings::new(ram.clone(), 0x4_0000, 16);
    let beyond = crate::virtio::testing::RAM_BYTES as u32;
    two.registers().set_used_ring_address(Some(beyond), Some(0));
    let cx = Context::for_test(ram.clone(), vec![one, two], VERSION_1);
    let (mut card, mut cx) = card(cx);
    card.start(&mut cx).unwrap_err();
    card.stop(&mut cx);
    assert_eq!(card.lent, [false; QUEUES]);
    // One that no driver has touched is no error.
    let (mut transmit, queue) = Rings::new(ram, 0x6_0000, 16);
    cx.queues = vec![VirtQueue::new(16).unwrap(), queue];
    start(&mut card, &mut cx);
    assert_eq!(card.lent, [false, true]);
    transmit.offer(&[Descriptor::at(0xb_0000, 100, READ)]);
    cx.again(TRANSMIT);
    assert_eq!(transmit.wait_used(1), [(0, 0)]);
    card.stop(&mut cx);
}
