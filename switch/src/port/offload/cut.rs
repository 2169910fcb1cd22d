//! TCP and UDP segmentation for a receiver that does not take it: a big frame becomes small ones with complete checksums.
//!
//! Pure, and total over any bytes: what is no TCP or UDP over IP as its offload request says is `None`.

use super::{VnetHdr, csum, ether_type, gso};

/// Ethernet with two tags, IPv4 with options (or IPv6), TCP with options: 22 + 60 + 60.
const FRONT_MAX: usize = 142;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// TCP's flags (RFC 9293, 3.1).
const FIN: u8 = 1;
const PSH: u8 = 8;
const CWR: u8 = 0x80;

/// A frame that is being cut.
pub struct Cut<'a> {
    front: [u8; FRONT_MAX],
    /// Where IP begins, where TCP or UDP begins, where its payload begins.
    at: [usize; 3],
    is_v6: bool,
    kind: Kind,
    payload: &'a [u8],
    mss: usize,
    done: usize,
    /// Of the whole frame.
    id: u16,
}

/// What is cut, with what of the whole frame differs from piece to piece.
#[derive(Clone, Copy)]
enum Kind {
    Tcp { seq: u32, flags: u8 },
    Udp,
}

impl<'a> Cut<'a> {
    /// Of a whole frame in memory that nobody else writes, and its offload request.
    pub fn new(vnet: VnetHdr, frame: &'a [u8]) -> Option<Cut<'a>> {
        let be16 = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        let (ether, ip) = ether_type(frame)?;
        let first = *frame.get(ip)?;
        let (is_v6, l4, protocol) = match (ether, first >> 4) {
            // A fragment has no header of its own; IPv6 with extension headers is nothing that a guest lets others cut.
            (0x0800, 4) if be16(ip + 6)? & 0x3fff == 0 => {
                (false, ip + usize::from(first & 15) * 4, ip + 9)
            }
            (0x86dd, 6) => (true, ip + 40, ip + 6),
            _ => return None,
        };
        let (kind, payload) = match (vnet.gso_type(), *frame.get(protocol)?, is_v6) {
            (gso::UDP_L4, UDP, _) => (Kind::Udp, l4 + 8),
            (t, TCP, v6) if t & !gso::ECN == if v6 { gso::TCPV6 } else { gso::TCPV4 } => {
                let payload = l4 + usize::from(*frame.get(l4 + 12)? >> 4) * 4;
                if payload < l4 + 20 {
                    return None;
                }
                let seq = u32::from_be_bytes(*frame.get(l4 + 4..)?.first_chunk()?);
                let flags = *frame.get(l4 + 13)?;
                (Kind::Tcp { seq, flags }, payload)
            }
            _ => return None,
        };
        let mss = usize::from(vnet.gso_size());
        if l4 < ip + 20 || payload >= frame.len() || mss == 0 {
            return None;
        }
        let mut front = [0; FRONT_MAX];
        front
            .get_mut(..payload)?
            .copy_from_slice(frame.get(..payload)?);
        Some(Cut {
            front,
            at: [ip, l4, payload],
            is_v6,
            kind,
            payload: frame.get(payload..)?,
            mss,
            done: 0,
            id: be16(ip + 4)?,
        })
    }

    /// The lengths of all frames that it becomes.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + use<'a> {
        let front = self.at[2];
        self.payload.chunks(self.mss).map(move |p| front + p.len())
    }

    /// The next frame: its headers, and its payload.
    pub fn next_frame(&mut self) -> Option<(&[u8], &'a [u8])> {
        let rest = self.payload.get(self.done..).filter(|r| !r.is_empty())?;
        let (part, behind) = rest.split_at(self.mss.min(rest.len()));
        let [ip, l4, end] = self.at;
        let number = self.done / self.mss;
        let mut put = |at: usize, bytes: &[u8]| {
            self.front[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let length = |from: usize| ((end - from + part.len()) as u16).to_be_bytes();
        if self.is_v6 {
            put(ip + 4, &length(ip + 40));
        } else {
            put(ip + 2, &length(ip));
            put(ip + 4, &self.id.wrapping_add(number as u16).to_be_bytes());
            put(ip + 10, &[0; 2]);
        }
        let (protocol, field) = match self.kind {
            Kind::Tcp { seq, mut flags } => {
                if number > 0 {
                    flags &= !CWR;
                }
                if !behind.is_empty() {
                    flags &= !(FIN | PSH);
                }
                put(l4 + 4, &seq.wrapping_add(self.done as u32).to_be_bytes());
                put(l4 + 13, &[flags]);
                (TCP, l4 + 16)
            }
            Kind::Udp => {
                put(l4 + 4, &length(l4));
                (UDP, l4 + 6)
            }
        };
        put(field, &[0; 2]);
        if !self.is_v6 {
            let sum = !csum::sum(&self.front[ip..l4]);
            self.front[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let addresses = if self.is_v6 {
            ip + 8..ip + 40
        } else {
            ip + 12..ip + 20
        };
        let [high, low] = length(l4);
        let sums = [
            csum::sum(&self.front[addresses]),
            csum::sum(&[0, protocol, high, low]),
            csum::sum(&self.front[l4..end]),
            csum::sum(part),
        ];
        let sum = csum::written(!sums.into_iter().fold(0, csum::add));
        self.front[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        self.done += part.len();
        Some((&self.front[..end], part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame as a guest sends it for others to cut.
    fn whole(v6: bool, tags: usize, options: usize, payload: &[u8], flags: u8) -> Vec<u8> {
        let mut f = vec![2; 12];
        for _ in 0..tags {
            f.extend([0x81, 0, 0, 7]);
        }
        let tcp_len = 20 + 4 * options;
        if v6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, TCP, 64]);
            f.extend((0..32).map(|n| n * 5));
        } else {
            f.extend([0x08, 0, 0x45, 0, 0, 0, 0xff, 0xfe, 0x40, 0, 64, TCP, 0, 0]);
            f.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        }
        f.extend([0x30, 0x39, 0, 80]);
        f.extend(0xffff_ff00u32.to_be_bytes());
        f.extend([
            0,
            0,
            0,
            9,
            (tcp_len as u8 / 4) << 4,
            flags,
            1,
            1,
            0xab,
            0xcd,
            0,
            0,
        ]);
        f.extend((0..4 * options).map(|n| n as u8));
        f.extend(payload);
        f
    }

    fn vnet(v6: bool, mss: u16) -> VnetHdr {
        let [lo, hi] = mss.to_le_bytes();
        VnetHdr([
            1,
            if v6 { gso::TCPV6 } else { gso::TCPV4 },
            0,
            0,
            lo,
            hi,
            34,
            0,
            16,
            0,
        ])
    }

    /// A datagram, complete, as the specifications say (RFC 768, 791, 8200), byte by byte.
    fn datagram(v6: bool, tags: usize, options: usize, id: u16, payload: &[u8]) -> Vec<u8> {
        let mut f = vec![2; 12];
        for _ in 0..tags {
            f.extend([0x88, 0xa8, 0, 7]);
        }
        let size = (8 + payload.len()) as u16;
        let addresses = if v6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 1]);
            f.extend(size.to_be_bytes());
            f.extend([UDP, 64]);
            f.extend((0..32).map(|n| n * 5));
            f[f.len() - 32..].to_vec()
        } else {
            let mut ip = vec![0x45 + options as u8, 0];
            ip.extend((size + 20 + 4 * options as u16).to_be_bytes());
            ip.extend(id.to_be_bytes());
            ip.extend([0x40, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            ip.extend((0..4 * options).map(|_| 1));
            let [high, low] = (!(plain_sum(&[&ip]) as u16)).to_be_bytes();
            (ip[10], ip[11]) = (high, low);
            f.extend([8, 0]);
            f.extend(&ip);
            ip[12..20].to_vec()
        };
        let [high, low] = size.to_be_bytes();
        let mut udp = vec![0x30, 0x39, 0, 53, high, low, 0, 0];
        udp.extend(payload);
        let sum = match !(plain_sum(&[&addresses, &[0, UDP, high, low], &udp]) as u16) {
            0 => 0xffff,
            sum => sum,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        f.extend(udp);
        f
    }

    fn uso(ip: usize, size: u16) -> VnetHdr {
        let [lo, hi] = size.to_le_bytes();
        VnetHdr([1, gso::UDP_L4, 0, 0, lo, hi, ip as u8, 0, 6, 0])
    }

    /// The ones' complement sum, word by word.
    fn plain_sum(parts: &[&[u8]]) -> u32 {
        let all: Vec<u8> = parts.concat();
        all.chunks(2).fold(0, |sum, w| {
            let sum = sum + u32::from(w[0]) * 256 + u32::from(*w.get(1).unwrap_or(&0));
            (sum & 0xffff) + (sum >> 16)
        })
    }

    proptest! {
        #[test]
        fn pieces_are_frames_of_their_own_and_make_the_whole(
            v6: bool, tags in 0usize..3, options in 0usize..11, mss in 1u16..2000, flags: u8,
            payload in proptest::collection::vec(any::<u8>(), 1..9000),
        ) {
            let f = whole(v6, tags, options, &payload, flags);
            let mut cut = Cut::new(vnet(v6, mss), &f).unwrap();
            let lengths: Vec<usize> = cut.lengths().collect();
            let ip = 14 + 4 * tags;
            let tcp = ip + if v6 { 40 } else { 20 };
            let mut got = Vec::new();
            let mut n = 0;
            while let Some((front, part)) = cut.next_frame() {
                let one = [front, part].concat();
                prop_assert_eq!(one.len(), lengths[n]);
                let size = (one.len() - tcp) as u16;
                let be16 = |at: usize| u16::from_be_bytes([one[at], one[at + 1]]);
                let addresses = if v6 {
                    prop_assert_eq!(be16(ip + 4), size);
                    &one[ip + 8..tcp]
                } else {
                    prop_assert_eq!(be16(ip + 2), size + 20);
                    prop_assert_eq!(be16(ip + 4), 0xfffeu16.wrapping_add(n as u16));
                    prop_assert_eq!(plain_sum(&[&one[ip..tcp]]), 0xffff);
                    &one[ip + 12..tcp]
                };
                let pseudo = [0, TCP, (size >> 8) as u8, size as u8];
                prop_assert_eq!(plain_sum(&[addresses, &pseudo, &one[tcp..]]), 0xffff);
                let seq = u32::from_be_bytes(one[tcp + 4..tcp + 8].try_into().unwrap());
                prop_assert_eq!(seq, 0xffff_ff00u32.wrapping_add(got.len() as u32));
                got.extend_from_slice(part);
                n += 1;
                let mut want = flags;
                if n > 1 {
                    want &= !CWR;
                }
                if got.len() < payload.len() {
                    prop_assert_eq!(part.len(), usize::from(mss));
                    want &= !(FIN | PSH);
                }
                prop_assert_eq!(one[tcp + 13], want);
                // All else is as it was.
                prop_assert_eq!(&one[..ip], &f[..ip]);
                prop_assert_eq!(&one[tcp + 8..tcp + 13], &f[tcp + 8..tcp + 13]);
                prop_assert_eq!(&one[tcp + 18..front.len()], &f[tcp + 18..tcp + 20 + 4 * options]);
            }
            prop_assert_eq!(n, lengths.len());
            prop_assert_eq!(got, payload);
        }

        #[test]
        fn a_burst_of_datagrams_becomes_what_its_sender_would_have_sent_one_by_one(
            v6: bool, tags in 0usize..3, options in 0usize..11, size in 1u16..2000, id: u16,
            payload in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..9000),
        ) {
            let options = if v6 { 0 } else { options };
            // What stands in the lengths and checksums of the whole does not matter.
            let mut whole = datagram(v6, tags, options, id, &payload);
            let udp = whole.len() - payload.len() - 8;
            whole[udp + 4..udp + 8].fill(0xee);
            let mut cut = Cut::new(uso(udp, size), &whole).unwrap();
            let lengths: Vec<usize> = cut.lengths().collect();
            let want: Vec<Vec<u8>> = payload
                .chunks(usize::from(size))
                .enumerate()
                .map(|(n, part)| datagram(v6, tags, options, id.wrapping_add(n as u16), part))
                .collect();
            prop_assert_eq!(&lengths, &want.iter().map(Vec::len).collect::<Vec<_>>());
            for one in want {
                let (front, part) = cut.next_frame().unwrap();
                prop_assert_eq!([front, part].concat(), one);
            }
            prop_assert!(cut.next_frame().is_none());
        }

        #[test]
        fn any_bytes_are_cut_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), hdr: [u8; 10], v6: bool, at in 0usize..60, with: u8,
        ) {
            let mut near = whole(v6, 0, 2, &bytes, 0);
            near[at] = with;
            let mut udp = datagram(v6, 0, 2 * usize::from(!v6), 0, &bytes);
            udp[at.min(49)] = with;
            for f in [&bytes, &near, &udp] {
                for h in [VnetHdr(hdr), vnet(v6, 7), uso(34, 7)] {
                    let Some(mut cut) = Cut::new(h, f) else { continue };
                    let lengths: Vec<usize> = cut.lengths().collect();
                    for n in lengths {
                        let (front, part) = cut.next_frame().unwrap();
                        prop_assert_eq!(front.len() + part.len(), n);
                    }
                    prop_assert!(cut.next_frame().is_none());
                }
            }
        }
    }

    #[test]
    fn what_is_not_as_the_request_says_is_refused() {
        let f = whole(false, 0, 0, &[1; 100], 0);
        assert!(Cut::new(vnet(false, 50), &f).is_some());
        assert!(Cut::new(vnet(true, 50), &f).is_none());
        assert!(Cut::new(vnet(false, 0), &f).is_none());
        for (at, with) in [
            (14, 0x44),
            (14, 0x4f),
            (20, 0x20),
            (23, 17),
            (46, 0x40),
            (46, 0xf0),
        ] {
            let mut bad = f.clone();
            bad.truncate(100);
            bad[at] = with;
            let refused = Cut::new(vnet(false, 50), &bad).is_none();
            // Options that there could be are none of our business.
            assert_eq!(refused, (at, with) != (46, 0xf0), "{at}: {with:#x}");
        }
        assert!(Cut::new(vnet(false, 50), &f[..54]).is_none(), "no payload");
        assert!(Cut::new(uso(34, 50), &f).is_none(), "TCP is not UDP");
        let f = datagram(false, 0, 0, 1, &[1; 100]);
        assert!(Cut::new(uso(34, 50), &f).is_some());
        assert!(Cut::new(vnet(false, 50), &f).is_none(), "nor UDP TCP");
        assert!(Cut::new(uso(34, 0), &f).is_none());
        assert!(Cut::new(uso(34, 50), &f[..42]).is_none(), "no payload");
        let mut ecn = uso(34, 50);
        ecn.0[1] |= gso::ECN;
        assert!(Cut::new(ecn, &f).is_none());
    }
}
