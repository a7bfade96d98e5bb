//! `key list`: root keys and KEKs, with their times; with `--count` also how many headers name each KEK.

use super::args::OpenKeys;
use super::place::Place;
use super::rotation_status::OnDisk;
use super::status::{KekView, KeyringView, ending_in_words, word};
use super::{key, output};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Reply, Request, RotateRequest, RotationState};
use crate::daemon::{open, rotate};
use crate::format::keyring::KekState;
use crate::format::time::rfc3339_seconds;
use crate::rotation::{Control, Options, Report};
use crate::store::{Store, StoreOptions};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Runs `key list`.
///
/// # Errors
/// [`FaultKind::NotAStore`]; with `count` also root keys, [`FaultKind::Locked`], [`FaultKind::RotationRunning`], the
/// store's.
pub fn run(target: &Path, count: bool, json: bool, keys: &OpenKeys) -> Result<(), Fault> {
    let place = Place::find(target)?;
    let mut view = KeyringView::new(&place.keyring, &OnDisk::find(&place));
    if count {
        let report = count_headers(&place, keys)?;
        for k in &mut view.keks {
            k.headers = Some(report.headers_by_kek.get(&k.id).copied().unwrap_or_default());
        }
        view.uncounted = Some(report.failures_total);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    if json { output::print_json(&view) } else { output::print(&text(&view, now)) }
}

/// A rotation that only looks.
fn count_headers(place: &Place, keys: &OpenKeys) -> Result<Report, Fault> {
    if let Some(c) = place.connect()? {
        let request = RotateRequest { dry_run: true, ..Default::default() };
        let Reply::Rotation(s) = c.ask(&Request::Rotate(request), |_| {})? else {
            return Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for"));
        };
        let unsaid = || Fault::new(FaultKind::Daemon, "the daemon did not say how the count ended");
        let RotationState { report, fault, .. } = *s;
        let report = report.ok_or_else(|| fault.unwrap_or_else(unsaid))?;
        return if report.is_done() {
            Ok(report)
        } else {
            Err(Fault::new(FaultKind::Other, "the count was cancelled"))
        };
    }
    let fail = |e: crate::store::StoreError| Fault::store(&place.backing, &e);
    let (_lock, observed, opened) = key::opened(place, keys)?;
    let store = Store::open(open::backing(&place.backing)?, opened, StoreOptions::default()).map_err(fail)?;
    let report = rotate::offline(&store, &Options { dry_run: true, ..Options::default() }, &(), &Control::new());
    let closed = store.close();
    observed.end();
    let report = report.map_err(fail)?;
    closed.map_err(fail)?;
    Ok(report)
}

fn text(v: &KeyringView, now: u64) -> String {
    let mut t = format!("keyring   generation {}\n", v.generation);
    for r in &v.root_keys {
        t += &format!("  root key {} {}\n", r.id, r.uri);
    }
    if v.quorum > 1 {
        t += &format!("  {} different root keys must confirm that KEKs are destroyed or root keys added\n", v.quorum);
    }
    for k in &v.keks {
        t += &kek(v, k, now);
    }
    match v.uncounted {
        Some(n) if n > 0 => t + &format!("  not counted, for they cannot be read: {n}; see check\n"),
        _ => t,
    }
}

fn kek(v: &KeyringView, k: &KekView, now: u64) -> String {
    let mut t = format!("  KEK      {} {}, {}, {} old\n", k.id, word(&k.state), word(&k.kind), age(k.created, now));
    let happened = [
        ("created", k.created),
        ("activated", k.activated),
        ("retired", k.retired),
        ("proved unused", k.unused),
        ("destroyed", k.destroyed),
    ];
    let times = happened.iter().filter(|(_, at)| *at > 0).map(|(what, at)| format!("{what} {}", rfc3339_seconds(*at)));
    t += &format!("           {}\n", times.collect::<Vec<_>>().join(", "));
    if let Some(n) = k.waived {
        t += &format!("           unused but for what was waived: {n}; see rotate --status\n");
    }
    if let Some(s) = &k.ending {
        t += &format!("           {}\n", ending_in_words(s));
    }
    if k.state == KekState::Retired && v.is_below_floor(k.id) {
        t += "           closed by the floor: no file is opened under it\n";
    }
    let uri = |id| v.root_keys.iter().find(|r| r.id == id).map_or_else(|| id.to_string(), |r| r.uri.clone());
    let roots: Vec<String> = k.root_keys.iter().map(|id| uri(*id)).collect();
    t += &match (k.state, roots.is_empty()) {
        (KekState::Destroyed, _) | (_, true) => "           opened by nothing\n".to_owned(),
        (_, false) => format!("           opened by {}\n", roots.join(", ")),
    };
    match k.headers {
        Some(1) => t + "           named by 1 header\n",
        Some(n) => t + &format!("           named by {n} headers\n"),
        None => t,
    }
}

/// How long ago, in the largest unit that fits.
fn age(since: u64, now: u64) -> String {
    let s = now.saturating_sub(since);
    let (n, unit) = match s {
        0..60 => return "less than a minute".into(),
        60..3600 => (s / 60, "minute"),
        3600..86_400 => (s / 3600, "hour"),
        _ => (s / 86_400, "day"),
    };
    format!("{n} {unit}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::RootKeyView;
    use crate::format::ids::{KekId, RootKeyId, StoreId};
    use crate::format::keyring::KekKind;
    use crate::format::lifecycle::Schedule;

    #[test]
    fn ages_are_in_the_largest_unit_that_fits() {
        let day = 86_400;
        for (seconds, shown) in [
            (0, "less than a minute"),
            (59, "less than a minute"),
            (60, "1 minute"),
            (3599, "59 minutes"),
            (3600, "1 hour"),
            (day - 1, "23 hours"),
            (day, "1 day"),
            (400 * day, "400 days"),
        ] {
            assert_eq!(age(7, 7 + seconds), shown);
        }
        assert_eq!(age(9, 7), "less than a minute", "a clock that was put back");
        assert!(age(0, u64::MAX).ends_with(" days"));
    }

    #[test]
    fn a_kek_is_shown_with_all_that_happened_to_it() {
        let (a, b) = (RootKeyId([1; 16]), RootKeyId([2; 16]));
        let root = |id, uri: &str| RootKeyView { id, uri: uri.into() };
        let k = |n: u8, state, retired, root_keys, headers| KekView {
            id: KekId([n; 16]),
            kind: KekKind::Sealed,
            state,
            created: 1_790_000_000,
            activated: 1_790_000_001,
            retired,
            unused: retired,
            destroyed: if state == KekState::Destroyed { retired } else { 0 },
            ending: (state == KekState::Retired).then_some(Schedule {
                kek: KekId([n; 16]),
                confirmed: 2,
                scheduled: retired,
                due: retired + 604_800,
                announced: 0,
                used: retired + 60,
            }),
            root_keys,
            headers,
            waived: (state == KekState::Retired).then_some(2),
        };
        let v = KeyringView {
            store: StoreId([9; 16]),
            generation: 5,
            root_keys: vec![root(a, "keyfile:/k"), root(b, "passphrase:")],
            keks: vec![
                k(3, KekState::Destroyed, 1_790_086_400, vec![], Some(0)),
                k(5, KekState::Retired, 1_790_086_400, vec![a], None),
                k(4, KekState::Active, 0, vec![a, b], Some(12)),
            ],
            quorum: 2,
            floor: Some(KekId([4; 16])),
            uncounted: Some(2),
        };
        let [one, two, three, four, five] = [1, 2, 3, 4, 5].map(|n: u8| format!("{n:02}").repeat(16));
        assert_eq!(
            text(&v, 1_790_086_400),
            format!(
                "keyring   generation 5\n  root key {one} keyfile:/k\n  root key {two} passphrase:\n  \
                 2 different root keys must confirm that KEKs are destroyed or root keys added\n  \
                 KEK      {three} destroyed, sealed, 1 day old\n           \
                 created 2026-09-21T14:13:20Z, activated 2026-09-21T14:13:21Z, retired 2026-09-22T14:13:20Z, \
                 proved unused 2026-09-22T14:13:20Z, destroyed 2026-09-22T14:13:20Z\n           \
                 opened by nothing\n           named by 0 headers\n  \
                 KEK      {five} retired, sealed, 1 day old\n           \
                 created 2026-09-21T14:13:20Z, activated 2026-09-21T14:13:21Z, retired 2026-09-22T14:13:20Z, \
                 proved unused 2026-09-22T14:13:20Z\n           \
                 unused but for what was waived: 2; see rotate --status\n           \
                 to be destroyed, not before 2026-09-29T14:13:20Z; a file NEEDED it on 2026-09-22T14:14:20Z\n           \
                 closed by the floor: no file is opened under it\n           \
                 opened by keyfile:/k\n  \
                 KEK      {four} active, sealed, 1 day old\n           \
                 created 2026-09-21T14:13:20Z, activated 2026-09-21T14:13:21Z\n           \
                 opened by keyfile:/k, passphrase:\n           named by 12 headers\n  \
                 not counted, for they cannot be read: 2; see check\n"
            )
        );
    }
}
