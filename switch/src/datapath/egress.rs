//! Sending: a worker's frames into the transmit queues of the ports.
//!
//! Invariant: one lock at a time, none longer than a burst; every queue that was sent to is flushed.

use std::sync::Arc;

use super::engine::{Port, TxGuard};
use super::flow::Flows;
use super::lane::Sink;
use super::stats::{Traffic, add};
use super::worker::Round;
use crate::port::{Frame, Sent, TxQueue};

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
    sent_to: &'a mut Vec<(usize, usize)>,
}

impl<'a> Egress<'a> {
    pub(super) fn new(round: &Round<'a>, sent_to: &'a mut Vec<(usize, usize)>) -> Egress<'a> {
        Egress {
            n: round.n,
            ports: &round.shared.ports,
            flows: round.flows,
            traffic: round.traffic,
            sent_to,
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
        let sent = self
            .turn_to(to, hash)
            .map_or(Sent::Down, |tx| tx.send(frame));
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

    /// As many of them as simply go, at once. They are of flows with the same queue; `hash` is of one of them.
    pub(super) fn send_run(&mut self, to: usize, hash: u64, frames: &[Frame<'_>]) -> usize {
        let sent = self.turn_to(to, hash).map_or(0, |tx| tx.send_run(frames));
        self.frames += sent as u64;
        self.bytes += frames[..sent].iter().map(|f| u64::from(f.len)).sum::<u64>();
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

    pub(super) fn flush(&mut self) {
        let Some((to, queue, mut guard)) = self.held.take() else {
            return;
        };
        if let Some(tx) = guard.as_mut() {
            tx.flush();
        }
        drop(guard);
        if self.frames == 0 {
            return;
        }
        if !self.sent_to.contains(&(to, queue)) {
            self.sent_to.push((to, queue));
        }
        let moved = self.traffic.port(to);
        add(moved.tx_frames(queue), std::mem::take(&mut self.frames));
        add(&moved.tx_bytes, std::mem::take(&mut self.bytes));
    }
}

/// What waits on a lane goes here.
pub(super) struct Towards<'e, 'a> {
    pub(super) egress: &'e mut Egress<'a>,
    pub(super) to: usize,
    /// Something was sent.
    pub(super) moved: bool,
}

impl Sink for Towards<'_, '_> {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        let sent = self.egress.send(self.to, frame);
        self.moved |= sent == Sent::Yes;
        sent
    }

    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize {
        let sent = self.egress.send_some(self.to, frames);
        self.moved |= sent > 0;
        sent
    }
}
