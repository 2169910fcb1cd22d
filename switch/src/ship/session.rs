//! A source's connection without the connection: what it says comes as values, in any order, and [`super::receive`] does with it what it does on a
//! real one. For the fuzz target `session`.

use std::sync::Arc;

use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};

use super::ShipError;
use super::incoming::Incoming;
use super::receive::{self, Acked, Borrowed, Numbers};
use crate::spool::{Arriving, sync_all};

/// From the welcome on. An error ends it, and its streams.
#[derive(Debug)]
pub struct Session {
    incoming: Arc<Incoming>,
    numbers: Numbers,
    acked: Acked,
}

/// A lane's stream. It has the lane's writer.
pub struct Stream {
    lane: u32,
    arriving: Arriving,
    writer: Borrowed,
}

impl Session {
    /// A source that was let in, and how it is welcomed.
    pub fn new(incoming: Arc<Incoming>) -> (Session, ToSource) {
        let welcome = receive::welcome(&incoming);
        let session = Session {
            incoming,
            numbers: Numbers::default(),
            acked: Acked::default(),
        };
        (session, welcome)
    }

    /// A message on the control stream; false: it was the last.
    ///
    /// # Errors
    /// If it is refused.
    pub fn heard(&self, m: ToTarget) -> Result<bool, ShipError> {
        receive::heard(&self.incoming, &self.numbers, m)
    }

    /// A lane's stream, of which nothing but the first message has come. One of a lane without a name is refused at once.
    ///
    /// # Errors
    /// If it is refused.
    pub fn begin(&self, open: &LaneOpen) -> Result<Stream, ShipError> {
        let place = self.numbers.lock().get(&open.lane).copied();
        let place = place.ok_or_else(|| receive::unnamed(open.lane))?;
        Ok(Stream {
            lane: open.lane,
            arriving: Arriving::default(),
            writer: receive::begin(&self.incoming, place, open)?,
        })
    }

    /// What the source is told of what has come since the last time.
    ///
    /// # Errors
    /// If a lane is not as the source says, or the spool fails.
    pub fn acknowledge(&mut self) -> Result<Vec<ToSource>, ShipError> {
        let due = receive::due(&self.incoming, &self.numbers, &self.acked)?;
        let queues: Vec<_> = due.iter().map(|d| d.queue.clone()).collect();
        sync_all(&queues).map_err(|e| ShipError::Connection(e.to_string()))?;
        let told = due.iter();
        Ok(told
            .map(|d| receive::synced(&self.incoming, &mut self.acked, d))
            .collect())
    }
}

impl Stream {
    /// Bytes that have come; false: those that are left wait for room. Nothing is committed.
    ///
    /// # Errors
    /// If they are refused.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<bool, ShipError> {
        let Some(writer) = self.writer.writer.as_mut() else {
            return Ok(false);
        };
        receive::take(self.lane, &mut self.arriving, writer, bytes)
    }

    /// What has come is read by others from now on.
    pub fn commit(&mut self) {
        if let Some(w) = self.writer.writer.as_mut() {
            w.commit();
        }
    }

    /// No more comes.
    ///
    /// # Errors
    /// If something was begun.
    pub fn end(self) -> Result<(), ShipError> {
        let writer = self.writer.writer.as_ref();
        writer.map_or(Ok(()), |w| receive::end(self.lane, &self.arriving, w))
    }
}
