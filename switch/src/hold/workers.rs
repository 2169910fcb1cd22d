//! The requests that concern workers: what is asked for, and whether it makes sense. The engine carries it out.

use gangway_shared::api::{PollMode, Refusal, RefusalCode, WorkerInfo, WorkerQueue, WorkersSet};
use gangway_shared::config::WORKERS_MAX;
use gangway_shared::config::valid::Poll;

use super::manager::Host;
use super::refuse;
use crate::datapath::crew::{Place, Unchanged};

/// The workers that there are.
pub(super) fn list(host: &Host) -> Vec<WorkerInfo> {
    let ports = &host.engine.shared().ports;
    let all = host.engine.workers().into_iter().enumerate();
    all.map(|(n, w)| WorkerInfo {
        worker: n as u32,
        cpu: w.place.cpu.map(|c| c as u32),
        poll: match w.place.poll {
            Poll::Adaptive => PollMode::Adaptive,
            Poll::Busy => PollMode::Busy,
        },
        queues: w
            .queues
            .into_iter()
            .map(|q| WorkerQueue {
                port: ports[q.port].name.clone(),
                queue: u32::from(q.queue),
            })
            .collect(),
        rx_frames: w.rx_frames,
        tx_frames: w.tx_frames,
    })
    .collect()
}

/// Changes them. `holds` names those that are open.
pub(super) fn set(
    host: &Host,
    wish: &WorkersSet,
    holds: impl FnOnce() -> String,
) -> Result<(), Refusal> {
    let mut what = String::new();
    let places = host.engine.set_workers(|now| {
        let places = places(now, wish).map_err(|e| refuse(RefusalCode::Malformed, e))?;
        let spool = &host.config.spool;
        let least = spool.segment_bytes * places.len() as u64;
        if spool.quota_bytes < least {
            let what = format!(
                "spool.quota_bytes {} is less than one segment of {} for each of {} workers",
                spool.quota_bytes,
                spool.segment_bytes,
                places.len()
            );
            return Err(refuse(RefusalCode::Resources, what).into());
        }
        what = format!("{} workers stay, not {}: ", now.len(), places.len());
        Ok(places)
    });
    let places = places.map_err(|e| {
        let e = match e {
            No::Wish(refused) => return refused,
            No::Unchanged(e) => e,
        };
        let (code, hint) = match &e {
            Unchanged::Held => (
                RefusalCode::Busy,
                format!(
                    " ({}): the number of workers changes when it has ended; wait, or `gangway abort`",
                    holds()
                ),
            ),
            Unchanged::Changing => (RefusalCode::Busy, "; try again".to_owned()),
            Unchanged::Waiting { .. } => (
                RefusalCode::Timeout,
                "; does its VM hang? Try again when it runs, or is stopped".to_owned(),
            ),
            Unchanged::NoCpu(..) => (RefusalCode::Resources, String::new()),
            Unchanged::NoWorker(_) => (RefusalCode::Resources, String::new()),
            Unchanged::Broken(_) => (RefusalCode::Internal, String::new()),
        };
        refuse(code, format!("{what}{e}{hint}"))
    })?;
    tracing::info!("{} workers now: {places:?}", places.len());
    Ok(())
}

/// Why nothing was changed.
enum No {
    /// It is not to be wished.
    Wish(Refusal),
    /// It cannot be.
    Unchanged(Unchanged),
}

impl From<Refusal> for No {
    fn from(refused: Refusal) -> No {
        No::Wish(refused)
    }
}

impl From<Unchanged> for No {
    fn from(e: Unchanged) -> No {
        No::Unchanged(e)
    }
}

/// What is wished, of what there is.
fn places(now: &[Place], wish: &WorkersSet) -> Result<Vec<Place>, String> {
    let count = wish.count.map_or(now.len(), |n| n as usize);
    if !(1..=WORKERS_MAX).contains(&count) {
        return Err(format!("{count} workers; 1 to {WORKERS_MAX} are allowed"));
    }
    let pinned = now.iter().any(|p| p.cpu.is_some());
    let cpus: Vec<Option<usize>> = match &wish.cpus {
        Some(cpus) if cpus.is_empty() => vec![None; count],
        Some(cpus) if cpus.len() != count => {
            let given = cpus.len();
            return Err(format!(
                "{given} CPUs for {count} workers; name one CPU per worker, or none"
            ));
        }
        Some(cpus) => {
            let twice = (1..cpus.len()).find(|n| cpus[..*n].contains(&cpus[*n]));
            if let Some(n) = twice {
                return Err(format!(
                    "CPU {} is named twice; give each worker its own",
                    cpus[n]
                ));
            }
            cpus.iter().map(|c| Some(*c as usize)).collect()
        }
        None if count > now.len() && pinned => {
            return Err(format!(
                "the workers are pinned; name one CPU for each of {count}, or none"
            ));
        }
        None => (0..count).map(|n| now.get(n).and_then(|p| p.cpu)).collect(),
    };
    let poll = |n: usize| match wish.poll {
        Some(PollMode::Adaptive) => Poll::Adaptive,
        Some(PollMode::Busy) => Poll::Busy,
        None => now
            .get(n)
            .or(now.first())
            .map_or(Poll::Adaptive, |p| p.poll),
    };
    let place = |(n, cpu)| Place { cpu, poll: poll(n) };
    Ok(cpus.into_iter().enumerate().map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_stays() {
        let place = |cpu, poll| Place { cpu, poll };
        let free = [place(None, Poll::Busy)];
        let bound = [place(Some(2), Poll::Adaptive), place(Some(3), Poll::Busy)];
        let wish = |count, cpus: Option<&[u32]>, poll| WorkersSet {
            count,
            cpus: cpus.map(<[u32]>::to_vec),
            poll,
        };
        let ok = |now: &[Place], w| places(now, &w).expect("makes sense");
        assert_eq!(ok(&bound, wish(None, None, None)), bound);
        assert_eq!(ok(&bound, wish(Some(1), None, None)), bound[..1]);
        assert_eq!(ok(&free, wish(Some(2), None, None)), [free[0]; 2]);
        assert_eq!(
            ok(&bound, wish(None, Some(&[]), Some(PollMode::Busy))),
            [free[0]; 2]
        );
        assert_eq!(
            ok(&free, wish(Some(2), Some(&[5, 4]), None)),
            [place(Some(5), Poll::Busy), place(Some(4), Poll::Busy)]
        );
        let no = |now: &[Place], w| places(now, &w).expect_err("makes no sense");
        assert!(no(&free, wish(Some(0), None, None)).contains("1 to 64"));
        assert!(no(&free, wish(Some(65), None, None)).contains("1 to 64"));
        assert!(no(&bound, wish(Some(3), None, None)).contains("pinned"));
        assert!(no(&bound, wish(Some(1), Some(&[1, 2]), None)).contains("2 CPUs for 1"));
        assert!(no(&bound, wish(None, Some(&[1, 1]), None)).contains("twice"));
    }
}
