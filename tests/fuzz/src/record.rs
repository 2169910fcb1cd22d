//! The file of a hold, as a bad disk, a torn write or somebody's hand may have left it.

use gangway_shared::api::Role;
use gangway_shared::id::MacAddr;
use gangway_shared::record::{HeldPort, HeldQueue, HeldSeats, HoldRecord};
use gangway_switch::hold::machine::STATES;
use gangway_switch::hold::record::{FILE, RecordFile, Stand, decode, encode};
use gangway_switch::spool::format::crc32c;

use crate::input::Input;
use crate::spool::{HOLD, folder};

/// Where the states are, each with its checksum at its end (docs/formats/hold.md).
const SLOTS: [usize; 2] = [512, 1024];
const SLOT: usize = 64;

fn text(input: &mut Input<'_>) -> String {
    let n = input.u8() & 31;
    String::from_utf8_lossy(input.take(n.into())).into_owned()
}

fn record(input: &mut Input<'_>) -> HoldRecord {
    let mut few = |n: u8| 0..input.u8() % n;
    let (vms, ports, seats) = (few(4), few(4), few(4));
    HoldRecord {
        hold: HOLD,
        role: [Role::Source, Role::Target][usize::from(input.u8() & 1)],
        vms: vms.map(|_| text(input)).collect(),
        peer: text(input),
        address: text(input),
        ticket: [input.u8(); 32],
        ports: ports
            .map(|n| HeldPort {
                name: text(input),
                mac: (n & 1 == 0).then_some(MacAddr([n; 6])),
            })
            .collect(),
        seats: seats
            .map(|_| HeldSeats {
                port: text(input),
                workers: vec![input.u32()],
                queues: vec![HeldQueue {
                    queue: input.u16(),
                    worker: input.u32(),
                }],
            })
            .collect(),
        queues: input.u32(),
    }
}

fn stand(input: &mut Input<'_>) -> Stand {
    Stand {
        announced: input.u8() & 1 == 1,
        named: input.u32(),
        grace_ms: input.u32(),
        frozen_ns: input.u64(),
        thawed_ns: input.u64(),
        drained_ns: input.u64(),
        ..Stand::new(STATES[usize::from(input.u8()) % STATES.len()])
    }
}

/// Written by the switch, then changed, then read by its successor.
pub fn run(data: &[u8]) {
    let _ = decode(data);
    let mut input = Input(data);
    let how = input.u8();
    let record = record(&mut input);
    let mut written = vec![stand(&mut input)];
    let dir = folder();
    let made = RecordFile::create(dir.path(), &record, &written[0], false);
    let mut file = made.expect("names are short");
    for _ in 0..how & 3 {
        let next = stand(&mut input);
        file.put(&next).expect("a file");
        written.push(next);
    }
    let path = dir.path().join(FILE);
    let mut bytes = std::fs::read(&path).expect("a file");
    let whole = bytes.len();
    let mut is_known = true;
    match how >> 2 & 3 {
        0 => {}
        // One bit, anywhere.
        1 => {
            let at = usize::from(input.u16()) % whole;
            bytes[at] ^= 1 << (input.u8() & 7);
        }
        // A state that somebody has made.
        2 => {
            is_known = false;
            let at = SLOTS[usize::from(input.u8() & 1)];
            let slot = &mut bytes[at..at + SLOT];
            let own = input.take(SLOT - 4);
            slot[..own.len()].copy_from_slice(own);
            let sum = crc32c(&slot[..SLOT - 4]);
            slot[SLOT - 4..].copy_from_slice(&sum.to_le_bytes());
        }
        // Anything, or less.
        _ => {
            is_known = false;
            let at = usize::from(input.u16()) % whole;
            let n = input.u8();
            let own = input.take(n.into());
            let n = own.len().min(whole - at);
            bytes[at..at + n].copy_from_slice(&own[..n]);
            bytes.truncate(whole - usize::from(input.u16()) % whole);
        }
    }
    std::fs::write(&path, &bytes).expect("a file");
    let Ok(found) = RecordFile::open(dir.path(), false) else {
        assert!(how >> 2 & 3 != 0, "what nobody has changed is refused");
        return;
    };
    let (again, found, mut file) = found.expect("it is there");
    if is_known {
        assert_eq!(again, record);
        let last = &written[written.len().saturating_sub(2)..];
        assert!(last.contains(&found), "{found:?} of {last:?}");
        assert!(how >> 2 & 3 != 0 || Some(&found) == written.last());
    }
    // The next one goes where this one is not, and counts.
    let next = stand(&mut input);
    file.put(&next).expect("a file");
    let (same, found, _) = RecordFile::open(dir.path(), false)
        .expect("it was read before")
        .expect("it is there");
    assert_eq!((&same, found), (&again, next));
    let bytes = encode(&same, &next).expect("it was read");
    let (same, found, _) = decode(&bytes).expect("it was just written");
    assert_eq!((same, found), (again, next));
}
