//! Compares what two hosts remember of a hold, and says which frame is missing if one is (docs/operating/verify.md).
//!
//! Invariant: pure; every digest is made again from the indexes, and no stage is believed because it says so.

use std::collections::{BTreeMap, BTreeSet};

use gangway_shared::api::HoldState;
use gangway_shared::id::{HoldId, LaneKey};
use gangway_shared::ledger::{
    Account, IndexBatch, IndexFrame, LaneKind, Ledger, LedgerLane, Stage, account,
};
use serde::Serialize;

pub mod pcapng;
#[cfg(test)]
mod tests;

/// One host's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct End {
    /// All but the lanes.
    pub ledger: Ledger,
    /// In the file's order.
    pub lanes: Vec<LaneRecord>,
}

/// One lane of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LaneRecord {
    /// Stages.
    pub lane: LedgerLane,
    /// Of each frame, if there is one.
    pub index: Option<Vec<IndexBatch>>,
}

/// What the comparison came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "docs/operating/verify.md describes the keys")]
pub struct Verdict {
    pub migration: HoldId,
    /// `moved` or `put_back`.
    pub outcome: &'static str,
    /// No fault anywhere.
    pub clean: bool,
    pub frames: u64,
    pub bytes: u64,
    pub lanes: Vec<LaneVerdict>,
    /// That concern no lane.
    pub faults: Vec<String>,
}

/// Of one lane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "see Verdict")]
pub struct LaneVerdict {
    pub lane: String,
    pub kind: LaneKind,
    pub frames: u64,
    pub bytes: u64,
    /// In order of the stages.
    pub stages: Vec<StageVerdict>,
    pub faults: Vec<Fault>,
}

/// Of one stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "see Verdict")]
pub struct StageVerdict {
    pub host: String,
    pub stage: Stage,
    pub account: Account,
    pub agrees: bool,
}

/// Something that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "see Verdict")]
pub struct Fault {
    pub host: String,
    pub stage: Stage,
    /// The frames that are meant, if they are known.
    pub first_seq: Option<u64>,
    pub last_seq: Option<u64>,
    pub what: String,
}

/// Ranges of frames that are named of one comparison.
const NAMED: usize = 32;

/// The verdict on two records of one hold.
pub fn verify(source: &End, target: &End) -> Verdict {
    let mut faults = Vec::new();
    if source.ledger.hold != target.ledger.hold {
        faults.push(format!(
            "the records are of different holds: {} and {}",
            source.ledger.hold, target.ledger.hold
        ));
    }
    let moved = source.ledger.state == HoldState::Released;
    if source.ledger.state != target.ledger.state {
        faults.push(format!(
            "{} says {:?}, {} says {:?}",
            source.ledger.host, source.ledger.state, target.ledger.host, target.ledger.state
        ));
    }
    let mut lanes = Vec::new();
    let keys: BTreeSet<&LaneKey> = [source, target]
        .iter()
        .flat_map(|e| of_kind(e, LaneKind::Shipped).map(|r| &r.lane.lane))
        .collect();
    for key in keys {
        let (s, t) = (shipped(source, key), shipped(target, key));
        lanes.push(lane(key, source, s, target, t, moved));
    }
    for end in [source, target] {
        lanes.extend(of_kind(end, LaneKind::Behind).map(|r| behind(end, r)));
    }
    let clean = faults.is_empty() && lanes.iter().all(|l| l.faults.is_empty());
    Verdict {
        migration: source.ledger.hold,
        outcome: if moved { "moved" } else { "put_back" },
        clean,
        frames: lanes.iter().map(|l| l.frames).sum(),
        bytes: lanes.iter().map(|l| l.bytes).sum(),
        lanes,
        faults,
    }
}

fn of_kind(end: &End, kind: LaneKind) -> impl Iterator<Item = &LaneRecord> {
    end.lanes.iter().filter(move |r| r.lane.kind == kind)
}

fn shipped<'a>(end: &'a End, key: &LaneKey) -> Option<&'a LaneRecord> {
    of_kind(end, LaneKind::Shipped).find(|r| r.lane.lane == *key)
}

/// A lane that is being judged.
struct Judge {
    reference: Account,
    verdict: LaneVerdict,
}

impl Judge {
    fn new(key: &LaneKey, kind: LaneKind, reference: Account) -> Judge {
        Judge {
            reference,
            verdict: LaneVerdict {
                lane: key.to_string(),
                kind,
                frames: reference.frames,
                bytes: reference.bytes,
                stages: Vec::new(),
                faults: Vec::new(),
            },
        }
    }

    fn fault(&mut self, host: &str, stage: Stage, what: impl Into<String>) {
        self.range(host, stage, None, what);
    }

    fn range(
        &mut self,
        host: &str,
        stage: Stage,
        seqs: Option<(u64, u64)>,
        what: impl Into<String>,
    ) {
        self.verdict.faults.push(Fault {
            host: host.to_owned(),
            stage,
            first_seq: seqs.map(|s| s.0),
            last_seq: seqs.map(|s| s.1),
            what: what.into(),
        });
    }

    /// What a host's stages say, against the reference.
    fn record(&mut self, host: &str, r: &LaneRecord, wanted: &[Stage]) {
        let l = &r.lane;
        for lost in &l.lost {
            let what = format!("{}: {}", range_of(lost.first_seq, lost.last_seq), lost.why);
            self.range(
                host,
                lost.stage,
                Some((lost.first_seq, lost.last_seq)),
                what,
            );
        }
        if l.lost_more > 0 {
            self.fault(
                host,
                Stage::Deliver,
                format!("{} more frames were lost", l.lost_more),
            );
        }
        if l.dropped > 0 {
            self.fault(
                host,
                Stage::Accept,
                format!("{} frames could not be held", l.dropped),
            );
        }
        for &stage in wanted {
            match l.stage(stage) {
                Some(a) => self.stage(host, stage, a),
                None if self.reference.frames > 0 => {
                    self.fault(host, stage, "there is no account of it");
                }
                None => {}
            }
        }
    }

    fn stage(&mut self, host: &str, stage: Stage, a: &Account) {
        let agrees = a.agrees(&self.reference);
        self.verdict.stages.push(StageVerdict {
            host: host.to_owned(),
            stage,
            account: *a,
            agrees,
        });
        if !agrees {
            let r = self.reference;
            let what = format!(
                "{}; the records say {}",
                text(a),
                text(&Account {
                    digest: a.digest.and(r.digest),
                    roll: a.roll.and(r.roll),
                    ..r
                })
            );
            self.fault(host, stage, what);
        }
    }

    /// The host's index adds up to what it says that it is.
    fn index(&mut self, host: &str, r: &LaneRecord, stage: Stage) {
        let (Some(index), Some(said)) = (&r.index, r.lane.stage(stage)) else {
            self.fault(host, stage, "there is no index of it");
            return;
        };
        let made = account(index);
        if made != *said {
            let what = format!(
                "its index adds up to {}, not to {}",
                text(&made),
                text(said)
            );
            self.fault(host, stage, what);
        }
        if made.frames > 0 && (made.first_seq, made.last_seq) != (1, made.frames) {
            let what = format!("its numbers are not 1 to {} without gaps", made.frames);
            self.fault(host, stage, what);
        }
    }

    /// Which frames the target does not have as the source has them.
    fn differences(&mut self, source: (&str, &[IndexBatch]), target: (&str, &[IndexBatch])) {
        let (here, there) = (by_number(source.1), by_number(target.1));
        let mut found = Ranges::default();
        for (seq, f) in &here {
            match there.get(seq) {
                None => found.add(*seq, "missing", f),
                Some(g) if g != f => found.add(*seq, "not the same frame", f),
                Some(_) => {}
            }
        }
        for (seq, f) in there.iter().filter(|(seq, _)| !here.contains_key(seq)) {
            found.add(*seq, "not in the source's record", f);
        }
        for (first, last, why, time_ns, len) in found.list {
            let mut what = format!("{}: {why}", range_of(first, last));
            if first == last {
                what = format!("{what} ({len} bytes, accepted at {time_ns} ns)");
            }
            self.range(target.0, Stage::Store, Some((first, last)), what);
        }
        if found.more > 0 {
            self.fault(
                target.0,
                Stage::Store,
                format!("{} more frames differ", found.more),
            );
        }
    }
}

/// A frame by which two indexes are compared: when it came, its bytes.
type Print = (u64, IndexFrame);

fn by_number(index: &[IndexBatch]) -> BTreeMap<u64, Print> {
    let of = |b: &'_ IndexBatch, f: &IndexFrame| (b.time_ns, *f);
    let frames = index
        .iter()
        .flat_map(|b| b.numbered().map(move |(n, f)| (n, of(b, f))));
    frames.collect()
}

#[derive(Default)]
struct Ranges {
    list: Vec<(u64, u64, &'static str, u64, u32)>,
    more: u64,
}

impl Ranges {
    fn add(&mut self, seq: u64, why: &'static str, (time_ns, f): &Print) {
        let full = self.list.len() >= NAMED;
        match self.list.last_mut() {
            Some(r) if r.1.checked_add(1) == Some(seq) && r.2 == why => r.1 = seq,
            _ if full => self.more += 1,
            _ => self.list.push((seq, seq, why, *time_ns, f.len)),
        }
    }
}

fn range_of(first: u64, last: u64) -> String {
    if first == last {
        format!("frame {first}")
    } else {
        format!("frames {first} to {last}")
    }
}

fn text(a: &Account) -> String {
    let mut t = format!(
        "{} frames ({} to {}), {} bytes",
        a.frames, a.first_seq, a.last_seq, a.bytes
    );
    for (name, v) in [("digest", a.digest), ("roll", a.roll)] {
        if let Some(v) = v {
            t += &format!(", {name} {v:016x}");
        }
    }
    t
}

const ON_SOURCE: [Stage; 4] = [Stage::Accept, Stage::Spool, Stage::Ship, Stage::Acknowledge];
const ON_TARGET: [Stage; 4] = [Stage::Receive, Stage::Store, Stage::Flush, Stage::Deliver];
/// Of what never left its host.
const AT_HOME: [Stage; 4] = [Stage::Accept, Stage::Spool, Stage::Flush, Stage::Deliver];

fn lane(
    key: &LaneKey,
    source: &End,
    s: Option<&LaneRecord>,
    target: &End,
    t: Option<&LaneRecord>,
    moved: bool,
) -> LaneVerdict {
    let index = |r: Option<&LaneRecord>| r.and_then(|r| r.index.clone());
    let (from, to) = (&source.ledger.host, &target.ledger.host);
    let reference = account(index(s).or_else(|| index(t)).iter().flatten());
    let mut j = Judge::new(key, LaneKind::Shipped, reference);
    match s {
        Some(s) => {
            j.index(from, s, Stage::Spool);
            let wanted = if moved { &ON_SOURCE } else { &AT_HOME };
            j.record(from, s, wanted);
        }
        None => j.fault(from, Stage::Accept, "the source does not know this lane"),
    }
    match t {
        Some(t) if moved => {
            j.index(to, t, Stage::Store);
            j.record(to, t, &ON_TARGET);
            if let (Some(a), Some(b)) = (index(s), index(Some(t))) {
                j.differences((from, &a), (to, &b));
            }
        }
        // What came before it was put back does not count, unless a VM got it.
        Some(t) if t.lane.stage(Stage::Deliver).is_some_and(|a| a.frames > 0) => {
            j.fault(to, Stage::Deliver, "delivered, although all was put back");
        }
        None if moved => j.fault(to, Stage::Receive, "the target does not know this lane"),
        _ => {}
    }
    j.verdict
}

/// What waited behind older frames, on one host.
fn behind(end: &End, r: &LaneRecord) -> LaneVerdict {
    let reference = account(r.index.iter().flatten());
    let mut j = Judge::new(&r.lane.lane, LaneKind::Behind, reference);
    j.index(&end.ledger.host, r, Stage::Spool);
    j.record(&end.ledger.host, r, &AT_HOME);
    j.verdict
}
