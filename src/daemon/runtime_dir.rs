//! Where control sockets live: `/run/envelopefs` for root, `$XDG_RUNTIME_DIR/envelopefs` or `/tmp/envelopefs-UID` for
//! others. The directory is ours alone (0700), which is the first of two locks; the second is `SO_PEERCRED`.

use super::fault::{Fault, FaultKind};
use super::process;
use crate::format::ids::StoreId;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Environment variable that puts the sockets elsewhere.
pub const OVERRIDE: &str = "ENVELOPEFS_RUNTIME_DIR";

/// The socket's place for `store` in `dir`.
pub fn socket_path(dir: &Path, store: StoreId) -> PathBuf {
    dir.join(format!("{store}.sock"))
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
