//! Writing to standard output. A reader that has gone away (`| head`) is not a failure.

use crate::daemon::fault::{Fault, FaultKind, plain};
use serde::Serialize;
use std::io::{self, Write};

/// Prints `text` as it is.
///
/// # Errors
/// Standard output cannot be written, for another reason than a closed pipe.
pub fn print(text: &str) -> Result<(), Fault> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Fault::new(FaultKind::Other, format!("cannot write to standard output: {}", plain(&e))))
        }
        _ => Ok(()),
    }
}

/// Prints a secret: to the descriptor itself, so that no buffer keeps it. Unlike [`print`], fails also if nobody reads.
///
/// # Errors
/// Standard output cannot be written.
pub fn print_secret(text: &str) -> Result<(), Fault> {
    let failed = |e: io::Error| Fault::new(FaultKind::Other, format!("cannot write to standard output: {}", plain(&e)));
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(rustix::stdio::stdout(), rest) {
            Ok(0) => return Err(failed(io::ErrorKind::WriteZero.into())),
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
    Ok(())
}

/// Prints one JSON object, indented, with a newline.
///
/// # Errors
/// As [`print`].
pub fn print_json<T: Serialize>(value: &T) -> Result<(), Fault> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Fault::new(FaultKind::Other, e.to_string()))?;
    text.push('\n');
    print(&text)
}

/// Bytes for people: `17 B`, `4.0 KiB`, `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut v = n as f64;
    let mut unit = 0;
    while v >= 1024.0 && unit + 1 < UNITS.len() {
        v /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 { format!("{n} B") } else { format!("{v:.1} {name}") }
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_for_people() {
        assert_eq!(super::bytes(0), "0 B");
        assert_eq!(super::bytes(1023), "1023 B");
        assert_eq!(super::bytes(4096), "4.0 KiB");
        assert_eq!(super::bytes(3 << 29), "1.5 GiB");
        assert_eq!(super::bytes(u64::MAX), "16384.0 PiB");
    }
}
