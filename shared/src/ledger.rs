//! What a host remembers of a hold when it is over (docs/formats/ledger.md): who had which frame of each lane, stage by
//! stage, so that anybody can check that none is missing.
//!
//! Invariant: pure; a digest of a stage can be made again from the index of either host.

use serde::{Deserialize, Serialize};
use wincode::{SchemaRead, SchemaWrite};

use crate::api::{HoldState, Role, Tally};
use crate::id::{HoldId, LaneKey};

/// Where a frame has been, in this order.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    SchemaRead,
    SchemaWrite,
)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Taken from its sender: the writer's own count while it wrote.
    Accept,
    /// In the files of the source's spool (of a local queue: of its host's), read again at the end.
    Spool,
    /// Handed to the network by the source.
    Ship,
    /// Acknowledged by the target, as the source was told.
    Acknowledge,
    /// Taken from the network by the target, checked: the writer's own count.
    Receive,
    /// In the files of the target's spool, read again at the end.
    Store,
    /// Read from the spool to be delivered.
    Flush,
    /// Taken by the receiving port.
    Deliver,
}

impl Stage {
    /// As in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Accept => "accept",
            Stage::Spool => "spool",
            Stage::Ship => "ship",
            Stage::Acknowledge => "acknowledge",
            Stage::Receive => "receive",
            Stage::Store => "store",
            Stage::Flush => "flush",
            Stage::Deliver => "deliver",
        }
    }
}

/// What one stage has seen of a lane.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, SchemaRead, SchemaWrite,
)]
pub struct Account {
    /// Sequence number of the first frame; 0 if there is none.
    pub first_seq: u64,
    /// Of the last one.
    pub last_seq: u64,
    /// Frames.
    pub frames: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Over the batches, in order (docs/formats/spool.md, "Digest"); not for stages that see frames only.
    pub digest: Option<u64>,
    /// Over the frames ([`roll`]); not for stages that see batches only.
    pub roll: Option<u64>,
}

impl Account {
    /// Of a queue up to record `last_seq`, whole batches.
    pub fn batches(last_seq: u64, t: &Tally) -> Account {
        Account {
            first_seq: u64::from(t.frames > 0),
            last_seq,
            frames: t.frames,
            bytes: t.bytes,
            digest: Some(t.digest),
            roll: None,
        }
    }

    /// One frame more, by its place and length.
    #[inline]
    pub fn frame(&mut self, seq: u64, len: u32) {
        if self.frames == 0 {
            self.first_seq = seq;
        }
        self.last_seq = seq;
        self.frames += 1;
        self.bytes += u64::from(len);
        self.roll = Some(self.roll.unwrap_or(0).wrapping_add(roll(seq, len)));
    }

    /// What a batch adds to the digest.
    pub fn batch(&mut self, first_seq: u64, checksum: u32) {
        let mut t = Tally {
            digest: self.digest.unwrap_or(0),
            ..Tally::default()
        };
        t.mix(first_seq, checksum);
        self.digest = Some(t.digest);
    }

    /// The same frames, as far as both stages can tell.
    pub fn agrees(&self, other: &Account) -> bool {
        let same = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        (self.first_seq, self.last_seq, self.frames, self.bytes)
            == (other.first_seq, other.last_seq, other.frames, other.bytes)
            && same(self.digest, other.digest)
            && same(self.roll, other.roll)
    }
}

/// What a frame adds (modulo 2^64) to the sum by which stages are compared that do not see batches: which frames there
/// were, each once, by place and length.
#[inline]
pub fn roll(seq: u64, len: u32) -> u64 {
    let mut t = Tally::default();
    t.mix(seq, len);
    t.digest
}

/// What a stage has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct StageAccount {
    /// Which.
    pub stage: Stage,
    /// What.
    pub account: Account,
}

/// Which queue of the hold this is.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    SchemaRead,
    SchemaWrite,
)]
#[serde(rename_all = "snake_case")]
pub enum LaneKind {
    /// Held on the source, shipped to the target: on both hosts.
    Shipped,
    /// Taken behind what is shipped (target), or behind what is put back (source): on one host.
    Behind,
}

/// Frames that a stage could not pass on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct Lost {
    /// Where.
    pub stage: Stage,
    /// The first of them.
    pub first_seq: u64,
    /// The last of them.
    pub last_seq: u64,
    /// Why, as the counters of drops are named.
    pub why: String,
}

/// A lane of a [`Ledger`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct LedgerLane {
    /// Which.
    pub lane: LaneKey,
    /// Which of its queues.
    pub kind: LaneKind,
    /// Between two VMs of the group.
    pub inside: bool,
    /// In order of the stages.
    pub stages: Vec<StageAccount>,
    /// By number, the first of them.
    pub lost: Vec<Lost>,
    /// Frames that were lost in ranges that found no place in `lost`.
    pub lost_more: u64,
    /// Frames that could not be held; they have no number.
    pub dropped: u64,
    /// There is an index of its frames.
    pub indexed: bool,
    /// Its frames were kept.
    pub kept: bool,
}

impl LedgerLane {
    /// What a stage has seen.
    pub fn stage(&self, stage: Stage) -> Option<&Account> {
        self.stages
            .iter()
            .find(|s| s.stage == stage)
            .map(|s| &s.account)
    }
}

/// One host's record of a hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct Ledger {
    /// Which.
    pub hold: HoldId,
    /// Whose end.
    pub role: Role,
    /// `released` or `aborted`.
    pub state: HoldState,
    /// This host.
    pub host: String,
    /// The other one.
    pub peer: String,
    /// The group.
    pub vms: Vec<String>,
    /// When the last freeze was acknowledged: nanoseconds since the Unix epoch, this host's clock; 0: never.
    pub frozen_ns: u64,
    /// When lanes were let go, likewise.
    pub thawed_ns: u64,
    /// When the last lane had drained, likewise.
    pub drained_ns: u64,
    /// When this was written, likewise.
    pub made_ns: u64,
    /// How many lanes there are.
    pub lanes: u32,
}

/// A batch of a lane's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct IndexBatch {
    /// Number of its first frame.
    pub first_seq: u64,
    /// When its frames were accepted: nanoseconds since the Unix epoch, the source's clock.
    pub time_ns: u64,
    /// Its checksum.
    pub crc: u32,
    /// Its frames.
    pub frames: Vec<IndexFrame>,
}

impl IndexBatch {
    /// Its frames with their numbers, which are the host's word: they may be any.
    pub fn numbered(&self) -> impl Iterator<Item = (u64, &IndexFrame)> {
        let frames = (0..).zip(&self.frames);
        frames.map(|(n, f)| (self.first_seq.wrapping_add(n), f))
    }
}

/// A frame of a lane's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
pub struct IndexFrame {
    /// Its bytes.
    pub len: u32,
    /// CRC-32C over its virtio-net header (12 bytes) and itself.
    pub crc: u32,
}

/// A frame that was kept.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct KeptFrame {
    /// Its number on the lane.
    pub seq: u64,
    /// When it was accepted: nanoseconds since the Unix epoch, the source's clock.
    pub time_ns: u64,
    /// From its Ethernet header on.
    pub bytes: Vec<u8>,
}

/// What an index says of its lane.
pub fn account<'a>(index: impl IntoIterator<Item = &'a IndexBatch>) -> Account {
    let mut a = Account {
        digest: Some(0),
        roll: Some(0),
        ..Account::default()
    };
    for b in index {
        for (seq, f) in b.numbered() {
            a.frame(seq, f.len);
        }
        a.batch(b.first_seq, b.crc);
    }
    a
}
