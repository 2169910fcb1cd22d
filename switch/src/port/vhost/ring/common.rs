//! What both layouts do alike: read a descriptor once, and find the memory of a buffer.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::AtomicU16;

use super::{Broken, Piece, Pieces};
use crate::mem::guest::GuestMem;

/// Bytes of a descriptor, of either layout (virtio 1.2, 2.7.5 and 2.8.13).
pub const DESC_BYTES: u32 = 16;

/// The two words of descriptor `i` of a table, each read once: the driver may write meanwhile.
///
/// # Safety
/// `table` is mapped for `16 * (i + 1)` bytes.
#[inline(always)]
pub unsafe fn words(table: NonNull<u8>, i: u32) -> [u64; 2] {
    // SAFETY: within the table by the contract of this function.
    let at = unsafe { table.as_ptr().add((i * DESC_BYTES) as usize) };
    if at.cast::<u64>().is_aligned() {
        let at = at.cast::<u64>();
        // SAFETY: aligned, within the table.
        let both = unsafe { [at.read_volatile(), at.add(1).read_volatile()] };
        both.map(u64::from_le)
    } else {
        // Only an indirect table can be that odd.
        let mut b = [0u8; DESC_BYTES as usize];
        for (k, b) in b.iter_mut().enumerate() {
            // SAFETY: within the table.
            *b = unsafe { at.add(k).read_volatile() };
        }
        let both = u128::from_le_bytes(b);
        [both as u64, (both >> 64) as u64]
    }
}

/// The same of a ring's own table, which is aligned.
///
/// # Safety
/// As for [`words`]; `table` is aligned to 8.
#[inline(always)]
pub unsafe fn words_aligned(table: NonNull<u8>, i: u32) -> [u64; 2] {
    // SAFETY: within the table by the contract of this function, and aligned.
    unsafe {
        let at = table.as_ptr().add((i * DESC_BYTES) as usize).cast::<u64>();
        [at.read_volatile(), at.add(1).read_volatile()].map(u64::from_le)
    }
}

/// Appends the pieces of a buffer. `region` is the caller's memory of the last hit.
#[inline]
pub fn buffer(
    mem: &GuestMem,
    region: &mut usize,
    mut gpa: u64,
    mut len: u32,
    pieces: &mut Pieces,
) -> Result<(), Broken> {
    if len == 0 {
        return pieces.push_empty();
    }
    while len > 0 {
        let host = mem.at(region, gpa, len).ok_or(Broken::Address(gpa))?;
        pieces.push(Piece { host, gpa })?;
        // No wrap: the region ends below 2^64.
        gpa += u64::from(host.len);
        len -= host.len;
    }
    Ok(())
}

/// # Safety
/// `base + offset` is mapped and aligned to 2 as long as the result lives.
#[inline]
pub unsafe fn atomic<'a>(base: NonNull<u8>, offset: usize) -> &'a AtomicU16 {
    // SAFETY: by the contract of this function; the driver uses atomic-sized accesses too.
    unsafe { &*base.as_ptr().add(offset).cast::<AtomicU16>() }
}
