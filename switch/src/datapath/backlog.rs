//! A bounded queue of frames in memory, for a lane whose receiver has no room at the moment: what a network device's
//! transmit queue is to a TAP. One ring of bytes, allocated when it is first needed.

use crate::port::{BURST, Burst, Frame, VnetHdr};

/// Bytes of frames and their headers that a lane keeps at most before it drops.
pub const BACKLOG_BYTES: usize = 1 << 20;
/// What they take in the spool at most, written in runs: a frame of 14 bytes takes a ninth more there.
pub const SPOOLED_MAX: usize = BACKLOG_BYTES / 8 * 9;
const HEADER: usize = 16;

fn need(len: u32) -> usize {
    HEADER + (len as usize).next_multiple_of(8)
}

/// See the module.
#[derive(Default)]
pub struct Backlog {
    ring: Box<[u8]>,
    head: usize,
    tail: usize,
    /// Where the records before the wrap end; meaningful while `tail < head`.
    end: usize,
    frames: usize,
}

impl Backlog {
    /// True if no frame waits.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Frames that wait.
    pub fn len(&self) -> usize {
        self.frames
    }

    /// Whether [`Backlog::push`] would take a frame of this length.
    pub fn has_room(&self, len: u32) -> bool {
        self.place(len).is_some()
    }

    /// Where a frame would go, and whether that is behind a wrap.
    fn place(&self, len: u32) -> Option<(usize, bool)> {
        let need = need(len);
        let (head, tail) = match self.frames {
            0 => (0, 0),
            _ => (self.head, self.tail),
        };
        if self.frames > 0 && tail <= head {
            (head - tail >= need).then_some((tail, false))
        } else if BACKLOG_BYTES - tail >= need {
            Some((tail, false))
        } else {
            (head >= need).then_some((0, true))
        }
    }

    /// Copies the frame to the end; false if there is no room.
    #[must_use]
    pub fn push(&mut self, f: &Frame<'_>) -> bool {
        if self.ring.is_empty() {
            self.ring = vec![0; BACKLOG_BYTES].into_boxed_slice();
        }
        let Some((at, wraps)) = self.place(f.len) else {
            return false;
        };
        let need = need(f.len);
        if self.frames == 0 {
            self.head = 0;
        }
        if wraps {
            self.end = self.tail;
        }
        let r = &mut self.ring[at..at + need];
        r[..4].copy_from_slice(&f.len.to_le_bytes());
        r[4..14].copy_from_slice(&f.vnet.0);
        f.copy_to(&mut r[HEADER..HEADER + f.len as usize]);
        self.tail = at + need;
        self.frames += 1;
        true
    }

    /// The oldest frame.
    pub fn front(&self) -> Option<Frame<'_>> {
        (self.frames > 0).then(|| self.record(self.head))
    }

    /// The oldest frames, a burst of them at most.
    pub fn oldest(&self) -> Burst<'_> {
        let mut out = Burst::new();
        let mut at = self.head;
        let mut wrapped = self.tail <= self.head;
        while out.len() < self.frames.min(BURST) {
            let frame = self.record(at);
            at += need(frame.len);
            out.push(frame);
            if wrapped && at == self.end {
                (at, wrapped) = (0, false);
            }
        }
        out
    }

    fn record(&self, at: usize) -> Frame<'_> {
        let r = &self.ring[at..];
        let len = u32::from_le_bytes([r[0], r[1], r[2], r[3]]) as usize;
        let mut vnet = VnetHdr::default();
        vnet.0.copy_from_slice(&r[4..14]);
        Frame::from_slice(vnet, &r[HEADER..HEADER + len])
    }

    /// Removes the oldest frame.
    pub fn pop(&mut self) {
        if self.frames == 0 {
            return;
        }
        let r = &self.ring[self.head..];
        let len = u32::from_le_bytes([r[0], r[1], r[2], r[3]]) as usize;
        let wrapped = self.tail <= self.head;
        self.head += HEADER + len.next_multiple_of(8);
        self.frames -= 1;
        if wrapped && self.frames > 0 && self.head == self.end {
            self.head = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn is_a_bounded_queue(ops in proptest::collection::vec((any::<bool>(), 14usize..65_000), 1..400)) {
            let mut b = Backlog::default();
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            for (i, (push, len)) in ops.into_iter().enumerate() {
                if push {
                    let bytes: Vec<u8> = (0..len).map(|k| (k * 31 + i) as u8).collect();
                    let used: usize = model.iter().map(|m| m.len() + 24).sum();
                    if b.push(&Frame::from_slice(VnetHdr([i as u8; 10]), &bytes)) {
                        model.push_back(bytes);
                    } else {
                        // A refusal is right only when it is really full (a wrap wastes at most one frame's room).
                        prop_assert!(used + 2 * (len + 24) + 65_000 > BACKLOG_BYTES);
                    }
                } else if let Some(want) = model.pop_front() {
                    let lengths: Vec<_> = b.oldest().iter().map(|f| f.len as usize).collect();
                    let expected = std::iter::once(&want).chain(&model).map(Vec::len);
                    prop_assert_eq!(lengths, expected.take(BURST).collect::<Vec<_>>());
                    let got = b.front().expect("a frame");
                    let mut out = vec![0; got.len as usize];
                    got.copy_to(&mut out);
                    prop_assert_eq!(out, want);
                    b.pop();
                }
                prop_assert_eq!(b.len(), model.len());
            }
        }
    }
}
