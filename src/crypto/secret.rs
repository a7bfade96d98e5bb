//! Raw keys: 32 bytes in locked memory, wiped when dropped, and a type for each kind.
//!
//! All raw keys live in one arena of pages that no core dump, swap device or child process gets to see:
//! memfd_secret(2) where the kernel has it (the pages are unmapped from the kernel's own address space too), else
//! anonymous pages with mlock(2), `MADV_DONTDUMP` and `MADV_WIPEONFORK`. A slot is wiped when its key is dropped.
//!
//! The key types have no `Clone`, no `Serialize`, a redacted `Debug`, and one named way out: [`Secret32::expose`].

use parking_lot::Mutex;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use zeroize::Zeroize;

/// Length of every key of the hierarchy, in bytes.
pub const KEY_LEN: usize = 32;
/// Bytes of one arena chunk. 64 KiB holds 2048 keys and stays below the smallest `RLIMIT_MEMLOCK` in common use.
const CHUNK_LEN: usize = 64 * 1024;

struct Arena {
    free: Vec<NonNull<[u8; KEY_LEN]>>,
    chunks: Vec<(usize, usize)>,
}

// SAFETY: the pointers are to pages that are never unmapped, and a slot belongs to exactly one Secret32 at a time.
unsafe impl Send for Arena {}

static ARENA: Mutex<Arena> = Mutex::new(Arena { free: Vec::new(), chunks: Vec::new() });
static UNLOCKED: AtomicBool = AtomicBool::new(false);

impl Arena {
    fn take(&mut self) -> NonNull<[u8; KEY_LEN]> {
        if let Some(p) = self.free.pop() {
            return p;
        }
        let base = map_chunk();
        self.chunks.push((base.as_ptr() as usize, CHUNK_LEN));
        for i in (0..CHUNK_LEN / KEY_LEN).rev() {
            // SAFETY: `base` maps CHUNK_LEN bytes, so every multiple of KEY_LEN below it is inside and non-null.
            self.free.push(unsafe { base.add(i * KEY_LEN) }.cast());
        }
        self.free.pop().expect("a new chunk has slots")
    }
}

/// Maps one chunk of secret memory. Falls back step by step; if even mlock(2) is refused (a low `RLIMIT_MEMLOCK`),
/// the pages are still kept from dumps and children, and [`memory_is_locked`] says no.
fn map_chunk() -> NonNull<u8> {
    if let Some(p) = map_memfd_secret() {
        return p;
    }
    // SAFETY: a fresh anonymous private mapping; nothing else refers to it.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            CHUNK_LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED, "no memory for keys");
    // SAFETY: `p` maps CHUNK_LEN bytes; these calls change only how the kernel treats them.
    unsafe {
        if libc::mlock(p, CHUNK_LEN) != 0 {
            UNLOCKED.store(true, Ordering::Relaxed);
        }
        libc::madvise(p, CHUNK_LEN, libc::MADV_DONTDUMP);
        libc::madvise(p, CHUNK_LEN, libc::MADV_WIPEONFORK);
    }
    NonNull::new(p.cast()).expect("mmap does not return null")
}

fn map_memfd_secret() -> Option<NonNull<u8>> {
    // SAFETY: memfd_secret(2) takes flags only and returns a new descriptor or -1; libc has no wrapper for it.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) } as libc::c_int;
    if fd < 0 {
        return None;
    }
    // SAFETY: `fd` is ours, just made; the mapping keeps the memory alive after the descriptor is closed.
    let p = unsafe {
        let ok = libc::ftruncate(fd, CHUNK_LEN as libc::off_t) == 0;
        let p = if ok {
            libc::mmap(std::ptr::null_mut(), CHUNK_LEN, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
        } else {
            libc::MAP_FAILED
        };
        libc::close(fd);
        p
    };
    // A shared mapping would stay visible in a forked child: keep it out of children altogether.
    if p == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: `p` maps CHUNK_LEN bytes, made just now.
    unsafe { libc::madvise(p, CHUNK_LEN, libc::MADV_DONTFORK) };
    NonNull::new(p.cast())
}

/// Whether every key so far lies in memory that cannot be swapped out.
pub fn memory_is_locked() -> bool {
    !UNLOCKED.load(Ordering::Relaxed)
}

/// Address ranges (start, length in bytes) of the arena, for the test that looks for keys outside of it.
pub fn arena_ranges() -> Vec<(usize, usize)> {
    ARENA.lock().chunks.clone()
}

/// 32 secret bytes in the arena. Wiped when dropped.
pub struct Secret32 {
    slot: NonNull<[u8; KEY_LEN]>,
}

// SAFETY: a Secret32 owns its slot alone, and shared access is read-only.
unsafe impl Send for Secret32 {}
// SAFETY: as above.
unsafe impl Sync for Secret32 {}

impl Secret32 {
    /// A slot filled by `fill`, which gets it zeroed.
    pub fn build(fill: impl FnOnce(&mut [u8; KEY_LEN])) -> Self {
        let mut s = Secret32 { slot: ARENA.lock().take() };
        // SAFETY: the slot was just taken from the free list, so this is the only reference to it.
        fill(unsafe { s.slot.as_mut() });
        s
    }

    /// Like [`Secret32::build`], for a `fill` that can fail.
    pub fn try_build<E>(fill: impl FnOnce(&mut [u8; KEY_LEN]) -> Result<(), E>) -> Result<Self, E> {
        let mut r = Ok(());
        let s = Self::build(|b| r = fill(b));
        r.map(|()| s)
    }

    /// A random secret.
    pub fn random() -> Self {
        Self::build(|b| super::random::fill(b))
    }

    /// Takes the bytes over and wipes where they came from.
    pub fn take_from(source: &mut [u8; KEY_LEN]) -> Self {
        let s = Self::build(|b| b.copy_from_slice(source));
        source.zeroize();
        s
    }

    /// The bytes. The only way out; every caller can be found by this name.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        // SAFETY: the slot is mapped for the life of the process and nobody writes it while `self` is borrowed.
        unsafe { self.slot.as_ref() }
    }

    /// A second copy, in a slot of its own. Explicit, so that copies can be found by this name.
    pub fn duplicate(&self) -> Self {
        Self::build(|b| b.copy_from_slice(self.expose()))
    }

    /// Compares in constant time.
    pub fn ct_eq(&self, other: &Secret32) -> bool {
        super::kdf::ct_eq(self.expose(), other.expose())
    }
}

impl Drop for Secret32 {
    fn drop(&mut self) {
        // SAFETY: the slot is ours until it goes back to the free list below.
        unsafe { self.slot.as_mut() }.zeroize();
        ARENA.lock().free.push(self.slot);
    }
}

impl fmt::Debug for Secret32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret32(redacted)")
    }
}

macro_rules! key_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(Secret32);

        impl $name {
            /// A random key.
            pub fn random() -> Self {
                Self(Secret32::random())
            }

            /// Gives 32 secret bytes this meaning.
            pub fn from_secret(s: Secret32) -> Self {
                Self(s)
            }

            /// The secret inside.
            pub fn secret(&self) -> &Secret32 {
                &self.0
            }
        }
    };
}

key_type!(
    /// Data encryption key: one per regular file, never changes under `rotate`.
    Dek
);
key_type!(
    /// Key encryption key: wraps DEKs.
    Kek
);
key_type!(
    /// Random secret of a store, the parent of the keys for names, symlinks, extended attributes and the keyring MAC.
    StoreSecret
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing() {
        let k = Dek::from_secret(Secret32::build(|b| b.fill(0xab)));
        assert_eq!(format!("{k:?}"), "Dek(Secret32(redacted))");
    }

    #[test]
    fn a_dropped_secret_is_wiped() {
        let s = Secret32::build(|b| b.fill(0x5a));
        let p = s.slot;
        // Holding the arena's lock keeps other tests from being given the slot between the drop and the look.
        drop(s);
        let arena = ARENA.lock();
        if arena.free.contains(&p) {
            // SAFETY: the slot is free and the lock is held, so nobody writes it.
            assert_eq!(unsafe { *p.as_ptr() }, [0u8; KEY_LEN]);
        }
    }

    #[test]
    fn secrets_lie_in_the_arena_and_do_not_overlap() {
        let v: Vec<Secret32> = (0..5000).map(|_| Secret32::random()).collect();
        let mut at: Vec<usize> = v.iter().map(|s| s.slot.as_ptr() as usize).collect();
        at.sort_unstable();
        assert!(at.windows(2).all(|w| w[1] - w[0] >= KEY_LEN));
        let ranges = arena_ranges();
        assert!(at.iter().all(|a| ranges.iter().any(|(s, l)| a >= s && a + KEY_LEN <= s + l)));
    }
}
