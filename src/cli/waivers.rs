//! `rotate --waive FILE`: reading the list, and telling what came of it.

use super::check::count;
use crate::daemon::fault::{Fault, FaultKind};
use crate::rotation::waive::BYTES_MAX;
use crate::rotation::{Report, Waivers};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Most bytes of a list: with comments and escapes it may be longer than the paths are.
const FILE_MAX: usize = 4 * BYTES_MAX;

/// The list in `path`; empty if there is none.
///
/// # Errors
/// [`FaultKind::Usage`] if a line can name no failure, or there are too many, or it is too long; the kernel's.
pub fn read(path: Option<&Path>) -> Result<Waivers, Fault> {
    let Some(path) = path else { return Ok(Waivers::default()) };
    let fail = |e: std::io::Error| Fault::io("read", path, &e);
    let mut text = Vec::new();
    File::open(path).map_err(fail)?.take(FILE_MAX as u64 + 1).read_to_end(&mut text).map_err(fail)?;
    if text.len() > FILE_MAX {
        let text = format!("waivers {}: longer than {FILE_MAX} bytes", path.display());
        return Err(Fault::new(FaultKind::Usage, text));
    }
    Waivers::parse(&text).map_err(|e| Fault::new(FaultKind::Usage, format!("waivers {}: {e}", path.display())))
}

/// Says on standard error what the operator may not expect: waivers that were of no use, files that have no header, KEKs
/// that were not destroyed.
pub fn tell(r: &Report) {
    for path in &r.waivers_unused {
        eprintln!("envelopefs: waiver not needed: nothing failed at {path}; take it off the list");
    }
    let lost = r.verify.map_or(0, |v| v.no_header);
    if lost > 0 {
        eprintln!(
            "envelopefs: {} with content and no header, which opens for nobody: not synced before a power cut, or lost by \
             the disk; put it back from a backup, or remove it",
            count(lost, "file")
        );
    }
    let needs_it =
        if lost > 0 { "a backup of what has no header may need it" } else { "what is waived needs it, or may" };
    for kek in &r.kept {
        eprintln!("envelopefs: KEK {kek} was not destroyed: {needs_it}; mend or remove that, and rotate again");
    }
}
