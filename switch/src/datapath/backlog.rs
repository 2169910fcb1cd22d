//! A bounded queue of frames in memory, for a lane whose receiver has no room at the moment: what a network device's
//! transmit queue is to a TAP. One ring of bytes, got when it is first needed.
//!
//! Its frames were given back to their sender, so they must not die with the switch: where there is a place for it
//! ([`super::shelf`]) the ring is a file in memory that is mapped, and two words of it say what waits. A record's bytes are there before
//! `TAIL` says so, and `HEAD` passes a frame when its receiver can see it ([`Backlog::note`]): a switch that is killed loses none of them,
//! and repeats at most what it was delivering.
//!
//! ```text
//!   HEAD, TAIL  places: bytes since some start, modulo the ring's length where they are; HEAD >= TAIL: nothing waits
//!   record      length (32 bits, ff ff ff ff: the next one is at the ring's begin) | 10 bytes virtio_net_hdr | queue (16 bits) | frame | to 16
//! ```
//!
//! Invariant: bytes between `HEAD` and `TAIL` are not written.
//! Invariant: no bytes of a file panic; what is no record ends what waits.

use std::path::Path;
use std::sync::atomic::Ordering;

use crate::port::{BURST, Burst, FRAME_MAX, FRAME_MIN, Frame, VnetHdr};
use crate::spool::Room;

use super::shelf::{Spot, Without};

/// Bytes of frames and their headers that a lane keeps at most before it drops.
pub const BACKLOG_BYTES: usize = 1 << 20;
/// What they take in the spool at most, written in runs: a frame of 14 bytes takes a ninth more there.
pub const SPOOLED_MAX: usize = BACKLOG_BYTES / 8 * 9;
/// Of a record; also what records are multiples of.
const HEADER: usize = 16;
/// Where a frame would go on at the ring's begin.
const SKIP: u32 = u32::MAX;
/// By how much a file grows.
const STEP: usize = 64 << 10;
/// No run of ours gets that far: places from there on are a foreign file's, and are made small before they are added to.
const FAR: u64 = 1 << 62;
/// Words of the file.
const HEAD: usize = 0;
const TAIL: usize = 1;

fn need(len: u32) -> usize {
    HEADER + (len as usize).next_multiple_of(HEADER)
}

/// Where a place lies in the ring.
fn offset(place: u64) -> usize {
    (place % BACKLOG_BYTES as u64) as usize
}

/// Where the records are.
#[derive(Default)]
enum Ring {
    /// Nothing ever waited.
    #[default]
    None,
    /// Dies with this process.
    Own(Box<[u8]>, Without),
    /// Does not.
    Kept(Box<Room>),
}

impl Ring {
    fn bytes(&self) -> &[u8] {
        match self {
            Ring::None => &[],
            Ring::Own(b, _) => b,
            Ring::Kept(r) => r.bytes(),
        }
    }

    /// The first `to` bytes, to be written; none if there is no memory for them.
    fn bytes_mut(&mut self, to: usize) -> Option<&mut [u8]> {
        match self {
            Ring::None => None,
            Ring::Own(b, _) => b.get_mut(..to),
            Ring::Kept(r) => {
                let to = to.next_multiple_of(STEP).min(BACKLOG_BYTES);
                r.need(to).ok()?;
                Some(r.bytes_mut())
            }
        }
    }

    fn set(&self, word: usize, place: u64) {
        if let Ring::Kept(r) = self {
            r.word(word).store(place, Ordering::Release);
        }
    }
}

/// What a file had.
pub(super) struct Opened {
    pub backlog: Backlog,
    /// Where the file says what it is.
    pub header: Vec<u8>,
    /// Bytes that are said to wait and are no record, or behind one that is none.
    pub unread: u64,
}

/// See the module.
#[derive(Default)]
pub struct Backlog {
    ring: Ring,
    /// Where to put it.
    spot: Spot,
    head: u64,
    tail: u64,
    /// What lies before is not wanted any more.
    noted: u64,
    frames: usize,
    /// There is no memory for another frame, as was seen behind the last one; asked for again when something was delivered.
    is_short: bool,
    /// Something has come since the last [`Backlog::trim`].
    is_used: bool,
}

impl Backlog {
    /// Without a frame; its ring will be there.
    pub fn at(spot: Spot) -> Backlog {
        Backlog {
            spot,
            ..Backlog::default()
        }
    }

    /// What an earlier run has left in a file of [`super::shelf`].
    pub(super) fn open(path: &Path) -> std::io::Result<Opened> {
        let (mut room, header) = Room::open(path, BACKLOG_BYTES)?;
        let get = |word| room.word(word).load(Ordering::Acquire);
        let (head, said) = (get(HEAD), get(TAIL));
        let waits = said.checked_sub(head).filter(|n| {
            let whole = n.is_multiple_of(HEADER as u64) && head.is_multiple_of(HEADER as u64);
            whole && (1..=BACKLOG_BYTES as u64).contains(n)
        });
        // A fresh one, or one that cannot be read.
        let mut unread = said.saturating_sub(head).min(BACKLOG_BYTES as u64);
        let (head, said) = match waits {
            None => (0, 0),
            Some(n) if said >= FAR => {
                let near = offset(head) as u64;
                room.word(HEAD).store(near, Ordering::Release);
                room.word(TAIL).store(near + n, Ordering::Release);
                (near, near + n)
            }
            Some(_) => (head, said),
        };
        if head < said {
            // One that wraps was there to its end.
            let (from, to) = (offset(head), offset(said));
            room.need(if from < to { to } else { BACKLOG_BYTES })?;
        }
        let mut found = Backlog {
            ring: Ring::Kept(Box::new(room)),
            spot: Spot::default(),
            head,
            tail: said,
            noted: head,
            frames: 0,
            is_short: false,
            is_used: true,
        };
        let mut at = head;
        while at < said {
            let Some((next, is_frame)) = found.next(at).filter(|(next, _)| *next <= said) else {
                break;
            };
            at = next;
            found.frames += usize::from(is_frame);
        }
        found.tail = at;
        if waits.is_some() {
            unread = said - at;
        }
        if at < said {
            found.ring.set(TAIL, at);
        }
        Ok(Opened {
            backlog: found,
            header,
            unread,
        })
    }

    /// The place behind the record there, and whether that is a frame; none if it is no record.
    fn next(&self, at: u64) -> Option<(u64, bool)> {
        let place = offset(at);
        let r = self.ring.bytes().get(place..)?;
        let len = u32::from_le_bytes(*r.first_chunk()?);
        if len == SKIP {
            return Some((at + (BACKLOG_BYTES - place) as u64, false));
        }
        let is_frame = (FRAME_MIN..=FRAME_MAX).contains(&(len as usize)) && need(len) <= r.len();
        is_frame.then(|| (at + need(len) as u64, true))
    }

    /// True if no frame waits.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Frames that wait.
    pub fn len(&self) -> usize {
        self.frames
    }

    /// Whether [`Backlog::push`] would take a frame of this length, as far as is known.
    pub fn has_room(&self, len: u32) -> bool {
        !self.is_short && self.place(len).is_some()
    }

    /// Where a frame would go. Not where the ring ends: then everything up to there is passed.
    fn place(&self, len: u32) -> Option<u64> {
        let left = BACKLOG_BYTES - offset(self.tail);
        let at = match need(len) <= left {
            true => self.tail,
            false => self.tail + left as u64,
        };
        let end = at + need(len) as u64;
        (end - self.noted <= BACKLOG_BYTES as u64).then_some(at)
    }

    /// Copies the frame, which came in at this queue of its sender's, to the end; false if there is no room.
    #[must_use]
    pub fn push(&mut self, f: &Frame<'_>, queue: u16) -> bool {
        if matches!(self.ring, Ring::None) {
            self.ring = match self.spot.room(BACKLOG_BYTES) {
                Some(room) => Ring::Kept(Box::new(room)),
                None => self.own(),
            };
        }
        self.is_used = true;
        if self.noted == self.tail {
            self.begin_again();
        }
        let Some(at) = self.place(f.len) else {
            return false;
        };
        let passed = offset(self.tail);
        let from = offset(at);
        let to = from + need(f.len);
        let end = to.max(passed + 4);
        if self.ring.bytes_mut(end).is_none() && self.noted == self.tail {
            // The file says that nothing waits, and is left alone.
            self.ring = self.own();
        }
        let Some(bytes) = self.ring.bytes_mut(end) else {
            self.is_short = true;
            return false;
        };
        if at != self.tail {
            bytes[passed..passed + 4].copy_from_slice(&SKIP.to_le_bytes());
        }
        let r = &mut bytes[from..to];
        r[..4].copy_from_slice(&f.len.to_le_bytes());
        r[4..14].copy_from_slice(&f.vnet.0);
        r[14..16].copy_from_slice(&queue.to_le_bytes());
        f.copy_to(&mut r[HEADER..HEADER + f.len as usize]);
        self.tail = at + need(f.len) as u64;
        self.ring.set(TAIL, self.tail);
        self.frames += 1;
        self.provide();
        true
    }

    /// Asks for the memory of the next frame, whatever its length: whoever is told that there is room for it takes it from its sender.
    fn provide(&mut self) {
        let next = (offset(self.tail) + need(FRAME_MAX as u32)).min(BACKLOG_BYTES);
        self.is_short = !matches!(self.ring, Ring::None) && self.ring.bytes_mut(next).is_none();
    }

    fn own(&self) -> Ring {
        let bytes = vec![0; BACKLOG_BYTES].into_boxed_slice();
        Ring::Own(bytes, self.spot.without())
    }

    /// What an earlier run has left in this lane's file.
    pub fn take_up(&mut self, left: Backlog) {
        let spot = std::mem::take(&mut self.spot);
        *self = Backlog { spot, ..left };
    }

    /// Gives back the memory of a ring where nothing waits, and nothing has come since the last call. The next frame asks for it anew, also
    /// for a file if there was no memory for that. For the lane's owner, now and then. True if there was some.
    pub fn trim(&mut self) -> bool {
        let is_used = std::mem::take(&mut self.is_used);
        if self.noted != self.tail {
            return false;
        }
        match &mut self.ring {
            Ring::None => false,
            Ring::Kept(_) if is_used => false,
            // One that should be in a file asks for it anew as soon as nothing waits.
            Ring::Own(_, without) if is_used && !without.counts() => false,
            Ring::Own(..) => {
                self.ring = Ring::None;
                true
            }
            Ring::Kept(r) => r.release(),
        }
    }

    /// Nothing waits: the ring's first bytes are those that are in the processor's cache. Empty all the time, also for who finds it so.
    fn begin_again(&mut self) {
        let start = self.tail.next_multiple_of(BACKLOG_BYTES as u64);
        self.ring.set(HEAD, start);
        self.ring.set(TAIL, start);
        (self.head, self.tail, self.noted) = (start, start, start);
    }

    /// The oldest frame, and the queue where it came in.
    pub fn front(&self) -> Option<(Frame<'_>, u16)> {
        self.record(self.head).map(|(f, queue, _)| (f, queue))
    }

    /// Where the frames came in, each queue once.
    pub fn queues(&self) -> Vec<u16> {
        let mut out = std::collections::BTreeSet::new();
        let mut at = self.head;
        while let Some((_, queue, next)) = self.record(at) {
            out.insert(queue);
            at = next;
        }
        out.into_iter().collect()
    }

    /// The oldest frames, a burst of them at most.
    pub fn oldest(&self) -> Burst<'_> {
        let mut out = Burst::new();
        let mut at = self.head;
        while out.len() < BURST
            && let Some((frame, _, next)) = self.record(at)
        {
            at = next;
            out.push(frame);
        }
        out
    }

    /// The first frame from there on, its queue, and the place behind it.
    fn record(&self, mut at: u64) -> Option<(Frame<'_>, u16, u64)> {
        loop {
            let (next, is_frame) = (at < self.tail).then(|| self.next(at))??;
            if is_frame {
                let r = &self.ring.bytes()[offset(at)..];
                let len = (next - at) as usize;
                let said = u32::from_le_bytes([r[0], r[1], r[2], r[3]]) as usize;
                let mut vnet = VnetHdr::default();
                vnet.0.copy_from_slice(&r[4..14]);
                let frame = Frame::from_slice(vnet, &r[HEADER..len][..said]);
                return Some((frame, u16::from_le_bytes([r[14], r[15]]), next));
            }
            at = next;
        }
    }

    /// Removes the oldest frame. It is still there for the next run of the switch, until [`Backlog::note`].
    pub fn pop(&mut self) {
        if let Some((_, _, next)) = self.record(self.head) {
            self.head = next;
            self.frames -= 1;
        }
    }

    /// What was removed is where it belongs, whatever becomes of this process.
    pub fn note(&mut self) {
        if self.noted != self.head {
            self.noted = self.head;
            self.ring.set(HEAD, self.head);
            if self.is_short {
                self.provide();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    use super::super::shelf::Shelf;
    use crate::spool::PAGE;

    proptest! {
        #[test]
        fn is_a_bounded_queue(ops in proptest::collection::vec((any::<bool>(), 14usize..65_000), 1..400)) {
            let mut b = Backlog::default();
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            for (i, (push, len)) in ops.into_iter().enumerate() {
                if push {
                    let bytes: Vec<u8> = (0..len).map(|k| (k * 31 + i) as u8).collect();
                    let used: usize = model.iter().map(|m| m.len() + 32).sum();
                    if b.push(&Frame::from_slice(VnetHdr([i as u8; 10]), &bytes), i as u16 % 3) {
                        model.push_back(bytes);
                    } else {
                        // A refusal is right only when it is really full (a wrap wastes at most one frame's room).
                        prop_assert!(used + 2 * (len + 32) + 65_000 > BACKLOG_BYTES);
                    }
                } else if let Some(want) = model.pop_front() {
                    let lengths: Vec<_> = b.oldest().iter().map(|f| f.len as usize).collect();
                    let expected = std::iter::once(&want).chain(&model).map(Vec::len);
                    prop_assert_eq!(lengths, expected.take(BURST).collect::<Vec<_>>());
                    let got = b.front().expect("a frame").0;
                    let mut out = vec![0; got.len as usize];
                    got.copy_to(&mut out);
                    prop_assert_eq!(out, want);
                    b.pop();
                    b.note();
                }
                prop_assert_eq!(b.len(), model.len());
            }
        }
    }

    fn bytes(n: usize, len: usize) -> Vec<u8> {
        (0..len).map(|k| (k * 31 + n) as u8).collect()
    }

    /// All that waits, oldest first.
    fn waits(mut b: Backlog) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while let Some((f, _)) = b.front() {
            let mut bytes = vec![0; f.len as usize];
            f.copy_to(&mut bytes);
            out.push(bytes);
            b.pop();
        }
        assert!(b.is_empty());
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A switch that is killed anywhere: what was pushed and is not noted as delivered is there, and nothing else.
        #[test]
        fn the_next_run_finds_what_waits(ops in proptest::collection::vec((0u8..8, 14usize..65_000), 1..300)) {
            let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
            let shelf = Shelf::open(dir.path(), vec!["a".into(), "b".into()]).expect("a shelf").0;
            let mut b = Backlog::at(shelf.spot(0, 0, 1));
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            let mut popped = 0;
            for (i, (op, len)) in ops.into_iter().enumerate() {
                // Long ones, so that it wraps, and short ones, so that it runs empty.
                let len = if i % 3 == 0 { len } else { 14 + len % 1500 };
                match op {
                    0..4 => {
                        let bytes = bytes(i, len);
                        if b.push(&Frame::from_slice(VnetHdr([i as u8; 10]), &bytes), i as u16 % 3) {
                            model.push_back(bytes);
                        }
                    }
                    4..7 if !b.is_empty() => {
                        b.pop();
                        popped += 1;
                    }
                    7 => {
                        b.note();
                        b.trim();
                        b.trim();
                        model.drain(..popped);
                        popped = 0;
                    }
                    _ => {}
                }
                if i % 16 == 15 {
                    let path = dir.path().join(shelf.name(0, 0, 1));
                    if path.exists() {
                        let Opened { backlog: found, unread, .. } = Backlog::open(&path).expect("a file");
                        prop_assert_eq!(unread, 0);
                        prop_assert_eq!(found.len(), model.len());
                        prop_assert_eq!(waits(found), model.iter().cloned().collect::<Vec<_>>());
                    } else {
                        prop_assert!(model.is_empty());
                    }
                }
            }
        }
    }

    /// A file with so many frames of 84 bytes, each of which is a record of 112.
    fn file(frames: usize) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let shelf = Shelf::open(dir.path(), vec!["a".into(), "b".into()])
            .expect("a shelf")
            .0;
        let mut b = Backlog::at(shelf.spot(0, 0, 1));
        for n in 0..frames {
            assert!(b.push(&Frame::from_slice(VnetHdr::default(), &bytes(n, 84)), 0));
        }
        let path = dir.path().join(shelf.name(0, 0, 1));
        (dir, path)
    }

    fn write(path: &Path, at: u64, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(path);
        file.and_then(|f| f.write_all_at(bytes, at))
            .expect("a file");
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let (_dir, path) = file(10);
        write(&path, PAGE + 3 * 112, &[0xee; 4]);
        let found = Backlog::open(&path).expect("a file");
        assert_eq!((found.backlog.len(), found.unread), (3, 7 * 112));
        // Once.
        let again = Backlog::open(&path).expect("a file");
        assert_eq!((again.backlog.len(), again.unread), (3, 0));
        // Words that say nothing.
        write(&path, 264, &u64::MAX.to_ne_bytes());
        let found = Backlog::open(&path).expect("a file");
        assert_eq!(
            (found.backlog.len(), found.unread),
            (0, BACKLOG_BYTES as u64)
        );
    }

    /// As far as it goes, from the file's end: no sum of ours overflows, and the run behind finds all again.
    #[test]
    fn places_of_a_foreign_file_may_be_anything() {
        let last = u64::MAX - (BACKLOG_BYTES as u64 - 1);
        for start in [1 << 61, FAR - BACKLOG_BYTES as u64, FAR, last] {
            let (_dir, path) = file(10);
            write(&path, 256, &start.to_ne_bytes());
            write(&path, 264, &(start + 10 * 112).to_ne_bytes());
            let mut found = Backlog::open(&path).expect("a file");
            assert_eq!((found.backlog.len(), found.unread), (10, 0), "{start:#x}");
            // It wraps, and is empty in between.
            for n in 10..20_000 {
                let f = bytes(n, 84);
                assert!(
                    found
                        .backlog
                        .push(&Frame::from_slice(VnetHdr::default(), &f), 0)
                );
                for _ in 0..[1, 0, 2, 1, 20][n / 3 % 5] {
                    found.backlog.pop();
                }
                found.backlog.note();
            }
            let want = waits(found.backlog);
            let again = Backlog::open(&path).expect("a file");
            assert_eq!(again.unread, 0);
            assert_eq!(waits(again.backlog), want);
        }
    }

    #[test]
    fn a_ring_where_nothing_waits_gives_its_memory_back() {
        use std::os::unix::fs::MetadataExt;
        let (_dir, path) = file(0);
        let shelf = Shelf::open(
            path.parent().expect("a folder"),
            vec!["a".into(), "b".into()],
        );
        let mut b = Backlog::at(shelf.expect("a shelf").0.spot(0, 0, 1));
        let has = || std::fs::metadata(&path).map_or(0, |m| m.blocks() * 512);
        let f = bytes(1, 1500);
        for _ in 0..3 {
            let mut n = 0;
            while b.push(&Frame::from_slice(VnetHdr::default(), &f), 0) {
                n += 1;
            }
            assert!(has() > BACKLOG_BYTES as u64);
            assert!([b.trim(), b.trim()] == [false, false], "they wait");
            (0..n).for_each(|_| b.pop());
            assert!(!b.trim(), "they are not noted");
            b.note();
            assert!(b.trim());
            assert!(has() <= PAGE);
            assert!(!b.trim(), "there is none");
            // And it is what it was.
            assert!(b.push(&Frame::from_slice(VnetHdr::default(), &f), 0));
            assert!(!b.trim());
            let found = Backlog::open(&path).expect("a file").backlog;
            assert_eq!(waits(found), std::slice::from_ref(&f));
            b.pop();
            b.note();
        }
    }

    #[test]
    fn where_no_memory_is_left_it_waits_elsewhere_if_nothing_waits_before() {
        let (_dir, path) = file(0);
        let shelf = Shelf::open(
            path.parent().expect("a folder"),
            vec!["a".into(), "b".into()],
        );
        let mut b = Backlog::at(shelf.expect("a shelf").0.spot(0, 0, 1));
        let f = bytes(1, 30_000);
        let f = Frame::from_slice(VnetHdr::default(), &f);
        let starve = |b: &mut Backlog| match &mut b.ring {
            Ring::Kept(r) => r.starve(),
            _ => panic!("no file"),
        };
        assert!(b.push(&f, 0));
        b.pop();
        b.note();
        assert!(!b.trim() && b.trim());
        starve(&mut b);
        for n in 1..10 {
            assert!(b.push(&f, 0));
            assert_eq!(b.len(), n);
        }
        assert!(matches!(b.ring, Ring::Own(..)));
        assert!(Backlog::open(&path).expect("a file").backlog.is_empty());
        assert_eq!(waits(b).len(), 9);

        // Behind what waits in the file there is no other place.
        let (_dir, path) = file(2);
        let mut b = Backlog::open(&path).expect("a file").backlog;
        starve(&mut b);
        while b.push(&f, 0) {}
        assert!(!b.has_room(f.len));
        // What is delivered makes no memory: nobody is told so.
        for _ in 0..2 {
            b.pop();
            b.note();
            while b.has_room(f.len) {
                assert!(b.push(&f, 0));
            }
        }
        let left = b.len();
        assert!(matches!(b.ring, Ring::Kept(..)) && left < 9);
        assert_eq!(Backlog::open(&path).expect("a file").backlog.len(), left);
    }
}
