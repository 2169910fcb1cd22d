//! Numbered UDP: a paced sender, a receiver that relays, the echo server and its client.
//!
//! Invariant: a number is used up only by a datagram that the kernel took; what it refuses is sent again.
//! Invariant: a guest sends nothing while its card has no carrier: its kernel would throw that away and say that it was sent.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::pace::Pacer;
use super::report::Live;
use super::socket::roomy;
use super::wire::{self, DATAGRAM_BYTES_MAX};

/// How often a thread that waits for datagrams looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);

/// Datagrams that go out per turn: several at a time spare an emulated processor most of its wake-ups.
const PER_TURN: u32 = 4;

/// What says that a guest's card has a carrier, and that it operates. An outside station has none: its link stays up whatever
/// becomes of the switches.
static CARD: OnceLock<[Sign; 2]> = OnceLock::new();

/// A file, and what it says when all is well.
struct Sign {
    path: String,
    file: File,
    good: &'static str,
}

/// From now on nothing is sent while this card has no carrier. Not with several queues: the look lets a sender change its
/// processor, and so its queue, between two datagrams of a flow.
pub fn look_at_carrier(card: &str) -> io::Result<()> {
    if Path::new(&format!("/sys/class/net/{card}/queues/tx-1")).exists() {
        return Ok(());
    }
    let sign = |what: &str, good| {
        let path = format!("/sys/class/net/{card}/{what}");
        let file = File::open(&path)?;
        io::Result::Ok(Sign { path, file, good })
    };
    let both = [sign("carrier", "1")?, sign("operstate", "up")?];
    CARD.get_or_init(|| both);
    Ok(())
}

/// While QEMU's connection to the switch is away it takes the carrier from the guest, whose kernel stops the card's queue at
/// once, and within a second throws away what waits there and has none any more. When the carrier is back it takes as long until
/// the card operates again. Asked before each datagram, so the files stay open: an emulated processor is slow.
fn wait_for_carrier() {
    let Some(card) = CARD.get() else { return };
    let is_good = |sign: &Sign| {
        let mut said = [0; 16];
        match sign.file.read_at(&mut said, 0) {
            Ok(n) => said[..n].trim_ascii() == sign.good.as_bytes(),
            // The driver has left the card since: another file has its name.
            Err(_) => std::fs::read_to_string(&sign.path).map_or(true, |s| s.trim() == sign.good),
        }
    };
    while !card.iter().all(is_good) {
        thread::sleep(Duration::from_millis(2));
    }
}

/// Binds a roomy socket on a port, 0 for any.
pub fn bind(port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    roomy(&socket);
    Ok(socket)
}

/// Sends the next datagram of a flow; its number is used up only when the kernel took it.
fn send_next(socket: &UdpSocket, to: SocketAddr, flow: &Live) {
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    wait_for_carrier();
    let number = flow.lock().sent.unwrap_or(0);
    let length = wire::datagram(&mut buffer, number);
    // Counted before it is sent: its echo may be back before we are.
    flow.count_sent();
    if let Err(error) = socket.send_to(&buffer[..length], to) {
        let mut state = flow.lock();
        state.sent = Some(number);
        state.error = Some(format!("send: {error}"));
    }
}

/// Sends `rate` datagrams per second while `on` is set.
pub fn send(socket: &UdpSocket, to: SocketAddr, rate: u32, flow: &Live, on: &AtomicBool) {
    let mut pacer = Pacer::new(rate.div_ceil(PER_TURN), Instant::now());
    while on.load(Ordering::Relaxed) {
        pacer.wait();
        for _ in 0..PER_TURN {
            send_next(socket, to, flow);
        }
    }
}

/// Receives for ever: counts, and passes each good datagram on under the next number of the flow `onward`.
pub fn receive(port: u16, flow: &Live, onward: Option<(SocketAddr, Live)>) -> io::Result<()> {
    let socket = bind(port)?;
    let out = bind(0)?;
    let mut buffer = [0; 2048];
    loop {
        let length = match socket.recv_from(&mut buffer) {
            Ok((length, _)) => length,
            Err(error) => {
                flow.fail(format!("receive: {error}"));
                continue;
            }
        };
        let number = wire::parse_datagram(&buffer[..length]);
        flow.count_received(number);
        if let (Some(_), Some((to, onward))) = (number, &onward) {
            send_next(&out, *to, onward);
        }
    }
}

/// Sends every datagram back, for ever.
pub fn echo(port: u16) -> io::Result<()> {
    let socket = bind(port)?;
    let mut buffer = [0; 2048];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            wait_for_carrier();
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

/// Sends `rate` per second to an echo server while `on` is set, and counts what comes back while `listen` is set.
pub fn echo_client(
    to: SocketAddr,
    rate: u32,
    flow: &Live,
    on: Arc<AtomicBool>,
    listen: Arc<AtomicBool>,
) -> io::Result<Vec<thread::JoinHandle<()>>> {
    let socket = bind(0)?;
    socket.set_read_timeout(Some(LOOK))?;
    let (sending, sender) = (socket.try_clone()?, flow.clone());
    let receiver = flow.clone();
    Ok(vec![
        thread::spawn(move || send(&sending, to, rate, &sender, &on)),
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while listen.load(Ordering::Relaxed) {
                match socket.recv_from(&mut buffer) {
                    Ok((length, from)) if from == to => {
                        receiver.count_received(wire::parse_datagram(&buffer[..length]))
                    }
                    Ok(_) => {}
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                        ) => {}
                    Err(error) => receiver.fail(format!("receive: {error}")),
                }
            }
        }),
    ])
}
