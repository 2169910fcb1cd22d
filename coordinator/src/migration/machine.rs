//! The migration's machine: events in, actions out. The picture: `Phase`.
//!
//! Actions must be carried out in their order, and a [`Action::Journal`] must be on its way to the disk before the
//! next one: what depends on a record comes behind it.
//! Invariant: pure; no clock, no socket. [`Machine::replay`] of the journal gives the machine that wrote it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::steps::{FreezeMode, NO_RETURN, Step, TABLE, Undo};

/// A step past the point of no return is tried so many times in one life of the coordinator.
pub const FORWARD_TRIES: u32 = 40;
/// An undo is tried so many times; then the next one follows, and the report names it.
pub const UNDO_TRIES: u32 = 10;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The shells are ready.
    Start,
    /// A step has ended well.
    Done(Step),
    /// A step has failed; `unchanged`: certainly without an effect.
    Failed {
        /// Which.
        step: Step,
        /// The actor refused, or never got the order.
        unchanged: bool,
    },
    /// The operator wants it undone.
    Abort,
    /// A step that was told to halt has let go.
    Halted(Step),
    /// An undo has ended well.
    Undone(Undo),
    /// An undo has failed.
    UndoFailed(Undo),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Append to the journal; with `sync`, wait for the disk.
    Journal {
        /// What.
        entry: Entry,
        /// Also force it to the disk.
        sync: bool,
    },
    /// Begin a step. `attempt` counts from 0; wait longer before a higher one.
    Run {
        /// Which.
        step: Step,
        /// How often it has failed.
        attempt: u32,
    },
    /// Let go of a running step; [`Event::Halted`] must follow, whatever else it reports is ignored.
    Halt(Step),
    /// Put something back.
    Undo {
        /// What.
        undo: Undo,
        /// How often it has failed.
        attempt: u32,
    },
    /// Tell the operator that it is too late for an abort.
    TooLate,
    /// It is over.
    End(Outcome),
}

/// A line of the journal that the machine understands again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The step begins.
    Begin(Step),
    /// The step is done.
    Done(Step),
    /// The step has failed.
    Failed(Step),
    /// From here on everything is put back.
    Rollback,
    /// This is put back.
    Undone(Undo),
    /// This could not be put back.
    NotUndone(Undo),
    /// It is over.
    End(Outcome),
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The VMs run on the target.
    Moved,
    /// It ended before anything was changed.
    NothingDone,
    /// The VMs run on the source, as before.
    RolledBack,
    /// Something could not be put back.
    RollbackIncomplete,
    /// Past the point of no return, and a step does not succeed. It can be taken up again.
    Unfinished,
}

/// Where a migration stands.
///
/// ```text
///  Idle --Start--> Forward --(last step done)--> Ended(Moved)
///   |              |  |  ^
///   |              |  |  `- past the point of no return: a failed step is tried again; too often: Ended(Unfinished)
///   |              |  `-- before it: a step fails, or Abort; or the first commit of a first life is refused
///   |              |        |
///   |              |        v
///   |              |      Halting --(all running steps have let go)--> Undoing --(last undo)--> Ended(RolledBack)
///   |              |                  |                                 |  ^ |
///   |              |                  |                                 |  `-' a failed undo is tried again; too often:
///   |              |                  |                                 |      the next one, and in the end
///   |              |                  |                                 `----> Ended(RollbackIncomplete)
///   |              |                  `--(nothing was begun that has an undo)--> Ended(NothingDone)
///   `--Abort-------)-----------------------------------------------------------> Ended(NothingDone)
///                  `--Abort past the point of no return: too late, it goes on
///
///  replay: the commit has begun, and no rollback ----> Forward, all that is not done begins
///          an end is noted, but Unfinished or RollbackIncomplete --> Ended
///          otherwise --------------------------------> Undoing, everything; or Ended(NothingDone)
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Phase {
    Idle,
    Forward {
        running: BTreeSet<Step>,
        tries: BTreeMap<Step, u32>,
    },
    Halting {
        running: BTreeSet<Step>,
    },
    Undoing {
        now: Undo,
        attempt: u32,
        incomplete: bool,
    },
    Ended(Outcome),
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Machine {
    phase: Phase,
    done: BTreeSet<Step>,
    begun: BTreeSet<Step>,
    /// After a crash: records may be missing, so everything is put back.
    undo_all: bool,
    /// The point of no return may have been passed in an earlier life.
    resumed: bool,
}

impl Machine {
    /// A migration that has not begun.
    pub fn new(freeze: FreezeMode) -> Machine {
        let done = TABLE
            .iter()
            .map(|r| r.step)
            .filter(|s| !s.in_mode(freeze))
            .collect();
        Machine {
            phase: Phase::Idle,
            done,
            begun: BTreeSet::new(),
            undo_all: false,
            resumed: false,
        }
    }

    /// The machine after a crash, and what it does now: nothing if it was over, else all undos or, past the point of
    /// no return, the steps that are missing.
    pub fn replay(freeze: FreezeMode, journal: &[Entry]) -> (Machine, Vec<Action>) {
        let mut m = Machine::new(freeze);
        m.undo_all = true;
        m.resumed = true;
        let mut rollback = false;
        for e in journal {
            match e {
                Entry::Begin(s) => {
                    m.begun.insert(*s);
                }
                Entry::Done(s) => {
                    m.done.insert(*s);
                }
                Entry::Rollback => rollback = true,
                // An unfinished one is taken up again.
                Entry::End(Outcome::Unfinished | Outcome::RollbackIncomplete) => {}
                Entry::End(o) => {
                    m.phase = Phase::Ended(*o);
                    return (m, Vec::new());
                }
                Entry::Failed(_) | Entry::Undone(_) | Entry::NotUndone(_) => {}
            }
        }
        let mut out = Vec::new();
        if m.begun.contains(&NO_RETURN) && !rollback {
            m.phase = Phase::Forward {
                running: BTreeSet::new(),
                tries: BTreeMap::new(),
            };
            m.advance(&mut out);
        } else {
            m.roll_back(&mut out);
        }
        (m, out)
    }

    /// True from the point of no return on: no undo any more.
    pub fn past_return(&self) -> bool {
        self.begun.contains(&NO_RETURN)
            && matches!(self.phase, Phase::Forward { .. } | Phase::Ended(_))
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        match self.phase {
            Phase::Ended(o) => Some(o),
            _ => None,
        }
    }

    /// The transition. Events that make no sense in the present state change nothing.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        let past = self.past_return();
        match (&mut self.phase, event) {
            (Phase::Idle, Event::Start) => {
                self.phase = Phase::Forward {
                    running: BTreeSet::new(),
                    tries: BTreeMap::new(),
                };
                self.advance(&mut out);
            }
            (Phase::Idle, Event::Abort) => self.end(Outcome::NothingDone, &mut out),

            (Phase::Forward { running, .. }, Event::Done(step)) if running.contains(&step) => {
                running.remove(&step);
                self.done.insert(step);
                out.push(Action::Journal {
                    entry: Entry::Done(step),
                    sync: false,
                });
                self.advance(&mut out);
            }
            (Phase::Forward { running, tries }, Event::Failed { step, unchanged })
                if running.contains(&step) =>
            {
                out.push(Action::Journal {
                    entry: Entry::Failed(step),
                    sync: false,
                });
                let attempt = tries.entry(step).or_default();
                // A commit that was refused has not happened: the one way back.
                let back = step == NO_RETURN && unchanged && *attempt == 0 && !self.resumed;
                if !past || back {
                    running.remove(&step);
                    let running = std::mem::take(running);
                    self.halt(running, &mut out);
                } else {
                    *attempt += 1;
                    if *attempt >= FORWARD_TRIES {
                        self.end(Outcome::Unfinished, &mut out);
                    } else {
                        out.push(Action::Run {
                            step,
                            attempt: *attempt,
                        });
                    }
                }
            }
            (Phase::Forward { .. }, Event::Abort) if past => out.push(Action::TooLate),
            (Phase::Forward { running, .. }, Event::Abort) => {
                let running = std::mem::take(running);
                self.halt(running, &mut out);
            }

            (Phase::Halting { running }, Event::Halted(step)) => {
                running.remove(&step);
                if running.is_empty() {
                    self.roll_back(&mut out);
                }
            }

            (Phase::Undoing { now, attempt, .. }, Event::Undone(undo)) if *now == undo => {
                *attempt = 0;
                out.push(Action::Journal {
                    entry: Entry::Undone(undo),
                    sync: false,
                });
                self.next_undo(Some(undo), &mut out);
            }
            (
                Phase::Undoing {
                    now,
                    attempt,
                    incomplete,
                },
                Event::UndoFailed(undo),
            ) if *now == undo => {
                *attempt += 1;
                if *attempt < UNDO_TRIES {
                    out.push(Action::Undo {
                        undo,
                        attempt: *attempt,
                    });
                } else {
                    *attempt = 0;
                    *incomplete = true;
                    out.push(Action::Journal {
                        entry: Entry::NotUndone(undo),
                        sync: false,
                    });
                    self.next_undo(Some(undo), &mut out);
                }
            }
            (Phase::Ended(_), Event::Abort) => out.push(Action::TooLate),
            _ => {}
        }
        out
    }

    /// Begins every step whose turn it is; ends if none is left.
    fn advance(&mut self, out: &mut Vec<Action>) {
        let Phase::Forward { running, .. } = &mut self.phase else {
            return;
        };
        for r in TABLE {
            let ready = !self.done.contains(&r.step)
                && !running.contains(&r.step)
                && r.after.iter().all(|a| self.done.contains(a));
            if ready {
                running.insert(r.step);
                self.begun.insert(r.step);
                let sync = !r.in_pause || r.step == NO_RETURN;
                out.push(Action::Journal {
                    entry: Entry::Begin(r.step),
                    sync,
                });
                out.push(Action::Run {
                    step: r.step,
                    attempt: 0,
                });
            }
        }
        if running.is_empty() {
            self.end(Outcome::Moved, out);
        }
    }

    fn halt(&mut self, running: BTreeSet<Step>, out: &mut Vec<Action>) {
        out.extend(running.iter().map(|s| Action::Halt(*s)));
        let idle = running.is_empty();
        self.phase = Phase::Halting { running };
        if idle {
            self.roll_back(out);
        }
    }

    fn roll_back(&mut self, out: &mut Vec<Action>) {
        out.push(Action::Journal {
            entry: Entry::Rollback,
            sync: true,
        });
        self.next_undo(None, out);
    }

    /// What has to be put back, in order.
    fn undos(&self) -> Vec<Undo> {
        let begun = |u: &Undo| self.begun.iter().any(|s| s.row().undo.contains(u));
        let any = self.begun.iter().any(|s| !s.row().undo.is_empty());
        Undo::ALL
            .into_iter()
            .filter(|u| begun(u) || (self.undo_all && any))
            .collect()
    }

    fn next_undo(&mut self, after: Option<Undo>, out: &mut Vec<Action>) {
        let incomplete = matches!(
            self.phase,
            Phase::Undoing {
                incomplete: true,
                ..
            }
        );
        match self.undos().into_iter().find(|u| Some(*u) > after) {
            Some(now) => {
                self.phase = Phase::Undoing {
                    now,
                    attempt: 0,
                    incomplete,
                };
                out.push(Action::Undo {
                    undo: now,
                    attempt: 0,
                });
            }
            None if after.is_none() => self.end(Outcome::NothingDone, out),
            None if incomplete => self.end(Outcome::RollbackIncomplete, out),
            None => self.end(Outcome::RolledBack, out),
        }
    }

    fn end(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        self.phase = Phase::Ended(outcome);
        out.push(Action::Journal {
            entry: Entry::End(outcome),
            sync: true,
        });
        out.push(Action::End(outcome));
    }
}

#[cfg(test)]
mod tests;
