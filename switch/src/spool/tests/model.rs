use proptest::prelude::*;

use super::*;
use gangway_shared::api::Tally;

#[derive(Debug, Clone)]
enum Op {
    Append(usize),
    Commit,
    /// By reader `0..READERS`, this many.
    Read(usize, usize),
    Seal,
}

const READERS: usize = 3;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => prop_oneof![14_usize..2000, 14_usize..200, 60_000_usize..65_557].prop_map(Op::Append),
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
        let mut model: Vec<usize> = Vec::new();
        let (mut committed, mut sealed) = (0, false);
        let mut readers: Vec<_> = (0..READERS).map(|_| (q.reader(), 0, Tally::default())).collect();
        for op in ops {
            match op {
                Op::Append(len) if !sealed => {
                    put(&mut w, model.len() as u64, len);
                    model.push(len);
                }
                Op::Append(len) => prop_assert!(!w.has_room(len as u32)),
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
                        prop_assert_eq!(rec.time_ns, *at as u64);
                        prop_assert_eq!(rec.vnet, vnet(*at as u64));
                        prop_assert_eq!(rec.frame, &bytes(*at as u64, model[*at])[..]);
                        tally.add(rec.seq, rec.frame.len() as u32, rec.crc);
                        r.advance();
                        *at += 1;
                        prop_assert_eq!(r.tally(), *tally);
                    }
                }
            }
            prop_assert_eq!(q.tally().frames, committed as u64);
            prop_assert_eq!(q.tally().bytes, model[..committed].iter().map(|l| *l as u64).sum::<u64>());
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
        let (seqs, bad) = all(&f.queue);
        prop_assert!(bad.is_empty());
        prop_assert_eq!(seqs.len(), model.len());
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
                let passed = r.pass_run(turn % 40, |run| {
                    for x in run {
                        assert_eq!(x.frame, bytes(x.time_ns, x.frame.len()));
                    }
                    assert!(run.windows(2).all(|w| w[0].seq + 1 == w[1].seq));
                    run.len() - run.len().min(turn % 3)
                });
                if passed == 0
                    && let Some(x) = r.peek().unwrap()
                {
                    assert_eq!(x.frame, bytes(x.time_ns, x.frame.len()));

                    r.advance();
                }
                let t = q.tally();
                assert!(t.frames >= r.tally().frames);
            }
            r.tally()
        }
    });
    for n in 0..N {
        put(&mut w, n, 60 + (n as usize * 13) % 1400);
        if n % 7 == 0 {
            w.commit();
        }
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
fn a_record_of_the_other_host_keeps_its_digest() {
    let (a, b) = (tmp(), tmp());
    let (source, _) = open(a.path());
    let (target, _) = open(b.path());
    let (mut w, q) = source.create(HOLD, Kind::Source, &lane(0)).unwrap();
    let (mut tw, tq) = target.create(HOLD, Kind::Incoming, &lane(0)).unwrap();
    let (mut ow, _) = target.create(HOLD, Kind::Incoming, &lane(1)).unwrap();
    for n in 0..500 {
        put(&mut w, n, 64 + n as usize);
    }
    w.seal();
    let mut r = q.reader();
    let mut first = None;
    while let Some(x) = r.peek().unwrap() {
        let raw = x.raw.to_vec();
        until(|| tw.has_room(2000));
        tw.append_record(&raw).unwrap();
        assert_eq!(ow.append_record(&raw), Err(RejectedRecord::Garbage));
        first.get_or_insert(raw);
        r.advance();
    }
    let first = first.unwrap();
    assert_eq!(
        tw.append_record(&first),
        Err(RejectedRecord::Sequence {
            found: 1,
            expected: 501
        })
    );
    for at in 0..first.len() {
        let mut bad = first.clone();
        bad[at] ^= 0x10;
        assert_eq!(
            tw.append_record(&bad),
            Err(RejectedRecord::Garbage),
            "byte {at}"
        );
    }
    tw.seal();
    assert_eq!(tq.tally(), q.tally());
    assert_eq!(tq.tally(), r.tally());
}
