//! Starting the background daemon: this program again, as a child that asks for passphrases on our terminal, tells us
//! through a pipe when the mount answers, and only then lets go of the terminal. There is no fork(2) with keys in
//! memory.

use super::fault::{Fault, FaultKind, plain};
use super::ready;
use rustix::io::FdFlags;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

/// Runs this program with `subcommand`, `--ready-fd N` and `args`, and waits until it is ready.
///
/// # Errors
/// The child's fault; [`FaultKind::Daemon`] if it died.
pub fn start(subcommand: &OsStr, args: &[OsString]) -> Result<(), Fault> {
    let fail = |e: std::io::Error| Fault::new(FaultKind::Daemon, format!("cannot start the daemon: {}", plain(&e)));
    let (reader, writer) = rustix::pipe::pipe().map_err(|e| fail(e.into()))?;
    // The writing end alone is inherited. This process has one thread, so nothing else can be started meanwhile.
    rustix::io::fcntl_setfd(&reader, FdFlags::CLOEXEC).map_err(|e| fail(e.into()))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("envelopefs")
        .arg(subcommand)
        .arg("--ready-fd")
        .arg(writer.as_raw_fd().to_string())
        .args(args)
        .spawn()
        .map_err(fail)?;
    drop(writer);
    match ready::wait(reader) {
        Ok(()) => Ok(()),
        Err(f) => Err(match child.wait() {
            Ok(status) if f.kind == FaultKind::Daemon => {
                Fault::new(f.kind, format!("{} ({})", f.message, said(status)))
            }
            _ => f,
        }),
    }
}

fn said(s: ExitStatus) -> String {
    match (s.code(), s.signal()) {
        (Some(c), _) => format!("exit code {c}"),
        (_, Some(n)) => format!("killed by signal {n}"),
        _ => "no exit code".into(),
    }
}

/// Lets go of the terminal: a session of its own, and `/dev/null` for the standard descriptors.
///
/// # Errors
/// The kernel's.
pub fn detach() -> std::io::Result<()> {
    // Fails only if this process leads its group already, as it does under a supervisor; then there is no need.
    let _ = rustix::process::setsid();
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
