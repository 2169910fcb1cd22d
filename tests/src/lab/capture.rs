//! What a device saw: `tcpdump` on it, and whether every checksum of what it wrote down is right.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::net::Netns;
use super::process::{Process, command_in, until};

/// A capture under way.
pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
}

/// What was in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// TCP segments over IPv4.
    pub tcp: u64,
    /// UDP datagrams over IPv4.
    pub udp: u64,
    /// The longest frame in bytes.
    pub longest: usize,
    /// The first few whose checksums are wrong, and why.
    pub wrong: Vec<String>,
}

impl Capture {
    /// Writes down at most `frames` frames that a device carries and `filter` matches, both ways, whole.
    pub fn start(
        netns: &Netns,
        device: &str,
        filter: &str,
        frames: u32,
        file: &Path,
    ) -> Result<Self> {
        let mut command = command_in(netns, "tcpdump");
        command.args(["-i", device, "-U", "-n", "-B", "32768", "-Z", "root"]);
        command.args(["-c", &frames.to_string(), "-w"]);
        command.arg(file).args(filter.split_whitespace());
        let log = file.with_extension("tcpdump.log");
        let tcpdump = Process::start("tcpdump", command, &log)?;
        until("capture", Duration::from_secs(10), || {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            Ok(said.contains("listening on").then_some(()))
        })?;
        Ok(Self {
            tcpdump,
            file: file.to_owned(),
        })
    }

    /// Ends it and looks at all that it wrote down.
    pub fn stop(self) -> Result<Seen> {
        // What it has seen last lies in its buffer for a moment.
        std::thread::sleep(Duration::from_millis(500));
        drop(self.tcpdump);
        let bytes = std::fs::read(&self.file).with_context(|| self.file.display().to_string())?;
        judge(&bytes)
    }
}

/// Looks at all frames of a file in tcpdump's format (libpcap's classic one, microseconds, this machine's byte order).
fn judge(bytes: &[u8]) -> Result<Seen> {
    let word = |at: usize| {
        let four = bytes.get(at..at + 4)?;
        Some(u32::from_ne_bytes(four.try_into().ok()?) as usize)
    };
    ensure!(word(0) == Some(0xa1b2_c3d4), "not a capture");
    let mut seen = Seen::default();
    let mut at = 24;
    // The last record may be cut.
    while let (Some(kept), Some(length)) = (word(at + 8), word(at + 12)) {
        let Some(frame) = bytes.get(at + 16..at + 16 + kept) else {
            break;
        };
        ensure!(
            kept == length,
            "a frame of {length} bytes was cut to {kept}"
        );
        seen.longest = seen.longest.max(length);
        if let Err(why) = seen.look(frame)
            && seen.wrong.len() < 5
        {
            seen.wrong.push(why);
        }
        at += 16 + kept;
    }
    Ok(seen)
}

impl Seen {
    /// Counts one frame, and says what is wrong with it.
    fn look(&mut self, frame: &[u8]) -> std::result::Result<(), String> {
        let Some([0x08, 0x00]) = frame.get(12..14) else {
            return Ok(());
        };
        let cut = || format!("cut: {} bytes", frame.len());
        let ip = &frame[14..];
        let header = usize::from(ip.first().ok_or_else(cut)? & 15) * 4;
        let total = usize::from(u16::from_be_bytes([
            *ip.get(2).ok_or_else(cut)?,
            *ip.get(3).ok_or_else(cut)?,
        ]));
        let (head, body) = (ip.get(..header), ip.get(header..total));
        let (head, body) = head.zip(body).ok_or_else(cut)?;
        if sum(&[head]) != 0xffff {
            return Err(format!("IP header {head:02x?}"));
        }
        let protocol = head[9];
        match protocol {
            6 => self.tcp += 1,
            17 => self.udp += 1,
            _ => return Ok(()),
        }
        // RFC 768: a sender may leave it out; none here does.
        let pseudo = [
            &head[12..20],
            &[0, protocol],
            &(body.len() as u16).to_be_bytes(),
        ]
        .concat();
        match sum(&[&pseudo, body]) {
            0xffff => Ok(()),
            other => Err(format!(
                "protocol {protocol}, {} bytes: sum {other:#x}, {:02x?}",
                body.len(),
                &frame[..frame.len().min(60)]
            )),
        }
    }
}

/// The folded ones' complement sum of parts, all but the last of even length (RFC 1071).
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let all: u32 = words
        .map(|w| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0)))
        .sum();
    let once = (all & 0xffff) + (all >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP datagram "hi!" from 10.0.0.1:1 to 10.0.0.2:2 with right checksums.
    fn frame() -> Vec<u8> {
        let mut f = vec![0u8; 12];
        f.extend([8, 0]);
        f.extend([
            0x45, 0, 0, 31, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        f.extend([0, 1, 0, 2, 0, 11, 0, 0]);
        f.extend(b"hi!");
        let ip = !sum(&[&f[14..34]]);
        f[24..26].copy_from_slice(&ip.to_be_bytes());
        let pseudo = [10, 0, 0, 1, 10, 0, 0, 2, 0, 17, 0, 11];
        let udp = !sum(&[&pseudo, &f[34..]]);
        f[40..42].copy_from_slice(&udp.to_be_bytes());
        f
    }

    fn file(frame: &[u8]) -> Vec<u8> {
        let mut all = 0xa1b2_c3d4u32.to_ne_bytes().to_vec();
        all.extend([0; 20]);
        all.extend([0; 8]);
        all.extend((frame.len() as u32).to_ne_bytes());
        all.extend((frame.len() as u32).to_ne_bytes());
        all.extend(frame);
        all
    }

    #[test]
    fn any_changed_byte_behind_the_addresses_is_wrong() {
        let good = judge(&file(&frame())).unwrap();
        assert_eq!((good.udp, good.longest), (1, 45));
        assert_eq!(good.wrong, Vec::<String>::new());
        for at in 14..frame().len() {
            let mut bad = frame();
            bad[at] ^= 0x20;
            assert_eq!(judge(&file(&bad)).unwrap().wrong.len(), 1, "byte {at}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        assert!(judge(b"").is_err());
        assert!(judge(&[0; 40]).is_err());
    }
}
