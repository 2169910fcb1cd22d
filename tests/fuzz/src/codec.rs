//! Messages of the control API and of shipments.

use gangway_shared::api::{Reply, Request};
use gangway_shared::codec::{decode, encode};
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};
use gangway_switch::control::wire;

use crate::qmp::block_on;

/// What kind of message, and its bytes.
pub fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    /// What was understood is written so that it is understood the same.
    macro_rules! round {
        ($kind:ty) => {
            if let Ok(value) = decode::<$kind>(bytes) {
                let again = encode(&value).expect("what was decoded can be encoded");
                assert!(decode::<$kind>(&again).expect("it can be decoded") == value);
            }
        };
    }
    match kind % 6 {
        0 => round!(Request),
        1 => round!(Reply),
        2 => round!(ToTarget),
        3 => round!(ToSource),
        4 => round!(LaneOpen),
        _ => block_on(async {
            let mut stream = bytes;
            while let Ok(Some(request)) = wire::read(&mut stream, None).await {
                drop(request);
            }
        }),
    }
}
