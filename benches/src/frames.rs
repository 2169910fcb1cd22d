//! The null guest's frames: what they look like, and what they differ in.

use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use crate::sys::Memory;

/// Bytes of `virtio_net_hdr` with `VERSION_1`.
pub const HEADER: usize = 12;
/// The bits of an address, read from memory as a word.
pub const MAC_BITS: u64 = (1 << 48) - 1;

/// What the frames of a sender differ in. Where they do, the guest writes into each frame that it sends, in random order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// In nothing: they are written once.
    One,
    /// So many flows between two stations: IPv4 addresses and the UDP source port.
    Flows(u32),
    /// So many pairs of stations, one flow each: the addresses of both.
    Pairs(u32),
}

/// The address of a port.
pub fn mac(port: usize) -> [u8; 6] {
    [0x52, 0x54, 0x00, 0x67, 0x77, port as u8 + 1]
}

fn mac_word(port: usize) -> u64 {
    let m = mac(port);
    u64::from_le_bytes([m[0], m[1], m[2], m[3], m[4], m[5], 0, 0])
}

/// A UDP frame of `bytes` from one port to the other, with right lengths and a right IPv4 checksum.
pub fn frame(bytes: usize, from: usize, to: usize) -> Vec<u8> {
    let mut f = vec![0u8; bytes];
    f[..6].copy_from_slice(&mac(to));
    f[6..12].copy_from_slice(&mac(from));
    f[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip_len = (bytes - 14) as u16;
    let ip = &mut f[14..34];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&ip_len.to_be_bytes());
    ip[8] = 64;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&[10, 0, 0, from as u8 + 1]);
    ip[16..20].copy_from_slice(&[10, 0, 0, to as u8 + 1]);
    let sum: u32 = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f[34..36].copy_from_slice(&1000u16.to_be_bytes());
    f[36..38].copy_from_slice(&2000u16.to_be_bytes());
    f[38..40].copy_from_slice(&(ip_len - 20).to_be_bytes());
    for (i, b) in f[42..].iter_mut().enumerate() {
        *b = i as u8;
    }
    f
}

/// Writes what is different in the next frame.
pub trait Paint: Copy {
    /// Bits of the destination that all frames to a port have in common.
    const DST_MASK: u64 = MAC_BITS;
    /// The destination, as far as they have.
    fn dst(port: usize) -> u64 {
        mac_word(port)
    }
    /// Into the buffer that starts at `at`, of a sender that is port `from`.
    fn next(&mut self, memory: &Memory, at: usize, from: usize);
    /// Sets what it writes to zero.
    fn blank(frame: &mut [u8]);
    /// How many frames of a receiver a learning switch must have seen to know all its stations.
    fn stations(&self) -> u32 {
        0
    }
    /// A receiver's frame from its station `i`.
    fn station(&self, _: &Memory, _at: usize, _from: usize, _i: u32) {}
}

/// Uniform numbers: a step of a linear congruential generator.
#[derive(Debug, Clone, Copy)]
pub struct Random {
    state: u64,
    below: u32,
}

impl Random {
    /// Numbers below this.
    pub fn below(below: u32) -> Random {
        Random { state: 1, below }
    }

    #[inline(always)]
    fn next(&mut self) -> u32 {
        let (a, c) = (6_364_136_223_846_793_005, 1_442_695_040_888_963_407);
        self.state = self.state.wrapping_mul(a).wrapping_add(c);
        (((self.state >> 32) * u64::from(self.below)) >> 32) as u32
    }
}

/// See [`Pattern::One`].
#[derive(Debug, Clone, Copy)]
pub struct Same;

impl Paint for Same {
    #[inline(always)]
    fn next(&mut self, _: &Memory, _: usize, _: usize) {}
    fn blank(_: &mut [u8]) {}
}

/// See [`Pattern::Flows`].
#[derive(Debug, Clone, Copy)]
pub struct Flows(pub Random);

impl Flows {
    /// Bytes 28 to 36 of the frame of flow `i`: the second half of the IPv4 source, the destination, the UDP source port.
    /// What one address gains the other loses, so that the checksum holds (RFC 1071: sums of ones' complement).
    #[inline(always)]
    fn word(i: u32, from: usize) -> u64 {
        let (high, port) = ((i >> 15) as u16, (i & 0x7fff) as u16 + 1024);
        let src = from as u16 + 1 + high;
        let (dst, borrow) = ((from ^ 1) as u16 + 1).overflowing_sub(high);
        let dst = dst.wrapping_sub(u16::from(borrow));
        let net = u16::from_ne_bytes([10, 0]);
        [src.to_be(), net, dst.to_be(), port.to_be()]
            .into_iter()
            .rev()
            .fold(0, |word, half| word << 16 | u64::from(half))
    }
}

impl Paint for Flows {
    #[inline(always)]
    fn next(&mut self, memory: &Memory, at: usize, from: usize) {
        let word = memory.u64(at + HEADER + 28);
        word.store(Flows::word(self.0.next(), from), Relaxed);
    }
    fn blank(frame: &mut [u8]) {
        frame[28..36].fill(0);
    }
}

/// See [`Pattern::Pairs`].
#[derive(Debug, Clone, Copy)]
pub struct Pairs(pub Random);

impl Pairs {
    /// Both addresses: 52:56, port, three bytes of the pair.
    #[inline(always)]
    fn write(memory: &Memory, at: usize, from: usize, i: u32) {
        let station = |port: usize| pair_word(port) | u64::from(i & 0xff_ffff) << 24;
        let (dst, src) = (station(from ^ 1), station(from));
        memory.u32(at + HEADER).store(dst as u32, Relaxed);
        let rest = memory.u64(at + HEADER + 4);
        rest.store(dst >> 32 | src << 16, Relaxed);
    }
}

fn pair_word(port: usize) -> u64 {
    0x5652 | (port as u64 + 1) << 16
}

impl Paint for Pairs {
    const DST_MASK: u64 = (1 << 24) - 1;
    fn dst(port: usize) -> u64 {
        pair_word(port)
    }
    #[inline(always)]
    fn next(&mut self, memory: &Memory, at: usize, from: usize) {
        Pairs::write(memory, at, from, self.0.next());
    }
    fn blank(frame: &mut [u8]) {
        frame[..12].fill(0);
    }
    fn stations(&self) -> u32 {
        self.0.below
    }
    fn station(&self, memory: &Memory, at: usize, from: usize, i: u32) {
        Pairs::write(memory, at, from, i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn painted(paint: &mut impl Paint, from: usize) -> Vec<u8> {
        let memory = Memory::new(1 << 12).unwrap();
        memory.write(HEADER, &frame(64, from, from ^ 1));
        paint.next(&memory, 0, from);
        let mut found = vec![0; 64];
        memory.read(HEADER, &mut found);
        found
    }

    fn sum(ip: &[u8]) -> u32 {
        let words = ip
            .chunks(2)
            .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
        let all: u32 = words.sum();
        (all & 0xffff) + (all >> 16)
    }

    #[test]
    fn flows_differ_and_their_checksums_hold() {
        let mut all = std::collections::HashSet::new();
        for i in (0..1 << 20).step_by(1021) {
            for from in [0, 62] {
                let memory = Memory::new(1 << 12).unwrap();
                memory.write(HEADER, &frame(64, from, from ^ 1));
                memory.u64(HEADER + 28).store(Flows::word(i, from), Relaxed);
                let mut f = vec![0; 64];
                memory.read(HEADER, &mut f);
                assert_eq!(sum(&f[14..34]), 0xffff, "{i}");
                let mut plain = frame(64, from, from ^ 1);
                assert!(all.insert(f[26..36].to_vec()), "{i} twice");
                Flows::blank(&mut f);
                Flows::blank(&mut plain);
                assert_eq!(f, plain);
            }
        }
    }

    #[test]
    fn a_pair_has_addresses_of_its_own_which_name_their_ports() {
        let mut paint = Pairs(Random::below(500_000));
        let f = painted(&mut paint, 2);
        assert_eq!(f[..3], [0x52, 0x56, 4]);
        assert_eq!(f[6..9], [0x52, 0x56, 3]);
        assert_eq!(f[3..6], f[9..12], "the same pair");
        assert_ne!(f, painted(&mut paint, 2));
        let to = u64::from_le_bytes([f[0], f[1], f[2], f[3], f[4], f[5], 0, 0]);
        assert_eq!(to & Pairs::DST_MASK, Pairs::dst(3));
        assert_eq!(f[12..], frame(64, 2, 3)[12..]);
    }

    #[test]
    fn one_pattern_leaves_the_frame_alone() {
        assert_eq!(painted(&mut Same, 0), frame(64, 0, 1));
    }
}
