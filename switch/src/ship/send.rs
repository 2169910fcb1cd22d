//! The source's work: connect, be welcomed, pump each lane, note acknowledgements; and again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use gangway_shared::api::{Tally, VERSION};
use gangway_shared::pki::host_server_name;
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::ShipError;
use super::outgoing::{Ending, Outgoing};
use super::wire::{self, lost};
use crate::said::Said;
use crate::spool::Queue;

const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A connection that has lasted so long is well.
const SETTLED: Duration = Duration::from_millis(500);
/// For each step up to the welcome.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// Batches go to QUIC together, up to about so many bytes.
const CHUNK: usize = 64 << 10;
/// Batches of fewer bytes are copied into one piece: for each packet quinn goes through the pieces of a stream that are under way.
const COPIED: usize = 16 << 10;
/// A lane that has caught up looks again after this long (or at its seal), so that a writer need not wake us for each
/// of its bursts.
const CALM: Duration = Duration::from_millis(1);

/// Until it is closed or fails for good.
pub(super) async fn run(out: Arc<Outgoing>) {
    let mut backoff = BACKOFF_MIN;
    let said = Said::default();
    let me = format!("hold {} to {}", out.args.hold, out.args.target_host);
    loop {
        let r = session(&out, &mut backoff).await;
        let e = r.err().unwrap_or(ShipError::Closed);
        match &e {
            ShipError::Closed => {}
            // The order to open the hold is refused, and says so.
            e if !out.lock().welcomed => tracing::debug!("{me}: shipment: {e}"),
            e if e.is_final() => said.warn(&me, format_args!("shipment ended: {e}")),
            e => said.info(&me, format_args!("shipment: {e}; trying again")),
        }
        let over = out.update(|s| {
            s.connected = false;
            let first_refusal = !s.welcomed && matches!(e, ShipError::Refused(_));
            if s.end.is_some() {
                s.fatal.get_or_insert(ShipError::Closed);
            } else if e.is_final() || first_refusal {
                s.fatal = Some(e.clone());
            }
            s.error = Some(e);
            s.fatal.is_some()
        });
        if over {
            return;
        }
        tokio::select! {
            () = sleep(backoff) => {}
            () = ending(&out) => {}
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Resolves when the shipment is to end.
async fn ending(out: &Outgoing) {
    while out.lock().end.is_none() {
        out.poke.notified().await;
    }
}

async fn session(out: &Arc<Outgoing>, backoff: &mut Duration) -> Result<(), ShipError> {
    if out.lock().end.is_some() {
        return Ok(());
    }
    let conn = tokio::select! {
        r = timeout(HANDSHAKE, connect(out)) => r.map_err(|_| {
            ShipError::Connection(format!("{} does not answer", out.args.target_address))
        })??,
        () = ending(out) => return Ok(()),
    };
    let r = connected(out, &conn, backoff).await;
    let path = conn.stats().path;
    tracing::debug!(
        hold = %out.args.hold,
        mtu = path.current_mtu,
        rtt = ?path.rtt,
        cwnd = path.cwnd,
        sent = path.sent_packets,
        lost = path.lost_packets,
        lost_bytes = path.lost_bytes,
        congested = path.congestion_events,
        handed = out.lock().lanes.iter().map(|l| l.handed).sum::<u64>(),
        "the shipment's connection"
    );
    conn.close(quinn::VarInt::from_u32(0), b"");
    r
}

async fn connect(out: &Outgoing) -> Result<Connection, ShipError> {
    let address = &out.args.target_address;
    let bad = |e: &dyn std::fmt::Display| ShipError::Connection(format!("{address}: {e}"));
    let mut found = tokio::net::lookup_host(address)
        .await
        .map_err(|e| bad(&e))?;
    let to: SocketAddr = found.next().ok_or_else(|| bad(&"no such host"))?;
    let name = host_server_name(&out.args.target_host).map_err(|e| bad(&e))?;
    let connecting = out
        .endpoint
        .connect_with(out.client.clone(), to, &name)
        .map_err(|e| bad(&e))?;
    connecting.await.map_err(|e| {
        let text = e.to_string();
        let whose = match e {
            quinn::ConnectionError::ConnectionClosed(_) => "this host".into(),
            _ => format!("host '{}'", out.args.target_host),
        };
        match wire::dated(&text) {
            (why, true) => bad(&format!(
                "{why}: that of {whose}; issue it anew (`gangway pki issue`), or compare the clocks"
            )),
            (_, false) => bad(&text),
        }
    })
}

/// What lane tasks tell the session.
struct LaneEnd {
    lane: u32,
    last_seq: u64,
    tally: Tally,
}

async fn connected(
    out: &Arc<Outgoing>,
    conn: &Connection,
    backoff: &mut Duration,
) -> Result<(), ShipError> {
    let (mut control, mut answers) = conn.open_bi().await.map_err(lost)?;
    let hello = ToTarget::Hello {
        version: VERSION,
        hold: out.args.hold,
        ticket: out.args.ticket,
    };
    wire::to_target(&mut control, &hello).await?;
    let answer = timeout(HANDSHAKE, wire::from_target(&mut answers)).await;
    let watermarks = match answer.map_err(|_| ShipError::Timeout(None))?? {
        Some(ToSource::Welcome { watermarks }) => watermarks,
        Some(ToSource::Refused(r)) => return Err(ShipError::Refused(r)),
        Some(m) => return Err(ShipError::Protocol(format!("{m:?} instead of a welcome"))),
        None => return Err(ShipError::Connection("closed before the welcome".into())),
    };
    out.update(|s| {
        s.connected = true;
        s.welcomed = true;
    });
    let settled = sleep(SETTLED);
    tokio::pin!(settled);
    let mut new = true;

    let (ends, mut ended) = mpsc::channel::<LaneEnd>(16);
    let mut tasks = JoinSet::new();
    tasks.spawn(acknowledgements(out.clone(), answers));
    let mut started = 0;
    let mut named = false;
    loop {
        let (fresh, end, all) = {
            let s = out.lock();
            let fresh = s.lanes.get(started..).unwrap_or_default().to_vec();
            (fresh, s.end, s.named)
        };
        match end {
            Some(Ending::Abort) => {
                wire::to_target(&mut control, &ToTarget::Abort).await?;
                let _ = control.finish();
                // The target closes when it has read that.
                let _ = timeout(Duration::from_secs(1), conn.closed()).await;
                return Ok(());
            }
            Some(Ending::Close) => return Ok(()),
            None => {}
        }
        for l in fresh {
            let lane = started as u32;
            started += 1;
            let message = ToTarget::Lane {
                lane,
                key: l.key.clone(),
                inside: l.inside,
            };
            wire::to_target(&mut control, &message).await?;
            let safe = watermarks.iter().find(|(k, _)| *k == l.key);
            let safe = safe.map_or(0, |(_, seq)| *seq);
            if safe > l.queue.last_seq() {
                return Err(ShipError::Disagree {
                    lane: l.key,
                    what: format!(
                        "the target has {safe} records, only {} are here",
                        l.queue.last_seq()
                    ),
                });
            }
            let pump = pump(out.clone(), conn.clone(), lane, l.queue, safe, ends.clone());
            tasks.spawn(pump);
        }
        if all && !named {
            let lanes = started as u32;
            wire::to_target(&mut control, &ToTarget::Named { lanes }).await?;
            named = true;
        }
        tokio::select! {
            Some(e) = ended.recv() => {
                let message = ToTarget::End { lane: e.lane, tally: e.tally };
                out.update(|s| {
                    if let Some(l) = s.lanes.get_mut(e.lane as usize) {
                        l.sent = Some((e.last_seq, e.tally));
                    }
                });
                wire::to_target(&mut control, &message).await?;
            }
            // The acknowledgements' task ends only with an error.
            Some(r) = tasks.join_next() => match r {
                Ok(r) => r?,
                Err(e) => return Err(ShipError::Connection(format!("a task failed: {e}"))),
            },
            () = out.poke.notified() => {}
            // Not before: a target that welcomes us and then refuses again and again is in trouble.
            () = &mut settled, if new => {
                new = false;
                *backoff = BACKOFF_MIN;
                out.update(|s| s.error = None);
            }
        }
    }
}

/// Sends what is behind record `safe`, in whole batches, until the queue is sealed and all of it is sent.
async fn pump(
    out: Arc<Outgoing>,
    conn: Connection,
    lane: u32,
    queue: Arc<Queue>,
    safe: u64,
    ends: mpsc::Sender<LaneEnd>,
) -> Result<(), ShipError> {
    let mut reader = queue.reader();
    if let Some(d) = reader.skip_to(safe).into_iter().next() {
        return Err(d.into());
    }
    let mut stream: Option<SendStream> = None;
    let (mut batches, mut small) = (Vec::new(), BytesMut::new());
    while !reader.finished() {
        let mut bytes = 0;
        while bytes < CHUNK {
            let Some(wire) = reader.wire()? else {
                break;
            };
            bytes += wire.len();
            if wire.len() < COPIED {
                small.extend_from_slice(&wire);
            } else {
                batches.extend((!small.is_empty()).then(|| small.split().freeze()));
                batches.push(wire);
            }
            reader.advance_batch();
        }
        batches.extend((!small.is_empty()).then(|| small.split().freeze()));
        if batches.is_empty() {
            if queue.is_removed() {
                return Ok(());
            }
            let _ = timeout(CALM, queue.sealed()).await;
            reader.ready().await;
            continue;
        }
        let s = match &mut stream {
            Some(s) => s,
            none => {
                let mut s = conn.open_uni().await.map_err(lost)?;
                let first_seq = safe + 1;
                wire::lane_open(&mut s, &LaneOpen { lane, first_seq }).await?;
                none.insert(s)
            }
        };
        let mut rest = &mut batches[..];
        while !rest.is_empty() {
            let taken = s.write_chunks(rest).await.map_err(lost)?;
            rest = rest.get_mut(taken.chunks..).unwrap_or_default();
            let mut state = out.lock();
            #[cfg(test)]
            state.taken.push((lane, taken.bytes));
            if let Some(l) = state.lanes.get_mut(lane as usize) {
                l.handed += taken.bytes as u64;
            }
        }
        batches.clear();
        // The other lanes' turn.
        tokio::task::yield_now().await;
    }
    if let Some(mut s) = stream {
        // It is closed already if the connection is, and then all is done again.
        let _ = s.finish();
    }
    let end = LaneEnd {
        lane,
        last_seq: reader.next_seq() - 1,
        tally: reader.tally(),
    };
    let _ = ends.send(end).await;
    Ok(())
}

/// Notes what the target has. Ends with an error.
async fn acknowledgements(out: Arc<Outgoing>, mut answers: RecvStream) -> Result<(), ShipError> {
    loop {
        match wire::from_target(&mut answers).await? {
            Some(ToSource::Ack {
                lane,
                seq,
                tally,
                complete,
            }) => out.update(|s| {
                let Some(l) = s.lanes.get_mut(lane as usize) else {
                    return Err(ShipError::Protocol(format!("lane {lane} does not exist")));
                };
                let disagree = |what| ShipError::Disagree {
                    lane: l.key.clone(),
                    what,
                };
                if seq > l.queue.last_seq() {
                    return Err(disagree(format!("record {seq} acknowledged, never sent")));
                }
                if complete && (tally != l.queue.tally() || !l.queue.is_sealed()) {
                    return Err(disagree(format!(
                        "source has {:?}, target {tally:?}",
                        l.queue.tally()
                    )));
                }
                l.acked_seq = l.acked_seq.max(seq);
                l.acked = tally;
                s.error = None;
                l.complete |= complete;
                Ok(())
            })?,
            Some(ToSource::Refused(r)) => return Err(ShipError::Refused(r)),
            Some(ToSource::Welcome { .. }) => {
                return Err(ShipError::Protocol("a second welcome".into()));
            }
            None => return Err(ShipError::Connection("the target ended it".into())),
        }
    }
}
