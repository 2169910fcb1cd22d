//! Records that come in from another switch.

use gangway_switch::spool::format::{salt, stream_len};
use gangway_switch::spool::{Kind, RejectedRecord, Spool};
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
        stream.extend(item(&mut input, &mut seq, salt(HOLD, &lane())));
    }
    let mut rest = &stream[..];
    let mut taken = Vec::new();
    while let Ok(Some(len)) = stream_len(rest) {
        let Some((record, behind)) = rest.split_at_checked(len) else {
            break;
        };
        match writer.append_record(record) {
            Ok(seq) => {
                taken.push(record);
                assert_eq!(seq, taken.len() as u64);
            }
            Err(RejectedRecord::Sequence { found, expected }) if found < expected => {}
            Err(_) => break,
        }
        rest = behind;
    }
    writer.commit();
    assert_eq!(queue.tally().frames, taken.len() as u64);
    let mut reader = queue.reader();
    for record in taken {
        let read = reader.peek().expect("intact").expect("it was committed");
        assert!(read.raw == record);
        reader.advance();
    }
    assert!(matches!(reader.peek(), Ok(None)));
}
