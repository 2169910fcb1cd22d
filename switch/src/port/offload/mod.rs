//! What a sender leaves for others to do, and what is done for a receiver that cannot (virtio 1.2, 5.1.6).
//!
//! - [`Offloads`]: what one side of a port takes
//! - [`csum`], [`cut`]: checksums and segmentation in software
//! - [`pieces`]: segmentation in front of a kernel that does not know the request
//!
//! Invariant: pure and total over any bytes. No port is known here.

use super::VnetHdr;

pub mod csum;
pub mod cut;
pub mod pieces;

/// `gso_type` without the ECN bit (virtio 1.2, 5.1.6).
pub mod gso {
    /// One frame.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP over either: each segment is a datagram of its own.
    pub const UDP_L4: u8 = 5;
    /// TCP with ECN, a flag.
    pub const ECN: u8 = 0x80;
}

/// Offloads that one side of a port has agreed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Partial checksums.
    pub csum: bool,
    /// TCP segmentation over IPv4.
    pub tso4: bool,
    /// TCP segmentation over IPv6.
    pub tso6: bool,
    /// Segmentation of TCP with ECN.
    pub ecn: bool,
    /// UDP segmentation over IPv4.
    pub uso4: bool,
    /// UDP segmentation over IPv6.
    pub uso6: bool,
}

impl Offloads {
    /// Whether this side takes a frame that starts like this with such a request. `head` is looked at only if the
    /// request does not say which IP it is about.
    pub fn takes_gso(&self, gso_type: u8, head: &[u8]) -> bool {
        match gso_type & !gso::ECN {
            gso::NONE => gso_type == gso::NONE,
            _ if gso_type & gso::ECN != 0 && !self.ecn => false,
            gso::TCPV4 => self.tso4,
            gso::TCPV6 => self.tso6,
            // ECN is a matter of TCP.
            gso::UDP_L4 if gso_type != gso::UDP_L4 => false,
            gso::UDP_L4 if self.uso4 == self.uso6 => self.uso4,
            gso::UDP_L4 => match ether_type(head) {
                Some((0x0800, _)) => self.uso4,
                Some((0x86dd, _)) => self.uso6,
                _ => false,
            },
            _ => false,
        }
    }
}

/// The type of a frame behind up to two VLAN tags, and where what it names begins.
fn ether_type(frame: &[u8]) -> Option<(u16, usize)> {
    let be16 = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let mut at = 12;
    let mut kind = be16(at)?;
    for _ in 0..2 {
        if matches!(kind, 0x8100 | 0x88a8) {
            at += 4;
            kind = be16(at)?;
        }
    }
    Some((kind, at + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each type for itself, with and without ECN, beside the words of 5.1.6.1.
    #[test]
    fn a_side_takes_what_it_has_agreed_to() {
        let v4 = [[0; 12].as_slice(), &[8, 0, 0x45]].concat();
        let v6 = [[0; 12].as_slice(), &[0x81, 0, 0, 7, 0x86, 0xdd, 0x60]].concat();
        let none = [0u8; 10];
        for n in 0..32u8 {
            let bit = |i: u8| n >> i & 1 == 1;
            let side = Offloads {
                csum: true,
                tso4: bit(0),
                tso6: bit(1),
                ecn: bit(2),
                uso4: bit(3),
                uso6: bit(4),
            };
            for head in [&v4[..], &v6, &none] {
                let takes = |t| side.takes_gso(t, head);
                assert!(takes(gso::NONE) && !takes(gso::ECN));
                assert_eq!(takes(gso::TCPV4), side.tso4);
                assert_eq!(takes(gso::TCPV6), side.tso6);
                assert_eq!(takes(gso::TCPV4 | gso::ECN), side.tso4 && side.ecn);
                assert!(!takes(gso::UDP_L4 | gso::ECN) && !takes(2) && !takes(3));
            }
            assert_eq!(side.takes_gso(gso::UDP_L4, &v4), side.uso4);
            assert_eq!(side.takes_gso(gso::UDP_L4, &v6), side.uso6);
            let both = side.uso4 && side.uso6;
            assert_eq!(side.takes_gso(gso::UDP_L4, &none), both);
        }
    }
}
