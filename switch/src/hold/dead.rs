//! Which VMs of a hold have died: what waits for them would wait for ever, and its senders with it (ADR-0029).
//!
//! Invariant: only a VM of which nobody serves the QMP socket has died; of one that our own child does not run that has to last. A guest
//! that is slow, a switch or a keeper that is started again, and a QEMU that does not answer are no deaths.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use gangway_shared::id::HoldId;

use super::Host;
use crate::datapath::engine::Mode;

/// How long nobody serves the QMP socket of a VM that something else than our own child runs, until it has died.
const ABSENT: Duration = Duration::from_secs(3);

/// Ports of VMs of which nobody serves the QMP socket, since when.
#[derive(Debug, Default)]
pub struct Dead(HashMap<usize, Instant>);

impl Dead {
    /// Gives up what waits for the port, if its lanes drain and its VM has died. True if it has.
    pub fn give_up(&mut self, host: &Host, hold: HoldId, port: usize) -> bool {
        let p = &host.engine.shared().ports[port];
        // A TAP stays up whatever its VM does.
        let is_up = p.is_up() && !host.taps.contains_key(&port);
        let Some(vm) = p.vm.as_ref().filter(|_| !is_up) else {
            self.0.remove(&port);
            return false;
        };
        let ended = host.vms.has_ended(vm, hold);
        if !host.vms.is_absent(vm) {
            self.0.remove(&port);
            return false;
        }
        let since = *self.0.entry(port).or_insert_with(Instant::now);
        let is_dead = ended || since.elapsed() >= ABSENT;
        if is_dead && p.mode() == Mode::Held {
            tracing::error!(%hold, vm, "has died: what waits for port {} is dropped", p.name);
            p.set_mode(Mode::Lost);
        }
        is_dead
    }
}
