//! Thousands of worlds. `SEED=n cargo test -p gangway-sim` runs one, with its trace; `SEEDS=n` so many.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gangway_sim::seen::{Counts, Seen};
use gangway_sim::{Bug, Options, run, trace};

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_world_without_faults_moves_its_group_and_loses_nothing() {
    let options = Options {
        faults: false,
        ..Options::default()
    };
    for seed in 0..50 {
        match run(seed, None, options) {
            Ok(told) => {
                assert_eq!(
                    told.outcome,
                    Some(gangway::migration::machine::Outcome::Moved),
                    "seed {seed}"
                );
                assert!(told.held > 0, "seed {seed} held nothing");
            }
            Err(what) => panic!("seed {seed}: {what}\n{}", trace(seed, None, options)),
        }
    }
}

/// For each mutation: it is found within so many worlds.
const WITHIN: u64 = 400;

#[test]
fn the_checker_finds_every_bug_that_is_put_in() {
    let next = AtomicU64::new(0);
    let missed = Mutex::new(Vec::new());
    let only = std::env::var("BUG").ok();
    std::thread::scope(|s| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            s.spawn(|| {
                while let Some(bug) = Bug::ALL.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if only.as_ref().is_some_and(|o| *o != format!("{bug:?}")) {
                        continue;
                    }
                    // What arrives when nobody waits for it any more.
                    let options = Options {
                        late: (*bug == Bug::NoTombstone).then_some(250),
                        ..Options::default()
                    };
                    let mut others = BTreeMap::<String, u64>::new();
                    let found = (1..=WITHIN).find_map(|seed| {
                        let what = run(seed, Some(*bug), options).err()?;
                        let broken = what.split(": ").next().unwrap_or_default();
                        if broken == bug.breaks() {
                            return Some((seed, what));
                        }
                        *others.entry(broken.to_owned()).or_default() += 1;
                        None
                    });
                    match found {
                        Some((seed, what)) => {
                            let without = run(seed, None, options);
                            assert!(without.is_ok(), "seed {seed} without a bug: {without:?}");
                            println!("{bug:?}: SEED={seed}: {what}");
                        }
                        None => missed.lock().unwrap().push((*bug, bug.breaks(), others)),
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(
        missed.is_empty(),
        "not found within {WITHIN} worlds: {missed:?}"
    );
}

#[test]
fn no_world_violates_the_contract() {
    let options = Options::default();
    if let Some(seed) = env("SEED") {
        println!("{}", trace(seed, None, options));
        run(seed, None, options).unwrap();
        return;
    }
    let (first, seeds) = (env("FIRST").unwrap_or(1), env("SEEDS").unwrap_or(2000));
    let (next, since) = (AtomicU64::new(first), Instant::now());
    let bad = Mutex::new(Vec::new());
    let seen = Mutex::new(Counts::default());
    std::thread::scope(|s| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            s.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds {
                        break;
                    }
                    match run(seed, None, options) {
                        Ok(told) => seen.lock().unwrap().add(&told.seen),
                        Err(what) => bad.lock().unwrap().push((seed, what)),
                    }
                }
            });
        }
    });
    let mut bad = bad.into_inner().unwrap();
    bad.sort();
    for (seed, what) in bad.iter().take(30) {
        println!("SEED={seed}: {what}");
    }
    if let Some((seed, _)) = bad.first() {
        panic!(
            "{} of {seeds} worlds; SEED={seed}:\n{}",
            bad.len(),
            trace(*seed, None, options)
        );
    }
    let seen = seen.into_inner().unwrap();
    let all = Seen::ALL
        .map(|k| format!("{k:?} {}", seen.of(k)))
        .join(", ");
    // Past the harness, which would keep it.
    let mut err = std::io::stderr();
    writeln!(err, "{seeds} worlds in {:.1?}: {all}", since.elapsed()).unwrap();
    if seeds >= 2000 {
        let never: Vec<Seen> = Seen::ALL.into_iter().filter(|k| seen.of(*k) == 0).collect();
        assert!(never.is_empty(), "never happened: {never:?}");
    }
}

#[test]
fn a_panic_has_a_seed_and_a_trace() {
    let options = Options::default();
    let panics = Some(Bug::Panics);
    let (seed, what) = (1..50)
        .find_map(|seed| Some((seed, run(seed, panics, options).err()?)))
        .expect("a commit in so many worlds");
    assert_eq!(what, "panic: a bug that was put in panics");
    let told = trace(seed, panics, options);
    let last = told.lines().rev().take(2).collect::<Vec<_>>();
    assert_eq!(last[0], format!("VIOLATED {what}"));
    assert!(last[1].contains("hears Commit"), "{last:?}");
}

#[test]
fn a_seed_is_the_same_world_each_time() {
    let options = Options::default();
    let mut lines = 0;
    for seed in 1..=30 {
        let again = std::thread::spawn(move || trace(seed, None, options));
        let (one, two) = (trace(seed, None, options), again.join().unwrap());
        assert!(one == two, "seed {seed}");
        lines += one.lines().count();
    }
    assert!(lines > 3000, "{lines}");
}
