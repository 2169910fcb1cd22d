//! The null guest: does with a frame as little as a guest can, so that the switch is what is measured.
//!
//! Ports come in pairs; each even one sends to the next odd one. A transmit ring is full of frames that were written
//! once, a receive ring full of empty buffers. What the switch has used is taken back in batches and handed out again at
//! once. Of each frame that arrives the first cache line is read: header, destination.
//!
//! A buffer starts on a cache line, with the 12 bytes of `virtio_net_hdr` and the frame right behind it, as Linux lays
//! out its receive buffers. The stride is no power of two: 2048 would put all buffers into the same cache sets.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Result, ensure};

use crate::frames::Pattern;
use crate::frames::{Flows, HEADER, MAC_BITS, Paint, Pairs, Random, Same, frame};
use crate::front::Front;
pub use crate::front::Unsupported;
use crate::hist::Histogram;
use crate::ring::packed::Packed;
use crate::ring::split::Split;
use crate::ring::{Layout, Place, Ring};
use crate::sys::{Memory, tsc};

/// From one buffer to the next: 33 cache lines.
const STRIDE: usize = 2112;
/// What fits into a receive buffer.
const RX_LEN: u32 = 2048;
const PAGE: usize = 4096;
/// How long a switch may take to learn all stations, in time-stamp cycles: a few seconds.
const ANNOUNCE_CYCLES: u64 = 10_000_000_000;
/// How long a frame may be on its way before it is lost, in time-stamp cycles: some ten milliseconds.
const SETTLE_CYCLES: u64 = 30_000_000;
/// A frame that is sent so much later than it was due is late, in time-stamp cycles: about a microsecond.
const LATE_CYCLES: u64 = 2_500;
/// Frames that a paced guest sends or receives at once.
const PACED_BURST: u16 = 32;
/// Where in a buffer the time stamp is: in the payload, in the first cache line.
const STAMP: usize = 56;
const RX: usize = 0;
const TX: usize = 1;

/// How the guest behaves.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    /// Entries of each ring.
    pub ring_size: u16,
    /// Used buffers are taken back from this many on.
    pub batch: u16,
    /// Frames may span several receive buffers (`MRG_RXBUF`), as far as the switch is concerned.
    pub mergeable: bool,
    /// `pause` instructions after a look at the rings that found nothing to do.
    pub pauses: u32,
    /// The senders' rings are full from the start; otherwise they stay empty until [`Drive::paced`].
    pub full: bool,
    /// All senders send to the first receiver.
    pub gather: bool,
}

struct Port<R> {
    /// The switch's number for it.
    number: usize,
    front: Front,
    memory: Arc<Memory>,
    rx: R,
    tx: R,
    frame: Vec<u8>,
}

impl<R: Ring> Port<R> {
    fn start(
        (port, sends): (usize, bool),
        bytes: usize,
        habits: &Habits,
        stream: UnixStream,
    ) -> Result<std::result::Result<Port<R>, Unsupported>> {
        let num = habits.ring_size;
        let mut next = PAGE;
        let mut take = |bytes: usize| {
            let at = next;
            next += bytes.next_multiple_of(PAGE);
            at
        };
        let mut queue = || {
            let areas = Place::area_bytes(num).map(&mut take);
            (areas, take(usize::from(num) * STRIDE))
        };
        let (rx, tx) = (queue(), queue());
        let memory = Arc::new(Memory::new(next as u64)?);
        let place = |(areas, buffers), len, device_writes| Place {
            memory: memory.clone(),
            areas,
            num,
            buffers,
            stride: STRIDE,
            len,
            device_writes,
        };
        let mut rx = R::new(place(rx, RX_LEN, true));
        let mut tx = R::new(place(tx, (HEADER + bytes) as u32, false));
        let to = if habits.gather && sends { 1 } else { port ^ 1 };
        let frame = frame(bytes, port, to);
        for i in 0..num {
            memory.write(tx.place().buffer(i) + HEADER, &frame);
            // So that no access of the measurement is the first to a page.
            memory.write(rx.place().buffer(i), &[0; RX_LEN as usize]);
        }
        rx.publish(num);
        if habits.full && sends {
            tx.publish(num);
        }
        let places = [rx.place(), tx.place()];
        Ok(
            Front::start(stream, R::LAYOUT, habits.mergeable, places)?.map(|front| Port {
                number: port,
                front,
                memory,
                rx,
                tx,
                frame,
            }),
        )
    }

    /// Takes back what the switch has taken from us, if less than `want` is free; how much of `want` is.
    #[inline(always)]
    fn free_tx(&mut self, want: u16) -> u16 {
        let num = self.tx.place().num;
        let free = |tx: &R| num - tx.outstanding();
        if want == 0 || free(&self.tx) < want {
            while self.tx.reap(1, |_, _| {}) > 0 {}
        }
        free(&self.tx).min(want)
    }

    /// A frame for each stamp; there is room for them.
    #[inline(always)]
    fn send(&mut self, stamps: &[u64]) {
        for (ahead, stamp) in (0..).zip(stamps) {
            let at = self.tx.place().buffer(self.tx.next_buffer(ahead));
            self.memory.u64(at + STAMP).store(*stamp, Relaxed);
        }
        if !stamps.is_empty() {
            self.tx.publish(stamps.len() as u16);
            if self.tx.wants_kick() {
                self.front.kick(TX);
            }
        }
    }

    /// What has arrived, about a burst at most: the stamp of each, and what time it is.
    #[inline(always)]
    fn receive(&mut self, mut each: impl FnMut(u64, u64)) {
        let memory = &self.memory;
        let buffers = self.rx.place().buffers;
        let (mut n, mut now) = (0, 0);
        while n < PACED_BURST {
            let m = self.rx.reap(1, |buffer, _| {
                if now == 0 {
                    now = tsc();
                }
                let at = buffers + usize::from(buffer) * STRIDE;
                each(memory.u64(at + STAMP).load(Relaxed), now);
            });
            n += m;
            if m == 0 {
                break;
            }
        }
        if n > 0 {
            self.rx.publish(n);
            if self.rx.wants_kick() {
                self.front.kick(RX);
            }
        }
    }
}

/// What a guest has seen in a time.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Seen {
    /// Frames that arrived.
    pub frames: u64,
    /// Frames that the switch took.
    pub sent: u64,
    /// Arrived with a wrong length, destination or number of buffers.
    pub wrong: u64,
    /// Time-stamp cycles in all.
    pub cycles: u64,
    /// Of these, in rounds that had nothing to do.
    pub idle_cycles: u64,
    /// Rounds over all rings.
    pub rounds: u64,
    /// Frames that arrived in each slice of the time.
    pub slices: Vec<u32>,
    /// Frames that the switch took in each slice of the time.
    pub sent_slices: Vec<u32>,
    /// How often a transmit ring was found empty: the switch may have had nothing to do.
    pub tx_empty: u64,
    /// How often a receive ring was found without a free buffer: the switch may have had nowhere to go.
    pub rx_full: u64,
    /// Kicks that the switch asked for.
    pub kicks: u64,
}

/// What became of frames that were sent at a given rate.
#[derive(Debug, Clone, Default)]
pub struct Paced {
    /// From when a frame was due (or, if as many as possible are sent, was sent) until it was seen.
    pub times: Histogram,
    /// Frames that were sent.
    pub sent: u64,
    /// Of these, in time: what could not be sent when it was due is sent later, and its delay counts.
    pub late: u64,
    /// Never seen again.
    pub lost: u64,
    /// Of these, those that the echoing port had no room for: the switch had not taken what it sent before.
    pub unechoed: u64,
    /// For which it was sent, in time-stamp cycles.
    pub cycles: u64,
}

/// A running guest, whatever its rings.
pub trait Drive {
    /// Whether all memory lies in hugepages.
    fn is_huge(&self) -> bool;
    /// The receivers send one frame each, so that a learning switch knows where they are.
    fn announce(&mut self);
    /// Drives all rings for so many time-stamp cycles, in slices of so many.
    fn run(&mut self, cycles: u64, slice: u64) -> Seen;
    /// From now on the senders give the switch nothing new, or they do again.
    fn rest(&mut self, rest: bool);
    /// Sends frames with a time stamp from the first port to the second, for so many time-stamp cycles, one each
    /// `interval` (0: as many as the switch takes). Notes how long they were on their way: to the second port, or back at
    /// the first (`echo`).
    fn paced(&mut self, cycles: u64, interval: f64, echo: bool) -> Paced;
    /// While the switch stands still: how many of the receivers' buffers hold exactly the sender's frame, of how many.
    fn intact(&self) -> (usize, usize);
    /// Stops the rings; the switch must run.
    fn stop(self: Box<Self>) -> Result<()>;
}

/// Connects a guest with rings of this layout, one port to each stream, numbered from 0; frames are `bytes` long.
pub fn start(
    layout: Layout,
    streams: Vec<UnixStream>,
    bytes: usize,
    habits: Habits,
    pattern: Pattern,
) -> Result<std::result::Result<Box<dyn Drive>, Unsupported>> {
    let ports = streams.into_iter().enumerate().collect();
    start_as(layout, ports, bytes, habits, pattern)
}

/// The same with the numbers that the switch has for the ports: the first of a pair sends.
pub fn start_as(
    layout: Layout,
    ports: Vec<(usize, UnixStream)>,
    bytes: usize,
    habits: Habits,
    pattern: Pattern,
) -> Result<std::result::Result<Box<dyn Drive>, Unsupported>> {
    match layout {
        Layout::Split => with_rings::<Split>(ports, bytes, habits, pattern),
        Layout::Packed => with_rings::<Packed>(ports, bytes, habits, pattern),
    }
}

fn with_rings<R: Ring + 'static>(
    ports: Vec<(usize, UnixStream)>,
    bytes: usize,
    habits: Habits,
    pattern: Pattern,
) -> Result<std::result::Result<Box<dyn Drive>, Unsupported>> {
    fn boxed<R: Ring + 'static, P: Paint + 'static>(guest: Guest<R, P>) -> Box<dyn Drive> {
        Box::new(guest)
    }
    let random = |below| {
        ensure!((1..=1 << 20).contains(&below), "{below} flows or pairs");
        Ok(Random::below(below))
    };
    Ok(match pattern {
        Pattern::One => Guest::<R, _>::start(ports, bytes, habits, Same)?.map(boxed),
        Pattern::Flows(n) => {
            Guest::<R, _>::start(ports, bytes, habits, Flows(random(n)?))?.map(boxed)
        }
        Pattern::Pairs(n) => {
            Guest::<R, _>::start(ports, bytes, habits, Pairs(random(n)?))?.map(boxed)
        }
    })
}

/// Ports in one process, two or more.
struct Guest<R, P> {
    ports: Vec<Port<R>>,
    habits: Habits,
    paint: P,
    rests: bool,
}

impl<R: Ring, P: Paint> Guest<R, P> {
    fn start(
        streams: Vec<(usize, UnixStream)>,
        bytes: usize,
        habits: Habits,
        paint: P,
    ) -> Result<std::result::Result<Guest<R, P>, Unsupported>> {
        ensure!(
            streams.len() >= 2 && streams.len().is_multiple_of(2),
            "ports come in pairs"
        );
        ensure!(
            (60..=RX_LEN as usize - HEADER).contains(&bytes),
            "frames of {bytes} bytes"
        );
        let mut ports = Vec::new();
        for (i, (number, stream)) in streams.into_iter().enumerate() {
            let port = (number, i.is_multiple_of(2));
            match Port::start(port, bytes, &habits, stream)? {
                Ok(port) => ports.push(port),
                Err(unsupported) => return Ok(Err(unsupported)),
            }
        }
        Ok(Ok(Guest {
            ports,
            habits,
            paint,
            rests: false,
        }))
    }
}

impl<R: Ring, P: Paint> Drive for Guest<R, P> {
    fn is_huge(&self) -> bool {
        self.ports.iter().all(|p| p.rx.place().memory.is_huge)
    }

    fn announce(&mut self) {
        let paint = self.paint;
        for [a, b] in self.ports.as_chunks_mut::<2>().0 {
            let since = tsc();
            for i in 0..paint.stations() {
                while b.tx.outstanding() == self.habits.ring_size {
                    b.tx.reap(1, |_, _| {});
                    let n = a.rx.reap(1, |_, _| {});
                    a.rx.publish(n);
                    if tsc() - since > ANNOUNCE_CYCLES {
                        // Too slow a learner: it will have to do with these.
                        return;
                    }
                }
                let buffer = b.tx.place().buffer(b.tx.next_buffer(0));
                paint.station(&b.memory, buffer, b.number, i);
                b.tx.publish(1);
                if b.tx.wants_kick() {
                    b.front.kick(TX);
                }
            }
            b.tx.reap(1, |_, _| {});
            if b.tx.outstanding() < self.habits.ring_size {
                b.tx.publish(1);
            }
            if b.tx.wants_kick() {
                b.front.kick(TX);
            }
            let n = a.rx.reap(1, |_, _| {});
            a.rx.publish(n);
        }
    }

    fn run(&mut self, cycles: u64, slice: u64) -> Seen {
        let mut seen = Seen {
            slices: Vec::with_capacity((cycles / slice) as usize + 1),
            sent_slices: Vec::with_capacity((cycles / slice) as usize + 1),
            ..Seen::default()
        };
        let (mut counted, mut counted_sent) = (0, 0);
        let (habits, rests) = (self.habits, self.rests);
        let mut paint = self.paint;
        let want_word: Vec<u64> = self.ports.iter().map(|p| P::dst(p.number)).collect();
        let begin = tsc();
        let mut before = begin;
        let mut slice_end = begin + slice;
        while before - begin < cycles {
            let mut work = 0;
            for (pair, [a, b]) in self.ports.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let (memory, buffers, from) = (&a.memory, a.tx.place().buffers, a.number);
                let n = if rests {
                    0
                } else {
                    a.tx.reap(habits.batch, |buffer, _| {
                        let at = buffers + usize::from(buffer) * STRIDE;
                        paint.next(memory, at, from);
                    })
                };
                if n > 0 {
                    seen.tx_empty += u64::from(a.tx.is_drained());
                    a.tx.publish(n);
                    if a.tx.wants_kick() {
                        a.front.kick(TX);
                        seen.kicks += 1;
                    }
                    seen.sent += u64::from(n);
                }
                let (want, want_len) = (want_word[2 * pair + 1], (HEADER + a.frame.len()) as u32);
                let (memory, buffers) = (&b.memory, b.rx.place().buffers);
                let mut wrong = 0u64;
                let m = b.rx.reap(habits.batch, |buffer, len| {
                    let at = buffers + usize::from(buffer) * STRIDE;
                    // num_buffers, then the destination's first four bytes; then the other two.
                    let front = memory.u64(at + 8).load(Relaxed);
                    let rest = memory.u64(at + 16).load(Relaxed);
                    let to = (front >> 32 | rest << 32) & MAC_BITS;
                    let buffers = (front >> 16) & 0xffff;
                    // DPDK leaves 0 there if buffers do not merge.
                    let one = (buffers == 1) | (!habits.mergeable & (buffers == 0));
                    wrong += u64::from((to & P::DST_MASK != want) | (len != want_len) | !one);
                });
                if m > 0 {
                    seen.rx_full += u64::from(b.rx.is_drained());
                    b.rx.publish(m);
                    if b.rx.wants_kick() {
                        b.front.kick(RX);
                        seen.kicks += 1;
                    }
                    seen.frames += u64::from(m);
                    seen.wrong += wrong;
                }
                work += n + m;
            }
            seen.rounds += 1;
            if work == 0 {
                for _ in 0..habits.pauses {
                    std::hint::spin_loop();
                }
            }
            let now = tsc();
            if work == 0 {
                seen.idle_cycles += now - before;
            }
            before = now;
            if now >= slice_end {
                seen.slices.push((seen.frames - counted) as u32);
                counted = seen.frames;
                seen.sent_slices.push((seen.sent - counted_sent) as u32);
                counted_sent = seen.sent;
                slice_end += slice;
            }
        }
        seen.cycles = before - begin;
        self.paint = paint;
        seen
    }

    fn rest(&mut self, rest: bool) {
        self.rests = rest;
    }

    fn paced(&mut self, cycles: u64, interval: f64, echo: bool) -> Paced {
        let mut out = Paced::default();
        let Some([a, b]) = self.ports.first_chunk_mut() else {
            return out;
        };
        // What an earlier run has left on its way.
        let begin = tsc();
        while a.tx.outstanding() + b.tx.outstanding() > 0 || tsc() - begin < SETTLE_CYCLES {
            for port in [&mut *a, &mut *b] {
                port.free_tx(0);
                port.receive(|_, _| {});
            }
            if tsc() - begin > ANNOUNCE_CYCLES {
                break;
            }
        }
        let mut stamps = Vec::with_capacity(usize::from(self.habits.ring_size));
        let (mut due, mut seen) = (0.0, 0);
        let begin = tsc();
        let mut now = begin;
        loop {
            let passed = now - begin;
            if passed < cycles {
                let room = a.free_tx(PACED_BURST);
                stamps.clear();
                while due <= passed as f64 && stamps.len() < usize::from(room) {
                    let stamp = begin + if interval > 0.0 { due as u64 } else { passed };
                    out.late += u64::from(now - stamp > LATE_CYCLES);
                    stamps.push(stamp);
                    due += interval;
                }
                a.send(&stamps);
                out.sent += stamps.len() as u64;
                out.cycles = passed;
            } else if seen >= out.sent || passed - cycles > SETTLE_CYCLES {
                break;
            }
            if echo {
                stamps.clear();
                b.receive(|stamp, _| stamps.push(stamp));
                let room = b.free_tx(stamps.len() as u16);
                out.unechoed += (stamps.len() - usize::from(room)) as u64;
                b.send(&stamps[..usize::from(room)]);
            }
            let last = if echo { &mut *a } else { &mut *b };
            last.receive(|stamp, now| {
                out.times.record(now.saturating_sub(stamp));
                seen += 1;
            });
            now = tsc();
        }
        out.lost = out.sent.saturating_sub(seen);
        out
    }

    fn intact(&self) -> (usize, usize) {
        let mut same = 0;
        let mut all = 0;
        for [a, b] in self.ports.as_chunks::<2>().0 {
            let mut sent = a.frame.clone();
            P::blank(&mut sent);
            let mut found = vec![0; a.frame.len()];
            for i in 0..self.habits.ring_size {
                b.rx.place()
                    .memory
                    .read(b.rx.place().buffer(i) + HEADER, &mut found);
                P::blank(&mut found);
                same += usize::from(found == sent);
                all += 1;
            }
        }
        (same, all)
    }

    fn stop(mut self: Box<Self>) -> Result<()> {
        self.ports.iter_mut().try_for_each(|p| p.front.stop())
    }
}
