//! How often a receiver that has no room is tried.
//!
//! A guest that does not read, for a moment or for ever, must not cost the others: with 64 ports each sender has a lane to it that
//! waits, and trying them all in every round took most of a worker's time.
//!
//! Invariant: a receiver that takes a frame is tried at once the next time; one that does not is tried after a pause that doubles,
//! from [`FIRST`] to [`LAST`], so a guest that reads again waits no longer than that.

use std::time::{Duration, Instant};

/// The first pause: what a guest takes for a burst.
const FIRST: Duration = Duration::from_micros(4);
/// The longest.
pub const LAST: Duration = Duration::from_micros(250);

/// A receiver, as a worker has found it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stuck {
    pause: Duration,
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
        self.pause = (2 * self.pause).clamp(FIRST, LAST);
        self.until = Some(now + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_end_with_the_first_frame() {
        let mut now = Instant::now();
        let mut s = Stuck::default();
        assert!(!s.rests(now));
        let mut pauses = Vec::new();
        for _ in 0..10 {
            s.full(now);
            assert!(s.rests(now));
            let until = s.until.unwrap();
            assert!(!s.rests(until));
            pauses.push((until - now).as_micros());
            now = until;
        }
        assert_eq!(pauses, [4, 8, 16, 32, 64, 128, 250, 250, 250, 250]);
        s.moved();
        assert!(!s.rests(now));
        s.full(now);
        assert_eq!(s.until, Some(now + FIRST), "from the start again");
    }
}
