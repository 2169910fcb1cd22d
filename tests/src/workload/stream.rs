//! TCP: the chain's stream of numbered messages with a running digest, and requests with answers.
//!
//! Invariant: a connection is made once. One that breaks is not replaced: the break shows as an error and as lost messages.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::pace::Pacer;
use super::report::Live;
use super::wire::{self, ANSWER_BYTES, Digest, MESSAGE_BYTES, REQUEST_BYTES};

/// How long a stall a connection survives before its client calls it broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// Connects, trying again while the other end is still coming up.
pub fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(2)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn send_message(stream: &mut TcpStream, flow: &Live, message: &[u8]) -> io::Result<()> {
    stream.write_all(message)?;
    let mut state = flow.lock();
    state.count_sent();
    state
        .digest
        .get_or_insert_with(Digest::default)
        .update(message);
    Ok(())
}

/// Sends `rate` messages per second while `on` is set.
pub fn send(to: SocketAddr, rate: u32, flow: &Live, on: &AtomicBool) -> io::Result<()> {
    let mut stream = connect(to)?;
    flow.watch(&stream);
    let mut pacer = Pacer::new(rate, Instant::now());
    let mut message = [0; MESSAGE_BYTES];
    while on.load(Ordering::Relaxed) {
        pacer.wait();
        wire::fill(&mut message, flow.lock().sent.unwrap_or(0));
        send_message(&mut stream, flow, &message)?;
    }
    // Its descriptor lives on with the flow, which counts retransmissions.
    stream.shutdown(Shutdown::Write)
}

/// Serves the chain's stream for ever: counts and digests messages, and passes the stream on as the flow `onward`.
pub fn receive(port: u16, flow: &Live, onward: Option<(SocketAddr, Live)>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = relay(stream, flow, onward.as_ref()) {
            flow.fail(error);
        }
    }
}

fn relay(
    mut stream: TcpStream,
    flow: &Live,
    onward: Option<&(SocketAddr, Live)>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut out = match onward {
        Some((to, onward)) => {
            let out =
                connect(*to).inspect_err(|error| onward.fail(format!("connect {to}: {error}")))?;
            onward.watch(&out);
            Some((out, onward))
        }
        None => None,
    };
    let mut message = [0; MESSAGE_BYTES];
    loop {
        match stream.read_exact(&mut message) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return out.map_or(Ok(()), |(out, _)| out.shutdown(Shutdown::Write));
            }
            Err(error) => return Err(error),
        }
        flow.count_received(wire::verify(&message));
        flow.lock()
            .digest
            .get_or_insert_with(Digest::default)
            .update(&message);
        if let Some((out, onward)) = &mut out
            && let Err(error) = send_message(out, onward, &message)
        {
            onward.fail(error);
            return Ok(());
        }
    }
}

/// Answers requests for ever, each connection in its own thread.
pub fn answer(port: u16, flow: &Live) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        flow.watch(&stream);
        thread::spawn(move || {
            let (mut request, mut answer) = ([0; REQUEST_BYTES], [0; ANSWER_BYTES]);
            while stream.read_exact(&mut request).is_ok() {
                // A damaged request gets an answer that will not match.
                wire::fill(&mut answer, wire::verify(&request).unwrap_or(u64::MAX));
                if stream.write_all(&answer).is_err() {
                    return;
                }
            }
        });
    }
}

/// Sends `rate` requests per second, one at a time, while `on` is set.
pub fn request(to: SocketAddr, rate: u32, flow: &Live, on: &AtomicBool) -> io::Result<()> {
    let mut stream = connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    flow.watch(&stream);
    let mut pacer = Pacer::new(rate, Instant::now());
    let (mut request, mut answer) = ([0; REQUEST_BYTES], [0; ANSWER_BYTES]);
    while on.load(Ordering::Relaxed) {
        pacer.wait();
        wire::fill(&mut request, flow.lock().sent.unwrap_or(0));
        flow.count_sent();
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        flow.count_received(wire::verify(&answer));
    }
    Ok(())
}
