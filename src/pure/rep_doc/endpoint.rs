//! Endpoints of a replication: `source`, `target` and the proxies, their URLs, headers and logins.

use serde_json::{Map, Value};

use crate::pure::nearest::nearest_of;
use crate::pure::rep_doc::{Findings, Severity, fields, folded, kind, shown_name};
use crate::pure::url::Url;

/// What CouchDB reads of an endpoint that is an object.
const MEMBERS: [&str; 3] = ["url", "headers", "auth"];
/// Headers that are logins.
const LOGINS: [&str; 4] = ["authorization", "proxy-authorization", "cookie", "x-auth-couchdb-token"];
/// Whoever reads the document reads the login; `_scheduler` hides it, error texts not always.
const GIVE_LITTLE: &str =
    "use a login that may do just what this replication needs, and let admins alone read the database";

/// That `source` and `target` are there.
pub(crate) fn check_both_there(findings: &mut Findings, members: &Map<String, Value>) {
    for name in ["source", "target"].into_iter().filter(|name| !members.contains_key(*name)) {
        findings.error(name, "expected an endpoint, got none", "write `\"http://HOST:5984/DATABASE\"`");
    }
}

/// `source` or `target`: a URL, an object with one, or a database's name.
pub(crate) fn check(findings: &mut Findings, path: &str, value: &Value) {
    match value {
        Value::String(text) if text.starts_with("http://") || text.starts_with("https://") => {
            check_url(findings, path, text);
        }
        Value::String(text) => check_name(findings, path, text),
        Value::Object(members) => check_object(findings, path, members),
        other => {
            let expected = "a URL, or an object with `url`";
            findings.wrong(path, expected, other, "write `\"http://HOST:5984/DATABASE\"`");
        }
    }
}

/// A string that does not begin as a URL: CouchDB takes it for the name of a database of its own.
///
/// Source: `parse_rep_db/3`: 3.0 and later throw `local_endpoints_not_supported`; 2.x opens a database of the node
/// itself (`couch_db:open/2`), none of those that clients see; 1.x has no others.
fn check_name(findings: &mut Findings, path: &str, text: &str) {
    let expected = "expected a URL that begins with `http://` or `https://`";
    if text.contains("://") {
        let (found, remedy) = match has_scheme(text, &["http", "https"]) {
            true => ("one in upper case", "write the scheme in lower case"),
            false => ("another scheme", "replications speak HTTP alone"),
        };
        return findings.error(path, format!("{expected}, got {found}"), remedy);
    }
    if text.is_empty() {
        return findings.error(path, format!("{expected}, got an empty string"), "write the database's URL");
    }
    if text.contains(['.', ':', '@']) {
        let message = format!("{expected}, got one without a scheme");
        return findings.error(path, message, "write `http://` or `https://` in front");
    }
    let url = "write its URL, with a login: `http://127.0.0.1:5984/DATABASE`";
    if findings.version.is_at_least(3, 0) {
        let message = "expected a URL, got a name: CouchDB 3.0 and later have no local endpoints";
        findings.error(path, message, url);
    } else if findings.version.is_at_least(2, 0) {
        let message =
            "expected a URL, got a name: CouchDB 2.x looks for it among the node's own databases (port 5986)";
        findings.error(path, message, url);
    } else if !is_database_name(text) {
        let message =
            "expected a database's name: `a` to `z`, digits and `_$()+-/`, a letter first; got others";
        findings.error(path, message, "write the name as `_all_dbs` shows it");
    }
}

/// Source: `couch_server:check_dbname/2`, 1.7.1.
fn is_database_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_$()+-/".contains(c);
    matches!(text, "_users" | "_replicator")
        || (text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(fits))
}

fn check_object(findings: &mut Findings, path: &str, members: &Map<String, Value>) {
    let url_path = format!("{path}.url");
    match members.get("url") {
        None => {
            findings.error(&url_path, "expected a URL, got none", "write `\"http://HOST:5984/DATABASE\"`")
        }
        Some(Value::String(url)) if url.starts_with("http://") || url.starts_with("https://") => {
            check_url(findings, &url_path, url);
        }
        Some(value) => {
            let found = match value.as_str() {
                Some(text) if has_scheme(text, &["http", "https"]) => "one in upper case",
                Some(text) if text.contains("://") => "another scheme",
                Some(text) if !text.is_empty() => "one without a scheme",
                _ => kind(value),
            };
            let message = format!("expected a URL that begins with `http://` or `https://`, got {found}");
            findings.error(&url_path, message, "write `\"http://HOST:5984/DATABASE\"`");
        }
    }
    for (name, value) in members {
        let member = format!("{path}.{}", shown_name(name));
        match name.as_str() {
            "url" => {}
            "headers" => check_headers(findings, &member, value),
            "auth" => check_auth(findings, &member, value),
            _ => check_unknown(findings, &member, name, members),
        }
    }
}

fn check_unknown(findings: &mut Findings, path: &str, name: &str, members: &Map<String, Value>) {
    let ignored = "CouchDB does not know it in an endpoint and ignores it";
    let folded = folded(name);
    if nearest_of(&folded, ["username", "user", "name", "password", "basic"], 1).is_some() {
        let remedy = match findings.version.is_at_least(3, 2) {
            true => "write `\"auth\": {\"basic\": {\"username\": …, \"password\": …}}`",
            false => "write the login into `headers`, as `Authorization`",
        };
        return findings.error(path, ignored, remedy);
    }
    if fields::find(name).is_some() {
        return findings.error(path, ignored, "it belongs to the top of the document");
    }
    match nearest_of(&folded, MEMBERS, 1).filter(|near| !members.contains_key(*near)) {
        Some(near) => findings.error(path, ignored, format!("did you mean `{near}`?")),
        None => findings.warning(path, ignored, "take it away"),
    }
}

fn has_scheme(text: &str, schemes: &[&str]) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| schemes.contains(&scheme.to_ascii_lowercase().as_str()))
}

/// A URL whose scheme is right.
fn check_url(findings: &mut Findings, path: &str, text: &str) {
    check_authority(findings, path, text);
    let Ok(url) = Url::parse(text) else { return };
    if !url.has_path() {
        let message = "names no database: CouchDB would ask the server's root for one";
        findings.warning(
            path,
            message,
            "write the database's name behind the host, unless the host stands for one",
        );
    }
    if url.has_query() {
        let message =
            "has a query: CouchDB appends its own paths behind it, and a CouchDB there answers with nothing";
        findings.warning(
            path,
            message,
            "take the `?` and what follows away, unless the endpoint wants it so",
        );
    }
}

/// Host, port and login of an endpoint's or a proxy's URL.
fn check_authority(findings: &mut Findings, path: &str, text: &str) {
    let after = text.split_once("://").map_or("", |(_, after)| after);
    let authority = after.split(['/', '?', '#']).next().unwrap_or_default();
    let (userinfo, host_port) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (host, port) = match host_port.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (host_port, None),
    };
    if host.is_empty() {
        findings.error(path, "expected a URL with a host, got none", "write the host behind `://`");
    } else if port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port > 0)) {
        let message = "expected a port from 1 to 65535 behind the host's `:`, got another";
        findings.error(path, message, "write a number; a `:`, `/` or `@` of a login must be percent-encoded");
    } else if !is_uri(authority, after) {
        // Blanks break the request; `uri_string:parse` is asked from 3.4 on.
        let breaks = after.contains(|c: char| c.is_whitespace() || c.is_control());
        let is_refused = breaks || findings.version.is_at_least(3, 4);
        let severity = if is_refused && !is_proxy(path) { Severity::Error } else { Severity::Warning };
        let message = "holds something that no URL can hold, or has it in a wrong place";
        let remedy = "percent-encode blanks, letters beyond ASCII, `@`, `|` and the like";
        findings.say(severity, path, message, remedy);
    } else if after.contains('#') {
        let message = "has a `#` part, which takes away all that CouchDB appends: nothing is replicated";
        findings.error(path, message, "write %23 where it belongs to a name, or take it away");
    }
    if userinfo.contains(':') {
        let has_auth = !is_proxy(path) && findings.version.is_at_least(3, 2);
        let remedy = match has_auth {
            true => format!("`auth.basic` keeps it out of URLs in logs and errors; {GIVE_LITTLE}"),
            false => GIVE_LITTLE.to_owned(),
        };
        findings.warning(path, "holds a password in clear, which error texts may repeat", remedy);
    }
}

fn is_proxy(path: &str) -> bool {
    path.ends_with("proxy")
}

/// Whether all characters stand where RFC 3986 has them: brackets in the host alone, one `@` in front of it.
fn is_uri(authority: &str, after: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=:@".contains(c);
    authority.chars().all(|c| fits(c) || "[]".contains(c))
        && authority.matches('@').count() <= 1
        && after[authority.len()..].chars().all(|c| fits(c) || "/?#".contains(c))
}

fn check_headers(findings: &mut Findings, path: &str, value: &Value) {
    let Some(headers) = value.as_object() else {
        let message = format!("expected an object, got {}", kind(value));
        return findings.error(path, message, "write `{\"Name\": \"value\"}`");
    };
    for (name, value) in headers {
        let header = format!("{path}.{}", shown_name(name));
        if !value.is_string() {
            let message = format!("expected a string, got {}", kind(value));
            findings.error(&header, message, "write the value in quotes");
        }
        if LOGINS.contains(&name.to_ascii_lowercase().as_str()) {
            findings.warning(header, "holds a login in clear", GIVE_LITTLE);
        }
    }
}

/// `auth`: OAuth up to 2.1, name and password since 3.2, and what plug-ins make of it since 2.2.
fn check_auth(findings: &mut Findings, path: &str, value: &Value) {
    let Some(auth) = value.as_object() else {
        let message = format!("expected an object, got {}", kind(value));
        return findings.error(path, message, "write `{\"basic\": {\"username\": …, \"password\": …}}`");
    };
    if !auth.is_empty() {
        findings.warning(path, "holds a login in clear", GIVE_LITTLE);
    }
    let version = findings.version;
    for (name, value) in auth {
        let member = format!("{path}.{}", shown_name(name));
        match name.as_str() {
            "basic" if version.is_at_least(3, 2) => check_basic(findings, &member, value),
            "basic" => {
                let message =
                    format!("CouchDB {version} does not know it and sends no login (known since 3.2)");
                findings.error(member, message, "write the login into the URL, or into `headers`");
            }
            "oauth" if !version.is_at_least(2, 2) => check_oauth(findings, &member, value),
            "oauth" => {
                let message = "CouchDB 2.2 and later do not know it and send no login";
                findings.error(member, message, "use another login");
            }
            "username" | "user" | "name" | "password" => {
                let message = "CouchDB does not know it here and sends no login";
                findings.error(
                    member,
                    message,
                    "write `{\"basic\": {\"username\": …, \"password\": …}}` (3.2 and later)",
                );
            }
            _ => {
                let message = "CouchDB itself does not know it; a plug-in may";
                findings.warning(member, message, "take it away unless one does");
            }
        }
    }
}

/// Without two strings no login is sent, and nothing is said: `couch_replicator_utils:get_basic_auth_creds/1`.
fn check_basic(findings: &mut Findings, path: &str, value: &Value) {
    let Some(basic) = value.as_object() else {
        let message = format!("expected an object with `username` and `password`, got {}", kind(value));
        return findings.error(path, message, "CouchDB sends no login without them");
    };
    check_texts(findings, path, basic, &["username", "password"], "CouchDB sends no login without it");
}

fn check_oauth(findings: &mut Findings, path: &str, value: &Value) {
    let Some(oauth) = value.as_object() else {
        let message = format!("expected an object, got {}", kind(value));
        return findings.error(path, message, "write `{\"consumer_key\": …, \"token\": …}`");
    };
    let names = ["consumer_key", "consumer_secret", "token", "token_secret"];
    check_texts(findings, path, oauth, &names, "CouchDB cannot start the replication without it");
    let methods = ["PLAINTEXT", "HMAC-SHA1", "RSA-SHA1"];
    let method = oauth.get("signature_method");
    if method.is_some_and(|method| !method.as_str().is_some_and(|word| methods.contains(&word))) {
        let message = format!("expected one of `{}`, got another", methods.join("`, `"));
        findings.error(format!("{path}.signature_method"), message, "leave it out for `HMAC-SHA1`");
    }
}

fn check_texts(
    findings: &mut Findings,
    path: &str,
    members: &Map<String, Value>,
    names: &[&str],
    remedy: &str,
) {
    for name in names {
        let found = match members.get(*name) {
            Some(Value::String(_)) => continue,
            Some(other) => kind(other),
            None => "none",
        };
        findings.error(format!("{path}.{name}"), format!("expected a string, got {found}"), remedy);
    }
}

/// `proxy`, `source_proxy`, `target_proxy`; an empty one is none.
///
/// Source: `parse_proxy_params/1`; schemes are looked at from 3.3 on, before all but `socks5` were taken for HTTP.
pub(crate) fn check_proxy(findings: &mut Findings, path: &str, value: &Value) {
    let example = "write `http://HOST:PORT`, `https://HOST:PORT` or `socks5://HOST:PORT`";
    let Some(text) = value.as_str() else {
        return findings.wrong(path, "a URL", value, example);
    };
    if text.is_empty() {
        return;
    }
    if !text.contains("://") {
        return findings.error(path, "expected a URL, got one without a scheme", example);
    }
    if !has_scheme(text, &["http", "https", "socks5"]) {
        let message = "expected the scheme `http`, `https` or `socks5`, got another";
        return match findings.version.is_at_least(3, 3) {
            true => findings.error(path, message, example),
            false => findings.warning(path, message, example),
        };
    }
    check_authority(findings, path, text);
}
