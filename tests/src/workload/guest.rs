//! In a VM: its place in the chain comes from the kernel's command line, its orders over the network.
//!
//! `gw.name=middle gw.prev=producer gw.next=consumer@10.78.0.13`, and the rates: `gw.udp_rate`, `gw.tcp_rate`,
//! `gw.dirty_mb`, `gw.span_mb`. A VM without `gw.prev` produces.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::report::{Clock, Ends, Live};
use super::wire::{CHAIN_TCP_PORT, CHAIN_UDP_PORT, CONTROL_PORT, ECHO_PORT, REQUEST_PORT};
use super::{control, dirty, stream, udp};

/// How long an order to stop waits for senders, well within the patience of who asks.
const LAST_SEGMENT: Duration = Duration::from_secs(3);

/// How often another process gets its turn.
const TURN: Duration = Duration::from_millis(4);

/// What the command line says.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    name: String,
    prev: Option<String>,
    next: Option<(String, Ipv4Addr)>,
    udp_rate: u32,
    tcp_rate: u32,
    dirty_mb: usize,
    span_mb: usize,
}

impl Place {
    fn parse(cmdline: &str) -> Result<Self, String> {
        let words: HashMap<&str, &str> = cmdline
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("gw.")?.split_once('='))
            .collect();
        let number = |key: &str, default: u32| match words.get(key) {
            Some(value) => value
                .parse()
                .map_err(|error| format!("gw.{key}={value}: {error}")),
            None => Ok(default),
        };
        let next = match words.get("next") {
            Some(next) => {
                let (name, address) = next
                    .split_once('@')
                    .ok_or(format!("gw.next={next}: no @"))?;
                Some((
                    name.to_owned(),
                    address
                        .parse()
                        .map_err(|error| format!("gw.next={next}: {error}"))?,
                ))
            }
            None => None,
        };
        Ok(Self {
            name: words.get("name").ok_or("gw.name is missing")?.to_string(),
            prev: words.get("prev").map(|prev| prev.to_string()),
            next,
            udp_rate: number("udp_rate", 1000)?,
            tcp_rate: number("tcp_rate", 100)?,
            dirty_mb: number("dirty_mb", 5)? as usize,
            span_mb: number("span_mb", 32)? as usize,
        })
    }
}

struct Guest {
    place: Place,
    on: Arc<AtomicBool>,
    senders: Vec<JoinHandle<()>>,
    udp_out: Option<Live>,
    tcp_out: Option<Live>,
    flows: Vec<Live>,
}

/// Runs until the VM ends.
pub fn main() -> io::Result<()> {
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let place = Place::parse(&cmdline).map_err(io::Error::other)?;
    // A kernel that has asked a neighbour three times in vain forgets where it is, and throws away what is sent to it: one that is
    // held for a minute would cost datagrams that nobody has taken.
    std::fs::write("/proc/sys/net/ipv4/neigh/eth0/ucast_solicit", "120")?;
    udp::look_at_carrier("eth0")?;
    Command::new("/proc/self/exe").arg("turn").spawn()?;
    let mut guest = Guest::start(place);
    println!("gangway-workload: {} is ready", guest.place.name);
    control::serve(CONTROL_PORT, |command| guest.handle(command))
}

/// A second process, whose turns take the place of the first one's page tables: with them QEMU's emulated processor forgets to
/// which pages it lets writes through unnoticed. It may have let through too many (see `do_not_preempt` of the lab), and where one
/// process has a processor for itself, it does so until that process is moved: what it counted since was lost.
pub fn turn() -> ! {
    loop {
        thread::sleep(TURN);
    }
}

/// Takes the network card from its driver, which resets the device, and gives it back.
fn rebind() -> io::Result<()> {
    const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";
    let card = std::fs::read_dir(DRIVER)?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with("virtio"))
        .ok_or_else(|| io::Error::other("no card"))?;
    std::fs::write(format!("{DRIVER}/unbind"), &card)?;
    thread::sleep(Duration::from_millis(200));
    std::fs::write(format!("{DRIVER}/bind"), &card)?;
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let words = cmdline.split_whitespace();
    let address = words
        .filter_map(|word| word.strip_prefix("gw.addr="))
        .next()
        .ok_or_else(|| io::Error::other("gw.addr is missing"))?;
    for line in [
        "ip link set eth0 up".to_owned(),
        format!("ip addr add {address} dev eth0"),
    ] {
        let mut ip = Command::new("/bin/busybox");
        let status = ip.args(line.split(' ')).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("{line}: {status}")));
        }
    }
    Ok(())
}

/// Lets the guest's shell run a script, and tells on one line what came of it. Long ones belong into the background.
fn shell(script: &str) -> String {
    let mut busybox = Command::new("/bin/busybox");
    busybox.args(["sh", "-c", script]);
    busybox.env("PATH", "/bin:/usr/bin:/usr/sbin");
    match busybox.output() {
        Ok(out) => {
            let said = [out.stdout, out.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            serde_json::json!({"status": out.status.code(), "said": said}).to_string()
        }
        Err(error) => serde_json::json!({"error": error.to_string()}).to_string(),
    }
}

/// What the guest's own kernel dropped, on one line.
fn kernel() -> String {
    let mut told = serde_json::Map::new();
    for path in [
        "/proc/net/snmp",
        "/proc/net/softnet_stat",
        "/proc/net/stat/arp_cache",
        "/sys/class/net/eth0/statistics/rx_dropped",
        "/sys/class/net/eth0/statistics/tx_dropped",
    ] {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines = text
            .lines()
            .filter(|l| !l.contains(':') || l.starts_with("Udp:"));
        let text: Vec<&str> = lines.collect();
        told.insert(path.to_owned(), text.join(" / ").into());
    }
    serde_json::Value::Object(told).to_string()
}

/// A service of the guest must not end; when it does, its flow says why.
fn service(flow: &Live, run: impl FnOnce(&Live) -> io::Result<()> + Send + 'static) {
    let flow = flow.clone();
    thread::spawn(move || {
        if let Err(error) = run(&flow) {
            flow.fail(error);
        }
    });
}

impl Guest {
    fn start(place: Place) -> Self {
        let mut flows = Vec::new();
        let mut keep = |flow: Live| {
            flows.push(flow.clone());
            flow
        };
        let name = place.name.clone();
        let out = |proto: &str| {
            place
                .next
                .as_ref()
                .map(|(next, _)| Live::sender(&format!("{proto} {name}->{next}"), Clock::Guest))
        };
        let (udp_out, tcp_out) = (out("udp").map(&mut keep), out("tcp").map(&mut keep));
        let to = |port| {
            place
                .next
                .as_ref()
                .map(|(_, address)| SocketAddr::from((*address, port)))
        };

        if let Some(prev) = &place.prev {
            let onward = to(CHAIN_UDP_PORT).zip(udp_out.clone());
            let flow = keep(Live::receiver(&format!("udp {prev}->{name}"), Clock::Guest));
            service(&flow, |flow| udp::receive(CHAIN_UDP_PORT, flow, onward));
            let onward = to(CHAIN_TCP_PORT).zip(tcp_out.clone());
            let flow = keep(Live::receiver(&format!("tcp {prev}->{name}"), Clock::Guest));
            service(&flow, |flow| stream::receive(CHAIN_TCP_PORT, flow, onward));
        }
        service(
            &keep(Live::neither(
                &format!("outside udp echo {name}"),
                Clock::Guest,
            )),
            |_| udp::echo(ECHO_PORT),
        );
        service(
            &keep(Live::neither(&format!("outside tcp {name}"), Clock::Guest)),
            |flow| stream::answer(REQUEST_PORT, flow),
        );
        let (rate, span) = (place.dirty_mb, place.span_mb);
        if rate > 0 {
            thread::spawn(move || dirty::run(rate, span));
        }
        Self {
            place,
            on: Arc::new(AtomicBool::new(false)),
            senders: Vec::new(),
            udp_out,
            tcp_out,
            flows,
        }
    }

    fn handle(&mut self, command: &str) -> String {
        match command {
            "ping" => {}
            "start" => self.produce(),
            "stop" => self.stop(),
            // The answer goes out before the network goes away.
            "rebind" => drop(thread::spawn(|| {
                thread::sleep(Duration::from_millis(200));
                match rebind() {
                    Ok(()) => println!("gangway-workload: the card is back"),
                    Err(error) => println!("gangway-workload: rebind: {error}"),
                }
            })),
            "kernel" => return kernel(),
            "report" => {
                let ends = self.flows.iter().map(Live::end).collect();
                return serde_json::to_string(&Ends {
                    name: self.place.name.clone(),
                    ends,
                })
                .unwrap_or_default();
            }
            other => {
                return match other.strip_prefix("sh ") {
                    Some(script) => shell(script),
                    None => format!("{{\"error\":\"unknown command {other:?}\"}}"),
                };
            }
        }
        "{\"ok\":true}".to_owned()
    }

    /// Starts the chain's traffic; only the first VM of the chain has something to start.
    fn produce(&mut self) {
        let (None, Some((_, next)), true) =
            (&self.place.prev, &self.place.next, self.senders.is_empty())
        else {
            return;
        };
        let (Some(udp_out), Some(tcp_out)) = (self.udp_out.clone(), self.tcp_out.clone()) else {
            return;
        };
        let (next, udp_rate, tcp_rate) = (*next, self.place.udp_rate, self.place.tcp_rate);
        self.on.store(true, Ordering::Relaxed);
        let on = self.on.clone();
        self.senders.push(thread::spawn(move || match udp::bind(0) {
            Ok(socket) => udp::send(
                &socket,
                SocketAddr::from((next, CHAIN_UDP_PORT)),
                udp_rate,
                &udp_out,
                &on,
            ),
            Err(error) => udp_out.fail(error),
        }));
        let on = self.on.clone();
        self.senders.push(thread::spawn(move || {
            if let Err(error) = stream::send(
                SocketAddr::from((next, CHAIN_TCP_PORT)),
                tcp_rate,
                &tcp_out,
                &on,
            ) {
                tcp_out.fail(error);
            }
        }));
    }

    fn stop(&mut self) {
        self.on.store(false, Ordering::Relaxed);
        // Their sockets close with them, after their last segment; but for a stream that nobody reads any more.
        let until = Instant::now() + LAST_SEGMENT;
        for sender in self.senders.drain(..) {
            while !sender.is_finished() && Instant::now() < until {
                thread::sleep(Duration::from_millis(10));
            }
            if sender.is_finished() {
                let _ = sender.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_gives_the_place_in_the_chain() {
        let place = Place::parse(
            "console=ttyS0 gw.name=middle gw.prev=producer gw.next=consumer@10.78.0.13 gw.udp_rate=7",
        );
        let place = place.unwrap();
        assert_eq!(
            (place.name.as_str(), place.prev.as_deref()),
            ("middle", Some("producer"))
        );
        assert_eq!(
            place.next,
            Some(("consumer".to_owned(), Ipv4Addr::new(10, 78, 0, 13)))
        );
        assert_eq!((place.udp_rate, place.tcp_rate), (7, 100));
    }

    #[test]
    fn nonsense_is_named() {
        assert_eq!(Place::parse("quiet").unwrap_err(), "gw.name is missing");
        assert!(
            Place::parse("gw.name=a gw.next=b")
                .unwrap_err()
                .contains("gw.next=b")
        );
        assert!(
            Place::parse("gw.name=a gw.dirty_mb=x")
                .unwrap_err()
                .contains("gw.dirty_mb=x")
        );
    }
}
