//! What we offer to a guest and to QEMU, and what the bits they accept mean for the ring loops.

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::{virtio_config, virtio_net, virtio_ring};

use crate::port::offload::Offloads;

/// `VHOST_F_LOG_ALL`: mark dirty pages (vhost-user, "Migration").
pub const LOG_ALL: u64 = 1 << 26;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_RING_PACKED` (virtio 1.2, 2.8).
pub const RING_PACKED: u64 = 1 << virtio_config::VIRTIO_F_RING_PACKED;
/// We give buffers back in the order in which they came, always.
const IN_ORDER: u64 = 1 << virtio_config::VIRTIO_F_IN_ORDER;
const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
const INDIRECT: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
const MRG_RXBUF: u64 = 1 << virtio_net::VIRTIO_NET_F_MRG_RXBUF;
const CSUM: u64 = 1 << virtio_net::VIRTIO_NET_F_CSUM;
const HOST_TSO4: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO4;
const HOST_TSO6: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO6;
const HOST_ECN: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_ECN;
const GUEST_CSUM: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_CSUM;
const GUEST_TSO4: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO4;
const GUEST_TSO6: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO6;
const GUEST_ECN: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_ECN;
const GUEST_USO4: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_USO4;
const GUEST_USO6: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_USO6;
const HOST_USO: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_USO;
/// `VIRTIO_NET_F_MQ`: several queue pairs (virtio 1.2, 5.1.6.5.5).
pub const MQ: u64 = 1 << virtio_net::VIRTIO_NET_F_MQ;
// The guest announces itself after a migration; QEMU handles the announcement itself, but masks the bit with ours.
const GUEST_ANNOUNCE: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;

/// The virtio features of a port. QEMU 7.2 passes through what is not in its list for vhost-user (CTRL_VQ, MAC, STATUS
/// and other things that it does itself).
pub const OFFERED: u64 = VERSION_1
    | RING_PACKED
    | IN_ORDER
    | INDIRECT
    | EVENT_IDX
    | MRG_RXBUF
    | CSUM
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | GUEST_USO4
    | GUEST_USO6
    | HOST_USO
    | GUEST_ANNOUNCE
    | MQ
    | LOG_ALL
    | PROTOCOL_FEATURES;

/// The protocol features of a port: only what the `vhost` crate dispatches and [`super::session`] answers.
pub fn protocol() -> Protocol {
    Protocol::MQ | Protocol::LOG_SHMFD | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS
}

/// What the accepted features mean for the rings of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingFeatures {
    /// Bytes of `virtio_net_hdr` before each frame (virtio 1.2, 5.1.6.1).
    pub hdr_len: u8,
    /// A frame may span several buffers of the guest's receive ring.
    pub mrg: bool,
    /// Indirect descriptor tables.
    pub indirect: bool,
    /// `used_event` and `avail_event`.
    pub event_idx: bool,
    /// What the guest may ask of us (its transmit ring).
    pub host: Offloads,
    /// What the guest takes from us (its receive ring).
    pub guest: Offloads,
}

impl RingFeatures {
    /// Of `SET_FEATURES`.
    pub fn new(bits: u64) -> RingFeatures {
        let has = |f| bits & f != 0;
        let mrg = has(MRG_RXBUF);
        RingFeatures {
            hdr_len: if mrg || has(VERSION_1) { 12 } else { 10 },
            mrg,
            indirect: has(INDIRECT),
            event_idx: has(EVENT_IDX),
            host: Offloads {
                csum: has(CSUM),
                tso4: has(HOST_TSO4),
                tso6: has(HOST_TSO6),
                ecn: has(HOST_ECN),
                uso4: has(HOST_USO),
                uso6: has(HOST_USO),
            },
            guest: Offloads {
                csum: has(GUEST_CSUM),
                tso4: has(GUEST_TSO4),
                tso6: has(GUEST_TSO6),
                ecn: has(GUEST_ECN),
                uso4: has(GUEST_USO4),
                uso6: has(GUEST_USO6),
            },
        }
    }
}
