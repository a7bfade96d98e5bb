//! How rekeys of a store stand: `rekey --status`, and its part of `status`. Needs no key.

use super::output;
use super::place::Place;
use super::rekey::besides;
use super::rotation_status::{failing, listed, minutes, readable, without_header};
use super::status::ask;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::protocol::{DaemonStatus, RekeyState};
use crate::format::ids::StoreId;
use crate::format::time::rfc3339_seconds;
use crate::rotation::rekey::{
    Asked, RekeyCounts, RekeyOutcome, RekeyPhase, RekeyReport, RekeyStatus, Unfinished, unfinished,
};
use crate::store::rekey::is_interrupted;
use serde::Serialize;

/// What the backing directory says of rekeys. Stable; part of `rekey --status --json` and of `status --json`.
#[derive(Debug, Serialize)]
pub struct OnDisk {
    /// A rekey was begun and has not dealt with everything yet.
    pub unfinished_rekey: Option<Unfinished>,
    /// A file with several names was being exchanged. Unless the store is mounted to be written, the next such mount
    /// finishes that.
    pub rekey_interrupted: bool,
}

impl OnDisk {
    /// Looks. What cannot be read there is said in the log, and left out.
    pub fn find(place: &Place) -> Self {
        let b = &place.posix;
        Self {
            unfinished_rekey: readable("journal of rekeys", unfinished(b)),
            rekey_interrupted: readable("folder of rekeys", is_interrupted(b).map(Some)).unwrap_or(false),
        }
    }

    /// What is left to do while no rekey is under way, a line each. `daemon`: what it says of itself, if there is one.
    pub fn left(&self, daemon: Option<&DaemonStatus>) -> Vec<String> {
        let mut t = Vec::new();
        if let Some(u) = &self.unfinished_rekey {
            t.push(format!(
                "unfinished{}, {} files done by {}; a rekey of the same paths and options goes on with it",
                daemon.and_then(|d| d.rekey_asked.as_ref()).map_or(String::new(), |a| format!(" of {}", of(a))),
                u.files,
                rfc3339_seconds(u.noted)
            ));
        }
        // Where files may be written, that was finished before the mount.
        if self.rekey_interrupted && daemon.is_none_or(|d| d.read_only) {
            t.push(
                "was interrupted in a file with several names; the next mount that may write finishes that file".into(),
            );
        }
        t
    }
}

/// What a rekey goes over.
fn of(a: &Asked) -> String {
    let mut t = a.paths.join(" ");
    match a.paths_total.saturating_sub(a.paths.len() as u64) {
        0 => {}
        n => t += &format!(" and {n} more"),
    }
    if let Some(sec) = a.written_before {
        t += &format!(" --written-before {}", u64::try_from(sec).map_or_else(|_| sec.to_string(), rfc3339_seconds));
    }
    t + &a.kek.map_or(String::new(), |k| format!(" --kek {k}"))
}

/// `rekey --status --json`. Stable.
#[derive(Debug, Serialize)]
struct View {
    store: StoreId,
    backing: String,
    mounted: bool,
    /// Some process has the store: a daemon, a rotation or a check.
    locked: bool,
    #[serde(flatten)]
    disk: OnDisk,
    /// What it goes over; only a daemon can tell, which has the key.
    asked: Option<Asked>,
    /// The rekey under way in the daemon, or the last one since the mount.
    rekey: Option<RekeyState>,
}

/// Runs `rekey --status`.
///
/// # Errors
/// [`FaultKind::RekeyIncomplete`] after saying so, if a rekey is unfinished and none is under way; the daemon's.
pub fn run(place: &Place, json: bool) -> Result<(), Fault> {
    let daemon = ask(place)?;
    let v = View {
        store: place.keyring.store,
        backing: place.backing.display().to_string(),
        mounted: daemon.is_some(),
        locked: VolumeLock::is_taken(&place.backing),
        disk: OnDisk::find(place),
        asked: daemon.as_ref().and_then(|d| d.rekey_asked.clone()),
        rekey: daemon.as_ref().and_then(|d| d.rekey.clone()),
    };
    let left = if v.is_under_way() { Vec::new() } else { v.disk.left(daemon.as_ref()) };
    if json {
        output::print_json(&v)?
    } else {
        output::print(&(text(&v) + &lines(&left)))?
    }
    if v.disk.unfinished_rekey.is_some() && !v.is_under_way() {
        return Err(Fault::new(FaultKind::RekeyIncomplete, "a rekey is unfinished, and none is under way"));
    }
    Ok(())
}

impl View {
    fn is_under_way(&self) -> bool {
        self.rekey.as_ref().is_some_and(|r| r.running)
    }
}

/// What is left to do, for people.
pub fn lines(left: &[String]) -> String {
    left.iter().map(|l| format!("rekey     {l}\n")).collect()
}

fn text(v: &View) -> String {
    match &v.rekey {
        Some(RekeyState { running: true, status: None, .. }) => "state     starting\n".into(),
        Some(RekeyState { running: true, status: Some(s), .. }) => running(s, v.asked.as_ref()),
        Some(RekeyState { report: Some(r), .. }) => ended(r),
        Some(RekeyState { fault: Some(f), .. }) => format!("state     failed: {f}\n"),
        _ if v.mounted => "state     there was no rekey since the mount\n".into(),
        _ => "state     not mounted: no rekey is under way\n".into(),
    }
}

/// One line about a rekey, for `status`.
pub fn in_words(s: &RekeyState) -> String {
    match (&s.status, &s.report, &s.fault) {
        (Some(t), _, _) if s.running => {
            let of = t.expected.map_or(String::new(), |n| format!(" of {n}"));
            format!("{}, {}{of} files, {} rekeyed", phase(t), t.counts.scanned, t.counts.rekeyed)
        }
        (_, Some(r), _) => format!("last one {}: {} files rekeyed", outcome(r.outcome), r.counts.rekeyed),
        (_, _, Some(f)) => format!("last one failed: {f}"),
        _ => "starting".into(),
    }
}

fn phase(s: &RekeyStatus) -> String {
    let phase = match s.state {
        RekeyPhase::Rekeying => "rekeying",
        RekeyPhase::LookingAgain => "looking for files that were missed",
        RekeyPhase::Ended => "ending",
    };
    format!("{phase}{}", if s.paused { ", paused" } else { "" })
}

fn outcome(o: RekeyOutcome) -> &'static str {
    match o {
        RekeyOutcome::Complete => "complete",
        RekeyOutcome::Incomplete => "incomplete",
        RekeyOutcome::Cancelled => "cancelled",
        RekeyOutcome::DryRun => "dry run",
    }
}

fn running(s: &RekeyStatus, asked: Option<&Asked>) -> String {
    let resumed = if s.resumed { ", going on with an unfinished one" } else { "" };
    let mut t = format!("state     {}\nbegun     {}{resumed}\n", phase(s), rfc3339_seconds(s.started));
    if let Some(a) = asked {
        t += &format!("paths     {}\n", of(a));
    }
    t += &files(&s.counts, s.expected);
    t += &format!("copied    {} bytes, {:.1} MB a second\n", s.copied, s.rate / 1e6);
    if let Some(eta) = s.eta {
        t += &format!("left      {}\n", minutes(eta));
    }
    t + &without_header(s.counts.no_header, &[]) + &failing("rekey", &s.failures)
}

fn files(c: &RekeyCounts, expected: Option<u64>) -> String {
    let of = expected.map_or(String::new(), |n| format!(" of {n}"));
    format!(
        "files     {}{of} met, {} rekeyed with {} bytes, {} done before, {} failed{}\n",
        c.scanned,
        c.rekeyed,
        c.bytes,
        c.done_before,
        c.failed,
        besides(c)
    )
}

fn ended(r: &RekeyReport) -> String {
    let mut t = format!("state     {}\n", outcome(r.outcome));
    t += &format!("time      {} to {}\n", rfc3339_seconds(r.started), rfc3339_seconds(r.finished));
    t + &files(&r.counts, None) + &without_header(r.counts.no_header, &r.no_header) + &listed(&r.failures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::protocol::{CacheStatus, KeysStatus};
    use crate::format::ids::KekId;
    use crate::rotation::{Failing, Failure};

    fn counts() -> RekeyCounts {
        RekeyCounts {
            scanned: 9,
            rekeyed: 4,
            bytes: 5000,
            skipped: 1,
            done_before: 2,
            empty: 1,
            no_header: 2,
            vanished: 0,
            failed: 1,
        }
    }

    fn asked() -> Asked {
        let paths = vec!["/".to_owned(), "d/f".to_owned()];
        Asked { paths, paths_total: 2, written_before: None, kek: Some(KekId([5; 16])) }
    }

    #[test]
    fn a_running_rekey_says_where_it_is_and_what_failed() {
        let f = Failure { path: "d/f".into(), code: "EIO".into(), message: "I/O error".into(), directory: false };
        let s = RekeyStatus {
            paused: true,
            resumed: true,
            started: 1_790_000_000,
            counts: counts(),
            copied: 6000,
            expected: Some(100),
            rate: 2_560_000.0,
            eta: Some(7200.0),
            failures: Failing { total: 1, waived: 0, by_code: [("EIO".into(), 1)].into(), first: vec![f] },
            ..RekeyStatus::default()
        };
        assert_eq!(
            running(&s, Some(&asked())),
            "state     rekeying, paused\n\
             begun     2026-09-21T14:13:20Z, going on with an unfinished one\n\
             paths     / d/f --kek 05050505050505050505050505050505\n\
             files     9 of 100 met, 4 rekeyed with 5000 bytes, 2 done before, 1 failed; 1 do not meet the criteria; 1 are \
             empty\n\
             copied    6000 bytes, 2.6 MB a second\n\
             left      2.0 h\n\
             no header 2 files with content\n\
             failed    1 in the rekey: 1 EIO\n  \
             d/f: I/O error (EIO)\n"
        );
        let state = RekeyState { running: true, status: Some(s), ..RekeyState::default() };
        assert_eq!(in_words(&state), "rekeying, paused, 9 of 100 files, 4 rekeyed");
    }

    #[test]
    fn what_is_left_is_said_when_no_rekey_is_under_way() {
        let disk =
            OnDisk { unfinished_rekey: Some(Unfinished { files: 7, noted: 1_790_000_000 }), rekey_interrupted: true };
        let unfinished =
            "unfinished, 7 files done by 2026-09-21T14:13:20Z; a rekey of the same paths and options goes on with it";
        let daemon = |read_only| {
            let v = serde_json::json!({
                "pid": 1, "version": "0", "store": "0", "mountpoint": "/m", "backing": "/b", "uptime": 1,
                "read_only": read_only, "memory_locked": true, "keys": KeysStatus::default(),
                "dek_cache": CacheStatus::default(), "rotation": null, "rekey": null, "rekey_asked": null,
            });
            serde_json::from_value::<DaemonStatus>(v).unwrap()
        };
        assert_eq!(disk.left(Some(&daemon(false))), [unfinished]);
        let asked = Asked { paths_total: 12, written_before: Some(1_790_000_000), ..asked() };
        let knows = DaemonStatus { rekey_asked: Some(asked), ..daemon(false) };
        assert_eq!(
            disk.left(Some(&knows)),
            ["unfinished of / d/f and 10 more --written-before 2026-09-21T14:13:20Z --kek \
              05050505050505050505050505050505, 7 files done by 2026-09-21T14:13:20Z; a rekey of the same paths and \
              options goes on with it"]
        );
        let interrupted =
            "was interrupted in a file with several names; the next mount that may write finishes that file";
        assert_eq!(disk.left(Some(&daemon(true))), [unfinished, interrupted]);
        assert_eq!(disk.left(None), [unfinished, interrupted]);
    }
}
