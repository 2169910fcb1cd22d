//! The seeded hash of the tables that a guest fills: without the seeds, which no guest sees, nobody can choose what falls
//! into one place.

use std::hash::{BuildHasher, RandomState};

/// From the operating system's random numbers, once for each table.
#[derive(Debug, Clone, Copy)]
pub struct Seeds(pub [u64; 3]);

impl Seeds {
    /// New ones.
    pub fn random() -> Seeds {
        let random = RandomState::new();
        // Odd, so that no seed takes a word's bits away.
        Seeds([0u64, 1, 2].map(|i| random.hash_one(i) | 1))
    }
}

/// Both halves of the product.
#[inline(always)]
pub fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a).wrapping_mul(u128::from(b));
    wide as u64 ^ (wide >> 64) as u64
}
