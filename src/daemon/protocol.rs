//! The control protocol: one JSON object a line, over the store's socket. A client sends one [`Request`]; the daemon
//! answers with [`Reply`] lines, of which all but [`Reply::Progress`] and [`Reply::RekeyProgress`] are the last. The protocol is internal to one
//! version of the program; scripts use `--json` of the command line.

use super::audit;
use super::fault::Fault;
use crate::crypto::seal::SealKey;
use crate::crypto::secret::StoreSecret;
use crate::format::keyring::KekKind;
use crate::rotation::rekey::{self, RekeyReport, RekeyStatus};
use crate::rotation::{Destruction, Report, SealedReport, Staged, Status, When, sealed};
use crate::store::keys::RefreshedRoot;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use std::io::{self, BufRead, Write};
use std::num::{NonZeroU32, NonZeroUsize};

/// Longest line the daemon accepts, in bytes: a request to rotate with the longest list of waivers
/// ([`crate::rotation::waive::BYTES_MAX`]), whose every byte may be escaped.
pub const LINE_MAX: u64 = 16 << 20;
/// Longest line a client accepts, in bytes: a report can name thousands of files ([`crate::rotation::report::FAILURES_MAX`]),
/// and a reply holds it twice.
pub const REPLY_MAX: u64 = 2 * sealed::LONGEST as u64;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the daemon knows of itself.
    Status,
    /// Start a rotation, or join the one that is under way.
    Rotate(RotateRequest),
    /// Make the new KEK of a rotation, and nothing more.
    RotateStage(RotateRequest),
    /// Steer the rotation or the rekey under way.
    Steer { what: Work, how: Switch },
    /// Add a root key to the keyring.
    KeyAdd {
        uri: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        passphrase: Option<Hidden>,
        #[serde(default)]
        confirm: Confirming,
    },
    /// Set how many root keys must confirm what cannot be undone.
    KeyPolicy {
        quorum: u8,
        #[serde(default)]
        confirm: Confirming,
    },
    /// Open no file under a KEK older than the one with this id; `None`: under any.
    KeyFloor { floor: Option<String> },
    /// Drop every key now.
    Lock,
    /// Bring the keys back.
    Unlock {
        /// Root keys to open the store with; empty: those it was mounted with.
        #[serde(default)]
        keys: Vec<String>,
        /// Passphrase of a `passphrase:` root key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        passphrase: Option<Hidden>,
        /// The recovery key, as it is printed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        recovery: Option<Hidden>,
    },
    /// Remove the root key with this id from the keyring.
    KeyRemove { id: String },
    /// Move what root keys wrapped to their newest versions.
    KeyRefresh {
        /// Look only.
        dry_run: bool,
    },
    /// Give files new DEKs.
    Rekey {
        asked: rekey::Request,
        /// Go on when the client goes away.
        detach: bool,
    },
    /// Prove that no header needs the KEK with this id, and destroy it; or schedule that, or take it back.
    KekDestroy {
        id: String,
        when: When,
        #[serde(default)]
        confirm: Confirming,
    },
    /// Figures for monitoring, as Prometheus text.
    Metrics,
    /// Write the audit log out, seal it, and say where it is.
    AuditHead,
    /// Which of these seals were made with the store's key.
    Seals { of: Sealed, seals: Vec<SealToCheck> },
}

/// Work that is done in the background, and can be watched and steered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    Rotation,
    Rekey,
}

/// What to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// Begin nothing new until resumed.
    Pause,
    Resume,
    /// End it; what is done stays done, and a later one of the same kind goes on.
    Cancel,
}

/// Root keys that confirm what cannot be undone, besides the one the daemon opened the store with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirming {
    pub keys: Vec<String>,
    /// Passphrase of a `passphrase:` root key among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passphrase: Option<Hidden>,
}

/// What is sealed with a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sealed {
    AuditLog,
    RotationReport,
}

impl Sealed {
    /// The store's key for it.
    pub fn key(self, secret: &StoreSecret) -> SealKey {
        match self {
            Self::AuditLog => audit::line::seal_key(secret),
            Self::RotationReport => sealed::seal_key(secret),
        }
    }
}

/// Most seals in one request.
pub const SEALS_MAX: usize = 4096;

/// A seal, in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealToCheck {
    /// SHA-256 of what is signed.
    pub digest: String,
    pub mac: String,
}

/// How a rotation is to be done.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotateRequest {
    /// Root keys for the new KEK; empty: those of the keyring.
    pub keys: Vec<String>,
    /// Passphrase of a `passphrase:` root key among `keys`; with no `keys`, of one that the keyring has already and that
    /// the daemon was not opened with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passphrase: Option<Hidden>,
    /// Kind of the new KEK; as the present one's if not given.
    pub kek: Option<KekKind>,
    /// At most this many files a second.
    pub rate: Option<NonZeroU32>,
    /// Take no heed of what users wait.
    pub full_speed: bool,
    /// Worker threads.
    pub jobs: Option<NonZeroUsize>,
    /// Seconds for which a key service that does not answer is waited for.
    pub patience: u64,
    /// Do nothing unless the active KEK has been in use for so many seconds.
    pub if_older_than: Option<u64>,
    /// Count only, change nothing.
    pub dry_run: bool,
    /// Make a new KEK even though an earlier rotation is unfinished.
    pub restart: bool,
    /// Go on when the client goes away.
    pub detach: bool,
    /// Destroy the old KEK once nothing names it.
    pub destroy_old: bool,
    /// Paths that may fail, as reports name them.
    #[serde(default)]
    pub waive: Vec<String>,
    /// What the answer to [`Request::RotateStage`] was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staged: Option<Staged>,
}

/// A passphrase or a recovery key on its way through the socket: wiped when dropped, never shown.
///
/// In hexadecimal on the wire, so that nothing in it needs escaping: serde then hands it on where it lies in the line, and
/// makes no copy that nobody wipes.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden(String);

impl Serialize for Hidden {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut hex = zeroize::Zeroizing::new(String::with_capacity(2 * self.0.len()));
        for b in self.0.bytes() {
            hex.extend([b >> 4, b & 15].map(|d| char::from_digit(d.into(), 16).unwrap_or('0')));
        }
        s.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for Hidden {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Hex;
        impl serde::de::Visitor<'_> for Hex {
            type Value = Hidden;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a passphrase in hexadecimal")
            }
            fn visit_str<E: serde::de::Error>(self, hex: &str) -> Result<Hidden, E> {
                // Not the text itself into the error.
                let bad = || E::custom("a passphrase in hexadecimal was expected");
                let digit = |c: &u8| char::from(*c).to_digit(16).ok_or_else(bad);
                let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
                let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(pairs.len()));
                for [h, l] in pairs {
                    bytes.push((digit(h)? * 16 + digit(l)?) as u8);
                }
                let text = std::str::from_utf8(&bytes).ok().filter(|_| rest.is_empty()).ok_or_else(bad)?;
                Ok(Hidden(text.to_owned()))
            }
        }
        d.deserialize_str(Hex)
    }
}

impl Hidden {
    pub fn new(s: String) -> Self {
        Self(s)
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hidden(redacted)")
    }
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "body", rename_all = "kebab-case")]
pub enum Reply {
    Status(Box<DaemonStatus>),
    /// More lines follow.
    Progress(Box<Status>),
    /// The rotation's report, or its present state.
    Rotation(Box<RotationState>),
    /// What a rotation is to begin with.
    Staged(Staged),
    /// What became of the KEK.
    Destruction(Destruction),
    /// How a rekey gets on; more lines follow.
    RekeyProgress(Box<RekeyStatus>),
    /// How a rekey ended.
    Rekey(Box<RekeyState>),
    /// What became of each root key.
    Refreshed(RefreshReport),
    Metrics(String),
    /// The audit log's file and the hash of its last line; `None` if the store is mounted without one.
    AuditHead(Option<AuditHead>),
    /// For each seal, whether it is genuine.
    Seals(Vec<bool>),
    /// What a lock or an unlock came to.
    Keys(KeysReply),
    /// Done; nothing to tell.
    Done,
    Failed(Fault),
}

/// Where the daemon's audit log is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditHead {
    pub path: String,
    pub seq: u64,
    /// Hash of the last line.
    pub head: String,
    /// Why nothing more gets there.
    pub trouble: Option<String>,
}

/// What only the daemon knows about a mounted store. Part of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Process id of the daemon.
    pub pid: u32,
    /// Version of the daemon.
    pub version: String,
    /// Store id.
    pub store: String,
    /// Where the store is mounted.
    pub mountpoint: String,
    /// The backing directory.
    pub backing: String,
    /// Seconds since the mount.
    pub uptime: u64,
    pub read_only: bool,
    /// Whether every key lies in memory that cannot be swapped out.
    pub memory_locked: bool,
    pub keys: KeysStatus,
    pub dek_cache: CacheStatus,
    /// The rotation under way, or the last one since the mount.
    pub rotation: Option<RotationState>,
    /// The rekey under way, or the last one since the mount.
    pub rekey: Option<RekeyState>,
    /// What the rekey goes over that is under way or unfinished.
    pub rekey_asked: Option<rekey::Asked>,
}

/// One word for how the keys stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeysState {
    #[default]
    Ready,
    /// The key service does not answer.
    Offline,
    /// The key service refuses.
    Denied,
    /// Locked by `lock`.
    Locked,
}

/// How the keys stand. Times are Unix seconds, 0 if there is none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeysStatus {
    pub state: KeysState,
    /// No key is in memory: open files do not work either.
    pub dropped: bool,
    /// Since when it is so.
    pub since: u64,
    /// While offline: until when files can be opened.
    pub grace_until: u64,
    /// When the key service last unwrapped the active KEK; 0 if none is asked.
    pub last_ok: u64,
    /// Seconds between refreshes; 0: none.
    pub refresh: u64,
    /// What the service said.
    pub reason: String,
}

/// What a lock or an unlock came to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeysReply {
    /// There was something to do.
    pub changed: bool,
    /// Files that were open and have their keys again.
    pub regained: u64,
    /// Files that were open and do not.
    pub failed: u64,
    pub keys: KeysStatus,
}

/// The DEK cache's figures.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CacheStatus {
    pub entries: u64,
    pub hits: u64,
    pub misses: u64,
    /// Dropped to make room.
    pub evicted: u64,
    /// Dropped for their age or idle time.
    pub expired: u64,
}

/// A rotation or a rekey, running or ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(bound(deserialize = "S: Deserialize<'de>, R: Deserialize<'de>"))]
pub struct RunState<S, R> {
    /// Whether it is under way now.
    pub running: bool,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<S>,
    /// The report of one that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<R>,
    /// A rotation's report as evidence, for the client that waits for it; no part of `status`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<SealedReport>,
    /// Why it ended without a report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

impl<S, R> Default for RunState<S, R> {
    fn default() -> Self {
        Self { running: false, status: None, report: None, sealed: None, fault: None }
    }
}

/// A rotation.
pub type RotationState = RunState<Status, Report>;
/// A rekey.
pub type RekeyState = RunState<RekeyStatus, RekeyReport>;

/// What `key refresh` found and did. `key refresh --json` is this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefreshReport {
    pub dry_run: bool,
    /// Generation of the keyring afterwards.
    pub generation: u64,
    pub root_keys: Vec<RootRefresh>,
}

/// One root key of a [`RefreshReport`]; what it wraps is counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RootRefresh {
    pub id: String,
    pub uri: String,
    /// Wrapped by its newest version already.
    pub current: u32,
    /// Wrapped by an older one.
    pub due: u32,
    /// Of those that were due, moved.
    pub moved: u32,
    /// Why not everything was looked at or moved.
    pub fault: Option<Fault>,
}

impl RefreshReport {
    /// What [`crate::store::keys::Keys::refresh`] returned, after which the keyring has this generation.
    pub fn new(dry_run: bool, generation: u64, roots: Vec<RefreshedRoot>) -> Self {
        let root = |r: RefreshedRoot| RootRefresh {
            id: r.id.to_string(),
            fault: r.problem.map(|e| Fault::kms(&r.uri, &e)),
            uri: r.uri,
            current: r.current,
            due: r.due,
            moved: r.moved,
        };
        Self { dry_run, generation, root_keys: roots.into_iter().map(root).collect() }
    }
}

/// Sends one line.
///
/// # Errors
/// The socket's.
pub fn send<T: Serialize>(w: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = zeroize::Zeroizing::new(serde_json::to_vec(message).map_err(io::Error::other)?);
    line.push(b'\n');
    w.write_all(&line)?;
    w.flush()
}

/// Receives the only line that the other side sends; `None` if it sends none. Nothing of it stays in memory: it may hold
/// a passphrase. What comes after the line is left out.
///
/// # Errors
/// As [`receive`].
pub fn receive_only<T: DeserializeOwned>(r: &mut impl io::Read) -> io::Result<Option<T>> {
    let mut line = zeroize::Zeroizing::new(vec![0u8; 4096]);
    let mut filled = 0;
    loop {
        if filled == line.len() {
            if line.len() as u64 >= LINE_MAX {
                return parse(&line);
            }
            // Not grown in place, which would leave the shorter one behind unwiped.
            let mut longer = zeroize::Zeroizing::new(vec![0u8; 2 * line.len()]);
            longer.iter_mut().zip(line.iter()).for_each(|(to, from)| *to = *from);
            line = longer;
        }
        let read = match r.read(line.get_mut(filled..).unwrap_or_default()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let new = line.get(filled..filled + read).unwrap_or_default();
        let end = new.iter().position(|b| *b == b'\n').map(|at| filled + at + 1);
        filled += read;
        if read == 0 || end.is_some() {
            return parse(line.get(..end.unwrap_or(filled)).unwrap_or_default());
        }
    }
}

/// Receives one line of at most `longest` bytes; `None` at the end.
///
/// # Errors
/// The socket's, or `InvalidData` if the line is too long or not a `T`.
pub fn receive<T: DeserializeOwned>(r: &mut impl BufRead, longest: u64) -> io::Result<Option<T>> {
    let mut line = zeroize::Zeroizing::new(Vec::new());
    io::Read::take(&mut *r, longest).read_until(b'\n', &mut line)?;
    parse(&line)
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> io::Result<Option<T>> {
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "line cut short or too long"));
    }
    serde_json::from_slice(line).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::report::FAILURES_MAX;
    use crate::rotation::{Counts, Failure};

    #[test]
    fn requests_travel() {
        for r in [
            Request::Status,
            Request::Rotate(RotateRequest {
                keys: vec!["keyfile:/k".into()],
                rate: NonZeroU32::new(5),
                ..Default::default()
            }),
            Request::KeyAdd {
                uri: "passphrase:".into(),
                passphrase: Some(Hidden::new("p w".into())),
                confirm: Confirming::default(),
            },
            Request::KeyRemove { id: "ab".into() },
            Request::KeyRefresh { dry_run: true },
            Request::KekDestroy {
                id: "ab".into(),
                when: When::After(7),
                confirm: Confirming { keys: vec!["keyfile:/k".into()], passphrase: None },
            },
            Request::KekDestroy { id: "ab".into(), when: When::Now, confirm: Confirming::default() },
            Request::KeyPolicy { quorum: 2, confirm: Confirming::default() },
            Request::KeyFloor { floor: None },
            Request::Seals { of: Sealed::AuditLog, seals: vec![SealToCheck { digest: "0".into(), mac: "1".into() }] },
            Request::Steer { what: Work::Rekey, how: Switch::Pause },
            Request::Rekey {
                asked: rekey::Request {
                    paths: vec![b"a/\xff".to_vec()],
                    rate: NonZeroU32::new(5),
                    ..Default::default()
                },
                detach: true,
            },
            Request::Lock,
            Request::Unlock {
                keys: vec!["keyfile:/k".into()],
                passphrase: Some(Hidden::new("p w".into())),
                recovery: None,
            },
        ] {
            let mut b = Vec::new();
            send(&mut b, &r).unwrap();
            assert_eq!(b.iter().filter(|c| **c == b'\n').count(), 1);
            assert_eq!(receive::<Request>(&mut &b[..], LINE_MAX).unwrap().as_ref(), Some(&r));
            assert_eq!(receive_only::<Request>(&mut &b[..]).unwrap(), Some(r));
        }
    }

    #[test]
    fn the_longest_list_of_seals_fits_into_a_line() {
        let seal = SealToCheck { digest: "a".repeat(64), mac: "b".repeat(64) };
        let mut b = Vec::new();
        send(&mut b, &Request::Seals { of: Sealed::AuditLog, seals: vec![seal; SEALS_MAX] }).unwrap();
        assert!((b.len() as u64) < LINE_MAX);
    }

    /// With paths as long as one call may name, a reply is longer than any request may be.
    #[test]
    fn a_report_that_names_as_many_failures_as_it_may_travels() {
        let failure = Failure {
            path: "d/".repeat(2048),
            code: "EIO".into(),
            message: "Input/output error".into(),
            directory: false,
        };
        let id = "01".repeat(16);
        let report = serde_json::json!({
            "outcome": "incomplete", "store": id, "version": "0", "target": id, "resumed": false, "started": 1,
            "finished": 2, "passes": 2, "sweep": Counts::default(), "verify": null, "slots_by_kek": {},
            "headers_by_kek": {}, "retired": [], "destroyed": [], "failures": [], "failures_total": 1, "generation": 1,
        });
        let report: Report = serde_json::from_value(report).unwrap();
        let report = Report { failures: vec![failure; FAILURES_MAX], ..report };
        let sealed = SealedReport::new(&report, &Sealed::RotationReport.key(&StoreSecret::random()));
        let state = RotationState { report: Some(report), sealed: Some(sealed), ..Default::default() };
        let reply = Reply::Rotation(Box::new(state));
        let mut b = Vec::new();
        send(&mut b, &reply).unwrap();
        assert!(b.len() as u64 > LINE_MAX);
        assert!(receive::<Reply>(&mut &b[..], REPLY_MAX).unwrap() == Some(reply));
    }

    #[test]
    fn hostile_lines_are_refused() {
        assert!(receive::<Request>(&mut &b"{\"request\":\"status\"}"[..], LINE_MAX).is_err(), "no newline");
        let unknown = b"{\"request\":\"key-remove\",\"id\":\"a\",\"x\":1}\n";
        assert!(receive::<Request>(&mut &unknown[..], LINE_MAX).is_err(), "unknown field");
        assert!(receive::<Request>(&mut &b"{\"request\":\"format-disk\"}\n"[..], LINE_MAX).is_err());
        assert!(receive::<Request>(&mut &b"\xff\n"[..], LINE_MAX).is_err());
        assert_eq!(receive::<Request>(&mut &b""[..], LINE_MAX).unwrap(), None);
        let long = vec![b' '; LINE_MAX as usize + 10];
        assert!(receive::<Request>(&mut &long[..], LINE_MAX).is_err());
        assert!(receive_only::<Request>(&mut &long[..]).is_err());
        for bad in ["68g0", "686", "ff"] {
            let line = format!("{{\"request\":\"unlock\",\"passphrase\":\"{bad}\"}}\n");
            let e = receive_only::<Request>(&mut line.as_bytes()).unwrap_err();
            assert!(!e.to_string().contains(bad), "{e}");
        }
    }

    /// One byte at a time, and longer than the first buffer.
    #[test]
    fn a_line_that_comes_in_pieces_is_put_together() {
        struct Drip<'a>(&'a [u8]);
        impl io::Read for Drip<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let n = self.0.len().min(out.len()).min(1);
                out[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let r = Request::Unlock {
            keys: vec!["k".repeat(10_000)],
            passphrase: Some(Hidden::new("ü \"\\\n".into())),
            recovery: None,
        };
        let mut b = Vec::new();
        send(&mut b, &r).unwrap();
        assert_eq!(receive_only::<Request>(&mut Drip(&b)).unwrap(), Some(r));
        assert_eq!(receive_only::<Request>(&mut &b""[..]).unwrap(), None);
        assert!(receive_only::<Request>(&mut Drip(&b[..b.len() - 1])).is_err());
    }

    #[test]
    fn a_passphrase_is_not_shown() {
        let hidden = || Some(Hidden::new("hunter2".into()));
        let confirm = Confirming { keys: Vec::new(), passphrase: hidden() };
        let r = Request::KeyAdd { uri: "passphrase:".into(), passphrase: hidden(), confirm };
        assert!(!format!("{r:?}").contains("hunter2"));
    }
}
