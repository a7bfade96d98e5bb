//! What shards leave in the store: in `.envelopefs/rotation/`, for each a journal and the sealed report of its last run.

use super::journal::{self, folder, last_noted, make_folder};
use super::record::Record;
use super::sealed::LONGEST;
use super::shard::Shard;
use crate::backing::{self, Backing};
use crate::store::walk::unless_gone;
use std::io;

const REPORT: &str = "report";

/// The shards that have left `what` in the folder of all rotations, in order.
fn left<B: Backing>(b: &B, folder: &B::Node, what: &str) -> io::Result<Vec<Shard>> {
    let mut shards: Vec<Shard> = b.read_dir(folder)?.iter().filter_map(|e| Shard::of_file(&e.name, what)).collect();
    shards.sort();
    Ok(shards)
}

/// Puts the report of `shard` in the place of its earlier one, durably.
///
/// # Errors
/// The backing directory's; the earlier report is as it was, unless the error came after the rename.
pub fn put_report<B: Backing>(b: &B, shard: Shard, file: &[u8]) -> io::Result<()> {
    let (temp, name) = (shard.file_name("new"), shard.file_name(REPORT));
    backing::replace_whole(b, &make_folder(b)?, temp.as_bytes(), name.as_bytes(), file)
}

/// All reports of shards that lie in the store, by the shard they go by. Nothing is known yet of whether they are genuine.
///
/// # Errors
/// The backing directory's.
pub fn reports<B: Backing>(b: &B) -> io::Result<Vec<(Shard, Vec<u8>)>> {
    let Some(folder) = folder(b)? else { return Ok(Vec::new()) };
    let read = |s: Shard| backing::read_whole(b, &folder, s.file_name(REPORT).as_bytes(), LONGEST);
    left(b, &folder, REPORT)?.into_iter().map(|s| Ok((s, read(s)?.unwrap_or_default()))).collect()
}

/// What the journals of shards say of their last runs, and when each was written, as [`last_noted`]. Journals that cannot
/// be made out are left out.
///
/// # Errors
/// The backing directory's.
pub fn noted<B: Backing>(b: &B) -> io::Result<Vec<(Shard, Record, i64)>> {
    let Some(folder) = folder(b)? else { return Ok(Vec::new()) };
    let mut out = Vec::new();
    for shard in left(b, &folder, journal::NAME)? {
        if let Some((record, noted)) = last_noted(b, Some(shard))? {
            out.push((shard, record, noted));
        }
    }
    Ok(out)
}

/// Takes away what runs have left to go on with or to be proved by: the journal, and the journals and reports of shards.
/// For another copy of the keyring: what was found out while this one was in force may not be so any more. What a run left
/// out ([`super::exceptions`]) stays, for people.
///
/// # Errors
/// The backing directory's.
pub fn forget<B: Backing>(b: &B) -> io::Result<()> {
    let Some(folder) = folder(b)? else { return Ok(()) };
    let mut names = vec![journal::file_name(None)];
    for what in [journal::NAME, REPORT] {
        names.extend(left(b, &folder, what)?.into_iter().map(|s| s.file_name(what).into_bytes()));
    }
    for name in names {
        unless_gone(b.unlink(&folder, &name))?;
    }
    b.sync_dir(&folder)
}

/// When `shard` last wrote its journal, in seconds since the epoch, if it ever did. A hint for people.
pub(super) fn last_heard<B: Backing>(b: &B, shard: Shard) -> Option<u64> {
    let node = b.lookup(&folder(b).ok()??, &journal::file_name(Some(shard))).ok()?;
    u64::try_from(b.stat(&node).ok()?.mtime.sec).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::sim::{PowerCut, SimDisk};
    use crate::format::names::STORE_DIR;
    use std::collections::BTreeSet;

    fn shard(k: u32, n: u32) -> Shard {
        Shard::new(k, n).unwrap()
    }

    fn disk() -> SimDisk {
        let d = SimDisk::default();
        d.mkdir(&d.root().unwrap(), STORE_DIR, 0o700, 0).unwrap();
        d.sync_all().unwrap();
        d
    }

    #[test]
    fn reports_come_back_by_their_shards() {
        let d = disk();
        assert_eq!(reports(&d).unwrap(), []);
        for (k, n, text) in [(2, 3, "b"), (1, 3, "old"), (1, 3, "a"), (1, 2, "c")] {
            put_report(&d, shard(k, n), text.as_bytes()).unwrap();
        }
        let folder = folder(&d).unwrap().unwrap();
        for other in ["journal", "shard-1-of-3.journal", "shard-4-of-3.report", "shard-1-of-3.new", "shard-.report"] {
            d.create(&folder, other.as_bytes(), 0o600, 0).unwrap();
        }
        let got = reports(&d).unwrap();
        assert_eq!(got, [(shard(1, 2), b"c".to_vec()), (shard(1, 3), b"a".to_vec()), (shard(2, 3), b"b".to_vec())]);
        assert_eq!(last_heard(&d, shard(2, 3)), None);
        assert!(last_heard(&d, shard(1, 3)).is_some());
    }

    #[test]
    fn runs_are_forgotten_but_not_what_they_left_out_and_not_who_holds_what() {
        let d = disk();
        forget(&d).unwrap();
        put_report(&d, shard(2, 3), b"b").unwrap();
        let folder = folder(&d).unwrap().unwrap();
        let kept = ["waived.json", "shards", "shard-4-of-3.report"];
        for name in ["journal", "shard-1-of-3.journal", "shard-2-of-3.journal"].iter().chain(&kept) {
            d.create(&folder, name.as_bytes(), 0o600, 0).unwrap();
        }
        d.sync_all().unwrap();
        forget(&d).unwrap();
        let d = d.crash_power(0, PowerCut::Lose);
        let left: BTreeSet<Vec<u8>> =
            d.read_dir(&super::folder(&d).unwrap().unwrap()).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(left, kept.map(|n| n.as_bytes().to_vec()).into());
    }

    #[test]
    fn the_power_can_go_at_every_operation_and_one_whole_report_is_there() {
        let base = disk();
        put_report(&base, shard(1, 2), b"the earlier one").unwrap();
        let length = {
            let d = base.crash_process();
            let before = d.operations();
            put_report(&d, shard(1, 2), b"the later one").unwrap();
            d.operations() - before
        };
        for n in 0..=length {
            for (seed, cut) in [(n, PowerCut::Lose), (n, PowerCut::Reorder { tear: true })] {
                let d = base.crash_process();
                d.stop_after(d.operations() + n);
                let said = put_report(&d, shard(1, 2), b"the later one");
                let d = d.crash_power(seed, cut);
                let got = reports(&d).unwrap();
                let whole = [b"the earlier one".to_vec(), b"the later one".to_vec()];
                assert!(got.len() == 1 && whole.contains(&got[0].1), "after {n}: {got:?}");
                if said.is_ok() {
                    assert_eq!(got[0].1, whole[1], "after {n}: what is done stays done");
                }
                put_report(&d, shard(1, 2), b"again").unwrap();
                assert_eq!(reports(&d).unwrap()[0].1, b"again");
            }
        }
    }
}
