//! `replications list`: every replication of a database and its state, once or as a table that keeps itself current.
//!
//! Guarantees that a long list is read to its end; that the live table leaves the terminal as it found it, however it
//! is told to end; and that a CouchDB which does not answer for a while ends the live table only at its start.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use crossbeam_channel::{Receiver, Sender, after, bounded, select};

use crate::cli::ask::count;
use crate::cli::out::Out;
use crate::cli::replications::Where;
use crate::cli::replications::look::{Entry, Listing, Look};
use crate::cli::replications::shown::{ago, by_state, end, number, print_rows, public_entry, state_cell};
use crate::cli::table::Table;
use crate::error::{Error, Kind, Result};
use crate::host::standalone::{Signal, Signals};
use crate::pure::lag;
use crate::pure::os_daemon::one_line;
use crate::pure::replication::State;
use crate::sys::{self, Thread};

/// How often the live table is read anew, in seconds.
const EVERY: u64 = 2;
/// Another screen without a cursor, and back.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";
/// To the upper left corner; what is left of the line; what is left of the screen.
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST: &str = "\x1b[J";

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications list\n  \
    couch-hookd replications list --database team/_replicator --state crashing,error,failed\n  \
    couch-hookd replications list --watch\n  \
    couch-hookd replications list --json | jq -r '.docs[] | select(.state == \"failed\").doc_id'\n\n\
    SOURCE and TARGET are a database's name where they are this CouchDB. PENDING are changes\n\
    of the source still to come, where CouchDB counts them (`lag` counts more). ERRORS are\n\
    failures in a row. --json gives what CouchDB's `_scheduler/docs` gives, in that shape on\n\
    every version, without secrets. On 1.x `triggered` is shown as `running`, and a document\n\
    that CouchDB has not looked at yet as `initializing`.")]
pub(super) struct Arguments {
    #[command(flatten)]
    place: Where,
    /// Only those in these states, separated by commas
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = states())]
    state: Vec<State>,
    /// At most so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Leave out the first N
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: u32,
    /// A table that keeps itself current, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Seconds between two looks of --watch
    #[arg(long, value_name = "SECONDS", requires = "watch", default_value_t = EVERY,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
    /// One JSON object on one line; with --watch one a look
    #[arg(long)]
    json: bool,
}

/// CouchDB's words, and 1.x's own.
fn states() -> impl TypedValueParser<Value = State> {
    let words = State::ALL.map(State::as_str).into_iter().chain(["triggered"]);
    let known = |word: String| State::parse(&word).expect("one of the words");
    PossibleValuesParser::new(words.collect::<Vec<_>>()).map(known)
}

/// Lists replications.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { place, state, limit, skip, watch, every, json } = arguments;
    let what = What {
        look: Look::open(place)?,
        states: state,
        limit: limit.map_or(usize::MAX, |limit| limit as usize),
        skip: skip as usize,
        json,
    };
    if watch {
        let signals = Signals::catch()?;
        let watched = what.watch(&signals.received(), Duration::from_secs(every), out);
        signals.stop().map_err(|panic| Error::new(Kind::Io, panic))?;
        return watched.map(|()| 0);
    }
    let listing = what.read()?;
    if json {
        what.print_json(&listing, out)?;
        return Ok(0);
    }
    what.table(&listing).print(out)?;
    out.line(&what.summary(&listing))?;
    Ok(0)
}

/// What is listed.
struct What {
    look: Look,
    states: Vec<State>,
    limit: usize,
    skip: usize,
    json: bool,
}

impl What {
    fn read(&self) -> Result<Listing> {
        self.look.list(&self.states, self.skip, self.limit)
    }

    fn print_json(&self, listing: &Listing, out: &mut Out) -> Result<()> {
        let rows = listing.entries.iter().map(public_entry).collect();
        print_rows(listing.total_rows, self.skip, "docs", rows, out)
    }

    fn table(&self, listing: &Listing) -> Table {
        let mut table =
            Table::new(&["DOCUMENT", "STATE", ">ERRORS", ">PENDING", ">UPDATED", "SOURCE", "TARGET"]);
        for Entry { row, progress, .. } in &listing.entries {
            table.row([
                (&row.doc_id).into(),
                state_cell(row.state),
                row.error_count.to_string().into(),
                number(lag::pending(progress)).into(),
                ago(row.last_updated).into(),
                end(&self.look, row.source.as_deref()).into(),
                end(&self.look, row.target.as_deref()).into(),
            ]);
        }
        table
    }

    fn summary(&self, listing: &Listing) -> String {
        let n_shown = listing.entries.len() as u64;
        let (db, such) = (&self.look.db, if self.states.is_empty() { "" } else { " in these states" });
        if n_shown == 0 {
            return format!("no replications in `{db}`{such}");
        }
        let more = match listing.total_rows.saturating_sub(n_shown + self.skip as u64) {
            n if n > 0 && n_shown >= self.limit as u64 && self.states.is_empty() => {
                format!("; {n} more (--skip {})", self.skip as u64 + n_shown)
            }
            _ => String::new(),
        };
        let by_state = by_state(listing.entries.iter());
        format!("{} in `{db}`: {by_state}{more}", count(n_shown, "replication"))
    }

    /// Looks again and again, until told to end.
    fn watch(self, signals: &Receiver<Signal>, every: Duration, out: &mut Out) -> Result<()> {
        // The first look says whether there is anything to be seen.
        let first = self.read()?;
        let live = !self.json && out.size().is_some();
        let server = self.look.server().clone();
        let what = Arc::new(self);
        let reader = Reader::start(&what)?;
        if live {
            out.text(ENTER)?;
        }
        let watched = what.redraw(first, live, &reader, signals, every, out);
        // A request under way would hold up the end.
        server.stop();
        let joined = reader.end();
        if live {
            out.text(LEAVE)?;
        }
        watched.and(joined)
    }

    fn redraw(
        &self,
        first: Listing,
        live: bool,
        reader: &Reader,
        signals: &Receiver<Signal>,
        every: Duration,
        out: &mut Out,
    ) -> Result<()> {
        let (mut seen, mut fault) = (first, None);
        loop {
            match live {
                true => self.draw(&seen, fault.as_ref(), out)?,
                false if self.json => self.print_json(&seen, out)?,
                false => {
                    self.table(&seen).print(out)?;
                    out.line(&self.summary(&seen))?;
                }
            }
            let timer = after(every);
            let read = loop {
                select! {
                    recv(signals) -> signal => if signal != Ok(Signal::Reload) { return Ok(()) },
                    // One look is asked for at a time.
                    recv(timer) -> _ => if reader.ask.send(()).is_err() { return Ok(()) },
                    recv(reader.read) -> read => match read {
                        Ok(read) => break read,
                        Err(_) => return Ok(()),
                    },
                }
            };
            match read {
                Ok(listing) => (seen, fault) = (listing, None),
                Err(error) if live => fault = Some(error),
                Err(error) => return Err(error),
            }
        }
    }

    /// One screen: as many rows as fit, and a line below them.
    fn draw(&self, listing: &Listing, fault: Option<&Error>, out: &mut Out) -> Result<()> {
        let (width, height) = out.size().unwrap_or((80, 24));
        let mut lines = self.table(listing).lines(Some(width), out.has_colours());
        let n_rows = lines.len().saturating_sub(1);
        let room = height.saturating_sub(2).max(2);
        let more = match lines.len().checked_sub(room) {
            Some(n) if n > 0 => format!("; {n} of {n_rows} below"),
            _ => String::new(),
        };
        lines.truncate(room);
        let summary = match fault {
            None => format!("{}{more}", self.summary(listing)),
            Some(error) => format!("not current: {error}"),
        };
        lines.push(one_line(&summary).chars().take(width).collect());
        let mut screen = HOME.to_owned();
        for line in lines {
            screen.extend([&line, REST_OF_LINE, "\r\n"]);
        }
        screen.push_str(REST);
        out.text(screen.as_bytes())
    }
}

/// Looks when it is asked to, so that a signal is heard meanwhile.
struct Reader {
    ask: Sender<()>,
    read: Receiver<Result<Listing>>,
    thread: Thread,
}

impl Reader {
    fn start(what: &Arc<What>) -> Result<Reader> {
        let ((ask, asked), (give, read)) = (bounded(1), bounded(1));
        let what = Arc::clone(what);
        let thread = sys::spawn("replications:reader", move || {
            for () in asked {
                if give.send(what.read()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Reader { ask, read, thread })
    }

    fn end(self) -> Result<()> {
        let Reader { ask, read, thread } = self;
        drop((ask, read));
        thread.join().map_err(|panic| Error::new(Kind::Io, panic))
    }
}
