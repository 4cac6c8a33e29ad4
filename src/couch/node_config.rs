//! CouchDB's own configuration, read over HTTP from one node: `/_node/NAME/_config`, on 1.x `/_config`.
//!
//! Guarantees that all readings come from the node that answered first (or was named), so that a load balancer does
//! not make webhooks come and go, and that only sections that concern us are kept: the rest holds password hashes.
//! When to read, and what the sections mean, is left to others.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::config;
use crate::couch::client::{Generation, Server, encoded};
use crate::error::{Context, Error, Kind, Result};

/// Values by section and key, as CouchDB has them: `{"hookd":{"username":"hookd"}}`.
pub type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// One node's configuration. Reading needs a server admin.
pub struct NodeConfig {
    server: Server,
    /// Named, or the one that answered first.
    node: Option<String>,
}

impl NodeConfig {
    /// Prepares; sends nothing. Without a `node` the first one that answers is taken.
    pub fn new(server: Server, node: Option<String>) -> NodeConfig {
        NodeConfig { server, node }
    }

    /// The node that is asked, once that is known; never on 1.x.
    pub fn node(&self) -> Option<&str> {
        self.node.as_deref()
    }

    /// Our sections as they are now.
    ///
    /// `[chttpd]` and `[httpd]` are left out: whoever reads this has a URL that answers, and what the server calls
    /// its own address may be another one outside its container.
    ///
    /// # Errors
    /// `Forbidden` when the login is no server admin's. `Config` on 2.x with several nodes and none named, because
    /// they cannot be told apart there. Else as [`Server::get_json`].
    pub fn read(&mut self) -> Result<Sections> {
        let path = match self.server.welcome()?.generation {
            Generation::One => "/_config".to_owned(),
            _ => format!("/_node/{}/_config", encoded(&self.pinned()?)),
        };
        let mut sections: Sections = self.server.get_json(&path).context(|| match &self.node {
            Some(node) => format!("failed to read the configuration of node `{node}`"),
            None => "failed to read the server's configuration".to_owned(),
        })?;
        sections.retain(|section, _| config::is_ours(section));
        Ok(sections)
    }

    /// The node's name, found out the first time. CouchDB 2.x has no `/_node/_local` that says it.
    fn pinned(&mut self) -> Result<String> {
        #[derive(Deserialize)]
        struct Name {
            name: String,
        }
        #[derive(Deserialize)]
        struct Membership {
            cluster_nodes: Vec<String>,
        }
        if let Some(node) = &self.node {
            return Ok(node.clone());
        }
        let found = match self.server.get_json::<Name>("/_node/_local") {
            Ok(Name { name }) => name,
            Err(error) if matches!(error.kind(), Kind::BadRequest | Kind::NotFound) => {
                let Membership { cluster_nodes } = self.server.get_json("/_membership")?;
                match <[String; 1]>::try_from(cluster_nodes) {
                    Ok([only]) => only,
                    Err(nodes) => {
                        let text = format!(
                            "expected --node with one of `{}`: before 3.0 CouchDB does not say which one answers",
                            nodes.join("`, `")
                        );
                        return Err(Error::new(Kind::Config, text));
                    }
                }
            }
            Err(error) => return Err(error),
        };
        Ok(self.node.insert(found).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::couch::scripted::{Scripted, send};

    /// What is read, and the paths that were asked for.
    #[track_caller]
    fn check(answers: &'static [(&str, u16, &str)], expected: &str, asked: &str) {
        let scripted = Scripted::start(move |seen, stream| {
            let (_, status, body) =
                answers.iter().find(|(path, ..)| *path == seen.path).expect("a path with an answer");
            send(stream, *status, body);
        });
        let mut node_config = NodeConfig::new(scripted.server(None), None);
        let mut found = Vec::new();
        for _ in 0..2 {
            found.push(node_config.read().map_or_else(|error| error.to_string(), |read| format!("{read:?}")));
        }
        assert_eq!(found[0], found[1]);
        assert_eq!(found[0], expected);
        let paths = scripted.seen().into_iter().map(|seen| seen.path).filter(|path| path != "/");
        assert_eq!(paths.collect::<Vec<_>>().join(" "), asked);
    }

    const OURS: &str = r#"{"admins":{"a":"-pbkdf2-x"},"chttpd":{"port":"1"},"hookd":{"log_level":"debug"}}"#;
    const READ: &str = r#"{"hookd": {"log_level": "debug"}}"#;

    #[test]
    fn the_node_that_answers_first_is_asked_from_then_on() {
        check(
            &[
                ("/", 200, r#"{"version":"3.5.0"}"#),
                ("/_node/_local", 200, r#"{"name":"a@h"}"#),
                ("/_node/a%40h/_config", 200, OURS),
            ],
            READ,
            "/_node/_local /_node/a%40h/_config /_node/a%40h/_config",
        );
    }

    #[test]
    fn before_3_the_only_node_is_taken_and_of_several_one_must_be_named() {
        const INCOMPLETE: &str = r#"{"error":"bad_request","reason":"Incomplete path to _node request"}"#;
        check(
            &[
                ("/", 200, r#"{"version":"2.3.1"}"#),
                ("/_node/_local", 400, INCOMPLETE),
                ("/_membership", 200, r#"{"cluster_nodes":["a@h"]}"#),
                ("/_node/a%40h/_config", 200, OURS),
            ],
            READ,
            "/_node/_local /_membership /_node/a%40h/_config /_node/a%40h/_config",
        );
        check(
            &[
                ("/", 200, r#"{"version":"2.3.1"}"#),
                ("/_node/_local", 400, INCOMPLETE),
                ("/_membership", 200, r#"{"cluster_nodes":["a@h","b@h"]}"#),
            ],
            "expected --node with one of `a@h`, `b@h`: before 3.0 CouchDB does not say which one answers",
            "/_node/_local /_membership /_node/_local /_membership",
        );
    }

    #[test]
    fn old_servers_have_no_nodes() {
        check(&[("/", 200, r#"{"version":"1.7.1"}"#), ("/_config", 200, OURS)], READ, "/_config /_config");
    }
}
