//! Errors of the backing directory in the middle of an operation: afterwards each block is as before or as after, what
//! comes next works, and so does opening the file again.

use super::*;
use crate::backing::sim::Op as Call;

/// What fails while one operation runs, and how.
#[derive(Debug, Clone)]
struct Fault {
    /// Any call that changes the disk, or one kind.
    call: Option<Call>,
    /// How many still succeed.
    after: u64,
    errno: i32,
    /// All that follow fail too, until the operation has returned.
    lasting: bool,
}

impl Fault {
    fn inject(&self, disk: &SimDisk) {
        if self.lasting {
            disk.fail_from(self.call, self.after, self.errno);
        } else {
            disk.fail_next(self.call, self.after, self.errno);
        }
    }
}

fn fault() -> impl Strategy<Value = Fault> {
    let call = prop_oneof![
        4 => Just(None),
        2 => Just(Some(Call::Write)),
        1 => Just(Some(Call::Truncate)),
        1 => Just(Some(Call::SyncFile)),
        1 => Just(Some(Call::SetTimes)),
        1 => Just(Some(Call::Allocate)),
        1 => Just(Some(Call::Read)),
        1 => Just(Some(Call::Stat)),
        1 => Just(Some(Call::Open)),
    ];
    (call, 0u64..8, prop_oneof![Just(libc::EIO), Just(libc::ENOSPC)], any::<bool>())
        .prop_map(|(call, after, errno, lasting)| Fault { call, after, errno, lasting })
}

/// Each block is the old or the new content, and the size lies between the two.
fn old_or_new(got: &[u8], old: &[u8], new: &[u8]) -> std::result::Result<(), TestCaseError> {
    let (lo, hi) = (old.len().min(new.len()), old.len().max(new.len()));
    prop_assert!(got.len() >= lo && got.len() <= hi, "size {} not in {lo}..={hi}", got.len());
    for (i, b) in got.chunks(PAGE as usize).enumerate() {
        let at = i * PAGE as usize;
        let is = |v: &[u8]| (0..b.len()).all(|k| b[k] == v.get(at + k).copied().unwrap_or(0));
        prop_assert!(is(old) || is(new), "block {i} is neither old nor new");
    }
    Ok(())
}

/// Runs `victim` under the fault; then `again` and a close without one. `reader` keeps the file open throughout.
fn survive(
    before: &[Op],
    victim: &Op,
    fault: &Fault,
    again: &[Op],
    (reader, killed): (bool, bool),
) -> std::result::Result<(), TestCaseError> {
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    let mut want = Vec::new();
    for o in before {
        rig.run(o).unwrap();
        model(&mut want, o);
    }
    let reader = reader.then(|| rig.core.open(Access::Read).unwrap());
    let mut new = want.clone();
    model(&mut new, victim);
    fault.inject(&disk);
    let result = rig.run(victim);
    disk.clear_faults();
    if rig.open.is_none() {
        rig.open = Some(rig.core.open(Access::ReadWrite).map_err(|e| TestCaseError::fail(format!("open: {e}")))?);
    }
    let got = read_all(rig.open()).map_err(|e| TestCaseError::fail(format!("read after {result:?}: {e}")))?;
    if result.is_ok() {
        prop_assert!(got == new, "acknowledged and not there");
    } else {
        old_or_new(&got, &want, &new)?;
    }
    want = got;
    for o in again {
        // A barrier that failed is told of by the next fsync, once.
        let mut r = rig.run(o);
        if r.is_err() && result.is_err() && matches!(o, Op::Sync) {
            r = rig.run(o);
        }
        r.map_err(|e| TestCaseError::fail(format!("{o:?} after {result:?}: {e}")))?;
        model(&mut want, o);
        let got = read_all(rig.open()).map_err(|e| TestCaseError::fail(format!("read after {o:?}: {e}")))?;
        prop_assert!(got == want, "content differs after {:?}", o);
    }
    let dead = disk.crash_process();
    drop((rig.open.take(), reader));
    rig.shared.settle.settle(Duration::ZERO);
    let disk = if killed { dead } else { disk };
    let got = content(&disk, false).map_err(|e| TestCaseError::fail(format!("opened anew: {e}")))?;
    prop_assert!(got == want, "content differs when opened anew: {} and {}", got.len(), want.len());
    Ok(())
}

/// A truncation that failed half-way left its mark in the state, and the last block sealed for a size the file never
/// got: closing the file then called that clean.
#[test]
fn a_failed_truncation_is_finished_or_undone() {
    for after in 0..8 {
        for lasting in [false, true] {
            let f = Fault { call: None, after, errno: libc::EIO, lasting };
            let before = [Op::Write { at: 0, len: 700_000, fill: 1 }, Op::Sync];
            let more = [Op::Write { at: 400_000, len: 300_000, fill: 2 }];
            for (again, killed) in [(&[][..], false), (&more[..], false), (&more[..], true)] {
                survive(&before, &Op::SetLen(5000), &f, again, (false, killed))
                    .unwrap_or_else(|e| panic!("{f:?} {again:?} {killed}: {e}"));
            }
        }
    }
}

/// CLEAN went to disk, then putting the times back failed: the flag was there and nobody knew, so that it stayed while
/// the next writer changed the size.
#[test]
fn a_clean_flag_that_came_with_an_error_is_cleared_before_the_next_change() {
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    rig.run(&Op::Write { at: 0, len: 5000, fill: 1 }).unwrap();
    let _reader = rig.core.open(Access::Read).unwrap();
    disk.fail_next(Some(Call::SetTimes), 0, libc::EIO);
    rig.run(&Op::Reopen { settle: false }).unwrap();
    rig.run(&Op::Write { at: 5000, len: 5000, fill: 2 }).unwrap();
    assert_eq!(content(&disk.crash_process(), false).unwrap().len(), 10_000);
}

/// fsync through one handle got the kernel's only report of lost pages; through another it then said that all was well,
/// and so did one after a settling whose barrier had failed.
#[test]
fn every_handle_is_told_of_a_failed_barrier() {
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    rig.run(&Op::Write { at: 0, len: 5000, fill: 1 }).unwrap();
    rig.run(&Op::Sync).unwrap();
    let other = rig.core.open(Access::ReadWrite).unwrap();
    disk.fail_next(Some(Call::SyncFile), 0, libc::EIO);
    rig.run(&Op::Sync).unwrap_err();
    rig.run(&Op::Sync).unwrap();
    other.sync().unwrap_err();
    other.sync().unwrap();
    rig.core.open(Access::ReadWrite).unwrap().sync().unwrap();
    drop(other);
    rig.run(&Op::Reopen { settle: false }).unwrap();
    assert!(!rig.core.is_clean().unwrap(), "a later barrier proves nothing");

    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    rig.run(&Op::Write { at: 0, len: 5000, fill: 1 }).unwrap();
    rig.run(&Op::Sync).unwrap();
    rig.run(&Op::Write { at: 5000, len: 5000, fill: 1 }).unwrap();
    rig.open = None;
    disk.fail_next(Some(Call::SyncFile), 0, libc::EIO);
    rig.shared.settle.settle(Duration::ZERO);
    let weak = Arc::downgrade(&rig.core);
    rig.core = try_core(&rig.shared).unwrap();
    let core = weak.upgrade().expect("kept until somebody was told");
    let open = core.open(Access::ReadWrite).unwrap();
    assert!(!core.is_clean().unwrap());
    open.sync().unwrap_err();
    open.sync().unwrap();
    drop((open, core));
    assert!(weak.upgrade().is_none());
}

/// Settling or punching a file of very many absent segments looked at each of them, for ages.
#[test]
fn what_is_absent_takes_no_time() {
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    let huge = 1u64 << 43;
    rig.run(&Op::SetLen(huge)).unwrap();
    rig.run(&Op::Write { at: huge - 5000, len: 5000, fill: 1 }).unwrap();
    drop(rig);
    let dead = disk.crash_process();
    let mut rig = Rig::new(&dead).unwrap();
    rig.run(&Op::Write { at: huge / 2, len: 5000, fill: 2 }).unwrap();
    rig.run(&Op::Reopen { settle: true }).unwrap();
    assert!(rig.core.is_clean().unwrap());
    rig.run(&Op::Allocate(FileAllocate::PunchHole, 10, huge - 2000)).unwrap();
    let mut got = [9; 2000];
    assert_eq!(rig.open().read(huge - 2000, &mut got).unwrap(), 2000);
    assert!(got[..10].iter().all(|b| *b == 0));
    assert_eq!(got[10..], pattern(1, huge - 5000, 5000)[3010..]);
    assert_eq!(rig.open().seek(PAGE, true).unwrap(), (huge - 2000) / PAGE * PAGE);
}

proptest! {
    #[test]
    fn an_error_in_the_middle_leaves_each_block_old_or_new(
        before in proptest::collection::vec(op(), 0..6), victim in op(), fault in fault(),
        again in proptest::collection::vec(op(), 0..4), reader in any::<bool>(), killed in any::<bool>(),
    ) {
        // A table of segments without a reader is left by a reopening in the middle; one core for an inode.
        let reopens = |o: &Op| matches!(o, Op::Reopen { settle: true });
        let reader = reader && !reopens(&victim) && !again.iter().any(reopens);
        survive(&before, &victim, &fault, &again, (reader, killed))?;
    }
}
