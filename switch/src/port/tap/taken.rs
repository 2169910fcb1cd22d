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
/// Bytes of the buffers that are made before they are needed: a frame that was not segmented, and more.
const PLAIN: usize = 2048;
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

/// A whole frame.
pub type Whole = (VnetHdr, Vec<u8>);

/// What comes back of a stopped VM's TAP next, oldest first.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Back {
    /// QEMU has taken it: the guest may have it already.
    pub taken: Vec<Whole>,
    /// It was still in the kernel's queue.
    pub queued: Option<Whole>,
}

/// The frames that went to a TAP last, oldest first.
#[derive(Debug)]
pub(super) struct Taken {
    frames: VecDeque<(Instant, Whole)>,
    /// Buffers for those that come, with all their pages: the data path waits for no memory.
    spare: Vec<Vec<u8>>,
    cut: Option<Instant>,
    /// Those that were read back so far, and are among `frames`, are not any more.
    is_aligned: bool,
    /// Something was read back that is not among them.
    is_foreign: bool,
    /// Read back, and not yet returned: two at most.
    pub(super) ahead: VecDeque<Whole>,
}

impl Taken {
    /// Nothing was sent so far. For the control path.
    pub(super) fn new() -> Taken {
        Taken {
            frames: VecDeque::with_capacity(KEPT),
            spare: (0..KEPT).map(|_| vec![1; PLAIN]).collect(),
            cut: None,
            is_aligned: false,
            is_foreign: false,
            ahead: VecDeque::new(),
        }
    }

    /// This one has just been sent.
    pub(super) fn add(&mut self, frame: &Frame<'_>) {
        let mut bytes = match self.frames.len() {
            KEPT.. => self.frames.pop_front().map(|(_, (_, bytes))| bytes),
            _ => self.spare.pop(),
        }
        .unwrap_or_default();
        bytes.resize(frame.len as usize, 0);
        frame.copy_to(&mut bytes);
        self.frames.push_back((Instant::now(), (frame.vnet, bytes)));
    }

    /// Both marks were sent: nothing follows.
    pub(super) fn cut(&mut self) {
        self.cut = Some(Instant::now());
    }

    pub(super) fn is_marked(&self) -> bool {
        self.cut.is_some()
    }

    /// What was sent before is not known any more: the kernel made other frames of one.
    pub(super) fn forget(&mut self) {
        self.frames.clear();
    }

    /// The next that comes back, of those that are `ahead`. Nothing, and then for ever, at the end.
    pub(super) fn next(&mut self) -> Back {
        let Some(queued) = self.ahead.pop_front() else {
            return Back {
                taken: self.behind_all(),
                queued: None,
            };
        };
        Back {
            taken: self.before(&queued.1),
            queued: (!is_mark(&queued.1)).then_some(queued),
        }
    }

    fn before(&mut self, queued: &[u8]) -> Vec<Whole> {
        if self.is_aligned {
            // The one that QEMU has taken while we read, if it is not the next.
            let mut near = self.frames.iter().take(2);
            let Some(at) = near.position(|(_, sent)| is_same(sent, queued)) else {
                return Vec::new();
            };
            return self.pass(0, at, at + 1);
        }
        let Some(at) = self.find(queued) else {
            self.is_foreign = true;
            return Vec::new();
        };
        self.is_aligned = true;
        self.trim(at);
        let stuck = at.min(STUCK_MAX);
        self.pass(at - stuck, at, at + 1)
    }

    /// Where the first one that was read back is: with the one behind it, as frames may be alike.
    fn find(&self, queued: &[u8]) -> Option<usize> {
        let behind = self.ahead.front();
        let follows = |at: usize| match behind {
            // Nothing follows, or what QEMU has just taken.
            None => self.frames.len() - at <= 2,
            Some((_, next)) => {
                let mut near = self.frames.iter().skip(at + 1).take(2);
                near.any(|(_, sent)| is_same(sent, next))
            }
        };
        let all = || (0..self.frames.len()).rev();
        let is = |at: &usize| is_same(&self.frames[*at].1, queued);
        all()
            .filter(is)
            .find(|at| follows(*at))
            .or_else(|| all().find(is))
    }

    fn behind_all(&mut self) -> Vec<Whole> {
        let end = self.frames.len();
        let marks = self.frames.iter().rev();
        let marks = marks.take_while(|(_, (_, b))| is_mark(b)).count();
        match (self.is_aligned, self.is_foreign) {
            // QEMU has taken the last one while we read. More it does not take: then this is not the queue's end.
            (true, _) if end - marks > 1 => {
                self.frames.clear();
                Vec::new()
            }
            (true, _) => self.pass(0, end, end),
            (false, true) => Vec::new(),
            // Nothing was in the queue.
            (false, false) => {
                self.trim(end);
                self.pass(end.saturating_sub(STUCK_MAX), end, end)
            }
        }
    }

    /// Marks what is before `end` and too old, so that it is not repeated.
    fn trim(&mut self, end: usize) {
        let cut = self.cut.unwrap_or_else(Instant::now);
        for (at, (_, bytes)) in self.frames.iter_mut().take(end) {
            if cut.saturating_duration_since(*at) >= FRESH {
                bytes.clear();
            }
        }
    }

    /// What is from `first` to before `last`; it and all before `end` is gone then.
    fn pass(&mut self, first: usize, last: usize, end: usize) -> Vec<Whole> {
        let passed = self.frames.drain(..end).take(last).skip(first);
        let whole = passed.map(|(_, whole)| whole);
        whole
            .filter(|(_, bytes)| !bytes.is_empty() && !is_mark(bytes))
            .collect()
    }
}

/// Whether this was read of what was sent: the kernel completes a checksum for a guest that does not.
fn is_same((vnet, sent): &Whole, read: &[u8]) -> bool {
    let VnetHdr([.., s0, s1, o0, o1]) = *vnet;
    let at = usize::from(u16::from_le_bytes([s0, s1])) + usize::from(u16::from_le_bytes([o0, o1]));
    let but_the_sum = || {
        let (sent_end, read_end) = (sent.get(at + 2..)?, read.get(at + 2..)?);
        Some(sent_end == read_end && sent[..at] == read[..at])
    };
    let is_summed = vnet.flags() & VnetHdr::F_NEEDS_CSUM != 0;
    sent == read || is_summed && but_the_sum() == Some(true)
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
        let mut taken = Taken::new();
        for n in numbers {
            taken.add(&Frame::from_slice(VnetHdr::default(), &frame(n)));
        }
        taken
    }

    fn numbers(whole: &[Whole]) -> Vec<u32> {
        let number = |(_, bytes): &Whole| super::super::tests::number(bytes).unwrap();
        whole.iter().map(number).collect()
    }

    fn marked(mut taken: Taken) -> Taken {
        taken.cut();
        taken.add(&mark());
        taken.add(&mark());
        taken
    }

    fn whole(bytes: Vec<u8>) -> Whole {
        (VnetHdr::default(), bytes)
    }

    /// All that comes back, and which of it is repeated: the kernel's queue still has these.
    fn back(mut taken: Taken, queue: Vec<Whole>) -> (Vec<u32>, Vec<u32>) {
        let mut queue = VecDeque::from(queue);
        let (mut all, mut again) = (Vec::new(), Vec::new());
        loop {
            while taken.ahead.len() < 2
                && let Some(next) = queue.pop_front()
            {
                taken.ahead.push_back(next);
            }
            let is_end = taken.ahead.is_empty();
            let back = taken.next();
            all.extend(numbers(&back.taken));
            again.extend(numbers(&back.taken));
            all.extend(
                back.queued
                    .as_ref()
                    .map(|w| numbers(std::slice::from_ref(w))[0]),
            );
            if is_end {
                assert_eq!(taken.next(), Back::default());
                return (all, again);
            }
        }
    }

    fn queue(numbers: impl IntoIterator<Item = u32>, marks: usize) -> Vec<Whole> {
        let frames = numbers.into_iter().map(|n| whole(frame(n)));
        frames
            .chain(std::iter::repeat_n(whole(MARK.to_vec()), marks))
            .collect()
    }

    #[test]
    fn the_last_two_before_the_queue_go_once_more() {
        for (first, again) in [(9, vec![7, 8]), (5, vec![3, 4]), (1, vec![0]), (0, vec![])] {
            // A VM that was never cut properly; and one behind a freeze that came late.
            for (taken, marks) in [(sent(0..9), 0), (marked(sent(0..9)), 2)] {
                let (all, repeated) = back(taken, queue(first..9, marks));
                assert_eq!(repeated, again, "from {first} on");
                assert_eq!(all, (first - again.len() as u32..9).collect::<Vec<_>>());
            }
        }
        assert_eq!(back(sent([]), vec![]), (vec![], vec![]));
        let many = 10 * KEPT as u32;
        let first = many - CREDIT - 128;
        let (all, again) = back(marked(sent(0..many)), queue(first..many, 2));
        assert_eq!(again, [first - 2, first - 1]);
        assert_eq!(all.len() as u32, many - first + 2);
    }

    /// Only marks are left: QEMU has taken what was before, and the guest perhaps not.
    #[test]
    fn marks_tell_what_is_through_and_are_nobodys() {
        let only = |marks| back(marked(sent(0..9)), queue([], marks)).1;
        assert_eq!(only(0), [0; 0], "QEMU has both");
        assert_eq!(only(1), [8], "and the other, which was thrown away");
        assert_eq!(only(2), [7, 8]);
    }

    /// At most one, wherever it is.
    #[test]
    fn what_qemu_takes_while_the_queue_is_read_back_is_not_missed() {
        for meanwhile in 4..9 {
            let left = (3..9).filter(|n| *n != meanwhile);
            let (all, again) = back(marked(sent(0..9)), queue(left, 2));
            assert_eq!(all, (1..9).collect::<Vec<_>>(), "{meanwhile}");
            assert_eq!(again, [1, 2, meanwhile]);
        }
    }

    #[test]
    fn frames_that_are_alike_are_told_apart_by_what_follows() {
        let all = [0, 7, 1, 2, 7, 3, 7, 4];
        for first in 0..all.len() {
            let (_, again) = back(marked(sent(all)), queue(all[first..].to_vec(), 2));
            assert_eq!(
                again,
                all[first.saturating_sub(2)..first],
                "from {first} on"
            );
        }
    }

    #[test]
    fn what_others_have_sent_is_not_mistaken() {
        let mut frames = queue([77, 5, 78, 6, 7, 8, 79], 2);
        assert_eq!(back(marked(sent(0..9)), frames.clone()).1, [3, 4]);
        frames.truncate(1);
        assert_eq!(back(marked(sent(0..9)), frames).1, [0; 0]);
    }

    #[test]
    fn a_checksum_that_the_kernel_completes_is_no_difference() {
        let mut taken = sent(0..3);
        for (_, (vnet, _)) in &mut taken.frames {
            *vnet = VnetHdr([VnetHdr::F_NEEDS_CSUM, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
        }
        let mut read = frame(2);
        read[50..52].copy_from_slice(&[0xab, 0xcd]);
        let (_, again) = back(taken, vec![whole(read)]);
        assert_eq!(again, [0, 1]);
    }

    #[test]
    fn what_is_old_is_not_sent_again() {
        let mut taken = sent(0..3);
        taken.frames[2].0 += FRESH;
        taken.cut = Some(taken.frames[2].0 + Duration::from_millis(1));
        assert_eq!(back(taken, vec![]).1, [2]);
    }
}
