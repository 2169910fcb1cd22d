//! What a back-end that begins anew must be told, so that it is where the one before it was. Pure.
//!
//! Of each thing that a front-end sets only the last counts, so the transcript is bounded by what there is: rings, regions. It is told in
//! an order of its own: what rings need first, among it the dirty log before the features that turn it on; then that they
//! are enabled; their kick descriptors last, each of which starts its ring.
//!
//! ```text
//!   asked and accepted features | memory | log | features | ring: size, base, addresses, call, error | enabled | kick
//! ```
//!
//! Where a ring was is not told: the back-end sees in the ring what was given back (split rings), and what it has noted beside its socket. A packed ring does not show it:
//! a connection with packed rings is kept only if the back-end has noted it ([`Transcript::can_be_told`]).

use std::collections::BTreeMap;

use crate::message::Message;
use crate::message::request::*;

/// Rings of a device, and regions of its memory, at most.
const RINGS_MAX: u32 = 256;
const REGIONS_MAX: usize = 1024;
/// `VIRTIO_F_RING_PACKED`.
const RING_PACKED: u64 = 1 << 34;

/// A message that cannot be of a front-end that is right in its mind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Shorter than what it must say.
    #[error("request {0} is too short")]
    Short(u32),
    /// A ring that no device has.
    #[error("request {0} is about ring {1}; there are {RINGS_MAX} at most")]
    Ring(u32, u32),
    /// More memory than anybody has.
    #[error("more than {REGIONS_MAX} memory regions")]
    Regions,
}

/// The order in which things are told, and what of them counts once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    AskedFeatures,
    Owner,
    AskedProtocol,
    Protocol,
    /// A table, or a change of it, in the order in which they came.
    Memory(usize),
    LogBase,
    LogFd,
    Features,
    /// Ring, and what of it.
    Ring(u32, RingPart),
    Enabled(u32),
    Kick(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum RingPart {
    Num,
    Base,
    Addr,
    Call,
    Err,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Transcript<F> {
    told: BTreeMap<Key, Message<F>>,
    /// What was offered when it was asked for: a new back-end must offer that, too.
    offered: BTreeMap<Key, u64>,
    regions: usize,
}

impl<F> Default for Transcript<F> {
    fn default() -> Self {
        Transcript {
            told: BTreeMap::new(),
            offered: BTreeMap::new(),
            regions: 0,
        }
    }
}

impl<F: Clone> Transcript<F> {
    /// Protocol features that both sides have.
    pub fn protocol(&self) -> u64 {
        let told = self.told.get(&Key::Protocol);
        told.and_then(Message::long).unwrap_or(0)
    }

    /// The front-end has said this, and the back-end, if it answers that, this.
    ///
    /// # Errors
    /// If it makes no sense. Nothing has changed then.
    pub fn note(&mut self, m: &Message<F>, answer: Option<&Message<F>>) -> Result<(), Refused> {
        if answer.is_some_and(|a| !m.was_done(a)) {
            return Ok(());
        }
        let key = match m.request {
            GET_FEATURES | GET_PROTOCOL_FEATURES => {
                let key = match m.request {
                    GET_FEATURES => Key::AskedFeatures,
                    _ => Key::AskedProtocol,
                };
                let offered = answer.and_then(Message::long);
                self.offered.insert(key, offered.unwrap_or(0));
                key
            }
            SET_OWNER => Key::Owner,
            SET_PROTOCOL_FEATURES => {
                m.long().ok_or(Refused::Short(m.request))?;
                Key::Protocol
            }
            SET_FEATURES => {
                m.long().ok_or(Refused::Short(m.request))?;
                Key::Features
            }
            SET_MEM_TABLE => {
                self.told.retain(|k, _| !matches!(k, Key::Memory(_)));
                self.next_region()?
            }
            ADD_MEM_REG => {
                region(m)?;
                self.next_region()?
            }
            REM_MEM_REG => {
                let gone = region(m)?;
                let is_it = |m: &Message<F>| m.request == ADD_MEM_REG && region(m) == Ok(gone);
                let added = self.told.iter().find(|(_, m)| is_it(m)).map(|(k, _)| *k);
                match added {
                    Some(key) => {
                        self.told.remove(&key);
                        return Ok(());
                    }
                    // Of a table.
                    None => self.next_region()?,
                }
            }
            SET_LOG_BASE => Key::LogBase,
            SET_LOG_FD => Key::LogFd,
            SET_VRING_NUM => Key::Ring(ring(m)?, RingPart::Num),
            SET_VRING_BASE => Key::Ring(ring(m)?, RingPart::Base),
            SET_VRING_ADDR => Key::Ring(ring(m)?, RingPart::Addr),
            SET_VRING_CALL => Key::Ring(ring(m)?, RingPart::Call),
            SET_VRING_ERR => Key::Ring(ring(m)?, RingPart::Err),
            SET_VRING_ENABLE => Key::Enabled(ring(m)?),
            SET_VRING_KICK => Key::Kick(ring(m)?),
            GET_VRING_BASE => {
                // It has stopped, and starts again with new descriptors only.
                let ring = ring(m)?;
                self.told.remove(&Key::Ring(ring, RingPart::Call));
                self.told.remove(&Key::Kick(ring));
                // Where it was: what was set before is old.
                let base = Key::Ring(ring, RingPart::Base);
                let here =
                    answer.filter(|a| self::ring(*a) == Ok(ring) && a.body.len() == m.body.len());
                if let (Some(said), Some(a)) = (self.told.get_mut(&base), here) {
                    said.body.clone_from(&a.body);
                }
                return Ok(());
            }
            RESET_OWNER | RESET_DEVICE => {
                self.told.retain(|k, _| *k < Key::LogBase);
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.told.insert(key, m.clone());
        Ok(())
    }

    fn next_region(&mut self) -> Result<Key, Refused> {
        let last = self.told.keys().filter(|k| matches!(k, Key::Memory(_)));
        if last.count() >= REGIONS_MAX {
            return Err(Refused::Regions);
        }
        self.regions += 1;
        Ok(Key::Memory(self.regions))
    }

    /// What a new back-end is told, in this order, with what its answer must offer at least.
    pub fn tell(&self) -> impl Iterator<Item = (&Message<F>, u64)> {
        let offered = |k| self.offered.get(k).copied().unwrap_or(0);
        self.told.iter().map(move |(k, m)| (m, offered(k)))
    }

    /// The descriptors by which guests are told of frames.
    pub fn calls(&self) -> impl Iterator<Item = &F> {
        self.told
            .iter()
            .filter(|(k, _)| matches!(k, Key::Ring(_, RingPart::Call)))
            .filter_map(|(_, m)| m.fds.first())
    }

    /// Whether a new back-end can know the rest from the guest's memory.
    pub fn can_be_told(&self) -> bool {
        let features = self.told.get(&Key::Features).and_then(Message::long);
        features.unwrap_or(0) & RING_PACKED == 0
    }
}

/// The ring that a message is about: the first word, or its lowest byte ("A vring state description", "Ring-based messages with a
/// descriptor").
pub fn ring<F>(m: &Message<F>) -> Result<u32, Refused> {
    let first = m.word(0).ok_or(Refused::Short(m.request))?;
    let ring = match m.request {
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => first & 0xff,
        _ => first,
    };
    match ring < RINGS_MAX {
        true => Ok(ring),
        false => Err(Refused::Ring(m.request, ring)),
    }
}

/// Guest address, size and user address of a region ("Single memory region description").
fn region<F>(m: &Message<F>) -> Result<[u8; 24], Refused> {
    let said = m.body.get(8..32).and_then(|b| b.try_into().ok());
    said.ok_or(Refused::Short(m.request))
}
