//! The Internet checksum (RFC 1071), for receivers without offloads.

/// Completes the partial checksum of `frame`: the field at `start + offset` holds the pseudo header's sum (virtio 1.2,
/// 5.1.6.2). False if it lies outside.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let field = start + offset;
    if field + 2 > frame.len() {
        return false;
    }
    let sum = written(!sum(&frame[start..]));
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// A checksum as it is written. A zero would mean "no checksum" in UDP; the other form of zero is right for all (RFC 768).
pub fn written(sum: u16) -> u16 {
    match sum {
        0 => 0xffff,
        s => s,
    }
}

/// The sum of two sums.
pub fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}

/// The folded ones' complement sum.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut chunks = bytes.chunks_exact(4);
    let mut acc: u64 = 0;
    for c in &mut chunks {
        acc += u64::from(u32::from_be_bytes([c[0], c[1], c[2], c[3]]));
    }
    let mut last = [0; 4];
    let tail = chunks.remainder();
    last[..tail.len()].copy_from_slice(tail);
    acc += u64::from(u32::from_be_bytes(last));
    while acc > 0xffff {
        acc = (acc & 0xffff) + (acc >> 16);
    }
    acc as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_as_rfc_1071_shows() {
        assert_eq!(
            sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
        assert_eq!(sum(&[0x12]), 0x1200);
    }

    #[test]
    fn a_completed_checksum_verifies() {
        for len in [20usize, 21, 22, 23, 1000] {
            let mut f: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            // The pseudo header's sum stands in the field.
            let pseudo = 0x1234u16;
            f[10..12].copy_from_slice(&pseudo.to_be_bytes());
            assert!(complete(&mut f, 4, 6));
            let all = u32::from(sum(&f[4..])) + u32::from(pseudo);
            assert_eq!((all & 0xffff) + (all >> 16), 0xffff);
        }
        assert!(!complete(&mut [0; 10], 4, 5));
    }
}
