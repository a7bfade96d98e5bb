//! Where control sockets live: `/run/envelopefs` for root, `$XDG_RUNTIME_DIR/envelopefs` or `/tmp/envelopefs-UID` for
//! others. The directory is ours alone (0700), which is the first of two locks; the second is `SO_PEERCRED`.

use super::fault::{Fault, FaultKind};
use super::process;
use crate::crypto::kdf::sha256;
use crate::format::ids::StoreId;
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Environment variable that puts the sockets elsewhere.
pub const OVERRIDE: &str = "ENVELOPEFS_RUNTIME_DIR";

/// The place in `dir` of the socket of the daemon that has `store` alone.
pub fn socket_path(dir: &Path, store: StoreId) -> PathBuf {
    dir.join(format!("{store}.sock"))
}

/// The place in `dir` of the socket of the daemon that has `store` mounted read-only at `mountpoint`: there can be several.
pub fn shared_socket_path(dir: &Path, store: StoreId, mountpoint: &Path) -> PathBuf {
    let hash = sha256(mountpoint.as_os_str().as_bytes());
    let tag: String = hash.iter().take(8).map(|b| format!("{b:02x}")).collect();
    dir.join(format!("{store}-{tag}.sock"))
}

/// All sockets of daemons that have `store` mounted read-only, as far as `dir` may be looked into. Nobody may be left there.
pub fn shared_sockets(dir: &Path, store: StoreId) -> Vec<PathBuf> {
    let begins = format!("{store}-");
    let ours = |p: &PathBuf| p.file_name().is_some_and(|n| n.as_bytes().starts_with(begins.as_bytes()));
    let mut found: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    found.retain(ours);
    found.sort();
    found
}

/// The right to take a mount point and to make a socket in the runtime directory `dir`, for one process of this user at a
/// time: mounts that share a store are kept apart by nothing else. Waits for it; dropping it lets go.
///
/// # Errors
/// The kernel's.
pub fn turn(dir: &Path) -> Result<File, Fault> {
    let fail = |e: io::Error| Fault::io("lock the runtime directory", dir, &e);
    let held = File::open(dir).map_err(fail)?;
    flock(&held, FlockOperation::LockExclusive).map_err(|e| fail(e.into()))?;
    Ok(held)
}

/// This user's runtime directory, made if it is not there.
///
/// # Errors
/// [`FaultKind::Denied`] if it belongs to somebody else or is open to others: then it is not safe to use.
pub fn make() -> Result<PathBuf, Fault> {
    let dir = place(process::uid());
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(Fault::io("make the runtime directory", &dir, &e)),
    }
    check(&dir, process::uid())?;
    Ok(dir)
}

/// Directories in which the socket of a daemon run by `owner` may be, best first.
pub fn candidates(owner: u32) -> Vec<PathBuf> {
    let me = process::uid();
    let mut dirs = vec![place(me)];
    if owner != me {
        dirs.push(default_place(owner, None));
        dirs.push(PathBuf::from(format!("/run/user/{owner}/envelopefs")));
        dirs.push(PathBuf::from(format!("/tmp/envelopefs-{owner}")));
    }
    dirs.dedup();
    dirs
}

/// Whether `dir` is a real directory of `owner` (or root) that nobody else can write to.
///
/// # Errors
/// [`FaultKind::Denied`], with the reason.
pub fn check(dir: &Path, owner: u32) -> Result<(), Fault> {
    let m = std::fs::symlink_metadata(dir).map_err(|e| Fault::io("look at the runtime directory", dir, &e))?;
    let refuse = |why: &str| Err(Fault::new(FaultKind::Denied, format!("runtime directory {} {why}", dir.display())));
    if !m.is_dir() {
        return refuse("is not a directory");
    }
    if m.uid() != owner {
        return refuse("belongs to another user");
    }
    if m.mode() & 0o077 != 0 {
        return refuse("is open to other users; its mode must be 0700");
    }
    Ok(())
}

fn place(uid: u32) -> PathBuf {
    match std::env::var_os(OVERRIDE) {
        Some(d) if !d.is_empty() => PathBuf::from(d),
        _ => default_place(uid, std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)),
    }
}

fn default_place(uid: u32, xdg: Option<PathBuf>) -> PathBuf {
    match (uid, xdg) {
        (0, _) => PathBuf::from("/run/envelopefs"),
        (_, Some(d)) if d.is_absolute() => d.join("envelopefs"),
        (uid, _) => PathBuf::from(format!("/tmp/envelopefs-{uid}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn places_by_user() {
        assert_eq!(default_place(0, Some("/x".into())), Path::new("/run/envelopefs"));
        assert_eq!(default_place(7, Some("/run/user/7".into())), Path::new("/run/user/7/envelopefs"));
        assert_eq!(default_place(7, Some("relative".into())), Path::new("/tmp/envelopefs-7"));
        assert_eq!(default_place(7, None), Path::new("/tmp/envelopefs-7"));
    }

    #[test]
    fn mounts_that_share_a_store_have_sockets_of_their_own() {
        let d = tempfile::tempdir().unwrap();
        let (store, other) = (StoreId([1; 16]), StoreId([2; 16]));
        let at = |s, m: &str| shared_socket_path(d.path(), s, Path::new(m));
        let mut all = vec![at(store, "/a"), at(store, "/b")];
        for p in all.iter().chain([&at(other, "/a"), &socket_path(d.path(), store)]) {
            std::fs::write(p, "").unwrap();
        }
        all.sort();
        assert_eq!(shared_sockets(d.path(), store), all);
        assert_eq!(shared_sockets(&d.path().join("none"), store), Vec::<PathBuf>::new());
    }

    #[test]
    fn an_open_or_foreign_directory_is_refused() {
        let d = tempfile::tempdir().unwrap();
        let uid = process::uid();
        std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        check(d.path(), uid).unwrap();
        assert!(check(d.path(), uid + 1).is_err());
        std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
        assert!(check(d.path(), uid).unwrap_err().message.contains("0700"));
        let link = d.path().join("link");
        std::os::unix::fs::symlink("/run", &link).unwrap();
        assert!(check(&link, uid).is_err());
    }
}
