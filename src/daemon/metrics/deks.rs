//! Counts uses of DEKs: how many, by whom they were wrapped, with what result, how long they took.

use super::text::{Kind, Text};
use crate::kms::event::{Call, DekUse, Observer, Operation};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::time::Duration;

/// Upper bounds of the histogram's buckets, in seconds: from a sealed KEK's microseconds to a service's time-out.
const BUCKETS: [f64; 12] = [0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0];

#[derive(Debug, Default, Clone, Copy)]
struct Latency {
    /// Uses in each bucket alone; the last is for those above all bounds.
    buckets: [u64; BUCKETS.len() + 1],
    sum: Duration,
}

impl Latency {
    fn add(&mut self, d: Duration) {
        let s = d.as_secs_f64();
        let i = BUCKETS.iter().position(|b| s <= *b).unwrap_or(BUCKETS.len());
        if let Some(b) = self.buckets.get_mut(i) {
            *b += 1;
        }
        self.sum += d;
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// By operation, whether the KEK is sealed, and result.
    counts: BTreeMap<(&'static str, bool, String), u64>,
    latencies: BTreeMap<(&'static str, bool), Latency>,
}

/// The counters. An [`Observer`].
#[derive(Debug, Default)]
pub struct DekCounts(Mutex<Inner>);

impl Observer for DekCounts {
    fn call(&self, _: &Call<'_>) {}

    fn dek(&self, u: &DekUse<'_>) {
        let sealed = u.provider == "sealed";
        let result = u.result.err().unwrap_or("ok");
        let operation = match (u.operation, u.ahead) {
            (Operation::Wrap, true) => "prepare",
            (Operation::Unwrap, true) => "prefetch",
            (o, _) => o.as_str(),
        };
        let mut i = self.0.lock();
        *i.counts.entry((operation, sealed, result.to_owned())).or_default() += 1;
        i.latencies.entry((operation, sealed)).or_default().add(u.latency);
    }
}

fn kind(sealed: bool) -> &'static str {
    if sealed { "sealed" } else { "external" }
}

impl DekCounts {
    /// Appends the counters' families.
    pub fn render(&self, t: &mut Text) {
        let i = self.0.lock();
        let name = "envelopefs_dek_operations_total";
        t.family(name, Kind::Counter, "File keys wrapped, unwrapped and rewrapped, by kind of KEK and result.");
        for ((operation, sealed, result), n) in &i.counts {
            t.sample(name, &[("operation", operation), ("kek", kind(*sealed)), ("result", result)], n);
        }
        // There from the start, so that a rate can be taken of the first one.
        for o in [Operation::Wrap, Operation::Unwrap, Operation::Rewrap].map(Operation::as_str) {
            if !i.counts.contains_key(&(o, true, "ok".to_owned())) {
                t.sample(name, &[("operation", o), ("kek", kind(true)), ("result", "ok")], 0);
            }
        }
        let name = "envelopefs_dek_operation_seconds";
        t.family(name, Kind::Histogram, "How long that took, with all calls to a key service.");
        for ((operation, sealed), l) in &i.latencies {
            let labels = [("operation", *operation), ("kek", kind(*sealed))];
            let mut total = 0;
            for (i, n) in l.buckets.iter().enumerate() {
                total += n;
                let le = BUCKETS.get(i).map_or_else(|| "+Inf".to_owned(), f64::to_string);
                t.sample(&format!("{name}_bucket"), &[labels[0], labels[1], ("le", &le)], total);
            }
            t.sample(&format!("{name}_sum"), &labels, l.sum.as_secs_f64());
            t.sample(&format!("{name}_count"), &labels, total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used<'a>(operation: Operation, provider: &'a str, micros: u64, result: Result<(), &'a str>) -> DekUse<'a> {
        DekUse {
            operation,
            ahead: false,
            provider,
            store: [0; 16],
            file: [0; 16],
            kek: [0; 16],
            from: None,
            request_id: None,
            latency: Duration::from_micros(micros),
            result,
            caller: None,
        }
    }

    #[test]
    fn uses_are_counted_and_buckets_add_up() {
        let d = DekCounts::default();
        for us in [10, 11, 30, 5_000_000, 60_000_000] {
            d.dek(&used(Operation::Unwrap, "sealed", us, Ok(())));
        }
        d.dek(&used(Operation::Unwrap, "aws-kms://x", 20_000, Err("kms-denied")));
        let mut t = Text::default();
        d.render(&mut t);
        for line in [
            "envelopefs_dek_operations_total{operation=\"unwrap\",kek=\"sealed\",result=\"ok\"} 5",
            "envelopefs_dek_operations_total{operation=\"unwrap\",kek=\"external\",result=\"kms-denied\"} 1",
            "envelopefs_dek_operations_total{operation=\"wrap\",kek=\"sealed\",result=\"ok\"} 0",
            "envelopefs_dek_operation_seconds_bucket{operation=\"unwrap\",kek=\"sealed\",le=\"0.00001\"} 1",
            "envelopefs_dek_operation_seconds_bucket{operation=\"unwrap\",kek=\"sealed\",le=\"0.00003\"} 3",
            "envelopefs_dek_operation_seconds_bucket{operation=\"unwrap\",kek=\"sealed\",le=\"1\"} 3",
            "envelopefs_dek_operation_seconds_bucket{operation=\"unwrap\",kek=\"sealed\",le=\"10\"} 4",
            "envelopefs_dek_operation_seconds_bucket{operation=\"unwrap\",kek=\"sealed\",le=\"+Inf\"} 5",
            "envelopefs_dek_operation_seconds_count{operation=\"unwrap\",kek=\"sealed\"} 5",
        ] {
            assert!(t.0.lines().any(|l| l == line), "{line}\n{}", t.0);
        }
    }
}
