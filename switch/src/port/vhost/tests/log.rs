//! The dirty log: every page that we wrote is marked, and no other.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::port::{Burst, Frame, Sent, VnetHdr};

fn marked(w: &World) -> BTreeSet<u64> {
    let mut bits = vec![0; LOG_BYTES as usize];
    w.log_file.read_exact_at(&mut bits, 0).unwrap();
    let pages = (0..LOG_BYTES * 8).filter(|p| bits[*p as usize / 8] >> (p % 8) & 1 == 1);
    pages.collect()
}

fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    let changed = pages.filter(|(_, (a, b))| a != b).map(|(i, _)| i as u64);
    let page = |i: u64| {
        if i >= REGION / 4096 {
            i - REGION / 4096 + HIGH / 4096
        } else {
            i
        }
    };
    changed.map(page).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_log_has_the_pages_that_were_written(
        mrg in any::<bool>(),
        event_idx in any::<bool>(),
        packed in any::<bool>(),
        in_runs in any::<bool>(),
        lens in prop::collection::vec(14usize..9000, 1..12),
    ) {
        let bits = VERSION_1 | if mrg { MRG } else { 0 } | if event_idx { EVENT_IDX } else { 0 };
        let bits = bits | if packed { PACKED } else { 0 };
        let mut w = World::logged(bits, true);
        let mut offered = BTreeSet::new();
        while w.tx.driver.free_descs() > 0 {
            let n = if mrg { 1600 } else { 9012 };
            let gpa = w.tx.driver.alloc(n);
            w.tx.driver.add(&[(gpa, n)], true, false);
            offered.extend(gpa / 4096..=(gpa + u64::from(n) - 1) / 4096);
        }
        for (i, len) in lens.iter().enumerate() {
            let mut b = vec![0; 12];
            b.extend(frame(i as u64, *len));
            prop_assert!(w.rx.driver.send(&b, 1, false));
        }
        let before = w.memory.read(0, 2 * REGION as usize);
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        let mut done = 0;
        let mut written = 0;
        while let Some(f) = out.get(done) {
            let run = if in_runs { w.tx.queue.send_run(&out[done..]) } else { 0 };
            written += out[done..done + run].iter().map(|f| f.len + 12).sum::<u32>();
            done += run;
            if run == 0 {
                if w.tx.queue.send(f) != Sent::Yes {
                    break;
                }
                done += 1;
                written += f.len + 12;
            }
        }
        drop(out);
        w.tx.queue.flush();
        w.rx.queue.release(done);
        w.rx.queue.arm();
        let after = w.memory.read(0, 2 * REGION as usize);
        let (marked, changed) = (marked(&w), changed(&before, &after));
        prop_assert!(changed.is_subset(&marked), "unmarked: {:?}", changed.difference(&marked));
        // Not more than the used rings and the buffers written to.
        let used: BTreeSet<u64> = [&w.rx.driver, &w.tx.driver]
            .iter()
            .flat_map(|d| {
                // What the device writes of a ring: the used ring, or its own area and the table.
                let table = if packed { d.at[0] } else { d.at[2] };
                let pages = d.at[2] / 4096..=(d.at[2] + 6 + 8 * u64::from(NUM)) / 4096;
                pages.chain(table / 4096..=(table + 16 * u64::from(NUM) - 1) / 4096)
            })
            .collect();
        let others: BTreeSet<u64> = marked.difference(&used).copied().collect();
        prop_assert!(others.is_subset(&offered));
        prop_assert!(others.len() as u32 <= written / 4096 + 3 * done as u32 + 12);
    }
}

#[test]
fn nothing_is_marked_without_a_log_and_from_the_switch_on_everything() {
    let mut w = World::new(VERSION_1);
    for _ in 0..4 {
        let buffer = (w.tx.driver.alloc(2000), 2000);
        w.tx.driver.add(&[buffer], true, false);
    }
    let f = frame(1, 60);
    let frame = || Frame::from_slice(VnetHdr::default(), &f);
    assert_eq!(w.tx.queue.send(&frame()), Sent::Yes);
    w.tx.queue.flush();
    assert!(marked(&w).is_empty());
    let on = live(&w.memory, &w.tx.driver, &w.tx.call, Some(&w.log_file));
    assert!(w.tx.control.swap(Some(on)));
    assert_eq!(w.tx.queue.send(&frame()), Sent::Yes);
    assert!(
        !marked(&w).contains(&(w.tx.driver.at[2] / 4096)),
        "used ring not yet"
    );
    w.tx.queue.flush();
    assert!(marked(&w).contains(&(w.tx.driver.at[2] / 4096)));
    assert_eq!(marked(&w).len(), 2);
}

#[test]
fn a_switch_waits_for_the_burst_that_is_open() {
    let mut w = World::new(VERSION_1);
    let buffer = (w.tx.driver.alloc(2000), 2000);
    w.tx.driver.add(&[buffer], true, false);
    let f = frame(1, 60);
    assert_eq!(
        w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f)),
        Sent::Yes
    );
    let on = live(&w.memory, &w.tx.driver, &w.tx.call, Some(&w.log_file));
    let control = w.tx.control.clone();
    let swap = std::thread::spawn(move || control.swap(Some(on)));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!swap.is_finished());
    w.tx.queue.flush();
    assert!(swap.join().unwrap());
}

#[test]
fn a_log_that_is_too_small_breaks_the_ring() {
    let mut w = World::new(VERSION_1);
    let buffer = (w.tx.driver.alloc(2000), 2000);
    w.tx.driver.add(&[buffer], true, false);
    let mut small = live(&w.memory, &w.tx.driver, &w.tx.call, Some(&w.log_file));
    small.log = Some(Arc::new(DirtyLog::new(&w.log_file, 0, 16).unwrap()));
    assert!(w.tx.control.swap(Some(small)));
    let f = frame(1, 60);
    let sent = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
    assert_eq!(sent, Sent::Never(crate::port::NeverReason::RingBroken));
    assert!(w.tx.control.broken().is_some());
}

#[test]
fn used_entries_are_marked_across_the_end_of_the_ring() {
    use super::super::ring::{Chain, Ring};
    let memory = Memory::new();
    let log_file = tempfile::tempfile().unwrap();
    log_file.set_len(LOG_BYTES).unwrap();
    let mem = Arc::new(memory.table());
    let num = 2048;
    let live = Live {
        areas: Split::areas(&mem, num, UVA + 0x10000, UVA + 0x20000, UVA + 0x30000).unwrap(),
        mem,
        log: Some(Arc::new(DirtyLog::new(&log_file, 0, LOG_BYTES).unwrap())),
        // Not where the ring lies: the front-end says under which address to mark it.
        used_log: Some(0x80000),
        call: None,
    };
    let mut ring = Split::new(&live, num, 0, &RingFeatures::new(VERSION_1));
    let mut pages = |chains: u32| {
        log_file.write_all_at(&[0; 64], 0).unwrap();
        for _ in 0..chains {
            ring.complete(Chain { id: 0, slots: 1 }, 0);
        }
        ring.publish(usize::MAX).unwrap();
        let mut bits = [0; 64];
        log_file.read_exact_at(&mut bits, 0).unwrap();
        (0..512)
            .filter(|p| bits[p / 8] >> (p % 8) & 1 == 1)
            .collect::<Vec<_>>()
    };
    assert_eq!(pages(1), [0x80]);
    assert_eq!(pages(511), [0x80, 0x81], "four bytes of the last entry");
    assert_eq!(pages(1528), [0x80, 0x81, 0x82, 0x83]);
    assert_eq!(
        pages(600),
        [0x80, 0x81, 0x83, 0x84],
        "eight at the end, the others at the start"
    );
}
