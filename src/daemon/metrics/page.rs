//! All figures of a mounted store.

use super::deks::DekCounts;
use super::text::{Kind, Text};
use crate::daemon::protocol::RotationState;
use crate::format::keyring::{KekState, Keyring};
use crate::rotation::State;
use crate::store::dek_cache::DekCacheStats;
use crate::store::keys::PoolStats;

/// What is shown, gathered at one time.
pub struct Figures<'a> {
    pub uptime: f64,
    pub read_only: bool,
    pub memory_locked: bool,
    pub keyring: &'a Keyring,
    pub dek_cache: DekCacheStats,
    pub dek_pool: PoolStats,
    pub rotation: Option<&'a RotationState>,
    pub deks: &'a DekCounts,
    /// The audit log, if there is one.
    pub audit: Option<AuditFigures>,
}

/// Of the audit log.
#[derive(Debug, Clone, Copy)]
pub struct AuditFigures {
    pub written: u64,
    pub lost: u64,
    /// Keys are refused because it cannot be written.
    pub refusing: bool,
}

const ROTATION_STATES: [State; 7] = [
    State::Staged,
    State::Sweeping,
    State::Verifying,
    State::Retiring,
    State::Done,
    State::Cancelled,
    State::Incomplete,
];
const KEK_STATES: [(KekState, &str); 4] = [
    (KekState::Pending, "pending"),
    (KekState::Active, "active"),
    (KekState::Retired, "retired"),
    (KekState::Destroyed, "destroyed"),
];

/// The figures as text.
pub fn text(f: &Figures<'_>) -> Text {
    let mut t = Text::default();
    let name = "envelopefs_info";
    t.family(name, Kind::Gauge, "Always 1; says which program serves which store.");
    let store = f.keyring.store.to_string();
    t.sample(name, &[("version", env!("CARGO_PKG_VERSION")), ("store", &store)], 1);
    t.single("envelopefs_uptime_seconds", Kind::Gauge, "Seconds since the mount.", f.uptime);
    t.single("envelopefs_read_only", Kind::Gauge, "Whether the store is mounted read-only.", u8::from(f.read_only));
    let help = "Whether all keys lie in memory that cannot be swapped out.";
    t.single("envelopefs_memory_locked", Kind::Gauge, help, u8::from(f.memory_locked));
    keys(&mut t, f.keyring);
    cache(&mut t, &f.dek_cache);
    pool(&mut t, &f.dek_pool);
    f.deks.render(&mut t);
    rotation(&mut t, f.rotation);
    if let Some(a) = &f.audit {
        let help = "Records written to the audit log.";
        t.single("envelopefs_audit_records_written_total", Kind::Counter, help, a.written);
        let help = "Events that could not be written to the audit log.";
        t.single("envelopefs_audit_events_lost_total", Kind::Counter, help, a.lost);
        let help = "Whether keys are refused because the audit log cannot be written.";
        t.single("envelopefs_audit_refusing", Kind::Gauge, help, u8::from(a.refusing));
    }
    t
}

fn keys(t: &mut Text, ring: &Keyring) {
    t.single("envelopefs_keyring_generation", Kind::Gauge, "Generation of the keyring.", ring.generation);
    t.single("envelopefs_root_keys", Kind::Gauge, "Root keys of the keyring.", ring.roots.len());
    let name = "envelopefs_keks";
    t.family(name, Kind::Gauge, "KEKs of the keyring by state.");
    for (state, word) in KEK_STATES {
        t.sample(name, &[("state", word)], ring.keks.iter().filter(|k| k.state == state).count());
    }
    let activated = ring.active().map_or(0, |k| k.activated);
    let help = "When the active KEK was made active, in seconds since the epoch.";
    t.single("envelopefs_kek_activated_timestamp_seconds", Kind::Gauge, help, activated);
}

fn cache(t: &mut Text, c: &DekCacheStats) {
    t.single("envelopefs_dek_cache_entries", Kind::Gauge, "File keys in the cache.", c.entries);
    let help = "Openings that found the file's key in the cache.";
    t.single("envelopefs_dek_cache_hits_total", Kind::Counter, help, c.hits);
    let help = "Openings that did not.";
    t.single("envelopefs_dek_cache_misses_total", Kind::Counter, help, c.misses);
    let help = "File keys dropped from the cache to make room.";
    t.single("envelopefs_dek_cache_evicted_total", Kind::Counter, help, c.evicted);
    let help = "File keys dropped from the cache for their age or idle time.";
    t.single("envelopefs_dek_cache_expired_total", Kind::Counter, help, c.expired);
}

fn pool(t: &mut Text, p: &PoolStats) {
    let help = "Keys made ahead of need for files to come.";
    t.single("envelopefs_dek_pool_entries", Kind::Gauge, help, p.ready);
    let help = "New files that got such a key.";
    t.single("envelopefs_dek_pool_hits_total", Kind::Counter, help, p.hits);
    let help = "New files that waited for a key service.";
    t.single("envelopefs_dek_pool_misses_total", Kind::Counter, help, p.misses);
}

fn rotation(t: &mut Text, r: Option<&RotationState>) {
    let running = r.is_some_and(|r| r.running);
    t.single("envelopefs_rotation_running", Kind::Gauge, "Whether a rotation is under way.", u8::from(running));
    let status = r.and_then(|r| r.status.as_ref());
    let name = "envelopefs_rotation_state";
    t.family(name, Kind::Gauge, "1 for the state of the rotation under way, or of the last one since the mount.");
    for s in ROTATION_STATES {
        let now = status.is_some_and(|x| x.state == s);
        t.sample(name, &[("state", s.as_str())], u8::from(now));
    }
    let Some(s) = status else { return };
    let name = "envelopefs_rotation_pass_files";
    t.family(name, Kind::Gauge, "Files of the rotation's present pass, by what was done with them.");
    for (what, n) in s.counts.named() {
        t.sample(name, &[("done", what)], n);
    }
    if let Some(expected) = s.expected {
        let help = "Files that the rotation's present pass will look at.";
        t.single("envelopefs_rotation_pass_expected_files", Kind::Gauge, help, expected);
    }
}
