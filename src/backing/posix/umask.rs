//! The umask of the calling thread.
//!
//! The kernel must see the caller's umask itself: only it knows that a directory with a default ACL ignores it. A
//! process has one umask for all threads, unless a thread leaves the shared `fs_struct`: `unshare(CLONE_FS)`, once a
//! thread. Where that is refused (a seccomp filter), the mask is applied to the mode instead, which differs from the
//! kernel only below a default ACL.
//!
//! A thread that has been here keeps the last mask it asked for, and so do threads and child processes it starts.

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::thread::{UnshareFlags, unshare_unsafe};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Untried,
    Refused,
    Mask(u32),
}

thread_local! {
    static OWN: Cell<Own> = const { Cell::new(Own::Untried) };
}

/// Makes `umask` hold for what this thread creates next, and returns the mode to create it with.
pub(super) fn apply(mode: u32, umask: u32) -> Mode {
    let umask = umask & 0o777;
    let mode = mode & 0o7777;
    OWN.with(|own| {
        if own.get() == Own::Untried {
            // SAFETY: CLONE_FS gives this thread its own copy of working directory, root and umask, none of which any
            // other code relies on being shared with it; no file descriptor or memory is unshared.
            let unshared = unsafe { unshare_unsafe(UnshareFlags::FS) };
            own.set(if unshared.is_err() { Own::Refused } else { set(umask) });
        }
        match own.get() {
            Own::Refused | Own::Untried => Mode::from_raw_mode(mode & !umask),
            Own::Mask(now) => {
                if now != umask {
                    own.set(set(umask));
                }
                Mode::from_raw_mode(mode)
            }
        }
    })
}

fn set(umask: u32) -> Own {
    rustix::process::umask(Mode::from_raw_mode(umask));
    Own::Mask(umask)
}
