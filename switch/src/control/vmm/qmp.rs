//! The little of QMP that the switch itself needs: `query-status`, and what passes through a relay about it.

use std::io;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// The longest line that is looked at.
const LINE_MAX: usize = 64 << 10;

/// Leaves the greeting's mode and asks. The greeting (or its beginning) has been read already; QMP takes commands then.
pub async fn query_status(stream: &mut UnixStream) -> io::Result<String> {
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\r\n{\"execute\":\"query-status\"}\r\n")
        .await?;
    // As many lines as a busy VM may send events before the answer.
    let mut lines = BufReader::new(stream.take(LINE_MAX as u64 * 4));
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(status) = answered_status(&line) {
            return Ok(status);
        }
    }
}

fn answered_status(line: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(line).ok()?;
    status_of(&value)
}

/// The reply to `query-status`.
fn status_of(value: &Value) -> Option<String> {
    let r = value.get("return")?;
    r.get("running")?;
    Some(r.get("status")?.as_str()?.to_owned())
}

/// Reads along what QEMU sends through a relay.
#[derive(Default)]
pub struct Watch {
    line: Vec<u8>,
    /// The line is longer than we look at.
    skip: bool,
}

impl Watch {
    /// The last status that `bytes` tell, if they tell one.
    pub fn bytes(&mut self, bytes: &[u8]) -> Option<String> {
        let mut last = None;
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            if self.line.len() + part.len() > LINE_MAX {
                self.skip = true;
            } else {
                self.line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                if !self.skip {
                    last = told(&self.line).or(last);
                }
                self.line.clear();
                self.skip = false;
            }
        }
        last
    }
}

fn told(line: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(line).ok()?;
    // qapi/run-state.json
    let status = match value.get("event").and_then(Value::as_str) {
        Some("STOP") => "paused",
        Some("RESUME") => "running",
        Some("SUSPEND") => "suspended",
        Some("SHUTDOWN") => "shutdown",
        Some(_) => return None,
        None => return status_of(&value),
    };
    Some(status.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_tells_the_status_whatever_the_pieces() {
        let stream = b"{\"QMP\": {}}\r\n{\"event\": \"STOP\", \"data\": {}}\r\n{\"return\": {}}\r\nnonsense\n\
            {\"return\": {\"status\": \"postmigrate\", \"running\": false}}\r\n{\"event\":\"BALLOON_CHANGE\"}\n";
        for size in 1..stream.len() {
            let mut watch = Watch::default();
            let told: Vec<String> = stream.chunks(size).filter_map(|c| watch.bytes(c)).collect();
            assert_eq!(
                told.last().map(String::as_str),
                Some("postmigrate"),
                "pieces of {size}"
            );
        }
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let mut watch = Watch::default();
        for _ in 0..1000 {
            assert_eq!(watch.bytes(&[b'x'; 1000]), None);
        }
        assert!(watch.line.len() <= LINE_MAX);
        assert_eq!(
            watch.bytes(b"\n{\"event\":\"RESUME\"}\n").as_deref(),
            Some("running")
        );
    }
}
