//! The keyring's two copies in the backing directory.
//!
//! Each update writes the same new bytes over both copies, one after the other, the older or damaged one first. Each
//! write is: temporary file, write, sync, read back by a new open and compare, rename over the copy, sync the folder.
//! So at every instant at least one copy is whole, and after an update that returned no copy holds what it removed.

use crate::backing::{self, Access, Backing, Timestamp};
use crate::format::damage::Damage;
use crate::format::keyring::{Decoded, KEYRING_MAX, Keyring};
use crate::store::{Result, StoreError};
use std::io;

/// The store's own folder in the backing directory.
pub const FOLDER: &[u8] = b".envelopefs";
/// The two copies.
pub const COPIES: [&str; 2] = ["keyring.a", "keyring.b"];
const TEMP: &[u8] = b"keyring.new";

/// A copy that cannot be used, and why.
pub type BadCopy = (&'static str, Damage);

/// What lies in the place of one copy.
#[derive(Debug)]
pub enum Found {
    Absent,
    /// The backing directory gave an error for it.
    Unreadable(io::Error),
    Damaged(Damage),
    Valid(Box<Decoded>),
}

impl Found {
    /// Generation of a valid copy. Nothing is known yet of whether it is authentic.
    pub fn generation(&self) -> Option<u64> {
        match self {
            Self::Valid(d) => Some(d.keyring.generation),
            _ => None,
        }
    }
}

/// Whether there is nothing.
pub fn is_absent(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
}

/// The store's folder.
///
/// # Errors
/// [`StoreError::NotAStore`] if there is none.
pub fn folder<B: Backing>(b: &B) -> Result<B::Node> {
    match b.lookup(&b.root()?, FOLDER) {
        Err(e) if is_absent(&e) => Err(StoreError::NotAStore("it has no .envelopefs folder".into())),
        other => Ok(other?),
    }
}

/// Reads both copies. An error with one copy is part of the result: the other may be whole.
pub fn load<B: Backing>(b: &B, folder: &B::Node) -> [Found; 2] {
    COPIES.map(|name| judge(read(b, folder, name.as_bytes())))
}

/// What tells one state of a copy from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    ino: u64,
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
}

/// Of both copies; `None`: it cannot be opened.
pub type Stamps = [Option<Stamp>; 2];

/// Looks at both copies. They are opened for it: over NFS, that is what asks the server.
pub fn stamps<B: Backing>(b: &B, folder: &B::Node) -> Stamps {
    COPIES.map(|name| {
        let file = b.open(&b.lookup(folder, name.as_bytes()).ok()?, Access::Read).ok()?;
        let s = b.stat_file(&file).ok()?;
        Some(Stamp { ino: s.ino, size: s.size, mtime: s.mtime, ctime: s.ctime })
    })
}

/// What [`read`] gave.
pub fn judge(read: io::Result<Option<Vec<u8>>>) -> Found {
    match read {
        Err(e) if is_absent(&e) => Found::Absent,
        Err(e) => Found::Unreadable(e),
        Ok(None) => Found::Damaged(Damage::KeyringUnreadable),
        Ok(Some(bytes)) => match Keyring::decode(&bytes) {
            Ok(d) => Found::Valid(Box::new(d)),
            Err(d) => Found::Damaged(d),
        },
    }
}

/// The valid copies, the one with the higher generation first, a copy equal to it left out; and what is wrong with
/// the others.
///
/// # Errors
/// [`StoreError::NotAStore`] if neither copy exists, [`Damage::KeyringUnreadable`] if neither is valid, the backing
/// directory's error if that is why; [`Damage::UnsupportedVersion`] or [`Damage::UnsupportedFeature`] if one of them
/// was written by a newer program: the other one is then out of date.
pub fn candidates(found: [Found; 2]) -> Result<(Vec<Decoded>, Vec<BadCopy>)> {
    let (mut valid, mut damaged, mut error) = (Vec::new(), Vec::new(), None);
    let mut absent = 0;
    for (name, f) in COPIES.into_iter().zip(found) {
        match f {
            Found::Absent => {
                absent += 1;
                damaged.push((name, Damage::KeyringUnreadable));
            }
            Found::Unreadable(e) => {
                error = Some(e);
                damaged.push((name, Damage::KeyringUnreadable));
            }
            Found::Damaged(d @ (Damage::UnsupportedVersion(_) | Damage::UnsupportedFeature(_))) => return Err(d.into()),
            Found::Damaged(d) => damaged.push((name, d)),
            Found::Valid(d) => valid.push(*d),
        }
    }
    // Stable: of two with the same generation, the first stays first.
    valid.sort_by_key(|d| std::cmp::Reverse(d.keyring.generation));
    valid.dedup_by(|a, b| a == b);
    match (valid.is_empty(), error) {
        (false, _) => Ok((valid, damaged)),
        (true, Some(e)) => Err(e.into()),
        (true, None) if absent == COPIES.len() => Err(StoreError::NotAStore("it has no keyring".into())),
        (true, None) => Err(Damage::KeyringUnreadable.into()),
    }
}

/// The content of a file, or `None` if it is longer than a keyring can be.
pub fn read<B: Backing>(b: &B, folder: &B::Node, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    backing::read_whole(b, folder, name, KEYRING_MAX)
}

/// Puts `bytes` in the place of copy `name`, durably; `check` sees them as read back before the old copy is replaced.
///
/// # Errors
/// The backing directory's or `check`'s; then the copy is as it was, unless the error came after the rename.
pub fn replace<B: Backing>(
    b: &B,
    folder: &B::Node,
    name: &str,
    bytes: &[u8],
    check: impl FnOnce(&[u8]) -> Result<()>,
) -> Result<()> {
    backing::replace_checked(b, folder, TEMP, name.as_bytes(), bytes, || {
        let back = read(b, folder, TEMP)?.unwrap_or_default();
        if back != bytes {
            return Err(Damage::KeyringUnreadable.into());
        }
        check(&back)
    })
}

#[cfg(test)]
impl Stamp {
    pub fn of_tests(n: u64) -> Self {
        Self { ino: n, size: n, mtime: Timestamp::default(), ctime: Timestamp::default() }
    }
}
