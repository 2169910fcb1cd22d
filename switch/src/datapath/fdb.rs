//! The forwarding database: which port a MAC address was last seen at (IEEE 802.1Q, 8.8). Shared by all workers
//! without locks.
//!
//! An address is in one of two buckets of eight entries, which a seeded hash chooses (addresses are the guests' choice): in
//! the first one, while that has room. When both are full the entry seen longest ago gives way, never a fixed one. Half
//! of the table or more is empty when it holds what it was made for: then all but a few of a million addresses have a place.
//!
//! Invariant: bounded work for any input. A look-up that races with a learning gives the old or the new port.

use std::io;
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use gangway_shared::id::MacAddr;

use super::hash::{Seeds, fold};
use crate::mem::prefetch;
use crate::mem::zeros::Zeros;

const WAYS: usize = 8;
const FIXED: u64 = 1 << 63;

/// See the module.
pub struct Fdb {
    entries: Zeros<AtomicU64>,
    seen: Zeros<AtomicU32>,
    mask: usize,
    seeds: [u64; 3],
    ageing_s: u32,
    generation: AtomicU32,
    changed: AtomicBool,
}

/// One entry, for listings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The address.
    pub mac: MacAddr,
    /// Port index.
    pub port: usize,
    /// Put there by configuration or a commit; only control moves it.
    pub fixed: bool,
    /// Seconds since it was last seen.
    pub age_s: u32,
}

// An entry: bit 63 fixed, bits 48..62 port + 1, bits 0..48 the address. 0 is empty.
fn pack(mac: MacAddr, port: usize, fixed: bool) -> u64 {
    mac.to_u64() | ((port as u64 + 1) & 0x7fff) << 48 | if fixed { FIXED } else { 0 }
}
fn mac_of(e: u64) -> u64 {
    e & 0xffff_ffff_ffff
}
fn port_of(e: u64) -> usize {
    ((e >> 48) & 0x7fff) as usize - 1
}

impl Fdb {
    /// For at least `capacity` addresses that age after `ageing_s` seconds.
    pub fn new(capacity: usize, ageing_s: u32) -> io::Result<Fdb> {
        let buckets = (2 * capacity).div_ceil(WAYS).max(2).next_power_of_two();
        Ok(Fdb {
            entries: Zeros::new(buckets * WAYS)?,
            seen: Zeros::new(buckets * WAYS)?,
            mask: buckets - 1,
            seeds: Seeds::random().0,
            ageing_s,
            generation: AtomicU32::new(0),
            changed: AtomicBool::new(false),
        })
    }

    /// As configured, in seconds.
    pub fn ageing_s(&self) -> u32 {
        self.ageing_s
    }

    /// Whether an address has come, moved or gone since this was last asked. One that comes at the moment in which it is asked may
    /// not be said.
    pub fn has_changed(&self) -> bool {
        self.changed.swap(false, AcqRel)
    }

    /// Only written when it is not said already: workers share the line.
    fn mark(&self) {
        if !self.changed.load(Relaxed) {
            self.changed.store(true, Release);
        }
    }

    /// Changes whenever an address that was known is said to be somewhere else (not when a new one is learned, so that
    /// a flood of new addresses does not make everybody look up again).
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Acquire)
    }

    fn moved(&self) {
        self.generation.fetch_add(1, AcqRel);
        self.mark();
    }

    /// The first entries of its two buckets.
    #[inline]
    fn buckets(&self, mac: MacAddr) -> [usize; 2] {
        let [a, b, c] = self.seeds;
        let hash = fold(fold(mac.to_u64() ^ a, b), c);
        let first = hash as usize & self.mask;
        let second = (hash >> 32) as usize & self.mask;
        let second = if second == first { first ^ 1 } else { second };
        [first * WAYS, second * WAYS]
    }

    /// Asks for what a look-up will read first. In a large table that is in no cache.
    #[inline]
    pub fn prefetch(&self, mac: MacAddr) {
        let [first, _] = self.buckets(mac);
        prefetch(std::ptr::from_ref(&self.entries[first]).cast());
        prefetch(std::ptr::from_ref(&self.seen[first]).cast());
    }

    fn find(&self, mac: MacAddr) -> Option<(usize, u64)> {
        let key = mac.to_u64();
        self.buckets(mac).into_iter().find_map(|b| {
            let bucket = self.entries[b..b + WAYS].iter().enumerate();
            bucket
                .map(|(i, e)| (b + i, e.load(Relaxed)))
                .find(|(_, v)| *v != 0 && mac_of(*v) == key)
        })
    }

    fn expired(&self, at: usize, v: u64, now_s: u32) -> bool {
        v & FIXED == 0
            && now_s.wrapping_sub(self.seen[at].load(Relaxed)) as i32 > self.ageing_s as i32
    }

    /// Where `mac` is; `None` if unknown or aged.
    pub fn lookup(&self, mac: MacAddr, now_s: u32) -> Option<usize> {
        let (at, v) = self.find(mac)?;
        (!self.expired(at, v, now_s)).then(|| port_of(v))
    }

    /// `mac` sent a frame through `port`. Returns the port of a fixed entry that says otherwise; nothing is changed
    /// then. Group addresses are no stations and are not learned.
    pub fn learn(&self, mac: MacAddr, port: usize, now_s: u32) -> Option<usize> {
        if mac.is_multicast() || mac.to_u64() == 0 {
            return None;
        }
        if let Some((at, v)) = self.find(mac) {
            if port_of(v) != port {
                if v & FIXED != 0 {
                    return Some(port_of(v));
                }
                self.entries[at].store(pack(mac, port, false), Relaxed);
                self.moved();
            }
            if self.seen[at].load(Relaxed) != now_s {
                self.seen[at].store(now_s, Relaxed);
            }
            return None;
        }
        self.insert(mac, port, false, now_s);
        None
    }

    fn insert(&self, mac: MacAddr, port: usize, fixed: bool, now_s: u32) {
        let mut victim = None;
        for at in self.buckets(mac).into_iter().flat_map(|b| b..b + WAYS) {
            let v = self.entries[at].load(Relaxed);
            if v == 0 || self.expired(at, v, now_s) {
                victim = Some(at);
                break;
            }
            let older = |x: usize| {
                let age = |i: usize| now_s.wrapping_sub(self.seen[i].load(Relaxed));
                age(at) > age(x)
            };
            if v & FIXED == 0 && victim.is_none_or(older) {
                victim = Some(at);
            }
        }
        if let Some(at) = victim {
            self.seen[at].store(now_s, Relaxed);
            self.entries[at].store(pack(mac, port, fixed), Relaxed);
            self.mark();
        }
    }

    /// An earlier run has seen `mac` at `port` so long ago. Whatever is known or would have to give way is right, and it is not
    /// taken then; nor if it has aged.
    pub fn recall(&self, mac: MacAddr, port: usize, age_s: u32, now_s: u32) -> bool {
        let station = !mac.is_multicast() && mac.to_u64() != 0;
        if !station || age_s > self.ageing_s || self.find(mac).is_some() {
            return false;
        }
        let mut places = self.buckets(mac).into_iter().flat_map(|b| b..b + WAYS);
        let empty = places.find(|&at| self.entries[at].load(Relaxed) == 0);
        if let Some(at) = empty {
            self.seen[at].store(now_s.wrapping_sub(age_s), Relaxed);
            self.entries[at].store(pack(mac, port, false), Relaxed);
            self.moved();
        }
        empty.is_some()
    }

    /// Control's word: `mac` is at `port`, whatever is seen elsewhere (`fixed`) or until it is seen elsewhere.
    pub fn set(&self, mac: MacAddr, port: usize, fixed: bool, now_s: u32) {
        match self.find(mac) {
            Some((at, _)) => {
                self.seen[at].store(now_s, Relaxed);
                self.entries[at].store(pack(mac, port, fixed), Relaxed);
            }
            None => self.insert(mac, port, fixed, now_s),
        }
        self.moved();
    }

    /// Forgets what points to `port`.
    pub fn forget_port(&self, port: usize) {
        for e in self.entries.iter() {
            let v = e.load(Relaxed);
            if v != 0 && port_of(v) == port {
                let _ = e.compare_exchange(v, 0, Relaxed, Relaxed);
            }
        }
        self.moved();
    }

    /// All entries that have not aged.
    pub fn list(&self, now_s: u32) -> Vec<Entry> {
        self.iter(now_s).collect()
    }

    /// The same one by one.
    pub fn iter(&self, now_s: u32) -> impl Iterator<Item = Entry> {
        let entry = move |(at, e): (usize, &AtomicU64)| {
            let v = e.load(Relaxed);
            (v != 0 && !self.expired(at, v, now_s)).then(|| Entry {
                mac: MacAddr::from_u64(v),
                port: port_of(v),
                fixed: v & FIXED != 0,
                age_s: now_s.wrapping_sub(self.seen[at].load(Relaxed)),
            })
        };
        self.entries.iter().enumerate().filter_map(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn mac(n: u64) -> MacAddr {
        MacAddr::from_u64(0x0200_0000_0000 | n)
    }

    #[test]
    fn addresses_move_age_and_stay_where_control_fixed_them() {
        let f = Fdb::new(64, 300).unwrap();
        f.learn(mac(1), 3, 0);
        assert_eq!(f.lookup(mac(1), 300), Some(3));
        assert_eq!(f.lookup(mac(1), 301), None);
        f.learn(mac(1), 4, 302);
        assert_eq!(f.lookup(mac(1), 302), Some(4));
        f.set(mac(1), 0, true, 302);
        assert_eq!(f.learn(mac(1), 4, 303), Some(0));
        assert_eq!(
            f.lookup(mac(1), 10_000),
            Some(0),
            "a fixed entry does not age"
        );
        f.forget_port(0);
        assert_eq!(f.lookup(mac(1), 303), None);
        f.learn(MacAddr::BROADCAST, 1, 0);
        assert_eq!(f.lookup(MacAddr::BROADCAST, 0), None);
    }

    #[test]
    fn a_flood_of_addresses_does_not_push_out_a_fixed_one() {
        let f = Fdb::new(64, 300).unwrap();
        f.set(mac(0), 5, true, 0);
        for n in 1..100_000 {
            f.learn(mac(n), 1, 1);
        }
        assert_eq!(f.lookup(mac(0), 1), Some(5));
        assert!(f.list(1).len() <= 128);
    }

    #[test]
    fn a_million_addresses_are_known_to_a_table_for_a_million() {
        // The second one is as full as one can be that holds what it was made for.
        for n in [1_000_000, 1 << 20] {
            let f = Fdb::new(n as usize, 300).unwrap();
            for i in 0..n {
                f.learn(mac(i), (i % 100) as usize, 1);
            }
            let known = |i: &u64| match f.lookup(mac(*i), 1) {
                Some(port) => {
                    assert_eq!(port, (i % 100) as usize);
                    true
                }
                None => false,
            };
            let known = (0..n).filter(known).count() as u64;
            assert!(known >= n - n / 1000, "{known} of {n}");
        }
    }

    #[test]
    fn addresses_that_collide_in_one_table_do_not_in_another() {
        let [a, b] = [(); 2].map(|()| Fdb::new(4096, 300).unwrap());
        let near = |m: &u64| a.buckets(mac(*m)).iter().all(|at| *at < 32 * WAYS);
        let chosen: Vec<u64> = (0..1 << 20).filter(near).collect();
        assert!(chosen.len() > 80 * WAYS);
        let known = |f: &Fdb| {
            for m in &chosen {
                f.learn(mac(*m), 1, 1);
            }
            f.list(1).len()
        };
        assert_eq!(known(&a), 32 * WAYS);
        assert_eq!(known(&b), chosen.len());
    }

    proptest! {
        /// In a table that is far too small: never a wrong port, never an aged one, what was learned last is known, and
        /// what is fixed stays.
        #[test]
        fn never_says_what_was_not_learned(ops in proptest::collection::vec((1u64..100, 0usize..4, 0u32..9, any::<bool>()), 1..400)) {
            let f = Fdb::new(WAYS, 300).unwrap();
            f.set(mac(0), 9, true, 0);
            let mut model: HashMap<u64, (usize, u32)> = HashMap::new();
            let mut now = 0;
            for (m, p, dt, learn) in ops {
                now += dt * dt;
                if learn {
                    f.learn(mac(m), p, now);
                    model.insert(m, (p, now));
                    prop_assert_eq!(f.lookup(mac(m), now), Some(p));
                } else if let Some(found) = f.lookup(mac(m), now) {
                    let (p, seen) = model[&m];
                    prop_assert_eq!(found, p);
                    prop_assert!(now - seen <= 300);
                }
                prop_assert_eq!(f.lookup(mac(0), now), Some(9));
                prop_assert!(f.list(now).len() <= 2 * WAYS);
            }
        }

        #[test]
        fn agrees_with_a_map_while_there_is_room(ops in proptest::collection::vec((0u64..6, 0usize..4, 0u32..50), 1..200)) {
            let f = Fdb::new(4096, 300).unwrap();
            let mut model: HashMap<u64, (usize, u32)> = HashMap::new();
            let mut now = 0;
            for (m, p, dt) in ops {
                now += dt;
                f.learn(mac(m), p, now);
                model.insert(m, (p, now));
                for (m, (p, seen)) in &model {
                    prop_assert_eq!(f.lookup(mac(*m), now), (now - seen <= 300).then_some(*p));
                }
            }
        }
    }
}
