//! The journal on disk: `.envelopefs/rotation/journal`, two copies of a record, the next one over the older. Each shard of
//! a run has one of its own.
//!
//! A run that cannot read or write it goes on without: what it says is a convenience ([`super::record`]).

use super::record::{RECORD_LEN, Record};
use super::report::State;
use super::shard::Shard;
use crate::backing::{self, Access, Backing, Kind};
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::Secret32;
use crate::format::ids::KekId;
use crate::format::names::STORE_DIR;
use crate::store::keys::Keys;
use crate::store::walk::unless_gone;
use std::io;

const FOLDER: &[u8] = b"rotation";
/// Its name; a shard's ends in this.
pub(super) const NAME: &str = "journal";

/// The journal of a store.
pub(super) struct Journal<'a, B: Backing> {
    backing: &'a B,
    name: Vec<u8>,
    key: Secret32,
    last: Option<Record>,
}

impl<'a, B: Backing> Journal<'a, B> {
    /// Opens the journal, the store's or a shard's, if there is one.
    pub(super) fn open(backing: &'a B, keys: &Keys, shard: Option<Shard>) -> Self {
        let name = file_name(shard);
        let key = kdf::derive(keys.secret().secret(), label::REPORT_MAC, &name);
        let mut j = Self { backing, name, key, last: None };
        match find(backing, &j.name) {
            Ok(file) => j.last = file.and_then(|f| read(backing, &f, |b| Record::decode(b, &j.key))),
            Err(e) => tracing::warn!("rotation journal cannot be opened: {e}"),
        }
        j
    }

    /// What the last run left.
    pub(super) fn last(&self) -> Option<&Record> {
        self.last.as_ref()
    }

    /// Notes where a run of `target` is, durably.
    pub(super) fn note(&mut self, state: State, target: KekId, started: u64, files: u64, cursor: &[u8]) {
        let sequence = self.last.as_ref().map_or(0, |l| l.sequence).saturating_add(1);
        let record = Record { sequence, state, target, started, files, cursor: cursor.to_vec() };
        match self.write(&record) {
            Ok(()) => self.last = Some(record),
            Err(e) => tracing::warn!("rotation journal cannot be written: {e}"),
        }
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let file = self.create()?;
        self.backing.write_at(&file, &record.encode(&self.key), record.sequence % 2 * RECORD_LEN as u64)?;
        self.backing.sync_file(&file)
    }

    /// The journal open for writing; made, durably, if it is not there.
    fn create(&self) -> io::Result<B::File> {
        let folder = make_folder(self.backing)?;
        if let Some(node) = unless_gone(self.backing.lookup(&folder, &self.name))? {
            return self.backing.open(&node, Access::ReadWrite);
        }
        let (_, file) = self.backing.create(&folder, &self.name, 0o600, 0)?;
        self.backing.sync_dir(&folder)?;
        Ok(file)
    }
}

/// Name of the journal of the store, or of a shard.
pub(super) fn file_name(shard: Option<Shard>) -> Vec<u8> {
    shard.map_or_else(|| NAME.to_owned(), |s| s.file_name(NAME)).into_bytes()
}

/// What the journal of a store, or of a shard, says of its last run, and when that was written, in seconds since the epoch.
/// Takes no key, so it may be made up.
///
/// # Errors
/// The backing directory's.
pub fn last_noted<B: Backing>(b: &B, shard: Option<Shard>) -> io::Result<Option<(Record, i64)>> {
    let Some(file) = find(b, &file_name(shard))? else { return Ok(None) };
    let noted = b.stat_file(&file)?.mtime.sec;
    Ok(read(b, &file, Record::decode_unverified).map(|r| (r, noted)))
}

/// The folder for what rotations keep; `None` if there is none.
pub(super) fn folder<B: Backing>(b: &B) -> io::Result<Option<B::Node>> {
    unless_gone(b.lookup(&b.root()?, STORE_DIR).and_then(|d| b.lookup(&d, FOLDER)))
}

/// The same; made, durably, if it is not there.
pub(super) fn make_folder<B: Backing>(b: &B) -> io::Result<B::Node> {
    if let Some(there) = folder(b)? {
        return Ok(there);
    }
    let store = b.lookup(&b.root()?, STORE_DIR)?;
    match b.mkdir(&store, FOLDER, 0o700, 0) {
        // Another shard was quicker.
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    b.sync_dir(&store)?;
    b.lookup(&store, FOLDER)
}

/// The journal open for reading only, so that a dry run writes nothing.
fn find<B: Backing>(b: &B, name: &[u8]) -> io::Result<Option<B::File>> {
    let Some(folder) = folder(b)? else { return Ok(None) };
    match unless_gone(b.lookup(&folder, name))? {
        Some(node) if b.stat(&node)?.kind == Kind::File => b.open(&node, Access::Read).map(Some),
        Some(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        None => Ok(None),
    }
}

/// The newer of the records that `decode` makes of the two copies.
fn read<B: Backing>(b: &B, file: &B::File, decode: impl Fn(&[u8; RECORD_LEN]) -> Option<Record>) -> Option<Record> {
    let copy = |n: u64| {
        let mut bytes = [0u8; RECORD_LEN];
        let got = backing::read_into(b, file, &mut bytes, n * RECORD_LEN as u64).ok()?;
        if got == RECORD_LEN { decode(&bytes) } else { None }
    };
    [copy(0), copy(1)].into_iter().flatten().max_by_key(|r| r.sequence)
}
