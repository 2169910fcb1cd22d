//! Against a model of QEMU 7.2's migration thread: windows of 100 ms, the bandwidth of the last one, passes over what is
//! dirty. Reading the bitmap takes 2 ms (on the lab's emulated guests it is more).

use super::*;

const PAGE: f64 = 4096.0;

/// A VM under migration.
struct Model {
    /// Bytes per millisecond that the guest dirties, and at most so many.
    dirties: f64,
    span: f64,
    dirty: f64,
    remaining: f64,
    transferred: f64,
    syncs: u64,
    limit: f64,
    window_begins: f64,
    sent_in_window: f64,
    threshold: f64,
    awake_at: f64,
    stopped: bool,
}

impl Model {
    fn new(mb: f64, dirties_mb_s: f64, span_mb: f64, phase: f64) -> Model {
        Model {
            dirties: dirties_mb_s * 1000.0,
            span: span_mb * 1e6,
            dirty: 0.0,
            remaining: mb * 1e6,
            transferred: 0.0,
            syncs: 1,
            limit: 0.0,
            window_begins: phase,
            sent_in_window: 0.0,
            threshold: 0.0,
            awake_at: 0.0,
            stopped: false,
        }
    }

    /// A tenth of a millisecond.
    fn tick(&mut self, now: f64, link: f64) {
        if self.stopped {
            return;
        }
        self.dirty = (self.dirty + self.dirties / 10.0).min(self.span);
        if now >= self.awake_at && now - self.window_begins >= WINDOW_MS {
            self.threshold = self.sent_in_window / (now - self.window_begins);
            self.window_begins = now;
            self.sent_in_window = 0.0;
        }
        if now < self.awake_at {
            return;
        }
        if self.sent_in_window > self.limit / 10.0 {
            // Whatever is set in the meantime.
            self.awake_at = self.window_begins + WINDOW_MS;
            return;
        }
        let chunk = self.remaining.min(link / 10.0);
        self.remaining -= chunk;
        self.transferred += chunk;
        self.sent_in_window += chunk;
        if self.remaining < self.threshold.max(1.0) {
            self.remaining += (self.dirty / PAGE).floor() * PAGE;
            self.dirty = 0.0;
            self.syncs += 1;
            self.awake_at = now + 2.0;
            self.stopped = self.remaining == 0.0 || self.remaining < self.threshold;
        }
    }

    fn sample(&self) -> Sample {
        Sample {
            stopped: self.stopped,
            remaining: self.remaining as u64,
            transferred: self.transferred as u64,
            sync_count: self.syncs,
        }
    }
}

struct Verdict {
    at_ms: f64,
    left: f64,
    early: usize,
    /// What is left counts what nobody knows yet.
    left_unknown: f64,
    asleep: usize,
}

fn play(vms: Vec<Model>, link_mb_s: f64) -> Verdict {
    play_with(vms, link_mb_s, false, &[1.0])
}

/// Looks take as long as `looks_ms` say, in turn.
fn play_with(mut vms: Vec<Model>, link_mb_s: f64, freeze_first: bool, looks_ms: &[f64]) -> Verdict {
    let mut looks = looks_ms.iter().cycle();
    let mut brink = Brink::new(vms.len(), freeze_first);
    let mut frozen = false;
    let full = (link_mb_s * 1e6) as u64 / vms.len() as u64;
    for vm in &mut vms {
        vm.limit = full as f64;
    }
    let mut now = 0.0_f64;
    let mut look = 0.0_f64;
    loop {
        now += 0.1;
        assert!(now < 120_000.0, "it never goes");
        let active = vms.iter().filter(|v| now >= v.awake_at).count().max(1);
        let link = link_mb_s * 1000.0 / active as f64;
        vms.iter_mut().for_each(|v| v.tick(now, link));
        if now < look {
            continue;
        }
        // The looks take a moment too.
        look = now + brink.poll_ms() as f64 + looks.next().unwrap();
        let samples: Vec<Sample> = vms.iter().map(Model::sample).collect();
        let orders = brink.on(now, &samples);
        for (i, vm) in vms.iter().enumerate() {
            let of_this = |o: &&Order| matches!(o, Order::Bandwidth { vm, .. } if *vm == i);
            assert!(
                orders.iter().filter(of_this).count() <= 1,
                "two orders for VM {i} of {}",
                vm.remaining
            );
        }
        for order in orders {
            // Shown when a test fails.
            println!("{now:.1} {order:?} {samples:?}");
            match order {
                Order::Bandwidth { vm, rate } => {
                    assert!(frozen || !freeze_first || rate != Rate::Unlimited);
                    vms[vm].limit = rate.bytes_per_s(full) as f64;
                }
                Order::Freeze => {
                    assert!(freeze_first && !frozen, "once, and only if it is wanted");
                    frozen = true;
                    // It takes its time.
                    look += 20.0;
                }
                Order::Go => {
                    assert_eq!(frozen, freeze_first);
                    return Verdict {
                        at_ms: now,
                        left: vms.iter().map(|v| v.remaining).sum(),
                        early: vms.iter().filter(|v| v.stopped).count(),
                        left_unknown: vms.iter().map(|v| v.dirty).sum(),
                        asleep: vms.iter().filter(|v| v.awake_at > now + 2.0).count(),
                    };
                }
            }
        }
    }
}

#[test]
fn a_busy_group_is_stopped_awake_with_little_left_and_nobody_early() {
    for shift in [0.0, 3.0, 7.0, 15.0, 33.0, 50.0, 81.0] {
        let vms = vec![
            Model::new(130.0, 5.0, 32.0, 0.0),
            Model::new(130.0, 5.0, 32.0, shift),
            Model::new(90.0, 3.0, 32.0, 2.0 * shift),
        ];
        let v = play(vms, 125.0);
        assert_eq!(v.early, 0, "shift {shift}");
        assert_eq!(v.asleep, 0, "shift {shift}");
        assert!(
            v.left + v.left_unknown < 8e6,
            "shift {shift}: {} and {} left",
            v.left,
            v.left_unknown
        );
        assert!(v.at_ms < 8000.0, "shift {shift}: {} ms", v.at_ms);
    }
}

#[test]
fn a_group_on_taps_is_frozen_before_the_sprint_and_stopped_as_well() {
    for shift in [0.0, 15.0, 50.0] {
        let vms = vec![
            Model::new(130.0, 5.0, 32.0, 0.0),
            Model::new(130.0, 5.0, 32.0, shift),
        ];
        let v = play_with(vms, 125.0, true, &[1.0]);
        assert_eq!((v.early, v.asleep), (0, 0), "shift {shift}");
        assert!(v.left + v.left_unknown < 8e6, "shift {shift}: {}", v.left);
    }
}

/// A host so busy that QEMU answers late (the lab's does in up to 400 ms): what is frozen first is frozen before QEMU stops anybody.
#[test]
fn late_answers_do_not_let_a_vm_stop_before_the_freeze() {
    for shift in [0.0, 33.0, 77.0] {
        for (dirties, late) in [(0.3, 200.0), (0.5, 300.0), (1.0, 400.0), (5.0, 400.0)] {
            let vms = vec![
                Model::new(130.0, dirties, 32.0, 0.0),
                Model::new(130.0, dirties, 32.0, shift),
                Model::new(90.0, dirties, 32.0, 2.0 * shift),
            ];
            let v = play_with(vms, 125.0, true, &[60.0, late, 20.0, 90.0, 110.0]);
            assert!(v.at_ms < 20_000.0, "late {late}: {} ms", v.at_ms);
        }
    }
}

#[test]
fn a_vm_that_dirties_faster_than_the_link_does_not_hold_the_group_for_ever() {
    let v = play(
        vec![
            Model::new(100.0, 300.0, 60.0, 0.0),
            Model::new(100.0, 5.0, 32.0, 0.0),
        ],
        125.0,
    );
    assert!(v.at_ms < 30_000.0, "{} ms", v.at_ms);
}

/// None of them copies its last pass in one window, between two looks.
#[test]
fn a_group_that_dirties_much_is_not_stopped_before_the_sprint() {
    for link in [250.0, 1250.0, 12_500.0] {
        for dirties in [10.0, 20.0, 50.0, 100.0, 200.0] {
            for shift in [0.0, 21.0, 43.0, 77.0] {
                let vms = vec![
                    Model::new(2000.0, dirties, 200.0, 0.0),
                    Model::new(1000.0, dirties / 2.0, 100.0, shift),
                ];
                // It is frozen before anybody stops.
                let v = play_with(vms, link, true, &[1.0, 4.0, 2.0]);
                assert!(v.at_ms < 60_000.0, "{} ms", v.at_ms);
            }
        }
    }
}

#[test]
fn one_vm_on_a_fast_link() {
    let v = play(vec![Model::new(500.0, 20.0, 64.0, 0.0)], 1250.0);
    assert_eq!(v.early, 0);
    assert!(v.left < 1250e3 * 10.0, "{}", v.left);
}

#[test]
fn who_was_stopped_by_qemu_takes_the_others_along() {
    let mut b = Brink::new(2, false);
    let running = Sample {
        remaining: 100 << 20,
        sync_count: 1,
        ..Sample::default()
    };
    assert!(!b.on(1.0, &[running, running]).contains(&Order::Go));
    let stopped = Sample {
        stopped: true,
        ..running
    };
    assert_eq!(b.on(2.0, &[running, stopped]), [Order::Go]);
    assert!(b.on(3.0, &[running, stopped]).is_empty(), "once");
    assert!(b.on(3.0, &[]).is_empty());
}
