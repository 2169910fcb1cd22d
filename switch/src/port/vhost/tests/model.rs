//! Random drivers against a plain model, well-behaved and hostile.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::driver::{INDIRECT_FLAG, NEXT, WRITE};
use super::*;
use crate::port::{BURST, Burst, Frame, Mark, Sent, VnetHdr};

#[derive(Debug, Clone)]
enum Op {
    /// The guest sends a frame of so many bytes in so many pieces.
    Guest {
        len: usize,
        pieces: usize,
        indirect: bool,
    },
    Burst,
    Release(usize),
    /// The guest offers a receive buffer.
    Buffer {
        sizes: Vec<u32>,
        indirect: bool,
    },
    Send {
        len: usize,
    },
    /// Frames of so many bytes, the way a worker sends a run: what does not go by the short way goes by the other.
    SendRun {
        lens: Vec<usize>,
    },
    Flush,
    /// The guest reads all that it has received.
    Read,
    /// Where the receive ring is: has the guest read that far?
    Mark,
    /// A new snapshot, nothing changed.
    Swap,
    Arm,
    /// Whether the driver looks for what it has back by itself (without an event index, in a split ring).
    Polls(bool),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        // What nearly all are: short ways depend on it.
        4 => (0usize..1600).prop_map(|len| Op::Guest { len, pieces: 1, indirect: false }),
        4 => (1500u32..2500).prop_map(|n| Op::Buffer { sizes: vec![n], indirect: false }),
        2 => prop::collection::vec(14usize..1600, 1..40).prop_map(|lens| Op::SendRun { lens }),
        3 => (0usize..3000, 1usize..30, any::<bool>())
            .prop_map(|(len, pieces, indirect)| Op::Guest { len, pieces, indirect }),
        3 => Just(Op::Burst),
        2 => (0usize..40).prop_map(Op::Release),
        // virtio 1.2, 5.1.6.3.1: the first at least as long as the header.
        4 => (12u32..2500, prop::collection::vec(0u32..2500, 0..3), any::<bool>())
            .prop_map(|(first, mut sizes, indirect)| {
                sizes.insert(0, first);
                Op::Buffer { sizes, indirect }
            }),
        4 => (14usize..4000).prop_map(|len| Op::Send { len }),
        2 => Just(Op::Flush),
        2 => Just(Op::Read),
        1 => Just(Op::Mark),
        1 => Just(Op::Swap),
        1 => Just(Op::Arm),
        1 => any::<bool>().prop_map(Op::Polls),
    ]
}

fn bits() -> impl Strategy<Value = u64> {
    (0u64..16).prop_map(|i| {
        VERSION_1
            | [0, MRG][i as usize & 1]
            | [0, EVENT_IDX][i as usize >> 1 & 1]
            | [0, INDIRECT][i as usize >> 2 & 1]
            | [0, PACKED][i as usize >> 3]
    })
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn rings_do_what_a_plain_model_does(bits in bits(), ops in prop::collection::vec(op(), 1..200)) {
        let mut w = World::new(bits);
        let mrg = bits & MRG != 0;
        // What the guest has sent and not got back: `None` for a runt.
        let mut queued: VecDeque<Option<Vec<u8>>> = VecDeque::new();
        let mut given = 0usize;
        let mut last_burst = 0usize;
        let mut unflushed: Vec<Vec<u8>> = Vec::new();
        let mut unread: Vec<Vec<u8>> = Vec::new();
        // Frames that were sent before a mark, and those that the guest has read.
        let mut marks = Vec::new();
        let mut read = 0;
        let mut seed = 0;
        // What a driver that polls may be shown late (ADR-0025).
        let may_lag = bits & (PACKED | EVENT_IDX) == 0;
        let lag = if may_lag { usize::from(NUM) / 8 } else { 0 };
        let shown = |w: &World| match bits & PACKED {
            0 => Some(usize::from(w.memory.u16(w.rx.driver.at[2] + 2))),
            _ => None,
        };
        for op in ops {
            seed += 1;
            match op {
                Op::Guest { len, pieces, indirect } => {
                    let mut b = vec![0; 12];
                    b.extend(frame(seed, len));
                    if w.rx.driver.send(&b, pieces, indirect) {
                        queued.push_back((len >= 14).then(|| frame(seed, len)));
                    }
                }
                Op::Burst => {
                    let mut out = Burst::new();
                    w.rx.queue.burst(&mut out);
                    let got: Vec<_> = out.iter().map(bytes).collect();
                    let want: Vec<_> = queued.iter().flatten().take(got.len()).cloned().collect();
                    prop_assert_eq!(&got, &want, "the oldest frames, in order");
                    // Something comes if something waits, unless the burst was full of runts.
                    let waits = queued.iter().take(BURST).any(Option::is_some);
                    prop_assert_eq!(!got.is_empty(), waits);
                    last_burst = got.len();
                    drop(out);
                    if let Some(shown) = shown(&w).filter(|_| last_burst > 0) {
                        // Runts that came with it do not come twice as anything.
                        let room = lag.saturating_sub(last_burst);
                        prop_assert!(given.saturating_sub(shown) <= room, "a burst comes twice after a crash, no more");
                    }
                }
                Op::Release(n) => {
                    let n = n.min(last_burst);
                    w.rx.queue.release(n);
                    last_burst -= n;
                    let mut left = n;
                    while left > 0 {
                        left -= usize::from(queued.pop_front().expect("was shown").is_some());
                        given += 1;
                    }
                }
                Op::Buffer { sizes, indirect } => {
                    let buffers: Vec<_> = sizes.iter().map(|&n| (w.tx.driver.alloc(n), n)).collect();
                    w.tx.driver.add(&buffers, true, indirect);
                }
                Op::Send { len } => {
                    let f = frame(seed, len);
                    if w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f)) == Sent::Yes {
                        unflushed.push(f);
                    }
                }
                Op::SendRun { lens } => {
                    let all: Vec<_> = lens.iter().map(|&len| frame(seed, len)).collect();
                    for burst in all.chunks(BURST) {
                        let frames: Vec<_> =
                            burst.iter().map(|f| Frame::from_slice(VnetHdr::default(), f)).collect();
                        let mut done = 0;
                        while done < frames.len() {
                            let n = w.tx.queue.send_run(&frames[done..]);
                            unflushed.extend_from_slice(&burst[done..done + n]);
                            done += n;
                            let Some(f) = frames.get(done) else { break };
                            match w.tx.queue.send(f) {
                                Sent::Yes => unflushed.push(burst[done].clone()),
                                Sent::Full => break,
                                _ => {}
                            }
                            done += 1;
                        }
                    }
                }
                Op::Flush => {
                    w.tx.queue.flush();
                    unread.append(&mut unflushed);
                }
                Op::Read => {
                    let got: Vec<_> = w.tx.driver.received(12, mrg).into_iter().map(|(_, f)| f).collect();
                    prop_assert_eq!(&got, &std::mem::take(&mut unread));
                    read += got.len();
                    let told = |(sent, mark): &(usize, Mark)| *sent > read || w.tx.queue.has_read(mark);
                    // Zero says nothing.
                    let says = bits & EVENT_IDX != 0 && w.tx.driver.used_idx != 0;
                    prop_assert!(!says || marks.iter().all(told), "it says so at once");
                }
                Op::Mark => {
                    let mark = w.tx.queue.mark().expect("rings tell");
                    prop_assert!(!mark.tells || bits & EVENT_IDX != 0);
                    marks.push((read + unread.len() + unflushed.len(), mark));
                }
                Op::Polls(yes) => {
                    if may_lag {
                        w.memory.write(w.rx.driver.at[1], &u16::from(yes).to_le_bytes());
                    }
                }
                Op::Swap => {
                    let new = live(&w.memory, &w.rx.driver, &w.rx.call, None);
                    prop_assert!(w.rx.control.swap(Some(new)));
                    if unflushed.is_empty() {
                        let new = live(&w.memory, &w.tx.driver, &w.tx.call, None);
                        prop_assert!(w.tx.control.swap(Some(new)));
                    }
                }
                Op::Arm => {
                    let waits = w.rx.queue.arm();
                    // Runts that nobody has looked at count as waiting.
                    let here = w.rx.driver.number_of(w.rx.control.next());
                    prop_assert_eq!(waits, usize::from(w.rx.driver.avail_idx) != here);
                    prop_assert_eq!(shown(&w).unwrap_or(here), here, "nothing is kept by who sleeps");
                    w.rx.queue.disarm();
                }
            }
            for (sent, mark) in &marks {
                prop_assert!(*sent <= read || !w.tx.queue.has_read(mark), "{mark:?}: read {read} of {sent}");
            }
            // Runts behind released frames go with them: the ring may be further than the model, by runts only.
            let back = w.rx.driver.number_of(w.rx.control.next());
            while given < back {
                prop_assert_eq!(queued.pop_front(), Some(None), "only runts go unasked");
                given += 1;
            }
            prop_assert_eq!(given, back);
            if let Some(shown) = shown(&w) {
                prop_assert!(shown <= given && given - shown <= lag, "{} of {}", shown, given);
            }
            prop_assert_eq!(w.rx.control.broken(), None);
            prop_assert_eq!(w.tx.control.broken(), None);
            if seed % 3 == 0 {
                w.rx.driver.reap();
            }
        }
        drop(w.rx.queue);
        w.rx.driver.reap();
        prop_assert_eq!(usize::from(w.rx.driver.used_idx), given, "the driver has exactly those back");
    }

    #[test]
    fn a_hostile_guest_breaks_its_own_ring_only(
        bits in bits().prop_map(|b| b & !PACKED),
        seeds in prop::collection::vec(any::<u64>(), 256),
        heads in prop::collection::vec(any::<u16>(), 1..64),
        jump in any::<u16>(),
        near in any::<bool>(),
    ) {
        let mut w = World::new(bits);
        // Descriptors of every kind, half of them nearly right.
        for (i, s) in seeds.iter().enumerate() {
            let i = i as u16 % NUM;
            let addr = if near { s % (REGION * 2) } else { *s };
            let len = if s >> 60 < 12 { (s >> 40 & 0xfff) as u32 } else { (s >> 20) as u32 };
            let flags = (s >> 50) as u16 & (NEXT | WRITE | INDIRECT_FLAG);
            let next = (s >> 32) as u16 % (NUM + 2);
            for d in [&w.rx.driver, &w.tx.driver] {
                d.desc(d.at[0], i, addr, len, flags, next);
                d.desc(0x8000, i, addr, len, flags, next);
            }
        }
        let f = frame(1, 1000);
        for h in &heads {
            let head = if near { h % (NUM + 1) } else { *h };
            w.rx.driver.offer(head);
            w.tx.driver.offer(head);
            let mut out = Burst::new();
            w.rx.queue.burst(&mut out);
            let n = out.len();
            for x in &out {
                assert_eq!(bytes(x).len(), x.len as usize);
            }
            drop(out);
            w.rx.queue.release(n / 2);
            let run: Vec<_> = (0..n % 4).map(|_| Frame::from_slice(VnetHdr::default(), &f)).collect();
            w.tx.queue.send_run(&run);
            let _ = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
            w.tx.queue.flush();
        }
        w.rx.driver.publish(jump);
        w.tx.driver.publish(jump);
        for _ in 0..4 {
            let mut out = Burst::new();
            w.rx.queue.burst(&mut out);
            drop(out);
            w.rx.queue.arm();
            w.rx.queue.disarm();
            let _ = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
            w.tx.queue.flush();
        }
        if w.rx.control.broken().is_some() {
            prop_assert_eq!(raised(&w.rx.alarm), 1, "reported once");
            prop_assert_eq!(w.rx.queue.errors().ring_broken, 1);
            let mut out = Burst::new();
            w.rx.queue.burst(&mut out);
            prop_assert!(out.is_empty());
        }
        if w.tx.control.broken().is_some() {
            prop_assert_eq!(raised(&w.tx.alarm), 1);
        }
    }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn a_hostile_guest_breaks_its_own_packed_ring_only(
        bits in bits().prop_map(|b| b | PACKED),
        rounds in prop::collection::vec((prop::collection::vec(any::<u64>(), NUM as usize), any::<bool>()), 1..4),
        word in any::<u32>(),
    ) {
        let mut w = World::new(bits);
        let f = frame(1, 1000);
        for (seeds, near) in rounds {
            for (i, s) in seeds.iter().enumerate() {
                let i = i as u16;
                let addr = if near { s % (REGION * 2) } else { *s };
                let len = if s >> 60 < 12 { (s >> 40 & 0xfff) as u32 } else { (s >> 20) as u32 };
                // Available in this lap or the next, or neither; of every kind.
                let lap = [1 << 7, 1 << 15, (1 << 7) | (1 << 15), 0][(s >> 48) as usize & 3];
                let flags = (s >> 50) as u16 & (NEXT | WRITE | INDIRECT_FLAG) | lap;
                for d in [&w.rx.driver, &w.tx.driver] {
                    // The two layouts differ in the order of the last two fields.
                    d.desc(d.at[0], i, addr, len, (s >> 32) as u16, flags);
                    d.desc(0x8000, i, addr, len, (s >> 32) as u16, flags);
                }
            }
            for d in [&w.rx.driver, &w.tx.driver] {
                d.memory.write(d.at[1], &word.to_le_bytes());
            }
            for _ in 0..6 {
                let mut out = Burst::new();
                w.rx.queue.burst(&mut out);
                let n = out.len();
                for x in &out {
                    assert_eq!(bytes(x).len(), x.len as usize);
                }
                drop(out);
                w.rx.queue.release(n / 2);
                w.rx.queue.arm();
                w.rx.queue.disarm();
                let run: Vec<_> = (0..n % 4).map(|_| Frame::from_slice(VnetHdr::default(), &f)).collect();
                w.tx.queue.send_run(&run);
                let _ = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
                w.tx.queue.flush();
                for next in [w.rx.control.next(), w.tx.control.next()] {
                    prop_assert!(next & 0x7fff < NUM, "a position in the ring");
                }
            }
        }
        if w.rx.control.broken().is_some() {
            prop_assert_eq!(raised(&w.rx.alarm), 1, "reported once");
            let mut out = Burst::new();
            w.rx.queue.burst(&mut out);
            prop_assert!(out.is_empty());
        }
    }
}

#[test]
fn each_kind_of_broken_ring_is_named() {
    use super::super::ring::Broken;
    type Break = fn(&mut Driver);
    let cases: [(Break, Broken); 8] = [
        (|d| d.publish(NUM + 1), Broken::Index(NUM + 1)),
        (|d| d.offer(NUM), Broken::Descriptor(NUM)),
        (
            |d| {
                d.desc(d.at[0], 0, 0x10_0000, 100, NEXT, 1);
                d.desc(d.at[0], 1, 0x10_0000, 100, NEXT, 0);
                d.offer(0);
            },
            Broken::Chain,
        ),
        (
            |d| {
                d.desc(d.at[0], 0, REGION - 1, 2, 0, 0);
                d.offer(0);
            },
            Broken::Address(REGION),
        ),
        (
            |d| {
                d.desc(d.at[0], 0, 0x10_0000, 100, WRITE, 0);
                d.offer(0);
            },
            Broken::Direction,
        ),
        (
            |d| {
                d.desc(d.at[0], 0, 0x10_0000, 17, INDIRECT_FLAG, 0);
                d.offer(0);
            },
            Broken::Indirect,
        ),
        (
            |d| {
                d.desc(d.at[0], 0, 0x10_0000, 16, INDIRECT_FLAG, 0);
                d.desc(0x10_0000, 0, 0x10_0000, 16, INDIRECT_FLAG, 0);
                d.offer(0);
            },
            Broken::Indirect,
        ),
        (
            |d| {
                d.desc(d.at[0], 0, HIGH - 16, 32, INDIRECT_FLAG, 0);
                d.offer(0);
            },
            Broken::Address(HIGH - 16),
        ),
    ];
    for (make, why) in cases {
        let mut w = World::new(VERSION_1 | INDIRECT);
        // A good frame before it is not lost.
        let mut b = vec![0; 12];
        b.extend(frame(1, 60));
        if !matches!(why, Broken::Index(_)) {
            // Descriptor 63, so the broken ones are not in its way.
            w.rx.driver.desc(w.rx.driver.at[0], 63, 0x20_0000, 72, 0, 0);
            w.memory.write(0x20_0000, &b);
            w.rx.driver.offer(63);
        }
        make(&mut w.rx.driver);
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        let n = out.len();
        assert_eq!(n, usize::from(!matches!(why, Broken::Index(_))));
        drop(out);
        w.rx.queue.release(n);
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        assert!(out.is_empty());
        drop(out);
        assert_eq!(w.rx.control.broken(), Some(why));
        assert_eq!(usize::from(w.rx.control.next()), n);
    }
}
