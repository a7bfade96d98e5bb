//! Which files an unfinished rekey has done: `.envelopefs/rekey/journal`, so that the same run, begun again, goes on.
//!
//! A run is known by the SHA-256 of what it was asked. What it notes of a file is the id the file has since: whatever the
//! file is called by then, and whatever its times say, its header tells whether it was done. Records have 64 bytes, each
//! a *subject* of 32 and the HMAC-SHA-256 of its SHA-256 (as all seals of the store). The first one's subject is the SHA-256 of the
//! request; the others' are that of [`Journal::subject`]. Those that are not genuine are passed over: a file that is not
//! known to be done is done again, which costs time and nothing else. That goes for lost records too, so nothing is synced.
//!
//! What the run was asked lies beside it, in `asked`: nonce, ciphertext and tag of AES-256-GCM-SIV over the text whose hash
//! the journal begins with. It is encrypted because names are, and only told, so a run without it is as good.

use super::report::{Asked, Request};
use crate::backing::{self, Access, Backing};
use crate::crypto::aead::GcmSiv;
use crate::crypto::kdf::{derive, label, sha256};
use crate::crypto::seal::{Hash, SealKey};
use crate::crypto::secret::{Secret32, StoreSecret};
use crate::format::ids::FileId;
use crate::format::names::STORE_DIR;
use crate::store::rekey::REKEY_DIR;
use crate::store::walk::unless_gone;
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::HashSet;
use std::io;
use std::sync::Arc;

const FILE: &[u8] = b"journal";
const ASKED: &[u8] = b"asked";
const ASKED_TEMP: &[u8] = b"asked.new";
/// Longest text of what was asked, in bytes: what a client may send is no longer.
const ASKED_MAX: usize = 16 << 20;
const RECORD: usize = 64;
/// Records read at once.
const READ: usize = 1024;

/// What the journal of a rekey says without any key, so it may be made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Unfinished {
    /// Files that it has done.
    pub files: u64,
    /// When it last noted one, in seconds since the epoch.
    pub noted: u64,
}

/// The rekey that is under way or unfinished in a store, if there is one.
///
/// # Errors
/// The backing directory's.
pub fn unfinished<B: Backing>(b: &B) -> io::Result<Option<Unfinished>> {
    let Some(stat) = unless_gone(folder(b).and_then(|f| b.stat_at(&f, FILE)))? else { return Ok(None) };
    let files = (stat.size / RECORD as u64).saturating_sub(1);
    Ok(Some(Unfinished { files, noted: u64::try_from(stat.mtime.sec).unwrap_or(0) }))
}

fn folder<B: Backing>(b: &B) -> io::Result<B::Node> {
    b.lookup(&b.lookup(&b.root()?, STORE_DIR)?, REKEY_DIR)
}

/// What the rekey was asked that is under way or unfinished in the store with this secret; `None` if there is none, or
/// nothing genuine that says it.
///
/// # Errors
/// The backing directory's.
pub fn asked<B: Backing>(b: &B, secret: &StoreSecret) -> io::Result<Option<Asked>> {
    let read = || {
        let folder = folder(b)?;
        let mut of = Hash::default();
        let n = backing::read_into(b, &b.open(&b.lookup(&folder, FILE)?, Access::Read)?, &mut of, 0)?;
        let sealed = backing::read_whole(b, &folder, ASKED, ASKED_MAX)?;
        Ok(sealed.filter(|_| n == of.len()).map(|sealed| (of, sealed)))
    };
    let Some((of, sealed)) = unless_gone(read())?.flatten() else { return Ok(None) };
    let text = GcmSiv::open_random(&asked_key(secret), b"", &sealed).ok();
    // One that lies there from another run says nothing of this one.
    Ok(text.filter(|t| sha256(t) == of).and_then(|t| Request::asked(&t)))
}

fn asked_key(secret: &StoreSecret) -> Secret32 {
    derive(secret.secret(), label::REKEY_ASKED, b"")
}

fn half(hash: &Hash) -> [u8; 16] {
    std::array::from_fn(|i| hash[i])
}

/// The journal of one run.
pub(super) struct Journal<'a, B: Backing> {
    backing: &'a B,
    folder: Arc<B::Node>,
    file: B::File,
    key: SealKey,
    request: Hash,
    /// Where the next record goes.
    end: Mutex<u64>,
    /// Files that are known to be done: the first half of their subjects.
    before: HashSet<[u8; 16]>,
}

impl<'a, B: Backing> Journal<'a, B> {
    /// Opens the journal for a run that was asked `request`: goes on with the one that is there if it is of the same
    /// request and not to `restart`, else begins a new one.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn open(
        backing: &'a B,
        folder: Arc<B::Node>,
        secret: &StoreSecret,
        request: &[u8],
        restart: bool,
    ) -> io::Result<Self> {
        let file = match backing.lookup(&folder, FILE) {
            Ok(node) => backing.open(&node, Access::ReadWrite)?,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => backing.create(&folder, FILE, 0o600, 0)?.1,
            Err(e) => return Err(e),
        };
        let key = SealKey::new(secret, label::REKEY_JOURNAL);
        let mut j =
            Self { backing, folder, file, key, request: sha256(request), end: Mutex::new(0), before: HashSet::new() };
        if restart || !j.load()? {
            j.before.clear();
            backing.truncate(&j.file, 0)?;
            *j.end.get_mut() = 0;
            j.append(j.request)?;
            let sealed = GcmSiv::seal_random(&asked_key(secret), b"", request);
            if let Err(e) = backing::replace_whole(backing, &j.folder, ASKED_TEMP, ASKED, &sealed) {
                tracing::warn!("what a rekey was asked cannot be noted for others to see: {e}");
            }
        }
        Ok(j)
    }

    /// Reads what is there; says whether it is of this request.
    fn load(&mut self) -> io::Result<bool> {
        let mut at = 0;
        let mut bytes = vec![0; READ * RECORD];
        loop {
            let n = backing::read_into(self.backing, &self.file, &mut bytes, at)?;
            for (i, r) in bytes.get(..n).unwrap_or_default().as_chunks::<RECORD>().0.iter().enumerate() {
                let genuine = self.genuine(r);
                match (at == 0 && i == 0, genuine) {
                    (true, Some(s)) if s == self.request => {}
                    (true, _) => return Ok(false),
                    (false, Some(s)) => drop(self.before.insert(half(&s))),
                    (false, None) => {}
                }
            }
            at += (n / RECORD * RECORD) as u64;
            if n < bytes.len() {
                *self.end.get_mut() = at;
                return Ok(at > 0);
            }
        }
    }

    fn genuine(&self, record: &[u8; RECORD]) -> Option<Hash> {
        let (subject, mac) = record.split_first_chunk::<32>()?;
        (self.key.seal(subject).mac == *mac).then_some(*subject)
    }

    /// What stands for a file: bound to the request, so that no record of another run says anything in this one.
    fn subject(&self, file: FileId) -> Hash {
        sha256(&[&self.request[..], &file.0].concat())
    }

    fn append(&self, subject: Hash) -> io::Result<()> {
        let mut end = self.end.lock();
        let record = [subject, self.key.seal(&subject).mac].concat();
        self.backing.write_at(&self.file, &record, *end)?;
        *end += RECORD as u64;
        Ok(())
    }

    /// Whether an earlier part of this run has done anything.
    pub fn is_resumed(&self) -> bool {
        !self.before.is_empty()
    }

    /// Learns of the files that this part of the run has done.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn look_again(&mut self) -> io::Result<()> {
        self.load().map(drop)
    }

    /// Whether an earlier part of this run has given the file its id.
    pub fn has(&self, file: FileId) -> bool {
        !self.before.is_empty() && self.before.contains(&half(&self.subject(file)))
    }

    /// The file has this id now. One that cannot be noted may be done again, no more.
    pub fn done(&self, file: FileId) {
        if let Err(e) = self.append(self.subject(file)) {
            tracing::warn!("journal of a rekey cannot be written: {e}");
        }
    }

    /// The run has ended and nothing is left to do.
    pub fn remove(self) {
        for name in [FILE, ASKED] {
            if let Err(e) = unless_gone(self.backing.unlink(&self.folder, name)) {
                tracing::warn!("journal of a rekey stays behind: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::sim::SimDisk;

    #[test]
    fn it_goes_on_with_the_same_request_and_no_other() {
        let disk = SimDisk::default();
        let secret = StoreSecret::random();
        let open = |request: &[u8], restart| {
            Journal::open(&disk, Arc::new(disk.root().unwrap()), &secret, request, restart).unwrap()
        };
        let ids: Vec<_> = (0..3000).map(|_| FileId::random()).collect();
        let j = open(b"a", false);
        assert!(!j.is_resumed());
        ids.iter().for_each(|i| j.done(*i));
        drop(j);
        let j = open(b"a", false);
        assert!(j.is_resumed() && ids.iter().all(|i| j.has(*i)) && !j.has(FileId::random()));
        j.done(FileId::random());
        drop(j);
        // A torn last record, and one that somebody made up.
        disk.write_raw("journal", 64 * 5, &[7; 64]).unwrap();
        disk.truncate_raw("journal", 64 * 3001 + 30).unwrap();
        let j = open(b"a", false);
        assert_eq!(ids.iter().filter(|i| !j.has(**i)).count(), 1);
        assert!(!j.has(ids[4]));
        drop(j);
        let j = open(b"b", false);
        assert!(!j.is_resumed());
        drop(j);
        assert!(!open(b"a", false).is_resumed(), "the other one has replaced it");
        let j = open(b"a", false);
        j.done(ids[0]);
        drop(j);
        assert!(!open(b"a", true).is_resumed());
        open(b"a", false).remove();
        assert!(disk.read_raw("journal").is_err() && disk.read_raw("asked").is_err());
        // Another store's.
        open(b"a", false).done(ids[0]);
        let other = StoreSecret::random();
        let j = Journal::open(&disk, Arc::new(disk.root().unwrap()), &other, b"a", false).unwrap();
        assert!(!j.is_resumed());
    }
}
