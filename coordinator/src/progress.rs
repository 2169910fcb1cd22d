//! What a migration shows while it runs: on a terminal a block that is drawn again, else plain lines.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use gangway_shared::api::{HoldInfo, Request};
use tokio::task::JoinHandle;

use crate::migration::act::World;
use crate::migration::steps::{Step, TABLE};
use crate::table::bytes;

/// The printer. It writes to standard error, so that `-o json` stays clean.
pub struct Progress {
    screen: Arc<Mutex<Screen>>,
    ticker: Option<JoinHandle<()>>,
}

struct Screen {
    quiet: bool,
    tty: bool,
    begun: Instant,
    running: Vec<(Step, Instant)>,
    holding: bool,
    /// Lines of the block that stand on the terminal now.
    drawn: usize,
    block: Vec<String>,
}

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    screen
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Progress {
    /// Begins to show; `quiet` shows nothing, and asks for the holds all the same: one that nobody asks for is overdue.
    /// `holding`: there may be holds already.
    pub fn new(world: Arc<World>, quiet: bool, holding: bool) -> Progress {
        let tty = std::io::stderr().is_terminal();
        let screen = Screen {
            quiet,
            tty,
            begun: Instant::now(),
            running: Vec::new(),
            holding,
            drawn: 0,
            block: Vec::new(),
        };
        let screen = Arc::new(Mutex::new(screen));
        let ticker = Some(tokio::spawn(tick(world, screen.clone())));
        Progress { screen, ticker }
    }

    /// A step begins.
    pub fn step_begins(&self, step: Step) {
        let mut s = lock(&self.screen);
        s.running.push((step, Instant::now()));
        match step {
            Step::Prepare => s.holding = true,
            Step::Release => s.holding = false,
            _ => {}
        }
    }

    /// A step is done.
    pub fn step_done(&self, step: Step) {
        let mut s = lock(&self.screen);
        let took = s
            .running
            .iter()
            .find(|(r, _)| *r == step)
            .map(|(_, t)| t.elapsed());
        s.running.retain(|(r, _)| *r != step);
        let took = took
            .map(|t| format!("{:.1} ms", t.as_secs_f64() * 1000.0))
            .unwrap_or_default();
        s.print(&format!(
            "{:2}/{} {:<13} {:>11}  {}",
            step as usize + 1,
            TABLE.len(),
            step.name(),
            took,
            step.row().forward
        ));
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        lock(&self.screen).print(text);
    }

    /// Takes the block away.
    pub async fn finish(&mut self) {
        if let Some(t) = self.ticker.take() {
            t.abort();
            // Cancelled: that is what was asked for.
            let _ = t.await;
        }
        let mut s = lock(&self.screen);
        s.erase();
        s.block.clear();
    }
}

impl Screen {
    fn print(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        self.erase();
        // Nobody is left to be told if standard error is gone.
        let _ = writeln!(
            anstream::stderr(),
            "{:7.3} s  {text}",
            self.begun.elapsed().as_secs_f64()
        );
        self.draw();
    }

    fn erase(&mut self) {
        if self.drawn > 0 {
            let _ = write!(anstream::stderr(), "\x1b[{}A\x1b[J", self.drawn);
            self.drawn = 0;
        }
    }

    fn draw(&mut self) {
        if self.tty {
            for line in &self.block {
                let _ = writeln!(anstream::stderr(), "{line}");
            }
            self.drawn = self.block.len();
        }
    }
}

/// Looks every 250 ms; without a terminal it shows every fourth; if it is quiet, it looks every 3 s.
async fn tick(world: Arc<World>, screen: Arc<Mutex<Screen>>) {
    let mut n = 0_u64;
    loop {
        let quiet = lock(&screen).quiet;
        let every = if quiet { 3000 } else { 250 };
        tokio::time::sleep(Duration::from_millis(every)).await;
        n += 1;
        let holding = lock(&screen).holding;
        let (mut source, mut target) = (None, None);
        if holding {
            let status = Request::HoldStatus {
                hold: world.mission.id,
            };
            let within = Duration::from_secs(2);
            let (s, t) = tokio::join!(
                world.source.hold(&status, within),
                world.target.hold(&status, within)
            );
            (source, target) = (s.ok(), t.ok());
        }
        let block = block(&world, source.as_ref(), target.as_ref());
        let mut s = lock(&screen);
        if s.tty {
            s.erase();
            s.block = block;
            s.draw();
        } else if n.is_multiple_of(4) {
            for line in block {
                s.print(&line);
            }
        }
    }
}

fn block(world: &World, source: Option<&HoldInfo>, target: Option<&HoldInfo>) -> Vec<String> {
    let mut out = Vec::new();
    let live = world.live();
    for vm in world.mission.vms() {
        let Some(l) = live.get(vm) else { continue };
        let s = &l.progress.sample;
        out.push(format!(
            "  vm   {vm:<16} {:<20} copied {:>9}  left {:>9}  pass {:<3} dirties {:>9}/s",
            l.state,
            bytes(s.transferred),
            bytes(s.remaining),
            s.sync_count,
            bytes(l.progress.dirty_pages_rate.saturating_mul(4096))
        ));
    }
    drop(live);
    for lane in source.iter().flat_map(|h| &h.lanes) {
        let there = target.and_then(|t| t.lanes.iter().find(|l| l.lane == lane.lane));
        let flushed = there.map_or(lane.flushed, |l| {
            if l.flushed.frames > 0 {
                l.flushed
            } else {
                lane.flushed
            }
        });
        if lane.held.frames > 0 {
            out.push(format!(
                "  link {:<30} held {:>6} ({})  shipped {:>6}  flushed {:>6}",
                lane.lane.to_string(),
                lane.held.frames,
                bytes(lane.held.bytes),
                lane.shipped.frames,
                flushed.frames
            ));
        }
    }
    out
}
