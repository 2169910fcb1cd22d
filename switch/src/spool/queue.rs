//! What writer, readers and keeper share of a queue.
//!
//! Invariant: nothing here is touched per frame; per burst it is a handful of stores.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use gangway_shared::api::Tally;
use gangway_shared::config::valid::{SpoolLimits, Sync as SyncPolicy};
use gangway_shared::id::{HoldId, LaneKey};
use tokio::sync::Notify;

use super::frames::Frames;
use super::keeper::Host;
use super::map::{PAGE, Segment};
use super::reader::Reader;
use super::words::{Word, Words};
use super::{Kind, SpoolError};

/// In [`Word::Flags`].
pub(super) const FLAG_INSIDE: u64 = 1;
/// The greatest value of [`Word::Flags`].
pub(super) const FLAGS_MAX: u64 = 15;

/// Segments ahead of a fast writer, at most.
const AHEAD_MAX: u32 = 8;
/// The same of one that writes what is shipped.
const INCOMING_AHEAD_MAX: u32 = 2;

/// One lane of one hold, shared between its writer, its readers and control.
#[derive(Debug)]
pub struct Queue {
    hold: HoldId,
    kind: Kind,
    lane: LaneKey,
    index: u32,
    salt: u32,
    dir: PathBuf,
    policy: SyncPolicy,
    limits: SpoolLimits,
    host: Weak<Host>,
    words: Words,
    /// What its words say.
    flushed: AtomicU64,
    flags: AtomicU64,
    /// All of them in order; pushed by the keeper.
    segments: Mutex<Vec<Arc<Segment>>>,
    sync: Mutex<SyncState>,
    dir_dirty: AtomicBool,
    /// The last committed sequence number.
    last: AtomicU64,
    /// Records up to this one are on the disk.
    durable: AtomicU64,
    /// The same as a place in the queue (see [`Queue::place`]); may be further.
    synced: AtomicU64,
    tally: TallyCell,
    sealed: AtomicBool,
    removed: AtomicBool,
    /// The writer wants more segments.
    wanted: AtomicBool,
    /// The spool's: the quota is half used, so nobody gets more ahead than needed.
    scarce: Arc<AtomicBool>,
    /// None: no quota of frames.
    frames: Option<Frames>,
    /// The number behind the last one's, and that of the one that is being written.
    allotted: AtomicU32,
    writing: AtomicU32,
    failed: OnceLock<String>,
    waiting: AtomicU32,
    notify: Notify,
    sealed_notify: Notify,
    /// A disk that is slow while a test has this, and fails while it is true.
    #[cfg(test)]
    pub(crate) disk: Mutex<bool>,
}

#[derive(Debug, Default)]
struct SyncState {
    /// Segments before this one are complete and synced.
    done: usize,
    /// The directories above are on the disk.
    parents_done: bool,
    /// The page that was being written at the last tick: number of the segment, offset.
    tail: Option<(u32, u32)>,
}

/// How much of a queue is forced to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Everything committed.
    All,
    /// Whole pages, and the last one if it was the last one before: a page that is forced faults when it is written again,
    /// and the writer of a busy lane shall not meet that.
    Pages,
}

/// What makes a queue, for [`Queue::new`].
pub(super) struct Parts {
    pub(super) hold: HoldId,
    pub(super) kind: Kind,
    pub(super) lane: LaneKey,
    pub(super) index: u32,
    pub(super) dir: PathBuf,
    pub(super) policy: SyncPolicy,
    pub(super) limits: SpoolLimits,
    pub(super) host: Weak<Host>,
    pub(super) scarce: Arc<AtomicBool>,
    pub(super) frames: Option<Frames>,
    pub(super) words: Words,
    /// At least one, linked.
    pub(super) segments: Vec<Arc<Segment>>,
}

impl Queue {
    pub(super) fn new(p: Parts) -> Queue {
        let number = p.segments.last().map_or(0, |s| s.number() + 1);
        Queue {
            salt: super::format::salt(p.hold, &p.lane),
            hold: p.hold,
            kind: p.kind,
            lane: p.lane,
            index: p.index,
            dir: p.dir,
            policy: match (p.policy, p.kind) {
                // Its sender is a switch, which keeps everything until it is told that it is on the disk.
                (SyncPolicy::Each, Kind::Incoming) => SyncPolicy::Batch,
                (policy, _) => policy,
            },
            limits: p.limits,
            host: p.host,
            scarce: p.scarce,
            frames: p.frames,
            words: p.words,
            flushed: AtomicU64::new(0),
            flags: AtomicU64::new(0),
            allotted: AtomicU32::new(number),
            writing: AtomicU32::new(number.saturating_sub(1)),
            segments: Mutex::new(p.segments),
            sync: Mutex::default(),
            dir_dirty: AtomicBool::new(true),
            last: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            tally: TallyCell::default(),
            sealed: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            failed: OnceLock::new(),
            waiting: AtomicU32::new(0),
            notify: Notify::new(),
            sealed_notify: Notify::new(),
            #[cfg(test)]
            disk: Mutex::default(),
        }
    }

    /// Of this hold.
    pub fn hold(&self) -> HoldId {
        self.hold
    }

    /// What it is for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Of this lane.
    pub fn lane(&self) -> &LaneKey {
        &self.lane
    }

    /// What is committed.
    pub fn tally(&self) -> Tally {
        self.tally.load().1
    }

    /// The sequence number of the last committed record, and the tally up to it, of the same moment.
    pub fn progress(&self) -> (u64, Tally) {
        self.tally.load()
    }

    /// The sequence number of the last committed record; 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// No record will follow behind what is committed.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Its hold was removed from the spool.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// The I/O error that stopped it, if any.
    pub fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// A new cursor at the first record. Of a removed queue: at its end.
    pub fn reader(self: &Arc<Self>) -> Reader {
        Reader::new(self.clone(), lock(&self.segments).first().cloned())
    }

    /// Persistent note for the owner: the lane is between two VMs of the group. Survives a restart.
    pub fn set_inside(&self, inside: bool) {
        let lost = self.flags.load(Ordering::Relaxed) & !FLAG_INSIDE;
        self.set_flags(if inside { lost | FLAG_INSIDE } else { lost });
    }

    fn set_flags(&self, flags: u64) {
        self.flags.store(flags, Ordering::Relaxed);
        self.words.put(Word::Flags, flags);
    }

    /// See [`Queue::set_inside`].
    pub fn inside(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & FLAG_INSIDE != 0
    }

    /// Persistent note of whoever delivers: everything up to `seq` has been delivered. Two stores, no system call.
    /// After a crash start with [`Reader::skip_to`] of [`Queue::flushed_seq`].
    pub fn set_flushed(&self, seq: u64) {
        self.flushed.store(seq, Ordering::Release);
        self.words.put(Word::Flushed, seq);
    }

    /// See [`Queue::set_flushed`].
    pub fn flushed_seq(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// Forces everything committed to the disk, by policy: nothing to do with `none`. Blocks. The first call also makes
    /// the queue's own files durable: call it once when the queue is made, so that a freeze does not pay for that. After
    /// a failure the queue is stopped and every further call fails.
    pub fn sync(&self) -> Result<(), SpoolError> {
        if self.policy == SyncPolicy::None {
            return Ok(());
        }
        self.sync_now(Reach::All)
    }

    /// Its words and the directories above were synced.
    #[cfg(test)]
    pub(crate) fn is_founded(&self) -> bool {
        let state = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        state.parents_done
    }

    pub(super) fn sync_now(&self, reach: Reach) -> Result<(), SpoolError> {
        let mut state = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = self.failed.get() {
            return Err(SpoolError::Stopped(why.clone()));
        }
        if self.is_removed() {
            return Ok(());
        }
        // What is committed is published: all of it is below the ends that are taken now.
        let seq = self.last_seq();
        let segments: Vec<Arc<Segment>> = {
            let all = lock(&self.segments);
            all.get(state.done..).unwrap_or_default().to_vec()
        };
        let done = segments
            .iter()
            .take_while(|s| s.next().is_some_and(|n| n.published() > 0))
            .count();
        match self.force(&mut state, &segments, reach) {
            Ok(whole) => {
                state.done += done;
                state.parents_done = true;
                if whole {
                    self.durable.fetch_max(seq, Ordering::AcqRel);
                }
                Ok(())
            }
            Err(e) => {
                let why = format!("{}: {e}", self.dir.display());
                tracing::error!(lane = %self.lane, hold = %self.hold, "sync of the spool failed: {why}");
                self.fail(why.clone());
                Err(SpoolError::Stopped(why))
            }
        }
    }

    /// True if nothing was left out.
    fn force(
        &self,
        state: &mut SyncState,
        segments: &[Arc<Segment>],
        reach: Reach,
    ) -> io::Result<bool> {
        #[cfg(test)]
        if *lock(&self.disk) {
            return Err(io::Error::other("a test's disk"));
        }
        let mut whole = true;
        let ends: Vec<u32> = segments.iter().map(|s| s.published()).collect();
        let last = ends.iter().rposition(|end| *end > 0);
        for (n, (s, end)) in segments.iter().zip(&ends).enumerate() {
            let mut to = *end;
            let tail = Some((s.number(), to - to % PAGE as u32));
            if reach == Reach::Pages && Some(n) == last && state.tail != tail {
                to -= to % PAGE as u32;
                whole = to == *end;
                state.tail = tail;
            }
            s.sync(to)?;
            if Some(n) == last {
                self.synced.store(self.place(s, to), Ordering::Release);
            }
        }
        if self.dir_dirty.swap(false, Ordering::AcqRel) {
            std::fs::File::open(&self.dir)?.sync_all()?;
        }
        if !state.parents_done {
            self.words.sync()?;
            // The hold's directory, and the spool's.
            for dir in self.dir.ancestors().skip(1).take(2) {
                std::fs::File::open(dir)?.sync_all()?;
            }
        }
        Ok(whole)
    }

    /// Bytes from the queue's start to that place in a segment.
    pub(super) fn place(&self, segment: &Segment, at: u32) -> u64 {
        u64::from(segment.number()) * segment.len() as u64 + u64::from(at)
    }

    /// The disk is too far behind to take what ends there.
    pub(super) fn is_behind(&self, end: u64) -> bool {
        self.is_forced()
            && end.saturating_sub(self.synced.load(Ordering::Relaxed)) > self.limits.sync_bytes
    }

    /// By the syncer: not what another switch keeps until it has heard that it is safe.
    fn is_forced(&self) -> bool {
        self.policy != SyncPolicy::None && self.kind != Kind::Incoming
    }

    /// There is something for the syncer.
    pub(super) fn wants_sync(&self) -> bool {
        self.is_forced()
            && self.durable_seq() < self.last_seq()
            && !self.is_removed()
            && self.failed().is_none()
    }

    /// Records up to this one are on the disk.
    pub fn durable_seq(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// For the writer: frames may not go back to their sender before they are on the disk.
    pub(super) fn owes(&self) -> bool {
        self.policy == SyncPolicy::Each
    }

    pub(super) fn fail(&self, why: String) {
        let _ = self.failed.set(why);
    }

    /// Resolves when something behind `seq` is committed, or the queue is sealed or removed; at once if so already.
    pub async fn notified(&self, seq: u64) {
        self.wait(&self.notify, || {
            self.last_seq() > seq || self.is_sealed() || self.is_removed()
        })
        .await;
    }

    /// Resolves when the queue is sealed or removed.
    pub async fn sealed(&self) {
        self.wait(&self.sealed_notify, || {
            self.is_sealed() || self.is_removed()
        })
        .await;
    }

    async fn wait(&self, notify: &Notify, ready: impl Fn() -> bool) {
        if ready() {
            return;
        }
        let _count = Waiting::new(&self.waiting);
        loop {
            let notified = notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            // Pairs with the fence in `wake`: either the writer sees us waiting or we see what it committed.
            fence(Ordering::SeqCst);
            if ready() {
                return;
            }
            notified.await;
        }
    }

    fn wake(&self, sealed: bool) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) != 0 {
            self.notify.notify_waiters();
            if sealed {
                self.sealed_notify.notify_waiters();
            }
        }
    }

    /// For recovery, before anybody else has it. Each word is whole again; `flags` go first, for they say which were lost.
    pub(super) fn set_recovered(
        &self,
        seq: u64,
        tally: &Tally,
        sealed: bool,
        flushed: u64,
        flags: u64,
    ) {
        if let Some(f) = &self.frames {
            f.add(seq, || false);
        }
        self.set_flags(flags);
        self.set_flushed(flushed);
        self.tally.store(seq, tally);
        self.words.put(Word::Committed, seq);
        self.last.store(seq, Ordering::Release);
        self.sealed.store(sealed, Ordering::Release);
    }

    /// For the writer, after it has published its segments.
    pub(super) fn committed(&self, seq: u64, tally: &Tally, sealed: bool) {
        if let Some(f) = &self.frames {
            let new = seq - self.last.load(Ordering::Relaxed);
            f.add(new, || self.removed.load(Ordering::SeqCst));
        }
        self.tally.store(seq, tally);
        self.words.put(Word::Committed, seq);
        self.last.store(seq, Ordering::Release);
        if sealed {
            self.sealed.store(true, Ordering::Release);
        }
        if self.policy == SyncPolicy::Each
            && let Some(h) = self.host.upgrade()
        {
            h.syncer.ask();
        }
        self.wake(sealed);
    }

    pub(super) fn set_removed(&self) {
        self.removed.store(true, Ordering::SeqCst);
        if let Some(f) = &self.frames {
            f.give_back();
        }
        self.wake(true);
    }

    /// For the writer: it has gone on to the next segment.
    pub(super) fn set_writing(&self, number: u32) {
        self.writing.store(number, Ordering::Relaxed);
    }

    /// For the writer: the quota of frames allows no more. The keeper says so.
    pub(super) fn has_all_frames(&self) -> bool {
        let Some(f) = self.frames.as_ref().filter(|f| f.is_full()) else {
            return false;
        };
        if f.want()
            && let Some(h) = self.host.upgrade()
        {
            h.wake();
        }
        true
    }

    pub(super) fn frames(&self) -> Option<&Frames> {
        self.frames.as_ref()
    }

    /// Fewer segments lie ready ahead of the writer than its pace asks for: one for a lane that is in its
    /// first segment, more for one that has filled several, so that a keeper that is late does not stop it.
    pub(super) fn lacks_segments(&self) -> bool {
        let number = self.writing.load(Ordering::Relaxed);
        let ahead = self
            .allotted
            .load(Ordering::Relaxed)
            .saturating_sub(number + 1);
        let goal = if self.scarce.load(Ordering::Relaxed) {
            1
        } else {
            (1 + number / 2).min(match self.kind {
                // As fast as a link, and nothing stops while it waits.
                Kind::Incoming => INCOMING_AHEAD_MAX,
                Kind::Source | Kind::Local => AHEAD_MAX,
            })
        };
        ahead < goal
    }

    /// Its writer has no segment ahead.
    pub(super) fn is_in_last(&self) -> bool {
        self.allotted.load(Ordering::Relaxed) <= self.writing.load(Ordering::Relaxed) + 1
    }

    /// For the writer: asks the keeper for segments, once.
    pub(super) fn want_segment(&self) {
        if !self.wanted.load(Ordering::Relaxed)
            && !self.wanted.swap(true, Ordering::AcqRel)
            && let Some(h) = self.host.upgrade()
        {
            h.wake();
        }
    }

    pub(super) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire) && !self.is_removed()
    }

    /// For the keeper: links a fresh segment behind the last one. False, and the segment back, if the queue was removed
    /// meanwhile.
    pub(super) fn push_segment(&self, seg: Segment) -> Result<(), Segment> {
        let mut all = lock(&self.segments);
        let Some(last) = all.last() else {
            return Err(seg);
        };
        let seg = Arc::new(seg);
        self.dir_dirty.store(true, Ordering::Release);
        self.allotted.fetch_add(1, Ordering::Relaxed);
        // Before the link, which the writer sees: so its next request is not lost.
        if !self.lacks_segments() {
            self.wanted.store(false, Ordering::Release);
        }
        last.set_next(seg.clone());
        all.push(seg);
        Ok(())
    }

    /// Which number the next segment gets.
    pub(super) fn next_number(&self) -> u32 {
        self.allotted.load(Ordering::Relaxed)
    }

    /// For tests that take the power away: number of each segment, and how far it is on the disk.
    #[cfg(test)]
    pub(super) fn on_disk(&self) -> Vec<(u32, u32)> {
        let all = lock(&self.segments);
        all.iter().map(|s| (s.number(), s.synced())).collect()
    }

    /// How many segments there are.
    #[cfg(test)]
    pub(super) fn segment_count(&self) -> usize {
        lock(&self.segments).len()
    }

    /// For removal: gives up the list.
    pub(super) fn take_segments(&self) -> Vec<Arc<Segment>> {
        std::mem::take(&mut lock(&self.segments))
    }

    pub(super) fn salt(&self) -> u32 {
        self.salt
    }

    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Syncs several queues at once: file systems merge what comes together. Blocks.
pub fn sync_all(queues: &[Arc<Queue>]) -> Result<(), SpoolError> {
    at_once(queues, &|q| q.sync())
}

/// Does it for several queues, by a few threads.
pub(super) fn at_once(
    queues: &[Arc<Queue>],
    what: &(impl Fn(&Queue) -> Result<(), SpoolError> + std::marker::Sync),
) -> Result<(), SpoolError> {
    const THREADS: usize = 8;
    if let [q] = queues {
        return what(q);
    }
    let each = queues.len().div_ceil(THREADS).max(1);
    std::thread::scope(|scope| {
        let parts = queues.chunks(each);
        let work: Vec<_> = parts
            .map(|p| scope.spawn(|| p.iter().try_for_each(|q| what(q))))
            .collect();
        work.into_iter().try_for_each(|w| {
            let panicked = |_| Err(SpoolError::Stopped("a thread panicked".into()));
            w.join().unwrap_or_else(panicked)
        })
    })
}

/// Locks; a panic elsewhere while it was held leaves the plain data in it usable.
pub(super) fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts somebody who waits, also when the future is dropped.
struct Waiting<'a>(&'a AtomicU32);

impl<'a> Waiting<'a> {
    fn new(n: &'a AtomicU32) -> Self {
        n.fetch_add(1, Ordering::SeqCst);
        Waiting(n)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A sequence number and its tally, written by one thread and read whole by others (a sequence lock).
#[derive(Debug, Default)]
struct TallyCell {
    version: AtomicU64,
    words: [AtomicU64; 4],
}

impl TallyCell {
    fn store(&self, seq: u64, t: &Tally) {
        let v = self.version.load(Ordering::Relaxed);
        self.version.store(v + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (w, x) in self.words.iter().zip([seq, t.frames, t.bytes, t.digest]) {
            w.store(x, Ordering::Relaxed);
        }
        self.version.store(v + 2, Ordering::Release);
    }

    fn load(&self) -> (u64, Tally) {
        loop {
            let v = self.version.load(Ordering::Acquire);
            let [seq, frames, bytes, digest] =
                [0, 1, 2, 3].map(|i| self.words[i].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if v.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == v {
                let t = Tally {
                    frames,
                    bytes,
                    digest,
                };
                return (seq, t);
            }
            std::hint::spin_loop();
        }
    }
}
