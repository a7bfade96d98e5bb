//! How rotations of a store stand: `rotate --status`, and its part of `status`. Needs no key.

use super::output;
use super::place::Place;
use super::rotate::{outcome, phase, standing};
use super::status::{ask, is_unfinished};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::{Taken, VolumeLock};
use crate::daemon::protocol::RotationState;
use crate::daemon::shard_lock;
use crate::format::ids::{KekId, StoreId};
use crate::format::keyring::{KekRecord, KekState};
use crate::format::time::rfc3339_seconds;
use crate::rotation::record::Record;
use crate::rotation::{Failing, Failure, Report, Shard, State, Status, exceptions, last_noted, shares};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;

/// What the backing directory says of rotations. Stable; part of `rotate --status --json` and of `status --json`.
#[derive(Debug, Serialize)]
pub struct OnDisk {
    /// A rotation was begun and has not proved yet that no header names an old KEK.
    pub rotation_unfinished: bool,
    /// `null` if there was none, or its journal is lost.
    pub last_rotation: Option<LastRotation>,
    /// Of the unfinished rotation, the shards that have begun.
    pub shards: Vec<ShardNoted>,
    /// `null` if there are none.
    pub exceptions: Option<Exceptions>,
}

/// What the journal says of the last rotation. Times are Unix seconds.
#[derive(Debug, Serialize)]
pub struct LastRotation {
    pub state: State,
    pub target: KekId,
    pub started: u64,
    /// When this was written.
    pub noted: u64,
    /// Files in the store as last counted, 0 if they were not.
    pub files: u64,
    /// It is known how far the sweep had got; else the next one begins at the beginning.
    pub cursor: bool,
}

/// What the journal of a shard says of its last run.
#[derive(Debug, Serialize)]
pub struct ShardNoted {
    pub shard: Shard,
    #[serde(flatten)]
    pub last: LastRotation,
}

/// What the last complete rotation left out. Times are Unix seconds.
#[derive(Debug, Serialize)]
pub struct Exceptions {
    /// Its report, sealed: see `key verify-report`.
    pub report: String,
    pub target: KekId,
    pub finished: u64,
    pub waived: Vec<Failure>,
}

impl OnDisk {
    /// Looks. What cannot be read there is said in the log, and left out.
    pub fn find(place: &Place) -> Self {
        let b = &place.posix;
        let rotation_unfinished = place.keyring.keks.iter().any(is_unfinished);
        // Journals of shards stay when their rotation is over.
        let target = place.keyring.active().map(|k| k.id).filter(|_| rotation_unfinished);
        let shards =
            readable("journals of shards of rotations", shares::noted(b).map(Some)).unwrap_or_default().into_iter();
        Self {
            rotation_unfinished,
            last_rotation: readable("journal of rotations", last_noted(b, None)).map(last),
            shards: shards
                .filter(|(_, r, _)| Some(r.target) == target)
                .map(|(shard, r, noted)| ShardNoted { shard, last: last((r, noted)) })
                .collect(),
            exceptions: readable("exceptions of rotations", excepted(place)),
        }
    }

    /// How many files and directories the proof left out that the KEK `k` is unused, if that was proved.
    pub fn waived_of(&self, k: &KekRecord) -> Option<u64> {
        let proved = k.state == KekState::Retired && k.unused != 0;
        self.exceptions.as_ref().filter(|_| proved).map(|e| e.waived.len() as u64)
    }
}

/// What was read; what cannot be is said and left out.
pub(super) fn readable<T>(what: &str, read: io::Result<Option<T>>) -> Option<T> {
    read.unwrap_or_else(|e| {
        eprintln!("envelopefs: {what} cannot be read: {e}");
        None
    })
}

fn last((r, noted): (Record, i64)) -> LastRotation {
    LastRotation {
        state: r.state,
        target: r.target,
        started: r.started,
        noted: u64::try_from(noted).unwrap_or(0),
        files: r.files,
        cursor: !r.cursor.is_empty(),
    }
}

fn excepted(place: &Place) -> io::Result<Option<Exceptions>> {
    let found = exceptions::read(&place.posix)?.filter(|r| r.store == place.keyring.store);
    let path = place.backing.join(exceptions::PATH).display().to_string();
    let seen = |r: Report| Exceptions { report: path, target: r.target, finished: r.finished, waived: r.waived };
    Ok(found.map(seen))
}

/// `rotate --status --json`. Stable.
#[derive(Debug, Serialize)]
struct View {
    store: StoreId,
    backing: String,
    mounted: bool,
    /// Some process has the store: a daemon, a rotation or a check.
    locked: bool,
    /// Without a daemon that says of itself what it does, a process has the store alone.
    #[serde(skip)]
    alone: bool,
    /// The shards that run now.
    shards_at_work: Vec<Shard>,
    #[serde(flatten)]
    disk: OnDisk,
    /// The rotation under way in the daemon, or the last one since the mount.
    rotation: Option<RotationState>,
}

/// Runs `rotate --status`.
///
/// # Errors
/// [`FaultKind::RotationIncomplete`] after saying so, if a rotation is unfinished and none is under way; the daemon's.
pub fn run(place: &Place, json: bool) -> Result<(), Fault> {
    let daemon = ask(place)?;
    let taken = VolumeLock::taken(&place.backing);
    let v = View {
        store: place.keyring.store,
        backing: place.backing.display().to_string(),
        mounted: daemon.is_some(),
        locked: taken != Taken::No,
        alone: taken == Taken::Alone && daemon.is_none(),
        shards_at_work: shard_lock::at_work(&place.backing),
        disk: OnDisk::find(place),
        rotation: daemon.and_then(|d| d.rotation),
    };
    if json {
        output::print_json(&v)?
    } else {
        output::print(&text(&v))?
    }
    if v.disk.rotation_unfinished && !v.is_under_way() {
        return Err(Fault::new(FaultKind::RotationIncomplete, "a rotation is unfinished, and none is under way"));
    }
    Ok(())
}

impl View {
    /// A daemon is rotating, or shards are, or a process has the store alone and its journal says so.
    fn is_under_way(&self) -> bool {
        let at_work = |l: &LastRotation| !matches!(l.state, State::Done | State::Cancelled | State::Incomplete);
        let by_daemon = self.rotation.as_ref().is_some_and(|r| r.running);
        let of_one = self.disk.last_rotation.iter().filter(|_| !self.is_shared_out());
        let by_itself = self.alone && of_one.into_iter().any(at_work);
        by_daemon || by_itself || !self.shards_at_work.is_empty()
    }

    /// Shards are at it or were, and since them nobody alone: the store's own journal says no more than that the rotation was
    /// begun for them.
    fn is_shared_out(&self) -> bool {
        let heard = self.disk.shards.iter().map(|s| s.last.noted).max();
        heard.is_some_and(|h| self.disk.last_rotation.as_ref().is_none_or(|l| l.state == State::Staged || l.noted < h))
    }
}

fn text(v: &View) -> String {
    let mut t = String::new();
    match &v.rotation {
        Some(RotationState { running: true, status: None, .. }) => t += "state     starting\n",
        Some(RotationState { running: true, status: Some(s), .. }) => t += &running(s),
        Some(RotationState { report: Some(r), .. }) => t += &ended(r),
        Some(RotationState { fault: Some(f), .. }) => t += &format!("state     failed: {f}\n"),
        _ if v.is_shared_out() => t += &shared_out(&v.disk.shards),
        _ => match &v.disk.last_rotation {
            Some(l) => t += &noted(l, v.is_under_way()),
            None => t += "state     there was no rotation\n",
        },
    }
    if v.disk.rotation_unfinished && !v.is_under_way() {
        t += match v.is_shared_out() {
            true => {
                "unfinished: when all shards are done, rotate --merge ends it; a rotate alone goes on with it, too\n"
            }
            false => "unfinished: headers may be under old KEKs; the next rotate goes on with it\n",
        };
    }
    t + &v.disk.exceptions.as_ref().map_or_else(String::new, in_words)
}

/// What the last complete rotation left out, for people.
pub fn in_words(e: &Exceptions) -> String {
    let when = rfc3339_seconds(e.finished);
    format!("waived    {} that the rotation of {when} left out: {}\n", e.waived.len(), e.report) + &listed(&e.waived)
}

/// Failures that are shown here; reports have them all.
const SHOWN: usize = 10;

/// The first few failures, a line each.
pub(super) fn listed(all: &[Failure]) -> String {
    in_lines(all, Failure::in_words)
}

fn in_lines<T>(all: &[T], words: impl Fn(&T) -> String) -> String {
    let mut t: String = all.iter().take(SHOWN).map(|f| format!("  {}\n", words(f))).collect();
    if all.len() > SHOWN {
        t += &format!("  and {} more\n", all.len() - SHOWN);
    }
    t
}

fn running(s: &Status) -> String {
    let mut t = format!("state     {}{}\n", phase(s.state), standing(s));
    t += &format!("since     {}, begun {}\n", rfc3339_seconds(s.since), rfc3339_seconds(s.started));
    if let Some(k) = s.target {
        t += &format!("target    KEK {k}\n");
    }
    let of = s.expected.map_or(String::new(), |n| format!(" of {n}"));
    let c = &s.counts;
    t += &format!("pass      {}, {}{of} files, {:.0} a second\n", s.pass, c.scanned, s.rate);
    t += &format!(
        "files     {} rewrapped, {} current, {} empty, {} vanished, {} failed\n",
        c.rewrapped, c.current, c.empty, c.vanished, c.failed
    );
    t += &without_header(c.no_header, &[]);
    for (kek, n) in &s.headers_by_kek {
        t += &format!("headers   {n} found under KEK {kek}\n");
    }
    if let (Some(pass), Some(run)) = (s.eta, s.run_eta) {
        t += &format!("left      {} of this pass, {} of the rotation\n", minutes(pass), minutes(run));
    }
    t + &failing("sweep", &s.sweep_failures) + &failing("scan", &s.verify_failures)
}

/// That so many files have content and no header, and the paths of the first few, if any are known.
pub(super) fn without_header(n: u64, paths: &[String]) -> String {
    match n {
        0 => String::new(),
        n => format!("no header {n} files with content\n") + &in_lines(paths, |path| format!("{path}; see check")),
    }
}

/// What has failed in a pass, for people.
pub(super) fn failing(pass: &str, f: &Failing) -> String {
    let mut t = String::new();
    if f.total > 0 {
        let codes: Vec<String> = f.by_code.iter().map(|(code, n)| format!("{n} {code}")).collect();
        t += &format!("failed    {} in the {pass}: {}\n", f.total, codes.join(", "));
        t += &listed(&f.first);
    }
    if f.waived > 0 {
        t += &format!("waived    {} that failed in the {pass}\n", f.waived);
    }
    t
}

fn ended(r: &Report) -> String {
    let mut t = format!("state     {}\n", outcome(r.outcome));
    t += &format!("time      {} to {}\n", rfc3339_seconds(r.started), rfc3339_seconds(r.finished));
    t += &format!("target    KEK {}\n", r.target);
    t += &format!("files     {} moved, {} failed, {} waived\n", r.sweep.rewrapped, r.failures_total, r.waived.len());
    t += &without_header(r.verify.map_or(0, |v| v.no_header), &r.no_header);
    t + &listed(&r.failures)
}

fn noted(l: &LastRotation, under_way: bool) -> String {
    let mut t = match under_way {
        true => format!("state     {}, in another process\n", phase(l.state)),
        false => format!("state     {}, when it was last written down\n", phase(l.state)),
    };
    t += &format!("time      begun {}, written down {}\n", rfc3339_seconds(l.started), rfc3339_seconds(l.noted));
    t += &format!("target    KEK {}\n", l.target);
    if l.files > 0 {
        t += &format!("files     {} in the store as last counted\n", l.files);
    }
    if l.cursor {
        t += "cursor    known: the next rotate goes on from there\n";
    }
    t
}

/// A rotation that several machines share. Those that are done are counted only.
fn shared_out(shards: &[ShardNoted]) -> String {
    let mut t = "state     shared out among machines\n".to_owned();
    if let Some(s) = shards.first() {
        t += &format!("target    KEK {}\n", s.last.target);
    }
    let mut divisions: BTreeMap<u32, Vec<&ShardNoted>> = BTreeMap::new();
    shards.iter().for_each(|s| divisions.entry(s.shard.of()).or_default().push(s));
    for (of, heard) in divisions {
        let (done, rest): (Vec<&ShardNoted>, Vec<_>) = heard.iter().partition(|s| s.last.state == State::Done);
        let silent = (of as usize).saturating_sub(heard.len());
        t += &format!("shards    {} of {of} done, {} begun, {silent} never heard of\n", done.len(), rest.len());
        for s in rest.iter().take(SHOWN) {
            let when = rfc3339_seconds(s.last.noted);
            t += &format!("  {}: {}, when it was last written down at {when}\n", s.shard, phase(s.last.state));
        }
        if rest.len() > SHOWN {
            t += &format!("  and {} more\n", rest.len() - SHOWN);
        }
    }
    t
}

/// A time to come, in the largest unit that says enough.
pub(super) fn minutes(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::Counts;

    #[test]
    fn shards_are_counted_by_their_divisions_and_those_not_done_are_named() {
        let noted = |shard: &str, state| ShardNoted {
            shard: shard.parse().unwrap(),
            last: LastRotation {
                state,
                target: KekId([2; 16]),
                started: 1_790_000_000,
                noted: 1_790_000_001,
                files: 0,
                cursor: false,
            },
        };
        let seen = [
            noted("1/2", State::Done),
            noted("1/4", State::Done),
            noted("2/4", State::Sweeping),
            noted("4/4", State::Done),
        ];
        assert_eq!(
            shared_out(&seen),
            format!(
                "state     shared out among machines\n\
                 target    KEK {}\n\
                 shards    1 of 2 done, 0 begun, 1 never heard of\n\
                 shards    2 of 4 done, 1 begun, 1 never heard of\n  \
                 2/4: rewrapping, when it was last written down at 2026-09-21T14:13:21Z\n",
                "02".repeat(16)
            )
        );
    }

    #[test]
    fn a_running_rotation_says_where_it_is_and_what_failed() {
        let f = Failure { path: "d/f".into(), code: "EIO".into(), message: "I/O error".into(), directory: true };
        let failing = Failing {
            total: 3,
            waived: 1,
            by_code: [("EIO".into(), 2), ("wrap-auth".into(), 1)].into(),
            first: vec![f],
        };
        let s = Status {
            state: State::Sweeping,
            waiting: true,
            started: 1_790_000_000,
            since: 1_790_000_001,
            target: Some(KekId([2; 16])),
            pass: 1,
            counts: Counts { scanned: 9, rewrapped: 5, current: 1, empty: 0, no_header: 2, vanished: 0, failed: 3 },
            expected: Some(100),
            rate: 4.5,
            eta: Some(60.0),
            run_eta: Some(7200.0),
            headers_by_kek: [(KekId([1; 16]), 5)].into(),
            sweep_failures: failing,
            ..Status::default()
        };
        let (one, two) = ("01".repeat(16), "02".repeat(16));
        assert_eq!(
            running(&s),
            format!(
                "state     rewrapping, waiting for the key service\n\
                 since     2026-09-21T14:13:21Z, begun 2026-09-21T14:13:20Z\n\
                 target    KEK {two}\n\
                 pass      1, 9 of 100 files, 4 a second\n\
                 files     5 rewrapped, 1 current, 0 empty, 0 vanished, 3 failed\n\
                 no header 2 files with content\n\
                 headers   5 found under KEK {one}\n\
                 left      60 s of this pass, 2.0 h of the rotation\n\
                 failed    3 in the sweep: 2 EIO, 1 wrap-auth\n  \
                 d/f: I/O error (EIO); nothing below it was looked at\n\
                 waived    1 that failed in the sweep\n"
            )
        );
    }
}
