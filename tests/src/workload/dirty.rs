//! Memory that keeps changing, so that pre-copy has something to do.

use std::time::Instant;

use super::pace::Pacer;

const PAGE_BYTES: usize = 4096;
const TURNS_PER_SECOND: u32 = 100;

/// Writes one word into each of so many pages that `rate_mb` megabytes per second have to be copied again, walking
/// round and round through `span_mb` megabytes. Never returns.
pub fn run(rate_mb: usize, span_mb: usize) {
    let mut memory = vec![1u8; (span_mb << 20).max(PAGE_BYTES)];
    let pages = memory.len() / PAGE_BYTES;
    let per_turn = (rate_mb << 20) / PAGE_BYTES / TURNS_PER_SECOND as usize;
    let mut pacer = Pacer::new(TURNS_PER_SECOND, Instant::now());
    let (mut page, mut value) = (0, 0u8);
    loop {
        pacer.wait();
        for _ in 0..per_turn {
            memory[page * PAGE_BYTES] = value;
            page = (page + 1) % pages;
            value = value.wrapping_add(u8::from(page == 0));
        }
        // The writes must happen though nobody reads them.
        std::hint::black_box(&mut memory);
    }
}
