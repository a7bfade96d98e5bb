//! Sees that the files of a directory are being opened one after another, and which come next. Decides only.
//!
//! Two orders are known: that of names, in which a shell opens `*`, and that of a listing, in which `find` and `grep -r`
//! meet files. Two opens that needed a call, the second one of the next few files after the first in either order, begin
//! a run; its window then doubles with what is used of it, as a kernel's readahead does, and an open elsewhere ends it.

use crate::store::place::offset_of;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// How far ahead a run begins, and how far from the next file an open may be: others are left out now and then.
const FIRST: usize = 4;
const NEAR: usize = 4;

/// A directory's files in both orders, by their backing names.
pub(super) struct Listing {
    orders: [Vec<Arc<[u8]>>; 2],
    places: HashMap<Arc<[u8]>, [usize; 2]>,
}

impl Listing {
    /// Of files given by their names and backing names.
    pub(super) fn new(files: Vec<(Vec<u8>, Vec<u8>)>) -> Self {
        let mut files: Vec<(Vec<u8>, Arc<[u8]>)> = files.into_iter().map(|(n, b)| (n, b.into())).collect();
        let order = |f: &[(Vec<u8>, Arc<[u8]>)]| f.iter().map(|(_, b)| Arc::clone(b)).collect::<Vec<_>>();
        files.sort();
        let by_name = order(&files);
        files.sort_by_cached_key(|(name, _)| offset_of(name));
        let orders = [by_name, order(&files)];
        let mut places: HashMap<Arc<[u8]>, [usize; 2]> = HashMap::with_capacity(files.len());
        for (o, names) in orders.iter().enumerate() {
            for (at, name) in names.iter().enumerate() {
                if let Some(place) = places.entry(Arc::clone(name)).or_default().get_mut(o) {
                    *place = at;
                }
            }
        }
        Self { orders, places }
    }

    fn place(&self, order: usize, name: &[u8]) -> Option<usize> {
        self.places.get(name)?.get(order).copied()
    }
}

/// Files of a directory that are being opened in an order.
pub(super) struct Run {
    listing: Listing,
    order: usize,
    /// The file opened last, and the end of those that were given out.
    at: usize,
    upto: usize,
    window: usize,
    window_max: usize,
}

impl Run {
    /// The run that the opens of `first` and then `second` begin, if they do.
    pub(super) fn begin(listing: Listing, first: &[u8], second: &[u8], window_max: usize) -> Option<Self> {
        let at = |order| Some((order, listing.place(order, first)?, listing.place(order, second)?));
        let follows = |(_, a, b): &(usize, usize, usize)| (a + 1..=a + NEAR).contains(b);
        let (order, _, at) = [0, 1].into_iter().filter_map(at).find(follows)?;
        let window = FIRST.min(window_max);
        Some(Self { listing, order, at, upto: at + 1, window, window_max })
    }

    /// `name` was opened: the files to look after now. `None`: the run is over.
    pub(super) fn step(&mut self, name: &[u8]) -> Option<Vec<Arc<[u8]>>> {
        let at = self.listing.place(self.order, name)?;
        let files = self.listing.orders.get(self.order)?;
        if at < self.at || at > self.upto + NEAR {
            return None;
        }
        self.at = at;
        let next = self.upto.max(at + 1);
        if next - at > self.window / 2 + 1 {
            return Some(Vec::new());
        }
        let end = (at + 1 + self.window).min(files.len());
        self.window = (self.window * 2).min(self.window_max);
        self.upto = next.max(end);
        let range: Range<usize> = next..self.upto;
        Some(files.get(range).unwrap_or_default().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> Vec<u8> {
        format!("f{n:03}").into_bytes()
    }

    /// The backing name tells nothing of the order.
    fn backing(n: usize) -> Vec<u8> {
        format!("{:03}", (n * 37) % 200).into_bytes()
    }

    fn listing() -> Listing {
        Listing::new((0..200).map(|n| (name(n), backing(n))).collect())
    }

    fn begin(a: usize, b: usize) -> Option<Run> {
        Run::begin(listing(), &backing(a), &backing(b), 32)
    }

    #[test]
    fn each_file_is_given_out_once_before_it_is_opened() {
        let mut by_place: Vec<usize> = (0..200).collect();
        by_place.sort_by_key(|n| offset_of(&name(*n)));
        for order in [(0..200).collect::<Vec<_>>(), by_place] {
            let mut run = begin(order[0], order[1]).unwrap();
            let (mut given, mut most) = (Vec::new(), 0);
            for (i, n) in order.iter().enumerate().skip(1) {
                let next = run.step(&backing(*n)).unwrap();
                given.extend(next);
                most = most.max(given.len() - (i - 1));
                assert!(given.len() + 2 >= i, "{i}");
            }
            let want: Vec<Arc<[u8]>> = order[2..].iter().map(|n| backing(*n).into()).collect();
            assert!(given == want);
            assert!((17..=33).contains(&most), "{most}");
        }
    }

    #[test]
    fn opens_here_and_there_begin_none_and_end_one() {
        assert!(begin(5, 100).is_none() && begin(6, 5).is_none() && begin(5, 5).is_none());
        assert!(Run::begin(listing(), b"?", &backing(1), 32).is_none());
        let mut run = begin(5, 6).unwrap();
        assert!(run.step(&backing(6)).unwrap().len() == 4);
        assert!(run.step(&backing(8)).is_some(), "one was left out");
        assert!(run.step(&backing(199)).is_none());
        assert!(begin(5, 6).unwrap().step(&backing(4)).is_none(), "back");
        assert!(begin(5, 6).unwrap().step(b"?").is_none(), "not there when it was listed");
    }

    #[test]
    fn the_end_of_a_directory_is_the_end() {
        let mut run = begin(196, 197).unwrap();
        let next = run.step(&backing(197)).unwrap();
        assert_eq!(next.len(), 2);
        assert_eq!(run.step(&backing(198)).unwrap().len(), 0);
        assert_eq!(run.step(&backing(199)).unwrap().len(), 0);
    }
}
