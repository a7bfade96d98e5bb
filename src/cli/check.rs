//! `check`: looks for damage, with keys as far as there are any.

use super::args::CheckArgs;
use super::progress::Meter;
use super::{output, root_keys};
use crate::backing::posix::Posix;
use crate::daemon::fault::{Fault, FaultKind};
use crate::daemon::lock::VolumeLock;
use crate::daemon::open;
use crate::store::check::{self, CheckCounts, CheckOptions, CheckProgress, CheckReport, Severity};
use crate::store::keys::Keys;

/// Runs the subcommand.
///
/// # Errors
/// [`FaultKind::Damage`] if some was found; [`FaultKind::NotAStore`]; root keys that were asked for and do not open the
/// store.
pub fn run(a: &CheckArgs) -> Result<(), Fault> {
    let b = open::backing(&a.backing)?;
    // Reading beside a daemon does no harm; with the lock nothing changes meanwhile.
    let lock = VolumeLock::take(&a.backing, "check");
    match &lock {
        Err(f) if f.kind == FaultKind::Locked => {
            eprintln!("envelopefs: the store is in use: what is being written just now may show as unfinished");
        }
        Err(f) if f.kind == FaultKind::NotAStore => return Err(f.clone()),
        _ => {}
    }
    let keys = if a.no_key { None } else { keys(a, &b)? };
    let meter = Meter::new(a.json);
    let options = CheckOptions { deep: a.deep };
    let report = check::run(&b, keys.as_ref(), &options, &Shown(&meter)).map_err(|e| Fault::store(&a.backing, &e))?;
    meter.end();
    if a.json {
        output::print_json(&report)?
    } else {
        output::print(&text(&report))?
    }
    if report.is_clean() {
        return Ok(());
    }
    let text = format!("{}: {} damaged", a.backing.display(), count(report.damage, "object"));
    Err(Fault::new(FaultKind::Damage, text))
}

/// The opened keyring; `None`, with a word on standard error, if nobody asked for keys and there are none to be had.
fn keys(a: &CheckArgs, b: &Posix) -> Result<Option<Keys>, Fault> {
    let p = &a.key.access;
    let connect = root_keys::opening(p, &a.recovery)?;
    let asked = a.deep
        || !a.key.keys.is_empty()
        || p.passphrase_file.is_some()
        || p.passphrase_command.is_some()
        || connect.recovery.is_some();
    match root_keys::open(b, &a.key.keys, &connect) {
        Ok(k) => Ok(Some(k)),
        Err(f) if asked => Err(f),
        Err(f) => {
            eprintln!("envelopefs: checking without keys, which sees less: {}", f.message);
            Ok(None)
        }
    }
}

struct Shown<'a>(&'a Meter);

impl CheckProgress for Shown<'_> {
    fn update(&self, c: &CheckCounts) {
        let bytes = output::bytes(c.bytes);
        self.0.update(c.files + c.empty_files, None, &format!("{} directories, {bytes}", c.directories));
    }
}

fn text(r: &CheckReport) -> String {
    let mut t = String::new();
    for f in &r.findings {
        let how = match f.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Damage => "DAMAGE",
        };
        let path = if f.path.is_empty() { "." } else { &f.path };
        t += &format!("{how}: {}: {} ({})\n", path.escape_debug(), f.message, f.code);
    }
    let c = &r.counts;
    let how = match (r.with_keys, r.deep) {
        (_, true) => "every block authenticated",
        (true, _) => "headers, states and names authenticated; --deep reads the blocks too",
        _ => "structure only, without keys",
    };
    let files = count(c.files + c.empty_files, "file");
    let found = [count(r.damage, "object"), count(r.warnings, "warning"), count(r.notes, "note")];
    let dirs = if c.directories == 1 { "directory" } else { "directories" };
    t + &format!(
        "checked {files} in {} {dirs}, {}: {how}\n{} damaged, {}, {}\n",
        c.directories,
        output::bytes(c.bytes),
        found[0],
        found[1],
        found[2]
    )
}

pub(super) fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_one_line_each_whatever_the_path() {
        let mut r = CheckReport::default();
        r.add("a\nb\u{1b}[0m", "block-auth", "block 3 does not authenticate", Severity::Damage);
        let t = text(&r);
        assert!(t.starts_with("DAMAGE: a\\nb\\u{1b}[0m: block 3 does not authenticate (block-auth)\n"), "{t}");
        assert!(t.ends_with("1 object damaged, 0 warnings, 0 notes\n"), "{t}");
    }
}
