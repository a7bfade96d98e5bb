//! Negative cache: a no that was heard a moment ago is not asked for again.
//!
//! Two kinds. *About one wrapped key* (not found, does not open): kept for seconds, by a digest, so that neither
//! wrapped keys nor contexts lie about. *About the caller* (denied, disabled, no credentials): kept for one operation
//! and purpose, because policies tell them apart, and for a second only: long enough that a storm of opens is one call,
//! short enough that nobody who has just mended a policy notices.
//!
//! A no must never outlive the yes that contradicts it. A successful wrap for a context drops what is known about that
//! context, a successful health check everything but keys that do not open; and what was asked before such a success
//! and comes back after it is not kept ([`Negative::epoch`]).

use crate::kms::event::Operation;
use crate::kms::{KeyPurpose, KmsError, WrapContext};
use sha2::{Digest as _, Sha256};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// SHA-256 of what is wrapped and for what.
pub type Digest = [u8; 32];

/// Most wrapped keys that are remembered; the oldest go first.
pub const ENTRIES: usize = 256;
/// How long a refusal is remembered.
pub const REFUSAL: Duration = Duration::from_secs(1);

/// Names one unwrap: SHA-256(length of `wrapped` (u64 LE) ‖ `wrapped` ‖ [`WrapContext::to_aad`]).
pub fn digest(wrapped: &[u8], context: &WrapContext) -> Digest {
    let mut h = Sha256::new();
    h.update((wrapped.len() as u64).to_le_bytes());
    h.update(wrapped);
    h.update(context.to_aad());
    h.finalize().into()
}

/// What was refused a moment ago.
#[derive(Debug)]
pub struct Negative {
    keep: Duration,
    /// All are kept for the same time, so the oldest is the first to go.
    entries: VecDeque<Entry>,
    refusals: Vec<Refusal>,
    epoch: u64,
}

#[derive(Debug)]
struct Entry {
    what: Digest,
    context: Digest,
    error: KmsError,
    until: Instant,
}

#[derive(Debug)]
struct Refusal {
    operation: Operation,
    purpose: KeyPurpose,
    error: KmsError,
    until: Instant,
}

impl Negative {
    /// An empty one that remembers wrapped keys for `keep`; zero: not at all.
    pub fn new(keep: Duration) -> Self {
        Self { keep, entries: VecDeque::new(), refusals: Vec::new(), epoch: 0 }
    }

    /// Counts the successes that void what was asked before them. To be read before a call whose error may be kept.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The error that an unwrap of `what` would give.
    pub fn unopenable(&self, what: &Digest, now: Instant) -> Option<KmsError> {
        self.entries.iter().find(|e| e.what == *what && now < e.until).map(|e| e.error.clone())
    }

    /// The error that this operation would give.
    pub fn refused(&self, operation: Operation, purpose: KeyPurpose, now: Instant) -> Option<KmsError> {
        let same = |r: &&Refusal| (r.operation, r.purpose) == (operation, purpose) && now < r.until;
        self.refusals.iter().find(same).map(|r| r.error.clone())
    }

    /// An unwrap of `what` for `context`, begun at `epoch`, ended with `error` at `now`. Kept if it is of the kind.
    pub fn unwrap_failed(&mut self, what: Digest, context: &WrapContext, error: &KmsError, epoch: u64, now: Instant) {
        if !matches!(error, KmsError::NotFound(_) | KmsError::BadCiphertext(_))
            || epoch != self.epoch
            || self.keep.is_zero()
        {
            return;
        }
        self.entries.retain(|e| e.what != what && now < e.until);
        if self.entries.len() >= ENTRIES {
            self.entries.pop_front();
        }
        let context = digest(&[], context);
        self.entries.push_back(Entry { what, context, error: error.clone(), until: now + self.keep });
    }

    /// A call of `operation`, begun at `epoch`, ended with `error` at `now`. Kept if it is of the kind.
    pub fn failed(&mut self, operation: Operation, purpose: KeyPurpose, error: &KmsError, epoch: u64, now: Instant) {
        let refusal = matches!(error, KmsError::Denied(_) | KmsError::Disabled(_) | KmsError::Credentials(_));
        if refusal && epoch == self.epoch {
            self.refusals.retain(|r| (r.operation, r.purpose) != (operation, purpose) && now < r.until);
            self.refusals.push(Refusal { operation, purpose, error: error.clone(), until: now + REFUSAL });
        }
    }

    /// A key was wrapped for `context`.
    pub fn wrapped(&mut self, context: &WrapContext) {
        self.epoch += 1;
        if !self.entries.is_empty() {
            let context = digest(&[], context);
            self.entries.retain(|e| e.context != context);
        }
    }

    /// The root key was found to be usable. That says nothing about a wrapped key that does not open.
    pub fn healthy(&mut self) {
        self.epoch += 1;
        self.refusals.clear();
        self.entries.retain(|e| !matches!(e.error, KmsError::NotFound(_)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEEP: Duration = Duration::from_secs(10);

    fn context(n: u8) -> WrapContext {
        WrapContext { store: [1; 16], purpose: KeyPurpose::Kek, object: [n; 16], extra: vec![] }
    }

    fn bad() -> KmsError {
        KmsError::BadCiphertext("x".into())
    }

    #[test]
    fn what_is_remembered_and_for_how_long() {
        let t = |s: &str| s.to_owned();
        // (error, seconds it is remembered for its wrapped key, for its operation)
        let table = [
            (KmsError::BadCiphertext(t("e")), 10, 0),
            (KmsError::NotFound(t("e")), 10, 0),
            (KmsError::Denied(t("e")), 0, 1),
            (KmsError::Disabled(t("e")), 0, 1),
            (KmsError::Credentials(t("e")), 0, 1),
            (KmsError::Unreachable(t("e")), 0, 0),
            (KmsError::Throttled(t("e")), 0, 0),
            (KmsError::Config(t("e")), 0, 0),
        ];
        for (e, key, operation) in table {
            let (mut n, now, c) = (Negative::new(KEEP), Instant::now(), context(1));
            let what = digest(b"w", &c);
            n.unwrap_failed(what, &c, &e, 0, now);
            n.failed(Operation::Unwrap, KeyPurpose::Kek, &e, 0, now);
            for (after, ms) in [(0, 0), (999, 999), (1000, 1000), (9999, 9999), (10_000, 10_000)] {
                let at = now + Duration::from_millis(ms);
                let known = n.unopenable(&what, at);
                assert_eq!(known, (after < key * 1000).then(|| e.clone()), "{e:?} at {after}");
                let refused = n.refused(Operation::Unwrap, KeyPurpose::Kek, at);
                assert_eq!(refused, (after < operation * 1000).then(|| e.clone()), "{e:?} at {after}");
            }
            assert_eq!(n.unopenable(&digest(b"v", &c), now), None);
            assert_eq!(n.unopenable(&digest(b"w", &context(2)), now), None);
            assert_eq!(n.refused(Operation::Wrap, KeyPurpose::Kek, now), None, "policies tell operations apart");
            assert_eq!(n.refused(Operation::Unwrap, KeyPurpose::Dek, now), None, "and what they are for");
        }
    }

    #[test]
    fn a_success_voids_what_it_contradicts() {
        let (now, a, b) = (Instant::now(), context(1), context(2));
        let (wa, wb) = (digest(b"w", &a), digest(b"w", &b));
        let mut n = Negative::new(KEEP);
        n.unwrap_failed(wa, &a, &bad(), 0, now);
        n.unwrap_failed(wb, &b, &KmsError::NotFound("x".into()), 0, now);
        n.failed(Operation::Unwrap, KeyPurpose::Kek, &KmsError::Denied("x".into()), 0, now);
        n.healthy();
        assert_eq!(n.unopenable(&wa, now), Some(bad()), "a usable root key does not open another's wrap");
        assert_eq!(n.unopenable(&wb, now), None);
        assert_eq!(n.refused(Operation::Unwrap, KeyPurpose::Kek, now), None);
        n.wrapped(&b);
        assert_eq!(n.unopenable(&wa, now), Some(bad()));
        n.wrapped(&a);
        assert_eq!(n.unopenable(&wa, now), None);
    }

    #[test]
    fn what_was_asked_before_a_success_is_not_kept_after_it() {
        let (now, c) = (Instant::now(), context(1));
        for success in [|n: &mut Negative| n.wrapped(&context(1)), Negative::healthy] {
            let mut n = Negative::new(KEEP);
            let asked = n.epoch();
            success(&mut n);
            n.unwrap_failed([1; 32], &c, &bad(), asked, now);
            n.failed(Operation::Unwrap, KeyPurpose::Kek, &KmsError::Denied("x".into()), asked, now);
            assert_eq!(n.unopenable(&[1; 32], now), None);
            assert_eq!(n.refused(Operation::Unwrap, KeyPurpose::Kek, now), None);
        }
    }

    #[test]
    fn it_is_bounded_and_can_be_switched_off() {
        let (now, c) = (Instant::now(), context(1));
        let mut n = Negative::new(KEEP);
        let what = |i: usize| digest(&i.to_le_bytes(), &c);
        for i in 0..=ENTRIES {
            n.unwrap_failed(what(i), &c, &bad(), 0, now);
        }
        assert_eq!(n.entries.len(), ENTRIES);
        assert_eq!((n.unopenable(&what(0), now), n.unopenable(&what(1), now)), (None, Some(bad())));
        n.unwrap_failed(what(0), &c, &bad(), 0, now + KEEP);
        assert_eq!(n.entries.len(), 1, "what is over is not kept");
        let mut off = Negative::new(Duration::ZERO);
        off.unwrap_failed(what(0), &c, &bad(), 0, now);
        assert!(off.entries.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Fail { key: u8, context: u8, asked_ago: u8 },
        Wrap { context: u8 },
        Healthy,
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u8..3, 0u8..3, 0u8..3).prop_map(|(key, context, asked_ago)| Step::Fail { key, context, asked_ago }),
            2 => (0u8..3).prop_map(|context| Step::Wrap { context }),
            1 => Just(Step::Healthy),
            2 => (0u64..6000).prop_map(Step::Pass),
        ]
    }

    proptest! {
        /// Whatever happens, nothing is remembered about a context that was asked before the last wrap for it, and
        /// nothing for longer than it is to be.
        #[test]
        fn no_entry_outlives_a_wrap_for_its_context(steps in proptest::collection::vec(step(), 0..80)) {
            let (mut n, mut now) = (Negative::new(KEEP), Instant::now());
            let mut epochs = vec![0];
            // For each (key, context): when the last failure that may be remembered came.
            let mut may = std::collections::HashMap::new();
            for s in steps {
                match s {
                    Step::Fail { key, context: c, asked_ago } => {
                        let asked = epochs[epochs.len().saturating_sub(1 + usize::from(asked_ago))];
                        n.unwrap_failed(digest(&[key], &context(c)), &context(c), &bad(), asked, now);
                        if asked == n.epoch() {
                            may.insert((key, c), now);
                        }
                    }
                    Step::Wrap { context: c } => {
                        n.wrapped(&context(c));
                        may.retain(|(_, of), _| *of != c);
                    }
                    Step::Healthy => n.healthy(),
                    Step::Pass(ms) => now += Duration::from_millis(ms),
                }
                epochs.push(n.epoch());
                for key in 0..3 {
                    for c in 0..3 {
                        let expected = may.get(&(key, c)).is_some_and(|t| now < *t + KEEP);
                        let known = n.unopenable(&digest(&[key], &context(c)), now).is_some();
                        prop_assert_eq!(known, expected);
                    }
                }
            }
        }
    }
}
