//! A worker: owns receive queues and lanes, runs every burst to completion.

use std::cell::{Cell, OnceCell};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrayvec::ArrayVec;
use gangway_shared::config::valid::Poll;

use super::backlog::Backlog;
use super::crew::{Place, Unpinned};
use super::egress::{Egress, Outbox, Towards};
use super::engine::Shared;
use super::flow::{Flow, Flows, Key};
use super::lane::{Drain, Gate, Lane, Progress};
use super::parse;
use super::stats::{Drop, Run, Traffic, add};
use super::stuck::{self, Stuck};
use super::targets::Targets;
use crate::port::{BURST, Burst, Frame, RxErrors, RxQueue};
use crate::spool::{Origin, Owed, Writer};
use crate::sys::{self, Affinity};

/// Backlogs whose memory is given back at once; each is up to 256 pages.
const TRIMMED: usize = 4;
/// Empty rounds before an adaptive worker sleeps. Each costs a system call per device queue: with 32 of them a switch at
/// 8,000 frames per second took a quarter of a core.
const SPINS: u32 = 2;
/// How often it looks again while a receiver has no room, or a sender's frames have no place.
const RETRY: Duration = stuck::LAST;
/// Frames that one lane delivers per round while it drains, and that may come twice if the switch is killed then.
const DRAIN_BUDGET: usize = BURST;
/// How often it does so in a round: more must go than can come in, or a lane whose receiver once had no room never forwards
/// directly again.
const DRAINS: usize = 2;
const _: () = assert!(DRAINS * DRAIN_BUDGET > BURST);

/// A receive queue and where its frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueId {
    /// Port index.
    pub port: usize,
    /// Queue of the port.
    pub queue: u16,
}

/// Whose lanes: what comes in at a port is in the hands of the workers that serve its queues, each with lanes of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// Port index.
    pub port: usize,
    /// Worker.
    pub worker: usize,
}

/// What control asks of the worker of a seat, for its lane to the port that is named; a batch of it is applied between two
/// bursts.
pub enum Command {
    /// Cuts a lane.
    Hold(Seat, usize, Writer),
    /// Lets a lane drain; an own held queue is sealed first.
    Drain(Seat, usize, Box<Drain>),
    /// Lets a held lane drain its own queue, once `before` is set.
    PutBack(Seat, usize, Option<Arc<AtomicBool>>, Arc<Progress>),
    /// Ends a lane's hold; the gate that follows.
    Close(Seat, usize, Gate),
    /// Reopens a lane.
    Open(Seat, usize),
}

impl Command {
    /// Which worker it is for.
    pub fn worker(&self) -> usize {
        let (Self::Hold(seat, ..)
        | Self::Drain(seat, ..)
        | Self::PutBack(seat, ..)
        | Self::Close(seat, ..)
        | Self::Open(seat, _)) = self;
        seat.worker
    }
}

/// What the engine asks of a worker.
pub enum Order {
    /// Takes over a receive queue.
    Attach(QueueId, Box<dyn RxQueue>),
    /// Gives it back.
    Detach(QueueId),
    /// Gives it back if nothing that came in at its port waits here.
    Leave(QueueId),
    /// Takes nothing from it, until it leaves or this is taken back: what has come in can be delivered meanwhile.
    Quiet(QueueId, bool),
    /// Runs there, and waits like that.
    Run(Place),
    /// Says what waits here, and what it serves.
    Idle,
    /// Says what waits here in memory.
    Backlogs,
    /// Gives back memory of backlogs that are not in use.
    Trim,
    /// Delivers what an earlier run had taken for a lane: sending port, destination port.
    TakeUp(usize, usize, Box<Backlog>),
    /// Ends.
    Retire,
    /// Something about a lane.
    Lane(Command),
}

/// A batch and where its end is told.
pub struct Batch {
    /// In order.
    pub orders: Vec<Order>,
    /// Acknowledged with what came back.
    pub done: Sender<Outcome>,
}

/// What a batch gave back.
#[derive(Default)]
pub struct Outcome {
    /// Detached or replaced queues.
    pub queues: Vec<Box<dyn RxQueue>>,
    /// Lanes that were not in a state to be held, or put back.
    pub refused: Vec<(Seat, usize)>,
    /// Frames of a backlog that found no room in a spool.
    pub lost: u64,
    /// Lanes that are not idle, for which a queue or a worker does not leave: (receiving port, destination port).
    pub busy: Vec<(usize, usize)>,
    /// Workers that could not move.
    pub unpinned: Vec<Unpinned>,
}

impl Outcome {
    /// What another one gave.
    pub fn add(&mut self, other: Outcome) {
        self.queues.extend(other.queues);
        self.refused.extend(other.refused);
        self.lost += other.lost;
        self.busy.extend(other.busy);
        self.unpinned.extend(other.unpinned);
    }
}

/// How a worker hears of batches.
pub struct Line {
    /// They come here.
    pub batches: Receiver<Batch>,
    /// Wakes it.
    pub waker: Arc<OwnedFd>,
    /// It has to be woken.
    pub asleep: Arc<AtomicBool>,
}

struct Rx {
    id: QueueId,
    queue: Option<Box<dyn RxQueue>>,
    fd: Option<RawFd>,
    blocked: bool,
    /// See [`Order::Quiet`].
    quiet: bool,
    /// Where the frame at hand goes.
    targets: Vec<usize>,
    /// Lanes that took a frame of this burst, other than by the short way.
    touched: Vec<usize>,
    /// Frames of the last burst that are accepted and not released, as long as some of them are `owed` to the disk.
    taken: usize,
    owed: Vec<Owed>,
    errors: RxErrors,
}

/// The lanes of a port's seat. Made when they are first needed.
#[derive(Default)]
struct Side {
    /// By destination port.
    lanes: Vec<Lane>,
    /// Lanes with something to deliver.
    pending: Vec<usize>,
    /// Of these, the ones that were tried just now.
    tried: Vec<usize>,
}

/// See the module.
pub struct Worker {
    /// Which one.
    n: usize,
    shared: Arc<Shared>,
    traffic: Arc<Traffic>,
    line: Line,
    poller: sys::Poller,
    poll: Poll,
    /// Where it runs when it has no CPU of its own.
    home: Affinity,
    retired: bool,
    rx: Vec<Rx>,
    /// By receiving port.
    sides: Vec<Side>,
    /// Of these, the one whose lanes are drained first.
    first: usize,
    /// By destination port.
    stuck: Vec<Stuck>,
    flows: Flows,
    out: Outbox,
}

/// What is the same for all queues of a worker's round.
pub(super) struct Round<'a> {
    /// The worker.
    pub(super) n: usize,
    pub(super) shared: &'a Shared,
    pub(super) traffic: &'a Traffic,
    pub(super) flows: &'a Flows,
    now_s: u32,
    /// Wanted only for what is held.
    now_ns: OnceCell<u64>,
    /// Wanted only for what waits.
    now: OnceCell<Instant>,
}

impl Worker {
    /// A worker without queues, with room for so many flows.
    pub fn new(
        n: usize,
        shared: Arc<Shared>,
        line: Line,
        poll: Poll,
        flows: usize,
        home: Affinity,
    ) -> std::io::Result<Worker> {
        let poller = sys::Poller::new()?;
        poller.add(line.waker.as_fd())?;
        let sides: Vec<Side> = shared.ports.iter().map(|_| Side::default()).collect();
        Ok(Worker {
            n,
            traffic: shared.books.of(n, shared.ports.len()),
            shared,
            line,
            poller,
            poll,
            home,
            retired: false,
            rx: Vec::new(),
            first: 0,
            stuck: vec![Stuck::default(); sides.len()],
            sides,
            flows: Flows::new(flows)?,
            out: Outbox::default(),
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
                n: self.n,
                shared: &self.shared,
                traffic: &self.traffic,
                flows: &self.flows,
                now_s,
                now_ns: OnceCell::new(),
                now: OnceCell::new(),
            };
            for rx in &mut self.rx {
                let side = &mut self.sides[rx.id.port];
                work |= rx.poll(side, &round, &mut self.out);
            }
            // Another one first each time: what room there is goes to who asks for it first.
            self.first = (self.first + 1) % self.sides.len().max(1);
            let (last, first) = self.sides.split_at_mut(self.first);
            for side in first.iter_mut().chain(last) {
                work |= side.drain(&round, &mut self.stuck, &mut self.out);
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
        for (to, queue) in self.out.sent_to.drain(..) {
            if let Some(tx) = self.shared.ports[to].tx(queue).as_mut() {
                tx.settle();
            }
        }
    }

    fn sleep(&mut self) {
        // Also for what was given back without being a frame.
        self.settle();
        // Order matters: first say that we sleep, then look once more (engine::batch does the reverse).
        self.line
            .asleep
            .store(true, std::sync::atomic::Ordering::SeqCst);
        let mut ready = false;
        let mut retry = self.sides.iter().any(|s| !s.pending.is_empty());
        for rx in &mut self.rx {
            // A queue whose first frame finds no place is readable all the time: look again after RETRY.
            retry |= rx.blocked;
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
            match self.line.batches.try_recv() {
                Ok(b) => self.apply(b),
                Err(_) => self.poller.wait(timeout),
            }
        }
        self.line
            .asleep
            .store(false, std::sync::atomic::Ordering::SeqCst);
        sys::drain_event(self.line.waker.as_fd());
        for q in self.rx.iter_mut().filter_map(|rx| rx.queue.as_mut()) {
            q.disarm();
        }
    }

    /// False when the worker shall end.
    fn control(&mut self) -> bool {
        while let Ok(b) = self.line.batches.try_recv() {
            self.apply(b);
        }
        !self.retired && !self.shared.stopping()
    }

    fn apply(&mut self, batch: Batch) {
        let mut out = Outcome::default();
        for order in batch.orders {
            match order {
                Order::Attach(id, q) => {
                    self.side(id.port);
                    let fd = q.wake_fd();
                    let rx = self.entry(id);
                    rx.give_back();
                    let old = rx.queue.replace(q);
                    let old_fd = std::mem::replace(&mut rx.fd, fd);
                    rx.errors = RxErrors::default();
                    self.watch(old_fd, fd);
                    out.queues.extend(old);
                    self.disarm(id);
                }
                Order::Detach(id) => out.queues.extend(self.detach(id)),
                Order::Leave(id) => match self.sides[id.port].busy() {
                    Some(to) => out.busy.push((id.port, to)),
                    None => out.queues.extend(self.detach(id)),
                },
                Order::Quiet(id, yes) => {
                    if let Some(rx) = self.rx.iter_mut().find(|r| r.id == id) {
                        rx.quiet = yes;
                    }
                }
                Order::Run(place) => {
                    self.poll = place.poll;
                    let moved = place.cpu.map_or_else(|| self.home.apply(), sys::pin_thread);
                    if let Err(e) = moved {
                        out.unpinned.push(Unpinned::new(self.n, place.cpu, e));
                    }
                }
                Order::Idle => {
                    let served = self.rx.iter().map(|r| (r.id.port, r.id.port));
                    let sides = self.sides.iter().enumerate();
                    out.busy
                        .extend(sides.filter_map(|(n, s)| Some((n, s.busy()?))));
                    out.busy.extend(served);
                }
                Order::Backlogs => {
                    let sides = self.sides.iter().enumerate();
                    out.busy
                        .extend(sides.filter_map(|(n, s)| Some((n, s.backlog()?))));
                }
                Order::Trim => {
                    let lanes = self.sides.iter_mut().flat_map(|s| &mut s.lanes);
                    // Frames wait meanwhile.
                    lanes
                        .filter_map(|l| l.trim().then_some(()))
                        .take(TRIMMED)
                        .for_each(drop);
                }
                Order::TakeUp(port, to, backlog) => {
                    let side = self.side(port);
                    side.lanes[to].take_up(*backlog, now_ns());
                    side.is_pending(to);
                }
                Order::Retire => self.retired = true,
                Order::Lane(c) => self.lane(c, &mut out),
            }
        }
        // Control may have given up waiting; then it does not matter.
        let _ = batch.done.send(out);
    }

    fn lane(&mut self, command: Command, out: &mut Outcome) {
        match command {
            Command::Hold(seat, to, writer) => {
                match self.side(seat.port).lanes[to].hold(writer, now_ns()) {
                    Ok(lost) => out.lost += lost,
                    Err(_) => out.refused.push((seat, to)),
                }
            }
            Command::Drain(seat, to, drain) => {
                let side = self.side(seat.port);
                side.lanes[to].drain(drain);
                side.is_pending(to);
            }
            Command::PutBack(seat, to, before, progress) => {
                let side = self.side(seat.port);
                if side.lanes[to].put_back(before, progress) {
                    side.is_pending(to);
                } else {
                    out.refused.push((seat, to));
                }
            }
            Command::Close(seat, to, gate) => self.side(seat.port).lanes[to].close(gate),
            Command::Open(seat, to) => self.side(seat.port).lanes[to].open(),
        }
    }

    fn side(&mut self, port: usize) -> &mut Side {
        let side = &mut self.sides[port];
        if side.lanes.is_empty() {
            let lane = |to| match &self.shared.shelf {
                Some(shelf) => Lane::at(shelf.spot(port, self.n, to)),
                None => Lane::default(),
            };
            side.lanes = (0..self.shared.ports.len()).map(lane).collect();
        }
        side
    }

    fn detach(&mut self, id: QueueId) -> Option<Box<dyn RxQueue>> {
        let at = self.rx.iter().position(|r| r.id == id)?;
        let mut rx = self.rx.remove(at);
        rx.give_back();
        self.watch(rx.fd, None);
        rx.queue
    }

    fn entry(&mut self, id: QueueId) -> &mut Rx {
        let at = self.rx.iter().position(|r| r.id == id).unwrap_or_else(|| {
            self.rx.push(Rx {
                id,
                queue: None,
                fd: None,
                blocked: false,
                quiet: false,
                targets: Vec::new(),
                touched: Vec::new(),
                taken: 0,
                owed: Vec::new(),
                errors: RxErrors::default(),
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
    /// What was accepted goes back to its sender. Where the queue is taken away that is before the disk has it: nobody
    /// would take it from the next queue again, and the hold's next sync covers it.
    fn give_back(&mut self) {
        self.owed.clear();
        let taken = std::mem::take(&mut self.taken);
        if let Some(q) = self.queue.as_mut().filter(|_| taken > 0) {
            q.release(taken);
        }
    }

    /// One burst: look up, gate, transmit, give back. True if there was one.
    fn poll(&mut self, side: &mut Side, round: &Round<'_>, out: &mut Outbox) -> bool {
        let Round {
            n,
            shared,
            traffic,
            flows,
            now_s,
            ref now_ns,
            ..
        } = *round;
        let Some(queue) = &mut self.queue else {
            self.blocked = false;
            return false;
        };
        if self.quiet {
            self.blocked = true;
            return false;
        }
        if !self.owed.is_empty() {
            self.owed.retain(|o| !o.is_settled());
            if !self.owed.is_empty() {
                self.blocked = true;
                return false;
            }
            queue.release(std::mem::take(&mut self.taken));
        }
        let port = self.id.port;
        let from = &shared.ports[port];
        let before = queue.position().map_or(Origin::NONE, |position| Origin {
            queue: self.id.queue,
            position,
        });
        let mut burst = Burst::new();
        queue.burst(&mut burst);
        let generation = shared.fdb.generation();
        let mut keys: ArrayVec<Key, BURST> = ArrayVec::new();
        for frame in &burst {
            let key = flows.key(frame.head());
            if keys.last().map(Key::hash) != Some(key.hash()) {
                flows.prefetch(&key, port);
            }
            keys.push(key);
        }
        let slots = flows.locate(&keys, port);
        let find = |at: usize| flows.find(keys.get(at)?, *slots.get(at)?, port, generation, now_s);
        // The first one that is to be looked up asks for what the others of the burst will need, too.
        let asked = Cell::new(false);
        let look_up = |at: usize| {
            if !asked.replace(true) {
                let all = burst.iter().enumerate().skip(at);
                let unknown = all.filter(|(i, _)| find(*i).is_none());
                for e in unknown.filter_map(|(_, f)| parse::ether(f.head())) {
                    shared.fdb.prefetch(e.src);
                    shared.fdb.prefetch(e.dst);
                }
            }
            look_up(burst.get(at)?, keys.get(at)?, port, round, generation)
        };
        let mut egress = Egress::new(round, out);
        let (mut done, mut bytes) = (0, 0);
        let mut run = (usize::MAX, Run::default());
        self.touched.clear();
        while done < burst.len() {
            // What most frames are: several of flows that are known, to one lane that forwards or is held.
            let known = |at: usize| find(at).or_else(|| look_up(at));
            if let Some(first) = known(done)
                && let to = first.to()
                && let plain = side.lanes[to].is_plain()
                && (plain || side.lanes[to].spools())
            {
                let steering = &shared.ports[to].steering;
                let wide = plain && steering.is_wide();
                let hash = |at: usize| keys.get(at).map_or(0, Key::hash);
                let queue = |at: usize| steering.pick(n, hash(at));
                let mut same: ArrayVec<Flow<'_>, BURST> = ArrayVec::new();
                same.push(first);
                while let Some(f) = known(done + same.len())
                    .filter(|f| f.to() == to && (!wide || queue(done + same.len()) == queue(done)))
                {
                    same.push(f);
                }
                let frames = &burst[done..done + same.len()];
                let sent = if plain {
                    egress.send_run(to, hash(done), frames)
                } else {
                    if !self.touched.contains(&to) {
                        self.touched.push(to);
                    }
                    let now_ns = *now_ns.get_or_init(self::now_ns);
                    side.lanes[to].take_run(frames, now_ns, before.behind(done))
                };
                if run.0 != to {
                    run = traffic.next(port, run, to, now_s);
                }
                let mut rest = same.iter().zip(&burst[done..done + sent]).peekable();
                while let Some((flow, frame)) = rest.next() {
                    let overhead = flow.overhead();
                    let (mut n, mut all) = (1, u64::from(frame.len));
                    let mut payload = u64::from(frame.len.saturating_sub(overhead));
                    while let Some((_, frame)) = rest.next_if(|(f, _)| f.is_same(*flow)) {
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
            let Some(frame) = burst.get(done) else {
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
            let accepts = |&to: &usize| side.lanes[to].accepts(frame.len, || waits(to));
            if !self.targets.iter().all(accepts) {
                break;
            }
            for &to in &self.targets {
                let lane = &mut side.lanes[to];
                let now_ns = || *now_ns.get_or_init(self::now_ns);
                match lane.take(
                    frame,
                    self.id.queue,
                    before.behind(done),
                    now_ns,
                    &mut |f| egress.send(to, f),
                ) {
                    Ok(()) => {}
                    Err(why) => shared.ports[to].counters.drop(why),
                }
                if lane.pending() {
                    side.is_pending(to);
                }
                if !self.touched.contains(&to) {
                    self.touched.push(to);
                }
            }
            match targets {
                Targets::One { to, .. } => {
                    if let Some(flow) = known(done) {
                        flow.count(1, u64::from(frame.len));
                    }
                    let payload = parse::payload_bytes(frame.head(), frame.len);
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
        egress.finish();
        let _ = traffic.next(port, run, usize::MAX, now_s);
        for &to in &self.touched {
            side.lanes[to].commit();
            self.owed.extend(side.lanes[to].owed());
        }
        let got = burst.len();
        drop(burst);
        self.blocked = done < got;
        if got > 0 {
            let moved = traffic.port(port);
            add(moved.rx_frames(usize::from(self.id.queue)), done as u64);
            add(&moved.rx_bytes, bytes);
        }
        if done > 0 && !self.owed.is_empty() {
            self.taken = done;
            self.blocked = true;
        } else {
            self.owed.clear();
            queue.release(done);
        }
        let e = queue.errors();
        if e != self.errors {
            let was = std::mem::replace(&mut self.errors, e);
            let more = [
                e.malformed - was.malformed,
                e.ring_broken - was.ring_broken,
                e.overrun - was.overrun,
            ];
            for (c, n) in from.counters.rx_errors.iter().zip(more) {
                c.fetch_add(n, Relaxed);
            }
        }
        done > 0
    }
}

impl Side {
    /// A lane that does not simply forward: what came in here waits, or is held.
    fn busy(&self) -> Option<usize> {
        self.lanes.iter().position(|l| !l.is_plain())
    }

    /// A lane of which something waits in memory.
    fn backlog(&self) -> Option<usize> {
        self.lanes.iter().position(Lane::has_backlog)
    }

    fn is_pending(&mut self, to: usize) {
        if !self.pending.contains(&to) {
            self.pending.push(to);
        }
    }

    /// Delivers what waits on the lanes. True if something moved.
    fn drain(&mut self, round: &Round<'_>, stuck: &mut [Stuck], out: &mut Outbox) -> bool {
        let mut moved = false;
        let lanes = &mut self.lanes;
        for _ in 0..DRAINS {
            if self.pending.is_empty() {
                break;
            }
            let mut egress = Egress::new(round, out);
            self.tried.clear();
            for &to in &self.pending {
                let now = *round.now.get_or_init(Instant::now);
                if stuck[to].rests(now) {
                    continue;
                }
                self.tried.push(to);
                let counters = &round.shared.ports[to].counters;
                let mut sink = Towards {
                    egress: &mut egress,
                    to,
                    now,
                    moved: false,
                    full: false,
                };
                lanes[to].step(DRAIN_BUDGET, &mut sink, &mut |why| counters.drop(why));
                match (sink.moved, sink.full) {
                    (true, _) => stuck[to].moved(),
                    (false, true) => stuck[to].full(now),
                    (false, false) => {}
                }
                moved |= sink.moved;
            }
            egress.finish();
            if self.tried.is_empty() {
                break;
            }
            // Now the receivers have it.
            self.tried.retain(|&to| {
                lanes[to].note();
                !lanes[to].pending()
            });
            self.pending.retain(|to| !self.tried.contains(to));
        }
        moved
    }
}

/// What the FDB says of a frame whose flow is not known, or not any more, noted; none if it is nothing simple.
#[inline(never)]
fn look_up<'a>(
    frame: &Frame<'_>,
    key: &Key,
    from: usize,
    round: &Round<'a>,
    generation: u32,
) -> Option<Flow<'a>> {
    let (shared, now_s) = (round.shared, round.now_s);
    match Targets::of(frame, from, shared, now_s)? {
        Targets::One { to, known: true } => {
            let payload = parse::payload_bytes(frame.head(), frame.len);
            let overhead = frame.len - payload.min(frame.len);
            let flow = round.flows.note(key, from, to, overhead, generation, now_s);
            Some(flow)
        }
        _ => None,
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
