//! What a pass or a rekey could not deal with, collected from all its threads, and told apart by what is waived.

use super::report::{Failing, Failure, Named};
use super::waive::Waivers;
use crate::store::StoreError;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Failures that the status of a running rotation names.
const SHOWN_MAX: usize = 10;

/// Failures as they come.
#[derive(Default)]
pub(super) struct Failures {
    waivers: Arc<Waivers>,
    list: Mutex<(Failed, Failing)>,
}

/// Failures of one pass or, after [`Failed::also`], of a sweep and a scan.
#[derive(Debug, Clone, Default)]
pub(super) struct Failed {
    /// Those that are not waived, as many as a report names.
    pub(super) named: Named<Failure>,
    /// All of those.
    pub(super) total: u64,
    /// Those that are waived, by their paths. There are no more of them than waivers.
    pub(super) waived: BTreeMap<String, Failure>,
}

impl Failures {
    /// None yet; those at the paths of `waivers` will be told apart.
    pub(super) fn new(waivers: &Arc<Waivers>) -> Self {
        Self { waivers: Arc::clone(waivers), list: Mutex::default() }
    }

    /// A file.
    pub(super) fn add(&self, path: String, error: &StoreError) {
        self.put(Failure::new(path, error, false));
    }

    /// A directory that could not be entered or listed: nothing below it was looked at.
    pub(super) fn add_directory(&self, path: String, error: &StoreError) {
        self.put(Failure::new(path, error, true));
    }

    fn put(&self, f: Failure) {
        let waived = self.waivers.covers(&f.path);
        tracing::warn!(path = f.path, waived, "not dealt with: {}", f.message);
        let (failed, failing) = &mut *self.list.lock();
        if waived {
            failing.waived += 1;
            failed.waived.entry(f.path.clone()).or_insert(f);
            return;
        }
        failing.total += 1;
        *failing.by_code.entry(f.code.clone()).or_default() += 1;
        if failing.first.len() < SHOWN_MAX {
            failing.first.push(f.clone());
        }
        failed.add(f);
    }

    /// Whether somebody answers for what is at this path.
    pub(super) fn is_waived(&self, path: &str) -> bool {
        self.waivers.covers(path)
    }

    /// What is known so far.
    pub(super) fn so_far(&self) -> Failing {
        self.list.lock().1.clone()
    }

    /// All of it; nothing is left.
    pub(super) fn take(&self) -> Failed {
        std::mem::take(&mut *self.list.lock()).0
    }
}

impl Failed {
    /// One more that is not waived.
    pub(super) fn add(&mut self, f: Failure) {
        self.total += 1;
        self.named.add(f);
    }

    /// Adds what `other` has and this has not.
    pub(super) fn also(&mut self, other: Self) {
        self.total += other.total;
        for f in other.named {
            if self.named.contains(&f) {
                self.total -= 1;
            } else {
                self.named.add(f);
            }
        }
        for (path, f) in other.waived {
            self.waived.entry(path).or_insert(f);
        }
    }

    /// Paths of those that are waived.
    pub(super) fn waived_paths(&self) -> BTreeSet<String> {
        self.waived.keys().cloned().collect()
    }
}
