//! The one place that turns values into bytes and back: bincode's `standard()` wire format
//! (variable-length integers, little endian), written by wincode (ADR-0002).
//!
//! Invariant: decoding never panics. It never allocates more than [`MESSAGE_MAX`] for one list on a length's word alone;
//! a message of [`MESSAGE_MAX`] bytes, all of it real, costs a small multiple of that (a list of empty strings is the
//! worst: one byte each on the wire, 24 in memory).
//! Invariant: bytes that are left over are an error.

use wincode::config::{Configuration, DefaultConfig};
use wincode::{SchemaRead, SchemaWrite};

/// The largest encoded message, in bytes. Frames on a stream carry their length before them as a `u32`, little endian.
pub const MESSAGE_MAX: usize = 1 << 20;

/// The peer's bytes are no message of ours.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// A message of more than [`MESSAGE_MAX`] bytes.
    #[error("message of {0} bytes, at most {MESSAGE_MAX} are allowed")]
    TooLong(usize),
    /// Not decodable as the expected type.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// Not encodable (a value beyond the limits).
    #[error("message cannot be encoded: {0}")]
    Encode(String),
}

type Standard = Configuration<
    true,
    MESSAGE_MAX,
    wincode::len::BincodeLen,
    wincode::int_encoding::LittleEndian,
    wincode::int_encoding::VarInt,
>;
const STANDARD: Standard = DefaultConfig::new()
    .with_varint_encoding()
    .with_preallocation_size_limit::<MESSAGE_MAX>();

/// Encodes `value`; the result has at most [`MESSAGE_MAX`] bytes.
pub fn encode<T>(value: &T) -> Result<Vec<u8>, CodecError>
where
    T: SchemaWrite<Standard, Src = T>,
{
    let bytes = wincode::config::serialize(value, STANDARD)
        .map_err(|e| CodecError::Encode(e.to_string()))?;
    if bytes.len() > MESSAGE_MAX {
        Err(CodecError::TooLong(bytes.len()))
    } else {
        Ok(bytes)
    }
}

/// Decodes all of `bytes`.
pub fn decode<T>(bytes: &[u8]) -> Result<T, CodecError>
where
    T: for<'de> SchemaRead<'de, Standard, Dst = T>,
{
    if bytes.len() > MESSAGE_MAX {
        return Err(CodecError::TooLong(bytes.len()));
    }
    wincode::config::deserialize_exact(bytes, STANDARD)
        .map_err(|e| CodecError::Malformed(e.to_string()))
}

#[cfg(test)]
mod tests;
