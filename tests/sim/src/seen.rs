//! What of the faults has happened in a world, so that a run of many can say that none was left out.

/// A kind of fault, counted where it has taken effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "their names say it")]
pub enum Seen {
    Loss,
    Duplicate,
    Reorder,
    Cut,
    HalfOpen,
    TornWrite,
    FailingSync,
    LyingSync,
    DiskFull,
    SourceSwitchKilled,
    TargetSwitchKilled,
    CoordinatorKilled,
    SourceVmKilled,
    TargetVmKilled,
    TargetWithoutPower,
    CoordinatorWithoutPower,
    GuestReset,
    GuestStop,
    /// A switch froze its hold because a guest had stopped.
    FrozenByItself,
    OperatorAbort,
}

impl Seen {
    /// All of them, in order.
    pub const ALL: [Seen; 20] = [
        Seen::Loss,
        Seen::Duplicate,
        Seen::Reorder,
        Seen::Cut,
        Seen::HalfOpen,
        Seen::TornWrite,
        Seen::FailingSync,
        Seen::LyingSync,
        Seen::DiskFull,
        Seen::SourceSwitchKilled,
        Seen::TargetSwitchKilled,
        Seen::CoordinatorKilled,
        Seen::SourceVmKilled,
        Seen::TargetVmKilled,
        Seen::TargetWithoutPower,
        Seen::CoordinatorWithoutPower,
        Seen::GuestReset,
        Seen::GuestStop,
        Seen::FrozenByItself,
        Seen::OperatorAbort,
    ];
}

/// How often each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts([u64; Seen::ALL.len()]);

impl Counts {
    /// Once more.
    pub fn count(&mut self, kind: Seen) {
        self.0[kind as usize] += 1;
    }

    /// So often.
    pub fn of(&self, kind: Seen) -> u64 {
        self.0[kind as usize]
    }

    /// Those of another one, too.
    pub fn add(&mut self, other: &Counts) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a += b);
    }
}
