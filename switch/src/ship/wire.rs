//! Messages on streams: a length and the codec's bytes.

use gangway_shared::codec::{self, CodecError, MESSAGE_MAX};
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};
use quinn::{ReadExactError, RecvStream, SendStream};

use super::ShipError;

impl From<CodecError> for ShipError {
    fn from(e: CodecError) -> Self {
        ShipError::Protocol(e.to_string())
    }
}

/// A failure of the connection, which may come back. Says why it was closed, if that is known: a target that does not want
/// our certificate says so there.
pub(super) fn lost(e: impl std::error::Error) -> ShipError {
    let mut cause: &dyn std::error::Error = &e;
    while let Some(next) = cause.source() {
        cause = next;
    }
    let cause = cause.to_string();
    let (why, _) = dated(&cause);
    ShipError::Connection(format!("the connection was lost: {why}"))
}

/// What is wrong with a certificate without rustls' seconds, which are others the next time; whether it is a matter of its dates.
pub(super) fn dated(text: &str) -> (&str, bool) {
    match text.split_once(": verification time") {
        Some((why, _)) => (why, true),
        None => (text, false),
    }
}

async fn write(s: &mut SendStream, message: &[u8]) -> Result<(), ShipError> {
    let mut b = Vec::with_capacity(4 + message.len());
    b.extend_from_slice(&(message.len() as u32).to_le_bytes());
    b.extend_from_slice(message);
    s.write_all(&b).await.map_err(lost)
}

/// One message, or none if the stream ended before it. `early`: what it is if the stream was finished inside of one.
async fn read(
    s: &mut RecvStream,
    early: fn(String) -> ShipError,
) -> Result<Option<Vec<u8>>, ShipError> {
    let cut = |e: ReadExactError, all: usize| match e {
        ReadExactError::FinishedEarly(n) => early(format!(
            "a stream ends inside a message: {n} bytes where {all} must stand"
        )),
        e => lost(e),
    };
    let mut len = [0; 4];
    match s.read_exact(&mut len).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(cut(e, len.len())),
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > MESSAGE_MAX {
        return Err(CodecError::TooLong(len).into());
    }
    let mut b = vec![0; len];
    s.read_exact(&mut b).await.map_err(|e| cut(e, len))?;
    Ok(Some(b))
}

pub(super) async fn to_target(s: &mut SendStream, m: &ToTarget) -> Result<(), ShipError> {
    write(s, &codec::encode(m)?).await
}

pub(super) async fn to_source(s: &mut SendStream, m: &ToSource) -> Result<(), ShipError> {
    write(s, &codec::encode(m)?).await
}

pub(super) async fn lane_open(s: &mut SendStream, m: &LaneOpen) -> Result<(), ShipError> {
    write(s, &codec::encode(m)?).await
}

pub(super) async fn from_source(s: &mut RecvStream) -> Result<Option<ToTarget>, ShipError> {
    let b = read(s, ShipError::Protocol).await?;
    Ok(b.map(|b| codec::decode(&b)).transpose()?)
}

pub(super) async fn from_target(s: &mut RecvStream) -> Result<Option<ToSource>, ShipError> {
    // Whatever has ended the target's work: it may go on with it, and nothing is lost by trying.
    let b = read(s, ShipError::Connection).await?;
    Ok(b.map(|b| codec::decode(&b)).transpose()?)
}

pub(super) async fn read_lane_open(s: &mut RecvStream) -> Result<LaneOpen, ShipError> {
    match read(s, ShipError::Protocol).await? {
        Some(b) => Ok(codec::decode(&b)?),
        None => Err(ShipError::Protocol(
            "a lane's stream without a start".into(),
        )),
    }
}
