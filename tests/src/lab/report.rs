//! What a run leaves behind: `report.json`.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

use super::cpu::Cpu;
use super::traffic::Flow;

/// The whole file: Gangway's run at the top level, what it is compared with below.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Gangway's run.
    #[serde(flatten)]
    pub run: Option<Run>,
    /// The same group, traffic and machine over Linux bridges: stopped together, resumed together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Run>,
    /// The same, with each VM migrated as soon as the one before has arrived.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline_one_by_one: Option<Run>,
    /// The control over Linux bridges: stopped together and resumed together on A, nothing moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_place: Option<Run>,
}

/// One migration of the group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Run {
    /// The group's name.
    pub group: String,
    /// The VMs, from the least dependent to the most dependent one.
    pub order: Vec<String>,
    /// How it was done.
    pub mode: Mode,
    /// Nothing was lost, duplicated, reordered or altered, and both ends of every link agree.
    pub clean: bool,
    /// Each VM's own figures, in order.
    pub vms: Vec<VmFigures>,
    /// Each link's buffer; empty without Gangway.
    pub links: Vec<LinkFigures>,
    /// From the first pause to the last resume.
    pub blackout_ms: f64,
    /// From the freeze to the thaw; `None` without Gangway.
    pub freeze_to_thaw_ms: Option<f64>,
    /// From the order to migrate to the last resume.
    pub migration_ms: f64,
    /// What the run took of the machine's processors.
    pub cpu: Cpu,
    /// The traffic's verdict.
    pub traffic: Vec<Flow>,
    /// The coordinator's own report, whole; absent without Gangway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coordinator: Option<serde_json::Value>,
}

/// How a run was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mode {
    /// `gangway`, `gang-stop`, `one-by-one` or `in-place`.
    pub method: String,
    /// `vhost-user` or `tap`.
    pub ports: String,
    /// `switchover` or `early`; `None` without Gangway.
    pub freeze: Option<String>,
}

/// A VM's figures.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VmFigures {
    /// Its name.
    pub name: String,
    /// Bytes of memory copied while it ran.
    pub precopy_bytes: u64,
    /// From QEMU's event STOP on the source to RESUME on the target.
    pub pause_ms: f64,
    /// When it stopped, in microseconds since 1970.
    pub stopped_at_us: u64,
    /// When it ran again.
    pub resumed_at_us: u64,
}

/// A queue's buffer on a link, as the coordinator's report has it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkFigures {
    /// The sending VM, or the outside.
    pub from: String,
    /// The receiving VM, or the outside.
    pub to: String,
    /// Frames held on the source.
    pub held_frames: u64,
    /// Bytes held on the source.
    pub held_bytes: u64,
    /// Frames shipped to the target.
    pub shipped_frames: u64,
    /// Bytes shipped to the target.
    pub shipped_bytes: u64,
    /// Frames that the target gave to the receiver.
    pub flushed_frames: u64,
    /// Bytes that the target gave to the receiver.
    pub flushed_bytes: u64,
    /// Frames of a held link that were dropped.
    pub dropped: u64,
    /// Digest of what was held.
    pub digest_source: String,
    /// Digest of what was flushed.
    pub digest_target: String,
    /// Both ends have the same, all of it was delivered, nothing dropped.
    pub agree: bool,
}

impl Run {
    /// Fills in what follows from the rest.
    pub fn conclude(&mut self) {
        let first = self
            .vms
            .iter()
            .map(|vm| vm.stopped_at_us)
            .min()
            .unwrap_or(0);
        let last = self
            .vms
            .iter()
            .map(|vm| vm.resumed_at_us)
            .max()
            .unwrap_or(0);
        self.blackout_ms = ms(last.saturating_sub(first));
        for vm in &mut self.vms {
            vm.pause_ms = ms(vm.resumed_at_us.saturating_sub(vm.stopped_at_us));
        }
        self.clean = !self.traffic.is_empty()
            && self.traffic.iter().all(Flow::is_clean)
            && self.links.iter().all(|link| link.agree);
    }
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

impl Report {
    /// Writes `report.json` into a folder.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let path = dir.join("report.json");
        // Never half a report under its name.
        let new = dir.join("report.json.new");
        std::fs::write(&new, serde_json::to_vec_pretty(self)?)
            .with_context(|| new.display().to_string())?;
        std::fs::rename(&new, &path).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_users_rely_on_are_there() {
        let mut run = Run {
            traffic: vec![Flow::default()],
            ..Run::default()
        };
        run.vms = vec![VmFigures::default()];
        run.links = vec![LinkFigures::default()];
        let report = Report {
            run: Some(run.clone()),
            baseline: Some(run),
            ..Report::default()
        };
        let value = serde_json::to_value(&report).unwrap();
        for top in [&value, &value["baseline"]] {
            for key in [
                "group",
                "order",
                "mode",
                "vms",
                "links",
                "blackout_ms",
                "freeze_to_thaw_ms",
                "traffic",
            ] {
                assert!(top.get(key).is_some(), "{key}");
            }
            let keys = "name sent received lost duplicated reordered stall_ms_max retransmits";
            for key in keys.split(' ') {
                assert!(top["traffic"][0].get(key).is_some(), "{key}");
            }
        }
    }

    #[test]
    fn the_blackout_is_from_the_first_pause_to_the_last_resume() {
        let vm = |stopped_at_us, resumed_at_us| VmFigures {
            stopped_at_us,
            resumed_at_us,
            ..VmFigures::default()
        };
        let mut run = Run {
            vms: vec![vm(1_000, 5_000), vm(2_000, 9_000)],
            ..Run::default()
        };
        run.conclude();
        assert_eq!(run.blackout_ms, 8.0);
        assert_eq!(run.vms[1].pause_ms, 7.0);
        assert!(!run.clean, "no traffic proves nothing");
    }
}
