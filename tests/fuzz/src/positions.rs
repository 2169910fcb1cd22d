//! Where a guest's rings were, in a file that an earlier run of the switch has left, or anybody.

use gangway_shared::positions::{AT, MAGIC};
use gangway_switch::port::BURST;
use gangway_switch::port::vhost::given::{BYTES, Element};
use gangway_switch::port::vhost::position::Positions;

use crate::input::Input;
use crate::spool::folder;

/// A word for each queue pair, and one for each ring.
const QUEUES: usize = 16;
const RINGS: usize = 2 * QUEUES;
const PAGE: usize = 4096;
/// The two notes of a ring are in a page of its own.
const NOTE: usize = PAGE / 2;
/// Bits of a position that are a slot's number.
const SLOT: u16 = 0x7fff;

fn set(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
}

fn file(input: &mut Input<'_>, ring: usize) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    bytes[AT..AT + 8].copy_from_slice(&MAGIC);
    set(&mut bytes, AT + 8 + 8 * (ring / 2), input.u64());
    set(&mut bytes, AT + 8 + 8 * (QUEUES + ring), input.u64());
    for which in 0..2 {
        let note = PAGE * (1 + ring) + NOTE * which;
        set(&mut bytes, note, input.u64());
        set(&mut bytes, note + 8, input.u32().into());
        let n = input.u8() & 31;
        let own = input.take(8 * usize::from(n));
        bytes[note + 16..note + 16 + own.len()].copy_from_slice(own);
    }
    bytes
}

/// Found, believed or not, and used by the run after.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let ring = usize::from(input.u8()) % RINGS;
    let bytes = match how & 3 {
        3 => input.take(1 << 12).to_vec(),
        _ => file(&mut input, ring),
    };
    let dir = folder();
    let path = dir.path().join("p.positions");
    std::fs::write(&path, &bytes).expect("a file");
    let open = || Positions::open(&path).expect("a file").expect("a file");
    let all = open();
    let (base, num) = (input.u16(), 1 << (input.u8() & 15));
    assert!(all.packed_at(ring, num).is_none_or(|at| at & SLOT < num));

    let queue = (ring / 2) as u16;
    let ahead = input.u16();
    let frames = u64::from(input.u8());
    let mut p = all.split(queue, base, ahead);
    let (at, unseen) = p.start();
    assert_eq!(at.wrapping_sub(base), unseen);
    assert!(unseen == 0 || unseen <= ahead.min(2 * BURST as u16));
    // Mostly the run after knows it; never another number for the same place.
    p.set(frames, at);
    let again = open().split(queue, base, ahead);
    assert_eq!(again.start(), (at, unseen));
    assert_eq!(
        again.count().map(|c| c << 17),
        p.count().map(|c| c << 17),
        "of 47 bits"
    );

    if let Some((mut p, last)) = all.packed(ring, base, num) {
        let (at, _) = p.start();
        assert!(at == base || at & SLOT < num);
        assert!(last.iter().all(|e| e.at & SLOT < num));
        let n = usize::from(input.u16()) % 300;
        p.set(frames, at);
        let element = |n| Element {
            at: n as u16 % num,
            id: 1,
            written: 2,
        };
        p.note(at, n, element);
        let next = open().packed(ring, base, num);
        match next {
            Some((next, found)) if at & SLOT < num && !p.is_behind() => {
                assert_eq!(next.start(), (at, 0));
                assert_eq!(found, (0..n).map(element).collect::<Vec<_>>());
                assert_eq!(next.count(), p.count());
            }
            Some(_) => assert!(!p.is_behind()),
            None => assert!(p.is_behind() || at & SLOT >= num),
        }
        all.packed_stopped(ring);
    }
    all.stopped(queue);
    let _ = (all.split(queue, base, ahead), all.packed(ring, base, num));
    all.give_up();
    assert!(Positions::open(&path).expect("no file").is_none());
}
