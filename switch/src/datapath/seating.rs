//! Which worker serves which receive queue, and in whose hands lanes are.
//!
//! Queues are spread evenly: those of a port, so that a guest with several has several workers, and all together. A port
//! that goes leaves an uneven rest, which [`Seating::moves`] evens out. While a hold is open nothing moves and a port gets no
//! worker that it did not have: the lanes that the hold has cut are all there are.
//!
//! Workers are numbered from 0. When there shall be fewer, the last ones leave: they get no queue any more, and what they have
//! moves first ([`Seating::resize`], [`Seating::dismiss`]).
//!
//! Pure: the engine carries out what it says.

use std::collections::BTreeMap;

use super::worker::QueueId;

/// See the module.
#[derive(Debug)]
pub struct Seating {
    owners: BTreeMap<QueueId, usize>,
    /// Queues of each worker, of those that leave, too.
    load: Vec<usize>,
    /// Workers that stay.
    count: usize,
    pins: usize,
    /// Of each port, the workers that have its lanes, as long as something is pinned.
    pinned: Vec<Vec<usize>>,
    /// Who served the queues that have left since: what they have sent waits in that worker's lanes.
    last: BTreeMap<QueueId, usize>,
    /// Ports whose seats are those of an earlier run.
    restored: Vec<usize>,
    /// What came in there in an earlier run waits in this worker's lanes.
    before: BTreeMap<QueueId, usize>,
}

impl Seating {
    /// Nothing is there yet.
    pub fn new(workers: usize) -> Seating {
        Seating {
            owners: BTreeMap::new(),
            load: vec![0; workers.max(1)],
            count: workers.max(1),
            pins: 0,
            pinned: Vec::new(),
            last: BTreeMap::new(),
            restored: Vec::new(),
            before: BTreeMap::new(),
        }
    }

    /// The queue goes to this worker when it comes for the first time, if nothing pinned says otherwise: what came in there before waits
    /// in that one's lanes.
    pub fn begin_at(&mut self, id: QueueId, worker: usize) {
        self.before.insert(id, worker);
    }

    /// So many workers shall there be. More of them have come; or the last ones leave, until [`Seating::dismiss`] or until
    /// this is said of all of them again.
    pub fn resize(&mut self, workers: usize) {
        self.count = workers.max(1);
        if self.count > self.load.len() {
            self.load.resize(self.count, 0);
        }
    }

    /// Those that leave are gone, if they have no queue and nothing is pinned.
    #[must_use]
    pub fn dismiss(&mut self) -> bool {
        let free = self.pins == 0 && self.load.iter().skip(self.count).all(|n| *n == 0);
        if free {
            self.load.truncate(self.count);
        }
        free
    }

    /// A hold is open.
    pub fn is_pinned(&self) -> bool {
        self.pins > 0
    }

    /// Queues that workers have which leave.
    pub fn to_leave(&self) -> impl Iterator<Item = (QueueId, usize)> {
        let all = self.owners.iter().map(|(id, w)| (*id, *w));
        all.filter(|(_, w)| *w >= self.count)
    }

    /// All queues of a worker.
    pub fn of(&self, worker: usize) -> Vec<QueueId> {
        let all = self.owners.iter().filter(|(_, w)| **w == worker);
        all.map(|(id, _)| *id).collect()
    }

    /// Who serves a queue.
    pub fn owner(&self, id: QueueId) -> Option<usize> {
        self.owners.get(&id).copied()
    }

    /// Who serves the queues of a port.
    pub fn served(&self, port: usize) -> Vec<(u16, usize)> {
        let mine = self.owners.iter().filter(|(id, _)| id.port == port);
        mine.map(|(id, w)| (id.queue, *w)).collect()
    }

    /// Queues that a worker has of a port.
    fn share(&self, port: usize, worker: usize) -> usize {
        let mine = self.owners.iter();
        mine.filter(|(id, w)| id.port == port && **w == worker)
            .count()
    }

    /// Finds a worker for a queue: the one that it has, or the one with fewest of its port, and of those with least to do.
    pub fn place(&mut self, id: QueueId) -> usize {
        if let Some(owner) = self.owner(id) {
            return owner;
        }
        let n = self.count;
        let all: Vec<usize> = match self.pins {
            0 => (0..n).collect(),
            _ => self.seats(id.port),
        };
        let before = self.before.remove(&id).filter(|w| all.contains(w));
        // Of equals the one whose turn it would be if all had the same number of queues.
        let turn = id.port + usize::from(id.queue);
        let order = |w: &usize| {
            let turn = (*w % n + n - turn % n) % n;
            (self.share(id.port, *w), self.load[*w], turn)
        };
        let last = self.last.get(&id).copied().or(before);
        let to = last
            .or_else(|| all.into_iter().min_by_key(order))
            .unwrap_or(0);
        self.owners.insert(id, to);
        self.load[to] += 1;
        to
    }

    /// The queue is gone.
    pub fn leave(&mut self, id: QueueId) -> Option<usize> {
        let owner = self.owners.remove(&id)?;
        self.load[owner] -= 1;
        if self.pins > 0 {
            self.last.insert(id, owner);
        }
        Some(owner)
    }

    /// The workers that have lanes of a port, in order; at least one.
    pub fn seats(&self, port: usize) -> Vec<usize> {
        if let Some(pinned) = self.pinned.get(port) {
            return pinned.clone();
        }
        let mine = self.owners.iter().filter(|(id, _)| id.port == port);
        let mut all: Vec<usize> = mine.map(|(_, w)| *w).collect();
        all.sort_unstable();
        all.dedup();
        if all.is_empty() {
            all.push(port % self.count);
        }
        all
    }

    /// From now on nothing moves.
    pub fn pin(&mut self, ports: usize) {
        if self.pins == 0 {
            self.pinned = (0..ports).map(|p| self.seats(p)).collect();
        }
        self.pins += 1;
    }

    /// While something is pinned: these workers had a port's lanes in an earlier run of the switch, and served its queues. They
    /// have them again; workers that there are not do not count.
    pub fn seat_again(&mut self, port: usize, workers: &[usize], queues: &[(u16, usize)]) {
        let there = self.load.len();
        let Some(seats) = self.pinned.get_mut(port) else {
            return;
        };
        let all = workers.iter().copied().filter(|w| *w < there);
        if !self.restored.contains(&port) {
            self.restored.push(port);
            let all: Vec<usize> = all.clone().collect();
            if !all.is_empty() {
                *seats = all;
            }
        }
        for w in all {
            if !seats.contains(&w) {
                seats.push(w);
            }
        }
        for (queue, w) in queues.iter().filter(|(_, w)| *w < there) {
            let id = QueueId {
                port,
                queue: *queue,
            };
            self.last.entry(id).or_insert(*w);
        }
    }

    /// Takes one [`Seating::pin`] back.
    pub fn unpin(&mut self) {
        self.pins = self.pins.saturating_sub(1);
        if self.pins == 0 {
            self.pinned.clear();
            self.last.clear();
            self.restored.clear();
        }
    }

    /// Moves away from workers that leave, then such that would even out a port's queues or the load, (queue, from, to), best
    /// first; none if both are even, or pinned.
    ///
    /// Each leaves less to those that leave, or makes the ports more even, or the load and no port less: so they come to an end.
    pub fn moves(&self) -> Vec<(QueueId, usize, usize)> {
        if self.pins > 0 {
            return Vec::new();
        }
        let workers = 0..self.count;
        let least = workers.clone().min_by_key(|w| self.load[*w]).unwrap_or(0);
        let mut all = Vec::new();
        for (id, from) in &self.owners {
            let more = |to: usize| {
                let (here, there) = (self.share(id.port, *from), self.share(id.port, to));
                here.saturating_sub(there)
            };
            let scarce = workers
                .clone()
                .min_by_key(|w| (self.share(id.port, *w), self.load[*w]))
                .unwrap_or(0);
            if *from >= self.count || more(scarce) >= 2 {
                all.push((*id, *from, scarce));
            } else if more(least) >= 1 && self.load[*from] >= self.load[least] + 2 {
                all.push((*id, *from, least));
            }
        }
        all.sort_by_key(|(id, from, to)| {
            let even = self.share(id.port, *from) < self.share(id.port, *to) + 2;
            (
                *from < self.count,
                even,
                std::cmp::Reverse(self.load[*from]),
            )
        });
        all
    }

    /// One of [`Seating::moves`] was carried out.
    pub fn moved(&mut self, id: QueueId, to: usize) {
        self.leave(id);
        self.owners.insert(id, to);
        self.load[to] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Place(usize, u16),
        Leave(usize, u16),
        Pin,
        Unpin,
        Even,
        Resize(usize),
        Dismiss,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            5 => (0usize..5, 0u16..4).prop_map(|(p, q)| Op::Place(p, q)),
            3 => (0usize..5, 0u16..4).prop_map(|(p, q)| Op::Leave(p, q)),
            1 => Just(Op::Pin),
            1 => Just(Op::Unpin),
            1 => Just(Op::Even),
            1 => (1usize..6).prop_map(Op::Resize),
            1 => Just(Op::Dismiss),
        ]
    }

    /// Two guests that start at once: their queues come in turn.
    #[test]
    fn a_guest_with_two_queues_has_two_workers() {
        let mut s = Seating::new(2);
        for (port, queue) in [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)] {
            s.place(QueueId { port, queue });
        }
        assert_eq!((s.seats(1), s.seats(2)), (vec![0, 1], vec![0, 1]));
        assert!(s.moves().is_empty());
    }

    /// A hold that was open when it came gave it one worker.
    #[test]
    fn two_queues_of_one_worker_part_even_if_all_have_as_much_to_do() {
        let mut s = Seating::new(2);
        s.pin(2);
        for (port, queue) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            s.place(QueueId { port, queue });
        }
        assert_eq!((s.seats(0), s.seats(1)), (vec![0], vec![1]));
        s.unpin();
        while let Some((id, _, to)) = s.moves().first().copied() {
            s.moved(id, to);
        }
        assert_eq!((s.seats(0), s.seats(1)), (vec![0, 1], vec![0, 1]));
        assert_eq!(s.load, [2, 2]);
    }

    /// Both come to the one that stays; one that comes back in a hold keeps to the seats that there were.
    #[test]
    fn who_leaves_is_left_by_all_queues() {
        let mut s = Seating::new(2);
        for port in 0..2 {
            s.place(QueueId { port, queue: 0 });
        }
        s.resize(1);
        assert_eq!(s.to_leave().count(), 1);
        assert!(!s.dismiss(), "it has a queue");
        let (id, from, to) = s.moves()[0];
        assert_eq!((from, to), (1, 0));
        s.moved(id, to);
        s.pin(2);
        assert!(!s.dismiss(), "pinned");
        s.unpin();
        assert!(s.dismiss());
        assert_eq!((s.load.clone(), s.seats(1)), (vec![2], vec![0]));
    }

    #[test]
    fn a_hold_of_an_earlier_run_has_its_seats_again() {
        let mut s = Seating::new(3);
        s.pin(2);
        s.seat_again(0, &[2, 1, 7], &[(0, 2), (1, 1), (2, 7)]);
        // Another hold of the same time says the same.
        s.seat_again(0, &[2, 1], &[(0, 2)]);
        let id = |queue| QueueId { port: 0, queue };
        assert_eq!(s.seats(0), [2, 1]);
        assert_eq!(s.seats(1), [1], "as without");
        assert_eq!([s.place(id(1)), s.place(id(0))], [1, 2]);
        assert!([1, 2].contains(&s.place(id(2))), "worker 7 is gone");
        s.unpin();
        s.pin(2);
        assert_eq!(s.seats(1), [1]);
    }

    proptest! {
        #[test]
        fn queues_are_spread_and_a_pinned_port_keeps_to_its_seats(workers in 1usize..5, ops in proptest::collection::vec(op(), 1..120)) {
            let mut s = Seating::new(workers);
            // Those that stay, and all.
            let (mut count, mut workers) = (workers, workers);
            let mut model: BTreeMap<QueueId, usize> = BTreeMap::new();
            let mut pins = 0;
            let mut seats: Vec<Vec<usize>> = Vec::new();
            let mut last: BTreeMap<QueueId, usize> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Place(port, queue) => {
                        let id = QueueId { port, queue };
                        let w = s.place(id);
                        let before = model.insert(id, w);
                        prop_assert!(before.is_none_or(|b| b == w), "one that is there stays");
                        prop_assert!(pins == 0 || seats[port].contains(&w));
                        prop_assert!(pins > 0 || before.is_some() || w < count, "one that leaves gets nothing");
                        prop_assert!(last.get(&id).is_none_or(|l| *l == w), "one that comes back during a hold, too");
                    }
                    Op::Leave(port, queue) => {
                        let id = QueueId { port, queue };
                        let owner = model.remove(&id);
                        prop_assert_eq!(s.leave(id), owner);
                        last.extend(owner.filter(|_| pins > 0).map(|o| (id, o)));
                    }
                    Op::Pin => {
                        s.pin(5);
                        if pins == 0 {
                            seats = (0..5).map(|p| s.seats(p)).collect();
                        }
                        pins += 1;
                    }
                    Op::Unpin if pins > 0 => {
                        s.unpin();
                        pins -= 1;
                        if pins == 0 {
                            last.clear();
                        }
                    }
                    Op::Unpin => {}
                    Op::Resize(_) if pins > 0 => {}
                    Op::Resize(n) => {
                        s.resize(n);
                        count = n;
                        workers = workers.max(n);
                    }
                    Op::Dismiss => {
                        let free = pins == 0 && model.values().all(|w| *w < count);
                        prop_assert_eq!(s.dismiss(), free);
                        if free {
                            workers = count;
                        }
                    }
                    Op::Even => {
                        while let Some((id, from, to)) = s.moves().first().copied() {
                            prop_assert_eq!(pins, 0);
                            prop_assert_eq!(model.insert(id, to), Some(from));
                            s.moved(id, to);
                        }
                        prop_assert!(pins > 0 || s.to_leave().next().is_none());
                        let load = |w| model.values().filter(|m| **m == w).count();
                        let all: Vec<usize> = (0..count).map(load).collect();
                        let even = all.iter().max().unwrap() - all.iter().min().unwrap() <= 1;
                        prop_assert!(even || pins > 0, "{:?}", all);
                        for port in 0..5 {
                            let of = |w| model.iter().filter(|(id, m)| id.port == port && **m == w).count();
                            let all: Vec<usize> = (0..count).map(of).collect();
                            let even = all.iter().max().unwrap() - all.iter().min().unwrap() <= 1;
                            prop_assert!(even || pins > 0, "port {}: {:?}", port, all);
                        }
                    }
                }
                prop_assert!((0..5).all(|p| !s.seats(p).is_empty()));
                if pins > 0 {
                    prop_assert_eq!((0..5).map(|p| s.seats(p)).collect::<Vec<_>>(), seats.clone());
                }
                prop_assert!(model.values().all(|w| *w < workers));
                let mut all: Vec<_> = model.iter().map(|(id, w)| (*w, *id)).collect();
                all.sort_unstable();
                let told: Vec<_> = (0..workers).flat_map(|w| s.of(w).into_iter().map(move |id| (w, id))).collect();
                prop_assert_eq!(told, all);
                for (id, w) in &model {
                    prop_assert_eq!(s.owner(*id), Some(*w));
                    prop_assert!(s.seats(id.port).contains(w));
                }
            }
        }
    }
}
