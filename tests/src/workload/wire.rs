//! What the traffic looks like: numbered datagrams and messages whose every byte follows from their number.
//!
//! Invariant: a frame that was altered, cut or mixed with another does not verify.

/// UDP: every datagram comes back to its sender.
pub const ECHO_PORT: u16 = 7000;
/// TCP: a request of [`REQUEST_BYTES`], an answer of [`ANSWER_BYTES`].
pub const REQUEST_PORT: u16 = 7001;
/// UDP: the chain's datagrams.
pub const CHAIN_UDP_PORT: u16 = 7002;
/// TCP: the chain's stream.
pub const CHAIN_TCP_PORT: u16 = 7003;
/// TCP: one command line, one line of JSON back.
pub const CONTROL_PORT: u16 = 7004;

/// A message of the chain's stream.
pub const MESSAGE_BYTES: usize = 1024;
/// A request to a VM.
pub const REQUEST_BYTES: usize = 64;
/// A VM's answer.
pub const ANSWER_BYTES: usize = 512;
/// The longest datagram.
pub const DATAGRAM_BYTES_MAX: usize = 640;

const DATAGRAM_BYTES_MIN: usize = 64;
const HEADER_BYTES: usize = 16;

/// Fills `buffer` with the number and the bytes that follow from it.
pub fn fill(buffer: &mut [u8], number: u64) {
    buffer[..8].copy_from_slice(&number.to_be_bytes());
    let mut state = seed(number, buffer.len());
    for chunk in buffer[8..].chunks_mut(8) {
        state = step(state);
        chunk.copy_from_slice(&state.to_be_bytes()[..chunk.len()]);
    }
}

/// The number in `buffer` when every byte is as [`fill`] wrote it.
pub fn verify(buffer: &[u8]) -> Option<u64> {
    let number = u64::from_be_bytes(buffer.get(..8)?.try_into().ok()?);
    let mut state = seed(number, buffer.len());
    for chunk in buffer[8..].chunks(8) {
        state = step(state);
        if chunk != &state.to_be_bytes()[..chunk.len()] {
            return None;
        }
    }
    Some(number)
}

/// Writes datagram `number` and returns its length, which changes with the number.
pub fn datagram(buffer: &mut [u8; DATAGRAM_BYTES_MAX], number: u64) -> usize {
    let length = DATAGRAM_BYTES_MIN + (number.wrapping_mul(97) % 449) as usize;
    fill(&mut buffer[..length], number);
    length
}

/// The number of a datagram that arrived whole.
pub fn parse_datagram(bytes: &[u8]) -> Option<u64> {
    if bytes.len() < HEADER_BYTES {
        None
    } else {
        verify(bytes)
    }
}

fn seed(number: u64, length: usize) -> u64 {
    // Never 0, which xorshift can't leave.
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (length as u64) << 1 | 1
}

fn step(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

/// A running digest of a stream (FNV-1a, 64 bits): cheap enough for an emulated processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    /// Adds the next bytes of the stream.
    pub fn update(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Sixteen hexadecimal digits.
    pub fn hex(self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_or_shortened_datagram_does_not_verify() {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        for number in [0, 1, 2, 77, u64::from(u32::MAX), u64::MAX] {
            let length = datagram(&mut buffer, number);
            assert_eq!(parse_datagram(&buffer[..length]), Some(number));
            assert_eq!(parse_datagram(&buffer[..length - 1]), None);
            for at in [0, 7, 8, length / 2, length - 1] {
                buffer[at] ^= 1;
                assert_eq!(
                    parse_datagram(&buffer[..length]),
                    None,
                    "byte {at} of {number}"
                );
                buffer[at] ^= 1;
            }
        }
    }

    #[test]
    fn short_input_is_refused() {
        assert_eq!(parse_datagram(&[]), None);
        assert_eq!(parse_datagram(&[0; 9]), None);
    }

    #[test]
    fn the_digest_depends_on_the_order() {
        let (mut one, mut two) = (Digest::default(), Digest::default());
        one.update(b"ab");
        two.update(b"ba");
        assert_ne!(one, two);
        assert_eq!(Digest::default().hex().len(), 16);
    }
}
