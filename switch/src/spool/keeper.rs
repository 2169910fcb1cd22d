//! The keeper: a thread that gets segments ready, away from the data path.
//!
//! Segments live in `pool/` until a queue gets them by a rename. `ready` ones are faulted in; `stale` ones were used
//! before and are made ready when needed, but for what is shipped, which gets them as they are; `waiting` ones belong to a removed hold and somebody still looks. None is zeroed:
//! each use has an epoch of its own (docs/formats/spool.md). What another switch ships is written with `pwrite`, by a thread that may
//! wait: its segments are not faulted in, for the kernel zeroes each page that it faults in, and none that is written whole.
//!
//! Invariant: the sum of all segment files (held, pooled, being made) stays within the quota, and the last quarter of it
//! is not for growing [`Kind::Local`] queues. What is shipped for a hold that is committed here may go beyond it: see [`State::forward`].

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync as SyncPolicy};
use gangway_shared::id::HoldId;

use super::frames::{Frames, HostFrames};
use super::map::{Segment, is_memory};
use super::queue::{Queue, lock};
use super::syncer::Syncer;
use super::{Kind, SpoolError};

/// While something can't be done: how long until it is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// What the keeper and the spool share.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) dir: PathBuf,
    pub(super) segment_bytes: u64,
    pub(super) quota_bytes: u64,
    pub(super) policy: SyncPolicy,
    pub(super) limits: SpoolLimits,
    pub(super) frames: HostFrames,
    pub(super) syncer: Syncer,
    pub(super) state: Mutex<State>,
    /// Half of the quota is used.
    pub(super) scarce: Arc<AtomicBool>,
    /// The files are memory: once faulted in, storing to them never faults again.
    in_memory: bool,
    epochs: Epochs,
    thread: OnceLock<Thread>,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) queues: BTreeMap<HoldId, Vec<Arc<Queue>>>,
    /// Nothing can put these back any more. No quota of bytes stops what is shipped for them, which has its source's: a shipment that waits
    /// for room waits for the end of its own hold.
    pub(super) forward: BTreeSet<HoldId>,
    ready: Vec<Pooled>,
    stale: Vec<Pooled>,
    waiting: Vec<(Arc<Segment>, PathBuf)>,
    /// In queues, also of removed holds that somebody still reads.
    pub(super) held: u64,
    /// All of them, also in the pool and those being made.
    pub(super) total: u64,
    file_number: u64,
    /// Holds whose queues ask for segments and get none, and why.
    trouble: BTreeMap<HoldId, String>,
}

#[derive(Debug)]
struct Pooled {
    seg: Segment,
    path: PathBuf,
}

/// Numbers that no earlier use of a segment had, also of an earlier process: random ones.
#[derive(Debug)]
struct Epochs(RandomState, AtomicU64);

impl Epochs {
    fn next(&self) -> u64 {
        // Zero is what a fresh file has.
        self.0.hash_one(self.1.fetch_add(1, Ordering::Relaxed)) | 1
    }
}

impl Host {
    pub(super) fn new(cfg: &SpoolConfig) -> Host {
        Host {
            in_memory: is_memory(&cfg.dir),
            epochs: Epochs(RandomState::new(), AtomicU64::new(0)),
            dir: cfg.dir.clone(),
            segment_bytes: cfg.segment_bytes,
            quota_bytes: cfg.quota_bytes,
            policy: cfg.sync,
            limits: cfg.limits,
            frames: HostFrames::new(&cfg.limits),
            syncer: Syncer::default(),
            state: Mutex::default(),
            scarce: Arc::default(),
            thread: OnceLock::new(),
            stop: AtomicBool::new(false),
        }
    }

    /// Segments that are kept ready: an eighth of the quota, at most 16 MiB or two.
    fn ready_goal(&self) -> usize {
        let bytes = (self.quota_bytes / 8).min(16 << 20);
        ((bytes / self.segment_bytes) as usize).max(2)
    }

    /// Used segments that are kept for another time.
    fn stale_goal(&self) -> usize {
        (self.quota_bytes / 4 / self.segment_bytes) as usize
    }

    /// A new queue's part of the quota of frames.
    pub(super) fn frames(&self, hold: HoldId, kind: Kind) -> Option<Frames> {
        let state = lock(&self.state);
        let sibling = state.queues.get(&hold).and_then(|q| q.first());
        self.frames.part(kind, sibling.and_then(|q| q.frames()))
    }

    fn pool_path(&self, state: &mut State) -> PathBuf {
        state.file_number += 1;
        self.dir
            .join("pool")
            .join(format!("{:08}.seg", state.file_number))
    }

    /// What is shipped for a hold that is committed here.
    pub(super) fn is_exempt(&self, hold: HoldId, kind: Kind) -> bool {
        kind == Kind::Incoming && lock(&self.state).forward.contains(&hold)
    }

    /// A segment for the queue in this directory, its next one by this number; faulted in where a worker writes to it. `beyond` the
    /// quota, too, if need be. Blocks.
    pub(super) fn take(
        &self,
        dir: &Path,
        number: u32,
        kind: Kind,
        beyond: bool,
    ) -> Result<Segment, SpoolError> {
        let to = dir.join(segment_name(number));
        let mut state = lock(&self.state);
        let is_free = |s: &State| {
            let room = (s.total + 1) * self.segment_bytes <= self.quota_bytes;
            room || !(s.ready.is_empty() && s.stale.is_empty())
        };
        if !is_free(&state) {
            // What was given back, and our thread has not come to yet.
            self.collect(&mut state);
        }
        state.held += 1;
        self.set_scarce(&state);
        let may_grow = (state.total + 1) * self.segment_bytes <= self.quota_bytes;
        let pooled = match kind {
            Kind::Incoming if may_grow => state.stale.pop(),
            Kind::Incoming => state.stale.pop().or_else(|| state.ready.pop()),
            Kind::Source | Kind::Local => state.ready.pop().or_else(|| state.stale.pop()),
        };
        let r = if let Some(p) = pooled {
            drop(state);
            self.place(p, &to, kind)
        } else if may_grow || beyond {
            state.total += 1;
            // In the pool first: under its name in the queue it is complete or not there.
            let path = self.pool_path(&mut state);
            drop(state);
            Segment::create(&path, self.segment_bytes)
                .map_err(SpoolError::io(&path))
                .and_then(|seg| self.place(Pooled { seg, path }, &to, kind))
        } else {
            state.held -= 1;
            drop(state);
            return Err(self.used_up());
        };
        let r = r.or_else(|e| match self.spare(kind) {
            Some(p) => self.place(p, &to, kind),
            None => Err(e),
        });
        match r {
            Ok(mut seg) => {
                seg.begin(number, self.epochs.next());
                Ok(seg)
            }
            Err(e) => {
                let mut state = lock(&self.state);
                state.held -= 1;
                state.total -= 1;
                Err(e)
            }
        }
    }

    /// Instead of one that could not be made: the disk may be full.
    fn spare(&self, kind: Kind) -> Option<Pooled> {
        let mut state = lock(&self.state);
        let spare = (kind == Kind::Incoming).then(|| state.ready.pop())??;
        state.total -= 1;
        Some(spare)
    }

    /// For a queue's segment whose earlier use is not known.
    pub(super) fn epoch(&self) -> u64 {
        self.epochs.next()
    }

    /// Makes sure that storing takes no page fault that has to wait. What can't be made so is gone.
    fn touched(&self, mut p: Pooled) -> std::io::Result<Pooled> {
        if !(self.in_memory && p.seg.is_faulted()) {
            p.seg.touch().inspect_err(|_| {
                let _ = std::fs::remove_file(&p.path);
            })?;
        }
        Ok(p)
    }

    /// What waits behind a shipment leaves room for the shipment, which is what it waits for, and for other holds.
    fn spare_for_local(&self) -> bool {
        lock(&self.state).held * self.segment_bytes * 4 < self.quota_bytes * 3
    }

    fn used_up(&self) -> SpoolError {
        SpoolError::Quota {
            quota_bytes: self.quota_bytes,
            used_bytes: lock(&self.state).held * self.segment_bytes,
            segment_bytes: self.segment_bytes,
        }
    }

    fn set_scarce(&self, state: &State) {
        let scarce = state.held * self.segment_bytes * 2 >= self.quota_bytes;
        self.scarce.store(scarce, Ordering::Relaxed);
    }

    fn place(&self, p: Pooled, to: &PathBuf, kind: Kind) -> Result<Segment, SpoolError> {
        let p = match kind {
            Kind::Incoming => Ok(p),
            Kind::Source | Kind::Local => self.touched(p),
        };
        let Pooled { mut seg, path } = p.map_err(SpoolError::io(to))?;
        seg.reset();
        match std::fs::rename(&path, to) {
            Ok(()) => Ok(seg),
            Err(e) => {
                let _ = std::fs::remove_file(&path);
                Err(SpoolError::io(to)(e))
            }
        }
    }

    /// Takes back the segments of a removed queue, whose directory is this one now.
    pub(super) fn give_back(&self, queue: &Queue, dir: &Path) {
        let segments = queue.take_segments();
        let mut state = lock(&self.state);
        for seg in segments {
            let from = dir.join(segment_name(seg.number()));
            let to = self.pool_path(&mut state);
            // If it can't be moved it goes with its directory, and only its memory is used again.
            let _ = std::fs::rename(&from, &to);
            state.waiting.push((seg, to));
        }
        drop(state);
        self.wake();
    }

    /// Segments that nobody looks at any more go to the pool. In order: each holds the next one.
    fn collect(&self, state: &mut State) {
        let keep = self.stale_goal();
        for (seg, path) in std::mem::take(&mut state.waiting) {
            if Arc::strong_count(&seg) > 1 {
                state.waiting.push((seg, path));
                continue;
            }
            match Arc::into_inner(seg) {
                Some(mut seg)
                    if state.stale.len() < keep && seg.len() as u64 == self.segment_bytes =>
                {
                    seg.unlink();
                    state.held -= 1;
                    state.stale.push(Pooled { seg, path });
                }
                _ => {
                    state.held -= 1;
                    state.total -= 1;
                    let _ = std::fs::remove_file(&path);
                }
            }
        }
    }

    pub(super) fn wake(&self) {
        if let Some(t) = self.thread.get() {
            t.unpark();
        }
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
        self.syncer.ask();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The thread's loop.
    pub(super) fn run(&self) {
        let _ = self.thread.set(thread::current());
        while !self.is_stopped() {
            let (mut is_short, mut has_failed, mut short) = (false, false, BTreeMap::new());
            let wanted: Vec<Arc<Queue>> = {
                let mut state = lock(&self.state);
                self.collect(&mut state);
                self.set_scarce(&state);
                let all = || state.queues.values().flatten();
                for q in all() {
                    if let Some(e) = q.frames().and_then(|f| f.trouble(q.hold())) {
                        is_short = true;
                        short.insert(q.hold(), e.to_string());
                    }
                }
                all().filter(|q| q.wanted()).cloned().collect()
            };
            // One that can't get on is no reason for the others to wait.
            for q in wanted {
                while q.wanted() {
                    if let Err(e) = self.provide(&q) {
                        is_short = true;
                        has_failed |= matches!(e, SpoolError::Io { .. });
                        // With a segment ahead it still has room.
                        if q.is_in_last() {
                            short.insert(q.hold(), e.to_string());
                        }
                        break;
                    }
                }
            }
            self.trouble(short);
            // A hold at its own bound is no reason for the others to have nothing ready; a disk that is full is one.
            if !has_failed && self.refill() {
                continue;
            }
            let waiting = !lock(&self.state).waiting.is_empty();
            if is_short || waiting {
                thread::park_timeout(RETRY);
            } else {
                thread::park();
            }
        }
    }

    /// One more segment for a queue.
    pub(super) fn provide(&self, q: &Queue) -> Result<(), SpoolError> {
        if q.kind() == Kind::Local && !self.spare_for_local() {
            return Err(self.used_up());
        }
        self.allows(q.hold(), q.kind())?;
        let number = q.next_number();
        let beyond = self.is_exempt(q.hold(), q.kind());
        let seg = match self.take(q.dir(), number, q.kind(), beyond) {
            // Its directory is gone, or going.
            Err(_) if q.is_removed() => return Ok(()),
            r => r?,
        };
        if q.push_segment(seg).is_err() {
            let _ = std::fs::remove_file(q.dir().join(segment_name(number)));
            let mut state = lock(&self.state);
            state.held -= 1;
            state.total -= 1;
        }
        Ok(())
    }

    /// Makes one more segment ready; false if there is nothing to do or no way to do it.
    fn refill(&self) -> bool {
        let mut state = lock(&self.state);
        if state.ready.len() >= self.ready_goal() || !self.disk_has_plenty() {
            return false;
        }
        let made = if let Some(p) = state.stale.pop() {
            drop(state);
            self.touched(p)
        } else if (state.total + 1) * self.segment_bytes <= self.quota_bytes {
            state.total += 1;
            let path = self.pool_path(&mut state);
            drop(state);
            let made = Segment::create(&path, self.segment_bytes);
            made.and_then(|seg| self.touched(Pooled { seg, path }))
        } else {
            return false;
        };
        let mut state = lock(&self.state);
        match made {
            Ok(p) => {
                state.ready.push(p);
                true
            }
            // Whoever needs a segment will see the error.
            Err(_) => {
                state.total -= 1;
                false
            }
        }
    }

    /// Room for several times what is kept ready: the last of a disk is for those who need it now.
    fn disk_has_plenty(&self) -> bool {
        let wanted = 4 * self.ready_goal() as u64 * self.segment_bytes;
        rustix::fs::statvfs(&self.dir)
            .is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) >= wanted)
    }

    fn trouble(&self, now: BTreeMap<HoldId, String>) {
        let mut state = lock(&self.state);
        for (hold, why) in &now {
            if !state.trouble.contains_key(hold) {
                tracing::warn!(%hold, "held senders wait, the spool gets no room: {why}");
            }
        }
        for hold in state.trouble.keys().filter(|h| !now.contains_key(h)) {
            tracing::info!(%hold, "the spool has room again");
        }
        state.trouble = now;
    }

    /// Why a hold, or one of them, gets no more room.
    pub(super) fn trouble_of(&self, hold: Option<HoldId>) -> Option<String> {
        let state = lock(&self.state);
        match hold {
            Some(hold) => state.trouble.get(&hold).cloned(),
            None => state.trouble.values().next().cloned(),
        }
    }

    /// One more segment stays within what the hold may have.
    pub(super) fn allows(&self, hold: HoldId, kind: Kind) -> Result<(), SpoolError> {
        let Some(hold_bytes) = self.limits.hold_bytes else {
            return Ok(());
        };
        if self.is_exempt(hold, kind) {
            return Ok(());
        }
        let state = lock(&self.state);
        let queues = state.queues.get(&hold).map_or(&[][..], Vec::as_slice);
        let segments: u64 = queues.iter().map(|q| u64::from(q.next_number())).sum();
        let used_bytes = segments * self.segment_bytes;
        // As of the whole: see [`Host::spare_for_local`].
        let limit = match kind {
            Kind::Local => hold_bytes / 4 * 3,
            Kind::Source | Kind::Incoming => hold_bytes,
        };
        if used_bytes + self.segment_bytes <= limit {
            return Ok(());
        }
        Err(SpoolError::HoldQuota {
            hold,
            hold_bytes,
            used_bytes,
        })
    }
}

/// File name of a queue's segment.
pub(super) fn segment_name(number: u32) -> String {
    format!("{number:06}.seg")
}

/// The inverse of [`segment_name`].
pub(super) fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".seg")?;
    let number = digits.parse().ok()?;
    (segment_name(number) == name).then_some(number)
}
