//! Reasons as CouchDB writes them, recorded, or put together from its sources, and what is made of them.

use super::*;

/// One line of words, class, raw.
fn check(reason: &str, class: Class, error: &str) {
    let analysis = analyze(reason);
    assert_eq!((analysis.error.as_str(), analysis.class), (error, class), "{reason}\n{analysis:#?}");
    assert!(!analysis.hint.is_empty() && !analysis.hint.contains('\n'));
}

#[test]
fn recorded_reasons() {
    // 2.2.0 and 3.5.0, `crashing`.
    check(
        "{replication_auth_error,\n    {session_request_failed,\"http://127.0.0.1:1/_session\",\"admin\",\n        {conn_failed,{error,econnrefused}}}}",
        Class::Unreachable,
        "login at http://127.0.0.1:1/_session failed: connection refused",
    );
    // 2.2.0 and 3.5.0, `error`; 1.7.1.
    check(
        "Couldn't open document `_design/nope` from source database `http://admin:*****@127.0.0.1:13984/fixture/`: {error,<<\"not_found\">>}",
        Class::Filter,
        "Couldn't open document `_design/nope` from source database `http://127.0.0.1:13984/fixture/`: not found",
    );
    check(
        "db_not_found: could not open http://127.0.0.1:15984/nothere/",
        Class::NotFound,
        "could not open http://127.0.0.1:15984/nothere/: database not found",
    );
    // 1.7.1, of a closed port.
    check("timeout", Class::Timeout, "timeout");
    // apache/couchdb#3986
    check(
        "{replication_auth_error,\n {session_request_failed,\n \"http://couch.example:5984/_session\",\"admin\",\n req_timedout}}",
        Class::Timeout,
        "login at http://couch.example:5984/_session failed: timeout",
    );
    // apache/couchdb#5004
    check(
        "{checkpoint_commit_failure,<<\"Failure on source commit: {'EXIT',{http_request_failed,\\\"POST\\\",\\n  \\\"https://r.example/registry/_ensure_full_commit\\\",\\n {error,{code,504}}}}\">>}",
        Class::Timeout,
        "writing the checkpoint failed: Failure on source commit: POST https://r.example/registry/_ensure_full_commit failed: 504 gateway timeout",
    );
    // apache/couchdb#5554
    check(
        "{changes_reader_died,{timeout,ibrowse_stream_cleanup}}",
        Class::Timeout,
        "reading changes failed: timeout",
    );
    // apache/couchdb-docker#213
    check(
        "{http_request_failed,\"GET\",\"https://s.example/registry/\",{error,{error,{conn_failed,{error,{tls_alert,\"bad record mac\"}}}}}}",
        Class::Unreachable,
        "GET https://s.example/registry/ failed: TLS failed: bad record mac",
    );
}

#[test]
fn connections() {
    let get = |why: &str| {
        format!("{{http_request_failed,\"GET\",\"http://u:*****@h/db/?revs=true\",\n  {{error,{why}}}}}")
    };
    let conn = |why: &str| get(&format!("{{error,{{conn_failed,{{error,{why}}}}}}}"));
    let check = |reason: &str, class: Class, why: &str| {
        check(reason, class, &format!("GET http://h/db/ failed: {why}"))
    };
    check(&conn("econnrefused"), Class::Unreachable, "connection refused");
    check(&get("{conn_failed,{error,econnrefused}}"), Class::Unreachable, "connection refused");
    check(&conn("nxdomain"), Class::Unreachable, "host name not found");
    check(&conn("ehostunreach"), Class::Unreachable, "host unreachable");
    check(&conn("enetunreach"), Class::Unreachable, "network unreachable");
    check(&conn("etimedout"), Class::Unreachable, "no answer to the connection");
    check(&conn("timeout"), Class::Unreachable, "no answer to the connection");
    check(&conn("eacces"), Class::Unreachable, "the system forbids the connection");
    check(
        &conn("{tls_alert,{unknown_ca,\"TLS client: In state certify\"}}"),
        Class::Unreachable,
        "TLS failed: unknown ca",
    );
    check(&conn("{options,{cacertfile,[]}}"), Class::Unreachable, "TLS failed");
    check(&get("sel_conn_closed"), Class::Unreachable, "connection closed");
    check(&get("{error,connection_closing}"), Class::Unreachable, "connection closed");
    check(&get("{connection_closed,mid_stream}"), Class::Unreachable, "connection closed");
    check(
        &get("{error,{send_failed,{error,closed}}}"),
        Class::Unreachable,
        "sending failed: connection closed",
    );
    check(&get("{error,req_timedout}"), Class::Timeout, "timeout");
    check(&get("timeout"), Class::Timeout, "timeout");
    check(&get("{error,proxy_tunnel_failed}"), Class::Unreachable, "the proxy refused");
    check(&get("{error,{url_parsing_failed,{error,invalid_uri}}}"), Class::Other, "not a URL: not a URL");
    check(&get("{code,401}"), Class::Auth, "401 unauthorized");
    check(&get("{code,403}"), Class::Forbidden, "403 forbidden");
    check(&get("{code,404}"), Class::NotFound, "404 not found");
    check(&get("{code,413}"), Class::TargetFull, "413 payload too large");
    check(&get("{code,500}"), Class::Other, "500 internal server error");
    check(&get("{code,502}"), Class::Unreachable, "502 bad gateway");
    check(&get("{code,504}"), Class::Timeout, "504 gateway timeout");
    check(&get("{code,507}"), Class::TargetFull, "507 insufficient storage");
    check(&get("{code,299}"), Class::Other, "299");
}

#[test]
fn starts_of_replications() {
    check(
        "nxdomain: could not resolve http://h/db/",
        Class::Unreachable,
        "could not resolve http://h/db/: host name not found",
    );
    check(
        "{http_error_code,503,<<\"GET http://h/db/\">>}",
        Class::Unreachable,
        "GET http://h/db/ failed: 503 service unavailable",
    );
    check(
        "unauthorized: unauthorized to access or create database http://u:*****@h/db/",
        Class::Auth,
        "unauthorized to access or create database http://h/db/",
    );
    check(
        "unauthorized to access or create database http://h/db/",
        Class::Auth,
        "unauthorized to access or create database http://h/db/",
    );
    check("forbidden: http://h/db/", Class::Forbidden, "http://h/db/: forbidden");
    check("{forbidden,<<\"http://h/db/\">>}", Class::Forbidden, "http://h/db/: forbidden");
    check("max_backoff", Class::Other, "too many answers of 429 (too many requests)");
    check("{error,{error,{conn_failed,{error,econnrefused}}}}", Class::Unreachable, "connection refused");
    check("{shutdown,{error,{conn_failed,{error,econnrefused}}}}", Class::Unreachable, "connection refused");
    check("{error, all_allocated}", Class::Timeout, "no free connection");
}

#[test]
fn logins() {
    let session = |kind: &str| format!("{{replication_auth_error,{{{kind},\"http://h/_session\",\"joe\"}}}}");
    check(
        &session("session_request_unauthorized"),
        Class::Auth,
        "login at http://h/_session failed: user name or password is wrong or missing",
    );
    check(
        &session("session_requires_valid_user"),
        Class::Auth,
        "login at http://h/_session failed: user name or password is wrong or missing",
    );
    check(
        &session("session_request_forbidden"),
        Class::Auth,
        "login at http://h/_session failed: 403 forbidden",
    );
    check(
        "{replication_auth_error,{session_unexpected_result,\"500\",\"http://h/_session\",\"joe\"}}",
        Class::Other,
        "login at http://h/_session failed: 500 internal server error",
    );
    check("{replication_auth_error,cookie_not_found}", Class::Auth, "no session cookie");
    check("{replication_auth_error,{unknown_thing,\"joe\"}}", Class::Auth, "unknown thing");
}

#[test]
fn filters() {
    check(
        "Could not open source database `http://h/db/`: {db_not_found,<<\"http://h/db/\">>}",
        Class::NotFound,
        "Could not open source database `http://h/db/`: http://h/db/: database not found",
    );
    check(
        "Couldn't open document `_design/f` from source database `http://h/db/`: {'EXIT',{http_request_failed,\"GET\",\"http://h/db/_design/f\",{error,{error,{conn_failed,{error,econnrefused}}}}}}",
        Class::Unreachable,
        "Couldn't open document `_design/f` from source database `http://h/db/`: GET http://h/db/_design/f failed: connection refused",
    );
    check(
        "Couldn't parse filter code from document f on `http://h/db/`  Error: {not_found,<<\"missing json key: filters\">>}",
        Class::Filter,
        "Couldn't parse filter code from document f on `http://h/db/` Error: not found: missing json key: filters",
    );
    check(
        "Invalid filter. Must match `ddocname/filtername`.",
        Class::Filter,
        "Invalid filter. Must match `ddocname/filtername`.",
    );
    check(
        "{changes_req_failed,404,{[{<<\"error\">>,<<\"not_found\">>},{<<\"reason\">>,<<\"missing json key: filters\">>}]}}",
        Class::Filter,
        "reading changes failed: 404: not found: missing json key: filters",
    );
    check(
        "{changes_req_failed,500,{[{<<\"error\">>,<<\"compilation_error\">>},{<<\"reason\">>,<<\"x is not defined\">>}]}}",
        Class::Filter,
        "reading changes failed: 500: the filter failed: x is not defined",
    );
}

#[test]
fn steps() {
    check("{changes_req_failed,503}", Class::Unreachable, "reading changes failed: 503 service unavailable");
    check("{changes_req_failed,timeout}", Class::Timeout, "reading changes failed: timeout");
    check(
        "{bulk_docs_failed,500,{[{<<\"error\">>,<<\"enospc\">>},{<<\"reason\">>,<<\"no space\">>}]}}",
        Class::TargetFull,
        "writing documents failed: 500: no space left: no space",
    );
    check(
        "{bulk_docs_failed,403,\n    {[{<<\"error\">>,<<\"forbidden\">>},\n      {<<\"reason\">>,<<\"You exceeded your disk quota\">>}]}}",
        Class::TargetFull,
        "writing documents failed: 403: forbidden: You exceeded your disk quota",
    );
    check("{revs_diff_failed,429,null}", Class::Other, "comparing revisions failed: 429 too many requests");
    check(
        "{doc_write_failed,{<<\"forbidden\">>,<<\"no\">>}}",
        Class::Forbidden,
        "writing a document failed: forbidden: no",
    );
    check(
        "{doc_write_failed,{error,request_body_too_large}}",
        Class::TargetFull,
        "writing a document failed: a document is too large for the target",
    );
    check(
        "{doc_write_failed,{<<\"doc_validation\">>,<<\"Bad special document member: _x\">>}}",
        Class::Forbidden,
        "writing a document failed: a document is not valid for the target: Bad special document member: _x",
    );
    check(
        "instance_start_time on target database has changed since last checkpoint.",
        Class::Other,
        "instance_start_time on target database has changed since last checkpoint.",
    );
    check(
        "{checkpoint_commit_failure,<<\"Error updating the target checkpoint document: conflict\">>}",
        Class::Other,
        "writing the checkpoint failed: Error updating the target checkpoint document: conflict",
    );
    check(
        "Target database out of sync. Try to increase max_dbs_open at the target's server.",
        Class::Other,
        "Target database out of sync. Try to increase max_dbs_open at the target's server.",
    );
    check(
        "unauthorized: You are not allowed to access this db.",
        Class::Auth,
        "unauthorized: You are not allowed to access this db.",
    );
    check(
        "Account is temporarily locked due to multiple authentication failures",
        Class::Auth,
        "Account is temporarily locked due to multiple authentication failures",
    );
}

#[test]
fn crashes() {
    check("kaboom", Class::Crash, "a document could not be read after all retries");
    check(
        "{worker_died,<0.1234.0>,{process_died,<0.1240.0>,kaboom}}",
        Class::Crash,
        "a worker of the replication died: a worker of the replication died: a document could not be read after all retries",
    );
    check(
        "{worker_died,<0.1.0>,\n    {process_died,<0.2.0>,\n        {{nocatch,missing_doc},\n         [{couch_replicator_api_wrap,open_doc_revs,6,\n              [{file,\"src/x.erl\"},{line,285}]}]}}}",
        Class::Crash,
        "a worker of the replication died: a worker of the replication died: missing doc",
    );
    check("{{badmatch,{error,enoent}},[{couch_file,open,2,[]},...]}", Class::Crash, "badmatch: enoent");
    check("{noproc,{gen_server,call,[<0.1.0>,stop,infinity]}}", Class::Crash, "noproc");
    check("{timeout,{gen_server,call,[<0.1.0>,{x,\"secret\"}]}}", Class::Timeout, "timeout");
    check(
        "{worker_died,<0.1.0>,{http_request_failed,\"POST\",\"http://h/db/_bulk_docs\",{error,{code,507}}}}",
        Class::TargetFull,
        "a worker of the replication died: POST http://h/db/_bulk_docs failed: 507 insufficient storage",
    );
    check("{function_clause,[{m,f,[1,\"secret\"],[]}]}", Class::Crash, "function clause");
}

#[test]
fn documents_and_duplicates() {
    check(
        "Replication `a1+continuous` specified by document `two` already started, triggered by document `one` from db `_replicator`",
        Class::Duplicate,
        "Replication `a1+continuous` specified by document `two` already started, triggered by document `one` from db `_replicator`",
    );
    check(
        "Replication `a1` specified by document `two` already running as a transient replication, started via `_replicate` API endpoint",
        Class::Duplicate,
        "Replication `a1` specified by document `two` already running as a transient replication, started via `_replicate` API endpoint",
    );
    check("{duplicate_job,<0.1.0>}", Class::Duplicate, "the same replication runs elsewhere");
    check(
        "local_endpoints_not_supported",
        Class::Other,
        "a bare database name: this CouchDB takes only URLs",
    );
    check(
        "{bad_request,<<\"parameter `continuous` must be a boolean\">>}",
        Class::Other,
        "the document is not valid: parameter `continuous` must be a boolean",
    );
    check("endpoint has an invalid url", Class::Other, "endpoint has an invalid url");
    check(
        "Replication for db <<\"shards/x\">> doc <<\"d\">> failed to start due to timeout after 61 seconds",
        Class::Timeout,
        "Replication for db <<\"shards/x\">> doc <<\"d\">> failed to start due to timeout after 61 seconds",
    );
}

#[test]
fn what_nobody_knows_is_told_cleaned() {
    check("", Class::Other, "no reason given");
    check("  \n ", Class::Other, "no reason given");
    check("something_new", Class::Other, "something new");
    check("{something_new,{with,\"text\"}}", Class::Other, "something new: with");
    check("Something at http://u:p@h/db/?x=y happened", Class::Other, "Something at http://h/db/ happened");
    check(
        "{\"a\": \"p\", \"at\": \"http://h/\"}",
        Class::Other,
        "{\"***\": \"***\", \"***\": \"http://h/\"}",
    );
    check("{a,{b", Class::Other, "a: b");
    check("{http_request_failed,\"GET\",\"http://u:p", Class::Other, "http request failed: GET");
    check("\"just a text\"", Class::Other, "\"just a text\"");
    check("[1,2,3]", Class::Other, "[_]");
}

/// Reasons that hold a secret wherever one was ever seen, or could be.
const CANARIES: &[&str] = &[
    "{http_request_failed,\"GET\",\"http://canary-user:canary-pass@h/db/?token=canary\",{error,{code,500}}}",
    "{http_request_failed,\"GET\",\"http://canary:*****@h/db/\",{error,{conn_failed,{error,econnrefused}}}}",
    "{http_request_failed,\"GET\",\"http://user:canary\\\"canary@h/db/\"\n  \"more?x=canary\",timeout}",
    "{replication_auth_error,{session_request_failed,\"http://h/_session\",\"canary\",{conn_failed,{error,nxdomain}}}}",
    "{replication_auth_error,{session_request_unauthorized,\"http://canary:canary@h/_session\",\"canary\"}}",
    "{replication_auth_error,{session_unexpected_result,\"500\",\"http://h/_session\",\"canary\"}}",
    "{badmatch,{httpdb,\"http://canary:canary@h/\",nil,[{\"Authorization\",\"Basic canary\"},{\"X\",\"canary\"}],30000,[{basic_auth,{\"canary\",\"canary\"}},{proxy_password,\"canary\"}]}}",
    "{{badmatch,\"canary\"},[{couch_replicator_httpc,send_req,[<<\"canary\">>,[{headers,[{\"a\",\"canary\"}]}]],[]}]}",
    "{error,{send_failed,{'EXIT',{badarg,[{gen_tcp,send,[[\"GET / HTTP/1.1\\r\\nAuthorization: Basic canary\"]],[]}]}}}}",
    "{error,{invalid_username_or_host,\"canary:canary\"}}",
    "{something,\"canary\"}",
    "{timeout,{gen_server,call,[x,{basic,\"canary\"}]}}",
    "[{proxy,\"http://canary:canary@p:1\"},{oauth,[{\"token\",\"canary\"}]}]",
    "#{<<\"password\">> => <<\"canary\">>}",
    "{bulk_docs_failed,500,{[{<<\"doc\">>,<<\"canary\">>},{<<\"reason\">>,<<\"at http://canary:x@h/\">>}]}}",
    "unauthorized: unauthorized to access or create database http://canary:canary@h/db/?q=canary",
    "could not open http://u:canary canary@h/db/",
    "Could not open source database `http://u:canary`canary@h/db`: {db_not_found,<<\"http://u:canary@h/\">>}",
    "Could not open source database `http://u:canary@h/db`: {badmatch,[{\"Cookie\",\"canary\"}]}",
    "db_not_found: could not open http://u:canary/canary@h/db/",
    "Invalid proxy url socks5://canary:canary@p:1080",
    "failed: Authorization: Basic canary",
    "failed: \"oauth_token\":\"canary\"",
    "{\"password\": \"canary\", \"url\": \"http://u:canary@h/\"}",
    "Failure on source commit: {'EXIT',{http_request_failed,\"POST\",\"http://canary:canary@h/?canary\",{error,{x,\"canary\"}}}}",
];

#[test]
fn no_secret_is_told_whatever_is_missing_at_the_end() {
    let shown = |reason: &str| {
        let analysis = analyze(reason);
        format!("{}\n{}", analysis.error, analysis.raw).to_lowercase()
    };
    for reason in CANARIES {
        assert!(!shown(reason).contains("canary"), "{reason}\n{}", shown(reason));
        // A sentence that ends within a URL cannot be told from one with another URL; CouchDB cuts none.
        if reason.starts_with(['{', '[', '#']) {
            for end in 0..reason.len() {
                let cut = &reason[..end];
                assert!(!shown(cut).contains("canary"), "{cut}\n{}", shown(cut));
            }
        }
    }
}

#[test]
fn a_reason_of_any_length_is_answered_in_bounded_lines() {
    let texts = [
        "error: ".repeat(100_000),
        "{".repeat(100_000),
        "{error,".repeat(100_000),
        "x: {error,<<\"".repeat(20_000),
        "{error,<<\"x: ".repeat(20_000),
        format!("{}econnrefused{}", "{error,".repeat(20), "}".repeat(20)),
        "http://u:p@h ".repeat(20_000),
        "ä\u{1}\n".repeat(50_000),
        format!("{}http://user:{}", "a ".repeat((16 << 10) / 2 - 10), "canary".repeat(100)),
        format!("{{http_request_failed,\"GET\",\"http://h/{}\",timeout}}", "a".repeat(5_000)),
    ];
    // On a stack as small as our threads have.
    let small = std::thread::Builder::new().stack_size(512 << 10);
    let thread = small.spawn(move || {
        for text in texts {
            let Analysis { error, raw, .. } = analyze(&text);
            assert!(error.len() <= 400 && raw.len() <= 1024, "{}", text.len());
            assert!(!format!("{error}{raw}").contains(['\n', '\u{1}']) && !raw.contains("canary"), "{raw}");
        }
    });
    thread.unwrap().join().unwrap();
}

#[test]
fn classes_have_the_words_of_the_design() {
    let all =
        "unreachable, auth, not_found, filter, target_full, forbidden, timeout, duplicate, crash, other";
    for word in all.split(", ") {
        let class: Class = serde_json::from_value(word.into()).unwrap();
        assert_eq!(
            (class.as_str(), serde_json::to_value(class).unwrap()),
            (word, serde_json::Value::from(word))
        );
    }
}
