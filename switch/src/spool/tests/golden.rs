use super::*;
use crate::port::PLAIN_HDR;
use crate::spool::format::{FILE_HEADER, FileHeader, Marker, SEGMENT_MAGIC, Step, salt, step};

/// Format v3, byte by byte, as docs/formats/spool.md shows it, in a use of the segment with epoch [`EPOCH`]. If this fails
/// the format has changed: that needs a new version.
const SEGMENT_V3: &str = include_str!("segment-v3.hex");
/// Of `queue.meta` the header and the first copy of the words, and the second copy.
const QUEUE_V3: &str = include_str!("queue-v3.hex");
const SECOND: usize = 1024;
const EPOCH: u64 = 0x0102_0304_0506_0709;

fn golden() -> Vec<u8> {
    unhex(SEGMENT_V3)
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap())
        .collect()
}

fn segment(dir: &Path) -> std::path::PathBuf {
    dir.join("1122334455667788/s-0000/000000.seg")
}

#[test]
fn version_3_is_written_as_ever() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(3)).unwrap();
    put(&mut w, 0x0102_0304, 20);
    let all = [bytes(5, 33), bytes(6, 14)];
    let frames = [
        Frame::from_slice(VnetHdr::default(), &all[0]),
        Frame::from_slice(vnet(0x0506_0708), &all[1]),
    ];
    assert_eq!(w.append_run(0x0506_0708, &frames, Origin::NONE), 2);
    w.seal();
    let mut b = std::fs::read(segment(dir.path())).unwrap();
    // The epoch is another one each time: that of the file, and all that follows from it.
    let epoch = FileHeader::decode(&b, SEGMENT_MAGIC).unwrap().epoch;
    for at in (0..b.len()).step_by(8) {
        if b[at..at + 8] == epoch.to_le_bytes() {
            b[at..at + 8].copy_from_slice(&EPOCH.to_le_bytes());
        }
    }
    let crc = super::super::format::crc32c(&b[..252]);
    b[252..256].copy_from_slice(&crc.to_le_bytes());
    // Header, two batches, marker.
    let used = FILE_HEADER + 96 + 144 + 48;
    is_golden(&b[..used], "segment-v3.hex", SEGMENT_V3);
}

/// `UPDATE=1 cargo test` writes it, if there is a reason.
fn is_golden(b: &[u8], file: &str, golden: &str) {
    let line = |c: &[u8]| c.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let lines: Vec<String> = b.chunks(16).map(line).collect();
    if std::env::var_os("UPDATE").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/spool/tests/");
        std::fs::write(format!("{path}{file}"), lines.join("\n") + "\n").unwrap();
    }
    assert_eq!(lines.join("\n"), golden.trim_end());
}

fn meta(dir: &Path) -> std::path::PathBuf {
    dir.join("1122334455667788/s-0000/queue.meta")
}

#[test]
fn the_metadata_of_version_3_is_written_as_ever() {
    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, q) = spool.create(HOLD, Kind::Source, &lane(3)).unwrap();
    (0..300).for_each(|n| put(&mut w, n, 60));
    w.commit();
    q.set_flushed(258);
    q.set_inside(true);
    let b = std::fs::read(meta(dir.path())).unwrap();
    assert_eq!(b.len(), 4096);
    let first = FILE_HEADER + 24;
    let used = [&b[..first], &b[SECOND..SECOND + 24]].concat();
    is_golden(&used, "queue-v3.hex", QUEUE_V3);
    let rest = [&b[first..SECOND], &b[SECOND + 24..]].concat();
    assert!(rest.iter().all(|b| *b == 0));
}

#[test]
fn the_metadata_of_version_3_is_read_as_ever() {
    let dir = tmp();
    {
        let (spool, _) = open(dir.path());
        let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(3)).unwrap();
        (0..300).for_each(|n| put(&mut w, n, 60));
        w.commit();
    }
    let golden = unhex(QUEUE_V3);
    let (first, second) = golden.split_at(FILE_HEADER + 24);
    let mut b = first.to_vec();
    b.resize(SECOND, 0);
    b.extend(second);
    b.resize(4096, 0);
    std::fs::write(meta(dir.path()), b).unwrap();
    let (_spool, found) = open(dir.path());
    let q = &found[0].queue;
    assert_eq!(
        (q.last_seq(), q.flushed_seq(), q.inside()),
        (300, 258, true)
    );
    assert_eq!((&found[0].damaged, &found[0].bad_words), (&vec![], &vec![]));
}

/// A second implementation of the words' check, from the document's words.
#[test]
fn the_check_of_a_word_is_what_the_document_says() {
    let b = unhex(QUEUE_V3);
    let salt = salt(HOLD, &lane(3)).to_le_bytes();
    for (n, value) in [300_u64, 258, 1].into_iter().enumerate() {
        let mut said = value.to_le_bytes().to_vec();
        said.extend(salt);
        said.extend([n as u8, 0, 0, 0]);
        let crc = super::super::format::crc32c(&said);
        let word = value | u64::from((crc >> 16) ^ (crc & 0xffff)) << 48;
        for copy in [FILE_HEADER, FILE_HEADER + 24] {
            let at = copy + 8 * n;
            assert_eq!(b[at..at + 8], word.to_le_bytes(), "word {n}");
        }
    }
}

#[test]
fn version_3_is_read_as_ever() {
    let b = golden();
    let h = FileHeader::decode(&b, SEGMENT_MAGIC).unwrap();
    assert_eq!(h.hold, HOLD);
    assert_eq!(h.kind, Kind::Source);
    assert_eq!(h.lane, lane(3));
    assert_eq!((h.index, h.number, h.first_seq), (0, 0, 1));
    assert_eq!((h.segment_bytes, h.epoch), (128 << 10, EPOCH));
    let salt = salt(HOLD, &lane(3));
    let Step::Batch(one) = step(&b[FILE_HEADER..], EPOCH, salt) else {
        panic!("no batch");
    };
    let rest = &b[FILE_HEADER + one.span()..];
    let Step::Batch(two) = step(rest, EPOCH, salt) else {
        panic!("no second batch");
    };
    let end = step(&rest[two.span()..], EPOCH, salt);
    assert_eq!(end, Step::Marker(Marker::Seal, 3));
    let records: Vec<_> = one.records().chain(two.records()).collect();
    let expected = [
        (1, 0x0102_0304, vnet(0x0102_0304), bytes(0x0102_0304, 20)),
        (2, 0x0506_0708, VnetHdr::default(), bytes(5, 33)),
        (3, 0x0506_0708, vnet(0x0506_0708), bytes(6, 14)),
    ];
    assert_eq!(records.len(), 3);
    for (r, e) in records.iter().zip(expected) {
        assert_eq!((r.seq, r.time_ns, r.vnet, r.frame.to_vec()), e);
    }
}

/// A second implementation of the checksum, the digest and the layout, from the document's words.
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
    let le32 = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
    let le64 = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
    let mut salted = 0x1122_3344_5566_7788_u64.to_le_bytes().to_vec();
    salted.extend_from_slice(&3_u16.to_le_bytes());
    salted.extend_from_slice(b"web0\0db0");
    assert_eq!(b[252..256], slow(&b[..252]).to_le_bytes());
    let mut at = FILE_HEADER;
    let (mut digest, mut magics) = (0, Vec::new());
    while at < b.len() {
        let len = le32(&b, at + 16) as usize;
        let batch = &b[at..at + len];
        at += len;
        assert_eq!(le64(batch, 0), EPOCH);
        magics.push(&batch[12..16]);
        let mut columns = [const { Vec::new() }; 4];
        for (n, word) in batch[16..].chunks(8).enumerate() {
            columns[n % 4].extend_from_slice(word);
        }
        let sums: Vec<u8> = columns.iter().flat_map(|c| slow(c).to_le_bytes()).collect();
        assert_eq!(le32(batch, 8), slow(&sums) ^ slow(&salted));
        if &batch[12..16] == b"GWbt" {
            let mut z = digest ^ (le64(batch, 24) << 32 | u64::from(le32(batch, 8)));
            z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            digest = z ^ (z >> 31);
        }
    }
    assert_eq!(magics, [b"GWbt", b"GWbt", b"GWsl"]);
    // The second batch: two entries, and 8 bytes of padding; 45 bytes of the first frame's slot, which has 48.
    let two = &b[FILE_HEADER + 96..];
    assert_eq!((le32(two, 48), le32(two, 52)), (33, 14));
    assert_eq!(two[64..76], PLAIN_HDR);
    assert_eq!(two[76..109], bytes(5, 33));
    assert_eq!(two[56..64], [0; 8]);
    assert_eq!(two[109..112], [0; 3]);
    assert_eq!(two[112..122], vnet(0x0506_0708).0);

    let dir = tmp();
    let (spool, _) = open(dir.path());
    let (mut w, _q) = spool.create(HOLD, Kind::Source, &lane(3)).unwrap();
    put(&mut w, 0x0102_0304, 20);
    let all = [bytes(5, 33), bytes(6, 14)];
    let frames = [
        Frame::from_slice(VnetHdr::default(), &all[0]),
        Frame::from_slice(vnet(0x0506_0708), &all[1]),
    ];
    w.append_run(0x0506_0708, &frames, Origin::NONE);
    let t = w.tally();
    assert_eq!((t.frames, t.bytes, t.digest), (3, 67, digest));
}

#[test]
fn foreign_bytes_are_never_a_batch() {
    let b = golden();
    for n in 0..FILE_HEADER {
        assert!(FileHeader::decode(&b[..n], SEGMENT_MAGIC).is_err());
        let mut bad = b.clone();
        bad[n] ^= 0x40;
        assert!(FileHeader::decode(&bad, SEGMENT_MAGIC).is_err(), "byte {n}");
    }
    let ours = salt(HOLD, &lane(3));
    let r = &b[FILE_HEADER..];
    for n in 0..96 {
        let cut = step(&r[..n], EPOCH, ours);
        assert!(matches!(cut, Step::Bad | Step::Free), "{n} bytes");
        let mut bad = r.to_vec();
        bad[n] ^= 0x40;
        let found = step(&bad, EPOCH, ours);
        let expected = if n < 8 { Step::Free } else { Step::Bad };
        assert_eq!(found, expected, "byte {n}");
    }
    assert_eq!(step(r, EPOCH, salt(HOLD, &lane(4))), Step::Bad);
    assert_eq!(step(r, EPOCH + 1, ours), Step::Free);
}

/// A checksum that is right says nothing of who made it: a peer's table must not lead out of its batch.
#[test]
fn a_table_that_does_not_fit_is_no_batch() {
    let b = golden();
    let ours = salt(HOLD, &lane(3));
    let len = 96;
    let whole = &b[FILE_HEADER..FILE_HEADER + len];
    for (at, value) in [
        (48, 19),
        (48, 28),
        (48, 0),
        (48, u32::MAX),
        (48, 1 << 17),
        (20, 2),
        (20, 0),
    ] {
        let mut bad = whole.to_vec();
        let size = if at == 20 { 2 } else { 4 };
        bad[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        let sum = super::super::format::striped(&bad[16..]) ^ ours;
        bad[8..12].copy_from_slice(&sum.to_le_bytes());
        let found = step(&bad, EPOCH, ours);
        // As long in its slot as before: another frame, but nothing that leads astray.
        let fits = at == 48 && value == 19;
        assert_eq!(matches!(found, Step::Batch(_)), fits, "{value} at {at}");
    }
}
