//! Random tampering with all files of a store at once, the keyring too: nothing panics, nothing hangs, and what can be
//! read is what was written, but for what `docs/THREAT_MODEL.md` says is not noticed.

use super::*;
use envelopefs::backing::sim::Op;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Harm {
    Flip { file: usize, at: u64, bit: u32 },
    Copy { from: usize, from_at: u64, to: usize, to_at: u64, len: usize },
    Zero { file: usize, at: u64, len: usize },
    Cut { file: usize, to: u64 },
    Grow { file: usize, by: u64 },
}

/// An offset as a fraction of the file, in pages and within one: edges are hit often.
fn place() -> impl Strategy<Value = u64> {
    let edge = prop_oneof![Just(0u64), Just(1024), Just(2048), Just(3072), 0u64..4096];
    (prop_oneof![3 => Just(0u64), 2 => 0u64..40, 1 => 0u64..180], edge).prop_map(|(page, at)| page * PAGE + at)
}

fn harm() -> impl Strategy<Value = Harm> {
    let file = || 0usize..64;
    let len = || prop_oneof![Just(1usize), Just(1024), Just(4096), 1usize..16_384];
    prop_oneof![
        4 => (file(), place(), 0u32..8).prop_map(|(file, at, bit)| Harm::Flip { file, at, bit }),
        3 => (file(), place(), file(), place(), len())
            .prop_map(|(from, from_at, to, to_at, len)| Harm::Copy { from, from_at, to, to_at, len }),
        2 => (file(), place(), len()).prop_map(|(file, at, len)| Harm::Zero { file, at, len }),
        1 => (file(), place()).prop_map(|(file, to)| Harm::Cut { file, to }),
        1 => (file(), prop_oneof![1u64..10_000, Just(1 << 30)]).prop_map(|(file, by)| Harm::Grow { file, by }),
    ]
}

fn apply(disk: &SimDisk, harm: &Harm) {
    let files = disk.files();
    let file = |i: usize| &files[i % files.len()];
    let size = |i: usize| disk.read_raw(file(i)).map_or(0, |v| v.len() as u64);
    match *harm {
        Harm::Flip { file: f, at, bit } => {
            let _ = disk.flip_bit(file(f), at, bit);
        }
        Harm::Copy { from, from_at, to, to_at, len } => {
            // Within both: a whole small file in another's place is not noticed, and growing is another harm.
            let len = (len as u64).min(size(from).saturating_sub(from_at)).min(size(to).saturating_sub(to_at));
            if len < size(to) {
                disk.copy_raw(file(from), from_at, file(to), to_at, len as usize).unwrap();
            }
        }
        Harm::Zero { file: f, at, len } => {
            let len = (len as u64).min(size(f).saturating_sub(at));
            disk.write_raw(file(f), at, &vec![0; len as usize]).unwrap();
        }
        Harm::Cut { file: f, to } => disk.truncate_raw(file(f), to.min(size(f))).unwrap(),
        Harm::Grow { file: f, by } => disk.truncate_raw(file(f), size(f) + by).unwrap(),
    }
}

/// Reads what can be read. `alone`: there was one harm only, so that nothing is read that was not written there.
fn read_all(s: &Arc<Store<SimDisk>>, alone: bool) -> std::result::Result<(), TestCaseError> {
    for (name, want) in contents() {
        let Ok((node, _)) = s.lookup(&s.root(), name.as_bytes()) else { continue };
        let Ok(f) = s.open_file(&node, Access::Read) else { continue };
        let len = f.len();
        prop_assert!(!alone || len == 0 || len == want.len() as u64, "{name} has {len} bytes");
        for at in (0..want.len() as u64 + 8 * PAGE).step_by(PAGE as usize) {
            let mut got = vec![0xa5; PAGE as usize];
            let Ok(n) = f.read(at, &mut got) else { continue };
            let written = |i: usize| want.get(at as usize + i).copied().unwrap_or(0);
            let same = (0..n).all(|i| got[i] == written(i));
            // States that are lost together with what they spoke for.
            let zeros = (!alone || *name == "sparse") && got[..n].iter().all(|b| *b == 0);
            prop_assert!(same || zeros, "{name}, offset {at}: read what was not written there");
        }
        let _ = (f.seek(0, true), f.seek(0, false), f.seek(len / 2, true), f.seek(u64::MAX, true));
    }
    Ok(())
}

fn look(disk: &SimDisk, read_only: bool, alone: bool) -> std::result::Result<(), TestCaseError> {
    let Ok(keys) = Keys::open(disk, &root()) else { return Ok(()) };
    let o = StoreOptions { read_only, ..StoreOptions::default() };
    let Ok(s) = Store::open(disk.clone(), keys, o) else { return Ok(()) };
    let _ = s.read_dir(&s.root());
    read_all(&s, alone)?;
    if read_only {
        return Ok(());
    }
    // Whoever writes on does not make good what is bad, nor bad what was good.
    for name in contents().keys() {
        let Ok((node, _)) = s.lookup(&s.root(), name.as_bytes()) else { continue };
        let Ok(f) = s.open_file(&node, Access::ReadWrite) else { continue };
        let len = f.len();
        if len > 0 && len < 1 << 22 {
            let _ = f.write(len - 1, &[contents()[name].get(len as usize - 1).copied().unwrap_or(0)]);
            let _ = f.sync();
        }
    }
    let _ = s.settle(std::time::Duration::ZERO);
    read_all(&s, alone)?;
    let _ = s.close();
    Ok(())
}

/// Each case reads a whole store several times: fewer than proptest's own 256, unless asked for more.
fn cases() -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig::with_cases(asked.unwrap_or(24))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn nothing_is_read_that_was_not_written(harms in proptest::collection::vec(harm(), 1..5)) {
        let w = World::new();
        for h in &harms {
            apply(&w.disk, h);
        }
        let before = w.disk.operations();
        look(&w.disk, true, harms.len() == 1)?;
        let keys = Keys::open(&w.disk, &root()).ok();
        let _ = check::run(&w.disk, keys.as_ref(), &CheckOptions { deep: true }, &());
        prop_assert_eq!(w.disk.operations(), before, "looking changed something");
        look(&w.disk.crash_process(), false, harms.len() == 1)?;
        // And on a disk that fails as well.
        let failing = w.disk.crash_process();
        failing.fail_next(Some(Op::Read), harms.len() as u64 * 7, 5);
        look(&failing, false, false)?;
    }

    #[test]
    fn a_store_that_was_not_closed_does_no_worse(harms in proptest::collection::vec(harm(), 1..4)) {
        let mut w = World::new();
        for name in ["large", "small", "sparse"] {
            let at = (contents()[name].len() - 5) as u64;
            w.kill_after(name, |f| write(f, at, &contents()[name][at as usize..]));
        }
        for h in &harms {
            apply(&w.disk, h);
        }
        look(&w.disk, true, false)?;
        look(&w.disk.crash_process(), false, false)?;
    }
}
