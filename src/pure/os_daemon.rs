//! Codec of CouchDB's os_daemon protocol: one JSON value a line, on stdin and stdout.
//!
//! Guarantees that every line it makes is one that all versions understand: a verb they know, names that are
//! strings (`["get",1]` crashes the daemon manager of 2.x), a level they know, a message that is one line of
//! bounded length. When to ask and whom an answer belongs to is left to `host::stdio`: replies carry no id.
//!
//! Source: `couch_os_daemons.erl`, the same on 1.1 to 2.2, and what was seen on running servers.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use log::Level;

use crate::error::{Error, Kind, Result};

/// Longest message in a log line, in bytes after escaping: long enough for every error with its context, short
/// enough that a body pasted into one does not fill CouchDB's log.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// One section: keys and values, both as CouchDB parsed them (comments cut, quotes kept, never trimmed by us).
pub type Section = BTreeMap<String, String>;

/// What CouchDB answers to a `get`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To `["get",SECTION]`; empty when there is no such section.
    Section(Section),
    /// To `["get",SECTION,KEY]`.
    Value(String),
    /// To `["get",SECTION,KEY]` when the key is missing or its value empty.
    Null,
}

/// `["get","couchdb"]`, with its line break.
pub fn get_section(section: &str) -> Vec<u8> {
    line(&["get", section])
}

/// `["get","couchdb","uuid"]`, with its line break.
pub fn get_key(section: &str, key: &str) -> Vec<u8> {
    line(&["get", section, key])
}

/// `["register","hookd"]`, with its line break: kill us when a key of the section is set.
pub fn register(section: &str) -> Vec<u8> {
    line(&["register", section])
}

/// `["log","started",{"level":"info"}]`, with its line break.
///
/// CouchDB knows three levels only: a warning goes out as info with `warning: ` in front, trace as debug.
/// Line breaks and other control characters are escaped, because CouchDB writes them as they are and a second
/// line without prefix looks like a line of its own; what is too long is cut and says so.
pub fn log(level: Level, message: &str) -> Vec<u8> {
    let (prefix, level) = match level {
        Level::Error => ("", "error"),
        Level::Warn => ("warning: ", "info"),
        Level::Info => ("", "info"),
        Level::Debug | Level::Trace => ("", "debug"),
    };
    let message = serde_json::Value::from(format!("{prefix}{}", one_line(message)));
    format!("[\"log\",{message},{{\"level\":\"{level}\"}}]\n").into_bytes()
}

/// The text with every line break, control character and text direction mark written out (`\n`, `\u{1b}`), cut
/// at [`MESSAGE_BYTES_MAX`] bytes: what a log line may hold, whatever it is written to.
pub fn one_line(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for (at, char) in text.char_indices() {
        let before = escaped.len();
        match char {
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\t' => escaped.push_str("\\t"),
            _ if char.is_control() || reorders(char) => {
                write!(escaped, "\\u{{{:x}}}", u32::from(char)).expect("a String takes all that is written");
            }
            _ => escaped.push(char),
        }
        if escaped.len() > MESSAGE_BYTES_MAX {
            escaped.truncate(before);
            write!(escaped, "… ({} bytes cut)", text.len() - at).expect("a String takes all that is written");
            break;
        }
    }
    escaped
}

/// What CouchDB answered to a `get`; `line` with or without its line break.
///
/// # Errors
/// `Malformed` when it is none of an object of strings, a string, `null`. The text names a key at most, never a
/// value: sections hold passwords.
pub fn parse_reply(line: &[u8]) -> Result<Reply> {
    let text = String::from_utf8_lossy(line);
    let malformed = |found: &str| {
        Error::new(
            Kind::Malformed,
            format!("reply to `get`: expected an object, a string or null, got {found}"),
        )
    };
    match serde_json::from_str(&text) {
        Ok(serde_json::Value::Null) => Ok(Reply::Null),
        Ok(serde_json::Value::String(value)) => Ok(Reply::Value(value)),
        Ok(serde_json::Value::Object(members)) => {
            let mut section = Section::new();
            for (key, value) in members {
                let serde_json::Value::String(value) = value else {
                    return Err(malformed(&format!("no string as value of `{}`", one_line(&key))));
                };
                section.insert(key, value);
            }
            Ok(Reply::Section(section))
        }
        Ok(serde_json::Value::Bool(_)) => Err(malformed("a boolean")),
        Ok(serde_json::Value::Number(_)) => Err(malformed("a number")),
        Ok(serde_json::Value::Array(_)) => Err(malformed("an array")),
        Err(error) => Err(malformed(&format!(
            "{} bytes that are not JSON at column {} of line {}",
            line.len(),
            error.column(),
            error.line()
        ))),
    }
}

fn line(words: &[&str]) -> Vec<u8> {
    let mut line = serde_json::to_vec(words).expect("strings are always JSON");
    line.push(b'\n');
    line
}

/// Line and paragraph separators, and the marks that make text read in another order than it stands in.
fn reorders(char: char) -> bool {
    matches!(char, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_line(made: Vec<u8>, expected: &str) {
        assert_eq!(String::from_utf8(made).unwrap(), format!("{expected}\n"));
    }

    #[test]
    fn requests_are_byte_for_byte_what_couchdb_reads() {
        check_line(get_section("couchdb"), r#"["get","couchdb"]"#);
        check_line(get_section("hookd.webhook.a-b_c"), r#"["get","hookd.webhook.a-b_c"]"#);
        check_line(get_section("a\"b\n"), r#"["get","a\"b\n"]"#);
        check_line(get_key("httpd", "port"), r#"["get","httpd","port"]"#);
        check_line(register("hookd"), r#"["register","hookd"]"#);
    }

    #[test]
    fn levels_are_the_three_that_couchdb_knows() {
        check_line(log(Level::Error, "x"), r#"["log","x",{"level":"error"}]"#);
        check_line(log(Level::Warn, "x"), r#"["log","warning: x",{"level":"info"}]"#);
        check_line(log(Level::Info, "x"), r#"["log","x",{"level":"info"}]"#);
        check_line(log(Level::Debug, "x"), r#"["log","x",{"level":"debug"}]"#);
        check_line(log(Level::Trace, "x"), r#"["log","x",{"level":"debug"}]"#);
    }

    #[test]
    fn no_message_can_forge_a_second_log_line() {
        let check = |message: &str, expected: &str| {
            check_line(log(Level::Info, message), &format!(r#"["log","{expected}",{{"level":"info"}}]"#));
        };
        check("a\nb", r"a\\nb");
        check("a\r\n[error] b", r"a\\r\\n[error] b");
        check("a\tb\0c\u{1b}[0m\u{7f}\u{85}", r"a\\tb\\u{0}c\\u{1b}[0m\\u{7f}\\u{85}");
        check("a\u{2028}b\u{2029}c\u{202e}d", r"a\\u{2028}b\\u{2029}c\\u{202e}d");
        check("ä \"q\" \\ 😀", r#"ä \"q\" \\ 😀"#);
        for char in (0..=u32::from(u16::MAX)).filter_map(char::from_u32) {
            let made = log(Level::Info, &char.to_string());
            assert_eq!(made.iter().filter(|byte| **byte == b'\n').count(), 1, "{char:?}");
            let value: serde_json::Value = serde_json::from_slice(&made).unwrap();
            assert!(!value[1].as_str().unwrap().chars().any(char::is_control), "{char:?}");
        }
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let fits = "ä".repeat(MESSAGE_BYTES_MAX / 2);
        assert_eq!(one_line(&fits), fits);
        let cut = one_line(&format!("{fits}äx"));
        assert_eq!(cut, format!("{fits}… (3 bytes cut)"));
        let breaks = one_line(&"\n".repeat(MESSAGE_BYTES_MAX));
        assert!(breaks.len() < MESSAGE_BYTES_MAX + 32 && breaks.ends_with("(2048 bytes cut)"), "{breaks}");
    }

    #[test]
    fn replies_are_read_as_couchdb_writes_them() {
        let check = |line: &str, expected: Reply| assert_eq!(parse_reply(line.as_bytes()).unwrap(), expected);
        let section = |pairs: &[(&str, &str)]| {
            Reply::Section(
                pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            )
        };
        check(
            "{\"uuid\":\"3311\",\"a.b\":\"{\\\"x\\\": 1}\"}\n",
            section(&[("uuid", "3311"), ("a.b", "{\"x\": 1}")]),
        );
        check("{}\n", section(&[]));
        check("\"3311\"", Reply::Value("3311".to_owned()));
        check("null\r\n", Reply::Null);
        assert_eq!(parse_reply(b"{\"a\":\"\xe4\"}").unwrap(), section(&[("a", "\u{fffd}")]));
    }

    #[test]
    fn what_is_no_reply_is_said_without_its_values() {
        let check = |line: &str, expected: &str| {
            let error = parse_reply(line.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), Kind::Malformed);
            let said = error.to_string();
            assert_eq!(said, format!("reply to `get`: expected an object, a string or null, got {expected}"));
        };
        check("[1]", "an array");
        check("7", "a number");
        check("true", "a boolean");
        check("{\"password\":{\"x\":\"secret\"}}", "no string as value of `password`");
        check("{\"password\":\"secret", "19 bytes that are not JSON at column 19 of line 1");
        check("", "0 bytes that are not JSON at column 0 of line 1");
    }
}
