//! THE table: what a migration does, in which order, who acts, and how it is undone. It drives execution, the status
//! output, `migrate --dry-run` and the tests that fail every step.

use serde::{Deserialize, Serialize};

/// A step of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the table below says what each is")]
pub enum Step {
    Check,
    Prepare,
    Start,
    FreezeInside,
    Precopy,
    Freeze,
    Stop,
    Seal,
    Switchover,
    Restore,
    Commit,
    Activate,
    Announce,
    Depart,
    Settle,
    Retire,
    Release,
}

/// One way of putting things back. Every one may be done when nothing is to be put back, and done again.
///
/// The declaration's order is the order of execution: no VM of the source goes on before its copy on the target can
/// never run, and held frames flow back to VMs that run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Undo {
    /// `migrate_cancel` on the source's VMs.
    CancelMemory,
    /// End the processes that were started on the target.
    EndTargets,
    /// `cont` on the source's VMs that are stopped.
    ResumeSources,
    /// `HoldAbort` on both: the source flushes in order, the target forgets.
    ReturnFrames,
}

impl Undo {
    /// All, in order.
    pub const ALL: [Undo; 4] = [
        Undo::CancelMemory,
        Undo::EndTargets,
        Undo::ResumeSources,
        Undo::ReturnFrames,
    ];

    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Undo::CancelMemory => "cancel the memory transfer",
            Undo::EndTargets => "end the VMs on the target",
            Undo::ResumeSources => "resume the VMs on the source",
            Undo::ReturnFrames => "flush what was held",
        }
    }
}

/// When the group's traffic is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FreezeMode {
    /// Only around the switchover.
    #[default]
    Switchover,
    /// Inside the group before the memory is copied: the method's literal order.
    Early,
}

/// A row of the table.
pub struct Row {
    /// Which step.
    pub step: Step,
    /// Its name, as in `status`, the journal and the report.
    pub name: &'static str,
    /// Who acts.
    pub actor: &'static str,
    /// What is done.
    pub forward: &'static str,
    /// What puts it back (once it has begun).
    pub undo: &'static [Undo],
    /// It begins when these are done.
    pub after: &'static [Step],
    /// VMs stand still: its records are written but not forced to the disk, which would prolong the pause. A crash of
    /// the coordinator loses none of them; after a loss of power all undos are done instead of some.
    pub in_pause: bool,
}

const fn row(
    step: Step,
    name: &'static str,
    actor: &'static str,
    forward: &'static str,
    undo: &'static [Undo],
    after: &'static [Step],
    in_pause: bool,
) -> Row {
    Row {
        step,
        name,
        actor,
        forward,
        undo,
        after,
        in_pause,
    }
}

/// The point of no return: once this has begun there is no undo, only retries.
pub const NO_RETURN: Step = Step::Commit;

/// The table.
#[rustfmt::skip]
pub const TABLE: &[Row] = {
    use Step::*;
    use Undo::*;
    &[
    row(Check,        "check",         "coordinator",     "both hosts answer, the VMs run, the target has their ports",          &[],              &[],                 false),
    row(Prepare,      "prepare",       "both switches",   "the target claims the ports, the source reserves the spool, dials",   &[ReturnFrames],  &[Check],            false),
    row(Start,        "start",         "target's VMMs",   "start paused VMs that wait for their memory",                         &[EndTargets],    &[Prepare],          false),
    row(FreezeInside, "freeze-inside", "source's switch", "hold what the VMs send each other (only with --freeze early)",        &[ReturnFrames],  &[Start],            false),
    row(Precopy,      "precopy",       "source's VMMs",   "copy memory of all VMs while they run, keep each at the brink",       &[CancelMemory, ResumeSources], &[Start, FreezeInside], false),
    row(Freeze,       "freeze",        "source's switch", "one cut: hold everything towards the group",                          &[ReturnFrames],  &[Precopy],          true),
    row(Stop,         "stop",          "source's VMMs",   "stop all VMs at once",                                                &[ResumeSources], &[Freeze],           true),
    row(Seal,         "seal",          "source's switch", "complete the group's lanes, ship the tail to the target",             &[ReturnFrames],  &[Stop],             true),
    row(Switchover,   "switchover",    "source's VMMs",   "the rest of the memory, then device states in dependency order",      &[CancelMemory, ResumeSources], &[Stop], true),
    row(Restore,      "restore",       "target's switch", "links as they were; counts and digests agree with the source's",      &[ReturnFrames],  &[Seal, Switchover], true),
    row(Commit,       "commit",        "target's switch", "POINT OF NO RETURN: the ports go live, held frames go first",         &[],              &[Restore],          true),
    row(Activate,     "activate",      "target's VMMs",   "run the VMs, in dependency order",                                    &[],              &[Commit],           true),
    row(Announce,     "announce",      "target's switch", "tell the network where the VMs are",                                  &[],              &[Activate],         false),
    row(Depart,       "depart",        "source's switch", "forward stragglers, close the lanes from outside",                    &[],              &[Announce],         false),
    row(Settle,       "settle",        "both switches",   "until every lane has drained and forwards directly",                  &[],              &[Depart],           false),
    row(Retire,       "retire",        "source's VMMs",   "end the source's stopped VMs",                                        &[],              &[Settle],           false),
    row(Release,      "release",       "both switches",   "keep the account, free the spools",                                   &[],              &[Retire],           false),
    ]
};

impl Step {
    /// Its row.
    pub fn row(self) -> &'static Row {
        // The table is in the enum's order; a test holds it to that.
        &TABLE[self as usize]
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The step of this name.
    pub fn named(name: &str) -> Option<Step> {
        TABLE.iter().find(|r| r.name == name).map(|r| r.step)
    }

    /// True if a migration with this freeze has the step.
    pub fn in_mode(self, freeze: FreezeMode) -> bool {
        self != Step::FreezeInside || freeze == FreezeMode::Early
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_begins_nothing_before_its_turn() {
        for (i, r) in TABLE.iter().enumerate() {
            assert_eq!(r.step as usize, i, "{}", r.name);
            assert_eq!(Step::named(r.name), Some(r.step));
            assert!(r.after.iter().all(|a| *a < r.step), "{}", r.name);
            let always = |a: &Step| a.in_mode(FreezeMode::Switchover);
            assert!(
                r.step == Step::Check || r.after.iter().any(always),
                "{}: hangs on a step that may be left out",
                r.name
            );
            assert!(
                r.step < NO_RETURN || r.undo.is_empty(),
                "{}: no undo after the point of no return",
                r.name
            );
        }
    }
}
