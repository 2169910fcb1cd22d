//! The account of a migration: what was measured, and whether both ends agree.
//!
//! Invariant: pure; made from the mission, the journal's records and the facts alone, so that it can be made again.

use std::collections::{BTreeMap, BTreeSet};

use gangway_shared::api::{HoldInfo, LaneInfo, Tally};
use gangway_shared::id::{HoldId, LaneKey};
use serde::{Deserialize, Serialize};

use super::machine::{Entry, Outcome};
use super::plan::Mission;
use super::steps::{FreezeMode, Step};

/// What the shells measure on the way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// By VM.
    pub vms: BTreeMap<String, VmFacts>,
    /// VMs that QEMU stopped by itself, before the freeze.
    pub early: Vec<String>,
    /// VMs that had died on the target when they were to run there.
    #[serde(default)]
    pub lost: Vec<String>,
    /// VMs that had died on the source when things were put back.
    #[serde(default)]
    pub died: BTreeSet<String>,
    /// When the freeze was acknowledged, nanoseconds since the Unix epoch, the source switch's clock.
    pub frozen_ns: u64,
    /// False if a TAP's queue was not seen empty.
    pub drained: Option<bool>,
    /// The source's hold, last seen.
    pub source: Option<HoldInfo>,
    /// The target's hold, last seen.
    pub target: Option<HoldInfo>,
}

/// Of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFacts {
    /// Where the target's VMM takes its memory.
    pub uri: String,
    /// Bytes sent while it ran.
    pub precopy_bytes: u64,
    /// Bytes known to be left when it was stopped.
    pub left_bytes: u64,
    /// Passes over its memory.
    pub passes: u64,
    /// Pages per second, as QEMU last said.
    pub dirty_pages_rate: u64,
    /// QEMU's own figure, which leaves out most of the pause.
    pub downtime_qemu_ms: Option<u64>,
    /// The source QEMU's STOP, nanoseconds since the Unix epoch.
    pub stop_ns: u64,
    /// The target QEMU's RESUME.
    pub resume_ns: u64,
}

/// `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "docs/operating/migrate.md describes the keys")]
pub struct Report {
    pub migration: HoldId,
    /// `moved`, `disagree` (moved, but the two ends' accounts differ), `rolled_back`, ...
    pub outcome: String,
    pub from: String,
    pub to: String,
    pub group: Vec<String>,
    pub order: Vec<String>,
    pub why: Vec<String>,
    pub mode: Mode,
    pub vms: Vec<VmReport>,
    pub links: Vec<LinkReport>,
    /// First STOP to last RESUME.
    pub blackout_ms: Option<f64>,
    /// Freeze acknowledged to lanes let go.
    pub freeze_to_thaw_ms: Option<f64>,
    pub stopped_early: Vec<String>,
    /// Died on the target when they were to run there; their stopped copies on the source were kept.
    #[serde(default)]
    pub lost: Vec<String>,
    /// Had died on the source when things were put back.
    #[serde(default)]
    pub died: BTreeSet<String>,
    pub tap_drained: Option<bool>,
    pub steps: Vec<StepReport>,
    pub troubles: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "see Report")]
pub struct Mode {
    pub freeze: FreezeMode,
    pub switchover: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "see Report")]
pub struct VmReport {
    pub name: String,
    pub precopy_bytes: u64,
    pub left_bytes: u64,
    pub passes: u64,
    pub dirty_pages_rate: u64,
    pub stop_ns: Option<u64>,
    pub resume_ns: Option<u64>,
    /// STOP to RESUME.
    pub pause_ms: Option<f64>,
    pub downtime_qemu_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "see Report")]
pub struct LinkReport {
    pub from: String,
    pub to: String,
    pub queue: u16,
    pub lane: String,
    pub held_frames: u64,
    pub held_bytes: u64,
    pub shipped_frames: u64,
    pub shipped_bytes: u64,
    pub flushed_frames: u64,
    pub flushed_bytes: u64,
    pub queued_behind: u64,
    pub dropped: u64,
    pub digest_source: String,
    pub digest_target: String,
    /// Both ends have the same, all of it was delivered, nothing dropped.
    pub agree: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "see Report")]
pub struct StepReport {
    pub step: Step,
    pub begin_ns: u64,
    pub ms: Option<f64>,
    pub failures: u32,
}

fn ms(ns: u64) -> f64 {
    (ns as f64 / 1000.0).round() / 1000.0
}

fn span_ms(from: u64, to: u64) -> Option<f64> {
    (from > 0 && to >= from).then(|| ms(to - from))
}

impl Report {
    /// The account. Times of the entries are the coordinator's, those of VMs and freezes are the hosts'.
    pub fn new(
        mission: &Mission,
        facts: &Facts,
        entries: &[(u64, Entry)],
        troubles: &[String],
    ) -> Report {
        let some = |ns: u64| (ns > 0).then_some(ns);
        let vms: Vec<VmReport> = mission
            .vms()
            .iter()
            .map(|name| {
                let f = facts.vms.get(name).cloned().unwrap_or_default();
                VmReport {
                    name: name.clone(),
                    precopy_bytes: f.precopy_bytes,
                    left_bytes: f.left_bytes,
                    passes: f.passes,
                    dirty_pages_rate: f.dirty_pages_rate,
                    stop_ns: some(f.stop_ns),
                    resume_ns: some(f.resume_ns),
                    pause_ms: span_ms(f.stop_ns, f.resume_ns),
                    downtime_qemu_ms: f.downtime_qemu_ms,
                }
            })
            .collect();
        let ended = entries.iter().rev().find_map(|(_, e)| match e {
            Entry::End(o) => Some(*o),
            _ => None,
        });
        let moved = ended == Some(Outcome::Moved);
        let links = links(facts, moved);
        let outcome = match ended {
            None => "running",
            Some(Outcome::Moved) if links.iter().any(|l| !l.agree) => "disagree",
            Some(Outcome::Moved) => "moved",
            Some(Outcome::NothingDone) => "nothing_done",
            Some(Outcome::RolledBack) => "rolled_back",
            Some(Outcome::RollbackIncomplete) => "rollback_incomplete",
            Some(Outcome::Unfinished) => "unfinished",
        };
        let first_stop = vms.iter().filter_map(|v| v.stop_ns).min().unwrap_or(0);
        let last_resume = vms.iter().filter_map(|v| v.resume_ns).max().unwrap_or(0);
        let resumed = |v: &VmReport| v.resume_ns.is_some() || facts.lost.contains(&v.name);
        let all_resumed = vms.iter().all(resumed);
        let thaw = if moved {
            facts.target.as_ref()
        } else {
            facts.source.as_ref()
        }
        .map_or(0, |h| h.thawed_ns);
        let mut group = mission.vms().to_vec();
        group.sort();
        Report {
            migration: mission.id,
            outcome: outcome.to_owned(),
            from: mission.from.clone(),
            to: mission.to.clone(),
            group,
            order: mission.vms().to_vec(),
            why: mission.plan.why.clone(),
            mode: Mode {
                freeze: mission.freeze,
                switchover: "atomic".to_owned(),
            },
            blackout_ms: if all_resumed {
                span_ms(first_stop, last_resume)
            } else {
                None
            },
            freeze_to_thaw_ms: span_ms(facts.frozen_ns, thaw),
            vms,
            links,
            stopped_early: facts.early.clone(),
            lost: facts.lost.clone(),
            died: facts.died.clone(),
            tap_drained: facts.drained,
            steps: steps(entries),
            troubles: troubles.to_vec(),
        }
    }
}

/// The lanes of both ends side by side.
fn links(facts: &Facts, moved: bool) -> Vec<LinkReport> {
    let mut lanes: BTreeMap<&LaneKey, (Option<&LaneInfo>, Option<&LaneInfo>)> = BTreeMap::new();
    for l in facts.source.iter().flat_map(|h| &h.lanes) {
        lanes.entry(&l.lane).or_default().0 = Some(l);
    }
    for l in facts.target.iter().flat_map(|h| &h.lanes) {
        lanes.entry(&l.lane).or_default().1 = Some(l);
    }
    let hex = |t: Tally| format!("{:016x}", t.digest);
    lanes
        .into_iter()
        .map(|(lane, (source, target))| {
            let tally = |l: Option<&LaneInfo>, pick: fn(&LaneInfo) -> Tally| {
                l.map(pick).unwrap_or_default()
            };
            let held = tally(source, |l| l.held);
            let shipped = tally(source, |l| l.shipped);
            let received = tally(target, |l| l.held);
            // After an abort the source itself delivers.
            let flushed = tally(if moved { target } else { source }, |l| l.flushed);
            let dropped = source.map_or(0, |l| l.dropped) + target.map_or(0, |l| l.dropped);
            let arrived = !moved || (held == received && shipped == held);
            LinkReport {
                from: lane.from.clone(),
                to: lane.to.clone(),
                queue: lane.queue,
                lane: lane.to_string(),
                held_frames: held.frames,
                held_bytes: held.bytes,
                shipped_frames: shipped.frames,
                shipped_bytes: shipped.bytes,
                flushed_frames: flushed.frames,
                flushed_bytes: flushed.bytes,
                queued_behind: target.map_or(0, |l| l.queued_behind),
                dropped,
                digest_source: hex(held),
                digest_target: hex(received),
                agree: arrived
                    && flushed.frames == held.frames
                    && flushed.bytes == held.bytes
                    && dropped == 0,
            }
        })
        .collect()
}

/// What differs between the two ends' sealed lanes, before the point of no return.
pub fn difference(source: &HoldInfo, target: &HoldInfo) -> Option<String> {
    for s in source.lanes.iter().filter(|l| l.sealed) {
        if s.dropped > 0 {
            return Some(format!(
                "lane {}: {} frames could not be held",
                s.lane, s.dropped
            ));
        }
        let there = target
            .lanes
            .iter()
            .find(|t| t.lane == s.lane)
            .map(|t| t.held)
            .unwrap_or_default();
        if there != s.held {
            return Some(format!(
                "lane {}: the source held {} frames (digest {:016x}), the target has {} ({:016x})",
                s.lane, s.held.frames, s.held.digest, there.frames, there.digest
            ));
        }
    }
    None
}

fn steps(entries: &[(u64, Entry)]) -> Vec<StepReport> {
    let mut out: Vec<StepReport> = Vec::new();
    for (at, e) in entries {
        match e {
            Entry::Begin(step) if out.iter().all(|s| s.step != *step) => {
                out.push(StepReport {
                    step: *step,
                    begin_ns: *at,
                    ms: None,
                    failures: 0,
                });
            }
            Entry::Done(step) | Entry::Failed(step) => {
                if let Some(s) = out.iter_mut().find(|s| s.step == *step) {
                    s.ms = Some(ms(at.saturating_sub(s.begin_ns)));
                    s.failures += u32::from(matches!(e, Entry::Failed(_)));
                }
            }
            _ => {}
        }
    }
    out
}
