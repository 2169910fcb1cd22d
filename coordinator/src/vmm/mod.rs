//! Drivers of virtual machine monitors.

pub mod qemu;
pub mod qmp;
