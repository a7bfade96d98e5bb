//! Which of N machines that share a backing file system moves which file. Decides only.
//!
//! The share goes by the number of the inode: a listing of the directory has it, so that a machine touches none but its own
//! files; a rename does not change it, so that no file slips from one share to another; and the names of a hard link have
//! the same. Every machine must see the same numbers, as those of NFS and CephFS do. A scan proves that: it counts the
//! files of all shares and adds up their numbers, and machines that saw other numbers come to other sums.

use crate::backing::{Backing, DirEntry};
use crate::store::walk::Dir;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Most shards of a run.
pub const SHARDS_MAX: u32 = 1024;

/// The K-th of N shards, 1 ≤ K ≤ N ≤ [`SHARDS_MAX`]. Written `K/N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    of: NonZeroU32,
    number: NonZeroU32,
}

/// Spreads inode numbers, which come in rows, over all 64-bit numbers: the finalizer of SplitMix64 (Steele, Lea and Flood,
/// "Fast splittable pseudorandom number generators", 2014). Part of the format of shards: all machines must agree on it.
fn spread(ino: u64) -> u64 {
    let mut h = ino.wrapping_add(0x9e37_79b9_7f4a_7c15);
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

impl Shard {
    /// The `number`-th of `of` shards; `None` if there is none.
    pub fn new(number: u32, of: u32) -> Option<Self> {
        let s = Self { of: NonZeroU32::new(of)?, number: NonZeroU32::new(number)? };
        (s.number <= s.of && of <= SHARDS_MAX).then_some(s)
    }

    /// Which one it is, from 1.
    pub fn number(self) -> u32 {
        self.number.get()
    }

    /// How many there are.
    pub fn of(self) -> u32 {
        self.of.get()
    }

    /// All shards of the run that this one is of.
    pub fn all(self) -> impl Iterator<Item = Self> {
        (1..=self.of()).filter_map(move |n| Self::new(n, self.of()))
    }

    /// Name of the file in `.envelopefs/rotation/` that holds `what` of this shard: `shard-K-of-N.what`.
    pub fn file_name(self, what: &str) -> String {
        format!("shard-{}-of-{}.{what}", self.number, self.of)
    }

    /// The shard whose `what` has this name, if it is one's.
    pub fn of_file(name: &[u8], what: &str) -> Option<Self> {
        let text = std::str::from_utf8(name).ok()?.strip_prefix("shard-")?.strip_suffix(what)?.strip_suffix('.')?;
        text.replacen("-of-", "/", 1).parse().ok()
    }

    /// Whether this shard deals with the inode `ino`. Of all shards of a run, exactly one does.
    pub fn owns(self, ino: u64) -> bool {
        // The upper half of the product is even over 0..of, without a division.
        let slot = (u128::from(spread(ino)) * u128::from(self.of())) >> 64;
        slot == u128::from(self.number() - 1)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let number = |t: &str| t.bytes().all(|b| b.is_ascii_digit()).then(|| t.parse().ok()).flatten();
        s.split_once('/')
            .and_then(|(k, n)| Self::new(number(k)?, number(n)?))
            .ok_or_else(|| format!("not K/N with 1 <= K <= N <= {SHARDS_MAX}, such as 2/3"))
    }
}

impl TryFrom<String> for Shard {
    type Error = String;

    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<Shard> for String {
    fn from(s: Shard) -> Self {
        s.to_string()
    }
}

/// What a shard's last scan saw, for whoever puts the shards together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareSeen {
    /// The shard.
    pub shard: Shard,
    /// When its scan began and ended, in seconds since the epoch.
    pub began: u64,
    /// See `began`.
    pub ended: u64,
    /// Names of files in all directories, whosever share.
    pub listed: u64,
    /// Those of this shard's share.
    pub own: u64,
    /// The sum of the spread numbers of the inodes of all names listed, 16 hexadecimal digits.
    pub inodes: String,
}

/// A shard in one pass, with what it has seen.
#[derive(Debug)]
pub(super) struct Share {
    shard: Shard,
    listed: AtomicU64,
    own: AtomicU64,
    sum: AtomicU64,
}

impl Share {
    pub(super) fn new(shard: Shard) -> Self {
        Self { shard, listed: AtomicU64::new(0), own: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }

    /// Before a scan.
    pub(super) fn count_anew(&self) {
        [&self.listed, &self.own, &self.sum].into_iter().for_each(|n| n.store(0, Relaxed));
    }

    /// Whether the entry is for this shard to look at. Asks the file system only where a listing does not number inodes. An
    /// inode that cannot even be asked about is for all shards, so that it fails in each.
    pub(super) fn takes<B: Backing>(&self, backing: &B, dir: &Dir<B>, entry: &DirEntry) -> bool {
        let ino = match entry.ino {
            0 => match backing.stat_at(&dir.node, &entry.name) {
                Ok(s) => s.ino,
                Err(_) => return true,
            },
            ino => ino,
        };
        self.listed.fetch_add(1, Relaxed);
        self.sum.fetch_add(spread(ino), Relaxed);
        let own = self.shard.owns(ino);
        self.own.fetch_add(u64::from(own), Relaxed);
        own
    }

    /// What was seen since [`Share::count_anew`].
    pub(super) fn seen(&self, began: u64, ended: u64) -> ShareSeen {
        ShareSeen {
            shard: self.shard,
            began,
            ended,
            listed: self.listed.load(Relaxed),
            own: self.own.load(Relaxed),
            inodes: format!("{:016x}", self.sum.load(Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn is_written_as_two_numbers_and_nothing_else() {
        let s: Shard = "2/3".parse().unwrap();
        assert_eq!((s.number(), s.of(), s.to_string().as_str()), (2, 3, "2/3"));
        assert_eq!(serde_json::to_string(&s).unwrap(), "\"2/3\"");
        assert_eq!(serde_json::from_str::<Shard>("\"2/3\"").unwrap(), s);
        assert_eq!(s.all().map(|s| s.to_string()).collect::<Vec<_>>(), ["1/3", "2/3", "3/3"]);
        for bad in ["", "2", "0/3", "4/3", "1/0", "+1/3", "1/ 3", "1/3/3", "-1/3", "1/1025", "1/99999999999", "a/b"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
            assert!(serde_json::from_str::<Shard>(&format!("{bad:?}")).is_err(), "{bad}");
        }
    }

    /// Other machines may run another version: this never changes.
    #[test]
    fn the_share_of_an_inode_is_fixed() {
        // SplitMix64 from the seed 0 gives these first numbers (its authors' published test values).
        assert_eq!(spread(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(spread(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
        let owner = |ino| Shard::new(1, 16).unwrap().all().find(|s| s.owns(ino)).unwrap().number();
        assert_eq!([0, 1, 2, 3, 12, u64::MAX].map(owner), [15, 10, 10, 2, 10, 15]);
    }

    proptest! {
        #[test]
        fn every_inode_is_in_exactly_one_share(ino: u64, of in 1..=SHARDS_MAX) {
            prop_assert_eq!(Shard::new(1, of).unwrap().all().filter(|s| s.owns(ino)).count(), 1);
        }
    }

    #[test]
    fn rows_of_inodes_are_shared_out_evenly() {
        for of in [2, 3, 4, 7, 16, 64] {
            // As file systems number them: in a row, every second one, every sixteenth, high ones.
            for (first, step) in [(1, 1), (12, 2), (1 << 20, 16), (1 << 40, 1)] {
                let n = 64_000u64;
                let mut got = vec![0u64; of as usize];
                for s in Shard::new(1, of).unwrap().all() {
                    let own = (0..n).filter(|i| s.owns(first + i * step)).count() as u64;
                    got[s.number() as usize - 1] = own;
                }
                assert_eq!(got.iter().sum::<u64>(), n);
                // Six standard deviations of a fair draw.
                let mean = n as f64 / f64::from(of);
                for g in got {
                    assert!((g as f64 - mean).abs() < 6.0 * mean.sqrt(), "{of} shards, from {first} by {step}: {g}");
                }
            }
        }
    }
}
