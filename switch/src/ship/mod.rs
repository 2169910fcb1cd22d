//! The shipment: a hold's queues go to the target's switch over QUIC while they are being written, and are spooled
//! there. Bytes: docs/formats/wire.md. [`Outgoing`] dials, [`Acceptor`] answers, [`Incoming`] receives.
//!
//! ```text
//! source                                   target
//! Hello{hold, ticket} ------------------->  known? ticket? this host?
//!                      <------------------  Welcome{lane, last safe seq}...   or Refused
//! Lane{0, key} ... ---------------------->  makes a queue
//! stream per lane: LaneOpen, batches ---->  checks, appends, commits, syncs
//!                      <------------------  Ack{lane, seq, tally}
//! End{lane, tally} ---------------------->  same tally? seals, syncs
//!                      <------------------  Ack{complete}
//! ```
//!
//! Invariant: an acknowledged record is in the target's spool and synced by its policy.
//! Invariant: a lane hands over at most a chunk before the others have had their turn (ADR-0036).
//! Invariant: nothing a peer sends costs more memory than a stream's window, one message and a batch for each lane, or panics.

use std::time::Duration;

use gangway_shared::api::Refusal;
use gangway_shared::id::LaneKey;

mod accept;
mod incoming;
mod outgoing;
mod receive;
mod send;
mod session;
mod wire;

#[cfg(test)]
pub(crate) mod tests;

pub use accept::Acceptor;
pub use incoming::{Incoming, IncomingLane};
pub use outgoing::{LaneShip, Lanes, Outgoing, OutgoingArgs};
#[doc(hidden)]
pub use session::{Session, Stream};

use crate::spool::Damaged;

/// What quinn should be told on both sides of a connection that ships (its defaults suit 100 Mbit/s and 100 streams). Between
/// endpoints that both offer packets of [`PACKET_MAX`] it needs a socket as `control::quic` has it.
pub fn transport() -> quinn::TransportConfig {
    let mut t = quinn::TransportConfig::default();
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(PACKET_MAX);
    t.mtu_discovery_config(Some(mtu));
    t.max_concurrent_uni_streams(quinn::VarInt::from_u32(LANES_MAX as u32));
    t.stream_receive_window(quinn::VarInt::from_u32(4 << 20));
    t.receive_window(quinn::VarInt::from_u32(16 << 20));
    t.send_window(16 << 20);
    // Streams of one priority take turns, a packet each (ADR-0036).
    t.send_fairness(true);
    t.keep_alive_interval(Some(Duration::from_millis(500)));
    // 3 s fit into a QUIC time-out.
    t.max_idle_timeout(quinn::IdleTimeout::try_from(Duration::from_secs(3)).ok());
    t
}

/// The largest packet that is tried, in bytes of UDP payload: what a link of 9,000 bytes carries over IPv6. The receiving endpoint has to
/// offer it, too, and who sends must not hand more than [`SENT_MAX`] to the kernel at once, as quinn's own socket does.
pub const PACKET_MAX: u16 = 9000 - 40 - 8;

/// Bytes of packets that the kernel takes at once; more is lost without an error.
pub const SENT_MAX: usize = u16::MAX as usize - 40 - 8;

/// The most lanes of one shipment.
pub const LANES_MAX: usize = 4096;

/// Why a shipment does not get on.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ShipError {
    /// The target does not want it.
    #[error("the target refused: {0}")]
    Refused(Refusal),
    /// No connection, for now.
    #[error("{0}")]
    Connection(String),
    /// Not within the time given.
    #[error("timed out{}", .0.as_ref().map(|e| format!(": {e}")).unwrap_or_default())]
    Timeout(Option<String>),
    /// Our own spool has lost records.
    #[error("the spool can't be shipped: {0}")]
    Damaged(#[from] Damaged),
    /// Source and target do not have the same frames.
    #[error("{lane}: {what}")]
    Disagree {
        /// Where.
        lane: LaneKey,
        /// How.
        what: String,
    },
    /// The peer speaks otherwise than docs/formats/wire.md says.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// It was closed or aborted here.
    #[error("the shipment was closed")]
    Closed,
}

impl ShipError {
    /// True if trying again can't help.
    fn is_final(&self) -> bool {
        use gangway_shared::api::RefusalCode as C;
        match self {
            ShipError::Refused(r) => !matches!(
                r.code,
                C::Unknown | C::State | C::Busy | C::Resources | C::Timeout
            ),
            ShipError::Connection(_) | ShipError::Timeout(_) => false,
            ShipError::Damaged(_)
            | ShipError::Disagree { .. }
            | ShipError::Protocol(_)
            | ShipError::Closed => true,
        }
    }
}
