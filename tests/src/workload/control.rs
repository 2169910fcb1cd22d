//! One command line in, one line of JSON out, over TCP: how a guest is started, stopped and read.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(5);

/// Serves commands for ever, one at a time.
pub fn serve(port: u16, mut handle: impl FnMut(&str) -> String) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    loop {
        let (stream, _) = listener.accept()?;
        // Whoever asks and goes away is no reason to stop.
        let _ = serve_one(stream, &mut handle);
    }
}

fn serve_one(mut stream: TcpStream, handle: &mut impl FnMut(&str) -> String) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let answer = handle(line.trim());
    stream.write_all(format!("{answer}\n").as_bytes())
}

/// Puts one question; tries again for a while, as the guest may still be coming up.
pub fn ask(address: &str, command: &str) -> io::Result<String> {
    let address: SocketAddr = address
        .parse()
        .map_err(|error| io::Error::other(format!("{address} is not ADDRESS:PORT: {error}")))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match try_ask(address, command) {
            Ok(answer) if !answer.is_empty() => return Ok(answer),
            Ok(_) if Instant::now() > deadline => {
                return Err(io::Error::other(format!("{address} gives no answer")));
            }
            Err(error) if Instant::now() > deadline => {
                return Err(io::Error::other(format!("{address}: {error}")));
            }
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn try_ask(address: SocketAddr, command: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{command}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}
