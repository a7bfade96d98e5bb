//! `audit verify`, and where audit logs go.

use super::args::AuditVerifyArgs;
use super::config::{Config, StoreConfig};
use super::place::Place;
use super::{output, root_keys, seals};
use crate::crypto::seal::{Seal, hash_from, hex};
use crate::daemon::audit::chain::{Bad, Beginning, Summary, Verifier};
use crate::daemon::audit::verify::{self, Refused};
use crate::daemon::audit::{OnError, Options};
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::protocol::{Reply, Request, Sealed};
use crate::daemon::{mounts, open};
use crate::format::ids::StoreId;
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the log is to be written, if there is to be one: as `given` on the command line, else as `table` says, else as the
/// defaults of the configuration do.
///
/// # Errors
/// [`FaultKind::Usage`] if the path names no file.
pub fn options(given: Option<&Path>, c: &Config, table: Option<&StoreConfig>) -> Result<Option<Options>, Fault> {
    let d = &c.defaults;
    let path = given.or(table.and_then(|t| t.audit_log.as_deref())).or(d.audit_log.as_deref());
    let Some(path) = path else { return Ok(None) };
    let no_file = || Fault::new(FaultKind::Usage, format!("audit log {}: not the name of a file", path.display()));
    let absolute = std::path::absolute(path).ok().filter(|p| p.file_name().is_some()).ok_or_else(no_file)?;
    let on_error: OnError = table.and_then(|t| t.audit_on_error).or(d.audit_on_error).unwrap_or_default();
    let fsync = d.audit_fsync_ms.map_or(Options::FSYNC, Duration::from_millis);
    Ok(Some(Options { path: absolute, on_error, fsync }))
}

/// The log of an unmounted store at `backing`: that of its table in the configuration, or the default one.
///
/// # Errors
/// As [`options`].
pub fn options_of(c: &Config, backing: &Path) -> Result<Option<Options>, Fault> {
    let is_it = |t: &&StoreConfig| std::fs::canonicalize(&t.backing).is_ok_and(|p| p == backing);
    options(None, c, c.store.values().find(is_it))
}

/// Refuses a file (`what` it is) that lies in one of `dirs`: in the mount a log would wait for itself, in the backing
/// directory it would be taken for a file of the store.
///
/// # Errors
/// [`FaultKind::Usage`].
pub fn refuse_inside(what: &str, file: &Path, dirs: &[&Path]) -> Result<(), Fault> {
    let folder = file.parent().and_then(|p| mounts::resolve(p).ok());
    match folder.and_then(|f| dirs.iter().find(|d| f.starts_with(d)).copied()) {
        Some(d) => {
            let text = format!("{what} {} lies in {}: put it elsewhere", file.display(), d.display());
            Err(Fault::new(FaultKind::Usage, text))
        }
        None => Ok(()),
    }
}

/// `audit verify --json`. Stable.
#[derive(Debug, Serialize)]
struct Report {
    whole: bool,
    files: Vec<String>,
    store: Option<StoreId>,
    records: u64,
    first: u64,
    last: u64,
    last_time: Option<String>,
    head: Option<String>,
    /// The record that the first file goes on after; `null` if it begins a log.
    continues: Option<Link>,
    chains: u64,
    recovered: u64,
    lost: u64,
    seals: Seals,
    bad: Option<BadLine>,
}

#[derive(Debug, Serialize)]
struct Link {
    seq: u64,
    head: String,
}

#[derive(Debug, Serialize)]
struct Seals {
    found: u64,
    /// Whether their MACs were checked.
    checked: bool,
    /// Records after the last one.
    unsealed: u64,
}

#[derive(Debug, Serialize)]
struct BadLine {
    file: String,
    line: u64,
    code: &'static str,
    message: String,
}

/// Runs `audit verify`.
///
/// # Errors
/// [`FaultKind::Damage`] with the first bad line; a file cannot be read; the store's and its root keys'.
pub fn verify(a: &AuditVerifyArgs) -> Result<(), Fault> {
    let place = a.store.as_deref().map(Place::find).transpose()?;
    let mut v = Verifier::new(place.as_ref().map(|p| p.keyring.store));
    if let Some(h) = &a.expect_head {
        let bad = || Fault::new(FaultKind::Usage, "--expect-head: expected 64 hexadecimal digits");
        v.require(hash_from(h).ok_or_else(bad)?);
    }
    let live = match &place {
        Some(p) => require_live_head(&mut v, p, &a.files)?,
        None => None,
    };
    let checked = match (read(v, &a.files, live)?, &place) {
        (Ok(s), Some(p)) => {
            let genuine = genuine_seals(p, a, &s)?;
            s.judge_seals(|i| genuine.get(i) != Some(&true)).map(|()| s)
        }
        (r, _) => r,
    };
    match checked {
        Ok(s) if a.json => output::print_json(&Report::whole(a, &s)),
        Ok(s) => output::print(&text(a, &s)),
        Err((file, bad)) => {
            let path = a.files.get(file).map(|p| p.display().to_string()).unwrap_or_default();
            let message = format!("{path}: {bad}");
            if a.json {
                output::print_json(&Report::bad(a, &path, &bad))?;
            }
            Err(Fault::new(FaultKind::AuditLog, message))
        }
    }
}

/// If the store is mounted with an audit log that is among `files`: that file, which must hold what the daemon has written
/// so far.
fn require_live_head(v: &mut Verifier, place: &Place, files: &[PathBuf]) -> Result<Option<usize>, Fault> {
    let Some(c) = place.connect()? else { return Ok(None) };
    let Reply::AuditHead(Some(h)) = c.ask(&Request::AuditHead, |_| {})? else { return Ok(None) };
    if let Some(why) = &h.trouble {
        eprintln!("envelopefs: the daemon cannot write its audit log {}: {why}", h.path);
    }
    let id = |p: &Path| std::fs::metadata(p).map(|m| (m.dev(), m.ino())).ok();
    let Some(log) = id(Path::new(&h.path)) else { return Ok(None) };
    let live = files.iter().position(|f| id(f) == Some(log));
    if let (Some(_), Some(head)) = (live, hash_from(&h.head)) {
        v.require(head);
    }
    Ok(live)
}

/// The chain of all `files`; the inner error is the first bad line, and in which file.
fn read(mut v: Verifier, files: &[PathBuf], live: Option<usize>) -> Result<Result<Summary, (usize, Bad)>, Fault> {
    for (i, f) in files.iter().enumerate() {
        match verify::file(&mut v, f, live == Some(i)) {
            Ok(()) => {}
            Err(Refused::Unreadable(f)) => return Err(f),
            Err(Refused::Bad(b)) => return Ok(Err((i, b))),
        }
    }
    Ok(v.end().map_err(|b| (files.len().saturating_sub(1), b)))
}

/// Which of the seals were made with the store's key.
fn genuine_seals(place: &Place, a: &AuditVerifyArgs, s: &Summary) -> Result<Vec<bool>, Fault> {
    let all: Vec<Seal> = s.seals.iter().map(|x| x.seal).collect();
    seals::genuine(
        Sealed::AuditLog,
        &all,
        || place.connect(),
        || open::keys(&place.posix, &a.key.keys, &root_keys::connect_options(&a.key.access)?),
    )
}

impl Report {
    fn whole(a: &AuditVerifyArgs, s: &Summary) -> Self {
        Self {
            whole: true,
            files: files(a),
            store: Some(s.store),
            records: s.records,
            first: first(s),
            last: s.end.seq,
            last_time: Some(s.last_time.clone()),
            head: Some(hex(&s.end.head)),
            continues: match s.beginning {
                Beginning::Start => None,
                Beginning::After(c) => Some(Link { seq: c.seq, head: hex(&c.head) }),
            },
            chains: s.chains,
            recovered: s.recovered,
            lost: s.lost,
            seals: Seals { found: s.seals.len() as u64, checked: a.store.is_some(), unsealed: s.unsealed },
            bad: None,
        }
    }

    fn bad(a: &AuditVerifyArgs, file: &str, b: &Bad) -> Self {
        let bad = BadLine { file: file.to_owned(), line: b.line, code: b.why.code(), message: b.to_string() };
        Self {
            whole: false,
            files: files(a),
            store: None,
            records: 0,
            first: 0,
            last: 0,
            last_time: None,
            head: None,
            continues: None,
            chains: 0,
            recovered: 0,
            lost: 0,
            seals: Seals { found: 0, checked: false, unsealed: 0 },
            bad: Some(bad),
        }
    }
}

fn files(a: &AuditVerifyArgs) -> Vec<String> {
    a.files.iter().map(|f| f.display().to_string()).collect()
}

fn first(s: &Summary) -> u64 {
    match s.beginning {
        Beginning::Start => 1,
        Beginning::After(c) => c.seq + 1,
    }
}

fn text(a: &AuditVerifyArgs, s: &Summary) -> String {
    let mut t = format!("whole: {} records of store {}, the last at {}\n", s.records, s.store, s.last_time);
    t += &format!("head      {} (record {})\n", hex(&s.end.head), s.end.seq);
    if let Beginning::After(c) = s.beginning {
        t += &format!("continues {} (record {}), which was not given\n", hex(&c.head), c.seq);
    }
    if s.chains > 1 {
        t += &format!("begins anew {} times: what came between cannot be known\n", s.chains - 1);
    }
    let seals = s.seals.len();
    t += &match (a.store.is_some(), s.unsealed) {
        (true, 0) => format!("seals     {seals}, all made with the key of this store\n"),
        (true, n) => {
            format!("seals     {seals}, all made with the key of this store; {n} records after the last one\n")
        }
        (false, _) => format!("seals     {seals}, not checked: give --store\n"),
    };
    if s.recovered > 0 {
        t += &format!("recovered {} torn by crashes\n", s.recovered);
    }
    if s.lost > 0 {
        t += &format!("lost      {} events that could not be written\n", s.lost);
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_about_the_log_counts() {
        let text = "[defaults]\naudit_log = \"/d/{store}\"\naudit_on_error = \"stop\"\naudit_fsync_ms = 0\n\
                    [store.s]\nbacking = \"/b\"\naudit_log = \"/s\"\n[store.t]\nbacking = \"/c\"\naudit_on_error = \"continue\"\n";
        let c = super::super::config::parse(text).unwrap();
        let of =
            |given: Option<&str>, name: &str| options(given.map(Path::new), &c, c.store.get(name)).unwrap().unwrap();
        assert_eq!(of(Some("/g"), "s").path, Path::new("/g"));
        assert_eq!(of(None, "s").path, Path::new("/s"));
        assert_eq!((of(None, "s").on_error, of(None, "s").fsync), (OnError::Stop, Duration::ZERO));
        assert_eq!(of(None, "t").on_error, OnError::Continue);
        let d = of(None, "none");
        assert_eq!(d.path_for(StoreId([1; 16])), Path::new("/d").join("01".repeat(16)));
        assert_eq!(options(None, &Config::default(), None).unwrap(), None);
        assert!(options(Some(Path::new("/")), &Config::default(), None).is_err());
    }

    #[test]
    fn a_log_inside_the_store_is_refused() {
        let d = tempfile::tempdir().unwrap();
        let (mnt, back) = (d.path().join("mnt"), d.path().join("back"));
        std::fs::create_dir_all(mnt.join("sub")).unwrap();
        std::fs::create_dir(&back).unwrap();
        std::os::unix::fs::symlink(&mnt, d.path().join("link")).unwrap();
        let dirs = [mnt.as_path(), back.as_path()];
        for bad in ["mnt/log", "mnt/sub/log", "back/log", "link/log"] {
            assert_eq!(refuse_inside("log", &d.path().join(bad), &dirs).unwrap_err().kind, FaultKind::Usage, "{bad}");
        }
        refuse_inside("log", &d.path().join("log"), &dirs).unwrap();
    }
}
