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
    if arguments.shell == Shell::Bash {
        text = mended(&String::from_utf8_lossy(&text)).into_bytes();
    }
    out.text(&text)?;
    Ok(0)
}

/// `clap_complete` 4.6 splits the `-` in our name where it looks a command up, but not where it notes which one was
/// typed, so nothing behind a command would be completed. A text without that fault stays as it is.
fn mended(text: &str) -> String {
    text.replace("couch__subcmd__hookd__", "couch__hookd__")
}
