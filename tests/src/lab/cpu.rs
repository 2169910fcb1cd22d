//! What a run takes of the machine: the processor time of our processes, whoever else is busy.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Instant;

/// Processor load in percent of all processors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cpu {
    /// Our processes before the migration, with all traffic.
    pub steady_percent: f64,
    /// Our processes during the migration.
    pub migration_percent: f64,
    /// Everything that ran on the machine during the migration.
    pub machine_percent: f64,
}

/// Load since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Of our processes.
    pub ours_percent: f64,
    /// Of the whole machine.
    pub machine_percent: f64,
}

impl Cpu {
    /// From the loads before and during the migration.
    pub fn of(steady: Load, moving: Load) -> Self {
        Self {
            steady_percent: steady.ours_percent,
            migration_percent: moving.ours_percent,
            machine_percent: moving.machine_percent,
        }
    }
}

/// Measures load between two looks.
#[derive(Debug)]
pub struct CpuMeter {
    at: Instant,
    /// Ticks by process: one that ends in between counts up to its last look.
    ours: HashMap<u32, u64>,
    busy: u64,
    all: u64,
}

impl CpuMeter {
    /// Starts to measure.
    pub fn start() -> Self {
        let (busy, all) = machine();
        Self {
            at: Instant::now(),
            ours: ours(),
            busy,
            all,
        }
    }

    /// The load since the last look.
    pub fn lap(&mut self) -> Load {
        let now = Self::start();
        let ticks: u64 = now
            .ours
            .iter()
            .map(|(pid, ticks)| ticks.saturating_sub(*self.ours.get(pid).unwrap_or(&0)))
            .sum();
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let seconds = now.at.duration_since(self.at).as_secs_f64().max(0.01);
        // USER_HZ is 100 on Linux x86_64.
        let load = Load {
            ours_percent: rounded(ticks as f64 / seconds / processors),
            machine_percent: rounded(
                100.0 * (now.busy - self.busy) as f64 / (now.all - self.all).max(1) as f64,
            ),
        };
        *self = now;
        load
    }
}

fn rounded(percent: f64) -> f64 {
    (percent * 10.0).round() / 10.0
}

/// proc(5), /proc/stat: user nice system idle iowait irq softirq steal
fn machine() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|tick| tick.parse().ok())
        .collect();
    let idle = ticks.get(3).unwrap_or(&0) + ticks.get(4).unwrap_or(&0);
    let all = ticks.iter().sum::<u64>();
    (all - idle, all)
}

/// The ticks of our process and all that descend from it.
fn ours() -> HashMap<u32, u64> {
    let mut processes: HashMap<u32, (u32, u64)> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let text = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some(found) = parse_stat(&text) {
            processes.insert(pid, found);
        }
    }
    let me = std::process::id();
    let descends = |mut pid: u32| {
        // Bounded: a chain of parents is never longer than there are processes.
        for _ in 0..processes.len() {
            match processes.get(&pid) {
                _ if pid == me => return true,
                Some((parent, _)) => pid = *parent,
                None => return false,
            }
        }
        false
    };
    processes
        .iter()
        .filter(|(pid, _)| descends(**pid))
        .map(|(pid, (_, ticks))| (*pid, *ticks))
        .collect()
}

/// proc(5), /proc/PID/stat: parent (4th field), utime and stime (14th and 15th). The name in brackets may hold anything.
fn parse_stat(text: &str) -> Option<(u32, u64)> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some((fields.get(1)?.parse().ok()?, ticks(11)? + ticks(12)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let text = "42 (a) b) S 7 1 1 0 -1 0 1 2 3 4 50 6 0 0 20 0 1 0 1 1";
        assert_eq!(parse_stat(text), Some((7, 56)));
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn we_descend_from_ourselves() {
        assert!(ours().contains_key(&std::process::id()));
    }
}
