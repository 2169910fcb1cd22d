//! Unsafe island: the checksum of batches (docs/formats/spool.md, "Checksum"): four CRC-32C side by side, so that a processor
//! with an instruction for it is never held up by the one before.
#![allow(unsafe_code)]

/// Bytes that are summed at once.
const WORD: usize = 8;
/// How many sums run side by side.
const STRIPES: usize = 4;

/// CRC-32C (Castagnoli, as in iSCSI), for headers and names.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The striped checksum of whole words; bytes behind the last whole one do not count.
#[inline]
pub fn striped(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { striped_sse42(bytes) };
    }
    striped_plain(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn striped_sse42(bytes: &[u8]) -> u32 {
    use std::arch::x86_64::_mm_crc32_u64;
    let mut c = [u64::from(u32::MAX); STRIPES];
    let (words, _) = bytes.as_chunks::<WORD>();
    let (rows, last) = words.as_chunks::<STRIPES>();
    for row in rows {
        for (c, w) in c.iter_mut().zip(row) {
            *c = _mm_crc32_u64(*c, u64::from_le_bytes(*w));
        }
    }
    for (c, w) in c.iter_mut().zip(last) {
        *c = _mm_crc32_u64(*c, u64::from_le_bytes(*w));
    }
    let [a, b, c, d] = c.map(|c| u64::from(!(c as u32)));
    let all = _mm_crc32_u64(u64::from(u32::MAX), a | b << 32);
    !(_mm_crc32_u64(all, c | d << 32) as u32)
}

/// The same, for processors without the instruction.
fn striped_plain(bytes: &[u8]) -> u32 {
    let mut c = [u32::MAX; STRIPES];
    for (n, w) in bytes.as_chunks::<WORD>().0.iter().enumerate() {
        let c = &mut c[n % STRIPES];
        *c = w.iter().fold(*c, |c, b| step(c, *b));
    }
    let ends = c.iter().flat_map(|c| (!c).to_le_bytes());
    !ends.fold(u32::MAX, step)
}

fn step(c: u32, byte: u8) -> u32 {
    (c >> 8) ^ TABLE[usize::from(c as u8 ^ byte)]
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut c = n as u32;
        let mut bit = 0;
        while bit < 8 {
            c = (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg());
            bit += 1;
        }
        table[n] = c;
        n += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// From the document's words.
    fn slow(bytes: &[u8]) -> u32 {
        let mut parts = [const { Vec::new() }; 4];
        for (n, w) in bytes.chunks_exact(8).enumerate() {
            parts[n % 4].extend_from_slice(w);
        }
        let ends: Vec<u8> = parts.iter().flat_map(|p| crc32c(p).to_le_bytes()).collect();
        crc32c(&ends)
    }

    #[test]
    fn both_ways_are_what_the_document_says() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let bytes: Vec<u8> = (0..1000_u32).map(|n| ((n * n) >> 3) as u8).collect();
        for len in (0..bytes.len()).step_by(8) {
            let b = &bytes[..len];
            assert_eq!(striped(b), slow(b), "{len} bytes");
            assert_eq!(striped_plain(b), slow(b), "{len} bytes");
        }
    }

    #[test]
    fn each_flipped_bit_changes_it() {
        let mut bytes = [7; 200];
        let was = striped(&bytes);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(striped(&bytes), was, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
