//! A device's registers, as a guest's processors reach them, with its worker behind them.
//!
//! Promised: no access panics; a device that is paused can be saved, and goes on as it was; after a
//! reset any device works.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_vmm::trace::Trace;
use tern_vmm::virtio::rng::Rng;
use tern_vmm::virtio::transport::Transport;

use crate::guest::{BUFFERS, Guest, WRITE};
use crate::input::{Input, Program};

const STATUS: u64 = 0x70;
/// Each may start a thread.
const MOST_STEPS: usize = 64;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut guest = Guest::new(1);
    let trace = Arc::new(Trace::new(Instant::now()));
    let ram = guest.ram.clone();
    let mut transport =
        Transport::new(Box::new(Rng::default()), ram.clone(), trace.clone()).unwrap();
    for _ in 0..MOST_STEPS {
        let Some(step) = input.step() else { break };
        match step % 8 {
            0 | 1 => {
                // A register, whole.
                let (offset, value) = (u64::from(input.byte() % 0x50) * 4, input.u32());
                transport.write(offset, &value.to_le_bytes());
            }
            2 => {
                let (offset, value, width) = (input.u16(), input.u64(), input.byte() % 9);
                let data = &value.to_le_bytes()[..width.into()];
                transport.write(offset.into(), data);
            }
            3 => {
                let (offset, width) = (input.u16(), input.byte() % 9);
                transport.read(offset.into(), &mut [0; 8][..width.into()]);
                assert_eq!(get(&mut transport, 0), u32::from_le_bytes(*b"virt"));
            }
            4 => set_up(&mut transport, input.byte()),
            5 => {
                transport.pause();
                let state = transport.save().unwrap();
                let rng = Box::new(Rng::default());
                transport = Transport::restore(rng, &state, ram.clone(), trace.clone()).unwrap();
                assert_eq!(transport.save().unwrap(), state);
                transport.resume();
            }
            6 => {
                transport.pause();
                transport.resume();
            }
            _ => {
                let step = input.byte();
                guest.step(step, &mut input);
            }
        }
    }
    transport.write(STATUS, &[0; 4]);
    assert_eq!(get(&mut transport, STATUS), 0);
    guest.clear_ring(0);
    guest.descriptor(0, 0, BUFFERS, 8, WRITE, 0);
    guest.offer(0, 0);
    set_up(&mut transport, 0);
    assert_eq!(get(&mut transport, STATUS), 15);
    let patience = Instant::now() + Duration::from_secs(20);
    loop {
        match guest.take_used(0).as_slice() {
            [] => {}
            answer => break assert_eq!(answer, [(0, 8)]),
        }
        assert!(
            Instant::now() < patience,
            "no answer of a device that was reset"
        );
        std::thread::yield_now();
    }
    transport.pause();
}

fn get(transport: &mut Transport, offset: u64) -> u32 {
    let mut word = [0; 4];
    transport.read(offset, &mut word);
    u32::from_le_bytes(word)
}

/// What Linux's driver does, less the steps whose bit is set in `without`.
fn set_up(transport: &mut Transport, without: u8) {
    let steps: [(u64, u32); 13] = [
        (STATUS, 0),
        (STATUS, 1),
        (STATUS, 3),
        (0x24, 1),
        (0x20, 1), // VERSION_1
        (STATUS, 11),
        (0x30, 0),
        (0x38, 16),
        (0x80, 0),
        (0x90, 0x400),
        (0xa0, 0x800),
        (0x44, 1),
        (STATUS, 15),
    ];
    for (index, (offset, value)) in steps.into_iter().enumerate() {
        if index < 5 || without & 1 << (index - 5) == 0 {
            transport.write(offset, &value.to_le_bytes());
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let at = BUFFERS as u16;
    let offered = Program::default()
        .byte(7)
        .descriptor(0, 0, at, 64, WRITE, 0)
        .byte(7)
        .offer(0, 0);
    vec![
        offered.clone().bytes(&[4, 0, 5, 6, 4, 0]).0,
        offered.bytes(&[4, 0]).bytes(&[0, 28, 0, 0, 0, 0]).0,
        Program::default()
            .bytes(&[2, 0x70, 0, 1, 0, 0, 0, 0, 0, 0, 0, 4])
            .bytes(&[3, 0, 0, 4, 4, 0x20, 5])
            .0,
    ]
}
