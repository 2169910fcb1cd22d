//! Keeps a group of VMs at the brink of their switchover, and finds the moment to stop them all.
//!
//! # Why this is not simple (QEMU 7.2)
//! QEMU stops a VM as soon as what is left fits into `downtime-limit` at the bandwidth of the last 100 ms. No value of
//! `downtime-limit` holds a VM back (0 skips the look at what was dirtied since, and stops it after the first pass). A
//! starved bandwidth does: at 64 kB/s, not even one page fits into a millisecond.
//!
//! But QEMU's rate limit works in windows of 100 ms: a starved VM sleeps until its window ends, whatever is set in the
//! meantime. Raising the bandwidth *after* the VMs were stopped therefore costs up to 100 ms of everybody's pause. So the
//! bandwidth is raised while they still run. A VM that wakes up copies what was dirtied while it was starved; for its
//! first window it still counts with the starved bandwidth, so it does not stop by itself (unless it dirties nothing at
//! all). In this window all VMs are awake and nearly nothing is left: that is the moment.
//! The wakings are seen in the counters, and the raise is placed so that they follow each other as closely as possible.
//!
//! ```text
//!  Copy --(near the end of the first pass)--> Held --> CatchUp --(caught up)--> Held     per VM
//!  all Held and none far behind --> Sprint --(all awake and caught up, or no time left)--> Go
//!  any VM stopped by QEMU itself --> Go at once
//! ```
//!
//! Invariant: pure; the time comes with the samples.

/// Bytes per second of a VM that is held.
pub const STARVED: u64 = 65536;
/// QEMU's rate limit window, in milliseconds.
const WINDOW_MS: f64 = 100.0;
/// A VM that is copied at 1 Gbit/s or less is starved when so much is left of the first pass.
const NEAR_BYTES: u64 = 12 << 20;
/// Caught up: the bitmap was read again, and not more than this is left.
const CAUGHT_UP_BYTES: u64 = 3 << 20;
/// Good enough to stop.
const LOW_BYTES: u64 = 512 << 10;
/// Catching up ends after this, in milliseconds, for VMs that dirty faster than the link carries.
const CATCH_UP_MS: f64 = 2000.0;
/// Held VMs are watched for this long, to learn when their windows begin.
const WATCH_MS: f64 = 250.0;
/// Awake so long, a VM may soon stop by itself.
const GRACE_MS: f64 = 90.0;
/// A sprint is over after this, whatever is left.
const SPRINT_MS: f64 = 400.0;

/// What `query-migrate` said about one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sample {
    /// `pre-switchover` or later: QEMU has stopped it.
    pub stopped: bool,
    /// Bytes that are known to be dirty and not sent.
    pub remaining: u64,
    /// Bytes sent.
    pub transferred: u64,
    /// Passes begun.
    pub sync_count: u64,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Starve this VM, or give it its full bandwidth.
    Bandwidth {
        /// Index of the VM.
        vm: usize,
        /// [`STARVED`], else as fast as allowed.
        starve: bool,
    },
    /// Freeze and stop now.
    Go,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Copy,
    Held { since: f64, behind: bool },
    CatchUp { since: f64, sync: u64 },
    Sprint { sync: u64, transferred: u64, awake: Option<f64> },
}

#[derive(Debug, Clone)]
struct Vm {
    stage: Stage,
    last: Option<(f64, Sample)>,
    /// How fast `remaining` falls at most, bytes per millisecond.
    fall: f64,
    /// When a starved VM was last seen to begin a window.
    window: Option<f64>,
}

/// The group's controller.
#[derive(Debug, Clone)]
pub struct Brink {
    vms: Vec<Vm>,
    sprint: Option<f64>,
    all_held: Option<f64>,
    gone: bool,
}

impl Brink {
    /// For so many VMs, all of which are being copied at full bandwidth.
    pub fn new(vms: usize) -> Brink {
        let vm = Vm { stage: Stage::Copy, last: None, fall: 0.0, window: None };
        Brink { vms: vec![vm; vms], sprint: None, all_held: None, gone: false }
    }

    /// When to look next, in milliseconds.
    pub fn poll_ms(&self) -> u64 {
        if self.sprint.is_some() { 2 } else { 5 }
    }

    /// A word for the display.
    pub fn stage(&self, vm: usize) -> &'static str {
        match self.vms.get(vm).map(|v| v.stage) {
            Some(Stage::Copy) => "copying",
            Some(Stage::Held { .. }) => "at the brink",
            Some(Stage::CatchUp { .. }) => "catching up",
            Some(Stage::Sprint { .. }) => "last stretch",
            None => "",
        }
    }

    /// Takes one look at all VMs.
    pub fn on(&mut self, now: f64, samples: &[Sample]) -> Vec<Order> {
        if self.gone || samples.len() != self.vms.len() {
            return Vec::new();
        }
        let mut orders = Vec::new();
        for (i, (vm, s)) in self.vms.iter_mut().zip(samples).enumerate() {
            vm.watch(now, s);
            if let Some(starve) = vm.step(now, s) {
                orders.push(Order::Bandwidth { vm: i, starve });
            }
        }
        if samples.iter().any(|s| s.stopped) {
            return self.go();
        }
        if let Some(since) = self.sprint {
            return if self.sprint_over(now - since, now, samples) { self.go() } else { orders };
        }
        let held = |v: &Vm| matches!(v.stage, Stage::Held { .. });
        if !self.vms.iter().all(held) {
            self.all_held = None;
            return orders;
        }
        let since = *self.all_held.get_or_insert(now);
        if self.vms.iter().any(|v| matches!(v.stage, Stage::Held { behind: true, .. })) {
            for (i, vm) in self.vms.iter_mut().enumerate() {
                if matches!(vm.stage, Stage::Held { behind: true, .. }) {
                    vm.stage = Stage::CatchUp { since: now, sync: samples[i].sync_count };
                    orders.push(Order::Bandwidth { vm: i, starve: false });
                }
            }
            self.all_held = None;
        } else if now - since >= WATCH_MS && (self.well_placed(now) || now - since >= 3.0 * WATCH_MS) {
            self.sprint = Some(now);
            for (i, (vm, s)) in self.vms.iter_mut().zip(samples).enumerate() {
                vm.stage = Stage::Sprint { sync: s.sync_count, transferred: s.transferred, awake: None };
                orders.push(Order::Bandwidth { vm: i, starve: false });
            }
        }
        orders
    }

    fn go(&mut self) -> Vec<Order> {
        self.gone = true;
        vec![Order::Go]
    }

    /// True if the windows that begin next lie as close together as they ever will.
    fn well_placed(&self, now: f64) -> bool {
        let mut phases: Vec<f64> = self.vms.iter().filter_map(|v| v.window).map(|w| w.rem_euclid(WINDOW_MS)).collect();
        phases.sort_by(f64::total_cmp);
        let (Some(first), Some(last)) = (phases.first(), phases.last()) else { return true };
        let wrap = first + WINDOW_MS - last;
        let widest = phases.windows(2).map(|w| w[1] - w[0]).fold(wrap, f64::max);
        // 2 ms of doubt about what was seen, 6 ms for the orders to arrive.
        let next = |p: f64| (p - now - 6.0).rem_euclid(WINDOW_MS);
        let (mut soonest, mut latest) = (WINDOW_MS, 0.0_f64);
        for p in &phases {
            soonest = soonest.min(next(*p));
            latest = latest.max(next(*p));
        }
        latest - soonest <= WINDOW_MS - widest + 2.0
    }

    fn sprint_over(&self, sprint_ms: f64, now: f64, samples: &[Sample]) -> bool {
        let mut all_awake = true;
        let mut all_low = true;
        let mut grace_over = false;
        for (vm, s) in self.vms.iter().zip(samples) {
            let Stage::Sprint { sync, awake, .. } = vm.stage else { continue };
            all_awake &= awake.is_some();
            all_low &= awake.is_some() && s.sync_count > sync && s.remaining <= LOW_BYTES;
            grace_over |= awake.is_some_and(|a| now - a >= GRACE_MS);
        }
        all_low || (all_awake && grace_over) || sprint_ms >= SPRINT_MS
    }
}

impl Vm {
    fn watch(&mut self, now: f64, s: &Sample) {
        if let Some((then, before)) = self.last
            && now > then
        {
            if before.sync_count == s.sync_count && before.remaining > s.remaining && self.stage == Stage::Copy {
                self.fall = self.fall.max((before.remaining - s.remaining) as f64 / (now - then));
            }
            let starved_for = match self.stage {
                Stage::Held { since, .. } => now - since,
                _ => 0.0,
            };
            // The window in which it was starved is not over before this.
            if starved_for > WINDOW_MS && s.transferred > before.transferred {
                self.window = Some(now);
            }
        }
        self.last = Some((now, *s));
    }

    /// Moves to the next stage; answers what the bandwidth has to become.
    fn step(&mut self, now: f64, s: &Sample) -> Option<bool> {
        match &mut self.stage {
            // 60 ms of the fastest fall, so that several looks see it come.
            Stage::Copy if s.sync_count > 0 && s.remaining < NEAR_BYTES.max((self.fall * 60.0) as u64) => {
                self.stage = Stage::Held { since: now, behind: true };
                Some(true)
            }
            Stage::CatchUp { since, sync } => {
                let done = s.sync_count > *sync && s.remaining < CAUGHT_UP_BYTES;
                if done || now - *since >= CATCH_UP_MS {
                    self.stage = Stage::Held { since: now, behind: false };
                    return Some(true);
                }
                None
            }
            Stage::Sprint { sync, transferred, awake } => {
                if awake.is_none() && (s.sync_count > *sync || s.transferred > *transferred + 4 * STARVED / 10) {
                    *awake = Some(now);
                }
                None
            }
            Stage::Copy | Stage::Held { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests;
