//! Micro benchmarks of the data path's stages: parse, look up, take from a ring, copy into a ring, gate, spool append,
//! flush. `cargo bench -p gangway-benches`; figures per frame. And the file of addresses, written and read: figures per address.
//!
//! Both sides of a ring are driven by one thread, so every line is in its cache: what a stage costs without waiting for
//! the other CPU. Only the switch's part is timed.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gangway_benches::frames::{frame, mac};
use gangway_benches::ring::{self as driver, Layout};
use gangway_shared::config::HostConfig;
use gangway_shared::config::valid::{SpoolConfig, SpoolLimits, Sync};
use gangway_shared::id::{HoldId, LaneKey, MacAddr};
use gangway_switch::addresses::Addresses;
use gangway_switch::datapath::Engine;
use gangway_switch::datapath::fdb::Fdb;
use gangway_switch::datapath::flow::{Flows, Key};
use gangway_switch::datapath::lane::Lane;
use gangway_switch::datapath::parse;
use gangway_switch::port::{BURST, Burst, Frame, Sent, VnetHdr};
use gangway_switch::spool::{Kind, Origin, Spool, Writer};

mod side;

use side::{receiver, sender, turn};

const SIZES: [usize; 2] = [64, 1514];
const RINGS: [Layout; 2] = [Layout::Split, Layout::Packed];

/// How often `part` was called for this time, in bursts, each timed alone.
fn bursts(n: u64, mut part: impl FnMut() -> Duration) -> Duration {
    (0..n).map(|_| part()).sum()
}

fn timed(part: impl FnOnce()) -> Duration {
    let since = Instant::now();
    part();
    since.elapsed()
}

fn parsing(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    group.throughput(Throughput::Elements(1));
    let bytes = frame(128, 0, 1);
    group.bench_function("addresses and payload", |b| {
        b.iter(|| {
            let head = black_box(&bytes[..]);
            (parse::ether(head), parse::payload_bytes(head, 128))
        });
    });
    group.finish();
}

fn look_up(c: &mut Criterion) {
    let mut group = c.benchmark_group("look up");
    group.throughput(Throughput::Elements(BURST as u64));
    for many in [1u32, 1 << 10, 1 << 16, 1 << 20] {
        let flows = Flows::new(4 << 20).expect("a flow table");
        let head = |i: u32| {
            let mut f = frame(64, 0, 1);
            f[28..32].copy_from_slice(&i.to_be_bytes());
            f
        };
        for i in 0..many {
            let key = flows.key(&head(i));
            flows.note(&key, 0, 1, 42, 1, 1);
        }
        // Each burst asks for others, in random order.
        let mut x = 1u32;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            head(((u64::from(x) * u64::from(many)) >> 32) as u32)
        };
        group.bench_function(BenchmarkId::new("flow", many), |b| {
            b.iter_custom(|n| {
                bursts(n, || {
                    let heads: [Vec<u8>; BURST] = std::array::from_fn(|_| next());
                    timed(|| {
                        let keys: [Key; BURST] = std::array::from_fn(|i| {
                            let key = flows.key(&heads[i]);
                            flows.prefetch(&key, 0);
                            key
                        });
                        let slots = flows.locate(&keys, 0);
                        for (key, slot) in keys.iter().zip(slots) {
                            black_box(flows.find(key, slot, 0, 1, 1).map(|f| f.to()));
                        }
                    })
                })
            });
        });
    }
    let fdb = Fdb::new(65_536, 300).expect("an address table");
    for i in 0..1000 {
        fdb.set(MacAddr::from_u64(0x5254_0000_0000 | i), 1, false, 1);
    }
    group.throughput(Throughput::Elements(1));
    let mut i = 0;
    group.bench_function("address, 1000 known", |b| {
        b.iter(|| {
            i = (i + 7) % 1000;
            fdb.lookup(MacAddr::from_u64(0x5254_0000_0000 | i), 1)
        });
    });
    group.finish();
}

fn ring<R: driver::Ring>(c: &mut Criterion, layout: Layout) {
    let mut group = c.benchmark_group(format!("ring, {layout:?}").to_lowercase());
    group.throughput(Throughput::Elements(BURST as u64));
    for bytes in SIZES {
        let mut from = sender::<R>(bytes);
        group.bench_function(BenchmarkId::new("take and give back", bytes), |b| {
            b.iter_custom(|n| {
                bursts(n, || {
                    let time = timed(|| {
                        let mut burst = Burst::new();
                        from.queue.burst(&mut burst);
                        assert_eq!(burst.len(), BURST);
                        drop(black_box(burst));
                        from.queue.release(BURST);
                    });
                    turn(&mut from.ring);
                    time
                })
            });
        });
        let mut to = receiver::<R>();
        group.bench_function(BenchmarkId::new("take, copy and give back", bytes), |b| {
            b.iter_custom(|n| {
                bursts(n, || {
                    let time = timed(|| {
                        let mut burst = Burst::new();
                        from.queue.burst(&mut burst);
                        let mut sent = to.queue.send_run(&burst);
                        // Where a run ends early, as before the first look ahead.
                        while sent < burst.len() {
                            assert_eq!(to.queue.send(&burst[sent]), Sent::Yes);
                            sent += 1;
                        }
                        to.queue.flush();
                        drop(burst);
                        from.queue.release(BURST);
                    });
                    turn(&mut from.ring);
                    turn(&mut to.ring);
                    time
                })
            });
        });
    }
    group.finish();
}

fn rings(c: &mut Criterion) {
    for layout in RINGS {
        match layout {
            Layout::Split => ring::<driver::split::Split>(c, layout),
            Layout::Packed => ring::<driver::packed::Packed>(c, layout),
        }
    }
}

fn gates(c: &mut Criterion) {
    let mut group = c.benchmark_group("gate");
    group.throughput(Throughput::Elements(1));
    let bytes = frame(64, 0, 1);
    let f = Frame::from_slice(VnetHdr::default(), &bytes);
    let mut lane = Lane::default();
    group.bench_function("is it plain", |b| b.iter(|| black_box(&lane).is_plain()));
    group.bench_function("forward", |b| {
        b.iter(|| {
            assert!(lane.accepts(f.len, || false));
            lane.take(&f, 0, Origin::NONE, || 1, &mut |f| {
                black_box(f);
                Sent::Yes
            })
        });
    });
    group.finish();
}

/// A spool whose queues take segments that lie ready, again and again.
struct Spooled {
    spool: Arc<Spool>,
    hold: u64,
}

impl Spooled {
    fn new(dir: &Path) -> Spooled {
        let segment_bytes = 64 << 20;
        let config = SpoolConfig {
            dir: dir.to_owned(),
            segment_bytes,
            quota_bytes: 4 * segment_bytes,
            sync: Sync::None,
            limits: SpoolLimits::default(),
        };
        let (spool, _) = Spool::open(&config).expect("a spool");
        Spooled { spool, hold: 0 }
    }

    fn queue(&mut self) -> Writer {
        if self.hold > 0 {
            self.spool.remove_hold(HoldId(self.hold)).expect("an end");
        }
        self.hold += 1;
        let [from, to] = [0, 1].map(|i| MacAddr(mac(i)).to_string());
        let lane = LaneKey { from, queue: 0, to };
        let hold = HoldId(self.hold);
        let mut tries = 0;
        loop {
            match self.spool.create(hold, Kind::Source, &lane) {
                Ok((writer, _)) => return writer,
                // Those of the queue before come back soon.
                Err(_) if tries < 1000 => std::thread::sleep(Duration::from_millis(5)),
                Err(e) => panic!("no queue: {e}"),
            }
            tries += 1;
        }
    }
}

fn spool(c: &mut Criterion) {
    let mut group = c.benchmark_group("spool");
    group.throughput(Throughput::Elements(BURST as u64));
    let base = Path::new("/dev/shm");
    let folder = gangway_benches::host::Folder::below(base).expect("a folder in /dev/shm");
    for bytes in SIZES {
        let bytes_of_it = frame(bytes, 0, 1);
        let f = Frame::from_slice(VnetHdr::default(), &bytes_of_it);
        let same = |_| Frame::from_slice(VnetHdr::default(), &bytes_of_it);
        let burst: Vec<Frame<'_>> = (0..BURST).map(same).collect();
        let mut spooled = Spooled::new(&folder.path().join(format!("append-{bytes}")));
        let mut writer = spooled.queue();
        group.bench_function(BenchmarkId::new("append and commit", bytes), |b| {
            b.iter_custom(|n| {
                bursts(n, || {
                    if !writer.has_room(BURST as u32 * (f.len + 64)) {
                        writer = spooled.queue();
                    }
                    timed(|| {
                        assert_eq!(writer.append_run(1, &burst, Origin::NONE), BURST, "room");
                        writer.commit();
                    })
                })
            });
        });
        let mut reader = writer.queue().reader();
        group.bench_function(BenchmarkId::new("read and check", bytes), |b| {
            b.iter_custom(|n| {
                bursts(n, || {
                    if reader.queue().last_seq() < reader.next_seq() + BURST as u64 {
                        reader = writer.queue().reader();
                    }
                    timed(|| {
                        let mut left = BURST;
                        while left > 0 {
                            // Two, where a segment ends.
                            let n = reader.pass_run(left, |run| black_box(run.frames).len());
                            assert!(n > 0, "intact");
                            left -= n;
                        }
                    })
                })
            });
        });
    }
    group.finish();
}

/// The FDB of a switch, written for its next run, and read by it.
fn address_file(c: &mut Criterion) {
    let mut group = c.benchmark_group("address file");
    // A million take a while.
    group.sample_size(10);
    let base = Path::new("/dev/shm");
    let folder = gangway_benches::host::Folder::below(base).expect("a folder in /dev/shm");
    for many in [100_000u64, 1_000_000] {
        let dir = folder.path().join(many.to_string());
        let text = format!(
            "[host]\nname = \"bench\"\nstate_dir = \"{}\"\n[fdb]\ncapacity = {}\n\
             [[port]]\nname = \"up\"\ntype = \"uplink\"\ndevice = \"none\"\n",
            dir.display(),
            1 << 20
        );
        let config = HostConfig::parse(&text, "bench").expect("a configuration");
        std::fs::create_dir_all(&config.state_dir).expect("a folder");
        // Nobody listens: no device is opened, and no worker has anything to do.
        let run = || {
            let engine = Engine::start(&config).expect("workers");
            let addresses = Addresses::new(&config, engine.shared().clone());
            (engine, addresses)
        };
        group.throughput(Throughput::Elements(many));
        let (engine, addresses) = run();
        for i in 0..many {
            let mac = MacAddr::from_u64(0x0200_0000_0000 | i);
            engine.shared().fdb.learn(mac, 0, 0);
        }
        group.bench_function(BenchmarkId::new("write", many), |b| {
            b.iter(|| addresses.save());
        });
        addresses.save();
        assert!(
            config
                .state_dir
                .join(gangway_switch::addresses::FILE)
                .exists()
        );
        engine.stop();
        group.bench_function(BenchmarkId::new("read", many), |b| {
            b.iter_custom(|n| {
                bursts(n, || {
                    let (engine, addresses) = run();
                    let time = timed(|| addresses.take_up());
                    engine.stop();
                    time
                })
            });
        });
    }
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = stages;
    config = config();
    targets = parsing, look_up, rings, gates, spool, address_file
}
criterion_main!(stages);
