//! Passphrases asked for on a terminal.

use super::support::{Bench, can_mount, wait_for};
use rustix::termios::LocalModes;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};

/// A new pseudo-terminal: our end, and the program's.
fn pty() -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: fills in two descriptors, which nothing else owns; the null pointers mean "defaults".
    unsafe {
        assert_eq!(libc::openpty(&mut ours, &mut theirs, null, null.cast(), null.cast()), 0);
        libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(theirs, libc::F_SETFD, libc::FD_CLOEXEC);
        (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    }
}

/// Runs `command` on a terminal where each of `answers` is typed after a prompt. Returns what the terminal showed.
pub fn on_terminal(command: Command, answers: &[&str]) -> (ExitStatus, String) {
    on_terminal_after(PASSPHRASE, command, answers)
}

/// How prompts for passphrases end.
const PASSPHRASE: &str = ": ";

/// The same for prompts that end with `prompt`, and that echo, if they are not for passphrases.
pub fn on_terminal_after(prompt: &str, mut command: Command, answers: &[&str]) -> (ExitStatus, String) {
    let (mut ours, theirs) = pty();
    command.stdin(Stdio::from(theirs.try_clone().unwrap()));
    command.stdout(Stdio::from(theirs.try_clone().unwrap())).stderr(Stdio::from(theirs));
    // SAFETY: both calls are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let mut child = command.spawn().unwrap();
    // The program's end of the terminal must be open nowhere else, or its end is never seen.
    drop(command);
    let (mut shown, mut answers, mut buf) = (String::new(), answers.iter(), [0u8; 256]);
    let mut seen = 0;
    // At the end of the last program on it, a terminal gives EIO.
    while let Ok(n @ 1..) = ours.read(&mut buf) {
        shown.push_str(&String::from_utf8_lossy(&buf[..n]));
        if shown[seen..].ends_with(prompt) {
            seen = shown.len();
            if let Some(a) = answers.next() {
                // Nobody types before the prompt has turned the echo off.
                wait_for("the echo to be off", || {
                    prompt != PASSPHRASE
                        || !rustix::termios::tcgetattr(&ours).unwrap().local_modes.contains(LocalModes::ECHO)
                });
                ours.write_all(format!("{a}\n").as_bytes()).unwrap();
            }
        }
    }
    (child.wait().unwrap(), shown)
}

#[test]
fn passphrases_are_asked_for_before_the_daemon_lets_go_of_the_terminal() {
    if !can_mount() {
        return;
    }
    let b = Bench::new();
    let (status, shown) = on_terminal(b.command("init back"), &["battery staple", "battery stable"]);
    assert_eq!(status.code(), Some(13), "{shown}");
    assert!(shown.contains("passphrase: the two differ; try again"), "{shown}");
    let (status, shown) = on_terminal(b.command("init back"), &["battery staple", "battery staple"]);
    assert_eq!(status.code(), Some(0), "{shown}");
    assert!(!shown.contains("battery"), "a passphrase is not echoed: {shown}");
    let (status, shown) = on_terminal(b.command("mount back mnt"), &["wrong"]);
    assert_eq!(status.code(), Some(4), "{shown}");
    assert_eq!(shown.matches("Passphrase: ").count(), 1, "{shown}");
    let (status, shown) = on_terminal(b.command("mount back mnt"), &["battery staple"]);
    assert_eq!(status.code(), Some(0), "{shown}");
    std::fs::write(b.path("mnt/f"), "x").unwrap();
    b.ok("unmount mnt");
}

#[test]
fn a_rotation_shows_a_bar_on_a_terminal() {
    let b = Bench::with_store();
    let (status, shown) = on_terminal(b.command("rotate back"), &[]);
    assert_eq!(status.code(), Some(0), "{shown}");
    assert!(shown.contains("\u{1b}["), "control sequences of a bar: {shown:?}");
    assert!(!String::from_utf8(b.run("rotate back").stderr).unwrap().contains('\u{1b}'));
}
