//! TAP devices, in two roles.
//!
//! *Endpoint* ([`open_endpoint`]): the switch holds the character device, and the network side belongs to the host or a
//! container. *VM* ([`VmTap`]): QEMU holds the character device, and the switch sits on the network side by packet
//! sockets, so that checksum and segmentation requests survive.
//!
//! Invariant: no frame is lost silently in a TAP's queue: what does not fit is refused before it is accepted.

mod endpoint;
mod reader;
mod taken;
mod tx;
mod vm;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_qemu;

pub use endpoint::{Endpoint, open_endpoint, open_endpoint_queues};
pub use taken::{Back, Whole};
pub use vm::{TapError, VmTap};
