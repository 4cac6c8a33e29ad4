//! Erlang's reasons in plain words: what failed, and at the end of the chain why.
//!
//! Every arm says which shape CouchDB gives where it is not plain; what no arm knows is told as it stands, cleaned.

use http::StatusCode;

use crate::pure::erlang_term::Term;
use crate::pure::rep_error::Class;
use crate::pure::rep_error::clean::{clean, cleaned, parts, show, told};
use crate::pure::url;

/// What is at the bottom of it: decides class and hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// Nothing listens.
    Refused,
    /// The host name is not known.
    NoName,
    /// No way there.
    NoRoute,
    /// The connection broke.
    Lost,
    /// TLS could not be agreed upon.
    Tls,
    /// 502, 503.
    Down,
    /// The proxy refuses.
    Proxy,
    /// 401.
    Login,
    /// 403 at a login.
    Locked,
    /// 404.
    Missing,
    /// The filter.
    Filter,
    /// No room.
    Full,
    /// 413.
    TooLarge,
    /// 403.
    Forbidden,
    /// A document was refused by the target.
    Refuses,
    /// Too slow.
    Slow,
    /// The same replication twice.
    Duplicate,
    /// Died.
    Crash,
    /// 429.
    Rate,
    /// The document is at fault.
    Document,
    /// The checkpoint.
    Checkpoint,
    /// Not CouchDB's answer.
    NoCouch,
    /// 500.
    Server,
    /// Anything else.
    Other,
}

impl Cause {
    /// The kind of failure.
    pub(super) fn class(self) -> Class {
        use Cause as C;
        match self {
            C::Refused | C::NoName | C::NoRoute | C::Lost | C::Tls | C::Down | C::Proxy => Class::Unreachable,
            C::Login | C::Locked => Class::Auth,
            C::Missing => Class::NotFound,
            C::Filter => Class::Filter,
            C::Full | C::TooLarge => Class::TargetFull,
            C::Forbidden | C::Refuses => Class::Forbidden,
            C::Slow => Class::Timeout,
            C::Duplicate => Class::Duplicate,
            C::Crash => Class::Crash,
            C::Rate | C::Document | C::Checkpoint | C::NoCouch | C::Server | C::Other => Class::Other,
        }
    }

    /// What to do.
    pub(super) fn hint(self) -> &'static str {
        match self {
            Cause::Refused => {
                "nothing listens there: start that server, or correct host and port in the document"
            }
            Cause::NoName => {
                "correct the host name in the document, or the DNS of the server that replicates"
            }
            Cause::NoRoute => {
                "check routes, firewall and proxy between the two servers; CouchDB tries again by itself"
            }
            Cause::Lost => "see the other server's log and any proxy between; CouchDB tries again by itself",
            Cause::Tls => {
                "check certificate and TLS versions there, and `ssl_trusted_certificates_file` in [replicator] here"
            }
            Cause::Down => {
                "the other server or a proxy before it is down or overloaded; CouchDB tries again by itself"
            }
            Cause::Proxy => {
                "check `proxy`, `source_proxy` and `target_proxy` of the document, and the proxy itself"
            }
            Cause::Login => "correct user name and password of `source` and `target` in the document",
            Cause::Locked => {
                "too many wrong passwords, or no right to log in: correct the password, then wait some minutes"
            }
            Cause::Missing => "create the database, correct its name in the document, or set `create_target`",
            Cause::Filter => {
                "put the filter's design document into the source, or correct `filter` in the document"
            }
            Cause::Full => "make room on the target's disk, or raise its quota",
            Cause::TooLarge => {
                "raise `max_document_size` and `max_http_request_size` at the target, and limits of proxies before it"
            }
            Cause::Forbidden => {
                "let the user read the source, write the target, and write `_local` documents in both"
            }
            Cause::Refuses => {
                "see the target's `validate_doc_update` functions, and the members of the document named"
            }
            Cause::Slow => {
                "check that it can be reached and is not overloaded; raise `connection_timeout`, lower `worker_batch_size`"
            }
            Cause::Duplicate => "delete one of the two: they ask for the same source, target and options",
            Cause::Crash => "see CouchDB's log at that time; it tries again by itself",
            Cause::Rate => {
                "lower `http_connections` and `worker_processes` of the document, or raise the limit of the other server"
            }
            Cause::Document => {
                "correct the document: `couch-hookd replications check DOC_ID` names every fault"
            }
            Cause::Checkpoint => {
                "check whether a database was made again or its server restarted; it goes on from the last checkpoint"
            }
            Cause::NoCouch => {
                "check that the URL is a CouchDB database's, and what a proxy before it answers"
            }
            Cause::Server => "see the other server's log at that time; CouchDB tries again by itself",
            Cause::Other => "see CouchDB's log at that time",
        }
    }
}

/// A reason in words.
#[derive(Debug)]
pub(super) struct Said {
    /// One line, cleaned.
    pub(super) words: String,
    /// `None` where nothing known was found.
    pub(super) cause: Option<Cause>,
}

fn said(words: impl Into<String>, cause: impl Into<Option<Cause>>) -> Said {
    Said { words: words.into(), cause: cause.into() }
}

impl Said {
    /// `what failed: why`.
    fn after(self, what: &str) -> Said {
        let words = if self.words.is_empty() { what.to_owned() } else { format!("{what}: {}", self.words) };
        Said { words, cause: self.cause }
    }

    fn or(self, cause: Cause) -> Said {
        Said { cause: self.cause.or(Some(cause)), ..self }
    }
}

/// More sentences within sentences are told as they stand. CouchDB nests up to about five.
const NESTED_MAX: usize = 12;

/// A reason.
pub(super) fn of_reason(text: &str) -> Said {
    if text.matches(": ").count() > NESTED_MAX { said(cleaned(text), by_phrase(text)) } else { of_text(text) }
}

/// A text: a term, a sentence, a sentence that ends in a term, `an_atom: a sentence`.
fn of_text(text: &str) -> Said {
    match parts(text) {
        ("", Some(term)) => of_term(&term),
        (lead, Some(term)) => with_term(lead, &term),
        (text, None) => of_sentence(text),
    }
}

/// `couch_replicator_filters.erl` (2.x, 3.x), `couch_replicator_utils.erl` (1.x), `…_scheduler_job.erl`.
fn with_term(lead: &str, term: &Term) -> Said {
    let inner = of_term(term);
    let filter =
        ["Couldn't open document", "Couldn't parse filter code"].iter().any(|start| lead.starts_with(start));
    if filter && matches!(inner.cause, None | Some(Cause::Missing)) {
        return said(inner.after(&clean(lead)).words, Cause::Filter);
    }
    inner.after(&clean(lead)).or(of_sentence(lead).cause.unwrap_or(Cause::Other))
}

fn of_sentence(text: &str) -> Said {
    let text = text.trim();
    // What CouchDB makes of `{error,{db_not_found,<<"could not open …">>}}`.
    let word = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if let Some((name, rest)) = text.split_once(": ").filter(|(name, _)| word(name)) {
        return of_tuple(name, &[Term::Binary(rest.to_owned())], true);
    }
    if !text.is_empty() && word(text) {
        return of_atom(text);
    }
    said(cleaned(text), by_phrase(text))
}

/// What sentences say, in CouchDB's own words and in those of servers, first fit.
fn by_phrase(text: &str) -> Option<Cause> {
    const PHRASES: &[(&str, Cause)] = &[
        ("already started, triggered by", Cause::Duplicate),
        ("already running as a transient", Cause::Duplicate),
        ("duplicate replication", Cause::Duplicate),
        ("failed to start due to timeout", Cause::Slow),
        ("must match `ddocname/filtername`", Cause::Filter),
        ("invalid `view` parameter", Cause::Filter),
        ("couldn't parse filter code", Cause::Filter),
        ("couldn't open document `_design/", Cause::Filter),
        ("missing json key", Cause::Filter),
        ("compilation_error", Cause::Filter),
        ("temporarily locked", Cause::Locked),
        ("name or password is incorrect", Cause::Login),
        ("unauthorized", Cause::Login),
        ("could not resolve", Cause::NoName),
        ("nxdomain", Cause::NoName),
        ("econnrefused", Cause::Refused),
        ("connection refused", Cause::Refused),
        ("enospc", Cause::Full),
        ("no space left", Cause::Full),
        ("insufficient storage", Cause::Full),
        ("quota", Cause::Full),
        ("too large", Cause::TooLarge),
        ("too_large", Cause::TooLarge),
        ("timed out", Cause::Slow),
        ("timedout", Cause::Slow),
        ("timeout", Cause::Slow),
        ("database does not exist", Cause::Missing),
        ("no_db_file", Cause::Missing),
        ("not_found", Cause::Missing),
        ("could not open http", Cause::Missing),
        ("not a server admin", Cause::Forbidden),
        ("not a db or server admin", Cause::Forbidden),
        ("not allowed", Cause::Forbidden),
        ("forbidden", Cause::Forbidden),
        ("doc_validation", Cause::Refuses),
        ("special document member", Cause::Refuses),
        ("has an invalid url", Cause::Document),
        ("invalid proxy url", Cause::Document),
        ("missing replicator database", Cause::Document),
        ("mutually exclusive", Cause::Document),
        ("parameter `", Cause::Document),
        ("checkpoint document", Cause::Checkpoint),
        ("instance_start_time on", Cause::Checkpoint),
        ("out of sync", Cause::Checkpoint),
        ("out of  sync", Cause::Checkpoint),
        ("bad request", Cause::Document),
    ];
    let text = text.to_lowercase();
    PHRASES.iter().find(|(phrase, _)| text.contains(phrase)).map(|(_, cause)| *cause)
}

fn of_atom(name: &str) -> Said {
    let (words, cause) = match name {
        "econnrefused" => ("connection refused", Cause::Refused),
        "nxdomain" => ("host name not found", Cause::NoName),
        "ehostunreach" => ("host unreachable", Cause::NoRoute),
        "enetunreach" => ("network unreachable", Cause::NoRoute),
        "ehostdown" => ("host is down", Cause::NoRoute),
        "enetdown" => ("network is down", Cause::NoRoute),
        "eacces" | "eperm" => ("the system forbids the connection", Cause::NoRoute),
        "eaddrnotavail" => ("no local address or port left", Cause::NoRoute),
        "etimedout" => ("no answer to the connection", Cause::NoRoute),
        "emfile" | "enfile" | "system_limit" => ("too many open files", Cause::Crash),
        "econnreset" => ("connection reset", Cause::Lost),
        "econnaborted"
        | "epipe"
        | "enotconn"
        | "closed"
        | "sel_conn_closed"
        | "connection_closed"
        | "connection_closing"
        | "connection_closed_no_retry"
        | "closing_on_request"
        | "mid_stream"
        | "more_data_expected"
        | "worker_is_dead"
        | "socket_closed_remotely" => ("connection closed", Cause::Lost),
        "send_failed" => ("sending failed", Cause::Lost),
        "conn_failed" => ("no connection", Cause::NoRoute),
        "eoptions" | "ecert" | "esslaccept" | "esslconnect" | "ssl_not_started" => ("TLS failed", Cause::Tls),
        "proxy_tunnel_failed" | "unacceptable" => ("the proxy refused", Cause::Proxy),
        "timeout" | "req_timedout" | "connect_timeout" | "ibrowse_stream_cleanup" => ("timeout", Cause::Slow),
        "max_backoff" => ("too many answers of 429 (too many requests)", Cause::Rate),
        "retry_later" | "all_allocated" => ("no free connection", Cause::Slow),
        "kaboom" | "open_doc_revs_failed" => ("a document could not be read after all retries", Cause::Crash),
        "enospc" | "edquot" => ("no space left", Cause::Full),
        "insufficient_storage" | "quota_exceeded" | "over_quota" => ("no space left", Cause::Full),
        "request_body_too_large"
        | "request_entity_too_large"
        | "document_too_large"
        | "too_large"
        | "attachment_too_large" => ("a document is too large for the target", Cause::TooLarge),
        "request_uri_too_long" => ("a URL is too long for the other server", Cause::NoCouch),
        "unauthorized" => ("user name or password is wrong or missing", Cause::Login),
        "missing_credentials" | "cookie_not_found" | "cookie_format_invalid" => {
            ("no session cookie", Cause::Login)
        }
        "forbidden" => ("forbidden", Cause::Forbidden),
        "doc_validation" => ("a document is not valid for the target", Cause::Refuses),
        "unsupported_media_type" | "missing_stub" | "invalid_attachment_name" => {
            ("the target refuses a document's attachment", Cause::Refuses)
        }
        "not_found" | "no_db_file" | "missing" | "deleted" => ("not found", Cause::Missing),
        "db_not_found" | "illegal_database_name" => ("database not found", Cause::Missing),
        "duplicate_job" | "already_started" | "already_present" => {
            ("the same replication runs elsewhere", Cause::Duplicate)
        }
        "local_endpoints_not_supported" => {
            ("a bare database name: this CouchDB takes only URLs", Cause::Document)
        }
        "invalid_uri" | "url_parsing_failed" | "invalid_url" | "invalid_host" => {
            ("not a URL", Cause::Document)
        }
        "bad_rep_doc" | "bad_request" => ("the document is not valid", Cause::Document),
        "conflict" => ("conflict", Cause::Checkpoint),
        "invalid_json" | "invalid_ejson" | "invalid_results" => {
            ("the answer is no valid JSON", Cause::NoCouch)
        }
        "internal_server_error" => ("internal server error", Cause::Server),
        "compilation_error" | "filter_fetch_error" => ("the filter failed", Cause::Filter),
        "killed" | "kill" | "noproc" | "function_clause" | "badarg" | "badarith" | "undef"
        | "noconnection" | "normal" | "shutdown" => (name, Cause::Crash),
        _ => return said(name.replace('_', " "), None),
    };
    said(words.replace('_', " "), cause)
}

fn of_code(code: u16) -> Said {
    let cause = match code {
        401 => Cause::Login,
        403 => Cause::Forbidden,
        404 => Cause::Missing,
        407 => Cause::Proxy,
        408 | 504 => Cause::Slow,
        413 => Cause::TooLarge,
        429 => Cause::Rate,
        502 | 503 => Cause::Down,
        507 => Cause::Full,
        500..600 => Cause::Server,
        _ => Cause::NoCouch,
    };
    let name = StatusCode::from_u16(code).ok().and_then(|code| code.canonical_reason()).unwrap_or_default();
    said(format!("{code} {}", name.to_lowercase()).trim().to_owned(), cause)
}

fn of_term(term: &Term) -> Said {
    match term {
        Term::Atom(name) => of_atom(name),
        Term::Number(number) => number.parse().map_or_else(|_| said(cleaned(number), None), of_code),
        Term::Text(text) | Term::Binary(text) => of_text(text),
        Term::Tuple(items) => match without_cut(items) {
            // A JSON object.
            [Term::List(members)] => of_members(members).unwrap_or_else(|| said(show(term), None)),
            // `{Reason,Stacktrace}`, which would say nothing more.
            [reason, Term::List(stack)] if is_stack(stack) => of_hidden(reason).or(Cause::Crash),
            [Term::Atom(name), rest @ ..] => of_tuple(name, rest, false),
            // `{<<"forbidden">>,<<"reason">>}`, out of an answer.
            [Term::Binary(name), rest] if !name.is_empty() && name.len() < 40 => {
                of_sentence(&format!("{name}: {}", rest.text().unwrap_or_default()))
            }
            [only] => of_hidden(only),
            _ => said(show(term), None),
        },
        Term::List(members) => of_members(members).unwrap_or_else(|| said(show(term), None)),
        Term::Cut => said("", None),
        _ => said(show(term), None),
    }
}

fn without_cut(items: &[Term]) -> &[Term] {
    let n_cut = items.iter().rev().take_while(|item| **item == Term::Cut).count();
    &items[..items.len() - n_cut]
}

/// A text at a place that nothing is known about is not told.
fn of_hidden(term: &Term) -> Said {
    if term.text().is_some() { said(show(term), None) } else { of_term(term) }
}

fn is_stack(items: &[Term]) -> bool {
    let is_frame =
        |item: &Term| matches!(item, Term::Tuple(frame) if frame.len() >= 3 && frame[0].atom().is_some());
    items.first().is_some_and(is_frame)
}

/// `{"error":"forbidden","reason":"…"}` as CouchDB holds it.
fn of_members(members: &[Term]) -> Option<Said> {
    let member = |wanted: &str| {
        members.iter().find_map(|member| match member {
            Term::Tuple(pair) if pair.len() == 2 && pair[0].text() == Some(wanted) => pair[1].text(),
            _ => None,
        })
    };
    let error = member("error")?;
    Some(of_sentence(&format!("{error}: {}", member("reason").unwrap_or_default())))
}

/// `{name,rest…}`. `all`: whether every text in it may be told, and not only those whose place is known.
fn of_tuple(name: &str, rest: &[Term], all: bool) -> Said {
    let item = |at: usize| -> Said {
        let inner = of_term(&rest[at]);
        let is_plain = matches!(rest[at], Term::Text(_) | Term::Binary(_) | Term::Number(_));
        // What it says may decide, and must not be repeated.
        if is_plain && !all && !told(name, at + 1) { said("", inner.cause) } else { inner }
    };
    let last = || if rest.is_empty() { of_atom(name) } else { item(rest.len() - 1) };
    match (name, rest) {
        // Wrappings.
        (
            "error" | "shutdown" | "EXIT" | "nocatch" | "throw" | "exit" | "temporary_error"
            | "permanent_failure",
            [_, ..],
        ) => last(),
        ("replication_auth_error", [_, ..]) => last().or(Cause::Login),
        ("bad_rep_doc", [_, ..]) => last().or(Cause::Document),
        ("filter_fetch_error", [_, ..]) => last().or(Cause::Filter),
        ("worker_died" | "process_died" | "unknown_process_died", [_, ..]) => {
            died("a worker of the replication died", last())
        }
        ("changes_reader_died", [_, ..]) => died("reading changes failed", last()),
        ("changes_manager_died" | "changes_queue_died", [_, ..]) => {
            died("a process that reads changes died", last())
        }
        // Requests.
        ("http_request_failed", [method, url]) => said(request(method, url), None),
        ("http_request_failed", [method, url, ..]) => last().after(&request(method, url)),
        ("http_error_code", [code, what]) => of_term(code).after(&format!("{} failed", text_of(what))),
        ("code" | "stat_code", [_]) => last(),
        ("conn_failed", [_]) => match last() {
            // Nothing was reached, so nothing is slow.
            Said { cause: Some(Cause::Slow), .. } => said("no answer to the connection", Cause::NoRoute),
            other => other.or(Cause::NoRoute),
        },
        ("send_failed", [_]) => last().or(Cause::Lost).after("sending failed"),
        ("connection_closed", _) => of_atom(name),
        ("tls_alert", [_]) => tls(&rest[0]),
        ("options" | "option" | "ssl_error" | "bad_cert", _) => said("TLS failed", Cause::Tls),
        ("timeout" | "noproc", _) => of_atom(name),
        (
            "session_request_failed"
            | "session_request_unauthorized"
            | "session_request_forbidden"
            | "session_requires_valid_user"
            | "session_not_supported"
            | "session_unexpected_result",
            _,
        ) => session(name, rest),
        // Steps.
        ("changes_req_failed", _) => step("reading changes failed", rest),
        ("bulk_docs_failed", _) => step("writing documents failed", rest),
        ("bulk_get_failed", _) => step("reading documents failed", rest),
        ("revs_diff_failed", _) => step("comparing revisions failed", rest),
        ("doc_write_failed", [_, ..]) => last().after("writing a document failed"),
        ("checkpoint_commit_failure", [_, ..]) => {
            last().after("writing the checkpoint failed").or(Cause::Checkpoint)
        }
        ("missing_stub" | "doc_validation" | "invalid_attachment_name", [_]) => {
            said(last().after(&of_atom(name).words).words, Cause::Refuses)
        }
        // `{forbidden,<<"http://h/db/">>}` (3.5), `db_not_found: could not open http://h/db/`.
        ("db_not_found" | "nxdomain", [what]) => {
            said(format!("{}: {}", text_of(what), of_atom(name).words), of_atom(name).cause)
        }
        ("unauthorized" | "forbidden" | "not_found", [what]) => answer(name, &text_of(what)),
        ("duplicate_job" | "already_started", _) => of_atom(name),
        (_, [_]) => {
            let inner = item(0);
            let own = of_atom(name);
            let cause = own.cause.or(inner.cause);
            Said { cause, ..inner.after(&own.words) }
        }
        _ => {
            let inner = (0..rest.len()).map(item).find(|inner| inner.cause.is_some());
            let own = of_atom(name);
            match inner {
                Some(inner) => Said { cause: own.cause.or(inner.cause), ..inner.after(&own.words) },
                None => own,
            }
        }
    }
}

fn died(what: &str, inner: Said) -> Said {
    inner.or(Cause::Crash).after(what)
}

/// `{changes_req_failed,404,{[{<<"error">>,…}]}}`, `{changes_req_failed,timeout}`.
fn step(what: &str, rest: &[Term]) -> Said {
    let mut parts = rest.iter().map(of_term);
    let Some(first) = parts.next() else { return said(what, None) };
    let Some(body) = parts.next().filter(|body| body.cause.is_some()) else { return first.after(what) };
    // A feed's 404 is the filter's: that the source exists was seen before.
    let cause = match body.cause {
        Some(Cause::Missing) if what == "reading changes failed" => Some(Cause::Filter),
        cause => cause,
    };
    let code = first.words.split(' ').next().unwrap_or_default();
    Said { cause, ..body.after(&format!("{what}: {code}")) }
}

/// `couch_replicator_auth_session.erl`, from 2.2 on. The user name is never told.
fn session(name: &str, rest: &[Term]) -> Said {
    let url = |at: usize| rest.get(at).and_then(Term::text).and_then(url::without_secrets);
    let at = usize::from(name == "session_unexpected_result");
    let what = url(at).map_or_else(|| "login failed".to_owned(), |url| format!("login at {url} failed"));
    let why = match name {
        "session_request_failed" => rest.get(2).map_or_else(|| said("", None), of_term),
        "session_request_unauthorized" | "session_requires_valid_user" => of_atom("unauthorized"),
        "session_request_forbidden" => said("403 forbidden", Cause::Locked),
        "session_unexpected_result" => {
            let code = rest.first().and_then(Term::text).and_then(|code| code.parse().ok());
            code.map_or_else(|| said("unexpected answer", None), of_code)
        }
        _ => said("no `_session` there", Cause::NoCouch),
    };
    why.after(&what)
}

/// `{tls_alert,"unknown ca"}` (to OTP 20), `{tls_alert,{unknown_ca,"TLS client: …"}}`.
fn tls(alert: &Term) -> Said {
    let kind = match alert {
        Term::Tuple(items) => items.first().and_then(Term::atom).map(|kind| kind.replace('_', " ")),
        Term::Atom(kind) => Some(kind.replace('_', " ")),
        other => other.text().map(clean),
    };
    said(kind.map_or_else(|| "TLS failed".to_owned(), |kind| format!("TLS failed: {kind}")), Cause::Tls)
}

/// `GET http://h/db/ failed`.
fn request(method: &Term, url: &Term) -> String {
    let url = url.text().and_then(url::without_secrets);
    format!("{} {} failed", text_of(method), url.unwrap_or_else(|| "***".to_owned()))
}

/// `forbidden: …`: the answer's own words, and where they are only a URL, ours.
fn answer(name: &str, text: &str) -> Said {
    let own = of_atom(name);
    let cause = match by_phrase(text) {
        Some(cause @ (Cause::Locked | Cause::Full | Cause::TooLarge)) => Some(cause),
        Some(Cause::Filter) if name == "not_found" => Some(Cause::Filter),
        _ => own.cause,
    };
    let words = match text {
        "" => own.words,
        text if text.contains("://") && !text.contains(' ') => format!("{text}: {}", own.words),
        text if text.starts_with(name) => text.to_owned(),
        text => format!("{}: {text}", if name == "unauthorized" { name } else { &own.words }),
    };
    said(words, cause)
}

fn text_of(term: &Term) -> String {
    term.text().map(cleaned).unwrap_or_default()
}
