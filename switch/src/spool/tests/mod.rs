//! The spool against a plain model, against crashes, and at its limits.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync};
use gangway_shared::id::{HoldId, LaneKey};
use tempfile::TempDir;

use super::*;
use crate::port::{Frame, VnetHdr};

mod golden;
mod limits;
mod model;
mod power;
mod recovery;
mod sync;

pub(crate) const HOLD: HoldId = HoldId(0x1122_3344_5566_7788);

pub(crate) fn config(dir: &Path, segment_bytes: u64, quota_bytes: u64) -> SpoolConfig {
    SpoolConfig {
        dir: dir.to_path_buf(),
        segment_bytes,
        quota_bytes,
        sync: Sync::None,
        limits: SpoolLimits::default(),
    }
}

pub(crate) fn open(dir: &Path) -> (Arc<Spool>, Vec<Recovered>) {
    Spool::open(&config(dir, 128 << 10, 64 << 20)).unwrap()
}

pub(crate) fn lane(n: u16) -> LaneKey {
    LaneKey {
        from: "web0".into(),
        queue: n,
        to: "db0".into(),
    }
}

/// A frame's bytes that depend on `n`.
pub(crate) fn bytes(n: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (n as usize * 31 + i * 7) as u8).collect()
}

pub(crate) fn vnet(n: u64) -> VnetHdr {
    let mut v = VnetHdr::default();
    v.0[..8].copy_from_slice(&n.to_le_bytes());
    v
}

/// Appends, waiting for the keeper if need be.
pub(crate) fn put(w: &mut Writer, n: u64, len: usize) {
    let b = bytes(n, len);
    until(|| w.has_room(len as u32));
    w.append(n, &Frame::from_slice(vnet(n), &b), Origin::NONE)
        .unwrap();
}

pub(crate) fn until(mut f: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !f() {
        assert!(Instant::now() < end, "nothing happened");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Numbers of all intact records, and how many damaged places there were.
pub(crate) fn all(q: &Arc<Queue>) -> (Vec<u64>, Vec<Damaged>) {
    let (mut seqs, mut bad) = (Vec::new(), Vec::new());
    let mut r = q.reader();
    loop {
        match r.peek() {
            Ok(Some(x)) => {
                let n = x.time_ns;
                assert_eq!(x.frame, bytes(n, x.frame.len()));
                assert_eq!(x.vnet, vnet(n));
                seqs.push(x.seq);
            }
            Ok(None) => return (seqs, bad),
            Err(d) => bad.push(d),
        }
        r.advance();
    }
}

pub(crate) fn tmp() -> TempDir {
    tempfile::tempdir().unwrap()
}
