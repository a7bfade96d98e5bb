//! A rotation of 10⁹ headers in virtual time.
//!
//! Machines, workers and a key service are played; what decides is the program's own code: the pace of the disk
//! (`rotation::pace`), the patience with a service that is silent (`rotation::patience`), and the guard's rate limit, the share
//! of it that a rotation may use, retry policy and budget, and breaker (`kms::guard`). The service's quota is a token bucket over all machines. A stretch of
//! some seconds is played call by call, the second half of it is measured, and the rest is multiplication: nothing in the
//! program depends on how many headers there are. Random numbers come from a fixed seed, so that every run prints the same.

use envelopefs::backing::DirEntry;
use envelopefs::kms::guard::breaker::{Admission, Breaker, Outcome, Permit, Position, Settings};
use envelopefs::kms::guard::lane::{Background, Common, Lane};
use envelopefs::kms::guard::limit::Rate;
use envelopefs::kms::guard::retry::{Budget, Policy};
use envelopefs::kms::services::Limits;
use envelopefs::rotation::pace::Pace;
use envelopefs::rotation::patience::Patience;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Write;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// Where the tables stand in the document.
pub const BEGIN: &str = "<!-- tables: cargo run --example scale -->";
/// Where they end.
pub const END: &str = "<!-- end of tables -->";

/// Headers in the store.
pub const HEADERS: u64 = 1_000_000_000;
/// Headers a second that one machine's sweep moves. Measured: 8,600 to 11,500 (docs/adr/0010-rotation.md has how).
pub const DISK: u32 = 10_000;
/// What that was measured to be, at worst and at best.
const DISK_MEASURED: [u32; 2] = [8_600, 11_500];
/// Headers a second that one machine's scan reads. Assumed no better than the sweep.
const SCAN: u32 = 10_000;
/// Names a second that a shard lists without looking at the files. Measured: 1,000,000 in directories that are cached.
const LISTING: u32 = 500_000;
/// Headers whose calls a run has under way at the same time, whatever the number of processors (docs/adr/0016).
const WORKERS: u32 = 16;
/// As many as `concurrent` of `[services.limits]` lets call at the same time: more are of no use.
const WORKERS_MORE: u32 = 32;
/// What an attempt takes that a service does not answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// What `rotate --patience` is without being told.
const PATIENCE: Duration = Duration::from_secs(600);
/// Length of a file's name in the backing directory, where names are encrypted.
const NAME: usize = 64;
/// Machines in the tables.
const MACHINES: [u32; 3] = [1, 4, 16];

/// A key service, as docs/KEYS.md has it.
#[derive(Debug, Clone, Copy)]
pub struct Provider {
    pub name: &'static str,
    /// Calls a second that it takes from all machines together.
    pub quota: u32,
    /// Calls for a header between two external KEKs (docs/KEYS.md): unwrap, wrap, proving unwrap; or re-wrap, proving unwrap.
    pub calls: u32,
    /// What a call takes. Assumed.
    pub latency: Duration,
    /// USD for 10,000 calls.
    pub price: f64,
    pub source: &'static str,
}

/// The services of the tables.
pub const PROVIDERS: [Provider; 4] = [
    Provider {
        name: "AWS KMS",
        quota: 10_000,
        calls: 2,
        latency: Duration::from_millis(8),
        price: 0.03,
        source: "public documentation, as of 2025: the default quota of most regions",
    },
    Provider {
        name: "Google Cloud KMS",
        quota: 1_000,
        calls: 3,
        latency: Duration::from_millis(15),
        price: 0.03,
        source: "public documentation, prices effective 2025-03-17; 60,000 calls a minute, enforced by the second",
    },
    Provider {
        name: "Vault/OpenBao",
        quota: 2_500,
        calls: 3,
        latency: Duration::from_micros(1_400),
        price: 0.0,
        source: "no quota: assumed one server that needs 0.4 ms a call, as measured, and 1 ms of network",
    },
    Provider {
        name: "PKCS#11 HSM",
        quota: 1_000,
        calls: 3,
        latency: Duration::from_millis(3),
        price: 0.0,
        source: "assumed a network HSM of 1,000 operations a second; see the data sheet of yours",
    },
];

/// How `[services.limits]` is set on the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Not at all.
    Default,
    /// `calls_per_second` and `burst` to each machine's part of nine tenths of the quota, all of it for the rotation.
    Fitted,
    /// No limit, and all slots for the rotation.
    Unlimited,
}

/// What a stretch of time came to.
#[derive(Debug, Clone, Copy)]
pub struct Played {
    /// Headers a second, all machines together.
    pub rate: f64,
    /// Attempts that reached the service, for each header moved.
    pub attempts: f64,
    /// Of those, per cent that were throttled.
    pub throttled: f64,
    /// Headers given up on.
    pub failed: u64,
    /// Headers moved.
    pub moved: f64,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A machine: what its workers share.
struct Machine {
    pace: Pace,
    rate: Rate,
    lane: Lane,
    under_way: u32,
    budget: Budget,
    breaker: Breaker,
    patience: Patience,
}

/// What a worker does next, when its time has come.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Takes up the next header, or the same one again.
    Header { again: bool },
    /// Asks whether there is a share of the limits for the calls of the header.
    Leave,
    /// Asks for leave to make an attempt of a call.
    Enter,
    /// Makes it, with what the rate limit has granted.
    Attempt,
    /// Hears what came of it.
    Answer(Permit, Outcome, bool),
}

#[derive(Debug, Clone, Copy)]
struct Worker {
    machine: usize,
    step: Step,
    /// Calls of this header that have been made.
    done: u32,
    /// Attempts of this call that have failed.
    made: u32,
    deadline: Instant,
}

struct World<'a> {
    provider: &'a Provider,
    /// Of one header.
    calls: u32,
    limits: Limits,
    policy: Policy,
    start: Instant,
    outage: Option<(Duration, Duration)>,
    service: Rate,
    machines: Vec<Machine>,
    random: Random,
    measured_from: Instant,
    failed: u64,
    /// Attempts that reached the service.
    asked: u64,
    throttled: u64,
    /// Calls that were answered, and need not be made again.
    answered: u64,
}

impl World<'_> {
    /// What the service does with a call that comes at `now`.
    fn serve(&mut self, now: Instant) -> (Outcome, Duration) {
        let at = now - self.start;
        if self.outage.is_some_and(|(from, to)| at >= from && at < to) {
            return (Outcome::Silent, TIMEOUT);
        }
        // Whose turn is not now gets none.
        match self.service.reserve(now, now) {
            Some(_) => (Outcome::Answered, self.provider.latency),
            None => (Outcome::Throttled, self.provider.latency),
        }
    }

    /// Does one step of `w` at `now`, as `kms::guard::Guarded` and `rotation::sweep` do; says how long until the next.
    fn step(&mut self, w: &mut Worker, now: Instant) -> Duration {
        let Some(m) = self.machines.get_mut(w.machine) else { return TIMEOUT };
        match w.step {
            Step::Header { again } => {
                (w.step, w.done, w.made) = (Step::Leave, 0, 0);
                if again {
                    return Duration::ZERO;
                }
                m.pace.grant(1, now)
            }
            Step::Leave => {
                let slots = self.limits.concurrent;
                let free = slots.saturating_sub(m.under_way);
                match m.lane.ask(self.calls, Common { rate: &m.rate, slots, free }, now) {
                    Ok(()) => {
                        w.step = Step::Enter;
                        Duration::ZERO
                    }
                    Err(wait) => wait,
                }
            }
            Step::Enter => {
                if w.made == 0 {
                    m.budget.earn();
                    w.deadline = now + Duration::from_secs(self.limits.deadline);
                }
                if m.breaker.refusal(now).is_some() {
                    return self.gave_up(w, now);
                }
                match m.rate.reserve(now, w.deadline) {
                    Some(wait) => {
                        w.step = Step::Attempt;
                        wait
                    }
                    None => self.gave_up(w, now),
                }
            }
            Step::Attempt => {
                let (permit, probe) = match m.breaker.admit(now) {
                    Admission::Go(permit) => (permit, false),
                    Admission::Probe(permit) => (permit, true),
                    Admission::No(_) => return self.gave_up(w, now),
                };
                m.under_way += 1;
                let (outcome, took) = self.serve(now);
                if now >= self.measured_from {
                    self.asked += 1;
                    self.throttled += u64::from(outcome == Outcome::Throttled);
                }
                w.step = Step::Answer(permit, outcome, probe);
                took
            }
            Step::Answer(permit, outcome, probe) => {
                m.under_way = m.under_way.saturating_sub(1);
                let random = self.random.next();
                m.breaker.record(permit, outcome, now, random);
                if outcome == Outcome::Answered {
                    // A probe was a health check: the call itself comes now.
                    w.done += u32::from(!probe);
                    self.answered += u64::from(!probe && now >= self.measured_from);
                    w.made = 0;
                    w.step = Step::Enter;
                    m.patience.answered();
                    if w.done == self.calls {
                        w.step = Step::Header { again: false };
                    }
                    return Duration::ZERO;
                }
                w.made += 1;
                let open = m.breaker.position() != Position::Closed;
                let random = self.random.next();
                let pause = self.policy.pause(w.made, random, now, w.deadline).filter(|_| !open);
                match pause.filter(|_| m.budget.spend(now)) {
                    Some(pause) => {
                        w.step = Step::Enter;
                        pause
                    }
                    None => self.gave_up(w, now),
                }
            }
        }
    }

    /// The guard has given a call up: the sweep waits and takes the header up again, or counts it as failed.
    fn gave_up(&mut self, w: &mut Worker, now: Instant) -> Duration {
        let wait = self.machines.get_mut(w.machine).and_then(|m| m.patience.wait(now));
        w.step = Step::Header { again: wait.is_some() };
        if now >= self.measured_from {
            self.failed += u64::from(wait.is_none());
            // They are made again.
            self.answered = self.answered.saturating_sub(w.done.into());
        }
        wait.unwrap_or(Duration::ZERO)
    }
}

fn limits_of(client: Client, p: &Provider, machines: u32) -> Limits {
    let part = (p.quota * 9 / 10 / machines).max(1);
    match client {
        Client::Default => Limits::default().without_users(),
        Client::Fitted => Limits { calls_per_second: part, burst: part, ..Limits::default() }.without_users(),
        Client::Unlimited => Limits { calls_per_second: 0, ..Limits::default() }.without_users(),
    }
}

/// What is played.
struct Scene<'a> {
    provider: &'a Provider,
    machines: u32,
    client: Client,
    workers: u32,
    /// Of one header.
    calls: u32,
    /// What comes after it is measured.
    warm_up: Duration,
    length: Duration,
    outage: Option<(Duration, Duration)>,
}

fn play(scene: &Scene<'_>) -> Played {
    let Scene { provider: p, machines, client, workers, calls, warm_up, length, outage } = *scene;
    let start = Instant::now();
    let limits = limits_of(client, p, machines);
    let settings = Settings {
        failures: limits.breaker_failures,
        percent: limits.breaker_percent,
        pause: Duration::from_secs(limits.breaker_pause),
        pause_max: Duration::from_secs(limits.breaker_pause_max),
    };
    let disk = NonZeroU32::new(DISK).unwrap_or(NonZeroU32::MIN);
    let machine = || Machine {
        pace: Pace::new(disk),
        rate: Rate::new(limits.calls_per_second, limits.burst, start),
        lane: Lane::new(Background::Rotation, limits.rotation_share, limits.calls_per_second, limits.burst, start),
        under_way: 0,
        budget: Budget::new(start),
        breaker: Breaker::new(settings, start),
        patience: Patience::new(PATIENCE),
    };
    let mut world = World {
        provider: p,
        calls,
        limits,
        policy: Policy::new(limits.attempts),
        start,
        outage,
        service: Rate::new(p.quota, p.quota, start),
        machines: (0..machines).map(|_| machine()).collect(),
        random: Random(1),
        measured_from: start + warm_up,
        failed: 0,
        asked: 0,
        throttled: 0,
        answered: 0,
    };
    let first = Worker { machine: 0, step: Step::Header { again: false }, done: 0, made: 0, deadline: start };
    let mut workers: Vec<Worker> =
        (0..machines * workers).map(|n| Worker { machine: (n / workers) as usize, ..first }).collect();
    let mut queue: BinaryHeap<Reverse<(Instant, u64, usize)>> =
        (0..workers.len()).map(|n| Reverse((start, n as u64, n))).collect();
    let mut order = workers.len() as u64;
    while let Some(Reverse((now, _, n))) = queue.pop() {
        if now >= start + length {
            break;
        }
        let Some(w) = workers.get_mut(n) else { break };
        let wait = world.step(w, now);
        order += 1;
        queue.push(Reverse((now + wait, order, n)));
    }
    let seconds = (length - warm_up).as_secs_f64();
    // Parts of headers count: a stretch begins and ends in the middle of many.
    let moved = world.answered as f64 / f64::from(calls);
    Played {
        rate: moved / seconds,
        attempts: world.asked as f64 / moved.max(1.0),
        throttled: 100.0 * world.throttled as f64 / (world.asked as f64).max(1.0),
        failed: world.failed,
        moved,
    }
}

const S: fn(u64) -> Duration = Duration::from_secs;

/// How a rotation between external KEKs gets on once what was saved up in token buckets is used up.
pub fn steady(p: &Provider, machines: u32, client: Client, workers: u32, calls: u32) -> Played {
    // Of a slow service a longer stretch, so that the numbers are not made of a few calls.
    let warm_up = if p.quota < 5_000 { S(20) } else { S(6) };
    play(&Scene { provider: p, machines, client, workers, calls, warm_up, length: warm_up * 2, outage: None })
}

fn grouped(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

fn time(seconds: f64) -> String {
    match seconds / 3600.0 {
        h if h < 72.0 => format!("{h:.1} h"),
        h => format!("{:.1} d", h / 24.0),
    }
}

/// Seconds that the scan of a share takes, and all the listing that comes with sweep and scan.
fn scan_and_listing(machines: u32) -> (f64, f64) {
    let share = HEADERS as f64 / f64::from(machines);
    let listings = if machines == 1 { 0.0 } else { 2.0 * HEADERS as f64 / f64::from(LISTING) };
    (share / f64::from(SCAN), listings)
}

fn inputs(out: &mut String) {
    let rows = [
        ("headers in the store", grouped(HEADERS as f64), "given"),
        (
            "headers a second of one machine's sweep",
            grouped(f64::from(DISK)),
            "measured: 8,600 to 11,500 on our test machine, ext4 on a virtual disk",
        ),
        ("headers a second of one machine's scan", grouped(f64::from(SCAN)), "assumed: no better than the sweep"),
        (
            "names a second that a shard lists",
            grouped(f64::from(LISTING)),
            "assumed: half of the 1,000,000 measured for cached directories on a local disk",
        ),
        ("headers of a machine in calls at once", WORKERS.to_string(), "docs/adr/0016, without --jobs"),
        ("calls for a header, sealed to sealed", "0".to_owned(), "docs/KEYS.md, counted by tests"),
        ("time of an attempt without an answer", format!("{} s", TIMEOUT.as_secs()), "assumed"),
        ("patience", format!("{} s", PATIENCE.as_secs()), "the default of rotate --patience"),
    ];
    out.push_str("### Inputs\n\n| input | value | where from |\n|---|---|---|\n");
    for (what, value, source) in rows {
        let _ = writeln!(out, "| {what} | {value} | {source} |");
    }
    out.push_str(
        "\n| service | calls a second, all machines | calls for a header, external to external | a call takes (assumed) | USD \
         for 10,000 calls | source |\n",
    );
    out.push_str("|---|---|---|---|---|---|\n");
    for p in PROVIDERS {
        let (quota, ms) = (grouped(f64::from(p.quota)), p.latency.as_secs_f64() * 1e3);
        let _ = writeln!(out, "| {} | {quota} | {} | {ms:.1} ms | {:.2} | {} |", p.name, p.calls, p.price, p.source);
    }
}

fn sealed(out: &mut String) {
    out.push_str(
        "\n### Sealed to sealed\n\nThe disk is the limit; the service is asked a handful of times for each machine, and the \
         cost is nothing.\n\n| machines | headers a second of one | sweep | scan | listing of all names, twice | in all |\n\
         |---|---|---|---|---|---|\n",
    );
    for machines in MACHINES {
        for disk in DISK_MEASURED {
            let sweep = HEADERS as f64 / f64::from(machines) / f64::from(disk);
            let (_, listing) = scan_and_listing(machines);
            // What the scan reads, the sweep reads and writes: as fast as this disk.
            let all = 2.0 * sweep + listing;
            let listed = if machines == 1 { "with the files".to_owned() } else { time(listing) };
            let _ = writeln!(
                out,
                "| {machines} | {} | {} | {} | {listed} | {} |",
                grouped(f64::from(disk)),
                time(sweep),
                time(sweep),
                time(all)
            );
        }
    }
}

fn external(out: &mut String) {
    out.push_str(
        "\n### External to external\n\nThe service is the limit, and more machines help up to its quota only. \"default\": \
         `[services.limits]` as it is without being set: 500 calls a second for each machine, all of them for the rotation, \
         since the store has no users. \"fitted\": nine tenths of the quota, divided by the machines. \"unlimited\": \
         `calls_per_second = 0`, to see what throttling does. Time is \
         sweep, scan and listing together; USD count every attempt.\n\n| service | machines | limits | headers a second | \
         attempts a header | throttled | time | calls | USD |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for p in PROVIDERS {
        for machines in MACHINES {
            for (client, workers, name) in [
                (Client::Default, WORKERS, "default"),
                (Client::Fitted, WORKERS, "fitted"),
                (Client::Fitted, WORKERS_MORE, "fitted, --jobs 32"),
                (Client::Unlimited, WORKERS_MORE, "unlimited, --jobs 32"),
            ] {
                let r = steady(&p, machines, client, workers, p.calls);
                let (scan, listing) = scan_and_listing(machines);
                let calls = HEADERS as f64 * r.attempts;
                let _ = writeln!(
                    out,
                    "| {} | {machines} | {name} | {} | {:.2} | {:.1} % | {} | {} million | {} |",
                    p.name,
                    grouped(r.rate),
                    r.attempts,
                    r.throttled,
                    time(HEADERS as f64 / r.rate.max(1e-9) + scan + listing),
                    grouped(calls / 1e6),
                    grouped(calls / 10_000.0 * p.price),
                );
            }
        }
    }
}

fn outages(out: &mut String) {
    out.push_str(
        "\n### Outages\n\nOne machine with AWS KMS and default limits; the service answers nobody for the time given. \"lost\": \
         how far the run is behind one without an outage, a hundred seconds after the end of it. Up to the patience an outage costs its own \
         length and the pause of the breaker; what is longer ends in failures, which the next `rotate` finishes.\n\n\
         | outage | lost | headers failed |\n|---|---|---|\n",
    );
    let [p, ..] = &PROVIDERS;
    let scene = |seconds: u64, outage: Option<u64>| Scene {
        provider: p,
        machines: 1,
        client: Client::Default,
        workers: WORKERS,
        calls: p.calls,
        warm_up: S(10),
        length: S(seconds),
        outage: outage.map(|for_seconds| (S(20), S(20 + for_seconds))),
    };
    for minutes in [1u64, 5, 9] {
        let calm = play(&scene(120 + minutes * 60, None));
        let hit = play(&scene(120 + minutes * 60, Some(minutes * 60)));
        let lost = (calm.moved - hit.moved) / calm.rate;
        let _ = writeln!(out, "| {minutes} min | {lost:.0} s | {} |", grouped(hit.failed as f64));
    }
    let over = play(&scene(640, Some(610)));
    let _ = writeln!(out, "| 10 min 10 s | the next run | {} |", grouped(over.failed as f64));
}

fn directions(out: &mut String) {
    out.push_str(
        "\n### Other directions\n\nFour machines with fitted limits and `--jobs 32`: external to sealed is 1 call a header, sealed \
         to external 2.\n\n| service | from external to sealed | USD | from sealed to external | USD |\n|---|---|---|---|---|\n",
    );
    for p in PROVIDERS {
        let _ = write!(out, "| {} |", p.name);
        for calls in [1, 2] {
            let r = steady(&p, 4, Client::Fitted, WORKERS_MORE, calls);
            let (scan, listing) = scan_and_listing(4);
            let usd = HEADERS as f64 * r.attempts / 10_000.0 * p.price;
            let _ = write!(out, " {} | {} |", time(HEADERS as f64 / r.rate.max(1e-9) + scan + listing), grouped(usd));
        }
        out.push('\n');
    }
}

fn memory(out: &mut String) {
    let entry = size_of::<DirEntry>() + NAME;
    let mb = |n: usize| format!("{:.1} MB", n as f64 / 1e6);
    out.push_str("\n### Memory of one process\n\n| what | grows with | bytes |\n|---|---|---|\n");
    let rows = [
        ("the whole run", "headers: does not", "0".to_owned()),
        (
            "the walk",
            "files in one directory and in those above it",
            format!("{entry} each with names of {NAME}; {} for a directory of a million", mb(entry * 1_000_000)),
        ),
        (
            "batches",
            "workers",
            format!("256 files each, in hand and in the queue: {} with 64", mb(2 * 64 * 256 * (NAME + 64))),
        ),
        ("failures", "failures, up to 10,000 named", "the paths".to_owned()),
        ("the list of what moves", "renames; none under --shard", "0".to_owned()),
        ("the reports of a merge", "shards, up to 1,024", "about 2,000 each without failures".to_owned()),
    ];
    for (what, grows, bytes) in rows {
        let _ = writeln!(out, "| {what} | {grows} | {bytes} |");
    }
}

/// All tables, as they stand in the document.
pub fn tables() -> String {
    let mut out = String::new();
    inputs(&mut out);
    sealed(&mut out);
    external(&mut out);
    directions(&mut out);
    outages(&mut out);
    memory(&mut out);
    out
}
