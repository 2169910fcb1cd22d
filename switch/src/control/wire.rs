//! Messages on a stream: a `u32` length (little endian), then [`gangway_shared::codec`] bytes.

use std::io;
use std::time::Duration;

use gangway_shared::api::{Reply, Request};
use gangway_shared::codec::{self, CodecError, MESSAGE_MAX};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// How long a peer may take for the rest of a message that it has begun, and for taking our answer.
pub const SLOW: Duration = Duration::from_secs(10);

/// Why there is no message, or no answer could be given.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer's: not a message of ours.
    #[error(transparent)]
    Malformed(#[from] CodecError),
    /// The peer's: it stopped in the middle of a message, or does not take the answer.
    #[error("the peer is too slow")]
    Slow,
    /// The connection broke.
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
}

/// Reads one request; `None` if the peer closed the stream between two. The first byte may take until `first`.
pub async fn read<S>(stream: &mut S, first: Option<Duration>) -> Result<Option<Request>, WireError>
where
    S: AsyncRead + Unpin,
{
    let mut length = [0; 4];
    let n = within(first, stream.read(&mut length)).await?;
    if n == 0 {
        return Ok(None);
    }
    within(Some(SLOW), async {
        if let Some(rest) = length.get_mut(n..) {
            stream.read_exact(rest).await?;
        }
        Ok(())
    })
    .await?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MESSAGE_MAX {
        return Err(CodecError::TooLong(length).into());
    }
    // Grows with what really arrives: a length alone costs nothing.
    let mut body = Vec::new();
    let mut limited = stream.take(length as u64);
    within(Some(SLOW), limited.read_to_end(&mut body)).await?;
    if body.len() < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Some(codec::decode(&body)?))
}

/// Writes one answer.
pub async fn write<S>(stream: &mut S, reply: &Reply) -> Result<(), WireError>
where
    S: AsyncWrite + Unpin,
{
    let body = codec::encode(reply)?;
    let length = u32::try_from(body.len()).map_err(|_| CodecError::TooLong(body.len()))?;
    let mut message = Vec::with_capacity(4 + body.len());
    message.extend_from_slice(&length.to_le_bytes());
    message.extend_from_slice(&body);
    within(Some(SLOW), async {
        stream.write_all(&message).await?;
        stream.flush().await
    })
    .await
}

async fn within<T>(
    limit: Option<Duration>,
    io: impl Future<Output = io::Result<T>>,
) -> Result<T, WireError> {
    match limit {
        None => Ok(io.await?),
        Some(limit) => Ok(timeout(limit, io).await.map_err(|_| WireError::Slow)??),
    }
}
