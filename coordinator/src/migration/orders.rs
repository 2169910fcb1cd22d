//! What each step, and each undo, asks of whom. The shells (`act`, `undo`) do it with all that belongs to it. The simulation and the
//! model do it by this table, and a test holds the shells to it (coordinator/tests/moves.rs).

use gangway_shared::api::Scope;

use super::act::End;
use super::steps::{Step, Undo};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "named as what they are of")]
pub enum Task {
    Step(Step),
    Undo(Undo),
}

/// What is asked for: of a switch, or (`Vm`) of each VM of the group, or for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as the requests and QEMU's commands are")]
pub enum Order {
    Show,
    Prepare,
    Open,
    Freeze(Scope),
    Seal,
    Restore,
    Commit,
    Announce,
    Depart,
    Status,
    Release,
    Abort,
    VmStart,
    VmMigrate,
    VmStop,
    VmSwitchover,
    VmShow,
    VmCont,
    VmCancel,
    VmEnd,
    VmQuit,
}

impl Order {
    /// For each VM of the group.
    pub fn is_for_vms(self) -> bool {
        use Order::*;
        matches!(
            self,
            VmStart
                | VmMigrate
                | VmStop
                | VmSwitchover
                | VmShow
                | VmCont
                | VmCancel
                | VmEnd
                | VmQuit
        )
    }
}

/// Orders that are under way at once; the next phase begins when all are answered.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    /// Of whom, what.
    pub asks: &'static [(End, Order)],
    /// One VM after the other, in dependency order.
    pub in_turn: bool,
    /// Only before the first try, and not by a coordinator that takes a migration up.
    pub once: bool,
}

const fn at_once(asks: &'static [(End, Order)]) -> Phase {
    Phase {
        asks,
        in_turn: false,
        once: false,
    }
}

const fn in_turn(asks: &'static [(End, Order)]) -> Phase {
    Phase {
        asks,
        in_turn: true,
        once: false,
    }
}

const fn once(asks: &'static [(End, Order)]) -> Phase {
    Phase {
        asks,
        in_turn: false,
        once: true,
    }
}

/// The table.
#[rustfmt::skip]
pub const fn phases(task: Task) -> &'static [Phase] {
    use End::{Source as A, Target as B};
    use Order::*;
    match task {
        Task::Step(Step::Check) => const { &[at_once(&[(A, Show), (B, Show)])] },
        Task::Step(Step::Prepare) => const { &[at_once(&[(B, Prepare)]), at_once(&[(A, Open)])] },
        Task::Step(Step::Start) => const { &[at_once(&[(B, VmStart)])] },
        Task::Step(Step::FreezeInside) => const { &[at_once(&[(A, Freeze(Scope::Inside))])] },
        Task::Step(Step::Precopy) => const { &[at_once(&[(A, VmMigrate)])] },
        Task::Step(Step::Freeze) => const { &[at_once(&[(A, Freeze(Scope::All))])] },
        Task::Step(Step::Stop) => const { &[at_once(&[(A, VmStop)])] },
        Task::Step(Step::Seal) => const { &[at_once(&[(A, Seal)])] },
        Task::Step(Step::Switchover) => const { &[in_turn(&[(A, VmSwitchover)])] },
        Task::Step(Step::Restore) => const { &[at_once(&[(B, Restore)])] },
        Task::Step(Step::Commit) => const { &[once(&[(B, VmShow)]), at_once(&[(B, Commit)])] },
        Task::Step(Step::Activate) => const { &[in_turn(&[(B, VmCont)])] },
        Task::Step(Step::Announce) => const { &[at_once(&[(B, Announce)])] },
        Task::Step(Step::Depart) => const { &[at_once(&[(A, Depart)])] },
        Task::Step(Step::Settle) => const { &[at_once(&[(A, Status), (B, Status)])] },
        Task::Step(Step::Retire) => const { &[at_once(&[(A, VmQuit)])] },
        Task::Step(Step::Release) => const { &[at_once(&[(A, Release)]), at_once(&[(B, Release)])] },
        Task::Undo(Undo::CancelMemory) => const { &[at_once(&[(A, VmCancel)])] },
        Task::Undo(Undo::EndTargets) => const { &[at_once(&[(B, VmEnd)])] },
        Task::Undo(Undo::ResumeSources) => const { &[at_once(&[(A, VmCont)])] },
        Task::Undo(Undo::ReturnFrames) => const { &[at_once(&[(A, Abort), (B, Abort)]), at_once(&[(A, Status), (B, Status)])] },
    }
}
