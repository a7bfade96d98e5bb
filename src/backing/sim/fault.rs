//! Stopping after an operation, and failing chosen ones.

use super::SimDisk;
use std::io;

/// An operation of [`Backing`](crate::backing::Backing), for choosing which one fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    Lookup,
    Stat,
    ReadDir,
    Open,
    ReadLink,
    GetXattr,
    ListXattr,
    StatFs,
    Read,
    NextData,
    Create,
    Mkdir,
    Mknod,
    Symlink,
    Link,
    Unlink,
    Rmdir,
    Rename,
    SetMode,
    SetOwner,
    SetTimes,
    SetXattr,
    RemoveXattr,
    Write,
    Truncate,
    Allocate,
    SyncFile,
    SyncDir,
    SyncAll,
}

impl Op {
    /// Whether it changes the disk or what is durable; only those are counted.
    pub fn is_counted(self) -> bool {
        !matches!(
            self,
            Op::Lookup
                | Op::Stat
                | Op::ReadDir
                | Op::Open
                | Op::ReadLink
                | Op::GetXattr
                | Op::ListXattr
                | Op::StatFs
                | Op::Read
                | Op::NextData
        )
    }

    /// Whether it can be done and yet be told as failed.
    fn fails_late(self) -> bool {
        matches!(self, Op::Create | Op::Unlink | Op::Rename | Op::Write | Op::SyncFile | Op::SyncDir)
    }
}

/// What every operation fails with once the disk has stopped. Nothing else gives this error.
pub const STOPPED: i32 = libc::ESHUTDOWN;

/// Whether `error` says that the disk has stopped.
pub fn is_stopped(error: &io::Error) -> bool {
    error.raw_os_error() == Some(STOPPED)
}

#[derive(Debug, Clone)]
struct Fault {
    /// Any counted operation if `None`.
    op: Option<Op>,
    /// How many of them still succeed.
    after: u64,
    errno: i32,
    for_ever: bool,
    /// The operation is done, if it is one of those that [`Op::fails_late`] names.
    late: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Faults {
    operations: u64,
    stop_after: Option<u64>,
    stopped: bool,
    faults: Vec<Fault>,
    /// What the operation under way will be told to have failed with.
    late: Option<i32>,
}

/// An operation that is not to be done.
pub(super) struct Refused {
    pub(super) error: io::Error,
    /// It is the one that was under way when the disk stopped.
    pub(super) just_stopped: bool,
}

impl Faults {
    pub(super) fn operations(&self) -> u64 {
        self.operations
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped
    }

    pub(super) fn stop_after(&mut self, operations: u64) {
        self.stop_after = Some(operations);
    }

    pub(super) fn fail(&mut self, op: Option<Op>, after: u64, errno: i32, for_ever: bool) {
        self.faults.push(Fault { op, after, errno, for_ever, late: false });
    }

    pub(super) fn fail_late(&mut self, op: Option<Op>, after: u64, errno: i32) {
        self.faults.push(Fault { op, after, errno, for_ever: false, late: true });
    }

    pub(super) fn clear(&mut self) {
        self.faults.clear();
    }

    /// Counts `op` and says whether it is done.
    pub(super) fn admit(&mut self, op: Op) -> Result<(), Refused> {
        let stop = self.stop_after.is_some_and(|n| self.operations >= n);
        if self.stopped || (op.is_counted() && stop) {
            let just_stopped = !self.stopped;
            self.stopped = true;
            return Err(Refused { error: io::Error::from_raw_os_error(STOPPED), just_stopped });
        }
        self.operations += u64::from(op.is_counted());
        let mut failure = None;
        self.faults.retain_mut(|fault| {
            if fault.op.map_or(!op.is_counted(), |of| of != op) {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            match fault.late && op.fails_late() {
                true => self.late = Some(fault.errno),
                false => failure = failure.or(Some(fault.errno)),
            }
            fault.for_ever
        });
        match failure {
            Some(code) => Err(Refused { error: io::Error::from_raw_os_error(code), just_stopped: false }),
            None => Ok(()),
        }
    }

    /// What is told of the operation that [`Faults::admit`] let through and that ended with `done`.
    pub(super) fn ended<T>(&mut self, done: io::Result<T>) -> io::Result<T> {
        match self.late.take() {
            Some(code) => done.and(Err(io::Error::from_raw_os_error(code))),
            None => done,
        }
    }
}

impl SimDisk {
    /// After `after` more operations `op` (any counted operation if `None`), the next one fails with `errno` and does
    /// nothing.
    pub fn fail_next(&self, op: Option<Op>, after: u64, errno: i32) {
        self.state().faults.fail(op, after, errno, false);
    }

    /// As [`Self::fail_next`], and all that follow it, until [`Self::clear_faults`].
    pub fn fail_from(&self, op: Option<Op>, after: u64, errno: i32) {
        self.state().faults.fail(op, after, errno, true);
    }

    /// As [`Self::fail_next`], but the operation is done, if it is one that makes, writes, renames, removes or syncs a file
    /// or syncs a directory: whoever asked for it is told that it failed, as by a file server that was heard too late.
    pub fn fail_next_late(&self, op: Option<Op>, after: u64, errno: i32) {
        self.state().faults.fail_late(op, after, errno);
    }

    /// Takes back [`Self::fail_next`], [`Self::fail_next_late`] and [`Self::fail_from`].
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }
}
