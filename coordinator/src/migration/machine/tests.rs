//! Every state against every event, as a checked-in text; and random walks against what must always hold.

use proptest::prelude::*;

use super::*;

fn begin(m: &mut Machine, until: Step) -> Vec<Action> {
    let mut all = m.on(Event::Start);
    let mut at = 0;
    while let Some(a) = all.get(at).copied() {
        at += 1;
        if let Action::Run { step, .. } = a
            && step < until
        {
            all.extend(m.on(Event::Done(step)));
        }
    }
    all
}

/// A machine in which exactly this step has begun and everything before it is done.
fn at(step: Step, freeze: FreezeMode) -> Machine {
    let mut m = Machine::new(freeze);
    begin(&mut m, step);
    m
}

fn word(a: &Action) -> String {
    match a {
        Action::Journal { entry, sync } => {
            let entry = match entry {
                Entry::Begin(s) => format!("begin {}", s.name()),
                Entry::Done(s) => format!("done {}", s.name()),
                Entry::Failed(s) => format!("failed {}", s.name()),
                Entry::Rollback => "rollback".into(),
                Entry::Undone(u) => format!("undone {u:?}"),
                Entry::NotUndone(u) => format!("not undone {u:?}"),
                Entry::End(o) => format!("end {o:?}"),
            };
            format!("journal{} {entry}", if *sync { "!" } else { "" })
        }
        Action::Run { step, attempt } => format!("RUN {} #{attempt}", step.name()),
        Action::Halt(s) => format!("HALT {}", s.name()),
        Action::Undo { undo, attempt } => format!("UNDO {undo:?} #{attempt}"),
        Action::TooLate => "TOO LATE".into(),
        Action::End(o) => format!("END {o:?}"),
    }
}

fn running(m: &Machine) -> Vec<Step> {
    match &m.phase {
        Phase::Forward { running, .. } | Phase::Halting { running } => {
            running.iter().copied().collect()
        }
        _ => Vec::new(),
    }
}

fn matrix() -> String {
    let mut states: Vec<(String, Machine)> =
        vec![("idle".into(), Machine::new(FreezeMode::Switchover))];
    for row in TABLE {
        let m = at(row.step, FreezeMode::Early);
        let names: Vec<&str> = running(&m).iter().map(|s| s.name()).collect();
        states.push((format!("running {}", names.join(" and ")), m.clone()));
        if row.step < NO_RETURN {
            let mut h = m;
            h.on(Event::Abort);
            states.push((format!("halting {}", names.join(" and ")), h));
        }
    }
    let mut m = at(Step::Switchover, FreezeMode::Switchover);
    m.on(Event::Abort);
    for s in running(&m) {
        m.on(Event::Halted(s));
    }
    for u in Undo::ALL {
        states.push((format!("undoing {u:?}"), m.clone()));
        m.on(Event::Undone(u));
    }
    states.push(("ended".into(), m));
    states.dedup_by(|a, b| a.0 == b.0);

    let mut out = String::from(
        "# state x event, made by coordinator/src/migration/machine/tests.rs; journal! is synced. No line: nothing happens.\n",
    );
    for (name, m) in &states {
        out += &format!("\n{name}\n");
        let mut events = vec![
            ("start".to_owned(), Event::Start),
            ("abort".to_owned(), Event::Abort),
        ];
        for s in running(m) {
            events.push((format!("done {}", s.name()), Event::Done(s)));
            events.push((
                format!("failed {}", s.name()),
                Event::Failed {
                    step: s,
                    unchanged: false,
                },
            ));
            events.push((
                format!("refused {}", s.name()),
                Event::Failed {
                    step: s,
                    unchanged: true,
                },
            ));
            events.push((format!("halted {}", s.name()), Event::Halted(s)));
        }
        for u in Undo::ALL {
            events.push((format!("undone {u:?}"), Event::Undone(u)));
            events.push((format!("undo failed {u:?}"), Event::UndoFailed(u)));
        }
        for (event_name, event) in events {
            let actions = m.clone().on(event);
            if !actions.is_empty() {
                let words: Vec<String> = actions.iter().map(word).collect();
                out += &format!("  {event_name}: {}\n", words.join(", "));
            }
        }
    }
    out
}

#[test]
fn the_whole_matrix_is_as_checked_in() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/migration/machine/matrix.txt"
    );
    let now = matrix();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &now).expect("write");
    }
    let then = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        now == then,
        "the machine has changed; look at it with UPDATE_SNAPSHOTS=1 and git diff {path}"
    );
}

#[test]
fn failing_each_step_undoes_what_had_begun_and_in_the_safe_order() {
    for row in TABLE.iter().filter(|r| r.step < NO_RETURN) {
        let mut m = at(row.step, FreezeMode::Early);
        let failing = running(&m);
        let mut queue = m.on(Event::Failed {
            step: row.step,
            unchanged: false,
        });
        let mut undone = Vec::new();
        let mut i = 0;
        while let Some(a) = queue.get(i).copied() {
            i += 1;
            match a {
                Action::Halt(s) => queue.extend(m.on(Event::Halted(s))),
                Action::Undo { undo, .. } => {
                    undone.push(undo);
                    queue.extend(m.on(Event::Undone(undo)));
                }
                _ => {}
            }
        }
        let begun: Vec<Undo> = TABLE
            .iter()
            .filter(|r| r.step <= row.step || failing.contains(&r.step))
            .flat_map(|r| r.undo)
            .copied()
            .collect();
        assert!(
            begun.iter().all(|u| undone.contains(u)),
            "{}: {undone:?}",
            row.name
        );
        assert!(undone.is_sorted(), "{}: {undone:?}", row.name);
        let expected = if undone.is_empty() {
            Outcome::NothingDone
        } else {
            Outcome::RolledBack
        };
        assert_eq!(m.outcome(), Some(expected), "{}", row.name);
    }
}

#[test]
fn an_undo_that_never_succeeds_does_not_stop_the_others() {
    let mut m = at(Step::Stop, FreezeMode::Switchover);
    let mut queue = m.on(Event::Abort);
    let mut tried = Vec::new();
    let mut i = 0;
    while let Some(a) = queue.get(i).copied() {
        i += 1;
        match a {
            Action::Halt(s) => queue.extend(m.on(Event::Halted(s))),
            Action::Undo { undo, attempt } => {
                tried.push((undo, attempt));
                let failed = undo == Undo::CancelMemory;
                queue.extend(m.on(if failed {
                    Event::UndoFailed(undo)
                } else {
                    Event::Undone(undo)
                }));
            }
            _ => {}
        }
    }
    assert_eq!(
        tried
            .iter()
            .filter(|(u, _)| *u == Undo::CancelMemory)
            .count(),
        UNDO_TRIES as usize
    );
    assert!(tried.contains(&(Undo::ResumeSources, 0)) && tried.contains(&(Undo::ReturnFrames, 0)));
    assert_eq!(m.outcome(), Some(Outcome::RollbackIncomplete));
}

proptest! {
    /// Whatever happens and wherever it crashes: no undo once the commit may have happened, no forward step once a
    /// rollback began, and the journal leads every action.
    #[test]
    fn random_walks_keep_the_contract(choices in prop::collection::vec((0u8..8, any::<prop::sample::Index>()), 1..120)) {
        let mut m = Machine::new(FreezeMode::Switchover);
        let mut journal: Vec<Entry> = Vec::new();
        let mut pending = m.on(Event::Start);
        let (mut running, mut undoing): (Vec<Step>, Option<Undo>) = (Vec::new(), None);
        let mut committed = false;
        let mut committing_failed_unchanged = false;
        for (choice, index) in choices {
            for a in pending.drain(..) {
                match a {
                    Action::Journal { entry, .. } => journal.push(entry),
                    Action::Run { step, .. } => {
                        prop_assert!(journal.contains(&Entry::Begin(step)), "{step:?} without its record");
                        prop_assert!(!journal.contains(&Entry::Rollback), "{step:?} after the rollback");
                        if !running.contains(&step) { running.push(step); }
                        committed |= step == NO_RETURN;
                    }
                    Action::Undo { undo, .. } => {
                        prop_assert!(journal.contains(&Entry::Rollback));
                        prop_assert!(!committed || committing_failed_unchanged, "{undo:?} after the commit");
                        undoing = Some(undo);
                    }
                    Action::Halt(_) | Action::TooLate | Action::End(_) => {}
                }
            }
            if m.outcome().is_some() { break; }
            // A crash: a new machine from the journal.
            if choice == 7 {
                let (again, actions) = Machine::replay(FreezeMode::Switchover, &journal);
                prop_assert_eq!(again.past_return(), m.past_return() && again.outcome().is_none());
                m = again;
                pending = actions;
                running.clear();
                undoing = None;
                continue;
            }
            let event = match (choice, running.is_empty(), undoing) {
                (0 | 1, false, _) => Event::Done(running.remove(index.index(running.len()))),
                (2, false, _) => {
                    let step = running[index.index(running.len())];
                    let unchanged = index.index(2) == 0;
                    committing_failed_unchanged |= step == NO_RETURN && unchanged;
                    Event::Failed { step, unchanged }
                }
                (3, ..) => Event::Abort,
                (4 | 5, false, _) => Event::Halted(running[index.index(running.len())]),
                (_, _, Some(u)) if choice % 2 == 0 => Event::Undone(u),
                (_, _, Some(u)) => Event::UndoFailed(u),
                _ => Event::Start,
            };
            pending = m.on(event);
        }
    }
}
