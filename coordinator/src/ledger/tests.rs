//! Records that agree, and records that were tampered with: the frame is named.

use gangway_shared::api::Role;
use gangway_shared::ledger::StageAccount;

use super::*;

fn key() -> LaneKey {
    LaneKey {
        from: "web0".into(),
        queue: 0,
        to: "db0".into(),
    }
}

/// Batches of 1, 2, 3, 1, 2, ... frames.
fn index(frames: u64) -> Vec<IndexBatch> {
    let (mut out, mut seq) = (Vec::new(), 1);
    while seq <= frames {
        let n = (out.len() as u64 % 3 + 1).min(frames + 1 - seq);
        out.push(IndexBatch {
            first_seq: seq,
            time_ns: 1000 * seq,
            crc: seq as u32 * 77,
            frames: (seq..seq + n)
                .map(|s| IndexFrame {
                    len: 60 + s as u32,
                    crc: s as u32 * 31,
                })
                .collect(),
        });
        seq += n;
    }
    out
}

fn end(role: Role, stages: &[Stage], index: Vec<IndexBatch>) -> End {
    let all = account(&index);
    let source = role == Role::Source;
    let stages = stages.iter().map(|&stage| {
        let mut a = all;
        match stage {
            Stage::Spool | Stage::Store => {}
            Stage::Deliver => a.digest = None,
            _ => a.roll = None,
        }
        StageAccount { stage, account: a }
    });
    End {
        ledger: Ledger {
            hold: HoldId(7),
            role,
            state: HoldState::Released,
            host: if source { "alpha" } else { "beta" }.into(),
            peer: if source { "beta" } else { "alpha" }.into(),
            vms: vec!["web".into(), "db".into()],
            frozen_ns: 1,
            thawed_ns: 2,
            drained_ns: 3,
            made_ns: 4,
            lanes: 1,
        },
        lanes: vec![LaneRecord {
            lane: LedgerLane {
                lane: key(),
                kind: LaneKind::Shipped,
                inside: true,
                stages: stages.collect(),
                lost: Vec::new(),
                lost_more: 0,
                dropped: 0,
                indexed: true,
                kept: false,
            },
            index: Some(index),
        }],
    }
}

fn pair(frames: u64) -> (End, End) {
    (
        end(Role::Source, &ON_SOURCE, index(frames)),
        end(Role::Target, &ON_TARGET, index(frames)),
    )
}

fn faults(v: &Verdict) -> Vec<(String, Stage, Option<u64>, Option<u64>)> {
    assert!(!v.clean);
    let all = v.lanes.iter().flat_map(|l| &l.faults);
    all.map(|f| (f.host.clone(), f.stage, f.first_seq, f.last_seq))
        .collect()
}

#[test]
fn records_that_agree_are_clean() {
    for frames in [0, 1, 100] {
        let (s, t) = pair(frames);
        let v = verify(&s, &t);
        assert!(v.clean, "{v:?}");
        assert_eq!((v.frames, v.outcome), (frames, "moved"));
    }
}

#[test]
fn the_very_frame_that_the_target_does_not_have_is_named() {
    for seq in 1..=20_u64 {
        let (s, _) = pair(20);
        let mut there = index(20);
        // It is left out, and everything at the target is made anew as if it had never been there.
        for b in &mut there {
            let at = seq.checked_sub(b.first_seq).map(|n| n as usize);
            if at.is_some_and(|n| n < b.frames.len()) {
                let tail = b.frames.split_off(at.unwrap_or(0));
                let rest = IndexBatch {
                    first_seq: seq + 1,
                    frames: tail[1..].to_vec(),
                    ..b.clone()
                };
                let place = there.iter().position(|b| b.first_seq > seq);
                there.insert(place.unwrap_or(there.len()), rest);
                break;
            }
        }
        there.retain(|b| !b.frames.is_empty());
        let t = end(Role::Target, &ON_TARGET, there);
        let found = faults(&verify(&s, &t));
        let named = ("beta".to_owned(), Stage::Store, Some(seq), Some(seq));
        assert!(found.contains(&named), "frame {seq}: {found:?}");
    }
}

#[test]
fn a_changed_frame_a_changed_order_and_a_surplus_frame_are_named() {
    let (s, t) = pair(20);
    let tampered = |change: &dyn Fn(&mut Vec<IndexBatch>)| {
        let mut t = t.clone();
        change(t.lanes[0].index.as_mut().expect("an index"));
        let v = verify(&s, &t);
        let named: Vec<_> = faults(&v)
            .into_iter()
            .filter_map(|f| Some((f.2?, f.3?)))
            .collect();
        (named, v)
    };
    // Batch 3 has frames 7 and up.
    let (named, _) = tampered(&|i| i[3].frames[0].crc ^= 1);
    assert_eq!(named, [(7, 7)]);
    let (named, _) = tampered(&|i| i[2].frames.swap(0, 1));
    assert_eq!(named, [(4, 5)]);
    let (named, _) = tampered(&|i| {
        i.last_mut()
            .expect("one")
            .frames
            .push(IndexFrame { len: 60, crc: 0 })
    });
    assert_eq!(named, [(21, 21)]);
    // A checksum of a batch is in no frame: the index does not add up to what was written.
    let (named, v) = tampered(&|i| i[3].crc ^= 1);
    assert!(named.is_empty());
    assert!(v.lanes[0].faults[0].what.contains("adds up"), "{v:?}");
}

#[test]
fn every_stage_that_differs_is_named() {
    let (s, t) = pair(20);
    for (of_source, stages) in [(true, ON_SOURCE), (false, ON_TARGET)] {
        for (n, stage) in stages.iter().enumerate() {
            for field in 0..5 {
                let (mut s, mut t) = (s.clone(), t.clone());
                let end = if of_source { &mut s } else { &mut t };
                let a = &mut end.lanes[0].lane.stages[n].account;
                match field {
                    0 => a.frames -= 1,
                    1 => a.bytes += 1,
                    2 => a.last_seq -= 1,
                    3 if a.digest.is_some() => a.digest = a.digest.map(|d| d ^ 1),
                    _ if a.roll.is_some() => a.roll = a.roll.map(|d| d ^ 1),
                    _ => continue,
                }
                let found = faults(&verify(&s, &t));
                assert!(found.iter().any(|f| f.1 == *stage), "{stage:?}");
            }
            let (mut s, mut t) = (s.clone(), t.clone());
            let end = if of_source { &mut s } else { &mut t };
            end.lanes[0].lane.stages.remove(n);
            assert!(!verify(&s, &t).clean, "{stage:?} is absent");
        }
    }
}

#[test]
fn what_was_lost_on_the_way_is_said_with_its_number() {
    let (s, mut t) = pair(20);
    let l = &mut t.lanes[0].lane;
    l.lost.push(gangway_shared::ledger::Lost {
        stage: Stage::Deliver,
        first_seq: 9,
        last_seq: 9,
        why: "too_long".into(),
    });
    let v = verify(&s, &t);
    assert_eq!(
        faults(&v),
        [("beta".into(), Stage::Deliver, Some(9), Some(9))]
    );
    assert_eq!(v.lanes[0].faults[0].what, "frame 9: too_long");
    let (mut s, t) = pair(20);
    s.lanes[0].lane.dropped = 3;
    assert!(!verify(&s, &t).clean);
}

#[test]
fn what_was_put_back_is_judged_at_the_source() {
    let (_, mut t) = pair(5);
    let mut s = end(Role::Source, &AT_HOME, index(20));
    s.ledger.state = HoldState::Aborted;
    t.ledger.state = HoldState::Aborted;
    assert!(!verify(&s, &t).clean, "the target has delivered");
    t.lanes[0].lane.stages.truncate(2);
    let v = verify(&s, &t);
    assert!(v.clean, "{v:?}");
    assert_eq!(v.outcome, "put_back");
    t.ledger.state = HoldState::Released;
    assert!(!verify(&s, &t).clean, "the hosts do not say the same");
    t.ledger.state = HoldState::Aborted;
    s.lanes[0].lane.stages[3].account.frames -= 1;
    assert!(!verify(&s, &t).clean, "the source has not delivered all");
}

#[test]
fn a_lane_that_one_host_does_not_know_is_a_fault() {
    let (s, mut t) = pair(3);
    t.lanes[0].lane.lane.queue = 1;
    let v = verify(&s, &t);
    assert_eq!(v.lanes.iter().filter(|l| l.faults.is_empty()).count(), 0);
}

/// The block types and lengths of a pcapng file, checked on the way.
fn blocks(file: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let (mut rest, mut out) = (file, Vec::new());
    let word =
        |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"));
    while !rest.is_empty() {
        let len = word(rest, 4) as usize;
        assert!(len.is_multiple_of(4) && word(rest, len - 4) as usize == len);
        out.push((word(rest, 0), rest[8..len - 4].to_vec()));
        rest = &rest[len..];
    }
    out
}

#[test]
fn a_pcapng_file_has_an_interface_per_lane_and_frames_by_time() {
    let frame = |seq: u64, time_ns, len: usize| gangway_shared::ledger::KeptFrame {
        seq,
        time_ns,
        bytes: (0..len).map(|n| (n as u64 + seq) as u8).collect(),
    };
    let lanes = [
        (
            "a -> b".to_owned(),
            vec![frame(1, 5 << 32, 61), frame(2, 7 << 32, 64)],
        ),
        ("b -> a".to_owned(), vec![frame(77, (6 << 32) + 9, 60)]),
    ];
    let all = blocks(&pcapng::file("7", &lanes));
    let kinds: Vec<u32> = all.iter().map(|b| b.0).collect();
    assert_eq!(kinds, [0x0a0d_0d0a, 1, 1, 6, 6, 6]);
    let nanoseconds = [9, 0, 1, 0, 9, 0, 0, 0];
    assert!(all[1].1.windows(8).any(|w| w == nanoseconds));
    let head = |n: usize| -> Vec<u32> {
        let words = all[n].1.chunks_exact(4).take(5);
        words
            .map(|w| u32::from_le_bytes(w.try_into().expect("four bytes")))
            .collect()
    };
    assert_eq!(head(3), [0, 5, 0, 61, 61]);
    assert_eq!(head(4), [1, 6, 9, 60, 60]);
    assert_eq!(head(5), [0, 7, 0, 64, 64]);
    // Behind the head: the frame, zeros up to a word, its number as a comment (option 1), and no more options.
    let comments: [&[u8]; 3] = [
        b"\x01\0\x05\0seq 1\0\0\0",
        b"\x01\0\x06\0seq 77\0\0",
        b"\x01\0\x05\0seq 2\0\0\0",
    ];
    let frames = [&lanes[0].1[0], &lanes[1].1[0], &lanes[0].1[1]];
    for ((block, frame), comment) in all[3..].iter().zip(frames).zip(comments) {
        let mut body = frame.bytes.clone();
        body.resize(body.len().next_multiple_of(4), 0);
        let rest = [&body, comment, &[0; 4]].concat();
        assert_eq!(block.1[20..], rest, "frame {}", frame.seq);
    }
}
