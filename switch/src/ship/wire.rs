//! Messages on streams: a length and the codec's bytes.

use gangway_shared::codec::{self, CodecError, MESSAGE_MAX};
use gangway_shared::ship::{LaneOpen, ToSource, ToTarget};
use quinn::{RecvStream, SendStream};

use super::ShipError;

impl From<CodecError> for ShipError {
    fn from(e: CodecError) -> Self {
        ShipError::Protocol(e.to_string())
    }
}

/// A failure of the connection, which may come back.
pub(super) fn lost(e: impl std::error::Error) -> ShipError {
    ShipError::Connection(format!("the connection was lost: {e}"))
}

async fn write(s: &mut SendStream, message: &[u8]) -> Result<(), ShipError> {
    let mut b = Vec::with_capacity(4 + message.len());
    b.extend_from_slice(&(message.len() as u32).to_le_bytes());
    b.extend_from_slice(message);
    s.write_all(&b).await.map_err(lost)
}

/// One message, or none if the stream ended before it.
async fn read(s: &mut RecvStream) -> Result<Option<Vec<u8>>, ShipError> {
    let mut len = [0; 4];
    match s.read_exact(&mut len).await {
        Ok(()) => {}
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(lost(e)),
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > MESSAGE_MAX {
        return Err(CodecError::TooLong(len).into());
    }
    let mut b = vec![0; len];
    s.read_exact(&mut b).await.map_err(lost)?;
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
    let b = read(s).await?;
    Ok(b.map(|b| codec::decode(&b)).transpose()?)
}

pub(super) async fn from_target(s: &mut RecvStream) -> Result<Option<ToSource>, ShipError> {
    let b = read(s).await?;
    Ok(b.map(|b| codec::decode(&b)).transpose()?)
}

pub(super) async fn read_lane_open(s: &mut RecvStream) -> Result<LaneOpen, ShipError> {
    match read(s).await? {
        Some(b) => Ok(codec::decode(&b)?),
        None => Err(ShipError::Protocol(
            "a lane's stream without a start".into(),
        )),
    }
}
