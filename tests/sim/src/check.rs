//! The checker: what the contract of a hold (mission, ADR-0001) says about frames, from outside. It knows what guests
//! have sent and what they got, and nothing of how.

use std::collections::{BTreeMap, BTreeSet};

use crate::disk::{EXT, Lane, Numbered};
use crate::seen::Counts;
use crate::world::BURST;

#[derive(Debug, Default)]
struct Log {
    sent: u64,
    seen: BTreeSet<u64>,
    last: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Check {
    lanes: BTreeMap<Lane, Log>,
    /// Taken back by the guest that sent them (a reset).
    pub withdrawn: BTreeSet<Numbered>,
    /// From outside, and in our hands.
    accepted: BTreeSet<Numbered>,
    /// Lanes that are cut, as the source has said.
    pub cut: BTreeSet<Lane>,
    /// Deaths of switches.
    pub kills: u64,
    twice: u64,
    /// A disk had said that they are there, and lost them with the power.
    pub betrayed: BTreeSet<Numbered>,
    /// VMs whose process died, and that run nowhere any more: nobody can give them a frame.
    pub dead: BTreeSet<u8>,
    /// Faults that have happened.
    pub seen: Counts,
    /// A VM has run on the target.
    pub activated: bool,
    /// Why the source closed lanes without having seen the mark.
    pub gave_up: bool,
    /// Frames delivered.
    pub delivered: u64,
    /// Frames that went through a spool.
    pub held: u64,
    broken: Option<String>,
}

impl Check {
    /// A guest, or the network, sends.
    pub fn send(&mut self, lane: Lane) -> Numbered {
        let log = self.lanes.entry(lane).or_default();
        log.sent += 1;
        Numbered { lane, n: log.sent }
    }

    /// A switch has taken a frame from outside.
    pub fn accept(&mut self, frame: Numbered) {
        if frame.lane.0 == EXT {
            self.accepted.insert(frame);
        }
    }

    /// A frame reached its receiver.
    pub fn deliver(&mut self, frame: Numbered, on: &str, is_source: bool) {
        self.delivered += 1;
        if is_source && self.cut.contains(&frame.lane) {
            self.violated(
                "cut",
                format!("{frame:?} was delivered on {on} behind the acknowledged freeze"),
            );
        }
        let log = self.lanes.entry(frame.lane).or_default();
        let (sent, last) = (log.sent, log.last);
        if !log.seen.insert(frame.n) {
            self.twice += 1;
            let allowed = BURST as u64 * self.kills;
            if self.twice > allowed || frame.n + BURST as u64 <= last {
                self.violated(
                    "no duplicate beyond the bound",
                    format!(
                        "{frame:?} again on {on}, behind {last}; {} duplicates after {} crashes",
                        self.twice, self.kills
                    ),
                );
            }
        } else if frame.n < last {
            self.violated("order", format!("{frame:?} on {on} behind {last}"));
        } else if frame.n > sent {
            self.violated("complete", format!("{frame:?} was never sent"));
        } else {
            log.last = frame.n;
        }
    }

    /// Only the first counts.
    pub fn violated(&mut self, what: &str, how: String) {
        self.broken.get_or_insert_with(|| format!("{what}: {how}"));
    }

    /// What was violated.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// At the end.
    pub fn complete(&mut self) {
        let mut missing = Vec::new();
        for (lane, log) in &self.lanes {
            for n in 1..=log.sent {
                let frame = Numbered { lane: *lane, n };
                let due = if lane.0 == EXT {
                    self.accepted.contains(&frame)
                } else {
                    !self.withdrawn.contains(&frame)
                };
                let excused = self.betrayed.contains(&frame) || self.dead.contains(&lane.2);
                if due && !excused && !log.seen.contains(&n) {
                    missing.push(frame);
                }
            }
        }
        if let Some(first) = missing.first() {
            let how = format!("{} frames are missing, first {first:?}", missing.len());
            self.violated("complete", how);
        }
    }
}
