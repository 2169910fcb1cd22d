//! The words of `queue.meta` that change in place (docs/formats/spool.md, "Metadata"): each says by itself whether it is
//! what was written, and is there twice, in two sectors.
//!
//! Invariant: no system call, and a word is one aligned 8-byte store: a death at any instruction leaves each copy as it was
//! before or after. Of two that check the greater one is the newer: no word ever goes back.
//! Invariant: a flipped bit of a word is a word that does not check; of up to three in a copy none makes another value.

use std::fmt;
use std::sync::atomic::Ordering;

use super::header::FILE_HEADER;
use super::map::Page;
use super::sum::crc32c;

/// Bits of a value; the check is above them.
const VALUE_BITS: u32 = 48;
/// The greatest value of a word.
pub const VALUE_MAX: u64 = (1 << VALUE_BITS) - 1;
/// Where the first words of the two copies are, in words behind the header: bytes 256 and 1024.
const COPIES: [usize; 2] = [0, 96];

/// Which word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The last committed sequence number.
    Committed,
    /// The last one that was delivered.
    Flushed,
    /// Bit 0: the lane is between two VMs of the group. Bits 1 to 3: which words were lost once.
    Flags,
}

impl Word {
    /// In the order of the file.
    pub const ALL: [Word; 3] = [Word::Committed, Word::Flushed, Word::Flags];

    /// In [`Word::Flags`], for as long as the queue is there: both copies of this word were damaged, and it was made anew.
    pub(super) const fn lost_flag(self) -> u64 {
        2 << self as u64
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Word::Committed => "committed",
            Word::Flushed => "flushed",
            Word::Flags => "flags",
        })
    }
}

/// The 16 bits above a value: the halves of the CRC-32C of value, salt and number of the word, one XOR the other.
fn check(word: Word, value: u64, salt: u32) -> u64 {
    let mut b = [0; 16];
    b[..8].copy_from_slice(&value.to_le_bytes());
    b[8..12].copy_from_slice(&salt.to_le_bytes());
    b[12] = word as u8;
    let crc = crc32c(&b);
    u64::from((crc >> 16) ^ (crc & 0xffff))
}

/// As it is stored. Values have at most 48 bits.
pub fn seal(word: Word, value: u64, salt: u32) -> u64 {
    let value = value.min(VALUE_MAX);
    value | check(word, value, salt) << VALUE_BITS
}

/// The inverse of [`seal`]; none if it is not what was written.
pub fn open(word: Word, stored: u64, salt: u32) -> Option<u64> {
    let value = stored & VALUE_MAX;
    (seal(word, value, salt) == stored).then_some(value)
}

/// What the two copies of a word say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// Both are intact.
    Well(u64),
    /// One is.
    Once(u64),
    /// Neither is.
    Nothing,
}

/// The file, mapped.
#[derive(Debug)]
pub(super) struct Words {
    page: Page,
    salt: u32,
}

impl Words {
    /// What a new file begins with: its header, these flags, and each other word 0.
    pub(super) fn start(header: &[u8; FILE_HEADER], flags: u64, salt: u32) -> Vec<u8> {
        let value = |w| if w == Word::Flags { flags } else { 0 };
        let words = || {
            Word::ALL
                .map(|w| seal(w, value(w), salt).to_le_bytes())
                .concat()
        };
        let mut b = header.to_vec();
        for copy in COPIES {
            b.resize(FILE_HEADER + copy * 8, 0);
            b.extend(words());
        }
        b
    }

    pub(super) fn new(page: Page, salt: u32) -> Words {
        Words { page, salt }
    }

    /// Both copies, one after the other.
    pub(super) fn put(&self, word: Word, value: u64) {
        let stored = seal(word, value, self.salt);
        for copy in COPIES {
            self.page
                .word(copy + word as usize)
                .store(stored, Ordering::Release);
        }
    }

    /// What is there; a value above `most` can't have been written.
    pub(super) fn get(&self, word: Word, most: u64) -> Said {
        let read = |copy| {
            let stored = self.page.word(copy + word as usize).load(Ordering::Acquire);
            open(word, stored, self.salt).filter(|v| *v <= most)
        };
        match COPIES.map(read) {
            [Some(a), Some(b)] => Said::Well(a.max(b)),
            [Some(a), None] | [None, Some(a)] => Said::Once(a),
            [None, None] => Said::Nothing,
        }
    }

    /// Forces it to the disk.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        self.page.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check is linear but for a constant: what one value shows of errors holds for all.
    #[test]
    fn up_to_three_flipped_bits_never_make_another_word() {
        for word in Word::ALL {
            let stored = seal(word, 0x1234_5678_9abc, 7);
            assert_eq!(open(word, stored, 7), Some(0x1234_5678_9abc));
            for a in 0..64 {
                for b in 0..64 {
                    for c in 0..64 {
                        let flipped = stored ^ (1 << a) ^ (1 << b) ^ (1 << c);
                        if flipped != stored {
                            assert_eq!(open(word, flipped, 7), None, "{word}: {a} {b} {c}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_word_is_of_its_queue_and_of_its_place() {
        let stored = seal(Word::Committed, 9, 7);
        assert_eq!(open(Word::Flushed, stored, 7), None);
        assert_eq!(open(Word::Committed, stored, 8), None);
        for value in [0, 1, VALUE_MAX] {
            assert_eq!(
                open(Word::Flags, seal(Word::Flags, value, 3), 3),
                Some(value)
            );
        }
    }
}
