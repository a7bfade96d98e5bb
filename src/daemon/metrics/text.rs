//! The text format, version 0.0.4: a help and a type line for each family, then its samples.

use std::fmt::{Display, Write};

/// Kinds of families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Text that is being put together.
#[derive(Debug, Default)]
pub struct Text(pub String);

impl Text {
    /// Begins a family. `help` is one line.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {}\n# TYPE {name} {kind}", escaped(help, false));
    }

    /// One sample.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (i, (k, v)) in labels.iter().enumerate() {
            let opens = if i == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{opens}{k}=\"{}\"", escaped(v, true));
        }
        let closes = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{closes} {value}");
    }

    /// A family of one sample without labels.
    pub fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }
}

fn escaped(s: &str, quotes: bool) -> String {
    let s = s.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { s.replace('"', "\\\"") } else { s }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_as_the_format_has_it() {
        let mut t = Text::default();
        t.single("a_total", Kind::Counter, "Back\\slash,\nline.", 3);
        t.family("b", Kind::Gauge, "B.");
        t.sample("b", &[("x", "q\"\\\n"), ("y", "")], 0.5);
        assert_eq!(
            t.0,
            "# HELP a_total Back\\\\slash,\\nline.\n# TYPE a_total counter\na_total 3\n# HELP b B.\n# TYPE b gauge\n\
             b{x=\"q\\\"\\\\\\n\",y=\"\"} 0.5\n"
        );
    }
}
