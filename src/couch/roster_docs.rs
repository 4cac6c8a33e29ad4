//! What is known of the databases that a webhook finds by pattern, in `_local` documents of `state_db`.
//!
//! `_local/couch-hookd.databases.NAME.2f`, one for each of [`BUCKETS`]:
//! `{"databases":{"tenant-9":["5f0c…","00c0ffee00c0ffee"]}}`, of each database its mark and the fingerprints of states
//! that hold nothing new. They die with `state_db`, wake nobody and have no history. Losing one costs a look at each of
//! its databases, never a change: a database that is not known, or whose fingerprint is not, is read from its checkpoint.

use std::collections::BTreeMap;

use http::Method;
use serde::{Deserialize, Serialize};

use crate::couch::client::{Server, Written, db_path};
use crate::couch::refusal::from_json;
use crate::couch::state_db::found;
use crate::error::{Context, Kind, Result};
use crate::pure::checkpoint::Mark;
use crate::pure::roster::{BUCKETS, Entry};

#[derive(Serialize, Deserialize)]
struct Document {
    #[serde(rename = "_rev", skip_serializing_if = "Option::is_none")]
    rev: Option<String>,
    databases: BTreeMap<String, Vec<String>>,
}

/// What is known of databases, by name.
pub type Entries = Vec<(String, Entry)>;
/// Revisions to write buckets with.
pub type Revs = BTreeMap<u8, String>;

/// What is stored, of all buckets, and the revisions to write them with.
///
/// # Errors
/// As [`Server::request`]; a document that is not ours counts as empty.
pub fn read_all(server: &Server, state_db: &str, webhook: &str) -> Result<(Entries, Revs)> {
    let (mut entries, mut revs) = (Vec::new(), BTreeMap::new());
    for bucket in 0..BUCKETS {
        let bucket = u8::try_from(bucket).expect("there are 256");
        if let Some(document) = read(server, state_db, webhook, bucket)? {
            entries.extend(document.databases.into_iter().map(|(name, texts)| (name, entry(&texts))));
            revs.extend(document.rev.map(|rev| (bucket, rev)));
        }
    }
    Ok((entries, revs))
}

/// Stores one bucket over the revision given, or over what is there; gives the new one.
///
/// # Errors
/// As [`Server::request`].
pub fn write(
    server: &Server,
    state_db: &str,
    webhook: &str,
    bucket: u8,
    entries: &[(String, Entry)],
    rev: Option<&str>,
) -> Result<String> {
    let databases = entries.iter().map(|(name, entry)| (name.clone(), texts(entry))).collect();
    let mut document = Document { rev: rev.map(str::to_owned), databases };
    match put(server, state_db, webhook, bucket, &document) {
        Err(error) if error.kind() == Kind::Conflict => {
            document.rev = read(server, state_db, webhook, bucket)?.and_then(|stored| stored.rev);
            put(server, state_db, webhook, bucket, &document)
        }
        result => result,
    }
}

/// Stores one bucket that others write, too: what it holds of databases that this one `keeps` stays.
///
/// # Errors
/// As [`Server::request`].
pub fn merge(
    server: &Server,
    state_db: &str,
    webhook: &str,
    bucket: u8,
    entries: &[(String, Entry)],
    keeps: impl Fn(&str) -> bool,
) -> Result<String> {
    let stored = read(server, state_db, webhook, bucket)?;
    let (rev, theirs) = stored.map_or_else(Default::default, |stored| (stored.rev, stored.databases));
    let theirs = theirs.into_iter().filter(|(db, _)| keeps(db)).map(|(db, texts)| (db, entry(&texts)));
    let all: Entries = theirs.chain(entries.iter().cloned()).collect();
    write(server, state_db, webhook, bucket, &all, rev.as_deref())
}

fn put(server: &Server, state_db: &str, webhook: &str, bucket: u8, document: &Document) -> Result<String> {
    let path = path(state_db, webhook, bucket);
    let body = serde_json::to_string(document).expect("texts are always JSON");
    let reply = server.request(&Method::PUT, &path, Some(&body), &[])?;
    let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
    Ok(written.rev)
}

fn read(server: &Server, state_db: &str, webhook: &str, bucket: u8) -> Result<Option<Document>> {
    let path = path(state_db, webhook, bucket);
    let Some(body) = found(server.request(&Method::GET, &path, None, &[]))? else { return Ok(None) };
    // Somebody else's is written over: what it says is no use.
    let nothing =
        || Document { rev: from_json::<Rev>(&body).ok().map(|rev| rev.rev), databases: BTreeMap::new() };
    Ok(Some(serde_json::from_slice(&body).unwrap_or_else(|_| nothing())))
}

#[derive(Deserialize)]
struct Rev {
    #[serde(rename = "_rev")]
    rev: String,
}

fn path(state_db: &str, webhook: &str, bucket: u8) -> String {
    db_path(state_db, &["_local", &format!("couch-hookd.databases.{webhook}.{bucket:02x}")])
}

fn texts(entry: &Entry) -> Vec<String> {
    let mark = entry.mark.map(|mark| mark.to_string()).unwrap_or_default();
    let clean = entry.clean.iter().map(|fingerprint| format!("{fingerprint:016x}"));
    std::iter::once(mark).chain(clean).collect()
}

fn entry(texts: &[String]) -> Entry {
    let mark = texts.first().and_then(|mark| Mark::parse(mark));
    let clean = texts.iter().skip(1).filter_map(|text| u64::from_str_radix(text, 16).ok());
    Entry { mark, clean: clean.collect() }
}
