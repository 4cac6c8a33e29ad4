//! `man`: manual pages of every command from their one definition, and hookd.ini(5) from the table of keys.
//!
//! Guarantees pages that hold what `--help` and the README's reference hold, because they are made of the same.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::cli::out::Out;
use crate::config::keys::{KEYS, Section};
use crate::error::{Error, Kind, Result};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd man | man -l -\n  \
    couch-hookd man --dir /usr/local/share/man")]
pub(crate) struct Arguments {
    /// Where to write all pages, below man1 and man5
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints couch-hookd(1), or writes all pages.
pub(crate) fn run(arguments: &Arguments, command: Command, out: &mut Out) -> Result<u8> {
    let pages = pages(command);
    match &arguments.dir {
        None => out.text(&pages[0].text)?,
        Some(dir) => pages.iter().try_for_each(|page| page.write_below(dir))?,
    }
    Ok(0)
}

/// One page.
#[derive(Debug)]
struct Page {
    /// `couch-hookd-run`
    name: String,
    /// 1, or 5 for files.
    section: u8,
    text: Vec<u8>,
}

impl Page {
    fn write_below(&self, dir: &Path) -> Result<()> {
        let Page { name, section, text } = self;
        let folder = dir.join(format!("man{section}"));
        let path = folder.join(format!("{name}.{section}"));
        let failed = |error: io::Error| Error::new(Kind::Io, format!("failed to write: {error}"));
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(&path, text))
            .map_err(|error| failed(error).context(format!("`{}`", path.display())))
    }
}

/// couch-hookd(1) first, then its commands, hookd.ini(5) last.
fn pages(command: Command) -> Vec<Page> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    add(&command, &mut pages);
    pages.push(Page { name: "hookd.ini".to_owned(), section: 5, text: keys_page() });
    pages
}

fn add(command: &Command, pages: &mut Vec<Page>) {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let text = command_page(command, &name).expect("memory takes all text");
    pages.push(Page { name, section: 1, text });
    command.get_subcommands().for_each(|command| add(command, pages));
}

fn command_page(command: &Command, name: &str) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone()).source(SOURCE).manual("couch-hookd");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut rest = Roff::new();
    rest.control("SH", ["EXAMPLES"]).control("nf", []);
    let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    for line in examples.lines() {
        // The heading says it.
        match line.trim_end_matches(':') {
            "Example" | "Examples" => {}
            line => drop(rest.text([roman(line)])),
        }
    }
    rest.control("fi", []);
    rest.control("SH", ["EXIT STATUS"]).text([roman("0: fine. 1: found a fault. 2: used wrongly.")]);
    rest.control("SH", ["SEE ALSO"]);
    match name {
        "couch-hookd" => rest.text([bold("hookd.ini"), roman("(5)")]),
        _ => rest.text([bold("couch-hookd"), roman("(1), "), bold("hookd.ini"), roman("(5)")]),
    };
    rest.to_writer(&mut page)?;
    Ok(page)
}

const SOURCE: &str = concat!("couch-hookd ", env!("CARGO_PKG_VERSION"));

/// hookd.ini(5).
fn keys_page() -> Vec<u8> {
    let mut page = Roff::new();
    page.control("TH", ["hookd.ini", "5", "", SOURCE, "couch-hookd"]);
    page.control("SH", ["NAME"]).text([roman("hookd.ini - configuration of couch-hookd")]);
    page.control("SH", ["DESCRIPTION"]).text([roman(
        "Read by couch-hookd run from /etc/couch-hookd/hookd.ini or what --config names; the same sections may stand in \
         CouchDB's own local.ini, or in its configuration over HTTP. A line is KEY = VALUE. Comments begin with a \
         semicolon and stand on lines of their own.",
    )]);
    page.control("PP", []).text([roman(
        "Durations are 500ms, 5s, 2m, 1h; sizes 512B, 64KiB, 1MiB. Any key but paths may be read from a file: KEY_file = \
         PATH, which counts from systemd's credentials directory, then from this file's. Any key of [hookd] may come \
         from the environment as COUCH_HOOKD_KEY, any key of all sections from --set SECTION.KEY=VALUE. Order: --set, \
         environment, file, default.",
    )]);
    page.control("SH", ["[hookd]"]);
    keys(&mut page, Section::Hookd);
    page.control("SH", ["[hookd.webhooks]"]).text([roman(
        "The list of webhooks: NAME = URL of the endpoint. A name is up to 40 of a-z, 0-9, - and _ and begins with a \
         letter or digit.",
    )]);
    page.control("SH", ["[hookd.webhook.NAME]"]).text([roman("Options of one webhook, all optional.")]);
    keys(&mut page, Section::Webhook);
    page.control("SH", ["EXAMPLE"]).control("nf", []);
    for line in EXAMPLE.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
    page.control("SH", ["FILES"]).text([italic("/etc/couch-hookd/hookd.ini")]);
    page.control("SH", ["SEE ALSO"]).text([bold("couch-hookd"), roman("(1)")]);
    page.to_roff().into_bytes()
}

const EXAMPLE: &str = "[hookd]
couchdb_url = http://127.0.0.1:5984
username = hookd
password_file = couchdb-password

[hookd.webhooks]
orders = https://shop.example/hooks/orders

[hookd.webhook.orders]
secret_file = orders.secret
";

fn keys(page: &mut Roff, section: Section) {
    for key in KEYS.iter().filter(|key| key.section == section) {
        let plain = |text: &str| text.replace('`', "");
        page.control("TP", []).text([bold(key.name)]);
        let default = key.default.map_or_else(String::new, |default| format!(" Default: {default}."));
        page.text([roman(format!("{} Value: {}.{default}", plain(key.text), plain(&key.kind.to_string())))]);
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_command_and_every_key_has_its_place() {
        let pages = pages(crate::cli::Arguments::command());
        let text = |name: &str| {
            let page =
                pages.iter().find(|page| page.name == name).unwrap_or_else(|| panic!("no page {name}"));
            String::from_utf8(page.text.clone()).unwrap()
        };
        let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
        for wanted in ["couch-hookd", "couch-hookd-run", "couch-hookd-signature-verify", "hookd.ini"] {
            assert!(names.contains(&wanted), "{names:?}");
        }
        let keys = text("hookd.ini");
        for key in KEYS {
            assert!(
                keys.contains(&format!("\\fB{}\\fR", key.name.replace('-', "\\-"))),
                "{}:\n{keys}",
                key.name
            );
        }
        let run = text("couch-hookd-run");
        assert!(run.contains(".SH EXAMPLES") && run.contains("log_level=debug"), "{run}");
        for page in &pages {
            assert!(page.text.starts_with(b".ie") || page.text.starts_with(b".TH"), "{}", page.name);
        }
    }
}
