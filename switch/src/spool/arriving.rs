//! Batches of another host, put together from the pieces in which they come, checked, and written to the queue's segment whole.
//!
//! Invariant: what is not whole, or not intact, is not written. (A death in the middle of the write leaves a torn tail, as a loss of power does.)
//! Invariant: a lane takes no more memory than one batch ([`format::BATCH_MAX`]), and none between two.

use super::format::{self, EPOCH, TABLE};
use super::writer::{RejectedBatch, Writer};

/// One lane's stream, as far as it has come.
#[derive(Debug, Default)]
pub struct Arriving {
    /// The batch at hand, as far as it has come, behind room for its epoch.
    batch: Vec<u8>,
}

impl Arriving {
    /// Takes `bytes`, and passes them. What was appended is not committed. Blocks, as a disk may.
    ///
    /// # Errors
    /// `NoRoom`: the rest of `bytes` later. Otherwise the stream is of no use.
    pub fn push(&mut self, writer: &mut Writer, bytes: &mut &[u8]) -> Result<(), RejectedBatch> {
        loop {
            let Some(want) = format::wire_len(self.wire())? else {
                if bytes.is_empty() {
                    if self.batch.is_empty() {
                        self.batch = Vec::new();
                    }
                    return Ok(());
                }
                self.add(bytes, TABLE);
                continue;
            };
            self.add(bytes, want);
            if self.pending() < want {
                return Ok(());
            }
            // One that is here already was sent again behind a lost connection.
            if format::last_seq(self.wire()) >= writer.next_seq() {
                writer.take_arrived(&mut self.batch)?;
            }
            self.batch.clear();
        }
    }

    /// Bytes of a batch of which the rest has not come.
    pub fn pending(&self) -> usize {
        self.wire().len()
    }

    fn wire(&self) -> &[u8] {
        self.batch.get(EPOCH..).unwrap_or_default()
    }

    /// Adds the next ones, until the batch has so many.
    fn add(&mut self, bytes: &mut &[u8], want: usize) {
        if self.batch.is_empty() {
            self.batch.extend([0; EPOCH]);
        }
        self.batch.reserve_exact(want - self.pending());
        let (piece, rest) = bytes.split_at(bytes.len().min(want - self.pending()));
        self.batch.extend_from_slice(piece);
        *bytes = rest;
    }
}
