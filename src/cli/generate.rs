//! `completions` and `man`: made from the clap definition.

use super::args::Cli;
use super::output;
use crate::daemon::fault::{Fault, FaultKind};
use clap::CommandFactory;

/// Prints a completion script.
///
/// # Errors
/// That standard output cannot be written.
pub fn completions(shell: clap_complete::Shell) -> Result<(), Fault> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "envelopefs", &mut text);
    output::print(&String::from_utf8_lossy(&text))
}

/// Prints one manual page that holds all subcommands.
///
/// # Errors
/// That standard output cannot be written.
pub fn man() -> Result<(), Fault> {
    let render = || -> std::io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let mut main = Cli::command();
        main.build();
        let page = clap_mangen::Man::new(main.clone());
        page.render_title(&mut text)?;
        page.render_name_section(&mut text)?;
        page.render_synopsis_section(&mut text)?;
        page.render_description_section(&mut text)?;
        for sub in main.get_subcommands().filter(|s| !s.is_hide_set()) {
            subcommand(&mut text, sub)?;
        }
        exit_codes(&mut text);
        Ok(text)
    };
    let text = render().map_err(|e| Fault::new(FaultKind::Other, e.to_string()))?;
    output::print(&String::from_utf8_lossy(&text))
}

fn subcommand(text: &mut Vec<u8>, sub: &clap::Command) -> std::io::Result<()> {
    let name = sub.get_bin_name().unwrap_or_else(|| sub.get_name()).to_uppercase();
    text.extend_from_slice(format!(".SH \"{name}\"\n").as_bytes());
    let page = clap_mangen::Man::new(sub.clone());
    let mut part = Vec::new();
    page.render_synopsis_section(&mut part)?;
    page.render_description_section(&mut part)?;
    page.render_options_section(&mut part)?;
    // Sections of a subcommand become subsections of the one page.
    text.extend_from_slice(String::from_utf8_lossy(&part).replace("\n.SH ", "\n.SS ").as_bytes());
    for inner in sub.get_subcommands().filter(|s| !s.is_hide_set() && s.get_name() != "help") {
        subcommand(text, inner)?;
    }
    Ok(())
}

fn exit_codes(text: &mut Vec<u8>) {
    text.extend_from_slice(b".SH \"EXIT STATUS\"\n");
    for e in super::exit::Exit::ALL {
        text.extend_from_slice(format!(".TP\n{}\n{}\n", e.code(), e.meaning()).as_bytes());
    }
}
