//! What is mounted where, from `/proc/self/mountinfo`; never touches the mounts themselves, so a dead one cannot hang it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The file system type of our mounts.
pub const FS_TYPE: &str = "fuse.envelopefs";

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Device number, `major:minor`: one for each daemon, whatever bind mounts of it there are.
    pub device: String,
    /// What of its file system is mounted: `/` but for bind mounts.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// File system type with its subtype, such as `fuse.envelopefs`.
    pub fs_type: String,
    /// What is mounted: for ours, the backing directory.
    pub source: PathBuf,
    /// Mount options, then super block options.
    pub options: Vec<String>,
}

impl Mount {
    /// Whether it is an envelopefs mount.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }

    /// `path`, which lies below the mount point, from the root of the file system.
    pub fn from_root(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix(&self.mountpoint).unwrap_or(path);
        self.root.strip_prefix("/").unwrap_or(&self.root).join(below)
    }

    /// The user who mounted it, from the FUSE option `user_id=`.
    pub fn owner(&self) -> Option<u32> {
        self.options.iter().find_map(|o| o.strip_prefix("user_id=")).and_then(|v| v.parse().ok())
    }
}

/// All mounts of this process's namespace, oldest first.
///
/// # Errors
/// That `/proc/self/mountinfo` cannot be read.
pub fn list() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount exactly at `mountpoint`, which must be absolute and free of symbolic links.
///
/// # Errors
/// As [`list`].
pub fn at(mountpoint: &Path) -> io::Result<Option<Mount>> {
    Ok(list()?.into_iter().rfind(|m| m.mountpoint == mountpoint))
}

/// Our newest mount of the backing directory `backing` (absolute, free of symbolic links).
///
/// # Errors
/// As [`list`].
pub fn of_backing(backing: &Path) -> io::Result<Option<Mount>> {
    Ok(all_of(backing)?.pop())
}

/// All our mounts of the backing directory `backing`, oldest first. One that can be written is alone, but for bind mounts.
///
/// # Errors
/// As [`list`].
pub fn all_of(backing: &Path) -> io::Result<Vec<Mount>> {
    Ok(list()?.into_iter().filter(|m| m.is_ours() && m.source == backing).collect())
}

/// Whether what is mounted at `mountpoint` is a FUSE mount whose daemon has died. Asked with statfs(2), which the kernel
/// never answers from its caches, as it does stat(2).
pub fn is_dead(mountpoint: &Path) -> bool {
    matches!(rustix::fs::statfs(mountpoint), Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED))
}

/// `path` made absolute with its parent's symbolic links resolved, without looking at `path` itself if that fails: a dead
/// mount point cannot be resolved, but its parent can.
///
/// # Errors
/// That neither `path` nor its parent exists.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    match std::fs::canonicalize(path) {
        Ok(p) => Ok(p),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(e),
        Err(e) => {
            let absolute = std::path::absolute(path)?;
            match (absolute.parent(), absolute.file_name()) {
                (Some(parent), Some(name)) => Ok(std::fs::canonicalize(parent)?.join(name)),
                _ => Err(e),
            }
        }
    }
}

/// Parses mountinfo; lines that make no sense are left out.
fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let device = String::from_utf8_lossy(fields.nth(2)?).into_owned();
    let root = path(fields.next()?);
    let mountpoint = path(fields.next()?);
    let mut options = list_of(fields.next()?);
    let mut after = fields.skip_while(|f| *f != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(after.next()?).into_owned();
    let source = path(after.next()?);
    options.extend(list_of(after.next().unwrap_or_default()));
    Some(Mount { device, root, mountpoint, fs_type, source, options })
}

fn list_of(field: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(field).split(',').map(str::to_string).collect()
}

/// Undoes the kernel's octal escapes of space, tab, newline, backslash and `#`.
fn path(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&b, tail)) = rest.split_first() {
        let octal = tail.first_chunk::<3>().filter(|d| b == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match octal {
            Some([a, b, c]) => {
                let v = u32::from(a - b'0') * 64 + u32::from(b - b'0') * 8 + u32::from(c - b'0');
                out.push(v as u8);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(b);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Whether one of two resolved paths lies inside the other, or they are the same.
pub fn overlap(a: &Path, b: &Path) -> bool {
    debug_assert!(!a.as_os_str().as_bytes().is_empty() && !b.as_os_str().as_bytes().is_empty());
    a.starts_with(b) || b.starts_with(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
23 28 0:21 / /proc rw,nosuid shared:13 - proc proc rw
90 28 0:52 / /mnt/a\\040b rw,nosuid,nodev,relatime shared:1 master:2 - fuse.envelopefs /srv/x\\134y rw,user_id=1000,group_id=0,allow_other
91 28 0:53 /d\\040e /mnt/c ro - fuse.other /srv/x ro
garbage
92 28";

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let m = parse(TEXT.as_bytes());
        assert_eq!(m.len(), 3);
        assert_eq!(m[1].mountpoint, Path::new("/mnt/a b"));
        assert_eq!(m[1].source, Path::new("/srv/x\\y"));
        assert!(m[1].is_ours() && !m[2].is_ours());
        assert_eq!(m[1].device, "0:52");
        assert_eq!(m[1].owner(), Some(1000));
        assert_eq!(m[0].owner(), None);
        assert_eq!(m[2].options, ["ro", "ro"]);
        assert_eq!(m[1].from_root(Path::new("/mnt/a b/x/y")), Path::new("x/y"));
        assert_eq!(m[2].from_root(Path::new("/mnt/c/x")), Path::new("d e/x"));
        assert_eq!(m[2].from_root(Path::new("/mnt/c")), Path::new("d e"));
    }

    #[test]
    fn the_kernel_lists_its_own_mounts() {
        assert!(list().unwrap().iter().any(|m| m.mountpoint == Path::new("/")));
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().fs_type, "proc");
    }

    #[test]
    fn overlap_is_by_component() {
        assert!(overlap(Path::new("/a/b"), Path::new("/a")));
        assert!(overlap(Path::new("/a"), Path::new("/a")));
        assert!(!overlap(Path::new("/a/bc"), Path::new("/a/b")));
    }
}
