//! Mounting and unmounting: mount(2) where we may, else the setuid helper fusermount3.
//!
//! Done here and not by fuser, because fuser turns away, by user id, requests that the kernel has let through, and the
//! kernel writes back times as root: with its check, an unprivileged mount would lose mtimes. A session over a device
//! that we opened has no such check.

use std::ffi::{CString, OsStr, OsString};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::options::{MountOptions, Parsed, escaped};

/// Second half of the type in `/proc/mounts`.
const SUBTYPE: &str = "envelopefs";
const HELPERS: [&str; 4] =
    ["/usr/bin/fusermount3", "/bin/fusermount3", "/usr/local/bin/fusermount3", "/sbin/fusermount3"];

/// Mounts; returns the FUSE device that speaks for the mount.
///
/// # Errors
/// Those of open(2) on `/dev/fuse` and mount(2), or what fusermount3 says.
pub(super) fn mount(at: &Path, o: &MountOptions, p: &Parsed) -> io::Result<OwnedFd> {
    match by_syscall(at, o, p) {
        // Not allowed to mount, or not to open the device: the helper may be.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => by_helper(at, o, p),
        done => done,
    }
}

fn by_syscall(at: &Path, o: &MountOptions, p: &Parsed) -> io::Result<OwnedFd> {
    let device = rustix::fs::open(c"/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let root_mode = rustix::fs::stat(at)?.st_mode & libc::S_IFMT;
    let mut data = format!(
        "fd={},rootmode={root_mode:o},user_id={},group_id={},subtype={SUBTYPE},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if p.allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data)?;
    rustix::mount::mount(o.fs_name.as_str(), at, c"fuse", p.flags, data.as_c_str())?;
    Ok(device)
}

fn by_helper(at: &Path, o: &MountOptions, p: &Parsed) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut list = format!("fsname={},subtype={SUBTYPE},default_permissions", escaped(&o.fs_name));
    if p.allow_other {
        list.push_str(",allow_other");
    }
    for word in &p.words {
        list.push(',');
        list.push_str(word);
    }
    // The helper's end of the socket is its standard input: no descriptor has to be made inheritable in this process.
    let child = Command::new(helper()?)
        .args([OsStr::new("-o"), list.as_ref(), OsStr::new("--"), at.as_os_str()])
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let device = receive_device(&ours);
    let output = child.wait_with_output()?;
    device?.ok_or_else(|| io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// The descriptor that the helper sends; `None` if it sent none, having said why on its standard error.
fn receive_device(from: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    rustix::net::recvmsg(from.as_fd(), &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(Some(fd));
        }
    }
    Ok(None)
}

fn helper() -> io::Result<PathBuf> {
    let in_path = std::env::var_os("PATH").map(|p| std::env::split_paths(&p).map(|d| d.join("fusermount3")).collect());
    let in_path: Vec<PathBuf> = in_path.unwrap_or_default();
    let candidates = in_path.into_iter().chain(HELPERS.iter().map(PathBuf::from));
    candidates.into_iter().find(|p| p.is_file()).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "fusermount3 is not installed, and without it only root may mount (on Debian: apt-get install fuse3)",
        )
    })
}

/// Unmounts. `lazily`: even if it is in use; it goes away when the last user does.
///
/// # Errors
/// `EBUSY` if it is in use and `lazily` is not asked for; `EINVAL` if nothing is mounted there.
pub(super) fn unmount(at: &Path, lazily: bool) -> io::Result<()> {
    let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(at, flags | UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::PERM) => unmount_by_helper(at, lazily),
        done => Ok(done?),
    }
}

fn unmount_by_helper(at: &Path, lazily: bool) -> io::Result<()> {
    // Not "-q": what it says is how "in use" is told from the rest.
    let mut args: Vec<OsString> = vec!["-u".into()];
    if lazily {
        args.push("-z".into());
    }
    args.extend(["--".into(), at.as_os_str().to_owned()]);
    let output = Command::new(helper()?).args(args).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let busy = said.contains("busy");
    Err(if busy { io::Error::from_raw_os_error(libc::EBUSY) } else { io::Error::other(said) })
}

/// The mount point's absolute path without symbolic links, looked at before anything is mounted there.
///
/// # Errors
/// Those of realpath(3); `NotADirectory`; `ENOTCONN` said in words if a dead mount is in the way.
pub(super) fn resolve(at: &Path) -> io::Result<PathBuf> {
    let explain = |e: io::Error| match e.raw_os_error() {
        Some(libc::ENOTCONN) => io::Error::new(
            e.kind(),
            format!("a mount whose daemon has died is at {}; unmount it first: umount {}", at.display(), at.display()),
        ),
        _ => e,
    };
    let path = at.canonicalize().map_err(explain)?;
    if !path.metadata().map_err(explain)?.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
    }
    debug_assert!(path.as_os_str().as_bytes().first() == Some(&b'/'));
    Ok(path)
}
