//! Flows: what the look-ups have said about frames like this one, and how many there were. One table per worker.
//!
//! A flow is the receiving port, both addresses, the type, and a digest of the addresses and ports behind them (IPv4,
//! IPv6). An entry is one cache line, holds good for one second of one generation of the FDB, and is then looked up
//! again: ageing, moved stations and refreshed entries need nothing else. Frames that share a digest by chance share
//! counters; where they go is decided by the addresses themselves.
//!
//! Invariant: bounded work for any input: two lines per look-up, chosen by a seeded hash; the line seen longest ago
//! gives way.

use super::stats::add;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Behind the Ethernet header of IPv4 without options: what a digest is made of.
const V4: usize = 14 + 20 + 4;
/// The same of IPv6.
const V6: usize = 14 + 40 + 4;

/// What is equal for the frames of a flow, but for the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The destination and the start of the source.
    dst: u64,
    /// The source and the type.
    src: u64,
    /// Of what is behind.
    digest: u64,
    /// Of all of it.
    hash: u64,
}

impl Key {
    /// Of the whole key, seeded.
    #[inline]
    pub fn hash(&self) -> u64 {
        self.hash
    }
}

/// One flow. Written by its worker alone; control may read.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Flow {
    dst: AtomicU64,
    src: AtomicU64,
    digest: AtomicU64,
    /// Bits 0 to 15 receiving port + 1, bits 16 to 31 the port it goes to, bits 32 to 63 bytes of headers.
    ports: AtomicU64,
    generation: AtomicU32,
    seen_s: AtomicU32,
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Flow {
    fn is(&self, key: &Key, from: usize) -> bool {
        self.dst.load(Relaxed) == key.dst
            && self.src.load(Relaxed) == key.src
            && self.digest.load(Relaxed) == key.digest
            && self.ports.load(Relaxed) as u16 == from as u16 + 1
    }

    /// The port that its frames go to.
    #[inline]
    pub fn to(&self) -> usize {
        usize::from((self.ports.load(Relaxed) >> 16) as u16)
    }

    /// Bytes of headers of a frame, as of the one that was looked at.
    #[inline]
    pub fn overhead(&self) -> u32 {
        (self.ports.load(Relaxed) >> 32) as u32
    }

    /// Counts frames with their bytes in all.
    #[inline]
    pub fn count(&self, frames: u64, bytes: u64) {
        add(&self.frames, frames);
        add(&self.bytes, bytes);
    }

    /// Frames and bytes so far.
    pub fn counted(&self) -> (u64, u64) {
        (self.frames.load(Relaxed), self.bytes.load(Relaxed))
    }
}

/// See the module.
pub struct Flows {
    entries: Box<[Flow]>,
    mask: usize,
    seeds: [u64; 3],
}

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a).wrapping_mul(u128::from(b));
    wide as u64 ^ (wide >> 64) as u64
}

#[inline(always)]
fn word(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

#[inline(always)]
fn half(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, |b| u64::from(u32::from_le_bytes(b)))
}

impl Flows {
    /// Room for `capacity` flows, at least two.
    pub fn new(capacity: usize) -> Flows {
        use std::hash::{BuildHasher, RandomState};
        let n = capacity.max(2).next_power_of_two();
        let random = RandomState::new();
        // Odd, so that no seed takes a word's bits away.
        let seed = |i: u64| random.hash_one(i) | 1;
        Flows {
            entries: (0..n).map(|_| Flow::default()).collect(),
            mask: n - 1,
            seeds: [seed(0), seed(1), seed(2)],
        }
    }

    /// The key of a frame of at least 14 bytes, from its head.
    #[inline]
    pub fn key(&self, head: &[u8]) -> Key {
        let (dst, src) = (word(head, 0), word(head, 6));
        let kind = (src >> 48) as u16;
        let digest = if kind == 0x0800u16.to_be() && head.len() >= V4 {
            let later_fragment = head[20] & 0x1f | head[21] != 0;
            let ports = if later_fragment { 0 } else { half(head, 34) };
            let rest = ports << 8 | u64::from(head[23]);
            fold(word(head, 26) ^ self.seeds[0], rest ^ self.seeds[1])
        } else if kind == 0x86ddu16.to_be() && head.len() >= V6 {
            let a = fold(
                word(head, 22) ^ self.seeds[0],
                word(head, 30) ^ self.seeds[1],
            );
            let b = fold(
                word(head, 38) ^ self.seeds[1],
                word(head, 46) ^ self.seeds[2],
            );
            fold(a ^ half(head, 54), b ^ u64::from(head[20]) << 32)
        } else {
            0
        };
        let both = fold(dst ^ self.seeds[0], src ^ self.seeds[1]);
        Key {
            dst,
            src,
            digest,
            hash: fold(both ^ digest, self.seeds[2]),
        }
    }

    #[inline]
    fn ways(&self, key: &Key, from: usize) -> [usize; 2] {
        let at = (key.hash as usize).wrapping_add(from.wrapping_mul(0x9e37)) & self.mask;
        [at, at ^ 1]
    }

    /// Asks for the line that a look-up will want.
    #[inline]
    pub fn prefetch(&self, key: &Key, from: usize) {
        crate::mem::prefetch(std::ptr::from_ref(&self.entries[self.ways(key, from)[0]]).cast());
    }

    /// The flow, if what was found out about it still holds.
    #[inline]
    pub fn find(&self, key: &Key, from: usize, generation: u32, now_s: u32) -> Option<&Flow> {
        let ways = self.ways(key, from);
        let flow = ways
            .into_iter()
            .map(|at| &self.entries[at])
            .find(|f| f.is(key, from))?;
        (flow.generation.load(Relaxed) == generation && flow.seen_s.load(Relaxed) == now_s)
            .then_some(flow)
    }

    /// Notes where a flow goes. Its counters go on if it was known, and start again in a line that another one had.
    pub fn note(
        &self,
        key: &Key,
        from: usize,
        to: usize,
        overhead: u32,
        generation: u32,
        now_s: u32,
    ) -> &Flow {
        let [a, b] = self.ways(key, from).map(|at| &self.entries[at]);
        let age = |f: &Flow| match f.ports.load(Relaxed) {
            0 => u32::MAX,
            _ => now_s.wrapping_sub(f.seen_s.load(Relaxed)),
        };
        let known = [a, b].into_iter().find(|f| f.is(key, from));
        let flow = known.unwrap_or(if age(a) >= age(b) { a } else { b });
        if known.is_none() {
            flow.dst.store(key.dst, Relaxed);
            flow.src.store(key.src, Relaxed);
            flow.digest.store(key.digest, Relaxed);
            flow.frames.store(0, Relaxed);
            flow.bytes.store(0, Relaxed);
        }
        let ports = (from as u64 + 1) & 0xffff | (to as u64 & 0xffff) << 16;
        flow.ports.store(ports | u64::from(overhead) << 32, Relaxed);
        flow.generation.store(generation, Relaxed);
        flow.seen_s.store(now_s, Relaxed);
        flow
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn udp4(dst: u8, src: u8, port: u16) -> Vec<u8> {
        let mut f = vec![0; 60];
        (f[5], f[11]) = (dst, src);
        f[12..14].copy_from_slice(&[8, 0]);
        f[14] = 0x45;
        f[23] = 17;
        f[26..34].copy_from_slice(&[10, 0, 0, src, 10, 0, 0, dst]);
        f[36..38].copy_from_slice(&port.to_be_bytes());
        f
    }

    #[test]
    fn a_flow_is_found_for_its_second_and_generation_only() {
        let t = Flows::new(64);
        let k = t.key(&udp4(1, 2, 3));
        assert!(t.find(&k, 0, 1, 5).is_none());
        t.note(&k, 0, 7, 42, 1, 5).count(1, 60);
        let f = t.find(&k, 0, 1, 5).unwrap();
        assert_eq!((f.to(), f.overhead(), f.counted()), (7, 42, (1, 60)));
        assert!(t.find(&k, 1, 1, 5).is_none(), "another port");
        assert!(t.find(&k, 0, 2, 5).is_none(), "the FDB has changed");
        assert!(t.find(&k, 0, 1, 6).is_none(), "a second later");
        t.note(&k, 0, 8, 42, 2, 6).count(1, 60);
        assert_eq!(t.find(&k, 0, 2, 6).unwrap().counted(), (2, 120));
        assert!(t.find(&t.key(&udp4(1, 2, 4)), 0, 2, 6).is_none());
    }

    #[test]
    fn fragments_of_a_datagram_are_one_flow() {
        let t = Flows::new(64);
        let mut a = udp4(1, 2, 3);
        let mut b = udp4(1, 2, 999);
        (a[21], b[21]) = (7, 9);
        assert_eq!(t.key(&a), t.key(&b));
    }

    proptest! {
        /// Whatever comes, an entry never says anything that was not noted for just that flow.
        #[test]
        fn what_is_found_was_noted(ops in proptest::collection::vec((0u8..6, 0u8..6, 0u16..40, 0usize..4, any::<bool>()), 1..400)) {
            let t = Flows::new(32);
            let mut model: HashMap<(u8, u8, u16, usize), usize> = HashMap::new();
            for (n, (dst, src, port, from, note)) in ops.into_iter().enumerate() {
                let k = t.key(&udp4(dst, src, port));
                if note {
                    t.note(&k, from, n, 0, 1, 1);
                    model.insert((dst, src, port, from), n);
                    prop_assert_eq!(t.find(&k, from, 1, 1).map(Flow::to), Some(n));
                } else if let Some(f) = t.find(&k, from, 1, 1) {
                    prop_assert_eq!(Some(&f.to()), model.get(&(dst, src, port, from)));
                }
            }
        }

        #[test]
        fn any_head_has_a_key(head in proptest::collection::vec(any::<u8>(), 14..130)) {
            Flows::new(8).key(&head);
        }
    }
}
