//! How often which time was seen: buckets that grow with the value, so that each is known to 1 in 64.

/// Buckets per power of two.
const STEPS: usize = 64;
const STEP_BITS: u32 = STEPS.ilog2();

/// See the module. Times are in time-stamp cycles.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Box<[u64]>,
    n: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            counts: vec![0; (64 - STEP_BITS as usize + 1) * STEPS].into_boxed_slice(),
            n: 0,
            max: 0,
        }
    }
}

#[inline(always)]
fn bucket(v: u64) -> usize {
    let shift = (63 - (v | STEPS as u64).leading_zeros()) - STEP_BITS;
    // The first power that has steps starts where the values below it end.
    (v >> shift) as usize + shift as usize * STEPS
}

/// The least value of a bucket, and how many it stands for.
fn range(bucket: usize) -> (u64, u64) {
    let shift = (bucket / STEPS).saturating_sub(1);
    ((bucket - shift * STEPS) as u64)
        .checked_shl(shift as u32)
        .map_or((0, 0), |low| (low, 1 << shift))
}

impl Histogram {
    /// One more.
    #[inline(always)]
    pub fn record(&mut self, v: u64) {
        self.counts[bucket(v)] += 1;
        self.n += 1;
        self.max = self.max.max(v);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.n
    }

    /// The longest.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The least time that this share of all does not surpass; `None` of nothing.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let want = ((self.n as f64 * share).ceil() as u64).clamp(1, self.n.max(1));
        let mut sum = 0;
        let found = self.counts.iter().position(|c| {
            sum += c;
            sum >= want
        })?;
        let (low, width) = range(found);
        Some((low + width / 2).min(self.max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_lies_in_its_bucket_and_buckets_follow_each_other() {
        for v in (0..5000).chain([1 << 20, (1 << 40) + 12345, u64::MAX]) {
            let (low, width) = range(bucket(v));
            assert!(low <= v && v - low < width, "{v} in {low}+{width}");
            assert!(
                width as f64 <= (v as f64 / STEPS as f64).max(1.0),
                "{v}: {width}"
            );
        }
        for b in 0..3000 {
            let (low, width) = range(b);
            assert_eq!(bucket(low + width), b + 1);
        }
    }

    #[test]
    fn quantiles_of_known_values() {
        let mut h = Histogram::default();
        assert_eq!(h.quantile(0.5), None);
        for v in 1..=1000u64 {
            h.record(v);
        }
        for (share, want) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0)] {
            let got = h.quantile(share).unwrap() as f64;
            assert!((got - want).abs() <= want / 64.0, "{share}: {got}");
        }
        assert_eq!((h.count(), h.max()), (1000, 1000));
    }
}
