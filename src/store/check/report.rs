//! What a check says.

use serde::{Deserialize, Serialize};

/// What to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckOptions {
    /// Read and authenticate every block. Needs keys.
    pub deep: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Left over from a crash or one copy of two; nothing is lost, nothing needs doing.
    Note,
    /// Still readable, but less safe than it should be: the second copy is bad, or something needs a decision.
    Warning,
    /// Content, a name or a key cannot be read or is not authentic.
    Damage,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Path in the backing directory, with bytes that are not UTF-8 replaced.
    pub path: String,
    /// Stable code.
    pub code: String,
    /// In words.
    pub message: String,
    /// How bad.
    pub severity: Severity,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CheckCounts {
    pub directories: u64,
    pub files: u64,
    pub empty_files: u64,
    pub symlinks: u64,
    /// FIFOs, sockets and devices: they hold no data.
    pub special: u64,
    pub xattrs: u64,
    /// Blocks authenticated (deep only).
    pub blocks: u64,
    /// Bytes of ciphertext in regular files.
    pub bytes: u64,
}

/// Most findings a report names; it counts all of them.
pub const FINDINGS_MAX: usize = 10_000;

/// The account of a check.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CheckReport {
    /// Keys were given.
    pub with_keys: bool,
    /// Every block was read.
    pub deep: bool,
    pub counts: CheckCounts,
    /// At most [`FINDINGS_MAX`] of them.
    pub findings: Vec<Finding>,
    pub notes: u64,
    pub warnings: u64,
    pub damage: u64,
}

impl CheckReport {
    /// Whether nothing was found that is damaged. Exit code 0, else the one for damage.
    pub fn is_clean(&self) -> bool {
        self.damage == 0
    }

    /// Adds a finding.
    pub fn add(&mut self, path: impl Into<String>, code: &str, message: impl Into<String>, severity: Severity) {
        match severity {
            Severity::Note => self.notes += 1,
            Severity::Warning => self.warnings += 1,
            Severity::Damage => self.damage += 1,
        }
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { path: path.into(), code: code.into(), message: message.into(), severity });
        }
    }
}

/// Who wants to know how a check gets on.
pub trait CheckProgress {
    /// Called every few files and every few megabytes.
    fn update(&self, counts: &CheckCounts);
}

/// Nobody.
impl CheckProgress for () {
    fn update(&self, _: &CheckCounts) {}
}
