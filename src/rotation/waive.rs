//! Files that may fail: the list of `rotate --waive`.
//!
//! A waiver excuses what is at one path, as reports name it (`failures[].path`), and nothing else: there are no
//! patterns, and a directory's waiver says nothing of what is in it. It is no skip: what can be moved is moved as ever.

use super::pass::{MOVED, OPENED};
use super::path;
use super::report::FAILURES_MAX;
use std::collections::BTreeSet;

/// Most bytes of all paths together, so that a list fits into a request to the daemon.
pub const BYTES_MAX: usize = 4 << 20;

/// The list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waivers {
    paths: BTreeSet<String>,
}

/// A list that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadWaiver {
    /// A line, counted from 1.
    #[error("line {line}: {why}")]
    Line {
        /// Which.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    #[error("more than {FAILURES_MAX} paths, or than {BYTES_MAX} bytes: with so many files failing, see to the cause")]
    TooMany,
}

impl Waivers {
    /// Reads a list: one path a line, as reports name it, or with bytes as they are that a report escapes, but for the
    /// backslash. Empty lines and those that begin with `#` say nothing; a path that begins so is written `\x23…`.
    ///
    /// # Errors
    /// [`BadWaiver`]: the first line that can name no failure, or too many of them.
    pub fn parse(text: &[u8]) -> Result<Self, BadWaiver> {
        let lines = text.split(|b| *b == b'\n').map(|l| l.strip_suffix(b"\r").unwrap_or(l));
        let said = lines.enumerate().filter(|(_, l)| !l.is_empty() && !l.starts_with(b"#"));
        Self::collect(said.map(|(at, l)| (at + 1, l)))
    }

    /// The list of these paths, each as [`Waivers::paths`] gave it.
    ///
    /// # Errors
    /// As [`Waivers::parse`]; paths count as lines.
    pub fn new<'a>(paths: impl IntoIterator<Item = &'a str>) -> Result<Self, BadWaiver> {
        Self::collect(paths.into_iter().enumerate().map(|(at, p)| (at + 1, p.as_bytes())))
    }

    fn collect<'a>(lines: impl Iterator<Item = (usize, &'a [u8])>) -> Result<Self, BadWaiver> {
        let (mut paths, mut bytes) = (BTreeSet::new(), 0);
        for (line, text) in lines {
            let path = canonical(text).map_err(|why| BadWaiver::Line { line, why })?;
            bytes += path.len();
            paths.insert(path);
            if paths.len() > FAILURES_MAX || bytes > BYTES_MAX {
                return Err(BadWaiver::TooMany);
            }
        }
        Ok(Self { paths })
    }

    /// Whether a failure at `path`, as a report names it, is waived.
    pub fn covers(&self, path: &str) -> bool {
        self.paths.contains(path)
    }

    /// All of them, as reports name paths, in order.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.paths.iter().map(String::as_str)
    }

    /// Whether nothing is waived.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }
}

/// The path in `text` as a report would name it.
fn canonical(text: &[u8]) -> Result<String, &'static str> {
    let path = path::bytes(text).ok_or("a backslash is written \\\\, and a byte may be written \\xHH")?;
    if path.split(|b| *b == b'/').any(|name| matches!(name, b"" | b"." | b"..")) {
        return Err("not a path as reports name it: below the backing directory, without / at its beginning or end");
    }
    let first = path.split(|b| *b == b'/').next().unwrap_or_default();
    if first == "…".as_bytes() {
        return Err("of so long a path only the end is known, so that others may end in the same way");
    }
    if first == MOVED || first == OPENED {
        return Err("this stands for whatever was moved during the run; run rotate again to learn its path");
    }
    Ok(path::shown(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_a_path_on_each_line() {
        let w = Waivers::parse(b"# broken since May\nb/c\r\n\na\n b \nb/c\n\\x23x\n\xff\\\\\n*").unwrap();
        assert_eq!(w.paths().collect::<Vec<_>>(), [" b ", "#x", "*", "\\xff\\\\", "a", "b/c"]);
        assert!(w.covers("a") && w.covers("b/c"));
        assert!(!w.covers("b") && !w.covers("a/x") && !w.covers("anything"), "neither a prefix nor a pattern");
        assert_eq!(Waivers::new(w.paths()), Ok(w));
        assert!(Waivers::parse(b"\n#\n").unwrap().is_empty());
    }

    #[test]
    fn what_can_name_no_failure_is_refused() {
        for bad in [
            "/",
            "/a",
            "a/",
            "a//b",
            "./a",
            "a/..",
            "a\\n",
            "…/a",
            "(moved during the run)/a",
            "(moved during the run)",
        ] {
            let list = format!("a\n{bad}\n");
            assert!(matches!(Waivers::parse(list.as_bytes()), Err(BadWaiver::Line { line: 2, .. })), "{bad}");
        }
        let many: String = (0..=FAILURES_MAX).map(|n| format!("{n}\n")).collect();
        assert_eq!(Waivers::parse(many.as_bytes()), Err(BadWaiver::TooMany));
        let long: String = (0..3).map(|n| format!("{n}{}\n", "x".repeat(BYTES_MAX / 2))).collect();
        assert_eq!(Waivers::parse(long.as_bytes()), Err(BadWaiver::TooMany));
    }
}
