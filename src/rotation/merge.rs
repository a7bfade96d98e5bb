//! The end of a run that several machines shared: from their reports, the proof that no header names an old KEK.
//!
//! A shard's report says that a fresh scan found both slots of every header of its share under the target. Headers do not
//! go back, nothing is wrapped under any KEK but the active one, and an inode stays in its share whatever it is called. So
//! if the target is still the active KEK, all shares of one division are there, and every shard listed the same files,
//! then every header of the store is under the target: what one scan would have said. Whether reports are genuine is for
//! the caller to find out first. No clock is compared: KEK ids are random and never used again, so a report that names the
//! target was made after that KEK became active.

use super::journal::Journal;
use super::report::{Counts, Failure, Named, Outcome, Report, State};
use super::run::{Context, now, retire_unproved, told};
use super::shard::Shard;
use super::{exceptions, plan, shares};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::{KekId, StoreId};
use crate::format::time::rfc3339_seconds;
use crate::kms::event::Change;
use crate::store::{Result, StoreError};
use std::collections::BTreeMap;

/// Why a share does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Why {
    /// There is no report of it.
    NoReport,
    /// Its report is of another run.
    OtherRun(KekId),
    /// Its run ended before it was done.
    NotDone(Outcome, u64),
    /// Its proof leaves out so many files.
    Waived(u64),
    /// So many files went away while it was scanned, although nobody could take them away.
    Vanished(u64),
    /// Its scan listed other files than the first shard's.
    OtherFiles,
    /// The shares do not add up to the files listed.
    Sum,
}

/// Puts the reports of one division together. `Ok`: all shares are there and done. `Err`: those that are not, and why. A
/// store may have reports of several divisions, of runs that were given up: the one with the fewest shares missing counts.
fn judge(reports: &[Report], store: StoreId, target: KekId) -> std::result::Result<Vec<&Report>, Vec<(Shard, Why)>> {
    let mut divisions: BTreeMap<u32, BTreeMap<Shard, &Report>> = BTreeMap::new();
    for r in reports.iter().filter(|r| r.store == store) {
        let [seen] = r.shares.as_slice() else { continue };
        let latest = divisions.entry(seen.shard.of()).or_default().entry(seen.shard).or_insert(r);
        // Of this run's before another's, and the latest of several.
        if (r.target == target, r.finished) >= (latest.target == target, latest.finished) {
            *latest = r;
        }
    }
    let mut best: Option<Vec<(Shard, Why)>> = None;
    for (of, division) in divisions {
        let shards: Vec<Shard> = Shard::new(1, of).into_iter().flat_map(Shard::all).collect();
        let missing: Vec<_> =
            shards.iter().filter_map(|s| why_not(division.get(s).copied(), target).map(|w| (*s, w))).collect();
        let missing = if missing.is_empty() { apart(&division) } else { missing };
        if missing.is_empty() {
            return Ok(division.into_values().collect());
        }
        if best.as_ref().is_none_or(|b| missing.len() < b.len()) {
            best = Some(missing);
        }
    }
    Err(best.unwrap_or_default())
}

fn why_not(r: Option<&Report>, target: KekId) -> Option<Why> {
    match r {
        None => Some(Why::NoReport),
        Some(r) if r.target != target => Some(Why::OtherRun(r.target)),
        Some(r) if !r.waived.is_empty() => Some(Why::Waived(r.waived.len() as u64)),
        // A share is scanned under the lock of the store: what goes away is with another machine, or comes back.
        Some(Report { verify: Some(v), .. }) if v.vanished > 0 => Some(Why::Vanished(v.vanished)),
        Some(r) => {
            let clean = r.failures_total == 0 && r.verify.is_some() && r.slots_by_kek.keys().all(|k| *k == target);
            (r.outcome != Outcome::ShareComplete || !clean).then_some(Why::NotDone(r.outcome, r.failures_total))
        }
    }
}

/// Shards that listed other files than the rest. Empty: all saw the same files, and each of them is in one share.
fn apart(division: &BTreeMap<Shard, &Report>) -> Vec<(Shard, Why)> {
    let seen = |r: &Report| r.shares.first().cloned();
    let all: Vec<_> = division.values().filter_map(|r| seen(r)).collect();
    let Some(first) = all.first() else { return Vec::new() };
    let other = |s: &super::ShareSeen| (s.listed, &s.inodes) != (first.listed, &first.inodes);
    let others: Vec<_> = all.iter().filter(|s| other(s)).map(|s| (s.shard, Why::OtherFiles)).collect();
    let sum: u64 = all.iter().fold(0, |n, s| n.saturating_add(s.own));
    match others.is_empty() && sum != first.listed {
        true => vec![(first.shard, Why::Sum)],
        false => others,
    }
}

/// Ends the run whose shards reported `reports`: retires the old KEKs if every share is done. If not, the outcome is
/// [`Outcome::Incomplete`] and the failures name the shares. The caller has checked the seals of `reports`, and holds the
/// lock of keyring changes.
///
/// # Errors
/// [`StoreError::ReadOnly`]; [`StoreError::KeyState`] if no rotation is unfinished; those of retiring.
pub fn merge<B: Backing>(ctx: &Context<'_, B>, reports: &[Report]) -> Result<Report> {
    if ctx.shared.read_only {
        return Err(StoreError::ReadOnly);
    }
    let keys = &ctx.shared.keys;
    let ring = keys.snapshot();
    let target = ring.active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
    if !plan::is_unfinished(&ring) {
        return Err(StoreError::KeyState("no rotation is unfinished: there is nothing to merge".into()));
    }
    let mut merged = match judge(reports, keys.store_id(), target) {
        Ok(whole) => {
            let mut merged = sum(&whole, keys.store_id(), target);
            // What an earlier run had to leave out, the shards have proved.
            exceptions::forget(&ctx.shared.backing)?;
            retire_unproved(ctx.shared, &mut merged.retired)?;
            let files = merged.verify.map_or(0, |v| v.scanned);
            let mut journal = Journal::open(&ctx.shared.backing, keys, None);
            journal.note(State::Done, target, merged.started, files, b"");
            merged
        }
        Err(missing) => {
            let mut merged = sum(&[], keys.store_id(), target);
            merged.outcome = Outcome::Incomplete;
            merged.failures =
                missing.iter().map(|(s, why)| failure(*s, why, shares::last_heard(&ctx.shared.backing, *s))).collect();
            if merged.failures.is_empty() {
                merged.failures.push(none_at_all());
            }
            merged.failures_total = merged.failures.len() as u64;
            merged
        }
    };
    merged.generation = keys.snapshot().generation;
    let step = if merged.outcome == Outcome::Complete { "done" } else { "incomplete" };
    let counts = told(merged.sweep, merged.failures_total, 0);
    keys.tell(&Change::Rotation { target: Some(target.0), step, counts: &counts, result: Ok(()) });
    Ok(merged)
}

/// One report that says what all of them say.
fn sum(of: &[&Report], store: StoreId, target: KekId) -> Report {
    let mut out = Report {
        outcome: Outcome::Complete,
        store,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        target,
        resumed: true,
        started: of.iter().map(|r| r.started).min().unwrap_or_else(now),
        finished: now(),
        passes: 0,
        sweep: Counts::default(),
        verify: of.first().map(|_| Counts::default()),
        slots_by_kek: BTreeMap::new(),
        headers_by_kek: BTreeMap::new(),
        retired: Vec::new(),
        destroyed: Vec::new(),
        kept: Vec::new(),
        waived: Vec::new(),
        waivers_unused: Vec::new(),
        no_header: Vec::new(),
        failures: Vec::new(),
        failures_total: 0,
        generation: 0,
        shares: Vec::new(),
    };
    let mut no_header = Named::default();
    for r in of {
        out.passes = out.passes.saturating_add(r.passes);
        out.sweep += r.sweep;
        if let (Some(sum), Some(v)) = (&mut out.verify, r.verify) {
            *sum += v;
        }
        for (sums, counts) in [(&mut out.slots_by_kek, &r.slots_by_kek), (&mut out.headers_by_kek, &r.headers_by_kek)] {
            counts.iter().for_each(|(kek, n)| *sums.entry(*kek).or_default() += n);
        }
        no_header.extend(r.no_header.iter().cloned());
        out.shares.extend(r.shares.iter().cloned());
    }
    out.no_header = no_header.to_vec();
    out
}

fn failure(shard: Shard, why: &Why, heard: Option<u64>) -> Failure {
    let heard = heard.map_or_else(|| "it was never heard of".into(), |t| format!("last heard {}", rfc3339_seconds(t)));
    let (code, message) = match why {
        Why::NoReport => ("share-missing", format!("no report of it; {heard}; run rotate --shard {shard}")),
        Why::OtherRun(kek) => (
            "share-missing",
            format!("its report is of another rotation, to KEK {kek}; {heard}; run rotate --shard {shard}"),
        ),
        Why::NotDone(Outcome::Cancelled, _) => {
            ("share-not-done", format!("it was cancelled; {heard}; run rotate --shard {shard} again"))
        }
        Why::NotDone(_, failed) => (
            "share-not-done",
            format!("it ended with {failed} failures, which its own report names; run rotate --shard {shard} again"),
        ),
        Why::Waived(n) => (
            "share-not-done",
            format!("its proof leaves out {n} files that were waived; run rotate --waive without --shard"),
        ),
        Why::Vanished(n) => (
            "share-not-done",
            format!(
                "{n} files went away while it was scanned, although the store was locked: somebody changes the backing \
                 directory; run rotate --shard {shard} again while nobody does"
            ),
        ),
        Why::OtherFiles => (
            "share-differs",
            "it listed other files than the other shards: the store was changed between their scans, or the machines see \
             other inode numbers; run all shards again while nobody changes the store, or rotate without --shard"
                .to_owned(),
        ),
        Why::Sum => (
            "share-differs",
            "the shares do not add up to the files of the store: run all shards again, or rotate without --shard".to_owned(),
        ),
    };
    Failure { path: format!("share {shard}"), code: code.to_owned(), message, directory: false }
}

fn none_at_all() -> Failure {
    Failure {
        path: "shares".to_owned(),
        code: "share-missing".to_owned(),
        message: "no report of any shard: run rotate --shard K/N for each K from 1 to N, or rotate without --shard"
            .to_owned(),
        directory: false,
    }
}

#[cfg(test)]
mod tests;
