//! `key export` and `key import`: a copy of the keyring outside of the store, and back.

use super::args::OpenKeys;
use super::config::Config;
use super::place::Place;
use super::{audit, output, root_keys};
use crate::daemon::fault::{Fault, FaultKind, plain};
use crate::daemon::lock::VolumeLock;
use crate::daemon::observed::Observed;
use crate::daemon::{mounts, open};
use crate::format::damage::Damage;
use crate::format::ids::StoreId;
use crate::format::keyring::{KEYRING_MAX, KekRecord, KekState, Keyring};
use crate::kms::ConnectOptions;
use crate::kms::event::StoreChange;
use crate::rotation::{Staged, shares};
use crate::store::keys::{Exported, FOLDER, Keys};
use rustix::fs::RenameFlags;
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// `key export --json`. Stable.
#[derive(Debug, Serialize)]
struct Export {
    store: StoreId,
    generation: u64,
    file: String,
}

/// `key import --json`. Stable.
#[derive(Debug, Serialize)]
struct Import {
    store: StoreId,
    /// Generation of the copy.
    imported: u64,
    /// Generation of the keyring that it is now.
    generation: u64,
    /// What was there before, by names in the backing directory.
    kept: Vec<String>,
}

/// The file that a copy of the keyring goes to.
pub struct ExportFile {
    /// The directory it lies in.
    dir: PathBuf,
    file: PathBuf,
    replace: Replace,
    /// The keyring as it was before anything was done.
    before: Keyring,
}

/// What has the name already, and a copy may take the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replace {
    Nothing,
    /// A copy of this store's keyring.
    Copy,
    Anything,
}

impl ExportFile {
    /// Looks whether a copy of the keyring of the store at `place` may be written to `file`.
    ///
    /// # Errors
    /// [`FaultKind::Usage`] if `file` would lie in the store; those of [`ExportFile::look`].
    fn find(place: &Place, file: &Path, replace: Replace) -> Result<Self, Fault> {
        let dir = parent(file)?;
        let inside = [Some(&place.backing), place.mount.as_ref().map(|m| &m.mountpoint)];
        if inside
            .into_iter()
            .flatten()
            .any(|own| dir.starts_with(fs::canonicalize(own).unwrap_or_else(|_| own.clone())))
        {
            let text = format!("{} would lie in the store, and be lost with it: name a place outside", file.display());
            return Err(Fault::new(FaultKind::Usage, text));
        }
        let target = Self { dir, file: file.to_path_buf(), replace, before: place.keyring.clone() };
        target.look(&place.keyring)?;
        Ok(target)
    }

    /// For `rotate --export`: what is there may be replaced if it is a copy of this store's keyring.
    ///
    /// # Errors
    /// As `key export`'s.
    pub fn of_rotation(place: &Place, file: &Path) -> Result<Self, Fault> {
        Self::find(place, file, Replace::Copy)
    }

    /// Looks at what is there, if anything is, and whether a copy of `present` may take its place. Says if something is.
    ///
    /// # Errors
    /// That it is there, and must not be replaced by what was asked for; that it is a copy of this store's keyring, and
    /// replacing it would lose keys.
    fn look(&self, present: &Keyring) -> Result<bool, Fault> {
        let target = self.path()?;
        let Ok(there) = target.symlink_metadata() else { return Ok(false) };
        let ring = Some(there).filter(|m| m.is_file()).and_then(|_| Keyring::decode(&read(&target).ok()?).ok());
        match (self.replace, ring.map(|d| d.keyring).filter(|r| r.store == present.store)) {
            (Replace::Nothing, _) | (Replace::Copy, None) => Err(self.failed(&io::ErrorKind::AlreadyExists.into())),
            (Replace::Anything, None) => Ok(true),
            (_, Some(ring)) => match lost_without(&ring, &self.before, present) {
                None => Ok(true),
                Some(why) => Err(Fault::new(
                    FaultKind::Other,
                    format!(
                        "{} is a copy of this store's keyring that {why}, and may be the last one: nothing was written; \
                         move it away, or put it back with key import",
                        self.file.display()
                    ),
                )),
            },
        }
    }

    /// Puts a copy of the keyring there, before a rotation that begins with `staged` goes on.
    ///
    /// # Errors
    /// The keyring's and the kernel's, and that the new KEK is not in what lies on disk. It was not made active then.
    pub fn take(&self, place: &Place, staged: Staged) -> Result<(), Fault> {
        let new = match staged {
            Staged::NotDue(_) => return Ok(()),
            Staged::Resume(_) => None,
            Staged::New(id) => Some(id),
        };
        let written = copy(place).and_then(|copy| match new {
            Some(id) if copy.keyring.pending().is_none_or(|k| k.id != id) => {
                Err(Fault::new(FaultKind::Other, format!("KEK {id} is not in the keyring on disk")))
            }
            _ => self.write(&copy),
        });
        written.map_err(|f| match new {
            Some(_) => Fault {
                message: format!("{}; the new KEK was not made active, and no file was touched", f.message),
                ..f
            },
            None => f,
        })
    }

    fn path(&self) -> Result<PathBuf, Fault> {
        let name = self.file.file_name().ok_or_else(|| self.failed(&io::ErrorKind::IsADirectory.into()))?;
        Ok(self.dir.join(name))
    }

    fn failed(&self, e: &io::Error) -> Fault {
        match e.kind() {
            io::ErrorKind::AlreadyExists => {
                let why = match self.replace {
                    // `rotate` has no --force: that would replace a KEK's last copy, too, by a slip.
                    Replace::Copy => ", and is no copy of this store's keyring; nothing was written; name another file",
                    Replace::Nothing | Replace::Anything => " already; nothing was written; --force replaces it",
                };
                Fault::new(FaultKind::Other, format!("{} is there{why}", self.file.display()))
            }
            _ => Fault::io("write", &self.file, e),
        }
    }

    /// Writes it, whole and durable or not at all.
    fn write(&self, copy: &Exported) -> Result<(), Fault> {
        let target = self.path()?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let temp = self.dir.join(format!(".{name}.{}", std::process::id()));
        let written = (|| {
            let mut f = File::options().write(true).create_new(true).mode(0o600).open(&temp)?;
            f.write_all(&copy.bytes)?;
            f.sync_all()
        })();
        // Somebody may have put something there since it was looked at first.
        let placed = written.map_err(|e| self.failed(&e)).and_then(|()| {
            let renamed = match self.look(&copy.keyring)? {
                true => fs::rename(&temp, &target),
                false => rename_to_new(&temp, &target),
            };
            renamed.map_err(|e| self.failed(&e))
        });
        if let Err(f) = placed {
            // One that this call made, or could not make.
            let _ = fs::remove_file(&temp);
            return Err(f);
        }
        File::open(&self.dir).and_then(|d| d.sync_all()).map_err(|e| self.failed(&e))
    }
}

/// What only the copy `there` has, and would be lost if one of the keyring `present` took its place; `None` if nothing. A KEK that was
/// pending in the copy and in the keyring `before` this rotation, and was discarded by it, is no loss.
fn lost_without(there: &Keyring, before: &Keyring, present: &Keyring) -> Option<String> {
    let was_pending = |k: &KekRecord| k.state == KekState::Pending && before.pending().is_some_and(|p| p.id == k.id);
    let is_known = |k: &KekRecord| k.state == KekState::Destroyed || present.kek(k.id).is_some() || was_pending(k);
    let unknown = there.keks.iter().find(|k| !is_known(k));
    match unknown {
        Some(k) => Some(format!("holds KEK {}, which the present one does not know", k.id)),
        None if there.generation > present.generation => {
            Some(format!("is of generation {}, and the present one only of {}", there.generation, present.generation))
        }
        None => None,
    }
}

/// The keyring as it lies on disk; a damaged copy is told.
fn copy(place: &Place) -> Result<Exported, Fault> {
    let copy = Keys::export(&place.posix).map_err(|e| Fault::store(&place.backing, &e))?;
    for (name, d) in &copy.damaged {
        eprintln!("envelopefs: {name} cannot be used ({d}); the other copy was taken");
    }
    Ok(copy)
}

/// Writes a copy of the keyring to `file`.
///
/// # Errors
/// [`FaultKind::Usage`] if `file` would lie in the store; that it is there, and `force` is not given, or is a copy of this
/// keyring that holds more; the keyring's and the kernel's.
pub fn export(place: &Place, file: &Path, force: bool, json: bool) -> Result<(), Fault> {
    let replace = if force { Replace::Anything } else { Replace::Nothing };
    let target = ExportFile::find(place, file, replace)?;
    let copy = copy(place)?;
    target.write(&copy)?;
    let (store, generation, file) = (copy.keyring.store, copy.keyring.generation, file.display());
    if json {
        return output::print_json(&Export { store, generation, file: file.to_string() });
    }
    output::print(&format!("wrote the keyring of store {store}, generation {generation}, to {file}\n"))
}

/// The directory that `file` is to lie in.
fn parent(file: &Path) -> Result<PathBuf, Fault> {
    let dir = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::canonicalize(dir).map_err(|e| Fault::io("open", dir, &e))
}

/// Renames, unless something is there. A file system that cannot promise that was looked at just before.
fn rename_to_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => fs::rename(from, to),
        other => Ok(other?),
    }
}

/// Puts the keyring in `file` into the store at `backing`.
///
/// # Errors
/// [`FaultKind::Locked`] if the store is mounted; root keys; why it was refused; the store's.
pub fn import(backing: &Path, file: &Path, force: bool, json: bool, old: &OpenKeys) -> Result<(), Fault> {
    let bytes = read(file)?;
    let ring = Keyring::decode(&bytes)
        .map_err(|d| match d {
            Damage::KeyringUnreadable => "it is no keyring, or a damaged one".to_owned(),
            d => d.to_string(),
        })
        .map_err(|why| Fault::new(FaultKind::Other, format!("{} cannot be imported: {why}", file.display())))?
        .keyring;
    let shown = backing.display();
    // As the configuration names it; what is not there is told by the next step.
    let backing = &fs::canonicalize(backing).unwrap_or_else(|_| backing.to_path_buf());
    let b = open::backing(backing)?;
    let _lock = lock(backing)?;
    let config = Config::load(old.access.config.as_deref())?;
    let observed = Observed::start(audit::options_of(&config, backing)?.as_ref(), ring.store)?;
    let recovery = root_keys::recovery_source(&old.recovery);
    let connect = ConnectOptions { recovery, ..root_keys::connect_with(&old.access, &config) };
    let roots = open::root_keys(&old.open_keys, &ring, &observed.connect(&connect))?;
    let done = Keys::import(&b, &bytes, &roots, force, shares::forget)
        .map_err(|e| Fault::store(backing, &e))
        .inspect_err(|f| observed.refused(StoreChange::KeyringImport.as_str(), backing, f))?;
    observed.opened(&done.keys);
    open::warnings(&done.keys, &connect).iter().for_each(|w| eprintln!("envelopefs: {w}"));
    observed.tell(StoreChange::KeyringImport, &format!("generation {} from {}", done.generation, file.display()));
    observed.end();
    let now = done.keys.snapshot();
    let kept: Vec<String> =
        done.kept.iter().map(|name| format!("{}/{name}", String::from_utf8_lossy(FOLDER))).collect();
    if json {
        let (store, generation) = (now.store, now.generation);
        return output::print_json(&Import { store, imported: done.generation, generation, kept });
    }
    let mut text = format!(
        "imported the keyring of store {}, generation {}, as generation {}\n",
        now.store, done.generation, now.generation
    );
    for name in &kept {
        text += &format!("kept what was there as {name}\n");
    }
    output::print(&text)?;
    eprintln!("envelopefs: look whether every file opens with it: envelopefs check {shown}");
    Ok(())
}

/// The lock of the store at `backing`; `None` if its folder is lost, and with it the lock's file.
fn lock(backing: &Path) -> Result<Option<VolumeLock>, Fault> {
    match VolumeLock::take(backing, "key import") {
        Err(f) if f.kind == FaultKind::NotAStore => {}
        taken => return taken.map(Some),
    }
    // Taken away below a daemon that goes on.
    match mounts::of_backing(backing).map_err(|e| Fault::io("look for mounts of", backing, &e))? {
        Some(m) => {
            let text = format!("store {} is mounted at {}", backing.display(), m.mountpoint.display());
            Err(Fault::new(FaultKind::Locked, text))
        }
        None => Ok(None),
    }
}

/// The bytes of a file, if it is not longer than a keyring can be.
fn read(file: &Path) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    let most = KEYRING_MAX as u64 + 1;
    let n = File::open(file)
        .and_then(|f| f.take(most).read_to_end(&mut bytes))
        .map_err(|e| Fault::new(FaultKind::Other, format!("cannot read {}: {}", file.display(), plain(&e))))?;
    match n > KEYRING_MAX {
        true => Err(Fault::new(FaultKind::Other, format!("{} is too long for a keyring", file.display()))),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::KekId;
    use crate::format::keyring::KekKind;
    use crate::format::lifecycle::LifeCycle;

    fn ring(generation: u64, keks: &[(u8, KekState)]) -> Keyring {
        let record = |(id, state): &(u8, KekState)| KekRecord {
            id: KekId([*id; 16]),
            kind: KekKind::Sealed,
            state: *state,
            created: 1,
            activated: 1,
            retired: 1,
            unused: 1,
            destroyed: 1,
            provider: None,
            wraps: Vec::new(),
        };
        Keyring {
            store: StoreId([7; 16]),
            generation,
            incompat: 0,
            ro_compat: 0,
            roots: Vec::new(),
            secret: Vec::new(),
            keks: keks.iter().map(record).collect(),
            life: LifeCycle::default(),
        }
    }

    #[test]
    fn a_copy_is_replaced_only_by_one_that_holds_all_that_it_does() {
        use KekState::{Active, Destroyed, Pending, Retired};
        let present = ring(5, &[(1, Destroyed), (2, Active)]);
        for (there, lost) in [
            (ring(4, &[(1, Active)]), false),
            (ring(5, &[(1, Retired), (2, Active)]), false),
            (ring(4, &[(1, Active), (3, Pending)]), true),
            (ring(4, &[(1, Retired), (3, Active)]), true),
            (ring(4, &[(1, Retired), (2, Active), (3, Destroyed)]), false),
            (ring(6, &[(1, Active)]), true),
        ] {
            assert_eq!(lost_without(&there, &present, &present).is_some(), lost, "{there:?}");
        }
        // A run with --export that was killed before its KEK was active: the next one discards it.
        let before = ring(4, &[(1, Active), (3, Pending)]);
        let present = ring(6, &[(1, Active), (4, Pending)]);
        assert_eq!(lost_without(&before, &before, &present), None);
        // It was active once, whatever the keyring below says since.
        assert!(lost_without(&ring(4, &[(1, Retired), (3, Active)]), &before, &present).is_some());
    }
}
