//! A worker: owns receive queues and their lanes, runs every burst to completion.

use std::cell::OnceCell;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrayvec::ArrayVec;
use gangway_shared::config::valid::Poll;

use super::engine::{Mode, Port, Shared, TxGuard};
use super::flow::{Flow, Flows, Key};
use super::lane::{Drain, Gate, Lane, Progress, Step};
use super::parse;
use super::stats::{Drop, Run, Traffic, add};
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
    /// Lets a held lane drain its own queue, once `before` is set.
    PutBack(QueueId, usize, Option<Arc<AtomicBool>>, Arc<Progress>),
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
    /// Lanes that were not in a state to be held, or put back.
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
    /// Where the frame at hand goes.
    targets: Vec<usize>,
    /// Lanes that took a frame of this burst, other than by the short way.
    touched: Vec<usize>,
    errors: RxErrors,
}

/// See the module.
pub struct Worker {
    /// Which one.
    n: usize,
    shared: Arc<Shared>,
    batches: Receiver<Batch>,
    waker: Arc<OwnedFd>,
    asleep: Arc<AtomicBool>,
    poller: sys::Poller,
    poll: Poll,
    rx: Vec<Rx>,
    flows: Flows,
    /// Ports that got frames in this round.
    sent_to: Vec<usize>,
}

/// What is the same for all queues of a worker's round.
struct Round<'a> {
    shared: &'a Shared,
    traffic: &'a Traffic,
    flows: &'a Flows,
    now_s: u32,
    /// Wanted only for what is held.
    now_ns: OnceCell<u64>,
}

/// The transmit sides in use during a burst: one lock at a time, every one flushed at the end.
struct Egress<'a> {
    ports: &'a [Arc<Port>],
    traffic: &'a Traffic,
    held: Option<(usize, TxGuard<'a>)>,
    /// Sent to the port whose lock is held.
    frames: u64,
    bytes: u64,
    sent_to: &'a mut Vec<usize>,
}

impl<'a> Egress<'a> {
    fn new(shared: &'a Shared, traffic: &'a Traffic, sent_to: &'a mut Vec<usize>) -> Egress<'a> {
        Egress {
            ports: &shared.ports,
            traffic,
            sent_to,
            held: None,
            frames: 0,
            bytes: 0,
        }
    }

    #[inline]
    fn send(&mut self, to: usize, frame: &Frame<'_>) -> Sent {
        self.turn_to(to);
        let Some((_, guard)) = &mut self.held else {
            return Sent::Down;
        };
        let sent = guard.as_mut().map_or(Sent::Down, |tx| tx.send(frame));
        match sent {
            Sent::Yes => {
                self.frames += 1;
                self.bytes += u64::from(frame.len);
            }
            Sent::Down if self.ports[to].awaited() => return Sent::Full,
            _ => {}
        }
        sent
    }

    /// As many of them as simply go, at once.
    fn send_run(&mut self, to: usize, frames: &[Frame<'_>]) -> usize {
        self.turn_to(to);
        let Some((_, guard)) = &mut self.held else {
            return 0;
        };
        let sent = guard.as_mut().map_or(0, |tx| tx.send_run(frames));
        self.frames += sent as u64;
        self.bytes += frames[..sent].iter().map(|f| u64::from(f.len)).sum::<u64>();
        sent
    }

    fn turn_to(&mut self, to: usize) {
        if self.held.as_ref().is_none_or(|(p, _)| *p != to) {
            self.flush();
            self.held = Some((to, self.ports[to].tx()));
        }
    }

    fn flush(&mut self) {
        let Some((to, mut guard)) = self.held.take() else {
            return;
        };
        if let Some(tx) = guard.as_mut() {
            tx.flush();
        }
        drop(guard);
        if self.frames == 0 {
            return;
        }
        if !self.sent_to.contains(&to) {
            self.sent_to.push(to);
        }
        let moved = self.traffic.port(to);
        add(&moved.tx_frames, std::mem::take(&mut self.frames));
        add(&moved.tx_bytes, std::mem::take(&mut self.bytes));
    }
}

impl Worker {
    /// A worker without queues, with room for so many flows.
    pub fn new(
        n: usize,
        shared: Arc<Shared>,
        batches: Receiver<Batch>,
        waker: Arc<OwnedFd>,
        asleep: Arc<AtomicBool>,
        poll: Poll,
        flows: usize,
    ) -> std::io::Result<Worker> {
        let poller = sys::Poller::new()?;
        poller.add(waker.as_fd())?;
        Ok(Worker {
            n,
            shared,
            batches,
            waker,
            asleep,
            poller,
            poll,
            rx: Vec::new(),
            flows: Flows::new(flows),
            sent_to: Vec::new(),
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
            let mut work = false;
            let round = Round {
                shared: &self.shared,
                traffic: &self.shared.traffic[self.n],
                flows: &self.flows,
                now_s,
                now_ns: OnceCell::new(),
            };
            for rx in &mut self.rx {
                work |= rx.poll(&round, &mut self.sent_to);
                work |= rx.drain(&round, &mut self.sent_to);
            }
            if work || self.poll == Poll::Busy {
                self.settle();
            }
            idle = if work { 0 } else { idle + 1 };
            if idle > SPINS && self.poll == Poll::Adaptive {
                self.sleep();
                idle = 0;
            }
        }
    }

    /// Signals the peers that want it, behind the round's one barrier.
    fn settle(&mut self) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        for q in self.rx.iter_mut().filter_map(|rx| rx.queue.as_mut()) {
            q.settle();
        }
        for to in self.sent_to.drain(..) {
            if let Some(tx) = self.shared.ports[to].tx().as_mut() {
                tx.settle();
            }
        }
    }

    fn sleep(&mut self) {
        // Also for what was given back without being a frame.
        self.settle();
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
                Command::PutBack(id, to, before, progress) => {
                    let rx = self.entry(id);
                    if !rx.lanes[to].put_back(before, progress) {
                        out.refused.push((id, to));
                    } else if !rx.pending.contains(&to) {
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
                targets: Vec::new(),
                touched: Vec::new(),
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
    /// One burst: look up, gate, transmit, give back. True if there was one.
    fn poll(&mut self, round: &Round<'_>, sent_to: &mut Vec<usize>) -> bool {
        let Round {
            shared,
            traffic,
            flows,
            now_s,
            ref now_ns,
        } = *round;
        let Some(queue) = &mut self.queue else {
            self.blocked = false;
            return false;
        };
        let port = self.id.port;
        let from = &shared.ports[port];
        let mut burst = Burst::new();
        queue.burst(&mut burst);
        let generation = shared.fdb.generation();
        let mut keys: ArrayVec<Key, BURST> = ArrayVec::new();
        for frame in &burst {
            let key = flows.key(frame.head());
            flows.prefetch(&key, port);
            keys.push(key);
        }
        let mut egress = Egress::new(shared, traffic, sent_to);
        let (mut done, mut bytes) = (0, 0);
        let mut run = (usize::MAX, Run::default());
        self.touched.clear();
        while done < burst.len() {
            // What most frames are: several of flows that are known, to one lane that forwards.
            let known = |at: usize| flows.find(keys.get(at)?, port, generation, now_s);
            if let Some(first) = known(done)
                && self.lanes[first.to()].is_plain()
            {
                let to = first.to();
                let mut same: ArrayVec<&Flow, BURST> = ArrayVec::new();
                same.push(first);
                while let Some(f) = known(done + same.len()).filter(|f| f.to() == to) {
                    same.push(f);
                }
                let sent = egress.send_run(to, &burst[done..done + same.len()]);
                if run.0 != to {
                    run = traffic.next(port, run, to, now_s);
                }
                let mut rest = same.iter().zip(&burst[done..done + sent]).peekable();
                while let Some((flow, frame)) = rest.next() {
                    let overhead = flow.overhead();
                    let (mut n, mut all) = (1, u64::from(frame.len));
                    let mut payload = u64::from(frame.len.saturating_sub(overhead));
                    while let Some((_, frame)) = rest.next_if(|(f, _)| std::ptr::eq(**f, *flow)) {
                        n += 1;
                        all += u64::from(frame.len);
                        payload += u64::from(frame.len.saturating_sub(overhead));
                    }
                    flow.count(n, all);
                    run.1.bytes += all;
                    run.1.payload += payload;
                    bytes += all;
                }
                run.1.frames += sent as u64;
                done += sent;
                if sent == same.len() {
                    continue;
                }
            }
            // Never out of range: less than all were sent.
            let (Some(frame), Some(key)) = (burst.get(done), keys.get(done)) else {
                break;
            };
            let Some(targets) = Targets::of(frame, port, shared, now_s) else {
                from.counters.drop(Drop::Malformed);
                done += 1;
                continue;
            };
            self.targets.clear();
            self.targets.extend(targets.iter(shared, port));
            // A VM that sends can wait for room; the network cannot be asked to, unless for a hold.
            let waits = |to: usize| {
                shared.ports[to].awaited() || (!from.uplink && shared.ports[to].is_patient(now_s))
            };
            let accepts = |&to: &usize| self.lanes[to].accepts(frame.len, || waits(to));
            if !self.targets.iter().all(accepts) {
                break;
            }
            for &to in &self.targets {
                let lane = &mut self.lanes[to];
                match lane.take(frame, || *now_ns.get_or_init(self::now_ns), &mut |f| {
                    egress.send(to, f)
                }) {
                    Ok(()) => {}
                    Err(why) => shared.ports[to].counters.drop(why),
                }
                if lane.pending() && !self.pending.contains(&to) {
                    self.pending.push(to);
                }
                if !self.touched.contains(&to) {
                    self.touched.push(to);
                }
            }
            match targets {
                Targets::One { to, known } => {
                    let payload = parse::payload_bytes(frame.head(), frame.len);
                    let overhead = frame.len - payload.min(frame.len);
                    if known {
                        let flow = flows.note(key, port, to, overhead, generation, now_s);
                        flow.count(1, u64::from(frame.len));
                    }
                    if run.0 != to {
                        run = traffic.next(port, run, to, now_s);
                    }
                    run.1.frames += 1;
                    run.1.bytes += u64::from(frame.len);
                    run.1.payload += u64::from(payload);
                }
                Targets::Nowhere(why) => from.counters.drop(why),
                Targets::Flood { .. } => {}
            }
            done += 1;
            bytes += u64::from(frame.len);
        }
        egress.flush();
        let _ = traffic.next(port, run, usize::MAX, now_s);
        for &to in &self.touched {
            self.lanes[to].commit();
        }
        let got = burst.len();
        drop(burst);
        self.blocked = done < got;
        if got > 0 {
            add(&traffic.port(port).rx_frames, done as u64);
            add(&traffic.port(port).rx_bytes, bytes);
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
    fn drain(&mut self, round: &Round<'_>, sent_to: &mut Vec<usize>) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        let (shared, traffic) = (round.shared, round.traffic);
        let mut egress = Egress::new(shared, traffic, sent_to);
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
    One {
        /// The port.
        to: usize,
        /// Nothing but the addresses was asked: the next frame like this one goes the same way.
        known: bool,
    },
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
            Some(to) => Targets::One {
                to,
                known: own.is_none(),
            },
            None => Targets::Flood { own, moved },
        })
    }

    fn iter<'a>(&self, shared: &'a Shared, from: usize) -> impl Iterator<Item = usize> + use<'a> {
        let (one, flood) = match self {
            Targets::One { to, .. } => (Some(*to), None),
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
