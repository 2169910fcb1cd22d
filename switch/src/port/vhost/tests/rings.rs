//! What goes in comes out, in every shape of ring.

use super::*;
use crate::port::offload::gso;
use crate::port::{BURST, Burst, FRAME_MAX, Frame, NeverReason, Sent, VnetHdr};

fn shapes() -> impl Iterator<Item = u64> {
    let shape = |i: u64| {
        let bit = |n: u64, f: u64| if i >> n & 1 == 1 { f } else { 0 };
        OFFLOADS
            | bit(0, MRG)
            | bit(1, EVENT_IDX)
            | bit(2, INDIRECT)
            | bit(3, VERSION_1)
            | bit(4, PACKED)
    };
    // A packed ring is one of version 1.
    (0..32u64)
        .map(shape)
        .filter(|b| b & PACKED == 0 || b & VERSION_1 != 0)
}

/// Offers receive buffers until the descriptors are gone.
fn fill(d: &mut Driver, mrg: bool) {
    let sizes: &[u32] = if mrg { &[1526] } else { &[12, 2048, 64_000] };
    while d.free_descs() > sizes.len() {
        let buffers: Vec<_> = sizes.iter().map(|&n| (d.alloc(n), n)).collect();
        d.add(&buffers, true, d.avail_idx.is_multiple_of(3));
    }
}

#[test]
fn frames_cross_byte_for_byte_in_every_shape() {
    for bits in shapes() {
        let mut w = World::new(bits);
        let mrg = bits & MRG != 0;
        let hdr_len = if bits & (MRG | VERSION_1) != 0 {
            12
        } else {
            10
        };
        let vnet = VnetHdr([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
        let mut seed = 0;
        for len in [14, 60, 127, 128, 129, 1514, 9000, FRAME_MAX] {
            for pieces in [1, 2, 3, 13, 40] {
                for indirect in [false, true] {
                    fill(&mut w.tx.driver, mrg);
                    seed += 1;
                    let f = frame(seed, len);
                    let h = if len > 54 { vnet } else { VnetHdr::default() };
                    let mut sent = h.0.to_vec();
                    sent.resize(hdr_len, 0xaa);
                    sent.extend(&f);
                    assert!(w.rx.driver.send(&sent, pieces, indirect));
                    let mut out = Burst::new();
                    w.rx.queue.burst(&mut out);
                    assert_eq!(out.len(), 1, "{bits:#x} {len} {pieces}");
                    assert_eq!(bytes(&out[0]), f);
                    assert_eq!(out[0].vnet, h);
                    assert_eq!(w.tx.queue.send(&out[0]), Sent::Yes);
                    drop(out);
                    assert!(w.rx.driver.reap().is_empty(), "not before the release");
                    w.rx.queue.release(1);
                    assert_eq!(w.rx.driver.reap().len(), 1);
                    assert!(
                        w.tx.driver.received(hdr_len, mrg).is_empty(),
                        "not before the flush"
                    );
                    w.tx.queue.flush();
                    let got = w.tx.driver.received(hdr_len, mrg);
                    assert_eq!(got.len(), 1);
                    assert_eq!(got[0].1, f, "{bits:#x} {len} {pieces}");
                    assert_eq!(got[0].0[..10], h.0);
                }
            }
        }
        assert_eq!(w.rx.queue.errors(), Default::default());
    }
}

/// Wherever buffers lie in their cache lines: heads end where a line starts, and a header in a line of its own is only written
/// if something else stands there.
#[test]
fn runs_cross_whatever_the_alignment() {
    const LENS: [usize; 13] = [
        14, 60, 64, 103, 104, 116, 117, 128, 179, 180, 181, 244, 1514,
    ];
    const AT: [u64; 7] = [0, 1, 12, 20, 52, 54, 63];
    for (bits, hdr_len) in [(0, 10), (VERSION_1, 12), (VERSION_1 | PACKED, 12)] {
        let mut w = World::new(if hdr_len == 12 { bits | MRG } else { bits });
        let mut stale = 0;
        for (from, to) in AT.into_iter().flat_map(|a| AT.map(|b| (a, b))) {
            let place = |base: u64, i: usize, at: u64| (base & !63) + 4096 * i as u64 + at;
            let mut want = Vec::new();
            for (i, len) in LENS.into_iter().enumerate() {
                let f = frame(from * 64 + to + i as u64, len);
                let mut sent = vec![0; hdr_len];
                sent.extend(&f);
                let gpa = place(w.rx.driver.heap + 64, i, from);
                w.memory.write(gpa, &sent);
                assert!(
                    w.rx.driver
                        .add(&[(gpa, sent.len() as u32)], false, false)
                        .is_some()
                );
                let gpa = place(w.tx.driver.heap + 64, i, to);
                stale += 1;
                let mut before = vec![0xee; 1600];
                if stale % 2 == 0 {
                    before[..12].copy_from_slice(&crate::port::PLAIN_HDR);
                }
                w.memory.write(gpa, &before);
                assert!(w.tx.driver.add(&[(gpa, 1600)], true, false).is_some());
                want.push((gpa, f));
            }
            let mut out = Burst::new();
            w.rx.queue.burst(&mut out);
            assert_eq!(out.len(), LENS.len());
            assert_eq!(w.tx.queue.send_run(&out), LENS.len());
            drop(out);
            w.rx.queue.release(LENS.len());
            w.tx.queue.flush();
            assert_eq!(w.rx.driver.reap().len(), LENS.len());
            let got = w.tx.driver.reap();
            assert_eq!(got.len(), LENS.len());
            for ((gpa, f), (_, len)) in want.iter().zip(&got) {
                assert_eq!(*len as usize, hdr_len + f.len());
                let all = w.memory.read(*gpa, 1600);
                let (hdr, rest) = all.split_at(hdr_len);
                assert_eq!(hdr, &crate::port::PLAIN_HDR[..hdr_len], "{from} to {to}");
                assert_eq!(&rest[..f.len()], f, "{from} to {to}");
                assert!(rest[f.len()..].iter().all(|b| *b == 0xee), "{from} to {to}");
            }
        }
    }
}

#[test]
fn a_burst_is_given_again_until_it_is_released() {
    let mut w = World::new(VERSION_1);
    for i in 0..40 {
        let mut b = vec![0; 12];
        b.extend(frame(i, 60));
        assert!(w.rx.driver.send(&b, 1, false));
    }
    for (released, upto) in [(0, 32), (5, 32), (32, 3), (3, 0)] {
        w.rx.queue.release(released);
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        assert_eq!(out.len(), upto);
        let first = u64::from(w.rx.control.next());
        for (i, f) in out.iter().enumerate() {
            assert_eq!(bytes(f), frame(first + i as u64, 60));
        }
    }
    assert_eq!(w.rx.driver.reap().len(), 40);
    assert_eq!(w.rx.control.next(), 40);
}

#[test]
fn a_full_receiver_takes_nothing_and_says_so() {
    let mut w = World::new(VERSION_1 | MRG);
    let f = frame(1, 3000);
    let send = |w: &mut World| w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
    assert_eq!(send(&mut w), Sent::Full);
    let buffer = (w.tx.driver.alloc(2000), 2000);
    w.tx.driver.add(&[buffer], true, false);
    assert_eq!(send(&mut w), Sent::Full, "half of it fits");
    w.tx.queue.flush();
    assert!(w.tx.driver.reap().is_empty());
    let buffer = (w.tx.driver.alloc(2000), 2000);
    w.tx.driver.add(&[buffer], true, false);
    assert_eq!(send(&mut w), Sent::Yes);
    w.tx.queue.flush();
    assert_eq!(w.tx.driver.received(12, true)[0].1, f);
}

#[test]
fn what_never_fits_is_said() {
    let mut w = World::new(VERSION_1);
    let buffer = (w.tx.driver.alloc(1526), 1526);
    w.tx.driver.add(&[buffer], true, false);
    let f = frame(1, 1515);
    let h = VnetHdr::default();
    let long = w.tx.queue.send(&Frame::from_slice(h, &f));
    assert_eq!(long, Sent::Never(NeverReason::TooLong));
    assert_eq!(
        w.tx.queue.send(&Frame::from_slice(h, &f[..1514])),
        Sent::Yes
    );
    let gso = VnetHdr([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    let gso = w.tx.queue.send(&Frame::from_slice(gso, &f));
    assert_eq!(gso, Sent::Never(NeverReason::Offload));
    // Mergeable, but all buffers together are too few.
    let mut w = World::new(VERSION_1 | MRG);
    for _ in 0..NUM {
        let buffer = (w.tx.driver.alloc(20), 20);
        w.tx.driver.add(&[buffer], true, false);
    }
    let few = w.tx.queue.send(&Frame::from_slice(h, &f));
    assert_eq!(few, Sent::Never(NeverReason::TooLong));
}

#[test]
fn a_receiver_without_offload_gets_a_checksum() {
    let mut w = World::new(VERSION_1);
    let buffer = (w.tx.driver.alloc(2000), 2000);
    w.tx.driver.add(&[buffer], true, false);
    let mut f = frame(7, 300);
    f[50..52].copy_from_slice(&[0x12, 0x34]);
    let vnet = VnetHdr([1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
    assert_eq!(w.tx.queue.send(&Frame::from_slice(vnet, &f)), Sent::Yes);
    w.tx.queue.flush();
    let (h, got) = w.tx.driver.received(12, false).remove(0);
    assert_eq!(h[..10], [0; 10]);
    let mut want = f.clone();
    assert!(crate::port::offload::csum::complete(&mut want, 34, 16));
    assert_ne!(want, f);
    assert_eq!(got, want);
}

#[test]
fn a_receiver_without_segmentation_gets_all_of_a_big_frame_in_small_ones_or_nothing() {
    const PARTS: usize = 20;
    // 54 bytes of Ethernet, IPv4 and TCP.
    let mut f = vec![2; 12];
    f.extend([
        8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    f.extend([
        0, 9, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
    ]);
    f.extend(frame(3, PARTS * 1448 - 100));
    let vnet = VnetHdr([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    // Checksums taken and segments not, then neither.
    let csum = 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
    for bits in shapes().map(|b| b & !OFFLOADS).flat_map(|b| [b, b | csum]) {
        let mut w = World::new(bits);
        let mrg = bits & MRG != 0;
        let hdr_len = if bits & (MRG | VERSION_1) != 0 {
            12
        } else {
            10
        };
        // Mergeable ones come in two.
        let sizes: &[u32] = if mrg { &[1000, 600] } else { &[1600] };
        let give = |w: &mut World, n: usize| {
            for &size in std::iter::repeat_n(sizes, n).flatten() {
                let buffer = (w.tx.driver.alloc(size), size);
                w.tx.driver.add(&[buffer], true, false);
            }
        };
        give(&mut w, PARTS - 1);
        assert_eq!(w.tx.queue.send(&Frame::from_slice(vnet, &f)), Sent::Full);
        w.tx.queue.flush();
        assert!(w.tx.driver.received(hdr_len, mrg).is_empty(), "{bits:#x}");
        give(&mut w, 1);
        assert_eq!(w.tx.queue.send(&Frame::from_slice(vnet, &f)), Sent::Yes);
        w.tx.queue.flush();
        let got = w.tx.driver.received(hdr_len, mrg);
        assert_eq!(got.len(), PARTS, "{bits:#x}");
        let mut payload = Vec::new();
        for (hdr, part) in &got {
            assert_eq!(hdr[..10], [0; 10]);
            payload.extend_from_slice(&part[54..]);
        }
        assert!(
            got[..PARTS - 1]
                .iter()
                .all(|(_, part)| part.len() == 54 + 1448)
        );
        assert_eq!(payload, f[54..], "{bits:#x}");
        // More pieces than there ever are buffers for.
        let tiny = VnetHdr([1, 1, 54, 0, 100, 0, 34, 0, 16, 0]);
        let never = w.tx.queue.send(&Frame::from_slice(tiny, &f));
        assert_eq!(never, Sent::Never(NeverReason::Offload));
    }
}

/// UDP over IPv4 or IPv6 with `payload` bytes of zero, cut at `size`.
fn uso(v6: bool, payload: usize, size: u16) -> (VnetHdr, Vec<u8>) {
    let mut f = vec![2; 12];
    if v6 {
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 17, 64]);
        f.extend([9; 32]);
    } else {
        f.extend([
            8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
    }
    let udp = f.len() as u8;
    f.extend([0, 9, 0, 9, 0, 0, 0, 0]);
    f.extend(frame(5, payload));
    let [lo, hi] = size.to_le_bytes();
    let vnet = VnetHdr([1, gso::UDP_L4, udp + 8, 0, lo, hi, udp, 0, 6, 0]);
    (vnet, f)
}

#[test]
fn a_burst_of_datagrams_passes_whole_where_it_may_and_is_cut_where_it_must() {
    let csum = 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
    let uso4 = 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_USO4;
    for packed in [0, PACKED] {
        for (bits, takes) in [
            (OFFLOADS, [true, true]),
            (OFFLOADS & !USO, [false, false]),
            (csum | uso4, [true, false]),
            (0, [false, false]),
        ] {
            let bits = bits | VERSION_1 | MRG | packed;
            for v6 in [false, true] {
                let (vnet, f) = uso(v6, 10_000, 1200);
                let mut w = World::new(bits | OFFLOADS);
                let mut sent = vnet.0.to_vec();
                sent.extend([0, 0]);
                sent.extend(&f);
                assert!(w.rx.driver.send(&sent, 3, false));
                let mut out = Burst::new();
                w.rx.queue.burst(&mut out);
                assert_eq!((out.len(), out[0].vnet), (1, vnet));
                let mut to = World::new(bits);
                fill(&mut to.tx.driver, true);
                assert_eq!(to.tx.queue.send(&out[0]), Sent::Yes);
                to.tx.queue.flush();
                let got = to.tx.driver.received(12, true);
                if takes[usize::from(v6)] {
                    assert_eq!(got.len(), 1, "{bits:#x}");
                    assert_eq!((&got[0].0[..10], &got[0].1), (&vnet.0[..], &f));
                } else {
                    assert_eq!(got.len(), 9, "{bits:#x}");
                    assert!(got.iter().all(|(hdr, _)| hdr[..10] == [0; 10]));
                }
            }
        }
    }
}

#[test]
fn the_driver_is_woken_when_it_asked_and_only_then() {
    for bits in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut w = World::new(bits);
        let d = &mut w.tx.driver;
        for _ in 0..8 {
            let buffer = (d.alloc(2000), 2000);
            d.add(&[buffer], true, false);
        }
        let f = frame(1, 60);
        let send = |w: &mut World, n: usize| {
            for _ in 0..n {
                assert_eq!(
                    w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f)),
                    Sent::Yes
                );
            }
            w.tx.queue.flush();
            assert_eq!(raised(&w.tx.call), 0, "not before it is settled");
            w.tx.queue.settle();
            raised(&w.tx.call)
        };
        assert_eq!(send(&mut w, 3), 1, "one for a burst");
        w.tx.driver.reap();
        assert_eq!(send(&mut w, 1), 1);
        // Not reaped, with EVENT_IDX: it knows already. Without: NO_INTERRUPT.
        if bits & EVENT_IDX == 0 {
            w.memory.write(w.tx.driver.at[1], &1u16.to_le_bytes());
        }
        assert_eq!(send(&mut w, 2), 0);
        w.tx.queue.flush();
        w.tx.queue.settle();
        assert_eq!(raised(&w.tx.call), 0, "nothing new");
        // What was not settled is settled when the ring stops.
        w.memory.write(w.tx.driver.at[1], &[0; 2]);
        w.tx.driver.reap();
        assert_eq!(
            w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f)),
            Sent::Yes
        );
        let World { tx, .. } = w;
        drop(tx.queue);
        assert_eq!(raised(&tx.call), 1);
    }
}

#[test]
fn a_sleeping_worker_asks_for_a_kick_and_looks_again() {
    for bits in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut w = World::new(bits);
        let mut b = vec![0; 12];
        b.extend(frame(1, 60));
        let offer = |w: &mut World| {
            let old = w.rx.driver.avail_idx;
            assert!(w.rx.driver.send(&b, 1, false));
            w.rx.driver.wants_kick(old)
        };
        assert!(!w.rx.queue.arm());
        assert!(offer(&mut w), "armed");
        assert!(w.rx.queue.arm(), "a frame waits");
        w.rx.queue.disarm();
        if bits & EVENT_IDX == 0 {
            assert!(!offer(&mut w), "we are polling");
        } else {
            // The event was passed by the kick above, and nobody moved it.
            w.rx.queue.arm();
            w.rx.queue.disarm();
            offer(&mut w);
            assert!(!offer(&mut w));
        }
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        let n = out.len();
        drop(out);
        w.rx.queue.release(n);
        assert!(!w.rx.queue.arm());
        assert!(offer(&mut w));
    }
}

#[test]
fn runts_are_consumed_and_counted_once() {
    let mut w = World::new(VERSION_1);
    let runt = vec![0; 12 + 13];
    let mut good = vec![0; 12];
    good.extend(frame(3, 60));
    assert!(w.rx.driver.send(&runt, 1, false));
    assert!(w.rx.driver.send(&good, 1, false));
    assert!(w.rx.driver.send(&runt, 2, false));
    for _ in 0..3 {
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        assert_eq!(out.len(), 1);
    }
    assert_eq!(w.rx.queue.errors().malformed, 2);
    w.rx.queue.release(1);
    // What follows goes at the next look at the latest.
    {
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        assert!(out.is_empty());
    }
    assert_eq!(w.rx.driver.reap().len(), 3);
    // A burst of nothing else ends too.
    for _ in 0..BURST + 8 {
        assert!(w.rx.driver.send(&runt[..5], 1, false));
    }
    for _ in 0..2 {
        let mut out = Burst::new();
        w.rx.queue.burst(&mut out);
        assert!(out.is_empty());
    }
    assert_eq!(w.rx.driver.reap().len(), BURST + 8);
    assert_eq!(w.rx.control.broken(), None);
}

#[test]
fn a_closed_ring_touches_nothing() {
    let mut w = World::new(VERSION_1);
    let mut b = vec![0; 12];
    b.extend(frame(1, 60));
    assert!(w.rx.driver.send(&b, 1, false));
    let buffer = (w.tx.driver.alloc(2000), 2000);
    w.tx.driver.add(&[buffer], true, false);
    let f = frame(1, 60);
    let mut out = Burst::new();
    w.rx.queue.burst(&mut out);
    assert_eq!(out.len(), 1);
    drop(out);
    assert!(w.rx.control.swap(None));
    assert!(w.tx.control.swap(None));
    w.rx.queue.release(1);
    assert!(w.rx.driver.reap().is_empty());
    assert_eq!(w.rx.control.next(), 0);
    let mut out = Burst::new();
    w.rx.queue.burst(&mut out);
    assert!(out.is_empty());
    drop(out);
    assert!(!w.rx.queue.arm());
    assert_eq!(
        w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f)),
        Sent::Down
    );
}

#[test]
fn a_packed_ring_signals_an_event_also_after_more_than_a_lap() {
    let mut w = World::new(VERSION_1 | EVENT_IDX | PACKED);
    let f = frame(1, 60);
    let send = |w: &mut World, n: u16| {
        for _ in 0..n {
            let buffer = (w.tx.driver.alloc(100), 100);
            w.tx.driver.add(&[buffer], true, false);
            let sent = w.tx.queue.send(&Frame::from_slice(VnetHdr::default(), &f));
            assert_eq!(sent, Sent::Yes);
        }
        w.tx.queue.flush();
    };
    let wait_for = |w: &World, pos: u16| {
        let word = u32::from(pos) | 2 << 16;
        w.memory.write(w.tx.driver.at[1], &word.to_le_bytes());
    };
    send(&mut w, NUM - 1);
    w.tx.driver.reap();
    w.tx.queue.settle();
    raised(&w.tx.call);
    // From the last slot on, more than a lap before anybody asks; the driver waits for what comes last.
    send(&mut w, NUM);
    w.tx.driver.reap();
    let last = w.tx.driver.avail_pos;
    send(&mut w, 1);
    wait_for(&w, last);
    w.tx.queue.settle();
    assert_eq!(raised(&w.tx.call), 1);
    // An event that lies ahead has not been passed.
    w.tx.driver.reap();
    let ahead = w.tx.driver.avail_pos + 5;
    send(&mut w, 1);
    wait_for(&w, ahead);
    w.tx.queue.settle();
    assert_eq!(raised(&w.tx.call), 0);
}

/// Whatever a guest chains: a worker looks at so many buffers of it, and no more.
#[test]
fn a_chain_without_an_end_is_left_after_so_many_buffers() {
    use super::super::ring::{Broken, CHAIN_MAX, Direction, Pieces, Pos, Ring};
    use super::driver::{INDIRECT_FLAG, NEXT};
    for (packed, indirect) in [(0, false), (0, true), (PACKED, false), (PACKED, true)] {
        let memory = Memory::new();
        let bits = VERSION_1 | INDIRECT | packed;
        let mut driver = Driver::new(&memory, NUM, 0x1000, 0x10_0000, bits);
        if indirect {
            for i in 0..2048 {
                driver.raw_in(0x10_0000, i, (0x20_0000, 1, NEXT), (i + 1) % 2048);
            }
            driver.raw(&[(0x10_0000, 2048 * 16, INDIRECT_FLAG)]);
        } else {
            driver.raw(&[(0x20_0000, 1, NEXT); NUM as usize]);
            if packed == 0 {
                driver.raw_in(driver.at[0], NUM - 1, (0x20_0000, 1, NEXT), 0);
            }
        }
        let live = live(&memory, &driver, &event(), None);
        let features = RingFeatures::new(bits);
        let mut pieces = Pieces::default();
        let found = match packed {
            0 => Split::new(&live, NUM, 0, &features).peek(Pos(0), Direction::Read, &mut pieces),
            _ => {
                let start = packed::START;
                let mut ring = Packed::new(&live, NUM, start, &features);
                ring.peek(Pos(start), Direction::Read, &mut pieces)
            }
        };
        assert_eq!(found.err(), Some(Broken::Chain));
        assert!(pieces.walked() <= CHAIN_MAX as usize);
    }
}

/// A driver of a split ring that asks for no signals: how it is shown what it has back (ADR-0025).
struct Polled(World);

impl Polled {
    fn new() -> Polled {
        let w = World::new(VERSION_1);
        let p = Polled(w);
        p.polls(true);
        p
    }

    fn polls(&self, yes: bool) {
        let w = &self.0;
        w.memory
            .write(w.rx.driver.at[1], &u16::from(yes).to_le_bytes());
    }

    /// Frames go as far as the burst.
    fn burst(&mut self, frames: usize) {
        for i in 0..frames {
            let mut sent = vec![0; 12];
            sent.extend(frame(i as u64, 60));
            assert!(self.0.rx.driver.send(&sent, 1, false));
        }
        let mut out = Burst::new();
        self.0.rx.queue.burst(&mut out);
        assert_eq!(out.len(), frames);
    }

    fn release(&mut self, frames: usize) {
        self.0.rx.queue.release(frames);
    }

    fn reaps(&mut self) -> usize {
        self.0.rx.driver.reap().len()
    }
}

#[test]
fn a_driver_that_polls_is_shown_its_buffers_a_burst_late() {
    let mut p = Polled::new();
    let lag = usize::from(NUM) / 8;
    p.burst(lag);
    p.release(lag);
    assert_eq!(p.reaps(), 0, "that many stay");
    p.burst(3);
    assert_eq!(p.reaps(), 3, "before as many more are taken");
    p.release(3);
    assert_eq!(p.reaps(), 0);
    p.burst(2 * lag);
    assert_eq!(p.reaps(), lag, "nothing stays where so many are under way");
    p.release(2 * lag);
    assert_eq!(p.reaps(), lag);
}

#[test]
fn a_driver_that_polls_has_all_back_when_nothing_more_comes() {
    let mut p = Polled::new();
    p.burst(5);
    p.release(5);
    let mut looks = 0;
    while p.reaps() == 0 {
        p.burst(0);
        looks += 1;
        assert!(looks < 10_000, "never");
    }
    assert!(looks > 100, "the next burst comes sooner: {looks}");
    // A frame that has no place is seen again and again.
    p.release(0);
    p.burst(6);
    p.release(5);
    let mut looks = 0;
    while p.reaps() == 0 {
        let mut out = Burst::new();
        p.0.rx.queue.burst(&mut out);
        assert_eq!(out.len(), 1);
        looks += 1;
        assert!(looks < 10_000, "never");
    }
    assert!(looks > 100, "{looks}");
    p.release(1);
    assert_eq!(p.reaps(), 0);
    while p.reaps() == 0 {
        p.burst(0);
    }
    // The count begins anew.
    p.burst(5);
    p.release(5);
    p.burst(0);
    assert_eq!(p.reaps(), 0);
}

#[test]
fn a_driver_that_polls_no_more_has_all_back_and_hears_of_it() {
    for arm in [false, true] {
        let mut p = Polled::new();
        p.burst(5);
        p.release(5);
        p.0.rx.queue.settle();
        p.polls(false);
        assert_eq!((p.reaps(), raised(&p.0.rx.call)), (0, 0));
        if arm {
            p.0.rx.queue.arm();
            assert_eq!(
                (p.reaps(), raised(&p.0.rx.call)),
                (5, 1),
                "who sleeps keeps nothing"
            );
        } else {
            p.burst(1);
            p.release(1);
            p.0.rx.queue.settle();
            assert_eq!((p.reaps(), raised(&p.0.rx.call)), (6, 1));
        }
    }
}

#[test]
fn a_queue_that_goes_shows_what_it_kept() {
    let mut p = Polled::new();
    p.burst(5);
    p.release(5);
    assert_eq!(p.reaps(), 0);
    drop(p.0.rx.queue);
    assert_eq!(p.0.rx.driver.reap().len(), 5);
}

#[test]
fn what_a_driver_puts_into_the_ring_again_it_has_read() {
    for bits in [VERSION_1, VERSION_1 | PACKED] {
        let mut w = World::new(bits);
        let f = frame(1, 60);
        let step = |w: &mut World, fills: usize, sends: usize| {
            for _ in 0..fills {
                let buffer = (w.tx.driver.alloc(2000), 2000);
                w.tx.driver.add(&[buffer], true, false).unwrap();
            }
            for _ in 0..sends {
                let f = Frame::from_slice(VnetHdr::default(), &f);
                assert_eq!(w.tx.queue.send(&f), Sent::Yes);
            }
            w.tx.queue.flush();
        };
        let num = usize::from(NUM);
        step(&mut w, num, 4);
        assert_eq!(w.tx.driver.reap().len(), 4);
        step(&mut w, 4, 1);
        let mark = w.tx.queue.mark().unwrap();
        assert!(!mark.tells);
        // As many as it could put in without having read the fifth one.
        step(&mut w, 0, num - 1);
        assert!(!w.tx.queue.has_read(&mark), "it has read four");
        w.tx.driver.reap();
        step(&mut w, 1, 1);
        assert!(w.tx.queue.has_read(&mark));
    }
}
