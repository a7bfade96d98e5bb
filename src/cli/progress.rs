//! Progress of long work: a bar on a terminal, a line now and then otherwise. Both on standard error.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How often a plain line is printed.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows how far something is.
pub struct Meter {
    bar: Option<ProgressBar>,
    last: Mutex<Instant>,
    quiet: bool,
}

impl Meter {
    /// A meter; `quiet` shows nothing.
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        let bar = terminal.then(|| {
            let b = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            b.set_style(ProgressStyle::default_spinner());
            b
        });
        Self { bar, last: Mutex::new(Instant::now()), quiet }
    }

    /// `done` of `total`, and what there is to say about it.
    pub fn update(&self, done: u64, total: Option<u64>, says: &str) {
        if let Some(b) = &self.bar {
            if total.is_some() && b.length() != total {
                if let Ok(s) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} eta {eta}") {
                    b.set_style(s);
                }
                b.set_length(total.unwrap_or_default());
            }
            b.set_position(done);
            b.set_message(says.to_string());
            return;
        }
        let mut last = self.last.lock();
        if !self.quiet && last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            let of = total.map_or(String::new(), |t| format!(" of {t}"));
            eprintln!("{done}{of} files, {says}");
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Some(b) = &self.bar {
            b.finish_and_clear();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.end();
    }
}
