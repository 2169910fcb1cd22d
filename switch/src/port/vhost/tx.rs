//! The guest's receive ring: frames out of the switch, copied once, straight into the guest's buffers.
//!
//! `send` copies and marks dirty pages; `flush` shows the guest everything at once. Nothing is consumed by a frame that
//! does not fit. Workers that share the queue take places and copy outside its lock ([`super::claim`]).
//!
//! Invariant: chains are shown in the ring's order: none behind a claim that is out.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::claim::{Claim, Cpu, Places, Plan, is_apart};
use super::features::RingFeatures;
use super::live::Gate;
use super::position::{Position, show};
use super::ring::{Broken, Chain, Direction, Plain, Plains, Pos, Ring};
use crate::mem::prefetch_to_write;
use crate::port::offload::Offloads;
use crate::port::{BURST, Frame, Mark, NeverReason, PLAIN_HDR, Sent, SharedTx, TxQueue, VnetHdr};

/// See the module's text.
pub struct Tx<R: Ring> {
    ring: R,
    gate: Gate,
    features: RingFeatures,
    num: u16,
    next: Pos,
    plains: Plains,
    /// The chains of one frame, with their bytes.
    chains: Vec<(Chain, u32)>,
    /// Of whoever has the queue for a burst; it is there but within [`TxQueue::send`].
    own: Option<Box<Claim>>,
    /// Sent by whoever has the queue since the last flush.
    unflushed: Taken,
    /// Taken from the ring and not shown yet, in its order: claims, and what was sent behind them.
    open: VecDeque<Open>,
    /// The number of the first of them.
    first: u64,
    /// Chains that were shown.
    shown: u64,
    /// No more claims: the queue is about to go.
    closing: bool,
    /// What ours can do.
    cpu: Cpu,
    /// Something was flushed, and nobody has asked whether the driver wants a signal.
    owes: bool,
    /// What the next run of the switch finds of it: of a split ring nothing, which says itself what was given back.
    position: Position,
}

/// So much of the ring.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    chains: usize,
    frames: u64,
}

/// See [`Tx::open`].
#[derive(Debug)]
struct Open {
    taken: Taken,
    /// The position behind it.
    end: Pos,
    written: bool,
}

/// Why a frame was not sent.
enum Not {
    Full,
    Never(NeverReason),
    Broken(Broken),
}

impl From<Broken> for Not {
    fn from(b: Broken) -> Not {
        Not::Broken(b)
    }
}

impl<R: Ring> Tx<R> {
    /// A queue on a ring of `num` entries that starts at `next`.
    pub fn new(
        ring: R,
        gate: Gate,
        next: u16,
        num: u16,
        features: RingFeatures,
        position: Position,
    ) -> Tx<R> {
        let mut tx = Tx {
            ring,
            gate,
            features,
            num,
            next: Pos(next),
            plains: Plains::default(),
            chains: Vec::with_capacity(usize::from(num)),
            own: Some(Box::default()),
            unflushed: Taken::default(),
            open: VecDeque::new(),
            first: 0,
            shown: 0,
            closing: false,
            cpu: Cpu::here(),
            owes: false,
            position,
        };
        // Nobody listens to the kicks for new buffers: a frame that found none is tried again by the worker.
        if tx.enter() {
            if let Err(why) = tx.ring.quiet() {
                tx.gate.set_broken(why);
            }
            // What the run before this one has not come to show.
            let unseen = usize::from(tx.position.start().1);
            match show(&mut tx.ring, &mut tx.position, unseen) {
                Ok(was_there) => tx.owes = was_there,
                Err(why) => tx.gate.set_broken(why),
            }
            tx.gate.leave();
        }
        if tx.owes {
            // Nothing may follow for long.
            fence(Ordering::SeqCst);
            tx.settle();
        }
        tx
    }

    /// Within a section: something was taken from the ring and is not shown yet.
    #[inline]
    fn is_busy(&self) -> bool {
        self.unflushed.chains > 0 || !self.open.is_empty()
    }

    /// Ends the section, unless it has to go on.
    #[inline]
    fn leave(&mut self) {
        if !self.is_busy() {
            self.gate.leave();
        }
    }

    /// Chains that were ever taken from the ring.
    fn taken(&self) -> u64 {
        let open: usize = self.open.iter().map(|o| o.taken.chains).sum();
        self.shown + (open + self.unflushed.chains) as u64
    }

    fn enter(&mut self) -> bool {
        self.gate.enter();
        if self.is_busy() {
            // The control side waits for its end.
            return true;
        }
        if self.gate.refresh() {
            self.plains.truncate(0);
            if let Some(live) = self.gate.live() {
                self.ring.rebind(live);
            }
        }
        if let Some(why) = self.gate.lost() {
            self.set_broken(why);
        }
        let live = self.gate.live().is_some() && !self.gate.is_broken();
        if !live {
            self.gate.leave();
        }
        live
    }

    /// The same for a claim. A section that claims keep open would never end for a control side that waits: none is added then.
    fn enter_claim(&mut self) -> Result<(), Sent> {
        if self.gate.is_broken() {
            return Err(Sent::Never(NeverReason::RingBroken));
        }
        if self.closing || (self.is_busy() && self.gate.is_stale()) {
            return Err(Sent::Full);
        }
        if self.is_busy()
            && let Some(why) = self.gate.lost()
        {
            self.set_broken(why);
        }
        match self.enter() {
            _ if self.gate.is_broken() => {
                self.leave();
                Err(Sent::Never(NeverReason::RingBroken))
            }
            true => Ok(()),
            false => Err(Sent::Down),
        }
    }

    /// Finds chains for `need` bytes from `at` on, behind those that were found; returns what is behind them, and how many
    /// chains and pieces they are.
    fn collect(&mut self, places: &mut Places, mut at: Pos, need: u64) -> Result<Pos, Not> {
        let chains = self.chains.len();
        let mut room = 0u64;
        let mut pieces = places.pieces.all().len();
        while room < need {
            // Only mergeable buffers go together (virtio 1.2, 5.1.6.4).
            if self.chains.len() > chains && !self.features.mrg {
                return Err(Not::Never(NeverReason::TooLong));
            }
            if self.chains.len() == usize::from(self.num) {
                return Err(Not::Never(NeverReason::TooLong));
            }
            let found = match self.ring.peek(at, Direction::Write, &mut places.pieces) {
                // Buffers so small that a frame would need thousands of them.
                Err(Broken::Chain) if !self.chains.is_empty() => {
                    return Err(Not::Never(NeverReason::TooLong));
                }
                found => found?,
            };
            let Some((chain, after)) = found else {
                return Err(Not::Full);
            };
            let all = places.pieces.all();
            let bytes: u64 = all[pieces..].iter().map(|p| u64::from(p.host.len)).sum();
            pieces = all.len();
            // Longer than a frame can be is as good as a frame's length.
            self.chains.push((chain, bytes.min(1 << 30) as u32));
            room += bytes;
            at = after;
        }
        Ok(at)
    }

    /// Takes places for all frames that are wanted, or for none.
    fn place(&mut self, places: &mut Places) -> Result<Taken, Not> {
        self.chains.clear();
        places.hdr_len = self.features.hdr_len;
        // So that a ring of two descriptors a buffer takes them when it is empty.
        if places.frames.len() > 1 && places.frames.len() > usize::from(self.num / 2) {
            return Err(Not::Never(NeverReason::Offload));
        }
        let hdr_len = u32::from(self.features.hdr_len);
        let mut at = self.next;
        for i in 0..places.frames.len() {
            let (chains, pieces) = (self.chains.len(), places.pieces.all().len());
            let need = u64::from(hdr_len + places.frames[i].bytes);
            at = self.collect(places, at, need)?;
            places.frames[i].buffers = (self.chains.len() - chains) as u16;
            places.frames[i].pieces = places.pieces.all().len() - pieces;
        }
        let mut chains = self.chains.iter();
        for frame in &places.frames {
            let mut left = hdr_len + frame.bytes;
            for &(chain, room) in chains.by_ref().take(usize::from(frame.buffers)) {
                let n = left.min(room);
                self.ring.complete(chain, n);
                left -= n;
            }
        }
        self.next = at;
        // One that is not plain ends what was looked at ahead.
        self.plains.take(self.chains.len());
        Ok(Taken {
            chains: self.chains.len(),
            frames: 1,
        })
    }

    /// Both at once, for who has the queue.
    fn place_and_write(&mut self, frame: &Frame<'_>, own: &mut Claim) -> Result<Taken, Not> {
        let plan = Plan::of(frame, self.features.guest, &mut own.bounce).map_err(Not::Never)?;
        own.places.want(&plan);
        let taken = self.place(&mut own.places)?;
        // SAFETY: the ring gave the pieces, and keeps them; the frame outlives this call.
        unsafe { own.places.write(plan) };
        Ok(taken)
    }

    /// What a sender is told.
    fn not_sent(&mut self, not: Not) -> Sent {
        let stale = self.gate.is_stale();
        self.leave();
        match not {
            Not::Full => Sent::Full,
            Not::Never(why) => Sent::Never(why),
            // In memory that was added meanwhile: the next burst knows it.
            Not::Broken(Broken::Address(_)) if stale => Sent::Full,
            Not::Broken(why) => {
                self.set_broken(why);
                Sent::Never(NeverReason::RingBroken)
            }
        }
    }

    /// Marks what was written to places.
    fn mark(&mut self, places: &Places) {
        let Some(log) = self.gate.live().and_then(|l| l.log.as_ref()) else {
            return;
        };
        let mut pieces = places.pieces.all();
        let mut bad = None;
        for frame in &places.frames {
            let mut left = u32::from(places.hdr_len) + frame.bytes;
            let (own, behind) = pieces
                .split_at_checked(frame.pieces)
                .unwrap_or((pieces, &[]));
            pieces = behind;
            for p in own {
                let n = left.min(p.host.len);
                if !log.mark(p.gpa, u64::from(n)) {
                    bad = Some(Broken::Log(p.gpa));
                }
                left -= n;
                if left == 0 {
                    break;
                }
            }
        }
        if let Some(why) = bad {
            self.set_broken(why);
        }
        self.mark_run(&places.plains, |i| places.written[i]);
    }

    fn set_broken(&mut self, why: Broken) {
        self.gate.set_broken(why);
    }

    /// Looks at the next plain buffers, as far as a burst more, and takes their first lines away from the guest's processor,
    /// which has read them: so much earlier than they are written that no store has to wait.
    #[inline]
    fn look_ahead(&mut self, want: usize) {
        let had = self.plains.waiting().len();
        let at = self.ring.after(self.next, had as u16);
        let max = want.min(self.ring.slots()).saturating_sub(had);
        if max == 0 {
            return;
        }
        self.ring
            .peek_plain(at, max, Direction::Write, &mut self.plains);
        for p in &self.plains.waiting()[had..] {
            let at = p.ptr.as_ptr();
            prefetch_to_write(match is_apart(at) {
                true => at.wrapping_add(PLAIN_HDR.len()),
                false => at,
            });
        }
    }

    /// How many of the frames have a plain buffer that takes them, from the next one on.
    #[inline]
    fn fitting(&mut self, frames: &[Frame<'_>]) -> usize {
        let simple = |frame: &&Frame<'_>| frame.vnet == VnetHdr::default();
        let n = frames.iter().take_while(simple).count();
        if self.plains.waiting().len() < n {
            self.look_ahead(n);
        }
        let hdr_len = self.features.hdr_len;
        let fits = |(frame, p): &(&Frame<'_>, &Plain)| p.len >= room(hdr_len, frame);
        let all = frames[..n].iter().zip(self.plains.waiting());
        all.take_while(fits).count()
    }

    /// Takes the next `n` plain buffers for these frames.
    #[inline]
    fn take_plain(&mut self, n: usize, frames: &[Frame<'_>]) {
        let (plains, hdr_len) = (self.plains.waiting(), self.features.hdr_len);
        let chain = |i: usize| (plains[i].chain(), room(hdr_len, &frames[i]));
        self.ring.complete_run(n, chain);
        self.plains.take(n);
        self.next = self.ring.after(self.next, n as u16);
    }

    /// Marks plain buffers, of which so many bytes were written.
    fn mark_run(&self, plains: &[Plain], written: impl Fn(usize) -> u32) {
        let Some(live) = self.gate.live() else { return };
        let Some(log) = &live.log else { return };
        let mark = |(i, p): (usize, &Plain)| {
            let gpa = live.mem.gpa(p.ptr).unwrap_or_default();
            let marked = log.mark(gpa, u64::from(written(i)));
            (!marked).then_some(Broken::Log(gpa))
        };
        if let Some(why) = plains.iter().enumerate().find_map(mark) {
            self.gate.set_broken(why);
        }
    }

    /// Adds what was just taken to what is open; returns its number.
    fn push(&mut self, taken: Taken, written: bool) -> u64 {
        self.open.push_back(Open {
            taken,
            end: self.next,
            written,
        });
        self.first + self.open.len() as u64 - 1
    }

    /// What was sent without a claim has its place behind the claims that are out.
    fn close_unflushed(&mut self) {
        let taken = std::mem::take(&mut self.unflushed);
        if taken.chains > 0 {
            self.push(taken, true);
        }
    }

    /// Shows the guest what is written, up to the first claim that is out.
    fn show_written(&mut self) {
        let mut all = Taken::default();
        let mut end = self.next;
        while let Some(o) = self.open.front().filter(|o| o.written) {
            all.chains += o.taken.chains;
            all.frames += o.taken.frames;
            end = o.end;
            self.first += 1;
            self.open.pop_front();
        }
        self.show(all, end);
    }

    /// Shows the guest the first of what was taken, which ends there.
    #[inline]
    fn show(&mut self, taken: Taken, end: Pos) {
        if taken.chains > 0 {
            match show(&mut self.ring, &mut self.position, taken.chains) {
                Ok(_) => self.owes = true,
                Err(why) => self.set_broken(why),
            }
            self.shown += taken.chains as u64;
            self.gate.set_next(end.0);
            self.gate.count(taken.frames);
        }
        self.leave();
    }
}

/// Bytes of a header and a frame.
#[inline]
fn room(hdr_len: u8, frame: &Frame<'_>) -> u32 {
    u32::from(hdr_len) + frame.len
}

impl<R: Ring> TxQueue for Tx<R> {
    fn send_run(&mut self, frames: &[Frame<'_>]) -> usize {
        if self.gate.is_broken() || !self.enter() {
            return 0;
        }
        let n = self.fitting(frames);
        let hdr_len = self.features.hdr_len;
        let (frames, plains) = (&frames[..n], &self.plains.waiting()[..n]);
        // SAFETY: the buffers are writable for header and frame, as was just checked; nothing is asked for.
        unsafe { self.cpu.write_run(frames, plains, hdr_len) };
        if n > 0 {
            self.mark_run(plains, |i| room(hdr_len, &frames[i]));
            self.take_plain(n, frames);
            self.unflushed.chains += n;
            self.unflushed.frames += n as u64;
            if self.plains.waiting().len() < BURST {
                self.look_ahead(BURST);
            }
        }
        self.leave();
        n
    }

    fn send(&mut self, frame: &Frame<'_>) -> Sent {
        if self.gate.is_broken() {
            return Sent::Never(NeverReason::RingBroken);
        }
        if !self.enter() {
            return match self.gate.is_broken() {
                true => Sent::Never(NeverReason::RingBroken),
                false => Sent::Down,
            };
        }
        let Some(mut own) = self.own.take() else {
            return self.not_sent(Not::Full);
        };
        let sent = self.place_and_write(frame, &mut own);
        let sent = match sent {
            Ok(taken) => {
                self.mark(&own.places);
                if self.gate.is_broken() {
                    self.leave();
                    self.own = Some(own);
                    return Sent::Never(NeverReason::RingBroken);
                }
                self.unflushed.chains += taken.chains;
                self.unflushed.frames += taken.frames;
                Sent::Yes
            }
            Err(not) => self.not_sent(not),
        };
        self.own = Some(own);
        sent
    }

    fn flush(&mut self) {
        if self.unflushed.chains == 0 {
            return;
        }
        if self.open.is_empty() {
            let taken = std::mem::take(&mut self.unflushed);
            return self.show(taken, self.next);
        }
        self.close_unflushed();
        self.show_written();
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.owes) && self.ring.wants_signal() && !self.gate.call() {
            self.set_broken(Broken::Call);
        }
    }

    fn mark(&mut self) -> Option<Mark> {
        Some(Mark {
            at: self.next.0,
            count: self.taken(),
            tells: self.ring.tells(),
        })
    }

    fn has_read(&mut self, mark: &Mark) -> bool {
        // What the driver puts into the ring again it has read: a lap behind the mark nothing of before is left.
        let lap = self.ring.slots() as u64;
        if self.gate.is_broken() || self.taken().saturating_sub(mark.count) >= lap {
            return true;
        }
        // While it is stopped it reads nothing.
        if !self.enter() {
            return false;
        }
        let has = self.ring.has_read(Pos(mark.at));
        self.leave();
        has
    }

    fn shared(&mut self) -> Option<&mut dyn SharedTx> {
        Some(self)
    }
}

impl<R: Ring> SharedTx for Tx<R> {
    fn takes(&self) -> Offloads {
        self.features.guest
    }

    fn take_run(&mut self, frames: &[Frame<'_>], places: &mut Places) -> usize {
        if self.enter_claim().is_err() {
            return 0;
        }
        // No further than is needed: the lines behind are another worker's to write.
        let n = self.fitting(frames);
        if n > 0 {
            self.close_unflushed();
            let hdr_len = self.features.hdr_len;
            let frames = &frames[..n];
            places.hdr_len = hdr_len;
            places
                .plains
                .extend(self.plains.waiting()[..n].iter().copied());
            places
                .written
                .extend(frames.iter().map(|f| room(hdr_len, f)));
            self.take_plain(n, frames);
            let taken = Taken {
                chains: n,
                frames: n as u64,
            };
            places.number = self.push(taken, false);
        }
        self.leave();
        n
    }

    fn take(&mut self, places: &mut Places) -> Result<(), Sent> {
        self.enter_claim()?;
        self.close_unflushed();
        match self.place(places) {
            Ok(taken) => {
                places.number = self.push(taken, false);
                Ok(())
            }
            Err(not) => {
                let not = self.not_sent(not);
                self.show_written();
                Err(not)
            }
        }
    }

    fn give_back(&mut self, places: &Places) -> bool {
        self.mark(places);
        let at = places.number.wrapping_sub(self.first) as usize;
        if let Some(o) = self.open.get_mut(at) {
            o.written = true;
        }
        self.show_written();
        !self.is_out(places.number)
    }

    fn is_out(&self, number: u64) -> bool {
        (number.wrapping_sub(self.first) as usize) < self.open.len()
    }

    fn last_out(&self) -> Option<u64> {
        (self.first + self.open.len() as u64)
            .checked_sub(1)
            .filter(|_| !self.open.is_empty())
    }

    fn close(&mut self) -> bool {
        self.closing = true;
        self.open.is_empty()
    }
}

impl<R: Ring> Drop for Tx<R> {
    fn drop(&mut self) {
        self.flush();
        if self.owes {
            fence(Ordering::SeqCst);
            self.settle();
        }
    }
}
