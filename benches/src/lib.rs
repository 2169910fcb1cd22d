//! Measurements beside peers. Empty so far: what has been measured comes from `make demo` (docs/benchmarks.md).
