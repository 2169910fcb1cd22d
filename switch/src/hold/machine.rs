//! PURE: what moves a hold, in which state that is right, and where it leads. The picture: [`HoldState`].
//!
//! Every move is written down ([`Persist`]) before anybody is told of it, so that a switch that starts again knows where its
//! holds stand ([`taken_up`]).
//!
//! Invariant: no I/O, no clock. A repeated request is `Again`, never an error, so that a coordinator may ask twice.
//! Invariant: what can't be taken back is written down before it is begun.

use gangway_shared::api::{HoldState, Role, Scope};

/// What moves a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Source.
    Freeze(Scope),
    /// Source.
    Seal,
    /// Source.
    Depart,
    /// Source: all lanes are acknowledged.
    Acknowledged,
    /// Target.
    Restore,
    /// Target.
    Commit,
    /// Target.
    Announce,
    /// Lanes have drained.
    Drained,
    /// Both.
    Abort,
    /// Nobody asks for it any more, or it holds frames for too long, and the configuration wants such a hold put back. Only where
    /// that is right whatever its coordinator's journal says (ADR-0035).
    TimedOut,
    /// Both.
    Release,
}

/// When the new state is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persist {
    /// First, then carry it out: a switch that dies in between goes on with it.
    First,
    /// Carry it out, write it down, answer: a switch that dies in between stands where it stood, and is asked again. What is
    /// written down of a hold that is over is that nothing is there any more: its record goes with its queues.
    Then,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out; then the hold is in this state.
    Go(HoldState, Persist),
    /// It was done before: answer as then.
    Again,
    /// Not in this state.
    No,
}

/// All of both ends.
pub const STATES: [HoldState; 13] = [
    HoldState::Open,
    HoldState::FrozenInside,
    HoldState::Frozen,
    HoldState::Sealed,
    HoldState::Departing,
    HoldState::Departed,
    HoldState::Prepared,
    HoldState::Restored,
    HoldState::Draining,
    HoldState::Live,
    HoldState::Aborting,
    HoldState::Aborted,
    HoldState::Released,
];

/// In which states this event would have been right; none if it is for the other end.
pub fn wanted(role: Role, event: Event) -> Vec<HoldState> {
    let goes = |s: &HoldState| matches!(step(role, *s, event), Verdict::Go(..));
    STATES.into_iter().filter(goes).collect()
}

/// The one transition table.
pub fn step(role: Role, state: HoldState, event: Event) -> Verdict {
    use Event as E;
    use HoldState as S;
    use Persist::{First, Then};
    use Verdict::{Again, Go, No};
    match (role, state, event) {
        (Role::Source, S::Open, E::Freeze(Scope::Inside)) => Go(S::FrozenInside, Then),
        (Role::Source, S::Open | S::FrozenInside, E::Freeze(Scope::All)) => Go(S::Frozen, Then),
        (Role::Source, S::FrozenInside, E::Freeze(Scope::Inside)) => Again,
        (Role::Source, S::Frozen | S::Sealed, E::Freeze(_)) => Again,
        (Role::Source, S::Frozen, E::Seal) => Go(S::Sealed, Then),
        (Role::Source, S::Sealed | S::Departing | S::Departed, E::Seal) => Again,
        (Role::Source, S::Sealed, E::Depart) => Go(S::Departing, First),
        (Role::Source, S::Departing | S::Departed, E::Depart) => Again,
        (Role::Source, S::Departing, E::Acknowledged) => Go(S::Departed, Then),
        (Role::Source, S::Departed, E::Release) => Go(S::Released, Then),
        (Role::Source, S::Open | S::FrozenInside | S::Frozen | S::Sealed, E::Abort) => {
            Go(S::Aborting, First)
        }
        // `Open` only where it holds all the same: the caller's to see.
        (Role::Source, S::Open | S::FrozenInside | S::Frozen, E::TimedOut) => {
            Go(S::Aborting, First)
        }
        (Role::Source, S::Aborting, E::Drained) => Go(S::Aborted, Then),

        (Role::Target, S::Prepared, E::Restore) => Go(S::Restored, Then),
        (Role::Target, S::Restored | S::Draining | S::Live, E::Restore) => Again,
        (Role::Target, S::Restored, E::Commit) => Go(S::Draining, First),
        (Role::Target, S::Draining | S::Live, E::Commit) => Again,
        (Role::Target, s @ (S::Draining | S::Live), E::Announce) => Go(s, First),
        (Role::Target, S::Draining, E::Drained) => Go(S::Live, Then),
        (Role::Target, S::Live, E::Release) => Go(S::Released, Then),
        (Role::Target, S::Prepared | S::Restored, E::Abort) => Go(S::Aborted, Then),
        (Role::Target, S::Prepared, E::TimedOut) => Go(S::Aborted, Then),

        (_, S::Released, E::Release) => Again,
        (_, S::Aborting | S::Aborted, E::Abort | E::Release | E::TimedOut) => Again,
        _ => No,
    }
}

/// What recovery has found of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// All queues that the source has named are there, and those between the group's VMs are sealed and intact.
    pub complete: bool,
}

/// Where a hold stands that was written down in `state`: there, unless what was verified is not there any more (a disk
/// that lied). Lanes that have drained drain once more, of nothing.
pub fn taken_up(role: Role, state: HoldState, found: Found) -> HoldState {
    match (role, state) {
        (Role::Target, HoldState::Restored) if !found.complete => HoldState::Prepared,
        (Role::Target, HoldState::Live) => HoldState::Draining,
        (_, s) => s,
    }
}

/// Whether a source's lane holds when the hold is taken up. `waits`: it was written to, and not all of that was delivered;
/// then it was held, whatever is written down.
pub fn holds(state: HoldState, inside: bool, waits: bool) -> bool {
    match state {
        HoldState::Open => waits,
        HoldState::FrozenInside => inside || waits,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 12] = [
        Event::Freeze(Scope::Inside),
        Event::Freeze(Scope::All),
        Event::Seal,
        Event::Depart,
        Event::Acknowledged,
        Event::Restore,
        Event::Commit,
        Event::Announce,
        Event::Drained,
        Event::Abort,
        Event::TimedOut,
        Event::Release,
    ];

    /// The whole state x event matrix, to be read when it changes. `UPDATE=1 cargo test` writes it.
    #[test]
    fn the_matrix_is_the_one_that_was_reviewed() {
        let mut text = String::new();
        for role in [Role::Source, Role::Target] {
            for s in STATES {
                for e in EVENTS {
                    if let v @ (Verdict::Go(..) | Verdict::Again) = step(role, s, e) {
                        text.push_str(&format!("{role:?} {s:?} + {e:?} = {v:?}\n"));
                    }
                }
            }
        }
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/hold/matrix.txt");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(file, &text).expect("write the matrix");
        }
        assert_eq!(
            text,
            std::fs::read_to_string(file).expect("the matrix"),
            "run with UPDATE=1 and review the diff"
        );
    }

    #[test]
    fn nothing_leads_back_behind_the_point_of_no_return() {
        for s in [HoldState::Departing, HoldState::Departed] {
            assert_eq!(step(Role::Source, s, Event::Abort), Verdict::No);
        }
        for s in [HoldState::Draining, HoldState::Live] {
            assert_eq!(step(Role::Target, s, Event::Abort), Verdict::No);
        }
    }

    /// What the coordinator may have gone on with stays. It has begun the commit only if a restore was answered, and that only if the
    /// seal was.
    #[test]
    fn a_time_out_ends_only_what_cannot_have_been_committed() {
        let ends = |role, s| matches!(step(role, s, Event::TimedOut), Verdict::Go(..));
        for s in STATES {
            let held = [HoldState::Open, HoldState::FrozenInside, HoldState::Frozen];
            assert_eq!(ends(Role::Source, s), held.contains(&s), "{s:?}");
            assert_eq!(ends(Role::Target, s), s == HoldState::Prepared, "{s:?}");
        }
    }

    #[test]
    fn what_is_refused_names_what_is_wanted() {
        let of = |role, event| wanted(role, event);
        assert_eq!(of(Role::Source, Event::Seal), [HoldState::Frozen]);
        assert_eq!(of(Role::Target, Event::Commit), [HoldState::Restored]);
        assert_eq!(
            of(Role::Target, Event::Abort),
            [HoldState::Prepared, HoldState::Restored]
        );
        assert!(of(Role::Source, Event::Commit).is_empty());
    }

    #[test]
    fn a_repeat_is_never_an_error() {
        for role in [Role::Source, Role::Target] {
            for s in STATES {
                for e in EVENTS {
                    if let Verdict::Go(to, _) = step(role, s, e)
                        && !matches!(e, Event::Acknowledged | Event::Drained)
                    {
                        assert_ne!(step(role, to, e), Verdict::No, "{role:?} {to:?} {e:?}");
                    }
                }
            }
        }
    }
}
