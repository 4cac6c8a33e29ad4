//! Which databases there are: `_all_dbs`, page by page.
//!
//! Guarantees that the list is read to its end in pages of [`PAGE`] names wherever CouchDB gives pages, and that nothing
//! is skipped by a database that comes or goes meanwhile. Needs a server admin on 3.x, unless
//! `[chttpd] admin_only_all_dbs = false`.

use std::collections::VecDeque;

use crate::couch::client::{Server, encoded};
use crate::error::Result;

/// Databases of a page, and databases that are asked about at once: CouchDB's own limit for `_dbs_info`.
pub const PAGE: usize = 100;

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
        for n in [0, 1, 99, 100, 101, 102, 201, 250] {
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
            let rest = all(250).into_iter().filter(|name| *name > since || since.is_empty());
            rest.take(limit - 1).collect()
        });
        assert_eq!(names, all(250));
    }
}
