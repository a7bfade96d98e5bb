//! Checks a store: is every file what envelopefs wrote? Reads only, and no content of the backing directory makes it
//! panic or follow a symbolic link.
//!
//! Without keys it sees structure: keyring copies, checksums, KEK ids, sizes, sidecars, directory ids, leftovers. With
//! keys it unwraps every DEK and authenticates states, names, links and attributes; with
//! [`CheckOptions::deep`] every block too. On a store that is mounted it may see what is being changed as unfinished.

mod file;
mod keyring;
mod names;
pub mod report;
#[cfg(test)]
mod tests;

pub use report::{CheckCounts, CheckOptions, CheckProgress, CheckReport, Finding, Severity};

use super::error::{Result, StoreError};
use super::keys::Keys;
use super::walk::{Dir, Visit, Walk, is_gone};
use crate::backing::{Backing, DirEntry, Kind};
use crate::format::ids::{DirId, FileId};
use crate::format::keyring::Keyring;
use crate::format::links::LinkKey;
use crate::format::names::{self as format_names, Listed, NameKeys};
use crate::format::xattrs::{FoundXattr, XattrKeys};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

/// What a fresh ext file system holds.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// Checks the store in `b`. Everything wrong with single files is in the report, not an error.
///
/// # Errors
/// [`StoreError::NotAStore`]; the backing directory's, if its root cannot be opened.
pub fn run<B: Backing>(
    b: &B,
    keys: Option<&Keys>,
    options: &CheckOptions,
    progress: &dyn CheckProgress,
) -> Result<CheckReport> {
    let mut c = Checker::new(b, keys, *options, progress);
    c.check_keyring()?;
    for visit in Walk::new(b)? {
        match visit {
            Ok(Visit::Dir { dir, entries }) => c.enter(&dir, &entries),
            Ok(Visit::Entry { dir, entry }) => c.entry(&dir, &entry),
            Err(e) if e.path == LOST_AND_FOUND && e.error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) => c.io_error(&e.path, &e.error.into()),
        }
    }
    c.check_own_folder();
    progress.update(&c.report.counts);
    Ok(c.report)
}

/// The state of one check.
struct Checker<'a, B: Backing> {
    b: &'a B,
    keys: Option<&'a Keys>,
    progress: &'a dyn CheckProgress,
    /// The keyring, with keys the authentic one.
    ring: Option<Keyring>,
    names: Option<NameKeys>,
    links: Option<LinkKey>,
    xattrs: Option<XattrKeys>,
    report: CheckReport,
    /// Who was seen with a file id: device and inode.
    ids: HashMap<FileId, (u64, u64)>,
    /// Files with several names that were checked already.
    linked: HashSet<(u64, u64)>,
    /// Files in `links/` that a link refers to.
    targets: HashSet<Vec<u8>>,
}

impl<'a, B: Backing> Checker<'a, B> {
    fn new(b: &'a B, keys: Option<&'a Keys>, options: CheckOptions, progress: &'a dyn CheckProgress) -> Self {
        let secret = keys.map(Keys::secret);
        let encrypted = keys.is_some_and(|k| !k.flags().plaintext_names);
        Self {
            b,
            keys,
            progress,
            ring: None,
            names: secret.filter(|_| encrypted).map(NameKeys::new),
            links: secret.map(LinkKey::new),
            xattrs: secret.map(XattrKeys::new),
            report: CheckReport {
                with_keys: keys.is_some(),
                deep: options.deep && keys.is_some(),
                ..CheckReport::default()
            },
            ids: HashMap::new(),
            linked: HashSet::new(),
            targets: HashSet::new(),
        }
    }

    fn add(&mut self, path: &[u8], code: &str, message: impl Into<String>, severity: Severity) {
        self.report.add(String::from_utf8_lossy(path), code, message, severity);
    }

    fn damaged(&mut self, path: &[u8], e: &StoreError) {
        self.add(path, &e.code(), e.to_string(), Severity::Damage);
    }

    /// A file that cannot be looked at counts as damage, one that has just gone as nothing.
    fn io_error(&mut self, path: &[u8], e: &StoreError) {
        match e {
            StoreError::Backing(e) if is_gone(e) => {}
            _ => self.damaged(path, e),
        }
    }

    /// Whether names in the store are in clear, as far as that is known.
    fn plaintext(&self) -> bool {
        self.ring.as_ref().is_some_and(Keyring::plaintext_names)
    }

    fn enter(&mut self, dir: &Arc<Dir<B>>, entries: &[DirEntry]) {
        self.report.counts.directories += 1;
        let saved = dir.path() == LOST_AND_FOUND || dir.path().starts_with(b"lost+found/");
        let own_name = dir.path().rsplit(|c| *c == b'/').next().unwrap_or_default();
        if format_names::classify(own_name) == Listed::Unfinished {
            self.add(dir.path(), "unfinished-directory", "a directory whose making was cut short", Severity::Note);
        } else if !saved {
            let id = self.check_dir_id(dir, entries);
            self.check_names(dir, entries, id.as_ref());
        }
        let node = Arc::clone(&dir.node);
        self.check_xattrs(&node, dir.path());
        self.progress.update(&self.report.counts);
    }

    fn entry(&mut self, dir: &Arc<Dir<B>>, entry: &DirEntry) {
        let path = dir.path_of(&entry.name);
        let listed = format_names::classify(&entry.name);
        if matches!(listed, Listed::DirId | Listed::Sidecar) {
            return;
        }
        let found = self.b.lookup(&dir.node, &entry.name).and_then(|n| self.b.stat(&n).map(|s| (n, s)));
        let (node, stat) = match found {
            Ok(f) => f,
            Err(e) => return self.io_error(&path, &e.into()),
        };
        if listed == Listed::Reserved {
            return self.add(&path, "leftover", "a reserved name that a crash left behind", Severity::Note);
        }
        if dir.path().starts_with(LOST_AND_FOUND) {
            return self.add(&path, "lost-and-found", "saved here by a file system check", Severity::Note);
        }
        match stat.kind {
            Kind::File => self.check_file(&path, &node, &stat),
            Kind::Symlink => self.check_link(&path, &node),
            Kind::Dir => {}
            Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => self.report.counts.special += 1,
        }
        self.check_xattrs(&node, &path);
        self.progress.update(&self.report.counts);
    }

    fn check_xattrs(&mut self, node: &B::Node, path: &[u8]) {
        let Some(keys) = &self.xattrs else { return };
        let found = match self.b.list_xattr(node) {
            Ok(f) => f,
            // No attributes on this kind of inode or file system.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => return,
            Err(e) => return self.io_error(path, &e.into()),
        };
        let mut bad = Vec::new();
        for name in found {
            let long = match keys.decode_name(&name) {
                FoundXattr::Plain(plain) if plain == name => continue,
                FoundXattr::Plain(_) => false,
                FoundXattr::InValue => true,
                // Something of another program, or a name that was tampered with.
                FoundXattr::Foreign if contains(&name, b".envelopefs.") => {
                    bad.push(StoreError::from(crate::format::damage::Damage::XattrAuth));
                    continue;
                }
                FoundXattr::Foreign => continue,
            };
            self.report.counts.xattrs += 1;
            match self.b.get_xattr(node, &name) {
                Ok(sealed) => bad.extend(keys.open_value(&name, long, &sealed).err().map(StoreError::from)),
                Err(e) if e.raw_os_error() == Some(libc::ENODATA) => {}
                Err(e) => bad.push(e.into()),
            }
        }
        bad.iter().for_each(|e| self.io_error(path, e));
    }

    /// The id of a directory whose names are encrypted, if keys can tell it.
    fn check_dir_id(&mut self, dir: &Arc<Dir<B>>, entries: &[DirEntry]) -> Option<DirId> {
        if self.plaintext() {
            return None;
        }
        match names::dir_id(self.b, &dir.node, entries, self.names.as_ref()) {
            Ok(id) => id,
            Err(e) => {
                self.io_error(dir.path(), &e);
                None
            }
        }
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}
