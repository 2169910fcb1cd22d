//! The log of dirty pages that a front-end gives us for a live migration (vhost-user, "Migration"): one bit per 4 KiB
//! page of guest memory, shared with the front-end, which reads and clears it while we set bits.
//!
//! Invariant: a page is marked *after* it was written. The front-end clears the bit first and copies the page then,
//! so a mark before the write could be cleared with the old content being copied.
//! Invariant: a mark is a read-modify-write even when the bit seems set: a plain load could pass the write before it
//! (x86 lets loads pass stores), and miss that the front-end has cleared the bit meanwhile.
#![allow(unsafe_code)]

use std::fs::File;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::mem::guest::{GuestMemError, Mapping};

/// `VHOST_LOG_PAGE`, as a shift.
const PAGE_SHIFT: u32 = 12;

/// A mapped log.
#[derive(Debug)]
pub struct DirtyLog {
    map: Mapping,
    bytes: u64,
}

// SAFETY: the log is only touched through atomic operations on its bytes.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Of `SET_LOG_BASE`.
    pub fn new(file: &File, offset: u64, bytes: u64) -> Result<DirtyLog, GuestMemError> {
        Ok(DirtyLog {
            map: Mapping::new(file, offset, bytes)?,
            bytes,
        })
    }

    /// Marks the pages of `len` bytes that were just written at `gpa`. False if the log does not cover them all.
    #[must_use]
    pub fn mark(&self, gpa: u64, len: u64) -> bool {
        if len == 0 {
            return true;
        }
        let Some(last) = gpa.checked_add(len - 1) else {
            return false;
        };
        let (mut page, last) = (gpa >> PAGE_SHIFT, last >> PAGE_SHIFT);
        if last / 8 >= self.bytes {
            return false;
        }
        while page <= last {
            // SAFETY: `page / 8 <= last / 8 < bytes`, all of which are mapped; a byte is always aligned; both sides
            // of the log use atomic operations.
            let byte = unsafe {
                &*self
                    .map
                    .base()
                    .as_ptr()
                    .add((page / 8) as usize)
                    .cast::<AtomicU8>()
            };
            let byte_last = page | 7;
            let mut bits = 0;
            while page <= byte_last.min(last) {
                bits |= 1 << (page % 8);
                page += 1;
            }
            // AcqRel: the writes to the page come before, for a front-end that takes the bit with an atomic exchange.
            byte.fetch_or(bits, Ordering::AcqRel);
        }
        true
    }

    /// Some of it is [`crate::mem::lost`].
    pub fn is_lost(&self) -> bool {
        self.map.is_lost()
    }

    /// Bytes of the log.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn marks_exactly_the_pages_touched() {
        let f = tempfile::tempfile().unwrap();
        f.set_len(8192).unwrap();
        let log = DirtyLog::new(&f, 4096, 16).unwrap();
        assert!(log.mark(0x1000, 1));
        assert!(log.mark(0x6fff, 0x2002));
        assert!(log.mark(0x7f000, 0x1000));
        assert!(log.mark(0x3000, 0));
        let mut bytes = [0; 17];
        f.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(bytes[0], 1 << 1 | 1 << 6 | 1 << 7);
        assert_eq!(bytes[1], 0b11);
        assert_eq!(bytes[15], 0x80);
        assert_eq!(bytes[16], 0);
    }

    #[test]
    fn what_it_does_not_cover_is_said() {
        let f = tempfile::tempfile().unwrap();
        f.set_len(4096).unwrap();
        let log = DirtyLog::new(&f, 0, 1).unwrap();
        assert!(!log.mark(0x8000, 1));
        assert!(!log.mark(0x7fff, 2));
        assert!(!log.mark(u64::MAX, 2));
        assert!(log.mark(0x7fff, 1));
        assert!(DirtyLog::new(&f, 0, 4097).is_err());
    }
}
