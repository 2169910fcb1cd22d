//! Batches that come in from another switch.

use gangway_switch::spool::format::{EPOCH, salt, shipped, wire_len};
use gangway_switch::spool::{Arriving, Kind, Spool};
use std::sync::Arc;

use crate::input::Input;
use crate::spool::{HOLD, config, folder, item, lane};

thread_local! {
    static SPOOL: (Arc<Spool>, tempfile::TempDir) = {
        let dir = folder();
        let (spool, _) = Spool::open(&config(dir.path())).expect("a spool");
        (spool, dir)
    };
}

/// A lane's stream, taken as the receiver of a shipment takes it.
pub fn run(data: &[u8]) {
    SPOOL.with(|(spool, _)| {
        take(spool, data);
        spool.remove_hold(HOLD).expect("its folder goes");
    });
}

fn take(spool: &Spool, data: &[u8]) {
    let mut input = Input(data);
    let (mut writer, queue) = spool
        .create(HOLD, Kind::Incoming, &lane())
        .expect("a queue");
    let mut stream = Vec::new();
    let mut seq = 1;
    while !input.is_empty() {
        let item = item(&mut input, &mut seq, 0, salt(HOLD, &lane()));
        stream.extend(item.get(EPOCH..).unwrap_or_default());
    }
    let mut rest = &stream[..];
    let mut arriving = Arriving::default();
    let mut pieces = (1..).map(|n: usize| n * n % 1999 + 1);
    while !rest.is_empty() {
        let (mut piece, behind) = rest.split_at(pieces.next().unwrap_or(1).min(rest.len()));
        if arriving.push(&mut writer, &mut piece).is_err() {
            break;
        }
        rest = behind;
    }
    writer.commit();
    // What a receiver that takes whole batches would have taken.
    let mut reader = queue.reader();
    let (mut rest, mut last) = (&stream[..], 0);
    while let Ok(Some(len)) = wire_len(rest) {
        let Some((wire, behind)) = rest.split_at_checked(len) else {
            break;
        };
        rest = behind;
        // Sent again: not looked at.
        if last_seq(wire).is_some_and(|seq| seq <= last) {
            continue;
        }
        let batch = shipped(wire, salt(HOLD, &lane()));
        let Some(batch) = batch.filter(|b| b.first_seq == last + 1) else {
            break;
        };
        let Ok(Some(read)) = reader.peek_batch() else {
            break;
        };
        assert!(read.wire == wire);
        last = batch.last_seq();
        reader.advance_batch();
    }
    assert_eq!(queue.tally().frames, last);
    assert!(matches!(reader.peek(), Ok(None)));
}

/// As the header says.
fn last_seq(wire: &[u8]) -> Option<u64> {
    let count = u16::from_le_bytes(*wire.get(12..)?.first_chunk()?);
    let first = u64::from_le_bytes(*wire.get(16..)?.first_chunk()?);
    Some(first.saturating_add(count.into()).saturating_sub(1))
}
