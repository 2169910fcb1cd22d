//! What QEMU has taken from its VM's TAP and not given to the guest, when the VM stops unasked.
//!
//! QEMU (without vhost) reads a TAP frame by frame, and the next only when it is rid of the last (net/tap.c, `tap_send`; net/queue.c).
//! A frame for which the guest has no room it keeps, and throws away when the VM stops (net/net.c,
//! `net_vm_change_state_handler`); the next one that it reads then it keeps until the VM goes on, for ever if that goes on
//! elsewhere. Nothing outside QEMU can see either. But at most these two have not reached the guest, and they are the last two
//! that are not in the kernel's queue (the second may be taken while that is read back): so the switch remembers what it sends
//! while a hold is open, and sends them once more.
//!
//! A freeze that comes in time proves that there are none: behind all that was sent go two *marks*, frames that nobody
//! receives. When QEMU has read both, what was before them is with the guest: it reads the second only when it is rid of the
//! first, the first only when it is rid of what was before, and of a stopped VM's frames it reads one.
//!
//! Invariant: the newest of [`Taken`] are the kernel's queue, in its order: what is remembered was sent, what was sent is
//! remembered, under the lock under which it is sent.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::tx::CREDIT;
use crate::port::{Frame, VnetHdr};

/// Frames that are remembered: the queue at its longest (the last of its frames may have gone in 128 pieces), marks, and two.
const KEPT: usize = CREDIT as usize + 128 + 8;
/// What was sent so long before the cut is with a guest that is alive, and stale if it is not.
const FRESH: Duration = Duration::from_secs(5);
/// How many have not reached the guest at most, of those that are not in the queue.
const STUCK_MAX: usize = 2;

/// From one station that does not exist to another, with an EtherType for experiments (IEEE 802, 9.2.3): QEMU's filter drops it,
/// or a guest that listens to everything ignores it.
const MARK: [u8; 60] = {
    let mut mark = [0; 60];
    let text = b"\x02gw\0\0\x01\x02gw\0\0\x02\x88\xb5gangway: nobody receives this";
    let mut at = 0;
    while at < text.len() {
        mark[at] = text[at];
        at += 1;
    }
    mark
};

/// A frame as it was sent.
type Whole = (VnetHdr, Vec<u8>);

/// The frames that went to a TAP last, oldest first.
#[derive(Debug, Default)]
pub(super) struct Taken {
    frames: VecDeque<(Instant, Whole)>,
    cut: Option<Instant>,
    /// The queue is being read back.
    is_read: bool,
}

impl Taken {
    /// This one has just been sent.
    pub(super) fn add(&mut self, frame: &Frame<'_>) {
        let mut bytes = match self.frames.len() {
            KEPT.. => self.frames.pop_front().map(|(_, (_, bytes))| bytes),
            _ => None,
        }
        .unwrap_or_default();
        bytes.resize(frame.len as usize, 0);
        frame.copy_to(&mut bytes);
        self.frames.push_back((Instant::now(), (frame.vnet, bytes)));
    }

    /// Behind these nothing is sent any more.
    pub(super) fn cut(&mut self) {
        self.cut.get_or_insert_with(Instant::now);
    }

    /// What was sent before is not known any more: the kernel made other frames of one.
    pub(super) fn forget(&mut self) {
        self.frames.clear();
    }

    /// What goes before a frame that was just read back, `back`, because QEMU has taken it; or behind the last one. Before the first
    /// these are [`STUCK_MAX`], unless frames like that one were sent repeatedly: then more, rather than the wrong ones. Later
    /// the one that QEMU may still take while we read, too.
    pub(super) fn before(&mut self, back: Option<&[u8]>) -> Vec<Whole> {
        let is_first = !std::mem::replace(&mut self.is_read, true);
        let same = |(_, (_, bytes)): &(Instant, Whole)| back.is_some_and(|b| b == bytes);
        let end = self.frames.len();
        let (first, last) = match back {
            None => (end, end),
            Some(_) => match (
                self.frames.iter().position(same),
                self.frames.iter().rposition(same),
            ) {
                (Some(first), Some(last)) if is_first => (first, last),
                (Some(first), _) if first <= 1 => (first, first),
                // Of somebody else.
                _ => return Vec::new(),
            },
        };
        let cut = self.cut.unwrap_or_else(Instant::now);
        let skip = if is_first {
            first.saturating_sub(STUCK_MAX)
        } else {
            0
        };
        let before = self
            .frames
            .drain(..(last + 1).min(end))
            .take(last)
            .skip(skip)
            .filter(|(at, _)| !is_first || cut.saturating_duration_since(*at) < FRESH);
        let whole = before.map(|(_, whole)| whole);
        whole.filter(|(_, bytes)| !is_mark(bytes)).collect()
    }
}

/// The frame that nobody receives.
pub(super) fn mark() -> Frame<'static> {
    Frame::from_slice(VnetHdr::default(), &MARK)
}

pub(super) fn is_mark(bytes: &[u8]) -> bool {
    bytes == MARK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(n: u32) -> Vec<u8> {
        super::super::tests::numbered(n, 60)
    }

    fn sent(numbers: impl IntoIterator<Item = u32>) -> Taken {
        let mut taken = Taken::default();
        for n in numbers {
            taken.add(&Frame::from_slice(VnetHdr::default(), &frame(n)));
        }
        taken
    }

    fn numbers(whole: &[Whole]) -> Vec<u32> {
        let number = |(_, bytes): &Whole| super::super::tests::number(bytes).unwrap();
        whole.iter().map(number).collect()
    }

    /// Before the first that is read back.
    fn stuck(mut taken: Taken, back: Option<&[u8]>) -> Vec<u32> {
        numbers(&taken.before(back))
    }

    fn marked(behind: u32) -> Taken {
        let mut taken = sent(0..behind);
        taken.cut();
        taken.add(&mark());
        taken.add(&mark());
        taken
    }

    #[test]
    fn the_last_two_before_the_queue_may_be_stuck() {
        assert_eq!(stuck(sent(0..9), None), [7, 8]);
        assert_eq!(stuck(sent(0..9), Some(&frame(5))), [3, 4]);
        assert_eq!(stuck(sent(0..9), Some(&frame(1))), [0]);
        assert_eq!(stuck(sent(0..9), Some(&frame(0))), [0; 0]);
        assert_eq!(stuck(sent([]), None), [0; 0]);
        // Of somebody else.
        assert_eq!(stuck(sent(0..9), Some(&frame(77))), [0; 0]);
        let many = 10 * KEPT as u32;
        assert_eq!(
            stuck(sent(0..many), Some(&frame(many - CREDIT - 130))),
            [many - CREDIT - 132, many - CREDIT - 131]
        );
    }

    #[test]
    fn marks_are_never_sent_again_and_tell_what_is_through() {
        assert_eq!(stuck(marked(9), None), [0; 0]);
        // One of them waits, which of them does not matter.
        assert_eq!(stuck(marked(9), Some(&MARK)), [7, 8]);
        assert_eq!(stuck(marked(9), Some(&frame(8))), [6, 7]);
    }

    /// At most one, wherever it is.
    #[test]
    fn what_qemu_takes_while_the_queue_is_read_back_is_not_missed() {
        for taken_meanwhile in 4..10 {
            let mut taken = marked(9);
            let mut again = Vec::new();
            for n in (3..9).filter(|n| *n != taken_meanwhile) {
                again.extend(numbers(&taken.before(Some(&frame(n)))));
                again.push(n);
            }
            again.extend(numbers(&taken.before(None)));
            assert_eq!(again, (1..9).collect::<Vec<_>>(), "{taken_meanwhile}");
            assert_eq!(taken.before(None), []);
        }
    }

    #[test]
    fn frames_that_are_alike_are_rather_sent_too_often() {
        let mut taken = sent([0, 1, 2, 7, 3, 7, 4]);
        assert_eq!(numbers(&taken.before(Some(&frame(7)))), [1, 2, 7, 3]);
        assert_eq!(taken.before(Some(&frame(4))), []);
        assert_eq!(taken.before(None), []);
    }

    #[test]
    fn what_is_old_is_not_sent_again() {
        let mut taken = sent(0..3);
        taken.frames[2].0 += FRESH;
        taken.cut = Some(taken.frames[2].0 + Duration::from_millis(1));
        assert_eq!(stuck(taken, None), [2]);
    }
}
