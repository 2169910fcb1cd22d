//! A guest's memory as a vhost-user front-end describes it: regions of mapped files, and the two translations
//! (vhost-user "Memory regions description"): guest physical addresses for buffers, user addresses for rings.
//!
//! Invariant: a table never changes; a front-end that changes its memory gets a new table, which shares the
//! mappings that stay.
//! Invariant: what a translation returns lies within one mapping, which lives as long as any table with it.
//!
//! A front-end that truncates the files under us (QEMU seals its memfds against that; the guest can't) finds its mapping
//! `mem::lost`: zeros, by which no ring goes on.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use super::lost::Watch;

/// Regions of a table at most.
pub const REGIONS_MAX: usize = 64;

/// Why a region can't be part of a table: the front-end's fault, or the kernel refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMemError {
    /// The front-end sent an empty region, or one that wraps around.
    #[error("memory region at guest address {gpa:#x} of {len:#x} bytes is empty or wraps around")]
    Range {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        len: u64,
    },
    /// The front-end's regions overlap.
    #[error("memory regions overlap at guest address {0:#x}")]
    Overlap(u64),
    /// The front-end's file is shorter than the region.
    #[error("memory region's file has {have:#x} bytes, {need:#x} are needed")]
    Short {
        /// The file's size.
        have: u64,
        /// The region's end in the file.
        need: u64,
    },
    /// More than [`REGIONS_MAX`].
    #[error("more than {REGIONS_MAX} memory regions")]
    TooMany,
    /// The kernel did not map it.
    #[error("mapping guest memory: {0}")]
    Map(#[source] std::io::Error),
}

/// A shared mapping of somebody else's file.
#[derive(Debug)]
pub struct Mapping {
    /// Goes before what it watches.
    watch: Watch,
    map: MmapRaw,
    skip: usize,
}

impl Mapping {
    /// `len` bytes from `offset` of `file`.
    ///
    /// Mapped from the file's start: on hugetlbfs an offset must be aligned to the huge page, which region offsets
    /// are not.
    pub fn new(file: &File, offset: u64, len: u64) -> Result<Mapping, GuestMemError> {
        let meta = file.metadata().map_err(GuestMemError::Map)?;
        let need = offset
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(GuestMemError::Range { gpa: 0, len })?;
        if meta.size() < need {
            return Err(GuestMemError::Short {
                have: meta.size(),
                need,
            });
        }
        // munmap on hugetlbfs wants whole huge pages.
        let page = meta.blksize().clamp(4096, 1 << 30).next_power_of_two();
        let whole = need
            .checked_next_multiple_of(page)
            .and_then(|w| usize::try_from(w).ok())
            .ok_or(GuestMemError::Range { gpa: 0, len })?;
        let map = MmapOptions::new()
            .len(whole)
            .map_raw(file)
            .map_err(GuestMemError::Map)?;
        let start = NonNull::new(map.as_mut_ptr()).unwrap_or(NonNull::dangling());
        // SAFETY: a shared mapping of `whole` bytes of the front-end's file, which is copied from and to only, and is
        // unmapped when `watch` was dropped: fields are dropped in their order.
        let watch = unsafe { Watch::new(start, whole, page as usize) };
        Ok(Mapping {
            watch,
            map,
            skip: offset as usize,
        })
    }

    /// The first byte.
    pub fn base(&self) -> NonNull<u8> {
        let base = self.map.as_mut_ptr().wrapping_add(self.skip);
        // mmap never returns null, and `skip` lies within the mapping.
        NonNull::new(base).unwrap_or(NonNull::dangling())
    }

    /// Its file was truncated, and somebody has looked where it was.
    pub fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }
}

/// One region, as the front-end describes it.
#[derive(Debug, Clone)]
pub struct Region {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Its size in bytes.
    pub len: u64,
    /// The front-end's own address of its first byte.
    pub uva: u64,
    /// The file's device and inode, and where in it the region begins.
    place: (u64, u64, u64),
    /// Keeps what `base` points to.
    map: Arc<Mapping>,
    base: NonNull<u8>,
}

// SAFETY: `base` points into the shared mapping that `map` keeps; nothing here dereferences it, and a mapping is the
// same for all threads.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a region.
    pub fn map(
        gpa: u64,
        len: u64,
        uva: u64,
        file: &File,
        offset: u64,
    ) -> Result<Region, GuestMemError> {
        if gpa.checked_add(len).is_none() || uva.checked_add(len).is_none() || len == 0 {
            return Err(GuestMemError::Range { gpa, len });
        }
        let meta = file.metadata().map_err(GuestMemError::Map)?;
        let map = Arc::new(Mapping::new(file, offset, len)?);
        Ok(Region {
            gpa,
            len,
            uva,
            place: (meta.dev(), meta.ino(), offset),
            base: map.base(),
            map,
        })
    }

    /// The same memory at the same addresses.
    fn is(&self, other: &Region) -> bool {
        let of = |r: &Region| (r.gpa, r.len, r.uva, r.place);
        of(self) == of(other)
    }
}

/// Where guest memory lies in ours: `len` bytes from `ptr`, mapped as long as the table lives.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// The first byte.
    pub ptr: NonNull<u8>,
    /// Bytes from there within the region, at most what was asked for.
    pub len: u32,
}

/// The table: few regions, so a scan that starts with the last hit beats anything clever.
#[derive(Debug, Clone, Default)]
pub struct GuestMem {
    regions: Vec<Region>,
}

impl GuestMem {
    /// Of all regions (`SET_MEM_TABLE`).
    pub fn new(regions: Vec<Region>) -> Result<GuestMem, GuestMemError> {
        let mut mem = GuestMem::default();
        for r in regions {
            mem = mem.with(r)?;
        }
        Ok(mem)
    }

    /// This table and one more region (`ADD_MEM_REG`). One that is there changes nothing: QEMU before 8.0 sends each
    /// region once per queue pair.
    pub fn with(&self, region: Region) -> Result<GuestMem, GuestMemError> {
        if self.regions.iter().any(|r| r.is(&region)) {
            return Ok(self.clone());
        }
        if self.regions.len() >= REGIONS_MAX {
            return Err(GuestMemError::TooMany);
        }
        for r in &self.regions {
            if region.gpa < r.gpa + r.len && r.gpa < region.gpa + region.len {
                return Err(GuestMemError::Overlap(region.gpa.max(r.gpa)));
            }
        }
        let mut regions = self.regions.clone();
        regions.push(region);
        Ok(GuestMem { regions })
    }

    /// This table without one region (`REM_MEM_REG`), which may be gone: it is removed once per queue pair, too, and
    /// another one may be in its place by then.
    pub fn without(&self, gpa: u64, len: u64, uva: u64) -> GuestMem {
        let mut regions = self.regions.clone();
        regions.retain(|r| (r.gpa, r.len, r.uva) != (gpa, len, uva));
        GuestMem { regions }
    }

    /// The memory at a guest physical address: `len` bytes of it, or as many as its region still has. `hint` is the
    /// caller's memory of the last hit.
    #[inline]
    pub fn at(&self, hint: &mut usize, gpa: u64, len: u32) -> Option<Host> {
        if let Some(r) = self.regions.get(*hint)
            && let Some(host) = Self::within(r, gpa, len)
        {
            return Some(host);
        }
        for (i, r) in self.regions.iter().enumerate() {
            if let Some(host) = Self::within(r, gpa, len) {
                *hint = i;
                return Some(host);
            }
        }
        None
    }

    /// The same if all of it lies in one region, which is nearly always that of the hint.
    #[inline]
    pub fn whole(&self, hint: &mut usize, gpa: u64, len: u32) -> Option<NonNull<u8>> {
        if let Some(r) = self.regions.get(*hint) {
            let offset = gpa.wrapping_sub(r.gpa);
            if offset < r.len && r.len - offset >= u64::from(len) {
                // SAFETY: `offset < r.len`, so the pointer stays within the region's mapping.
                return Some(unsafe { r.base.add(offset as usize) });
            }
        }
        let host = self.at(hint, gpa, len)?;
        (host.len == len).then_some(host.ptr)
    }

    #[inline]
    fn within(r: &Region, gpa: u64, len: u32) -> Option<Host> {
        let offset = gpa.wrapping_sub(r.gpa);
        if offset >= r.len {
            return None;
        }
        let len = (r.len - offset).min(u64::from(len)) as u32;
        // SAFETY: `offset < r.len`, so the pointer stays within the region's mapping.
        let ptr = unsafe { r.base.add(offset as usize) };
        Some(Host { ptr, len })
    }

    /// All `len` bytes at a front-end's user address, aligned to `align` (rings; virtio 1.2, 2.7). Not for the data path.
    pub fn ring(&self, uva: u64, len: u64, align: usize) -> Option<NonNull<u8>> {
        let r = self
            .regions
            .iter()
            .find(|r| uva.wrapping_sub(r.uva) < r.len)?;
        let offset = uva - r.uva;
        if r.len - offset < len {
            return None;
        }
        // SAFETY: `offset < r.len`, so the pointer stays within the region's mapping.
        let ptr = unsafe { r.base.add(offset as usize) };
        (ptr.as_ptr() as usize).is_multiple_of(align).then_some(ptr)
    }

    /// The guest physical address of a place that [`GuestMem::ring`] gave. Not for every frame.
    pub fn gpa(&self, at: NonNull<u8>) -> Option<u64> {
        let at = at.as_ptr() as u64;
        self.regions.iter().find_map(|r| {
            let offset = at.wrapping_sub(r.base.as_ptr() as u64);
            (offset < r.len).then(|| r.gpa + offset)
        })
    }

    /// The end of the highest region: what a dirty log must cover.
    pub fn end(&self) -> u64 {
        self.regions
            .iter()
            .map(|r| r.gpa + r.len)
            .max()
            .unwrap_or(0)
    }

    /// Some of it is [`super::lost`].
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.map.is_lost())
    }

    /// The regions, in the front-end's order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> File {
        let f = tempfile::tempfile().unwrap();
        f.set_len(len).unwrap();
        f
    }

    fn region(gpa: u64, len: u64, uva: u64) -> Region {
        Region::map(gpa, len, uva, &file(len), 0).unwrap()
    }

    #[test]
    fn translation_ends_with_the_region() {
        let m = GuestMem::new(vec![
            region(0, 0x1000, 0x10000),
            region(0x2000, 0x1000, 0x20000),
        ])
        .unwrap();
        let mut hint = 0;
        assert_eq!(m.at(&mut hint, 0xfff, 10).unwrap().len, 1);
        assert!(m.at(&mut hint, 0x1000, 1).is_none());
        assert_eq!(m.at(&mut hint, 0x2000, 0x1000).unwrap().len, 0x1000);
        assert_eq!(hint, 1);
        assert!(m.at(&mut hint, u64::MAX, 1).is_none());
        assert_eq!(m.end(), 0x3000);
    }

    #[test]
    fn rings_lie_in_one_region_and_are_aligned() {
        let m = GuestMem::new(vec![region(0, 0x1000, 0x10000)]).unwrap();
        assert!(m.ring(0x10000, 0x1000, 16).is_some());
        assert!(m.ring(0x10008, 0x100, 16).is_none());
        assert!(m.ring(0x10010, 0xff1, 16).is_none());
        assert!(m.ring(0xffff, 1, 1).is_none());
    }

    #[test]
    fn bad_regions_are_refused() {
        assert!(Region::map(u64::MAX, 0x1000, 0, &file(0x1000), 0).is_err());
        assert!(Region::map(0, 0x1000, 0, &file(0x800), 0).is_err());
        assert!(Region::map(0, 0x1000, 0, &file(0x1000), 1).is_err());
        assert!(Region::map(0, 0, 0, &file(0x1000), 0).is_err());
        assert!(GuestMem::new(vec![region(0, 0x1000, 0), region(0xfff, 0x1000, 0)]).is_err());
    }

    /// As QEMU 7.2 changes one region into another, for each of two queue pairs.
    #[test]
    fn what_comes_twice_counts_once() {
        let f = file(0x3000);
        let map = |len, offset| Region::map(0, len, 0, &f, offset).unwrap();
        let mut m = GuestMem::default();
        for _ in 0..2 {
            m = m.with(map(0x1000, 0)).unwrap();
        }
        assert_eq!(m.regions().len(), 1);
        // Other memory at the same addresses.
        assert!(m.with(map(0x1000, 0x1000)).is_err());
        assert!(m.with(region(0, 0x1000, 0)).is_err());
        for _ in 0..2 {
            m = m.without(0, 0x1000, 0).with(map(0x2000, 0)).unwrap();
        }
        assert_eq!(m.end(), 0x2000);
        assert_eq!(m.without(0, 0x2000, 1).regions().len(), 1);
        assert!(m.without(0, 0x2000, 0).regions().is_empty());
    }
}
