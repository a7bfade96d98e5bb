//! Directory ids, names, sidecars, links, and what lies in `.envelopefs/`.

use super::{Checker, Severity};
use crate::backing::{Access, Backing, DirEntry, Kind, read_into};
use crate::format::damage::Damage;
use crate::format::ids::DirId;
use crate::format::links::{REFERENCE_LEN, Reference, SEALED_MAX};
use crate::format::names::{
    DIR_ID_FILE, Encoded, Listed, NameKeys, SEALED_DIR_ID_LEN, SIDECAR_SUFFIX, STORE_DIR, TEXT_MAX, classify,
    sidecar_of,
};
use crate::store::error::Result;
use crate::store::walk::{Dir, is_gone};
use std::io;
use std::sync::Arc;

/// Reads a small file of the store's own; of a longer one, `max + 1` bytes. Something else than a file gives `None`.
fn read_small<B: Backing>(b: &B, dir: &B::Node, name: &[u8], max: usize) -> io::Result<Option<Vec<u8>>> {
    let node = b.lookup(dir, name)?;
    if b.stat(&node)?.kind != Kind::File {
        return Ok(None);
    }
    let mut buf = vec![0; max + 1];
    let n = read_into(b, &b.open(&node, Access::Read)?, &mut buf, 0)?;
    buf.truncate(n);
    Ok(Some(buf))
}

fn has(entries: &[DirEntry], name: &[u8]) -> bool {
    entries.binary_search_by(|e| e.name.as_slice().cmp(name)).is_ok()
}

/// The id of a directory: there, as long as it should be, and with keys authentic.
pub(super) fn dir_id<B: Backing>(
    b: &B,
    dir: &B::Node,
    entries: &[DirEntry],
    keys: Option<&NameKeys>,
) -> Result<Option<DirId>> {
    if !has(entries, DIR_ID_FILE) {
        return Err(Damage::DirIdMissing.into());
    }
    let sealed = read_small(b, dir, DIR_ID_FILE, SEALED_DIR_ID_LEN)?.ok_or(Damage::DirIdAuth)?;
    if sealed.len() != SEALED_DIR_ID_LEN {
        return Err(Damage::DirIdAuth.into());
    }
    Ok(keys.map(|k| k.open_dir_id(&sealed)).transpose()?)
}

impl<B: Backing> Checker<'_, B> {
    /// Names of a directory: long ones have their sidecars, sidecars their long ones, and with keys all authenticate.
    pub(super) fn check_names(&mut self, dir: &Arc<Dir<B>>, entries: &[DirEntry], id: Option<&DirId>) {
        if self.plaintext() {
            return;
        }
        for e in entries {
            let path = dir.path_of(&e.name);
            if dir.is_root() && e.name == b"lost+found" {
                continue;
            }
            match classify(&e.name) {
                Listed::Short => {
                    if let (Some(keys), Some(id)) = (&self.names, id)
                        && let Err(d) = keys.decode(id, &e.name)
                    {
                        self.damaged(&path, &d.into());
                    }
                }
                Listed::Long => self.check_sidecar(dir, &e.name, &path, id),
                Listed::Sidecar => {
                    let long = e.name.strip_suffix(SIDECAR_SUFFIX).unwrap_or_default();
                    if !has(entries, long) {
                        self.add(&path, "orphan-sidecar", "the name of a file that is not there", Severity::Note);
                    }
                }
                Listed::DirId | Listed::Unfinished | Listed::Reserved => {}
            }
        }
    }

    fn check_sidecar(&mut self, dir: &Arc<Dir<B>>, long: &[u8], path: &[u8], id: Option<&DirId>) {
        let text = match read_small(self.b, &dir.node, &sidecar_of(long), TEXT_MAX) {
            Ok(text) => text.unwrap_or_default(),
            Err(e) if is_gone(&e) => Vec::new(),
            Err(e) => return self.io_error(path, &e.into()),
        };
        let checked = match (&self.names, id) {
            (Some(keys), Some(id)) => keys.decode_long(id, long, &text).map(|_| ()),
            // Without keys: the text's hash must still give the name.
            _ if Encoded::from_text(text).content() == long => Ok(()),
            _ => Err(Damage::NameSidecar),
        };
        if let Err(d) = checked {
            self.damaged(path, &d.into());
        }
    }

    /// A symbolic link: with keys its target authenticates; without, a long one's file is at least there.
    pub(super) fn check_link(&mut self, path: &[u8], node: &B::Node) {
        self.report.counts.symlinks += 1;
        let text = match self.b.readlink(node) {
            Ok(t) => t,
            Err(e) => return self.io_error(path, &e.into()),
        };
        if text.len() != REFERENCE_LEN {
            if let Some(Err(d)) = self.links.as_ref().map(|k| k.open_text(&text)) {
                self.damaged(path, &d.into());
            }
            return;
        }
        if let Err(e) = self.check_long_target(&text) {
            self.damaged(path, &e);
        }
    }

    fn check_long_target(&mut self, text: &[u8]) -> Result<()> {
        let reference = Reference::parse(text)?;
        let folder = self.b.lookup(&self.b.root()?, STORE_DIR).and_then(|f| self.b.lookup(&f, b"links"));
        let sealed = match folder.and_then(|f| read_small(self.b, &f, &reference.name, SEALED_MAX)) {
            Ok(s) => s.ok_or(Damage::SymlinkAuth)?,
            Err(e) if is_gone(&e) => return Err(Damage::SymlinkAuth.into()),
            Err(e) => return Err(e.into()),
        };
        self.targets.insert(reference.name);
        if let Some(keys) = &self.links {
            keys.open_sealed(&sealed)?;
        }
        Ok(())
    }

    /// What lies in `.envelopefs/` and belongs to nothing.
    pub(super) fn check_own_folder(&mut self) {
        let own = match self.b.root().and_then(|r| self.b.lookup(&r, STORE_DIR)) {
            Ok(o) => o,
            Err(e) => return self.io_error(STORE_DIR, &e.into()),
        };
        for (folder, path) in [(&b"links"[..], &b".envelopefs/links"[..]), (b"pool", b".envelopefs/pool")] {
            let listed = match self.b.lookup(&own, folder).and_then(|n| Ok((self.b.read_dir(&n)?, n))) {
                Ok(l) => l,
                Err(e) => {
                    self.io_error(path, &e.into());
                    continue;
                }
            };
            let (entries, node) = listed;
            for e in entries {
                let shown = [path, b"/", &e.name].concat();
                if folder == b"links" {
                    if !self.targets.contains(&e.name) {
                        self.add(
                            &shown,
                            "orphan-link-target",
                            "the target of a link that is not there",
                            Severity::Note,
                        );
                    }
                } else if self.holds_users_files(&node, &e.name) {
                    self.add(&shown, "pool-leftover", "holds files that belong elsewhere", Severity::Warning);
                }
            }
        }
    }

    fn holds_users_files(&self, pool: &B::Node, name: &[u8]) -> bool {
        let entries = self.b.lookup(pool, name).and_then(|n| self.b.read_dir(&n));
        entries.is_ok_and(|e| e.iter().any(|e| matches!(classify(&e.name), Listed::Short | Listed::Long)))
    }
}
