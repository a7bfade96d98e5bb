//! A report as evidence: a file that holds it and a seal under a key from the store secret.
//!
//! The file is a JSON object of this form to the byte, in which the report's text begins after `"report": ` and ends
//! before the next `,\n  "algorithm"`:
//!
//! ```text
//! {
//!   "report": { … },
//!   "algorithm": "HMAC-SHA-256",
//!   "mac": "64 hexadecimal digits"
//! }
//! ```
//!
//! The MAC is HMAC-SHA-256 of the SHA-256 of the report's text as it stands there, spaces and newlines included.

use super::report::Report;
use crate::crypto::kdf::{label, sha256};
use crate::crypto::seal::{Seal, SealKey, hash_from, hex};
use crate::crypto::secret::StoreSecret;
use serde::{Deserialize, Serialize};

/// Longest file in bytes that is read as a report. One that names as much as it may, all of it in characters that JSON
/// escapes, is shorter.
pub const LONGEST: usize = 128 << 20;

const OPENS: &str = "{\n  \"report\": ";
const MAC_OPENS: &str = ",\n  \"algorithm\": \"HMAC-SHA-256\",\n  \"mac\": \"";
const CLOSES: &str = "\"\n}\n";

/// The key of the seals of a store's reports.
pub fn seal_key(secret: &StoreSecret) -> SealKey {
    SealKey::new(secret, label::ROTATION_REPORT)
}

/// The text of a report, and its MAC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedReport {
    /// JSON, as it stands in a file.
    text: String,
    /// 64 lower-case hexadecimal digits.
    mac: String,
}

impl SealedReport {
    /// Seals `report`.
    pub fn new(report: &Report, key: &SealKey) -> Self {
        // Fails only for maps with keys that are not strings, which there are none of. No string in JSON has a newline of
        // its own, so this indents lines only.
        let text = serde_json::to_string_pretty(report).unwrap_or_default().replace('\n', "\n  ");
        let mac = hex(&key.seal(text.as_bytes()).mac);
        Self { text, mac }
    }

    /// The file.
    pub fn to_file(&self) -> String {
        [OPENS, &self.text, MAC_OPENS, &self.mac, CLOSES].concat()
    }

    /// Takes a file apart; `None` if it is not one that [`SealedReport::to_file`] could have made. Says nothing of whether
    /// the seal is genuine.
    pub fn from_file(file: &[u8]) -> Option<(Report, Seal)> {
        let rest = std::str::from_utf8(file).ok()?.strip_prefix(OPENS)?.strip_suffix(CLOSES)?;
        let (rest, mac) = rest.split_at_checked(rest.len().checked_sub(64)?)?;
        let (text, mac) = (rest.strip_suffix(MAC_OPENS)?, hash_from(mac)?);
        let report = serde_json::from_str(text).ok()?;
        Some((report, Seal { digest: sha256(text.as_bytes()), mac }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ids::{KekId, StoreId};
    use crate::rotation::failures::Failed;
    use crate::rotation::report::{FAILURES_MAX, Named};
    use crate::rotation::waive::BYTES_MAX;
    use crate::rotation::{Counts, Failure, Outcome};
    use proptest::prelude::*;

    fn report(failures: Vec<Failure>) -> Report {
        Report {
            outcome: if failures.is_empty() { Outcome::Complete } else { Outcome::Incomplete },
            store: StoreId([1; 16]),
            version: "0.1.0".into(),
            target: KekId([2; 16]),
            resumed: false,
            started: 1_790_000_000,
            finished: 1_790_000_002,
            passes: 2,
            sweep: Counts { scanned: 3, rewrapped: 3, ..Counts::default() },
            verify: Some(Counts { scanned: 3, current: 3, ..Counts::default() }),
            slots_by_kek: [(KekId([2; 16]), 6)].into(),
            headers_by_kek: [(KekId([2; 16]), 3)].into(),
            retired: vec![KekId([3; 16])],
            destroyed: Vec::new(),
            kept: Vec::new(),
            waived: Vec::new(),
            waivers_unused: Vec::new(),
            no_header: Vec::new(),
            failures_total: failures.len() as u64,
            failures,
            generation: 5,
            shares: Vec::new(),
        }
    }

    fn is_genuine(file: &[u8], key: &SealKey) -> bool {
        SealedReport::from_file(file).is_some_and(|(_, seal)| key.is_genuine(&seal))
    }

    fn key() -> SealKey {
        seal_key(&StoreSecret::random())
    }

    #[test]
    fn a_file_is_one_json_object_with_the_report_and_comes_back() {
        let (key, r) = (key(), report(Vec::new()));
        let file = SealedReport::new(&r, &key).to_file();
        let v: serde_json::Value = serde_json::from_str(&file).unwrap();
        assert_eq!(v.as_object().unwrap().len(), 3);
        assert_eq!(v["report"], serde_json::to_value(&r).unwrap());
        assert_eq!(v["algorithm"], "HMAC-SHA-256");
        let (read, seal) = SealedReport::from_file(file.as_bytes()).unwrap();
        assert!(key.is_genuine(&seal));
        assert_eq!(read, r);
    }

    #[test]
    fn no_other_store_seals_so() {
        let file = SealedReport::new(&report(Vec::new()), &key()).to_file();
        assert!(!is_genuine(file.as_bytes(), &key()));
    }

    #[test]
    fn every_flipped_bit_of_a_report_is_noticed() {
        let key = key();
        let file = SealedReport::new(&report(Vec::new()), &key).to_file().into_bytes();
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut bad = file.clone();
                bad[at] ^= 1 << bit;
                assert!(!is_genuine(&bad, &key), "byte {at}, bit {bit}");
            }
        }
        for at in 0..file.len() {
            assert!(!is_genuine(&file[..at], &key), "cut at {at}");
        }
    }

    /// A report with paths of backslashes was longer than what is read, and so was taken for one that was changed.
    #[test]
    fn the_longest_report_that_there_can_be_is_read_again() {
        let path = |n: usize| format!("{n:05}{}", "\\\\".repeat(4091));
        let mut failed = Failed::default();
        let failure = |n| Failure { path: path(n), code: "c".into(), message: "m".into(), directory: true };
        (0..FAILURES_MAX).for_each(|n| failed.add(failure(n)));
        assert_eq!(failed.total, FAILURES_MAX as u64);
        // Waived is no more than was on the list.
        let mut waived: Vec<Failure> = (0..BYTES_MAX / path(0).len()).map(failure).collect();
        waived.resize_with(FAILURES_MAX, || Failure { path: String::new(), message: "m".repeat(400), ..failure(0) });
        let mut no_header = Named::default();
        no_header.extend((0..FAILURES_MAX).map(path));
        let waivers_unused = waived.iter().map(|f| f.path.clone()).collect();
        let r = Report { waived, waivers_unused, no_header: no_header.to_vec(), ..report(failed.named.to_vec()) };
        let key = key();
        let sealed = SealedReport::new(&r, &key);
        let file = sealed.to_file();
        assert!(file.len() <= LONGEST, "{}", file.len());
        assert!(is_genuine(file.as_bytes(), &key));
        // The daemon sends it, and its text once more as JSON.
        let sent = file.len() + serde_json::to_string(&sealed).unwrap().len();
        assert!(sent < 2 * LONGEST - (1 << 20), "{sent}");
    }

    /// JSON allows what means the same to be written in many ways; the seal does not.
    #[test]
    fn the_same_report_written_otherwise_is_noticed() {
        let key = key();
        let file = SealedReport::new(&report(Vec::new()), &key).to_file();
        let (head, tail) = file.split_at(OPENS.len());
        for bad in [
            [head, " ", tail].concat(),
            [&file, "\n"].concat(),
            file.replacen("\"passes\": 2", "\"passes\":2", 1),
            file.replacen("\"passes\": 2", "\"passes\": 2, \"more\": 1", 1),
            file.replacen("complete", "\\u0063omplete", 1),
            [head, "{}, \"report\": ", tail].concat(),
        ] {
            assert_ne!(bad, file);
            assert!(!is_genuine(bad.as_bytes(), &key), "{bad}");
        }
        assert!(is_genuine(file.as_bytes(), &key));
    }

    proptest! {
        #[test]
        fn every_changed_byte_of_any_report_is_noticed(
            failed in proptest::collection::vec((any::<String>(), "[a-z-]{1,12}", any::<String>()), 0..4),
            at in any::<proptest::sample::Index>(),
            change in 1..=255u8,
        ) {
            let failure = |(path, code, message)| Failure { path, code, message, directory: false };
            let failures = failed.into_iter().map(failure).collect();
            let (key, r) = (key(), report(failures));
            let mut file = SealedReport::new(&r, &key).to_file().into_bytes();
            prop_assert_eq!(SealedReport::from_file(&file).map(|(r, _)| r), Some(r));
            prop_assert!(is_genuine(&file, &key));
            let at = at.index(file.len());
            file[at] ^= change;
            prop_assert!(!is_genuine(&file, &key));
        }
    }
}
