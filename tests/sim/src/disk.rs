//! The disk of a host: the spool's files in memory, written and read with the product's format code, and the records of
//! holds. What was written survives the death of a process; what was synced survives the loss of power.
//!
//! Invariant: a queue is changed only by [`Disk::append`], [`Disk::append_wire`] and [`Disk::seal`], which put the
//! product's bytes into segments; it is read only by the product's `step` and `Scanner`.

use std::collections::BTreeMap;

use gangway_shared::api::{HoldState, Role, Tally};
use gangway_shared::id::{HoldId, LaneKey};
use gangway_switch::port::{Frame, VnetHdr};
use gangway_switch::spool::Kind;
use gangway_switch::spool::format::{
    self, BATCH_HEADER, EPOCH, FILE_HEADER, Fields, FileHeader, Marker, Origin, SEGMENT_MAGIC, Step,
};
use gangway_switch::spool::recover::{End, Scanner, epoch_of};

use crate::rng::Rng;
use crate::seen::{Counts, Seen};

/// Bytes of a segment: small, so that lanes have several.
pub const SEGMENT: usize = 4096;
/// What a disk writes at once.
const SECTOR: usize = 512;

/// Sender, queue, receiver. Senders are VMs by number, or [`EXT`].
pub type Lane = (u8, u8, u8);
/// The network outside.
pub const EXT: u8 = 99;

/// A frame by what it says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Numbered {
    /// The lane that it was sent on.
    pub lane: Lane,
    /// Its number there, from 1.
    pub n: u64,
}

impl Numbered {
    /// The announcement of a VM, on its way to its old host.
    pub fn mark(vm: u8) -> Numbered {
        Numbered {
            lane: (EXT, 1, vm),
            n: 0,
        }
    }

    /// As it lies in a guest's memory.
    pub fn encode(self) -> Vec<u8> {
        let mut b = vec![self.n as u8; 60 + (self.n % 3) as usize * 30];
        b[14..22].copy_from_slice(&self.n.to_le_bytes());
        (b[22], b[23], b[24]) = self.lane;
        b
    }

    /// From the spool.
    pub fn decode(b: &[u8]) -> Numbered {
        let mut n = [0; 8];
        n.copy_from_slice(&b[14..22]);
        Numbered {
            lane: (b[22], b[23], b[24]),
            n: u64::from_le_bytes(n),
        }
    }
}

/// The name that a lane has in the product.
pub fn key(lane: Lane) -> LaneKey {
    let name = |p: u8| {
        if p == EXT {
            "uplink".to_owned()
        } else {
            format!("vm{p}")
        }
    };
    LaneKey {
        from: name(lane.0),
        queue: u16::from(lane.1),
        to: name(lane.2),
    }
}

/// The lane of this name.
pub fn lane_of(key: &LaneKey) -> Lane {
    let number = |s: &str| {
        s.strip_prefix("vm")
            .map_or(EXT, |n| n.parse().unwrap_or(EXT))
    };
    (number(&key.from), key.queue as u8, number(&key.to))
}

/// Which queue.
pub type QueueId = (HoldId, Kind, Lane);

#[derive(Debug, Clone)]
struct Segment {
    written: Vec<u8>,
    synced: Vec<u8>,
    epoch: u64,
    at: usize,
    /// Not synced since it was written.
    dirty: bool,
}

/// A queue of the spool.
#[derive(Debug, Clone)]
pub struct Queue {
    id: QueueId,
    salt: u32,
    segments: Vec<Segment>,
    next_seq: u64,
    tally: Tally,
    sealed: bool,
    /// Delivered up to here: a word in the queue's metadata file.
    pub flushed: u64,
    flushed_synced: u64,
    /// A sync has failed; nothing is taken any more until the spool is opened again.
    pub failed: bool,
    synced_once: bool,
    /// Up to here it is on the platter: a sync said so and was true.
    synced_seq: u64,
    /// Up to here a sync has said so since, and lied.
    lied_seq: u64,
}

/// What a loss of power takes although a sync has said that it is there.
#[derive(Debug, Default)]
pub struct Betrayed {
    /// Their records.
    pub frames: Vec<Numbered>,
    /// An old record of them is back.
    pub holds: Vec<HoldId>,
}

/// Where a reader stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    segment: usize,
    offset: usize,
}

/// What a cursor points at.
pub enum At<'a> {
    /// An intact batch.
    Batch(format::Batch<'a>),
    /// No record follows.
    Sealed,
    /// Nothing is committed there yet.
    Nothing,
}

impl Queue {
    /// The last record's number.
    pub fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    /// Over all records.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// No record follows.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// What is at the cursor, which passes segment ends.
    pub fn at(&self, c: &mut Cursor) -> At<'_> {
        loop {
            let Some(s) = self.segments.get(c.segment) else {
                return At::Nothing;
            };
            c.offset = c.offset.max(FILE_HEADER);
            match format::step(&s.written[c.offset..], s.epoch, self.salt) {
                Step::Batch(b) => return At::Batch(b),
                Step::Marker(Marker::Next(_), _) => {
                    *c = Cursor {
                        segment: c.segment + 1,
                        offset: FILE_HEADER,
                    }
                }
                Step::Marker(Marker::Seal, _) => return At::Sealed,
                Step::Free | Step::Bad => return At::Nothing,
            }
        }
    }

    /// Behind this batch.
    pub fn pass(c: &mut Cursor, b: &format::Batch<'_>) {
        c.offset += b.span();
    }

    /// All its records.
    fn numbered(&self) -> Vec<(u64, Numbered)> {
        let (mut c, mut out) = (Cursor::default(), Vec::new());
        while let At::Batch(b) = self.at(&mut c) {
            out.extend(b.records().map(|r| (r.seq, Numbered::decode(r.frame))));
            Queue::pass(&mut c, &b);
        }
        out
    }

    /// Up to `max` records behind `flushed`, from the cursor's batch on; the cursor moves to the batch of the last one.
    pub fn unflushed(&self, c: &mut Cursor, max: usize) -> Vec<(u64, Numbered)> {
        let mut out = Vec::new();
        let mut look = *c;
        while let At::Batch(b) = self.at(&mut look) {
            if b.last_seq() <= self.flushed {
                Queue::pass(&mut look, &b);
                *c = look;
                continue;
            }
            for r in b.records().filter(|r| r.seq > self.flushed) {
                if out.len() == max {
                    return out;
                }
                out.push((r.seq, Numbered::decode(r.frame)));
            }
            Queue::pass(&mut look, &b);
        }
        out
    }

    /// What is on the platter for certain after a sync that said so: all, but for what a lie covers.
    pub fn promised(&self) -> u64 {
        if self.lied_seq > self.synced_seq {
            self.synced_seq
        } else {
            self.last_seq()
        }
    }

    /// Records on the platter, as a recovery after a loss of power would find them in order.
    pub fn durable_seq(&self) -> u64 {
        if !self.synced_once {
            return 0;
        }
        if self.segments.iter().all(|s| !s.dirty) {
            return self.last_seq();
        }
        let (scan, _) = scan(self, |s| &s.synced);
        match scan.damaged().first() {
            Some((first, _)) => first - 1,
            None => scan.next_seq() - 1,
        }
    }
}

fn scan<'q>(
    q: &'q Queue,
    bytes: impl Fn(&'q Segment) -> &'q Vec<u8>,
) -> (Scanner, Vec<(Option<u64>, usize, bool)>) {
    let mut scan = Scanner::new(q.salt);
    let mut ends = Vec::new();
    let mut said = None;
    for (number, s) in q.segments.iter().enumerate() {
        let b = bytes(s);
        let ours = |h: &FileHeader| {
            (h.hold, h.kind, &h.lane, h.number as usize) == (q.id.0, q.id.1, &key(q.id.2), number)
        };
        match epoch_of(b, ours, said.take(), q.salt) {
            Some(epoch) => {
                let end = scan.segment(b, epoch);
                if let End::Next(next) = end.end {
                    said = Some(next);
                }
                ends.push((Some(epoch), end.used, end.end == End::Sealed));
            }
            None => ends.push((None, 0, false)),
        }
    }
    (scan, ends)
}

/// What a hold is, on the disk: written before it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Which end.
    pub role: Role,
    /// Where it stands.
    pub state: HoldState,
    /// The source has named so many lanes; 0: not yet all.
    pub named: usize,
    /// The lanes that were closed.
    pub closed: Vec<Lane>,
}

#[derive(Debug, Clone, Default)]
struct RecordFile {
    written: Option<Record>,
    synced: Option<Record>,
}

/// No room: the quota, or the disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRoom;

/// See the module.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The queues.
    pub queues: BTreeMap<QueueId, Queue>,
    records: BTreeMap<HoldId, RecordFile>,
    /// Segments, at most.
    pub quota: usize,
    /// In use.
    pub used: usize,
    /// No more space at the moment.
    pub full: bool,
    /// A sync fails.
    pub failing: bool,
    /// A sync does nothing and says that it did.
    pub lying: bool,
    epoch: u64,
    without_power: bool,
    /// Of this disk.
    pub seen: Counts,
}

impl Disk {
    /// An empty one.
    pub fn new(quota: usize) -> Disk {
        Disk {
            queues: BTreeMap::new(),
            records: BTreeMap::new(),
            quota,
            used: 0,
            full: false,
            failing: false,
            lying: false,
            epoch: 1,
            without_power: false,
            seen: Counts::default(),
        }
    }

    fn segment(&mut self, id: QueueId, number: usize, first_seq: u64) -> Result<Segment, NoRoom> {
        // What waits on the target may not take the room that the shipment before it needs.
        let limit = match id.1 {
            Kind::Local if number > 0 => self.quota / 4 * 3,
            _ => self.quota,
        };
        if self.full {
            self.seen.count(Seen::DiskFull);
        }
        if self.full || self.used >= limit {
            return Err(NoRoom);
        }
        self.used += 1;
        self.epoch += 1;
        let header = FileHeader {
            hold: id.0,
            kind: id.1,
            lane: key(id.2),
            index: 0,
            number: number as u32,
            first_seq,
            segment_bytes: SEGMENT as u64,
            epoch: self.epoch,
        };
        let mut written = vec![0; SEGMENT];
        written[..FILE_HEADER].copy_from_slice(&header.encode(SEGMENT_MAGIC));
        Ok(Segment {
            written,
            synced: vec![0; SEGMENT],
            epoch: self.epoch,
            at: FILE_HEADER,
            dirty: true,
        })
    }

    /// A new queue; one that is there stays.
    pub fn create(&mut self, id: QueueId) -> Result<(), NoRoom> {
        if self.queues.contains_key(&id) {
            return Ok(());
        }
        let first = self.segment(id, 0, 1)?;
        let q = Queue {
            id,
            salt: format::salt(id.0, &key(id.2)),
            segments: vec![first],
            next_seq: 1,
            tally: Tally::default(),
            sealed: false,
            flushed: 0,
            flushed_synced: 0,
            failed: false,
            synced_once: false,
            synced_seq: 0,
            lied_seq: 0,
        };
        self.queues.insert(id, q);
        Ok(())
    }

    fn make_room(&mut self, id: QueueId, len: usize) -> Result<(), NoRoom> {
        let q = self.queues.get(&id).ok_or(NoRoom)?;
        if q.sealed || q.failed {
            return Err(NoRoom);
        }
        let last = &q.segments[q.segments.len() - 1];
        if last.at + len + BATCH_HEADER <= SEGMENT {
            return Ok(());
        }
        let (number, seq) = (q.segments.len(), q.next_seq);
        let next = self.segment(id, number, seq)?;
        let q = self.queues.get_mut(&id).ok_or(NoRoom)?;
        let marker = Marker::Next(next.epoch);
        q.put_marker(marker);
        q.segments.push(next);
        Ok(())
    }

    /// Appends frames and commits them; how many there was room for.
    pub fn append(&mut self, id: QueueId, frames: &[Numbered]) -> usize {
        let mut done = 0;
        let bytes: Vec<Vec<u8>> = frames.iter().map(|f| f.encode()).collect();
        let all: Vec<Frame<'_>> = bytes
            .iter()
            .map(|b| Frame::from_slice(VnetHdr::default(), b))
            .collect();
        while done < all.len() {
            let one = format::batch_len(1, format::slot_len(all[done].len));
            if self.make_room(id, one).is_err() {
                break;
            }
            let Some(q) = self.queues.get_mut(&id) else {
                break;
            };
            let (next_seq, salt) = (q.next_seq, q.salt);
            let Some(s) = q.segments.last_mut() else {
                break;
            };
            let (n, len) = format::fit(&all[done..], SEGMENT - s.at - BATCH_HEADER);
            let fields = Fields {
                first_seq: next_seq,
                time_ns: 0,
                origin: Origin::NONE,
            };
            let crc = format::write_batch(
                &mut s.written[s.at..s.at + len],
                s.epoch,
                &fields,
                &all[done..done + n],
                salt,
            );
            s.at += len;
            s.dirty = true;
            let sum = all[done..done + n].iter().map(|f| u64::from(f.len)).sum();
            q.took(n as u64, sum, crc);
            done += n;
        }
        done
    }

    /// Appends a batch as it was shipped, which the caller has checked to be the next.
    pub fn append_wire(&mut self, id: QueueId, wire: &[u8]) -> Result<(), NoRoom> {
        self.make_room(id, EPOCH + wire.len())?;
        let q = self.queues.get_mut(&id).ok_or(NoRoom)?;
        let batch = format::shipped(wire, q.salt).ok_or(NoRoom)?;
        let s = q.segments.last_mut().ok_or(NoRoom)?;
        let end = s.at + EPOCH + wire.len();
        s.written[s.at + EPOCH..end].copy_from_slice(wire);
        s.written[s.at..s.at + EPOCH].copy_from_slice(&s.epoch.to_le_bytes());
        s.at = end;
        s.dirty = true;
        q.took(u64::from(batch.count), batch.bytes, batch.crc);
        Ok(())
    }

    /// Looks at a shipped batch for this queue.
    pub fn shipped<'w>(&self, id: QueueId, wire: &'w [u8]) -> Option<format::Batch<'w>> {
        format::shipped(wire, self.queues.get(&id)?.salt)
    }

    /// No record will follow.
    pub fn seal(&mut self, id: QueueId) {
        if let Some(q) = self.queues.get_mut(&id)
            && !q.sealed
        {
            q.put_marker(Marker::Seal);
            q.sealed = true;
        }
    }

    /// Syncs a queue; false: it has failed, for good until the spool is opened again.
    pub fn sync(&mut self, id: QueueId) -> bool {
        let (failing, lying) = (self.failing, self.lying);
        let Some(q) = self.queues.get_mut(&id) else {
            return true;
        };
        q.failed |= failing;
        if failing {
            self.seen.count(Seen::FailingSync);
        }
        if q.failed {
            return false;
        }
        if lying {
            if q.segments.iter().any(|s| s.dirty) {
                q.lied_seq = q.last_seq();
                self.seen.count(Seen::LyingSync);
            }
        } else {
            for s in q.segments.iter_mut().filter(|s| s.dirty) {
                s.synced.copy_from_slice(&s.written);
                s.dirty = false;
            }
            q.flushed_synced = q.flushed;
            q.synced_once = true;
            (q.synced_seq, q.lied_seq) = (q.last_seq(), 0);
        }
        true
    }

    /// The record of a hold.
    pub fn record(&self, hold: HoldId) -> Option<&Record> {
        self.records.get(&hold)?.written.as_ref()
    }

    /// Puts a record in place, durably.
    pub fn persist(&mut self, hold: HoldId, record: Record) {
        let lying = self.lying;
        let file = self.records.entry(hold).or_default();
        file.written = Some(record);
        if lying {
            self.seen.count(Seen::LyingSync);
        } else {
            file.synced.clone_from(&file.written);
        }
    }

    /// All holds with a record.
    pub fn holds(&self) -> Vec<HoldId> {
        let there = self.records.iter().filter(|(_, f)| f.written.is_some());
        there.map(|(h, _)| *h).collect()
    }

    /// Frees the queues of a hold, and its record with them, at once (the product renames its directory).
    pub fn remove_hold(&mut self, hold: HoldId) {
        if let Some(f) = self.records.get_mut(&hold) {
            f.written = None;
            if !self.lying {
                f.synced = None;
            }
        }
        self.queues.retain(|id, q| {
            let keep = id.0 != hold;
            if !keep {
                self.used -= q.segments.len();
            }
            keep
        });
    }

    /// Segments that the queues have.
    pub fn segments(&self) -> usize {
        self.queues.values().map(|q| q.segments.len()).sum()
    }

    /// What the next start of the switch finds in the files; what is gone that may not be. `forget_tail`: a mutation.
    pub fn reopen(&mut self, forget_tail: bool) -> Option<String> {
        let mut gone = None;
        let without_power = std::mem::take(&mut self.without_power);
        for q in self.queues.values_mut() {
            let (had, was_sealed) = (q.last_seq(), q.sealed);
            let promised = if without_power { q.synced_seq } else { had };
            let (scan, ends) = scan(q, |s| &s.written);
            q.next_seq = scan.next_seq();
            q.tally = scan.tally();
            q.sealed = ends.last().is_some_and(|e| e.2);
            q.failed = !scan.damaged().is_empty();
            // Used segments only; a first one always.
            let used = ends
                .iter()
                .rposition(|e| e.0.is_some())
                .map_or(1, |n| n + 1);
            self.used -= q.segments.len() - used;
            q.segments.truncate(used);
            for (s, (epoch, at, _)) in q.segments.iter_mut().zip(ends) {
                s.at = at.max(FILE_HEADER);
                s.dirty = true;
                s.epoch = epoch.unwrap_or(s.epoch);
            }
            let header = FileHeader {
                hold: q.id.0,
                kind: q.id.1,
                lane: key(q.id.2),
                index: 0,
                number: 0,
                first_seq: 1,
                segment_bytes: SEGMENT as u64,
                epoch: q.segments[0].epoch,
            };
            if q.last_seq() == 0 && !q.sealed {
                q.segments[0].written[..FILE_HEADER].copy_from_slice(&header.encode(SEGMENT_MAGIC));
            }
            // What is behind the last batch does not come back.
            if let Some(s) = q.segments.last_mut() {
                let at = s.at;
                s.written[at..].fill(0);
            }
            q.flushed = q.flushed.min(q.last_seq());
            if forget_tail && !q.sealed && q.last_seq() > q.flushed {
                q.drop_last_batch();
            }
            let (lane, has) = (q.id.2, q.last_seq());
            if has < promised {
                gone = Some(format!("of {promised} records of {lane:?} {has} are left"));
            } else if was_sealed && !q.sealed && !without_power {
                gone = Some(format!("{lane:?} is not sealed any more"));
            }
            q.synced_seq = q.synced_seq.min(has);
            q.lied_seq = q.lied_seq.min(has);
        }
        gone
    }

    /// The power fails: of each sector that was not synced, either the old or the new is there.
    pub fn lose_power(&mut self, rng: &mut Rng) -> Betrayed {
        let mut betrayed = Betrayed::default();
        let (mut gone, mut torn) = (0, 0);
        self.without_power = true;
        self.queues.retain(|_, q| {
            let lied = q.synced_seq + 1..=q.lied_seq;
            let frames = q.numbered().into_iter().filter(|f| lied.contains(&f.0));
            betrayed.frames.extend(frames.map(|f| f.1));
            // Its directory was never synced.
            let keep = q.synced_once || rng.permille(500);
            if !keep {
                gone += q.segments.len();
                return false;
            }
            for s in &mut q.segments {
                for (w, d) in s
                    .written
                    .chunks_mut(SECTOR)
                    .zip(s.synced.chunks_mut(SECTOR))
                {
                    if w != d && rng.permille(500) {
                        w.copy_from_slice(d);
                        torn += 1;
                    }
                    d.copy_from_slice(w);
                }
            }
            if rng.permille(500) {
                q.flushed = q.flushed_synced;
            }
            true
        });
        self.used -= gone;
        (0..torn).for_each(|_| self.seen.count(Seen::TornWrite));
        for (hold, f) in &mut self.records {
            if f.written != f.synced && rng.permille(500) {
                f.written.clone_from(&f.synced);
                betrayed.holds.push(*hold);
            }
            f.synced.clone_from(&f.written);
        }
        betrayed
    }
}

impl Queue {
    fn took(&mut self, frames: u64, bytes: u64, crc: u32) {
        self.tally.count(frames, bytes);
        self.tally.mix(self.next_seq, crc);
        self.next_seq += frames;
    }

    fn put_marker(&mut self, kind: Marker) {
        let (seq, salt) = (self.last_seq(), self.salt);
        if let Some(s) = self.segments.last_mut() {
            let m = format::marker(s.epoch, kind, seq, salt);
            s.written[s.at..s.at + BATCH_HEADER].copy_from_slice(&m);
            s.at += BATCH_HEADER;
            s.dirty = true;
        }
    }

    fn drop_last_batch(&mut self) {
        let mut c = Cursor::default();
        let mut last = None;
        while let At::Batch(batch) = self.at(&mut c) {
            last = Some((c, batch.first_seq));
            Queue::pass(&mut c, &batch);
        }
        if let Some((c, first)) = last
            && c.segment + 1 == self.segments.len()
        {
            self.segments[c.segment].written[c.offset..].fill(0);
            self.segments[c.segment].at = c.offset;
            self.next_seq = first;
            let (scan, _) = scan(self, |s| &s.written);
            self.tally = scan.tally();
        }
    }
}
