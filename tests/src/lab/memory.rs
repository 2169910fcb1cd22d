//! Whether a VM's memory at its target is what it is at its source, while both processors stand still.
//!
//! Traffic alone does not tell: with all of a switch's dirty marks suppressed, eight moves lost nothing that anyone noticed.
//! Both QEMUs have their memory in a memfd that can be read through `/proc`.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::qemu::{self, Files};

const PAGE: usize = 4096;
const CHUNK: usize = 256 * PAGE;

/// A page that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// Its number in the guest's memory.
    pub page: u64,
    /// The offsets of the first and the last byte that differ.
    pub range: (usize, usize),
    /// How many do.
    pub bytes: usize,
    /// What stands at the source and at the target in the lines of 16 bytes that differ, the first of them.
    pub lines: Vec<String>,
}

/// Lines of a page that are shown.
const LINES: usize = 24;

fn lines(a: &[u8], b: &[u8]) -> Vec<String> {
    let hex = |l: &[u8]| l.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let pairs = a.chunks(16).zip(b.chunks(16)).enumerate();
    pairs
        .filter(|(_, (a, b))| a != b)
        .take(LINES)
        .map(|(i, (a, b))| format!("{:03x}: {} {}", 16 * i, hex(a), hex(b)))
        .collect()
}

/// The memory of the QEMU whose lab monitor is at `files`.
pub fn of(files: &Files) -> Result<File> {
    let pid = qemu::process_at(files)
        .with_context(|| format!("no QEMU has a monitor at {}", files.lab_qmp.display()))?;
    let memory = memfd(PathBuf::from(format!("/proc/{pid}/fd")))?;
    memory.with_context(|| format!("no memfd in process {pid}"))
}

/// The largest memfd among a process's descriptors.
fn memfd(folder: PathBuf) -> Result<Option<File>> {
    let mut largest: Option<(u64, File)> = None;
    let shown = folder.display().to_string();
    for fd in std::fs::read_dir(folder).context(shown)?.flatten() {
        let is_memfd = std::fs::read_link(fd.path())
            .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
        if !is_memfd {
            continue;
        }
        let file = File::open(fd.path()).with_context(|| fd.path().display().to_string())?;
        let len = file.metadata()?.len();
        if largest.as_ref().is_none_or(|(most, _)| len > *most) {
            largest = Some((len, file));
        }
    }
    Ok(largest.map(|(_, file)| file))
}

/// The pages that differ.
pub fn compare(source: &File, target: &File) -> Result<Vec<Stale>> {
    let len = source.metadata()?.len();
    if target.metadata()?.len() != len {
        bail!("the memories differ in length");
    }
    let (mut stale, mut ours, mut theirs) = (Vec::new(), vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < len {
        let count = CHUNK.min(usize::try_from(len - at)?);
        let (ours, theirs) = (&mut ours[..count], &mut theirs[..count]);
        source.read_exact_at(ours, at)?;
        target.read_exact_at(theirs, at)?;
        if ours != theirs {
            let pages = ours.chunks(PAGE).zip(theirs.chunks(PAGE));
            for (page, (a, b)) in (at / PAGE as u64..).zip(pages) {
                let mut differs = a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b);
                if let Some((first, _)) = differs.next() {
                    let rest: Vec<usize> = differs.map(|(i, _)| i).collect();
                    let range = (first, rest.last().copied().unwrap_or(first));
                    let bytes = 1 + rest.len();
                    let lines = lines(a, b);
                    stale.push(Stale {
                        page,
                        range,
                        bytes,
                        lines,
                    });
                }
            }
        }
        at += count as u64;
    }
    Ok(stale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_differs_makes_a_page_stale() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut bytes = vec![7; CHUNK + 2 * PAGE];
        a.write_all_at(&bytes, 0).unwrap();
        bytes[CHUNK + PAGE + 3] = 8;
        bytes[CHUNK + PAGE + 9] = 8;
        b.write_all_at(&bytes, 0).unwrap();
        let stale = Stale {
            page: 257,
            range: (3, 9),
            bytes: 2,
            lines: vec![format!(
                "000: {} {}",
                "07".repeat(16),
                "07070708070707070708".to_string() + &"07".repeat(6),
            )],
        };
        assert_eq!(compare(&a, &b).unwrap(), [stale]);
        assert_eq!(compare(&a, &a).unwrap(), []);
        b.set_len(PAGE as u64).unwrap();
        assert!(compare(&a, &b).is_err());
    }
}
