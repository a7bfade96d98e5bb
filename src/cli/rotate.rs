//! `rotate`: through the daemon if the store is mounted, here if it is not.

use super::args::{RotateArgs, WorkArgs};
use super::config::Config;
use super::keyring::ExportFile;
use super::place::Place;
use super::progress::Meter;
use super::report::ReportFile;
use super::{advice, audit, output, root_keys, rotation_status, shard, waivers};
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::{Taken, VolumeLock};
use crate::daemon::observed::Observed;
use crate::daemon::protocol::{Hidden, Reply, Request, RotateRequest, RotationState, Switch, Work};
use crate::daemon::rotate::BESIDE_READERS;
use crate::daemon::{open, rotate};
use crate::kms::ConnectOptions;
use crate::rotation::{Control, Options, Outcome, Progress, Report, SealedReport, Staged, State, Status, Waivers};
use crate::store::keys::Keys;
use crate::store::{Store, StoreOptions};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::RotationIncomplete`] if files are left that are not waived; [`FaultKind::Usage`] of a list of waivers;
/// [`FaultKind::Locked`]; root keys; the store's.
pub fn run(a: &RotateArgs) -> Result<(), Fault> {
    let place = Place::find(&a.target)?;
    if a.work.status {
        return rotation_status::run(&place, a.json);
    }
    match (a.shard, &a.merge) {
        (Some(s), _) => return shard::run(a, s, &place),
        (None, Some(files)) => return shard::merge(a, files, &place),
        (None, None) => {}
    }
    let connection = place.connect().map_err(|f| beside(&place, f))?;
    if let Some(how) = steering(&a.work) {
        let c = connection.ok_or_else(|| not_mounted(&place, "no rotation is under way: the store is not mounted"))?;
        return c.ask(&Request::Steer { what: Work::Rotation, how }, |_| {}).map(drop);
    }
    let waive = waivers::read(a.waive.as_deref())?;
    let file = report_file(a, &place)?;
    let export = a.export.as_deref().map(|file| ExportFile::of_rotation(&place, file)).transpose()?;
    match connection {
        Some(_) => {
            if file.is_some() {
                cancel_in_daemon_on_signal(&a.target)?;
            }
            let mut request = RotateRequest {
                passphrase: passphrase(a)?,
                keys: a.keys.iter().map(|k| root_keys::for_daemon(k, &a.open.access)).collect::<Result<_, _>>()?,
                kek: a.kek.map(Into::into),
                rate: a.rate,
                full_speed: a.work.full_speed,
                jobs: a.jobs,
                patience: a.patience,
                if_older_than: a.if_older_than,
                dry_run: a.work.dry_run,
                restart: a.restart,
                detach: a.work.detach,
                destroy_old: a.destroy_old,
                waive: waive.paths().map(str::to_owned).collect(),
                staged: None,
            };
            if let Some(target) = export {
                let Reply::Staged(staged) = place.daemon()?.ask(&Request::RotateStage(request.clone()), |_| {})? else {
                    return Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for"));
                };
                target.take(&place, staged)?;
                request.staged = Some(staged);
                if let Staged::New(_) = staged {
                    // What the new KEK is like was said, and it is there.
                    (request.passphrase, request.keys) = (None, Vec::new());
                }
            }
            let meter = Meter::new(a.json);
            let reply = place.daemon()?.ask(&Request::Rotate(request), |s| show(&meter, s))?;
            meter.end();
            match reply {
                Reply::Rotation(s) => ended(*s, a, file),
                _ if a.json => output::print_json(&RotationState { running: true, ..Default::default() }),
                _ => output::print("rotation started; follow it with: envelopefs status\n"),
            }
        }
        None if a.work.detach => {
            Err(not_mounted(&place, "--detach leaves the rotation to the daemon: the store is not mounted"))
        }
        None => offline(a, &place, file, export, waive),
    }
}

/// The same fault, and what can be done beside those who share the store.
fn beside(place: &Place, f: Fault) -> Fault {
    match f.kind == FaultKind::Locked && VolumeLock::taken(&place.backing) == Taken::Shared {
        true => Fault::new(f.kind, format!("{}; {BESIDE_READERS}", f.message)),
        false => f,
    }
}

/// Which switch of a run is asked for, if one is.
pub(super) fn steering(a: &WorkArgs) -> Option<Switch> {
    let all = [(a.pause, Switch::Pause), (a.resume, Switch::Resume), (a.cancel, Switch::Cancel)];
    all.into_iter().find_map(|(asked, how)| asked.then_some(how))
}

/// Where the report goes, if there is to be one.
pub(super) fn report_file(a: &RotateArgs, place: &Place) -> Result<Option<ReportFile>, Fault> {
    let Some(path) = &a.report else { return Ok(None) };
    if a.work.detach {
        let text = "--report needs somebody who waits for the end: leave out --detach, or count later what names which \
                    KEK with rotate --dry-run --report";
        return Err(Fault::new(FaultKind::Usage, text));
    }
    ReportFile::create(path, &place.backing).map(Some)
}

/// The passphrase the daemon needs and cannot ask for: that of a new root key after `--key`, or, if the operator gave one
/// and no `--key`, that of the root key the daemon was not opened with.
fn passphrase(a: &RotateArgs) -> Result<Option<Hidden>, Fault> {
    let given = a.open.access.passphrase_file.is_some() || a.open.access.passphrase_command.is_some();
    match (a.keys.is_empty(), given) {
        (true, true) => root_keys::read_passphrase(&a.open.access, false).map(Some),
        (true, false) => Ok(None),
        (false, _) => {
            let new = root_keys::new_passphrase(a.new_passphrase_file.as_deref(), &a.open.access);
            root_keys::passphrase_for(&open::parse(&a.keys)?, &new)
        }
    }
}

fn not_mounted(place: &Place, why: &str) -> Fault {
    Fault::new(FaultKind::NotMounted, format!("{}: {why}", place.backing.display()))
}

/// Says how a rotation ended.
fn ended(s: RotationState, a: &RotateArgs, file: Option<ReportFile>) -> Result<(), Fault> {
    match (s.report, s.fault) {
        (Some(r), _) => finish(&r, s.sealed.as_ref(), file, a),
        (None, Some(f)) => Err(f),
        (None, None) => Err(Fault::new(FaultKind::Daemon, "the daemon did not say how the rotation ended")),
    }
}

fn offline(
    a: &RotateArgs,
    place: &Place,
    file: Option<ReportFile>,
    export: Option<ExportFile>,
    waive: Waivers,
) -> Result<(), Fault> {
    let fail = |e: &crate::store::StoreError| Fault::store(&place.backing, e);
    let _lock = VolumeLock::take(&place.backing, "rotate").map_err(|f| beside(place, f))?;
    let config = config_of(a)?;
    let observed = Observed::start(audit::options_of(&config, &place.backing)?.as_ref(), place.keyring.store)?;
    let (b, keys) = open_keys(a, place, &config, &observed)?;
    let new = root_keys::new_passphrase(a.new_passphrase_file.as_deref(), &a.open.access);
    let new = observed.connect(&root_keys::connect_with(&new, &config));
    let mut options = Options {
        kek: a.kek.map(Into::into),
        root: root_keys::for_new_kek(&open::parse(&a.keys)?, &new)?,
        rate: a.rate,
        full_speed: a.work.full_speed,
        jobs: a.jobs,
        patience: Duration::from_secs(a.patience),
        if_older_than: a.if_older_than,
        dry_run: a.work.dry_run,
        destroy_old: a.destroy_old,
        waive: Arc::new(waive),
        restart: a.restart,
        staged: None,
        shard: None,
    };
    let store = Store::open(b, keys, StoreOptions::default()).map_err(|e| fail(&e))?;
    if let Some(target) = export {
        let staged = rotate::stage(&store, &options).map_err(|e| fail(&e))?;
        target.take(place, staged)?;
        options.staged = Some(staged);
    }
    let control = Arc::new(Control::new());
    let switch = control.clone();
    on_signal(move || switch.cancel())?;
    let meter = Meter::new(a.json);
    let report = rotate::offline(&store, &options, &Shown(&meter), &control);
    meter.end();
    let report = report.map(|r| (rotate::seal(&store, &r), r));
    if report.is_ok() {
        root_keys::tell_of_copy(&store.shared().keys);
    }
    let closed = store.close();
    observed.end();
    let (sealed, report) = report.map_err(|e| fail(&e))?;
    closed.map_err(|e| fail(&e))?;
    finish(&report, Some(&sealed), file, a)
}

/// The configuration of a rotation in this process, which has no users.
///
/// # Errors
/// As [`Config::load`].
pub(super) fn config_of(a: &RotateArgs) -> Result<Config, Fault> {
    let mut config = Config::load(a.open.access.config.as_deref())?;
    config.services.limits = config.services.limits.without_users();
    Ok(config)
}

/// Opens the store in this process.
pub(super) fn open_keys(
    a: &RotateArgs,
    place: &Place,
    config: &Config,
    observed: &Observed,
) -> Result<(Posix, Keys), Fault> {
    let recovery = root_keys::recovery_source(&a.open.recovery);
    let connect = ConnectOptions { recovery, ..root_keys::connect_with(&a.open.access, config) };
    let b = open::backing(&place.backing)?;
    let keys = root_keys::open(&b, &a.open.open_keys, &observed.connect(&connect))
        .inspect_err(|f| observed.refused("rotate", &place.backing, f))?;
    observed.opened(&keys);
    Ok((b, keys))
}

/// Cancels a rotation in the daemon in order, so that there is a report to write: a client that just ends cancels it too,
/// and hears no more of it.
fn cancel_in_daemon_on_signal(target: &Path) -> Result<(), Fault> {
    let target = target.to_path_buf();
    on_signal(move || {
        let asked = Place::find(&target).and_then(|p| p.connect());
        if let Ok(Some(c)) = asked {
            // Fails only if there is nothing to cancel: too early or too late.
            let _ = c.ask(&Request::Steer { what: Work::Rotation, how: Switch::Cancel }, |_| {});
        }
    })
}

/// Does `then` at each signal that asks the process to end.
pub(super) fn on_signal(then: impl Fn() + Send + 'static) -> Result<(), Fault> {
    let fail = |e: std::io::Error| Fault::new(FaultKind::Other, format!("cannot wait for signals: {e}"));
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(fail)?;
    std::thread::spawn(move || signals.forever().for_each(|_| then()));
    Ok(())
}

/// A meter for the progress of work on this store.
pub(super) struct Shown<'a>(pub(super) &'a Meter);

impl Progress for Shown<'_> {
    fn update(&self, s: &Status) {
        show(self.0, s);
    }
}

/// Shows how far a run or a scan is.
pub(super) fn show(meter: &Meter, s: &Status) {
    let says = format!("{}: {} rewrapped, {:.0}/s{}", phase(s.state), s.counts.rewrapped, s.rate, standing(s));
    meter.update(s.counts.scanned, s.expected, &says);
}

/// Why it does not get on, if so.
pub(super) fn standing(s: &Status) -> &'static str {
    match (s.paused, s.waiting) {
        (true, _) => ", paused",
        (false, true) => ", waiting for the key service",
        (false, false) => "",
    }
}

pub(super) fn phase(s: State) -> &'static str {
    match s {
        State::Staged => "staging the new KEK",
        State::Sweeping => "rewrapping",
        State::Verifying => "verifying",
        State::Retiring => "retiring the old KEK",
        State::Done => "done",
        State::Cancelled => "cancelled",
        State::Incomplete => "incomplete",
    }
}

/// One line about a rotation, for `status`.
pub fn in_words(s: &RotationState) -> String {
    match (&s.status, &s.report, &s.fault) {
        (Some(t), _, _) if s.running => {
            let of = t.expected.map_or(String::new(), |n| format!(" of {n}"));
            format!("{}, {}{of} files, pass {}{}", phase(t.state), t.counts.scanned, t.pass, standing(t))
        }
        (_, Some(r), _) => {
            format!("last one {}", moved(r))
        }
        (_, _, Some(f)) => format!("last one failed: {f}"),
        _ => "starting".into(),
    }
}

pub(super) fn outcome(o: Outcome) -> &'static str {
    match o {
        Outcome::Complete => "complete",
        Outcome::Incomplete => "incomplete",
        Outcome::Cancelled => "cancelled",
        Outcome::DryRun => "dry run",
        Outcome::NotDue => "not due",
        Outcome::ShareComplete => "share complete",
    }
}

/// Says how a run ended, writes its report, and turns into a fault what is not as it was meant to be.
///
/// # Errors
/// [`FaultKind::RotationIncomplete`]; those of writing.
pub(super) fn finish(
    r: &Report,
    s: Option<&SealedReport>,
    file: Option<ReportFile>,
    a: &RotateArgs,
) -> Result<(), Fault> {
    let written = write(s, file);
    if a.json {
        output::print_json(r)?;
    } else {
        let place = written.as_ref().ok().and_then(Option::as_ref);
        let place = place.map_or(String::new(), |p| format!("report written to {}\n", p.display()));
        output::print(&(text(r) + &place))?;
    }
    waivers::tell(r);
    if r.is_done() {
        if r.outcome == Outcome::Complete && !a.json && a.export.is_none() {
            let at = a.target.display();
            eprintln!(
                "envelopefs: the keyring has changed: keep a copy outside of the store (envelopefs key export {at} FILE)"
            );
        }
        return written.map(drop);
    }
    // How the rotation ended matters more.
    if let Err(f) = written {
        eprintln!("{}", advice::line(&f, &a.target.display().to_string()));
    }
    let text = match r.outcome {
        Outcome::Cancelled => format!("rotation to KEK {} was cancelled", r.target),
        _ if shard::is_short(r) => {
            format!("rotation to KEK {} is incomplete: {} shares are not done", r.target, r.failures_total)
        }
        _ => format!("rotation to KEK {} is incomplete: {} files could not be moved", r.target, r.failures_total),
    };
    Err(Fault::new(FaultKind::RotationIncomplete, text))
}

/// Writes the report, if it is to be; returns where it is.
fn write(sealed: Option<&SealedReport>, file: Option<ReportFile>) -> Result<Option<PathBuf>, Fault> {
    let Some(file) = file else { return Ok(None) };
    let sealed = sealed.ok_or_else(|| Fault::new(FaultKind::Daemon, "the daemon sent no sealed report"))?;
    file.write(sealed).map(Some)
}

fn text(r: &Report) -> String {
    if r.outcome == Outcome::NotDue {
        return format!("not due: KEK {} is younger than asked for; nothing was done\n", r.target);
    }
    let mut t = match r.outcome {
        Outcome::DryRun => counted(r),
        _ => moved(r) + "\n",
    };
    if let Some(v) = r.verify.filter(|_| r.outcome != Outcome::DryRun) {
        t += &format!("verified: {} headers under it in both slots, {} empty files\n", v.current, v.empty);
    }
    for k in &r.retired {
        t += &format!("retired KEK {k}\n");
    }
    if let (Outcome::ShareComplete, [s]) = (r.outcome, r.shares.as_slice()) {
        t += &format!(
            "share {} is done; the rotation is not complete before all {} are merged\n",
            s.shard,
            s.shard.of()
        );
    }
    for k in &r.destroyed {
        t += &format!("destroyed KEK {k}\n");
    }
    for f in &r.waived {
        t += &format!("waived: {}\n", f.in_words());
    }
    for path in &r.no_header {
        t += &format!("no header: {path}\n");
    }
    for f in &r.failures {
        t += &format!("failed: {}\n", f.in_words());
    }
    t
}

/// How a rotation ended and how far it came.
fn moved(r: &Report) -> String {
    let except = if r.waived.is_empty() { String::new() } else { format!(", {} waived", r.waived.len()) };
    format!("{}: {} files moved to KEK {}{except}", outcome(r.outcome), r.sweep.rewrapped, r.target)
}

/// What a dry run saw.
fn counted(r: &Report) -> String {
    let c = r.verify.unwrap_or_default();
    let todo = c.scanned.saturating_sub(c.current + c.empty + c.no_header + c.vanished + c.failed);
    format!(
        "dry run: {} files, {} empty, {} under KEK {} already, {todo} to move\n",
        c.scanned, c.empty, c.current, r.target
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use crate::kms::services::Limits;
    use clap::Parser;

    #[test]
    fn a_rotation_that_has_no_users_leaves_nothing_of_the_limits_to_any() {
        let d = tempfile::tempdir().unwrap();
        let config = d.path().join("config.toml");
        std::fs::write(&config, "[services.limits]\nrotation_share = 10\ncalls_per_second = 7\n").unwrap();
        let config = config.to_str().unwrap();
        for words in [&["back"][..], &["back", "--shard", "1/2"]] {
            let all = [&["envelopefs", "rotate"], words, &["--config", config]].concat();
            let Command::Rotate(a) = Cli::try_parse_from(all).unwrap().command else { unreachable!() };
            let limits = config_of(&a).unwrap().services.limits;
            assert_eq!(limits, Limits { calls_per_second: 7, rotation_share: 100, ..Limits::default() });
        }
    }
}
