//! Counters of what is asked of key services, and their text form for Prometheus (exposition format 0.0.4).
//!
//! Counters are atomics; the one lock on the way of a call is taken shared, to find the provider's counters.

use super::KmsError;
use super::event::{Call, Observer, Operation};
use super::guard::breaker::Position;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

const OPERATIONS: [Operation; 5] =
    [Operation::Wrap, Operation::Unwrap, Operation::Rewrap, Operation::Generate, Operation::Health];
/// Classes of results, in the order in which they are rendered.
const RESULTS: [&str; 9] =
    ["ok", "unreachable", "throttled", "denied", "disabled", "not-found", "bad-ciphertext", "credentials", "config"];
/// Upper bounds of the latency buckets, in microseconds, with the text they are rendered as (seconds).
const BUCKETS: [(u64, &str); 14] = [
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (500_000, "0.5"),
    (1_000_000, "1"),
    (2_500_000, "2.5"),
    (5_000_000, "5"),
    (10_000_000, "10"),
];

fn result_index(r: &Result<(), &KmsError>) -> usize {
    match r {
        Ok(()) => 0,
        Err(KmsError::Unreachable(_)) => 1,
        Err(KmsError::Throttled(_)) => 2,
        Err(KmsError::Denied(_)) => 3,
        Err(KmsError::Disabled(_)) => 4,
        Err(KmsError::NotFound(_)) => 5,
        Err(KmsError::BadCiphertext(_)) => 6,
        Err(KmsError::Credentials(_)) => 7,
        Err(KmsError::Config(_)) => 8,
    }
}

fn operation_index(o: Operation) -> usize {
    OPERATIONS.iter().position(|x| *x == o).unwrap_or_default()
}

/// One number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn add_one(&self) {
        self.add(1);
    }

    /// `n` more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// What it stands at.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct Histogram {
    /// Calls by the first bucket they fit into; the last are those that fit into none.
    buckets: [Counter; BUCKETS.len() + 1],
    sum: Counter,
}

impl Histogram {
    fn record(&self, d: Duration) {
        let at = BUCKETS.iter().position(|(us, _)| d <= Duration::from_micros(*us)).unwrap_or(BUCKETS.len());
        if let Some(b) = self.buckets.get(at) {
            b.add_one();
        }
        self.sum.add(nanos(d));
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// What is counted for one kind of provider.
#[derive(Debug, Default)]
pub struct Counters {
    calls: [[Counter; RESULTS.len()]; OPERATIONS.len()],
    latency: [Histogram; OPERATIONS.len()],
    /// Attempts after the first.
    pub retries: Counter,
    /// Attempts that were refused here, because the breaker was open.
    pub fast_failures: Counter,
    /// Calls that were answered by somebody else's call.
    pub joined: Counter,
    /// Calls that were answered from the negative cache.
    pub negative_hits: Counter,
    /// Times a breaker has opened.
    pub breaker_opened: Counter,
    limiter_waits: Counter,
    limiter_wait: Counter,
}

impl Counters {
    /// A call had to wait for its turn.
    pub fn waited(&self, d: Duration) {
        self.limiter_waits.add_one();
        self.limiter_wait.add(nanos(d));
    }

    /// Calls of `operation` that ended as `result` says.
    pub fn calls(&self, operation: Operation, result: Result<(), &KmsError>) -> u64 {
        let of = self.calls.get(operation_index(operation));
        of.and_then(|o| o.get(result_index(&result))).map_or(0, Counter::get)
    }

    fn record(&self, c: &Call<'_>) {
        let at = operation_index(c.operation);
        if let Some(n) = self.calls.get(at).and_then(|o| o.get(result_index(&c.result))) {
            n.add_one();
        }
        if let Some(h) = self.latency.get(at) {
            h.record(c.latency);
        }
    }
}

/// Where one breaker stands. It is forgotten with the provider that holds it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU8);

impl Gauge {
    /// It stands there now.
    pub fn set(&self, p: Position) {
        let n = match p {
            Position::Closed => 0,
            Position::HalfOpen => 1,
            Position::Open => 2,
        };
        self.0.store(n, Ordering::Relaxed);
    }
}

/// All counters. Shared by the providers that count and whoever renders them.
#[derive(Default)]
pub struct Registry {
    /// By the scheme of the provider's URI.
    providers: RwLock<BTreeMap<String, Arc<Counters>>>,
    breakers: Mutex<Vec<(String, Weak<Gauge>)>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry")
    }
}

impl Registry {
    /// One in which nothing has been counted.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The counters for the kind of provider that `uri` names: by its scheme.
    pub fn counters(&self, uri: &str) -> Arc<Counters> {
        let scheme = scheme(uri);
        if let Some(c) = self.providers.read().get(scheme) {
            return c.clone();
        }
        self.providers.write().entry(scheme.to_owned()).or_default().clone()
    }

    /// The gauge for a breaker of the root key `uri`.
    pub fn breaker(&self, uri: &str) -> Arc<Gauge> {
        let gauge = Arc::new(Gauge::default());
        let mut breakers = self.breakers.lock();
        breakers.retain(|(_, g)| g.strong_count() > 0);
        breakers.push((uri.to_owned(), Arc::downgrade(&gauge)));
        drop(breakers);
        gauge
    }

    /// Appends everything to `out` in Prometheus' text format: only what has been counted, in a stable order.
    pub fn render(&self, out: &mut String) {
        let providers: Vec<(String, Arc<Counters>)> =
            self.providers.read().iter().map(|(s, c)| (s.clone(), c.clone())).collect();
        // Writing to a String does not fail.
        let _ = calls(out, &providers);
        let _ = latencies(out, &providers);
        for (name, help, value) in SIMPLE {
            let _ = simple(out, &providers, name, help, value);
        }
        let _ = self.breakers(out);
    }

    /// Several providers may be connected to one root key; the worst counts.
    fn breakers(&self, out: &mut String) -> fmt::Result {
        let mut worst = BTreeMap::new();
        self.breakers.lock().retain(|(uri, gauge)| {
            let Some(g) = gauge.upgrade() else { return false };
            let at: &mut u8 = worst.entry(uri.clone()).or_default();
            *at = (*at).max(g.0.load(Ordering::Relaxed));
            true
        });
        let name = "envelopefs_key_breaker_state";
        if !worst.is_empty() {
            head(out, name, "gauge", "Circuit breaker of a root key: 0 closed, 1 half-open, 2 open.")?;
        }
        for (uri, state) in worst {
            writeln!(out, "{name}{{root_key=\"{}\"}} {state}", escaped(&uri))?;
        }
        Ok(())
    }
}

impl Observer for Registry {
    fn call(&self, c: &Call<'_>) {
        self.counters(c.provider).record(c);
    }
}

fn scheme(uri: &str) -> &str {
    uri.split_once(':').map_or(uri, |(s, _)| s)
}

type Value = fn(&Counters) -> f64;

/// Prometheus' numbers are doubles.
fn float(n: u64) -> f64 {
    n as f64
}

const SIMPLE: [(&str, &str, Value); 7] = [
    ("envelopefs_key_retries_total", "Attempts after the first.", |c| float(c.retries.get())),
    ("envelopefs_key_fast_failures_total", "Attempts refused here, because the breaker was open.", |c| {
        float(c.fast_failures.get())
    }),
    ("envelopefs_key_joined_total", "Calls answered by the same call of somebody else.", |c| float(c.joined.get())),
    ("envelopefs_key_negative_hits_total", "Calls answered from the negative cache.", |c| float(c.negative_hits.get())),
    ("envelopefs_key_limiter_waits_total", "Calls that had to wait for their turn.", |c| float(c.limiter_waits.get())),
    ("envelopefs_key_limiter_wait_seconds_total", "Time that calls waited for their turn.", |c| {
        seconds(c.limiter_wait.get())
    }),
    ("envelopefs_key_breaker_opened_total", "Times a circuit breaker has opened.", |c| float(c.breaker_opened.get())),
];

fn seconds(nanos: u64) -> f64 {
    float(nanos) / 1e9
}

fn simple(out: &mut String, p: &[(String, Arc<Counters>)], name: &str, help: &str, value: Value) -> fmt::Result {
    if !p.is_empty() {
        head(out, name, "counter", help)?;
    }
    for (scheme, c) in p {
        writeln!(out, "{name}{{provider=\"{}\"}} {}", escaped(scheme), value(c))?;
    }
    Ok(())
}

fn calls(out: &mut String, providers: &[(String, Arc<Counters>)]) -> fmt::Result {
    let name = "envelopefs_key_calls_total";
    if !providers.is_empty() {
        head(out, name, "counter", "Calls to key providers, by result; each attempt is one.")?;
    }
    for (scheme, c) in providers {
        for (operation, results) in OPERATIONS.iter().zip(&c.calls) {
            for (result, n) in RESULTS.iter().zip(results).filter(|(_, n)| n.get() > 0) {
                let (provider, operation) = (escaped(scheme), operation.as_str());
                let n = n.get();
                writeln!(out, "{name}{{provider=\"{provider}\",operation=\"{operation}\",result=\"{result}\"}} {n}")?;
            }
        }
    }
    Ok(())
}

fn latencies(out: &mut String, providers: &[(String, Arc<Counters>)]) -> fmt::Result {
    let name = "envelopefs_key_call_duration_seconds";
    if !providers.is_empty() {
        head(out, name, "histogram", "Time that calls to key providers took; each attempt is one.")?;
    }
    for (scheme, c) in providers {
        for (operation, h) in OPERATIONS.iter().zip(&c.latency) {
            // Read once, so that the buckets and the count agree.
            let counts: Vec<u64> = h.buckets.iter().map(Counter::get).collect();
            let all: u64 = counts.iter().sum();
            if all == 0 {
                continue;
            }
            let labels = format!("provider=\"{}\",operation=\"{}\"", escaped(scheme), operation.as_str());
            let mut so_far = 0;
            for ((_, le), n) in BUCKETS.iter().zip(&counts) {
                so_far += n;
                writeln!(out, "{name}_bucket{{{labels},le=\"{le}\"}} {so_far}")?;
            }
            writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {all}")?;
            writeln!(out, "{name}_sum{{{labels}}} {}", seconds(h.sum.get()))?;
            writeln!(out, "{name}_count{{{labels}}} {all}")?;
        }
    }
    Ok(())
}

/// The lines before a family's samples. No text of ours has a backslash or a line feed, which would need escapes.
fn head(out: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// A label's value: backslash, quotation mark and line feed are escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call<'a>(operation: Operation, provider: &'a str, us: u64, result: Result<(), &'a KmsError>) -> Call<'a> {
        let latency = Duration::from_micros(us);
        Call { operation, provider, context: None, kek: None, request_id: None, latency, result, caller: None }
    }

    #[test]
    fn the_text_is_exactly_this() {
        let r = Registry::new();
        let slow = KmsError::Throttled("x".into());
        r.call(&call(Operation::Unwrap, "aws-kms://alias/a", 500, Ok(())));
        r.call(&call(Operation::Unwrap, "aws-kms://alias/b", 501, Ok(())));
        r.call(&call(Operation::Unwrap, "aws-kms://alias/a", 11_000_000, Err(&slow)));
        r.call(&call(Operation::Wrap, "sealed", 2, Ok(())));
        let c = r.counters("aws-kms://alias/c");
        c.retries.add(3);
        c.fast_failures.add_one();
        c.waited(Duration::from_millis(1500));
        let (a, b, gone) = (r.breaker("vault:\"\\\n"), r.breaker("aws-kms://x"), r.breaker("vault://gone"));
        let same = r.breaker("aws-kms://x");
        a.set(Position::HalfOpen);
        same.set(Position::Open);
        b.set(Position::Closed);
        drop(gone);
        let mut text = String::new();
        r.render(&mut text);
        assert_eq!(text, include_str!("metrics/example.txt"));
        assert_eq!(c.calls(Operation::Unwrap, Err(&slow)), 1);
    }

    #[test]
    fn nothing_counted_is_nothing_written() {
        let mut text = String::new();
        Registry::new().render(&mut text);
        assert_eq!(text, "");
    }

    #[test]
    fn every_result_has_its_own_class() {
        let t = String::new;
        let errors = [
            KmsError::Unreachable(t()),
            KmsError::Throttled(t()),
            KmsError::Denied(t()),
            KmsError::Disabled(t()),
            KmsError::NotFound(t()),
            KmsError::BadCiphertext(t()),
            KmsError::Credentials(t()),
            KmsError::Config(t()),
        ];
        let names: Vec<&str> = errors.iter().map(|e| RESULTS[result_index(&Err(e))]).collect();
        assert_eq!(names, RESULTS[1..]);
        assert_eq!(RESULTS[result_index(&Ok(()))], "ok");
        for (i, o) in OPERATIONS.iter().enumerate() {
            assert_eq!(operation_index(*o), i);
        }
        assert!(BUCKETS.windows(2).all(|w| w[0].0 < w[1].0));
        let as_seconds = |us: u64| us as f64 / 1e6;
        assert!(BUCKETS.iter().all(|(us, text)| text.parse() == Ok(as_seconds(*us))));
    }
}
