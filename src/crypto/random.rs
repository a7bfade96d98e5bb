//! The only doorway to randomness: the kernel's generator, getrandom(2).

/// Fills `buf` with random bytes.
///
/// # Panics
/// If the kernel has no random generator. There is no safe way to go on then, and getrandom(2) with a valid buffer
/// cannot fail once the generator has been seeded at boot.
pub fn fill(buf: &mut [u8]) {
    getrandom::fill(buf).expect("the kernel's random generator does not answer");
}

/// `N` random bytes.
pub fn array<const N: usize>() -> [u8; N] {
    let mut a = [0u8; N];
    fill(&mut a);
    a
}
