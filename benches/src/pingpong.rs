//! How far apart the two CPUs are at the moment: a cache line goes to and fro between two pinned threads. On a virtual
//! machine this changes every few seconds, when the host moves a virtual CPU to another cache, and halves every rate.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result};

use crate::host;
use crate::sys::tsc;

const TRIPS: u64 = 200;
const ROUNDS: usize = 50;
const WARM: usize = 10;

/// Whether the CPUs share a cache, as a measurement before and one after say.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Both say so.
    Near,
    /// Neither does.
    Far,
    /// It changed in between.
    Mixed,
}

impl State {
    /// From both round trips, in cycles.
    pub fn of(before: u64, after: u64, near_max: u64) -> State {
        match (before <= near_max, after <= near_max) {
            (true, true) => State::Near,
            (false, false) => State::Far,
            _ => State::Mixed,
        }
    }
}

#[repr(align(128))]
struct Ball(AtomicU64);

/// The median round trip between this thread's CPU and another, in time-stamp cycles. Both must be free of other work.
pub fn round_trip(other_cpu: usize) -> Result<u64> {
    let ball = Ball(AtomicU64::new(0));
    let last = TRIPS * (ROUNDS + WARM) as u64;
    thread::scope(|scope| {
        let partner = scope.spawn(|| -> Result<()> {
            let pinned = host::pin(other_cpu);
            // Odd values are the partner's to answer; it plays on when it could not be pinned, or we would hang.
            for trip in 0..last {
                while ball.0.load(Ordering::Acquire) != 2 * trip + 1 {}
                ball.0.store(2 * trip + 2, Ordering::Release);
            }
            pinned
        });
        let mut rounds = Vec::with_capacity(ROUNDS);
        let mut trip = 0;
        for round in 0..ROUNDS + WARM {
            let begin = tsc();
            for _ in 0..TRIPS {
                ball.0.store(2 * trip + 1, Ordering::Release);
                while ball.0.load(Ordering::Acquire) != 2 * trip + 2 {}
                trip += 1;
            }
            if round >= WARM {
                rounds.push((tsc() - begin) / TRIPS);
            }
        }
        let partner = partner.join().ok().context("the partner's panic")?;
        partner?;
        rounds.sort_unstable();
        Ok(rounds[ROUNDS / 2])
    })
}
