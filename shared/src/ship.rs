//! Frames of a shipment, switch to switch (docs/formats/wire.md).
//!
//! The source's switch dials (QUIC, ALPN [`ALPN`], mutual TLS) and opens one bidirectional stream for control:
//! [`ToTarget`] one way, [`ToSource`] the other, each a `u32` length (little endian) and [`crate::codec`] bytes. Then
//! one unidirectional stream per lane: the same framing for one [`LaneOpen`], then batches exactly as in the spool
//! (docs/formats/spool.md). After a lost connection the source dials again and [`ToSource::Welcome`] says where each
//! lane goes on.

use wincode::{SchemaRead, SchemaWrite};

use crate::api::{Refusal, Tally};
use crate::id::{HoldId, LaneKey};

/// The QUIC application protocol of shipments.
pub const ALPN: &[u8] = b"gangway-ship/2";

/// From the source's switch.
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub enum ToTarget {
    /// First.
    Hello {
        /// [`crate::api::VERSION`].
        version: u32,
        /// Of which hold.
        hold: HoldId,
        /// From the coordinator, who gave it to the target too.
        ticket: [u8; 32],
    },
    /// This lane exists (also when it has no frame), before any of its frames. Numbered from 0 in this order.
    Lane {
        /// Index for [`LaneOpen`], [`ToTarget::End`] and [`ToSource::Ack`].
        lane: u32,
        /// Its name.
        key: LaneKey,
        /// Between two VMs of the group.
        inside: bool,
    },
    /// No record follows behind these.
    End {
        /// Of which lane.
        lane: u32,
        /// Everything that was held on it.
        tally: Tally,
    },
    /// The source has put everything back; forget the shipment.
    Abort,
    /// All lanes of the hold were named.
    Named {
        /// So many.
        lanes: u32,
    },
}

/// From the target's switch.
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub enum ToSource {
    /// To `Hello`: what is already here and synced, per lane.
    Welcome {
        /// Lane and the last sequence number that is safe here.
        watermarks: Vec<(LaneKey, u64)>,
    },
    /// To `Hello`, or at any time: no.
    Refused(Refusal),
    /// Everything of the lane up to `seq` is in the target's spool and synced by its policy.
    Ack {
        /// Of which lane.
        lane: u32,
        /// The last safe sequence number.
        seq: u64,
        /// Over everything up to `seq`.
        tally: Tally,
        /// `End` was received and agrees.
        complete: bool,
    },
}

/// First message on a lane's own stream.
#[derive(Debug, Clone, PartialEq, SchemaRead, SchemaWrite)]
pub struct LaneOpen {
    /// As numbered by [`ToTarget::Lane`].
    pub lane: u32,
    /// The sequence number of the first record that follows, or an earlier one.
    pub first_seq: u64,
}
