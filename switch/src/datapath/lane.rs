//! A lane: what one worker receives at one port for one destination port, with its gate.
//!
//! ```text
//!             receiver full             Hold                     Drain (abort, commit)
//!   Forward <===============> Forward ----------> Hold(spool) ------------------------> Drain
//!      ^      (backlog)                             |                                     |
//!      |                                            | Close                               | everything older is
//!      |                                            v                                     | delivered
//!      |                                  Blocked | Closed                                v
//!      +------------------------------------------------------------------------------ Forward
//! ```
//! * Forward: straight to the receiver; behind a non-empty backlog, to its end.
//! * Hold: into the lane's spool queue. The backlog went there first, so order stays.
//! * Drain: what is older (on the target: what was shipped), then what was queued here, goes to the receiver as it takes
//!   it; newer frames line up behind. When all is delivered the lane forwards again. After an abort a held lane drains
//!   its own queue, which it goes on to fill: putting back needs no room that is not there already.
//! * Blocked: nothing is accepted; frames stay with their sender. Closed: frames are counted and dropped.
//!
//! Invariant: a frame is accepted by exactly one place, and places are emptied in the order in which they were filled.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use gangway_shared::api::Tally;
use gangway_shared::ledger::Account;

use super::backlog::Backlog;
use super::reading::Reading;
use super::shelf::Spot;
use super::stats::{DROP_NAMES, Drop, add};
use super::worker::now_ns;
use crate::port::{Frame, Sent};
use crate::spool::{Origin, Owed, Queue, Reader, Writer};

/// What a drain has delivered of one queue; written by the worker, read by control.
#[derive(Debug, Default)]
pub struct Progress {
    frames: AtomicU64,
    bytes: AtomicU64,
    digest: AtomicU64,
    last_seq: AtomicU64,
    /// What the receiver took: first and last number, frames, bytes, roll.
    delivered: [AtomicU64; 5],
    lost: [Gap; GAPS],
    gaps: AtomicU64,
    /// Frames of gaps that found no place.
    lost_more: AtomicU64,
    finished: AtomicBool,
}

/// Ranges of frames that were not delivered of which a drain keeps account.
const GAPS: usize = 32;

/// Frames in a row that were not delivered, and the [`Drop`] that says why.
#[derive(Debug, Default)]
struct Gap {
    first_seq: AtomicU64,
    last_seq: AtomicU64,
    why: AtomicU64,
}

impl Progress {
    /// Read from the queue, and up to which record.
    pub fn flushed(&self) -> Account {
        Account::batches(self.last_seq.load(Ordering::Acquire), &self.tally())
    }

    /// Taken by the receiver.
    pub fn delivered(&self) -> Account {
        let [first_seq, last_seq, frames, bytes, roll] =
            [0, 1, 2, 3, 4].map(|i| self.delivered[i].load(Ordering::Acquire));
        Account {
            first_seq,
            last_seq,
            frames,
            bytes,
            digest: None,
            roll: Some(roll),
        }
    }

    /// What was not delivered: first and last number, why; and the number of frames beyond these.
    pub fn lost(&self) -> (Vec<(u64, u64, &'static str)>, u64) {
        let n = self.gaps.load(Ordering::Acquire) as usize;
        let gap = |g: &Gap| {
            let why = g.why.load(Ordering::Relaxed) as usize;
            let get = |a: &AtomicU64| a.load(Ordering::Acquire);
            let name = DROP_NAMES.get(why).copied().unwrap_or_default();
            (get(&g.first_seq), get(&g.last_seq), name)
        };
        let known = self.lost.iter().take(n).map(gap).collect();
        (known, self.lost_more.load(Ordering::Acquire))
    }

    fn lose(&self, first_seq: u64, last_seq: u64, why: Drop) {
        let n = self.gaps.load(Ordering::Relaxed) as usize;
        if let Some(g) = n.checked_sub(1).and_then(|n| self.lost.get(n))
            && g.last_seq.load(Ordering::Relaxed) + 1 == first_seq
            && g.why.load(Ordering::Relaxed) == why as u64
        {
            g.last_seq.store(last_seq, Ordering::Release);
        } else if let Some(g) = self.lost.get(n) {
            g.first_seq.store(first_seq, Ordering::Relaxed);
            g.last_seq.store(last_seq, Ordering::Relaxed);
            g.why.store(why as u64, Ordering::Relaxed);
            self.gaps.store(n as u64 + 1, Ordering::Release);
        } else {
            add(&self.lost_more, last_seq - first_seq + 1);
        }
    }

    fn took(&self, got: &Account) {
        let Some(roll) = got.roll else { return };
        let [first, last, frames, bytes, sum] = &self.delivered;
        if frames.load(Ordering::Relaxed) == 0 {
            first.store(got.first_seq, Ordering::Release);
        }
        last.store(got.last_seq, Ordering::Release);
        add(bytes, got.bytes);
        add(sum, roll);
        add(frames, got.frames);
    }

    /// What was delivered so far.
    pub fn tally(&self) -> Tally {
        let get = |a: &AtomicU64| a.load(Ordering::Acquire);
        Tally {
            frames: get(&self.frames),
            bytes: get(&self.bytes),
            digest: get(&self.digest),
        }
    }

    /// The queue was sealed and is delivered to the end.
    pub fn finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    fn set(&self, last_seq: u64, t: Tally) {
        self.last_seq.store(last_seq, Ordering::Release);
        self.digest.store(t.digest, Ordering::Release);
        self.bytes.store(t.bytes, Ordering::Release);
        self.frames.store(t.frames, Ordering::Release);
    }
}

/// A queue to deliver, and where to note how far.
pub struct Source {
    /// The cursor.
    pub reader: Reader,
    /// For control.
    pub progress: Arc<Progress>,
}

impl Source {
    /// From behind what an earlier run of the switch has delivered, which counts as delivered here.
    pub fn new(queue: &Arc<Queue>, progress: Arc<Progress>) -> Source {
        let mut reader = queue.reader();
        let delivered = queue.flushed_seq();
        let mut got = Account::default();
        while reader.next_seq() <= delivered {
            match reader.peek() {
                Ok(None) => break,
                Ok(Some(r)) => got.frame(r.seq, r.frame.len() as u32),
                Err(d) => progress.lose(d.first_seq, d.last_seq, Drop::Corrupt),
            }
            reader.advance();
        }
        if reader.next_seq() > 1 {
            progress.took(&got);
            progress.set(reader.next_seq() - 1, reader.tally());
        }
        Source { reader, progress }
    }

    fn note(&self) {
        let (queue, seq) = (self.reader.queue(), self.reader.next_seq() - 1);
        if seq > queue.flushed_seq() {
            queue.set_flushed(seq);
        }
    }
}

/// Queues that are delivered side by side: none knows of the others' order.
#[derive(Default)]
pub struct Stage {
    /// The queues.
    pub sources: Vec<Source>,
    /// Where what follows may take other queues of the receiver: the stage ends when it is there and has read these frames, or
    /// was waited for ([`Reading`]).
    pub reading: Option<Reading>,
    /// Set when all are delivered to the end and the stage has ended.
    pub done: Option<Arc<AtomicBool>>,
}

/// See [`Gate::Drain`].
pub struct Drain {
    /// Another lane's `done` that must be set before anything goes.
    pub before: Option<Arc<AtomicBool>>,
    /// Older than everything local, one stage after the other.
    pub older: VecDeque<Stage>,
    /// Another lane's `done` that must be set before anything local goes.
    pub wait: Option<Arc<AtomicBool>>,
    /// Where frames that come meanwhile wait; without one they stay with their sender.
    pub behind: Option<Behind>,
    /// Delivered to the end, and not yet noted.
    pub ended: Vec<Source>,
}

/// A queue that is filled at one end while it is delivered at the other.
pub struct Behind {
    /// What comes.
    pub writer: Writer,
    /// Its delivery.
    pub local: Source,
}

/// See the module.
pub enum Gate {
    /// Straight to the receiver.
    Forward,
    /// Into the spool.
    Hold(Writer),
    /// Out of the spool, newer frames in behind.
    Drain(Box<Drain>),
    /// Nothing is accepted.
    Blocked,
    /// Everything is dropped and counted.
    Closed(Drop),
}

/// Hands a frame to the receiving port.
pub type Send<'a> = dyn FnMut(&Frame<'_>) -> Sent + 'a;

/// Where a lane delivers to.
pub trait Sink {
    /// One frame.
    fn send(&mut self, frame: &Frame<'_>) -> Sent;

    /// As many of them as simply go, in order. What becomes of the next one [`Sink::send`] tells.
    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize;

    /// Whether the receiver is there, and has read what it was sent until this was first asked, which `reading` remembers.
    fn caught_up(&mut self, reading: &mut Reading) -> bool {
        let _ = reading;
        true
    }
}

impl<F: FnMut(&Frame<'_>) -> Sent> Sink for F {
    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        self(frame)
    }

    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize {
        frames.iter().take_while(|f| self(f) == Sent::Yes).count()
    }
}

/// What [`Lane::step`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing is left; the lane forwards.
    Idle,
    /// The budget is used up or the receiver is full; come again.
    More,
}

/// See the module.
pub struct Lane {
    gate: Gate,
    backlog: Backlog,
    /// Of a drain that is over, what is not yet noted.
    ended: Vec<Source>,
}

impl Default for Lane {
    fn default() -> Lane {
        Lane {
            gate: Gate::Forward,
            backlog: Backlog::default(),
            ended: Vec::new(),
        }
    }
}

impl Lane {
    /// It forwards, and its backlog will be there.
    pub fn at(spot: Spot) -> Lane {
        Lane {
            backlog: Backlog::at(spot),
            ..Lane::default()
        }
    }

    /// What an earlier run of the switch had taken and not delivered. It forwarded then: all of it is newer than what is being put
    /// back or was shipped, and older than what comes.
    pub fn take_up(&mut self, backlog: Backlog, now_ns: u64) {
        self.backlog.take_up(backlog);
        self.spool_left(now_ns);
    }

    /// Of a lane that spools: what an earlier run has left goes into the spool, as far as there is room. Nothing newer is taken before.
    fn spool_left(&mut self, now_ns: u64) {
        let writer = match &mut self.gate {
            Gate::Hold(w) => w,
            Gate::Drain(d) => match &mut d.behind {
                Some(b) => &mut b.writer,
                None => return,
            },
            _ => return,
        };
        while !self.backlog.is_empty() && spool(&mut self.backlog, writer, now_ns) == 0 {}
        writer.commit();
    }

    /// It forwards, and nothing waits: a frame may go straight to the receiver.
    #[inline]
    pub fn is_plain(&self) -> bool {
        matches!(self.gate, Gate::Forward) && self.backlog.is_empty()
    }

    /// See [`Backlog::trim`].
    pub fn trim(&mut self) -> bool {
        self.backlog.trim()
    }

    /// Frames wait in memory, and not in a spool.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// True if what comes goes into a spool queue.
    #[inline]
    pub fn spools(&self) -> bool {
        match &self.gate {
            Gate::Hold(_) => true,
            Gate::Drain(d) => d.behind.is_some(),
            _ => false,
        }
    }

    /// Takes frames that came together, behind `from`, into the spool queue, as many as it has room for; none without a queue.
    pub fn take_run(&mut self, frames: &[Frame<'_>], now_ns: u64, from: Origin) -> usize {
        if !self.backlog.is_empty() {
            return 0;
        }
        self.writer()
            .map_or(0, |w| w.append_run(now_ns, frames, from))
    }

    fn writer(&mut self) -> Option<&mut Writer> {
        match &mut self.gate {
            Gate::Hold(w) => Some(w),
            Gate::Drain(d) => d.behind.as_mut().map(|b| &mut b.writer),
            _ => None,
        }
    }

    /// False: the frame has to stay with its sender for now. A backlog that is full is a reason only if the receiver is
    /// `awaited`; otherwise the newest frame is dropped, as at any full queue.
    pub fn accepts(&self, len: u32, awaited: impl FnOnce() -> bool) -> bool {
        match &self.gate {
            Gate::Forward => self.backlog.is_empty() || self.backlog.has_room(len) || !awaited(),
            Gate::Closed(_) => true,
            Gate::Hold(w) => self.backlog.is_empty() && w.has_room(len),
            Gate::Drain(d) => {
                let behind = d.behind.as_ref();
                self.backlog.is_empty() && behind.is_some_and(|b| b.writer.has_room(len))
            }
            Gate::Blocked => false,
        }
    }

    /// Takes a frame that [`Lane::accepts`] has agreed to, and that came in at this queue, behind `from`. `Err` counts as dropped.
    pub fn take(
        &mut self,
        frame: &Frame<'_>,
        queue: u16,
        from: Origin,
        now_ns: impl FnOnce() -> u64,
        send: &mut Send<'_>,
    ) -> Result<(), Drop> {
        let writer = match &mut self.gate {
            Gate::Forward => {
                if self.backlog.is_empty() {
                    match send(frame) {
                        Sent::Yes => return Ok(()),
                        Sent::Never(r) => return Err(r.into()),
                        Sent::Down => return Err(Drop::Down),
                        Sent::Full => {}
                    }
                }
                return if self.backlog.push(frame, queue) {
                    Ok(())
                } else {
                    Err(Drop::Full)
                };
            }
            Gate::Closed(why) => return Err(*why),
            Gate::Blocked => return Err(Drop::Full),
            Gate::Hold(w) => w,
            Gate::Drain(d) => match &mut d.behind {
                Some(b) => &mut b.writer,
                None => return Err(Drop::Full),
            },
        };
        // Agreed to: others may have used up a quota since.
        match writer.append_accepted(now_ns(), std::slice::from_ref(frame), from) {
            0 => Err(Drop::Full),
            _ => Ok(()),
        }
    }

    /// Publishes what was taken into a spool. Once per burst, before the frames are released to their sender.
    pub fn commit(&mut self) {
        if let Some(w) = self.writer() {
            w.commit();
        }
    }

    /// What was taken and must be on the disk before it is released.
    pub fn owed(&mut self) -> Option<Owed> {
        self.writer().and_then(|w| w.owed())
    }

    /// True if [`Lane::step`] has something to do.
    pub fn pending(&self) -> bool {
        matches!(self.gate, Gate::Drain(_)) || !self.backlog.is_empty()
    }

    /// Delivers up to `budget` frames of what waits, oldest first. `count` is told what was dropped.
    pub fn step(&mut self, budget: usize, to: &mut dyn Sink, count: &mut dyn FnMut(Drop)) -> Step {
        let mut left = budget;
        if !self.backlog.is_empty() && self.spools() {
            self.spool_left(now_ns());
        }
        if let Gate::Drain(d) = &mut self.gate {
            match d.step(&mut left, to, count) {
                Step::More => return Step::More,
                Step::Idle => {
                    self.ended.append(&mut d.ended);
                    self.ended.extend(d.behind.take().map(|b| b.local));
                    self.gate = Gate::Forward;
                }
            }
        }
        if matches!(self.gate, Gate::Hold(_)) {
            return Step::More;
        }
        while let Some((f, _)) = self.backlog.front() {
            if left == 0 {
                return Step::More;
            }
            match to.send(&f) {
                Sent::Yes => {}
                Sent::Never(r) => count(r.into()),
                Sent::Down => count(Drop::Down),
                Sent::Full => return Step::More,
            }
            left -= 1;
            self.backlog.pop();
        }
        Step::Idle
    }

    /// Notes what of the spool is delivered. To be called when the receiver can see it: a crash must rather repeat a burst
    /// than lose it.
    pub fn note(&mut self) {
        self.backlog.note();
        if let Gate::Drain(d) = &mut self.gate {
            d.note();
        }
        for s in self.ended.drain(..) {
            s.note();
            s.progress.finished.store(true, Ordering::Release);
        }
    }

    /// Forward -> Hold. What waits in the backlog goes first. Returns the frames that found no room (zero if the queue has
    /// [`super::backlog::SPOOLED_MAX`] reserved). In any other state nothing changes and the writer comes back.
    pub fn hold(&mut self, mut writer: Writer, now_ns: u64) -> Result<u64, Writer> {
        if !matches!(self.gate, Gate::Forward) {
            return Err(writer);
        }
        let mut lost = 0;
        while !self.backlog.is_empty() {
            let no_room = spool(&mut self.backlog, &mut writer, now_ns);
            (0..no_room).for_each(|_| self.backlog.pop());
            lost += no_room as u64;
        }
        self.backlog.note();
        writer.commit();
        self.gate = Gate::Hold(writer);
        Ok(lost)
    }

    /// Any state -> Drain. A writer that is there is sealed: its queue must be the last of `older`.
    pub fn drain(&mut self, drain: Box<Drain>) {
        self.seal();
        self.gate = Gate::Drain(drain);
    }

    /// Hold -> Drain of its own queue, which takes what comes meanwhile. In any other state nothing changes: false.
    #[must_use]
    pub fn put_back(&mut self, before: Option<Arc<AtomicBool>>, progress: Arc<Progress>) -> bool {
        if !matches!(self.gate, Gate::Hold(_)) {
            return false;
        }
        if let Gate::Hold(writer) = std::mem::replace(&mut self.gate, Gate::Blocked) {
            let local = Source::new(writer.queue(), progress);
            self.gate = Gate::Drain(Box::new(Drain {
                before,
                older: VecDeque::new(),
                wait: None,
                behind: Some(Behind { writer, local }),
                ended: Vec::new(),
            }));
        }
        true
    }

    /// Hold -> Blocked or Closed: no record will follow on the held queue.
    pub fn close(&mut self, gate: Gate) {
        self.seal();
        self.gate = gate;
    }

    fn seal(&mut self) {
        if let Some(w) = self.writer() {
            w.seal();
        }
    }

    /// Back to plain forwarding from Blocked or Closed.
    pub fn open(&mut self) {
        if matches!(self.gate, Gate::Blocked | Gate::Closed(_)) {
            self.gate = Gate::Forward;
        }
    }
}

impl Drain {
    fn step(&mut self, left: &mut usize, to: &mut dyn Sink, count: &mut dyn FnMut(Drop)) -> Step {
        let closed =
            |f: &Option<Arc<AtomicBool>>| f.as_ref().is_some_and(|f| !f.load(Ordering::Acquire));
        if closed(&self.before) {
            return Step::More;
        }
        while let Some(stage) = self.older.front_mut() {
            let ended = stage
                .sources
                .extract_if(.., |s| s.step(left, to, count) && s.reader.finished());
            self.ended.extend(ended);
            if !stage.sources.is_empty() {
                return Step::More;
            }
            if stage.reading.as_mut().is_some_and(|r| !to.caught_up(r)) {
                return Step::More;
            }
            if let Some(d) = stage.done.take() {
                d.store(true, Ordering::Release);
            }
            self.older.pop_front();
        }
        if closed(&self.wait) {
            return Step::More;
        }
        if let Some(b) = &mut self.behind {
            b.writer.commit();
            if !b.local.step(left, to, count) {
                return Step::More;
            }
            b.writer.seal();
        }
        Step::Idle
    }

    fn note(&mut self) {
        if let Some(stage) = self.older.front() {
            stage.sources.iter().for_each(Source::note);
        }
        if let Some(b) = &self.behind {
            b.local.note();
        }
        for s in self.ended.drain(..) {
            s.note();
            s.progress.finished.store(true, Ordering::Release);
        }
    }
}

impl Source {
    /// True when everything committed was delivered.
    fn step(&mut self, left: &mut usize, to: &mut dyn Sink, count: &mut dyn FnMut(Drop)) -> bool {
        let before = *left;
        let mut got = Account::default();
        let passed = self.pass(left, to, count, &mut got);
        if *left < before {
            self.progress.took(&got);
            self.progress
                .set(self.reader.next_seq() - 1, self.reader.tally());
        }
        passed
    }

    fn pass(
        &mut self,
        left: &mut usize,
        to: &mut dyn Sink,
        count: &mut dyn FnMut(Drop),
        got: &mut Account,
    ) -> bool {
        while *left > 0 {
            let sent = self.reader.pass_run(*left, |run| {
                let sent = to.send_run(run.frames);
                for (f, seq) in run.frames.iter().take(sent).zip(run.first_seq..) {
                    got.frame(seq, f.len);
                }
                sent
            });
            if sent > 0 {
                *left -= sent;
                continue;
            }
            match self.reader.peek() {
                Ok(None) => return self.reader.at_end(),
                Err(d) => {
                    self.progress.lose(d.first_seq, d.last_seq, Drop::Corrupt);
                    count(Drop::Corrupt);
                }
                Ok(Some(r)) => match to.send(&Frame::from_slice(r.vnet, r.frame)) {
                    Sent::Yes => got.frame(r.seq, r.frame.len() as u32),
                    Sent::Never(why) => {
                        self.progress.lose(r.seq, r.seq, why.into());
                        count(why.into());
                    }
                    Sent::Full | Sent::Down => return false,
                },
            }
            *left -= 1;
            self.reader.advance();
        }
        false
    }
}

/// Moves the oldest frames, a burst of them at most. 1 if the next one finds no room. What is in a spool is there for a switch that
/// starts, committed or not, so it is passed at once: one that is killed here repeats at most this burst.
fn spool(backlog: &mut Backlog, writer: &mut Writer, now_ns: u64) -> usize {
    let run = backlog.oldest();
    let (done, all) = (
        writer.append_accepted(now_ns, &run, Origin::NONE),
        run.len(),
    );
    drop(run);
    (0..done).for_each(|_| backlog.pop());
    backlog.note();
    usize::from(done < all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::{FRAME_MAX, VnetHdr};
    use crate::spool::{Kind, Spool};
    use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync};
    use gangway_shared::id::{HoldId, LaneKey};
    use proptest::prelude::*;

    fn frame(n: u64, len: usize) -> Vec<u8> {
        let mut f = vec![(n % 251) as u8; len.max(22)];
        f[14..22].copy_from_slice(&n.to_be_bytes());
        f
    }

    fn number(f: &Frame<'_>) -> u64 {
        let mut b = vec![0; f.len as usize];
        f.copy_to(&mut b);
        u64::from_be_bytes(b[14..22].try_into().expect("eight bytes"))
    }

    #[derive(Debug, Clone)]
    enum Op {
        Frames(u8, u16),
        Room(u8),
        Hold,
        LetGo,
        Step,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (1u8..40, 22u16..3000).prop_map(|(n, l)| Op::Frames(n, l)),
            3 => any::<u8>().prop_map(Op::Room),
            1 => Just(Op::Hold),
            1 => Just(Op::LetGo),
            3 => Just(Op::Step),
        ]
    }

    /// Whatever the frames' lengths, and without a keeper that comes in time.
    #[test]
    fn a_full_backlog_finds_room_in_what_was_reserved_for_it() {
        for segment_bytes in [128 << 10, 1 << 20] {
            for len in [22, 60, 90, 1514, 9000, FRAME_MAX] {
                let dir = tempfile::tempdir().expect("a directory");
                let cfg = SpoolConfig {
                    dir: dir.path().join("spool"),
                    segment_bytes,
                    quota_bytes: 64 << 20,
                    sync: Sync::None,
                    limits: Default::default(),
                };
                let (spool, _) = Spool::open(&cfg).expect("a spool");
                let key: LaneKey = LaneKey {
                    from: "a".into(),
                    queue: 0,
                    to: "b".into(),
                };
                let (writer, queue) = spool
                    .create(HoldId(1), Kind::Source, &key)
                    .expect("a queue");
                spool
                    .reserve(&queue, crate::datapath::backlog::SPOOLED_MAX)
                    .expect("segments");
                let mut lane = Lane::default();
                let mut full = |_: &Frame<'_>| Sent::Full;
                let mut n = 0;
                loop {
                    let bytes = frame(n, len);
                    let f = Frame::from_slice(VnetHdr::default(), &bytes);
                    if !lane.accepts(f.len, || true) {
                        break;
                    }
                    assert_eq!(lane.take(&f, 0, Origin::NONE, || 1, &mut full), Ok(()));
                    n += 1;
                }
                // The keeper is gone: what was reserved is all there is.
                spool.stop_keeper();
                let lost = lane.hold(writer, 1).map_err(|_| "not forwarding");
                assert_eq!(
                    lost,
                    Ok(0),
                    "{n} frames of {len} bytes, segments of {segment_bytes}"
                );
                assert_eq!(queue.last_seq(), n);
            }
        }
    }

    /// What is damaged is passed, counted and named; what is behind it is delivered.
    #[test]
    fn a_drain_passes_what_is_damaged_and_says_so() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().expect("a directory");
        let cfg = SpoolConfig {
            dir: dir.path().join("spool"),
            segment_bytes: 128 << 10,
            quota_bytes: 64 << 20,
            sync: Sync::None,
            limits: SpoolLimits::default(),
        };
        let (spool, _) = Spool::open(&cfg).expect("a spool");
        let key = LaneKey {
            from: "a".into(),
            queue: 0,
            to: "b".into(),
        };
        let (mut writer, queue) = spool
            .create(HoldId(1), Kind::Source, &key)
            .expect("a queue");
        for first in [1, 11, 21] {
            let all: Vec<Vec<u8>> = (first..first + 10).map(|n| frame(n, 100)).collect();
            let frames: Vec<Frame<'_>> = all
                .iter()
                .map(|b| Frame::from_slice(VnetHdr::default(), b))
                .collect();
            assert_eq!(writer.append_run(1, &frames, Origin::NONE), 10);
        }
        writer.commit();
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(queue.dir().join("000000.seg"))
            .expect("a segment");
        // Header, a batch of 10 slots of 112 bytes behind its table, and 300 bytes of the next.
        let at = 256 + 48 + 48 + 10 * 112 + 300;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        file.write_all_at(&[byte[0] ^ 16], at).expect("a bit");

        let mut lane = Lane::default();
        assert!(lane.hold(writer, 1).is_ok_and(|lost| lost == 0));
        let progress: Arc<Progress> = Arc::default();
        assert!(lane.put_back(None, progress.clone()));
        let (mut out, mut dropped) = (Vec::new(), Vec::new());
        let mut send = |f: &Frame<'_>| {
            out.push(number(f));
            Sent::Yes
        };
        let end = lane.step(1000, &mut send, &mut |why| dropped.push(why));
        lane.note();
        assert_eq!(end, Step::Idle);
        assert_eq!(out, (1..=10).chain(21..=30).collect::<Vec<u64>>());
        assert_eq!(dropped, [Drop::Corrupt]);
        let (lost, more) = progress.lost();
        assert_eq!((lost, more), (vec![(11, 20, "spool_corrupt")], 0));
        assert!(progress.finished());
        assert_eq!((queue.flushed_seq(), progress.tally().frames), (30, 20));
        // An account of what an earlier run has delivered passes it, too.
        let again: Arc<Progress> = Arc::default();
        let source = Source::new(&queue, again.clone());
        assert_eq!(source.reader.next_seq(), 31);
        assert_eq!(again.lost().0, [(11, 20, "spool_corrupt")]);
        assert_eq!(again.tally().frames, 20);
    }

    #[test]
    fn a_full_backlog_stops_the_sender_if_the_receiver_is_awaited_and_drops_otherwise() {
        let mut lane = Lane::default();
        let bytes = frame(1, 1500);
        let f = Frame::from_slice(VnetHdr::default(), &bytes);
        let mut full = |_: &Frame<'_>| Sent::Full;
        let mut n = 0;
        while lane.accepts(f.len, || true) {
            assert_eq!(
                lane.take(&f, 0, Origin::NONE, || 1, &mut full),
                Ok(()),
                "what it accepts it keeps"
            );
            n += 1;
        }
        assert!(n > 500);
        assert!(lane.accepts(f.len, || false));
        assert_eq!(
            lane.take(&f, 0, Origin::NONE, || 1, &mut full),
            Err(Drop::Full)
        );
        let mut out = 0;
        let mut send = |_: &Frame<'_>| {
            out += 1;
            Sent::Yes
        };
        assert_eq!(lane.step(1000, &mut send, &mut |_| {}), Step::Idle);
        assert_eq!(out, n);
        assert!(lane.accepts(f.len, || true));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Whatever the receiver does and whenever control holds and lets go: what the lane accepted comes out once, in
        /// order; nothing comes out while it is held.
        #[test]
        fn keeps_every_frame_and_their_order_through_holds_and_full_receivers(ops in proptest::collection::vec(op(), 1..60)) {
            let dir = tempfile::tempdir().expect("a directory");
            let cfg = SpoolConfig { dir: dir.path().into(), segment_bytes: 1 << 20, quota_bytes: 256 << 20, sync: Sync::None, limits: SpoolLimits::default() };
            let (spool, _) = Spool::open(&cfg).expect("a spool");
            let key = LaneKey { from: "a".into(), queue: 0, to: "b".into() };
            let mut lane = Lane::default();
            let mut out: Vec<u64> = Vec::new();
            let mut room = 1000usize;
            let (mut next, mut accepted) = (0u64, Vec::new());
            let mut held: Option<Arc<crate::spool::Queue>> = None;
            let mut holds = 0;
            let mut dropped = 0;
            for op in ops {
                let before = out.len();
                let is_held = held.is_some();
                let mut send = |f: &Frame<'_>| {
                    if room == 0 { return Sent::Full; }
                    room -= 1;
                    out.push(number(f));
                    Sent::Yes
                };
                match op {
                    // In runs and one by one.
                    Op::Frames(n, len) if n % 2 == 0 && lane.spools() => {
                        let numbers: Vec<u64> = (next + 1..=next + u64::from(n)).collect();
                        next += u64::from(n);
                        let bytes: Vec<Vec<u8>> = numbers.iter().map(|n| frame(*n, usize::from(len))).collect();
                        let frames: Vec<Frame<'_>> = bytes.iter().map(|b| Frame::from_slice(VnetHdr::default(), b)).collect();
                        accepted.extend(&numbers[..lane.take_run(&frames, 1, Origin::NONE)]);
                    }
                    Op::Frames(n, len) => for _ in 0..n {
                        next += 1;
                        let bytes = frame(next, usize::from(len));
                        if !lane.accepts(bytes.len() as u32, || false) { continue; }
                        if lane.take(&Frame::from_slice(VnetHdr::default(), &bytes), 0, Origin::NONE, || 1, &mut send).is_ok() {
                            accepted.push(next);
                        } else { dropped += 1; }
                    },
                    Op::Room(n) => room = usize::from(n),
                    Op::Hold => {
                        holds += 1;
                        let (w, q) = spool.create(HoldId(holds), Kind::Source, &key).expect("a queue");
                        if let Ok(lost) = lane.hold(w, 1) {
                            prop_assert_eq!(lost, 0);
                            held = Some(q);
                        }
                    }
                    Op::LetGo => if let Some(q) = held.take() {
                        if holds % 2 == 0 {
                            prop_assert!(lane.put_back(None, Arc::default()));
                            continue;
                        }
                        let (writer, local) = spool.create(HoldId(holds), Kind::Local, &key).expect("a queue");
                        let source = |q: &Arc<crate::spool::Queue>| Source { reader: q.reader(), progress: Arc::default() };
                        lane.drain(Box::new(Drain { before: None, older: [Stage { sources: vec![source(&q)], ..Stage::default() }].into(), wait: None, behind: Some(Behind { writer, local: source(&local) }), ended: Vec::new() }));
                    },
                    Op::Step => { lane.step(64, &mut send, &mut |_| dropped += 1); }
                }
                lane.commit();
                if is_held && held.is_some() {
                    prop_assert_eq!(before, out.len(), "a held lane delivered");
                }
            }
            if held.is_some() && holds % 2 == 0 {
                prop_assert!(lane.put_back(None, Arc::default()));
                prop_assert!(!lane.put_back(None, Arc::default()), "it is not held any more");
            } else if let Some(q) = held.take() {
                let (writer, local) = spool.create(HoldId(9999), Kind::Local, &key).expect("a queue");
                let source = |q: &Arc<crate::spool::Queue>| Source { reader: q.reader(), progress: Arc::default() };
                lane.drain(Box::new(Drain { before: None, older: [Stage { sources: vec![source(&q)], ..Stage::default() }].into(), wait: None, behind: Some(Behind { writer, local: source(&local) }), ended: Vec::new() }));
            }
            while lane.step(64, &mut |f: &Frame<'_>| { out.push(number(f)); Sent::Yes }, &mut |_| dropped += 1) == Step::More {}
            prop_assert!(matches!(lane.gate, Gate::Forward));
            prop_assert_eq!(dropped, 0, "room was enough for all");
            prop_assert_eq!(out, accepted);
        }
    }
}
