//! Split rings against a second device, which is not ours: rust-vmm's `virtio-queue`.

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::driver::{INDIRECT_FLAG, NEXT, WRITE};
use super::*;
use crate::port::vhost::ring::{Direction, Pieces, Pos, Ring};

type Chain = (u16, Vec<(u64, u32)>);

/// What the other device finds, chain by chain: `None` for one that breaks the rules.
fn theirs(memory: &Memory, driver: &Driver) -> Vec<Option<Chain>> {
    let region = |gpa: u64, at: u64| {
        let file = FileOffset::from_arc(memory.0.clone(), at);
        (GuestAddress(gpa), REGION as usize, Some(file))
    };
    let mem: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges_with_files([region(0, 0), region(HIGH, REGION)]).unwrap();
    let mut queue = Queue::new(NUM).unwrap();
    let [desc, avail, used] = driver.at.map(GuestAddress);
    queue.try_set_desc_table_address(desc).unwrap();
    queue.try_set_avail_ring_address(avail).unwrap();
    queue.try_set_used_ring_address(used).unwrap();
    queue.set_ready(true);
    assert!(queue.is_valid(&mem));
    let chain = |c: virtio_queue::DescriptorChain<&GuestMemoryMmap>| {
        let head = c.head_index();
        let all: Vec<_> = c.collect();
        let ends = all.last().is_some_and(|d| !d.has_next());
        let fine = all.iter().all(|d| {
            let len = d.len() as usize;
            !d.is_write_only() && (len == 0 || mem.check_range(d.addr(), len, Permissions::Read))
        });
        let all = all.iter().map(|d| (d.addr().raw_value(), d.len()));
        (ends && fine).then(|| (head, all.filter(|(_, len)| *len > 0).collect()))
    };
    queue.iter(&mem).unwrap().map(chain).collect()
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn both_devices_find_the_same_chains_and_refuse_the_same(
        seeds in prop::collection::vec(any::<u64>(), 2 * NUM as usize),
        heads in prop::collection::vec(0..NUM + 2, 1..NUM as usize),
        wild in 0u64..8,
    ) {
        let memory = Memory::new();
        let bits = VERSION_1 | INDIRECT;
        let mut driver = Driver::new(&memory, NUM, 0x1000, 0x10_0000, bits);
        let table = 0x8000;
        for (i, s) in seeds.iter().enumerate() {
            // Mostly right: one in eight or fewer is wrong in each of its ways.
            let odd = |n: u32| s >> n & 7 < wild / 2;
            let addr = if odd(0) { *s } else { 0x10_0000 + (s >> 8 & 0xf_ffff) };
            let len = if odd(3) { (s >> 20) as u32 } else { (s >> 40 & 0x7ff) as u32 };
            let mut flags = (s >> 30) as u16 & NEXT | if odd(6) { WRITE } else { 0 };
            let next = (s >> 34) as u16 % (NUM + u16::from(odd(9)));
            let own = i < usize::from(NUM);
            let (mut addr, mut len) = (addr, len);
            if s >> 50 & 7 == 0 && (own || odd(12)) {
                // virtio-queue does not look at NEXT beside INDIRECT, which is forbidden.
                flags = INDIRECT_FLAG;
                (addr, len) = (table, if odd(15) { len } else { 16 * (1 + (s >> 53) as u32 % 64) });
            }
            let (at, i) = if own { (driver.at[0], i as u16) } else { (table, i as u16 - NUM) };
            driver.desc(at, i, addr, len, flags, next);
        }
        heads.iter().for_each(|h| driver.offer(*h));
        let live = live(&memory, &driver, &event(), None);
        let mut ring = Split::new(&live, NUM, 0, &RingFeatures::new(bits));
        let (mut at, mut region) = (Pos(0), 0);
        for (n, theirs) in theirs(&memory, &driver).into_iter().enumerate() {
            let mut pieces = Pieces::default();
            let ours = ring.peek(at, Direction::Read, &mut pieces);
            let Some((head, buffers)) = theirs else {
                prop_assert!(ours.is_err(), "chain {}: {:?}", n, ours);
                // Ours ends here; the other one goes on with the next.
                at = Pos(at.0.wrapping_add(1));
                continue;
            };
            let (chain, after) = ours.unwrap().expect("it was offered");
            prop_assert_eq!(chain.id, head);
            let mut want = Vec::new();
            for (mut gpa, mut len) in buffers {
                while len > 0 {
                    let host = live.mem.at(&mut region, gpa, len).unwrap();
                    want.push((gpa, host.len));
                    gpa += u64::from(host.len);
                    len -= host.len;
                }
            }
            let got: Vec<_> = pieces.all().iter().map(|p| (p.gpa, p.host.len)).collect();
            prop_assert_eq!(got, want, "chain {}", n);
            at = after;
        }
        prop_assert_eq!(usize::from(at.0), heads.len());
    }
}
