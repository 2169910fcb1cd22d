//! A hold of many lanes goes to another host: how fast, beside `scp` and plain TCP over the same link, and how much memory the two
//! switches take meanwhile.
//!
//! Two switches, one worker each, and a null guest whose every other port sends to one VM: so many lanes. All lanes are frozen and
//! filled while the target's process stands still; then it goes on, and the time counts until the target has acknowledged the last frame, which
//! it has in its spool by then (`sync = "batch"`). The tail is the same of a stretch in which frames are held and shipped at once: from
//! the last held frame on; once at all that the guest can send, and once at a rate that the shipment can carry. Then the hold is sealed, restored, committed and flushed into a guest at the target; what came must be
//! what was held, lane by lane, by count and digest.
//!
//! The peers have as many bytes, and both ends on this machine, too: `scp` of a file of random bytes, with OpenSSH's own choice of cipher,
//! to a file; `iperf3`, from memory to memory. All three go over the loopback device, which has no limit but the two CPUs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use gangway_shared::api::{HoldInfo, HoldState, Request};
use gangway_shared::id::HoldId;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate};
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::frames::Pattern;
use crate::guest::{self, Drive, Habits};
use crate::hold::{Hosts, Sections, run_on, stretch};
use crate::host::{self, Folder, Process, run, until};
use crate::peer::Switch;
use crate::plot::{Bars, Panel, draw};
use crate::report::{Figure, one, table};
use crate::rig::{Common, tsc_hz};
use crate::ring::Layout;
use crate::sys;

const PATIENCE: Duration = Duration::from_secs(20);
/// For all that depends on how much there is.
const LONG: Duration = Duration::from_secs(300);
const STRETCH: Duration = Duration::from_millis(20);
/// How long frames are held and shipped at once.
const LIVE: Duration = Duration::from_millis(300);
/// The same at a rate that the shipment can carry, and that rate in bytes of frames per second.
const CARRIED: Duration = Duration::from_secs(2);
const CARRIED_RATE: f64 = 100e6;
/// A paced guest sends for so long at a time.
const PACE: Duration = Duration::from_micros(500);
const SEGMENT: u64 = 1 << 20;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where.
    pub common: Common,
    /// Senders.
    pub lanes: usize,
    /// Frame size without FCS.
    pub frame: usize,
    /// Held, in bytes of frames.
    pub bytes: u64,
    /// Rounds; in each, all three have their turn.
    pub pairs: usize,
    /// How the guest behaves.
    pub habits: Habits,
    /// Spools and files lie in folders below this one.
    pub spool: PathBuf,
}

/// A hold, from the freeze to the last frame at the other host's guest.
#[derive(Debug, Clone, Serialize)]
pub struct Shipped {
    /// In which round.
    pub round: usize,
    /// Frames, and their bytes, that were held before the target went on.
    pub held: [u64; 2],
    /// From then until it had acknowledged all.
    pub ship_s: f64,
    /// From the last held frame until it was acknowledged, of frames that were shipped while others were held; up to 2 ms less,
    /// as it is looked for each millisecond.
    pub tail_ms: f64,
    /// The same while no more is held than can be shipped, and MB/s (of frames) that were held then.
    pub carried_tail_ms: f64,
    /// See there.
    pub carried: f64,
    /// From the commit until the guest had the last one.
    pub flush_s: f64,
    /// Anonymous memory of source and target, the most that was seen, in bytes: what they take beyond files and guests.
    pub anonymous: [u64; 2],
    /// Spool files and guest memory that they had mapped, the most that was seen, in bytes.
    pub mapped: [u64; 2],
}

/// A round.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    /// Ours.
    pub gangway: Shipped,
    /// Seconds of `scp`.
    pub scp_s: f64,
    /// Seconds of TCP.
    pub tcp_s: f64,
}

/// What is made of the rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Lanes.
    pub lanes: usize,
    /// Frame size.
    pub frame: usize,
    /// Bytes held.
    pub bytes: u64,
    /// Ours, in MB/s (10^6 bytes of frames).
    pub gangway: Figure,
    /// `scp`.
    pub scp: Figure,
    /// TCP.
    pub tcp: Figure,
    /// Ours to `scp`, of the same round.
    pub by_scp: Figure,
    /// Ours to TCP.
    pub by_tcp: Figure,
    /// See [`Shipped::tail_ms`].
    pub tail_ms: Figure,
    /// See [`Shipped::carried_tail_ms`].
    pub carried_tail_ms: Figure,
    /// See [`Shipped::carried`].
    pub carried: Figure,
    /// MB/s from the commit on.
    pub flush: Figure,
    /// MB of anonymous memory, source and target.
    pub anonymous: [Figure; 2],
}

/// Measures, and gives back all that it took.
pub fn measure(plan: &Plan) -> Result<Vec<Round>> {
    Peers::install()?;
    let mut rounds = Vec::new();
    for round in 0..plan.pairs {
        // Files in memory are searched room for where the kernel keeps old ones: that would be what is measured.
        rustix::fs::sync();
        std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches: run as root")?;
        let gangway = ship(plan, round)?;
        let peers = Peers::start(&plan.spool, gangway.held[1])?;
        let (scp_s, tcp_s) = (peers.scp()?, peers.tcp()?);
        drop(peers);
        let mb = |s: f64| gangway.held[1] as f64 / 1e6 / s;
        eprintln!(
            "{} MB: gangway {:.0}, scp {:.0}, TCP {:.0} MB/s; tail {:.1} ms, {:.1} ms at {:.0} MB/s, flush {:.0} MB/s, anonymous {:?} MB",
            gangway.held[1] / 1_000_000,
            mb(gangway.ship_s),
            mb(scp_s),
            mb(tcp_s),
            gangway.tail_ms,
            gangway.carried_tail_ms,
            gangway.carried,
            mb(gangway.flush_s),
            gangway.anonymous.map(|b| b >> 20),
        );
        rounds.push(Round {
            gangway,
            scp_s,
            tcp_s,
        });
    }
    Ok(rounds)
}

/// The most memory that was seen of a process.
#[derive(Default)]
struct Most {
    anonymous: u64,
    mapped: u64,
}

impl Most {
    fn look(&mut self, pid: u32) -> Result<()> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = |key: &str| -> u64 {
            let line = status.lines().find_map(|l| l.strip_prefix(key));
            let number = line.and_then(|l| l.split_whitespace().nth(1));
            number.and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        self.anonymous = self.anonymous.max(kib("RssAnon") << 10);
        self.mapped = self.mapped.max((kib("RssFile") + kib("RssShmem")) << 10);
        Ok(())
    }
}

fn status(control: &mut Control, hold: HoldId) -> Result<HoldInfo> {
    control.hold(&Request::HoldStatus { hold })
}

fn held(info: &HoldInfo) -> [u64; 2] {
    let sum = |of: fn(&gangway_shared::api::Tally) -> u64| {
        info.lanes.iter().map(|l| of(&l.held)).sum::<u64>()
    };
    [sum(|t| t.frames), sum(|t| t.bytes)]
}

fn is_shipped(info: &HoldInfo) -> bool {
    info.lanes.iter().all(|l| l.shipped == l.held)
}

fn start(
    plan: &Plan,
    ports: Vec<(usize, std::os::unix::net::UnixStream)>,
    full: bool,
) -> Result<Box<dyn Drive>> {
    let habits = Habits {
        full,
        gather: true,
        // Who counts to the last frame takes each one.
        batch: if full { plan.habits.batch } else { 1 },
        ..plan.habits
    };
    guest::start_as(Layout::Split, ports, plan.frame, habits, Pattern::One)?
        .map_err(|_| anyhow!("the switch does not offer split rings"))
}

fn ship(plan: &Plan, round: usize) -> Result<Shipped> {
    let tsc_hz = tsc_hz();
    let ports = 2 * plan.lanes;
    // What is held, what batches add, a lane's first segments, and what is shipped while it is looked for the tail.
    let quota = 2 * plan.bytes + (4 * ports as u64 + 64) * SEGMENT + (5 << 30);
    let sections = |dir: &Path| {
        format!(
            "dir = \"{}\"\nsegment_bytes = {SEGMENT}\nquota_bytes = {quota}\nsync = \"batch\"\n",
            dir.display()
        )
    };
    let sections = [Some(&sections as Sections<'_>); 2];
    let mut hosts = Hosts::start(&plan.common, &plan.spool, sections, ports)?;
    let streams = hosts.source.connect()?.into_iter().enumerate().collect();
    let mut guest = start(plan, streams, true)?;
    let guest_ = guest.as_mut();
    stretch(guest_, 5 * STRETCH, tsc_hz);
    guest_.rest(true);
    run_on(guest_, tsc_hz, "frames under way", |s| s.frames)?;

    let hold = hosts.open(1)?;
    hosts.freeze(hold)?;
    let mut most = [Most::default(), Most::default()];
    let pids = [hosts.source.process().pid(), hosts.target.process().pid()];
    let mut look = || -> Result<()> {
        most.iter_mut()
            .zip(pids)
            .try_for_each(|(m, pid)| m.look(pid))
    };
    guest_.rest(false);
    let since = Instant::now();
    loop {
        stretch(guest_, STRETCH, tsc_hz);
        look()?;
        if held(&status(&mut hosts.near, hold)?)[1] >= plan.bytes {
            break;
        }
        ensure!(!sys::is_interrupted(), "interrupted");
        ensure!(
            since.elapsed() < LONG,
            "no {} bytes held after {LONG:?}",
            plan.bytes
        );
    }
    guest_.rest(true);
    run_on(guest_, tsc_hz, "frames under way", |s| s.sent)?;
    let first = status(&mut hosts.near, hold)?;
    let before = held(&first);

    let mut shipped = |hosts: &mut Hosts, what: &str| -> Result<HoldInfo> {
        until(what, LONG, || {
            let info = status(&mut hosts.near, hold)?;
            look()?;
            Ok(is_shipped(&info).then_some(info))
        })
    };
    let room = Room::of(&plan.spool, before[1])?;
    let begin = Instant::now();
    hosts.target.process().go_on()?;
    shipped(&mut hosts, "end of the shipment")?;
    let ship_s = begin.elapsed().as_secs_f64();
    drop(room);

    // Held and shipped at once.
    guest_.rest(false);
    stretch(guest_, LIVE, tsc_hz);
    guest_.rest(true);
    let begin = last_held(&mut hosts, hold)?;
    let all = shipped(&mut hosts, "end of the tail")?;
    let tail_ms = begin.elapsed().as_secs_f64() * 1e3;

    let so_far = held(&all)[1];
    let begin = Instant::now();
    paced(guest_, plan.frame, tsc_hz);
    let paced_s = begin.elapsed().as_secs_f64();
    let begin = last_held(&mut hosts, hold)?;
    let all = shipped(&mut hosts, "end of the carried tail")?;
    let carried_tail_ms = begin.elapsed().as_secs_f64() * 1e3;
    let carried = (held(&all)[1] - so_far) as f64 / 1e6 / paced_s;
    guest.stop()?;

    let (near, far) = (&mut hosts.near, &mut hosts.far);
    let seal = Request::Seal {
        hold,
        timeout_ms: 10_000,
    };
    // Until the switch has seen that the VM has gone.
    until("seal", PATIENCE, || Ok(near.call(&seal).ok()))?;
    far.call(&Request::IncomingRestore { hold })?;
    let two = hosts.target.sockets().0.iter().take(2);
    let dial = |s: &PathBuf| std::os::unix::net::UnixStream::connect(s);
    let two: std::io::Result<Vec<_>> = two.map(dial).collect();
    let mut guest = start(plan, two?.into_iter().enumerate().collect(), false)?;
    // The target's worker has the other CPU; the source's sleeps.
    host::pin(plan.common.worker_cpu)?;
    let begin = Instant::now();
    far.call(&Request::Commit { hold })?;
    let (mut arrived, mut wrong, mut flush_s) = (0, 0, 0.0);
    while arrived < held(&all)[0] {
        let seen = stretch(guest.as_mut(), STRETCH, tsc_hz);
        arrived += seen.frames;
        wrong += seen.wrong;
        if seen.frames > 0 {
            flush_s = begin.elapsed().as_secs_f64();
        }
        look()?;
        ensure!(!sys::is_interrupted(), "interrupted");
        ensure!(
            begin.elapsed() < LONG,
            "{arrived} of {} frames arrived in {LONG:?}",
            held(&all)[0]
        );
    }
    far.call(&Request::Announce { hold })?;
    near.call(&Request::Depart {
        hold,
        grace_ms: 100,
    })?;
    let is = |control: &mut Control, state| {
        until("state", LONG, || {
            let info = status(control, hold)?;
            Ok((info.state == state).then_some(info))
        })
    };
    is(near, HoldState::Departed)?;
    let more = stretch(guest.as_mut(), STRETCH, tsc_hz).frames;
    let flushed = is(far, HoldState::Live)?;
    ensure!(
        more == 0 && wrong == 0 && arrived == held(&all)[0],
        "{arrived} and {more} frames arrived of {}, {wrong} of them wrong",
        held(&all)[0]
    );
    for lane in &all.lanes {
        let there = flushed.lanes.iter().find(|l| l.lane == lane.lane);
        ensure!(
            there.is_some_and(|t| t.flushed == lane.held),
            "{}: held {:?}, flushed {:?}",
            lane.lane,
            lane.held,
            there.map(|t| t.flushed)
        );
    }
    guest.stop()?;
    hosts.near.call(&Request::HoldRelease { hold })?;
    hosts.far.call(&Request::HoldRelease { hold })?;
    let used = all.lanes.iter().filter(|l| l.held.frames > 0).count();
    ensure!(used >= plan.lanes, "{used} lanes were used");
    host::unpin()?;
    Ok(Shipped {
        round,
        held: before,
        ship_s,
        tail_ms,
        carried_tail_ms,
        carried,
        flush_s: flush_s * before[1] as f64 / held(&all)[1] as f64,
        anonymous: [0, 1].map(|i| most[i].anonymous),
        mapped: [0, 1].map(|i| most[i].mapped),
    })
}

/// When nothing more was held.
fn last_held(hosts: &mut Hosts, hold: HoldId) -> Result<Instant> {
    let mut last = held(&status(&mut hosts.near, hold)?);
    until("last held frame", PATIENCE, || {
        let now = Instant::now();
        let next = held(&status(&mut hosts.near, hold)?);
        let same = next == last;
        last = next;
        Ok(same.then_some(now))
    })
}

/// Sends at a rate that the shipment can carry.
fn paced(guest: &mut dyn Drive, frame: usize, tsc_hz: f64) {
    let begin = Instant::now();
    let mut sent = 0.0;
    while begin.elapsed() < CARRIED {
        if sent < CARRIED_RATE * begin.elapsed().as_secs_f64() {
            guest.rest(false);
            sent += (stretch(guest, PACE, tsc_hz).sent * frame as u64) as f64;
            guest.rest(true);
        } else {
            std::thread::sleep(PACE);
        }
    }
}

/// Memory that a copy in a folder of `tmpfs` goes into: as much as the folder takes meanwhile is given back, a little ahead of it.
///
/// A virtual machine's kernel tells its host which memory is free (the balloon's page reporting), and has to ask for it again, by a fault in
/// the host, 1 to 6 ns a byte. That is as much as a copy costs, and it falls to whoever comes first: the next one gets what has just
/// been freed. So each copy gets memory that was in use until now.
struct Room {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Room {
    /// Less of it, and the kernel takes what has been free for longer.
    const AHEAD: u64 = 1 << 30;
    const STEP: u64 = 16 << 20;

    /// For so many bytes, and what else is written with them.
    fn of(base: &Path, bytes: u64) -> Result<Room> {
        let len = (bytes + bytes / 2).next_multiple_of(Self::STEP);
        let room = rustix::fs::memfd_create("room", MemfdFlags::CLOEXEC)?;
        let piece = vec![1; Self::STEP as usize];
        for at in (0..len).step_by(Self::STEP as usize) {
            rustix::io::pwrite(&room, &piece, at)?;
        }
        let base = base.to_owned();
        let free = move || rustix::fs::statvfs(&base).map(|s| s.f_bfree * s.f_frsize);
        let before = free()?;
        let mut given = 0;
        let mut give = move || {
            while given < len && given < Self::AHEAD + before.saturating_sub(free()?) {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&room, flags, given, Self::STEP)?;
                given += Self::STEP;
            }
            rustix::io::Result::Ok(())
        };
        give()?;
        let done = Arc::new(AtomicBool::new(false));
        let is_done = done.clone();
        let thread = std::thread::spawn(move || {
            while !is_done.load(Ordering::Relaxed) && give().is_ok() {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Ok(Room {
            done,
            thread: Some(thread),
        })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What a user would take.
struct Peers {
    sshd: Process,
    iperf3: Process,
    ports: [u16; 2],
    bytes: u64,
    folder: Folder,
}

fn free_port() -> Result<u16> {
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    Ok(TcpListener::bind(any)?.local_addr()?.port())
}

const SSHD: &str = "/usr/sbin/sshd";

impl Peers {
    fn install() -> Result<()> {
        if run(Command::new("iperf3").arg("--version")).is_err() {
            host::install(&["iperf3"])?;
        }
        if !Path::new(SSHD).exists() {
            // It shall not start as a service: the package asks this, if it is there.
            let policy = Path::new("/usr/sbin/policy-rc.d");
            let ours = !policy.exists();
            if ours {
                std::fs::write(policy, "#!/bin/sh\nexit 101\n")?;
                run(Command::new("chmod").arg("755").arg(policy))?;
            }
            let installed = host::install(&["openssh-server", "openssh-client"]);
            if ours {
                std::fs::remove_file(policy)?;
            }
            installed?;
        }
        Ok(())
    }

    /// On free ports of the loopback device, with keys of their own and so many random bytes.
    fn start(base: &Path, bytes: u64) -> Result<Peers> {
        let folder = Folder::below(base)?;
        let dir = folder.path().to_owned();
        for key in ["host", "user"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
            run(keygen.arg(dir.join(key)))?;
        }
        let ports = [free_port()?, free_port()?];
        std::fs::create_dir_all("/run/sshd")?;
        let d = dir.display();
        let config = format!(
            "Port {}\nListenAddress 127.0.0.1\nHostKey {d}/host\nAuthorizedKeysFile {d}/user.pub\nStrictModes no\nUsePAM no\n\
             PidFile none\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n",
            ports[0]
        );
        std::fs::write(dir.join("sshd_config"), config)?;
        let mut sshd = Command::new(SSHD);
        sshd.arg("-D").arg("-f").arg(dir.join("sshd_config"));
        let mut iperf3 = Command::new("iperf3");
        iperf3.args(["-s", "-B", "127.0.0.1", "-p", &ports[1].to_string()]);
        let peers = Peers {
            sshd: Process::start("sshd", sshd, &dir.join("sshd.log"))?,
            iperf3: Process::start("iperf3", iperf3, &dir.join("iperf3.log"))?,
            ports,
            bytes,
            folder,
        };
        for port in ports {
            let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
            until("answer of a peer", PATIENCE, || {
                Ok(TcpStream::connect(address).is_ok().then_some(()))
            })?;
        }
        let mut dd = Command::new("head");
        dd.arg("-c").arg(bytes.to_string()).arg("/dev/urandom");
        let file = std::fs::File::create(dir.join("held"))?;
        let made = dd.stdout(file).status().context("head")?;
        ensure!(made.success(), "no file of {bytes} random bytes");
        Ok(peers)
    }

    fn scp(&self) -> Result<f64> {
        let dir = self.folder.path();
        let mut scp = Command::new("scp");
        scp.args(["-q", "-P", &self.ports[0].to_string(), "-i"]);
        scp.arg(dir.join("user"));
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "BatchMode=yes",
        ] {
            scp.args(["-o", option]);
        }
        scp.arg(dir.join("held"));
        scp.arg(format!("root@127.0.0.1:{}", dir.join("there").display()));
        let _room = Room::of(dir, self.bytes)?;
        let begin = Instant::now();
        run(&mut scp).with_context(|| self.sshd.said())?;
        let seconds = begin.elapsed().as_secs_f64();
        let there = std::fs::metadata(dir.join("there"))?.len();
        ensure!(
            there == self.bytes,
            "scp has copied {there} of {} bytes",
            self.bytes
        );
        std::fs::remove_file(dir.join("there"))?;
        Ok(seconds)
    }

    fn tcp(&self) -> Result<f64> {
        let mut client = Command::new("iperf3");
        client.args(["-J", "-c", "127.0.0.1", "-p", &self.ports[1].to_string()]);
        let said = run(client.args(["-n", &self.bytes.to_string()]))
            .with_context(|| self.iperf3.said())?;
        let json: serde_json::Value = serde_json::from_str(&said).context("iperf3's answer")?;
        let rate = json["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(self.bytes as f64 * 8.0 / rate.context(said)?)
    }
}

/// What is made of the rounds.
pub fn cell(plan: &Plan, rounds: &[Round]) -> Option<Cell> {
    let mb = |r: &Round, s: f64| r.gangway.held[1] as f64 / 1e6 / s;
    let figure = |of: &dyn Fn(&Round) -> f64| Figure::of(rounds.iter().map(of));
    let anonymous = |i: usize| figure(&|r| r.gangway.anonymous[i] as f64 / 1e6);
    Some(Cell {
        lanes: plan.lanes,
        frame: plan.frame,
        bytes: rounds.first()?.gangway.held[1],
        gangway: figure(&|r| mb(r, r.gangway.ship_s))?,
        scp: figure(&|r| mb(r, r.scp_s))?,
        tcp: figure(&|r| mb(r, r.tcp_s))?,
        by_scp: figure(&|r| r.scp_s / r.gangway.ship_s)?,
        by_tcp: figure(&|r| r.tcp_s / r.gangway.ship_s)?,
        tail_ms: figure(&|r| r.gangway.tail_ms)?,
        carried_tail_ms: figure(&|r| r.gangway.carried_tail_ms)?,
        carried: figure(&|r| r.gangway.carried)?,
        flush: figure(&|r| mb(r, r.gangway.flush_s))?,
        anonymous: [anonymous(0)?, anonymous(1)?],
    })
}

/// A table.
pub fn markdown(cells: &[Cell]) -> String {
    let rows = cells.iter().map(|c| {
        let f = |figure, digits| one(Some(figure), digits);
        [
            c.lanes.to_string(),
            c.frame.to_string(),
            format!("{:.2}", c.bytes as f64 / f64::from(1 << 30)),
            f(c.gangway, 0),
            f(c.scp, 0),
            f(c.by_scp, 2),
            f(c.tcp, 0),
            f(c.by_tcp, 2),
            f(c.tail_ms, 1),
            f(c.carried_tail_ms, 1),
            f(c.carried, 0),
            f(c.flush, 0),
            f(c.anonymous[0], 0),
            f(c.anonymous[1], 0),
        ]
    });
    table(
        [
            "lanes",
            "frame",
            "held, GiB",
            "Gangway, MB/s",
            "scp, MB/s",
            "ratio",
            "TCP, MB/s",
            "ratio",
            "tail, ms",
            "carried tail, ms",
            "at MB/s",
            "flush, MB/s",
            "source, MB",
            "target, MB",
        ],
        rows,
    )
}

/// Pictures of the cells.
pub fn picture(cells: &[Cell]) -> Result<String> {
    let bars = |name: &str, of: fn(&Cell) -> Figure| Bars {
        name: name.to_owned(),
        values: cells.iter().map(|c| Some(of(c))).collect(),
    };
    let title = |c: &Cell| format!("{} lanes, {} B", c.lanes, c.frame);
    draw(&[Panel::Bars {
        title: "A hold to another host, MB/s".to_owned(),
        categories: cells.iter().map(title).collect(),
        series: vec![
            bars("Gangway", |c| c.gangway),
            bars("scp", |c| c.scp),
            bars("TCP (iperf3)", |c| c.tcp),
        ],
    }])
}
