//! `replications check`: everything that is wrong with replication documents, before or after they are saved.
//!
//! Guarantees that a file and stdin are checked without a CouchDB, that nothing is written, and that no text of a
//! document is printed but its id and names of its members (`pure::rep_doc`).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::ask::count;
use crate::cli::common::Setup;
use crate::cli::out::{Colour, Out};
use crate::cli::run::Source;
use crate::couch::client::db_path;
use crate::error::{Error, Kind, Result};
use crate::pure::rep_doc::{self, Finding, Origin, Version};

/// Of a file or stdin; more are no documents written by hand.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications check edge1.json --couchdb-version 2.2\n  \
    curl -s -u admin $COUCH/_replicator/edge1 | couch-hookd replications check - --stored\n  \
    couch-hookd replications check edge1 --config /etc/couch-hookd/hookd.ini\n  \
    couch-hookd replications check all.json --json | jq 'select(.level == \"error\")'\n\n\
    A file holds one document, an array of them, or {\"docs\": [...]}. What is no file is\n\
    the id of a document, read from CouchDB and checked for CouchDB's own version.\n\
    Exit status 1 when there is an error; warnings do not count.")]
pub(crate) struct Arguments {
    /// A file, `-` for stdin, or else the id of a document in CouchDB
    #[arg(value_name = "FILE|-|DOC_ID")]
    what: String,
    /// Of a file: the version that will run it, such as 1.7 or 3.5.0 [default: the newest]
    #[arg(long, value_name = "VERSION")]
    couchdb_version: Option<Version>,
    /// Of a file: it was read from CouchDB, so what CouchDB has written into it is right
    #[arg(long)]
    stored: bool,
    /// Of a DOC_ID: the replicator database
    #[arg(long, value_name = "NAME", default_value = "_replicator")]
    database: String,
    #[command(flatten)]
    source: Source,
    /// One JSON object a line: {"level":…,"document":…,"path":…,"message":…,"remedy":…}
    #[arg(long)]
    json: bool,
}

/// Documents, each with what it is called, and what they are checked for.
struct Asked {
    documents: Vec<(String, Value)>,
    version: Option<Version>,
    origin: Origin,
}

/// Checks what is named.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let json = arguments.json;
    let mut report = Report { out, json, n_errors: 0, n_warnings: 0 };
    let asked = match text_of(&arguments.what)? {
        None => of_couchdb(arguments)?,
        Some(text) => match rep_doc::documents(&text) {
            Ok(documents) => {
                let documents = documents.into_iter().map(|(place, doc)| (label(&doc, place), doc)).collect();
                let origin = if arguments.stored { Origin::Stored } else { Origin::ToSave };
                Asked { documents, version: arguments.couchdb_version, origin }
            }
            Err(finding) => {
                report.say(&arguments.what, Some(&finding))?;
                return Ok(1);
            }
        },
    };
    for (name, doc) in &asked.documents {
        let findings = rep_doc::check(doc, asked.version, asked.origin);
        if findings.is_empty() {
            report.say(name, None)?;
        }
        findings.iter().try_for_each(|finding| report.say(name, Some(finding)))?;
    }
    report.finish(&asked)
}

/// What a document is called: by its id, else by its place in the file.
fn label(doc: &Value, place: String) -> String {
    match doc.get("_id").and_then(Value::as_str) {
        Some(id) => id.to_owned(),
        None if place.is_empty() => "document".to_owned(),
        None => place,
    }
}

/// The text of a file or of stdin; `None` when it is neither.
fn text_of(what: &str) -> Result<Option<String>> {
    let from: Box<dyn Read> = match what {
        "-" => Box::new(io::stdin().lock()),
        _ if Path::new(what).is_dir() => {
            let found = format!("expected a file, `-` or the id of a document, got the directory `{what}`");
            return Err(Error::new(Kind::Config, found));
        }
        _ if !Path::new(what).exists() => return Ok(None),
        _ => Box::new(File::open(what).map_err(|error| failed(what, &error))?),
    };
    let mut bytes = Vec::new();
    from.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| failed(what, &error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let found = format!("`{what}`: expected at most {} MiB, got more", FILE_BYTES_MAX >> 20);
        return Err(Error::new(Kind::Config, found));
    }
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|_| Error::new(Kind::Config, format!("`{what}`: expected UTF-8, got other bytes")))
}

fn failed(what: &str, error: &io::Error) -> Error {
    Error::new(Kind::Io, format!("`{what}`: cannot be read: {error}"))
}

/// A document of CouchDB.
fn of_couchdb(arguments: Arguments) -> Result<Asked> {
    let Arguments { what, database, source, couchdb_version, stored, .. } = arguments;
    if couchdb_version.is_some() || stored {
        let found = format!(
            "there is no file `{what}`, and a document of CouchDB is checked as it is stored there, for CouchDB's own \
             version: expected no --couchdb-version and no --stored"
        );
        return Err(Error::new(Kind::Config, found));
    }
    let setup = Setup::load(source)?;
    let version = setup.welcome()?.version.parse().ok();
    let doc: Value =
        setup.server.get_json(&db_path(&database, &[&what])).map_err(|error| match error.kind() {
            Kind::NotFound => {
                let found =
                    format!("no document `{what}` in database `{database}`, and no file of this name");
                Error::new(Kind::NotFound, found)
            }
            _ => error.context(format!("database `{database}`, document `{what}`")),
        })?;
    Ok(Asked { documents: vec![(label(&doc, what), doc)], version, origin: Origin::Stored })
}

/// Prints findings as they come and counts them.
struct Report<'a> {
    out: &'a mut Out,
    json: bool,
    n_errors: u64,
    n_warnings: u64,
}

impl Report<'_> {
    /// One finding of a document, or that it has none.
    fn say(&mut self, document: &str, finding: Option<&Finding>) -> Result<()> {
        let (word, colour) = match finding {
            None => ("ok", Colour::Green),
            Some(finding) if finding.is_error() => ("error", Colour::Red),
            Some(_) => ("warning", Colour::Yellow),
        };
        match colour {
            Colour::Green => {}
            Colour::Red => self.n_errors += 1,
            Colour::Yellow => self.n_warnings += 1,
        }
        match (self.json, finding) {
            (true, None) => self.out.json(&json!({"level": word, "document": document}).to_string()),
            (true, Some(Finding { path, message, remedy, .. })) => {
                let line = json!({
                    "level": word, "document": document, "path": path, "message": message, "remedy": remedy,
                });
                self.out.json(&line.to_string())
            }
            (false, None) => self.out.marked_line(word, colour, document),
            (false, Some(finding)) => self.out.marked_line(word, colour, &format!("{document}: {finding}")),
        }
    }

    /// The sum of it, and the exit status: 1 with an error.
    fn finish(self, asked: &Asked) -> Result<u8> {
        if !self.json {
            let version = asked.version.unwrap_or(Version::NEWEST);
            self.out.line(&format!(
                "{}, checked for CouchDB {version}: {}, {}",
                count(asked.documents.len() as u64, "document"),
                count(self.n_errors, "error"),
                count(self.n_warnings, "warning"),
            ))?;
        }
        Ok(u8::from(self.n_errors > 0))
    }
}
