//! A guest's driver in plain memory, and what the rings must do with it.

mod adversary;
mod claims;
mod crash;
mod driver;
mod log;
mod model;
mod oracle;
mod pressure;
mod protocol;
mod rings;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::dirty::DirtyLog;
use super::features::RingFeatures;
use super::live::{Control, Gate, Live};
use super::position::Position;
use super::ring::packed::{self, Packed};
use super::ring::split::Split;
use super::rx::Rx;
use super::tx::Tx;
use crate::mem::guest::{GuestMem, Region};
use crate::port::{RxQueue, TxQueue};
use driver::Driver;

/// Two regions of one file, apart in guest memory.
const REGION: u64 = 4 << 20;
const HIGH: u64 = 1 << 32;
const UVA: u64 = 0x7f00_0000_0000;
/// Room for what a test logs: one bit per page up to the high region's end.
const LOG_BYTES: u64 = (HIGH + REGION) / 4096 / 8;

pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PACKED: u64 = super::features::RING_PACKED;
pub const MRG: u64 = 1 << 15;
pub const USO: u64 = 0b111 << 54;
pub const OFFLOADS: u64 = 0b11 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | USO;

/// The guest's memory, seen by the driver through the file: no mapping, no unsafe.
#[derive(Clone)]
pub struct Memory(pub Arc<File>);

impl Memory {
    fn new() -> Memory {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(2 * REGION).unwrap();
        Memory(Arc::new(file))
    }
    fn offset(gpa: u64) -> u64 {
        if gpa >= HIGH {
            gpa - HIGH + REGION
        } else {
            gpa
        }
    }
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, Self::offset(gpa)).unwrap();
    }
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.0.read_exact_at(&mut v, Self::offset(gpa)).unwrap();
        v
    }
    pub fn u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.read(gpa, 2).try_into().unwrap())
    }
    pub fn table(&self) -> GuestMem {
        let low = Region::map(0, REGION, UVA, &self.0, 0).unwrap();
        let high = Region::map(HIGH, REGION, UVA + REGION, &self.0, REGION).unwrap();
        GuestMem::new(vec![low, high]).unwrap()
    }
}

fn event() -> Arc<File> {
    use rustix::event::{EventfdFlags, eventfd};
    Arc::new(File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap()))
}

/// How often an eventfd was raised since the last look.
fn raised(fd: &File) -> u64 {
    let mut b = [0; 8];
    match rustix::io::read(fd, &mut b) {
        Ok(8) => u64::from_ne_bytes(b),
        _ => 0,
    }
}

/// One ring with both of its sides.
struct Side<Q> {
    driver: Driver,
    queue: Q,
    control: Arc<Control>,
    call: Arc<File>,
    alarm: Arc<File>,
}

struct World {
    memory: Memory,
    log_file: File,
    /// The guest transmits.
    rx: Side<Box<dyn RxQueue>>,
    /// The guest receives.
    tx: Side<Box<dyn TxQueue>>,
}

const NUM: u16 = 64;

fn live(memory: &Memory, driver: &Driver, call: &Arc<File>, log: Option<&File>) -> Live {
    let mem = Arc::new(memory.table());
    let [desc, avail, used] = driver.at.map(|gpa| UVA + Memory::offset(gpa));
    let areas = match driver.packed {
        true => Packed::areas(&mem, driver.num, desc, avail, used).unwrap(),
        false => Split::areas(&mem, driver.num, desc, avail, used).unwrap(),
    };
    Live {
        mem,
        areas,
        log: log.map(|f| Arc::new(DirtyLog::new(f, 0, LOG_BYTES).unwrap())),
        used_log: log.map(|_| driver.at[2]),
        call: Some(call.clone()),
    }
}

impl World {
    fn new(bits: u64) -> World {
        World::logged(bits, false)
    }

    fn logged(bits: u64, log: bool) -> World {
        let memory = Memory::new();
        let features = RingFeatures::new(bits);
        let log_file = tempfile::tempfile().unwrap();
        log_file.set_len(LOG_BYTES).unwrap();
        let packed = bits & PACKED != 0;
        let next = if packed { packed::START } else { 0 };
        let parts = |driver: &Driver| {
            let (call, alarm) = (event(), event());
            let live = live(&memory, driver, &call, log.then_some(&log_file));
            let control = Control::new(live.clone(), next, alarm.clone());
            (live, control, call, alarm)
        };
        let driver = Driver::new(&memory, NUM, 0x1000, 0x10_0000, bits);
        let (live, control, call, alarm) = parts(&driver);
        let (gate, kick) = (Gate::new(control.clone()), Some(event()));
        let queue: Box<dyn RxQueue> = if packed {
            let ring = Packed::new(&live, NUM, next, &features);
            Box::new(Rx::new(
                ring,
                gate,
                next,
                kick,
                features,
                Position::unknown(),
            ))
        } else {
            let ring = Split::new(&live, NUM, next, &features);
            Box::new(Rx::new(
                ring,
                gate,
                next,
                kick,
                features,
                Position::unknown(),
            ))
        };
        let rx = Side {
            driver,
            queue,
            control,
            call,
            alarm,
        };
        let driver = Driver::new(&memory, NUM, HIGH, HIGH + 0x10_0000, bits);
        let (live, control, call, alarm) = parts(&driver);
        let gate = Gate::new(control.clone());
        let queue: Box<dyn TxQueue> = if packed {
            let ring = Packed::new(&live, NUM, next, &features);
            Box::new(Tx::new(
                ring,
                gate,
                next,
                NUM,
                features,
                Position::unknown(),
            ))
        } else {
            let ring = Split::new(&live, NUM, next, &features);
            Box::new(Tx::new(
                ring,
                gate,
                next,
                NUM,
                features,
                Position::unknown(),
            ))
        };
        let tx = Side {
            driver,
            queue,
            control,
            call,
            alarm,
        };
        World {
            memory,
            log_file,
            rx,
            tx,
        }
    }
}

/// Of a property: `PROPTEST_CASES`, or so many.
fn cases(n: u32) -> proptest::test_runner::Config {
    let said = std::env::var("PROPTEST_CASES").ok();
    let n = said.and_then(|s| s.parse().ok()).unwrap_or(n);
    proptest::test_runner::Config::with_cases(n)
}

/// A frame that no other is like.
fn frame(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (seed.wrapping_mul(0x9e37_79b9).wrapping_add(i * 31) >> 3) as u8)
        .collect()
}

fn bytes(f: &crate::port::Frame<'_>) -> Vec<u8> {
    let mut v = vec![0; f.len as usize];
    f.copy_to(&mut v);
    v
}
