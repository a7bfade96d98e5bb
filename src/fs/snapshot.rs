//! What a directory held when somebody began to read it, in an order that survives changes.
//!
//! The kernel reads a directory in pieces and names the place to go on from by a 63-bit number that it got with the last
//! entry. Here that number is a hash of the entry's name and the entries are sorted by it, so the number means the same
//! place in every later snapshot: an entry that is there all the time is reported exactly once however many others come
//! and go, `seekdir` to any number from `telldir` works for ever, and no state needs to hang on an open directory.
//! (ext4 does the same.)

use crate::store::Entry;
use crate::store::place::offset_of;
pub(super) use crate::store::place::{DOT, DOT_DOT};

/// The entries of a directory, sorted by offset.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// (offset, entry); offsets grow strictly and lie above [`DOT_DOT`].
    entries: Vec<(u64, Entry)>,
}

impl Snapshot {
    pub(super) fn new(entries: Vec<Entry>) -> Self {
        let mut entries: Vec<(u64, Entry)> = entries.into_iter().map(|e| (offset_of(&e.name), e)).collect();
        entries.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| x.name.cmp(&y.name)));
        // Two equal hashes, if that ever happens, are told apart by counting on.
        let mut last = DOT_DOT;
        for (offset, _) in &mut entries {
            *offset = (*offset).max(last + 1);
            last = *offset;
        }
        Self { entries }
    }

    /// The entries that come after `offset`, with the offset to go on from after each.
    pub(super) fn after(&self, offset: u64) -> &[(u64, Entry)] {
        let from = self.entries.partition_point(|(o, _)| *o <= offset);
        self.entries.get(from..).unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Kind;

    fn entry(name: &str) -> Entry {
        Entry { name: name.into(), ino: 7, kind: Kind::File, backing: name.into() }
    }

    fn snapshot(names: &[String]) -> Snapshot {
        Snapshot::new(names.iter().map(|n| entry(n)).collect())
    }

    #[test]
    fn reading_in_pieces_while_names_come_and_go_reports_the_others_once() {
        let stay: Vec<String> = (0..500).map(|i| format!("stays-{i}")).collect();
        let mut seen = Vec::new();
        let mut offset = DOT_DOT;
        for round in 0.. {
            // Every piece is read from another snapshot.
            let mut names = stay.clone();
            names.extend((0..200).map(|i| format!("round-{round}-{i}")));
            let s = snapshot(&names);
            let piece: Vec<_> = s.after(offset).iter().take(7).collect();
            let Some(last) = piece.last() else { break };
            offset = last.0;
            seen.extend(piece.iter().map(|(_, e)| String::from_utf8(e.name.to_vec()).unwrap()));
        }
        seen.retain(|n| n.starts_with("stays-"));
        seen.sort();
        let mut want = stay;
        want.sort();
        assert_eq!(seen, want);
    }

    #[test]
    fn an_offset_means_the_same_place_after_changes() {
        let names: Vec<String> = (0..50).map(|i| format!("n{i}")).collect();
        let s = snapshot(&names);
        let (offset, _) = s.after(DOT_DOT)[20];
        let rest: Vec<_> = s.after(offset).iter().map(|(_, e)| e.name.clone()).collect();
        let mut more = names;
        more.retain(|n| n != "n3");
        let again: Vec<_> = snapshot(&more).after(offset).iter().map(|(_, e)| e.name.clone()).collect();
        assert_eq!(again, rest.into_iter().filter(|n| &n[..] != b"n3").collect::<Vec<_>>());
    }

    #[test]
    fn offsets_fit_the_kernels_signed_number_and_leave_room_for_dots() {
        for i in 0..10_000 {
            let o = offset_of(format!("{i}").as_bytes());
            assert!(o > DOT_DOT && i64::try_from(o).is_ok());
        }
    }
}
