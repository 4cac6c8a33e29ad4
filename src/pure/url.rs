//! `http` and `https` URLs taken apart as far as configuration and logs need it.
//!
//! Guarantees that [`Url::origin`] and every error text are fit for logs: they show neither userinfo nor path
//! nor query, which may hold tokens.

use std::fmt;
use std::net::IpAddr;

use http::Uri;
use percent_encoding::percent_decode_str;

use crate::pure::secret::{Secret, fingerprint};

/// A URL that was checked. `Debug` and `Display` show only its origin.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    https: bool,
    userinfo: Option<String>,
    host: String,
    port: Option<u16>,
    rest: String,
}

impl Url {
    /// Takes a URL apart.
    ///
    /// # Errors
    /// What was expected and what was found, without any part that may be secret.
    pub fn parse(text: &str) -> Result<Url, String> {
        let expected = "expected `http://HOST` or `https://HOST` with or without a path";
        let Some((scheme, after)) = text.split_once("://") else {
            return Err(format!("{expected}, got a text without `://`"));
        };
        let https = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(format!("{expected}, got another scheme")),
        };
        if after.contains('#') {
            return Err(format!(
                "{expected}, got one with a `#` part, which is never sent; write %23 or drop it"
            ));
        }
        let end = after.find(['/', '?']).unwrap_or(after.len());
        let (authority, rest) = after.split_at(end);
        let (userinfo, host_port) = match authority.rsplit_once('@') {
            Some((userinfo, host_port)) => (Some(userinfo.to_owned()), host_port),
            None => (None, authority),
        };
        let (host, port) = host_and_port(host_port).map_err(|found| format!("{expected}, got {found}"))?;
        if let Some(odd) = text.chars().find(|c| !c.is_ascii_graphic()) {
            return Err(format!("{expected}, got one with {}; percent-encode it", name_of(odd)));
        }
        text.parse::<Uri>().map_err(|_| {
            format!("{expected}, got one with a character that no URL can hold; percent-encode it")
        })?;
        Ok(Url { https, userinfo, host: host.to_ascii_lowercase(), port, rest: rest.to_owned() })
    }

    /// `https://host:8443`, in lower case, the port as written.
    pub fn origin(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        match self.port {
            Some(port) => format!("{scheme}://{}:{port}", self.host),
            None => format!("{scheme}://{}", self.host),
        }
    }

    /// Origin and path, without userinfo, query and slashes at the end: a base that paths are appended to.
    pub fn base(&self) -> String {
        let path = self.rest.split('?').next().unwrap_or_default();
        format!("{}{}", self.origin(), path.trim_end_matches('/'))
    }

    /// All of it but the userinfo: what a request is sent to. May hold tokens.
    pub fn without_userinfo(&self) -> String {
        format!("{}{}", self.origin(), self.rest)
    }

    /// Whether there is a query.
    pub fn has_query(&self) -> bool {
        self.rest.contains('?')
    }

    /// Whether there is a path or a query: what follows the origin and may be secret.
    pub fn has_path(&self) -> bool {
        !["", "/"].contains(&self.rest.as_str())
    }

    /// Whether there is a user name.
    pub fn has_userinfo(&self) -> bool {
        self.userinfo.is_some()
    }

    /// User name and password, percent-decoded.
    ///
    /// # Errors
    /// When the bytes are not UTF-8.
    pub fn userinfo(&self) -> Result<Option<(String, Option<Secret>)>, String> {
        let Some(userinfo) = &self.userinfo else { return Ok(None) };
        let decode = |text: &str| match percent_decode_str(text).decode_utf8() {
            Ok(text) => Ok(text.into_owned()),
            Err(_) => Err("expected UTF-8 in front of `@`, got other bytes".to_owned()),
        };
        Ok(Some(match userinfo.split_once(':') {
            Some((name, password)) => (decode(name)?, Some(Secret::new(decode(password)?))),
            None => (decode(userinfo)?, None),
        }))
    }

    /// Whether it is `https`.
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// The host in lower case, an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }

    /// The port as written, or the scheme's.
    pub fn port(&self) -> u16 {
        self.port.unwrap_or(if self.https { 443 } else { 80 })
    }

    /// Whether the host is this machine: `localhost`, 127.0.0.0/8, `::1`.
    pub fn is_loopback(&self) -> bool {
        let bare = self.host();
        bare == "localhost"
            || bare.ends_with(".localhost")
            || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin())
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin())
    }
}

/// What may be shown of an endpoint's URL, whose path and query may be secret: `https://shop.example #1f9a07`, or
/// `***` for a text that is no URL. The fingerprint tells two endpoints of one host apart; it is too short to
/// find out by it what it was made of.
pub fn shown(text: &str) -> String {
    let Ok(url) = Url::parse(text) else { return "***".to_owned() };
    // Without the login: a short hash helps whoever guesses at a weak password.
    format!("{} {}", url.origin(), fingerprint(&url.without_userinfo()))
}

/// What may be shown of a replication's `source` or `target`: scheme, host, port and path, nothing else, or the bare
/// name of a database as 1.x and 2.x take it. Takes CouchDB's masked form (`http://admin:*****@h/db/`), too; `***`
/// for everything that is neither. The path stays as written, with or without its last slash.
pub fn shown_url(text: &str) -> String {
    if is_db_name(text) {
        return text.to_owned();
    }
    without_secrets(text).unwrap_or_else(|| "***".to_owned())
}

/// Scheme, host, port and path of an absolute URL; `None` where they cannot be told from the rest for certain.
pub fn without_secrets(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let scheme = scheme.to_ascii_lowercase();
    if !["http", "https", "socks5"].contains(&scheme.as_str()) {
        return None;
    }
    let (login, after) = rest.rsplit_once('@').unwrap_or(("", rest));
    // `http://u:p/w@h`: is the path `/w@h`, or the password `p/w`? CouchDB says the latter.
    if login.contains(['/', '?', '#']) {
        return None;
    }
    let (authority, rest) = after.split_at(after.find(['/', '?', '#']).unwrap_or(after.len()));
    let (host, port) = host_and_port(authority).ok()?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if !bare.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':')) {
        return None;
    }
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    let odd = |b: u8| !b.is_ascii_graphic() || b"\"'<>\\^`{|}".contains(&b);
    if path.bytes().any(odd) {
        return None;
    }
    let port = port.map(|port| format!(":{port}")).unwrap_or_default();
    Some(format!("{scheme}://{}{port}{path}", host.to_ascii_lowercase()))
}

/// Whether CouchDB would take it for the name of a database.
fn is_db_name(text: &str) -> bool {
    const BYTES_MAX: usize = 238;
    let may_begin = text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    let may_hold = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_$()+/-".contains(&b);
    may_begin && text.len() <= BYTES_MAX && text.bytes().all(may_hold)
}

fn host_and_port(text: &str) -> Result<(&str, Option<u16>), String> {
    let (host, port) = if text.starts_with('[') {
        let end = text.find(']').ok_or("an IPv6 address without `]`")?;
        let (host, after) = text.split_at(end + 1);
        if host[1..end].parse::<std::net::Ipv6Addr>().is_err() {
            return Err("brackets around something else than an IPv6 address".to_owned());
        }
        match after.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if after.is_empty() => (host, None),
            None => return Err("something between `]` and the port".to_owned()),
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    if host.is_empty() {
        return Err("no host".to_owned());
    }
    match port {
        None => Ok((host, None)),
        Some(port) => match port.parse::<u16>() {
            Ok(number) if number > 0 && port.bytes().all(|b| b.is_ascii_digit()) => Ok((host, Some(number))),
            _ => Err("a port that is not a number from 1 to 65535".to_owned()),
        },
    }
}

fn name_of(odd: char) -> &'static str {
    match odd {
        ' ' => "a blank",
        c if c.is_control() => "a control character",
        _ => "a character beyond ASCII",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let found = match Url::parse(text) {
            Ok(url) => format!("{} loopback={}", url.base(), url.is_loopback()),
            Err(error) => error.rsplit("got ").next().unwrap().to_owned(),
        };
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn urls_are_taken_apart() {
        check("http://127.0.0.1:5984", "http://127.0.0.1:5984 loopback=true");
        check("http://127.0.0.1:5984/", "http://127.0.0.1:5984 loopback=true");
        check("HTTPS://Couch.Example/db/", "https://couch.example/db loopback=false");
        check("https://u:p@h/x?token=1", "https://h/x loopback=false");
        check("https://u:p@ss@h", "https://h loopback=false");
        check("http://[::1]:80/x", "http://[::1]:80/x loopback=true");
        check("http://localhost", "http://localhost loopback=true");
        check("http://localhost.example", "http://localhost.example loopback=false");
        check("https:///hooks", "no host");
        check("https://:80/hooks", "no host");
        check("https://?x", "no host");
        check("https://u:p@/hooks", "no host");
        check("shop.example/hooks", "a text without `://`");
        check("ftp://shop.example", "another scheme");
        check("http://h:0", "a port that is not a number from 1 to 65535");
        check("http://h:70000", "a port that is not a number from 1 to 65535");
        check("http://h:+80", "a port that is not a number from 1 to 65535");
        check("http://h:", "a port that is not a number from 1 to 65535");
        check("http://[::1", "an IPv6 address without `]`");
        check("http://[x]", "brackets around something else than an IPv6 address");
        check("http://[::1]x", "something between `]` and the port");
        check("http://h/a b", "one with a blank; percent-encode it");
        check("http://h/ä", "one with a character beyond ASCII; percent-encode it");
        check("http://h/a\nb", "one with a control character; percent-encode it");
        check("http://h/a#b", "one with a `#` part, which is never sent; write %23 or drop it");
        check("http://h|x/", "one with a character that no URL can hold; percent-encode it");
    }

    #[test]
    fn userinfo_is_decoded() {
        let url = Url::parse("http://ho%40okd:p%C3%A4%3Ass@h").unwrap();
        let (name, password) = url.userinfo().unwrap().unwrap();
        assert_eq!((name.as_str(), password.unwrap().expose()), ("ho@okd", "pä:ss"));
        assert!(Url::parse("http://%ff@h").unwrap().userinfo().is_err());
        assert_eq!(Url::parse("http://h").unwrap().userinfo().unwrap(), None);
    }

    #[test]
    fn endpoints_of_one_host_are_told_apart() {
        assert_eq!(shown("https://Shop.example:8443/hooks?token=1"), "https://shop.example:8443 #5a892f");
        assert_ne!(shown("https://shop.example/a"), shown("https://shop.example/b"));
        assert_eq!(shown("shop.example/a"), "***");
    }

    #[test]
    fn of_a_replication_scheme_host_port_and_path_are_shown() {
        let check = |text: &str, expected: &str| assert_eq!(shown_url(text), expected, "{text}");
        check("http://admin:*****@127.0.0.1:5984/fixture/", "http://127.0.0.1:5984/fixture/");
        check("HTTPS://u:p%40ss@Couch.example/a%2Fb?token=t#x", "https://couch.example/a%2Fb");
        check("https://u:p@ss@h/db", "https://h/db");
        check("http://[::1]:5984/db", "http://[::1]:5984/db");
        check("socks5://u:p@h:1080", "socks5://h:1080");
        check("http://couch_db:5984/x", "http://couch_db:5984/x");
        check("orders", "orders");
        check("eu/_replicator", "eu/_replicator");
        for hidden in [
            "",
            "http://",
            "http://u:p/w@h/db",
            "http://12/34@h/db",
            "http://u:p?w@h/db",
            "http://u:p%40h/db",
            "http://u%3Ap%40h/db",
            "http:/u:p@h/db",
            "http://h/a b",
            "http://h/a\nb",
            "http://h/`x`",
            "ftp://u:p@h/db",
            "u:p@h/db",
            "u@h/db",
            "Token",
            "{\"url\":1}",
        ] {
            check(hidden, "***");
        }
    }

    #[test]
    fn nothing_secret_is_shown() {
        for text in
            ["https://u:canary@h/canary?canary", "https://canary h/", "canary://h", "https://h/canary#x"]
        {
            let url = Url::parse(text);
            assert!(!format!("{url:?} {}", shown(text)).contains("canary"), "{url:?}");
        }
    }
}
