//! The file of addresses that a switch finds at its start, as a bad disk or somebody's hand may have left it.

use gangway_shared::id::MacAddr;
use gangway_switch::addresses::format::{HEADER, decode, encode};
use gangway_switch::datapath::fdb::Fdb;
use gangway_switch::spool::format::crc32c;

use crate::input::Input;

const CAPACITY: usize = 64;
const AGEING_S: u32 = 300;
const NOW_S: u32 = 5;

/// Any bytes; or a header with some of its fields and right checksums before them.
fn file(data: &[u8]) -> Vec<u8> {
    let mut input = Input(data);
    if input.u8() & 1 == 0 {
        return input.0.to_vec();
    }
    let mut bytes = encode([7; 16], input.u64(), &[], std::iter::empty());
    let counts = [input.u8(), input.u8(), input.u8()].map(u32::from);
    bytes.extend_from_slice(input.0);
    let sum = crc32c(&bytes[HEADER..]);
    for (n, value) in counts.into_iter().chain([sum]).enumerate() {
        let at = 40 + 4 * n;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let sum = crc32c(&bytes[..HEADER - 4]);
    bytes[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub fn run(data: &[u8]) {
    let Ok(kept) = decode(&file(data)) else {
        return;
    };
    let again = encode(
        kept.boot,
        kept.at_s,
        &kept.ports,
        kept.addresses.iter().copied(),
    );
    assert_eq!(decode(&again).as_ref(), Ok(&kept));
    let fdb = Fdb::new(CAPACITY, AGEING_S).expect("memory");
    let ours = MacAddr([2, 0, 0, 0, 0, 1]);
    fdb.set(ours, 3, true, NOW_S);
    for a in &kept.addresses {
        let port = usize::from(a.port);
        if fdb.recall(a.mac, port, a.age_s, NOW_S) {
            assert!(a.age_s <= AGEING_S && !a.mac.is_multicast());
            assert_eq!(fdb.lookup(a.mac, NOW_S), Some(port));
        }
        assert_eq!(fdb.lookup(ours, NOW_S), Some(3), "what is known is right");
    }
}
