//! Unsafe island: arrays of zeros that take memory where they are touched, and no other.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64};

use memmap2::{Advice, MmapOptions, MmapRaw};

/// What the kernel calls a huge page, on all machines that we know.
const HUGE: usize = 2 << 20;

/// A type of which all zeros are a value.
///
/// # Safety
/// All zeros are a value, nothing is to be dropped, and a page is enough for its alignment.
pub unsafe trait Zero {}

// SAFETY: an integer.
unsafe impl Zero for AtomicU32 {}
// SAFETY: an integer.
unsafe impl Zero for AtomicU64 {}
// SAFETY: integers; `Cell` has the layout of what is in it.
unsafe impl<const N: usize> Zero for Cell<[u32; N]> {}
// SAFETY: as each of its elements.
unsafe impl<T: Zero, const N: usize> Zero for [T; N] {}
// SAFETY: as what is in it; 64 bytes are less than a page.
unsafe impl<T: Zero> Zero for Line<T> {}

/// Starts on a cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Line<T>(pub T);

/// An array that is all zeros at first.
#[derive(Debug)]
pub struct Zeros<T> {
    map: MmapRaw,
    /// Bytes of the mapping before it.
    skip: usize,
    len: usize,
    _elements: PhantomData<T>,
}

impl<T: Zero> Zeros<T> {
    /// Of so many elements.
    pub fn new(len: usize) -> io::Result<Zeros<T>> {
        Zeros::map(len, 0)
    }

    /// Of so many elements, in huge pages if the kernel has some: for what is read all over.
    pub fn huge(len: usize) -> io::Result<Zeros<T>> {
        let mut zeros = Zeros::map(len, HUGE)?;
        zeros.skip = zeros.map.as_ptr().align_offset(HUGE);
        // Without such pages in the kernel there is no such advice; then small ones do.
        let _ = zeros.map.advise(Advice::HugePage);
        Ok(zeros)
    }

    fn map(len: usize, spare: usize) -> io::Result<Zeros<T>> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_add(spare))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // The kernel maps no less than a byte.
        let map = MmapOptions::new().len(bytes.max(1)).map_anon()?;
        Ok(Zeros {
            map: map.into(),
            skip: 0,
            len,
            _elements: PhantomData,
        })
    }
}

impl<T: Zero> Deref for Zeros<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `skip + len * size_of::<T>()` bytes are in the mapping (`skip < HUGE`, which `huge` has spare), which is
        // private, ours alone, readable and writable, and lives as long as `self`; its start and `skip` are multiples of a
        // page. It held zeros, a value of `T`, and has been changed through `&T` only. Two threads have it only if `T` is
        // `Sync`, since `Zeros<T>` is, as its `PhantomData<T>`, no more than `T`.
        unsafe {
            let first = self.map.as_ptr().add(self.skip).cast::<T>();
            std::slice::from_raw_parts(first, self.len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn zeros_are_aligned_and_hold_what_is_put_there() {
        for n in [0, 1, 100_000] {
            let small: Zeros<Line<[AtomicU64; 8]>> = Zeros::new(n).unwrap();
            let huge: Zeros<Line<[AtomicU64; 8]>> = Zeros::huge(n).unwrap();
            assert_eq!(huge.as_ptr().align_offset(HUGE), 0);
            for zeros in [small, huge] {
                assert_eq!(zeros.len(), n);
                assert!(
                    zeros
                        .iter()
                        .all(|l| l.0.iter().all(|w| w.load(Relaxed) == 0))
                );
                for (i, l) in zeros.iter().enumerate() {
                    l.0[i % 8].store(i as u64, Relaxed);
                }
                let sum: u64 = zeros
                    .iter()
                    .flat_map(|l| &l.0)
                    .map(|w| w.load(Relaxed))
                    .sum();
                assert_eq!(sum, (0..n as u64).sum::<u64>());
            }
        }
        assert!(Zeros::<AtomicU64>::new(usize::MAX).is_err());
    }
}
