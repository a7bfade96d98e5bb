//! The `envelopefs` program; everything is in the library.

fn main() -> std::process::ExitCode {
    envelopefs::cli::main(std::env::args_os().collect())
}
