//! What the data path wants to know of a frame, read from the private copy of its head.
//!
//! Invariant: total functions over any bytes; no index can be out of bounds.

use gangway_shared::id::MacAddr;

/// RARP (RFC 903), which announces where a station is now.
pub const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// The addresses of a frame (IEEE 802.3, 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ether {
    /// Destination.
    pub dst: MacAddr,
    /// Source.
    pub src: MacAddr,
}

/// Reads the addresses; `None` for less than an Ethernet header.
pub fn ether(head: &[u8]) -> Option<Ether> {
    let h: &[u8; 14] = head.first_chunk()?;
    Some(Ether {
        dst: MacAddr([h[0], h[1], h[2], h[3], h[4], h[5]]),
        src: MacAddr([h[6], h[7], h[8], h[9], h[10], h[11]]),
    })
}

fn be16(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]))
}

/// Bytes behind the transport header (TCP: RFC 9293, UDP: RFC 768), or behind the network header where there is no
/// known transport, or behind the Ethernet header where there is no IP. `len` is the length of the whole frame; what
/// pads a short frame does not count.
pub fn payload_bytes(head: &[u8], len: u32) -> u32 {
    let mut at = 12;
    let mut kind = be16(head, at).unwrap_or(0);
    for _ in 0..2 {
        if kind == ETHERTYPE_VLAN || kind == ETHERTYPE_QINQ {
            at += 4;
            kind = be16(head, at).unwrap_or(0);
        }
    }
    at += 2;
    let behind = |at: usize| len.saturating_sub(at as u32);
    let (transport, proto, end) = match kind {
        ETHERTYPE_IPV4 => {
            let (Some(vihl), Some(total), Some(proto), Some(frag)) = (
                head.get(at),
                be16(head, at + 2),
                head.get(at + 9),
                be16(head, at + 6),
            ) else {
                return behind(at);
            };
            let header = usize::from(vihl & 15) * 4;
            // A TSO frame may say 0; later fragments have no transport header.
            let end = if total == 0 {
                len
            } else {
                (at as u32 + u32::from(total)).min(len)
            };
            let proto = if frag & 0x1fff == 0 { *proto } else { 255 };
            (at + header, proto, end)
        }
        ETHERTYPE_IPV6 => {
            let (Some(length), Some(next)) = (be16(head, at + 4), head.get(at + 6)) else {
                return behind(at);
            };
            let end = if length == 0 {
                len
            } else {
                (at as u32 + 40 + u32::from(length)).min(len)
            };
            (at + 40, *next, end)
        }
        _ => return behind(at),
    };
    let header = match proto {
        6 => head
            .get(transport + 12)
            .map_or(20, |b| usize::from(b >> 4) * 4),
        17 => 8,
        _ => 0,
    };
    end.saturating_sub((transport + header) as u32)
}

/// A RARP request with which `mac` announces itself, padded to 60 bytes (RFC 903; the form QEMU and Linux use).
pub fn rarp(mac: MacAddr) -> [u8; 60] {
    let mut f = [0; 60];
    f[..6].fill(0xff);
    f[6..12].copy_from_slice(&mac.0);
    f[12..14].copy_from_slice(&ETHERTYPE_RARP.to_be_bytes());
    // Hardware Ethernet, protocol IPv4, lengths 6 and 4, operation 3 (request reverse).
    f[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    f[22..28].copy_from_slice(&mac.0);
    f[32..38].copy_from_slice(&mac.0);
    f
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(payload: usize, tags: usize) -> Vec<u8> {
        let mut f = vec![0u8; 12];
        for _ in 0..tags {
            f.extend([0x81, 0, 0, 7]);
        }
        f.extend([8, 0, 0x45, 0]);
        f.extend(((20 + 32 + payload) as u16).to_be_bytes());
        f.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        f.extend([0; 12]);
        f.push(8 << 4);
        f.resize(f.len() + 19 + payload, 0);
        f
    }

    #[test]
    fn payload_is_what_lies_behind_the_transport_header() {
        for tags in 0..3 {
            let f = tcp(100, tags);
            assert_eq!(payload_bytes(&f, f.len() as u32), 100, "{tags} tags");
        }
        let mut ack = tcp(0, 0);
        ack.resize(80, 0);
        assert_eq!(payload_bytes(&ack, 80), 0, "padding is no payload");
    }

    #[test]
    fn rarp_names_the_sender() {
        let mac = MacAddr([2, 0, 0, 0, 0, 9]);
        let e = ether(&rarp(mac)).expect("a header");
        assert_eq!((e.src, e.dst), (mac, MacAddr::BROADCAST));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(head in proptest::collection::vec(any::<u8>(), 0..128), len in 0u32..70_000) {
            let _ = ether(&head);
            prop_assert!(payload_bytes(&head, len) <= len);
        }
    }
}
