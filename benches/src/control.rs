//! A coordinator's calls to a switch, over its unix socket (`gangway_shared::api`, "Transport").

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use gangway_shared::api::{HoldInfo, Reply, Request, VERSION};
use gangway_shared::codec::{self, MESSAGE_MAX};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection that has said hello.
#[derive(Debug)]
pub struct Control(UnixStream);

impl Control {
    /// To the switch that listens there.
    pub fn connect(socket: &Path) -> Result<Control> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("control: {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut control = Control(stream);
        match control.call(&Request::Hello { version: VERSION })? {
            Reply::Hello { .. } => Ok(control),
            other => bail!("control: {other:?} instead of a hello"),
        }
    }

    /// One call; a refusal is an error.
    pub fn call(&mut self, request: &Request) -> Result<Reply> {
        let body = codec::encode(request)?;
        let mut message = (body.len() as u32).to_le_bytes().to_vec();
        message.extend(body);
        self.0.write_all(&message).context("control: a request")?;
        let mut length = [0; 4];
        self.0
            .read_exact(&mut length)
            .context("control: no answer")?;
        let length = u32::from_le_bytes(length) as usize;
        ensure!(
            length <= MESSAGE_MAX,
            "control: an answer of {length} bytes"
        );
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).context("control: an answer")?;
        match codec::decode(&body)? {
            Reply::Refused(refusal) => bail!("{request:?} is refused: {refusal}"),
            reply => Ok(reply),
        }
    }

    /// One call whose answer is a hold.
    pub fn hold(&mut self, request: &Request) -> Result<HoldInfo> {
        match self.call(request)? {
            Reply::Hold(info) => Ok(info),
            other => bail!("control: {other:?} instead of a hold"),
        }
    }
}
