//! How often a receiver that has no room is tried.
//!
//! A guest that does not read must not cost the others: with 64 ports each sender has a lane to it that waits, and trying them all in
//! every round took most of a worker's time.
//!
//! Invariant: a receiver that takes a frame, or took one less than [`PATIENCE`] ago, is tried in each round: what waits for a guest that is
//! only slow must not be overtaken by what comes through another queue. One that takes nothing for longer is tried every [`LAST`].

use std::time::{Duration, Instant};

/// How long a guest may be away, as when its processor runs something else.
const PATIENCE: Duration = Duration::from_millis(20);
/// Between two tries of one that is away for longer.
pub const LAST: Duration = Duration::from_micros(250);

/// A receiver, as a worker has found it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stuck {
    since: Option<Instant>,
    until: Option<Instant>,
}

impl Stuck {
    /// Nothing is to be tried yet.
    #[inline]
    pub fn rests(&self, now: Instant) -> bool {
        self.until.is_some_and(|u| now < u)
    }

    /// It took something.
    #[inline]
    pub fn moved(&mut self) {
        *self = Stuck::default();
    }

    /// It had no room for anything.
    pub fn full(&mut self, now: Instant) {
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) >= PATIENCE {
            self.until = Some(now + LAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_nothing_for_long_rests_until_he_takes_something() {
        let begin = Instant::now();
        let mut s = Stuck::default();
        s.full(begin);
        s.full(begin + PATIENCE / 2);
        assert!(!s.rests(begin + PATIENCE / 2), "only slow");
        let late = begin + PATIENCE;
        s.full(late);
        assert!(s.rests(late) && !s.rests(late + LAST));
        s.full(late + LAST);
        assert!(s.rests(late + LAST));
        s.moved();
        s.full(late + LAST);
        assert!(!s.rests(late + LAST), "from the start again");
    }
}
