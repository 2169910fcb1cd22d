//! The driver's side of a virtqueue whose buffers are one descriptor each, written once. Buffer `i` starts in slot `i`
//! and stays there while the device gives buffers back in order; the drivers do cope with a device that does not.
//!
//! Event index is off; the driver wants no interrupts, and kicks only when the device asks for it.
//!
//! Invariant: a position that is taken back frees its slot for the buffer that came back there; [`Ring::publish`] hands
//! the next slots out again, in order.

use std::sync::Arc;

use crate::sys::Memory;

pub mod packed;
pub mod split;

/// Which layout.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// virtio 1.2, 2.7.
    Split,
    /// virtio 1.2, 2.8.
    Packed,
}

/// A queue's place in guest memory.
#[derive(Debug, Clone)]
pub struct Place {
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// Where the three areas start, as offsets into the memory.
    pub areas: [usize; 3],
    /// Entries, a power of two.
    pub num: u16,
    /// Where buffer 0 starts.
    pub buffers: usize,
    /// From one buffer to the next.
    pub stride: usize,
    /// What a descriptor says about a buffer's length.
    pub len: u32,
    /// The device writes (the guest's receive ring).
    pub device_writes: bool,
}

/// The guest physical address of offset 0.
pub const GPA: u64 = 1 << 30;

impl Place {
    /// The bytes of the three areas; enough for both layouts.
    pub fn area_bytes(num: u16) -> [usize; 3] {
        let num = usize::from(num);
        [16 * num, 6 + 2 * num, 6 + 8 * num]
    }

    /// Where a buffer starts.
    #[inline(always)]
    pub fn buffer(&self, i: u16) -> usize {
        self.buffers + usize::from(i) * self.stride
    }
}

/// What the benchmark needs of a layout.
pub trait Ring {
    /// Which one it is.
    const LAYOUT: Layout;
    /// Writes all descriptors; the device sees none of them yet.
    fn new(place: Place) -> Self;
    /// Takes back what the device has used, if it is `least` at least (a layout may
    /// leave what is behind them for the next call); calls `each` with buffer and length.
    fn reap(&mut self, least: u16, each: impl FnMut(u16, u32)) -> u16;
    /// Hands the next `n` slots to the device. They must be free.
    fn publish(&mut self, n: u16);
    /// The buffer in the slot that is handed out next, `ahead` slots further on.
    fn next_buffer(&self, ahead: u16) -> u16;
    /// Whether the device wants a kick, after a publish.
    fn wants_kick(&self) -> bool;
    /// Whether the device has used all that it has: it may have waited for us.
    fn is_drained(&self) -> bool;
    /// Buffers that the device has.
    fn outstanding(&self) -> u16;
    /// Where it lies.
    fn place(&self) -> &Place;
}

#[cfg(test)]
mod tests;
