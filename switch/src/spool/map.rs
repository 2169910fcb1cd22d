//! Unsafe island: segment files in memory. One [`Tail`] per segment writes behind what is published, anybody reads what
//! is published, and the two never overlap.
//!
//! Invariant: `published` only grows, and bytes below it are never written again while the segment is shared.
//! Invariant: the file behind a mapping is really allocated before anybody sees it, so a full disk is an error of
//! [`Segment::create`], not a SIGBUS; nobody but this process writes or truncates it (the directory is ours alone, mode
//! 0700). It is faulted in, too, where a worker writes to it ([`Segment::touch`]).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};

/// A mapped segment file.
#[derive(Debug)]
pub(super) struct Segment {
    map: MmapRaw,
    /// Device and inode of its file.
    inode: (u64, u64),
    /// Of its present use: see [`Segment::begin`].
    epoch: u64,
    number: u32,
    published: AtomicU32,
    /// Storing to it takes no page fault, as far as that is up to us.
    faulted: bool,
    /// Where the writer left it for the next one; valid once `next` is in use.
    end: AtomicU32,
    synced: AtomicU32,
    has_tail: AtomicBool,
    /// The segment that the lane goes on in, set by the keeper ahead of time.
    next: OnceLock<Arc<Segment>>,
}

impl Segment {
    /// How far it is on the disk.
    #[cfg(test)]
    pub(super) fn synced(&self) -> u32 {
        self.synced.load(Ordering::Acquire)
    }

    fn map(file: &File, len: u64) -> io::Result<Segment> {
        Ok(Segment {
            map: MmapOptions::new().len(len as usize).map_raw(file)?,
            inode: inode(file)?,
            epoch: 0,
            number: 0,
            published: AtomicU32::new(0),
            faulted: false,
            end: AtomicU32::new(0),
            synced: AtomicU32::new(0),
            has_tail: AtomicBool::new(false),
            next: OnceLock::new(),
        })
    }

    /// Makes a file of `len` zeros, really allocated and mapped, not faulted in. Not of any queue yet.
    pub(super) fn create(path: &Path, len: u64) -> io::Result<Segment> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let made = allocate(&file, len).and_then(|()| Segment::map(&file, len));
        if made.is_err() {
            // Half a file is of no use; the error that matters is `made`.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Maps an existing file of at least one page, unpublished. Its holes, if any, are filled.
    pub(super) fn open(path: &Path) -> io::Result<Segment> {
        let file = File::options().read(true).write(true).open(path)?;
        let len = file.metadata()?.len();
        if !(4096..=1 << 30).contains(&len) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a segment of {len} bytes"),
            ));
        }
        allocate(&file, len)?;
        let mut segment = Segment::map(&file, len)?;
        segment.touch()?;
        Ok(segment)
    }

    /// Makes it empty: nothing published, and no header that says anything of the use before. What else that has left
    /// stays, under its own epoch.
    pub(super) fn reset(&mut self) {
        let header = super::format::FILE_HEADER;
        self.bytes_mut()[..header].fill(0);
        *self.published.get_mut() = 0;
        *self.end.get_mut() = 0;
        *self.synced.get_mut() = 0;
        *self.has_tail.get_mut() = false;
        self.next = OnceLock::new();
    }

    /// From now on it is a queue's segment of this number, and nothing in it counts that was not written with this epoch.
    pub(super) fn begin(&mut self, number: u32, epoch: u64) {
        self.number = number;
        self.epoch = epoch;
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// In its queue.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Forgets the link to the next one.
    pub(super) fn unlink(&mut self) {
        self.next = OnceLock::new();
    }

    /// Makes sure that storing to it takes no page fault that has to wait.
    pub(super) fn touch(&mut self) -> io::Result<()> {
        populate(&self.map)?;
        self.faulted = true;
        Ok(())
    }

    /// It was touched in this process.
    pub(super) fn is_faulted(&self) -> bool {
        self.faulted
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// Its file, for whoever has its [`Tail`]. The path may lead to another one by now: an error.
    pub(super) fn file(&self, path: &Path) -> io::Result<File> {
        let file = File::options().write(true).open(path)?;
        match inode(&file)? == self.inode {
            true => Ok(file),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Everything, for recovery: nobody else has it yet.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is live and `len` long; `&mut self` proves that there is no `Tail` and no reader
        // (both hold an `Arc` of the segment).
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr(), self.map.len()) }
    }

    /// Publishes what recovery found.
    pub(super) fn set_published(&mut self, to: u32) {
        *self.published.get_mut() = to.min(self.map.len() as u32);
        *self.end.get_mut() = to;
    }

    /// How far readers may look.
    pub(super) fn published(&self) -> u32 {
        self.published.load(Ordering::Acquire)
    }

    /// Bytes `from..to`, as far as they are published.
    pub(super) fn read(&self, from: u32, to: u32) -> &[u8] {
        let to = to.min(self.published());
        let from = from.min(to);
        // SAFETY: `to <= published <= len` of the live mapping. Bytes below `published` are never written again
        // (module invariant), and its Acquire load orders us behind the writes.
        unsafe {
            std::slice::from_raw_parts(self.map.as_ptr().add(from as usize), (to - from) as usize)
        }
    }

    /// The one write handle, behind what is published. None if it was given out already.
    pub(super) fn tail(self: &Arc<Self>) -> Option<Tail> {
        if self.has_tail.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(Tail {
            at: self.published(),
            seg: self.clone(),
        })
    }

    /// The next segment of the lane, if it is ready.
    pub(super) fn next(&self) -> Option<&Arc<Segment>> {
        self.next.get()
    }

    /// Links the next one; false if there is one already.
    pub(super) fn set_next(&self, next: Arc<Segment>) -> bool {
        self.next.set(next).is_ok()
    }

    /// Publishes a segment that was left by [`Tail::leave`].
    pub(super) fn publish_left(&self) {
        self.published
            .store(self.end.load(Ordering::Relaxed), Ordering::Release);
    }

    /// Forces what is published below `to` to the disk (`msync(MS_SYNC)`: what fdatasync does, for that range).
    pub(super) fn sync(&self, to: u32) -> io::Result<()> {
        let to = to.min(self.published());
        let from = self.synced.load(Ordering::Acquire);
        if to <= from {
            return Ok(());
        }
        self.map.flush_range(from as usize, (to - from) as usize)?;
        self.synced.fetch_max(to, Ordering::AcqRel);
        Ok(())
    }
}

impl Drop for Segment {
    /// A long chain goes one by one, not by recursion.
    fn drop(&mut self) {
        let mut next = self.next.take();
        while let Some(mut s) = next.and_then(Arc::into_inner) {
            next = s.next.take();
        }
    }
}

/// The write end of a segment: everything from `at` on is its own.
#[derive(Debug)]
pub(super) struct Tail {
    seg: Arc<Segment>,
    at: u32,
}

impl Tail {
    /// Room left.
    pub(super) fn room(&self) -> usize {
        self.seg.len() - self.at as usize
    }

    /// Bytes written so far.
    pub(super) fn at(&self) -> u32 {
        self.at
    }

    pub(super) fn segment(&self) -> &Arc<Segment> {
        &self.seg
    }

    /// The next `len` bytes, to be written and then passed with [`Tail::advance`].
    pub(super) fn buf(&mut self, len: usize) -> Option<&mut [u8]> {
        if len > self.room() {
            return None;
        }
        // SAFETY: `at + len <= len of the mapping` (checked). Only the one `Tail` of a segment writes, through
        // `&mut self`, and readers stay below `published <= at`.
        Some(unsafe {
            std::slice::from_raw_parts_mut(self.seg.map.as_mut_ptr().add(self.at as usize), len)
        })
    }

    /// The same through the segment's file, which may wait for a disk: pages that are new and written whole are not zeroed before.
    pub(super) fn write(&mut self, file: &File, bytes: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        match bytes.len() <= self.room() {
            true => file.write_all_at(bytes, u64::from(self.at)),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Passes `len` bytes that were written.
    pub(super) fn advance(&mut self, len: usize) {
        debug_assert!(len <= self.room());
        self.at += len.min(self.room()) as u32;
    }

    /// Publishes everything passed.
    pub(super) fn publish(&self) {
        self.seg.published.store(self.at, Ordering::Release);
    }

    /// Remembers where this segment ends, for [`Segment::publish_left`], and gives it up.
    pub(super) fn leave(self) -> Arc<Segment> {
        self.seg.end.store(self.at, Ordering::Relaxed);
        self.seg
    }
}

/// A file of a few pages: a header, and words that change in place.
#[derive(Debug)]
pub(crate) struct Page {
    map: MmapRaw,
    words: usize,
}

/// Bytes of a metadata file.
pub(crate) const PAGE: u64 = 4096;
/// Bytes before the first word.
const HEADER: usize = 256;

impl Page {
    /// Creates the file of `len` bytes, with this content at its start. It appears under its name complete or not at all.
    pub(crate) fn create(path: &Path, start: &[u8], len: u64) -> io::Result<Page> {
        use std::os::unix::fs::FileExt;
        let tmp = path.with_extension("new");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&tmp)?;
        allocate(&file, len)?;
        file.write_all_at(start, 0)?;
        std::fs::rename(&tmp, path)?;
        Page::map(&file, len)
    }

    /// Maps an existing one of this length.
    pub(crate) fn open(path: &Path, len: u64) -> io::Result<Page> {
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() != len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not of a metadata file's size",
            ));
        }
        allocate(&file, len)?;
        Page::map(&file, len)
    }

    fn map(file: &File, len: u64) -> io::Result<Page> {
        let map = MmapOptions::new().len(len as usize).map_raw(file)?;
        populate(&map)?;
        let words = (len as usize - HEADER) / size_of::<AtomicU64>();
        Ok(Page { map, words })
    }

    /// The word at byte `256 + 8 * n`.
    pub(crate) fn word(&self, n: usize) -> &AtomicU64 {
        &self.words(n, 1)[0]
    }

    /// `len` of them from there on.
    #[inline]
    pub(crate) fn words(&self, n: usize, len: usize) -> &[AtomicU64] {
        assert!(n <= self.words && len <= self.words - n);
        // SAFETY: inside the mapping (asserted), aligned (a mapping starts at a page), live as long as `self`; only
        // touched as atomics.
        unsafe {
            let first = self.map.as_ptr().add(HEADER).cast::<AtomicU64>().add(n);
            std::slice::from_raw_parts(first, len)
        }
    }

    /// Writes what is before the words anew.
    pub(super) fn repair(path: &Path, header: &[u8; HEADER]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        File::options()
            .write(true)
            .open(path)?
            .write_all_at(header, 0)
    }

    /// Forces it to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.map.flush()
    }
}

/// A file that is memory: a page of words ([`Page`]), and bytes that are really there as far as they were asked for.
#[derive(Debug)]
pub(crate) struct Room {
    page: Page,
    map: MmapRaw,
    file: File,
    there: usize,
}

impl Room {
    /// Creates one for `len` bytes, a multiple of the page size, with this content at its start. It appears under its name complete or
    /// not at all.
    pub(crate) fn create(path: &Path, start: &[u8], len: usize) -> io::Result<Room> {
        drop(Page::create(path, start, PAGE)?);
        let file = File::options().read(true).write(true).open(path)?;
        file.set_len(PAGE + len as u64)?;
        Room::map(file, len)
    }

    /// Maps an existing one, and gives its header.
    pub(crate) fn open(path: &Path, len: usize) -> io::Result<(Room, Vec<u8>)> {
        use std::os::unix::fs::FileExt;
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() != PAGE + len as u64 {
            let what = "not of such a file's size";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let mut header = vec![0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        allocate(&file, PAGE)?;
        Ok((Room::map(file, len)?, header))
    }

    fn map(file: File, len: usize) -> io::Result<Room> {
        let map = MmapOptions::new().offset(PAGE).len(len).map_raw(&file)?;
        Ok(Room {
            page: Page::map(&file, PAGE)?,
            map,
            file,
            there: 0,
        })
    }

    /// The word at byte `256 + 8 * n`.
    pub(crate) fn word(&self, n: usize) -> &AtomicU64 {
        self.page.word(n)
    }

    /// The first `to` bytes are really there from now on, or it is an error and not a SIGBUS.
    pub(crate) fn need(&mut self, to: usize) -> io::Result<()> {
        if to > self.there {
            let (from, len) = (self.there, to.min(self.map.len()) - self.there);
            let from = PAGE + from as u64;
            fallocate(&self.file, FallocateFlags::empty(), from, len as u64)?;
            self.there += len;
        }
        Ok(())
    }

    /// There is no memory from now on.
    #[cfg(test)]
    pub(crate) fn starve(&mut self) {
        self.file = File::open("/dev/null").expect("it is there");
    }

    /// Gives back all that was asked for; it is zeros when it is asked for again. False if there is nothing, or the file system cannot do it.
    pub(crate) fn release(&mut self) -> bool {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let len = self.map.len() as u64;
        // Also what an earlier run asked for.
        let is_done = self.there > 0 && fallocate(&self.file, hole, PAGE, len).is_ok();
        if is_done {
            self.there = 0;
        }
        is_done
    }

    /// Those that are there.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is live, `there <= len`, and its file is not shortened (the directory is ours). Only `&mut self` writes.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), self.there) }
    }

    /// Likewise.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, `there <= len`, and `&mut self` is alone.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr(), self.there) }
    }
}

/// The files of this directory are memory: once faulted in, storing to them never faults again, and waits for no disk.
pub(crate) fn is_memory(dir: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::statfs(dir).is_ok_and(|s| s.f_type == TMPFS_MAGIC)
}

fn inode(file: &File) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    file.metadata().map(|m| (m.dev(), m.ino()))
}

/// Allocates really: reserved blocks, or written zeros where the file system can't reserve.
fn allocate(file: &File, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let old = file.metadata()?.len();
            let zeros = vec![0; 64 << 10];
            let mut at = old;
            while at < len {
                let n = (len - at).min(zeros.len() as u64) as usize;
                file.write_all_at(&zeros[..n], at)?;
                at += n as u64;
            }
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Faults all pages in for writing; unlike a store, this reports a failure as an error.
fn populate(map: &MmapRaw) -> io::Result<()> {
    match map.advise(Advice::PopulateWrite) {
        // Before Linux 5.14 there is no such advice; the zeroing or the first store faults the pages in.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        r => r,
    }
}
