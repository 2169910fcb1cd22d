//! What every measurement here has in common: the switches, started and stopped in turn, and the window that one of them
//! is measured in, with what spoils it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::host::{self, Alone, CpuTime, Folder, Hugepages, Task};
use crate::peer::{Gangway, OVS_HUGEPAGES, Ovs, Rule, Setup, Size, Switch};
use crate::pingpong::{State, round_trip};
use crate::sys;

/// Of its CPU, what a thread must have had for its window to count.
const SHARE_MIN: f64 = 0.95;
/// A window's steal time at most, of both CPUs' time.
pub const STEAL_MAX: f64 = 0.01;

/// Why a window does not count in which the guest shared its CPU.
pub const GUEST_SHARED: &str = "the guest had not its whole CPU";

/// Where a measurement takes place, and how long each part of it is.
#[derive(Debug, Clone)]
pub struct Common {
    /// Our binary.
    pub switch: PathBuf,
    /// Whether OVS-DPDK has turns.
    pub with_ovs: bool,
    /// Whether ours has.
    pub with_gangway: bool,
    /// CPU of the switches' workers.
    pub worker_cpu: usize,
    /// CPU of the guest.
    pub guest_cpu: usize,
    /// Not counted at a window's start.
    pub skip: Duration,
    /// Counted.
    pub measure: Duration,
    /// How long to wait for other work on this machine to end, before each window.
    pub quiet: Duration,
    /// A round trip up to so many cycles is near.
    pub near_max: u64,
}

/// What a run has of the machine.
///
/// Fields drop in this order: hugepages, then the folder, then the turn.
pub struct Ground {
    _pages: Hugepages,
    folder: Folder,
    _alone: Alone,
}

impl Ground {
    /// Waits for this run's turn, and takes `pages` hugepages of 2 MB. The calling thread may run on any CPU.
    pub fn take(common: &Common, pages: u64) -> Result<Ground> {
        ensure!(
            common.worker_cpu != common.guest_cpu,
            "the worker and the guest need a CPU each"
        );
        sys::on_signals();
        host::go_first()?;
        // An earlier rig has pinned us, and what is started inherits that.
        host::unpin()?;
        let alone = Alone::wait()?;
        let folder = Folder::below(Path::new("/tmp"))?;
        Ok(Ground {
            _pages: Hugepages::take(pages, &folder)?,
            folder,
            _alone: alone,
        })
    }

    /// For what the run puts down.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }
}

/// The switches of a run, each with the rules that it is measured with; all of them stand still.
///
/// The processes drop before what they use.
pub struct Rig {
    /// In the order of their turns.
    pub switches: Vec<(Box<dyn Switch>, &'static [Rule])>,
    ground: Ground,
}

impl Rig {
    /// Starts them, and takes `pages` hugepages of 2 MB for their guests. The calling thread is pinned to the guest's CPU.
    pub fn start(common: &Common, size: Size, pages: u64) -> Result<Rig> {
        Rig::start_on(common, &[common.worker_cpu], size, pages)
    }

    /// The same with a worker on each of these CPUs.
    pub fn start_on(common: &Common, cpus: &[usize], size: Size, pages: u64) -> Result<Rig> {
        if common.with_ovs {
            Ovs::install()?;
        }
        let ovs_pages = if common.with_ovs { OVS_HUGEPAGES } else { 0 };
        let mut rig = Rig {
            switches: Vec::new(),
            ground: Ground::take(common, pages + ovs_pages)?,
        };
        let dir = rig.ground.dir();
        if common.with_gangway {
            let ours = Gangway::start(&common.switch, dir, &Setup::default(), size, cpus)?;
            rig.switches.push((Box::new(ours), &[Rule::Normal]));
        }
        if common.with_ovs {
            let ovs = Ovs::start(dir, size, cpus, common.guest_cpu)?;
            let rules = &[Rule::InPort, Rule::Normal];
            rig.switches.push((Box::new(ovs), rules));
        }
        host::pin(common.guest_cpu)?;
        for (switch, _) in &mut rig.switches {
            switch.process().pause()?;
        }
        Ok(rig)
    }

    /// For what else the run puts down.
    pub fn dir(&self) -> PathBuf {
        self.ground.dir().to_owned()
    }
}

/// Time-stamp cycles per second, by the kernel's clock.
pub fn tsc_hz() -> f64 {
    let (since, begin) = (Instant::now(), sys::tsc());
    std::thread::sleep(Duration::from_millis(200));
    let cycles = sys::tsc() - begin;
    cycles as f64 / since.elapsed().as_secs_f64()
}

/// What a window was like.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Conditions {
    /// Of the two ping-pongs.
    pub state: State,
    /// Ping-pong round trips before and after, in cycles.
    pub trips: [u64; 2],
    /// What the worker had of its CPU.
    pub worker_share: f64,
    /// What the guest had of its CPU.
    pub guest_share: f64,
    /// What the hypervisor gave to others, of both.
    pub steal: f64,
    /// Why it does not count.
    pub spoiled: Option<&'static str>,
}

/// An open window: between [`Meter::start`] and [`Meter::stop`] a switch is measured.
pub struct Meter {
    before: u64,
    worker: Task,
    guest: Task,
    since: Instant,
    from: (CpuTime, CpuTime, u64),
}

/// A window whose switch may still run.
pub struct Closed {
    before: u64,
    worker_share: f64,
    guest_share: f64,
    steal: f64,
}

/// The ping-pong before a window, when the machine has nothing else to do. The switches stand still.
pub fn before(common: &Common) -> Result<u64> {
    host::quiet(common.quiet)?;
    round_trip(common.worker_cpu)
}

impl Meter {
    /// After the warm-up. `guest` is the thread that stands for the guests; `before` is [`before`]'s.
    pub fn start(
        common: &Common,
        switch: &mut dyn Switch,
        guest: Task,
        before: u64,
    ) -> Result<Meter> {
        let worker = switch.worker()?;
        let pinned = worker.pinned_to()?;
        ensure!(
            pinned == Some(common.worker_cpu),
            "{}: the worker may run on {pinned:?}",
            switch.name()
        );
        let since = Instant::now();
        let from = (worker.cpu_time()?, guest.cpu_time()?, host::steal_ns());
        Ok(Meter {
            before,
            worker,
            guest,
            since,
            from,
        })
    }

    /// Its end.
    pub fn stop(self) -> Result<Closed> {
        let (worker, guest, steal) = self.from;
        let to = (
            self.worker.cpu_time()?,
            self.guest.cpu_time()?,
            host::steal_ns(),
        );
        let wall_ns = self.since.elapsed().as_nanos() as f64;
        let share = |a: CpuTime, b: CpuTime| (b.ran - a.ran) as f64 / wall_ns;
        Ok(Closed {
            before: self.before,
            worker_share: share(worker, to.0),
            guest_share: share(guest, to.1),
            steal: (to.2 - steal) as f64 / (2.0 * wall_ns),
        })
    }
}

impl Closed {
    /// The ping-pong behind it: the switch, and what runs on the guest's CPU, must stand still now.
    pub fn conditions(self, common: &Common) -> Result<Conditions> {
        let after = round_trip(common.worker_cpu)?;
        let state = State::of(self.before, after, common.near_max);
        let spoiled = if self.worker_share < SHARE_MIN {
            Some("the worker had not its whole CPU")
        } else if self.guest_share < SHARE_MIN {
            Some(GUEST_SHARED)
        } else if self.steal > STEAL_MAX {
            Some("the hypervisor gave the CPUs to others")
        } else if state == State::Mixed {
            Some("the CPUs' distance changed")
        } else {
            None
        };
        Ok(Conditions {
            state,
            trips: [self.before, after],
            worker_share: self.worker_share,
            guest_share: self.guest_share,
            steal: self.steal,
            spoiled,
        })
    }
}

/// Whether some state has as many rounds as were asked for in which every switch had a good window: of each window its
/// round and conditions.
pub fn enough(windows: &[(usize, Conditions)], pairs: usize) -> bool {
    [State::Near, State::Far].into_iter().any(|state| {
        let last = windows.iter().map(|(round, _)| *round).max();
        let rounds = (0..=last.unwrap_or(0)).filter(|round| {
            let mut all = windows.iter().filter(|(r, _)| r == round).peekable();
            all.peek().is_some() && all.all(|(_, c)| c.spoiled.is_none() && c.state == state)
        });
        rounds.count() >= pairs
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(round: usize, state: State, spoiled: Option<&'static str>) -> (usize, Conditions) {
        let c = Conditions {
            state,
            trips: [300; 2],
            worker_share: 1.0,
            guest_share: 1.0,
            steal: 0.0,
            spoiled,
        };
        (round, c)
    }

    #[test]
    fn a_round_counts_if_all_its_windows_are_good_and_of_one_state() {
        use State::{Far, Near};
        let mut all = vec![window(0, Near, None), window(0, Near, Some("noise"))];
        assert!(!enough(&all, 1), "one is spoiled");
        all.extend([window(1, Near, None), window(1, Far, None)]);
        assert!(!enough(&all, 1), "two states");
        all.extend([window(2, Far, None), window(2, Far, None)]);
        assert!(enough(&all, 1));
        assert!(!enough(&all, 2));
        assert!(!enough(&[], 1));
    }
}
