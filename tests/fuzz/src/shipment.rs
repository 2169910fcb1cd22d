//! Batches that come in from another switch.

use gangway_switch::spool::format::{EPOCH, salt, wire_len};
use gangway_switch::spool::{Kind, RejectedBatch, Spool};
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
    let mut taken = Vec::new();
    let mut last = 0;
    while let Ok(Some(len)) = wire_len(rest) {
        let Some((batch, behind)) = rest.split_at_checked(len) else {
            break;
        };
        match writer.append_batch(batch) {
            Ok(seq) => {
                taken.push(batch);
                assert!(seq > last);
                last = seq;
            }
            Err(RejectedBatch::Known(seq)) => assert!(seq <= last),
            Err(_) => break,
        }
        rest = behind;
    }
    writer.commit();
    assert_eq!(queue.tally().frames, last);
    let mut reader = queue.reader();
    for batch in taken {
        let read = reader.peek_batch().expect("intact");
        assert!(read.expect("it was committed").wire == batch);
        reader.advance_batch();
    }
    assert!(matches!(reader.peek(), Ok(None)));
}
