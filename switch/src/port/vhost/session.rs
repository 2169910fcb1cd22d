//! The control socket's requests (vhost-user, "Front-end message types"), and from them: which rings run.
//!
//! A ring runs while it has everything it needs: features, memory, size, addresses, a kick descriptor, and the front-end
//! has enabled it. The specification starts a ring at its first kick; we start it at once, since after a restart of the
//! switch a guest has no reason to kick a ring that it has filled long ago.
//!
//! ```text
//!              has all, enabled                       GET_VRING_BASE, RESET_OWNER, disconnect,
//!   stopped ---------------------> running ---------> disabled, features changed: closed at a
//!      ^                            |    ^            burst boundary, position kept --> stopped
//!      |                            v    |
//!      |                     SET_MEM_TABLE, ADD/REM_MEM_REG, SET_LOG_BASE, LOG_ALL,
//!      |                     SET_VRING_ADDR, SET_VRING_CALL: new snapshot, ring keeps running
//!      +--------------------------------- addresses no longer valid
//! ```
//!
//! With several queue pairs (`VIRTIO_NET_F_MQ`) the guest's receive rings go to the data path together, when all that are
//! enabled run: frames for a VM that has just arrived would else take the first ring, and newer ones of the same flow
//! another, before them.
//!
//! Invariant: the answer to GET_VRING_BASE (and to everything that stops a ring) is sent when no worker touches the
//! ring any more; what the guest has queued and we have not given back stays in guest memory.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, Result, VhostUserBackendReqHandlerMut};

use super::Shared;
use super::dirty::DirtyLog;
use super::features::{self, LOG_ALL, MQ, OFFERED, PROTOCOL_FEATURES, RING_PACKED, RingFeatures};
use super::live::{Control, Gate, Live};
use super::position::{Position, Positions};
use super::ring::packed::Packed;
use super::ring::split::Split;
use super::ring::{Broken, Ring};
use super::rx::Rx;
use super::tx::Tx;
use super::watchdog::raise;
use crate::mem::guest::{GuestMem, GuestMemError, REGIONS_MAX, Region};
use crate::port::{QUEUES, TxQueue};
use crate::sys;

/// Even: the guest's receive rings, where we transmit. Odd: its transmit rings (virtio 1.2, 5.1.2).
const RINGS: usize = 2 * QUEUES;
/// How long rings may wait for others that the front-end has enabled and does not start.
pub(super) const TOGETHER: Duration = Duration::from_millis(if cfg!(test) { 2000 } else { 20 });
/// virtio 1.2, 2.7 and 2.8.1: the largest ring.
const NUM_MAX: u32 = 32_768;

#[derive(Debug, Clone, Copy)]
struct Addr {
    desc: u64,
    avail: u64,
    used: u64,
    /// `VHOST_VRING_F_LOG` and its address.
    used_log: Option<u64>,
}

#[derive(Debug, Default)]
struct Vring {
    num: u16,
    addr: Option<Addr>,
    base: u16,
    /// The front-end, or a keeper, has said so.
    is_based: bool,
    /// Given (`Some`), perhaps without a descriptor (`Some(None)`: the driver is polled).
    kick: Option<Option<Arc<File>>>,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    enabled: bool,
    running: Option<Arc<Control>>,
    reported: bool,
}

/// One connection's state.
pub struct Session {
    shared: Arc<Shared>,
    features: Option<u64>,
    mem: Option<Arc<GuestMem>>,
    log: Option<Arc<DirtyLog>>,
    vrings: [Vring; RINGS],
    /// Transmit queues that wait for the others.
    waiting: Vec<(u16, Box<dyn TxQueue>)>,
    /// Of the guest's transmit rings and of packed ones, if the connection outlives the switch.
    positions: Option<Positions>,
    /// What another run has noted of it could not be read.
    is_lost: bool,
    /// A packed ring of which it is not known where it is.
    unknown: Option<usize>,
}

/// We receive by this ring; else we transmit.
fn is_rx(ring: usize) -> bool {
    ring % 2 == 1
}

/// Its queue pair.
fn pair(ring: usize) -> u16 {
    (ring / 2) as u16
}

fn refuse(why: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(std::io::Error::other(why))
}

fn refuse_mem(e: GuestMemError) -> Error {
    refuse(e)
}

impl Session {
    /// Of a new connection.
    pub fn new(shared: Arc<Shared>) -> Session {
        let path = shared.positions.as_deref();
        // Another run has noted something of this connection.
        let is_old = path.is_some_and(|p| std::fs::metadata(p).is_ok_and(|m| m.len() > 0));
        let positions = path.and_then(|path| {
            let no = |e| tracing::warn!(port = %shared.name, "{}: {e}; if the switch is killed, a burst may come twice", path.display());
            Positions::open(path).map_err(no).ok().flatten()
        });
        Session {
            is_lost: is_old && positions.as_ref().is_none_or(Positions::is_new),
            positions,
            shared,
            features: None,
            mem: None,
            log: None,
            vrings: Default::default(),
            waiting: Vec::new(),
            unknown: None,
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    /// SET_FEATURES has been here.
    pub fn has_features(&self) -> bool {
        self.features.is_some()
    }

    fn logging(&self) -> bool {
        self.features.is_some_and(|f| f & LOG_ALL != 0)
    }

    fn is_packed(&self) -> bool {
        self.features.is_some_and(|f| f & RING_PACKED != 0)
    }

    /// The snapshot of a ring, if it has valid addresses.
    fn live(&self, i: usize) -> Option<Live> {
        let v = &self.vrings[i];
        let (mem, addr) = (self.mem.as_ref()?, v.addr?);
        if v.num == 0 {
            return None;
        }
        let (desc, avail, used) = (addr.desc, addr.avail, addr.used);
        // A size that was set for a packed ring may be none for a split one.
        if !self.is_packed() && !v.num.is_power_of_two() {
            return None;
        }
        let areas = if self.is_packed() {
            Packed::areas(mem, v.num, desc, avail, used)?
        } else {
            Split::areas(mem, v.num, desc, avail, used)?
        };
        Some(Live {
            mem: mem.clone(),
            areas,
            log: self.log.clone().filter(|_| self.logging()),
            used_log: addr.used_log,
            call: v.call.clone(),
        })
    }

    /// Starts what can run.
    fn start(&mut self, i: usize) {
        let v = &self.vrings[i];
        let (Some(kick), Some(features)) = (v.kick.clone(), self.features) else {
            return;
        };
        if v.running.is_some() || !v.enabled {
            return;
        }
        let Some(live) = self.live(i) else {
            self.report_unmapped(i);
            return;
        };
        let packed = self.is_packed();
        let (mut position, mut last) = (Position::unknown(), Vec::new());
        let v = &mut self.vrings[i];
        let next = if packed {
            // The ring itself does not tell how far it is; what the front-end says must at least lie in it.
            if v.base & 0x7fff >= v.num {
                let why = format!(
                    "ring {i} cannot start at {:#x}, it has {} slots",
                    v.base, v.num
                );
                self.shared.attach.port_error(self.shared.slot, Some(why));
                return;
            }
            match &self.positions {
                _ if self.is_lost => {
                    self.unknown = Some(i);
                    return;
                }
                Some(all) => match all.packed(i, v.base, v.num) {
                    Some(left) => {
                        (position, last) = left;
                        position.start().0
                    }
                    None => {
                        self.unknown = Some(i);
                        return;
                    }
                },
                None => v.base,
            }
        } else {
            // What lies between the used index and the front-end's idea of our position was taken by somebody who never
            // gave it back (a back-end that was killed). We take it again, rather twice than never, but for what our own note
            // says that it was given back.
            let used = Split::used_idx(&live.areas);
            match &self.positions {
                Some(all) if is_rx(i) => {
                    let ahead = Split::ahead(&live.areas, used).min(v.num);
                    position = all.split(pair(i), used, ahead);
                    position.start().0
                }
                _ => used,
            }
        };
        if next != v.base {
            // After a crash of ours, as it should be. After a migration it would mean that a page of the ring stayed behind.
            tracing::warn!(
                port = self.shared.slot,
                ring = i,
                said = v.base,
                next,
                "vhost-user: the ring is not where the front-end says"
            );
            self.shared.state(|s| s.resumed += 1);
        }
        v.base = next;
        v.reported = false;
        let features = RingFeatures::new(features);
        let control = if packed {
            let mut ring = Packed::new(&live, v.num, next, &features);
            let position = position.with_unseen(ring.resume(&last));
            self.attach(i, ring, live, kick, features, position)
        } else {
            let ring = Split::new(&live, v.num, next, &features).not_shown(position.start().1);
            self.attach(i, ring, live, kick, features, position)
        };
        self.vrings[i].running = Some(control.clone());
        self.shared.set_control(i, Some(control));
        let missing = |v: &Vring| v.enabled && v.running.is_none();
        if !self.vrings.iter().step_by(2).any(missing) {
            self.attach_waiting();
        }
        let runs = self.vrings[..2].iter().all(|v| v.running.is_some());
        if runs && !self.vrings.iter().any(|v| v.reported) {
            self.shared.attach.port_error(self.shared.slot, None);
        }
    }

    /// Rings wait for others.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// They do not wait any more.
    pub fn attach_waiting(&mut self) {
        let queues = std::mem::take(&mut self.waiting);
        if !queues.is_empty() {
            self.shared.attach.set_tx(self.shared.slot, queues);
        }
    }

    /// Gives a ring to the data path.
    fn attach<R: Ring + 'static>(
        &mut self,
        i: usize,
        ring: R,
        live: Live,
        kick: Option<Arc<File>>,
        features: RingFeatures,
        position: Position,
    ) -> Arc<Control> {
        let v = &self.vrings[i];
        let control = Control::new(live, v.base, self.shared.alarm.clone());
        let gate = Gate::new(control.clone());
        let (attach, slot) = (&self.shared.attach, self.shared.slot);
        if is_rx(i) {
            let rx = Rx::new(ring, gate, v.base, kick.clone(), features, position);
            attach.attach_rx(slot, pair(i), Box::new(rx));
            // The guest may have kicked long before, or may never.
            if let Some(kick) = kick {
                let _ = raise(kick.as_fd());
            }
        } else {
            let tx = Tx::new(ring, gate, v.base, v.num, features, position);
            if self.features.is_some_and(|f| f & MQ != 0) {
                self.waiting.push((pair(i), Box::new(tx)));
            } else {
                attach.set_tx(slot, vec![(pair(i), Box::new(tx))]);
            }
        }
        control
    }

    /// Stops a ring at a burst boundary and keeps its position.
    fn stop(&mut self, i: usize) {
        let Some(control) = self.vrings[i].running.take() else {
            return;
        };
        if is_rx(i) {
            drop(self.shared.attach.detach_rx(self.shared.slot, pair(i)));
        } else {
            self.waiting.retain(|(queue, _)| *queue != pair(i));
            self.shared.attach.clear_tx(self.shared.slot, pair(i));
        }
        self.vrings[i].reported = false;
        // Whoever might still hold the queue finds it closed.
        if !control.swap(None) {
            tracing::warn!(port = %self.shared.name, ring = i, "a worker does not let go of a stopped ring");
            if let Some(all) = self.positions.take() {
                all.give_up();
            }
        }
        if !self.is_packed() {
            self.note_stopped(i);
        }
        self.vrings[i].base = control.next();
        self.shared.set_control(i, None);
    }

    /// A ring does not run, whatever an earlier run of the switch has noted of it. A packed one may go on all the same, where it is noted to
    /// be, until the front-end is told where it stands, or sets that anew.
    fn note_stopped(&self, i: usize) {
        let Some(all) = &self.positions else { return };
        if is_rx(i) {
            all.stopped(pair(i));
        }
        all.packed_stopped(i);
    }

    /// Stops everything, for the end of the connection.
    pub fn stop_all(&mut self) {
        let receive = (0..RINGS).filter(|i| is_rx(*i));
        let transmit = (0..RINGS).filter(|i| !is_rx(*i));
        receive.chain(transmit).for_each(|i| self.stop(i));
    }

    /// Gives a running ring its new snapshot, or stops it if there is none.
    fn renew(&mut self, i: usize) {
        let Some(control) = self.vrings[i].running.clone() else {
            return;
        };
        let Some(live) = self.live(i) else {
            self.stop(i);
            self.report_unmapped(i);
            return;
        };
        if !control.swap(Some(live)) {
            // A worker hangs in the middle of a burst; without the ring it can do no harm.
            self.stop(i);
            self.start(i);
        }
    }

    fn set_mem(&mut self, mem: GuestMem) {
        self.mem = Some(Arc::new(mem));
        for i in 0..RINGS {
            self.renew(i);
            self.start(i);
        }
    }

    fn reset(&mut self) {
        self.stop_all();
        self.vrings = Default::default();
        (0..RINGS).for_each(|i| self.note_stopped(i));
        self.features = None;
        self.log = None;
        self.shared.state(|s| {
            s.features = 0;
            s.logging = false;
        });
    }

    /// Everything was said about a ring, but it does not lie in the memory that the front-end has given: says so once.
    fn report_unmapped(&mut self, i: usize) {
        let has_memory = self.mem.is_some();
        let v = &mut self.vrings[i];
        if !has_memory || v.num == 0 || v.addr.is_none() || std::mem::replace(&mut v.reported, true)
        {
            return;
        }
        let which = if is_rx(i) { "transmit" } else { "receive" };
        let n = pair(i);
        let text = format!("guest's {which} ring {n} is not in guest memory, or not aligned");
        self.shared.state(|s| s.broken += 1);
        self.shared.attach.port_error(self.shared.slot, Some(text));
    }

    /// A packed ring that does not run stands where it is noted to, unless the front-end has set that anew; the driver is shown what an earlier run
    /// has not come to show.
    fn take_up(&mut self, i: usize) -> Result<()> {
        let Some(all) = &self.positions else {
            return Ok(());
        };
        let v = &self.vrings[i];
        if !v.is_based
            && let Some(at) = all.packed_at(i, v.num)
        {
            self.vrings[i].base = at;
        }
        let v = &self.vrings[i];
        let (Some(live), Some(features)) = (self.live(i), self.features) else {
            return Ok(());
        };
        let Some((position, last)) = all.packed(i, v.base, v.num) else {
            self.unknown = Some(i);
            return Err(Error::InvalidOperation("it is not known where the ring is"));
        };
        let at = position.start().0;
        let mut ring = Packed::new(&live, v.num, at, &RingFeatures::new(features));
        let unseen = ring.resume(&last);
        if ring.publish(unseen).map_err(refuse)?
            && let Some(call) = &live.call
        {
            let _ = raise(call.as_fd());
        }
        self.vrings[i].base = at;
        Ok(())
    }

    /// Why the connection has to begin anew, if it does.
    pub fn is_lost(&self) -> Option<String> {
        self.unknown.map(|i| {
            format!("ring {i}: an earlier run of the switch has noted nothing that can be read of where it is")
        })
    }

    /// Reports rings that broke since the last call. An error if the front-end is not to be served any more: with each ring that
    /// it starts it could stall a worker again.
    pub fn report_broken(&mut self) -> std::result::Result<(), String> {
        let mut end = Ok(());
        for (i, v) in self.vrings.iter_mut().enumerate() {
            let Some(why) = v.running.as_ref().and_then(|c| c.broken()) else {
                continue;
            };
            if std::mem::replace(&mut v.reported, true) {
                continue;
            }
            if let Some(err) = &v.err {
                let _ = raise(err.as_fd());
            }
            let which = if is_rx(i) { "transmit" } else { "receive" };
            let n = pair(i);
            let text = format!("guest's {which} ring {n} is broken: {why}");
            self.shared.state(|s| s.broken += 1);
            if why == Broken::Call {
                end = Err(text.clone());
            }
            self.shared.attach.port_error(self.shared.slot, Some(text));
        }
        end
    }
}

/// A descriptor that is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("ring {ring}: the {what} descriptor is no eventfd")]
struct NoEventfd {
    ring: u8,
    what: &'static str,
}

/// An eventfd of the front-end, made non-blocking: a worker must not sleep in it. What else can be read or written may
/// block whatever its flags say, or do something when it is.
fn event(ring: u8, what: &'static str, fd: Option<File>) -> Result<Option<Arc<File>>> {
    let Some(fd) = fd else { return Ok(None) };
    if !sys::is_eventfd(fd.as_fd()).map_err(refuse)? {
        return Err(refuse(NoEventfd { ring, what }));
    }
    let flags = rustix::fs::fcntl_getfl(fd.as_fd()).map_err(refuse)?;
    rustix::fs::fcntl_setfl(fd.as_fd(), flags | rustix::fs::OFlags::NONBLOCK).map_err(refuse)?;
    Ok(Some(Arc::new(fd)))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(OFFERED)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !OFFERED != 0 {
            return Err(Error::InvalidParam);
        }
        let before = self.features.replace(features);
        // Without protocol features there is no SET_VRING_ENABLE: a ring starts enabled ("Ring states").
        if features & PROTOCOL_FEATURES == 0 {
            for v in &mut self.vrings {
                v.enabled = true;
            }
        }
        let only_log = before.is_some_and(|b| (b ^ features) & !LOG_ALL == 0);
        for i in 0..RINGS {
            if only_log {
                self.renew(i);
            } else {
                self.stop(i);
            }
            self.start(i);
        }
        let logging = self.logging();
        self.shared.state(|s| {
            s.features = features;
            s.logging = logging;
        });
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions = ctx
            .iter()
            .zip(&files)
            .map(|(r, f)| {
                Region::map(
                    r.guest_phys_addr,
                    r.memory_size,
                    r.user_addr,
                    f,
                    r.mmap_offset,
                )
            })
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(refuse_mem)?;
        self.set_mem(GuestMem::new(regions).map_err(refuse_mem)?);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        // A packed ring may have any size (virtio 1.2, 2.8.10.1).
        if num == 0 || num > NUM_MAX || !(num.is_power_of_two() || self.is_packed()) {
            return Err(Error::InvalidParam);
        }
        self.vring(index)?;
        let i = index as usize;
        if self.vrings[i].num != num as u16 {
            self.stop(i);
            self.vrings[i].num = num as u16;
        }
        self.start(i);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        self.vring(index)?.addr = Some(Addr {
            desc: descriptor,
            avail: available,
            used,
            used_log: logged.then_some(log),
        });
        self.renew(index as usize);
        self.start(index as usize);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.vring(index)?;
        if self.vrings[index as usize].running.is_some() {
            self.stop(index as usize);
            self.note_stopped(index as usize);
        }
        self.vrings[index as usize].is_based = true;
        self.vrings[index as usize].base = base as u16;
        self.start(index as usize);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        let packed = self.is_packed();
        let i = index as usize;
        // One that does not run, and that an earlier run of the switch had.
        if packed && self.vrings[i].running.is_none() {
            self.take_up(i)?;
        }
        self.stop(i);
        self.note_stopped(i);
        // One that was stopped in an earlier run of the switch: what the keeper was told of its position is old.
        if !packed && let Some(live) = self.live(index as usize) {
            self.vrings[index as usize].base = Split::used_idx(&live.areas);
        }
        let v = &mut self.vrings[index as usize];
        // It starts again with new descriptors only.
        v.kick = None;
        v.call = None;
        // Packed: where we take, and where we give back, which are the same between bursts ("Packed virtqueues").
        let base = u32::from(v.base);
        let both = if packed { base | base << 16 } else { base };
        Ok(VhostUserVringState::new(index, both))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = event(index, "kick", fd)?;
        self.vring(u32::from(index))?;
        self.stop(usize::from(index));
        self.vrings[usize::from(index)].kick = Some(kick);
        self.start(usize::from(index));
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = event(index, "call", fd)?;
        let v = self.vring(u32::from(index))?;
        v.call.clone_from(&call);
        let is_running = v.running.is_some();
        self.renew(usize::from(index));
        // A signal may just have gone to the old one, where nobody listens any more.
        if let Some(call) = call
            && is_running
            && !raise(call.as_fd())
        {
            return Err(refuse(Broken::Call));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let err = event(index, "error", fd)?;
        self.vring(u32::from(index))?.err = err;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol())
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<()> {
        match bits & !features::protocol().bits() {
            0 => Ok(()),
            _ => Err(Error::InvalidParam),
        }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        // Pairs, for a network device.
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            self.start(index as usize);
        } else {
            self.stop(index as usize);
            // A packed one goes on from here, whatever the next run is told of its base.
            if !self.is_packed() {
                self.note_stopped(index as usize);
            }
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        r: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let region = Region::map(
            r.guest_phys_addr,
            r.memory_size,
            r.user_addr,
            &fd,
            r.mmap_offset,
        );
        let old = self.mem.clone().unwrap_or_default();
        self.set_mem(old.with(region.map_err(refuse_mem)?).map_err(refuse_mem)?);
        Ok(None)
    }

    fn remove_mem_region(&mut self, r: &VhostUserSingleMemoryRegion) -> Result<()> {
        let old = self.mem.clone().unwrap_or_default();
        self.set_mem(old.without(r.guest_phys_addr, r.memory_size, r.user_addr));
        Ok(())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::new(&file, log.mmap_offset, log.mmap_size).map_err(refuse_mem)?;
        self.log = Some(Arc::new(log));
        if self.logging() {
            for i in 0..RINGS {
                self.renew(i);
            }
        }
        Ok(())
    }

    // What follows belongs to features that we do not offer.

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("no config"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("no config"))
    }

    fn set_gpu_socket(&mut self, _: vhost::vhost_user::GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("no inflight region"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("no inflight region"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }
}
