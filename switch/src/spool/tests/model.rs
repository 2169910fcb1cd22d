use proptest::prelude::*;

use super::*;
use crate::mem::Seg;
use crate::port::{HEAD, PLAIN_HDR};
use gangway_shared::api::Tally;

#[derive(Debug, Clone)]
enum Op {
    Append(usize),
    /// Frames that came together.
    Run(usize, usize),
    Commit,
    /// By reader `0..READERS`, this many.
    Read(usize, usize),
    Seal,
}

const READERS: usize = 3;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => prop_oneof![14_usize..2000, 14_usize..200, 60_000_usize..65_557].prop_map(Op::Append),
        4 => (1_usize..70, prop_oneof![14_usize..200, 1000_usize..9000]).prop_map(|(n, len)| Op::Run(n, len)),
        3 => Just(Op::Commit),
        4 => (0..READERS, 0_usize..40).prop_map(|(r, n)| Op::Read(r, n)),
        1 => Just(Op::Seal),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is appended and committed comes out of every reader, in order and once; nothing else does. A second
    /// opening of the directory finds the same.
    #[test]
    fn a_queue_is_a_vec(ops in prop::collection::vec(op(), 1..120), pages in 32_u64..80) {
        let dir = tmp();
        let cfg = config(dir.path(), pages * 4096, 64 << 20);
        let (spool, _) = Spool::open(&cfg).unwrap();
        let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
        let mut model: Vec<(usize, u64, VnetHdr)> = Vec::new();
        let (mut committed, mut sealed) = (0, false);
        let mut readers: Vec<_> = (0..READERS).map(|_| (q.reader(), 0, Tally::default())).collect();
        for op in ops {
            match op {
                Op::Append(len) if !sealed => {
                    let n = model.len() as u64;
                    put(&mut w, n, len);
                    model.push((len, n, vnet(n)));
                }
                Op::Append(len) => prop_assert!(!w.has_room(len as u32)),
                Op::Run(n, len) if !sealed => {
                    let all: Vec<_> = (0..n).map(|i| bytes((model.len() + i) as u64, len + i)).collect();
                    let time = model.len() as u64;
                    let mut frames: Vec<_> = all.iter().map(|b| Frame::from_slice(vnet(time), b)).collect();
                    // A frame of the data path has its head apart, and the rest in pieces.
                    let plain: Vec<_> = all.iter().map(|b| [&PLAIN_HDR[..], &b[..b.len().min(HEAD)]].concat()).collect();
                    let rest: Vec<_> = all.iter().map(|b| Seg::from_slice(&b[b.len().min(HEAD)..])).collect();
                    if n % 2 == 0 {
                        frames = (0..n).map(|i| Frame::with_prefix(VnetHdr::default(), all[i].len() as u32, &plain[i], std::slice::from_ref(&rest[i]))).collect();
                    }
                    let mut done = 0;
                    until(|| { done += w.append_run(time, &frames[done..], Origin::NONE); done == n });
                    model.extend(frames.iter().map(|f| (f.len as usize, time, f.vnet)));
                }
                Op::Run(..) => prop_assert_eq!(w.append_run(0, &[Frame::from_slice(vnet(0), &[0; 60])], Origin::NONE), 0),
                Op::Commit => {
                    w.commit();
                    committed = model.len();
                }
                Op::Seal => {
                    w.seal();
                    committed = model.len();
                    sealed = true;
                }
                Op::Read(r, n) => {
                    let (r, at, tally) = &mut readers[r];
                    for _ in 0..n {
                        prop_assert_eq!(r.at_end(), *at == committed);
                        prop_assert_eq!(r.finished(), sealed && *at == committed);
                        let Some(rec) = r.peek().unwrap() else {
                            prop_assert_eq!(*at, committed);
                            break;
                        };
                        prop_assert!(*at < committed);
                        prop_assert_eq!(rec.seq, *at as u64 + 1);
                        let (len, time, vnet) = model[*at];
                        prop_assert_eq!(rec.time_ns, time);
                        prop_assert_eq!(rec.vnet, vnet);
                        prop_assert_eq!(rec.frame, &bytes(*at as u64, len)[..]);
                        tally.count(1, len as u64);
                        r.advance();
                        *at += 1;
                        prop_assert_eq!((r.tally().frames, r.tally().bytes), (tally.frames, tally.bytes));
                    }
                }
            }
            prop_assert_eq!(q.tally().frames, committed as u64);
            prop_assert_eq!(q.tally().bytes, model[..committed].iter().map(|m| m.0 as u64).sum::<u64>());
            prop_assert_eq!(q.is_sealed(), sealed);
        }
        let written = w.tally();
        drop((w, q, readers, spool));
        let (_spool, found) = Spool::open(&cfg).unwrap();
        prop_assert_eq!(found.len(), 1);
        let f = &found[0];
        prop_assert_eq!(f.queue.lane(), &lane(0));
        prop_assert_eq!(f.queue.tally(), written);
        prop_assert_eq!(f.queue.is_sealed(), sealed);
        prop_assert_eq!(f.writer.is_none(), sealed);
        prop_assert!(f.damaged.is_empty());
        prop_assert_eq!(f.torn_bytes, 0);
        let mut r = f.queue.reader();
        for (n, (len, time, vnet)) in model.iter().enumerate() {
            let x = r.peek().unwrap().unwrap();
            prop_assert_eq!((x.seq, x.time_ns, x.vnet), (n as u64 + 1, *time, *vnet));
            prop_assert_eq!(x.frame, &bytes(n as u64, *len)[..]);
            r.advance();
        }
        prop_assert_eq!(r.peek().unwrap(), None);
        prop_assert_eq!(r.tally(), written);
    }
}

#[test]
fn a_reader_in_another_thread_sees_everything_in_order() {
    const N: u64 = 20_000;
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let t = std::thread::spawn({
        let q = q.clone();
        move || {
            let mut r = q.reader();
            let mut turn = 0;
            while !r.finished() {
                // One by one, in runs, and in runs of which only a part is taken.
                turn += 1;
                let next = r.next_seq();
                let passed = r.pass_run(turn % 40, |run| {
                    assert_eq!(run.first_seq, next);
                    for (x, n) in run.frames.iter().zip(run.first_seq - 1..) {
                        let mut b = vec![0; x.len as usize];
                        x.copy_to(&mut b);
                        assert_eq!(b, bytes(n, b.len()));
                    }
                    run.frames.len() - run.frames.len().min(turn % 3)
                });
                if passed == 0
                    && let Some(x) = r.peek().unwrap()
                {
                    assert_eq!(x.frame, bytes(x.seq - 1, x.frame.len()));
                    r.advance();
                }
                let t = q.tally();
                assert!(t.frames >= r.tally().frames);
            }
            r.tally()
        }
    });
    let mut n = 0;
    while n < N {
        let count = (n % 45 + 1).min(N - n);
        let all: Vec<_> = (n..n + count)
            .map(|n| bytes(n, 60 + (n as usize * 13) % 1400))
            .collect();
        let frames: Vec<_> = all.iter().map(|b| Frame::from_slice(vnet(n), b)).collect();
        let mut done = 0;
        until(|| {
            done += w.append_run(n, &frames[done..], Origin::NONE);
            done == frames.len()
        });
        if n % 7 < 3 {
            w.commit();
        }
        n += count;
    }
    w.seal();
    let read = t.join().unwrap();
    assert_eq!(read, w.tally());
    assert_eq!(read, q.tally());
}

#[test]
fn whoever_waits_is_woken_by_commit_and_seal() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let rt = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let waiting = rt.spawn({
        let q = q.clone();
        async move {
            let mut r = q.reader();
            let mut n = 0;
            while !r.finished() {
                r.ready().await;
                while r.peek().unwrap().is_some() {
                    r.advance();
                    n += 1;
                }
            }
            q.sealed().await;
            n
        }
    });
    for n in 0..1000 {
        put(&mut w, n, 100);
        w.commit();
        if n % 100 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    w.seal();
    let n = rt.block_on(async { tokio::time::timeout(Duration::from_secs(10), waiting).await });
    assert_eq!(n.unwrap().unwrap(), 1000);
}

#[test]
fn a_batch_of_the_other_host_keeps_its_digest() {
    let (a, b) = (tmp(), tmp());
    let (source, _) = open(a.path());
    let (target, _) = open(b.path());
    let (mut w, q) = source.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let (mut tw, tq) = target.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
    let (mut ow, oq) = target.create(HOLD, Kind::Incoming, &lane(1)).unwrap();
    for n in 0..500 {
        put(&mut w, n, 64 + n as usize);
    }
    w.seal();
    let mut r = q.reader();
    let mut first = None;
    let arrive = |w: &mut Writer, wire: &[u8]| push(&mut Arriving::default(), w, wire);
    while let Some(b) = r.peek_batch().unwrap() {
        let wire = b.wire.to_vec();
        until(|| tw.has_room(2000) && ow.has_room(2000));
        arrive(&mut tw, &wire).unwrap();
        assert_eq!(arrive(&mut ow, &wire), Err(RejectedBatch::Garbage));
        first.get_or_insert(wire);
        r.advance_batch();
    }
    let first = first.unwrap();
    assert_eq!(arrive(&mut tw, &first), Ok(()), "known: nothing happens");
    for at in 0..first.len() {
        let mut bad = first.clone();
        bad[at] ^= 0x10;
        let mut arriving = Arriving::default();
        let r = push(&mut arriving, &mut ow, &bad);
        // A length that is too long waits for more.
        assert!(r.is_err() || arriving.pending() > 0, "byte {at}: {r:?}");
    }
    ow.commit();
    assert_eq!(oq.tally().frames, 0);
    tw.seal();
    assert_eq!(tq.tally(), q.tally());
    assert_eq!(tq.tally(), r.tally());
}

fn push(arriving: &mut Arriving, w: &mut Writer, wire: &[u8]) -> Result<(), RejectedBatch> {
    arriving.push(w, &mut &wire[..])
}

/// What a lane's stream carries of `count` records.
fn stream(count: u64) -> (Vec<u8>, Tally) {
    let dir = tmp();
    let (source, _) = open(dir.path());
    let (mut w, q) = source.create(HOLD, Kind::Source, &lane(0)).unwrap();
    for n in 0..count {
        put(&mut w, n, 14 + (n * 37 % 2000) as usize);
    }
    w.seal();
    let (mut r, mut all) = (q.reader(), Vec::new());
    while let Some(b) = r.wire().unwrap() {
        all.extend_from_slice(&b);
        r.advance_batch();
    }
    (all, q.tally())
}

#[test]
fn a_stream_arrives_whole_in_whatever_pieces() {
    let (all, tally) = stream(400);
    // Pieces of a byte, of less than a head, of several batches.
    for most in [1, 39, 41, 5000, 300_000] {
        let dir = tmp();
        let (target, _) = open(dir.path());
        let (mut w, q) = target.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
        let mut arriving = Arriving::default();
        let (mut rest, mut n) = (&all[..], 0);
        while !rest.is_empty() {
            n += 1;
            let (mut piece, behind) = rest.split_at((n * n % most + 1).min(rest.len()));
            rest = behind;
            until(|| match arriving.push(&mut w, &mut piece) {
                Err(RejectedBatch::NoRoom(_)) => false,
                r => r.is_ok(),
            });
            assert!(piece.is_empty());
        }
        assert_eq!(arriving.pending(), 0);
        w.seal();
        assert_eq!(q.tally(), tally, "{most} bytes");
        let mut r = q.reader();
        r.skip_to(400);
        assert_eq!(r.tally(), tally);
    }
}

#[test]
fn what_arrives_for_a_removed_queue_is_not_written_to_the_one_that_has_its_place() {
    let (all, tally) = stream(3);
    let dir = tmp();
    let (target, _) = open(dir.path());
    let (mut w, _) = target.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
    let mut arriving = Arriving::default();
    let (head, rest) = all.split_at(40);
    push(&mut arriving, &mut w, head).unwrap();
    target.remove_hold(HOLD).unwrap();
    let (mut new, q) = target.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
    push(&mut Arriving::default(), &mut new, &all).unwrap();
    assert_eq!(
        push(&mut arriving, &mut w, rest),
        Err(RejectedBatch::NoRoom(NoRoom))
    );
    new.seal();
    let mut r = q.reader();
    r.skip_to(3);
    assert_eq!((q.tally(), r.tally(), q.failed()), (tally, tally, None));
}

#[test]
fn a_queue_whose_file_can_not_be_written_takes_nothing_more_and_says_so() {
    let (all, _) = stream(3);
    let dir = tmp();
    let (target, _) = open(dir.path());
    let (mut w, q) = target.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
    std::fs::remove_file(q.dir().join("000000.seg")).unwrap();
    assert_eq!(
        push(&mut Arriving::default(), &mut w, &all),
        Err(RejectedBatch::NoRoom(NoRoom))
    );
    let why = q.failed().expect("it has failed");
    assert!(why.contains("000000.seg"), "{why}");
    assert_eq!(q.tally().frames, 0);
    assert!(!w.has_room(64));
}

#[test]
fn a_segment_opens_no_file_but_its_own() {
    use crate::spool::map::Segment;
    let dir = tmp();
    let (path, elsewhere) = (dir.path().join("a"), dir.path().join("b"));
    let first = Segment::create(&path, 4096).unwrap();
    assert!(first.file(&path).is_ok());
    std::fs::rename(&path, &elsewhere).unwrap();
    let second = Segment::create(&path, 4096).unwrap();
    assert!(second.file(&path).is_ok());
    assert!(first.file(&path).is_err(), "its name is another's");
    assert!(first.file(&elsewhere).is_ok());
}
