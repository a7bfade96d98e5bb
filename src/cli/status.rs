//! `status`: what a store is and how it stands. Needs no key.

use super::args::StatusArgs;
use super::place::Place;
use super::rotation_status::OnDisk;
use super::{output, rekey_status, rotation_status};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::protocol::{DaemonStatus, KeysState, KeysStatus, Reply, Request};
use crate::format::ids::{KekId, RootKeyId, StoreId};
use crate::format::keyring::{KekKind, KekRecord, KekState, Keyring};
use crate::format::lifecycle::Schedule;
use crate::format::time::rfc3339_seconds;
use serde::Serialize;
use std::time::{SystemTime, UNIX_EPOCH};

/// `status --json`. Stable.
#[derive(Debug, Serialize)]
struct Status {
    store: StoreId,
    backing: String,
    mounted: bool,
    mountpoint: Option<String>,
    /// If it is mounted read-only several times and was named by its backing directory: the others, which can be seen here.
    other_mountpoints: Vec<String>,
    /// Some process has the store: a daemon, a rotation or a check.
    locked: bool,
    plaintext_names: bool,
    #[serde(flatten)]
    rotation: OnDisk,
    #[serde(flatten)]
    rekey: rekey_status::OnDisk,
    keyring: KeyringView,
    /// What the daemon says of itself; `null` if the store is not mounted.
    daemon: Option<DaemonStatus>,
}

/// The keyring without its wrapped bytes. Stable; `key list --json` is this.
#[derive(Debug, Serialize)]
pub struct KeyringView {
    pub store: StoreId,
    pub generation: u64,
    pub root_keys: Vec<RootKeyView>,
    pub keks: Vec<KekView>,
    /// So many different root keys must confirm what cannot be undone.
    pub quorum: u8,
    /// The oldest KEK under which files are opened; `null`: any.
    pub floor: Option<KekId>,
    /// Files and directories whose headers could not be counted; only if they were to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncounted: Option<u64>,
}

/// A root key.
#[derive(Debug, Serialize)]
pub struct RootKeyView {
    pub id: RootKeyId,
    pub uri: String,
}

/// A KEK. Times are Unix seconds, 0 if it has not happened.
#[derive(Debug, Serialize)]
pub struct KekView {
    pub id: KekId,
    pub kind: KekKind,
    pub state: KekState,
    pub created: u64,
    pub activated: u64,
    pub retired: u64,
    pub unused: u64,
    pub destroyed: u64,
    /// When it is to be destroyed; `null` if it is not to be.
    pub ending: Option<Schedule>,
    /// Root keys that open it.
    pub root_keys: Vec<RootKeyId>,
    /// Headers that name it; only if they were counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub headers: Option<u64>,
    /// Files and directories that were waived when it was proved unused; only if there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waived: Option<u64>,
}

impl KeyringView {
    /// `ring`, and what rotations left out.
    pub fn new(ring: &Keyring, rotation: &OnDisk) -> Self {
        let roots = ring.roots.iter().map(|r| RootKeyView { id: r.id, uri: r.uri.clone() }).collect();
        let keks = ring.keks.iter().map(|k| KekView {
            id: k.id,
            kind: k.kind,
            state: k.state,
            created: k.created,
            activated: k.activated,
            retired: k.retired,
            unused: k.unused,
            destroyed: k.destroyed,
            ending: ring.life.schedule(k.id).copied(),
            root_keys: k.wraps.iter().map(|w| w.root).collect(),
            headers: None,
            waived: rotation.waived_of(k),
        });
        Self {
            store: ring.store,
            generation: ring.generation,
            root_keys: roots,
            keks: keks.collect(),
            quorum: ring.life.required(),
            floor: ring.life.floor,
            uncounted: None,
        }
    }

    /// Whether files are not opened under `kek`, which stands before the floor.
    pub fn is_below_floor(&self, kek: KekId) -> bool {
        let at = |id| self.keks.iter().position(|k| k.id == id);
        self.floor.and_then(at).is_some_and(|floor| at(kek).is_some_and(|n| n < floor))
    }
}

/// That a KEK is to be destroyed, for people.
pub fn ending_in_words(s: &Schedule) -> String {
    let used = match s.used {
        0 => String::new(),
        t => format!("; a file NEEDED it on {}", rfc3339_seconds(t)),
    };
    format!("to be destroyed, not before {}{used}", rfc3339_seconds(s.due))
}

/// Runs `status`.
///
/// # Errors
/// [`FaultKind::NotAStore`]; the daemon does not answer.
pub fn run(a: &StatusArgs) -> Result<(), Fault> {
    let place = Place::find(&a.target)?;
    let daemon = ask(&place)?;
    let k = &place.keyring;
    let rotation = OnDisk::find(&place);
    let status = Status {
        store: k.store,
        backing: place.backing.display().to_string(),
        mounted: daemon.is_some(),
        mountpoint: daemon.as_ref().map(|d| d.mountpoint.clone()),
        other_mountpoints: place.other_mounts.iter().map(|m| m.display().to_string()).collect(),
        locked: VolumeLock::is_taken(&place.backing),
        plaintext_names: k.plaintext_names(),
        keyring: KeyringView::new(k, &rotation),
        rotation,
        rekey: rekey_status::OnDisk::find(&place),
        daemon,
    };
    if a.json { output::print_json(&status) } else { output::print(&text(&status)) }
}

/// The daemon's answer; `None` if there is no daemon. Somebody else having the store (an offline rotation) is no error.
pub(super) fn ask(place: &Place) -> Result<Option<DaemonStatus>, Fault> {
    let dead = place.mount.as_ref().filter(|m| crate::daemon::mounts::is_dead(&m.mountpoint));
    match place.connect() {
        Ok(Some(c)) => match c.ask(&Request::Status, |_| {})? {
            Reply::Status(s) => Ok(Some(*s)),
            _ => Err(Fault::new(FaultKind::Daemon, "the daemon gave another answer than was asked for")),
        },
        Err(f) if f.kind != FaultKind::Locked => Err(f),
        Ok(None) | Err(_) => match dead {
            Some(m) => {
                let text = format!("the daemon of the mount at {} has died", m.mountpoint.display());
                Err(Fault::new(FaultKind::DeadMount, text).about(&m.mountpoint))
            }
            None => Ok(None),
        },
    }
}

/// Whether `k` is on its way in or out: staged and not active yet, or retired and maybe still named by some header.
pub(super) fn is_unfinished(k: &KekRecord) -> bool {
    k.state == KekState::Pending || (k.state == KekState::Retired && k.is_needed())
}

fn text(s: &Status) -> String {
    let mut t = format!("store     {}\nbacking   {}\n", s.store, s.backing);
    match (&s.mountpoint, s.locked) {
        (Some(m), _) => t += &format!("mounted   {m}\n"),
        (None, true) => t += "mounted   no, but in use by another process\n",
        (None, false) => t += "mounted   no\n",
    }
    s.other_mountpoints.iter().for_each(|m| t += &format!("mounted   {m}\n"));
    t += &format!("names     {}\n", if s.plaintext_names { "plaintext" } else { "encrypted" });
    if let Some(d) = &s.daemon {
        let mode = if d.read_only { ", read-only" } else { "" };
        t += &format!("daemon    process {}, version {}, up {} s{mode}\n", d.pid, d.version, d.uptime);
        t += &format!("memory    keys {} be swapped out\n", if d.memory_locked { "cannot" } else { "CAN" });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        t += &format!("keys      {}\n", keys_in_words(&d.keys, now));
        let c = &d.dek_cache;
        t += &format!("DEK cache {} keys, {} hits, {} misses\n", c.entries, c.hits, c.misses);
        if let Some(r) = &d.rotation {
            t += &format!("rotation  {}\n", super::rotate::in_words(r));
        }
    }
    if s.rotation.rotation_unfinished && !s.daemon.as_ref().and_then(|d| d.rotation.as_ref()).is_some_and(|r| r.running)
    {
        t += "rotation  unfinished; the next rotate goes on with it\n";
    }
    let rekey = s.daemon.as_ref().and_then(|d| d.rekey.as_ref());
    if let Some(r) = rekey {
        t += &format!("rekey     {}\n", rekey_status::in_words(r));
    }
    if !rekey.is_some_and(|r| r.running) {
        t += &rekey_status::lines(&s.rekey.left(s.daemon.as_ref()));
    }
    t += &s.rotation.exceptions.as_ref().map_or_else(String::new, rotation_status::in_words);
    t + &keys(&s.keyring)
}

/// How the keys stand at the Unix second `now`, and what to do about it.
pub fn keys_in_words(k: &KeysStatus, now: u64) -> String {
    let ago = |t: u64| now.saturating_sub(t);
    match (k.state, k.dropped) {
        (KeysState::Ready, _) if k.last_ok == 0 => "ready".into(),
        (KeysState::Ready, _) => format!("ready, confirmed by the key service {} s ago", ago(k.last_ok)),
        (KeysState::Offline, _) if k.grace_until > now => format!(
            "offline for {} s, files can be opened for {} s more: {}; see to the key service",
            ago(k.since),
            k.grace_until - now,
            k.reason
        ),
        (KeysState::Offline, _) => format!(
            "offline for {} s, too long for files to be opened (ENOKEY); open ones go on: {}; see to the key service",
            ago(k.since),
            k.reason
        ),
        (KeysState::Denied, dropped) => format!(
            "denied for {} s, no file can be opened{}: {}; when access is given back, the next refresh lifts this, or at \
             once: envelopefs unlock",
            ago(k.since),
            if dropped { " and open ones have lost their keys" } else { "; open ones go on" },
            k.reason
        ),
        (KeysState::Locked, _) => {
            format!("locked for {} s, files give ENOKEY; bring them back with: envelopefs unlock", ago(k.since))
        }
    }
}

fn keys(k: &KeyringView) -> String {
    let mut t = format!("keyring   generation {}\n", k.generation);
    for r in &k.root_keys {
        t += &format!("  root key {} {}\n", r.id, r.uri);
    }
    for kek in &k.keks {
        let (state, kind) = (word(&kek.state), word(&kek.kind));
        let closed =
            if kek.state == KekState::Retired && k.is_below_floor(kek.id) { ", closed by the floor" } else { "" };
        let ending = kek.ending.as_ref().map_or(String::new(), |s| format!(", {}", ending_in_words(s)));
        t += &format!("  KEK      {} {state}, {kind}{closed}{ending}\n", kek.id);
    }
    t
}

/// A unit variant's name as JSON has it.
pub fn word<T: Serialize>(v: &T) -> String {
    serde_json::to_value(v).ok().and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default()
}
