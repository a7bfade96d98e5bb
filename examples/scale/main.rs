//! Prints the tables of `docs/SCALE.md`: `cargo run --example scale`.

mod model;

use std::io::Write;

fn main() -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{}\n\n{}\n{}", model::BEGIN, model::tables(), model::END)
}
