//! The quota of frames: how many the queues of a hold, and of all holds, have accepted.
//!
//! Invariant: without a quota nothing is counted; with one there are two additions for each commit, none for a frame.
//! Invariant: what a queue has added it takes back once, when its hold is removed, whoever commits meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use gangway_shared::config::valid::SpoolLimits;
use gangway_shared::id::HoldId;

use super::{Kind, SpoolError};

/// One number and its bound.
#[derive(Debug)]
struct Bound {
    used: AtomicU64,
    most: u64,
}

impl Bound {
    fn new(most: Option<u64>) -> Option<Arc<Bound>> {
        let used = AtomicU64::new(0);
        most.map(|most| Arc::new(Bound { used, most }))
    }

    /// What is used, if a queue of this kind gets no more: of what waits behind a shipment the last quarter is not. What is shipped has its
    /// source's quota: a second one here could only stop it for ever.
    fn full(&self, kind: Kind) -> Option<u64> {
        let used = self.used.load(Ordering::Relaxed);
        let most = match kind {
            Kind::Local => self.most / 4 * 3,
            Kind::Source => self.most,
            Kind::Incoming => return None,
        };
        (used >= most).then_some(used)
    }
}

/// Of all holds of a host.
#[derive(Debug)]
pub(super) struct HostFrames {
    all: Option<Arc<Bound>>,
    hold: Option<u64>,
}

impl HostFrames {
    pub(super) fn new(limits: &SpoolLimits) -> HostFrames {
        HostFrames {
            all: Bound::new(limits.quota_frames),
            hold: limits.hold_frames,
        }
    }

    /// A queue's part; `sibling` is another one of its hold. None: there is no quota.
    pub(super) fn part(&self, kind: Kind, sibling: Option<&Frames>) -> Option<Frames> {
        let hold = match sibling {
            Some(s) => s.hold.clone(),
            None => Bound::new(self.hold),
        };
        let all = self.all.clone();
        (all.is_some() || hold.is_some()).then(|| Frames {
            all,
            hold,
            kind,
            own: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
        })
    }
}

/// Of one queue.
#[derive(Debug)]
pub(super) struct Frames {
    all: Option<Arc<Bound>>,
    hold: Option<Arc<Bound>>,
    kind: Kind,
    own: AtomicU64,
    /// Its writer was refused.
    wanted: AtomicBool,
}

impl Frames {
    fn bounds(&self) -> impl Iterator<Item = &Bound> {
        self.all.as_deref().into_iter().chain(self.hold.as_deref())
    }

    /// For the writer, once per commit.
    pub(super) fn add(&self, n: u64, is_removed: impl Fn() -> bool) {
        self.bounds().for_each(|b| {
            b.used.fetch_add(n, Ordering::SeqCst);
        });
        self.own.fetch_add(n, Ordering::SeqCst);
        if is_removed() {
            self.give_back();
        }
    }

    /// What was accepted counts no more. To be called behind what `is_removed` sees.
    pub(super) fn give_back(&self) {
        let own = self.own.swap(0, Ordering::SeqCst);
        self.bounds().for_each(|b| {
            b.used.fetch_sub(own, Ordering::SeqCst);
        });
    }

    pub(super) fn is_full(&self) -> bool {
        self.bounds().any(|b| b.full(self.kind).is_some())
    }

    /// For the writer, which is full: true the first time.
    pub(super) fn want(&self) -> bool {
        !self.wanted.load(Ordering::Relaxed) && !self.wanted.swap(true, Ordering::AcqRel)
    }

    /// For the keeper: why the writer waits. None: it does not, or need not any more.
    pub(super) fn trouble(&self, hold: HoldId) -> Option<SpoolError> {
        if !self.wanted.load(Ordering::Acquire) {
            return None;
        }
        let full = |b: &Option<Arc<Bound>>| {
            let b = b.as_deref()?;
            Some((b.most, b.full(self.kind)?))
        };
        if let Some((quota_frames, used_frames)) = full(&self.all) {
            return Some(SpoolError::Frames {
                quota_frames,
                used_frames,
            });
        }
        if let Some((hold_frames, used_frames)) = full(&self.hold) {
            return Some(SpoolError::HoldFrames {
                hold,
                hold_frames,
                used_frames,
            });
        }
        self.wanted.store(false, Ordering::Release);
        None
    }
}
