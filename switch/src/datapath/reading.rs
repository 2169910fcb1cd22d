//! Waiting until a guest with several receive queues has read what was put into them.
//!
//! A guest reads its queues side by side. Where a flow's frames change their queue, as behind a move, a guest that is at the new
//! one first would see them out of order: so what is next waits until the guest has read what is there.
//!
//! Invariant: behind [`Reading::begin`] nothing waits longer than `PATIENCE`, or `BLIND` for drivers that do not say how far they
//! are: a queue that is never read must not cost the others.

use std::time::{Duration, Instant};

use crate::port::Mark;

/// For drivers that tell (`VIRTIO_F_EVENT_IDX`).
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 20_000 } else { 500 });
/// For drivers that do not; those that poll are there in microseconds.
const BLIND: Duration = Duration::from_millis(5);

/// See the module. By default it has not begun.
#[derive(Debug, Default)]
pub struct Reading {
    /// None: not begun.
    until: Option<Instant>,
    /// Transmit queues that are not read yet, and up to where they must be.
    left: Vec<(usize, Mark)>,
}

impl Reading {
    /// Of the queues, from now on, if it was not begun before.
    pub fn begin(&mut self, now: Instant, left: impl FnOnce() -> Vec<(usize, Mark)>) {
        if self.until.is_none() {
            self.left = left();
            let tells = self.left.iter().any(|(_, mark)| mark.tells);
            self.until = Some(now + if tells { PATIENCE } else { BLIND });
        }
    }

    /// The guest has gone: what will be in its queues is seen when it is there again.
    pub fn reset(&mut self) {
        *self = Reading::default();
    }

    /// True when all is read, or nobody waits for it any longer.
    pub fn is_over(
        &mut self,
        now: Instant,
        mut has_read: impl FnMut(usize, &Mark) -> bool,
    ) -> bool {
        self.left.retain(|(queue, mark)| !has_read(*queue, mark));
        self.left.is_empty() || self.until.is_some_and(|until| now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_when_all_is_read_or_after_a_while() {
        let now = Instant::now();
        let of = |left: &[(usize, bool)]| {
            let mark = |&(queue, tells)| {
                let (at, count) = (7, 7);
                (queue, Mark { at, count, tells })
            };
            let mut r = Reading::default();
            r.begin(now, Vec::new);
            r.reset();
            r.begin(now, || left.iter().map(mark).collect());
            r
        };
        let mut r = of(&[(0, true), (3, false)]);
        assert!(!r.is_over(now, |q, _| q == 3));
        r.begin(now + BLIND, || unreachable!("it has begun"));
        assert!(!r.is_over(now + PATIENCE - BLIND, |q, _| q == 3));
        assert!(r.is_over(now, |q, _| q == 0), "3 was read before");
        let mut r = of(&[(0, true)]);
        assert!(r.is_over(now + PATIENCE, |_, _| false));
        let mut r = of(&[(0, false)]);
        assert!(!r.is_over(now, |_, _| false));
        assert!(r.is_over(now + BLIND, |_, _| false));
        assert!(of(&[]).is_over(now, |_, _| false));
    }
}
