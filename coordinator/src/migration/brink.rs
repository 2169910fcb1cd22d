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
//!  all Held, none behind --> Sprint --(all awake, nearly nothing left)--> Go
//!                              `-----(somebody's first window ends)--> Held or CatchUp, and again
//!  any VM stopped by QEMU itself --> Go at once
//! ```
//! A VM that dirties faster than the link carries never catches up: after some passes it counts as caught up, and what
//! it has left is the group's pause.
//!
//! Invariant: pure; the time comes with the samples.

/// QEMU's rate limit window, in milliseconds.
const WINDOW_MS: f64 = 100.0;
/// A VM that is copied at 1 Gbit/s or less is starved when so much is left of the first pass.
const NEAR_BYTES: u64 = 12 << 20;
const FALL_MS: f64 = 30.0;
/// A pass is given so much bandwidth that what is left of it takes this long, in milliseconds: QEMU does not run past
/// its end while we look elsewhere, and believes that little fits into a millisecond.
const APPROACH_MS: f64 = 300.0;
/// Where QEMU answers late, it is so many times as long as the longest that a look has taken; but not longer than the other: a
/// group whose inside is held does not wait for ever.
const APPROACH_LOOKS: f64 = 2.0;
const APPROACH_MS_MAX: f64 = 800.0;
/// A pass is copied so many times as fast as the VM dirties, at least.
const APPROACH_DIRTIES: f64 = 2.0;
/// What a look takes is forgotten by so much with each further one.
const LOOK_FADES: f64 = 0.99;
/// Caught up: the bitmap was read again, and not more than this is left.
const CAUGHT_UP_BYTES: u64 = 1 << 20;
/// What the first sprint wants to leave at most for the pause, in milliseconds of copying; each further one twice that.
const LEFT_MS: f64 = 8.0;
/// With so little left, waiting for less is not worth the risk that somebody stops by himself.
const ENOUGH_MS: f64 = 60.0;
/// So many passes without catching up: it dirties faster than the link carries.
const CATCH_UP_PASSES: u64 = 5;
/// VMs are held for this long before a sprint: until a whole window has passed in which they were starved.
const HOLD_MS: f64 = 210.0;
/// A good place for a sprint is waited for so long.
const PLACE_MS: f64 = 110.0;
/// Awake so long, a VM may soon stop by itself.
const GRACE_MS: f64 = 75.0;
/// A sprint is over after this, whatever is left.
const SPRINT_MS: f64 = 400.0;
/// So many sprints are tried.
const SPRINTS: u32 = 5;

/// How fast a VM may be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// The last stretch: no limit of QEMU's, which would put it to sleep. The link shares itself.
    Unlimited,
    /// So many bytes per second.
    Limited(u64),
    /// It does not get anywhere.
    Starved,
}

impl Rate {
    /// In bytes per second, for a VM whose share of the group's bandwidth is `share`.
    pub fn bytes_per_s(self, share: u64) -> u64 {
        match self {
            Rate::Unlimited => crate::vmm::qemu::UNLIMITED,
            Rate::Limited(rate) => share.min(rate),
            Rate::Starved => 65536,
        }
    }
}

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
    /// Set a VM's bandwidth.
    Bandwidth {
        /// Index of the VM.
        vm: usize,
        /// What it becomes.
        rate: Rate,
    },
    /// Freeze now; VMs run on. Once, before the first sprint.
    Freeze,
    /// Freeze and stop now.
    Go,
}

impl Order {
    fn vm(&self) -> Option<usize> {
        match self {
            Order::Bandwidth { vm, .. } => Some(*vm),
            Order::Freeze | Order::Go => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Copy,
    Held {
        since: f64,
        behind: bool,
    },
    CatchUp {
        sync: u64,
    },
    Sprint {
        sync: u64,
        transferred: u64,
        awake: Option<f64>,
    },
}

#[derive(Debug, Clone)]
struct Vm {
    stage: Stage,
    last: Option<(f64, Sample)>,
    /// How fast `remaining` falls at most, bytes per millisecond.
    fall: f64,
    /// When the bitmap was last seen to have been read, and how fast it dirties, bytes per millisecond.
    synced: f64,
    dirties: f64,
    /// Its limit, if it has one now.
    limit: u64,
    /// When a starved VM was last seen to begin a window.
    window: Option<f64>,
    /// It dirties faster than the link carries.
    hopeless: bool,
}

/// The group's controller.
#[derive(Debug, Clone)]
pub struct Brink {
    vms: Vec<Vm>,
    sprint: Option<f64>,
    sprints: u32,
    all_held: Option<f64>,
    /// When all were looked at last, and the longest time from one look to the next of late, in milliseconds.
    looked: Option<f64>,
    look_ms: f64,
    /// When that was measured last, what they had sent, and the fastest that was seen, bytes per millisecond.
    sent: (f64, u64),
    link: f64,
    /// The freeze must come before a sprint, and has not yet.
    to_freeze: bool,
    frozen: bool,
    gone: bool,
}

impl Brink {
    /// For so many VMs, all of which are being copied at full bandwidth.
    pub fn new(vms: usize, freeze_first: bool) -> Brink {
        let vm = Vm {
            stage: Stage::Copy,
            last: None,
            fall: 0.0,
            synced: 0.0,
            dirties: 0.0,
            limit: u64::MAX,
            window: None,
            hopeless: false,
        };
        Brink {
            vms: vec![vm; vms],
            sprint: None,
            sprints: 0,
            all_held: None,
            looked: None,
            look_ms: 0.0,
            sent: (0.0, 0),
            link: 0.0,
            to_freeze: freeze_first,
            frozen: false,
            gone: false,
        }
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

    /// Takes one look at all VMs. At most one order for each: they are carried out side by side.
    pub fn on(&mut self, now: f64, samples: &[Sample]) -> Vec<Order> {
        let mut orders: Vec<Order> = Vec::new();
        for order in self.look(now, samples) {
            orders.retain(|o| o.vm() != order.vm());
            orders.push(order);
        }
        orders
    }

    fn look(&mut self, now: f64, samples: &[Sample]) -> Vec<Order> {
        if self.gone || samples.len() != self.vms.len() {
            return Vec::new();
        }
        if let Some(last) = self.looked.replace(now) {
            self.look_ms = (self.look_ms * LOOK_FADES).max(now - last);
        }
        let look_ms = self.look_ms;
        let approach = (look_ms * APPROACH_LOOKS).clamp(APPROACH_MS, APPROACH_MS_MAX);
        // Over 20 ms and more: QEMU sends in bursts.
        let (then, before) = self.sent;
        if now - then >= 20.0 {
            let sent = samples.iter().map(|s| s.transferred).sum::<u64>();
            self.link = self
                .link
                .max(sent.saturating_sub(before) as f64 / (now - then));
            self.sent = (now, sent);
        }
        let mut orders = Vec::new();
        for (i, (vm, s)) in self.vms.iter_mut().zip(samples).enumerate() {
            vm.watch(now, s, look_ms);
            if let Some(rate) = vm.step(now, s, approach) {
                orders.push(Order::Bandwidth { vm: i, rate });
            }
        }
        if samples.iter().any(|s| s.stopped) {
            return self.go();
        }
        if let Some(since) = self.sprint {
            return match self.judge(now - since, now, samples) {
                Some(true) => self.go(),
                Some(false) => self.break_off(now, samples),
                None => orders,
            };
        }
        if !self
            .vms
            .iter()
            .all(|v| matches!(v.stage, Stage::Held { .. }))
        {
            self.all_held = None;
            return orders;
        }
        // Once they were held for long enough, that is no reason to wait again.
        let held = if self.frozen { now - HOLD_MS } else { now };
        let since = *self.all_held.get_or_insert(held);
        let behind = |v: &Vm| matches!(v.stage, Stage::Held { behind: true, .. });
        if self.vms.iter().any(behind) {
            self.all_held = None;
            for (i, vm) in self.vms.iter_mut().enumerate().filter(|(_, v)| behind(v)) {
                vm.stage = Stage::CatchUp {
                    sync: samples[i].sync_count,
                };
                vm.limit = 0;
                orders.extend(
                    vm.approach(&samples[i], approach)
                        .map(|rate| Order::Bandwidth { vm: i, rate }),
                );
            }
        } else if self.to_freeze && now - since >= HOLD_MS {
            self.to_freeze = false;
            // From here on the group's traffic stands still: the next sprint is the last. The place for it is looked for anew.
            self.frozen = true;
            self.all_held = None;
            orders.push(Order::Freeze);
        } else if self.well_placed(now, since) {
            self.sprint = Some(now);
            self.sprints += 1;
            for (i, (vm, s)) in self.vms.iter_mut().zip(samples).enumerate() {
                vm.stage = Stage::Sprint {
                    sync: s.sync_count,
                    transferred: s.transferred,
                    awake: None,
                };
                orders.push(Order::Bandwidth {
                    vm: i,
                    rate: Rate::Unlimited,
                });
            }
        }
        orders
    }

    /// A sprint came too late for somebody: who has caught up is held again, the others go on.
    fn break_off(&mut self, now: f64, samples: &[Sample]) -> Vec<Order> {
        self.sprint = None;
        self.all_held = None;
        let mut orders = Vec::new();
        for (i, (vm, s)) in self.vms.iter_mut().zip(samples).enumerate() {
            let Stage::Sprint { sync, .. } = vm.stage else {
                continue;
            };
            if vm.hopeless || (s.sync_count > sync && s.remaining < 2 * CAUGHT_UP_BYTES) {
                vm.stage = Stage::Held {
                    since: now,
                    behind: false,
                };
                orders.push(Order::Bandwidth {
                    vm: i,
                    rate: Rate::Starved,
                });
            } else {
                vm.stage = Stage::CatchUp { sync };
            }
        }
        orders
    }

    fn go(&mut self) -> Vec<Order> {
        self.gone = true;
        vec![Order::Go]
    }

    /// True if the windows that begin next lie as close together as they ever will, or nothing better can be known.
    fn well_placed(&self, now: f64, since: f64) -> bool {
        let mut phases: Vec<f64> = self
            .vms
            .iter()
            .filter_map(|v| v.window)
            .map(|w| w.rem_euclid(WINDOW_MS))
            .collect();
        if phases.len() < self.vms.len() {
            return now - since >= HOLD_MS;
        }
        phases.sort_by(f64::total_cmp);
        let (Some(first), Some(last)) = (phases.first(), phases.last()) else {
            return true;
        };
        let wrap = first + WINDOW_MS - last;
        let widest = phases.windows(2).map(|w| w[1] - w[0]).fold(wrap, f64::max);
        // 2 ms of doubt about what was seen, 6 ms for the orders to arrive.
        let next = |p: f64| (p - now - 6.0).rem_euclid(WINDOW_MS);
        let (mut soonest, mut latest) = (WINDOW_MS, 0.0_f64);
        for p in &phases {
            soonest = soonest.min(next(*p));
            latest = latest.max(next(*p));
        }
        now - since >= HOLD_MS
            && (latest - soonest <= WINDOW_MS - widest + 2.0 || now - since >= HOLD_MS + PLACE_MS)
    }

    /// True: now. False: not in this sprint.
    fn judge(&self, sprint_ms: f64, now: f64, samples: &[Sample]) -> Option<bool> {
        let mut ready = true;
        let mut somebody_idles = false;
        let mut left = 0;
        for (vm, s) in self.vms.iter().zip(samples) {
            let Stage::Sprint { sync, awake, .. } = vm.stage else {
                continue;
            };
            let known = s.sync_count > sync;
            ready &= awake.is_some() && known;
            if !vm.hopeless {
                left += s.remaining;
            }
            // Who still has much to send is in no danger.
            let idles = known && s.remaining < CAUGHT_UP_BYTES / 4;
            somebody_idles |= idles && awake.is_some_and(|a| now - a >= GRACE_MS);
        }
        let left_ms = left as f64 / self.link.max(1.0);
        let wanted_ms = LEFT_MS * f64::from(1 << (self.sprints - 1).min(8));
        let last = self.frozen || self.sprints >= SPRINTS;
        match () {
            () if ready && left_ms <= wanted_ms => Some(true),
            () if ready && somebody_idles && (last || left_ms <= ENOUGH_MS) => Some(true),
            () if somebody_idles && !last => Some(false),
            () if sprint_ms >= SPRINT_MS => Some(last),
            () => None,
        }
    }
}

impl Vm {
    fn watch(&mut self, now: f64, s: &Sample, look_ms: f64) {
        if let Some((then, before)) = self.last
            && now > then
        {
            if before.sync_count == s.sync_count
                && before.remaining > s.remaining
                && self.stage == Stage::Copy
            {
                self.fall = self
                    .fall
                    .max((before.remaining - s.remaining) as f64 / (now - then));
            }
            if before.sync_count < s.sync_count {
                if before.sync_count > 0 {
                    // Either may have been seen late.
                    self.dirties = s.remaining as f64 / (now - self.synced).max(look_ms);
                }
                self.synced = now;
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
    fn step(&mut self, now: f64, s: &Sample, approach_ms: f64) -> Option<Rate> {
        match &mut self.stage {
            // Some time of the fastest fall (zero pages cost no bandwidth), so that several looks see it come.
            Stage::Copy
                if s.sync_count > 0
                    && s.remaining < NEAR_BYTES.max((self.fall * FALL_MS) as u64) =>
            {
                self.stage = Stage::Held {
                    since: now,
                    behind: true,
                };
                Some(Rate::Starved)
            }
            Stage::Copy => self.approach(s, approach_ms),
            Stage::CatchUp { sync } => {
                let passes = s.sync_count.saturating_sub(*sync);
                self.hopeless |= passes >= CATCH_UP_PASSES;
                if self.hopeless || (passes > 0 && s.remaining < self.little()) {
                    self.stage = Stage::Held {
                        since: now,
                        behind: false,
                    };
                    return Some(Rate::Starved);
                }
                self.approach(s, approach_ms)
            }
            Stage::Sprint {
                sync,
                transferred,
                awake,
            } => {
                if awake.is_none()
                    && (s.sync_count > *sync
                        || s.transferred > *transferred + 4 * Rate::Starved.bytes_per_s(0) / 10)
                {
                    *awake = Some(now);
                }
                None
            }
            Stage::Held { .. } => None,
        }
    }

    /// So little is left that it has caught up: all passes behind it would fit into one window of QEMU's, between two looks.
    fn little(&self) -> u64 {
        CAUGHT_UP_BYTES.max((self.dirties * APPROACH_DIRTIES * WINDOW_MS * 1.25) as u64)
    }

    /// The limit that fits to what is left, if it has to change much.
    fn approach(&mut self, s: &Sample, ms: f64) -> Option<Rate> {
        if s.sync_count == 0 {
            return None;
        }
        // The last of it in half that time: otherwise a pass would never end.
        let last = CAUGHT_UP_BYTES as f64 * 2.0 / ms;
        let fits = (s.remaining as f64 / ms)
            .max(last)
            .max(self.dirties * APPROACH_DIRTIES);
        let fits = (fits * 1000.0) as u64;
        let much = fits < self.limit / 4 * 3 || fits / 4 * 3 > self.limit;
        much.then(|| {
            self.limit = fits;
            Rate::Limited(fits)
        })
    }
}

#[cfg(test)]
mod tests;
