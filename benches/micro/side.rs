//! Rings of a guest in this process, with both sides: the switch's queue and the driver.

use std::fs::File;
use std::sync::Arc;

use gangway_benches::frames::{HEADER, frame};
use gangway_benches::ring::{self as driver, GPA, Layout, Place};
use gangway_benches::sys::Memory;
use gangway_switch::mem::guest::{GuestMem, Region};
use gangway_switch::port::vhost::features::{OFFERED, RING_PACKED, RingFeatures};
use gangway_switch::port::vhost::live::{Control, Gate, Live};
use gangway_switch::port::vhost::position::Position;
use gangway_switch::port::vhost::ring::{packed, split};
use gangway_switch::port::vhost::{rx::Rx, tx::Tx};
use gangway_switch::port::{RxQueue, TxQueue};

const NUM: u16 = 256;
/// Of a buffer in guest memory.
const STRIDE: usize = 2112;
const RX_LEN: u32 = 2048;
const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;

/// A queue of the switch and the driver's side of its ring.
pub struct Side<Q, R> {
    /// The switch's.
    pub queue: Q,
    /// The driver's.
    pub ring: R,
}

fn features(layout: Layout) -> RingFeatures {
    let packed = if layout == Layout::Packed {
        RING_PACKED
    } else {
        0
    };
    RingFeatures::new(OFFERED & (VERSION_1 | MRG_RXBUF) | packed)
}

/// A ring in a memory of its own, as a guest lays it out; `len` bytes in each buffer.
fn place(len: u32, device_writes: bool) -> Place {
    let mut next = 4096;
    let mut take = |bytes: usize| {
        let at = next;
        next += bytes.next_multiple_of(4096);
        at
    };
    let areas = Place::area_bytes(NUM).map(&mut take);
    let buffers = take(usize::from(NUM) * STRIDE);
    let memory = Memory::new(next as u64).expect("memory");
    Place {
        memory: Arc::new(memory),
        areas,
        num: NUM,
        buffers,
        stride: STRIDE,
        len,
        device_writes,
    }
}

fn live(place: &Place, layout: Layout) -> Live {
    let memory = &place.memory;
    let uva = memory.user_addr();
    let region = Region::map(GPA, memory.bytes(), uva, memory.file(), 0).expect("a region");
    let mem = Arc::new(GuestMem::new(vec![region]).expect("a table"));
    let [desc, avail, used] = place.areas.map(|at| uva + at as u64);
    let areas = match layout {
        Layout::Split => split::Split::areas(&mem, NUM, desc, avail, used),
        Layout::Packed => packed::Packed::areas(&mem, NUM, desc, avail, used),
    };
    Live {
        mem,
        areas: areas.expect("the ring's areas"),
        log: None,
        used_log: None,
        call: None,
    }
}

fn gate(live: &Live, next: u16) -> Gate {
    let null = File::options().write(true).open("/dev/null");
    let alarm = Arc::new(null.expect("/dev/null"));
    Gate::new(Control::new(live.clone(), next, alarm))
}

/// A guest's transmit ring, full of frames.
pub fn sender<R: driver::Ring>(bytes: usize) -> Side<Box<dyn RxQueue>, R> {
    let place = place((HEADER + bytes) as u32, false);
    let (live, f) = (live(&place, R::LAYOUT), features(R::LAYOUT));
    let mut ring = R::new(place);
    for i in 0..NUM {
        let at = ring.place().buffer(i) + HEADER;
        ring.place().memory.write(at, &frame(bytes, 0, 1));
    }
    ring.publish(NUM);
    let none = Position::unknown();
    let queue: Box<dyn RxQueue> = match R::LAYOUT {
        Layout::Split => {
            let q = split::Split::new(&live, NUM, 0, &f);
            Box::new(Rx::new(q, gate(&live, 0), 0, None, f, none))
        }
        Layout::Packed => {
            let q = packed::Packed::new(&live, NUM, packed::START, &f);
            Box::new(Rx::new(
                q,
                gate(&live, packed::START),
                packed::START,
                None,
                f,
                none,
            ))
        }
    };
    Side { queue, ring }
}

/// A guest's receive ring, full of empty buffers.
pub fn receiver<R: driver::Ring>() -> Side<Box<dyn TxQueue>, R> {
    let place = place(RX_LEN, true);
    let (live, f) = (live(&place, R::LAYOUT), features(R::LAYOUT));
    let mut ring = R::new(place);
    ring.publish(NUM);
    let queue: Box<dyn TxQueue> = match R::LAYOUT {
        Layout::Split => {
            let q = split::Split::new(&live, NUM, 0, &f);
            Box::new(Tx::new(q, gate(&live, 0), 0, NUM, f, Position::unknown()))
        }
        Layout::Packed => {
            let q = packed::Packed::new(&live, NUM, packed::START, &f);
            Box::new(Tx::new(
                q,
                gate(&live, packed::START),
                packed::START,
                NUM,
                f,
                Position::unknown(),
            ))
        }
    };
    Side { queue, ring }
}

/// What was used goes to the device again.
pub fn turn<R: driver::Ring>(ring: &mut R) {
    // A layout may leave some for the next call.
    loop {
        match ring.reap(1, |_, _| {}) {
            0 => return,
            n => ring.publish(n),
        }
    }
}
