//! `completions`: what a shell needs to complete our commands, from their one definition.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::cli::out::Out;
use crate::error::Result;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd completions bash > /etc/bash_completion.d/couch-hookd\n  \
    couch-hookd completions zsh > ~/.zfunc/_couch-hookd\n  \
    couch-hookd completions fish > ~/.config/fish/completions/couch-hookd.fish")]
pub(crate) struct Arguments {
    /// Which shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Prints them.
pub(crate) fn run(arguments: &Arguments, mut command: Command, out: &mut Out) -> Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "couch-hookd", &mut text);
    out.text(&text)?;
    Ok(0)
}
