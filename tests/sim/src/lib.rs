//! A simulation of moves: two hosts, their disks, networks, guests and a coordinator, all from one seed (ADR-0015).
//!
//! The machines under test are the product's: the table of a hold's states, the migration's machine, the spool's format and
//! recovery, the shipment's messages. What is modelled is what does I/O in the product. The checker knows the contract.
//!
//! Invariant: the same seed is the same run, on every machine: no clock, no thread, no file, no hash order.

pub mod check;
pub mod coord;
pub mod disk;
pub mod rng;
pub mod seen;
pub mod shipment;
pub mod switch;
pub mod world;

use gangway::migration::machine::Outcome;
use seen::Counts;
use world::World;

/// A bug that is put into a shell or around a machine, to see that the checker finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The target acknowledges what is not on its disk yet.
    AckBeforeSync,
    /// An answer leaves, and its record is written with the next one.
    AnswerFirst,
    /// No record is written: a switch that starts knows no hold.
    SkipPersist,
    /// The commit forgets a lane that was shipped.
    ForgetLane,
    /// A step that fails behind the commit is put back, and the target's table lets that through.
    AbortAfterCommit,
    /// Batches that are here already are appended again, and digests are not compared.
    NoDedupe,
    /// Commit is ordered before the journal says so.
    SkipJournal,
    /// The journal's `sync` does nothing.
    JournalNotSynced,
    /// The freeze leaves a lane out.
    HoleInTheCut,
    /// The target forwards while it still drains.
    OpenBeforeDrained,
    /// Descriptors go back to the guest before the frames are in the spool.
    GiveBackFirst,
    /// Frames are noted as delivered before they are.
    FlushedEarly,
    /// A frame without room is dropped.
    DropWhenFull,
    /// An abort of an unknown hold leaves no trace, and a late order opens it.
    NoTombstone,
    /// The source closes its lanes without waiting for the network.
    DepartAtOnce,
    /// Recovery leaves out the last batch.
    ForgetTail,
    /// `hold::machine::step`: an abort behind the freeze frees the frames and puts nothing back.
    AbortForgetsFrames,
    /// `hold::machine::step`: a commit skips the draining.
    LiveAtOnce,
    /// `hold::machine::step`: the source has departed before its lanes are closed.
    NeverDeparts,
    /// `hold::machine::taken_up`: a target that drained has drained.
    TakenUpDrained,
    /// `hold::machine::holds`: a lane without frames does not hold, whatever was acknowledged.
    HoldsWhatWaits,
    /// `migration::machine::on`: a step that fails is done.
    FailureIsSuccess,
    /// `migration::machine::on`: an undo is left out.
    LeavesTargets,
    /// `migration::machine::replay`: the journal's point of no return is not seen.
    ForgetsNoReturn,
    /// `hold::machine::step` panics.
    Panics,
    /// A hold that nobody asks for is put back at its source behind the seal, too.
    TimeOutSealed,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 26] = [
        Bug::AckBeforeSync,
        Bug::AnswerFirst,
        Bug::SkipPersist,
        Bug::ForgetLane,
        Bug::AbortAfterCommit,
        Bug::NoDedupe,
        Bug::SkipJournal,
        Bug::JournalNotSynced,
        Bug::HoleInTheCut,
        Bug::OpenBeforeDrained,
        Bug::GiveBackFirst,
        Bug::FlushedEarly,
        Bug::DropWhenFull,
        Bug::NoTombstone,
        Bug::DepartAtOnce,
        Bug::ForgetTail,
        Bug::AbortForgetsFrames,
        Bug::LiveAtOnce,
        Bug::NeverDeparts,
        Bug::TakenUpDrained,
        Bug::HoldsWhatWaits,
        Bug::FailureIsSuccess,
        Bug::LeavesTargets,
        Bug::ForgetsNoReturn,
        Bug::Panics,
        Bug::TimeOutSealed,
    ];

    /// What of the contract it breaks: only a violation of that counts as found.
    pub fn breaks(self) -> &'static str {
        match self {
            Bug::HoleInTheCut | Bug::HoldsWhatWaits => "cut",
            Bug::ForgetLane
            | Bug::GiveBackFirst
            | Bug::FlushedEarly
            | Bug::DropWhenFull
            | Bug::DepartAtOnce
            | Bug::AbortForgetsFrames
            | Bug::TakenUpDrained => "complete",
            Bug::OpenBeforeDrained | Bug::LiveAtOnce => "order",
            Bug::AckBeforeSync | Bug::ForgetTail => "durable",
            Bug::AbortAfterCommit
            | Bug::SkipJournal
            | Bug::JournalNotSynced
            | Bug::LeavesTargets
            | Bug::ForgetsNoReturn => "all or nothing",
            Bug::NoDedupe => "no duplicate beyond the bound",
            Bug::AnswerFirst
            | Bug::SkipPersist
            | Bug::NoTombstone
            | Bug::NeverDeparts
            | Bug::FailureIsSuccess
            | Bug::TimeOutSealed => "it does not end",
            Bug::Panics => "panic",
        }
    }
}

/// What a world may do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Things go wrong.
    pub faults: bool,
    /// After the last fault everything has to end within this.
    pub patience_s: u64,
    /// So many of a thousand messages are late by seconds; else the seed says.
    pub late: Option<u64>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            faults: true,
            patience_s: 300,
            late: None,
        }
    }
}

/// What a run came to.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    /// Of the migration.
    pub outcome: Option<Outcome>,
    /// Events.
    pub steps: u64,
    /// Frames delivered.
    pub delivered: u64,
    /// Frames that were held.
    pub held: u64,
    /// Deaths of switches.
    pub kills: u64,
    /// What has gone wrong.
    pub seen: Counts,
}

/// A panic in the product, or in the world itself, is a violation like any other: it has a seed and a trace.
fn survive(w: &mut World) {
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| w.run()));
    if let Err(what) = ran {
        let text = what.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| what.downcast_ref::<&str>().copied());
        w.check
            .violated("panic", text.unwrap_or("of unknown kind").to_owned());
    }
}

/// Runs the world of a seed; `Err`: what was violated.
pub fn run(seed: u64, bug: Option<Bug>, options: Options) -> Result<Told, String> {
    let mut w = World::new(seed, bug, options, false);
    survive(&mut w);
    match w.check.broken() {
        Some(what) => Err(what.to_owned()),
        None => Ok(Told {
            outcome: w.coord.outcome(),
            steps: w.steps,
            delivered: w.check.delivered,
            held: w.check.held,
            kills: w.check.kills,
            seen: w.seen(),
        }),
    }
}

/// The same with every line of what happened.
pub fn trace(seed: u64, bug: Option<Bug>, options: Options) -> String {
    let mut w = World::new(seed, bug, options, true);
    survive(&mut w);
    let end = match w.check.broken() {
        Some(what) => format!("VIOLATED {what}"),
        None => "nothing was violated".to_owned(),
    };
    let mut lines = w.take_trace();
    lines.push(end);
    lines.join("\n")
}
