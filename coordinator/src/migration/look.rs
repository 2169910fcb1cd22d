//! What a coordinator that takes over asks both switches before it acts: what became of the hold while nobody was there.
//!
//! Invariant: [`remarks`] is pure, and [`ask`] changes nothing but when the hold was last asked for.

use std::time::Duration;

use gangway_shared::api::{HoldInfo, HoldState, Request};

use super::act::World;

/// VMs may stand still meanwhile: what cannot be asked by then fails, and is told, in the step or undo that needs it.
const WITHIN: Duration = Duration::from_secs(2);

/// Asks both switches, at once. `ordered`: the coordinator that died may itself have ordered that all is put back.
pub async fn ask(w: &World, ordered: bool) -> Vec<String> {
    // The answer is made before it counts as asked for: one that is overdue still says so.
    let status = Request::HoldStatus { hold: w.mission.id };
    let (source, target) = tokio::join!(
        w.source.hold(&status, WITHIN),
        w.target.hold(&status, WITHIN)
    );
    [(&w.source, source), (&w.target, target)]
        .into_iter()
        .filter_map(|(switch, told)| Some((switch, told.ok()?)))
        .flat_map(|(switch, told)| remarks(switch.host(), &told, ordered))
        .collect()
}

/// What a person should know of the hold, as its host tells it.
pub fn remarks(host: &str, told: &HoldInfo, ordered: bool) -> Vec<String> {
    let (state, role) = (told.state, told.role);
    let gone = matches!(state, HoldState::Aborting | HoldState::Aborted);
    let why = match &told.error {
        Some(why) => Some(why.clone()),
        None if gone && !ordered => Some("it was put back before this coordinator came".to_owned()),
        None => None,
    };
    let why =
        why.map(|why| format!("host '{host}' has the hold as {state:?} on the {role:?}: {why}"));
    let dropped = told.lanes.iter().filter(|l| l.dropped > 0).map(|l| {
        format!(
            "host '{host}', lane {}: {} frames could not be held",
            l.lane, l.dropped
        )
    });
    why.into_iter().chain(dropped).collect()
}

#[cfg(test)]
mod tests {
    use gangway_shared::api::{LaneInfo, Role, Tally};
    use gangway_shared::id::{HoldId, LaneKey};

    use super::*;

    fn told(state: HoldState, error: Option<&str>, dropped: u64) -> HoldInfo {
        let lane = LaneKey {
            from: "a".to_owned(),
            queue: 0,
            to: "b".to_owned(),
        };
        HoldInfo {
            hold: HoldId(1),
            role: Role::Source,
            state,
            vms: Vec::new(),
            peer: String::new(),
            error: error.map(str::to_owned),
            frozen_ns: 0,
            thawed_ns: 0,
            drained_ns: 0,
            lanes: vec![LaneInfo {
                lane,
                sealed: false,
                held: Tally::default(),
                shipped: Tally::default(),
                flushed: Tally::default(),
                queued_behind: 0,
                dropped,
            }],
        }
    }

    #[test]
    fn a_hold_that_is_well_is_not_worth_a_word() {
        for state in [HoldState::Frozen, HoldState::Draining, HoldState::Released] {
            assert!(remarks("alpha", &told(state, None, 0), false).is_empty());
        }
        let undone = told(HoldState::Aborted, None, 0);
        assert!(remarks("alpha", &undone, true).is_empty());
    }

    #[test]
    fn a_hold_that_is_overdue_or_put_back_or_has_lost_frames_is_told() {
        let late = remarks("alpha", &told(HoldState::Frozen, Some("late"), 0), false);
        assert_eq!(
            late,
            ["host 'alpha' has the hold as Frozen on the Source: late"]
        );
        for state in [HoldState::Aborting, HoldState::Aborted] {
            let back = remarks("alpha", &told(state, None, 0), false);
            assert!(back.len() == 1 && back[0].contains("put back"), "{back:?}");
        }
        let lossy = remarks("alpha", &told(HoldState::Frozen, None, 7), false);
        assert!(
            lossy.len() == 1 && lossy[0].contains("7 frames could not be held"),
            "{lossy:?}"
        );
    }
}
