//! Flows: what the look-ups have said about frames like this one, and how many there were. One table per worker.
//!
//! A flow is the receiving port, both addresses, the type, and a digest of the addresses and ports behind them (IPv4,
//! IPv6). An entry is one cache line, holds good for one second of one generation of the FDB, and is then looked up
//! again: ageing, moved stations and refreshed entries need nothing else. Frames that share a digest by chance share
//! counters; where they go is decided by the addresses themselves.
//!
//! Entries are taken one after the other, so that the table has memory for the flows that there were, and no more. Where a
//! flow's entry is says the index (ADR-0012): buckets of one cache line with sixteen lanes, each a tag of the hash and an
//! entry's number. There are twice as many lanes as entries: of a million flows in a table for a million 99.9 % have a
//! place.
//!
//! An entry that was seen in this second or the last one keeps its place. For a flow that finds none, each frame is looked
//! up in the FDB: no flood of flows slows those down that are there.
//!
//! Invariant: bounded work for any input, in a bucket that a seeded hash chooses: it, the entries of its lanes with the same
//! tag, and at most `PROBES` entries of other flows, which may have to go.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::hash::{Seeds, fold};
use super::stats::add;
use crate::mem::zeros::{Line, Zeros};
use crate::port::BURST;

/// Behind the Ethernet header of IPv4 without options: what a digest is made of.
const V4: usize = 14 + 20 + 4;
/// The same of IPv6.
const V6: usize = 14 + 40 + 4;
/// Flows of a bucket of the index.
const LANES: usize = 16;
/// Entries that are looked at for one that may go.
const PROBES: usize = 4;
/// An entry that was not seen for so many seconds may go.
const KEPT_S: u32 = 2;

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

/// Where a flow's entry seems to be. It may not be there: [`Flows::find`] looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u32);

type Entry = Line<[AtomicU64; 8]>;
type Bucket = Line<Cell<[u32; LANES]>>;

// Words of an entry.
const DST: usize = 0;
const SRC: usize = 1;
const DIGEST: usize = 2;
/// Bits 0 to 15 receiving port + 1 (0: nobody's), bits 16 to 31 the port it goes to, bits 32 to 63 bytes of headers.
const PORTS: usize = 3;
/// Bits 0 to 31 the generation of the FDB, bits 32 to 63 the second.
const SEEN: usize = 4;
/// With the port: says its place in the index.
const HASH: usize = 5;
const FRAMES: usize = 6;
const BYTES: usize = 7;

/// One flow. Written by its worker alone; control may read.
#[derive(Debug, Clone, Copy)]
pub struct Flow<'t>(&'t Entry);

impl Flow<'_> {
    #[inline(always)]
    fn get(self, word: usize) -> u64 {
        self.0.0[word].load(Relaxed)
    }

    #[inline(always)]
    fn set(self, word: usize, to: u64) {
        self.0.0[word].store(to, Relaxed);
    }

    #[inline(always)]
    fn is(self, key: &Key, from: usize) -> bool {
        self.get(DST) == key.dst
            && self.get(SRC) == key.src
            && self.get(DIGEST) == key.digest
            && self.get(PORTS) as u16 == from as u16 + 1
    }

    fn age_s(self, now_s: u32) -> u32 {
        now_s.wrapping_sub((self.get(SEEN) >> 32) as u32)
    }

    /// The port that its frames go to.
    #[inline]
    pub fn to(self) -> usize {
        usize::from((self.get(PORTS) >> 16) as u16)
    }

    /// Bytes of headers of a frame, as of the one that was looked at.
    #[inline]
    pub fn overhead(self) -> u32 {
        (self.get(PORTS) >> 32) as u32
    }

    /// It is this very entry.
    #[inline]
    pub fn is_same(self, other: Flow<'_>) -> bool {
        std::ptr::eq(self.0, other.0)
    }

    /// Counts frames with their bytes in all.
    #[inline]
    pub fn count(self, frames: u64, bytes: u64) {
        add(&self.0.0[FRAMES], frames);
        add(&self.0.0[BYTES], bytes);
    }

    /// Frames and bytes so far.
    pub fn counted(self) -> (u64, u64) {
        (self.get(FRAMES), self.get(BYTES))
    }
}

/// See the module.
pub struct Flows {
    index: Zeros<Bucket>,
    /// Buckets less one.
    mask: usize,
    /// The bits of a lane that are the tag. The others are the entry's number; 0 is none.
    tags: u32,
    /// The first is nobody's.
    entries: Zeros<Entry>,
    /// Entries that have been used.
    used: Cell<u32>,
    /// The one that was last looked at for one that may go.
    hand: Cell<u32>,
    /// A second, and how many were looked at in it.
    looked: Cell<(u32, u32)>,
    /// In turn for flows that have no place: as many as a burst may have, as what is found for a burst must last that long.
    nobodys: [Entry; BURST],
    next_nobody: Cell<usize>,
    seeds: [u64; 3],
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

/// Of a key that came in at a port: which bucket, which tag.
#[inline(always)]
fn placed(key: &Key, from: usize) -> u64 {
    key.hash ^ (from as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Flows {
    /// Room for `capacity` flows (1 to 2^24).
    pub fn new(capacity: usize) -> io::Result<Flows> {
        let capacity = capacity.clamp(1, 1 << 24);
        let buckets = (2 * capacity).div_ceil(LANES).next_power_of_two();
        let numbers = (capacity as u32 + 1).next_power_of_two();
        Ok(Flows {
            index: Zeros::new(buckets)?,
            mask: buckets - 1,
            tags: !(numbers - 1),
            entries: Zeros::huge(capacity + 1)?,
            used: Cell::new(0),
            hand: Cell::new(0),
            looked: Cell::new((0, 0)),
            nobodys: std::array::from_fn(|_| Line(Default::default())),
            next_nobody: Cell::new(0),
            seeds: Seeds::random().0,
        })
    }

    /// Flows that there is room for.
    fn capacity(&self) -> u32 {
        self.entries.len() as u32 - 1
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

    #[inline(always)]
    fn bucket(&self, placed: u64) -> &Cell<[u32; LANES]> {
        &self.index[placed as usize & self.mask].0
    }

    fn lanes(&self, placed: u64) -> &[Cell<u32>; LANES] {
        self.bucket(placed).as_array_of_cells()
    }

    /// Never 0, which is an empty lane's.
    #[inline(always)]
    fn tag(&self, placed: u64) -> u32 {
        let tag = (placed >> 32) as u32 & self.tags;
        tag.max(self.tags & self.tags.wrapping_neg())
    }

    #[inline(always)]
    fn at(&self, number: u32) -> Flow<'_> {
        Flow(&self.entries[number as usize])
    }

    /// Asks for the bucket that [`Flows::locate`] will want.
    #[inline(always)]
    pub fn prefetch(&self, key: &Key, from: usize) {
        let bucket = self.bucket(placed(key, from));
        crate::mem::prefetch(std::ptr::from_ref(bucket).cast());
    }

    /// Where the flows of a burst seem to be. Asks for their entries.
    #[inline(always)]
    pub fn locate(&self, keys: &[Key], from: usize) -> [Slot; BURST] {
        let mut slots = [Slot(0); BURST];
        let mut last = (0, Slot(0));
        for (slot, key) in slots.iter_mut().zip(keys) {
            if key.hash != last.0 {
                last = (key.hash, self.slot(placed(key, from)));
            }
            *slot = last.1;
        }
        slots
    }

    #[inline(always)]
    fn slot(&self, placed: u64) -> Slot {
        let tag = self.tag(placed);
        let lanes = self.bucket(placed).get();
        // No branches: they could not be predicted.
        let hits = crate::mem::which(&lanes, self.tags, tag);
        let lane = lanes[hits.trailing_zeros() as usize % LANES];
        let number = if hits == 0 { 0 } else { lane & !self.tags };
        crate::mem::prefetch(std::ptr::from_ref(self.at(number).0).cast());
        Slot(number)
    }

    /// The flow, if what was found out about it still holds.
    #[inline(always)]
    pub fn find(
        &self,
        key: &Key,
        slot: Slot,
        from: usize,
        generation: u32,
        now_s: u32,
    ) -> Option<Flow<'_>> {
        let mut flow = self.at(slot.0);
        if !flow.is(key, from) {
            flow = self.other(key, slot, from)?;
        }
        (flow.get(SEEN) == seen(generation, now_s)).then_some(flow)
    }

    /// Another flow has its tag.
    #[cold]
    fn other(&self, key: &Key, slot: Slot, from: usize) -> Option<Flow<'_>> {
        (slot.0 != 0).then(|| self.search(key, from))?
    }

    fn search(&self, key: &Key, from: usize) -> Option<Flow<'_>> {
        let placed = placed(key, from);
        let tag = self.tag(placed);
        self.lanes(placed)
            .iter()
            .map(Cell::get)
            .filter(|lane| lane & self.tags == tag)
            .map(|lane| self.at(lane & !self.tags))
            .find(|flow| flow.is(key, from))
    }

    /// Notes where a flow goes. Its counters go on if it was known, and start again otherwise. What is returned is good
    /// for a burst.
    pub fn note(
        &self,
        key: &Key,
        from: usize,
        to: usize,
        overhead: u32,
        generation: u32,
        now_s: u32,
    ) -> Flow<'_> {
        let flow = self.search(key, from).unwrap_or_else(|| {
            let placed = placed(key, from);
            let flow = self.room(placed, now_s).unwrap_or_else(|| {
                let n = self.next_nobody.get();
                self.next_nobody.set((n + 1) % BURST);
                Flow(&self.nobodys[n])
            });
            flow.set(DST, key.dst);
            flow.set(SRC, key.src);
            flow.set(DIGEST, key.digest);
            flow.set(HASH, placed);
            flow.set(FRAMES, 0);
            flow.set(BYTES, 0);
            flow
        });
        let ports = (from as u64 + 1) & 0xffff | (to as u64 & 0xffff) << 16;
        flow.set(PORTS, ports | u64::from(overhead) << 32);
        flow.set(SEEN, seen(generation, now_s));
        flow
    }

    /// An entry and its lane, for a flow that has none.
    fn room(&self, placed: u64, now_s: u32) -> Option<Flow<'_>> {
        let lanes = self.lanes(placed);
        let (lane, number) = match lanes.iter().find(|lane| lane.get() == 0) {
            Some(lane) => (lane, self.unused().or_else(|| self.reclaim(now_s))?),
            None => {
                let first = (placed >> 24) as usize;
                let probed = (first..first + PROBES).map(|i| &lanes[i % LANES]);
                let number = |lane: &Cell<u32>| lane.get() & !self.tags;
                let lane = probed.max_by_key(|lane| self.at(number(lane)).age_s(now_s))?;
                let number = number(lane);
                (self.at(number).age_s(now_s) >= KEPT_S).then_some((lane, number))?
            }
        };
        lane.set(self.tag(placed) | number);
        Some(self.at(number))
    }

    fn unused(&self) -> Option<u32> {
        let number = self.used.get() + 1;
        (number <= self.capacity()).then(|| {
            self.used.set(number);
            number
        })
    }

    /// Takes an entry from a flow that has not been seen for long, if one comes by. Each is looked at once a second: none
    /// becomes old in between.
    fn reclaim(&self, now_s: u32) -> Option<u32> {
        let mut looked = match self.looked.get() {
            (second, n) if second == now_s => n,
            _ => 0,
        };
        let mut taken = None;
        for _ in 0..PROBES {
            if taken.is_some() || looked == self.capacity() {
                break;
            }
            let number = self.hand.get() + 1;
            self.hand.set(number % self.capacity());
            looked += 1;
            taken = (self.at(number).age_s(now_s) >= KEPT_S).then_some(number);
        }
        self.looked.set((now_s, looked));
        let number = taken?;
        let lanes = self.lanes(self.at(number).get(HASH));
        let is_its = |lane: &&Cell<u32>| lane.get() & !self.tags == number;
        if let Some(lane) = lanes.iter().find(is_its) {
            lane.set(0);
        }
        Some(number)
    }
}

fn seen(generation: u32, now_s: u32) -> u64 {
    u64::from(generation) | u64::from(now_s) << 32
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

    fn table(capacity: usize) -> Flows {
        Flows::new(capacity).unwrap()
    }

    fn find<'t>(t: &'t Flows, k: &Key, from: usize, (g, s): (u32, u32)) -> Option<Flow<'t>> {
        t.find(k, t.locate(&[*k], from)[0], from, g, s)
    }

    /// Some key, other than those with other numbers.
    fn numbered(t: &Flows, n: u32) -> Key {
        let mut f = udp4(1, 2, n as u16);
        f[26..30].copy_from_slice(&n.to_be_bytes());
        t.key(&f)
    }

    /// How many of them are found.
    fn found(t: &Flows, keys: &[Key], at: (u32, u32)) -> usize {
        keys.iter().filter(|k| find(t, k, 0, at).is_some()).count()
    }

    /// Each entry is in one lane at most, of the bucket where it is looked for.
    fn check(t: &Flows) {
        let mut seen = std::collections::HashSet::new();
        for (n, bucket) in t.index.iter().enumerate() {
            for lane in bucket.0.get().into_iter().filter(|l| *l != 0) {
                let number = lane & !t.tags;
                assert!(number > 0 && number <= t.used.get() && seen.insert(number));
                let placed = t.at(number).get(HASH);
                assert_eq!(placed as usize & t.mask, n);
                assert_eq!(t.tag(placed), lane & t.tags);
            }
        }
    }

    #[test]
    fn a_flow_is_found_for_its_second_and_generation_only() {
        let t = table(64);
        let k = t.key(&udp4(1, 2, 3));
        assert!(find(&t, &k, 0, (1, 5)).is_none());
        t.note(&k, 0, 7, 42, 1, 5).count(1, 60);
        let f = find(&t, &k, 0, (1, 5)).unwrap();
        assert_eq!((f.to(), f.overhead(), f.counted()), (7, 42, (1, 60)));
        assert!(find(&t, &k, 1, (1, 5)).is_none(), "another port");
        assert!(find(&t, &k, 0, (2, 5)).is_none(), "the FDB has changed");
        assert!(find(&t, &k, 0, (1, 6)).is_none(), "a second later");
        t.note(&k, 0, 8, 42, 2, 6).count(1, 60);
        assert_eq!(find(&t, &k, 0, (2, 6)).unwrap().counted(), (2, 120));
        assert!(find(&t, &t.key(&udp4(1, 2, 4)), 0, (2, 6)).is_none());
    }

    #[test]
    fn fragments_of_a_datagram_are_one_flow() {
        let t = table(64);
        let mut a = udp4(1, 2, 3);
        let mut b = udp4(1, 2, 999);
        (a[21], b[21]) = (7, 9);
        assert_eq!(t.key(&a), t.key(&b));
    }

    #[test]
    fn a_million_flows_have_a_place_in_a_table_for_a_million() {
        let t = table(1_000_000);
        let keys: Vec<Key> = (0..1_000_000).map(|n| numbered(&t, n)).collect();
        for (n, k) in keys.iter().enumerate() {
            t.note(k, 0, n % 1000, 42, 1, 1);
        }
        let right = |(n, k): &(usize, &Key)| match find(&t, k, 0, (1, 1)) {
            Some(f) => {
                assert_eq!(f.to(), n % 1000);
                true
            }
            None => false,
        };
        let n = keys.iter().enumerate().filter(right).count();
        assert!(n >= 999_000, "{n} have a place");
    }

    #[test]
    fn a_flow_that_is_seen_keeps_its_place_and_one_that_is_not_gives_way() {
        let t = table(64);
        let mine: Vec<Key> = (0..32).map(|n| numbered(&t, n)).collect();
        for second in 10..20 {
            for k in &mine {
                t.note(k, 0, 7, 42, 1, second).count(1, 60);
            }
            let others = |n: u32| numbered(&t, second << 16 | n);
            for n in 100..2000 {
                t.note(&others(n), 0, 8, 42, 1, second);
            }
            check(&t);
            assert_eq!(found(&t, &mine, (1, second)), mine.len());
            let of_others = (100..2000).map(others).collect::<Vec<_>>();
            let n = found(&t, &of_others, (1, second));
            // A flood fills the rest, and again when what filled it has not been seen for two seconds.
            match second % 2 {
                0 => assert_eq!(n, 32, "in second {second}"),
                _ => assert_eq!(n, 0, "in second {second}"),
            }
        }
        for k in &mine {
            assert_eq!(find(&t, k, 0, (1, 19)).unwrap().counted(), (10, 600));
        }
    }

    #[test]
    fn a_full_table_is_searched_for_room_once_a_second_and_serves_a_burst() {
        let t = table(64);
        let keys: Vec<Key> = (0..100_000).map(|n| numbered(&t, n)).collect();
        for k in &keys {
            t.note(k, 0, 8, 42, 1, 1);
        }
        assert_eq!(t.looked.get(), (1, 64));
        assert_eq!(t.hand.get(), 0, "one turn");
        let burst: Vec<Flow<'_>> = (keys[99_000..].iter().zip(0..BURST))
            .map(|(k, to)| t.note(k, 0, to, 42, 1, 1))
            .collect();
        let told: Vec<usize> = burst.into_iter().map(Flow::to).collect();
        assert_eq!(told, (0..BURST).collect::<Vec<_>>(), "good for a burst");
    }

    #[test]
    fn flows_that_collide_in_one_table_do_not_in_another() {
        let (known, other) = (table(4096), table(4096));
        let in_one_bucket = |n: &u32| placed(&numbered(&known, *n), 0) as usize & known.mask == 0;
        let chosen: Vec<u32> = (0..1 << 16).filter(in_one_bucket).collect();
        assert!(chosen.len() > 64);
        let places = |t: &Flows| {
            let keys: Vec<Key> = chosen.iter().map(|n| numbered(t, *n)).collect();
            for k in &keys {
                t.note(k, 0, 8, 42, 1, 1);
            }
            found(t, &keys, (1, 1))
        };
        assert_eq!(places(&known), LANES);
        assert_eq!(places(&other), chosen.len());
    }

    #[test]
    fn a_tag_that_flows_share_hides_none_of_them() {
        // One bit of tag, and that is never 0: all in a bucket share it.
        let t = Flows {
            tags: 1 << 31,
            ..table(64)
        };
        let flows: Vec<(usize, Key)> = (0..64u8)
            .map(|n| (usize::from(n / 4), t.key(&udp4(n % 4, 1, 1))))
            .collect();
        for (n, (from, k)) in flows.iter().enumerate() {
            t.note(k, *from, n, 0, 1, 1);
        }
        let mut placed = 0;
        for (n, (from, k)) in flows.iter().enumerate() {
            if let Some(f) = find(&t, k, *from, (1, 1)) {
                assert_eq!(f.to(), n);
                placed += 1;
            }
        }
        assert!(placed > 56, "{placed}");
    }

    /// A flow: what its frames are made of, and the port they come from.
    type Of = (u8, u8, u16, usize);
    /// The port they go to, generation, second, frames.
    type Said = (usize, u32, u32, u64);

    proptest! {
        /// Whatever comes, collides or gives way: what is found was noted last for just that flow, in that second and
        /// generation; what was just noted is found, as long as there is room; counters count the frames since then.
        #[test]
        fn what_is_found_was_noted(
            capacity in 1usize..40,
            ops in proptest::collection::vec((0u8..6, 0u8..6, 0u16..40, 0usize..4, 0u8..8), 1..600),
        ) {
            let t = table(capacity);
            let mut model: HashMap<Of, Said> = HashMap::new();
            let (mut generation, mut second) = (1, 1);
            for (n, (dst, src, port, from, what)) in ops.into_iter().enumerate() {
                let k = t.key(&udp4(dst, src, port));
                let is = (dst, src, port, from);
                match what {
                    0 => second += 1,
                    1 => generation += 1,
                    2..=4 => {
                        let f = t.note(&k, from, n, 5, generation, second);
                        prop_assert_eq!((f.to(), f.overhead()), (n, 5));
                        let frames = f.counted().0;
                        prop_assert!(frames == 0 || frames == model[&is].3);
                        f.count(1, 60);
                        if model.values().filter(|m| m.2 + 1 >= second).count() < capacity.min(PROBES) {
                            prop_assert!(find(&t, &k, from, (generation, second)).is_some());
                        }
                        model.insert(is, (n, generation, second, frames + 1));
                    }
                    _ => if let Some(f) = find(&t, &k, from, (generation, second)) {
                        let (to, g, s, frames) = model[&is];
                        prop_assert_eq!((f.to(), f.counted().0), (to, frames));
                        prop_assert_eq!((g, s), (generation, second));
                    },
                }
            }
            check(&t);
        }

        #[test]
        fn any_head_has_a_key(head in proptest::collection::vec(any::<u8>(), 14..130)) {
            let t = table(8);
            let k = t.key(&head);
            prop_assert!(find(&t, &k, 0, (0, 0)).is_none());
        }
    }
}
