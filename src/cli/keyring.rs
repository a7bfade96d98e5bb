//! `key export` and `key import`: a copy of the keyring outside of the store, and back.

use super::args::OpenKeys;
use super::config::Config;
use super::place::Place;
use super::{audit, output, root_keys};
use crate::daemon::fault::{Fault, FaultKind, plain};
use crate::daemon::lock::VolumeLock;
use crate::daemon::observed::Observed;
use crate::daemon::open;
use crate::format::damage::Damage;
use crate::format::ids::StoreId;
use crate::format::keyring::{KEYRING_MAX, Keyring};
use crate::kms::ConnectOptions;
use crate::kms::event::StoreChange;
use crate::store::keys::{FOLDER, Keys};
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

/// Writes a copy of the keyring to `file`.
///
/// # Errors
/// [`FaultKind::Usage`] if `file` would lie in the store; [`FaultKind::NotEmpty`] if it is there and `force` is not
/// given; the keyring's and the kernel's.
pub fn export(place: &Place, file: &Path, force: bool, json: bool) -> Result<(), Fault> {
    let dir = parent(file)?;
    let inside = [Some(&place.backing), place.mount.as_ref().map(|m| &m.mountpoint)];
    if inside.into_iter().flatten().any(|own| dir.starts_with(fs::canonicalize(own).unwrap_or_else(|_| own.clone()))) {
        let text = format!("{} would lie in the store, and be lost with it: name a place outside", file.display());
        return Err(Fault::new(FaultKind::Usage, text));
    }
    let copy = Keys::export(&place.posix).map_err(|e| Fault::store(&place.backing, &e))?;
    for (name, d) in &copy.damaged {
        eprintln!("envelopefs: {name} cannot be used ({d}); the other copy was taken");
    }
    write(&dir, file, &copy.bytes, force)?;
    let ring = copy.keyring;
    if json {
        let file = file.display().to_string();
        return output::print_json(&Export { store: ring.store, generation: ring.generation, file });
    }
    output::print(&format!(
        "wrote the keyring of store {}, generation {}, to {}\n",
        ring.store,
        ring.generation,
        file.display()
    ))
}

/// The directory that `file` is to lie in.
fn parent(file: &Path) -> Result<PathBuf, Fault> {
    let dir = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::canonicalize(dir).map_err(|e| Fault::io("open", dir, &e))
}

/// Writes `file` in `dir`, whole and durable or not at all.
fn write(dir: &Path, file: &Path, bytes: &[u8], force: bool) -> Result<(), Fault> {
    let fail = |e: &io::Error| match e.kind() {
        io::ErrorKind::AlreadyExists => Fault::new(
            FaultKind::Other,
            format!("{} is there already; nothing was written; --force replaces it", file.display()),
        ),
        _ => Fault::io("write", file, e),
    };
    let name = file.file_name().ok_or_else(|| fail(&io::ErrorKind::IsADirectory.into()))?;
    let target = dir.join(name);
    if !force && target.symlink_metadata().is_ok() {
        return Err(fail(&io::ErrorKind::AlreadyExists.into()));
    }
    let temp = dir.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let written = (|| {
        let mut f = File::options().write(true).create_new(true).mode(0o600).open(&temp)?;
        f.write_all(bytes)?;
        f.sync_all()
    })();
    let placed = written.and_then(|()| if force { fs::rename(&temp, &target) } else { rename_to_new(&temp, &target) });
    if let Err(e) = placed {
        // One that this call made, or could not make.
        let _ = fs::remove_file(&temp);
        return Err(fail(&e));
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| fail(&e))
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
    let _lock = VolumeLock::take(backing, "key import")?;
    let config = Config::load(old.access.config.as_deref())?;
    let observed = Observed::start(audit::options_of(&config, backing)?.as_ref(), ring.store)?;
    let recovery = root_keys::recovery_source(&old.recovery);
    let connect = ConnectOptions { recovery, ..root_keys::connect_with(&old.access, &config) };
    let roots = open::root_keys(&old.open_keys, &ring, &observed.connect(&connect))?;
    let done = Keys::import(&b, &bytes, &roots, force)
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
