//! What one end of a flow reports. The lab joins the ends by the flow's name.

use serde::{Deserialize, Serialize};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::socket;
use super::tally::Tally;
use super::wire::Digest;

/// Whose clock measured the stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Stands still while the VM is paused.
    Guest,
    /// The machine's monotonic clock.
    Host,
}

/// One end of a flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// The flow's name, the same at both ends.
    pub flow: String,
    /// Sent by this end; `None` when it only receives.
    pub sent: Option<u64>,
    /// Received by this end; `None` when it only sends.
    pub received: Option<u64>,
    /// Received more than once.
    pub duplicated: u64,
    /// Received after a later one.
    pub reordered: u64,
    /// The first of these, as ranges; and the highest number that was there before.
    #[serde(default)]
    pub late: Vec<(u64, u64, u64)>,
    /// Received, but not as it was sent.
    pub corrupted: u64,
    /// The longest time between two arrivals.
    pub stall_ms_max: Option<f64>,
    /// Whose milliseconds these are.
    pub clock: Option<Clock>,
    /// TCP segments that this end sent again.
    pub retransmits: u64,
    /// Digest of the stream so far.
    pub digest: Option<String>,
    /// The first ranges of numbers that are missing at a receiver which knows what was sent.
    pub missing: Vec<(u64, u64)>,
    /// The last thing that went wrong.
    pub error: Option<String>,
}

/// A command's answer: all ends of a program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ends {
    /// Who answers.
    pub name: String,
    /// Its ends.
    pub ends: Vec<End>,
}

/// The live state of an end, shared between its thread and the one that answers.
#[derive(Clone)]
pub struct Live(Arc<Mutex<State>>);

/// What the thread of a flow keeps.
pub struct State {
    flow: String,
    clock: Clock,
    epoch: Instant,
    /// Sent so far, when this end sends.
    pub sent: Option<u64>,
    /// What arrived, when this end receives.
    pub tally: Option<Tally>,
    /// The digest, when the flow is a stream.
    pub digest: Option<Digest>,
    /// The last error.
    pub error: Option<String>,
    sockets: Vec<TcpStream>,
    retransmits_closed: u64,
    twin: Twin,
}

impl State {
    /// Counts one as sent.
    pub fn count_sent(&mut self) {
        self.sent = Some(self.sent.unwrap_or(0) + 1);
        self.twin.count();
    }
}

/// A count that is kept twice, on different pages of memory. They differ when a VM arrives with a page as it was
/// some time ago: its own counts are worth nothing then.
struct Twin {
    here: u64,
    there: Box<[u64; 4 * PAGE_WORDS]>,
}

/// Of a page of 4 KiB.
const PAGE_WORDS: usize = 512;

impl Twin {
    fn count(&mut self) {
        self.here += 1;
        self.there[2 * PAGE_WORDS] += 1;
    }

    /// What is said when they differ: as a kernel does that has found damage.
    fn damage(&self) -> Option<String> {
        let (here, there) = (self.here, self.there[2 * PAGE_WORDS]);
        (here != there)
            .then(|| format!("BUG: a page of this VM's memory has gone back: {here} events on one, {there} on another"))
    }
}

impl Live {
    /// An end that sends.
    pub fn sender(flow: &str, clock: Clock) -> Self {
        Self::new(flow, clock, true, false)
    }

    /// An end that receives.
    pub fn receiver(flow: &str, clock: Clock) -> Self {
        Self::new(flow, clock, false, true)
    }

    /// An end that sends and gets back.
    pub fn both(flow: &str, clock: Clock) -> Self {
        Self::new(flow, clock, true, true)
    }

    /// An end that only answers: nothing of its own to count but retransmissions.
    pub fn neither(flow: &str, clock: Clock) -> Self {
        Self::new(flow, clock, false, false)
    }

    fn new(flow: &str, clock: Clock, sends: bool, receives: bool) -> Self {
        Self(Arc::new(Mutex::new(State {
            flow: flow.to_owned(),
            clock,
            epoch: Instant::now(),
            sent: sends.then_some(0),
            tally: receives.then(Tally::default),
            digest: None,
            error: None,
            sockets: Vec::new(),
            retransmits_closed: 0,
            twin: Twin {
                here: 0,
                there: Box::new([0; 4 * PAGE_WORDS]),
            },
        })))
    }

    /// The state, for a moment.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one as sent.
    pub fn count_sent(&self) {
        self.lock().count_sent();
    }

    /// Counts an arrival.
    pub fn count_received(&self, number: Option<u64>) {
        let mut state = self.lock();
        let now_ns = state.epoch.elapsed().as_nanos() as u64;
        state.twin.count();
        if let Some(tally) = &mut state.tally {
            tally.take(number, now_ns);
        }
    }

    /// Notes what went wrong.
    pub fn fail(&self, error: impl std::fmt::Display) {
        self.lock().error = Some(error.to_string());
    }

    /// The connection whose retransmissions count as this flow's.
    pub fn watch(&self, stream: &TcpStream) {
        let mut state = self.lock();
        // A finished connection gives its count once and lets its descriptor go.
        if state.sockets.len() >= 8 {
            let gone = state.sockets.remove(0);
            state.retransmits_closed += socket::retransmits(&gone);
        }
        if let Ok(stream) = stream.try_clone() {
            state.sockets.push(stream);
        }
    }

    /// The state as a report.
    pub fn end(&self) -> End {
        let state = self.lock();
        // On a guest's console, where its kernel's own words are looked for.
        if let Some(damage) = state.twin.damage() {
            eprintln!("{}: {damage}", state.flow);
        }
        let live: u64 = state.sockets.iter().map(socket::retransmits).sum();
        let mut end = End {
            flow: state.flow.clone(),
            sent: state.sent,
            retransmits: state.retransmits_closed + live,
            digest: state.digest.map(Digest::hex),
            error: state.error.clone(),
            ..End::default()
        };
        if let Some(tally) = &state.tally {
            end.received = Some(tally.received);
            end.duplicated = tally.duplicated;
            end.reordered = tally.reordered;
            end.late = tally.late.clone();
            end.corrupted = tally.corrupted;
            end.stall_ms_max = Some((tally.stall_ns_max / 1000) as f64 / 1000.0);
            end.clock = Some(state.clock);
            // Without the sender's count the tail stays unknown; gaps up to the last arrival are known.
            end.missing = tally.missing(state.sent.unwrap_or(tally.received), 8);
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_went_back_is_told() {
        let mut twin = Twin {
            here: 0,
            there: Box::new([0; 4 * PAGE_WORDS]),
        };
        twin.count();
        twin.count();
        assert_eq!(twin.damage(), None);
        twin.here = 1;
        let said = twin.damage().unwrap();
        assert!(said.contains("BUG:") && said.contains("1 events on one, 2 on another"));
    }
}
