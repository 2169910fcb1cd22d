//! Who may ship what: the first words on a connection.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gangway_shared::api::{Refusal, RefusalCode, VERSION};
use gangway_shared::id::HoldId;
use gangway_shared::ship::{ToSource, ToTarget};
use quinn::{Connection, SendStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::incoming::Incoming;
use super::{ShipError, receive, wire};
use crate::said::Said;

/// How long a connection may take to say what it wants.
const HELLO: Duration = Duration::from_secs(3);

/// The shipments that are expected on this host.
#[derive(Debug)]
pub struct Acceptor {
    expected: Mutex<HashMap<HoldId, Arc<Incoming>>>,
    said: Said,
    /// What takes lanes may wait for the spool's disk, and nothing else shall. Taken when we go.
    lanes: Option<Runtime>,
}

/// Threads that take lanes.
const THREADS: usize = 2;

impl Acceptor {
    /// Expects nothing yet. Starts the threads that take lanes.
    pub fn new() -> io::Result<Acceptor> {
        let lanes = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("ship")
            .enable_all()
            .build()?;
        Ok(Acceptor {
            expected: Mutex::default(),
            said: Said::default(),
            lanes: Some(lanes),
        })
    }

    /// Expects a shipment. One of the same hold is stopped and returned.
    pub fn register(&self, incoming: Arc<Incoming>) -> Option<Arc<Incoming>> {
        let old = self.lock().insert(incoming.hold, incoming);
        if let Some(o) = &old {
            o.stop();
        }
        old
    }

    /// Expects it no more, and stops it.
    pub fn unregister(&self, hold: HoldId) -> Option<Arc<Incoming>> {
        let old = self.lock().remove(&hold);
        if let Some(o) = &old {
            o.stop();
        }
        old
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<HoldId, Arc<Incoming>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection (ALPN [`gangway_shared::ship::ALPN`]) of the host `peer_name` (as its verified certificate
    /// says, without the suffix), until it ends. To be spawned.
    pub async fn accept(self: Arc<Self>, conn: Connection, peer_name: String) {
        let mut hold = None;
        let end = self.serve(&conn, &peer_name, &mut hold).await;
        let of = hold.map_or(String::new(), |h| format!(" of hold {h}"));
        let peer = format!("host '{peer_name}'");
        match end {
            Ok(()) => {}
            // One that comes back and goes again is no news either.
            Err(e @ (ShipError::Connection(_) | ShipError::Closed)) => {
                self.said.info(peer, format!("shipment{of}: {e}"));
            }
            Err(e) => {
                // The error's own text is for the source: "the target refused".
                let why = match e {
                    ShipError::Refused(r) => r.message,
                    e => e.to_string(),
                };
                self.said.warn(peer, format!("shipment{of} refused: {why}"));
            }
        }
        conn.close(quinn::VarInt::from_u32(0), b"");
    }

    /// `of`: which hold the peer has named.
    async fn serve(
        &self,
        conn: &Connection,
        peer: &str,
        of: &mut Option<HoldId>,
    ) -> Result<(), ShipError> {
        let hello = async {
            let (mut answers, mut control) = conn.accept_bi().await.map_err(wire::lost)?;
            let e = match wire::from_source(&mut control).await {
                Ok(Some(first)) => return Ok((answers, control, first)),
                Ok(None) => ShipError::Protocol("the stream ends where Hello must stand".into()),
                Err(e) => e,
            };
            refuse(conn, &mut answers, malformed(&e)).await;
            Err(e)
        };
        let late = |_| ShipError::Timeout(Some(format!("no Hello within {HELLO:?}")));
        let hello = timeout(HELLO, hello).await;
        let (mut answers, control, first) = hello.map_err(late)??;
        if let ToTarget::Hello { hold, .. } = &first {
            *of = Some(*hold);
        }
        match self.admit(&first, peer) {
            Ok(incoming) => {
                let lanes = self.lanes.as_ref().map(Runtime::handle);
                let lanes = lanes.cloned().ok_or(ShipError::Closed)?;
                receive::run(incoming, conn, control, answers, lanes).await
            }
            Err(r) => {
                refuse(conn, &mut answers, r.clone()).await;
                Err(ShipError::Refused(r))
            }
        }
    }

    fn admit(&self, first: &ToTarget, peer: &str) -> Result<Arc<Incoming>, Refusal> {
        let refuse = |code, message: String| Err(Refusal { code, message });
        let ToTarget::Hello {
            version,
            hold,
            ticket,
        } = first
        else {
            let m = format!("the first message must be Hello, not {}", name(first));
            return refuse(RefusalCode::Malformed, m);
        };
        if *version != VERSION {
            let m =
                format!("this switch speaks version {VERSION}, the peer {version}; upgrade one");
            return refuse(RefusalCode::Version, m);
        }
        let Some(incoming) = self.lock().get(hold).cloned() else {
            let m = format!("no shipment of hold {hold} is expected here");
            return refuse(RefusalCode::Unknown, m);
        };
        if peer != incoming.source_host {
            let m = format!(
                "hold {hold} is expected from host '{}', not from '{peer}'",
                incoming.source_host
            );
            return refuse(RefusalCode::Unknown, m);
        }
        if !same(ticket, &incoming.ticket) {
            let m = format!("the ticket is not that of hold {hold}");
            return refuse(RefusalCode::Unknown, m);
        }
        Ok(incoming)
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        if let Some(lanes) = self.lanes.take() {
            // Also from inside of a runtime, where nothing may block.
            lanes.shutdown_background();
        }
    }
}

fn name(m: &ToTarget) -> &'static str {
    match m {
        ToTarget::Hello { .. } => "Hello",
        ToTarget::Lane { .. } => "Lane",
        ToTarget::End { .. } => "End",
        ToTarget::Abort => "Abort",
        ToTarget::Named { .. } => "Named",
    }
}

/// Compares in a time that does not depend on the content.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let diff = a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y));
    std::hint::black_box(diff) == 0
}

pub(super) fn malformed(e: &ShipError) -> Refusal {
    Refusal {
        code: RefusalCode::Malformed,
        message: e.to_string(),
    }
}

/// Says no, and gives the peer a moment to read it.
pub(super) async fn refuse(conn: &Connection, answers: &mut SendStream, r: Refusal) {
    if wire::to_source(answers, &ToSource::Refused(r))
        .await
        .is_ok()
    {
        let _ = answers.finish();
        let _ = timeout(Duration::from_secs(1), conn.closed()).await;
    }
}
