use super::*;
use crate::spool::format::{FILE_HEADER, FileHeader, SEGMENT_MAGIC, Step, salt, step};

/// Format v1, byte by byte, as docs/formats/spool.md shows it. If this fails the format has changed: that needs a new
/// version.
const SEGMENT_V1: &str = include_str!("segment-v1.hex");

fn golden() -> Vec<u8> {
    let digits: Vec<u8> = SEGMENT_V1.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn version_1_is_written_as_ever() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(3)).unwrap();
    put(&mut w, 0x0102_0304, 20);
    put(&mut w, 0x0506_0708, 33);
    w.seal();
    let path = dir.path().join("1122334455667788/s-0000/000000.seg");
    let b = std::fs::read(path).unwrap();
    let used = b.iter().rposition(|b| *b != 0).unwrap() + 1;
    let hex: Vec<String> = b[..used.next_multiple_of(8)]
        .chunks(16)
        .map(|c| c.iter().map(|b| format!("{b:02x}")).collect())
        .collect();
    assert_eq!(hex.join("\n"), SEGMENT_V1.trim_end());
}

#[test]
fn version_1_is_read_as_ever() {
    let b = golden();
    let h = FileHeader::decode(&b, SEGMENT_MAGIC).unwrap();
    assert_eq!(h.hold, HOLD);
    assert_eq!(h.kind, Kind::Source);
    assert_eq!(h.lane, lane(3));
    assert_eq!((h.index, h.number, h.first_seq), (0, 0, 1));
    assert_eq!(h.segment_bytes, 128 << 10);
    let salt = salt(HOLD, &lane(3));
    let Step::Record(r) = step(&b[FILE_HEADER..], salt) else {
        panic!("no record");
    };
    assert_eq!((r.seq, r.time_ns), (1, 0x0102_0304));
    assert_eq!(r.vnet, vnet(0x0102_0304));
    assert_eq!(r.frame, bytes(0x0102_0304, 20));
}

/// A second implementation of the checksum and of the digest, from the document's words.
#[test]
fn checksum_and_digest_are_what_the_document_says() {
    fn slow(b: &[u8]) -> u32 {
        !b.iter().fold(!0, |mut c: u32, x| {
            c ^= u32::from(*x);
            for _ in 0..8 {
                c = (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg());
            }
            c
        })
    }
    assert_eq!(slow(b"123456789"), 0xe306_9283);
    let b = golden();
    let mut salted = 0x1122_3344_5566_7788_u64.to_le_bytes().to_vec();
    salted.extend_from_slice(&3_u16.to_le_bytes());
    salted.extend_from_slice(b"web0\0db0");
    let r = &b[FILE_HEADER..];
    let stored = u32::from_le_bytes(r[4..8].try_into().unwrap());
    assert_eq!(stored, slow(&r[8..60]) ^ slow(&salted));
    assert_eq!(r[38..40], slow(&salted).to_le_bytes()[..2]);
    assert_eq!(b[252..256], slow(&b[..252]).to_le_bytes());
}

#[test]
fn foreign_bytes_are_never_a_record() {
    let b = golden();
    for n in 0..FILE_HEADER {
        assert!(FileHeader::decode(&b[..n], SEGMENT_MAGIC).is_err());
        let mut bad = b.clone();
        bad[n] ^= 0x40;
        assert!(FileHeader::decode(&bad, SEGMENT_MAGIC).is_err(), "byte {n}");
    }
    let r = &b[FILE_HEADER..];
    for n in 0..60 {
        assert!(matches!(
            step(&r[..n], salt(HOLD, &lane(3))),
            Step::Short(_) | Step::Free
        ));
    }
    assert_eq!(step(r, salt(HOLD, &lane(4))), Step::Bad);
}
