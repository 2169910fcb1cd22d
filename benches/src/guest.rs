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

use crate::front::Front;
pub use crate::front::Unsupported;
use crate::ring::packed::Packed;
use crate::ring::split::Split;
use crate::ring::{Layout, Place, Ring};
use crate::sys::{Memory, tsc};

/// Bytes of `virtio_net_hdr` with `VERSION_1`.
pub const HEADER: usize = 12;
/// From one buffer to the next: 33 cache lines.
const STRIDE: usize = 2112;
/// What fits into a receive buffer.
const RX_LEN: u32 = 2048;
const PAGE: usize = 4096;
const RX: usize = 0;
const TX: usize = 1;
const MAC_BITS: u64 = (1 << 48) - 1;

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
}

/// The address of a port.
pub fn mac(port: usize) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x67, 0x77, port as u8 + 1]
}

fn mac_word(port: usize) -> u64 {
    let m = mac(port);
    u64::from_le_bytes([m[0], m[1], m[2], m[3], m[4], m[5], 0, 0])
}

/// A UDP frame of `bytes` from one port to the other, with right lengths and a right IPv4 checksum.
pub fn frame(bytes: usize, from: usize, to: usize) -> Vec<u8> {
    let mut f = vec![0u8; bytes];
    f[..6].copy_from_slice(&mac(to));
    f[6..12].copy_from_slice(&mac(from));
    f[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip_len = (bytes - 14) as u16;
    let ip = &mut f[14..34];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&ip_len.to_be_bytes());
    ip[8] = 64;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&[10, 0, 0, from as u8 + 1]);
    ip[16..20].copy_from_slice(&[10, 0, 0, to as u8 + 1]);
    let sum: u32 = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f[34..36].copy_from_slice(&1000u16.to_be_bytes());
    f[36..38].copy_from_slice(&2000u16.to_be_bytes());
    f[38..40].copy_from_slice(&(ip_len - 20).to_be_bytes());
    for (i, b) in f[42..].iter_mut().enumerate() {
        *b = i as u8;
    }
    f
}

struct Port<R> {
    front: Front,
    memory: Arc<Memory>,
    rx: R,
    tx: R,
    frame: Vec<u8>,
}

impl<R: Ring> Port<R> {
    fn start(
        port: usize,
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
        let frame = frame(bytes, port, port ^ 1);
        for i in 0..num {
            memory.write(tx.place().buffer(i) + HEADER, &frame);
            // So that no access of the measurement is the first to a page.
            memory.write(rx.place().buffer(i), &[0; RX_LEN as usize]);
        }
        rx.publish(num);
        if port.is_multiple_of(2) {
            tx.publish(num);
        }
        let places = [rx.place(), tx.place()];
        Ok(
            Front::start(stream, R::LAYOUT, habits.mergeable, places)?.map(|front| Port {
                front,
                memory,
                rx,
                tx,
                frame,
            }),
        )
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
    /// How often a transmit ring was found empty: the switch may have had nothing to do.
    pub tx_empty: u64,
    /// How often a receive ring was found without a free buffer: the switch may have had nowhere to go.
    pub rx_full: u64,
    /// Kicks that the switch asked for.
    pub kicks: u64,
}

/// A running guest, whatever its rings.
pub trait Drive {
    /// Whether all memory lies in hugepages.
    fn is_huge(&self) -> bool;
    /// The receivers send one frame each, so that a learning switch knows where they are.
    fn announce(&mut self);
    /// Drives all rings for so many time-stamp cycles, in slices of so many.
    fn run(&mut self, cycles: u64, slice: u64) -> Seen;
    /// While the switch stands still: how many of the receivers' buffers hold exactly the sender's frame, of how many.
    fn intact(&self) -> (usize, usize);
    /// Stops the rings; the switch must run.
    fn stop(self: Box<Self>) -> Result<()>;
}

/// Connects a guest with rings of this layout, one port to each stream; frames are `bytes` long.
pub fn start(
    layout: Layout,
    streams: Vec<UnixStream>,
    bytes: usize,
    habits: Habits,
) -> Result<std::result::Result<Box<dyn Drive>, Unsupported>> {
    Ok(match layout {
        Layout::Split => Guest::<Split>::start(streams, bytes, habits)?.map(|g| Box::new(g) as _),
        Layout::Packed => Guest::<Packed>::start(streams, bytes, habits)?.map(|g| Box::new(g) as _),
    })
}

/// Ports in one process, two or more.
struct Guest<R> {
    ports: Vec<Port<R>>,
    habits: Habits,
}

impl<R: Ring> Guest<R> {
    fn start(
        streams: Vec<UnixStream>,
        bytes: usize,
        habits: Habits,
    ) -> Result<std::result::Result<Guest<R>, Unsupported>> {
        ensure!(
            streams.len() >= 2 && streams.len().is_multiple_of(2),
            "ports come in pairs"
        );
        ensure!(
            (60..=RX_LEN as usize - HEADER).contains(&bytes),
            "frames of {bytes} bytes"
        );
        let mut ports = Vec::new();
        for (i, stream) in streams.into_iter().enumerate() {
            match Port::start(i, bytes, &habits, stream)? {
                Ok(port) => ports.push(port),
                Err(unsupported) => return Ok(Err(unsupported)),
            }
        }
        Ok(Ok(Guest { ports, habits }))
    }
}

impl<R: Ring> Drive for Guest<R> {
    fn is_huge(&self) -> bool {
        self.ports.iter().all(|p| p.rx.place().memory.is_huge)
    }

    fn announce(&mut self) {
        for [a, b] in self.ports.as_chunks_mut::<2>().0 {
            b.tx.reap(1, |_, _| {});
            b.tx.publish(1);
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
            ..Seen::default()
        };
        let mut counted = 0;
        let habits = self.habits;
        let want_word: Vec<u64> = (0..self.ports.len()).map(mac_word).collect();
        let begin = tsc();
        let mut before = begin;
        let mut slice_end = begin + slice;
        while before - begin < cycles {
            let mut work = 0;
            for (pair, [a, b]) in self.ports.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let n = a.tx.reap(habits.batch, |_, _| {});
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
                    wrong += u64::from((to != want) | (len != want_len) | !one);
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
                slice_end += slice;
            }
        }
        seen.cycles = before - begin;
        seen
    }

    fn intact(&self) -> (usize, usize) {
        let mut same = 0;
        let mut all = 0;
        for [a, b] in self.ports.as_chunks::<2>().0 {
            let mut found = vec![0; a.frame.len()];
            for i in 0..self.habits.ring_size {
                b.rx.place()
                    .memory
                    .read(b.rx.place().buffer(i) + HEADER, &mut found);
                same += usize::from(found == a.frame);
                all += 1;
            }
        }
        (same, all)
    }

    fn stop(mut self: Box<Self>) -> Result<()> {
        self.ports.iter_mut().try_for_each(|p| p.front.stop())
    }
}
