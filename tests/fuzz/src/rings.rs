//! A guest that writes what it likes into its memory, and rings that are served meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use gangway_switch::mem::guest::{GuestMem, Region};
use gangway_switch::port::vhost::dirty::DirtyLog;
use gangway_switch::port::vhost::features::{OFFERED, RING_PACKED, RingFeatures};
use gangway_switch::port::vhost::live::{Areas, Control, Gate, Live};
use gangway_switch::port::vhost::position::Position;
use gangway_switch::port::vhost::ring::Ring;
use gangway_switch::port::vhost::ring::packed::Packed;
use gangway_switch::port::vhost::ring::split::Split;
use gangway_switch::port::vhost::rx::Rx;
use gangway_switch::port::vhost::tx::Tx;
use gangway_switch::port::{BURST, Burst, FRAME_MAX, FRAME_MIN, Frame, RxQueue, TxQueue, VnetHdr};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::input::Input;

/// Two regions, neither of which ends with a page of the file.
const LOW: u64 = 0xfff8;
const HIGH: u64 = 0x7ffc;
const HIGH_GPA: u64 = 1 << 32;
const HIGH_AT: u64 = 0x1_0000;
const FILE: u64 = 0x1_9000;
const UVA: u64 = 0x7f00_0000_0000;
/// Descriptors; driver's, device's area. The second ring's are as far behind it.
const RINGS: [u64; 3] = [0x1000, 0x2000, 0x2800];
const NEXT_RING: u64 = 0x3000;
const BUFFERS: u64 = 0x8000;
const CANARY: [u8; 4] = [0xa5; 4];

struct Guest {
    file: File,
    mem: Arc<GuestMem>,
    packed: bool,
    num: u16,
    /// The split rings' available indices, or the packed rings' positions.
    at: [u16; 2],
}

impl Guest {
    fn new(packed: bool, num: u16) -> Guest {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(FILE).expect("its size");
        for at in [LOW, HIGH_AT + HIGH, FILE - 4] {
            file.write_all_at(&CANARY, at).expect("in the file");
        }
        let low = Region::map(0, LOW, UVA, &file, 0).expect("mapped");
        let high = Region::map(HIGH_GPA, HIGH, UVA + LOW, &file, HIGH_AT).expect("mapped");
        let mem = Arc::new(GuestMem::new(vec![low, high]).expect("a table"));
        let at = if packed { [1 << 15; 2] } else { [0; 2] };
        Guest {
            file,
            mem,
            packed,
            num,
            at,
        }
    }

    /// As much as lies in guest memory.
    fn write(&self, gpa: u64, bytes: &[u8]) {
        let (offset, room) = match gpa {
            0..LOW => (gpa, LOW - gpa),
            HIGH_GPA.. if gpa - HIGH_GPA < HIGH => {
                (gpa - HIGH_GPA + HIGH_AT, HIGH + HIGH_GPA - gpa)
            }
            _ => return,
        };
        let n = bytes.len().min(room as usize);
        self.file
            .write_all_at(&bytes[..n], offset)
            .expect("in the file");
    }

    fn area(ring: usize, n: usize) -> u64 {
        RINGS[n] + ring as u64 * NEXT_RING
    }

    fn areas(&self, ring: usize) -> Areas {
        let [d, a, u] = [0, 1, 2].map(|n| UVA + Guest::area(ring, n));
        let found = match self.packed {
            true => Packed::areas(&self.mem, self.num, d, a, u),
            false => Split::areas(&self.mem, self.num, d, a, u),
        };
        found.expect("they lie in guest memory")
    }

    /// A descriptor, wherever; and in a split ring it is offered.
    fn offer(&mut self, ring: usize, input: &mut Input<'_>) {
        let (kind, slot) = (input.u8(), input.u8());
        let addr = match kind & 7 {
            0 | 1 => BUFFERS + u64::from(input.u16() & 0x3fff),
            2 => HIGH_GPA + u64::from(input.u16()),
            3 => LOW - u64::from(input.u8()),
            4 => Guest::area(ring, 0) + u64::from(input.u16() & 0xff0),
            5 => BUFFERS,
            _ => input.u64(),
        };
        let len = match kind >> 3 & 7 {
            0 | 1 => u32::from(input.u16() & 0x7ff),
            2 => 16 * u32::from(input.u8()),
            3 => 0,
            4 => u32::from(input.u16()),
            5 => 1514 + 12,
            6 => 12,
            _ => input.u32(),
        };
        let flags = u16::from(input.u8());
        let mut d = addr.to_le_bytes().to_vec();
        d.extend(len.to_le_bytes());
        let table = Guest::area(ring, 0);
        if self.packed {
            let at = self.at[ring];
            let wrap = if at & 1 << 15 != 0 { 1 << 7 } else { 1 << 15 };
            d.extend(u16::from(slot).to_le_bytes());
            d.extend((flags & 7 | wrap).to_le_bytes());
            self.write(table + 16 * u64::from(at & 0x7fff), &d);
            self.at[ring] = match (at & 0x7fff) + 1 {
                n if n >= self.num => !at & 1 << 15,
                n => n | at & 1 << 15,
            };
            return;
        }
        let slot = u16::from(slot) % self.num;
        let next = if flags & 8 != 0 {
            input.u16()
        } else {
            slot + 1
        };
        d.extend((flags & 7).to_le_bytes());
        d.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(slot), &d);
        if flags & 16 == 0 {
            let place = u64::from(self.at[ring] % self.num);
            self.write(Guest::area(ring, 1) + 4 + 2 * place, &slot.to_le_bytes());
            self.at[ring] = self.at[ring].wrapping_add(1);
            self.write(Guest::area(ring, 1) + 2, &self.at[ring].to_le_bytes());
        }
    }
}

fn event() -> Arc<File> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Arc::new(File::from(eventfd(0, flags).expect("an eventfd")))
}

/// Bytes for frames.
static FRAME: [u8; FRAME_MAX] = [0x5a; FRAME_MAX];

/// A split ring each way.
pub fn split(data: &[u8]) {
    serve(data, false);
}

/// A packed ring each way.
pub fn packed(data: &[u8]) {
    serve(data, true);
}

fn serve(data: &[u8], packed: bool) {
    let mut input = Input(data);
    let bits = input.u64() & OFFERED & !RING_PACKED | if packed { RING_PACKED } else { 0 };
    let features = RingFeatures::new(bits | 1 << 32);
    let size = input.u8();
    let num = match packed {
        true => u16::from(size) % 200 + 1,
        false => 1 << (size % 8),
    };
    let mut guest = Guest::new(packed, num);
    let log = tempfile::tempfile().expect("a file");
    log.set_len(0x2_0000 + 16).expect("its size");
    let log = Arc::new(DirtyLog::new(&log, 0, 0x2_0000 + 16).expect("a log"));
    let short = DirtyLog::new(&guest.file, 0, 2).ok().map(Arc::new);

    let live = |guest: &Guest, ring: usize, how: u8| Live {
        mem: guest.mem.clone(),
        areas: guest.areas(ring),
        log: match how & 3 {
            0 | 1 => None,
            2 => Some(log.clone()),
            // Marks in pages 0 to 15 only; a mark is one in the guest's own first two bytes.
            _ => short.clone(),
        },
        used_log: (how & 4 != 0).then(|| Guest::area(ring, 2)),
        call: (how & 8 != 0).then(event),
    };
    let controls = [0, 1].map(|ring| {
        let how = input.u8();
        let start = match (packed, how & 16 != 0) {
            (false, false) => 0,
            (false, true) => input.u16(),
            (true, false) => 1 << 15,
            (true, true) => {
                let at = input.u16();
                ((at & 0x7fff) % num) | (at & (1 << 15))
            }
        };
        guest.at[ring] = start;
        if !packed {
            for n in [1, 2] {
                guest.write(Guest::area(ring, n) + 2, &start.to_le_bytes());
            }
        }
        Control::new(live(&guest, ring, how), start, event())
    });
    let [rx, tx] = controls
        .each_ref()
        .map(|c| (Gate::new(c.clone()), c.next()));
    let now = [0, 1].map(|ring| live(&guest, ring, 0));
    let (mut rx, mut tx): (Box<dyn RxQueue>, Box<dyn TxQueue>) = if packed {
        let [a, b] = [(0, rx.1), (1, tx.1)].map(|(r, at)| Packed::new(&now[r], num, at, &features));
        (receiver(a, rx, features), sender(b, tx, num, features))
    } else {
        let [a, b] = [(0, rx.1), (1, tx.1)].map(|(r, at)| Split::new(&now[r], num, at, &features));
        (receiver(a, rx, features), sender(b, tx, num, features))
    };

    let (mut shown, mut whole) = (0, true);
    while !input.is_empty() {
        let op = input.u8();
        let ring = usize::from(op >> 7);
        match op & 15 {
            0..4 => guest.offer(ring, &mut input),
            4 => {
                let at = u64::from(input.u16());
                let at = if op & 16 != 0 { HIGH_GPA + at } else { at };
                let n = input.u8();
                guest.write(at, input.take(usize::from(n)));
            }
            5 => guest.write(Guest::area(ring, 1) + 2, input.take(2)),
            6 | 7 => {
                let mut burst = Burst::new();
                rx.burst(&mut burst);
                assert!(burst.len() <= BURST);
                for frame in &burst {
                    let len = frame.len as usize;
                    assert!((FRAME_MIN..=FRAME_MAX).contains(&len));
                    let mut copy = vec![0; len];
                    frame.copy_to(&mut copy);
                    let v = frame.vnet;
                    let end = usize::from(v.csum_start()) + usize::from(v.csum_offset()) + 2;
                    assert!(v.flags() & VnetHdr::F_NEEDS_CSUM == 0 || end <= len);
                }
                if op & 16 != 0 {
                    tx.send_run(&burst);
                    tx.flush();
                }
                shown = burst.len();
            }
            8 => {
                let n = shown.min(usize::from(op >> 4) * 5);
                rx.release(n);
                shown -= n;
            }
            9 => {
                let len = usize::from(input.u16()).clamp(FRAME_MIN, FRAME_MAX);
                let mut bytes = FRAME[..len].to_vec();
                let head = input.take(usize::from(op >> 4) * 8);
                let n = head.len().min(len);
                bytes[..n].copy_from_slice(&head[..n]);
                let vnet = if op & 16 != 0 { input.vnet() } else { [0; 10] };
                tx.send(&Frame::from_slice(VnetHdr(vnet), &bytes));
            }
            10 => {
                let len = usize::from(input.u16() & 0x7ff).max(FRAME_MIN);
                let run: Vec<_> = (0..op >> 4)
                    .map(|_| Frame::from_slice(VnetHdr::default(), &FRAME[..len]))
                    .collect();
                tx.send_run(&run);
            }
            11 => tx.flush(),
            12 => {
                rx.settle();
                tx.settle();
            }
            13 => {
                rx.arm();
                rx.disarm();
            }
            14 => {
                // Within a burst of the sender it would wait for the end.
                tx.flush();
                let next = (op & 48 != 48).then(|| live(&guest, ring, input.u8()));
                assert!(controls[ring].swap(next), "no section is open");
            }
            _ if op & 16 != 0 => {
                // The front-end takes memory away.
                let len = 2 * u64::from(input.u16());
                guest.file.set_len(len.min(FILE)).expect("a size");
                whole = false;
            }
            _ => drop(rx.errors()),
        }
    }
    tx.flush();
    drop((rx, tx));
    for at in [LOW, HIGH_AT + HIGH, FILE - 4] {
        if !whole {
            break;
        }
        let mut now = [0; 4];
        guest.file.read_exact_at(&mut now, at).expect("in the file");
        assert_eq!(now, CANARY, "behind the guest's memory");
    }
}

fn receiver<R: Ring + 'static>(
    ring: R,
    (gate, next): (Gate, u16),
    features: RingFeatures,
) -> Box<dyn RxQueue> {
    Box::new(Rx::new(
        ring,
        gate,
        next,
        Some(event()),
        features,
        Position::unknown(),
    ))
}

fn sender<R: Ring + 'static>(
    ring: R,
    (gate, next): (Gate, u16),
    num: u16,
    features: RingFeatures,
) -> Box<dyn TxQueue> {
    Box::new(Tx::new(
        ring,
        gate,
        next,
        num,
        features,
        Position::unknown(),
    ))
}
