//! Where log lines go: standard error in the foreground, a file, or the system log once the daemon is in the background.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Where to log.
#[derive(Debug)]
pub enum Target {
    /// Standard error, with times only on request of the reader (systemd adds its own).
    Stderr,
    /// Appended to an open file.
    File(File),
    /// syslog(3) through `/dev/log`, which the journal listens on too.
    System,
}

impl Target {
    /// A log file, made with mode 0600.
    ///
    /// # Errors
    /// The kernel's.
    pub fn file(path: &Path) -> io::Result<Self> {
        File::options().create(true).append(true).mode(0o600).open(path).map(Self::File)
    }
}

/// What is logged: of this program all that is at least as grave as `level`, of everybody else warnings and errors at
/// most. A key service's client logs at its finest level what it sends and receives, and so the keys in it.
fn filter(level: Level) -> EnvFilter {
    let others = level.min(Level::WARN);
    EnvFilter::new(format!("{others},{}={level}", env!("CARGO_PKG_NAME")))
}

/// Installs the process's log as [`filter`] has it, and a panic hook that logs. A second call is ignored.
pub fn install(target: Target, level: Level) {
    let b = tracing_subscriber::fmt().with_env_filter(filter(level)).with_ansi(false).with_target(false);
    let _ = match target {
        Target::Stderr => tracing::subscriber::set_global_default(b.without_time().with_writer(io::stderr).finish()),
        Target::File(f) => tracing::subscriber::set_global_default(b.with_writer(Mutex::new(f)).finish()),
        Target::System => {
            let log = SystemLog::default();
            tracing::subscriber::set_global_default(b.without_time().with_level(false).with_writer(log).finish())
        }
    };
    std::panic::set_hook(Box::new(|p| {
        let text = p.payload_as_str().unwrap_or("no message");
        let at = p.location().map_or_else(|| "?".to_string(), ToString::to_string);
        tracing::error!("panic at {at}: {text}");
    }));
}

/// The system log; lines are dropped while nobody listens.
#[derive(Debug, Clone, Default)]
struct SystemLog {
    socket: Arc<Mutex<Option<UnixDatagram>>>,
}

/// One line on its way, with its syslog severity.
#[derive(Debug)]
struct Line<'a> {
    log: &'a SystemLog,
    severity: u8,
}

impl SystemLog {
    fn send(&self, datagram: &[u8]) {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if socket.as_ref().is_some_and(|s| s.send(datagram).is_ok()) {
            return;
        }
        *socket = UnixDatagram::unbound().and_then(|s| s.connect("/dev/log").map(|()| s)).ok();
        if let Some(s) = socket.as_ref() {
            // A log that cannot be written must not stop the file system.
            let _ = s.send(datagram);
        }
    }
}

/// `<facility daemon + severity>envelopefs[pid]: text`.
fn datagram(severity: u8, pid: u32, text: &[u8]) -> Vec<u8> {
    let mut d = format!("<{}>envelopefs[{pid}]: ", 3 * 8 + severity).into_bytes();
    d.extend_from_slice(text.trim_ascii());
    d
}

fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

impl<'a> MakeWriter<'a> for SystemLog {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { log: self, severity: 6 }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line<'a> {
        Line { log: self, severity: severity(*meta.level()) }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.log.send(&datagram(self.severity, std::process::id(), buf));
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_program_is_heard_at_fine_levels() {
        assert_eq!(filter(Level::TRACE).to_string(), "envelopefs=trace,warn");
        assert_eq!(filter(Level::ERROR).to_string(), "envelopefs=error,error");
    }

    #[test]
    fn a_datagram_is_what_syslog_expects() {
        assert_eq!(datagram(severity(Level::WARN), 7, b"low disk\n"), b"<28>envelopefs[7]: low disk");
    }
}
