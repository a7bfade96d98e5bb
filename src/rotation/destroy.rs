//! Destroying one retired KEK, after a fresh proof that nothing needs it.
//!
//! That a rotation proved it unused says nothing of today: a file may have been restored from an old backup since. So
//! both slots of every header are read from disk again, past the page cache, and a single one that names the KEK, or a
//! single file that cannot be looked at, is reason to leave it be.

use super::control::{Cancelled, Control};
use super::failures::{Failed, Failures};
use super::pass::Pass;
use super::report::{Counts, Progress, State, Status};
use super::run::Context;
use super::turns::Turns;
use super::verify::{Found, Verify};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::format::keyring::KekState;
use crate::format::lifecycle::Schedule;
use crate::store::keys::{Confirmation, Ending};
use crate::store::{Result, StoreError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Instant;

/// When a KEK is to be destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Now; one that is scheduled, if its time has come.
    Now,
    /// Now, if it is scheduled and its time has come: whoever asks has seen a schedule, and asked nobody again.
    Due,
    /// So many seconds from now, if nobody takes it back.
    After(u64),
    /// Not any more.
    Never,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    Destroyed,
    AlreadyDestroyed,
    Scheduled,
    /// It is scheduled, and the time has not come.
    Waiting,
    Cancelled,
    /// There was nothing to cancel.
    NotScheduled,
}

/// What came of [`destroy`]. `key destroy --json` is this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destruction {
    pub kek: KekId,
    pub outcome: Fate,
    /// What the proof looked at, if the KEK was destroyed now.
    pub proof: Option<Counts>,
    /// The earliest time at which it can be destroyed, in Unix seconds; 0 if it is not scheduled.
    pub not_before: u64,
    pub schedule: Option<Schedule>,
}

/// Destroys the retired KEK `kek`, after a scan that finds no header which names it; or schedules that, or takes that back.
/// What only it opens is lost then: old backups of files, unless there is a copy of the keyring from before. On one that is
/// destroyed already, only makes sure that neither copy of the keyring holds its wrapped bytes.
///
/// A scheduled KEK whose time has come needs no more confirmation: it was confirmed when it was scheduled. Whoever takes
/// the schedule back while the scan runs is heard.
///
/// No rotation may run meanwhile if `when` is [`When::Now`] or [`When::Due`].
///
/// # Errors
/// [`StoreError::ReadOnly`]; [`StoreError::KeyState`] if the KEK is not retired, was not proved unused by a rotation, more
/// root keys must confirm it, it is not scheduled any more, it is named by a header, a file could not be looked at, or the scan was cancelled. Nothing was
/// changed then.
pub fn destroy<B: Backing>(
    ctx: &Context<'_, B>,
    kek: KekId,
    when: When,
    confirmed: &Confirmation,
    progress: &dyn Progress,
    control: &Control,
) -> Result<Destruction> {
    if ctx.shared.read_only {
        return Err(StoreError::ReadOnly);
    }
    let (keys, b) = (&ctx.shared.keys, &ctx.shared.backing);
    let end = |outcome, proof, not_before| {
        let schedule = keys.snapshot().life.schedule(kek).copied();
        Ok(Destruction { kek, outcome, proof, not_before, schedule })
    };
    match when {
        When::After(seconds) => {
            let s = keys.schedule_destroy(b, kek, seconds, confirmed)?;
            return end(Fate::Scheduled, None, s.due);
        }
        When::Never if keys.cancel_destroy(b, kek)? => return end(Fate::Cancelled, None, 0),
        When::Never => return end(Fate::NotScheduled, None, 0),
        When::Now | When::Due => {}
    }
    if keys.snapshot().kek(kek).is_some_and(|k| k.state == KekState::Destroyed) {
        keys.destroy(b, kek, confirmed)?;
        return end(Fate::AlreadyDestroyed, None, 0);
    }
    let proof = match keys.look_at_ending(b, kek)? {
        Ending::NotBefore(t) => return end(Fate::Waiting, None, t),
        Ending::Come => {
            let proof = prove_unused(ctx, kek, progress, control)?;
            keys.destroy_scheduled(b, kek)?;
            proof
        }
        Ending::Unscheduled if when == When::Due => {
            return Err(StoreError::KeyState(format!(
                "KEK {kek} is not scheduled to be destroyed any more, and was not destroyed: somebody took that back"
            )));
        }
        Ending::Unscheduled => {
            keys.check_destroy(kek, confirmed)?;
            let proof = prove_unused(ctx, kek, progress, control)?;
            keys.destroy(b, kek, confirmed)?;
            proof
        }
    };
    end(Fate::Destroyed, Some(proof), 0)
}

/// Looks at every header, and counts.
fn prove_unused<B: Backing>(
    ctx: &Context<'_, B>,
    kek: KekId,
    progress: &dyn Progress,
    control: &Control,
) -> Result<Counts> {
    // What was moved to the active KEK a moment ago is to be on the disk before anything is believed that is read there.
    ctx.shared.backing.sync_all()?;
    let active = ctx.shared.keys.snapshot().active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
    let failures = Failures::default();
    let options = super::Options::default();
    let turns = Turns::new(&options, control, &ctx.shared.load);
    // No waiver excuses anything here: what is not known must not be lost.
    let excused = BTreeSet::new();
    let verify = Verify {
        shared: ctx.shared,
        target: active,
        excused: &excused,
        unwanted: Some(kek),
        turns: &turns,
        failures: &failures,
        found: Mutex::new(Found::default()),
    };
    let pass = Pass {
        backing: &ctx.shared.backing,
        moves: ctx.moves,
        control,
        failures: &failures,
        workers: options.reader_count(),
        gentle: true,
        share: None,
    };
    let began = Instant::now();
    let end = pass.run(b"", &verify, &mut |_| {
        let counts = verify.found.lock().counts;
        progress.update(&status(kek, counts, control.is_paused(), began.elapsed().as_secs_f64()));
    });
    let found = verify.found.into_inner();
    let why = match end {
        Err(Cancelled) => Some("the scan was cancelled".to_owned()),
        Ok(end) => refusal(&found, &failures, end.whole),
    };
    match why {
        None => Ok(found.counts),
        Some(why) => Err(StoreError::KeyState(format!("KEK {kek} was not destroyed: {why}"))),
    }
}

/// Why a scan that came to its end is no proof; `None` if it is.
fn refusal(found: &Found, failures: &Failures, whole: bool) -> Option<String> {
    if found.unwanted > 0 {
        let what = if found.unwanted == 1 { "header needs" } else { "headers need" };
        let paths = listed(&found.unwanted_paths, found.unwanted);
        return Some(format!("{} {what} it: {paths}; rotate to move them to the active KEK", found.unwanted));
    }
    let Failed { named, total, .. } = failures.take();
    if total > 0 {
        let paths: Vec<String> = named.iter().map(|f| format!("{} ({})", f.path, f.code)).collect();
        let what = if total == 1 { "file" } else { "files" };
        return Some(format!(
            "{total} {what} could not be looked at: {}; look closer with check",
            listed(&paths, total)
        ));
    }
    if found.counts.no_header > 0 {
        let n = found.counts.no_header;
        let what = if n == 1 { "file has content and no header" } else { "files have content and no header" };
        let paths = listed(&found.no_header, n);
        return Some(format!(
            "{n} {what}: {paths}; if the disk lost it, only a backup under an older KEK may have it: put it back from there \
             and rotate, or remove it"
        ));
    }
    (!whole).then(|| "files were moved faster than they could be looked at; try again".to_owned())
}

/// The first few of `total` paths.
fn listed(paths: &[String], total: u64) -> String {
    let shown: Vec<String> = paths.iter().take(PATHS_MAX).cloned().collect();
    let more = total.saturating_sub(shown.len() as u64);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    shown.join(", ") + &tail
}

/// Most paths that a refusal names.
pub(super) const PATHS_MAX: usize = 3;

fn status(kek: KekId, counts: Counts, paused: bool, elapsed: f64) -> Status {
    let rate = if elapsed > 0.0 { counts.scanned as f64 / elapsed } else { 0.0 };
    Status { state: State::Verifying, paused, target: Some(kek), pass: 1, counts, rate, elapsed, ..Status::default() }
}
