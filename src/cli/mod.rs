//! The command line: one file per subcommand.

pub mod advice;
pub mod args;
pub mod config;
pub mod exit;
pub mod generate;
pub mod options;
pub mod output;
pub mod speed;

use crate::daemon::fault::{Fault, FaultKind};
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
    let cli = match Cli::try_parse_from(as_subcommand(argv)) {
        Ok(c) => c,
        Err(e) => return usage(&e),
    };
    let subject = subject(&cli.command);
    match run(cli.command) {
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

fn run(c: Command) -> Result<Exit, Fault> {
    let done = |r: Result<(), Fault>| r.map(|()| Exit::Done);
    match c {
        Command::Speed(a) => done(speed::run(&a)),
        Command::Completions { shell } => done(generate::completions(shell)),
        Command::Man => done(generate::man()),
        _ => Err(Fault::new(FaultKind::Other, "this subcommand is being built")),
    }
}

/// What the command is about, for advice.
fn subject(c: &Command) -> String {
    let p = |p: &std::path::Path| p.display().to_string();
    match c {
        Command::Init(a) => p(&a.backing),
        Command::Mount(a) => a.store.clone(),
        Command::Unmount(a) => p(&a.mountpoint),
        Command::Status(a) => p(&a.target),
        Command::Rotate(a) => p(&a.target),
        Command::Key(args::KeyCommand::List { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Add { target, .. }) => p(target),
        Command::Key(args::KeyCommand::Remove { target, .. }) => p(target),
        Command::Check(a) => p(&a.backing),
        Command::Inspect(a) => p(&a.file),
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
    let words: Vec<&str> = complaint.trim_start_matches("error: ").split_whitespace().collect();
    eprintln!("envelopefs: {}; see --help", words.join(" "));
    Exit::Usage.into()
}
