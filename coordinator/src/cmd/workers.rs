//! `gangway host workers`.

use std::time::{Duration, Instant};

use gangway_shared::api::{PollMode, RefusalCode, Request, WorkerInfo, WorkersSet};
use serde_json::json;

use super::Context;
use crate::cli::{Format, Poll, WorkersArgs, WorkersCmd};
use crate::client::{ClientError, Switch};
use crate::exit::{Code, Failure};
use crate::table::{json, num, show, table};

/// How often a refused change is tried again.
const AGAIN: Duration = Duration::from_millis(200);

pub async fn exec(cx: &Context, command: WorkersCmd) -> Result<(), Failure> {
    match command {
        WorkersCmd::List { host, output } => list(cx, host, output.output).await,
        WorkersCmd::Set(args) => set(cx, args).await,
    }
}

async fn list(cx: &Context, host: Option<String>, format: Format) -> Result<(), Failure> {
    let hosts = cx.hosts()?;
    let asked: Vec<_> = match &host {
        Some(name) => vec![hosts.find(name)?],
        None => hosts.hosts.iter().collect(),
    };
    let (mut rows, mut silent) = (Vec::new(), Vec::new());
    for h in asked {
        match Switch::new(&hosts, h)?.workers(&Request::WorkerList).await {
            Ok(workers) => rows.push((h.name.clone(), workers)),
            Err(e) if host.is_some() => return Err(e.into()),
            Err(e) => silent.push(e.to_string()),
        }
    }
    print(&rows, format)?;
    match silent.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Code::Unreachable, silent.join("; "))),
    }
}

async fn set(cx: &Context, args: WorkersArgs) -> Result<(), Failure> {
    let switch = cx.switch(&args.host)?;
    let request = Request::WorkersSet(WorkersSet {
        count: args.count,
        cpus: args.cpus.map(|c| c.0),
        poll: args.poll.map(|p| match p {
            Poll::Adaptive => PollMode::Adaptive,
            Poll::Busy => PollMode::Busy,
        }),
    });
    let until = Instant::now() + Duration::from_secs(args.wait_s);
    let workers = loop {
        match switch.workers(&request).await {
            Err(ClientError::Refused { refusal, .. })
                if refusal.code == RefusalCode::Busy && Instant::now() < until =>
            {
                tokio::time::sleep(AGAIN).await;
            }
            other => break other?,
        }
    };
    print(&[(args.host, workers)], args.output.output)
}

fn print(rows: &[(String, Vec<WorkerInfo>)], format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        let host =
            |(host, workers): &(String, Vec<WorkerInfo>)| json!({"host": host, "workers": workers});
        return json(&rows.iter().map(host).collect::<Vec<_>>());
    }
    let mut t = table(&[
        "host",
        "worker",
        "cpu",
        "poll",
        "frames in",
        "frames out",
        "queues",
    ]);
    for (host, workers) in rows {
        for w in workers {
            let queue = |q: &gangway_shared::api::WorkerQueue| format!("{}/{}", q.port, q.queue);
            let queues: Vec<String> = w.queues.iter().map(queue).collect();
            t.add_row(vec![
                host.into(),
                num(w.worker),
                w.cpu.map_or("any".to_owned(), |c| c.to_string()).into(),
                match w.poll {
                    PollMode::Adaptive => "adaptive",
                    PollMode::Busy => "busy",
                }
                .into(),
                num(w.rx_frames),
                num(w.tx_frames),
                queues.join(",").into(),
            ]);
        }
    }
    show(&t);
    Ok(())
}
