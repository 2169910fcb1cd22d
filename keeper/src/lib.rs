//! Keeps the vhost-user connections of VMs while their switch is restarted.
//!
//! QEMU takes the carrier from its guest when the socket of its back-end closes, and throws away what is in the guest's
//! transmit ring (ADR-0024). So the socket must not close when the switch dies: the keeper stands between the two and
//! passes messages on. It remembers what a back-end has to know ([`transcript`]), and tells it to the next run of the switch.
//! Frames do not pass through it; they lie in the guest's memory, where the next run finds them.
//!
//! ```text
//!   QEMU <--- the port's socket ---> keeper <--- keeper.dir/PORT.sock ---> switch
//! ```
//!
//! - [`message`]: what of a message concerns us (vhost-user, "Message specification")
//! - [`transcript`]: pure; what a new back-end must be told, in order
//! - [`wire`]: messages with their descriptors, over a socket
//! - [`relay`]: a port's loop
//! - [`devices`]: the sockets of network devices, which are only held
//!
//! Invariant: a message counts as part of the transcript when the switch has answered it or nobody waits for an answer. One that
//! was not answered is sent again.
//! Invariant: a switch that hangs up and lives on has refused something: then the VM's end is closed, too, as without a keeper.

pub mod devices;
pub mod message;
pub mod relay;
pub mod transcript;
pub mod wire;
