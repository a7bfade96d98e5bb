//! Reading logs for the check.

use super::chain::{Bad, Verifier};
use super::line::LINE_MAX;
use crate::daemon::fault::Fault;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Why a file does not pass.
#[derive(Debug)]
pub enum Refused {
    /// It cannot be read.
    Unreadable(Fault),
    /// It is not whole.
    Bad(Bad),
}

/// Checks the next file. `live`: it is being written, so that a last line without a newline is only not finished yet.
///
/// # Errors
/// See [`Refused`]. A bad line may be told only by the next file, or at the end.
pub fn file(v: &mut Verifier, path: &Path, live: bool) -> Result<(), Refused> {
    let fail = |e: std::io::Error| Refused::Unreadable(Fault::io("read", path, &e));
    let mut r = BufReader::with_capacity(256 << 10, File::open(path).map_err(fail)?);
    v.begin_file().map_err(Refused::Bad)?;
    let mut line = Vec::new();
    loop {
        line.clear();
        // One more than the longest line with its newline tells that it is longer.
        let n = (&mut r).take(LINE_MAX as u64 + 2).read_until(b'\n', &mut line).map_err(fail)?;
        if n == 0 {
            return v.end_of_file().map_err(Refused::Bad);
        }
        let whole = line.pop_if(|b| *b == b'\n').is_some();
        if !whole && live && line.len() <= LINE_MAX {
            return v.end_of_file().map_err(Refused::Bad);
        }
        if line.len() > LINE_MAX {
            return Err(Refused::Bad(v.too_long()));
        }
        v.line(&line, whole).map_err(Refused::Bad)?;
    }
}
