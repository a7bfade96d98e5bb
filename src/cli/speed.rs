//! `speed`: the ciphers on this machine, measured.

use super::args::SpeedArgs;
use super::output;
use crate::crypto::aead::{BlockCipher, GcmSiv};
use crate::crypto::secret::Secret32;
use crate::daemon::fault::Fault;
use serde::Serialize;
use std::time::{Duration, Instant};

/// How long each figure is measured.
const TIME: Duration = Duration::from_millis(150);
const SIZES: [usize; 2] = [4096, 128 * 1024];

/// The measured figures. Stable.
#[derive(Debug, Serialize)]
struct Speed {
    results: Vec<Figure>,
}

#[derive(Debug, Serialize)]
struct Figure {
    cipher: &'static str,
    implementation: &'static str,
    /// `blocks`: for file content; `small`: for keys, names and states.
    used_for: &'static str,
    /// Message length in bytes.
    size: usize,
    /// 10^9 bytes a second, one thread.
    seal_gb_per_s: f64,
    open_gb_per_s: f64,
}

/// Runs the subcommand.
///
/// # Errors
/// That standard output cannot be written.
pub fn run(a: &SpeedArgs) -> Result<(), Fault> {
    let speed = Speed { results: measure() };
    if a.json { output::print_json(&speed) } else { output::print(&table(&speed)) }
}

fn measure() -> Vec<Figure> {
    let key = Secret32::random();
    let block = BlockCipher::new(&key);
    let nonce = [7u8; 12];
    let figure = |implementation, used_for, size, (seal, open)| Figure {
        cipher: "AES-256-GCM-SIV",
        implementation,
        used_for,
        size,
        seal_gb_per_s: seal,
        open_gb_per_s: open,
    };
    let mut out = Vec::new();
    for size in SIZES {
        let pair = rates(size, |data| block.seal(&nonce, b"", data), |tag, d| block.open(&nonce, b"", tag, d).is_ok());
        out.push(figure("aws-lc-rs", "blocks", size, pair));
    }
    for size in SIZES {
        let open = |tag: &[u8; 16], d: &mut [u8]| GcmSiv::open(&key, &nonce, b"", tag, d).is_ok();
        let pair = rates(size, |data| GcmSiv::seal(&key, &nonce, b"", data), open);
        out.push(figure("aes-gcm-siv", "small", size, pair));
    }
    out
}

/// Rates of seal and open in GB/s. Each round opens what it sealed, so that only successful work is counted.
fn rates(size: usize, seal: impl Fn(&mut [u8]) -> [u8; 16], open: impl Fn(&[u8; 16], &mut [u8]) -> bool) -> (f64, f64) {
    let mut data = vec![0u8; size];
    let (mut sealing, mut opening) = (Duration::ZERO, Duration::ZERO);
    let mut total = 0usize;
    while sealing + opening < TIME * 2 {
        let start = Instant::now();
        let tag = seal(&mut data);
        let middle = Instant::now();
        if !open(&tag, &mut data) {
            return (0.0, 0.0);
        }
        opening += middle.elapsed();
        sealing += middle - start;
        total += size;
    }
    let rate = |t: Duration| (total as f64 / 1e9 / t.as_secs_f64() * 1000.0).round() / 1000.0;
    (rate(sealing), rate(opening))
}

fn table(s: &Speed) -> String {
    let mut t = format!("{:<16} {:<12} {:<7} {:>8} {:>12} {:>12}\n", "cipher", "from", "for", "size", "seal", "open");
    for f in &s.results {
        let size = output::bytes(f.size as u64);
        let (seal, open) = (format!("{:.2} GB/s", f.seal_gb_per_s), format!("{:.2} GB/s", f.open_gb_per_s));
        t += &format!("{:<16} {:<12} {:<7} {size:>9} {seal:>12} {open:>12}\n", f.cipher, f.implementation, f.used_for);
    }
    t
}
