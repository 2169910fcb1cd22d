//! The target's work on one connection: queues for the lanes, batches into them, syncs, acknowledgements.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gangway_shared::api::{Refusal, RefusalCode, Tally};
use gangway_shared::id::LaneKey;
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};
use quinn::{Connection, RecvStream, SendStream};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::accept::{malformed, refuse};
use super::incoming::{Incoming, Lane};
use super::wire::{self, lost};
use super::{LANES_MAX, ShipError};
use crate::spool::{Arriving, Kind, Queue, RejectedBatch, Writer, sync_all};

/// Acknowledgements that nobody waits for go out together, this far apart: each costs a sync of all lanes that got something.
const CALM: Duration = Duration::from_millis(20);
/// How long a lane's stream waits for the message that names the lane.
const NAMED: Duration = Duration::from_secs(3);
/// Bytes that are taken from a lane's stream at once: the peer may send as many more.
const CHUNK: usize = 64 << 10;
/// Pieces of a lane's stream that are committed together, at most.
const AT_ONCE: usize = 32;
/// While the spool has no room.
const RETRY: Duration = Duration::from_millis(1);

/// Numbers of this connection's lanes; place in [`super::incoming::State::lanes`].
#[derive(Debug, Default)]
pub(super) struct Numbers {
    place: Mutex<HashMap<u32, usize>>,
    named: Notify,
}

impl Numbers {
    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, usize>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn get(&self, lane: u32) -> usize {
        loop {
            let named = self.named.notified();
            tokio::pin!(named);
            named.as_mut().enable();
            if let Some(n) = self.lock().get(&lane) {
                return *n;
            }
            named.await;
        }
    }
}

/// Until the connection ends. One that was there before is ended first. What comes of the lanes is taken on the threads of `lanes`.
pub(super) async fn run(
    incoming: Arc<Incoming>,
    conn: &Connection,
    control: RecvStream,
    mut answers: SendStream,
    lanes: Handle,
) -> Result<(), ShipError> {
    let old = incoming.update(|s| {
        if s.stopped {
            return Err(());
        }
        Ok(s.conn.replace(conn.clone()))
    });
    match old {
        Err(()) => {
            let r = Refusal {
                code: RefusalCode::State,
                message: format!("hold {} takes no shipment any more", incoming.hold),
            };
            refuse(conn, &mut answers, r.clone()).await;
            return Err(ShipError::Refused(r));
        }
        Ok(Some(old)) => old.close(quinn::VarInt::from_u32(0), b"replaced"),
        Ok(None) => {}
    }
    let _turn = incoming.turn.lock().await;
    let mut tasks = JoinSet::new();
    let r = session(&incoming, conn, control, &mut answers, &mut tasks, &lanes).await;
    // Each gives its writer back when it is dropped.
    tasks.shutdown().await;
    incoming.update(|s| {
        let ours = s.conn.as_ref().map(Connection::stable_id) == Some(conn.stable_id());
        if ours {
            s.conn = None;
        }
        let done = !s.lanes.is_empty() && s.lanes.iter().all(|l| l.complete);
        if let (Err(e), false) = (&r, done) {
            s.error = Some(e.to_string());
        }
    });
    let refusal = match &r {
        Err(ShipError::Refused(r)) => Some(r.clone()),
        Err(e @ (ShipError::Protocol(_) | ShipError::Disagree { .. })) => Some(malformed(e)),
        _ => None,
    };
    if let Some(refusal) = refusal {
        refuse(conn, &mut answers, refusal).await;
    }
    r
}

async fn session(
    incoming: &Arc<Incoming>,
    conn: &Connection,
    control: RecvStream,
    answers: &mut SendStream,
    tasks: &mut JoinSet<Result<(), ShipError>>,
    lanes: &Handle,
) -> Result<(), ShipError> {
    let all: Vec<_> = incoming
        .lock()
        .lanes
        .iter()
        .map(|l| l.queue.clone())
        .collect();
    sync(all).await?;
    wire::to_source(answers, &welcome(incoming)).await?;

    let numbers = Arc::new(Numbers::default());
    tasks.spawn(messages(incoming.clone(), control, numbers.clone()));
    let mut acked = HashMap::new();
    loop {
        tokio::select! {
            Some(r) = tasks.join_next() => match r {
                Ok(r) => r?,
                Err(e) => return Err(ShipError::Connection(format!("a task failed: {e}"))),
            },
            s = conn.accept_uni() => {
                let stream = stream(incoming.clone(), s.map_err(lost)?, numbers.clone());
                tasks.spawn_on(stream, lanes);
            }
            () = incoming.received.notified() => {
                acknowledge(incoming, &numbers, &mut acked, answers).await?;
                let _ = timeout(CALM, incoming.urgent.notified()).await;
            }
        }
        if incoming.lock().aborted {
            return Ok(());
        }
    }
}

/// Everything here is synced: from where the source goes on.
pub(super) fn welcome(incoming: &Incoming) -> ToSource {
    let watermarks = incoming.update(|s| {
        s.error = None;
        let lanes = s.lanes.iter();
        lanes.map(|l| (l.key.clone(), l.queue.last_seq())).collect()
    });
    ToSource::Welcome { watermarks }
}

/// The control stream. Ends with the connection, or with an abort.
async fn messages(
    incoming: Arc<Incoming>,
    mut control: RecvStream,
    numbers: Arc<Numbers>,
) -> Result<(), ShipError> {
    loop {
        let goes_on = match wire::from_source(&mut control).await? {
            Some(m @ ToTarget::Lane { .. }) => {
                let (i, n) = (incoming.clone(), numbers.clone());
                // What was begun is ended even if this task is aborted meanwhile: no queue is made and then forgotten.
                let heard = tokio::task::spawn_blocking(move || heard(&i, &n, m));
                heard.await.unwrap_or_else(|e| {
                    Err(ShipError::Refused(Refusal {
                        code: RefusalCode::Internal,
                        message: format!("a lane's queue is not made: {e}"),
                    }))
                })?
            }
            Some(m) => heard(&incoming, &numbers, m)?,
            None => return Err(ShipError::Connection("the source ended it".into())),
        };
        if !goes_on {
            return Ok(());
        }
    }
}

/// What a message behind the first Hello changes; false: it was the last, an abort. Makes a new lane's queue: blocks then.
pub(super) fn heard(
    incoming: &Incoming,
    numbers: &Numbers,
    m: ToTarget,
) -> Result<bool, ShipError> {
    match m {
        ToTarget::Lane { lane, key, inside } => {
            // What is refused makes no queue.
            let place = incoming.lock().lanes.iter().position(|l| l.key == key);
            let twice = match &*numbers.lock() {
                all if all.contains_key(&lane) => Some(format!("lane {lane} was named twice")),
                all => all
                    .iter()
                    .find(|(_, p)| Some(**p) == place)
                    .map(|(n, _)| format!("lane {key} is {n} on this connection, and {lane}")),
            };
            if let Some(what) = twice {
                return Err(ShipError::Protocol(what));
            }
            let place = make_lane(incoming, key, inside).map_err(ShipError::Refused)?;
            numbers.lock().insert(lane, place);
            numbers.named.notify_waiters();
        }
        ToTarget::Named { lanes } => {
            let known = numbers.lock().len();
            if known != lanes as usize {
                let what = format!("{lanes} lanes were named, {known} are known");
                return Err(ShipError::Protocol(what));
            }
            incoming.update(|s| s.named = true);
        }
        ToTarget::End { lane, tally } => {
            let (place, known) = {
                let all = numbers.lock();
                (all.get(&lane).copied(), all.len())
            };
            incoming.update(|s| match place.and_then(|p| s.lanes.get_mut(p)) {
                // It has been compared, and acknowledged.
                Some(l) if l.complete && tally != l.acked => Err(ShipError::Disagree {
                    lane: l.key.clone(),
                    what: format!("complete with {:?}, source has {tally:?} now", l.acked),
                }),
                Some(l) => {
                    l.end = Some(tally);
                    Ok(())
                }
                None => Err(ShipError::Protocol(format!(
                    "an end of lane {lane}, which was not named; {known} lanes were"
                ))),
            })?;
            incoming.received.notify_one();
            incoming.urgent.notify_one();
        }
        ToTarget::Abort => {
            incoming.update(|s| s.aborted = true);
            return Ok(false);
        }
        ToTarget::Hello { .. } => {
            let what = "a second Hello; a connection has one";
            return Err(ShipError::Protocol(what.into()));
        }
    }
    Ok(true)
}

/// The lane's place; its queue is made if it is new.
fn make_lane(i: &Incoming, key: LaneKey, inside: bool) -> Result<usize, Refusal> {
    let _one = i.making();
    let no = |code, message: String| Err(Refusal { code, message });
    if i.lock().stopped {
        let what = "this host takes no shipment of the hold any more";
        return no(RefusalCode::State, what.into());
    }
    // Its frames would never be delivered.
    if !i.ports.contains(&key.to) {
        let what = format!(
            "a lane to port '{}'; the hold's ports here are {}",
            key.to.escape_debug(),
            i.ports.join(", ")
        );
        return no(RefusalCode::Malformed, what);
    }
    let known = i.lock().lanes.iter().position(|l| l.key == key);
    if let Some(n) = known {
        // What an earlier connection said of the lane's end is said again, or was wrong.
        i.update(|s| {
            if let Some(l) = s.lanes.get_mut(n).filter(|l| !l.complete)
                && l.end.take().is_some()
            {
                l.mismatch = None;
            }
        });
        return Ok(n);
    }
    if i.lock().lanes.len() >= LANES_MAX {
        let what = format!("more than {LANES_MAX} lanes in one hold");
        return no(RefusalCode::Resources, what);
    }
    let (writer, queue) = match i.spool.create(i.hold, Kind::Incoming, &key) {
        Ok(created) => created,
        Err(e) => return no(RefusalCode::Resources, e.to_string()),
    };
    queue.set_inside(inside);
    // A failure is latched in the queue, and found before anything is acknowledged.
    let _ = queue.sync();
    Ok(i.update(|s| {
        s.lanes.push(Lane {
            key,
            inside,
            queue,
            writer: Some(writer),
            end: None,
            complete: false,
            mismatch: None,
            acked: Tally::default(),
        });
        s.lanes.len() - 1
    }))
}

/// A lane's writer, which goes back to the lane whatever happens.
pub(super) struct Borrowed {
    incoming: Arc<Incoming>,
    place: usize,
    pub(super) writer: Option<Writer>,
}

impl Borrowed {
    fn take(incoming: Arc<Incoming>, place: usize) -> Option<Borrowed> {
        let writer = incoming.lock().lanes.get_mut(place)?.writer.take()?;
        Some(Borrowed {
            incoming,
            place,
            writer: Some(writer),
        })
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let writer = self.writer.take().map(|mut w| {
            w.commit();
            w
        });
        self.incoming.update(|s| match s.lanes.get_mut(self.place) {
            Some(l) if !s.stopped => l.writer = writer,
            _ => drop(writer),
        });
        self.incoming.received.notify_one();
        self.incoming.urgent.notify_one();
    }
}

pub(super) fn unnamed(lane: u32) -> ShipError {
    ShipError::Protocol(format!("a stream of lane {lane}, unnamed"))
}

/// A lane's stream begins: it has the lane's writer, or is refused.
pub(super) fn begin(
    incoming: &Arc<Incoming>,
    place: usize,
    open: &LaneOpen,
) -> Result<Borrowed, ShipError> {
    let lane = open.lane;
    let b = Borrowed::take(incoming.clone(), place).ok_or_else(|| {
        let lanes = incoming.lanes();
        let sealed = lanes.get(place).filter(|l| l.queue.is_sealed());
        ShipError::Protocol(sealed.map_or_else(
            || format!("a second stream of lane {lane}; a lane has one"),
            |l| {
                format!(
                    "lane {lane} is complete, nothing follows record {}",
                    l.queue.last_seq()
                )
            },
        ))
    })?;
    let next = b.writer.as_ref().map_or(0, Writer::next_seq);
    if open.first_seq > next {
        return Err(ShipError::Protocol(format!(
            "lane {lane} goes on at record {}, {next} is missing",
            open.first_seq
        )));
    }
    Ok(b)
}

/// Takes bytes of a lane's stream; false: those that are left wait for room.
pub(super) fn take(
    lane: u32,
    arriving: &mut Arriving,
    writer: &mut Writer,
    bytes: &mut &[u8],
) -> Result<bool, ShipError> {
    let garbage = |what: String| ShipError::Protocol(format!("lane {lane}: {what}"));
    match arriving.push(writer, bytes) {
        Ok(()) => Ok(true),
        Err(RejectedBatch::NoRoom(_)) => Ok(false),
        Err(e @ (RejectedBatch::Garbage | RejectedBatch::Header(_))) => {
            let next = writer.next_seq();
            Err(garbage(format!("{e} where record {next} must follow")))
        }
        Err(e) => Err(garbage(e.to_string())),
    }
}

/// A lane's stream has ended.
pub(super) fn end(lane: u32, arriving: &Arriving, writer: &Writer) -> Result<(), ShipError> {
    match arriving.pending() {
        0 => Ok(()),
        n => Err(ShipError::Protocol(format!(
            "lane {lane} ends inside a batch, {n} bytes behind its start, where record {} must follow",
            writer.next_seq()
        ))),
    }
}

async fn stream(
    incoming: Arc<Incoming>,
    mut s: RecvStream,
    numbers: Arc<Numbers>,
) -> Result<(), ShipError> {
    let open = wire::read_lane_open(&mut s).await?;
    let lane = open.lane;
    let place = timeout(NAMED, numbers.get(lane)).await;
    let place = place.map_err(|_| unnamed(lane))?;
    let mut b = begin(&incoming, place, &open)?;
    let Some(writer) = b.writer.as_mut() else {
        return Ok(());
    };
    let mut arriving = Arriving::default();
    let mut uncommitted = 0;
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = s.read_chunk(CHUNK, true), if uncommitted < AT_ONCE => chunk,
            // Enough, or no more is here.
            () = std::future::ready(()) => {
                uncommitted = 0;
                writer.commit();
                incoming.received.notify_one();
                s.read_chunk(CHUNK, true).await
            }
        };
        let Some(chunk) = chunk.map_err(lost)? else {
            break;
        };
        uncommitted += 1;
        let mut bytes = &chunk.bytes[..];
        while !take(lane, &mut arriving, writer, &mut bytes)? {
            writer.commit();
            wait_for_room(writer, &incoming).await?;
        }
    }
    end(lane, &arriving, writer)
}

async fn wait_for_room(writer: &Writer, incoming: &Incoming) -> Result<(), ShipError> {
    let q = writer.queue();
    if let Some(e) = q.failed() {
        return Err(ShipError::Refused(Refusal {
            code: RefusalCode::Internal,
            message: format!("the target's spool has stopped: {e}"),
        }));
    }
    if q.is_removed() {
        return Err(ShipError::Closed);
    }
    incoming.received.notify_one();
    sleep(RETRY).await;
    Ok(())
}

/// What a lane has got and nobody acknowledged yet.
pub(super) struct Due {
    lane: u32,
    place: usize,
    seq: u64,
    tally: Tally,
    complete: bool,
    pub(super) queue: Arc<Queue>,
}

/// By the source's number: what was acknowledged on this connection.
pub(super) type Acked = HashMap<u32, (u64, bool)>;

/// Syncs and acknowledges what has come since the last time.
async fn acknowledge(
    incoming: &Arc<Incoming>,
    numbers: &Numbers,
    acked: &mut Acked,
    answers: &mut SendStream,
) -> Result<(), ShipError> {
    let due = due(incoming, numbers, acked)?;
    if due.is_empty() {
        return Ok(());
    }
    sync(due.iter().map(|d| d.queue.clone()).collect()).await?;
    for d in due {
        wire::to_source(answers, &synced(incoming, acked, &d)).await?;
    }
    Ok(())
}

/// What has come since the last time. Seals what is at its end.
pub(super) fn due(
    incoming: &Incoming,
    numbers: &Numbers,
    acked: &Acked,
) -> Result<Vec<Due>, ShipError> {
    let places: Vec<(u32, usize)> = numbers.lock().iter().map(|(n, p)| (*n, *p)).collect();
    let mut due = Vec::new();
    incoming.update(|s| {
        for (lane, place) in places {
            let Some(l) = s.lanes.get_mut(place) else {
                continue;
            };
            let complete = at_end(l)?;
            let (seq, tally) = l.queue.progress();
            if acked.get(&lane) != Some(&(seq, complete)) && (seq > 0 || complete) {
                due.push(Due {
                    lane,
                    place,
                    seq,
                    tally,
                    complete,
                    queue: l.queue.clone(),
                });
            }
        }
        Ok(due)
    })
}

/// It is on the disk: what the source is told.
pub(super) fn synced(incoming: &Incoming, acked: &mut Acked, d: &Due) -> ToSource {
    acked.insert(d.lane, (d.seq, d.complete));
    incoming.update(|s| {
        if let Some(l) = s.lanes.get_mut(d.place) {
            l.acked = d.tally;
            l.complete |= d.complete;
        }
    });
    ToSource::Ack {
        lane: d.lane,
        seq: d.seq,
        tally: d.tally,
        complete: d.complete,
    }
}

/// True if everything is here that the source has announced; seals the queue then.
fn at_end(l: &mut Lane) -> Result<bool, ShipError> {
    let Some(end) = l.end else { return Ok(false) };
    let here = l.queue.tally();
    if here == end {
        if let Some(mut w) = l.writer.take() {
            w.seal();
        }
        // While a stream still has the writer its end is not seen yet.
        return Ok(l.queue.is_sealed());
    }
    if here.frames < end.frames && !l.queue.is_sealed() {
        return Ok(false);
    }
    let what = format!("source has {end:?}, target {here:?}");
    l.mismatch = Some(what.clone());
    Err(ShipError::Disagree {
        lane: l.key.clone(),
        what,
    })
}

/// Syncs several queues.
async fn sync(queues: Vec<Arc<Queue>>) -> Result<(), ShipError> {
    let done = tokio::task::spawn_blocking(move || sync_all(&queues)).await;
    let failed = match done {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(e)) => e.to_string(),
        Err(e) => e.to_string(),
    };
    Err(ShipError::Refused(Refusal {
        code: RefusalCode::Internal,
        message: format!("the target can't sync: {failed}"),
    }))
}
