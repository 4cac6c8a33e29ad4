//! Texts of the ini files turned into values, one function per kind of value.
//!
//! An error says what was expected and what was found, and what to write where that is known. It shows no
//! more of the text than [`shown`] lets through.

use std::time::Duration;

use serde_json::Value as Json;

use crate::config::keys;
use crate::pure::about;
use crate::pure::conflict::{CONFLICTED, RESOLVED};
use crate::pure::database_events;
use crate::pure::guard::Network;
use crate::pure::message::{DELETED, UPDATED};
use crate::pure::pattern::{is_pattern, is_system_database};
use crate::pure::rate::RateLimit;
use crate::pure::signature::Key;
use crate::pure::transitions;

/// As much of a text as an error may show: 40 characters, and none of one that looks like a secret put into
/// the wrong key.
pub(crate) fn shown(text: &str) -> String {
    if text.contains("whsec_") || text.contains('@') || text.contains("://") {
        return "***".to_owned();
    }
    let cut: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().count() > 40 { format!("{cut}...") } else { cut }
}

/// The parts of a list, trimmed, without empty ones.
pub(crate) fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// `true`, `on`, `false`, `off`.
pub(crate) fn flag(text: &str) -> Result<bool, String> {
    match text {
        "true" | "on" => Ok(true),
        "false" | "off" => Ok(false),
        _ => Err(format!("expected `true` or `false`, got `{}`", shown(text))),
    }
}

/// `500ms`, `5s`, `2m`, `1h`.
pub(crate) fn duration(text: &str, min: Duration, max: Duration) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let ms_per_unit = match unit.trim_start() {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "" if digits > 0 => return Err(bare_number(number, min, max)),
        _ => {
            return Err(format!(
                "expected a duration such as `500ms`, `5s`, `2m` or `1h`, got `{}`",
                shown(text)
            ));
        }
    };
    let number: Option<u64> = number.parse().ok();
    let Some(ms) = number.and_then(|number| number.checked_mul(ms_per_unit)) else {
        return Err(format!(
            "expected a duration such as `500ms`, `5s`, `2m` or `1h`, got `{}`",
            shown(text)
        ));
    };
    let duration = Duration::from_millis(ms);
    if duration < min || duration > max {
        let (min, max) = (keys::short(min), keys::short(max));
        return Err(format!("expected a duration from `{min}` to `{max}`, got `{}`", shown(text)));
    }
    Ok(duration)
}

/// A number without unit: which units would do.
fn bare_number(number: &str, min: Duration, max: Duration) -> String {
    let fits = |ms_per_unit: u64| {
        let ms = number.parse().ok().and_then(|number: u64| number.checked_mul(ms_per_unit));
        ms.is_some_and(|ms| (min..=max).contains(&Duration::from_millis(ms)))
    };
    let units = [("s", 1000), ("ms", 1), ("m", 60_000)].into_iter().filter(|(_, ms)| fits(*ms)).take(2);
    let write: Vec<String> = units.map(|(unit, _)| format!("`{number}{unit}`")).collect();
    if write.is_empty() {
        let (min, max) = (keys::short(min), keys::short(max));
        return format!(
            "expected a duration with its unit, from `{min}` to `{max}`, got `{}`",
            shown(number)
        );
    }
    format!("expected a duration with its unit, got `{number}`; write {}", write.join(" or "))
}

/// The most steps of a `retry_schedule`.
const STEPS_MAX: usize = 32;

/// Durations, separated by commas; at least one.
pub(crate) fn durations(text: &str, min: Duration, max: Duration) -> Result<Vec<Duration>, String> {
    let expected = "expected durations such as `5s` or `2m`, separated by commas";
    let mut all = Vec::new();
    for part in text.split(',') {
        let step = duration(part.trim(), min, max).map_err(|why| {
            let why = why.split_once("got ").map_or(why.as_str(), |(_, got)| got);
            match part.trim() {
                "" => format!("{expected}, got nothing between two commas"),
                _ if why.contains("; write") => format!("{expected}, got {why}"),
                _ => format!(
                    "{expected}, each from `{}` to `{}`, got {why}",
                    keys::short(min),
                    keys::short(max)
                ),
            }
        })?;
        all.push(step);
    }
    if all.len() > STEPS_MAX {
        return Err(format!("expected at most {STEPS_MAX} durations, got {}", all.len()));
    }
    Ok(all)
}

/// A whole number.
pub(crate) fn count(text: &str, min: u64, max: u64) -> Result<u64, String> {
    match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!("expected a number from {min} to {max}, got `{}`", shown(text))),
    }
}

/// `512B`, `64KiB`, `1MiB`.
pub(crate) fn size(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let expected = "expected a size such as `64KiB` or `1MiB`";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let bytes_per_unit: u64 = match unit.trim_start() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "" if digits > 0 => {
            let write = number
                .parse()
                .map_or_else(|_| "with `B`".to_owned(), |n| format!("`{}`", keys::short_size(n)));
            return Err(format!("{expected}, got `{}`; write {write}", shown(text)));
        }
        "KB" | "kB" | "K" | "k" if digits > 0 => {
            return Err(format!("{expected}, got `{}`; write `{}KiB`", shown(text), shown(number)));
        }
        "MB" | "M" if digits > 0 => {
            return Err(format!("{expected}, got `{}`; write `{}MiB`", shown(text), shown(number)));
        }
        _ => return Err(format!("{expected}, got `{}`", shown(text))),
    };
    let bytes = number.parse().ok().and_then(|number: u64| number.checked_mul(bytes_per_unit));
    match bytes {
        Some(bytes) if (min..=max).contains(&bytes) => Ok(bytes),
        _ => {
            let (min, max) = (keys::short_size(min), keys::short_size(max));
            Err(format!("expected a size from `{min}` to `{max}`, got `{}`", shown(text)))
        }
    }
}

/// The most attempts that a `rate_limit` may name.
const RATE_MAX: u32 = 1_000_000;

/// `3, 10m`: how often, after how long; `off` is never.
pub(crate) fn retries(text: &str) -> Result<Option<(u32, Duration)>, String> {
    if text == "off" {
        return Ok(None);
    }
    let [n, after] = list(text).collect::<Vec<_>>()[..] else {
        return Err(format!(
            "expected `off`, or how often and after how long, such as `3, 10m`, got `{}`",
            shown(text)
        ));
    };
    let n = u32::try_from(count(n, 1, 1_000)?).expect("at most 1,000");
    Ok(Some((n, duration(after, Duration::from_secs(1), Duration::from_secs(24 * 3600))?)))
}

/// `10/s`, `100/m`, `1000/h`; `off` is none.
pub(crate) fn rate_limit(text: &str) -> Result<Option<RateLimit>, String> {
    if text == "off" {
        return Ok(None);
    }
    let expected = "expected `off` or a rate such as `10/s`, `100/m` or `1000/h`";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "/s" => 1,
        "/m" => 60,
        "/h" => 3600,
        "" if digits > 0 => {
            let number = shown(number);
            return Err(format!("{expected}, got `{number}`; write `{number}/s` or `{number}/m`"));
        }
        _ => return Err(format!("{expected}, got `{}`", shown(text))),
    };
    match number.parse() {
        Ok(n) if (1..=RATE_MAX).contains(&n) => Ok(Some(RateLimit { n, per: Duration::from_secs(seconds) })),
        _ => Err(format!("expected a rate from 1 to {RATE_MAX}, got `{}`", shown(text))),
    }
}

/// One of `words`; those of `later` are answered with that they are not available yet.
pub(crate) fn word(text: &str, words: &[&'static str], later: &[&str]) -> Result<&'static str, String> {
    if let Some(word) = words.iter().find(|word| **word == text) {
        return Ok(word);
    }
    let expected = words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" or ");
    if later.contains(&text) {
        return Err(format!("`{text}` is not available in this version; expected {expected}"));
    }
    Err(format!("expected {expected}, got `{}`", shown(text)))
}

/// HTTP statuses of refusals, separated by commas; `off` for none.
pub(crate) fn statuses(text: &str) -> Result<Vec<u16>, String> {
    if text == "off" {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for part in list(text) {
        match part.parse::<u16>() {
            Ok(410) => return Err("410 always pauses the webhook; leave it out".to_owned()),
            Ok(status) if (400..=599).contains(&status) && !all.contains(&status) => all.push(status),
            Ok(status) if (400..=599).contains(&status) => {}
            _ => {
                let part = shown(part);
                return Err(format!(
                    "expected statuses from 400 to 599, separated by commas, or `off`, got `{part}`"
                ));
            }
        }
    }
    if all.is_empty() {
        Err("expected statuses, separated by commas, or `off`, got none".to_owned())
    } else {
        Ok(all)
    }
}

/// Networks, separated by commas.
pub(crate) fn networks(text: &str) -> Result<Vec<Network>, String> {
    let parse = |part: &str| Network::parse(part).map_err(|why| format!("{why}, got `{}`", shown(part)));
    let all = list(text).map(parse).collect::<Result<Vec<_>, _>>()?;
    match all.is_empty() {
        true => Err("expected networks, separated by commas, got none".to_owned()),
        false => Ok(all),
    }
}

/// What a webhook on changes can be told.
const EVENT_TYPES: [&str; 4] = [UPDATED, DELETED, CONFLICTED, RESOLVED];

/// Event types and patterns of them, separated by commas. Each must match something.
pub(crate) fn events(text: &str) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for part in list(text) {
        if part == "document.created" {
            return Err("there is no `document.created`: CouchDB cannot know whether a document is new; \
                        write `document.updated`"
                .to_owned());
        }
        if !EVENT_TYPES.iter().any(|event_type| matches_pattern(part, event_type)) {
            return Err(format!(
                "expected `document.updated`, `document.deleted`, `document.conflicted`, `document.resolved` or a pattern such as `document.*`, got `{}`",
                shown(part)
            ));
        }
        all.push(part.to_owned());
    }
    if all.is_empty() {
        Err("expected event types, separated by commas, got none".to_owned())
    } else {
        Ok(all)
    }
}

/// Types of events about ourselves and patterns of them, separated by commas. Each must match something.
pub(crate) fn daemon_events(text: &str) -> Result<Vec<String>, String> {
    let expected =
        "types such as `webhook.failing`, `feed.lost`, `daemon.started` or a pattern such as `webhook.*`";
    events_of(&about::TYPES, expected, text)
}

/// Likewise of replications.
pub(crate) fn replication_events(text: &str) -> Result<Vec<String>, String> {
    let expected =
        "types such as `replication.failed`, `replication.recovered` or a pattern such as `replication.*`";
    events_of(&transitions::TYPES, expected, text)
}

/// Likewise of databases.
pub(crate) fn database_events(text: &str) -> Result<Vec<String>, String> {
    let expected = "types such as `database.created`, `database.deleted` or a pattern such as `database.*`";
    events_of(&database_events::TYPES, expected, text)
}

fn events_of(types: &[&str], expected: &str, text: &str) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for part in list(text) {
        if !types.iter().any(|event_type| matches_pattern(part, event_type)) {
            return Err(format!("expected {expected}, got `{}`", shown(part)));
        }
        all.push(part.to_owned());
    }
    if all.is_empty() {
        Err("expected event types, separated by commas, got none".to_owned())
    } else {
        Ok(all)
    }
}

/// Whether `pattern`, in which `*` stands for any text, matches all of `text`.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|after| {
            (0..=after.len())
                .filter(|at| after.is_char_boundary(*at))
                .any(|at| matches_pattern(rest, &after[at..]))
        }),
    }
}

/// A database's name by CouchDB's rules, system databases included.
///
/// Source: `couch_db:validate_dbname`, 3.5.0: at most 238 characters.
pub(crate) fn database(text: &str) -> Result<String, String> {
    if is_pattern(text) || text.starts_with('!') {
        return Err(format!("expected a database by its name, got a pattern, `{}`", shown(text)));
    }
    let bare =
        if is_system_database(text) { text.rsplit_once('/').map_or("a", |(above, _)| above) } else { text };
    let fine = bare.starts_with(|c: char| c.is_ascii_lowercase())
        && bare.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_$()+/-".contains(c));
    if !fine || text.len() > 238 {
        return Err(format!(
            "expected a database name (a lower-case letter, then lower-case letters, digits and _$()+/-), got `{}`",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

/// A pattern of database names, `tenant-*`.
pub(crate) fn database_pattern(text: &str) -> Result<String, String> {
    if text.starts_with('_') {
        return Err(format!(
            "a pattern never matches a database whose name begins with `_`, got `{}`; name it singly",
            shown(text)
        ));
    }
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_$()+/-*?".contains(c);
    if !text.starts_with(|c: char| c.is_ascii_lowercase() || c == '*' || c == '?')
        || !text.chars().all(fits)
        || text.len() > 238
    {
        return Err(format!(
            "expected a pattern of lower-case letters, digits, _$()+/- with `*` for any text and `?` for one character, \
             got `{}`",
            shown(text)
        ));
    }
    Ok(text.to_owned())
}

/// `DESIGN_DOCUMENT/NAME`.
pub(crate) fn design_function(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix("_design/").unwrap_or(text);
    match bare.split_once('/') {
        Some((ddoc, name)) if !ddoc.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(bare.to_owned())
        }
        _ if text.starts_with('_') => Err(format!(
            "expected `DESIGN_DOCUMENT/NAME`, got `{}`; for a built-in filter write `selector`, `doc_ids` or `view`",
            shown(text)
        )),
        _ => Err(format!("expected `DESIGN_DOCUMENT/NAME`, got `{}`", shown(text))),
    }
}

/// Parses JSON; an error names the place and, where the text ends too early, what may have cut it.
fn json(text: &str, expected: &str) -> Result<Json, String> {
    serde_json::from_str(text).map_err(|error| {
        if error.is_eof() {
            format!(
                "expected {expected}, got one that ends in the middle; where it holds ` ;`, that begins a comment: \
                 write \\u003b for the semicolon"
            )
        } else {
            // serde_json's own text quotes what it found in some cases, which may be a secret in the wrong key.
            format!("expected {expected}, got a text that is no JSON at character {}", error.column())
        }
    })
}

fn json_name(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "an array",
        Json::Object(_) => "an object",
    }
}

/// A JSON object; given back as it was written.
pub(crate) fn json_object(text: &str) -> Result<String, String> {
    let expected = "a JSON object such as `{\"type\": \"order\"}`";
    match json(text, expected)? {
        Json::Object(_) => Ok(text.to_owned()),
        other => Err(format!("expected {expected}, got {}", json_name(&other))),
    }
}

/// Query parameters: strings as they are, everything else as JSON.
pub(crate) fn params(text: &str) -> Result<Vec<(String, String)>, String> {
    let expected = "a JSON object such as `{\"type\": \"order\"}`";
    match json(text, expected)? {
        Json::Object(members) => {
            let text_of = |value: Json| match value {
                Json::String(text) => text,
                other => other.to_string(),
            };
            Ok(members.into_iter().map(|(name, value)| (name, text_of(value))).collect())
        }
        other => Err(format!("expected {expected}, got {}", json_name(&other))),
    }
}

/// A JSON array of strings, at least one.
pub(crate) fn json_strings(text: &str) -> Result<Vec<String>, String> {
    let expected = "a JSON array of strings such as `[\"a\", \"b\"]`";
    let Json::Array(items) = json(text, expected)? else {
        return Err(format!("expected {expected}, got another kind of JSON"));
    };
    if items.is_empty() {
        return Err(format!("expected {expected}, got an empty one, which no document passes"));
    }
    let strings = items.into_iter().map(|item| match item {
        Json::String(text) if !text.is_empty() => Ok(text),
        Json::String(_) => Err(format!("expected {expected}, got an empty string in it")),
        other => Err(format!("expected {expected}, got {} in it", json_name(&other))),
    });
    strings.collect()
}

/// Checks one `whsec_...` by the signer's own rules, without ever showing it.
pub(crate) fn signing_secret(text: &str) -> Result<(), String> {
    match Key::parse(text) {
        Ok(_) => Ok(()),
        Err(why) => Err(format!("{why}; `couch-hookd secret` prints a new one")),
    }
}

/// Headers that are ours or the HTTP client's.
const RESERVED_HEADERS: [&str; 9] = [
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A header's name, given back in lower case.
pub(crate) fn header_name(text: &str) -> Result<String, String> {
    let name = text.to_ascii_lowercase();
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(token) {
        return Err("expected a header name of letters, digits and `-` after `header.`".to_owned());
    }
    let ours = ["webhook-", "hookd-"].iter().any(|prefix| name.starts_with(prefix)) || name == "user-agent";
    if ours || RESERVED_HEADERS.contains(&name.as_str()) {
        return Err(format!("the header `{name}` is set by couch-hookd itself"));
    }
    Ok(name)
}

/// Checks a header's value without ever showing it.
pub(crate) fn header_value(text: &str) -> Result<(), String> {
    if text.chars().all(|c| c == ' ' || c == '\t' || c.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("expected visible ASCII characters and blanks, got others".to_owned())
    }
}
