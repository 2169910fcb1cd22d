//! Held frames as a pcapng file (draft-ietf-opsawg-pcapng): one interface per lane, nanoseconds.

use gangway_shared::ledger::KeptFrame;

/// LINKTYPE_ETHERNET.
const ETHERNET: u16 = 1;
const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const PACKET: u32 = 6;
/// Options.
const END: u16 = 0;
const COMMENT: u16 = 1;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const SHB_USERAPPL: u16 = 4;

/// A whole file. Frames are sorted by their time; those of a lane keep their order.
pub fn file(hold: &str, lanes: &[(String, Vec<KeptFrame>)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut body = Vec::new();
    body.extend_from_slice(&0x1a2b_3c4d_u32.to_le_bytes());
    body.extend_from_slice(&1_u16.to_le_bytes());
    body.extend_from_slice(&0_u16.to_le_bytes());
    // The section's length is not said.
    body.extend_from_slice(&u64::MAX.to_le_bytes());
    option(&mut body, COMMENT, format!("hold {hold}").as_bytes());
    option(&mut body, SHB_USERAPPL, b"gangway");
    option(&mut body, END, &[]);
    block(&mut out, SECTION, &body);
    for (name, _) in lanes {
        let mut body = Vec::new();
        body.extend_from_slice(&ETHERNET.to_le_bytes());
        body.extend_from_slice(&0_u16.to_le_bytes());
        // No limit on a packet's length.
        body.extend_from_slice(&0_u32.to_le_bytes());
        option(&mut body, IF_NAME, name.as_bytes());
        option(&mut body, IF_TSRESOL, &[9]);
        option(&mut body, END, &[]);
        block(&mut out, INTERFACE, &body);
    }
    let mut all: Vec<(usize, &KeptFrame)> = lanes
        .iter()
        .enumerate()
        .flat_map(|(n, (_, frames))| frames.iter().map(move |f| (n, f)))
        .collect();
    all.sort_by_key(|(_, f)| f.time_ns);
    for (n, f) in all {
        let mut body = Vec::with_capacity(f.bytes.len() + 64);
        body.extend_from_slice(&(n as u32).to_le_bytes());
        body.extend_from_slice(&((f.time_ns >> 32) as u32).to_le_bytes());
        body.extend_from_slice(&(f.time_ns as u32).to_le_bytes());
        let len = (f.bytes.len() as u32).to_le_bytes();
        body.extend_from_slice(&len);
        body.extend_from_slice(&len);
        padded(&mut body, &f.bytes);
        option(&mut body, COMMENT, format!("seq {}", f.seq).as_bytes());
        option(&mut body, END, &[]);
        block(&mut out, PACKET, &body);
    }
    out
}

fn block(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let len = (body.len() as u32 + 12).to_le_bytes();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&len);
    out.extend_from_slice(body);
    out.extend_from_slice(&len);
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend_from_slice(&code.to_le_bytes());
    body.extend_from_slice(&(value.len() as u16).to_le_bytes());
    padded(body, value);
}

fn padded(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend_from_slice(bytes);
    body.resize(body.len().next_multiple_of(4), 0);
}
