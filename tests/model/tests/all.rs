//! All states of small moves.

use std::time::Instant;

use gangway::migration::steps::FreezeMode;
use gangway_model::{Bounds, Bug, Move, rounds};
use stateright::{Checker, Model};

fn model(freeze: FreezeMode, bounds: Bounds) -> Move {
    Move {
        freeze,
        bounds,
        bug: None,
    }
}

/// Looks at all states; says how a property was violated.
fn all(model: Move) -> (Result<(), String>, usize) {
    let told = format!("{model:?}");
    let checker = model.checker().spawn_dfs().join();
    let states = checker.unique_state_count();
    let found = checker.discoveries();
    let moves = found.contains_key("it moves");
    let bad = found.into_iter().find(|(name, _)| *name != "it moves");
    let result = match bad {
        Some((name, path)) => {
            let steps: Vec<String> = path
                .clone()
                .into_vec()
                .iter()
                .filter_map(|(_, a)| Some(format!("  {:?}", a.as_ref()?)))
                .collect();
            let last = path.last_state();
            Err(format!(
                "{told}: {name}: {:?}\n{}\n{last:#?}",
                last.wrong(),
                steps.join("\n")
            ))
        }
        None if !moves => Err(format!("{told}: nothing moves")),
        None => Ok(()),
    };
    (result, states)
}

const ONE: Bounds = Bounds {
    frames: 1,
    lost: 0,
    coordinator: 0,
    switches: 0,
    aborts: 0,
};

const BOTH: [FreezeMode; 2] = [FreezeMode::Switchover, FreezeMode::Early];

/// In each `make test`; with `MODEL=all` (`make soak`) also what takes minutes.
fn cases() -> Vec<Bounds> {
    let mut all = vec![
        Bounds { frames: 2, ..ONE },
        Bounds { lost: 1, ..ONE },
        Bounds {
            coordinator: 1,
            ..ONE
        },
        Bounds { switches: 1, ..ONE },
        Bounds {
            aborts: 1,
            lost: 1,
            ..ONE
        },
    ];
    if std::env::var("MODEL").is_ok_and(|m| m == "all") {
        all.extend([
            Bounds {
                lost: 1,
                coordinator: 1,
                ..ONE
            },
            Bounds { lost: 2, ..ONE },
            Bounds { switches: 2, ..ONE },
            Bounds {
                switches: 1,
                lost: 1,
                ..ONE
            },
            Bounds {
                switches: 1,
                coordinator: 1,
                ..ONE
            },
            Bounds {
                switches: 1,
                aborts: 1,
                ..ONE
            },
            Bounds {
                frames: 2,
                switches: 1,
                ..ONE
            },
        ]);
    }
    all
}

#[test]
fn the_contract_holds_in_every_state_and_every_move_ends() {
    for bounds in cases() {
        for freeze in BOTH {
            let since = Instant::now();
            let (result, states) = all(model(freeze, bounds));
            eprintln!(
                "{freeze:?}, {bounds:?}: {states} states, {:?}",
                since.elapsed()
            );
            result.unwrap_or_else(|why| panic!("{why}"));
        }
    }
}

#[test]
fn no_state_comes_back() {
    for bounds in [
        Bounds { frames: 2, ..ONE },
        Bounds { lost: 1, ..ONE },
        Bounds { aborts: 1, ..ONE },
        Bounds { switches: 1, ..ONE },
        Bounds {
            coordinator: 1,
            ..ONE
        },
    ] {
        for freeze in BOTH {
            let since = Instant::now();
            let (again, states) = rounds(&model(freeze, bounds));
            eprintln!(
                "{freeze:?}, {bounds:?}: {states} states, {:?}",
                since.elapsed()
            );
            assert!(again.is_none(), "{again:#?}");
        }
    }
}

#[test]
fn each_bug_is_found() {
    let lost = Bounds { lost: 1, ..ONE };
    let switches = Bounds { switches: 1, ..ONE };
    for (bug, bounds) in [
        (Bug::SkipPersist, switches),
        (Bug::ForgetFirst, switches),
        (
            Bug::SkipJournal,
            Bounds {
                coordinator: 1,
                ..ONE
            },
        ),
        (Bug::OpenBeforeDrained, Bounds { frames: 2, ..ONE }),
        (Bug::HoleInTheCut, ONE),
        (Bug::NoTombstone, Bounds { aborts: 1, ..lost }),
        (Bug::DepartAtOnce, ONE),
        (Bug::AbortAfterCommit, lost),
        (Bug::StartAgain, Bounds { aborts: 1, ..lost }),
    ] {
        let mut model = model(FreezeMode::Switchover, bounds);
        model.bug = Some(bug);
        let (result, states) = all(model);
        let Err(why) = result else {
            panic!("{bug:?} is not found in {states} states");
        };
        let what = why.lines().next().unwrap_or_default();
        eprintln!("{bug:?} after {states} states: {what}");
    }
}
