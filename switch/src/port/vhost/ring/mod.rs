//! What a ring loop ([`super::rx`], [`super::tx`]) needs of a ring layout: [`split`] or [`packed`].
//!
//! Invariant: no method allocates, and each does bounded work whatever the guest wrote.

use std::ptr::NonNull;

use crate::mem::guest::Host;

use super::live::Live;
use super::position::Position;
use crate::port::BURST;

mod common;
pub mod packed;
pub mod split;

/// Descriptors of one chain at most (QEMU's and Linux's own limit).
pub const CHAIN_MAX: u32 = 1024;
/// Pieces that the chains of one frame may have together, empty ones included.
pub const PIECES_MAX: usize = 2048;

/// How a guest (or its front-end) broke a ring. The ring stays silent until it is set up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// The driver's index runs further ahead than the ring is long.
    #[error("available index is {0} ahead")]
    Index(u16),
    /// A descriptor index beyond the table.
    #[error("descriptor index {0} is beyond the table")]
    Descriptor(u16),
    /// A chain that is longer than [`CHAIN_MAX`] or loops.
    #[error("descriptor chain loops or is longer than {CHAIN_MAX}")]
    Chain,
    /// A buffer or an indirect table outside guest memory.
    #[error("address {0:#x} is not guest memory")]
    Address(u64),
    /// A buffer to read where one to write is due, or the other way round.
    #[error("descriptor of the wrong direction")]
    Direction,
    /// An indirect descriptor that was not negotiated, nested, or of an odd length.
    #[error("bad indirect descriptor")]
    Indirect,
    /// The front-end's dirty log does not cover what we write.
    #[error("dirty log does not cover address {0:#x}")]
    Log(u64),
    /// The front-end took O_NONBLOCK from the descriptor by which it is called, and filled it: we slept in the signal.
    #[error("its call descriptor blocks, the front-end made it so and filled it")]
    Call,
    /// The front-end truncated a file of guest memory while it was in use.
    #[error("guest memory lost, its file was truncated")]
    MemoryLost,
    /// The same of the dirty log.
    #[error("dirty log lost, its file was truncated")]
    LogLost,
}

/// A place in the ring: where a chain waits, or will. Its bits are the layout's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pos(pub u16);

/// What gives a chain back.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    /// Split: index of its first descriptor. Packed: the driver's own number for it.
    pub id: u16,
    /// Slots of the ring that it takes.
    pub slots: u16,
}

/// A piece of a chain's memory.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Where it lies.
    pub host: Host,
    /// Its guest physical address, for the dirty log.
    pub gpa: u64,
}

/// Which way a chain's buffers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads (the guest's transmit ring).
    Read,
    /// The device writes (the guest's receive ring).
    Write,
}

/// A chain of one descriptor in one region, what nearly all are. It takes one slot.
#[derive(Debug, Clone, Copy)]
pub struct Plain {
    /// Its memory: `len` bytes.
    pub ptr: NonNull<u8>,
    /// In bytes.
    pub len: u32,
    /// To give it back.
    pub id: u16,
}

impl Plain {
    /// To give it back.
    #[inline]
    pub fn chain(&self) -> Chain {
        Chain {
            id: self.id,
            slots: 1,
        }
    }
}

/// Plain chains, one behind the other: looked at, not given back yet.
#[derive(Debug)]
pub struct Plains {
    all: [Plain; 3 * BURST],
    /// Up to here they are gone, up to there they wait.
    gone: usize,
    end: usize,
}

impl Default for Plains {
    fn default() -> Plains {
        let none = Plain {
            ptr: NonNull::dangling(),
            len: 0,
            id: 0,
        };
        Plains {
            all: [none; 3 * BURST],
            gone: 0,
            end: 0,
        }
    }
}

impl Plains {
    /// The first of them is the ring's next.
    #[inline]
    pub fn waiting(&self) -> &[Plain] {
        self.all.get(self.gone..self.end).unwrap_or_default()
    }

    /// The first `n`, or all, are gone.
    #[inline]
    pub fn take(&mut self, n: usize) {
        self.gone = (self.gone + n).min(self.end);
    }

    /// Forgets all but the first `n`.
    #[inline]
    pub fn truncate(&mut self, n: usize) {
        self.end = self.end.min(self.gone + n);
    }

    /// Room for a burst; [`Plains::added`] then says how much of it was filled.
    #[inline]
    fn room(&mut self) -> &mut [Plain] {
        if self.all.len() - self.end < BURST {
            self.all.copy_within(self.gone..self.end, 0);
            (self.gone, self.end) = (0, self.end - self.gone);
        }
        let room = self.all.len().min(self.end + BURST);
        &mut self.all[self.end..room]
    }

    #[inline]
    fn added(&mut self, n: usize) {
        self.end = self.all.len().min(self.end + n);
    }
}

/// A ring layout.
pub trait Ring: Send {
    /// Takes over a new snapshot.
    fn rebind(&mut self, live: &Live);
    /// The chain at `at` and the position behind it; its pieces are appended to `pieces`. `None` if the driver has not
    /// put one there yet. Consumes nothing.
    fn peek(
        &mut self,
        at: Pos,
        direction: Direction,
        pieces: &mut Pieces,
    ) -> Result<Option<(Chain, Pos)>, Broken>;
    /// Adds the plain chains from `at` on to `out`, at most `max` and a burst, up to the first that is anything else or not
    /// there. Their loads do not wait for each other, as those of one [`Ring::peek`] after the other do.
    fn peek_plain(&mut self, at: Pos, max: usize, direction: Direction, out: &mut Plains);
    /// Gives a chain back with `written` bytes in it; chains must come in the order of their positions. The driver sees
    /// it after [`Ring::publish`].
    fn complete(&mut self, chain: Chain, written: u32);
    /// The same for `n` chains in a row, which `chain` tells, with the bytes in each.
    fn complete_run(&mut self, n: usize, chain: impl Fn(usize) -> (Chain, u32));
    /// The position behind so many slots.
    fn after(&self, at: Pos, slots: u16) -> Pos;
    /// Slots of the ring: more cannot wait in it.
    fn slots(&self) -> usize;
    /// Notes what [`Ring::publish`] will write, where a run that is killed while it does leaves a ring that the next one cannot read.
    fn note(&self, max: usize, position: &mut Position) {
        let _ = (max, position);
    }
    /// Shows the driver what was given back, the first `max` chains of it. True if there was anything.
    fn publish(&mut self, max: usize) -> Result<bool, Broken>;
    /// Whether the driver wants a signal for what was published since it was last asked. Only behind a full barrier after
    /// [`Ring::publish`]: what was published must be out before we look whether the driver sleeps (virtio 1.2, 2.7.7.2
    /// and 2.8.10); the driver does the same the other way round.
    fn wants_signal(&mut self) -> bool;
    /// Whether the driver looks by itself for what was given back, and wants to hear of none of it, as those of DPDK do.
    fn is_polled(&self) -> bool {
        false
    }
    /// Whether the driver says how far it has read (`VIRTIO_F_EVENT_IDX`), as far as can be seen.
    fn tells(&self) -> bool;
    /// Whether it is known to have read all that was given back before `at`, which is no more than a lap ago: by what it says, or as it
    /// has put a ring's length of buffers in since, which it cannot have without.
    fn has_read(&self, at: Pos) -> bool;
    /// Asks for a signal when the driver fills `at`. True if it has done so already.
    fn arm(&mut self, at: Pos) -> Result<bool, Broken>;
    /// Asks for no signals, as far as the layout can.
    fn quiet(&mut self) -> Result<(), Broken>;
}

/// Pieces, in memory that was allocated once.
#[derive(Debug)]
pub struct Pieces {
    all: Vec<Piece>,
    /// Buffers without a byte: no piece, but work all the same. Chains of nothing else would cost a worker milliseconds.
    empty: usize,
}

#[allow(unsafe_code)]
mod threads {
    use super::{Pieces, Plains};
    // SAFETY: a piece points into shared mappings, which are the same for all threads; a ring clears its pieces before
    // it drops the table that keeps the mappings, and never follows old ones.
    unsafe impl Send for Pieces {}
    // SAFETY: as above.
    unsafe impl Send for Plains {}
}

impl Default for Pieces {
    fn default() -> Pieces {
        Pieces {
            all: Vec::with_capacity(PIECES_MAX),
            empty: 0,
        }
    }
}

impl Pieces {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.all.clear();
        self.empty = 0;
    }
    /// Adds one, if there is room.
    #[inline]
    pub fn push(&mut self, piece: Piece) -> Result<(), Broken> {
        self.has_room()?;
        self.all.push(piece);
        Ok(())
    }
    /// Counts an empty one, if there is room.
    #[inline]
    pub fn push_empty(&mut self) -> Result<(), Broken> {
        self.has_room()?;
        self.empty += 1;
        Ok(())
    }
    #[inline]
    fn has_room(&self) -> Result<(), Broken> {
        match self.walked() < PIECES_MAX {
            true => Ok(()),
            false => Err(Broken::Chain),
        }
    }
    /// How many buffers were looked at.
    #[inline]
    pub fn walked(&self) -> usize {
        self.all.len() + self.empty
    }
    /// All, in order.
    #[inline]
    pub fn all(&self) -> &[Piece] {
        &self.all
    }
}
