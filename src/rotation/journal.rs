//! The journal on disk: `.envelopefs/rotation/journal`, two copies of a record, the next one over the older.
//!
//! A run that cannot read or write it goes on without: what it says is a convenience ([`super::record`]).

use super::record::{RECORD_LEN, Record};
use super::report::State;
use crate::backing::{self, Access, Backing, Kind};
use crate::crypto::kdf::{self, label};
use crate::crypto::secret::Secret32;
use crate::format::ids::KekId;
use crate::format::names::STORE_DIR;
use crate::store::keys::Keys;
use crate::store::walk::is_gone;
use std::io;

const FOLDER: &[u8] = b"rotation";
const FILE: &[u8] = b"journal";

/// The journal of a store.
pub(super) struct Journal<'a, B: Backing> {
    backing: &'a B,
    key: Secret32,
    last: Option<Record>,
}

impl<'a, B: Backing> Journal<'a, B> {
    /// Opens the journal, if there is one.
    pub(super) fn open(backing: &'a B, keys: &Keys) -> Self {
        let key = kdf::derive(keys.secret().secret(), label::REPORT_MAC, b"journal");
        let mut j = Self { backing, key, last: None };
        match j.find() {
            Ok(file) => j.last = file.and_then(|f| j.read(&f)),
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

    fn find(&self) -> io::Result<Option<B::File>> {
        let found = self
            .backing
            .lookup(&self.backing.root()?, STORE_DIR)
            .and_then(|d| self.backing.lookup(&d, FOLDER))
            .and_then(|d| self.backing.lookup(&d, FILE));
        match found {
            Ok(node) if self.backing.stat(&node)?.kind == Kind::File => {
                // Read-only, so that a dry run writes nothing; `write` opens it again.
                self.backing.open(&node, Access::Read).map(Some)
            }
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn read(&self, file: &B::File) -> Option<Record> {
        let copy = |n: u64| {
            let mut b = [0u8; RECORD_LEN];
            let got = backing::read_into(self.backing, file, &mut b, n * RECORD_LEN as u64).ok()?;
            if got == RECORD_LEN { Record::decode(&b, &self.key) } else { None }
        };
        [copy(0), copy(1)].into_iter().flatten().max_by_key(|r| r.sequence)
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let file = self.create()?;
        self.backing.write_at(&file, &record.encode(&self.key), record.sequence % 2 * RECORD_LEN as u64)?;
        self.backing.sync_file(&file)
    }

    /// The journal open for writing; made, durably, if it is not there.
    fn create(&self) -> io::Result<B::File> {
        let store = self.backing.lookup(&self.backing.root()?, STORE_DIR)?;
        let folder = match self.backing.lookup(&store, FOLDER) {
            Err(e) if is_gone(&e) => {
                self.backing.mkdir(&store, FOLDER, 0o700, 0)?;
                self.backing.sync_dir(&store)?;
                self.backing.lookup(&store, FOLDER)?
            }
            other => other?,
        };
        match self.backing.lookup(&folder, FILE) {
            Ok(node) => self.backing.open(&node, Access::ReadWrite),
            Err(e) if is_gone(&e) => {
                let (_, file) = self.backing.create(&folder, FILE, 0o600, 0)?;
                self.backing.sync_dir(&folder)?;
                Ok(file)
            }
            Err(e) => Err(e),
        }
    }
}
