//! Reports of rotations as evidence: writing them (`rotate --report`) and checking them (`key verify-report`).

use super::args::OpenKeys;
use super::audit::refuse_inside;
use super::place::Place;
use super::{output, root_keys, seals};
use crate::daemon::client::Connection;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::process;
use crate::daemon::protocol::Sealed;
use crate::format::time::rfc3339_seconds;
use crate::rotation::sealed::LONGEST;
use crate::rotation::{Outcome, Report, SealedReport};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A report's file before there is anything to write: a temporary file next to it, so that a rotation of hours does not
/// end with a directory that cannot be written. Goes away when dropped.
#[derive(Debug)]
pub struct ReportFile {
    path: PathBuf,
    temporary: Option<(PathBuf, File)>,
}

impl ReportFile {
    /// Makes the temporary file, with mode 0600.
    ///
    /// # Errors
    /// [`FaultKind::Usage`] if `path` names no file, or one in the backing directory; the kernel's.
    pub fn create(path: &Path, backing: &Path) -> Result<Self, Fault> {
        let no_file = || Fault::new(FaultKind::Usage, format!("report {}: not the name of a file", path.display()));
        let path = std::path::absolute(path).ok().filter(|p| !p.is_dir()).ok_or_else(no_file)?;
        let name = path.file_name().ok_or_else(no_file)?;
        refuse_inside("report", &path, &[backing])?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let mut how = File::options();
        let file = how.write(true).create_new(true).mode(0o600).open(&temporary);
        let file = file.map_err(|e| Fault::io("write", &path, &e))?;
        Ok(Self { path, temporary: Some((temporary, file)) })
    }

    /// Writes `report`, durably, in the place of what had this name. Returns the path.
    ///
    /// # Errors
    /// The kernel's; what had this name is as it was.
    pub fn write(mut self, report: &SealedReport) -> Result<PathBuf, Fault> {
        let moved = match &mut self.temporary {
            Some((temporary, file)) => put(file, temporary, &self.path, report.to_file().as_bytes()),
            None => Ok(()),
        };
        moved.map_err(|e| Fault::io("write", &self.path, &e))?;
        self.temporary = None;
        Ok(std::mem::take(&mut self.path))
    }
}

fn put(file: &mut File, temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// `key verify-report --json`. Stable.
#[derive(Debug, Serialize)]
struct Verdict<'a> {
    genuine: bool,
    file: String,
    /// `null` if it is not genuine.
    report: Option<&'a Report>,
}

/// Runs `key verify-report`.
///
/// # Errors
/// [`FaultKind::Report`] if the store's key did not seal this report; [`FaultKind::Usage`] if it is another store's, or it
/// is not known where the store is; the store's and its root keys'.
pub fn verify(file: &Path, target: Option<&Path>, json: bool, keys: &OpenKeys) -> Result<(), Fault> {
    let shown = file.display().to_string();
    let not_genuine = |why: &str| {
        if json {
            output::print_json(&Verdict { genuine: false, file: shown.clone(), report: None })?;
        }
        Err(Fault::new(FaultKind::Report, format!("{shown}: {why}")))
    };
    let Some((report, seal)) = SealedReport::from_file(&read(file)?) else {
        return not_genuine("not a report as rotate --report writes it, or changed since");
    };
    let place = target.map(Place::find).transpose()?;
    if let Some(p) = place.as_ref().filter(|p| p.keyring.store != report.store) {
        let text = format!(
            "{shown} is about store {}, and {} is store {}: name the store that the report is about",
            report.store,
            p.backing.display(),
            p.keyring.store
        );
        return Err(Fault::new(FaultKind::Usage, text));
    }
    let connect = || match &place {
        Some(p) => p.connect(),
        None => daemon_of(&report).map(Some),
    };
    let open = || match &place {
        Some(p) => root_keys::open(&p.posix, &keys.open_keys, &root_keys::opening(&keys.access, &keys.recovery)?),
        None => Err(where_is(&report)),
    };
    if seals::genuine(Sealed::RotationReport, &[seal], connect, open)? != [true] {
        return not_genuine("not sealed with the key of this store, or changed since");
    }
    match json {
        true => output::print_json(&Verdict { genuine: true, file: shown, report: Some(&report) }),
        false => output::print(&in_words(&report)),
    }
}

/// The bytes of a report's file.
///
/// # Errors
/// The kernel's.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    let fail = |e: io::Error| Fault::io("read", path, &e);
    let mut bytes = Vec::new();
    File::open(path).map_err(fail)?.take(LONGEST as u64).read_to_end(&mut bytes).map_err(fail)?;
    Ok(bytes)
}

/// The daemon that has the report's store mounted.
fn daemon_of(r: &Report) -> Result<Connection, Fault> {
    Connection::to_store(r.store, process::uid()).map_err(|f| match f.kind {
        FaultKind::Daemon => where_is(r),
        _ => f,
    })
}

fn where_is(r: &Report) -> Fault {
    let text = format!("store {} of this report is not mounted here: name its backing directory, too", r.store);
    Fault::new(FaultKind::Usage, text)
}

/// What a genuine report proves.
fn in_words(r: &Report) -> String {
    let mut t = format!("genuine: sealed with the key of store {} by envelopefs {}\n", r.store, r.version);
    t += &format!("rotation   {}\n", outcome(r.outcome));
    t += &format!("time       {} to {}\n", rfc3339_seconds(r.started), rfc3339_seconds(r.finished));
    t += &format!("keyring    generation {} at the end\n", r.generation);
    if r.outcome != Outcome::DryRun {
        t += &format!("moved      {} headers to KEK {}\n", r.sweep.rewrapped, r.target);
    }
    match &r.verify {
        Some(v) => t += &format!("scanned    {} files, {} of them empty\n", v.scanned, v.empty),
        None => t += "scanned    nothing: it ended before the scan that counts headers\n",
    }
    for (kek, n) in &r.headers_by_kek {
        t += &format!("headers    {n} under KEK {kek}\n");
    }
    for k in &r.retired {
        t += &format!("retired    KEK {k}\n");
    }
    for k in &r.destroyed {
        t += &format!("destroyed  KEK {k}\n");
    }
    for s in &r.shares {
        t += &format!("share      {}, {} of {} files listed\n", s.shard, s.own, s.listed);
    }
    for k in &r.kept {
        t += &format!("kept       KEK {k}, for what is waived or has no header\n");
    }
    if let Some(n) = lost(r) {
        t += &format!("no header  {n} files with content\n");
    }
    for path in &r.no_header {
        t += &format!("  {path}\n");
    }
    if !r.waived.is_empty() {
        t += &format!("waived     {}\n", r.waived.len());
    }
    for f in &r.waived {
        t += &format!("  {}\n", f.in_words());
    }
    t += &format!("failures   {}\n", r.failures_total);
    for f in &r.failures {
        t += &format!("  {}\n", f.in_words());
    }
    let but = if lost(r).is_some() { "; nothing of files that have content and no header" } else { "" };
    t + &format!("proves     {}{but}\n", proves(r))
}

/// Files with content and no header that the last scan saw, if there are any.
fn lost(r: &Report) -> Option<u64> {
    r.verify.map(|v| v.no_header).filter(|n| *n > 0)
}

fn outcome(o: Outcome) -> &'static str {
    match o {
        Outcome::Complete => "complete",
        Outcome::Incomplete => "incomplete",
        Outcome::Cancelled => "cancelled",
        Outcome::DryRun => "none: headers were counted only",
        Outcome::NotDue => "none: the active KEK is younger than asked for",
        Outcome::ShareComplete => "one share of it complete",
    }
}

fn proves(r: &Report) -> String {
    match r.outcome {
        Outcome::Complete if !r.waived.is_empty() => format!(
            "when it ended, every header of the store named KEK {} in both slots, and no other, but for what is waived",
            r.target
        ),
        Outcome::Complete => {
            format!("when it ended, every header of the store named KEK {} in both slots, and no other", r.target)
        }
        Outcome::Incomplete => "what was moved until then; what failed is under an older KEK or cannot be read".into(),
        Outcome::Cancelled => "what was moved until then; headers may be under older KEKs".into(),
        Outcome::ShareComplete => format!(
            "when it ended, every header of its share named KEK {} in both slots; nothing about the other shares",
            r.target
        ),
        Outcome::NotDue => "that the active KEK was younger than asked for, and no rotation unfinished".into(),
        Outcome::DryRun if r.failures_total == 0 => "how many headers were seen under which KEK at that time".into(),
        Outcome::DryRun => "how many headers were seen under which KEK at that time, without what failed".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_report_that_is_not_written_leaves_nothing() {
        let d = tempfile::tempdir().unwrap();
        let (out, back) = (d.path().join("out"), d.path().join("back"));
        fs::create_dir(&out).unwrap();
        fs::create_dir(&back).unwrap();
        let f = ReportFile::create(&out.join("r"), &back).unwrap();
        assert_eq!(names(&out).len(), 1);
        drop(f);
        assert!(names(&out).is_empty());
        for bad in [back.join("r"), out.clone(), PathBuf::from("/")] {
            assert_eq!(ReportFile::create(&bad, &back).unwrap_err().kind, FaultKind::Usage, "{}", bad.display());
        }
        assert_eq!(ReportFile::create(&d.path().join("no/r"), &back).unwrap_err().kind, FaultKind::Other);
    }
}
