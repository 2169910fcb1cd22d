//! The ports on real devices, each test in a network namespace of its own. They need root and say so.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::tx::CREDIT;
use super::*;
use crate::port::kept::Kept;
use crate::port::offload::gso;
use crate::port::packet::{self, Fault, Opened, PortError};
use crate::port::{Burst, Frame, NeverReason, RxQueue, Sent, TxQueue, VnetHdr};
use crate::sys::{FrameBuf, frame_io, process, tun};

/// Runs a test on a thread in a fresh network namespace.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        process::own_network_namespace().expect("these tests need root (CAP_SYS_ADMIN)");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(args: &str) {
    let done = Command::new("ip").args(args.split(' ')).status();
    assert!(done.expect("run ip").success(), "ip {args}");
}

/// A broadcast Ethernet frame of `len` bytes with a number in it and an EtherType for experiments (IEEE 802, 9.2.3).
pub(super) fn numbered(n: u32, len: usize) -> Vec<u8> {
    let mut f = vec![0xff; 6];
    f.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    f.extend(n.to_be_bytes());
    f.extend((f.len()..len).map(|i| (i as u32 ^ n) as u8));
    f
}

pub(super) fn number(frame: &[u8]) -> Option<u32> {
    let rest = frame.strip_prefix(&[0xff; 6])?.get(6..)?;
    let n = rest.strip_prefix(&[0x88, 0xb5])?.first_chunk()?;
    Some(u32::from_be_bytes(*n))
}

/// A TCP segment over IPv4 with `payload` bytes, asking for segmentation at `mss` bytes.
fn tso(payload: usize, mss: u16) -> (VnetHdr, Vec<u8>) {
    let mut f = vec![0xff; 6];
    f.extend([2, 0, 0, 0, 0, 1, 0x08, 0x00]);
    let total = (40 + payload) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = ones(&ip, 0);
    ip[10..12].copy_from_slice(&(!sum).to_be_bytes());
    let pseudo = ones(&ip[12..20], 6 + u32::from(total - 20));
    f.extend(&ip);
    f.extend([
        0x10, 0x00, 0x20, 0x00, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff,
    ]);
    // With NEEDS_CSUM the field holds the sum of the pseudo header.
    f.extend(pseudo.to_be_bytes());
    f.extend([0, 0]);
    f.extend((0..payload).map(|i| (i * 7) as u8));
    let mut vnet = VnetHdr([1, 1, 54, 0, 0, 0, 34, 0, 16, 0]);
    vnet.0[4..6].copy_from_slice(&mss.to_le_bytes());
    (vnet, f)
}

/// Datagrams over IPv4 with `payload` bytes together, to be cut at `size` bytes.
fn uso(payload: usize, size: u16) -> (VnetHdr, Vec<u8>) {
    let (_, tcp) = tso(payload, size);
    let mut f = tcp[..34].to_vec();
    let total = (28 + payload) as u16;
    f[16..18].copy_from_slice(&total.to_be_bytes());
    f[23] = 17;
    f[24..26].fill(0);
    let sum = !ones(&f[14..34], 0);
    f[24..26].copy_from_slice(&sum.to_be_bytes());
    let pseudo = ones(&f[26..34], 17 + u32::from(total - 20));
    f.extend([0x10, 0x00, 0x20, 0x00]);
    f.extend((total - 20).to_be_bytes());
    f.extend(pseudo.to_be_bytes());
    f.extend(&tcp[54..]);
    let [lo, hi] = size.to_le_bytes();
    (VnetHdr([1, gso::UDP_L4, 42, 0, lo, hi, 34, 0, 6, 0]), f)
}

/// Whether this kernel knows bursts of datagrams (Linux 6.2).
fn has_uso() -> bool {
    let fd = tun::open_tap("probe", false).expect("TAP");
    let has = tun::set_offloads(fd.as_fd(), tun::OFFLOADS | tun::USO).is_ok();
    if !has {
        eprintln!("this kernel knows no USO: only the way around it is tested");
    }
    has
}

/// The payload of datagrams of at most `size` bytes of it, each complete.
fn datagrams(got: &[Copied], size: usize) -> Vec<u8> {
    let mut payload = Vec::new();
    for (v, f) in got {
        assert_eq!((v.gso_type(), v.flags() & VnetHdr::F_NEEDS_CSUM), (0, 0));
        assert!(f.len() <= 42 + size);
        let udp = (f.len() - 34) as u32;
        assert_eq!(
            ones(&f[34..], u32::from(ones(&f[26..34], 17 + udp))),
            0xffff
        );
        payload.extend(&f[42..]);
    }
    payload
}

fn ones(bytes: &[u8], start: u32) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)));
    let mut sum: u32 = start + words.sum::<u32>();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

pub(super) fn send(tx: &mut dyn TxQueue, vnet: VnetHdr, frame: &[u8]) -> Sent {
    let sent = tx.send(&Frame::from_slice(vnet, frame));
    tx.flush();
    sent
}

type Copied = (VnetHdr, Vec<u8>);

/// The frames of the next burst, which stay unreleased.
fn peek(rx: &mut dyn RxQueue) -> Vec<Copied> {
    let mut burst = Burst::new();
    rx.burst(&mut burst);
    let copy = |f: &Frame<'_>| {
        let mut bytes = vec![0; f.len as usize];
        f.copy_to(&mut bytes);
        (f.vnet, bytes)
    };
    burst.iter().map(copy).collect()
}

/// Receives until `enough` of what `wanted` picks have come (or 5 s are over).
fn receive(rx: &mut dyn RxQueue, enough: usize, wanted: fn(&[u8]) -> bool) -> Vec<Copied> {
    let end = Instant::now() + Duration::from_secs(5);
    let mut got = Vec::new();
    while got.len() < enough && Instant::now() < end {
        let frames = peek(rx);
        rx.release(frames.len());
        got.extend(frames.into_iter().filter(|f| wanted(&f.1)));
    }
    got
}

fn is_numbered(f: &[u8]) -> bool {
    number(f).is_some()
}

fn is_udp(f: &[u8]) -> bool {
    f.get(12..14) == Some(&[8, 0]) && f.get(23) == Some(&17)
}

fn is_tcp(f: &[u8]) -> bool {
    f.get(12..14) == Some(&[8, 0]) && f.get(23) == Some(&6)
}

/// An endpoint and an uplink on the two sides of one TAP.
fn pair() -> (Opened, Opened) {
    let endpoint = open_endpoint("t0").expect("endpoint");
    let uplink = packet::open("t0", &Kept::default()).expect("uplink");
    (endpoint, uplink)
}

/// A VM's TAP and a reader as QEMU is one.
fn vm() -> (Arc<VmTap>, Opened, OwnedFd) {
    let tap = VmTap::create("v0").expect("create");
    let qemu = tun::open_tap("v0", false).expect("open as QEMU does");
    tun::set_offloads(qemu.as_fd(), tun::OFFLOADS).expect("offloads");
    tap.adopt(std::process::id(), 1).expect("adopt");
    let queues = tap.queues(&Kept::default()).expect("queues");
    (tap, queues, qemu)
}

fn read(fd: &OwnedFd) -> Option<Copied> {
    let mut buf = FrameBuf::default();
    frame_io::read_frame(fd.as_fd(), &mut buf).ok()?;
    Some((buf.vnet(), buf.bytes().to_vec()))
}

#[test]
fn frames_cross_a_tap_in_both_directions_byte_for_byte() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        for len in [18, 60, 127, 128, 129, 1000, 1514] {
            let frame = numbered(len as u32, len);
            assert_eq!(send(&mut *e.tx, VnetHdr::default(), &frame), Sent::Yes);
            let got = receive(&mut *u.rx, 1, is_numbered);
            assert_eq!(got[0].1, frame);
            assert_eq!(send(&mut *u.tx, VnetHdr::default(), &frame), Sent::Yes);
            let got = receive(&mut *e.rx, 1, is_numbered);
            assert_eq!(got[0].1, frame);
            assert_eq!(got[0].0, VnetHdr::default());
        }
        assert_eq!((e.health.fault(), u.health.fault()), (None, None));
        assert_eq!(u.rx.errors().overrun, 0);
    });
}

#[test]
fn a_segmentation_request_passes_whole_in_both_directions() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        for payload in [10_000, 65_535 - 40] {
            let (vnet, frame) = tso(payload, 1448);
            assert_eq!(send(&mut *e.tx, vnet, &frame), Sent::Yes);
            let got = receive(&mut *u.rx, 1, is_tcp);
            assert_eq!(got[0].0, vnet);
            assert_eq!(got[0].1, frame);
        }
        let (vnet, frame) = tso(10_000, 1448);
        assert_eq!(send(&mut *u.tx, vnet, &frame), Sent::Yes);
        let got = receive(&mut *e.rx, 1, is_tcp);
        assert_eq!(got[0].0, vnet);
        assert_eq!(got[0].1, frame);
    });
}

#[test]
fn a_burst_of_datagrams_passes_whole_in_both_directions() {
    in_namespace(|| {
        let uso_here = has_uso();
        let (mut e, mut u) = pair();
        for payload in [5000, 60_000] {
            let (vnet, frame) = uso(payload, 1400);
            let pieces = payload.div_ceil(1400);
            assert_eq!(send(&mut *e.tx, vnet, &frame), Sent::Yes);
            let want = if uso_here { 1 } else { pieces };
            let got = receive(&mut *u.rx, want, is_udp);
            if uso_here {
                assert_eq!(got, [(vnet, frame.clone())]);
            } else {
                assert_eq!(datagrams(&got, 1400), frame[42..]);
            }
            assert_eq!(send(&mut *u.tx, vnet, &frame), Sent::Yes);
            let got = receive(&mut *e.rx, want, is_udp);
            if uso_here {
                assert_eq!(got, [(vnet, frame)]);
            } else {
                assert_eq!(datagrams(&got, 1400), frame[42..]);
            }
        }
    });
}

/// As QEMU before 8.2 is one.
#[test]
fn a_reader_without_uso_gets_datagrams() {
    in_namespace(|| {
        let (tap, mut q, qemu) = vm();
        tun::set_offloads(qemu.as_fd(), 0).expect("offloads");
        let (vnet, frame) = uso(10_000, 1400);
        for _ in 0..3 {
            assert_eq!(send(&mut *q.tx, vnet, &frame), Sent::Yes);
            let back = tap.read_back(usize::MAX).expect("read back");
            assert_eq!(back.len(), 8);
            assert_eq!(datagrams(&back, 1400), frame[42..]);
        }
    });
}

#[test]
fn a_frame_gathered_from_pieces_arrives_whole() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        let bytes = numbered(1, 1500);
        let (head, rest) = bytes.split_at(crate::port::HEAD);
        let rest: Vec<_> = rest.chunks(100).map(crate::mem::Seg::from_slice).collect();
        let frame = Frame::new(VnetHdr::default(), bytes.len() as u32, head, &rest);
        assert_eq!(u.tx.send(&frame), Sent::Yes);
        assert_eq!(receive(&mut *e.rx, 1, is_numbered)[0].1, bytes);
        assert_eq!(e.tx.send(&frame), Sent::Yes);
        assert_eq!(receive(&mut *u.rx, 1, is_numbered)[0].1, bytes);
    });
}

#[test]
fn what_is_not_released_comes_again_with_what_is_new() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        let Opened { rx, tx, .. } = &mut e;
        let sides: [(&mut dyn TxQueue, &mut dyn RxQueue); 2] =
            [(&mut **tx, &mut *u.rx), (&mut *u.tx, &mut **rx)];
        for (tx, rx) in sides {
            for n in 0..50 {
                assert_eq!(send(tx, VnetHdr::default(), &numbered(n, 60)), Sent::Yes);
            }
            let mut numbers = Vec::new();
            let mut last: Vec<Copied> = Vec::new();
            for round in 0..1000 {
                let now = peek(rx);
                assert!(
                    now.starts_with(&last),
                    "the rest of the last burst comes first"
                );
                let release = now.len().min(round % 8);
                rx.release(release);
                numbers.extend(now[..release].iter().filter_map(|f| number(&f.1)));
                last = now[release..].to_vec();
            }
            assert_eq!(numbers, (0..50).collect::<Vec<_>>());
        }
    });
}

#[test]
fn a_vlan_tag_that_the_kernel_takes_off_is_put_back() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        let mut frame = numbered(7, 100);
        frame.splice(12..12, [0x81, 0x00, 0x60, 0x2a]);
        assert_eq!(send(&mut *e.tx, VnetHdr::default(), &frame), Sent::Yes);
        let got = receive(&mut *u.rx, 1, |f| f.get(12..14) == Some(&[0x81, 0]));
        assert_eq!(got[0].1, frame);
        assert_eq!(send(&mut *u.tx, VnetHdr::default(), &frame), Sent::Yes);
        let got = receive(&mut *e.rx, 1, |f| f.get(12..14) == Some(&[0x81, 0]));
        assert_eq!(got[0].1, frame);
    });
}

#[test]
fn a_frame_above_the_mtu_is_refused_for_good() {
    in_namespace(|| {
        let (_e, mut u) = pair();
        let long = numbered(1, 1514 + 100);
        let sent = send(&mut *u.tx, VnetHdr::default(), &long);
        assert_eq!(sent, Sent::Never(NeverReason::TooLong));
        let bad_header = VnetHdr([1, 1, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        let sent = send(&mut *u.tx, bad_header, &numbered(1, 60));
        assert_eq!(sent, Sent::Never(NeverReason::Refused));
    });
}

#[test]
fn a_device_that_goes_down_and_up_works_again() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        let frame = numbered(1, 60);
        ip("link set t0 down");
        assert_eq!(send(&mut *u.tx, VnetHdr::default(), &frame), Sent::Down);
        assert_eq!(send(&mut *e.tx, VnetHdr::default(), &frame), Sent::Down);
        assert!(peek(&mut *u.rx).is_empty());
        assert_eq!(
            (u.health.fault(), e.health.fault()),
            (Some(Fault::Down), Some(Fault::Down))
        );
        ip("link set t0 up");
        assert_eq!(send(&mut *u.tx, VnetHdr::default(), &frame), Sent::Yes);
        assert_eq!(receive(&mut *e.rx, 1, is_numbered).len(), 1);
        assert_eq!(send(&mut *e.tx, VnetHdr::default(), &frame), Sent::Yes);
        assert_eq!(receive(&mut *u.rx, 1, is_numbered).len(), 1);
        assert_eq!((u.health.fault(), e.health.fault()), (None, None));
    });
}

#[test]
fn a_device_deleted_under_load_is_down_and_nothing_panics() {
    in_namespace(|| {
        let (mut e, mut u) = pair();
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&stop);
        let load = std::thread::spawn(move || {
            let mut answers = (Sent::Full, Sent::Full);
            let end = Instant::now() + Duration::from_secs(20);
            while !done.load(Ordering::Relaxed) || answers != (Sent::Down, Sent::Down) {
                assert!(Instant::now() < end, "not down: {answers:?}");
                answers.0 = send(&mut *u.tx, VnetHdr::default(), &numbered(1, 60));
                answers.1 = send(&mut *e.tx, VnetHdr::default(), &numbered(2, 60));
                let n = peek(&mut *u.rx).len();
                u.rx.release(n);
                let n = peek(&mut *e.rx).len();
                e.rx.release(n);
            }
            (u.health.fault(), e.health.fault())
        });
        std::thread::sleep(Duration::from_millis(100));
        ip("link del t0");
        stop.store(true, Ordering::Relaxed);
        let faults = load.join().expect("no panic");
        assert_eq!(faults, (Some(Fault::Gone), Some(Fault::Gone)));
    });
}

#[test]
fn opening_says_whose_fault_it_is() {
    in_namespace(|| {
        let no = |r: Result<Opened, PortError>| r.err().expect("must fail");
        assert!(matches!(
            no(packet::open("nosuch", &Kept::default())),
            PortError::NoDevice { .. }
        ));
        assert!(packet::open("a name that is too long", &Kept::default()).is_err());
        let _first = open_endpoint("t0").expect("endpoint");
        assert!(matches!(
            open_endpoint("t0").err(),
            Some(PortError::Busy { .. })
        ));
        ip("link add d0 type veth peer name d1");
        assert!(matches!(VmTap::create("d0"), Err(TapError::NoTap { .. })));
    });
}

/// A keeper, for as long as the tests last, in a folder of its own.
fn keeper(dir: &std::path::Path) {
    let dir = dir.to_owned();
    let socket = dir.join(gangway_keeper::devices::FILE);
    std::thread::spawn(move || gangway_keeper::devices::serve(&dir));
    let until = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(Instant::now() < until, "no keeper");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn numbers(rx: &mut dyn RxQueue, n: usize) -> Vec<u32> {
    let got = receive(rx, n, is_numbered);
    got.iter().filter_map(|(_, f)| number(f)).collect()
}

#[test]
fn what_comes_while_no_switch_runs_waits_in_kept_sockets() {
    in_namespace(|| {
        let dir = tempfile::tempdir().expect("a folder");
        let start = |device: &str| {
            let kept = Kept::new(Some(dir.path()));
            let opened = packet::open(device, &kept).expect("uplink");
            kept.done();
            (kept, opened)
        };
        let frame = |n| numbered(n, 60);
        let plain = VnetHdr::default();
        let mut e = open_endpoint("t0").expect("endpoint");
        // The keeper comes later than the switch.
        let (kept, mut u) = start("t0");
        keeper(dir.path());
        kept.look();
        assert_eq!(send(&mut *e.tx, plain, &frame(1)), Sent::Yes);
        assert_eq!(numbers(&mut *u.rx, 1), [1]);
        // The switch dies; twice.
        drop((kept, u));
        for n in 2..=100 {
            assert_eq!(send(&mut *e.tx, plain, &frame(n)), Sent::Yes);
        }
        let (kept, mut u) = start("t0");
        let first = numbers(&mut *u.rx, 40);
        drop((kept, u));
        let (kept, mut u) = start("t0");
        let rest = numbers(&mut *u.rx, 99 - first.len());
        assert!(!rest.is_empty(), "{first:?}");
        assert_eq!([first, rest].concat(), (2..=100).collect::<Vec<_>>());
        drop((kept, u));
        // Another device of the same name: nothing of the old one.
        assert_eq!(send(&mut *e.tx, plain, &frame(200)), Sent::Yes);
        drop(e);
        let mut e = open_endpoint("t0").expect("endpoint");
        let (kept, mut u) = start("t0");
        assert_eq!(send(&mut *e.tx, plain, &frame(201)), Sent::Yes);
        assert_eq!(numbers(&mut *u.rx, 1), [201]);
        drop((kept, u));

        // A VM's: what its QEMU gives to the kernel meanwhile.
        let tap = VmTap::create("v0").expect("create");
        let qemu = tun::open_tap("v0", false).expect("open as QEMU does");
        let kept = Kept::new(Some(dir.path()));
        drop((tap.queues(&kept).expect("queues"), kept, tap));
        for n in 1..=40 {
            let bytes = frame(n);
            let frame = Frame::from_slice(plain, &bytes);
            frame_io::write_frame(qemu.as_fd(), &frame).expect("as QEMU does");
        }
        let tap = VmTap::create("v0").expect("it is adopted");
        let kept = Kept::new(Some(dir.path()));
        let mut q = tap.queues(&kept).expect("queues");
        assert_eq!(numbers(&mut *q.rx, 40), (1..=40).collect::<Vec<_>>());
        tap.delete().expect("delete");
    });
}

#[test]
fn several_queues_of_an_endpoint_share_the_flows() {
    in_namespace(|| {
        let mut e = open_endpoint_queues("t0", 2).expect("endpoint");
        let mut u = packet::open("t0", &Kept::default()).expect("uplink");
        let (vnet, mut frame) = tso(100, 1448);
        for port in 0..64 {
            frame[35] = port;
            assert_eq!(send(&mut *e.tx, vnet, &frame), Sent::Yes);
        }
        assert_eq!(receive(&mut *u.rx, 64, is_tcp).len(), 64);
        for _ in 0..64 {
            assert_eq!(
                send(&mut *u.tx, VnetHdr::default(), &numbered(1, 60)),
                Sent::Yes
            );
        }
        let mut got = 0;
        for rx in &mut e.rx {
            for _ in 0..10 {
                let frames = peek(&mut **rx);
                rx.release(frames.len());
                got += frames.iter().filter(|f| is_numbered(&f.1)).count();
            }
        }
        assert_eq!(got, 64);
    });
}

#[test]
fn without_a_reader_a_vm_tap_is_down() {
    in_namespace(|| {
        let tap = VmTap::create("v0").expect("create");
        let mut q = tap.queues(&Kept::default()).expect("queues");
        let frame = numbered(1, 60);
        assert_eq!(send(&mut *q.tx, VnetHdr::default(), &frame), Sent::Down);
        assert_eq!(q.health.fault(), Some(Fault::NoReader));
        assert!(matches!(
            tap.adopt(std::process::id(), 1),
            Err(TapError::NotTheReader { .. })
        ));
        assert!(matches!(
            tap.read_back(usize::MAX),
            Err(TapError::NoReader { .. })
        ));

        let qemu = tun::open_tap("v0", false).expect("open");
        tap.adopt(std::process::id(), 1).expect("adopt");
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(send(&mut *q.tx, VnetHdr::default(), &frame), Sent::Yes);
        assert_eq!(q.health.fault(), None);
        assert_eq!(read(&qemu).expect("frame").1, frame);

        // QEMU ends: while we keep the duplicate the kernel would queue for nobody; without it the port is down.
        drop(qemu);
        tap.release_dup();
        assert_eq!(send(&mut *q.tx, VnetHdr::default(), &frame), Sent::Down);
        tap.delete().expect("delete");
        assert_eq!(send(&mut *q.tx, VnetHdr::default(), &frame), Sent::Down);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(send(&mut *q.tx, VnetHdr::default(), &frame), Sent::Down);
        assert_eq!(q.health.fault(), Some(Fault::Gone));
        tap.delete().expect("twice is fine");
    });
}

#[test]
fn read_back_returns_what_was_queued_in_order() {
    in_namespace(|| {
        for hdr_len in [10, 12] {
            let (tap, mut q, qemu) = vm();
            tun::set_vnet_hdr_len(qemu.as_fd(), hdr_len).expect("header");
            assert_eq!(tap.queue_empty(), Some(true));
            let (vnet, big) = tso(10_000, 1448);
            let mut want = Vec::new();
            for n in 0..400 {
                want.push((VnetHdr::default(), numbered(n, 60 + n as usize)));
            }
            want.push((vnet, big));
            for (vnet, frame) in &want {
                assert_eq!(send(&mut *q.tx, *vnet, frame), Sent::Yes);
            }
            assert_eq!(tap.queue_empty(), Some(false));
            assert!(!tap.wait_empty(Duration::from_millis(5)));
            assert_eq!(tap.read_back(usize::MAX).expect("read back"), want);
            assert_eq!(tap.queue_empty(), Some(true));
            assert!(tap.wait_empty(Duration::ZERO));
            assert_eq!(tap.read_back(usize::MAX).expect("nothing"), []);
            tap.delete().expect("delete");
        }
    });
}

/// QEMU has read some of what was sent; the last two of them go before what waits, and marks are nobody's.
#[test]
fn what_a_reader_has_taken_last_is_remembered() {
    in_namespace(|| {
        let (tap, mut q, qemu) = vm();
        // The guest takes no TSO: the kernel would cut what nobody could remember.
        tun::set_offloads(qemu.as_fd(), libc::TUN_F_CSUM).expect("offloads");
        tap.remember();
        let (vnet, mut big) = tso(10_000, 1448);
        for n in 0..3 {
            let sent = send(&mut *q.tx, VnetHdr::default(), &numbered(n, 60));
            assert_eq!(sent, Sent::Yes);
            big[54..].fill(n as u8);
            assert_eq!(send(&mut *q.tx, vnet, &big), Sent::Yes);
        }
        tap.mark().expect("marks");
        assert!(!tap.wait_empty(Duration::from_millis(5)));
        // Each big one is seven: three numbered ones and twelve of those.
        let taken: Vec<_> = (0..15).filter_map(|_| read(&qemu)).collect();
        let (mut before, mut queued) = (Vec::new(), 0);
        while let Some(back) = tap.take_back().expect("take back") {
            before.extend(back.taken);
            queued += usize::from(back.queued.is_some());
        }
        assert_eq!(before, taken[13..]);
        assert_eq!(queued, 24 - 15);
        assert_eq!(tap.queue_empty(), Some(true));
    });
}

/// Sends `count` numbered frames, as often as it takes, to a reader that sleeps now and then; all must arrive in order.
fn slow_reader_gets_all(count: u32, adopt: bool) -> u64 {
    let (tap, mut q, qemu) = vm();
    if !adopt {
        tap.release_dup();
    }
    let reader = std::thread::spawn(move || {
        let mut next = 0;
        let end = Instant::now() + Duration::from_secs(30);
        while next < count && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
            for _ in 0..97 {
                let Some((_, frame)) = read(&qemu) else { break };
                if let Some(n) = number(&frame) {
                    assert_eq!(n, next, "lost or out of order");
                    next += 1;
                }
            }
        }
        next
    });
    let mut full = 0;
    for n in 0..count {
        let frame = numbered(n, 60);
        loop {
            match send(&mut *q.tx, VnetHdr::default(), &frame) {
                Sent::Yes => break,
                Sent::Full => full += 1,
                other => panic!("{other:?}"),
            }
            std::thread::yield_now();
        }
    }
    assert_eq!(reader.join().expect("reader"), count);
    full
}

#[test]
fn credit_loses_nothing_with_a_slow_reader() {
    in_namespace(|| assert!(slow_reader_gets_all(10_000, true) > 0));
}

#[test]
fn without_a_duplicate_the_driver_alone_loses_nothing() {
    in_namespace(|| assert!(slow_reader_gets_all(10_000, false) > 0));
}

/// QEMU closes descriptors whenever it likes, also one that was this TAP's when it was looked at.
#[test]
fn a_reader_is_found_beside_descriptors_that_come_and_go() {
    in_namespace(|| {
        let (tap, _q, qemu) = vm();
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    drop(qemu.try_clone().expect("a descriptor more"));
                }
            });
            let all: Result<Vec<()>, _> = (0..2000)
                .map(|_| {
                    tap.release_dup();
                    tap.adopt(std::process::id(), 1)
                })
                .collect();
            done.store(true, Ordering::Relaxed);
            all.expect("adopt");
        });
    });
}

#[test]
fn a_reader_that_stands_still_gets_no_more_than_the_credit() {
    in_namespace(|| {
        let (tap, mut q, _qemu) = vm();
        let answers: Vec<Sent> = (0..CREDIT + 100)
            .map(|n| send(&mut *q.tx, VnetHdr::default(), &numbered(n, 60)))
            .collect();
        let yes = answers.iter().filter(|s| **s == Sent::Yes).count();
        assert!(answers[yes..].iter().all(|s| *s == Sent::Full));
        assert_eq!(yes, CREDIT as usize);
        assert_eq!(tap.read_back(usize::MAX).expect("read back").len(), yes);
    });
}

#[test]
fn a_guest_without_tso_gets_segments() {
    in_namespace(|| {
        let (tap, mut q, qemu) = vm();
        tun::set_offloads(qemu.as_fd(), 0).expect("offloads");
        let (vnet, frame) = tso(10_000, 1448);
        for _ in 0..3 {
            assert_eq!(send(&mut *q.tx, vnet, &frame), Sent::Yes);
            let back = tap.read_back(usize::MAX).expect("read back");
            assert_eq!(back.len(), 7);
            let mut payload = Vec::<u8>::new();
            for (v, f) in &back {
                assert_eq!((v.gso_type(), v.flags() & VnetHdr::F_NEEDS_CSUM), (0, 0));
                assert!(f.len() <= 1514);
                // The sum over the pseudo header and the segment, checksum included, is all ones.
                let tcp = (f.len() - 34) as u32;
                assert_eq!(ones(&f[34..], u32::from(ones(&f[26..34], 6 + tcp))), 0xffff);
                payload.extend(&f[54..]);
            }
            assert_eq!(payload, frame[54..]);
        }
        tap.release_dup();
        let refused = Sent::Never(NeverReason::Offload);
        assert_eq!(send(&mut *q.tx, vnet, &frame), refused);
        // Checksums alone the kernel fills in on the way.
        let (mut vnet, frame) = tso(500, 0);
        vnet.0[1] = 0;
        assert_eq!(send(&mut *q.tx, vnet, &frame), Sent::Yes);
        let (v, f) = std::iter::from_fn(|| read(&qemu))
            .find(|f| is_tcp(&f.1))
            .expect("frame");
        assert_eq!(v.flags() & VnetHdr::F_NEEDS_CSUM, 0);
        assert_eq!(ones(&f[34..], u32::from(ones(&f[26..34], 6 + 520))), 0xffff);
    });
}

#[test]
fn what_the_vm_sends_comes_in_and_the_host_keeps_out() {
    in_namespace(|| {
        let (tap, mut q, qemu) = vm();
        ip("link set lo up");
        ip("address add 10.9.9.9/32 dev lo");
        // Who has 10.9.9.9? A host that takes part would answer.
        let mut arp = vec![0xff; 6];
        arp.extend([
            2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 9, 9, 1,
        ]);
        arp.extend([0, 0, 0, 0, 0, 0, 10, 9, 9, 9]);
        let (vnet, big) = tso(20_000, 1448);
        frame_io::write_parts(qemu.as_fd(), &VnetHdr::default(), &arp).expect("write");
        frame_io::write_parts(qemu.as_fd(), &vnet, &big).expect("write");
        let got = receive(&mut *q.rx, 2, |_| true);
        assert_eq!(got, [(VnetHdr::default(), arp), (vnet, big)]);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(
            tap.read_back(usize::MAX).expect("read back"),
            [],
            "the host has answered"
        );
    });
}

#[test]
fn an_existing_tap_is_adopted_and_not_deleted_unless_claimed() {
    in_namespace(|| {
        ip("tuntap add dev v0 mode tap vnet_hdr");
        let tap = VmTap::create("v0").expect("create");
        assert!(!tap.created());
        tap.delete().expect("nothing");
        assert!(tap.carrier().is_ok());
        let qemu = tun::open_tap("v0", false).expect("open");
        let again = VmTap::create("v0").expect("while QEMU has it");
        again.claim();
        assert!(matches!(again.delete(), Err(TapError::InUse { .. })));
        again.adopt(std::process::id(), 1).expect("adopt");
        again.delete().expect("goes with QEMU");
        assert!(tap.carrier().is_ok());
        drop(qemu);
        assert!(tap.carrier().is_err());
    });
}
