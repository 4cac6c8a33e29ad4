//! `replications retry`: has CouchDB begin a replication anew that has ended.

use clap::Args;
use serde_json::json;

use crate::cli::out::Out;
use crate::cli::replications::Where;
use crate::cli::replications::look::Look;
use crate::couch::scheduler;
use crate::error::{Error, Kind, Result};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications retry edge1\n  \
    couch-hookd replications retry nightly && couch-hookd replications wait nightly\n\n\
    CouchDB does not look at a replication again that has failed or completed. Its document\n\
    is saved again under its revision, without the `_replication_*` fields that CouchDB put\n\
    into it; everything else stays byte for byte. One that crashes, or is in error, is tried\n\
    again by CouchDB itself (2.1 and later): nothing is saved then. Exit status 1 when\n\
    nothing was saved.")]
pub(super) struct Arguments {
    /// Its document in the replicator database
    #[arg(value_name = "DOC_ID")]
    doc_id: String,
    #[command(flatten)]
    place: Where,
    /// What was done as one JSON object
    #[arg(long)]
    json: bool,
}

/// Saves the document again.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { doc_id, place, json } = arguments;
    let look = Look::open(place)?;
    let saved = scheduler::resubmit(look.server(), &look.db, &doc_id)
        .map_err(|error| refused(&look, &doc_id, error))?;
    let Some(saved) = saved else { return Err(look.no_such(&doc_id)) };
    if json {
        let mut shown = json!(saved);
        shown["database"] = look.db.as_str().into();
        shown["doc_id"] = doc_id.as_str().into();
        out.json(&shown.to_string())?;
        return Ok(u8::from(saved.rev.is_none()));
    }
    let Some(rev) = &saved.rev else {
        let state = look.one(&doc_id)?.map(|(entry, _)| entry.row.state.to_string());
        let state = state.map(|state| format!("`{doc_id}` is {state}: ")).unwrap_or_default();
        out.line(&format!(
            "{state}nothing was saved; CouchDB put nothing into the document that keeps it from trying by itself"
        ))?;
        return Ok(1);
    };
    let was = saved.previous_state.as_ref().map(|state| format!(", which was {state}")).unwrap_or_default();
    let taken_out = saved.taken_out.join("`, `");
    out.line(&format!(
        "`{doc_id}`{was}: saved again as {rev} without `{taken_out}`; CouchDB begins it anew"
    ))?;
    Ok(0)
}

/// What CouchDB's refusal to write means here.
fn refused(look: &Look, doc_id: &str, error: Error) -> Error {
    let what = match error.kind() {
        Kind::Forbidden if !look.has_scheduler => {
            "before 2.1 nobody may change one that is triggered; delete its document and write it again"
        }
        Kind::Forbidden | Kind::Unauthorized => "only its owner and server admins may save a replication",
        Kind::Conflict => "somebody else keeps writing it; try again",
        _ => return error,
    };
    Error::new(error.kind(), format!("`{doc_id}` was not saved: {error}; {what}"))
}
