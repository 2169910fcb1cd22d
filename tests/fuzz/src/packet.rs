//! What a frame says of itself, and what an offload request says of it.

use std::cell::OnceCell;

use gangway_switch::datapath::flow::Flows;
use gangway_switch::datapath::parse;
use gangway_switch::port::offload::csum;
use gangway_switch::port::offload::cut::Cut;
use gangway_switch::port::{HEAD, VnetHdr};

use crate::input::Input;

thread_local! {
    static FLOWS: OnceCell<Flows> = const { OnceCell::new() };
}

/// An offload request, and a frame.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let vnet = VnetHdr(input.vnet());
    let frame = input.0;
    let head = &frame[..frame.len().min(HEAD)];
    let len = frame.len() as u32;
    let payload = parse::payload_bytes(head, len);
    assert!(payload <= len);
    assert_eq!(parse::ether(head).is_some(), head.len() >= 14);

    FLOWS.with(|flows| {
        let flows = flows.get_or_init(|| Flows::new(64).expect("memory"));
        let key = flows.key(head);
        let from = usize::from(vnet.0[0]);
        flows.note(&key, from, 7, len - payload, 1, u32::from(vnet.0[1]));
        let slot = flows.locate(&[key], from)[0];
        if let Some(flow) = flows.find(&key, slot, from, 1, u32::from(vnet.0[1])) {
            assert_eq!((flow.to(), flow.overhead()), (7, len - payload));
        }
    });

    let (start, offset) = (
        usize::from(vnet.csum_start()),
        usize::from(vnet.csum_offset()),
    );
    let mut whole = frame.to_vec();
    let done = csum::complete(&mut whole, start, offset);
    assert_eq!(done, start + offset + 2 <= frame.len());

    if let Some(mut cut) = Cut::new(vnet, frame) {
        let lengths: Vec<usize> = cut.lengths().collect();
        let mut rest = frame;
        for (n, want) in lengths.iter().enumerate() {
            let (front, part) = cut.next_frame().expect("as many as were announced");
            assert_eq!(front.len() + part.len(), *want);
            assert!(part.len() <= usize::from(vnet.gso_size()));
            if n == 0 {
                rest = &frame[front.len()..];
            }
            rest = rest.strip_prefix(part).expect("the payload, in order");
        }
        assert!(rest.is_empty() && cut.next_frame().is_none());
    }
}
