//! Every target on every input that once reached or broke something.

use gangway_fuzz::{TARGETS, corpus};

/// On a thread of its own, so that one that hangs or breaks does not hide the others; the panic's message is printed.
fn replay(name: &'static str, target: gangway_fuzz::Target) -> Vec<String> {
    let inputs = corpus::read(name).unwrap();
    assert!(!inputs.is_empty(), "{name} has no inputs");
    let broken = |(about, bytes): (String, Vec<u8>)| {
        let shown = format!("{name}: {about} {}", hex::encode(&bytes));
        let ended = std::thread::spawn(move || target(&bytes)).join();
        ended.err().map(|_| shown)
    };
    inputs.into_iter().filter_map(broken).collect()
}

#[test]
fn what_was_found_once_is_read_without_harm() {
    let broken: Vec<_> = TARGETS.iter().flat_map(|(n, t)| replay(n, *t)).collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// No bytes, and the same byte many times.
#[test]
fn plain_inputs_are_read_without_harm() {
    for (_, target) in TARGETS {
        for byte in 0..=255 {
            target(&vec![byte; usize::from(byte) * 3]);
        }
    }
}
