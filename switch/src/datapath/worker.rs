//! A worker: owns receive queues and their lanes, runs every burst to completion.

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrayvec::ArrayVec;
use gangway_shared::config::valid::Poll;

use super::engine::{Mode, Port, Shared, Tx};
use super::lane::{Drain, Gate, Lane, Step};
use super::parse;
use super::stats::Drop;
use crate::port::{BURST, Burst, Frame, RxErrors, RxQueue, Sent};
use crate::spool::Writer;
use crate::sys;

/// Empty rounds before an adaptive worker sleeps. Each costs a system call per device queue: with 32 of them a switch at
/// 8,000 frames per second took a quarter of a core.
const SPINS: u32 = 2;
/// How often it looks again while a receiver has no room, or a sender's frames have no place.
const RETRY: Duration = Duration::from_micros(250);
/// Frames that one lane delivers per round while it drains.
const DRAIN_BUDGET: usize = 64;

/// A receive queue and where its frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueId {
    /// Port index.
    pub port: usize,
    /// Queue of the port.
    pub queue: u16,
}

/// What control asks of a worker; a batch of them is applied between two bursts.
pub enum Command {
    /// Takes over a receive queue.
    Attach(QueueId, Box<dyn RxQueue>),
    /// Gives it back.
    Detach(QueueId),
    /// Cuts a lane.
    Hold(QueueId, usize, Writer),
    /// Lets a lane drain; an own held queue is sealed first.
    Drain(QueueId, usize, Box<Drain>),
    /// Ends a lane's hold; the gate that follows.
    Close(QueueId, usize, Gate),
    /// Reopens a lane.
    Open(QueueId, usize),
}

/// A batch and where its end is told.
pub struct Batch {
    /// In order.
    pub commands: Vec<Command>,
    /// Acknowledged with what came back.
    pub done: Sender<Outcome>,
}

/// What a batch gave back.
#[derive(Default)]
pub struct Outcome {
    /// Detached or replaced queues.
    pub queues: Vec<Box<dyn RxQueue>>,
    /// Lanes that were not in a state to be held.
    pub refused: Vec<(QueueId, usize)>,
    /// Frames of a backlog that found no room in a spool.
    pub lost: u64,
}

struct Rx {
    id: QueueId,
    queue: Option<Box<dyn RxQueue>>,
    fd: Option<RawFd>,
    lanes: Vec<Lane>,
    /// Lanes with something to deliver.
    pending: Vec<usize>,
    blocked: bool,
    errors: RxErrors,
}

/// See the module.
pub struct Worker {
    shared: Arc<Shared>,
    batches: Receiver<Batch>,
    waker: Arc<OwnedFd>,
    asleep: Arc<AtomicBool>,
    poller: sys::Poller,
    poll: Poll,
    rx: Vec<Rx>,
}

/// The transmit sides in use during a burst: one lock at a time, every one flushed at the end.
struct Egress<'a> {
    ports: &'a [Arc<Port>],
    held: Option<(usize, MutexGuard<'a, Tx>)>,
}

impl<'a> Egress<'a> {
    fn new(ports: &'a [Arc<Port>]) -> Egress<'a> {
        Egress { ports, held: None }
    }

    fn send(&mut self, to: usize, frame: &Frame<'_>) -> Sent {
        if self.held.as_ref().is_none_or(|(p, _)| *p != to) {
            self.flush();
            self.held = Some((to, self.ports[to].tx()));
        }
        let Some((_, guard)) = &mut self.held else {
            return Sent::Down;
        };
        let mut sent = guard.as_mut().map_or(Sent::Down, |tx| tx.send(frame));
        if sent == Sent::Down && self.ports[to].awaited() {
            sent = Sent::Full;
        }
        if sent == Sent::Yes {
            let c = &self.ports[to].counters;
            c.tx_frames.fetch_add(1, Relaxed);
            c.tx_bytes.fetch_add(u64::from(frame.len), Relaxed);
        }
        sent
    }

    fn flush(&mut self) {
        if let Some((_, mut guard)) = self.held.take()
            && let Some(tx) = guard.as_mut()
        {
            tx.flush();
        }
    }
}

impl Worker {
    /// A worker without queues.
    pub fn new(
        shared: Arc<Shared>,
        batches: Receiver<Batch>,
        waker: Arc<OwnedFd>,
        asleep: Arc<AtomicBool>,
        poll: Poll,
    ) -> std::io::Result<Worker> {
        let poller = sys::Poller::new()?;
        poller.add(waker.as_fd())?;
        Ok(Worker {
            shared,
            batches,
            waker,
            asleep,
            poller,
            poll,
            rx: Vec::new(),
        })
    }

    /// The loop: control, bursts, drains, sleep.
    pub fn run(mut self) {
        let mut idle = 0;
        loop {
            if !self.control() {
                return;
            }
            let now_s = self.shared.now_s();
            let now_ns = now_ns();
            let mut work = false;
            for rx in &mut self.rx {
                work |= rx.poll(&self.shared, now_s, now_ns);
                work |= rx.drain(&self.shared);
            }
            idle = if work { 0 } else { idle + 1 };
            if idle > SPINS && self.poll == Poll::Adaptive {
                self.sleep();
                idle = 0;
            }
        }
    }

    fn sleep(&mut self) {
        // Order matters: first say that we sleep, then look once more (engine::batch does the reverse).
        self.asleep.store(true, std::sync::atomic::Ordering::SeqCst);
        let mut ready = false;
        let mut retry = false;
        for rx in &mut self.rx {
            // A queue whose first frame finds no place is readable all the time: look again after RETRY.
            retry |= !rx.pending.is_empty() || rx.blocked;
            if let Some(q) = rx.queue.as_mut().filter(|_| !rx.blocked) {
                ready |= q.arm();
            }
        }
        let timeout = if retry {
            Some(RETRY)
        } else {
            Some(Duration::from_millis(500))
        };
        if !ready {
            match self.batches.try_recv() {
                Ok(b) => self.apply(b),
                Err(_) => self.poller.wait(timeout),
            }
        }
        self.asleep
            .store(false, std::sync::atomic::Ordering::SeqCst);
        sys::drain_event(self.waker.as_fd());
        for q in self.rx.iter_mut().filter_map(|rx| rx.queue.as_mut()) {
            q.disarm();
        }
    }

    /// False when the worker shall end.
    fn control(&mut self) -> bool {
        while let Ok(b) = self.batches.try_recv() {
            self.apply(b);
        }
        !self.shared.stopping()
    }

    fn apply(&mut self, batch: Batch) {
        let mut out = Outcome::default();
        for c in batch.commands {
            match c {
                Command::Attach(id, q) => {
                    let fd = q.wake_fd();
                    let rx = self.entry(id);
                    let old = rx.queue.replace(q);
                    let old_fd = std::mem::replace(&mut rx.fd, fd);
                    rx.errors = RxErrors::default();
                    self.watch(old_fd, fd);
                    out.queues.extend(old);
                    self.disarm(id);
                }
                Command::Detach(id) => {
                    let rx = self.entry(id);
                    let old = rx.queue.take();
                    let old_fd = rx.fd.take();
                    self.watch(old_fd, None);
                    out.queues.extend(old);
                }
                Command::Hold(id, to, writer) => {
                    match self.entry(id).lanes[to].hold(writer, now_ns()) {
                        Ok(lost) => out.lost += lost,
                        Err(_) => out.refused.push((id, to)),
                    }
                }
                Command::Drain(id, to, drain) => {
                    let rx = self.entry(id);
                    rx.lanes[to].drain(drain);
                    if !rx.pending.contains(&to) {
                        rx.pending.push(to);
                    }
                }
                Command::Close(id, to, gate) => self.entry(id).lanes[to].close(gate),
                Command::Open(id, to) => self.entry(id).lanes[to].open(),
            }
        }
        // Control may have given up waiting; then it does not matter.
        let _ = batch.done.send(out);
    }

    fn entry(&mut self, id: QueueId) -> &mut Rx {
        let at = self.rx.iter().position(|r| r.id == id).unwrap_or_else(|| {
            let lanes = self.shared.ports.iter().map(|_| Lane::default()).collect();
            let errors = RxErrors::default();
            self.rx.push(Rx {
                id,
                queue: None,
                fd: None,
                lanes,
                pending: Vec::new(),
                blocked: false,
                errors,
            });
            self.rx.len() - 1
        });
        &mut self.rx[at]
    }

    fn disarm(&mut self, id: QueueId) {
        if let Some(q) = self.entry(id).queue.as_mut() {
            q.disarm();
        }
    }

    fn watch(&self, old: Option<RawFd>, new: Option<RawFd>) {
        if let Some(fd) = old {
            self.poller.remove_raw(fd);
        }
        if let Some(fd) = new {
            self.poller.add_raw(fd);
        }
    }
}

impl Rx {
    /// One burst. True if there was one.
    fn poll(&mut self, shared: &Shared, now_s: u32, now_ns: u64) -> bool {
        let Some(queue) = &mut self.queue else {
            return false;
        };
        let from = &shared.ports[self.id.port];
        let mut burst = Burst::new();
        queue.burst(&mut burst);
        let mut egress = Egress::new(&shared.ports);
        let mut done = 0;
        let mut bytes = 0;
        let mut touched: ArrayVec<usize, { BURST + 1 }> = ArrayVec::new();
        for frame in &burst {
            let Some(targets) = Targets::of(frame, self.id.port, shared, now_s) else {
                from.counters.drop(Drop::Malformed);
                done += 1;
                continue;
            };
            if !targets
                .iter(shared, self.id.port)
                .all(|to| self.lanes[to].accepts(frame.len))
            {
                break;
            }
            for to in targets.iter(shared, self.id.port) {
                let lane = &mut self.lanes[to];
                match lane.take(frame, now_ns, &mut |f| egress.send(to, f)) {
                    Ok(()) => {}
                    Err(why) => shared.ports[to].counters.drop(why),
                }
                if lane.pending() && !self.pending.contains(&to) {
                    self.pending.push(to);
                }
                if !touched.contains(&to) && touched.try_push(to).is_err() {
                    lane.commit();
                }
            }
            if let Targets::One(to) = targets {
                let payload = parse::payload_bytes(frame.head(), frame.len);
                shared
                    .links
                    .count(self.id.port, to, frame.len, payload, now_s);
            } else if let Targets::Nowhere(why) = targets {
                from.counters.drop(why);
            }
            done += 1;
            bytes += u64::from(frame.len);
        }
        egress.flush();
        for to in touched {
            self.lanes[to].commit();
        }
        let got = burst.len();
        drop(burst);
        self.blocked = done < got;
        if got > 0 {
            from.counters.rx_frames.fetch_add(done as u64, Relaxed);
            from.counters.rx_bytes.fetch_add(bytes, Relaxed);
        }
        queue.release(done);
        let e = queue.errors();
        if e != self.errors {
            self.errors = e;
            for (c, v) in
                from.counters
                    .rx_errors
                    .iter()
                    .zip([e.malformed, e.ring_broken, e.overrun])
            {
                c.store(v, Relaxed);
            }
        }
        done > 0
    }

    /// Delivers what waits on this queue's lanes. True if something moved or should be tried again at once.
    fn drain(&mut self, shared: &Shared) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        let mut egress = Egress::new(&shared.ports);
        let mut moved = false;
        let lanes = &mut self.lanes;
        self.pending.retain(|&to| {
            let counters = &shared.ports[to].counters;
            let mut send = |f: &Frame<'_>| {
                let s = egress.send(to, f);
                moved |= s == Sent::Yes;
                s
            };
            lanes[to].step(DRAIN_BUDGET, &mut send, &mut |why| counters.drop(why)) == Step::More
        });
        egress.flush();
        moved
    }
}

/// Where a frame goes.
enum Targets {
    One(usize),
    /// Everywhere but to where it came from; the port whose own address is the source gets no echo.
    Flood {
        own: Option<usize>,
        moved: bool,
    },
    Nowhere(Drop),
}

impl Targets {
    fn of(frame: &Frame<'_>, from: usize, shared: &Shared, now_s: u32) -> Option<Targets> {
        let e = parse::ether(frame.head())?;
        let from_uplink = shared.ports[from].uplink;
        let mut own = None;
        let mut moved = false;
        if let Some(home) = shared.fdb.learn(e.src, from, now_s) {
            // A configured address of another port: believed only when that VM is on its way out (then this is the
            // mark that the network has learned its new place), or when its port is not up.
            own = Some(home);
            match shared.ports[home].mode() {
                Mode::Held | Mode::Departing if from_uplink => {
                    moved = true;
                    shared.ports[home]
                        .marker
                        .store(true, std::sync::atomic::Ordering::Release);
                }
                Mode::Live if !shared.ports[home].is_up() && !shared.ports[home].armed() => {
                    shared.ports[home].unfix();
                    shared.fdb.set(e.src, from, false, now_s);
                }
                _ => {}
            }
        } else if shared.ports[from].mac == Some(e.src) && shared.ports[from].fix_own_address() {
            shared.fdb.set(e.src, from, true, now_s);
        }
        if e.dst.is_multicast() {
            return Some(Targets::Flood { own, moved });
        }
        Some(match shared.fdb.lookup(e.dst, now_s) {
            Some(to) if to == from || (from_uplink && shared.ports[to].uplink) => {
                Targets::Nowhere(Drop::Hairpin)
            }
            Some(to) if shared.ports[to].mode() == Mode::Standby => Targets::Nowhere(Drop::Down),
            Some(to) => Targets::One(to),
            None => Targets::Flood { own, moved },
        })
    }

    fn iter<'a>(&self, shared: &'a Shared, from: usize) -> impl Iterator<Item = usize> + use<'a> {
        let (one, flood) = match self {
            Targets::One(to) => (Some(*to), None),
            Targets::Flood { own, moved } => (None, Some((*own, *moved))),
            Targets::Nowhere(_) => (None, None),
        };
        let from_uplink = shared.ports[from].uplink;
        // What anybody but the arriving group floods reaches the source, too, until the announcement.
        let from_deaf = !shared.ports[from].hears_uplink();
        let all = if flood.is_some() {
            shared.ports.len()
        } else {
            0
        };
        let (own, moved) = flood.unwrap_or_default();
        let floods = (0..all).filter(move |&to| {
            let p = &shared.ports[to];
            to != from
                && Some(to) != own
                && !(from_uplink && p.uplink)
                && (p.hears_uplink() || from_deaf)
                && match p.mode() {
                    Mode::Live => p.is_up() || p.armed(),
                    // What comes from a VM that has moved already reaches the others of its group where they are now.
                    Mode::Held | Mode::Departing => !moved,
                    Mode::Standby | Mode::Departed => false,
                }
        });
        one.into_iter().chain(floods)
    }
}

/// The host's wall clock in nanoseconds since the Unix epoch.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64)
}

/// Seconds since `start`.
pub fn seconds_since(start: Instant) -> u32 {
    start.elapsed().as_secs() as u32
}
