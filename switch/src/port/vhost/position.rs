//! How far each of a guest's transmit rings was given back, where the next run of the switch finds it (ADR-0021).
//!
//! A switch that is killed between accepting a burst and giving it back leaves frames in the ring that it has accepted. The ring
//! does not say so, and a queue of the spool does not know what of its frames is still in the ring. So each ring has a word in a
//! file beside the keeper's socket: how many frames were given back, and the ring's position behind them. It is stored when
//! the used entries are written and before the driver sees them. The next run starts there, shows the driver what it has not seen,
//! and counts on, and so the numbers that batches of the spool have from the run before mean the same frames.
//!
//! ```text
//!   word: stopped (1 bit) | frames given back (47 bits, from a random start) | position (16 bits); 0: not known
//! ```
//!
//! Invariant: a word is there only while the front-end's connection lasts that has set up the ring: the keeper puts an empty file there
//! before it passes a new connection on. A word of another ring would skip frames.
//! Invariant: whoever stops a ring, or is told that it is stopped, says so in its word. Then it counts only for a ring that stands
//! exactly there, and not at the begin, where a guest's reset puts it.
//!
//! Packed rings, of both directions, have more to be noted, and no word: see [`super::given`].

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gangway_shared::positions::{AT as MAGIC_AT, MAGIC};

use super::given::{self, BYTES, Element, Given, Left};
use super::ring::{Broken, Ring};
use crate::port::{BURST, QUEUES};
use crate::spool::Page;

/// Bits of a word that are the position.
const AT: u32 = 16;
/// The ring is stopped: all that was given back is shown, and the guest may reset it.
const STOPPED: u64 = 1 << 63;
/// Frames that a driver may have back and not see: what is shown late, and what is being given back.
const UNSEEN_MAX: u16 = 2 * BURST as u16;

/// The words of a port.
#[derive(Debug, Clone)]
pub struct Positions {
    page: Arc<Page>,
    path: PathBuf,
    is_new: bool,
}

impl Positions {
    /// Opens the file that the keeper has made for this connection, empty at first. None if there is none: a keeper that makes none
    /// removes none. One that can't be used is removed, for this run would move the rings and not say so.
    pub fn open(path: &Path) -> io::Result<Option<Positions>> {
        if !path.exists() {
            return Ok(None);
        }
        let magic = u64::from_ne_bytes(MAGIC);
        let found = Page::open(path, BYTES).ok();
        let found = found.filter(|p| p.word(0).load(Ordering::Relaxed) == magic);
        let is_new = found.is_none();
        let page = match found {
            Some(page) => page,
            None => {
                let mut start = vec![0; MAGIC_AT];
                start.extend(MAGIC);
                Page::create(path, &start, BYTES).inspect_err(|_| {
                    let _ = std::fs::remove_file(path);
                })?
            }
        };
        Ok(Some(Positions {
            page: Arc::new(page),
            path: path.to_owned(),
            is_new,
        }))
    }

    /// There was nothing in the file that could be used.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Where a packed ring with `num` slots is noted to be, whether it is stopped or not.
    pub fn packed_at(&self, ring: usize, num: u16) -> Option<u16> {
        Given::new(self.page.clone(), ring).at(num)
    }

    /// Of the guest's transmit ring of a queue pair, whose used index is `used` and which has `ahead` chains from there on.
    pub fn split(&self, queue: u16, used: u16, ahead: u16) -> Position {
        let mut p = Position {
            page: Some(self.page.clone()),
            queue,
            count: 0,
            at: used,
            unseen: 0,
            given: Given::default(),
            is_packed: false,
        };
        let word = p.word().map_or(0, |w| w.load(Ordering::Acquire));
        let at = word as u16;
        let unseen = at.wrapping_sub(used);
        let is_this = match word & STOPPED {
            0 => word != 0 && unseen <= UNSEEN_MAX.min(ahead),
            _ => unseen == 0 && used != 0,
        };
        if is_this {
            (p.count, p.at, p.unseen) = ((word & !STOPPED) >> AT, at, unseen);
        } else {
            p.count = any_count();
        }
        p.set(0, p.at);
        p
    }

    /// Of a packed ring with `num` slots, guest's receive rings even, that the front-end starts at `base`: where it goes on, and what may
    /// still have to be written. None if an earlier run was killed where that cannot be known.
    pub fn packed(&self, ring: usize, base: u16, num: u16) -> Option<(Position, Vec<Element>)> {
        let mut p = Position {
            page: Some(self.page.clone()),
            queue: (ring / 2) as u16,
            count: 0,
            at: base,
            unseen: 0,
            given: Given::new(self.page.clone(), ring),
            is_packed: true,
        };
        let last = match p.given.left(base, num) {
            Left::Unknown => return None,
            Left::Nothing => {
                p.count = any_count();
                Vec::new()
            }
            Left::Here { at, count, last } => {
                (p.at, p.count) = (at, count);
                last
            }
        };
        if last.is_empty() {
            p.note(p.at, 0, |_| Element::default());
        }
        Some((p, last))
    }

    /// A packed ring is stopped, and its front-end knows where.
    pub fn packed_stopped(&self, ring: usize) {
        given::stopped(&self.page, ring);
    }

    /// The ring is stopped, or was not started.
    pub fn stopped(&self, queue: u16) {
        if let Some(w) = word(&self.page, queue).filter(|w| w.load(Ordering::Relaxed) != 0) {
            w.fetch_or(STOPPED, Ordering::AcqRel);
        }
    }

    /// Nobody is to find anything: somebody may still have a ring that was stopped.
    pub fn give_up(self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            tracing::error!(
                "{}: {e}; remove it before the switch is started again",
                self.path.display()
            );
        }
    }

    /// All that is noted of a packed ring.
    #[cfg(test)]
    pub fn raw_packed(&self, ring: usize) -> Vec<&AtomicU64> {
        given::words(&self.page, ring)
    }

    /// What the next run will find of it.
    #[cfg(test)]
    pub fn left(&self, ring: usize, base: u16, num: u16) -> Left {
        Given::new(self.page.clone(), ring).left(base, num)
    }

    /// The word itself.
    #[cfg(test)]
    pub fn raw(&self, queue: u16) -> &AtomicU64 {
        word(&self.page, queue).expect("a queue's")
    }
}

/// Numbers of a ring that begins must not be those of another one.
fn any_count() -> u64 {
    RandomState::new().hash_one(0) >> (AT + 1)
}

fn word(page: &Page, queue: u16) -> Option<&AtomicU64> {
    (usize::from(queue) < QUEUES).then(|| page.word(1 + usize::from(queue)))
}

/// Of one ring, which one worker has.
#[derive(Debug, Default)]
pub struct Position {
    page: Option<Arc<Page>>,
    queue: u16,
    /// Frames given back.
    count: u64,
    at: u16,
    unseen: u16,
    given: Given,
    is_packed: bool,
}

impl Position {
    /// Of a ring whose connection ends with the switch: nobody asks.
    pub fn unknown() -> Position {
        Position::default()
    }

    /// Where the ring goes on, and how many chains before that the driver has not been shown.
    pub fn start(&self) -> (u16, u16) {
        (self.at, self.unseen)
    }

    /// Of a packed ring, which has found out how many.
    pub fn with_unseen(self, unseen: usize) -> Position {
        Position {
            unseen: unseen as u16,
            ..self
        }
    }

    fn word(&self) -> Option<&AtomicU64> {
        word(self.page.as_ref()?, self.queue)
    }

    /// How many frames were given back, if the next run of the switch will know that, too.
    #[inline]
    pub fn count(&self) -> Option<u64> {
        self.page.as_ref().map(|_| self.count)
    }

    /// So many more frames were given back; the ring stands at `at`. Behind the used entries, before the driver sees them.
    #[inline]
    pub fn set(&mut self, frames: u64, at: u16) {
        self.count = self.count.wrapping_add(frames);
        if !self.is_packed
            && let Some(w) = self.word()
        {
            let word = self.count << AT | u64::from(at);
            w.store(word & !STOPPED, Ordering::Release);
        }
    }

    /// Of a packed ring: these are about to be written, and then it stands at `at`.
    #[inline]
    pub fn note(&mut self, at: u16, n: usize, element: impl Fn(usize) -> Element) {
        self.given.put(self.count, at, n, element);
    }

    /// More was written than could be noted; now the place behind it can be.
    #[inline]
    pub fn is_behind(&self) -> bool {
        self.given.is_behind()
    }
}

/// Shows the driver what was given back, the first `n` chains of it, so that the next run can do it again.
#[inline]
pub fn show<R: Ring>(ring: &mut R, position: &mut Position, n: usize) -> Result<bool, Broken> {
    ring.note(n, position);
    let shown = ring.publish(n);
    if position.is_behind() {
        ring.note(0, position);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("p.positions");
        assert!(Positions::open(&path).expect("no file").is_none());
        std::fs::write(&path, []).expect("as the keeper makes it");
        (dir, path)
    }

    fn open(path: &Path) -> Positions {
        Positions::open(path).expect("a file").expect("a file")
    }

    #[test]
    fn the_next_run_goes_on_where_the_ring_was_and_counts_on() {
        let (_dir, path) = file();
        let mut p = open(&path).split(3, 65_530, 0);
        assert_eq!(p.start(), (65_530, 0));
        let begin = p.count().expect("it is known");
        p.set(20, 14);
        // Killed: nothing is cleared. The driver has seen five of them.
        let next = open(&path);
        assert_ne!(next.split(4, 14, 9).count(), Some(begin + 20));
        let p = next.split(3, 65_535, 15);
        assert_eq!(p.start(), (14, 15));
        assert_eq!(p.count(), Some(begin + 20));
        // Stopped in good order, and started again where it stands.
        next.stopped(3);
        assert_eq!(open(&path).split(3, 14, 0).count(), Some(begin + 20));
    }

    #[test]
    fn a_word_that_cannot_be_of_this_ring_is_not_believed() {
        let (_dir, path) = file();
        let all = open(&path);
        // Ahead of it, as behind a QEMU that has dropped what was in the ring; too far behind it; ahead of all that the driver has offered;
        // or of a ring that was stopped, and is another one now.
        for (used, ahead, stopped) in [
            (102, 256, false),
            (101 - UNSEEN_MAX - 1, 256, false),
            (99, 1, false),
            (100, 256, true),
        ] {
            let mut was = all.split(0, 7, 1);
            was.set(1, 101);
            if stopped {
                all.stopped(0);
            }
            let p = all.split(0, used, ahead);
            assert_eq!(p.start(), (used, 0));
            assert_ne!(p.count(), was.count());
        }
        // A guest's reset puts the ring there.
        let mut was = all.split(0, 7, 1);
        was.set(1, 0);
        all.stopped(0);
        assert_ne!(all.split(0, 0, 9).count(), was.count());
        std::fs::write(&path, [7; 4096]).expect("garbage");
        assert_eq!(open(&path).split(0, 9, 9).start(), (9, 0), "replaced");
        open(&path).give_up();
        assert!(!path.exists());
    }

    #[test]
    fn without_a_keeper_nothing_is_known() {
        let mut p = Position::unknown();
        p.set(3, 3);
        assert_eq!((p.count(), p.start()), (None, (0, 0)));
    }
}
