//! Copies of frames: short ones from and to private heads, long ones from guest to guest, by whole cache lines.
//!
//! What is copied from or to may be guest memory, which its guest writes meanwhile: it gets bytes of its own in an order of its
//! own. Source and destination may even be the same memory, if a guest gives us that; all copies here are defined for it.
#![allow(unsafe_code)]

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Copies `N` bytes: all loads come before the first store.
///
/// # Safety
/// `from` is readable and `to` writable for `N` bytes.
#[inline(always)]
unsafe fn fixed<const N: usize>(from: *const u8, to: *mut u8) {
    // SAFETY: by the contract.
    unsafe { std::ptr::copy(from, to, N) }
}

/// Copies the last `N` of `len` bytes.
///
/// # Safety
/// As for [`copy_short`]; `len` is `N` or more.
#[inline(always)]
unsafe fn last<const N: usize>(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the contract.
    unsafe { fixed::<N>(from.add(len - N), to.add(len - N)) }
}

/// Copies what is left behind whole lines, `len` being all that was to be copied, at least a line: in one piece, which may
/// overlap what was copied already.
///
/// # Safety
/// As for [`copy_short`]; `len` is [`LINE`] or more.
#[inline(always)]
unsafe fn tail(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the contract.
    unsafe {
        match len % LINE {
            0 => {}
            1..=16 => last::<16>(from, to, len),
            17..=32 => last::<32>(from, to, len),
            _ => last::<64>(from, to, len),
        }
    }
}

/// Copies `len` bytes, mostly 60 to 192.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes.
#[inline(always)]
pub unsafe fn copy_short(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: all parts lie within `len` bytes in each case.
    unsafe {
        match len {
            64..=192 => {
                fixed::<64>(from, to);
                if len >= 128 {
                    fixed::<64>(from.add(64), to.add(64));
                }
                if len == 192 {
                    fixed::<64>(from.add(128), to.add(128));
                }
                tail(from, to, len);
            }
            32..64 => {
                fixed::<32>(from, to);
                last::<32>(from, to, len);
            }
            _ => std::ptr::copy(from, to, len),
        }
    }
}

/// Copies `len` bytes, mostly hundreds: a line by one store where the caller is compiled for that.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes.
#[inline(always)]
pub unsafe fn copy_long(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: all parts lie within `len` bytes in each case.
    unsafe {
        if len < LINE {
            return copy_short(from, to, len);
        }
        let mut at = 0;
        while at + LINE <= len {
            fixed::<64>(from.add(at), to.add(at));
            at += LINE;
        }
        tail(from, to, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_whole_and_touch_nothing_else() {
        let from: Vec<u8> = (0..4096u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for len in (0..=400).chain([1382, 1398, 1500, 4000]) {
            for copy in [copy_short, copy_long] {
                let mut to = vec![0xee; 4096 + 2];
                // SAFETY: both are long enough.
                unsafe { copy(from.as_ptr(), to.as_mut_ptr().add(1), len) };
                assert_eq!(to[1..=len], from[..len], "{len}");
                assert!(to[0] == 0xee && to[len + 1..].iter().all(|b| *b == 0xee));
            }
        }
    }
}
