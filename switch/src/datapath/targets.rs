//! Where a frame goes, by its addresses, the FDB and what the ports are.
//!
//! Pure but for what is learned: the FDB, and the marks of ports whose VM is on its way out.

use super::engine::{Mode, Shared};
use super::parse;
use super::stats::Drop;
use crate::port::Frame;

/// Where a frame goes.
pub(super) enum Targets {
    One {
        /// The port.
        to: usize,
        /// Nothing but the addresses was asked: the next frame like this one goes the same way.
        known: bool,
    },
    /// Everywhere but to where it came from; the port whose own address is the source gets no echo.
    Flood {
        own: Option<usize>,
        moved: bool,
    },
    Nowhere(Drop),
}

impl Targets {
    pub(super) fn of(
        frame: &Frame<'_>,
        from: usize,
        shared: &Shared,
        now_s: u32,
    ) -> Option<Targets> {
        let e = parse::ether(frame.head())?;
        let from_uplink = shared.ports[from].uplink;
        let mut own = None;
        let mut moved = false;
        if let Some(home) = shared.fdb.learn(e.src, from, now_s) {
            // A configured address of another port: believed only when that VM is on its way out (then this is the
            // mark that the network has learned its new place), or when its port is not up.
            own = Some(home);
            match shared.ports[home].mode() {
                Mode::Held | Mode::Departing if from_uplink => {
                    moved = true;
                    shared.ports[home]
                        .marker
                        .store(true, std::sync::atomic::Ordering::Release);
                }
                Mode::Live if !shared.ports[home].is_up() && !shared.ports[home].armed() => {
                    shared.ports[home].unfix();
                    shared.fdb.set(e.src, from, false, now_s);
                }
                _ => {}
            }
        } else if shared.ports[from].mac == Some(e.src) && shared.ports[from].fix_own_address() {
            shared.fdb.set(e.src, from, true, now_s);
        }
        if e.dst.is_multicast() {
            return Some(Targets::Flood { own, moved });
        }
        Some(match shared.fdb.lookup(e.dst, now_s) {
            Some(to) if to == from || (from_uplink && shared.ports[to].uplink) => {
                Targets::Nowhere(Drop::Hairpin)
            }
            Some(to) if shared.ports[to].mode() == Mode::Standby => Targets::Nowhere(Drop::Down),
            Some(to) => Targets::One {
                to,
                known: own.is_none(),
            },
            None => Targets::Flood { own, moved },
        })
    }

    pub(super) fn iter<'a>(
        &self,
        shared: &'a Shared,
        from: usize,
    ) -> impl Iterator<Item = usize> + use<'a> {
        let (one, flood) = match self {
            Targets::One { to, .. } => (Some(*to), None),
            Targets::Flood { own, moved } => (None, Some((*own, *moved))),
            Targets::Nowhere(_) => (None, None),
        };
        let from_uplink = shared.ports[from].uplink;
        // What anybody but the arriving group floods reaches the source, too, until the announcement.
        let from_deaf = !shared.ports[from].hears_uplink();
        let all = if flood.is_some() {
            shared.ports.len()
        } else {
            0
        };
        let (own, moved) = flood.unwrap_or_default();
        let floods = (0..all).filter(move |&to| {
            let p = &shared.ports[to];
            to != from
                && Some(to) != own
                && !(from_uplink && p.uplink)
                && (p.hears_uplink() || from_deaf)
                && match p.mode() {
                    Mode::Live => p.is_up() || p.armed(),
                    Mode::Lost => p.is_up(),
                    // What comes from a VM that has moved already reaches the others of its group where they are now.
                    Mode::Held | Mode::Departing => !moved,
                    Mode::Standby | Mode::Departed => false,
                }
        });
        one.into_iter().chain(floods)
    }
}
