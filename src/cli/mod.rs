//! The command line: one file per subcommand.

pub mod advice;
pub mod args;
pub mod audit;
pub mod check;
pub mod config;
mod confirm;
pub mod exit;
pub mod generate;
pub mod init;
pub mod inspect;
pub mod kek;
pub mod key;
pub mod key_list;
pub mod keyring;
pub mod lock;
pub mod metrics;
pub mod mount;
pub mod options;
pub mod output;
mod policy;
pub mod place;
pub mod progress;
pub mod recovery;
pub mod rekey;
pub mod rekey_status;
pub mod report;
pub mod root_keys;
pub mod rotate;
pub mod rotation_status;
pub mod seals;
pub mod shard;
pub mod speed;
pub mod status;
pub mod unmount;
pub mod waivers;

use crate::daemon::fault::Fault;
use crate::daemon::process;
use args::{Cli, Command};
use clap::Parser;
use clap::error::ErrorKind;
use exit::Exit;
use std::ffi::OsString;
use std::process::ExitCode;

/// The program: reads `argv`, does it, says on standard error what went wrong, returns the exit code.
pub fn main(argv: Vec<OsString>) -> ExitCode {
    if let Err(e) = process::harden() {
        eprintln!("envelopefs: cannot keep keys out of core dumps: {e}");
        return Exit::Other.into();
    }
    let argv = as_subcommand(argv);
    let after: Vec<OsString> = argv.iter().skip(2).cloned().collect();
    let cli = match Cli::try_parse_from(argv) {
        Ok(c) => c,
        Err(e) => return usage(&e),
    };
    let subject = subject(&cli.command);
    match run(cli.command, &after) {
        Ok(exit) => exit.into(),
        Err(f) => {
            eprintln!("{}", advice::line(&f, &subject));
            Exit::from(f.kind).into()
        }
    }
}

/// Called as `mount.fuse.envelopefs` (a symbolic link), the program is mount(8)'s helper.
fn as_subcommand(mut argv: Vec<OsString>) -> Vec<OsString> {
    let name = argv.first().map(std::path::PathBuf::from).and_then(|p| p.file_name().map(OsString::from));
    if name.is_some_and(|n| n.to_string_lossy().starts_with("mount.")) {
        argv.insert(1, "mount-helper".into());
    }
    argv
}

/// Does what is asked; `after` is what followed the subcommand's name.
fn run(c: Command, after: &[OsString]) -> Result<Exit, Fault> {
    match c {
        Command::Init(a) => init::run(&a),
        // The only one whose process may end with a failure that another one tells.
        Command::Mount(a) => return mount::run(a, after),
        Command::Unmount(a) => unmount::run(&a),
        Command::Lock(a) => lock::lock(&a),
        Command::Unlock(a) => lock::unlock(&a),
        Command::Status(a) => status::run(&a),
        Command::Rotate(a) => rotate::run(&a),
        Command::Rekey(a) => rekey::run(&a),
        Command::Key(c) => key::run(&c),
        Command::Check(a) => check::run(&a),
        Command::Audit(args::AuditCommand::Verify(a)) => audit::verify(&a),
        Command::Metrics(a) => metrics::run(&a),
        Command::Inspect(a) => inspect::run(&a),
        Command::Speed(a) => speed::run(&a),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man => generate::man(),
        Command::MountHelper { args } => mount::helper(&args),
    }
    .map(|()| Exit::Done)
}

/// What the command is about, for advice.
fn subject(c: &Command) -> String {
    let p = |p: &std::path::Path| p.display().to_string();
    match c {
        Command::Init(a) => p(&a.backing),
        Command::Mount(a) => a.store.clone(),
        Command::Unmount(a) => p(&a.mountpoint),
        Command::Lock(a) => p(&a.target),
        Command::Unlock(a) => p(&a.target),
        Command::Status(a) => p(&a.target),
        Command::Rotate(a) => p(&a.target),
        Command::Rekey(a) => a.paths.first().map(|f| p(f)).unwrap_or_default(),
        Command::Key(args::KeyCommand::List { target, .. }) => p(target),
        Command::Key(args::KeyCommand::VerifyReport { file, target, .. }) => p(target.as_ref().unwrap_or(file)),
        Command::Key(args::KeyCommand::Add { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Remove { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Refresh { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Destroy { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Export { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Import { backing, .. }) => p(backing),
        Command::Check(a) => p(&a.backing),
        Command::Audit(args::AuditCommand::Verify(a)) => a.store.as_deref().map(p).unwrap_or_default(),
        Command::Metrics(a) => p(&a.target),
        Command::Inspect(a) => p(&a.file),
        // mount(8) says what to mount first.
        Command::MountHelper { args } => args.first().cloned().unwrap_or_default(),
        _ => String::new(),
    }
}

/// clap's complaint, on one line; help and version as they are.
fn usage(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = e.print();
        return Exit::Done.into();
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = e.print();
        return Exit::Usage.into();
    }
    let text = e.to_string();
    let complaint = text.split("\n\nUsage:").next().unwrap_or_default();
    let complaint = complaint.split("\n\nFor more").next().unwrap_or_default();
    let parts = complaint.trim_start_matches("error: ").split("\n\n  tip: ");
    let parts: Vec<String> = parts.map(|p| p.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    eprintln!("envelopefs: {}; see --help", parts.join("; "));
    Exit::Usage.into()
}
