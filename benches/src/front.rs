//! The handshake of a vhost-user front-end, as QEMU does it for a network device with one queue pair.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::ring::{GPA, Layout, Place};

const MRG_RXBUF: u64 = 1 << 15;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;

/// Why a switch can't be measured with a ring layout.
#[derive(Debug)]
pub struct Unsupported;

/// A connection whose rings run until it drops.
pub struct Front {
    front: Frontend,
    kicks: [EventFd; 2],
    /// Kept open: the switch signals them if it ignores that we want no interrupts.
    _calls: [EventFd; 2],
}

impl Front {
    /// Negotiates the layout and starts both rings (receive, transmit). `Err(Unsupported)` inside if the switch does not
    /// offer the layout.
    pub fn start(
        stream: UnixStream,
        layout: Layout,
        mergeable: bool,
        places: [&Place; 2],
    ) -> Result<std::result::Result<Front, Unsupported>> {
        let mut front = Frontend::from_stream(stream, 2);
        front.set_owner()?;
        let offered = front.get_features().context("GET_FEATURES")?;
        let mut want = VERSION_1 | PROTOCOL_FEATURES;
        if mergeable {
            want |= MRG_RXBUF;
        }
        if layout == Layout::Packed {
            if offered & RING_PACKED == 0 {
                return Ok(Err(Unsupported));
            }
            want |= RING_PACKED;
        }
        if offered & want != want {
            bail!("the switch offers {offered:#x}, which lacks some of {want:#x}");
        }
        let protocol = front.get_protocol_features()? & (Protocol::MQ | Protocol::REPLY_ACK);
        front.set_protocol_features(protocol)?;
        // No GET_QUEUE_NUM: the crate takes the number of pairs for the number of rings.
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(want).context("SET_FEATURES")?;
        let memory = &places[0].memory;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: memory.bytes(),
            userspace_addr: memory.user_addr(),
            mmap_offset: 0,
            mmap_handle: memory.fd(),
        };
        front.set_mem_table(&[region]).context("SET_MEM_TABLE")?;
        let event = || EventFd::new(EFD_NONBLOCK);
        let (kicks, calls) = ([event()?, event()?], [event()?, event()?]);
        for (i, place) in places.iter().enumerate() {
            let [desc, avail, used] = place.areas.map(|at| memory.user_addr() + at as u64);
            let config = VringConfigData {
                queue_max_size: place.num,
                queue_size: place.num,
                flags: 0,
                desc_table_addr: desc,
                used_ring_addr: used,
                avail_ring_addr: avail,
                log_addr: None,
            };
            front.set_vring_num(i, place.num)?;
            // A packed ring starts in slot 0 with the wrap counter 1, which is bit 15 (vhost-user, "Ring states").
            let base = match layout {
                Layout::Split => 0,
                Layout::Packed => 1 << 15,
            };
            front.set_vring_base(i, base)?;
            front.set_vring_addr(i, &config).context("SET_VRING_ADDR")?;
            front.set_vring_kick(i, &kicks[i])?;
            front.set_vring_call(i, &calls[i])?;
        }
        for i in 0..places.len() {
            front
                .set_vring_enable(i, true)
                .context("SET_VRING_ENABLE")?;
        }
        Ok(Ok(Front {
            front,
            kicks,
            _calls: calls,
        }))
    }

    /// Signals ring `i`.
    pub fn kick(&self, i: usize) {
        // A full one is raised already.
        let _ = self.kicks[i].write(1);
    }

    /// Stops both rings, as QEMU does before it lets go: the switch's answer says that it no longer touches them.
    pub fn stop(&mut self) -> Result<()> {
        for i in 0..2 {
            self.front.get_vring_base(i).context("GET_VRING_BASE")?;
        }
        Ok(())
    }
}
