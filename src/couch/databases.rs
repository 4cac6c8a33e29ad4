//! Which databases there are, and how each is: `_all_dbs` page by page, and `_dbs_info`.
//!
//! Guarantees that the list is read to its end in pages wherever CouchDB gives pages, that nothing is skipped by a
//! database that comes or goes meanwhile, and that a database counts as gone only when CouchDB answers 404 for it alone.
//! Needs a server admin on 3.x, unless `[chttpd] admin_only_all_dbs = false`. When to look is left to the caller.

use std::collections::VecDeque;

use http::Method;
use ring::digest;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::couch::client::{Server, db_path, encoded};
use crate::couch::local_docs::is_creation_time;
use crate::couch::refusal::from_json;
use crate::error::{Context, Kind, Result};

/// Names of a page.
pub const PAGE: usize = 500;
/// Databases that `_dbs_info` is asked about at once. CouchDB takes 100 (`max_db_number_for_dbs_info_req`); with fewer
/// an answer does not keep hints waiting for long: 2.3 ms a database.
const ASKED_MAX: usize = 50;

/// How a database is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info {
    /// There is none of this name, or none any more.
    Gone,
    /// A fingerprint of what changes when the database does: when it is not one that was seen before there may be
    /// something new. Two equal ones mean the same life and the same changes. Not the other way round: on a cluster
    /// CouchDB spells one and the same state in many ways (CONTRACT §9), and up to 3.2 what others store in `_local`
    /// documents changes it, too.
    Seen(u64),
}

/// A walk over the names of all databases, CouchDB's own among them, in the order of their bytes.
///
/// 1.x knows no pages, nor does anything that ignores `limit`: there the first answer holds everything and the walk asks
/// no more. 2.x and 3.x leave design documents of `_dbs` out of a page *after* they were counted, so a short page is no
/// end: only one with nothing new is (`chttpd_misc:all_dbs_callback`).
#[derive(Debug, Default)]
pub struct Walk {
    /// Answered, not given yet.
    waiting: VecDeque<String>,
    /// The last name of the last answer.
    after: Option<String>,
    ended: bool,
}

impl Walk {
    /// The next names, at most [`PAGE`]; none at the end.
    ///
    /// # Errors
    /// As [`Server::request`]; `Forbidden` when we may not list databases. The walk can go on where it stood.
    pub fn next(&mut self, server: &Server) -> Result<Vec<String>> {
        if self.waiting.is_empty() && !self.ended {
            self.ask(server)?;
        }
        let n = self.waiting.len().min(PAGE);
        Ok(self.waiting.drain(..n).collect())
    }

    fn ask(&mut self, server: &Server) -> Result<()> {
        // From the last name on, not behind it with `skip=1`: it may be deleted by now.
        let since = self.after.as_ref().map_or_else(String::new, |after| {
            format!("&startkey={}", encoded(&serde_json::Value::from(after.as_str()).to_string()))
        });
        let limit = PAGE + 1;
        let names: Vec<String> = server.get_json(&format!("/_all_dbs?limit={limit}{since}"))?;
        let is_everything = names.len() > limit;
        let is_new = |name: &String| self.after.as_ref().is_none_or(|after| name > after);
        self.waiting = names.into_iter().filter(is_new).collect();
        self.ended = is_everything || self.waiting.is_empty();
        self.after = self.waiting.back().cloned().or(self.after.take());
        Ok(())
    }
}

/// Asks how databases are.
pub struct Looker {
    server: Server,
    /// `None`: one by one with `GET /DB`, for want of `_dbs_info` (before 2.2).
    at_once: Option<usize>,
}

impl Looker {
    /// Prepares it; sends nothing.
    pub fn new(server: &Server) -> Looker {
        Looker { server: server.clone(), at_once: Some(ASKED_MAX) }
    }

    /// Finds out whether this server has `_dbs_info`, before each walk: it may have been upgraded.
    ///
    /// # Errors
    /// As [`Server::request`].
    pub fn find_out(&mut self) -> Result<()> {
        self.at_once = match self.ask_many(&[]) {
            Ok(_) => Some(ASKED_MAX),
            // 1.x, 2.0, 2.1: taken for a database's name; what is in front of a CouchDB may say 404 or 405.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::BadRequest) => None,
            Err(error) => return Err(error),
        };
        Ok(())
    }

    /// How many databases are asked about at once; 1 where each is a request of its own.
    pub fn at_once(&self) -> usize {
        self.at_once.unwrap_or(1)
    }

    /// Whether each database is a request of its own.
    pub fn is_single(&self) -> bool {
        self.at_once.is_none()
    }

    /// How they are, in their order. One that we may not read, or that CouchDB itself cannot, is left out: whoever reads
    /// it hears why, and the others are looked at.
    ///
    /// # Errors
    /// As [`Server::request`].
    pub fn infos(&mut self, names: &[String]) -> Result<Vec<(String, Info)>> {
        let mut infos = Vec::with_capacity(names.len());
        let mut rest = names;
        while !rest.is_empty() {
            let n = self.at_once().min(rest.len());
            let (now, later) = rest.split_at(n);
            match self.at_once {
                None => infos.extend(self.ask_one(&now[0])?.map(|info| (now[0].clone(), info))),
                Some(max) => match self.ask_many(now) {
                    Ok(answered) => {
                        self.settle(now, answered, &mut infos)?;
                    }
                    // `too_many_keys`: an admin has lowered the limit.
                    Err(error) if error.kind() == Kind::BadRequest && max > 1 => {
                        self.at_once = Some(n.div_ceil(2).min(max / 2));
                        continue;
                    }
                    Err(error) => return Err(error),
                },
            }
            rest = later;
        }
        Ok(infos)
    }

    /// `_dbs_info` says `not_found` whatever went wrong (`chttpd_misc:handle_dbs_info_req`): the database itself decides.
    fn settle(
        &self,
        names: &[String],
        answered: Vec<Answered>,
        infos: &mut Vec<(String, Info)>,
    ) -> Result<()> {
        let mut answered = answered.into_iter().peekable();
        for name in names {
            let described = answered.next_if(|one| one.key == *name).and_then(|one| one.info);
            let info = match described {
                Some(described) => Some(described.fingerprint()),
                None => self.ask_one(name)?,
            };
            infos.extend(info.map(|info| (name.clone(), info)));
        }
        Ok(())
    }

    fn ask_many(&self, names: &[String]) -> Result<Vec<Answered>> {
        let body = serde_json::json!({ "keys": names }).to_string();
        let reply = self.server.request(&Method::POST, "/_dbs_info", Some(&body), &[])?;
        from_json(&reply.body).context(|| "POST /_dbs_info".to_owned())
    }

    fn ask_one(&self, name: &str) -> Result<Option<Info>> {
        match self.server.get_json::<Described>(&db_path(name, &[])) {
            Ok(described) => Ok(Some(described.fingerprint())),
            Err(error) if error.kind() == Kind::NotFound => Ok(Some(Info::Gone)),
            Err(error) if is_its_own(error.kind()) => {
                log::debug!("database `{name}` cannot be looked at: {error}");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether a fault is of one database: no rights, a file or a shard that cannot be opened, a name of before 2.0.
fn is_its_own(kind: Kind) -> bool {
    matches!(kind, Kind::Forbidden | Kind::Server | Kind::BadRequest | Kind::Malformed | Kind::TooLong)
}

/// `{"key":"orders","info":{…}}` or `{"key":"orders","error":"not_found"}`
#[derive(Deserialize)]
struct Answered {
    key: String,
    info: Option<Described>,
}

/// What `GET /DB` says.
#[derive(Deserialize)]
struct Described {
    update_seq: Option<Box<RawValue>>,
    doc_count: Option<Box<RawValue>>,
    doc_del_count: Option<Box<RawValue>>,
    instance_start_time: Option<serde_json::Value>,
    sizes: Option<Sizes>,
    /// Before 2.0; from 1.2 on.
    data_size: Option<Box<RawValue>>,
    /// Of the file; before 1.2 there is nothing else.
    disk_size: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Sizes {
    active: Option<Box<RawValue>>,
}

impl Described {
    /// First 8 bytes of SHA-256 over what changes with the database, and what tells its lives apart. From 3.3 on that is
    /// its time of creation, and `update_seq` itself, which holds ids of the shards' files. Before, one that was deleted
    /// and made again with the same documents has the same `update_seq` and the same counts (seen on 1.7.1 and 2.3.1);
    /// but the old one held our mark, a `_local` document, which the bytes in use tell. (Time of opening will not do:
    /// 1.x keeps 100 databases open, so that it would change with every walk over more of them.) A 1.x that was killed gives
    /// the numbers of the changes that it lost to others: `update_seq` and counts come back, but not the length of its file,
    /// which only compaction makes shorter (seen).
    fn fingerprint(&self) -> Info {
        let created = self.instance_start_time.as_ref().and_then(serde_json::Value::as_str);
        let created = created.filter(|time| is_creation_time(time));
        let active = self.sizes.as_ref().and_then(|sizes| sizes.active.as_ref());
        let bytes = active.or(self.data_size.as_ref()).or(self.disk_size.as_ref());
        let file = self.disk_size.as_ref().filter(|_| self.sizes.is_none());
        let of = (
            &self.update_seq,
            &self.doc_count,
            &self.doc_del_count,
            created,
            bytes.filter(|_| created.is_none()),
            file,
        );
        let json = serde_json::to_vec(&of).expect("JSON is made of JSON");
        let hash = digest::digest(&digest::SHA256, &json);
        Info::Seen(u64::from_be_bytes(hash.as_ref()[..8].try_into().expect("SHA-256 has 32 bytes")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::couch::scripted::{Scripted, send};

    /// Walks over what a server gives for `limit` and `startkey`; the pages' sizes, the names, the number of requests.
    fn walk(
        answer: impl Fn(usize, Option<String>) -> Vec<String> + Send + Sync + 'static,
    ) -> (Vec<usize>, Vec<String>) {
        let server = Scripted::start(move |request, stream| {
            let query = request.path.split_once('?').unwrap().1;
            let value = |name: &str| {
                query.split('&').find_map(|part| part.strip_prefix(&format!("{name}="))).map(|text| {
                    percent_encoding::percent_decode_str(text).decode_utf8().unwrap().into_owned()
                })
            };
            let since = value("startkey").map(|text| serde_json::from_str(&text).unwrap());
            let names = answer(value("limit").unwrap().parse().unwrap(), since);
            send(stream, 200, &Value::from(names).to_string());
        });
        let (server, mut walk) = (server.server(None), Walk::default());
        let (mut sizes, mut names) = (Vec::new(), Vec::new());
        loop {
            let page = walk.next(&server).unwrap();
            sizes.push(page.len());
            if page.is_empty() {
                return (sizes, names);
            }
            names.extend(page);
        }
    }

    fn all(n: usize) -> Vec<String> {
        (0..n).map(|n| format!("db{n:05}")).collect()
    }

    #[test]
    fn pages_hold_every_name_once() {
        for n in [0, 1, 499, 500, 501, 502, 1_001, 1_250] {
            let (sizes, names) = walk(move |limit, since| {
                let since = since.unwrap_or_default();
                all(n).into_iter().filter(|name| *name >= since).take(limit).collect()
            });
            assert_eq!(names, all(n), "{n}");
            assert!(sizes.iter().all(|size| *size <= PAGE), "{sizes:?}");
        }
    }

    #[test]
    fn a_server_without_pages_is_asked_once() {
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = std::sync::Arc::clone(&asked);
        let (_, names) = walk(move |_, _| {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            all(1_000)
        });
        assert_eq!((names, asked.load(std::sync::atomic::Ordering::SeqCst)), (all(1_000), 1));
        let (_, few) = walk(|_, _| all(7));
        assert_eq!(few, all(7));
    }

    #[test]
    fn short_pages_and_deletions_in_between_skip_nothing() {
        // A design document of `_dbs` took a place in each page, and the name that the next page begins at is gone.
        let (_, names) = walk(|limit, since| {
            let since = since.unwrap_or_default();
            let rest = all(1_250).into_iter().filter(|name| *name > since || since.is_empty());
            rest.take(limit - 1).collect()
        });
        assert_eq!(names, all(1_250));
    }
}
