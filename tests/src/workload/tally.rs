//! PURE: what arrived of a numbered flow, and how.
//!
//! Invariant: no clock here; the time of arrival is a parameter.
//! Invariant: memory is bounded, whatever numbers arrive.

/// Numbers from here on are taken as damage: at 10,000 per second they would be reached after 40 minutes.
const NUMBERS_MAX: u64 = 1 << 24;
/// Ranges of late arrivals that are remembered.
const LATE_MAX: usize = 8;

/// The receiver's account of one flow. Numbers count from 0.
#[derive(Debug, Default)]
pub struct Tally {
    /// Different numbers that arrived.
    pub received: u64,
    /// Arrivals of a number that had arrived before.
    pub duplicated: u64,
    /// First arrivals of a number below the highest so far.
    pub reordered: u64,
    /// Arrivals whose bytes are not what was sent.
    pub corrupted: u64,
    /// The longest time between two arrivals.
    pub stall_ns_max: u64,
    /// The first of these, as ranges; and the highest number by then, which says how late they were.
    pub late: Vec<(u64, u64, u64)>,
    seen: Vec<u64>,
    next: u64,
    last_ns: Option<u64>,
}

impl Tally {
    /// Takes an arrival: its number, or `None` when it did not verify.
    pub fn take(&mut self, number: Option<u64>, now_ns: u64) {
        if let Some(last) = self.last_ns.replace(now_ns) {
            self.stall_ns_max = self.stall_ns_max.max(now_ns.saturating_sub(last));
        }
        let Some(number) = number.filter(|number| *number < NUMBERS_MAX) else {
            self.corrupted += 1;
            return;
        };
        let (word, bit) = ((number / 64) as usize, 1u64 << (number % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.duplicated += 1;
            return;
        }
        self.seen[word] |= bit;
        self.received += 1;
        if number < self.next {
            self.reordered += 1;
            self.was_late(number);
        } else {
            self.next = number + 1;
        }
    }

    fn was_late(&mut self, number: u64) {
        let full = self.late.len() == LATE_MAX;
        match self.late.last_mut() {
            Some(last) if last.1 + 1 == number && last.2 + 1 == self.next => last.1 = number,
            _ if full => {}
            _ => self.late.push((number, number, self.next - 1)),
        }
    }

    /// The numbers below `sent` that did not arrive, as ranges, at most `limit` of them.
    pub fn missing(&self, sent: u64, limit: usize) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for number in 0..sent.min(NUMBERS_MAX) {
            let word = self.seen.get((number / 64) as usize).copied().unwrap_or(0);
            if word & 1 << (number % 64) != 0 {
                continue;
            }
            let full = ranges.len() == limit;
            match ranges.last_mut() {
                Some(last) if last.1 + 1 == number => last.1 = number,
                _ if full => break,
                _ => ranges.push((number, number)),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(numbers: &[u64]) -> Tally {
        let mut tally = Tally::default();
        for (at, number) in numbers.iter().enumerate() {
            tally.take(Some(*number), at as u64 * 10);
        }
        tally
    }

    #[test]
    fn in_order_is_neither_lost_nor_reordered() {
        let tally = of(&[0, 1, 2, 3]);
        assert_eq!(
            (tally.received, tally.duplicated, tally.reordered),
            (4, 0, 0)
        );
        assert!(tally.missing(4, 8).is_empty());
    }

    #[test]
    fn a_loss_is_not_a_reordering_until_it_arrives_late() {
        let mut tally = of(&[0, 1, 4, 5]);
        assert_eq!((tally.received, tally.reordered), (4, 0));
        assert_eq!(tally.missing(7, 8), [(2, 3), (6, 6)]);
        tally.take(Some(2), 50);
        assert_eq!((tally.received, tally.reordered), (5, 1));
        tally.take(Some(3), 55);
        assert_eq!(tally.late, [(2, 3, 5)]);
        tally.take(Some(2), 60);
        assert_eq!((tally.received, tally.duplicated), (6, 1));
    }

    #[test]
    fn the_longest_silence_counts() {
        let mut tally = of(&[0, 1]);
        tally.take(Some(2), 500);
        tally.take(Some(3), 510);
        assert_eq!(tally.stall_ns_max, 490);
    }

    #[test]
    fn wild_numbers_take_no_memory() {
        let tally = of(&[u64::MAX, 1 << 40]);
        assert_eq!((tally.corrupted, tally.seen.len()), (2, 0));
    }
}
