//! Messages that the keeper passes on and remembers, from a front-end that says anything.

use gangway_keeper::message::{HEADER, Message, header};
use gangway_keeper::transcript::Transcript;

type Said = Vec<(Message<u8>, u64)>;

/// An answer that does all that was asked.
fn answer(m: &Message<u8>, protocol: u64, offered: u64) -> Option<Message<u8>> {
    let answer = Message {
        body: offered.to_ne_bytes().to_vec(),
        fds: Vec::new(),
        ..m.clone()
    };
    m.is_answered(protocol).then_some(answer)
}

fn told(t: &Transcript<u8>) -> Said {
    t.tell().map(|(m, offered)| (m.clone(), offered)).collect()
}

pub fn run(mut bytes: &[u8]) {
    let mut transcript = Transcript::default();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER>() {
        let Ok((request, flags, size)) = header(*head) else {
            return;
        };
        let (body, rest) = rest.split_at(size.min(rest.len()));
        bytes = rest;
        let m = Message {
            request,
            flags,
            body: body.to_vec(),
            fds: body.first().copied().into_iter().collect(),
        };
        assert_eq!(
            m.bytes().first_chunk().map(|h| header(*h)),
            Some(Ok((request, flags, body.len())))
        );
        let before = told(&transcript);
        let answer = answer(&m, transcript.protocol(), 0);
        if transcript.note(&m, answer.as_ref()).is_err() {
            assert_eq!(told(&transcript), before, "what is refused changes nothing");
        }
    }
    // Who is told it knows it, and would tell the same.
    let all = told(&transcript);
    let mut next = Transcript::default();
    for (m, offered) in &all {
        let answer = answer(m, transcript.protocol(), *offered);
        next.note(m, answer.as_ref()).expect("what was taken once");
    }
    assert_eq!(told(&next), all);
    assert_eq!(next.can_be_told(), transcript.can_be_told());
}
