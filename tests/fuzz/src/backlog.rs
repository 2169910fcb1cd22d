//! What waited for a receiver, in a file that an earlier run of the switch has left, or anybody.

use gangway_switch::datapath::backlog::BACKLOG_BYTES;
use gangway_switch::datapath::shelf::{Found, Shelf};
use gangway_switch::port::{FRAME_MAX, FRAME_MIN, Frame, VnetHdr};

use crate::input::Input;
use crate::spool::folder;

const PAGE: usize = 4096;
const WORDS: usize = 256;
const MAGIC: &[u8; 8] = b"GWblog01";

/// Frames of such a length, one behind the other, mostly.
fn records(input: &mut Input<'_>, ring: &mut [u8], mut at: usize) -> usize {
    let mut used = 0;
    for _ in 0..input.u8() & 31 {
        let len = match input.u8() {
            n @ 0..128 => u32::from(n),
            128..200 => u32::from(input.u16()),
            200..230 => u32::MAX,
            _ => input.u32(),
        };
        let Some(r) = ring.get_mut(at..at + 16) else {
            break;
        };
        r[..4].copy_from_slice(&len.to_le_bytes());
        r[14] = input.u8();
        let step = match len {
            u32::MAX => BACKLOG_BYTES - at,
            n => 16 + (n as usize).next_multiple_of(16),
        };
        used += step;
        at = (at + step) % BACKLOG_BYTES;
    }
    used
}

fn take(found: &mut [Found]) -> usize {
    let mut frames = 0;
    for f in found {
        assert!(!f.backlog.is_empty());
        while let Some((frame, _)) = f.backlog.front() {
            let len = frame.len as usize;
            assert!((FRAME_MIN..=FRAME_MAX).contains(&len));
            let mut bytes = vec![0; len];
            frame.copy_to(&mut bytes);
            frames += 1;
            f.backlog.pop();
        }
    }
    frames
}

/// Found, used by this run, and found by the next one.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let mut bytes = vec![0; PAGE + BACKLOG_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    let near = BACKLOG_BYTES - 16 * usize::from(input.u8());
    let head = match how & 3 {
        0 => 0,
        1 => near as u64,
        2 => input.u64() & !15,
        _ => input.u64(),
    };
    let at = (head % BACKLOG_BYTES as u64) as usize;
    let used = records(&mut input, &mut bytes[PAGE..], at) as u64;
    let tail = match how & 4 {
        0 => head.wrapping_add(used),
        _ => input.u64(),
    };
    bytes[WORDS..WORDS + 8].copy_from_slice(&head.to_le_bytes());
    bytes[WORDS + 8..WORDS + 16].copy_from_slice(&tail.to_le_bytes());
    if how & 8 != 0 {
        bytes[..8].copy_from_slice(&input.u64().to_le_bytes());
    }
    if how & 16 != 0 {
        bytes.truncate(input.u16().into());
    }
    let dir = folder();
    std::fs::write(dir.path().join("a~0~b.frames"), &bytes).expect("a file");
    let open = || Shelf::open(dir.path(), vec!["a".into(), "b".into()]).expect("in memory");
    let (shelf, found) = open();
    let mut found = shelf.settle(found, 1);
    let had: usize = found.iter().map(|f| f.backlog.len()).sum();
    assert_eq!(take(&mut found), had);
    // It is not said that they are delivered: they are there again, with what comes.
    let mut more = 0;
    for f in &mut found {
        for n in 0..input.u8() & 15 {
            let len = FRAME_MIN + usize::from(input.u16());
            let frame = vec![n; len.min(FRAME_MAX)];
            let frame = Frame::from_slice(VnetHdr::default(), &frame);
            more += usize::from(f.backlog.push(&frame, 0));
        }
    }
    let (_, mut again) = open();
    assert_eq!(take(&mut again), had + more);
    for f in &mut found {
        while !f.backlog.is_empty() {
            f.backlog.pop();
        }
        f.backlog.note();
    }
    let (_, last) = open();
    assert!(last.is_empty());
}
