//! PURE: a steady rate in absolute time, so that lateness does not add up.
//!
//! Invariant: after a pause at most [`CATCH_UP`] of sending is made up for; the rest of the schedule is dropped.

use std::time::{Duration, Instant};

/// How much of a delay is caught up on.
pub const CATCH_UP: Duration = Duration::from_millis(20);

/// When to send next.
#[derive(Debug)]
pub struct Pacer {
    interval: Duration,
    due: Instant,
}

impl Pacer {
    /// `rate` times per second from `now` on.
    pub fn new(rate: u32, now: Instant) -> Self {
        Self {
            interval: Duration::from_secs(1) / rate.max(1),
            due: now,
        }
    }

    /// Takes the next turn; how long to wait for it.
    pub fn turn(&mut self, now: Instant) -> Duration {
        if self.due + CATCH_UP < now {
            self.due = now;
        }
        let wait = self.due.saturating_duration_since(now);
        self.due += self.interval;
        wait
    }

    /// Takes the next turn and sleeps until it has come.
    pub fn wait(&mut self) {
        let wait = self.turn(Instant::now());
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_does_not_add_up_and_a_pause_is_not_made_up_for() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut pacer = Pacer::new(100, start);
        assert_eq!(pacer.turn(start), ms(0));
        assert_eq!(pacer.turn(start + ms(4)), ms(6));
        assert_eq!(
            pacer.turn(start + ms(25)),
            ms(0),
            "late, but within what is caught up on"
        );
        assert_eq!(pacer.turn(start + ms(25)), ms(5), "back on the schedule");
        assert_eq!(pacer.turn(start + ms(5000)), ms(0));
        assert_eq!(
            pacer.turn(start + ms(5000)),
            ms(10),
            "the pause is forgotten"
        );
    }
}
