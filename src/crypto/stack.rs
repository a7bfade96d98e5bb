//! Wiping what a computation with keys leaves on the stack.
//!
//! Ciphers and hashes wipe their state when it is dropped, but not the copies that a compiler makes of it in passing: a
//! key schedule that was returned by value, a block spilled from registers. Those lie below the stack pointer until
//! something else happens to be put there. Whatever reads a [`super::secret::Secret32`] therefore runs in [`wiped`].

use std::hint::black_box;

/// Bytes of stack that are wiped, which takes about 0.1 µs.
const DEPTH: usize = 12 * 1024;

/// Runs `f`, then overwrites the stack that it used, up to 12 KiB. What `f` returns must not hold a secret: it is copied
/// outside of what is wiped.
pub fn wiped<R>(f: impl FnOnce() -> R) -> R {
    let r = apart(f);
    wipe();
    r
}

/// Runs `f` in a frame that begins where the one of [`wipe`] does.
#[inline(never)]
fn apart<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[inline(never)]
fn wipe() {
    // Not optimised away: for all the compiler knows, somebody looks at it.
    black_box(&mut [0u8; DEPTH]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_comes_through() {
        let text = String::from("a");
        assert_eq!(wiped(|| text + "b"), "ab");
    }
}
