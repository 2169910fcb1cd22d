//! What is being given back of a packed ring, where the next run of the switch finds it (ADR-0030).
//!
//! The used index of a split ring says how far it was given back. A packed ring has none, and used elements are written over the
//! driver's descriptors: a switch that is killed between the first and the last of a burst leaves a ring that nobody can read. So a burst is
//! noted as a whole before its first element is written: its elements, the position behind them, and for the guest's transmit rings
//! how many frames were given back ([`super::position`]). The next run writes it once more, unless the driver has seen it, and goes on behind it.
//!
//! ```text
//!   page 1 + ring of PORT.positions: two notes; a burst goes into the one that does not count
//!     note     frames given back (64 bits) | number of elements (16), position behind them (16) | elements
//!     element  bytes written (32) | the driver's id (16) | position (16)
//!   state    in page 0, a word per ring behind those of positions: 0 nothing is known, 1 or 2 the note that counts,
//!            3 more than a note holds; bit 63: stopped
//! ```
//!
//! Invariant: while an element is written, the note that counts has it, or the state is 3.
//! Invariant: a note counts only while the front-end's connection lasts ([`super::position`]), and behind a stop only for a ring that
//! stands exactly there and not at the begin, where a guest's reset puts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ring::packed::{SLOT, START};
use crate::port::QUEUES;
use crate::spool::{PAGE, Page};

/// Both directions.
const RINGS: usize = 2 * QUEUES;
/// Bytes of the file that has notes and positions.
pub const BYTES: u64 = PAGE * (1 + RINGS as u64);
/// Words of a note.
const NOTE: usize = 256;
/// Elements that a note holds.
const MOST: usize = NOTE - 2;
/// Words of a file's header are not counted.
const HEADER: usize = 256 / 8;
/// The first state: behind the file's own word and the positions.
const STATES: usize = 1 + QUEUES;

const WHICH: u64 = 3;
const TOO_MUCH: u64 = 3;
const STOPPED: u64 = 1 << 63;

const _: () = assert!(2 * NOTE * 8 == PAGE as usize);
const _: () = assert!(HEADER + STATES + RINGS <= PAGE as usize / 8);

/// A chain that is given back: what its used element says, and where it goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Element {
    /// Position, with its wrap counter.
    pub at: u16,
    /// The driver's number for it.
    pub id: u16,
    /// Bytes.
    pub written: u32,
}

impl Element {
    fn to_word(self) -> u64 {
        u64::from(self.written) | u64::from(self.id) << 32 | u64::from(self.at) << 48
    }

    fn of_word(word: u64) -> Element {
        Element {
            written: word as u32,
            id: (word >> 32) as u16,
            at: (word >> 48) as u16,
        }
    }
}

/// What an earlier run has left of a ring.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing: the ring is where the front-end says.
    Nothing,
    /// It cannot be known where the ring was.
    Unknown,
    /// The ring goes on here.
    Here {
        /// Behind what was given back.
        at: u16,
        /// Frames given back.
        count: u64,
        /// The last of it, which may not be written, or in part.
        last: Vec<Element>,
    },
}

/// The notes of one ring, which one worker has. By default there are none.
#[derive(Debug, Default)]
pub struct Given {
    page: Option<Arc<Page>>,
    ring: usize,
    /// The last burst was more than a note holds.
    too_much: bool,
}

fn state(page: &Page, ring: usize) -> &AtomicU64 {
    page.word(STATES + ring % RINGS)
}

fn note(page: &Page, ring: usize, which: u64) -> &[AtomicU64] {
    let words = PAGE as usize / 8;
    let first = words * (1 + ring % RINGS) - HEADER;
    let which = usize::from(which == 2);
    page.words(first + NOTE * which, NOTE)
}

/// The ring is stopped in good order, and the front-end was told where it stands, or it sets that anew.
pub(super) fn stopped(page: &Page, ring: usize) {
    let state = state(page, ring);
    if state.load(Ordering::Relaxed) != 0 {
        state.fetch_or(STOPPED, Ordering::AcqRel);
    }
}

/// The state's word and both notes.
#[cfg(test)]
pub(super) fn words(page: &Page, ring: usize) -> Vec<&AtomicU64> {
    let notes = [1, 2].into_iter().flat_map(|which| note(page, ring, which));
    std::iter::once(state(page, ring)).chain(notes).collect()
}

impl Given {
    /// Of a ring in a file of [`BYTES`].
    pub(super) fn new(page: Arc<Page>, ring: usize) -> Given {
        Given {
            page: Some(page),
            ring,
            too_much: false,
        }
    }

    /// What is there of a ring with `num` slots that the front-end starts at `base`.
    pub fn left(&self, base: u16, num: u16) -> Left {
        let Some(page) = &self.page else {
            return Left::Nothing;
        };
        let state = state(page, self.ring).load(Ordering::Acquire);
        let stopped = state & STOPPED != 0;
        match state & WHICH {
            0 => return Left::Nothing,
            // What the front-end was told then was right.
            TOO_MUCH if stopped => return Left::Nothing,
            TOO_MUCH => return Left::Unknown,
            _ => {}
        }
        let words = note(page, self.ring, state & WHICH);
        let get = |n: usize| words[n].load(Ordering::Relaxed);
        let (count, n, at) = (get(0), get(1) as u16, (get(1) >> 16) as u16);
        if stopped {
            let is_this = at == base && at != START;
            return match is_this {
                true => Left::Here {
                    at,
                    count,
                    last: Vec::new(),
                },
                false => Left::Nothing,
            };
        }
        let fits = |at: u16| at & SLOT < num;
        if usize::from(n) > MOST || !fits(at) {
            return Left::Unknown;
        }
        let last: Vec<_> = (0..n.into())
            .map(|i| Element::of_word(get(2 + i)))
            .collect();
        match last.iter().all(|e| fits(e.at)) {
            true => Left::Here { at, count, last },
            false => Left::Unknown,
        }
    }

    /// Where the last note says that the ring is, if it lies in one of `num` slots.
    pub fn at(&self, num: u16) -> Option<u16> {
        let page = self.page.as_ref()?;
        let which = state(page, self.ring).load(Ordering::Acquire) & WHICH;
        let at = (note(page, self.ring, which)[1].load(Ordering::Relaxed) >> 16) as u16;
        (which != 0 && which != TOO_MUCH && at & SLOT < num).then_some(at)
    }

    /// These `n` elements are about to be written, behind which the ring stands at `at`; with them `count` frames were given back.
    #[inline]
    pub fn put(&mut self, count: u64, at: u16, n: usize, element: impl Fn(usize) -> Element) {
        let Some(page) = &self.page else { return };
        let state = state(page, self.ring);
        self.too_much = n > MOST;
        if self.too_much {
            return state.store(TOO_MUCH, Ordering::Release);
        }
        let other = if state.load(Ordering::Relaxed) & WHICH == 1 {
            2
        } else {
            1
        };
        let words = note(page, self.ring, other);
        words[0].store(count, Ordering::Relaxed);
        words[1].store(n as u64 | u64::from(at) << 16, Ordering::Relaxed);
        for (i, word) in words[2..].iter().take(n).enumerate() {
            word.store(element(i).to_word(), Ordering::Relaxed);
        }
        state.store(other, Ordering::Release);
    }

    /// It was more than could be noted: the place behind it is to be noted when it is written.
    #[inline]
    pub fn is_behind(&self) -> bool {
        self.too_much
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> (tempfile::TempDir, Arc<Page>) {
        let dir = tempfile::tempdir().expect("a directory");
        let page = Page::create(&dir.path().join("p"), &[], BYTES).expect("a file");
        (dir, Arc::new(page))
    }

    fn element(n: usize) -> Element {
        Element {
            at: START | n as u16,
            id: n as u16 * 3,
            written: n as u32 * 1000,
        }
    }

    #[test]
    fn the_next_run_finds_the_last_burst_and_only_that() {
        let (_dir, page) = page();
        for ring in [0, 1, RINGS - 1] {
            let mut g = Given::new(page.clone(), ring);
            assert_eq!(g.left(START, 64), Left::Nothing);
            for n in [0, 5, 40, 0, 64] {
                g.put(n as u64 + 7, START | 63, n, element);
                let want = Left::Here {
                    at: START | 63,
                    count: n as u64 + 7,
                    last: (0..n).map(element).collect(),
                };
                assert_eq!(Given::new(page.clone(), ring).left(START, 64), want);
            }
        }
    }

    #[test]
    fn what_cannot_be_of_this_ring_is_not_believed() {
        let (_dir, page) = page();
        let mut g = Given::new(page.clone(), 3);
        // A ring that is shorter, and one that was damaged.
        g.put(1, START | 9, 2, |n| element(n + 20));
        assert_eq!(g.left(START, 9), Left::Unknown);
        assert_eq!(g.left(START, 20), Left::Unknown);
        assert!(matches!(g.left(START, 64), Left::Here { .. }));
        note(&page, 3, state(&page, 3).load(Ordering::Relaxed))[1].store(0xffff, Ordering::Relaxed);
        assert_eq!(g.left(START, 64), Left::Unknown);
        // Stopped: only there, and not at the begin.
        for at in [START, START | 9, 9] {
            g.put(5, at, 3, element);
            stopped(&page, 3);
            assert_eq!(g.left(at ^ 1, 64), Left::Nothing);
            let here = Left::Here {
                at,
                count: 5,
                last: Vec::new(),
            };
            let want = if at == START { Left::Nothing } else { here };
            assert_eq!(g.left(at, 64), want);
        }
    }

    #[test]
    fn a_burst_that_is_more_than_a_note_holds_is_said_to_be() {
        let (_dir, page) = page();
        let mut g = Given::new(page.clone(), 0);
        g.put(1, START, MOST, element);
        assert!(!g.is_behind());
        assert!(matches!(g.left(START, 1024), Left::Here { .. }));
        g.put(1, START, MOST + 1, element);
        assert!(g.is_behind());
        assert_eq!(g.left(START, 1024), Left::Unknown);
        stopped(&page, 0);
        assert_eq!(g.left(START, 1024), Left::Nothing);
        g.put(2, START | 5, 0, element);
        assert!(!g.is_behind() && matches!(g.left(START, 1024), Left::Here { .. }));
    }

    #[test]
    fn without_a_keeper_nothing_is_noted() {
        let mut g = Given::default();
        g.put(1, 2, 3, element);
        assert_eq!(g.left(START, 64), Left::Nothing);
    }
}
