//! Tests of files over a simulated disk: against a model, with the daemon killed after every single backing
//! operation, and with the power cut.

mod faults;

use super::*;
use crate::backing::sim::{Moment, Op as SimOp, PowerCut, SimDisk, SimOptions};
use crate::crypto::random;
use crate::crypto::secret::Secret32;
use crate::format::geometry::{self, PAGE};
use crate::kms::{Capabilities, Description, KeyProvider, KmsError, WrapContext};
use crate::store::dek_cache::{DekCache, DekCacheLimits};
use crate::store::keys::{KekKind, Keys, StoreFlags};
use proptest::prelude::*;
use std::time::Duration;

/// A root key that lives in the test.
struct FixedKey(Secret32);

impl KeyProvider for FixedKey {
    fn describe(&self) -> std::result::Result<Description, KmsError> {
        Ok(Description { uri: "keyfile:/test".into(), key_id: "test".into(), capabilities: Capabilities::default() })
    }

    fn wrap(&self, key: &Secret32, context: &WrapContext) -> std::result::Result<Vec<u8>, KmsError> {
        Ok(crate::crypto::aead::GcmSiv::wrap(&self.0, &context.to_aad(), key).to_vec())
    }

    fn unwrap(&self, wrapped: &[u8], context: &WrapContext) -> std::result::Result<Secret32, KmsError> {
        crate::crypto::aead::GcmSiv::unwrap(&self.0, &context.to_aad(), wrapped)
            .map_err(|_| KmsError::BadCiphertext("test".into()))
    }
}

fn root_key() -> Vec<Arc<dyn KeyProvider>> {
    vec![Arc::new(FixedKey(Secret32::build(|b| b.fill(9))))]
}

/// A disk that holds a store with one empty file `f`, everything durable.
fn new_disk() -> SimDisk {
    let disk = SimDisk::new(SimOptions { split_last_write: true, ..SimOptions::default() });
    Keys::create(&disk, &root_key(), KekKind::Sealed, StoreFlags::default()).unwrap();
    let root = disk.root().unwrap();
    disk.create(&root, b"f", 0o600, 0).unwrap();
    disk.sync_all().unwrap();
    disk
}

fn open_shared(disk: &SimDisk, read_only: bool) -> Arc<Shared<SimDisk>> {
    let keys = Keys::open(disk, &root_key()).unwrap();
    Arc::new(Shared::new(disk.clone(), keys, DekCache::new(DekCacheLimits::default()), read_only))
}

fn core_of(shared: &Arc<Shared<SimDisk>>) -> Arc<FileCore<SimDisk>> {
    try_core(shared).unwrap()
}

fn try_core(shared: &Arc<Shared<SimDisk>>) -> Result<Arc<FileCore<SimDisk>>> {
    let root = shared.backing.root()?;
    let node = shared.backing.lookup(&root, b"f")?;
    Ok(FileCore::new(shared, Arc::new(node)))
}

fn content(disk: &SimDisk, read_only: bool) -> Result<Vec<u8>> {
    let shared = open_shared(disk, read_only);
    let open = core_of(&shared).open(Access::Read)?;
    read_all(&open)
}

fn read_all(open: &OpenFile<SimDisk>) -> Result<Vec<u8>> {
    let mut v = vec![0xee; open.len() as usize];
    let n = open.read(0, &mut v)?;
    assert_eq!(n, v.len());
    Ok(v)
}

#[derive(Debug, Clone)]
enum Op {
    Write {
        at: u64,
        len: usize,
        fill: u8,
    },
    SetLen(u64),
    Allocate(FileAllocate, u64, u64),
    Sync,
    /// Close, let the file settle, open again.
    Reopen {
        settle: bool,
    },
}

/// Bytes that differ from block to block and from write to write.
fn pattern(fill: u8, at: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| fill ^ ((at + i) / 7) as u8 ^ ((at + i) >> 12) as u8).collect()
}

fn model(v: &mut Vec<u8>, op: &Op) {
    let grow = |v: &mut Vec<u8>, to: u64| {
        if (v.len() as u64) < to {
            v.resize(to as usize, 0);
        }
    };
    match *op {
        Op::Write { at, len, fill } => {
            grow(v, at + len as u64);
            v[at as usize..at as usize + len].copy_from_slice(&pattern(fill, at, len));
        }
        Op::SetLen(n) => v.resize(n as usize, 0),
        Op::Allocate(mode, off, len) => {
            match mode {
                FileAllocate::Default | FileAllocate::ZeroRange { keep_size: false } => grow(v, off + len),
                _ => {}
            }
            if matches!(mode, FileAllocate::PunchHole | FileAllocate::ZeroRange { .. }) {
                let end = ((off + len) as usize).min(v.len());
                let off = (off as usize).min(end);
                v[off..end].fill(0);
            }
        }
        Op::Sync | Op::Reopen { .. } => {}
    }
}

struct Rig {
    shared: Arc<Shared<SimDisk>>,
    core: Arc<FileCore<SimDisk>>,
    open: Option<OpenFile<SimDisk>>,
}

impl Rig {
    fn new(disk: &SimDisk) -> Result<Self> {
        let shared = open_shared(disk, false);
        let core = core_of(&shared);
        let open = Some(core.open(Access::ReadWrite)?);
        Ok(Self { shared, core, open })
    }

    fn open(&self) -> &OpenFile<SimDisk> {
        self.open.as_ref().unwrap()
    }

    fn run(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Write { at, len, fill } => self.open().write(*at, &pattern(*fill, *at, *len)).map(|_| ()),
            Op::SetLen(n) => self.open().set_len(*n),
            Op::Allocate(mode, off, len) => self.open().allocate(*mode, *off, *len),
            Op::Sync => self.open().sync(),
            Op::Reopen { settle } => {
                self.open = None;
                if *settle {
                    self.shared.settle.settle(Duration::ZERO);
                    self.core = try_core(&self.shared)?;
                }
                self.open = Some(self.core.open(Access::ReadWrite)?);
                Ok(())
            }
        }
    }
}

/// Offsets near what the format makes edges of: blocks, the first segments.
fn offset() -> impl Strategy<Value = u64> {
    let edge = prop_oneof![
        Just(0u64),
        Just(4096),
        Just(8192),
        Just(131_072),
        Just(131_072 + 4096),
        Just(131_072 + 524_288),
        Just(300_000)
    ];
    prop_oneof![
        3 => (edge, -100i64..100).prop_map(|(e, d)| e.saturating_add_signed(d)),
        2 => 0u64..20_000,
        1 => 0u64..1_300_000,
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let len = prop_oneof![4 => 1usize..300, 3 => 1usize..20_000, 1 => 100_000usize..200_000, 1 => Just(4096usize)];
    let mode = prop_oneof![
        Just(FileAllocate::Default),
        Just(FileAllocate::KeepSize),
        Just(FileAllocate::PunchHole),
        any::<bool>().prop_map(|keep_size| FileAllocate::ZeroRange { keep_size })
    ];
    prop_oneof![
        8 => (offset(), len.clone(), any::<u8>()).prop_map(|(at, len, fill)| Op::Write { at, len, fill }),
        3 => offset().prop_map(Op::SetLen),
        2 => (mode, offset(), len).prop_map(|(m, o, l)| Op::Allocate(m, o, l as u64)),
        1 => Just(Op::Sync),
        2 => any::<bool>().prop_map(|settle| Op::Reopen { settle }),
    ]
}

proptest! {

    #[test]
    fn a_file_is_its_model(ops in proptest::collection::vec(op(), 1..40)) {
        let disk = new_disk();
        let mut rig = Rig::new(&disk).unwrap();
        let mut want = Vec::new();
        for o in &ops {
            rig.run(o).unwrap();
            model(&mut want, o);
            prop_assert_eq!(rig.open().len(), want.len() as u64, "{:?}", o);
            prop_assert!(read_all(rig.open()).unwrap() == want, "content differs after {:?}", o);
        }
        drop(rig.open.take());
        rig.shared.settle.settle(Duration::ZERO);
        prop_assert!(content(&disk, false).unwrap() == want);
        let root = disk.root().unwrap();
        let size = disk.stat_at(&root, b"f").unwrap().size;
        prop_assert_eq!(size, geometry::backing_size(want.len() as u64), "size after a clean close");
    }

    #[test]
    fn a_killed_daemon_leaves_each_block_old_or_new(
        before in proptest::collection::vec(op(), 0..6), victim in op(), again in op(), stop in 0.0f64..1.0, stop2 in 0.0f64..1.0,
    ) {
        let disk = new_disk();
        let mut old = Vec::new();
        {
            let mut rig = Rig::new(&disk).unwrap();
            for o in &before {
                rig.run(o).unwrap();
                model(&mut old, o);
            }
            kill_during(&disk, rig, &old, &victim, &again, stop, stop2)?;
        }
    }
}

/// Runs `victim` and stops the disk at a fraction of its operations; looks; then does the same to the survivor.
fn kill_during(
    disk: &SimDisk,
    mut rig: Rig,
    old: &[u8],
    victim: &Op,
    again: &Op,
    stop: f64,
    stop2: f64,
) -> std::result::Result<(), TestCaseError> {
    let cost = {
        // A rehearsal on a copy tells how many operations there are to stop at.
        let copy = disk.crash_process();
        let at = copy.operations();
        if let Ok(mut r) = Rig::new(&copy) {
            let _ = r.run(victim);
        }
        copy.operations() - at
    };
    disk.stop_after(disk.operations() + ((cost + 2) as f64 * stop) as u64);
    let _ = rig.run(victim);
    drop(rig);
    let mut new = old.to_vec();
    model(&mut new, victim);
    let dead = disk.crash_process();
    let seen = check_blocks(&dead, old, &new)?;
    // A second death while the first one's remains are being written over.
    let Ok(mut rig) = Rig::new(&dead) else { return Err(TestCaseError::fail("does not open for writing")) };
    prop_assert!(read_all(rig.open()).unwrap() == seen, "opening for writing changed what is read");
    dead.stop_after(dead.operations() + (12.0 * stop2) as u64);
    let _ = rig.run(again);
    drop(rig);
    let mut newer = seen.clone();
    model(&mut newer, again);
    let dead = dead.crash_process();
    let seen = check_blocks(&dead, &seen, &newer)?;
    // And a clean close makes it whole.
    let rig = Rig::new(&dead).unwrap();
    let shared = Arc::clone(&rig.shared);
    drop(rig);
    shared.settle.settle(Duration::ZERO);
    prop_assert!(content(&dead, false).unwrap() == seen);
    Ok(())
}

/// Reads the file: its size lies between the two, and each block is the old or the new content.
fn check_blocks(disk: &SimDisk, old: &[u8], new: &[u8]) -> std::result::Result<Vec<u8>, TestCaseError> {
    // A copy, read-only first: recovery must also work where nothing may be written.
    let ro = content(&disk.crash_process(), true)
        .map_err(|e| TestCaseError::fail(format!("read-only after the kill: {e}")))?;
    let got = content(&disk.crash_process(), false).map_err(|e| TestCaseError::fail(format!("after the kill: {e}")))?;
    prop_assert!(ro == got, "read-only and read-write recovery disagree: {} {}", ro.len(), got.len());
    let (lo, hi) = (old.len().min(new.len()), old.len().max(new.len()));
    prop_assert!(got.len() >= lo && got.len() <= hi, "size {} not in {lo}..={hi}", got.len());
    let part = |v: &[u8], at: usize, n: usize| {
        let mut p = v.get(at..(at + n).min(v.len())).unwrap_or_default().to_vec();
        p.resize(n, 0);
        p
    };
    for (i, b) in got.chunks(PAGE as usize).enumerate() {
        let at = i * PAGE as usize;
        let ok = b == part(old, at, b.len()) || b == part(new, at, b.len());
        prop_assert!(ok, "block {i} is neither old nor new");
    }
    Ok(got)
}

#[test]
fn every_stop_of_every_shape_of_change() {
    let write = |at, len| Op::Write { at, len, fill: 0x55 };
    let shapes: Vec<(Vec<Op>, Op)> = vec![
        (vec![], write(0, 10)),
        (vec![write(0, 10)], write(5, 10)),
        (vec![write(0, 5000)], write(4000, 200)),
        (vec![write(0, 5000), Op::Sync], write(5000, 300_000)),
        (vec![write(0, 5000), Op::Reopen { settle: true }], write(700_000, 10)),
        (vec![write(0, 700_000), Op::Reopen { settle: true }], Op::SetLen(100)),
        (vec![write(0, 700_000), Op::Reopen { settle: true }], Op::SetLen(131_072)),
        (vec![write(0, 700_000), Op::Sync], Op::SetLen(131_073)),
        (vec![write(0, 700_000)], Op::SetLen(0)),
        (vec![write(0, 5000)], Op::SetLen(900_000)),
        (vec![write(0, 200_000), Op::Reopen { settle: true }], Op::Allocate(FileAllocate::PunchHole, 3000, 150_000)),
        (vec![write(0, 200_000)], Op::Allocate(FileAllocate::ZeroRange { keep_size: false }, 190_000, 50_000)),
        (vec![write(0, 200_000)], Op::Reopen { settle: true }),
        (vec![write(0, 200_000), Op::Sync, write(0, 10)], Op::Sync),
    ];
    for (before, victim) in &shapes {
        for stop in 0..40u64 {
            let disk = new_disk();
            let mut rig = Rig::new(&disk).unwrap();
            let mut old = Vec::new();
            for o in before {
                rig.run(o).unwrap();
                model(&mut old, o);
            }
            let mut new = old.clone();
            model(&mut new, victim);
            disk.stop_after(disk.operations() + stop);
            let done = rig.run(victim).is_ok();
            drop(rig);
            check_blocks(&disk.crash_process(), &old, &new).unwrap_or_else(|e| panic!("{victim:?} stop {stop}: {e}"));
            if done {
                break;
            }
        }
    }
}

#[test]
fn what_was_synced_and_not_touched_since_survives_a_power_cut() {
    for seed in 0..300u64 {
        let disk = new_disk();
        let mut rig = Rig::new(&disk).unwrap();
        let size = [3000u64, 150_000, 700_000][seed as usize % 3];
        let mut want = Vec::new();
        let first = Op::Write { at: 0, len: size as usize, fill: 1 };
        rig.run(&first).unwrap();
        model(&mut want, &first);
        if seed % 2 == 0 {
            rig.run(&Op::Sync).unwrap();
        } else {
            // Settling is a promise too once it is durable; here the next session syncs it.
            rig.run(&Op::Reopen { settle: true }).unwrap();
            rig.run(&Op::Sync).unwrap();
        }
        // Unsynced: growth, and overwrites of the first block only.
        let tail_block = size / PAGE;
        for (i, o) in [
            Op::Write { at: (tail_block + 1) * PAGE + 5, len: 200_000, fill: 2 },
            Op::Write { at: 0, len: 100, fill: 3 },
            Op::SetLen((tail_block + 2) * PAGE),
            Op::Write { at: 50, len: 100, fill: 4 },
        ]
        .iter()
        .enumerate()
        {
            if seed >> (i + 1) & 1 == 1 {
                rig.run(o).unwrap();
            }
        }
        let cut =
            disk.crash_power(seed, if seed % 5 == 0 { PowerCut::Lose } else { PowerCut::Reorder { tear: false } });
        drop(rig);
        let shared = open_shared(&cut, false);
        let open = core_of(&shared).open(Access::Read).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(open.len() >= size.min((tail_block + 1) * PAGE), "seed {seed}: size {}", open.len());
        for block in 1..tail_block {
            let mut got = [0u8; 4096];
            open.read(block * PAGE, &mut got).unwrap_or_else(|e| panic!("seed {seed} block {block}: {e}"));
            assert!(got[..] == want[(block * PAGE) as usize..][..4096], "seed {seed} block {block}");
        }
    }
}

/// With one write between one fsync and the next, a copy of the state is always whole, whatever the drive does to a page.
#[test]
fn what_was_synced_survives_a_torn_page_if_one_write_or_a_close_came_since() {
    for seed in 0..24u64 {
        let disk = new_disk();
        let mut rig = Rig::new(&disk).unwrap();
        let mut want = Vec::new();
        for block in 0..seed % 6 + 1 {
            let append = Op::Write { at: block * PAGE, len: PAGE as usize, fill: block as u8 };
            rig.run(&append).unwrap();
            model(&mut want, &append);
            rig.run(&Op::Sync).unwrap();
        }
        let synced = want.len();
        let since = match seed % 4 {
            0 => Op::Reopen { settle: false },
            1 => Op::Write { at: synced as u64, len: 4096, fill: 200 },
            2 => Op::Write { at: synced as u64 + 3 * PAGE, len: 10, fill: 200 },
            _ => Op::Sync,
        };
        rig.run(&since).unwrap();
        for cut in 0..200 {
            let cut = disk.crash_power(cut, PowerCut::Reorder { tear: true });
            let mut got = vec![0; synced];
            let read = core_of(&open_shared(&cut, false)).open(Access::Read).and_then(|f| f.read(0, &mut got));
            assert!(read.is_ok() && got == want, "seed {seed} {since:?}: {read:?}");
        }
    }
}

/// After several writes since the last fsync a power cut may tear both copies of the state, or leave one from before that
/// fsync beside a torn one. What was acknowledged is then an error; as an older state's hole it was zeros.
#[test]
fn what_was_synced_never_reads_as_zeros_after_a_torn_page() {
    let (mut damaged, mut whole) = (0, 0);
    for seed in 0..40u64 {
        let disk = new_disk();
        let mut rig = Rig::new(&disk).unwrap();
        let synced = seed % 3 + 1;
        let first = Op::Write { at: 0, len: (synced * PAGE) as usize, fill: 1 };
        let mut want = Vec::new();
        model(&mut want, &first);
        rig.run(&first).unwrap();
        rig.run(&Op::Sync).unwrap();
        for n in 0..2 + seed % 4 {
            rig.run(&Op::Write { at: (synced + n) * PAGE, len: 4096, fill: 9 }).unwrap();
        }
        for cut in 0..100 {
            let cut = disk.crash_power(1000 * seed + cut, PowerCut::Reorder { tear: true });
            let Ok(open) = core_of(&open_shared(&cut, seed % 2 == 0)).open(Access::Read) else { continue };
            for block in 0..synced {
                let (mut got, at) = ([0u8; 4096], (block * PAGE) as usize);
                match open.read(at as u64, &mut got) {
                    Ok(_) => assert!(got[..] == want[at..at + 4096], "seed {seed} block {block}: other bytes"),
                    Err(e) => assert_eq!(e.code(), "block-auth", "seed {seed} block {block}"),
                }
                let seen = if got[..] == want[at..at + 4096] { &mut whole } else { &mut damaged };
                *seen += 1;
            }
        }
    }
    assert!(damaged > 0 && whole > 0, "{damaged}, {whole}");
}

/// The same where a shrink is to be finished, onto a block that is lost, or before one.
#[test]
fn a_hole_that_a_lost_copy_leaves_open_is_damage_also_while_a_shrink_is_finished() {
    let mut finished = 0;
    for (len, stop, copy) in
        [PAGE + 100, 2 * PAGE].into_iter().flat_map(|l| (0..9).flat_map(move |n| [(l, n, 0), (l, n, 1)]))
    {
        let disk = new_disk();
        let mut rig = Rig::new(&disk).unwrap();
        for block in [0, 2] {
            rig.run(&Op::Write { at: block * PAGE, len: 4096, fill: 1 }).unwrap();
        }
        rig.run(&Op::Sync).unwrap();
        disk.stop_after(disk.operations() + stop);
        let _stopped = rig.run(&Op::SetLen(len));
        let left = disk.crash_process();
        let copy_at = geometry::state_offset(0, if copy == 0 { geometry::Copy2::A } else { geometry::Copy2::B });
        left.flip_bit("f", copy_at + 100, 1).unwrap();
        left.write_raw("f", geometry::block_offset(1), &[5; 50]).unwrap();
        for read_only in [true, false] {
            let open = match core_of(&open_shared(&left, read_only)).open(Access::Read) {
                Ok(open) => open,
                // The copy that was damaged is the one that knew of the shrink.
                Err(e) => {
                    assert_eq!(e.code(), "size-short", "{len} {stop} {copy}");
                    continue;
                }
            };
            finished += u64::from(open.len() == len && stop < 5);
            let read = open.read(PAGE, &mut [0; 50]);
            assert!(matches!(&read, Err(e) if e.code() == "block-auth"), "{len} {stop} {copy} {read_only}: {read:?}");
            assert_eq!(open.read(0, &mut [0; 4096]).unwrap(), 4096);
        }
    }
    assert!(finished > 0);
}

/// Does `f` once, when a barrier is done and fsync does not know yet.
fn once_synced(disk: &SimDisk, f: impl Fn() + Send + Sync + 'static) {
    let done = std::sync::atomic::AtomicBool::new(false);
    disk.set_hook(Some(Arc::new(move |m| {
        if m == Moment::Synced(SimOp::SyncFile) && !done.swap(true, Ordering::SeqCst) {
            f();
        }
    })));
}

/// A write that came between the barrier and the state that raises the sealed length left no copy of the state durable.
#[test]
fn what_was_synced_survives_a_torn_page_if_a_write_came_while_it_was_synced() {
    for seed in 0..8u64 {
        let disk = new_disk();
        let mut rig = Rig::new(&disk).unwrap();
        let first = Op::Write { at: 0, len: 3 * PAGE as usize, fill: 1 };
        let mut want = Vec::new();
        model(&mut want, &first);
        rig.run(&first).unwrap();
        let other = rig.core.open(Access::ReadWrite).unwrap();
        once_synced(&disk, move || assert_eq!(other.write(2 * PAGE, &[7; 4096]).unwrap(), 4096));
        rig.run(&Op::Sync).unwrap();
        disk.set_hook(None);
        for cut in 0..200 {
            let cut = disk.crash_power(1000 * seed + cut, PowerCut::Reorder { tear: true });
            let mut got = vec![0; 2 * PAGE as usize];
            let read = core_of(&open_shared(&cut, false)).open(Access::Read).and_then(|f| f.read(0, &mut got));
            assert!(read.is_ok() && got == want[..got.len()], "seed {seed}: {read:?}");
        }
        // The next fsync raises it.
        let sealed = || {
            let (inner, keys) = (rig.core.inner.read(), rig.core.inner.read().keys.clone().unwrap());
            rig.core.with_segment(&inner, &keys, 0, |l| Ok(l.state.file.length)).unwrap()
        };
        assert_eq!(sealed(), 0);
        rig.open().sync().unwrap();
        assert_eq!(sealed(), 3 * PAGE);
    }
}

/// After a barrier that failed, one that succeeds proves nothing of the size: sealed all the same, a length that a power cut
/// took back disowned the whole file.
#[test]
fn a_barrier_that_proves_nothing_seals_no_length() {
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    rig.run(&Op::Write { at: 0, len: 9000, fill: 1 }).unwrap();
    disk.fail_next(Some(SimOp::SyncFile), 0, libc::EIO);
    rig.run(&Op::Sync).unwrap_err();
    rig.run(&Op::Sync).unwrap();
    let keys = rig.core.inner.read().keys.clone().unwrap();
    let sealed = rig.core.with_segment(&rig.core.inner.read(), &keys, 0, |l| Ok(l.state.file.length)).unwrap();
    assert_eq!(sealed, 0);
}

#[test]
fn two_files_never_share_a_key_and_an_emptied_file_gets_a_new_one() {
    let disk = new_disk();
    let rig = Rig::new(&disk).unwrap();
    rig.open().write(0, b"one").unwrap();
    let first = rig.core.file_id().unwrap();
    rig.open().set_len(0).unwrap();
    assert_eq!(rig.core.file_id(), None);
    assert_eq!(rig.open().stat().unwrap().size, 0, "an empty file has no header");
    rig.open().write(0, b"two").unwrap();
    assert_ne!(rig.core.file_id().unwrap(), first);
}

#[test]
fn closing_keeps_the_time_that_was_set() {
    use crate::backing::{SetTime, Timestamp};
    let disk = new_disk();
    let rig = Rig::new(&disk).unwrap();
    rig.open().write(0, &[7; 10_000]).unwrap();
    let t = Timestamp { sec: 1_000_000, nsec: 42 };
    let root = disk.root().unwrap();
    let node = disk.lookup(&root, b"f").unwrap();
    disk.set_times(&node, SetTime::Omit, SetTime::At(t)).unwrap();
    let shared = Arc::clone(&rig.shared);
    drop(rig);
    shared.settle.settle(Duration::ZERO);
    assert_eq!(disk.stat(&node).unwrap().mtime, t);
}

#[test]
fn writers_in_different_segments_run_in_parallel_and_lose_nothing() {
    let disk = new_disk();
    let rig = Rig::new(&disk).unwrap();
    rig.open().set_len(8 * 524_288).unwrap();
    rig.open().write(0, &[1]).unwrap();
    let open = rig.open();
    std::thread::scope(|s| {
        for t in 0..4u64 {
            s.spawn(move || {
                for i in 0..100u64 {
                    let at = (t * 2 * 524_288 + i * 5000) % (8 * 524_288 - 5000);
                    open.write(at, &[(t as u8) + 1; 3000]).unwrap();
                    let mut back = [0u8; 3000];
                    open.read(at, &mut back).unwrap();
                    assert!(back.iter().all(|b| *b == t as u8 + 1));
                }
            });
        }
    });
}

#[test]
fn a_damaged_block_fails_alone() {
    let disk = new_disk();
    let rig = Rig::new(&disk).unwrap();
    let mut data = vec![0u8; 200_000];
    random::fill(&mut data);
    rig.open().write(0, &data).unwrap();
    let shared = Arc::clone(&rig.shared);
    drop(rig);
    shared.settle.settle(Duration::ZERO);
    let root = disk.root().unwrap();
    let node = disk.lookup(&root, b"f").unwrap();
    let raw = disk.open(&node, Access::ReadWrite).unwrap();
    disk.write_at(&raw, &[0x99], geometry::block_offset(3) + 17).unwrap();
    let open = core_of(&open_shared(&disk, false)).open(Access::Read).unwrap();
    let mut buf = [0u8; 4096];
    let err = open.read(3 * PAGE, &mut buf).unwrap_err();
    assert!(matches!(err, StoreError::Damage(Damage::BlockAuth { block: 3 })), "{err}");
    for b in (0..40u64).filter(|b| *b != 3) {
        open.read(b * PAGE, &mut buf).unwrap();
        assert_eq!(buf[..], data[(b * PAGE) as usize..][..4096]);
    }
}

/// A shrink that a crash interrupted left the entries of the blocks it cut off in place when the new last block was a
/// hole; growing again then found them.
#[test]
fn finishing_a_shrink_onto_a_hole_forgets_what_was_cut_off() {
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    rig.run(&Op::Write { at: 655_359, len: 2, fill: 0 }).unwrap();
    rig.run(&Op::Write { at: 8192, len: 1, fill: 0 }).unwrap();
    disk.stop_after(disk.operations() + 1);
    rig.run(&Op::SetLen(1)).unwrap_err();
    drop(rig);
    let dead = disk.crash_process();
    let rig = Rig::new(&dead).unwrap();
    assert_eq!(rig.open().len(), 1);
    let keys = rig.core.inner.read().keys.clone().unwrap();
    let left = rig.core.with_segment(&rig.core.inner.read(), &keys, 0, |l| Ok(l.state.entry(2).is_hole())).unwrap();
    assert!(left, "block 2 lies behind the end and must be a hole");
}

/// The last block was sealed at its new length, the backing file could not be cut, and the old length stayed in force
/// in memory: the block was unreadable, and a crash would have cut what was written later.
#[test]
fn a_shrink_whose_cut_fails_is_a_shrink_all_the_same() {
    use crate::backing::sim::Op as Raw;
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    let mut want = pattern(3, 0, 10_000);
    rig.open().write(0, &want).unwrap();
    rig.open().sync().unwrap();
    for _ in 0..3 {
        disk.fail_next(Some(Raw::Truncate), 0, libc::EIO);
        rig.open().set_len(5000).unwrap_err();
        want.truncate(5000);
        assert_eq!(rig.open().len(), 5000);
        assert!(read_all(rig.open()).unwrap() == want);
        assert!(content(&disk.crash_process(), false).unwrap() == want, "after a crash");
        want.resize(9000, 0);
        rig.open().set_len(9000).unwrap();
        assert!(read_all(rig.open()).unwrap() == want);
        rig.open().write(8000, &[7; 2000]).unwrap();
        want.resize(10_000, 0);
        want[8000..].fill(7);
        assert!(read_all(rig.open()).unwrap() == want);
    }
    rig.run(&Op::Reopen { settle: true }).unwrap();
    assert!(read_all(rig.open()).unwrap() == want);
}

/// CLEAN had reached the disk although setting it failed; the next change then built on it.
#[test]
fn a_clean_flag_whose_write_was_reported_failed_is_cleared_before_the_next_change() {
    use crate::backing::sim::Op as Raw;
    let disk = new_disk();
    let mut rig = Rig::new(&disk).unwrap();
    rig.open().write(0, &[1; 5000]).unwrap();
    // A reader keeps the file open, so that nothing is read anew.
    let _reader = rig.core.open(Access::Read).unwrap();
    disk.fail_next(Some(Raw::SetTimes), 0, libc::EIO);
    rig.run(&Op::Reopen { settle: false }).unwrap();
    rig.open().write(5000, &[2; 5000]).unwrap();
    let got = content(&disk.crash_process(), false).unwrap();
    assert_eq!(got.len(), 10_000);
}

/// A daemon killed after it had cut a file, but before the state said so, left TRUNCATING in the state. Nobody cleared
/// it, so that everything appended later was cut off when the daemon was killed again.
#[test]
fn a_file_that_grows_after_an_interrupted_shrink_is_not_cut_again() {
    for (settled, synced) in [(false, false), (true, false), (false, true)] {
        for stop in 0..8 {
            let disk = new_disk();
            let mut rig = Rig::new(&disk).unwrap();
            rig.run(&Op::Write { at: 0, len: 20_000, fill: 1 }).unwrap();
            rig.run(&Op::Reopen { settle: true }).unwrap();
            disk.stop_after(disk.operations() + stop);
            let _ = rig.run(&Op::SetLen(5000));
            drop(rig);
            let dead = disk.crash_process();
            let mut rig = Rig::new(&dead).unwrap();
            let mut want = read_all(rig.open()).unwrap();
            if settled {
                rig.run(&Op::Reopen { settle: true }).unwrap();
            }
            let more = Op::Write { at: want.len() as u64, len: 50_000, fill: 2 };
            rig.run(&more).unwrap();
            model(&mut want, &more);
            if synced {
                rig.run(&Op::Sync).unwrap();
            }
            // Without a sync the program is killed, with one the power is cut.
            let again = if synced { dead.crash_power(stop, PowerCut::Lose) } else { dead.crash_process() };
            drop(rig);
            assert!(content(&again, false).unwrap() == want, "settled {settled}, synced {synced}, stop {stop}");
        }
    }
}
