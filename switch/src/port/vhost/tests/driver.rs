//! The driver's side of a split ring (virtio 1.2, 2.7.13) and of a packed one (2.8.21), written from the specification and
//! not from our device.

use std::collections::HashMap;

use super::{EVENT_IDX, INDIRECT, Memory, PACKED};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT_FLAG: u16 = 4;

/// One buffer of a chain: guest address, bytes.
pub type Buffer = (u64, u32);

pub struct Driver {
    pub memory: Memory,
    pub num: u16,
    /// Descriptor table, available ring, used ring.
    pub at: [u64; 3],
    pub avail_idx: u16,
    pub used_idx: u16,
    pub event_idx: bool,
    pub indirect: bool,
    pub packed: bool,
    /// Packed: the slots to be filled and reaped next, each with its wrap counter in bit 15.
    pub avail_pos: u16,
    used_pos: u16,
    /// Packed: where each chain started, and how many of them the device was last seen to have given back.
    starts: Vec<u16>,
    back: usize,
    free: Vec<u16>,
    /// Head to its descriptors and buffers.
    chains: HashMap<u16, (Vec<u16>, Vec<Buffer>)>,
    /// Buffers are carved from here, in a circle.
    pub heap: u64,
    heap_next: u64,
}

const HEAP: u64 = 0x28_0000;

impl Driver {
    pub fn new(memory: &Memory, num: u16, rings: u64, heap: u64, bits: u64) -> Driver {
        Driver {
            memory: memory.clone(),
            num,
            at: [rings, rings + 0x4000, rings + 0x6000],
            avail_idx: 0,
            used_idx: 0,
            event_idx: bits & EVENT_IDX != 0,
            indirect: bits & INDIRECT != 0,
            packed: bits & PACKED != 0,
            avail_pos: 1 << 15,
            used_pos: 1 << 15,
            starts: Vec::new(),
            back: 0,
            free: (0..num).rev().collect(),
            chains: HashMap::new(),
            heap,
            heap_next: 0,
        }
    }

    /// Fresh memory of `len` bytes, odd in its alignment.
    pub fn alloc(&mut self, len: u32) -> u64 {
        let len = u64::from(len);
        if self.heap_next + len + 64 > HEAP {
            self.heap_next = 0;
        }
        let at = self.heap + self.heap_next;
        self.heap_next += len + 3;
        at
    }

    pub fn free_descs(&self) -> usize {
        self.free.len()
    }

    pub fn desc(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut d = addr.to_le_bytes().to_vec();
        d.extend(len.to_le_bytes());
        d.extend(flags.to_le_bytes());
        d.extend(next.to_le_bytes());
        self.memory.write(table + 16 * u64::from(i), &d);
    }

    /// Makes a chain available. None if there are not enough descriptors.
    pub fn add(&mut self, buffers: &[Buffer], write: bool, indirect: bool) -> Option<u16> {
        let w = if write { WRITE } else { 0 };
        if self.packed {
            return self.add_packed(buffers, w, indirect);
        }
        let flags = |i: usize| if i + 1 < buffers.len() { NEXT | w } else { w };
        let descs: Vec<u16> = if indirect && self.indirect {
            let head = self.free.pop()?;
            let bytes = 16 * buffers.len() as u32;
            let table = self
                .alloc(bytes + 16)
                .next_multiple_of(if head % 2 == 0 { 16 } else { 1 });
            for (i, &(gpa, len)) in buffers.iter().enumerate() {
                self.desc(table, i as u16, gpa, len, flags(i), i as u16 + 1);
            }
            self.desc(self.at[0], head, table, bytes, INDIRECT_FLAG, 0);
            vec![head]
        } else {
            if self.free.len() < buffers.len() {
                return None;
            }
            let descs: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
            for (i, &(gpa, len)) in buffers.iter().enumerate() {
                let next = descs.get(i + 1).copied().unwrap_or(0);
                self.desc(self.at[0], descs[i], gpa, len, flags(i), next);
            }
            descs
        };
        let head = descs[0];
        self.chains.insert(head, (descs, buffers.to_vec()));
        self.offer(head);
        Some(head)
    }

    fn after(&self, pos: u16) -> u16 {
        match (pos & 0x7fff) + 1 {
            n if n == self.num => !pos & 0x8000,
            n => n | (pos & 0x8000),
        }
    }

    fn packed_desc(&self, table: u64, i: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let mut d = addr.to_le_bytes().to_vec();
        d.extend(len.to_le_bytes());
        d.extend(id.to_le_bytes());
        d.extend(flags.to_le_bytes());
        self.memory.write(table + 16 * u64::from(i), &d);
    }

    /// The same in a packed ring: `free` counts slots, and its numbers are the chains' ids.
    fn add_packed(&mut self, buffers: &[Buffer], w: u16, indirect: bool) -> Option<u16> {
        let indirect = indirect && self.indirect;
        let slots = if indirect { 1 } else { buffers.len() };
        if self.free.len() < slots {
            return None;
        }
        let ids: Vec<u16> = (0..slots).map(|_| self.free.pop().unwrap()).collect();
        let id = ids[0];
        let start = self.avail_pos;
        let mut first = None;
        let mut put = |d: &mut Driver, addr, len, flags: u16| {
            let avail = if d.avail_pos & 0x8000 != 0 {
                1 << 7
            } else {
                1 << 15
            };
            let slot = d.avail_pos & 0x7fff;
            // The first one's flags come last.
            match first {
                None => {
                    first = Some((slot, flags | avail));
                    let was = d.memory.u16(d.at[0] + 16 * u64::from(slot) + 14);
                    d.packed_desc(d.at[0], slot, addr, len, id, was);
                }
                Some(_) => d.packed_desc(d.at[0], slot, addr, len, id, flags | avail),
            }
            d.avail_pos = d.after(d.avail_pos);
        };
        if indirect {
            let bytes = 16 * buffers.len() as u32;
            let table = self.alloc(bytes + 16);
            let table = table.next_multiple_of(if id.is_multiple_of(2) { 16 } else { 1 });
            for (i, &(gpa, len)) in buffers.iter().enumerate() {
                // NEXT means nothing here (2.8.7).
                self.packed_desc(table, i as u16, gpa, len, 0, w);
            }
            put(self, table, bytes, INDIRECT_FLAG);
        } else {
            for (i, &(gpa, len)) in buffers.iter().enumerate() {
                let next = if i + 1 < buffers.len() { NEXT } else { 0 };
                put(self, gpa, len, next | w);
            }
        }
        let (slot, flags) = first.unwrap();
        let at = self.at[0] + 16 * u64::from(slot) + 14;
        self.memory.write(at, &flags.to_le_bytes());
        self.starts.push(start);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.chains.insert(id, (ids, buffers.to_vec()));
        Some(id)
    }

    fn reap_packed(&mut self) -> Vec<(Vec<Buffer>, u32)> {
        let mut out = Vec::new();
        loop {
            let at = self.at[0] + 16 * u64::from(self.used_pos & 0x7fff);
            let flags = self.memory.u16(at + 14);
            let (avail, used) = (flags >> 7 & 1, flags >> 15);
            if avail != used || used != self.used_pos >> 15 {
                break;
            }
            let e = self.memory.read(at + 8, 6);
            let len = u32::from_le_bytes(e[..4].try_into().unwrap());
            let id = u16::from_le_bytes(e[4..].try_into().unwrap());
            // A look at a chain that was never offered would be one at the driver's own descriptor.
            let Some((ids, buffers)) = self.chains.remove(&id) else {
                panic!("id {id} was not offered");
            };
            for _ in &ids {
                self.used_pos = self.after(self.used_pos);
            }
            self.free.extend(ids.iter().rev());
            out.push((buffers, len));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        let word = u32::from(self.used_pos) | if self.event_idx { 2 << 16 } else { 0 };
        self.memory.write(self.at[1], &word.to_le_bytes());
        out
    }

    /// How many chains the device has given back when it stands at `next`. To be asked at least once per lap.
    pub fn number_of(&mut self, next: u16) -> usize {
        if !self.packed {
            return usize::from(next);
        }
        while self.starts.get(self.back).is_some_and(|s| *s != next) {
            self.back += 1;
        }
        if self.back == self.starts.len() {
            assert_eq!(next, self.avail_pos);
        }
        self.back
    }

    /// Writes entry `i` of a table, whatever it is: address, length, flags, and in a split ring what is next.
    pub fn raw_in(&self, table: u64, i: u16, (addr, len, flags): (u64, u32, u16), next: u16) {
        match self.packed {
            true => self.packed_desc(table, i, addr, len, 0, flags),
            false => self.desc(table, i, addr, len, flags, next),
        }
    }

    /// Makes descriptors available as they are, the first of them last: from the table's start in a split ring.
    pub fn raw(&mut self, chain: &[(u64, u32, u16)]) {
        if !self.packed {
            for (i, &d) in chain.iter().enumerate() {
                self.raw_in(self.at[0], i as u16, d, i as u16 + 1);
            }
            return self.offer(0);
        }
        let mut all = Vec::new();
        for &(addr, len, flags) in chain {
            let turn = [1 << 15, 1 << 7][usize::from(self.avail_pos >> 15)];
            all.push((self.avail_pos & 0x7fff, (addr, len, flags | turn)));
            self.avail_pos = self.after(self.avail_pos);
        }
        for &(slot, d) in all.iter().rev() {
            self.raw_in(self.at[0], slot, d, 0);
        }
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.num);
        self.memory
            .write(self.at[1] + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.publish(self.avail_idx);
    }

    pub fn publish(&self, idx: u16) {
        self.memory.write(self.at[1] + 2, &idx.to_le_bytes());
    }

    /// Whether the device wants a kick for what came since `old`.
    pub fn wants_kick(&self, old: u16) -> bool {
        if self.packed {
            // One chain was added at a time.
            let word = self.memory.read(self.at[2], 4);
            let at = u16::from_le_bytes([word[0], word[1]]);
            return match word[2] {
                0 => true,
                1 => false,
                _ => self.starts.last() == Some(&at),
            };
        }
        if self.event_idx {
            let event = self.memory.u16(self.at[2] + 4 + 8 * u64::from(self.num));
            let new = self.avail_idx;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.u16(self.at[2]) & 1 == 0
        }
    }

    /// Takes back what the device has used: the buffers and how many bytes were written.
    pub fn reap(&mut self) -> Vec<(Vec<Buffer>, u32)> {
        if self.packed {
            return self.reap_packed();
        }
        let mut out = Vec::new();
        let idx = self.memory.u16(self.at[2] + 2);
        assert!(idx.wrapping_sub(self.used_idx) <= self.num);
        while self.used_idx != idx {
            let slot = u64::from(self.used_idx % self.num);
            let e = self.memory.read(self.at[2] + 4 + 8 * slot, 8);
            let id = u32::from_le_bytes(e[..4].try_into().unwrap());
            let len = u32::from_le_bytes(e[4..].try_into().unwrap());
            let (descs, buffers) = self
                .chains
                .remove(&(id as u16))
                .expect("a head that was offered");
            self.free.extend(descs.iter().rev());
            out.push((buffers, len));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        if self.event_idx {
            // Wake me for the next one.
            let at = self.at[1] + 4 + 2 * u64::from(self.num);
            self.memory.write(at, &self.used_idx.to_le_bytes());
        }
        out
    }

    /// Cuts `bytes` into `pieces` buffers and offers them as one chain.
    pub fn send(&mut self, bytes: &[u8], pieces: usize, indirect: bool) -> bool {
        let pieces = pieces.clamp(1, bytes.len());
        let needs = if indirect && self.indirect { 1 } else { pieces };
        if self.free.len() < needs {
            return false;
        }
        let buffers: Vec<Buffer> = (0..pieces)
            .map(|i| {
                let part = &bytes[bytes.len() * i / pieces..bytes.len() * (i + 1) / pieces];
                let at = self.alloc(part.len() as u32);
                self.memory.write(at, part);
                (at, part.len() as u32)
            })
            .collect();
        self.add(&buffers, false, indirect).is_some()
    }

    /// The content of a used chain.
    pub fn content(&self, buffers: &[Buffer], len: u32) -> Vec<u8> {
        let mut v = Vec::new();
        for &(gpa, n) in buffers {
            v.extend(self.memory.read(gpa, n as usize));
        }
        v.truncate(len as usize);
        v
    }

    /// Takes received frames back, headers first: (header, frame).
    pub fn received(&mut self, hdr_len: usize, mrg: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut used = self.reap().into_iter();
        let mut out = Vec::new();
        while let Some((buffers, len)) = used.next() {
            let mut v = self.content(&buffers, len);
            if hdr_len == 12 {
                let n = u16::from_le_bytes([v[10], v[11]]);
                assert!(mrg || n == 1);
                for _ in 1..n {
                    let (buffers, len) = used.next().expect("all buffers of a frame at once");
                    v.extend(self.content(&buffers, len));
                }
            }
            let frame = v.split_off(hdr_len);
            out.push((v, frame));
        }
        out
    }
}
