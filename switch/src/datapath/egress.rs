//! Sending: a worker's frames into the transmit queues of the ports.
//!
//! A queue stays behind its lock for a run of frames. Where workers share it, a long run locks it only to take places and
//! to give them back (ADR-0022).
//!
//! Invariant: one lock at a time, none longer than a burst; every queue that was sent to is flushed; behind
//! [`Egress::finish`] the receivers can see all that was sent.

use std::sync::Arc;
use std::time::Instant;

use super::engine::{Mode, Port, TxGuard};
use super::flow::Flows;
use super::lane::Sink;
use super::reading::Reading;
use super::stats::{Traffic, add};
use super::worker::Round;
use crate::port::{Claim, Frame, NeverReason, Sent, TxQueue};

/// What a worker keeps from one burst to the next.
#[derive(Default)]
pub(super) struct Outbox {
    /// Ports and their transmit queues that got frames in this round.
    pub(super) sent_to: Vec<(usize, usize)>,
    claim: Claim,
    /// Ports, their queues, and the last claim in each that the receiver could not see when it was given back.
    behind: Vec<(usize, usize, u64)>,
}

impl Outbox {
    fn wait_for(&mut self, to: usize, queue: usize, number: u64) {
        let mut known = self.behind.iter_mut();
        match known.find(|b| (b.0, b.1) == (to, queue)) {
            Some(last) => last.2 = number,
            None => self.behind.push((to, queue, number)),
        }
    }
}

/// So many bytes at once are worth a claim; a shorter copy takes less than the line of a lock needs to go to and fro (ADR-0022).
const CLAIM_BYTES: u64 = 32 << 10;

/// How often a worker looks whether the one before it has finished its copy until it lets others run.
const LOOKS: u32 = 64;

/// The transmit queues in use during a burst: one lock at a time, every one flushed at the end.
pub(super) struct Egress<'a> {
    n: usize,
    ports: &'a [Arc<Port>],
    flows: &'a Flows,
    traffic: &'a Traffic,
    held: Option<(usize, usize, TxGuard<'a>)>,
    /// Sent to the queue whose lock is held.
    frames: u64,
    bytes: u64,
    out: &'a mut Outbox,
}

impl<'a> Egress<'a> {
    pub(super) fn new(round: &Round<'a>, out: &'a mut Outbox) -> Egress<'a> {
        Egress {
            n: round.n,
            ports: &round.shared.ports,
            flows: round.flows,
            traffic: round.traffic,
            out,
            held: None,
            frames: 0,
            bytes: 0,
        }
    }

    #[inline]
    pub(super) fn send(&mut self, to: usize, frame: &Frame<'_>) -> Sent {
        let hash = match self.ports[to].steering.is_wide() {
            true => self.flows.key(frame.head()).hash(),
            false => 0,
        };
        let is_long = u64::from(frame.len) >= CLAIM_BYTES;
        let claimed = match is_long && self.ports[to].steering.is_shared() {
            true => self.claim(to, hash, frame),
            false => None,
        };
        let sent = claimed.unwrap_or_else(|| {
            let sent = self
                .turn_to(to, hash)
                .map_or(Sent::Down, |tx| tx.send(frame));
            if sent == Sent::Yes {
                self.frames += 1;
                self.bytes += u64::from(frame.len);
            }
            sent
        });
        match sent {
            Sent::Down if self.ports[to].awaited() => Sent::Full,
            Sent::Down if self.ports[to].mode() == Mode::Lost => Sent::Never(NeverReason::Gone),
            sent => sent,
        }
    }

    /// Sends into a queue that workers share; none if there is no such queue.
    fn claim(&mut self, to: usize, hash: u64, frame: &Frame<'_>) -> Option<Sent> {
        self.flush();
        let port = &self.ports[to];
        let queue = port.steering.pick(self.n, hash);
        let sent = self.out.claim.send(|| port.tx(queue), frame)?;
        if sent == Sent::Yes {
            self.claimed(to, queue, std::slice::from_ref(frame));
        }
        Some(sent)
    }

    /// The same with as many as simply go.
    fn claim_run(&mut self, to: usize, hash: u64, frames: &[Frame<'_>]) -> Option<usize> {
        self.flush();
        let port = &self.ports[to];
        let queue = port.steering.pick(self.n, hash);
        let sent = self.out.claim.send_run(|| port.tx(queue), frames)?;
        if sent > 0 {
            self.claimed(to, queue, &frames[..sent]);
        }
        Some(sent)
    }

    /// These have their places.
    fn claimed(&mut self, to: usize, queue: usize, frames: &[Frame<'_>]) {
        if let Some(number) = self.out.claim.behind() {
            self.out.wait_for(to, queue, number);
        }
        let bytes = frames.iter().map(|f| u64::from(f.len)).sum();
        self.note(to, queue, frames.len() as u64, bytes);
    }

    /// As many of them as simply go, at once. They are of flows with the same queue; `hash` is of one of them.
    pub(super) fn send_run(&mut self, to: usize, hash: u64, frames: &[Frame<'_>]) -> usize {
        let bytes = |frames: &[Frame<'_>]| frames.iter().map(|f| u64::from(f.len)).sum::<u64>();
        if self.ports[to].steering.is_shared()
            && bytes(frames) >= CLAIM_BYTES
            && let Some(sent) = self.claim_run(to, hash, frames)
        {
            return sent;
        }
        let sent = self.turn_to(to, hash).map_or(0, |tx| tx.send_run(frames));
        self.frames += sent as u64;
        self.bytes += bytes(&frames[..sent]);
        sent
    }

    /// The same of frames of any flows: none behind the first that takes another queue.
    pub(super) fn send_some(&mut self, to: usize, frames: &[Frame<'_>]) -> usize {
        let steering = &self.ports[to].steering;
        if !steering.is_wide() {
            return self.send_run(to, 0, frames);
        }
        let hash = |f: &Frame<'_>| self.flows.key(f.head()).hash();
        let Some(first) = frames.first().map(hash) else {
            return 0;
        };
        let queue = steering.pick(self.n, first);
        let same = |f: &&Frame<'_>| steering.pick(self.n, hash(f)) == queue;
        let n = frames.iter().take_while(same).count();
        self.send_run(to, first, &frames[..n])
    }

    /// The queue for a flow with this hash; none if the port is down.
    #[inline]
    fn turn_to(&mut self, to: usize, hash: u64) -> Option<&mut dyn TxQueue> {
        let port = &self.ports[to];
        let mut queue = port.steering.pick(self.n, hash);
        if self
            .held
            .as_ref()
            .is_none_or(|(p, q, _)| (*p, *q) != (to, queue))
        {
            self.flush();
            let mut guard = port.tx(queue);
            if guard.is_none() {
                // It may have just gone, and left others.
                drop(guard);
                queue = port.steering.pick(self.n, hash);
                guard = port.tx(queue);
            }
            self.held = Some((to, queue, guard));
        }
        let (_, _, guard) = self.held.as_mut()?;
        guard.as_deref_mut().map(|tx| tx as &mut dyn TxQueue)
    }

    /// Whether the receiver is there, and has read what was in its queues when this was first asked; see [`Reading`].
    fn caught_up(&mut self, to: usize, now: Instant, reading: &mut Reading) -> bool {
        let port = &self.ports[to];
        if !port.is_up() {
            reading.reset();
            return port.mode() == Mode::Lost;
        }
        if !port.steering.is_wide() {
            return true;
        }
        self.flush();
        reading.begin(now, || port.marks());
        reading.is_over(now, |q, mark| port.has_read(q, mark))
    }

    /// Ends a burst.
    pub(super) fn finish(mut self) {
        self.flush();
        while let Some((to, queue, number)) = self.out.behind.pop() {
            let is_out = || {
                let mut tx = self.ports[to].tx(queue);
                tx.as_mut()
                    .and_then(|t| t.shared())
                    .is_some_and(|t| t.is_out(number))
            };
            let mut looks = 0;
            while is_out() {
                looks += 1;
                match looks < LOOKS {
                    true => std::hint::spin_loop(),
                    false => std::thread::yield_now(),
                }
            }
        }
    }

    fn flush(&mut self) {
        let Some((to, queue, mut guard)) = self.held.take() else {
            return;
        };
        if let Some(tx) = guard.as_mut() {
            tx.flush();
            // Another worker's claim may be out, and this behind it.
            if let Some(number) = tx.shared().and_then(|t| t.last_out()) {
                self.out.wait_for(to, queue, number);
            }
        }
        drop(guard);
        let (frames, bytes) = (self.frames, self.bytes);
        (self.frames, self.bytes) = (0, 0);
        if frames > 0 {
            self.note(to, queue, frames, bytes);
        }
    }

    /// So much has gone to a queue.
    fn note(&mut self, to: usize, queue: usize, frames: u64, bytes: u64) {
        if !self.out.sent_to.contains(&(to, queue)) {
            self.out.sent_to.push((to, queue));
        }
        let moved = self.traffic.port(to);
        add(moved.tx_frames(queue), frames);
        add(&moved.tx_bytes, bytes);
    }
}

/// What waits on a lane goes here.
pub(super) struct Towards<'e, 'a> {
    pub(super) egress: &'e mut Egress<'a>,
    pub(super) to: usize,
    pub(super) now: Instant,
    /// Something was sent.
    pub(super) moved: bool,
    /// For the last frame there was no room.
    pub(super) full: bool,
}

impl Sink for Towards<'_, '_> {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let sent = self.egress.send(self.to, frame);
        self.moved |= sent == Sent::Yes;
        self.full = sent == Sent::Full;
        sent
    }

    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize {
        let sent = self.egress.send_some(self.to, frames);
        self.moved |= sent > 0;
        sent
    }

    fn caught_up(&mut self, reading: &mut Reading) -> bool {
        self.egress.caught_up(self.to, self.now, reading)
    }
}
