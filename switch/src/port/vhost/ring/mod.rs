//! What a ring loop ([`super::rx`], [`super::tx`]) needs of a ring layout. There is one layout so far ([`split`]); a
//! packed ring (virtio 1.2, 2.8) fits behind the same trait.
//!
//! Invariant: no method allocates, and each does bounded work whatever the guest wrote.

use crate::mem::guest::Host;

use super::live::Live;

pub mod split;

/// Descriptors of one chain at most (QEMU's and Linux's own limit).
pub const CHAIN_MAX: u32 = 1024;
/// Pieces that the chains of one frame may have together.
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
}

/// A place in the ring: where a chain waits, or will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pos(pub u16);

/// What gives a chain back.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    /// Index of its first descriptor.
    pub id: u16,
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
    /// Gives a chain back with `written` bytes in it; chains must come in the order of their positions. The driver sees
    /// it after [`Ring::publish`].
    fn complete(&mut self, chain: Chain, written: u32);
    /// Shows the driver what was given back. True if it wants a signal.
    fn publish(&mut self) -> Result<bool, Broken>;
    /// Asks for a signal when the driver fills `at`. True if it has done so already.
    fn arm(&mut self, at: Pos) -> Result<bool, Broken>;
    /// Asks for no signals, as far as the layout can.
    fn quiet(&mut self) -> Result<(), Broken>;
}

/// Pieces, in memory that was allocated once.
#[derive(Debug)]
pub struct Pieces(Vec<Piece>);

#[allow(unsafe_code)]
mod threads {
    use super::Pieces;
    // SAFETY: a piece points into shared mappings, which are the same for all threads; a ring clears its pieces before
    // it drops the table that keeps the mappings, and never follows old ones.
    unsafe impl Send for Pieces {}
}

impl Default for Pieces {
    fn default() -> Pieces {
        Pieces(Vec::with_capacity(PIECES_MAX))
    }
}

impl Pieces {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
    /// Adds one, if there is room.
    #[inline]
    pub fn push(&mut self, piece: Piece) -> Result<(), Broken> {
        if self.0.len() == PIECES_MAX {
            return Err(Broken::Chain);
        }
        self.0.push(piece);
        Ok(())
    }
    /// All, in order.
    #[inline]
    pub fn all(&self) -> &[Piece] {
        &self.0
    }
}
