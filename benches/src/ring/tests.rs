//! The drivers against the plainest device of each layout.

use std::sync::atomic::Ordering::Relaxed;

use super::packed::Packed;
use super::split::Split;
use super::*;

const NUM: u16 = 8;

fn place(device_writes: bool) -> Place {
    Place {
        memory: Arc::new(Memory::new(1 << 16).unwrap()),
        areas: [0, 4096, 8192],
        num: NUM,
        buffers: 16384,
        stride: 128,
        len: 100,
        device_writes,
    }
}

/// A device that takes what is there and gives it back.
trait Device {
    fn new(place: &Place) -> Self;
    /// Address, length, is writable.
    fn take(&mut self) -> Option<(u16, u64, u32, bool)>;
    fn give(&mut self, id: u16, len: u32);
}

struct SplitDevice(Place, u16, u16);

impl Device for SplitDevice {
    fn new(place: &Place) -> Self {
        SplitDevice(place.clone(), 0, 0)
    }
    fn take(&mut self) -> Option<(u16, u64, u32, bool)> {
        let (m, [desc, avail, _]) = (&self.0.memory, self.0.areas);
        if m.u16(avail + 2).load(Relaxed) == self.1 {
            return None;
        }
        let id = m
            .u16(avail + 4 + 2 * usize::from(self.1 % NUM))
            .load(Relaxed);
        self.1 = self.1.wrapping_add(1);
        let at = desc + 16 * usize::from(id);
        let flags = m.u16(at + 12).load(Relaxed);
        Some((
            id,
            m.u64(at).load(Relaxed),
            m.u32(at + 8).load(Relaxed),
            flags & 2 != 0,
        ))
    }
    fn give(&mut self, id: u16, len: u32) {
        let (m, [.., used]) = (&self.0.memory, self.0.areas);
        let at = used + 4 + 8 * usize::from(self.2 % NUM);
        m.u32(at).store(u32::from(id), Relaxed);
        m.u32(at + 4).store(len, Relaxed);
        self.2 = self.2.wrapping_add(1);
        m.u16(used + 2).store(self.2, Relaxed);
    }
}

struct PackedDevice(Place, (u16, bool), (u16, bool));

fn step(at: &mut (u16, bool)) {
    at.0 += 1;
    if at.0 == NUM {
        *at = (0, !at.1);
    }
}

impl Device for PackedDevice {
    fn new(place: &Place) -> Self {
        PackedDevice(place.clone(), (0, true), (0, true))
    }
    fn take(&mut self) -> Option<(u16, u64, u32, bool)> {
        let (m, at) = (&self.0.memory, 16 * usize::from(self.1.0));
        let flags = m.u16(at + 14).load(Relaxed);
        let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
        if avail != self.1.1 || used == self.1.1 {
            return None;
        }
        step(&mut self.1);
        let id = m.u16(at + 12).load(Relaxed);
        Some((
            id,
            m.u64(at).load(Relaxed),
            m.u32(at + 8).load(Relaxed),
            flags & 2 != 0,
        ))
    }
    fn give(&mut self, id: u16, len: u32) {
        let (m, at) = (&self.0.memory, 16 * usize::from(self.2.0));
        m.u32(at + 8).store(len, Relaxed);
        m.u16(at + 12).store(id, Relaxed);
        let flags = if self.2.1 { 1 << 7 | 1 << 15 } else { 0 };
        m.u16(at + 14).store(flags, Relaxed);
        step(&mut self.2);
    }
}

/// Three of the device's buffers at a time go round, in an order of the test's.
fn goes_round<R: Ring, D: Device>(order: [usize; 3]) {
    for device_writes in [false, true] {
        let place = place(device_writes);
        let (mut ring, mut device) = (R::new(place.clone()), D::new(&place));
        assert!(device.take().is_none(), "nothing is published yet");
        ring.publish(NUM);
        let mut had = Vec::new();
        for round in 0..1000u32 {
            while let Some((id, addr, len, writable)) = device.take() {
                assert_eq!(addr, GPA + place.buffer(id) as u64);
                assert_eq!((len, writable), (100, device_writes));
                assert!(!had.contains(&id), "buffer {id} is handed out twice");
                had.push(id);
            }
            assert_eq!(
                had.len(),
                usize::from(NUM),
                "the ring is full in round {round}"
            );
            let three: Vec<u16> = had.drain(..3).collect();
            for i in order {
                assert_eq!(ring.reap(3, |_, _| panic!("too few")), 0);
                device.give(three[i], round + i as u32);
            }
            let mut back = Vec::new();
            assert_eq!(ring.reap(3, |id, len| back.push((id, len))), 3);
            assert_eq!(back, order.map(|i| (three[i], round + i as u32)));
            assert_eq!(ring.outstanding(), NUM - 3);
            ring.publish(3);
        }
    }
}

#[test]
fn a_split_ring_goes_round() {
    goes_round::<Split, SplitDevice>([0, 1, 2]);
}

#[test]
fn a_split_ring_copes_with_a_device_that_changes_the_order() {
    goes_round::<Split, SplitDevice>([2, 0, 1]);
}

#[test]
fn a_packed_ring_goes_round() {
    goes_round::<Packed, PackedDevice>([0, 1, 2]);
}

#[test]
fn a_packed_ring_copes_with_a_device_that_changes_the_order() {
    goes_round::<Packed, PackedDevice>([2, 0, 1]);
}

#[test]
fn a_batch_of_a_packed_ring_whose_first_is_not_shown_yet_is_left_alone() {
    let place = place(true);
    let (mut ring, mut device) = (Packed::new(place.clone()), PackedDevice::new(&place));
    ring.publish(NUM);
    let ids: Vec<u16> = (0..3).map(|_| device.take().unwrap().0).collect();
    device.2 = (1, true);
    device.give(ids[1], 1);
    device.give(ids[2], 1);
    assert_eq!(ring.reap(3, |_, _| ()), 0);
    device.2 = (0, true);
    device.give(ids[0], 1);
    assert_eq!(ring.reap(3, |_, _| ()), 3);
}
