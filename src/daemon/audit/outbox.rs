//! Lines on their way to the file, and what remains of them when the disk takes a part, or nothing. Pure.

use super::chain::Chain;
use std::collections::VecDeque;

/// What a line stands for, or several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weight {
    /// Records.
    pub records: u64,
    /// Events among them: records that were not made by the log itself.
    pub events: u64,
    /// Events that the records say were lost.
    pub lost: u64,
}

impl Weight {
    /// An event.
    pub const EVENT: Self = Self { records: 1, events: 1, lost: 0 };
    /// A record about the log itself.
    pub const OWN: Self = Self { records: 1, events: 0, lost: 0 };
    /// A record that tells of so many lost events.
    pub fn gap(lost: u64) -> Self {
        Self { lost, ..Self::OWN }
    }
}

impl std::ops::AddAssign for Weight {
    fn add_assign(&mut self, o: Self) {
        self.records += o.records;
        self.events += o.events;
        self.lost += o.lost;
    }
}

/// A line, where it ends in the outbox, and the chain up to and with it.
#[derive(Debug, Clone, Copy)]
struct Entry {
    end: usize,
    chain: Chain,
    weight: Weight,
}

/// Lines that are to be written, in order.
#[derive(Debug)]
pub struct Outbox {
    bytes: Vec<u8>,
    entries: VecDeque<Entry>,
    written: usize,
    /// The chain up to and with the last line that was written.
    on_disk: Chain,
}

impl Outbox {
    /// An empty one for a file that ends with `on_disk`.
    pub fn new(on_disk: Chain) -> Self {
        Self { bytes: Vec::new(), entries: VecDeque::new(), written: 0, on_disk }
    }

    /// Puts in a line, to which a newline is added, that brings the chain to `chain`.
    pub fn push(&mut self, line: &[u8], chain: Chain, weight: Weight) {
        self.bytes.extend_from_slice(line);
        self.bytes.push(b'\n');
        self.entries.push_back(Entry { end: self.bytes.len(), chain, weight });
    }

    /// Puts in the newline that the file's last line lacks.
    pub fn end_line(&mut self) {
        self.bytes.push(b'\n');
        self.entries.push_back(Entry { end: self.bytes.len(), chain: self.chain(), weight: Weight::default() });
    }

    /// What is still to be written.
    pub fn rest(&self) -> &[u8] {
        self.bytes.get(self.written..).unwrap_or_default()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.rest().is_empty()
    }

    /// The chain once everything is written.
    pub fn chain(&self) -> Chain {
        self.entries.back().map_or(self.on_disk, |e| e.chain)
    }

    /// The chain as it is in the file.
    pub fn on_disk(&self) -> Chain {
        self.on_disk
    }

    /// The first `n` bytes of the rest were written. Returns what that completes.
    pub fn wrote(&mut self, n: usize) -> Weight {
        self.written = (self.written + n).min(self.bytes.len());
        let mut done = Weight::default();
        while let Some(e) = self.entries.front().filter(|e| e.end <= self.written).copied() {
            self.on_disk = e.chain;
            done += e.weight;
            self.entries.pop_front();
        }
        if self.entries.is_empty() {
            self.bytes.clear();
            self.written = 0;
        }
        done
    }

    /// Drops every line of which nothing was written yet; one that was begun stays, to be finished. Returns what
    /// was dropped.
    pub fn give_up(&mut self) -> Weight {
        let done = self.done_before();
        let begun = self.entries.front().is_some_and(|e| done < self.written && self.written < e.end);
        let keep = usize::from(begun);
        let mut dropped = Weight::default();
        self.entries.iter().skip(keep).for_each(|e| dropped += e.weight);
        self.entries.truncate(keep);
        let end = self.entries.front().map_or(self.written, |e| e.end);
        self.bytes.truncate(end);
        if self.entries.is_empty() {
            self.bytes.clear();
            self.written = 0;
        }
        dropped
    }

    /// Where the first line that is not written begins.
    fn done_before(&self) -> usize {
        let upto = self.bytes.get(..self.written).unwrap_or_default();
        upto.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(seq: u64) -> Chain {
        Chain { seq, head: [seq as u8; 32] }
    }

    fn three() -> Outbox {
        let mut o = Outbox::new(chain(0));
        o.push(b"aa", chain(1), Weight::EVENT);
        o.push(b"bb", chain(2), Weight::gap(5));
        o.push(b"cc", chain(3), Weight::EVENT);
        o
    }

    #[test]
    fn the_chain_follows_what_is_written() {
        let mut o = three();
        assert_eq!((o.chain(), o.on_disk()), (chain(3), chain(0)));
        assert_eq!((o.wrote(2), o.on_disk()), (Weight::default(), chain(0)), "the newline is part of the line");
        assert_eq!(
            (o.wrote(4), o.on_disk(), o.rest()),
            (Weight { records: 2, events: 1, lost: 5 }, chain(2), &b"cc\n"[..])
        );
        assert_eq!((o.wrote(3), o.on_disk(), o.is_empty()), (Weight::EVENT, chain(3), true));
        o.push(b"d", chain(4), Weight::OWN);
        assert_eq!(o.rest(), b"d\n");
    }

    /// Wherever the disk stops, giving up leaves whole lines in the file once the rest is written, and the chain ends with
    /// the last of them.
    #[test]
    fn giving_up_finishes_what_was_begun_and_drops_the_rest() {
        let all = b"aa\nbb\ncc\n";
        for n in 0..=all.len() {
            let mut o = three();
            o.wrote(n);
            let dropped = o.give_up();
            let mut file = all[..n].to_vec();
            file.extend_from_slice(o.rest());
            let whole = n.div_ceil(3);
            assert_eq!(file, all[..3 * whole], "{n}");
            assert_eq!(o.chain(), chain(whole as u64));
            assert_eq!((dropped.events, dropped.lost), [(2, 5), (1, 5), (1, 0), (0, 0)][whole]);
            o.wrote(o.rest().len());
            assert_eq!(o.on_disk(), chain(whole as u64));
            o.push(b"next", chain(9), Weight::EVENT);
            assert_eq!(o.rest(), b"next\n");
        }
    }

    #[test]
    fn a_newline_that_was_missing_changes_no_chain() {
        let mut o = Outbox::new(chain(4));
        o.end_line();
        o.push(b"x", chain(5), Weight::OWN);
        assert_eq!(o.rest(), b"\nx\n");
        o.wrote(1);
        assert_eq!(o.on_disk(), chain(4));
    }
}
