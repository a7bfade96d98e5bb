//! The sweep: moves every header of a batch to the target KEK.

use super::barrier::{Barrier, Since};
use super::control::{Cancelled, Control};
use super::failures::Failures;
use super::pass::{Item, Visitor};
use super::patience::Patience;
use super::report::Counts;
use super::rewrap::{First, Half, Leave, Second, Tried, first_half, second_half};
use super::turns::Turns;
use crate::backing::Backing;
use crate::format::ids::KekId;
use crate::store::StoreError;
use crate::store::keys::KekHandle;
use crate::store::shared::Shared;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// From so many headers on, one barrier over the whole file system is cheaper than one for each file
/// (`docs/adr/0010-rotation.md` has the measurement).
const SYNC_ALL_FROM: usize = 8;
/// How often a file is begun again whose header changed between the halves.
const TRIES: usize = 8;

/// How soon leave for a header's calls is asked for again at the earliest: each time its slots are read again, and a service
/// that many ask may say a very short time.
pub(super) const LEAVE_AGAIN: Duration = Duration::from_millis(20);

/// First halves under way at once in a run, where each is a handful of calls to a key service. At 10 ms a call, three a
/// header, that is 500 headers a second, which is more than the usual limits allow; and half as many as a service is
/// called at once.
const CALLS_AT_ONCE: usize = 16;

/// First halves that each of `workers` has under way at once: more than one only where that is calls to a service, which
/// keep no processor busy.
pub(super) fn calls_at_once<B: Backing>(shared: &Shared<B>, workers: usize) -> usize {
    if shared.keys.calls_a_service() { CALLS_AT_ONCE.div_ceil(workers.max(1)) } else { 1 }
}

/// A header between its halves, and where it was found.
type Begun<B> = (Item<B>, Half<B>);

/// What a sweep has done.
#[derive(Debug, Clone, Default)]
pub(super) struct Swept {
    pub(super) counts: Counts,
    /// Headers by the KEK that they were found under.
    pub(super) found_under: BTreeMap<KekId, u64>,
}

impl Swept {
    fn found(&mut self, kek: KekId) {
        *self.found_under.entry(kek).or_default() += 1;
    }
}

/// Rewraps what it is given.
pub(super) struct Sweep<'a, B: Backing> {
    pub(super) shared: &'a Shared<B>,
    pub(super) target: Arc<KekHandle>,
    pub(super) control: &'a Control,
    pub(super) failures: &'a Failures,
    /// A scan of the disk found headers behind that the sweep before it took for done: a page whose writeback failed
    /// stays in the cache as if it were clean. Every header is written again.
    pub(super) again: bool,
    pub(super) turns: &'a Turns<'a>,
    /// First halves of a batch under way at once, see [`calls_at_once`].
    pub(super) calls: usize,
    pub(super) barrier: Barrier,
    pub(super) patience: Mutex<Patience>,
    pub(super) swept: Mutex<Swept>,
}

impl<B: Backing> Sweep<'_, B> {
    /// The first half of one header. A key service that does not answer is waited for as long as there is patience:
    /// an outage in the middle of a run is no reason to end it with as many failures as there are files.
    fn first(&self, item: &Item<B>) -> Result<Result<First<B>, StoreError>, Cancelled> {
        let mut leave = Leave::default();
        loop {
            match first_half(self.shared, &self.target, item, self.again, &mut leave) {
                Ok(Tried::NotYet(wait)) => self.idle(|| self.control.wait(wait.max(LEAVE_AGAIN)))?,
                Err(StoreError::Kms(e)) if e.is_retryable() => {
                    leave = Leave::default();
                    let wait = self.patience.lock().wait(Instant::now());
                    match wait {
                        Some(wait) => self.idle(|| self.control.wait(wait))?,
                        None => return Ok(Err(e.into())),
                    }
                }
                Ok(Tried::Done(first)) => {
                    self.patience.lock().answered();
                    return Ok(Ok(first));
                }
                Err(e) => {
                    self.patience.lock().answered();
                    return Ok(Err(e));
                }
            }
        }
    }

    /// Waits: what users wait meanwhile is not this worker's doing.
    fn idle<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.shared.load.work(false);
        let r = wait();
        self.shared.load.work(true);
        r
    }

    fn fail(&self, counts: &mut Counts, path: String, e: &StoreError) {
        counts.failed += 1;
        self.failures.add(path, e);
    }

    /// First halves of all `items`, several at once. A cancel leaves out the rest: what was begun is to be finished.
    fn begin(&self, items: Vec<Item<B>>, done: &mut Swept, end: &mut Result<(), Cancelled>) -> Vec<Begun<B>> {
        let at_once = self.calls.min(items.len());
        let items = Mutex::new(items.into_iter());
        let all = Mutex::new((Vec::new(), done, end));
        let work = || {
            while all.lock().2.is_ok() {
                let Some(item) = items.lock().next() else { break };
                let first = self.turns.next(!item.has_moved()).and_then(|()| self.first(&item));
                let (halves, done, end) = &mut *all.lock();
                match first {
                    Ok(Ok(First::Current)) => {
                        done.counts.current += 1;
                        done.found(self.target.id());
                    }
                    Ok(Ok(First::Empty)) => done.counts.empty += 1,
                    // The scan tells of it.
                    Ok(Ok(First::NoHeader)) => done.counts.no_header += 1,
                    Ok(Ok(First::Gone)) => done.counts.vanished += 1,
                    Ok(Ok(First::Half(h))) => halves.push((item, *h)),
                    Ok(Err(e)) => self.fail(&mut done.counts, item.shown(), &e),
                    Err(c) => **end = Err(c),
                }
            }
        };
        std::thread::scope(|s| {
            let helper = || {
                let _at_work = self.turns.at_work();
                work();
            };
            let helpers: Vec<_> = (1..at_once).map(|_| s.spawn(helper)).collect();
            work();
            // Some of them may be resting.
            if let Some(panic) = self.idle(|| helpers.into_iter().find_map(|h| h.join().err())) {
                std::panic::resume_unwind(panic);
            }
        });
        all.into_inner().0
    }

    /// Makes the first halves durable. Those for which that failed are dropped: their old slot must stay.
    fn durable(&self, halves: Vec<Begun<B>>, since: Since, counts: &mut Counts) -> Vec<Begun<B>> {
        let b = &self.shared.backing;
        if halves.len() >= SYNC_ALL_FROM && self.barrier.wait(b, since) {
            return halves;
        }
        // One by one, also to find out which file a failed barrier was about.
        let mut durable = Vec::with_capacity(halves.len());
        for (item, h) in halves {
            match b.sync_file(&h.file) {
                Ok(()) => durable.push((item, h)),
                Err(e) => self.fail(counts, item.shown(), &e.into()),
            }
        }
        durable
    }

    /// Both halves of `items`, with one barrier in between.
    fn together(&self, items: Vec<Item<B>>, done: &mut Swept) -> Result<(), Cancelled> {
        let (mut end, mut todo) = (Ok(()), items);
        for _ in 0..TRIES {
            let since = self.barrier.now();
            let halves = self.begin(std::mem::take(&mut todo), done, &mut end);
            for (item, h) in self.durable(halves, since, &mut done.counts) {
                let from = h.from;
                match second_half(self.shared, h) {
                    Ok(Second::Done) => {
                        done.counts.rewrapped += 1;
                        done.found(from);
                    }
                    Ok(Second::Again) => todo.push(item),
                    Err(e) => self.fail(&mut done.counts, item.shown(), &e),
                }
            }
            if todo.is_empty() || end.is_err() {
                break;
            }
        }
        if end.is_ok() {
            for item in todo {
                let busy = std::io::Error::from_raw_os_error(libc::EBUSY);
                self.fail(&mut done.counts, item.shown(), &busy.into());
            }
        }
        end
    }
}

impl<B: Backing> Visitor<B> for Sweep<'_, B> {
    fn batch(&self, items: Vec<Item<B>>) -> Result<(), Cancelled> {
        let _at_work = self.turns.at_work();
        let counts = Counts { scanned: items.len() as u64, ..Counts::default() };
        let mut done = Swept { counts, ..Swept::default() };
        let mut items = items.into_iter();
        let mut end = Ok(());
        while end.is_ok() && items.len() > 0 {
            end = self.together(items.by_ref().take(self.turns.burst()).collect(), &mut done);
        }
        let mut all = self.swept.lock();
        all.counts += done.counts;
        for (kek, n) in done.found_under {
            *all.found_under.entry(kek).or_default() += n;
        }
        end
    }
}
