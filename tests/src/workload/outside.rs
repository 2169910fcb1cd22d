//! Outside of the group: clients of each VM and the sink of the chain, all on the host's clock.
//!
//! Orders come line by line on standard input (`start`, `stop`, `report`), each is answered by one line of JSON; the
//! end of the input ends the program.

use std::io::{self, BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::report::{Clock, Ends, Live};
use super::wire::{CHAIN_TCP_PORT, CHAIN_UDP_PORT, ECHO_PORT, REQUEST_PORT};
use super::{stream, udp};

/// How long nothing may come in before the rest counts as lost, once the senders have stopped. A guest on a crowded
/// machine can be late by seconds.
const STRAGGLERS: Duration = Duration::from_secs(5);

struct Options {
    vms: Vec<(String, Ipv4Addr)>,
    sink_of: Option<String>,
    echo_rate: u32,
    request_rate: u32,
}

fn parse(args: &[String]) -> Result<Options, String> {
    let mut options = Options {
        vms: Vec::new(),
        sink_of: None,
        echo_rate: 500,
        request_rate: 100,
    };
    let mut args = args.iter();
    while let Some(option) = args.next() {
        let value = args.next().ok_or(format!("{option} needs a value"))?;
        let rate = || {
            value
                .parse::<u32>()
                .map_err(|error| format!("{option} {value}: {error}"))
        };
        match option.as_str() {
            "--vm" => {
                let (name, address) = value
                    .split_once('=')
                    .ok_or(format!("--vm {value}: not NAME=ADDRESS"))?;
                let address = address
                    .parse()
                    .map_err(|error| format!("--vm {value}: {error}"))?;
                options.vms.push((name.to_owned(), address));
            }
            "--sink-of" => options.sink_of = Some(value.clone()),
            "--echo-rate" => options.echo_rate = rate()?,
            "--request-rate" => options.request_rate = rate()?,
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(options)
}

struct Outside {
    options: Options,
    on: Arc<AtomicBool>,
    listen: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    echoes: Vec<Live>,
    flows: Vec<Live>,
}

/// Serves standard input.
pub fn main(args: &[String]) -> io::Result<()> {
    let options = parse(args).map_err(io::Error::other)?;
    let mut outside = Outside::new(options);
    let mut output = io::stdout();
    for line in io::stdin().lock().lines() {
        let answer = outside.handle(line?.trim());
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

impl Outside {
    fn new(options: Options) -> Self {
        let mut flows = Vec::new();
        if let Some(last) = &options.sink_of {
            let flow = Live::receiver(&format!("udp {last}->outside"), Clock::Host);
            flows.push(flow.clone());
            thread::spawn(move || {
                udp::receive(CHAIN_UDP_PORT, &flow, None).unwrap_or_else(|error| flow.fail(error))
            });
            let flow = Live::receiver(&format!("tcp {last}->outside"), Clock::Host);
            flows.push(flow.clone());
            thread::spawn(move || {
                stream::receive(CHAIN_TCP_PORT, &flow, None)
                    .unwrap_or_else(|error| flow.fail(error))
            });
        }
        Self {
            options,
            on: Arc::new(AtomicBool::new(false)),
            listen: Arc::new(AtomicBool::new(true)),
            threads: Vec::new(),
            echoes: Vec::new(),
            flows,
        }
    }

    fn handle(&mut self, command: &str) -> String {
        match command {
            "start" => {
                if let Err(error) = self.start() {
                    return format!("{{\"error\":{:?}}}", error.to_string());
                }
            }
            "stop" => self.stop(),
            "report" => {
                let ends = self.flows.iter().map(Live::end).collect();
                return serde_json::to_string(&Ends {
                    name: "outside".to_owned(),
                    ends,
                })
                .unwrap_or_default();
            }
            other => return format!("{{\"error\":\"unknown command {other:?}\"}}"),
        }
        "{\"ok\":true}".to_owned()
    }

    fn start(&mut self) -> io::Result<()> {
        if !self.threads.is_empty() {
            return Ok(());
        }
        self.on.store(true, Ordering::Relaxed);
        self.listen.store(true, Ordering::Relaxed);
        for (name, address) in &self.options.vms {
            let flow = Live::both(&format!("outside udp echo {name}"), Clock::Host);
            let to = SocketAddr::from((*address, ECHO_PORT));
            self.threads.extend(udp::echo_client(
                to,
                self.options.echo_rate,
                &flow,
                self.on.clone(),
                self.listen.clone(),
            )?);
            self.echoes.push(flow.clone());
            self.flows.push(flow);

            let flow = Live::both(&format!("outside tcp {name}"), Clock::Host);
            let (to, rate, on) = (
                SocketAddr::from((*address, REQUEST_PORT)),
                self.options.request_rate,
                self.on.clone(),
            );
            self.flows.push(flow.clone());
            self.threads.push(thread::spawn(move || {
                stream::request(to, rate, &flow, &on).unwrap_or_else(|error| flow.fail(error));
            }));
        }
        Ok(())
    }

    /// Senders first, then the stragglers, then the listeners.
    fn stop(&mut self) {
        self.on.store(false, Ordering::Relaxed);
        let all_back = |flow: &Live| {
            let end = flow.end();
            end.received >= end.sent
        };
        // The senders need a turn to see the order before their count stands.
        thread::sleep(Duration::from_millis(50));
        let (mut since, mut back) = (Instant::now(), 0);
        while since.elapsed() < STRAGGLERS && !self.echoes.iter().all(all_back) {
            let now: u64 = self
                .echoes
                .iter()
                .filter_map(|flow| flow.end().received)
                .sum();
            if now != back {
                (since, back) = (Instant::now(), now);
            }
            thread::sleep(Duration::from_millis(20));
        }
        // A duplicate would come late, too.
        thread::sleep(Duration::from_millis(300));
        self.listen.store(false, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
