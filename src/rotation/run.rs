//! A run from beginning to end.

use super::barrier::Barrier;
use super::control::{Cancelled, Control};
use super::estimate::Estimate;
use super::exceptions;
use super::failures::{Failed, Failures};
use super::journal::Journal;
use super::moves::Moves;
use super::options::Options;
use super::pass::Pass;
use super::patience::Patience;
use super::plan;
use super::report::{Counts, Failing, Failure, Outcome, Progress, Report, State, Status};
use super::sealed::{SealedReport, seal_key};
use super::shard::{Share, ShareSeen};
use super::stage::{Staged, stage};
use super::sweep::{Sweep, Swept, calls_at_once};
use super::turns::Turns;
use super::verify::{Found, Verify};
use crate::backing::Backing;
use crate::format::damage::Damage;
use crate::format::ids::KekId;
use crate::format::keyring::KekState;
use crate::kms::event::Change;
use crate::store::keys::Confirmation;
use crate::store::shared::Shared;
use crate::store::{Result, StoreError};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Scans in a row that find nothing left and yet may have missed something, after which a run is given up. A scan keeps
/// up with renames however many there are, unless it is paused or its files' disk does not answer.
const SCANS_MAX: u32 = 16;
/// Sweeps of one run after which it is given up although each one found something to do. Every sweep leaves fewer
/// headers behind, so this is never reached but by a store somebody restores old files into all the while.
const SWEEPS_MAX: u32 = 16;
/// How often the cursor is written.
const CURSOR_EVERY: Duration = Duration::from_secs(5);

/// What a run works on.
pub struct Context<'a, B: Backing> {
    /// The open store. The caller holds the store's lock.
    pub shared: &'a Shared<B>,
    /// What is renamed meanwhile: the mounted store, or [`super::NoMoves`].
    pub moves: &'a dyn Moves<B>,
}

/// Moves every header of the store to a new KEK, proves it by a fresh scan, and retires the old ones.
///
/// Readers and writers go on meanwhile. A run that is killed anywhere, cancelled or ended with failures leaves every
/// file readable, and the next one goes on from there. One run at a time.
///
/// # Errors
/// [`StoreError::ReadOnly`]; [`StoreError::KeyState`] if old KEKs are to be destroyed and the store requires several root
/// keys to confirm that; those of staging and activating the new KEK, after which nothing has changed but perhaps
/// a pending KEK in the keyring; those of writing down what was waived, and of retiring and destroying the old ones.
/// Failures with single files are no error but [`Outcome::Incomplete`], unless all of them are waived.
pub fn run<B: Backing>(
    ctx: &Context<'_, B>,
    options: &Options,
    progress: &dyn Progress,
    control: &Control,
) -> Result<Report> {
    if ctx.shared.read_only && !options.dry_run {
        return Err(StoreError::ReadOnly);
    }
    let mut run = Run::new(ctx, options, progress, control);
    if options.dry_run {
        return run.count_only();
    }
    let ended = run.rotate();
    if let Err(e) = &ended {
        run.tell("failed", Err(&e.code()));
    }
    ended
}

/// What a scan says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Every file was seen, and every header is under the target in both slots, but for what is waived.
    Clean,
    /// No other was seen, but some may have been missed.
    Unsettled,
    /// Headers are behind, or could not be looked at, and that is not waived.
    Behind,
}

/// Makes the new KEK active to which shards move headers, where no run is unfinished that they could join. The caller holds
/// the lock of keyring changes.
///
/// # Errors
/// As [`run`].
pub fn begin<B: Backing>(
    ctx: &Context<'_, B>,
    options: &Options,
    progress: &dyn Progress,
    control: &Control,
) -> Result<Begun> {
    let alone = Options { shard: None, ..options.clone() };
    let mut run = Run::new(ctx, &alone, progress, control);
    Ok(match run.begin()? {
        (target, true) => Begun::To(target),
        (active, false) => Begun::NotDue(Box::new(run.report(active, Outcome::NotDue))),
    })
}

/// What came of [`begin`].
#[derive(Debug)]
pub enum Begun {
    /// Headers go to this KEK.
    To(KekId),
    /// Nothing was done.
    NotDue(Box<Report>),
}

struct Run<'a, B: Backing> {
    ctx: &'a Context<'a, B>,
    options: &'a Options,
    progress: &'a dyn Progress,
    control: &'a Control,
    turns: Turns<'a>,
    journal: RefCell<Journal<'a, B>>,
    began: Instant,
    started: u64,
    resumed: bool,
    target: Option<KekId>,
    state: State,
    since: u64,
    passes: u32,
    /// Files a second that the last scan looked at; 0 if there was none.
    verify_rate: f64,
    /// Files in the store as last counted; 0 if unknown.
    files: u64,
    /// Up to where the last sweep is known to have done everything.
    reached: Vec<u8>,
    swept: Counts,
    verified: Option<Found>,
    failed: Failed,
    /// What the last sweep's failures looked like.
    sweep_failing: Failing,
    retired: Vec<KekId>,
    destroyed: Vec<KekId>,
    kept: Vec<KekId>,
    /// The files that are ours, if not all of them.
    share: Option<Share>,
    /// What the last scan saw of all files.
    seen: Option<ShareSeen>,
}

/// What a pass is at, for the status.
#[derive(Default)]
struct At {
    counts: Counts,
    headers_by_kek: BTreeMap<KekId, u64>,
    /// Seconds since the pass began.
    seconds: f64,
    waiting: bool,
    failing: Failing,
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl<'a, B: Backing> Run<'a, B> {
    fn new(ctx: &'a Context<'a, B>, options: &'a Options, progress: &'a dyn Progress, control: &'a Control) -> Self {
        let journal = Journal::open(&ctx.shared.backing, &ctx.shared.keys, options.shard);
        let files = journal.last().map_or(0, |l| l.files);
        Self {
            ctx,
            options,
            progress,
            control,
            turns: Turns::new(options, control, &ctx.shared.load),
            journal: RefCell::new(journal),
            began: Instant::now(),
            started: now(),
            resumed: false,
            target: None,
            state: State::Staged,
            since: now(),
            passes: 0,
            verify_rate: 0.0,
            files,
            reached: Vec::new(),
            swept: Counts::default(),
            verified: None,
            failed: Failed::default(),
            sweep_failing: Failing::default(),
            retired: Vec::new(),
            destroyed: Vec::new(),
            kept: Vec::new(),
            share: options.shard.map(Share::new),
            seen: None,
        }
    }

    /// Only looks: what names which KEK now.
    fn count_only(&mut self) -> Result<Report> {
        let ring = self.ctx.shared.keys.snapshot();
        let active = ring.active().map(|k| k.id).ok_or(Damage::KeyringUnreadable)?;
        self.target = Some(active);
        match self.verify(active, &BTreeSet::new()) {
            Ok(_) => Ok(self.report(active, Outcome::DryRun)),
            Err(Cancelled) => Ok(self.report(active, Outcome::Cancelled)),
        }
    }

    fn rotate(&mut self) -> Result<Report> {
        let (target, is_due) = self.begin()?;
        if !is_due {
            return Ok(self.report(target, Outcome::NotDue));
        }
        let outcome = match self.move_headers(target)? {
            // Other shards' files may still name the old KEKs.
            Ok(true) if self.share.is_some() => Outcome::ShareComplete,
            Ok(true) => {
                self.except(target)?;
                self.retire(target)?;
                Outcome::Complete
            }
            Ok(false) => Outcome::Incomplete,
            Err(Cancelled) => Outcome::Cancelled,
        };
        match outcome {
            Outcome::Complete => {
                self.keep_exceptions_of(target);
                self.enter(State::Done, target, b"");
            }
            Outcome::ShareComplete => self.enter(State::Done, target, b""),
            // What failed may lie anywhere: the next run begins at the beginning.
            Outcome::Incomplete => self.enter(State::Incomplete, target, b""),
            Outcome::Cancelled | Outcome::DryRun | Outcome::NotDue => {
                let cursor = std::mem::take(&mut self.reached);
                self.enter(State::Cancelled, target, &cursor);
            }
        }
        Ok(self.report(target, outcome))
    }

    /// Makes the new KEK active, or goes on with the one an earlier run made. Returns the active KEK, and whether there is
    /// anything to do.
    fn begin(&mut self) -> Result<(KekId, bool)> {
        if self.share.is_some() {
            return self.join().map(|target| (target, true));
        }
        let (keys, b) = (&self.ctx.shared.keys, &self.ctx.shared.backing);
        match stage(self.ctx, self.options)? {
            Staged::NotDue(active) => Ok((active, false)),
            Staged::Resume(target) => Ok((self.resume(target), true)),
            Staged::New(target) => {
                self.target = Some(target);
                self.enter(State::Staged, target, b"");
                keys.activate(b, target)?;
                self.tell("activated", Ok(()));
                Ok((target, true))
            }
        }
    }

    /// Goes on with a run that is under way, or was.
    fn resume(&mut self, target: KekId) -> KekId {
        self.resumed = true;
        self.target = Some(target);
        self.tell("resumed", Ok(()));
        if let Some(l) = self.journal.borrow().last().filter(|l| l.target == target) {
            self.started = l.started;
        }
        target
    }

    /// A shard's beginning: the KEK is there, and the keyring is not ours to change.
    fn join(&mut self) -> Result<KekId> {
        let ring = self.ctx.shared.keys.snapshot();
        match ring.active().filter(|_| plan::is_unfinished(&ring)).map(|k| k.id) {
            Some(target) => Ok(self.resume(target)),
            None => Err(StoreError::KeyState("no rotation is unfinished that a shard could join".into())),
        }
    }

    /// Sweeps and scans until a scan finds nothing left. `Ok(true)`: it did.
    fn move_headers(&mut self, target: KekId) -> Result<std::result::Result<bool, Cancelled>> {
        let mut cursor = self.cursor(target);
        for sweep in 0..SWEEPS_MAX {
            self.failed = Failed::default();
            self.sweep_failing = Failing::default();
            self.enter(State::Sweeping, target, &cursor);
            let durable = match self.sweep(target, &cursor, sweep > 0)? {
                Ok(durable) => durable,
                Err(c) => return Ok(Err(c)),
            };
            cursor.clear();
            self.enter(State::Verifying, target, b"");
            let mut swept = std::mem::take(&mut self.failed);
            let verdict = match self.prove(target, &swept.waived_paths()) {
                Ok(verdict) => verdict,
                Err(c) => {
                    self.failed.also(swept);
                    return Ok(Err(c));
                }
            };
            // What the scan saw may be in memory only if the barrier failed.
            if verdict == Verdict::Clean && durable {
                // What the sweep could not do is of no interest any more if the scan found it done.
                let excused = self.verified.as_ref().map(|v| &v.excused);
                swept.waived.retain(|path, _| excused.is_some_and(|e| e.contains(path)));
                self.failed.also(Failed { waived: swept.waived, ..Failed::default() });
                return Ok(Ok(true));
            }
            // A failure that the scan did not see again is only told if the run fails for it.
            self.failed.also(swept);
            if self.failed.total > 0 {
                return Ok(Ok(false));
            }
            if verdict == Verdict::Unsettled {
                break;
            }
        }
        self.failed.add(Failure {
            path: "/".to_owned(),
            code: "not-settled".to_owned(),
            message: "files were moved or restored faster than they could be looked at; run rotate again".to_owned(),
            directory: false,
        });
        Ok(Ok(false))
    }

    fn pass<'p>(&'p self, failures: &'p Failures, workers: usize) -> Pass<'p, B> {
        Pass {
            backing: &self.ctx.shared.backing,
            moves: self.ctx.moves,
            control: self.control,
            failures,
            workers,
            gentle: !self.options.full_speed,
            share: self.share.as_ref(),
        }
    }

    /// One sweep and the barrier that makes it durable. `Ok(false)`: the barrier failed.
    fn sweep(&mut self, target: KekId, cursor: &[u8], again: bool) -> Result<std::result::Result<bool, Cancelled>> {
        self.passes += 1;
        let failures = Failures::new(&self.options.waive);
        let sweep = Sweep {
            shared: self.ctx.shared,
            target: self.ctx.shared.keys.kek(target)?,
            control: self.control,
            failures: &failures,
            again,
            turns: &self.turns,
            calls: calls_at_once(self.ctx.shared, self.options.worker_count()),
            barrier: Barrier::default(),
            patience: Mutex::new(Patience::new(self.options.patience)),
            swept: Mutex::default(),
        };
        let pass_began = Instant::now();
        let (mut noted, mut reached) = (Instant::now(), cursor.to_vec());
        let end = self.pass(&failures, self.options.worker_count()).run(cursor, &sweep, &mut |at| {
            let Swept { counts, found_under } = sweep.swept.lock().clone();
            let waiting = sweep.patience.lock().is_waiting();
            let seconds = pass_began.elapsed().as_secs_f64();
            self.show(At { counts, headers_by_kek: found_under, seconds, waiting, failing: failures.so_far() });
            if let Some(at) = at {
                reached = at.to_vec();
            }
            if noted.elapsed() >= CURSOR_EVERY {
                self.journal.borrow_mut().note(State::Sweeping, target, self.started, self.files, &reached);
                noted = Instant::now();
            }
        });
        // The last second halves are not durable before this, and until then no old KEK may go.
        let barrier = self.ctx.shared.backing.sync_all();
        let durable = barrier.is_ok();
        if let Err(e) = barrier {
            failures.add("/".to_owned(), &e.into());
        }
        self.swept += sweep.swept.into_inner().counts;
        self.sweep_failing = failures.so_far();
        self.failed = failures.take();
        // Past a failure the cursor would lead the next run past it too.
        let whole = self.failed.total == 0 && self.failed.waived.is_empty();
        self.reached = if whole { reached } else { Vec::new() };
        Ok(end.map(|_| durable))
    }

    /// Scans until a scan says how things are: there is nothing to sweep as long as none is found behind.
    fn prove(&mut self, target: KekId, excused: &BTreeSet<String>) -> std::result::Result<Verdict, Cancelled> {
        for _ in 1..SCANS_MAX {
            let verdict = self.verify(target, excused)?;
            if verdict != Verdict::Unsettled {
                return Ok(verdict);
            }
        }
        self.verify(target, excused)
    }

    /// One fresh scan; `excused` are paths at which something that is waived failed in the sweep.
    fn verify(&mut self, target: KekId, excused: &BTreeSet<String>) -> std::result::Result<Verdict, Cancelled> {
        self.passes += 1;
        let failures = Failures::new(&self.options.waive);
        let verify = Verify {
            shared: self.ctx.shared,
            target,
            turns: &self.turns,
            excused,
            unwanted: None,
            failures: &failures,
            found: Mutex::new(Found::default()),
        };
        let (pass_began, began) = (Instant::now(), now());
        self.share.iter().for_each(Share::count_anew);
        let end = self.pass(&failures, self.options.reader_count()).run(b"", &verify, &mut |_| {
            let found = verify.found.lock();
            let (counts, headers_by_kek) = (found.counts, found.headers.clone());
            drop(found);
            let seconds = pass_began.elapsed().as_secs_f64();
            self.show(At { counts, headers_by_kek, seconds, waiting: false, failing: failures.so_far() });
        });
        let found = verify.found.into_inner();
        self.verify_rate = rate(found.counts.scanned, pass_began.elapsed().as_secs_f64());
        self.failed = failures.take();
        let verdict = end.map(|e| match (found.behind == 0 && self.failed.total == 0, e.whole) {
            (true, true) => Verdict::Clean,
            (true, false) => Verdict::Unsettled,
            (false, _) => Verdict::Behind,
        });
        self.files = found.counts.scanned;
        self.verified = Some(found);
        self.seen = self.share.as_ref().map(|s| s.seen(began, now()));
        verdict
    }

    /// Tells what the proof leaves out, and writes it down durably, before anything is built on the proof.
    fn except(&mut self, target: KekId) -> Result<()> {
        let b = &self.ctx.shared.backing;
        if self.failed.waived.is_empty() {
            // What an earlier run had to leave out, this one has proved.
            return Ok(exceptions::forget(b)?);
        }
        let waived = self.failed.waived.values();
        waived.for_each(|f| {
            self.ctx.shared.keys.tell(&Change::Waived { target: target.0, path: &f.path, code: &f.code })
        });
        let report = self.report(target, Outcome::Complete);
        Ok(exceptions::keep(b, &self.seal(&report))?)
    }

    /// Completes what was written down.
    fn keep_exceptions_of(&self, target: KekId) {
        if self.failed.waived.is_empty() {
            return;
        }
        let report = self.report(target, Outcome::Complete);
        tracing::warn!(waived = report.waived.len(), kek = %target, "rotation: complete but for what was waived");
        if let Err(e) = exceptions::keep(&self.ctx.shared.backing, &self.seal(&report)) {
            tracing::warn!("rotation: what was waived stays written down as before the old KEKs were retired: {e}");
        }
    }

    fn seal(&self, report: &Report) -> SealedReport {
        SealedReport::new(report, &seal_key(self.ctx.shared.keys.secret()))
    }

    /// Marks the old KEKs as proved unused, and destroys them if asked and nothing that was waived may need them.
    fn retire(&mut self, target: KekId) -> Result<()> {
        let (keys, b) = (&self.ctx.shared.keys, &self.ctx.shared.backing);
        self.enter(State::Retiring, target, b"");
        retire_unproved(self.ctx.shared, &mut self.retired)?;
        if self.options.destroy_old {
            let ring = keys.snapshot();
            // What is scheduled has a time of its own.
            let mut retired = plan::in_state(&ring, KekState::Retired);
            retired.retain(|id| ring.life.schedule(*id).is_none());
            let (destroy, keep) = self.destructible(retired);
            self.kept = keep;
            for id in destroy {
                keys.destroy(b, id, &Confirmation::default())?;
                self.destroyed.push(id);
            }
        }
        Ok(())
    }

    /// Which of the retired KEKs `old` the scan proved that nothing needs, and which not. It did so for all of them but
    /// for what was waived: that may be under any KEK, unless its header was read and says which. A file that has no header
    /// needs none; but if the disk lost that, a backup of the file is all there is of it, and under any KEK, too.
    fn destructible(&self, old: Vec<KekId>) -> (Vec<KekId>, Vec<KekId>) {
        let Some(found) = &self.verified else { return (Vec::new(), old) };
        let unsaid = found.unsaid + found.counts.no_header > 0 || self.failed.waived.values().any(|f| f.directory);
        old.into_iter().partition(|id| !unsaid && !found.left.contains(id))
    }

    /// Where the journal says an earlier run to the same KEK had got to.
    fn cursor(&self, target: KekId) -> Vec<u8> {
        self.journal.borrow().last().filter(|l| l.target == target).map(|l| l.cursor.clone()).unwrap_or_default()
    }

    fn enter(&mut self, state: State, target: KekId, cursor: &[u8]) {
        (self.state, self.since) = (state, now());
        let share_done = self.share.is_some() && state == State::Done;
        self.tell(if share_done { "share-done" } else { state.as_str() }, Ok(()));
        self.journal.borrow_mut().note(state, target, self.started, self.files, cursor);
        self.show(At::default());
    }

    /// Tells the keys' observer how far the run is, with what its sweeps have done so far.
    fn tell(&self, step: &str, result: std::result::Result<(), &str>) {
        let counts = told(self.swept, self.failed.total, self.failed.waived.len() as u64);
        let target = self.target.map(|k| k.0);
        self.ctx.shared.keys.tell(&Change::Rotation { target, step, counts: &counts, result });
    }

    fn show(&self, at: At) {
        let expected = Some(self.files).filter(|f| *f > 0);
        let rate = rate(at.counts.scanned, at.seconds);
        let (sweep_failures, verify_failures) = match self.state {
            State::Sweeping => (at.failing, Failing::default()),
            _ => (self.sweep_failing.clone(), at.failing),
        };
        let left = Estimate { state: self.state, expected, scanned: at.counts.scanned, rate, verify: self.verify_rate };
        self.progress.update(&Status {
            state: self.state,
            paused: self.control.is_paused(),
            waiting: at.waiting,
            started: self.started,
            since: self.since,
            target: self.target,
            pass: self.passes,
            counts: at.counts,
            expected,
            rate,
            elapsed: self.began.elapsed().as_secs_f64(),
            eta: left.of_pass(),
            run_eta: left.of_run(),
            headers_by_kek: at.headers_by_kek,
            sweep_failures,
            verify_failures,
        });
    }

    fn report(&self, target: KekId, outcome: Outcome) -> Report {
        let keys = &self.ctx.shared.keys;
        let found = self.verified.as_ref();
        // A run that did not look at everything cannot tell.
        let judged = matches!(outcome, Outcome::Complete | Outcome::Incomplete | Outcome::DryRun);
        let unused = |path: &&str| judged && !self.failed.waived.contains_key(*path);
        Report {
            outcome,
            store: keys.store_id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            target,
            resumed: self.resumed,
            started: self.started,
            finished: now(),
            passes: self.passes,
            sweep: self.swept,
            verify: found.map(|v| v.counts),
            slots_by_kek: found.map(|v| v.by_kek.clone()).unwrap_or_default(),
            headers_by_kek: found.map(|v| v.headers.clone()).unwrap_or_default(),
            retired: self.retired.clone(),
            destroyed: self.destroyed.clone(),
            kept: self.kept.clone(),
            waived: self.failed.waived.values().cloned().collect(),
            waivers_unused: self.options.waive.paths().filter(unused).map(str::to_owned).collect(),
            no_header: found.map(|v| v.no_header.to_vec()).unwrap_or_default(),
            failures: self.failed.named.to_vec(),
            failures_total: self.failed.total,
            generation: keys.snapshot().generation,
            shares: self.seen.iter().cloned().collect(),
        }
    }
}

/// What the keys' observer is told of a run: what was done, and how much failed.
pub(super) fn told(swept: Counts, failed: u64, waived: u64) -> Vec<(&'static str, u64)> {
    swept.named().into_iter().chain([("failures_total", failed), ("waived", waived)]).collect()
}

/// Files a second.
fn rate(files: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { files as f64 / seconds } else { 0.0 }
}

/// Marks every KEK as proved unused that is retired and was not marked yet.
pub(super) fn retire_unproved<B: Backing>(shared: &Shared<B>, retired: &mut Vec<KekId>) -> Result<()> {
    for id in plan::unproved(&shared.keys.snapshot()) {
        shared.keys.retire(&shared.backing, id)?;
        retired.push(id);
    }
    Ok(())
}
