//! Sockets that receive from devices, of which the keeper has a copy each: what comes while no switch runs waits in them
//! ([`gangway_keeper::devices`], ADR-0039).
//!
//! Invariant: a keeper that is not there, or goes, costs what comes in without a switch, and nothing else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use gangway_keeper::devices::Client;

use crate::sys::packet::{Direction, PacketSocket};

/// See the module. By default nobody keeps anything.
#[derive(Debug, Default)]
pub struct Kept {
    dir: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    keeper: Option<Client>,
    /// Copies of those that were opened, by device, for a keeper that comes later.
    sockets: BTreeMap<String, OwnedFd>,
    /// That there is no keeper was said.
    said: bool,
}

impl State {
    fn lost(&mut self, e: &io::Error) {
        self.keeper = None;
        if !self.said {
            tracing::warn!(
                "the keeper keeps no devices ({e}): what comes in while no switch runs is lost"
            );
        }
        self.said = true;
    }

    fn ask<T>(&mut self, what: impl FnOnce(&Client) -> io::Result<T>) -> Option<T> {
        match what(self.keeper.as_ref()?) {
            Ok(t) => Some(t),
            Err(e) => {
                self.lost(&e);
                None
            }
        }
    }

    fn connect(&mut self, dir: &Path) {
        match Client::connect(dir) {
            Ok(c) => (self.keeper, self.said) = (Some(c), false),
            Err(e) => self.lost(&e),
        }
    }
}

impl Kept {
    /// By the keeper of this folder, if there is one.
    pub fn new(dir: Option<&Path>) -> Kept {
        let kept = Kept {
            dir: dir.map(Path::to_owned),
            ..Kept::default()
        };
        if let Some(dir) = &kept.dir {
            kept.lock().connect(dir);
        }
        kept
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that an earlier run had of this device, with what has come in since; or a new one.
    pub(super) fn socket(
        &self,
        device: &str,
        ifindex: u32,
        direction: Direction,
    ) -> io::Result<PacketSocket> {
        let mut state = self.lock();
        let found = state.ask(|k| k.take(device)).flatten();
        // Of a device that was made anew under its name there is nothing to go on with.
        if let Some(socket) = found.and_then(|fd| PacketSocket::adopt(fd, ifindex).ok()) {
            tracing::debug!("{device}: goes on with what has come in");
            state.remember(device, &socket)?;
            return Ok(socket);
        }
        let socket = PacketSocket::open(ifindex, direction)?;
        state.ask(|k| k.keep(device, socket.as_fd()));
        state.remember(device, &socket)?;
        Ok(socket)
    }

    /// All devices are open: the keeper closes what it has of others.
    pub fn done(&self) {
        self.lock().ask(Client::done);
    }

    /// To be called now and then: a keeper that was started again is given everything anew. Waits for it a few seconds at most.
    pub fn look(&self) {
        let Some(dir) = &self.dir else { return };
        let mut state = self.lock();
        if state.keeper.as_ref().is_some_and(Client::is_there) {
            return;
        }
        state.connect(dir);
        let all: Vec<(String, io::Result<OwnedFd>)> = state
            .sockets
            .iter()
            .map(|(d, fd)| (d.clone(), fd.try_clone()))
            .collect();
        for (device, fd) in all {
            state.ask(|k| k.keep(&device, fd?.as_fd()));
        }
        if state.ask(Client::done).is_some() {
            tracing::info!("the keeper keeps the devices");
        }
    }
}

impl State {
    fn remember(&mut self, device: &str, socket: &PacketSocket) -> io::Result<()> {
        let copy = socket.as_fd().try_clone_to_owned()?;
        self.sockets.insert(device.to_owned(), copy);
        Ok(())
    }
}
