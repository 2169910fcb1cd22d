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

/// Where a machine stands, and what it did to come there, if it was made of a journal.
struct At {
    name: String,
    machine: Machine,
    replayed: Option<Vec<Action>>,
}

fn here(name: impl Into<String>, machine: &Machine) -> At {
    At {
        name: name.into(),
        machine: machine.clone(),
        replayed: None,
    }
}

fn replayed(name: &str, freeze: FreezeMode, journal: &[Entry]) -> At {
    let (machine, actions) = Machine::replay(freeze, journal);
    At {
        name: format!("replayed: {name}"),
        machine,
        replayed: Some(actions),
    }
}

/// What stands in the journal when exactly this step has begun and everything before it is done.
fn journal_at(step: Step, freeze: FreezeMode) -> Vec<Entry> {
    let actions = begin(&mut Machine::new(freeze), step);
    let entries = actions.into_iter().filter_map(|a| match a {
        Action::Journal { entry, .. } => Some(entry),
        _ => None,
    });
    entries.collect()
}

fn failed(m: &mut Machine, step: Step, times: u32) -> Vec<Action> {
    let failed = Event::Failed {
        step,
        unchanged: false,
    };
    (0..times).flat_map(|_| m.on(failed)).collect()
}

fn names(steps: &[Step]) -> String {
    let names: Vec<&str> = steps.iter().map(|s| s.name()).collect();
    names.join(" and ")
}

/// Every phase, with every step and undo in it, at its first and its last try, half let go, and made of a journal.
fn states() -> Vec<At> {
    let mut all = vec![here("idle", &Machine::new(FreezeMode::Switchover))];
    for row in TABLE {
        let mut m = at(row.step, FreezeMode::Early);
        let steps = running(&m);
        all.push(here(format!("running {}", names(&steps)), &m));
        if row.step < NO_RETURN {
            let mut h = m.clone();
            h.on(Event::Abort);
            all.push(here(format!("halting {}", names(&steps)), &h));
            for s in steps.iter().filter(|_| steps.len() > 1) {
                let (mut m, mut h) = (m.clone(), h.clone());
                m.on(Event::Done(*s));
                h.on(Event::Halted(*s));
                let rest = names(&running(&m));
                all.push(here(format!("running {rest}, {} is done", s.name()), &m));
                all.push(here(format!("halting {rest}, {} has let go", s.name()), &h));
            }
        } else {
            failed(&mut m, row.step, 1);
            all.push(here(format!("running {}, failed once", row.name), &m));
            failed(&mut m, row.step, FORWARD_TRIES - 2);
            all.push(here(format!("running {}, its last try", row.name), &m));
            failed(&mut m, row.step, 1);
            all.push(here(format!("ended, {} never succeeded", row.name), &m));
        }
    }
    let mut m = at(Step::Switchover, FreezeMode::Switchover);
    m.on(Event::Abort);
    for s in running(&m) {
        m.on(Event::Halted(s));
    }
    let mut incomplete = m.clone();
    for u in Undo::ALL {
        all.push(here(format!("undoing {u:?}"), &m));
        for _ in 1..UNDO_TRIES {
            incomplete.on(Event::UndoFailed(u));
        }
        let before = if u == Undo::ALL[0] {
            ""
        } else {
            ", those before were not undone"
        };
        all.push(here(
            format!("undoing {u:?}, its last try{before}"),
            &incomplete,
        ));
        incomplete.on(Event::UndoFailed(u));
        m.on(Event::Undone(u));
    }
    all.push(here("ended, rolled back", &m));
    all.push(here("ended, not all of it undone", &incomplete));
    let mut moved = at(Step::Release, FreezeMode::Early);
    moved.on(Event::Done(Step::Release));
    all.push(here("ended, moved", &moved));

    let early = FreezeMode::Early;
    all.push(replayed("nothing", early, &[]));
    for row in TABLE {
        let journal = journal_at(row.step, early);
        all.push(replayed(
            &format!("{} has begun", row.name),
            early,
            &journal,
        ));
    }
    let ends = |step, more: &[Entry]| [journal_at(step, early).as_slice(), more].concat();
    let refused = [Entry::Failed(NO_RETURN)];
    for (name, journal) in [
        ("the commit was refused", ends(NO_RETURN, &refused)),
        (
            "the commit was refused, and a rollback began",
            ends(NO_RETURN, &[refused[0], Entry::Rollback]),
        ),
        (
            "seal is done, switchover is not",
            ends(Step::Seal, &[Entry::Done(Step::Seal)]),
        ),
        (
            "a rollback from start began",
            ends(Step::Start, &[Entry::Rollback]),
        ),
        (
            "and one thing was undone",
            ends(
                Step::Start,
                &[Entry::Rollback, Entry::Undone(Undo::EndTargets)],
            ),
        ),
        (
            "not all was undone",
            ends(
                Step::Start,
                &[Entry::Rollback, Entry::End(Outcome::RollbackIncomplete)],
            ),
        ),
        (
            "it was unfinished",
            ends(Step::Activate, &[Entry::End(Outcome::Unfinished)]),
        ),
        (
            "it was rolled back",
            ends(
                Step::Start,
                &[Entry::Rollback, Entry::End(Outcome::RolledBack)],
            ),
        ),
        (
            "it has moved",
            ends(
                Step::Release,
                &[Entry::Done(Step::Release), Entry::End(Outcome::Moved)],
            ),
        ),
    ] {
        all.push(replayed(name, early, &journal));
    }
    let mut m = Machine::replay(early, &journal_at(Step::Activate, early)).0;
    failed(&mut m, Step::Activate, FORWARD_TRIES - 1);
    all.push(here("replayed: activate has begun, its last try", &m));
    all.dedup_by(|a, b| a.name == b.name);
    all
}

fn events() -> Vec<(String, Event)> {
    let mut all = vec![
        ("start".to_owned(), Event::Start),
        ("abort".to_owned(), Event::Abort),
    ];
    for row in TABLE {
        let (step, name) = (row.step, row.name);
        let fails = |unchanged| Event::Failed { step, unchanged };
        all.push((format!("done {name}"), Event::Done(step)));
        all.push((format!("failed {name}"), fails(false)));
        all.push((format!("refused {name}"), fails(true)));
        all.push((format!("halted {name}"), Event::Halted(step)));
    }
    for u in Undo::ALL {
        all.push((format!("undone {u:?}"), Event::Undone(u)));
        all.push((format!("undo failed {u:?}"), Event::UndoFailed(u)));
    }
    all
}

fn matrix() -> String {
    let mut out = String::from(
        "# state x event, made by coordinator/src/migration/machine/tests.rs; journal! is synced. No line: nothing is done, though a step may\n# be noted as let go. (replay): what the journal alone makes it do.\n",
    );
    let words = |actions: &[Action]| actions.iter().map(word).collect::<Vec<_>>().join(", ");
    for at in states() {
        out += &format!("\n{}\n", at.name);
        if let Some(actions) = &at.replayed {
            out += &format!("  (replay): {}\n", words(actions));
        }
        for (name, event) in events() {
            let actions = at.machine.clone().on(event);
            if !actions.is_empty() {
                out += &format!("  {name}: {}\n", words(&actions));
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

#[test]
fn a_step_behind_the_commit_that_never_succeeds_ends_unfinished_and_is_taken_up_again() {
    for row in TABLE.iter().filter(|r| r.step >= NO_RETURN) {
        for again in [false, true] {
            let mut m = at(row.step, FreezeMode::Early);
            let mut journal = journal_at(row.step, FreezeMode::Early);
            if again {
                m = Machine::replay(FreezeMode::Early, &journal).0;
            }
            let actions = failed(&mut m, row.step, FORWARD_TRIES);
            let tries = actions.iter().filter_map(|a| match a {
                Action::Run { step, attempt } => Some((*step, *attempt)),
                _ => None,
            });
            let wanted = (1..FORWARD_TRIES).map(|n| (row.step, n));
            assert!(tries.eq(wanted), "{}: {actions:?}", row.name);
            assert!(
                !actions
                    .iter()
                    .any(|a| matches!(a, Action::Undo { .. } | Action::Halt(_)))
            );
            assert_eq!(m.outcome(), Some(Outcome::Unfinished), "{}", row.name);
            assert_eq!(m.on(Event::Abort), [Action::TooLate], "no way back");
            journal.push(Entry::End(Outcome::Unfinished));
            let (m, actions) = Machine::replay(FreezeMode::Early, &journal);
            let run = Action::Run {
                step: row.step,
                attempt: 0,
            };
            assert!(m.past_return() && actions.contains(&run), "{}", row.name);
        }
    }
}

/// What an observer of the actors knows of the commit.
#[derive(Default)]
struct Commit {
    /// It was ordered, and not answered.
    ordered: bool,
    /// An order was answered otherwise than by a refusal, or never.
    maybe: bool,
}

proptest! {
    /// Whatever happens, and wherever it crashes, between any two actions or with the power gone: no undo once the commit may have happened, no
    /// forward step once a rollback began, and the journal leads every action.
    #[test]
    fn random_walks_keep_the_contract(
        ahead in 0..TABLE.len(),
        choices in prop::collection::vec((0u8..9, any::<prop::sample::Index>()), 1..120),
    ) {
        let freeze = FreezeMode::Switchover;
        let mut m = Machine::new(freeze);
        let mut journal: Vec<Entry> = Vec::new();
        // How much of it survives a loss of power.
        let mut synced = 0;
        let mut pending = m.on(Event::Start);
        let (mut running, mut undoing): (Vec<Step>, Option<Undo>) = (Vec::new(), None);
        let mut commit = Commit::default();
        // Most walks shall get somewhere first.
        let steps = std::iter::repeat_n((0, None), ahead);
        for (choice, index) in steps.chain(choices.into_iter().map(|(c, i)| (c, Some(i)))) {
            let pick = |n: usize| index.map_or(0, |i| i.index(n));
            let crash = choice >= 7;
            let until = if crash { pick(pending.len() + 1) } else { pending.len() };
            for a in pending.drain(..).take(until) {
                match a {
                    Action::Journal { entry, sync } => {
                        journal.push(entry);
                        if sync { synced = journal.len(); }
                    }
                    Action::Run { step, .. } => {
                        prop_assert!(journal.contains(&Entry::Begin(step)), "{step:?} without its record");
                        prop_assert!(!journal.contains(&Entry::Rollback), "{step:?} after the rollback");
                        if !running.contains(&step) { running.push(step); }
                        commit.ordered |= step == NO_RETURN;
                    }
                    Action::Undo { undo, .. } => {
                        prop_assert!(journal.contains(&Entry::Rollback));
                        prop_assert!(!commit.ordered && !commit.maybe, "{undo:?} after the commit");
                        undoing = Some(undo);
                    }
                    Action::End(o) => {
                        prop_assert!(journal.contains(&Entry::End(o)));
                        prop_assert!(o != Outcome::Moved || commit.maybe);
                    }
                    Action::Halt(_) | Action::TooLate => {}
                }
            }
            if crash {
                // Of what was not synced, a loss of power leaves as much as it likes.
                if choice == 8 {
                    journal.truncate(synced + pick(journal.len() - synced + 1));
                }
                commit.maybe |= std::mem::take(&mut commit.ordered);
                let (again, actions) = Machine::replay(freeze, &journal);
                let forward = journal.contains(&Entry::Begin(NO_RETURN)) && !journal.contains(&Entry::Rollback);
                prop_assert_eq!(again.past_return() || again.outcome().is_some(), forward || again.outcome().is_some());
                prop_assert!(forward || !commit.maybe, "a commit is forgotten");
                m = again;
                pending = actions;
                running.clear();
                undoing = None;
                continue;
            }
            if m.outcome().is_some() { break; }
            let event = match (choice, running.is_empty(), undoing) {
                (0 | 1, false, _) => {
                    let step = running.remove(pick(running.len()));
                    if step == NO_RETURN { commit = Commit { ordered: false, maybe: true }; }
                    Event::Done(step)
                }
                (2, false, _) => {
                    // It is answered; another try is another order.
                    let step = running.remove(pick(running.len()));
                    let unchanged = pick(2) == 0;
                    if step == NO_RETURN {
                        commit.ordered = false;
                        commit.maybe |= !unchanged;
                    }
                    Event::Failed { step, unchanged }
                }
                (3, ..) => Event::Abort,
                (4 | 5, false, _) => Event::Halted(running[pick(running.len())]),
                (_, _, Some(u)) if choice % 2 == 0 => Event::Undone(u),
                (_, _, Some(u)) => Event::UndoFailed(u),
                _ => Event::Start,
            };
            pending = m.on(event);
        }
    }
}
