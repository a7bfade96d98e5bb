//! `unmount`: returns when everything is written back and the daemon is gone.

use super::args::UnmountArgs;
use crate::daemon::client::Connection;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::mounts::{self, Mount};
use crate::daemon::{open, process};
use crate::fuse::Unmounter;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use std::os::fd::OwnedFd;

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::NotMounted`], [`FaultKind::Busy`]; the kernel's.
pub fn run(a: &UnmountArgs) -> Result<(), Fault> {
    let shown = a.mountpoint.display();
    let none = || Fault::new(FaultKind::NotMounted, format!("no envelopefs is mounted at {shown}"));
    let at = mounts::resolve(&a.mountpoint).map_err(|_| none())?;
    let looked = mounts::at(&at).map_err(|e| Fault::io("look for mounts at", &at, &e))?;
    let mount = looked.filter(Mount::is_ours).ok_or_else(none)?;
    let unmounter = Unmounter::new(&at);
    let fail = |e: std::io::Error| match e.raw_os_error() {
        Some(libc::EBUSY) => Fault::new(FaultKind::Busy, format!("{shown} is in use")),
        _ => Fault::io("unmount", &a.mountpoint, &e),
    };
    if mounts::is_dead(&at) {
        return unmounter.detach().map_err(fail);
    }
    let daemon = daemon_of(&mount);
    unmounter.unmount().map_err(fail)?;
    match daemon {
        Some(fd) => drop(poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)),
        // Nobody answered on the control socket; the lock is the next best sign of life.
        None => VolumeLock::wait_free(&mount.source),
    }
    Ok(())
}

/// A descriptor of the daemon's process, which the kernel makes readable when it ends.
fn daemon_of(m: &Mount) -> Option<OwnedFd> {
    let ring = open::backing(&m.source).and_then(|b| open::keyring(&b)).ok()?;
    let c = Connection::to_mount(ring.store, m.owner().unwrap_or_else(process::uid), &m.mountpoint).ok()?;
    pidfd_open(c.pid(), PidfdFlags::empty()).ok()
}
