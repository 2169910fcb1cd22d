//! A vhost-user message, as far as it concerns us (<https://qemu-project.gitlab.io/qemu/interop/vhost-user.html>,
//! "Message specification" and "Front-end message types").

/// Bytes of a header: request, flags, size, each an u32 of the machine.
pub const HEADER: usize = 12;
/// The longest body that we pass on, in bytes: the longest of the specification has 4 KiB.
pub const BODY_MAX: usize = 4096;
/// Descriptors of a message at most: one per region of a memory table, and there are eight of those.
pub const FDS_MAX: usize = 8;

const VERSION_BITS: u32 = 0b11;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_PROTOCOL_F_LOG_SHMFD`, `VHOST_USER_PROTOCOL_F_REPLY_ACK`.
const LOG_SHMFD: u64 = 1 << 1;
const REPLY_ACK: u64 = 1 << 3;

/// The requests that we know.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const GET_STATUS: u32 = 40;
    pub const GET_SHARED_OBJECT: u32 = 41;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}
use request::*;

/// A message and its descriptors (`F`; in tests anything).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message<F> {
    /// See [`request`].
    pub request: u32,
    /// As they came: version, whether it is a reply, whether one is wanted.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What came with it.
    pub fds: Vec<F>,
}

/// Not a message of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Another version than 1.
    #[error("a vhost-user message of version {0}, not 1")]
    Version(u32),
    /// A body of more than [`BODY_MAX`].
    #[error("a vhost-user message of {0} bytes, {BODY_MAX} at most")]
    Long(usize),
}

/// Request, flags and body bytes of a header.
///
/// # Errors
/// If it is none that we pass on.
pub fn header(bytes: [u8; HEADER]) -> Result<(u32, u32, usize), Malformed> {
    let [request, flags, size] = [0, 1, 2].map(|i| word(&bytes, i).unwrap_or_default());
    if flags & VERSION_BITS != VERSION {
        return Err(Malformed::Version(flags & VERSION_BITS));
    }
    let size = size as usize;
    match size > BODY_MAX {
        true => Err(Malformed::Long(size)),
        false => Ok((request, flags, size)),
    }
}

fn word(bytes: &[u8], i: usize) -> Option<u32> {
    let word = bytes.get(4 * i..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

impl<F> Message<F> {
    /// Header and body, as they go over the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let words = [self.request, self.flags, self.body.len() as u32];
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend(&self.body);
        bytes
    }

    /// The `i`th u32 of the body.
    pub fn word(&self, i: usize) -> Option<u32> {
        word(&self.body, i)
    }

    /// The first u64 of the body.
    pub fn long(&self) -> Option<u64> {
        self.body.first_chunk().map(|b| u64::from_ne_bytes(*b))
    }

    /// It answers one.
    pub fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }

    /// Whether the back-end answers it, with these protocol features.
    pub fn is_answered(&self, protocol: u64) -> bool {
        match self.request {
            GET_FEATURES
            | GET_VRING_BASE
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_CONFIG
            | GET_INFLIGHT_FD
            | GET_MAX_MEM_SLOTS
            | GET_STATUS
            | GET_SHARED_OBJECT
            | SET_DEVICE_STATE_FD
            | CHECK_DEVICE_STATE => true,
            SET_LOG_BASE if protocol & LOG_SHMFD != 0 => true,
            _ => self.flags & NEED_REPLY != 0 && protocol & REPLY_ACK != 0,
        }
    }

    /// Whether an answer to this request says that it was done: what is only acknowledged says 0 then.
    pub fn was_done(&self, answer: &Message<F>) -> bool {
        match self.request {
            GET_FEATURES
            | GET_VRING_BASE
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_MAX_MEM_SLOTS
            | SET_LOG_BASE => true,
            _ => answer.long() == Some(0),
        }
    }
}
