//! What can go wrong with a CouchDB, to be switched on while the stand-in runs.
//!
//! The feed of `couch_hookd`, where the daemon follows requests all the time, is spared: a test that lets the next
//! feed fail means one of a watched database.

use std::time::Duration;

use crate::standin::http::Request;

/// Its feed is spared.
pub(crate) const SPARED: &str = "couch_hookd";

/// Misbehaviour, all of it off by default. Numbers say "the next so many" and count down.
#[derive(Debug, Clone, Default)]
pub struct Quirks {
    /// `last_seq` of a full filtered page lies behind this many matching rows that were not given (seen on 2.2.0
    /// and 3.5.0, `HOLES` 1). 1.x with `_doc_ids` jumps to the end without it, as the real one.
    pub last_seq_skips: usize,
    /// A continuous or long-poll feed whose filter drops everything does not end at its timeout while others
    /// write: an empty line at each write on 2.x and 3.x, nothing on 1.x (seen on all three).
    pub filtered_feeds_never_end: bool,
    /// Feeds are cut after this many bytes of body.
    pub cut_feeds_after: Option<usize>,
    /// Answers to make instead of the right ones, the first that fits a request is taken.
    pub faults: Vec<Fault>,
    /// All rows but every so-manieth have `"seq":null`, as with `seq_interval`.
    pub seq_every: Option<u64>,
    /// Writing a document whose id begins with `msg_` is refused: 403.
    pub refuse_dead_letters: bool,
    /// The next so many reads of `_local` documents that have an earlier version give that, as a lagging copy of
    /// a cluster does; one that has only one version is not found.
    pub old_locals: u32,
    /// The next so many feeds begin at the beginning, whatever `since` says, as after a lost shard copy.
    pub rewinds: u32,
    /// The next so many rows have `"doc":null` where documents are asked for.
    pub null_docs: u32,
    /// The next so many feeds from anywhere but the beginning are refused: not a position of this server.
    pub unknown_seqs: u32,
    /// Every answer comes this much later.
    pub slow: Option<Duration>,
    /// A feed stays open and silent when its database is deleted, as pouchdb-server's.
    pub feeds_outlive_database: bool,
    /// `instance_start_time` is `"0"`, as on 2.0 to 3.2.
    pub no_creation_time: bool,
    /// Every so-manieth `_scheduler/docs` is answered with CouchDB's 500.
    pub scheduler_fails_every: Option<u64>,
    /// Pages of `_scheduler/docs` but the first begin up to this many rows before or after the right one, as when
    /// documents come and go between two pages.
    pub scheduler_shift_max: usize,
    /// Every so-manieth row is missing from `_scheduler/docs`.
    pub scheduler_row_lost_every: Option<u64>,
    /// Nodes of the cluster beside the one that answers. With one or more an idle database's `update_seq` is spelled in
    /// one of six ways at each call (CONTRACT §9).
    pub n_other_nodes: usize,
    /// `_db_updates` is open and gives signs of life, but no lines.
    pub drop_updates: bool,
    /// On 1.x a database that is looked at was closed meanwhile, as with more of them than `max_dbs_open`: its
    /// `instance_start_time` is another one each time. But of our own one, which is followed.
    pub closes_idle: bool,
    /// There is no `_dbs_info`, as on 2.0 and 2.1.
    pub no_dbs_info: bool,
    /// `_dbs_info` takes so many names (`max_db_number_for_dbs_info_req`); 100 by default.
    pub dbs_info_max: Option<usize>,
}

/// An answer to make instead of the right one.
#[derive(Debug, Clone)]
pub struct Fault {
    /// A part of `METHOD /path?name=value&…`, the path percent-encoded, the query not: `PUT /orders/`, `_changes`.
    pub request: String,
    /// How many times.
    pub times: u32,
    /// What to do.
    pub kind: FaultKind,
}

/// What a [`Fault`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// A proxy's page instead of JSON, with this status.
    Html(u16),
    /// This status and CouchDB's kind of body: `{"error":"unknown_error","reason":"made by a fault"}`.
    Status(u16),
    /// 200 and these bytes, a whole body.
    Body(&'static [u8]),
    /// The connection is closed without an answer.
    Cut,
    /// No answer at all, until the peer goes or the server stops.
    Hang,
    /// It is done this much later, or not at all when the server stops before.
    Late(Duration),
    /// It is done, but the connection is closed before the answer.
    CutAfterDoing,
}

impl Quirks {
    /// Takes the fault for a request, if there is one, and counts it down.
    pub(crate) fn take_fault(&mut self, request: &Request) -> Option<FaultKind> {
        let spared = request.path.starts_with(&format!("/{SPARED}/_changes"));
        if self.faults.is_empty() || spared {
            return None;
        }
        let query: Vec<String> =
            request.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let line = format!("{} {}?{}", request.method, request.path, query.join("&"));
        let fault = self.faults.iter_mut().find(|fault| fault.times > 0 && line.contains(&fault.request))?;
        fault.times -= 1;
        Some(fault.kind)
    }
}

/// Takes one off a counter; whether there was one.
pub(crate) fn take_one(counter: &mut u32) -> bool {
    let there = *counter > 0;
    *counter = counter.saturating_sub(1);
    there
}
