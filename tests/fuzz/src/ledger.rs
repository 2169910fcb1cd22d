//! A ledger's file, as a bad disk or somebody's hand may have left it; and what `gangway verify` makes of what a host says that
//! it has read there.

use gangway::ledger::{End, LaneRecord, pcapng, verify};
use gangway_shared::api::{HoldState, Role};
use gangway_shared::config::valid::LedgerConfig;
use gangway_shared::ledger::{
    Account, IndexBatch, KeptFrame, LaneKind, Ledger, LedgerLane, Lost, Stage, StageAccount,
    account,
};
use gangway_shared::{codec, id::LaneKey};
use gangway_switch::ledger::Reader;
use gangway_switch::spool::format::{EPOCH, crc32c, salt};

use crate::input::Input;
use crate::spool::{HOLD, folder, item, lane};

const HEADER: usize = 40;
/// Of an index's batch and of a frame in it.
const BATCH: usize = 24;
const ENTRY: usize = 8;
const STAGES: [Stage; 8] = [
    Stage::Accept,
    Stage::Spool,
    Stage::Ship,
    Stage::Acknowledge,
    Stage::Receive,
    Stage::Store,
    Stage::Flush,
    Stage::Deliver,
];

fn ledger(input: &mut Input<'_>, role: Role, lanes: u32) -> Ledger {
    Ledger {
        hold: HOLD,
        role,
        state: [HoldState::Released, HoldState::Aborted][usize::from(input.u8() & 1)],
        host: "a".into(),
        peer: "b".into(),
        vms: Vec::new(),
        frozen_ns: 0,
        thawed_ns: 0,
        drained_ns: 0,
        made_ns: 0,
        lanes,
    }
}

/// A small number, or one at the end of what there is.
fn number(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        n @ 0..200 => u64::from(n),
        200..240 => u64::MAX - u64::from(input.u8()),
        _ => input.u64(),
    }
}

fn batches(input: &mut Input<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut seq = 1u64;
    for _ in 0..input.u8() & 15 {
        let how = input.u8();
        let first = if how & 1 == 0 { seq } else { number(input) };
        let count = match how & 6 {
            0 => u32::from(how >> 3) + 1,
            2 => 256,
            4 => u32::from(input.u16()),
            _ => input.u32(),
        };
        out.extend(first.to_le_bytes());
        out.extend(number(input).to_le_bytes());
        out.extend(input.u32().to_le_bytes());
        out.extend(count.to_le_bytes());
        for n in 0..count.min(256) {
            let len = if n < 4 { input.u32() } else { 60 };
            out.extend(len.to_le_bytes());
            out.extend(n.to_le_bytes());
        }
        seq = first.wrapping_add(u64::from(count));
    }
    out
}

fn frames(input: &mut Input<'_>) -> Vec<u8> {
    let (mut out, mut seq) = (Vec::new(), 1);
    for _ in 0..input.u8() & 7 {
        let item = item(input, &mut seq, 0, salt(HOLD, &lane()));
        out.extend(item.get(EPOCH..).unwrap_or_default());
    }
    out
}

/// What a lane says of itself: that its stages have seen what is in its index, or anything.
fn said(input: &mut Input<'_>, index: &[IndexBatch]) -> LedgerLane {
    let how = input.u8();
    let made = account(index);
    let stages = STAGES.iter().filter_map(|&stage| {
        let mut a = made;
        match input.u8() {
            0..128 => {}
            128..200 => return None,
            _ => {
                a = Account {
                    first_seq: number(input),
                    last_seq: number(input),
                    frames: number(input),
                    bytes: number(input),
                    digest: (how & 1 == 0).then_some(made.digest?),
                    roll: (how & 2 == 0).then_some(made.roll?),
                }
            }
        }
        Some(StageAccount { stage, account: a })
    });
    LedgerLane {
        stages: stages.collect(),
        lane: match how & 4 {
            0 => lane(),
            _ => LaneKey {
                queue: input.u16(),
                ..lane()
            },
        },
        kind: [LaneKind::Shipped, LaneKind::Behind][usize::from(how >> 3 & 1)],
        inside: true,
        lost: match how & 16 {
            0 => Vec::new(),
            _ => vec![Lost {
                stage: Stage::Deliver,
                first_seq: number(input),
                last_seq: number(input),
                why: "too_long".into(),
            }],
        },
        lost_more: if how & 32 == 0 { 0 } else { number(input) },
        dropped: 0,
        indexed: how & 64 == 0,
        kept: true,
    }
}

fn message(summary: &mut Vec<u8>, bytes: &[u8]) {
    summary.extend((bytes.len() as u32).to_le_bytes());
    summary.extend(bytes);
}

/// A file whose checksums are right, and what is between them mostly. `how` says what is not.
fn file(input: &mut Input<'_>, role: Role, how: u8) -> Vec<u8> {
    let lanes = u32::from(how & 3);
    let mut out = vec![0; HEADER];
    let mut summary = Vec::new();
    let head = codec::encode(&ledger(input, role, lanes)).expect("short");
    message(&mut summary, &head);
    for _ in 0..lanes {
        let mut places = Vec::new();
        for section in [batches(input), frames(input)] {
            let (mut at, mut len) = (out.len() as u64, section.len() as u64);
            out.extend(&section);
            if how & 4 != 0 {
                at = at.wrapping_add(number(input));
                len = number(input);
            }
            let part = usize::try_from(at).ok().and_then(|at| {
                let end = at.checked_add(usize::try_from(len).ok()?)?;
                out.get(at..end)
            });
            places.extend(at.to_le_bytes());
            places.extend(len.to_le_bytes());
            places.extend(crc32c(part.unwrap_or_default()).to_le_bytes());
        }
        let lane = codec::encode(&said(input, &[])).expect("short");
        message(&mut summary, &lane);
        summary.extend(&places);
    }
    if how & 8 != 0 {
        let at = usize::from(input.u16()) % summary.len();
        summary[at] = input.u8();
    }
    let (mut at, mut len) = (out.len() as u64, summary.len() as u64);
    if how & 16 != 0 {
        at = number(input);
        len = number(input);
    }
    out[..8].copy_from_slice(b"GWLEDGR\n");
    out[8..12].copy_from_slice(&1u32.to_le_bytes());
    out[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    out[16..24].copy_from_slice(&at.to_le_bytes());
    out[24..32].copy_from_slice(&len.to_le_bytes());
    out[32..36].copy_from_slice(&crc32c(&summary).to_le_bytes());
    let sum = crc32c(&out[..36]);
    out[36..40].copy_from_slice(&sum.to_le_bytes());
    out.extend(summary);
    if how & 32 != 0 {
        let at = usize::from(input.u16()) % out.len();
        out[at] ^= 1 << (input.u8() & 7);
    }
    if how & 64 != 0 {
        out.truncate(usize::from(input.u16()));
    }
    out
}

/// All pages of a section; each ends where the next one begins.
fn pages<T, E>(
    mut page: impl FnMut(u64) -> Result<(Vec<T>, Option<u64>), E>,
    bytes: usize,
) -> Option<Vec<T>> {
    let (mut all, mut at) = (Vec::new(), 0);
    loop {
        let (found, next) = page(at).ok()?;
        all.extend(found);
        match next {
            Some(next) => {
                assert!(next > at && next < bytes as u64, "{at}: {next}");
                at = next;
            }
            None => return Some(all),
        }
    }
}

/// A host's record, as far as it can be read, and the frames that it has kept.
fn read(input: &mut Input<'_>, role: Role) -> Option<(End, Vec<KeptFrame>)> {
    let how = input.u8();
    let bytes = match how {
        255 => input.take(usize::MAX).to_vec(),
        _ => file(input, role, how),
    };
    let dir = folder();
    let name = match role {
        Role::Source => "source",
        Role::Target => "target",
    };
    let path = dir.path().join(format!("{HOLD}-{name}.ledger"));
    std::fs::write(path, &bytes).expect("a file");
    let cfg = LedgerConfig {
        dir: dir.path().to_owned(),
        keep_days: 1,
        keep_bytes: 1 << 20,
        frames_bytes: 1 << 20,
    };
    let r = Reader::open(&cfg, HOLD, role).ok()??;
    let (mut lanes, mut kept) = (Vec::new(), Vec::new());
    for n in 0..r.lanes(0).count() {
        let mut index = pages(|at| r.index(n, at), bytes.len());
        if let Some(index) = &index {
            let words = |b: &IndexBatch| BATCH + ENTRY * b.frames.len();
            let whole = index.iter().map(words).sum::<usize>();
            assert!(whole <= bytes.len(), "more than is in the file");
        }
        let frames = pages(|at| r.frames(n, at), bytes.len());
        kept.extend(frames.unwrap_or_default());
        // Anywhere.
        let _ = (r.index(n, number(input)), r.frames(n, number(input)));
        // What a host says may be as foreign as all else.
        let first = index.as_mut().and_then(|i| i.first_mut());
        if let Some(batch) = first.filter(|_| input.u8() >= 200) {
            batch.first_seq = number(input);
        }
        lanes.push(LaneRecord {
            lane: said(input, index.as_deref().unwrap_or_default()),
            index,
        });
    }
    assert!(r.index(lanes.len(), 0).is_err());
    let end = End {
        ledger: r.ledger().clone(),
        lanes,
    };
    Some((end, kept))
}

/// Two hosts' files, read, judged and exported.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let Some((source, mut kept)) = read(&mut input, Role::Source) else {
        return;
    };
    let target = match input.u8() {
        // The same frames.
        0..128 => {
            let mut end = source.clone();
            end.ledger.role = Role::Target;
            end
        }
        _ => match read(&mut input, Role::Target) {
            Some((end, frames)) => {
                kept.extend(frames);
                end
            }
            None => return,
        },
    };
    let verdict = verify(&source, &target);
    let frames = verdict.lanes.iter().map(|l| l.frames).sum::<u64>();
    assert_eq!(verdict.frames, frames);
    let faults = verdict.faults.len() + verdict.lanes.iter().map(|l| l.faults.len()).sum::<usize>();
    assert_eq!(verdict.clean, faults == 0);
    serde_json::to_vec(&verdict).expect("JSON");
    let bytes: usize = kept.iter().map(|k| k.bytes.len()).sum();
    let file = pcapng::file("7", &[("a -> b".to_owned(), kept)]);
    assert!(file.len() > bytes);
}
