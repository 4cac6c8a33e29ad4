//! Every key that counts for a webhook, its value in force, and where that comes from.
//!
//! Guarantees that no secret is among the values: passwords, headers and tokens are `set`, signing secrets have a
//! fingerprint, URLs are shown without what may be secret in them.

use crate::cli::common::Setup;
use crate::config::finding::Value;
use crate::config::keys::{self, KEYS, Key, Kind, Section};
use crate::config::{OF_CHANGES, OF_REPLICATIONS, Webhook, couchdb_url_from};
use crate::pure::message::Watch;
use crate::pure::secret::fingerprint;
use crate::pure::url;

/// One line of the table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// `[hookd]`
    pub(crate) section: String,
    /// `timeout`
    pub(crate) key: String,
    /// As one would write it; `set` in place of a secret, `-` where nothing holds.
    pub(crate) value: String,
    /// `/etc/couch-hookd/hookd.ini:12`, `--set`, `default`, …
    pub(crate) origin: String,
}

/// The webhook's line in the list, its own section, then `[hookd]`, in the order of the reference.
pub(crate) fn of(setup: &Setup, webhook: &Webhook) -> Vec<Setting> {
    let own = format!("hookd.webhook.{}", webhook.name);
    let mut all = Vec::new();
    if let Some(value) = setup.raw.value("hookd.webhooks", &webhook.name) {
        all.push(Setting {
            section: "[hookd.webhooks]".to_owned(),
            key: webhook.name.clone(),
            value: url::shown(value.text.expose().trim()),
            origin: value.origin.to_string(),
        });
    }
    for key in KEYS.iter().filter(|key| key.section == Section::Webhook) {
        if key.name == "header.*" {
            all.extend(headers(setup, &own));
            continue;
        }
        let value = setup.raw.value(&own, key.name);
        if value.is_some() || has_meaning(webhook, key) {
            all.push(setting(key, &own, value, || inherited(setup, webhook, key)));
        }
    }
    for key in KEYS.iter().filter(|key| key.section == Section::Hookd) {
        all.push(setting(key, "hookd", setup.raw.value("hookd", key.name), || {
            inherited(setup, webhook, key)
        }));
    }
    all
}

/// Whether a key counts for what the webhook watches.
fn has_meaning(webhook: &Webhook, key: &Key) -> bool {
    match webhook.watch {
        Watch::Replications => !OF_CHANGES.contains(&key.name),
        Watch::Daemon | Watch::Databases => {
            !OF_CHANGES.contains(&key.name) && !OF_REPLICATIONS.contains(&key.name)
        }
        Watch::Changes => !OF_REPLICATIONS.contains(&key.name),
    }
}

fn setting(
    key: &Key,
    section: &str,
    value: Option<&Value>,
    without: impl FnOnce() -> (String, String),
) -> Setting {
    let (value, origin) = match value {
        Some(value) => (shown(key, value.text.expose().trim()), value.origin.to_string()),
        None => without(),
    };
    Setting { section: format!("[{section}]"), key: key.name.to_owned(), value, origin }
}

/// What holds without the key, and why.
fn inherited(setup: &Setup, webhook: &Webhook, key: &Key) -> (String, String) {
    let default = || "default".to_owned();
    match (key.section, key.name) {
        (Section::Webhook, "db") if webhook.watch == Watch::Daemon => {
            (webhook.db.join(", "), "state_db".to_owned())
        }
        (Section::Webhook, "db") if webhook.watch == Watch::Databases => (webhook.databases(), default()),
        (Section::Webhook, "db") if webhook.watch == Watch::Replications => {
            (webhook.db.join(", "), default())
        }
        (Section::Webhook, "db") => (webhook.db.join(", "), "the webhook's name".to_owned()),
        (Section::Webhook, "events") if webhook.watch != Watch::Changes => {
            (webhook.events.join(", "), default())
        }
        (Section::Webhook, "endpoint_guard" | "endpoint_allow" | "endpoint_deny") => {
            let common = keys::find(Section::Hookd, key.name).expect("the table has both");
            let common = setting(common, "hookd", setup.raw.value("hookd", key.name), || {
                inherited(setup, webhook, common)
            });
            (common.value, "[hookd]".to_owned())
        }
        (Section::Hookd, "couchdb_url") => {
            let origin = match couchdb_url_from(&setup.raw) {
                Some(_) => "[chttpd] or [httpd]".to_owned(),
                None => default(),
            };
            (setup.config.hookd.couchdb_url.clone(), origin)
        }
        _ => (key.default.unwrap_or("-").to_owned(), default()),
    }
}

fn headers(setup: &Setup, own: &str) -> Vec<Setting> {
    let Some(section) = setup.raw.sections.get(own) else { return Vec::new() };
    let headers = section.iter().filter(|(key, _)| key.starts_with("header."));
    headers
        .map(|(key, value)| Setting {
            section: format!("[{own}]"),
            key: key.clone(),
            value: "set".to_owned(),
            origin: value.origin.to_string(),
        })
        .collect()
}

/// A value as it may be shown.
fn shown(key: &Key, text: &str) -> String {
    match key.kind {
        Kind::Secret => "set".to_owned(),
        Kind::SigningSecrets => {
            let secrets = text.split([',', ' ', '\t', '\n', '\r']).filter(|part| !part.is_empty());
            format!("set ({})", secrets.map(fingerprint).collect::<Vec<_>>().join(", "))
        }
        Kind::Url => url::Url::parse(text).map_or_else(|_| "set".to_owned(), |url| url.base()),
        _ => text.to_owned(),
    }
}
