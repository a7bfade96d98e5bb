//! The readiness pipe: the background daemon tells the process that started it, once, that the mount answers, or why
//! there is none. The end of the pipe without a word means the daemon died.

use super::fault::{Fault, FaultKind};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// What goes over the pipe.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Ready,
    Failed(Fault),
}

/// The daemon's end.
#[derive(Debug)]
pub struct Sender(Option<File>);

impl Sender {
    /// The end inherited as descriptor `fd`; `None` if that is not an open descriptor above the standard ones.
    pub fn inherited(fd: RawFd) -> Option<Self> {
        if fd <= 2 {
            return None;
        }
        // SAFETY: F_SETFD on a number is harmless; it fails if nothing is open there.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return None;
        }
        // SAFETY: the descriptor is open (checked above), and the starter left it to this process alone.
        Some(Self(Some(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))))
    }

    /// Nobody waits.
    pub fn none() -> Self {
        Self(None)
    }

    /// The mount answers.
    pub fn ready(&mut self) {
        self.say(&Word::Ready);
    }

    /// There will be no mount.
    pub fn failed(&mut self, why: &Fault) {
        self.say(&Word::Failed(why.clone()));
    }

    /// A starter that has gone away is no reason to stop.
    fn say(&mut self, w: &Word) {
        if let (Some(mut f), Ok(text)) = (self.0.take(), serde_json::to_vec(w)) {
            let _ = f.write_all(&text);
        }
    }
}

/// Waits for the daemon's word on `pipe`.
///
/// # Errors
/// The daemon's own fault, or [`FaultKind::Daemon`] if it died without a word.
pub fn wait(pipe: OwnedFd) -> Result<(), Fault> {
    let mut text = Vec::new();
    let read = File::from(pipe).take(64 * 1024).read_to_end(&mut text);
    match (read, serde_json::from_slice(&text)) {
        (Ok(_), Ok(Word::Ready)) => Ok(()),
        (Ok(_), Ok(Word::Failed(f))) => Err(f),
        _ => Err(Fault::new(FaultKind::Daemon, "the daemon ended before the mount was ready")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    fn pair() -> (OwnedFd, Sender) {
        let (r, w) = rustix::pipe::pipe().unwrap();
        (r, Sender::inherited(w.into_raw_fd()).unwrap())
    }

    #[test]
    fn ready_failed_and_death_are_told_apart() {
        let (r, mut s) = pair();
        s.ready();
        assert_eq!(wait(r), Ok(()));
        let (r, mut s) = pair();
        let f = Fault::new(FaultKind::WrongKey, "no");
        s.failed(&f);
        assert_eq!(wait(r), Err(f));
        let (r, s) = pair();
        drop(s);
        assert_eq!(wait(r).unwrap_err().kind, FaultKind::Daemon);
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_refused() {
        assert!(Sender::inherited(1).is_none());
        assert!(Sender::inherited(1_000_000).is_none());
    }
}
