//! The commands: what each takes, and the few calls that it is made of.
//!
//! Guarantees one line for whatever goes wrong, without secrets, and the exit status of DESIGN §3: 0 fine, 1 found
//! a fault, 2 used wrongly. Each command has a file; only `out` writes to stdout (the daemon's modes never do).

mod ask;
mod check;
mod common;
mod completions;
mod dead_letters;
mod demo;
mod explain;
mod manual;
mod out;
mod pause;
mod prompt;
mod receive;
mod replications;
mod run;
mod secret;
mod seek;
mod signature;
mod status;
mod table;
mod tail;
mod test;
mod update_notification;
mod watch;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::cli::out::{Out, complain};
use crate::error::{Kind, Result};
use crate::host::{self, Mode};

/// Turns what happens inside CouchDB into signed webhooks, losing nothing.
#[derive(Debug, Parser)]
#[command(name = "couch-hookd", version, arg_required_else_help = true, max_term_width = 100)]
#[command(after_help = "Examples:\n  \
    couch-hookd watch http://admin:secret@127.0.0.1:5984/orders\n  \
    couch-hookd check --config /etc/couch-hookd/hookd.ini\n  \
    couch-hookd run --config /etc/couch-hookd/hookd.ini")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run by itself, under systemd or in a container
    Run(run::Arguments),
    /// Run under CouchDB 1.1 to 2.2, which starts it from its section os_daemons
    #[command(after_help = "Example, in CouchDB's local.ini:\n  \
        [os_daemons]\n  \
        couch_hookd = /usr/bin/couch-hookd os-daemon")]
    OsDaemon,
    /// Run under CouchDB 1.x, 2.0 or 2.1, which starts it from its section update_notification
    UpdateNotification(update_notification::Arguments),
    /// Follow one database, to try it; writes nothing to CouchDB
    Watch(watch::Arguments),
    /// Find everything that is wrong: configuration, server, rights, endpoints
    Check(check::Arguments),
    /// Say how every webhook is; exit status 1 when one needs a person
    Status(status::Arguments),
    /// Show a webhook's attempts as they are made
    Tail(tail::Arguments),
    /// Stop a webhook at its place
    Pause(pause::Pause),
    /// End a webhook's pause, whatever began it
    Resume(pause::Resume),
    /// Set a webhook to another place in its databases
    Seek(seek::Arguments),
    /// List, show, send again or delete what endpoints refused
    DeadLetters(dead_letters::Arguments),
    /// Show what CouchDB's replications are at, check, wait for and retry them
    Replications(replications::Arguments),
    /// Show the whole on a machine with nothing installed, with a kill -9 in the middle
    Demo(demo::Arguments),
    /// Receive webhooks, verify and print them
    Receive(receive::Arguments),
    /// Sign a payload, or say why a signature does not match
    Signature(signature::Arguments),
    /// Show what a webhook is configured to do, where each value comes from, and what it needs
    Explain(explain::Arguments),
    /// Send one test event to a webhook's endpoint, and show each step and the answer
    Test(test::Arguments),
    /// Print completions for a shell
    Completions(completions::Arguments),
    /// Print the manual page, or write all of them into a directory
    Man(manual::Arguments),
    /// Print a new signing secret
    #[command(after_help = "Example:\n  (umask 077; couch-hookd secret > /etc/couch-hookd/orders.secret)")]
    Secret,
}

/// Runs the program; gives the exit status: 0 fine, 1 found a fault, 2 used wrongly.
pub fn main() -> u8 {
    if std::env::args_os().len() == 1 && Mode::of_bare_start().is_some() {
        return settle(run::os_daemon());
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if must_stay() => {
            return update_notification::stay(&one_line_of(&error.render().to_string()));
        }
        Err(error) => return refuse(&error),
    };
    let out = &mut Out::new();
    settle(match arguments.command {
        Command::Run(arguments) => run::run(arguments),
        Command::OsDaemon => run::os_daemon(),
        Command::UpdateNotification(arguments) => return update_notification::run(&arguments),
        Command::Watch(arguments) => watch::run(arguments, out),
        Command::Check(arguments) => check::run(arguments, out),
        Command::Status(arguments) => status::run(arguments, out),
        Command::Tail(arguments) => tail::run(arguments, out),
        Command::Pause(arguments) => pause::pause(arguments, out),
        Command::Resume(arguments) => pause::resume(arguments, out),
        Command::Seek(arguments) => seek::run(arguments, out),
        Command::DeadLetters(arguments) => dead_letters::run(arguments, out),
        Command::Replications(arguments) => replications::run(arguments, out),
        Command::Demo(arguments) => demo::run(&arguments, out),
        Command::Receive(arguments) => receive::run(arguments, out),
        Command::Signature(arguments) => signature::run(arguments, out),
        Command::Explain(arguments) => explain::run(arguments, out),
        Command::Test(arguments) => test::run(arguments, out),
        Command::Completions(arguments) => completions::run(&arguments, Arguments::command(), out),
        Command::Man(arguments) => manual::run(&arguments, Arguments::command(), out),
        Command::Secret => secret::run(out),
    })
}

/// Whether CouchDB started us with arguments that it may not even be told are wrong: from `[update_notification]` an end,
/// or a word on stdout, would take its HTTP down (CONTRACT §4), and in a misspelt command that cannot be told from others.
fn must_stay() -> bool {
    let is_named = std::env::args_os().nth(1).is_some_and(|word| word == "update-notification");
    host::is_between_pipes() && (is_named || host::is_under_erlang())
}

/// The README's reference of commands: a table in Markdown, from the one definition.
pub fn reference_markdown() -> String {
    fn rows(command: &clap::Command, before: &str, text: &mut String) {
        for one in command.get_subcommands().filter(|one| !one.is_hide_set() && one.get_name() != "help") {
            let name = format!("{before}{}", one.get_name());
            if one.has_subcommands() {
                rows(one, &format!("{name} "), text);
                continue;
            }
            let words = one.get_positionals().map(|word| {
                let value = word.get_value_names().and_then(|names| names.first());
                let value =
                    value.map_or_else(|| word.get_id().as_str(), |value| value.as_str()).to_uppercase();
                // A bar ends a cell, in code too.
                let value = value.replace('|', "\\|");
                if word.is_required_set() { format!(" {value}") } else { format!(" [{value}]") }
            });
            let about = one.get_about().map(ToString::to_string).unwrap_or_default();
            text.push_str(&format!("| `{name}{}` | {about} |\n", words.collect::<String>()));
        }
    }
    let mut text = String::from("| command | |\n|---|---|\n");
    rows(&<Arguments as clap::CommandFactory>::command(), "", &mut text);
    text
}

/// The exit status of what a command came to; says what went wrong.
fn settle(result: Result<u8>) -> u8 {
    match result {
        Ok(status) => status,
        // Whoever read the output has had enough.
        Err(error) if error.kind() == Kind::Stopped => 0,
        Err(error) => {
            complain(&error.to_string());
            if error.kind() == Kind::Config { 2 } else { 1 }
        }
    }
}

/// Help where it was asked for or nothing was given; else one line about what was wrong.
fn refuse(error: &clap::Error) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // A reader who went away has had enough.
            let _ = error.print();
        }
        _ => complain(&one_line_of(&error.render().to_string())),
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

/// What clap says in paragraphs, without what may be secret and without the usage: `--help` has it.
fn one_line_of(rendered: &str) -> String {
    let said = rendered.split("\nUsage:").next().unwrap_or_default();
    let said = said.split("\nFor more information").next().unwrap_or_default();
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let words = lines.collect::<Vec<_>>().join(" ").replace(" tip: ", "; ");
    let words = words.strip_prefix("error: ").unwrap_or(&words).split(' ');
    let words = words.map(|word| if may_be_secret(word) { "***" } else { word });
    format!("{}; see --help", words.collect::<Vec<_>>().join(" "))
}

fn may_be_secret(word: &str) -> bool {
    word.contains("whsec_") || word.contains('@') || word.contains("://")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(arguments: &str, expected: &str) {
        let error = Arguments::try_parse_from(arguments.split(' ')).unwrap_err();
        assert_eq!(one_line_of(&error.render().to_string()), expected, "{arguments}");
    }

    #[test]
    fn mistakes_are_said_in_one_line_without_secrets() {
        check("couch-hookd nonsense", "unrecognized subcommand 'nonsense'; see --help");
        check(
            "couch-hookd chek",
            "unrecognized subcommand 'chek'; a similar subcommand exists: 'check'; see --help",
        );
        check("couch-hookd secret whsec_canary", "unexpected argument *** found; see --help");
        check(
            "couch-hookd watch",
            "the following required arguments were not provided: <DATABASE_URL>; see --help",
        );
    }

    #[test]
    fn every_help_has_an_example_and_fits_the_definition() {
        fn look(command: &clap::Command) {
            let name = command.get_name();
            if name == "help" {
                return;
            }
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Example"), "`{name}` has no example: {help}");
            command.get_subcommands().for_each(look);
        }
        let command = Arguments::command();
        command.clone().debug_assert();
        look(&command);
    }
}
