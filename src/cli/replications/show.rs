//! `replications show`: everything that is known of one replication.

use clap::Args;
use serde_json::{Map, Value};

use crate::cli::common::age;
use crate::cli::out::Out;
use crate::cli::replications::Where;
use crate::cli::replications::look::{Behind, Entry, Look};
use crate::cli::replications::shown::{
    analysis, analysis_members, behind_members, colour, counters, happened, public_entry, public_history,
    wrapped,
};
use crate::error::Result;
use crate::pure::replication::{Job, State};
use crate::pure::url::shown_url;

/// Entries of a job's history that are shown; CouchDB keeps `max_history` (20).
const HISTORY: usize = 10;
/// Where values begin.
const INDENT: usize = 14;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications show edge1\n  \
    couch-hookd replications show edge1 --database team/_replicator --json | jq .lag\n\n\
    The checkpoint is read where the source or the target is this CouchDB; CouchDB writes\n\
    one only while something happens, so an idle replication's grows old. The history is the\n\
    scheduler's (2.1 and later). Exit status 1 when the replication has failed, and when\n\
    there is no such document.")]
pub(super) struct Arguments {
    /// Its document in the replicator database
    #[arg(value_name = "DOC_ID")]
    doc_id: String,
    #[command(flatten)]
    place: Where,
    /// One JSON object: what `_scheduler/docs` gives, with lag, checkpoint, history and error
    #[arg(long)]
    json: bool,
}

/// Shows one replication.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { doc_id, place, json } = arguments;
    let look = Look::open(place)?;
    let Some((entry, doc)) = look.one(&doc_id)? else { return Err(look.no_such(&doc_id)) };
    let job = look.job(&entry)?;
    let behind = look.behind(&entry)?;
    if json {
        let mut shown = public_entry(&entry);
        if let Some(members) = shown.as_object_mut() {
            members.extend(behind_members(&behind));
            members.extend(analysis(&entry).map(|found| analysis_members(&found)).unwrap_or_default());
            let history =
                job.as_ref().map_or_else(|| Value::Array(Vec::new()), |(_, raw)| public_history(raw));
            members.insert("history".to_owned(), history);
        }
        out.json(&shown.to_string())?;
    } else {
        let page = Page { look: &look, entry: &entry, doc: &doc, behind: &behind };
        page.print(out)?;
        page.print_history(job.map(|(job, _)| job).as_ref(), out)?;
    }
    Ok(u8::from(entry.row.state == State::Failed))
}

/// One replication for people.
struct Page<'a> {
    look: &'a Look,
    entry: &'a Entry,
    /// A secret: only named members of it are shown.
    doc: &'a Map<String, Value>,
    behind: &'a Behind,
}

impl Page<'_> {
    fn print(&self, out: &mut Out) -> Result<()> {
        let (row, look) = (&self.entry.row, self.look);
        let text = |name: &str| self.doc.get(name).and_then(Value::as_str);
        let revision = text("_rev").map(|rev| format!(", revision {rev}")).unwrap_or_default();
        line("document", &format!("{} in `{}`{revision}", row.doc_id, look.db), out)?;
        let state = match out.has_colours() {
            true => colour(row.state).paint(row.state.as_str()),
            false => row.state.as_str().to_owned(),
        };
        out.styled(&format!("{:<INDENT$}{state}  {}", "state", self.since()))?;
        for (name, end) in [("source", &row.source), ("target", &row.target)] {
            let Some(end) = end else { continue };
            let here = look.db_of(end).map(|db| format!(" (`{db}` of this CouchDB)")).unwrap_or_default();
            line(name, &format!("{}{here}", shown_url(end)), out)?;
        }
        let settings = [
            (self.doc.get("continuous") == Some(&Value::Bool(true))).then(|| "continuous".to_owned()),
            text("filter").map(|filter| format!("filter `{filter}`")),
            text("owner").map(|owner| format!("owner `{owner}`")),
        ];
        let settings: Vec<String> = settings.into_iter().flatten().collect();
        if !settings.is_empty() {
            line("settings", &settings.join(", "), out)?;
        }
        if let Some(id) = &row.id {
            let node = row.node.as_ref().map(|node| format!(" on {node}")).unwrap_or_default();
            line("replication", &format!("{id}{node}"), out)?;
        }
        self.print_error(out)?;
        self.print_progress(out)
    }

    /// When it came there, and what else is to be said of it.
    fn since(&self) -> String {
        let row = &self.entry.row;
        let updated = row.last_updated.map(|at| format!("{} ago ({at})", age(at)));
        let started = row.start_time.map(|at| format!("started {} ago", age(at)));
        let said = [updated, started].into_iter().flatten().collect::<Vec<_>>().join(", ");
        match row.state {
            State::Initializing => format!("CouchDB has not begun with it {said}").trim_end().to_owned(),
            _ => said,
        }
    }

    fn print_error(&self, out: &mut Out) -> Result<()> {
        let row = &self.entry.row;
        if row.error_count > 0 {
            line("errors", &format!("{} in a row", row.error_count), out)?;
        }
        let Some(found) = analysis(self.entry) else { return Ok(()) };
        line("error", &found.error, out)?;
        line("class", found.class.as_str(), out)?;
        line("hint", found.hint, out)?;
        if found.raw != found.error {
            line("raw", &found.raw, out)?;
        }
        Ok(())
    }

    fn print_progress(&self, out: &mut Out) -> Result<()> {
        let progress = counters(&self.entry.progress.0);
        if !progress.is_empty() {
            line("progress", &progress, out)?;
        }
        if let Some(n) = self.behind.changes_pending {
            let counted = match self.behind.counted_by {
                Some("source") => " (counted at the source, behind the checkpoint, before any filter)",
                _ => "",
            };
            line("pending", &format!("{n} changes{counted}"), out)?;
        }
        let Some(checkpoint) = &self.behind.checkpoint else {
            let here = [&self.entry.row.source, &self.entry.row.target];
            let here = here.into_iter().flatten().any(|end| self.look.db_of(end).is_some());
            let why = match here {
                false => "not to be seen: neither end is this CouchDB",
                true if self.entry.row.id.is_none() => {
                    "not known: in this state CouchDB gives no replication id"
                }
                true => "none yet",
            };
            return line("checkpoint", why, out);
        };
        let age =
            checkpoint.age_seconds.map_or_else(|| "of unknown age".to_owned(), |age| format!("{age} s old"));
        let session = checkpoint.session_id.as_deref().unwrap_or("-");
        let done = counters(&checkpoint.counters);
        line("checkpoint", &format!("{age}, session {session}; {done}"), out)?;
        match &checkpoint.source_last_seq {
            Some(place) => line("at", &place.as_str().map_or_else(|| place.to_string(), str::to_owned), out),
            None => Ok(()),
        }
    }

    fn print_history(&self, job: Option<&Job>, out: &mut Out) -> Result<()> {
        let Some(job) = job else {
            let why = match self.look.has_scheduler {
                true => "none: it is no job of the scheduler now",
                false => "none: CouchDB keeps one from 2.1 on",
            };
            return line("history", why, out);
        };
        for (at, one) in job.history.iter().take(HISTORY).enumerate() {
            let name = if at == 0 { "history" } else { "" };
            line(name, &format!("{}  {}", one.timestamp, happened(one)), out)?;
        }
        match job.history.len().saturating_sub(HISTORY) {
            0 => Ok(()),
            n => line("", &format!("and {n} before (--json has them)"), out),
        }
    }
}

/// A name and its value, broken where the terminal ends.
fn line(name: &str, value: &str, out: &mut Out) -> Result<()> {
    for line in wrapped(&format!("{name:<INDENT$}"), value, out.width()) {
        out.line(&line)?;
    }
    Ok(())
}
