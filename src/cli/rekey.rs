//! `rekey`: through the daemon of the mount that the paths lie in.

use super::args::RekeyArgs;
use super::place::Place;
use super::progress::Meter;
use super::rotate::steering;
use super::{output, rekey_status};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::mounts;
use crate::daemon::protocol::{RekeyState, Reply, Request, Work};
use crate::rotation::rekey::{self, RekeyCounts, RekeyOutcome, RekeyReport, RekeyStatus};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Why a rotation would not have done, and what this has not.
const WHY: &str = "\
rotate alone does not help after a leak: it wraps the same file keys anew, so whoever had a file's key, or the KEK and
a copy of the header, could read on. The files rekeyed now have keys that nobody had. What was copied before (backups,
snapshots, blocks that the disk has not overwritten yet) stays readable with the old keys. If the KEK itself leaked, let
rotate come first and then rekey: new file keys are wrapped under the KEK that is active.
";

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::RekeyIncomplete`] if files are left; [`FaultKind::NotMounted`]; [`FaultKind::RotationRunning`]; the
/// store's.
pub fn run(a: &RekeyArgs) -> Result<(), Fault> {
    if a.work.status {
        return rekey_status::run(&place(a)?, a.json);
    }
    if let Some(how) = steering(&a.work) {
        let place = place(a)?;
        let c = place.connect()?.ok_or_else(|| {
            let text = format!("{}: no rekey is under way: the store is not mounted", place.backing.display());
            Fault::new(FaultKind::NotMounted, text)
        })?;
        return c.ask(&Request::Steer { what: Work::Rekey, how }, |_| {}).map(drop);
    }
    let (mountpoint, paths) = below_one_mount(&a.paths)?;
    let place = Place::find(&mountpoint)?;
    let connection = place.connect()?.ok_or_else(|| not_mounted(&mountpoint))?;
    let asked = rekey::Request {
        paths,
        written_before: a.written_before,
        kek: a.kek,
        rate: a.rate,
        full_speed: a.work.full_speed,
        jobs: a.jobs,
        dry_run: a.work.dry_run,
        restart: a.restart,
    };
    let meter = Meter::new(a.json);
    let request = Request::Rekey { asked, detach: a.work.detach };
    let reply = connection.ask_rekey(&request, |s| show(&meter, s)).map_err(|f| f.about(&mountpoint))?;
    meter.end();
    match reply {
        Reply::Rekey(s) => match (s.report, s.fault) {
            (Some(r), _) => finish(&r, a),
            (None, Some(f)) => Err(f.about(&mountpoint)),
            (None, None) => Err(Fault::new(FaultKind::Daemon, "the daemon did not say how the rekey ended")),
        },
        _ if a.json => output::print_json(&RekeyState { running: true, ..Default::default() }),
        _ => {
            let at = mountpoint.display();
            output::print(&format!("rekey started; follow it with: envelopefs rekey --status {at}\n"))
        }
    }
}

/// The store that the first path lies in, or whose backing directory it is.
fn place(a: &RekeyArgs) -> Result<Place, Fault> {
    let [path] = a.paths.as_slice() else {
        return Err(Fault::new(FaultKind::Usage, "one path says which store's rekey is meant"));
    };
    match below_one_mount(&a.paths) {
        Ok((mountpoint, _)) => Place::find(&mountpoint),
        Err(_) => Place::find(path),
    }
}

fn not_mounted(path: &Path) -> Fault {
    Fault::new(FaultKind::NotMounted, format!("{}: not in a mounted store of ours", path.display()))
}

/// The mount point that all paths lie in, and the paths below it.
fn below_one_mount(paths: &[PathBuf]) -> Result<(PathBuf, Vec<Vec<u8>>), Fault> {
    let mounts = mounts::list().map_err(|e| Fault::io("read", Path::new("/proc/self/mountinfo"), &e))?;
    let (mut at, mut below): (Option<PathBuf>, Vec<Vec<u8>>) = (None, Vec::new());
    for p in paths {
        let found = mounts::resolve(p).map_err(|e| Fault::io("find", p, &e))?;
        // The deepest mount counts, and of several at one place the newest.
        let inside = mounts.iter().filter(|m| found.starts_with(&m.mountpoint));
        let mount = inside.max_by_key(|m| m.mountpoint.as_os_str().len()).filter(|m| m.is_ours());
        let mount = mount.ok_or_else(|| not_mounted(p))?;
        if at.as_ref().is_some_and(|other| *other != mount.mountpoint) {
            let text = format!("{}: in another store than the first path; rekey one store at a time", p.display());
            return Err(Fault::new(FaultKind::Usage, text));
        }
        below.push(mount.from_root(&found).into_os_string().into_vec());
        at = Some(mount.mountpoint.clone());
    }
    let at = at.ok_or_else(|| Fault::new(FaultKind::Usage, "no path was given"))?;
    Ok((at, below))
}

fn show(meter: &Meter, s: &RekeyStatus) {
    let paused = if s.paused { ", paused" } else { "" };
    let says = format!("{} rekeyed, {:.1} MB/s{paused}", s.counts.rekeyed, s.rate / 1e6);
    meter.update(s.counts.scanned, s.expected, &says);
}

fn finish(r: &RekeyReport, a: &RekeyArgs) -> Result<(), Fault> {
    if a.json {
        output::print_json(r)?;
    } else {
        output::print(&text(r))?;
    }
    let why = match r.outcome {
        RekeyOutcome::Complete | RekeyOutcome::DryRun => return Ok(()),
        RekeyOutcome::Cancelled => "the rekey was cancelled".to_owned(),
        RekeyOutcome::Incomplete => format!("{} files could not be rekeyed and are as they were", r.failures_total),
    };
    Err(Fault::new(FaultKind::RekeyIncomplete, why))
}

fn text(r: &RekeyReport) -> String {
    let c = &r.counts;
    let mut t = String::new();
    if r.resumed {
        t += &format!("went on with an unfinished rekey: {} files were done before\n", c.done_before);
    }
    let done = if r.outcome == RekeyOutcome::DryRun { "dry run: to be rekeyed" } else { "rekeyed" };
    t += &format!("{done}: {} files, {} bytes{}\n", c.rekeyed, c.bytes, besides(c));
    for path in &r.no_header {
        t += &format!("no header: {path}; see check\n");
    }
    for f in &r.failures {
        t += &format!("failed: {}\n", f.in_words());
    }
    t + WHY
}

/// What else was met.
pub(super) fn besides(c: &RekeyCounts) -> String {
    let others = [(c.skipped, "do not meet the criteria"), (c.empty, "are empty"), (c.vanished, "went away")];
    others.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("; {n} {what}")).collect()
}
