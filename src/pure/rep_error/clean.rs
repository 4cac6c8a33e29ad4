//! Takes what may be secret out of the reasons CouchDB gives: allow-lists for terms, patterns for plain text.
//!
//! Of a term only atoms leave, and those texts and numbers whose place says what they are ([`told`]): a method, a URL,
//! the reason in an answer. Everything else in it may be a header, a login or a document. In plain text URLs lose all
//! but scheme, host, port and path, and what looks like a credential becomes `***`: that is the second best, kept for
//! what is no term. Whoever knows the secrets themselves should look for them as well.

use crate::pure::erlang_term::{self, Term};
use crate::pure::url;

/// What stands where something was taken out.
pub(super) const HIDDEN: &str = "***";

/// Words that stand in front of a credential, with `=` or `:` between.
const KEYS: &[&str] = &[
    "authorization",
    "cookie",
    "authsession",
    "password",
    "passwd",
    "pwd",
    "secret",
    "token",
    "apikey",
    "api_key",
    "api-key",
    "oauth",
    "signature",
];
/// Schemes of `Authorization`: the credential is the next word.
const SCHEMES: &[&str] = &["basic", "bearer", "digest", "negotiate"];

/// A text that may end in a term, as CouchDB writes them: `Failure on source commit: {'EXIT',…}`.
pub(super) fn parts(text: &str) -> (&str, Option<Term>) {
    const BEFORE: &str = ": ";
    let text = text.trim();
    let opens = |rest: &str| rest.starts_with(['{', '[']) || rest.starts_with("<<");
    let starts = text.match_indices(BEFORE).map(|(at, _)| at + BEFORE.len());
    let Some(start) = std::iter::once(0).chain(starts).find(|at| opens(&text[*at..])) else {
        return (text, None);
    };
    match erlang_term::read(&text[start..]) {
        Some((term, "")) => (text[..start].trim_end().trim_end_matches(':'), Some(term)),
        _ => (text, None),
    }
}

/// A text of either kind in one line, with nothing that may be secret.
pub(super) fn cleaned(text: &str) -> String {
    match parts(text) {
        ("", Some(term)) => show(&term),
        (lead, Some(term)) => format!("{}: {}", clean(lead), show(&term)),
        (text, None) => clean(&without_quoted(text)),
    }
}

/// What looks like a term and is none: only URLs are left of its quoted texts.
fn without_quoted(text: &str) -> String {
    let Some(start) = text.find(['{', '[']).filter(|at| text[*at..].contains('"')) else {
        return text.to_owned();
    };
    let (lead, rest) = text.split_at(start);
    let parts = rest.split('"').enumerate().map(|(at, part)| match part {
        part if at % 2 == 0 || url::without_secrets(part).is_some() => part,
        _ => HIDDEN,
    });
    format!("{lead}{}", parts.collect::<Vec<_>>().join("\""))
}

/// Plain text in one line, without logins, queries and credentials.
pub(super) fn clean(text: &str) -> String {
    without_credentials(&without_logins(&one_line(text)))
}

/// Every run of blanks and control characters is one blank.
fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Shortens to `n` bytes at most; `…` says that something is missing.
pub(super) fn bound(mut text: String, n: usize) -> String {
    const MORE: &str = "…";
    if text.len() > n {
        let mut end = n - MORE.len();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text += MORE;
    }
    text
}

fn without_logins(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(colon) = rest.find("://") {
        let (before, url) = rest.split_at(scheme_start(rest, colon));
        shown += before;
        let behind = colon - before.len() + 3;
        // A login may hold anything, blanks and quotes too, and ends at the last `@`.
        let next = url[behind..].find("://").map(|at| behind + scheme_start(&url[behind..], at));
        let region = &url[..next.unwrap_or(url.len()).max(behind)];
        let end = |from: usize, of: &str| of[from..].find(ends_url).map_or(of.len(), |at| from + at);
        let quote = before.chars().next_back().filter(|c| matches!(c, '`' | '"' | '\''));
        let span = quote.and_then(|quote| region.find(quote)).map_or(region, |at| &region[..at]);
        let token = &span[..end(behind, span)];
        let token = token.trim_end_matches(['.', ',', ';', ')']);
        // `http://u:` may be the start of a login.
        let has_path = token[behind..].contains('/');
        let token = if has_path { token.trim_end_matches(':') } else { token };
        let at_sign = |of: &str| of.rfind('@');
        let told = if at_sign(span) == at_sign(token) { url::without_secrets(token) } else { None };
        let taken = match &told {
            Some(_) => token.len(),
            None => end(at_sign(region).unwrap_or(0).max(token.len()), region),
        };
        shown += told.as_deref().unwrap_or(HIDDEN);
        rest = &url[taken..];
    }
    shown + rest
}

fn ends_url(c: char) -> bool {
    c == ' ' || matches!(c, '`' | '"' | '\'' | '<' | '>')
}

fn scheme_start(text: &str, colon: usize) -> usize {
    let scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    text[..colon].char_indices().rev().take_while(|(_, c)| scheme(*c)).last().map_or(colon, |(at, _)| at)
}

fn without_credentials(line: &str) -> String {
    let mut shown: Vec<String> = Vec::new();
    let mut hide_next = false;
    for word in line.split(' ') {
        let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_ascii_lowercase();
        let is_scheme = SCHEMES.contains(&bare.as_str());
        if std::mem::replace(&mut hide_next, is_scheme) {
            shown.push(if is_scheme { word.to_owned() } else { HIDDEN.to_owned() });
            continue;
        }
        let mut word = word.to_owned();
        if let Some(at) = word.find('?').filter(|at| word[*at..].contains('=')) {
            word.truncate(at);
        }
        if let Some(value) = value_start(&word) {
            let (name, value) = word.split_at(value);
            let bare = value.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_ascii_lowercase();
            hide_next = bare.is_empty() || SCHEMES.contains(&bare.as_str());
            word = if hide_next { word } else { format!("{name}{HIDDEN}") };
        } else if word.find('@').is_some_and(|at| word[..at].contains(':')) {
            word = HIDDEN.to_owned();
        }
        shown.push(word);
    }
    shown.join(" ")
}

/// Where the credential begins in `password=x`, `"oauth_token_secret":"x"`.
fn value_start(word: &str) -> Option<usize> {
    let lower = word.to_ascii_lowercase();
    let starts = KEYS.iter().filter_map(|key| lower.find(key).map(|at| at + key.len()));
    let in_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '"' | '\'' | '`');
    let values = starts.filter_map(|from| {
        let rest = lower[from..].trim_start_matches(in_name);
        rest.starts_with(['=', ':']).then(|| lower.len() - rest.len() + 1)
    });
    values.min()
}

/// A term in one line, only with what may leave.
pub(super) fn show(term: &Term) -> String {
    let mut shown = String::new();
    put(term, false, &mut shown);
    shown
}

/// Whether the text or number at place `at` of a tuple is of a kind that may leave, by the atom at its head.
///
/// Source: `couch_replicator_{httpc,api_wrap,worker,scheduler_job,auth_session,parse,docs}.erl` of 1.6.1 and 3.5.0.
pub(super) fn told(head: &str, at: usize) -> bool {
    match head {
        // Method, URL; URL, user name; code, URL, user name.
        "http_request_failed" => at <= 2,
        "session_request_failed"
        | "session_request_unauthorized"
        | "session_request_forbidden"
        | "session_requires_valid_user"
        | "session_not_supported" => at == 1,
        "session_unexpected_result" => at <= 2,
        "code"
        | "stat_code"
        | "http_error_code"
        | "error"
        | "reason"
        | "unauthorized"
        | "forbidden"
        | "not_found"
        | "db_not_found"
        | "nxdomain"
        | "missing_stub"
        | "doc_validation"
        | "bad_request"
        | "bad_rep_doc"
        | "filter_fetch_error"
        | "invalid_attachment_name"
        | "checkpoint_commit_failure"
        | "changes_req_failed"
        | "bulk_docs_failed"
        | "bulk_get_failed"
        | "revs_diff_failed"
        | "doc_write_failed"
        | "tls_alert"
        | "shutdown"
        | "temporary_error"
        | "permanent_failure" => true,
        _ => false,
    }
}

/// Tuples whose inner tuple is `{KIND,TEXT}` with a kind of many.
fn tells_inside(head: &str) -> bool {
    matches!(head, "tls_alert" | "doc_write_failed")
}

fn put(term: &Term, may_tell: bool, shown: &mut String) {
    match term {
        Term::Atom(name) => put_atom(name, shown),
        Term::Number(number) => *shown += if may_tell { number } else { "_" },
        Term::Text(text) => put_text("", text, may_tell, "", shown),
        Term::Binary(text) => put_text("<<", text, may_tell, ">>", shown),
        Term::Bytes => *shown += "<<_>>",
        Term::Opaque(text) => *shown += text,
        Term::Map(_) => *shown += "#{_}",
        Term::Cut => *shown += "...",
        // A text beyond Latin 1 is printed as the numbers of its characters.
        Term::List(items) if items.iter().any(|item| matches!(item, Term::Number(_))) => *shown += "[_]",
        Term::List(items) => put_items(items, |_, _| false, ["[", "]"], shown),
        Term::Tuple(items) => {
            let is_tuple = |item: &Term| matches!(item, Term::Tuple(_));
            match items.first() {
                Some(Term::Atom(head)) => put_items(
                    items,
                    |at, item| if is_tuple(item) { tells_inside(head) } else { may_tell || told(head, at) },
                    ["{", "}"],
                    shown,
                ),
                // A member of a JSON object.
                Some(Term::Binary(name)) if items.len() == 2 => {
                    let tells = may_tell || matches!(name.as_str(), "error" | "reason");
                    put_items(items, |_, item| tells && !is_tuple(item), ["{", "}"], shown);
                }
                _ => put_items(items, |_, _| false, ["{", "}"], shown),
            }
        }
    }
}

fn put_items(items: &[Term], tells: impl Fn(usize, &Term) -> bool, ends: [&str; 2], shown: &mut String) {
    *shown += ends[0];
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            shown.push(',');
        }
        put(item, tells(at, item), shown);
    }
    *shown += ends[1];
}

fn put_text(open: &str, text: &str, may_tell: bool, close: &str, shown: &mut String) {
    let text = if may_tell { cleaned(text).replace('"', "'") } else { HIDDEN.to_owned() };
    *shown += &format!("{open}\"{text}\"{close}");
}

fn put_atom(name: &str, shown: &mut String) {
    const BYTES_MAX: usize = 80;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let node = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '@' | '.' | '-');
    if name.len() > BYTES_MAX || !name.chars().all(node) {
        *shown += "'_'";
    } else if name.chars().all(plain) {
        *shown += name;
    } else {
        *shown += &format!("'{name}'");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pure::erlang_term::read;

    #[test]
    fn plain_text_loses_logins_and_queries() {
        let check = |text: &str, expected: &str| assert_eq!(clean(text), expected, "{text}");
        check("could not open http://admin:*****@h:1/db/", "could not open http://h:1/db/");
        check("GET https://h/db/_changes?token=x&y=z failed", "GET https://h/db/_changes failed");
        check("from `http://u:x@h/a/`: gone", "from `http://h/a/`: gone");
        check("http://u:x@h/a http://v:y@i/b.", "http://h/a http://i/b.");
        // Whatever a password holds.
        check("open http://u:x y@h/db/ now", "open *** now");
        check("open http://u:x@y z@h/db/", "open ***");
        check("open `http://u:x`y@h/db/` now", "open `***` now");
        check("open http://u:x/y@h/db/", "open ***");
        check("open http://u:x?y@h/db/", "open ***");
        check("open http://u:a://x@h/db/", "open ******");
        check("open http://u:x", "open ***");
        check("no scheme u:x@h/db", "no scheme ***");
        check("asked for /db/_all_docs?key=x now", "asked for /db/_all_docs now");
        check("a\r\n  b\tc\u{0}d", "a b c d");
    }

    #[test]
    fn plain_text_loses_credentials() {
        let check = |text: &str, expected: &str| assert_eq!(clean(text), expected, "{text}");
        check("Authorization: Basic eDp5 refused", "Authorization: Basic *** refused");
        check("authorization: eDp5 refused", "authorization: *** refused");
        check("authorization=Bearer eDp5", "authorization=Bearer ***");
        check("sent Basic eDp5.", "sent Basic ***");
        check("Cookie: AuthSession=x; y", "Cookie: *** y");
        check("{\"oauth_token_secret\":\"x\"}", "{\"oauth_token_secret\":***");
        check("password=x, pwd: y", "password=*** pwd: ***");
        check("Name or password is incorrect.", "Name or password is incorrect.");
    }

    #[test]
    fn of_a_term_only_what_has_a_known_place_is_shown() {
        let check = |text: &str, expected: &str| {
            let (term, rest) = read(text).unwrap();
            assert_eq!((show(&term).as_str(), rest), (expected, ""), "{text}");
        };
        check(
            "{http_request_failed,\"GET\",\n \"http://u:*****@h/db/?x=y\",\n {error,{code,503}}}",
            r#"{http_request_failed,"GET","http://h/db/",{error,{code,503}}}"#,
        );
        check(
            r#"{session_request_failed,"http://h/_session","name",{conn_failed,{error,nxdomain}}}"#,
            r#"{session_request_failed,"http://h/_session","***",{conn_failed,{error,nxdomain}}}"#,
        );
        check(
            r#"{session_unexpected_result,"500","http://h/_session","name"}"#,
            r#"{session_unexpected_result,"500","http://h/_session","***"}"#,
        );
        check(
            r#"{badmatch,{httpdb,"http://u:p@h/",nil,[{"Authorization","Basic eDp5"}],30000,[{basic_auth,{"u","p"}}]}}"#,
            r#"{badmatch,{httpdb,"***",nil,[{"***","***"}],_,[{basic_auth,{"***","***"}}]}}"#,
        );
        check(
            r#"{bulk_docs_failed,500,{[{<<"error">>,<<"e">>},{<<"reason">>,<<"at http://u:p@h/?q">>},{<<"doc">>,<<"d">>}]}}"#,
            r#"{bulk_docs_failed,500,{[{<<"error">>,<<"e">>},{<<"reason">>,<<"at http://h/">>},{<<"***">>,<<"***">>}]}}"#,
        );
        check(
            r#"{tls_alert,{unknown_ca,"TLS client: Unknown CA"}}"#,
            r#"{tls_alert,{unknown_ca,"TLS client: Unknown CA"}}"#,
        );
        check(
            r#"{doc_write_failed,{<<"forbidden">>,<<"no">>}}"#,
            r#"{doc_write_failed,{<<"forbidden">>,<<"no">>}}"#,
        );
        check(
            "{x,[112,8364],<<1,2>>,#{a => \"b\"},'n@h','a b',<0.1.2>,...}",
            "{x,[_],<<_>>,#{_},'n@h','_',<0.1.2>,...}",
        );
    }

    #[test]
    fn cuts_between_characters() {
        assert_eq!(bound("short".to_owned(), 5), "short");
        assert_eq!(bound("ääääää".to_owned(), 10), "äää…");
    }
}
