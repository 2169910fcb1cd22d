//! Batches of another host, put together in the queue's segment from the pieces in which they come: each byte is copied once.
//!
//! Invariant: what is not whole, or not intact, is not passed, and its epoch is not written: neither a reader nor a recovery sees it.

use super::format::{self, TABLE};
use super::writer::{RejectedBatch, Writer};

/// One lane's stream, as far as it has come.
#[derive(Debug, Default)]
pub struct Arriving {
    head: Head,
    /// Bytes of the batch that have come.
    have: usize,
    /// All it has; 0 as long as that is not known.
    want: usize,
    place: Place,
}

/// Of a batch, in front of its table.
#[derive(Debug)]
struct Head([u8; TABLE]);

impl Default for Head {
    fn default() -> Head {
        Head([0; TABLE])
    }
}

/// Where the batch's bytes go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Place {
    /// Into `head`.
    #[default]
    Head,
    /// Into the segment.
    Segment,
    /// Nowhere: it is here already, and was sent again behind a lost connection.
    Nowhere,
}

impl Arriving {
    /// Takes `bytes`, and passes them. What was appended is not committed.
    ///
    /// # Errors
    /// `NoRoom`: the rest of `bytes` later. Otherwise the stream is of no use.
    pub fn push(&mut self, writer: &mut Writer, bytes: &mut &[u8]) -> Result<(), RejectedBatch> {
        while !bytes.is_empty() || self.is_whole_head() {
            if self.place == Place::Head {
                let piece = take(bytes, TABLE - self.have);
                self.head.0[self.have..][..piece.len()].copy_from_slice(piece);
                self.have += piece.len();
                let Some(want) = format::wire_len(&self.head.0[..self.have])? else {
                    return Ok(());
                };
                self.place = match format::last_seq(&self.head.0) < writer.next_seq() {
                    true => Place::Nowhere,
                    false => {
                        writer.arriving(want)?[..TABLE].copy_from_slice(&self.head.0);
                        Place::Segment
                    }
                };
                self.want = want;
            }
            let piece = take(bytes, self.want - self.have);
            if self.place == Place::Segment {
                writer.arriving(self.want)?[self.have..][..piece.len()].copy_from_slice(piece);
            }
            self.have += piece.len();
            if self.have == self.want {
                let whole = std::mem::take(self);
                if whole.place == Place::Segment {
                    writer.take_arrived(whole.want)?;
                }
            }
        }
        Ok(())
    }

    /// Bytes of a batch of which the rest has not come.
    pub fn pending(&self) -> usize {
        self.have
    }

    /// There was no room for it.
    fn is_whole_head(&self) -> bool {
        self.place == Place::Head && self.have == TABLE
    }
}

/// The first `n` bytes, or all there are.
fn take<'b>(bytes: &mut &'b [u8], n: usize) -> &'b [u8] {
    let (piece, rest) = bytes.split_at(n.min(bytes.len()));
    *bytes = rest;
    piece
}
