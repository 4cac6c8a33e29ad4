//! CouchDB's ini dialect, by the rules of the versions before 3.3 and of those since.
//!
//! Reads a file as CouchDB would, but says what CouchDB passes over in silence, and keeps the line of every
//! value. Merging files, and what the keys mean, is left to `config`.
//!
//! Source: `couch_config.erl` of 1.7.1, `config.erl` of apache/couchdb-config 1.0.1 (2.0) and 2.1.9 (3.2), and
//! of CouchDB 3.5.0; CONTRACT §2.

use std::collections::BTreeSet;

/// Whose rules to read by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// CouchDB 1.x, 2.x and 3.0 to 3.2. Where 1.x and 2.x differ (blanks around `=`), 1.x.
    Before3_3,
    /// CouchDB 3.3 and later; also our own files.
    Since3_3,
}

/// A value that counts: not empty, and not overridden by another line of the same text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As it stands between the brackets.
    pub section: String,
    /// Without blanks around it.
    pub key: String,
    /// Without blanks around it, never empty.
    pub value: String,
    /// Counted from 1.
    pub line: usize,
}

/// A line that is not read as its writer may think. Holds no value and so no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Counted from 1.
    pub line: usize,
    /// The section that the line stands in; empty before the first one.
    pub section: String,
    /// For a malformed section header: the section that was probably meant.
    pub header: Option<String>,
    /// What was expected and what was found.
    pub message: String,
}

/// Reads a text. Lines that say nothing by the rules of `dialect` are left out as CouchDB leaves them out, but
/// those that were hardly meant to say nothing are findings.
///
/// Of two lines for one key the last counts since 3.3, the first before it (CouchDB inserts them from behind).
pub fn parse(text: &[u8], dialect: Dialect) -> (Vec<Entry>, Vec<Finding>) {
    match dialect {
        Dialect::Before3_3 => parse_by(text, Rules::V1),
        Dialect::Since3_3 => parse_by(text, Rules::V3),
    }
}

fn parse_by(text: &[u8], rules: Rules) -> (Vec<Entry>, Vec<Finding>) {
    let mut entries: Vec<Entry> = Vec::new();
    let mut findings = Vec::new();
    for Read { line, section, found } in read(text, rules) {
        let mut finding = |header: Option<&str>, message: String| {
            let header = header.map(str::to_owned);
            findings.push(Finding { line, section: section.clone(), header, message });
        };
        match found {
            Found::Pair(key, value) => entries.push(Entry { section, key, value, line }),
            Found::Continued(more) => {
                if let Some(last) = entries.last_mut() {
                    last.section = section;
                    last.value = trim(&format!("{} {more}", last.value)).to_owned();
                }
            }
            Found::BadHeader(meant) => {
                let message = "expected `[section]` alone on its line, got a line that only begins like one; \
                    it is ignored, and the keys below it count for the section above it";
                finding(Some(&meant), message.to_owned());
            }
            Found::Malformed(why) => finding(None, why.to_owned()),
            Found::Nothing | Found::Header | Found::Empty(_) => {}
        }
    }
    let mut seen = BTreeSet::new();
    let mut is_first = |entry: &Entry| seen.insert((entry.section.clone(), entry.key.clone()));
    if rules == Rules::V3 {
        entries.reverse();
        entries.retain(&mut is_first);
        entries.reverse();
    } else {
        entries.retain(&mut is_first);
        entries.retain(|entry| !entry.value.is_empty());
    }
    (entries, findings)
}

/// Every line that CouchDB's versions, or its files and its HTTP interface, read differently, with what to
/// write instead. Only lines that some version counts for a section that `concerns` accepts.
pub fn differences(text: &[u8], concerns: impl Fn(&str) -> bool) -> Vec<Finding> {
    let (one, two, three) = (read(text, Rules::V1), read(text, Rules::V2), read(text, Rules::V3));
    let mut findings = Vec::new();
    if let Some(first) = three.first().filter(|first| text.starts_with(MARK) && concerns(&first.section)) {
        let message = "a byte order mark makes CouchDB ignore this line; save the file without it".to_owned();
        findings.push(Finding { line: 1, section: first.section.clone(), header: None, message });
    }
    let mut seen = BTreeSet::new();
    for (((one, two), three), raw) in one.into_iter().zip(two).zip(three).zip(lines(text)) {
        if !concerns(&one.section) && !concerns(&three.section) {
            continue;
        }
        let raw = String::from_utf8_lossy(raw);
        let message = difference(&raw, &one.found, &two.found, &three.found).or_else(|| match &three.found {
            Found::Pair(key, _) if !seen.insert((three.section.clone(), key.clone())) => Some(
                "this key stands in this section twice: before 3.3 the first counts, since then the last; \
                 delete one of them",
            ),
            _ => None,
        });
        if let Some(message) = message {
            let Read { line, section, .. } = three;
            findings.push(Finding { line, section, header: None, message: message.to_owned() });
        }
    }
    findings
}

/// What one line of text says, and in which section it stands (for a header: the one it opens).
struct Read {
    line: usize,
    section: String,
    found: Found,
}

#[derive(Clone, PartialEq, Eq)]
enum Found {
    /// A blank line or a comment.
    Nothing,
    Header,
    /// Key and value without blanks around them. Before 3.3 the value is empty when only a comment follows a
    /// blank, and still hides a later line for the same key.
    Pair(String, String),
    /// A key without a value.
    Empty(String),
    /// More of the value above (before 3.3).
    Continued(String),
    /// Begins with `[` but opens no section; the name that was probably meant.
    BadHeader(String),
    /// Ignored by CouchDB, and hardly on purpose.
    Malformed(&'static str),
}

/// What CouchDB's code does, by version.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rules {
    /// 1.x: any number of blanks around every `=` vanish.
    V1,
    /// 2.0 to 3.2: at most one blank on each side.
    V2,
    /// 3.3 and later: comments first, then the first ` = `, else the first `=`.
    V3,
}

/// UTF-8 byte order mark; skipped by us, not by CouchDB.
const MARK: &[u8] = b"\xef\xbb\xbf";
const NO_PAIR: &str = "expected `key = value`, got a line without `=`; comments begin with `;`";
const NO_KEY: &str = "expected `key = value`, got a line without a key";
const NO_UTF8: &str = "expected UTF-8, got other bytes; the line is ignored";
const NO_SECTION: &str = "expected a `[section]` above the first key, got none";

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let text = text.strip_prefix(MARK).unwrap_or(text);
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        match text.iter().position(|byte| matches!(byte, b'\n' | b'\r' | 0x1a)) {
            None => {
                rest = None;
                Some(text)
            }
            Some(end) => {
                let after = if text[end..].starts_with(b"\r\n") { end + 2 } else { end + 1 };
                rest = Some(&text[after..]);
                Some(&text[..end])
            }
        }
    })
}

fn read(text: &[u8], rules: Rules) -> Vec<Read> {
    let mut section = String::new();
    let mut any_pair = false;
    let mut all = Vec::new();
    for (index, bytes) in lines(text).enumerate() {
        let found = match std::str::from_utf8(bytes) {
            Err(_) if bytes.trim_ascii_start().starts_with(b"[") => Found::BadHeader(String::new()),
            Err(_) if bytes.trim_ascii_start().starts_with(b";") => Found::Nothing,
            Err(_) => Found::Malformed(NO_UTF8),
            Ok(line) => match rules {
                Rules::V3 => read_since_3_3(line, &mut section),
                Rules::V1 | Rules::V2 => read_before_3_3(line, &mut section, rules, any_pair),
            },
        };
        any_pair |= matches!(&found, Found::Pair(..));
        all.push(Read { line: index + 1, section: section.clone(), found });
    }
    all
}

fn read_since_3_3(line: &str, section: &mut String) -> Found {
    let trimmed = trim(line);
    if trimmed.is_empty() || trimmed.starts_with(';') {
        return Found::Nothing;
    }
    let line = trim(before_comment(trimmed));
    if let Some(rest) = line.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((name, "")) if !name.is_empty() => {
                name.clone_into(section);
                Found::Header
            }
            _ => Found::BadHeader(meant_section(rest)),
        };
    }
    let pair = line.split_once(" = ").or_else(|| line.split_once('='));
    match pair {
        None => Found::Malformed(NO_PAIR),
        Some((key, _)) if trim(key).is_empty() => Found::Malformed(NO_KEY),
        Some(_) if section.is_empty() => Found::Malformed(NO_SECTION),
        Some((key, value)) if trim(value).is_empty() => Found::Empty(trim(key).to_owned()),
        Some((key, value)) => Found::Pair(trim(key).to_owned(), trim(value).to_owned()),
    }
}

fn read_before_3_3(line: &str, section: &mut String, rules: Rules, any_pair: bool) -> Found {
    let stripped = line.trim_matches(' ');
    if let Some(rest) = stripped.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((name, "")) => {
                name.clone_into(section);
                Found::Header
            }
            _ => Found::BadHeader(meant_section(rest)),
        };
    }
    if trim(stripped).is_empty() || stripped.starts_with(';') {
        return Found::Nothing;
    }
    let Some((key, value)) = stripped.split_once('=') else {
        // A continuation is recognised by exactly one blank in front.
        let indented = line.strip_prefix(' ').is_some_and(|rest| !rest.starts_with(char::is_whitespace));
        return match (indented, any_pair) {
            (true, true) => Found::Continued(trim(before_comment(stripped)).to_owned()),
            _ => Found::Malformed(NO_PAIR),
        };
    };
    if trim(key).is_empty() {
        return Found::Malformed(NO_KEY);
    }
    let squeezed = squeeze_equals(value, rules);
    if squeezed.is_empty() {
        return Found::Empty(trim(key).to_owned());
    }
    Found::Pair(trim(key).to_owned(), trim(before_comment(&squeezed)).to_owned())
}

/// The value's parts between `=`, with the blanks that the version's split takes away.
fn squeeze_equals(value: &str, rules: Rules) -> String {
    let strip_start = |part: &str| match rules {
        Rules::V1 => part.trim_start_matches(' ').to_owned(),
        _ => part.strip_prefix(' ').unwrap_or(part).to_owned(),
    };
    let strip_end = |part: String| match rules {
        Rules::V1 => part.trim_end_matches(' ').to_owned(),
        _ => part.strip_suffix(' ').unwrap_or(&part).to_owned(),
    };
    let parts: Vec<&str> = value.split('=').collect();
    let last = parts.len() - 1;
    let stripped = parts.iter().enumerate().map(|(index, part)| {
        let part = strip_start(part);
        if index == last { part } else { strip_end(part) }
    });
    stripped.collect::<Vec<_>>().join("=")
}

fn trim(text: &str) -> &str {
    text.trim_matches([' ', '\t', '\x0b', '\x0c'])
}

fn before_comment(text: &str) -> &str {
    let end = [" ;", "\t;"].iter().filter_map(|mark| text.find(mark)).min();
    &text[..end.unwrap_or(text.len())]
}

fn meant_section(after_bracket: &str) -> String {
    let end = after_bracket.find([']', ';', '\t', ' ']).unwrap_or(after_bracket.len());
    after_bracket[..end].to_owned()
}

/// Why a line is read differently, and what to write. In the order of what misleads most.
fn difference(raw: &str, one: &Found, two: &Found, three: &Found) -> Option<&'static str> {
    let trimmed = trim(raw);
    let header = |found: &Found| matches!(found, Found::Header);
    if header(one) != header(three) {
        return Some(
            "before 3.3 a comment, a tab or an empty name makes CouchDB ignore this section header, and its keys \
             count for the section above; write `[section]` alone on its line",
        );
    }
    if header(three) {
        let name = trimmed.trim_start_matches('[').split(']').next().unwrap_or_default();
        let blank = name != trim(name);
        return blank.then_some("blanks inside the brackets belong to the section's name; delete them");
    }
    if matches!(one, Found::Continued(_)) {
        return Some(
            "before 3.3 this line continues the value above it, since 3.3 it is ignored; write the value on one line",
        );
    }
    if matches!((one, three), (Found::Empty(_), Found::Empty(_))) {
        return Some(
            "an empty value: before 3.3 it takes away the value of an earlier file, since 3.3 it says nothing; \
             delete the line, or write `off` where the key takes it",
        );
    }
    let Found::Pair(key, value) = one else {
        return (one != three)
            .then_some("CouchDB's versions read this line differently; write `key = value` without tabs");
    };
    if before_comment(trimmed) != trimmed {
        return Some(
            "in a file everything from a blank and `;` on is a comment, over HTTP it belongs to the value until \
             CouchDB restarts; put comments on a line of their own, and inside JSON write \\u003b for `;`",
        );
    }
    match three {
        Found::Pair(new_key, new_value) if new_key == key && new_value == value => {}
        Found::Pair(new_key, _) if new_key != key => {
            return Some(
                "since 3.3 the key ends at the first ` = `, before at the first `=`; write ` = ` after the key, and \
                 inside JSON \\u003d for `=`",
            );
        }
        _ => {
            return Some(
                "before 3.3 blanks around `=` inside a value vanish; leave them out, or inside JSON write \\u003d \
                 for `=`",
            );
        }
    }
    if two != three {
        return Some("2.x keeps some of the blanks around `=` inside this value; leave them out");
    }
    if !raw.is_ascii() {
        return Some(
            "characters beyond ASCII are fine in files but refused over HTTP by 2.x and 3.x; inside JSON write \
             \\uXXXX, in URLs percent-encode them",
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `section.key=value` by line, then findings as `!line`, by the rules before and since 3.3.
    fn check(text: &str, before: &str, since: &str) {
        for (dialect, expected) in [(Dialect::Before3_3, before), (Dialect::Since3_3, since)] {
            assert_eq!(shown(text.as_bytes(), dialect), expected, "{text:?} by the rules of {dialect:?}");
        }
    }

    fn shown(text: &[u8], dialect: Dialect) -> String {
        let (entries, findings) = parse(text, dialect);
        let entries = entries.iter().map(|e| format!("{}.{}={}", e.section, e.key, e.value));
        let findings = findings.iter().map(|finding| format!("!{}", finding.line));
        entries.chain(findings).collect::<Vec<_>>().join(" | ")
    }

    fn same(text: &str, expected: &str) {
        check(text, expected, expected);
    }

    #[test]
    fn plain_lines_read_the_same() {
        same("", "");
        same("[s]\nk=v", "s.k=v");
        same("[s]\r\n\r\nk = v\r\n", "s.k=v");
        same("[s]\n  k  =  v  ", "s.k=v");
        same("[s]\n; k = v\n ; k = v\n;k=v", "");
        same("[s]\n;k=v\n[t]\nk=v", "t.k=v");
        same("[s]\nk=v=v", "s.k=v=v");
        same("[s]\nk==v", "s.k==v");
        same("[s]\nk=v;w", "s.k=v;w");
        same("[s]\nk=v; w", "s.k=v; w");
        same("[s]\nk = v ; comment", "s.k=v");
        same("[s]\nk = v\t; comment", "s.k=v");
        same("[s]\nk = {\"a\":[1,2]}", "s.k={\"a\":[1,2]}");
        same("[a.b.c]\nheader.x-y = https://h/?a%7E*", "a.b.c.header.x-y=https://h/?a%7E*");
        same("[s]\nk =\nl = 1", "s.l=1");
        same("[s]\nk = grün", "s.k=grün");
        same("[s]\rk=v\x1al=w", "s.k=v | s.l=w");
    }

    #[test]
    fn versions_differ() {
        check("[a]\nk=1\n[b] ; x\nl=2", "a.k=1 | a.l=2 | !3", "a.k=1 | b.l=2");
        check("[s]\nk = a = b", "s.k=a=b", "s.k=a = b");
        check("[s]\nk=a = b", "s.k=a=b", "s.k=a=b");
        check("[s]\nk = v\n more", "s.k=v more", "s.k=v | !3");
        check("[s]\nk = v\n  more", "s.k=v | !3", "s.k=v | !3");
        check("[s]\nk=1\nk=2", "s.k=1", "s.k=2");
        check("[s]\nk=1\nk=", "s.k=1", "s.k=1");
        check("\t[s]\nk=1", ".k=1 | !1", "s.k=1");
        check("[s]\nk = ; c", "s.k=; c", "");
        check("k = v", ".k=v", "!1");
        check("[s]\nk ; c = v", "s.k ; c=v", "!2");
    }

    #[test]
    fn malformed_lines_are_said_and_lose_nothing_else() {
        same("[s]\nno pair\nk=v", "s.k=v | !2");
        same("[s]\n= v\nk=v", "s.k=v | !2");
        check("[s\nk=v\n[s]\nl=w", ".k=v | s.l=w | !1", "s.l=w | !1 | !2");
    }

    #[test]
    fn invalid_utf8_loses_one_line() {
        for dialect in [Dialect::Before3_3, Dialect::Since3_3] {
            assert_eq!(shown(b"[s]\nk=\xff\nl=w", dialect), "s.l=w | !2");
            assert_eq!(shown(b"[s]\n; \xe4\nl=w", dialect), "s.l=w");
            let (_, findings) = parse(b"[s]\n[\xff]\nl=w", dialect);
            assert!(findings[0].header.is_some(), "keys below it belong elsewhere");
        }
    }

    #[test]
    fn a_byte_order_mark_is_skipped_and_said() {
        assert_eq!(shown(b"\xef\xbb\xbf[s]\nk=v", Dialect::Since3_3), "s.k=v");
        assert_eq!(differing(b"\xef\xbb\xbf[s]\nk=v"), "1: a byte order mark");
    }

    /// The first four words of each difference.
    fn differing(text: &[u8]) -> String {
        let findings = differences(text, |section| section == "s");
        let words = findings.iter().map(|finding| {
            let words: Vec<&str> = finding.message.split(' ').take(4).collect();
            format!("{}: {}", finding.line, words.join(" ").trim_end_matches([',', ':']))
        });
        words.collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn lines_that_versions_read_differently_are_named() {
        let check = |text: &str, expected: &str| assert_eq!(differing(text.as_bytes()), expected, "{text:?}");
        check("[s]\nk = v\n; comment\n\nl=w", "");
        check("[s] ; x\nk=v", "1: before 3.3 a comment");
        check("[s]\nk=v\n[t] ; x\nl=v", "3: before 3.3 a comment");
        check("\t[s]\nk=v", "1: before 3.3 a comment");
        check("[ s]\nk=v", "");
        check("[s]\nk = {\"a\":\"x ;y\"}", "2: in a file everything");
        check("[s]\nk = ; c", "2: in a file everything");
        check("[s]\nk = a = b", "2: before 3.3 blanks around");
        check("[s]\nk=a = b", "2: since 3.3 the key");
        check("[s]\nk = a=b", "");
        check("[s]\nk = v\n more", "3: before 3.3 this line");
        check("[s]\nk = v\n\tmore", "");
        check("[s]\nk=1\nk=2", "3: this key stands in");
        check("[s]\nk =", "2: an empty value: before");
        check("[s]\nk = grün", "2: characters beyond ASCII are");
        check("[t] ; x\nk = a = b", "");
    }
}
