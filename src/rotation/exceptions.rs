//! What the last complete run left out: its sealed report, kept in the store as `.envelopefs/rotation/waived.json`.
//!
//! There is one only if something was waived. It is there before the first KEK is marked as proved unused, and goes when
//! a later run proves everything. It is for people, who would else be told that nothing names the retired KEKs. Nothing
//! is decided by it: a KEK is destroyed after a scan only, whatever is written here.

use super::journal;
use super::report::Report;
use super::sealed::{LONGEST, SealedReport};
use crate::backing::{self, Backing};
use crate::store::walk::unless_gone;
use std::io;

/// Path in the backing directory.
pub const PATH: &str = ".envelopefs/rotation/waived.json";
const FILE: &[u8] = b"waived.json";
const TEMP: &[u8] = b"waived.new";

/// Puts `report` in the place of what is there, durably.
///
/// # Errors
/// The backing directory's. What was there is then as it was, unless the error came after the rename.
pub(super) fn keep<B: Backing>(b: &B, report: &SealedReport) -> io::Result<()> {
    backing::replace_whole(b, &journal::make_folder(b)?, TEMP, FILE, report.to_file().as_bytes())
}

/// Takes away what is there.
///
/// # Errors
/// The backing directory's.
pub(super) fn forget<B: Backing>(b: &B) -> io::Result<()> {
    let Some(folder) = journal::folder(b)? else { return Ok(()) };
    match unless_gone(b.unlink(&folder, FILE))? {
        Some(()) => b.sync_dir(&folder),
        None => Ok(()),
    }
}

/// The report; `None` if there is none, or nothing that looks like one. Its seal is not looked at, which takes a key: who
/// wants to know does so with `key verify-report`.
///
/// # Errors
/// The backing directory's.
pub fn read<B: Backing>(b: &B) -> io::Result<Option<Report>> {
    let Some(folder) = journal::folder(b)? else { return Ok(None) };
    let bytes = unless_gone(backing::read_whole(b, &folder, FILE, LONGEST))?.flatten();
    Ok(bytes.and_then(|b| SealedReport::from_file(&b)).map(|(report, _)| report))
}
