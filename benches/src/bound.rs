//! What no switch with a single copy can be faster than on this machine: a device that only moves frames, between the same
//! rings and for the same guest as [`crate::guest`]'s.
//!
//! It is a thread that reads the descriptors of one split ring, copies what they point to into the buffers of another, and
//! gives both back, a burst at a time; what it will copy next is fetched a burst ahead. It looks at no frame, checks no
//! address, knows no port, counts nothing. `rings`: the same without the copy.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::frames::{HEADER, frame};
use crate::host;
use crate::pingpong::{State, round_trip};
use crate::report::{Figure, one, table};
use crate::rig::{Common, Ground, tsc_hz};
use crate::ring::split::Split;
use crate::ring::{GPA, Place, Ring};
use crate::sys::{self, Memory, Wide, tsc};

/// As in [`crate::guest`].
const STRIDE: usize = 2112;
const RX_LEN: u32 = 2048;
const PAGE: usize = 4096;
/// Frames that are looked at beyond those that are being copied.
const AHEAD: usize = 32;
/// Windows that may be spoiled for each that counts.
const TRIES: usize = 3;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where, and how long; there is no peer.
    pub common: Common,
    /// Frame sizes without FCS.
    pub frames: Vec<usize>,
    /// Windows of each cell.
    pub windows: usize,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Used buffers are taken back from this many on.
    pub batch: u16,
    /// Frames that the device moves at once.
    pub burst: usize,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// `copy` or `rings`.
    pub what: String,
    /// Bytes.
    pub frame: usize,
    /// How far the CPUs were apart.
    pub state: State,
    /// Million frames a second.
    pub mpps: Figure,
    /// Time-stamp cycles per frame.
    pub cycles: Figure,
    /// Windows.
    pub windows: usize,
}

/// Measures all cells.
pub fn measure(plan: &Plan) -> Result<Vec<Cell>> {
    ensure!(plan.burst > 0, "a burst has a frame");
    let _ground = Ground::take(&plan.common, 16)?;
    host::pin(plan.common.guest_cpu)?;
    let hz = tsc_hz();
    let mut found: Vec<(&str, usize, State, f64)> = Vec::new();
    for &frame in &plan.frames {
        for what in ["copy", "rings"] {
            let has = |found: &[(&str, usize, State, f64)]| {
                let mine = found.iter().filter(|f| (f.0, f.1) == (what, frame));
                mine.count()
            };
            let before = has(&found);
            for _ in 0..plan.windows * TRIES {
                if has(&found) - before >= plan.windows {
                    break;
                }
                host::quiet(plan.common.quiet)?;
                let first = round_trip(plan.common.worker_cpu)?;
                let mpps = window(plan, frame, what == "copy", hz)?;
                let last = round_trip(plan.common.worker_cpu)?;
                ensure!(!sys::is_interrupted(), "interrupted");
                let state = State::of(first, last, plan.common.near_max);
                eprintln!(
                    "{what} {frame} B {state:?} {mpps:.1} Mpps ({:.0} cycles)",
                    hz / mpps / 1e6
                );
                if !matches!(state, State::Mixed) {
                    found.push((what, frame, state, mpps));
                }
            }
        }
    }
    let mut cells = Vec::new();
    for &frame in &plan.frames {
        for what in ["copy", "rings"] {
            for state in [State::Near, State::Far] {
                let of =
                    |f: &&(&str, usize, State, f64)| (f.0, f.1) == (what, frame) && f.2 == state;
                let all: Vec<f64> = found.iter().filter(of).map(|f| f.3).collect();
                let cycles = all.iter().map(|mpps| hz / mpps / 1e6);
                if let (Some(mpps), Some(cycles)) = (
                    Figure::of(all.clone()),
                    Figure::of(cycles.collect::<Vec<_>>()),
                ) {
                    cells.push(Cell {
                        what: what.to_owned(),
                        frame,
                        state,
                        mpps,
                        cycles,
                        windows: all.len(),
                    });
                }
            }
        }
    }
    Ok(cells)
}

/// A guest's memory with one ring and its buffers.
fn place(plan: &Plan, len: u32, device_writes: bool) -> Result<Place> {
    let num = plan.ring_size;
    let mut next = PAGE;
    let mut take = |bytes: usize| {
        let at = next;
        next += bytes.next_multiple_of(PAGE);
        at
    };
    let areas = Place::area_bytes(num).map(&mut take);
    let buffers = take(usize::from(num) * STRIDE);
    Ok(Place {
        memory: Arc::new(Memory::new(next as u64)?),
        areas,
        num,
        buffers,
        stride: STRIDE,
        len,
        device_writes,
    })
}

/// Million frames a second.
fn window(plan: &Plan, bytes: usize, copies: bool, hz: f64) -> Result<f64> {
    let mut tx = Split::new(place(plan, (HEADER + bytes) as u32, false)?);
    let mut rx = Split::new(place(plan, RX_LEN, true)?);
    let sent = frame(bytes, 0, 1);
    for i in 0..plan.ring_size {
        let at = tx.place().buffer(i);
        tx.place().memory.write(at + HEADER, &sent);
        let at = rx.place().buffer(i);
        rx.place().memory.write(at, &[0; RX_LEN as usize]);
    }
    rx.publish(plan.ring_size);
    tx.publish(plan.ring_size);
    let (stop, worker) = (AtomicBool::new(false), plan.common.worker_cpu);
    let (from, to) = (tx.place().clone(), rx.place().clone());
    let moved = AtomicU64::new(0);
    let rate = thread::scope(|scope| {
        let (stop, moved) = (&stop, &moved);
        let device = scope.spawn(move || -> Result<()> {
            host::pin(worker)?;
            let mut device = Device::new(from, to, plan.burst, copies);
            while !stop.load(Relaxed) {
                moved.fetch_add(device.round() as u64, Relaxed);
            }
            Ok(())
        });
        let run = |secs: f64, tx: &mut Split, rx: &mut Split| {
            let (begin, cycles) = (tsc(), (secs * hz) as u64);
            let (mut frames, mut sum) = (0u64, 0u64);
            while tsc() - begin < cycles {
                let n = tx.reap(plan.batch, |_, _| {});
                if n > 0 {
                    tx.publish(n);
                }
                let memory = rx.place().memory.clone();
                let buffers = rx.place().buffers;
                let m = rx.reap(plan.batch, |buffer, _| {
                    let at = buffers + usize::from(buffer) * STRIDE;
                    sum = sum.wrapping_add(memory.u64(at + 8).load(Relaxed));
                });
                if m > 0 {
                    rx.publish(m);
                    frames += u64::from(m);
                }
                if n + m == 0 {
                    for _ in 0..40 {
                        std::hint::spin_loop();
                    }
                }
            }
            std::hint::black_box(sum);
            frames as f64 / ((tsc() - begin) as f64 / hz) / 1e6
        };
        run(plan.common.skip.as_secs_f64(), &mut tx, &mut rx);
        let rate = run(plan.common.measure.as_secs_f64(), &mut tx, &mut rx);
        stop.store(true, Relaxed);
        device.join().ok().context("the device's panic")??;
        anyhow::Ok(rate)
    })?;
    ensure!(moved.load(Relaxed) > 0, "nothing was moved");
    if copies {
        let mut got = vec![0; bytes];
        for i in 0..plan.ring_size {
            rx.place()
                .memory
                .read(rx.place().buffer(i) + HEADER, &mut got);
            ensure!(got == sent, "buffer {i} has not what was sent");
        }
    }
    Ok(rate)
}

/// One side of the device: a ring it reads chains of.
struct Side {
    place: Place,
    taken: u16,
    used: u16,
}

impl Side {
    fn new(place: Place) -> Side {
        Side {
            place,
            taken: 0,
            used: 0,
        }
    }

    fn waiting(&self) -> usize {
        let idx = self.place.memory.u16(self.place.areas[1] + 2).load(Acquire);
        usize::from(idx.wrapping_sub(self.taken))
    }

    /// The next chain's number and where its buffer is, and its length.
    #[inline(always)]
    fn take(&mut self) -> (u16, usize, u32) {
        let [desc, avail, _] = self.place.areas;
        let slot = usize::from(self.taken & (self.place.num - 1));
        let id = self.place.memory.u16(avail + 4 + 2 * slot).load(Relaxed);
        let words = self.place.memory.u64s(desc + 16 * usize::from(id), 2);
        self.taken = self.taken.wrapping_add(1);
        let at = (words[0].load(Relaxed) - GPA) as usize;
        (id, at, words[1].load(Relaxed) as u32)
    }

    #[inline(always)]
    fn give(&mut self, id: u16, written: u32) {
        let slot = usize::from(self.used & (self.place.num - 1));
        let words = self
            .place
            .memory
            .u32s(self.place.areas[2] + 4 + 8 * slot, 2);
        words[0].store(u32::from(id), Relaxed);
        words[1].store(written, Relaxed);
        self.used = self.used.wrapping_add(1);
    }

    fn show(&self) {
        let idx = self.place.memory.u16(self.place.areas[2] + 2);
        idx.store(self.used, Release);
    }
}

/// A frame that will be moved.
#[derive(Clone, Copy)]
struct Move {
    ids: [u16; 2],
    from: usize,
    to: usize,
    len: u32,
}

struct Device {
    from: Side,
    to: Side,
    ahead: std::collections::VecDeque<Move>,
    burst: usize,
    copies: bool,
    wide: Wide,
}

impl Device {
    fn new(from: Place, to: Place, burst: usize, copies: bool) -> Device {
        Device {
            from: Side::new(from),
            to: Side::new(to),
            ahead: std::collections::VecDeque::with_capacity(burst + AHEAD),
            burst,
            copies,
            wide: Wide::here(),
        }
    }

    fn look(&mut self) {
        let want = self.burst + AHEAD - self.ahead.len();
        let n = want.min(self.from.waiting()).min(self.to.waiting());
        for _ in 0..n {
            let (a, from, len) = self.from.take();
            let (b, to, _) = self.to.take();
            if self.copies {
                self.from.place.memory.fetch(from);
                self.from.place.memory.fetch(from + 64);
                self.to.place.memory.fetch_to_write(to);
            }
            self.ahead.push_back(Move {
                ids: [a, b],
                from,
                to,
                len,
            });
        }
    }

    /// Moves up to a burst; how many.
    fn round(&mut self) -> usize {
        if self.ahead.len() < self.burst + AHEAD {
            self.look();
        }
        let n = self.burst.min(self.ahead.len());
        if n == 0 {
            std::hint::spin_loop();
            return 0;
        }
        let (from, to) = (self.from.place.memory.clone(), self.to.place.memory.clone());
        for m in self.ahead.drain(..n) {
            if self.copies {
                let lines = (m.len as usize).div_ceil(64);
                from.copy_lines(m.from, &to, m.to, lines, self.wide);
            }
            self.from.give(m.ids[0], 0);
            self.to.give(m.ids[1], m.len);
        }
        self.from.show();
        self.to.show();
        n
    }
}

/// The table.
pub fn markdown(cells: &[Cell]) -> String {
    let rows = cells.iter().map(|c| {
        [
            c.what.clone(),
            c.frame.to_string(),
            format!("{:?}", c.state).to_lowercase(),
            one(Some(c.mpps), 1),
            one(Some(c.cycles), 0),
            c.windows.to_string(),
        ]
    });
    format!(
        "A device that only moves frames between two split rings: median [least to most].\n\n{}",
        table(
            ["what", "frame", "state", "Mpps", "cycles", "windows"],
            rows
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common() -> Common {
        let time = std::time::Duration::from_secs(1);
        Common {
            switch: "none".into(),
            with_ovs: false,
            with_gangway: false,
            worker_cpu: 0,
            guest_cpu: 1,
            skip: time,
            measure: time,
            quiet: time,
            near_max: 600,
        }
    }

    #[test]
    fn a_device_moves_frames_in_order_and_gives_both_rings_back() {
        let plan = Plan {
            common: common(),
            frames: vec![],
            windows: 1,
            ring_size: 64,
            batch: 1,
            burst: 8,
        };
        let tx = place(&plan, (HEADER + 300) as u32, false).unwrap();
        let rx = place(&plan, RX_LEN, true).unwrap();
        for i in 0..64 {
            tx.memory.write(tx.buffer(i), &[i as u8; HEADER + 300]);
        }
        let mut device = Device::new(tx.clone(), rx.clone(), 8, true);
        let (mut tx, mut rx) = (Split::new(tx), Split::new(rx));
        tx.publish(20);
        rx.publish(12);
        assert_eq!([8, 4, 0], [0; 3].map(|_| device.round()));
        assert_eq!(tx.reap(1, |_, _| {}), 12);
        let mut at = 0;
        let n = rx.reap(1, |id, len| {
            assert_eq!((id, len), (at, HEADER as u32 + 300));
            at += 1;
        });
        assert_eq!(n, 12);
        let mut got = [0; HEADER + 300];
        let place = rx.place();
        place.memory.read(place.buffer(11), &mut got);
        assert_eq!(got, [11; HEADER + 300]);
    }
}
