//! The target's end, as control sees it. The work is in [`super::receive`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gangway_shared::api::Tally;
use gangway_shared::id::{HoldId, LaneKey};
use tokio::sync::Notify;

use super::outgoing::Lanes;
use crate::spool::{Queue, Recovered, Spool, Writer};

/// Expects the shipment of one hold, and receives it.
#[derive(Debug)]
pub struct Incoming {
    pub(super) spool: Arc<Spool>,
    pub(super) hold: HoldId,
    pub(super) ticket: [u8; 32],
    pub(super) source_host: String,
    /// Names of the ports that lanes may lead to.
    pub(super) ports: Vec<String>,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a lane's queue is made.
    making: Mutex<()>,
    /// One connection at a time has the writers.
    pub(super) turn: tokio::sync::Mutex<()>,
    /// Something was received, or is to be acknowledged.
    pub(super) received: Notify,
    /// Something was received that the source waits for.
    pub(super) urgent: Notify,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) lanes: Vec<Lane>,
    pub(super) conn: Option<quinn::Connection>,
    pub(super) error: Option<String>,
    pub(super) stopped: bool,
    pub(super) aborted: bool,
    /// The source has named all lanes.
    pub(super) named: bool,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) key: LaneKey,
    pub(super) inside: bool,
    pub(super) queue: Arc<Queue>,
    /// Here while no stream appends; gone once sealed.
    pub(super) writer: Option<Writer>,
    pub(super) end: Option<Tally>,
    pub(super) complete: bool,
    pub(super) mismatch: Option<String>,
    pub(super) acked: Tally,
}

/// What has arrived of a lane.
#[derive(Debug, Clone)]
pub struct IncomingLane {
    /// Its name.
    pub key: LaneKey,
    /// Between two VMs of the group.
    pub inside: bool,
    /// Its records. Sealed once complete.
    pub queue: Arc<Queue>,
    /// The source has said that this is all, and the digests agree.
    pub complete: bool,
    /// How they do not agree.
    pub mismatch: Option<String>,
    /// Synced and acknowledged.
    pub acked: Tally,
}

impl Incoming {
    /// Nothing happens before it is registered with an [`super::Acceptor`]. `source_host` as in its certificate; `ports`: to
    /// which lanes may lead.
    pub fn new(
        spool: Arc<Spool>,
        hold: HoldId,
        ticket: [u8; 32],
        source_host: String,
        ports: Vec<String>,
    ) -> Arc<Incoming> {
        Arc::new(Incoming {
            spool,
            hold,
            ticket,
            source_host,
            ports,
            state: Mutex::default(),
            changed: Condvar::new(),
            making: Mutex::new(()),
            turn: tokio::sync::Mutex::new(()),
            received: Notify::new(),
            urgent: Notify::new(),
        })
    }

    /// The hold.
    pub fn hold(&self) -> HoldId {
        self.hold
    }

    /// After a restart: goes on with a queue that the spool has recovered, before the first connection.
    pub fn adopt(&self, found: Recovered) {
        let q = found.queue;
        self.lock().lanes.push(Lane {
            key: q.lane().clone(),
            inside: q.inside(),
            acked: q.tally(),
            queue: q,
            writer: found.writer,
            end: None,
            complete: false,
            mismatch: found.damaged.first().map(ToString::to_string),
        });
    }

    /// All lanes that the source has named.
    pub fn lanes(&self) -> Vec<IncomingLane> {
        let state = self.lock();
        let lanes = state.lanes.iter();
        lanes
            .map(|l| IncomingLane {
                key: l.key.clone(),
                inside: l.inside,
                queue: l.queue.clone(),
                complete: l.complete,
                mismatch: l.mismatch.clone(),
                acked: l.acked,
            })
            .collect()
    }

    /// What was wrong last; none while a connection is well.
    pub fn error(&self) -> Option<String> {
        self.lock().error.clone()
    }

    /// A connection is there and was welcomed.
    pub fn is_connected(&self) -> bool {
        self.lock().conn.is_some()
    }

    /// The source has said that it put everything back.
    pub fn is_aborted(&self) -> bool {
        self.lock().aborted
    }

    /// The source has named all its lanes; the target knows what it has to flush.
    pub fn is_named(&self) -> bool {
        self.lock().named
    }

    /// Blocks until these lanes, as far as they were named, are complete (true) or the time is up (false).
    pub fn wait_complete(&self, lanes: Lanes, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            let mut meant = state
                .lanes
                .iter()
                .filter(|l| lanes == Lanes::All || l.inside);
            if meant.all(|l| l.complete) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.stopped {
                return false;
            }
            let r = self.changed.wait_timeout(state, left);
            state = r.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the connection and takes no other; no queue is made from here on. The queues stay as they are. Blocks.
    pub fn stop(&self) {
        let conn = self.update(|s| {
            s.stopped = true;
            // The spool has its room back once nobody can write.
            s.lanes.iter_mut().for_each(|l| l.writer = None);
            s.conn.take()
        });
        if let Some(c) = conn {
            c.close(quinn::VarInt::from_u32(0), b"stopped");
        }
        drop(self.making());
    }

    /// Held while a lane's queue is made.
    pub(super) fn making(&self) -> MutexGuard<'_, ()> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let r = f(&mut self.lock());
        self.changed.notify_all();
        r
    }
}
