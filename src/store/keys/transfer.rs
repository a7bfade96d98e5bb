//! Copies of the keyring outside of the store: taking one, and putting one back.
//!
//! A copy is the bytes of the keyring as they lie on disk. All keys in it are wrapped by root keys, and a MAC under the
//! store secret covers it, so it may lie where ciphertext may lie; who has a root key as well has the store's keys.
//!
//! Putting one back never removes anything: what was there is kept beside it ([`Imported::kept`]).

use super::disk::{self, Found};
use super::{BadCopy, COPIES, Keys, Proof, make_folder, now, refuse, roots};
use crate::backing::{Access, Backing, Kind, RenameMode};
use crate::format::damage::Damage;
use crate::format::ids::{KekId, StoreId};
use crate::format::keyring::{KekState, Keyring};
use crate::format::lifecycle::LifeCycle;
use crate::format::names::{self, Listed, NameKeys};
use crate::kms::KeyProvider;
use crate::store::header::{self, Source};
use crate::store::walk::{Visit, Walk};
use crate::store::{Result, StoreError, dir};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Files looked at for the store's id when nothing else tells whose they are.
const FILES_MAX: usize = 10_000;
/// Most copies of a replaced keyring that are kept.
const KEPT_MAX: u32 = 1000;

/// The keyring in force, as it lies on disk.
#[derive(Debug)]
pub struct Exported {
    pub bytes: Vec<u8>,
    pub keyring: Keyring,
    /// Copies on disk that cannot be used, and why.
    pub damaged: Vec<BadCopy>,
}

/// What came of [`Keys::import`].
#[derive(Debug)]
pub struct Imported {
    /// The keyring, now in force.
    pub keys: Keys,
    /// Generation of the copy that was put back.
    pub generation: u64,
    /// Names in the store's folder of what was there before.
    pub kept: Vec<String>,
}

/// Whose the files of a backing directory are, as far as can be seen.
enum Whose {
    Ours,
    Another(StoreId),
    /// The root's directory id does not open.
    NotOurs,
    Unknown,
}

impl Keys {
    /// The keyring in force, byte for byte. Needs no key, and so verifies the checksum only: that it is authentic shows
    /// when it is used.
    ///
    /// # Errors
    /// As [`Keys::read_keyring`].
    pub fn export<B: Backing>(b: &B) -> Result<Exported> {
        let folder = disk::folder(b)?;
        let read = COPIES.map(|name| disk::read(b, &folder, name.as_bytes()));
        let bytes: Vec<Vec<u8>> = read.iter().flatten().flatten().cloned().collect();
        let (candidates, damaged) = disk::candidates(read.map(disk::judge))?;
        let first = candidates.into_iter().next().ok_or(Damage::KeyringUnreadable)?;
        let bytes = bytes.into_iter().find(|b| Keyring::decode(b).as_ref() == Ok(&first));
        Ok(Exported { bytes: bytes.ok_or(Damage::KeyringUnreadable)?, keyring: first.keyring, damaged })
    }

    /// Puts an exported keyring in the place of one that is lost, damaged or older. It is opened with the first of `root`
    /// that is one of its root keys, MAC and active KEK included, must be the keyring of the store it is put into, and gets a
    /// generation higher than any there. At every instant either the old keyring, if there is one, or the new one
    /// is in force; what lay in the copies' places is kept under other names in the folder.
    ///
    /// The store's folder is made if it is lost, once it is sure whose the files are. Not in it then: the targets of long
    /// symbolic links, which lay there.
    ///
    /// A KEK that was pending is active, what was scheduled to be destroyed is not any more, and no retired KEK counts as
    /// proved unused: files may have been written under it since, when another copy was in force. For the same reason
    /// `forget` takes away what is left in the store of proofs under way; it is called when nothing is in the way of the
    /// import any more, and nothing was replaced yet. If the keyring that this one replaces is whole and this store's, a
    /// quorum and a floor that are set there stay.
    /// Destroyed KEKs that it holds are there again; KEKs that are newer than it are not in it, and files under them do not
    /// open. With `force` it may replace a whole keyring that is as new or newer, or that another key made.
    ///
    /// The caller holds the volume lock, if there is a folder to hold it in.
    ///
    /// # Errors
    /// [`Damage`] of `bytes`; [`StoreError::WrongKey`] and [`StoreError::Kms`] as [`Keys::open`]; [`StoreError::KeyState`]
    /// if it is not this store's, or the present keyring must not be replaced without `force`; the backing directory's;
    /// `forget`'s; [`StoreError::CopyLeft`] if a copy that another key made could not be replaced.
    pub fn import<B: Backing>(
        b: &B,
        bytes: &[u8],
        root: &[Arc<dyn KeyProvider>],
        force: bool,
        forget: impl FnOnce(&B) -> io::Result<()>,
    ) -> Result<Imported> {
        let folder = match disk::folder(b) {
            Err(StoreError::NotAStore(_)) => None,
            other => Some(other?),
        };
        let d = Keyring::decode(bytes)?;
        let generation = d.keyring.generation;
        let (secret, first, passed_over) = roots::unlock(&d, root)?;
        let keys = Self { passed_over, ..Self::open_with(put_back(d.keyring), secret, first.clone(), root)? };
        let mut ring = keys.to_change()?;
        match keys.whose(b)? {
            Whose::Ours => {}
            Whose::Another(id) => {
                return refuse(format!("this keyring is of store {}, the files here of {id}", ring.store));
            }
            Whose::NotOurs => {
                return refuse("this keyring is another store's: the id of the root directory does not open with it");
            }
            Whose::Unknown if force || (ring.plaintext_names() && folder.is_some()) => {}
            Whose::Unknown => {
                return refuse("nothing here shows that this keyring is this store's; --force puts it here");
            }
        }
        let folder = match folder {
            Some(f) => f,
            None => make_folder(b)?,
        };
        let there = disk::load(b, &folder);
        if let Some(why) = keys.in_the_way(&there, generation).filter(|_| !force) {
            return refuse(format!("{why}; --force replaces it all the same, and keeps a copy"));
        }
        if let Some(present) = keys.in_force(&there) {
            hold_on(&mut ring, &present.life);
            keys.not_taken_back.store(present.generation, Ordering::Release);
        }
        forget(b)?;
        let mut kept = Vec::new();
        for name in COPIES {
            kept.extend(keep(b, &folder, name)?);
        }
        let proofs: [Proof<'_>; 1] = [(first, roots::Object::Secret, keys.secret.secret())];
        keys.adopt(b, ring, &proofs)?;
        if there.iter().any(|f| matches!(f, Found::Valid(d) if !roots::is_authentic(&keys.secret, d))) {
            // A root key may open that one as well, and its generation may be the higher one.
            keys.settle(b, "the keyring is put back")?;
        }
        Ok(Imported { keys, generation, kept })
    }

    /// The present keyring, if this one's key made it.
    fn in_force<'a>(&self, found: &'a [Found]) -> Option<&'a Keyring> {
        let authentic = found.iter().filter_map(|f| match f {
            Found::Valid(d) if roots::is_authentic(&self.secret, d) => Some(&d.keyring),
            _ => None,
        });
        authentic.max_by_key(|r| r.generation)
    }

    /// Why what is there should not be replaced; `None` if there is no reason.
    fn in_the_way(&self, found: &[Found], generation: u64) -> Option<String> {
        found.iter().find_map(|f| match f {
            Found::Absent => None,
            Found::Damaged(d @ (Damage::UnsupportedVersion(_) | Damage::UnsupportedFeature(_))) => {
                Some(format!("there is a keyring that a newer program wrote ({d})"))
            }
            Found::Damaged(_) => None,
            Found::Unreadable(e) => Some(format!("a copy of the present keyring cannot be read ({e})")),
            Found::Valid(d) if !roots::is_authentic(&self.secret, d) => {
                Some("there is a whole keyring, and not one that this one's key made".to_owned())
            }
            Found::Valid(d) if d.keyring.generation >= generation => Some(format!(
                "the present keyring is whole, and of generation {}; this one is of {generation}, and KEKs made since are \
                 not in it",
                d.keyring.generation
            )),
            Found::Valid(_) => None,
        })
    }

    /// Whose the files are that lie in the backing directory.
    fn whose<B: Backing>(&self, b: &B) -> Result<Whose> {
        let mut without_headers = Whose::Unknown;
        if !self.flags.plaintext_names {
            match dir::read_id(b, &b.root()?, &NameKeys::new(&self.secret)) {
                Ok(_) => return Ok(Whose::Ours),
                // Damaged, perhaps: then headers tell.
                Err(StoreError::Damage(Damage::DirIdAuth)) => without_headers = Whose::NotOurs,
                Err(StoreError::Damage(Damage::DirIdMissing)) => {}
                Err(e) => return Err(e),
            }
        }
        let files = Walk::new(b)?.filter_map(|visit| match visit {
            Ok(Visit::Entry { dir, entry }) if matches!(entry.kind, Some(Kind::File) | None) => {
                let ours = matches!(names::classify(&entry.name), Listed::Short | Listed::Long);
                ours.then_some((dir, entry.name))
            }
            _ => None,
        });
        let found = files.take(FILES_MAX).find_map(|(dir, name)| named_in(b, &dir.node, &name));
        Ok(match found {
            Some(id) if id == self.store => Whose::Ours,
            Some(id) => Whose::Another(id),
            None => without_headers,
        })
    }
}

/// A keyring from before as it is to be in force now. What was to be destroyed then is to be decided anew: it may have
/// been cancelled since. A KEK that was pending may have been made active since and headers may name it (`rotate --export`),
/// so it is the active one; had it not been, nothing is lost by that. One that was proved unused may have been the active
/// one since, by a copy from before that.
fn put_back(mut ring: Keyring) -> Keyring {
    ring.life.schedules.clear();
    let is_pending = ring.pending().is_some();
    for k in &mut ring.keks {
        match k.state {
            KekState::Active if is_pending => (k.state, k.retired) = (KekState::Retired, now()),
            KekState::Pending => (k.state, k.activated) = (KekState::Active, now()),
            KekState::Retired => k.unused = 0,
            KekState::Active | KekState::Destroyed => {}
        }
    }
    ring
}

/// Carries over to `ring`, which is put in its place, what the present keyring asks of operators: one root key, which
/// imports, must not lift what takes several. The higher quorum counts, and the later of two floors; a floor at a KEK that
/// `ring` does not have, or has not come to, cannot stand.
fn hold_on(ring: &mut Keyring, present: &LifeCycle) {
    ring.life.quorum = ring.life.quorum.max(present.quorum);
    let at = |id: KekId| ring.keks.iter().position(|k| k.id == id);
    let active = ring.keks.iter().position(|k| k.state == KekState::Active);
    let floor = present.floor.filter(|f| at(*f).is_some_and(|n| Some(n) <= active));
    let later = [ring.life.floor, floor].into_iter().flatten().max_by_key(|f| at(*f));
    ring.life.floor = later;
}

/// The store that a file's header names, if it has one.
fn named_in<B: Backing>(b: &B, dir: &B::Node, name: &[u8]) -> Option<StoreId> {
    let node = b.lookup(dir, name).ok()?;
    // A FIFO must not be opened.
    b.stat(&node).ok().filter(|s| s.kind == Kind::File)?;
    let file = b.open(&node, Access::Read).ok()?;
    let (pair, _) = header::read_slots(b, &file, Source::Cache).ok()??;
    pair.authoritative().ok().map(|(_, slot)| slot.store)
}

/// Keeps what lies in the place of copy `name` under another name, which is returned, unless there is nothing. A whole
/// copy stays in force meanwhile.
fn keep<B: Backing>(b: &B, folder: &B::Node, name: &str) -> Result<Option<String>> {
    let found = disk::read(b, folder, name.as_bytes());
    if matches!(&found, Err(e) if disk::is_absent(e)) {
        return Ok(None);
    }
    for n in 1..=KEPT_MAX {
        let kept = format!("{name}.old.{n}");
        match (disk::read(b, folder, kept.as_bytes()), &found) {
            (Err(e), Ok(Some(bytes))) if disk::is_absent(&e) => {
                disk::replace(b, folder, &kept, bytes, |_| Ok(()))?;
                return Ok(Some(kept));
            }
            // Not to be read, too long to be a keyring, or no file: it is in force for nobody, so that it can be moved.
            (Err(e), _) if disk::is_absent(&e) => {
                b.rename(folder, name.as_bytes(), folder, kept.as_bytes(), RenameMode::NoReplace)?;
                b.sync_dir(folder)?;
                return Ok(Some(kept));
            }
            // An import that was cut short has kept it already.
            (Ok(Some(there)), Ok(Some(bytes))) if there == *bytes => return Ok(Some(kept)),
            _ => {}
        }
    }
    refuse("too many replaced keyrings are kept in .envelopefs: remove those that are not needed")
}

/// Names of replaced keyrings in the store's folder: they hold what was wrapped when they were replaced, KEKs included
/// that were destroyed since.
///
/// # Errors
/// [`StoreError::NotAStore`]; the backing directory's.
pub fn kept<B: Backing>(b: &B) -> Result<Vec<String>> {
    let is_kept = |n: &str| COPIES.iter().any(|c| n.strip_prefix(c).is_some_and(|rest| rest.starts_with(".old.")));
    let entries = b.read_dir(&disk::folder(b)?)?;
    let mut names: Vec<String> = entries.into_iter().filter_map(|e| String::from_utf8(e.name).ok()).collect();
    names.retain(|n| is_kept(n));
    names.sort();
    Ok(names)
}
