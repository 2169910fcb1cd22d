//! The source's end, as control sees it. The work is in [`super::send`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gangway_shared::api::Tally;
use gangway_shared::id::{HoldId, LaneKey};
use tokio::sync::Notify;

use super::{ShipError, send};
use crate::spool::Queue;

/// To whom, and what for.
#[derive(Debug, Clone)]
pub struct OutgoingArgs {
    /// The hold.
    pub hold: HoldId,
    /// Shown to the target.
    pub ticket: [u8; 32],
    /// `address:port` of the target's switch.
    pub target_address: String,
    /// Its host name, as in its certificate.
    pub target_host: String,
}

/// Ships one hold. Lanes are added as they come; what is written to their queues goes out at once.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) args: OutgoingArgs,
    pub(super) endpoint: quinn::Endpoint,
    pub(super) client: quinn::ClientConfig,
    state: Mutex<State>,
    changed: Condvar,
    /// For the task: lanes were added, or it is to end.
    pub(super) poke: Notify,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) lanes: Vec<Lane>,
    /// No lane will be added.
    pub(super) named: bool,
    pub(super) connected: bool,
    /// Was connected at least once.
    pub(super) welcomed: bool,
    /// Trouble at the moment.
    pub(super) error: Option<ShipError>,
    /// Over, and why.
    pub(super) fatal: Option<ShipError>,
    pub(super) end: Option<Ending>,
    /// Of which lane QUIC took how many bytes, in this order.
    #[cfg(test)]
    pub(super) taken: Vec<(u32, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Close,
    Abort,
}

#[derive(Debug, Clone)]
pub(super) struct Lane {
    pub(super) key: LaneKey,
    pub(super) inside: bool,
    pub(super) queue: Arc<Queue>,
    /// Handed to QUIC, once all of it is: up to which record, and what.
    pub(super) sent: Option<(u64, Tally)>,
    /// Bytes that QUIC has taken, on all connections.
    pub(super) handed: u64,
    pub(super) acked_seq: u64,
    pub(super) acked: Tally,
    pub(super) complete: bool,
}

/// How far a lane's shipment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneShip {
    /// As [`Outgoing::add_lane`] returned.
    pub lane: u32,
    /// Its name.
    pub key: LaneKey,
    /// Between two VMs of the group.
    pub inside: bool,
    /// Handed to the network, once all of it is: up to which record, and what.
    pub sent: Option<(u64, Tally)>,
    /// Bytes of batches that QUIC has taken, those that were sent again behind a lost connection once more.
    pub handed: u64,
    /// What the target has safely.
    pub acked: Tally,
    /// The last record that the target has safely.
    pub acked_seq: u64,
    /// It is sealed, and the target has all of it with the same digest.
    pub complete: bool,
}

/// Which lanes are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lanes {
    /// Those between two VMs of the group.
    Inside,
    /// All.
    All,
}

impl Outgoing {
    /// Starts to connect, and keeps trying until [`Outgoing::close`] or [`Outgoing::abort`].
    pub fn start(
        rt: tokio::runtime::Handle,
        endpoint: quinn::Endpoint,
        client: quinn::ClientConfig,
        args: OutgoingArgs,
    ) -> Arc<Outgoing> {
        Outgoing::spawn(rt, endpoint, client, args, false)
    }

    /// The same for a shipment that an earlier run of this switch has begun: that the target does not know it is no
    /// reason to give up, for it may be starting, too.
    pub fn go_on(
        rt: tokio::runtime::Handle,
        endpoint: quinn::Endpoint,
        client: quinn::ClientConfig,
        args: OutgoingArgs,
    ) -> Arc<Outgoing> {
        Outgoing::spawn(rt, endpoint, client, args, true)
    }

    fn spawn(
        rt: tokio::runtime::Handle,
        endpoint: quinn::Endpoint,
        client: quinn::ClientConfig,
        args: OutgoingArgs,
        welcomed: bool,
    ) -> Arc<Outgoing> {
        let out = Arc::new(Outgoing {
            args,
            endpoint,
            client,
            state: Mutex::new(State {
                welcomed,
                ..State::default()
            }),
            changed: Condvar::new(),
            poke: Notify::new(),
        });
        rt.spawn(send::run(out.clone()));
        out
    }

    /// Blocks until the target has welcomed us once; a refusal is an error at once, no connection one at the time-out.
    pub fn wait_connected(&self, timeout: Duration) -> Result<(), ShipError> {
        let state = self.wait(timeout, |s| {
            s.welcomed || s.fatal.is_some() || matches!(s.error, Some(ShipError::Refused(_)))
        });
        match (&state.fatal, state.welcomed, &state.error) {
            (Some(e), _, _) => Err(e.clone()),
            (None, true, _) => Ok(()),
            (None, false, Some(e @ ShipError::Refused(_))) => Err(e.clone()),
            (None, false, e) => Err(ShipError::Timeout(e.as_ref().map(ToString::to_string))),
        }
    }

    /// Ships this queue from its first record on, while it is written, and its end once it is sealed. The same lane
    /// again: its number.
    pub fn add_lane(&self, key: LaneKey, inside: bool, queue: Arc<Queue>) -> u32 {
        let mut state = self.lock();
        if let Some(n) = state.lanes.iter().position(|l| l.key == key) {
            return n as u32;
        }
        state.lanes.push(Lane {
            key,
            inside,
            queue,
            sent: None,
            handed: 0,
            acked_seq: 0,
            acked: Tally::default(),
            complete: false,
        });
        let n = state.lanes.len() - 1;
        drop(state);
        self.poke.notify_one();
        n as u32
    }

    /// No lane will be added: the target may open its ports once it knows them all.
    pub fn all_added(&self) {
        self.lock().named = true;
        self.poke.notify_one();
    }

    /// All lanes, in the order of their numbers.
    pub fn status(&self) -> Vec<LaneShip> {
        let state = self.lock();
        let lanes = state.lanes.iter().enumerate();
        lanes
            .map(|(n, l)| LaneShip {
                lane: n as u32,
                key: l.key.clone(),
                inside: l.inside,
                sent: l.sent,
                handed: l.handed,
                acked: l.acked,
                acked_seq: l.acked_seq,
                complete: l.complete,
            })
            .collect()
    }

    /// Connected at this moment.
    pub fn is_connected(&self) -> bool {
        self.lock().connected
    }

    /// What is wrong now; none while it gets on.
    pub fn error(&self) -> Option<String> {
        let state = self.lock();
        state
            .fatal
            .as_ref()
            .or(state.error.as_ref())
            .map(ToString::to_string)
    }

    /// What ended it for good, if something did.
    pub fn failure(&self) -> Option<ShipError> {
        self.lock().fatal.clone()
    }

    /// Blocks until these lanes are complete (true), or the time is up or the shipment has failed for good (false).
    pub fn wait_complete(&self, lanes: Lanes, timeout: Duration) -> bool {
        let done = |s: &State| {
            let mut meant = s.lanes.iter().filter(|l| lanes == Lanes::All || l.inside);
            meant.all(|l| l.complete)
        };
        done(&self.wait(timeout, |s| done(s) || s.fatal.is_some()))
    }

    /// Tells the target to forget the shipment, if it can be reached, and ends.
    pub fn abort(&self) {
        self.finish(Ending::Abort);
    }

    /// Ends. The target keeps what it has.
    pub fn close(&self) {
        self.finish(Ending::Close);
    }

    fn finish(&self, how: Ending) {
        self.lock().end.get_or_insert(how);
        self.poke.notify_one();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes who waits for it.
    pub(super) fn update<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let r = f(&mut self.lock());
        self.changed.notify_all();
        r
    }

    fn wait(&self, timeout: Duration, until: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let end = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || until(&state) {
                return state;
            }
            let r = self.changed.wait_timeout(state, left);
            state = r.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
