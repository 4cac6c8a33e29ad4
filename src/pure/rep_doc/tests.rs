//! What is found in which document, for which version. Only `found` knows the API.

use expect_test::{Expect, expect};
use serde_json::{Value, json};

use super::*;

fn found(doc: &Value, version: &str, origin: Origin) -> String {
    let findings = super::check(doc, Some(version.parse().unwrap()), origin);
    let line = |finding: &Finding| {
        let mark = if finding.is_error() { "!" } else { "?" };
        format!("{mark} {finding}\n")
    };
    findings.iter().map(line).collect()
}

/// A document with source and target, and these members.
fn doc(members: Value) -> Value {
    let mut doc = json!({"_id": "a", "source": "https://h:6984/a", "target": "https://h:6984/b"});
    let Value::Object(members) = members else { panic!("expected an object") };
    doc.as_object_mut().unwrap().extend(members);
    doc
}

/// What is found in a document to save: `!` an error, `?` a warning.
#[track_caller]
fn check(version: &str, members: Value, expected: Expect) {
    expected.assert_eq(&found(&doc(members), version, Origin::ToSave));
}

#[track_caller]
fn fine(version: &str, members: Value) {
    assert_eq!(found(&doc(members), version, Origin::ToSave), "");
}

#[track_caller]
fn stored(version: &str, members: Value, expected: Expect) {
    expected.assert_eq(&found(&doc(members), version, Origin::Stored));
}

#[test]
fn what_couchdb_uses_is_fine() {
    let old = json!({"continuous": true, "create_target": false, "doc_ids": ["a"], "proxy": "http://p:3128",
        "user_ctx": {"name": null, "roles": ["r"]}, "cancel": false, "owner": "ann"});
    for version in ["1.1", "1.7.1", "2.0", "2.2.0", "3.0.1", "3.5.0"] {
        fine(version, json!({}));
        fine(version, old.clone());
        fine(version, json!({"filter": "ddoc/name", "query_params": {"a": 1}}));
        fine(version, json!({"source": {"url": "http://h/a", "headers": {"x-tenant": "blue"}}}));
        fine(version, json!({"_id": "_design/x", "source": 5}));
        fine(version, json!({"_deleted": true, "continuous": "x"}));
    }
    let numbers = json!({"worker_processes": "4", "worker_batch_size": 500, "http_connections": 20,
        "connection_timeout": 30000, "retries_per_request": 0, "since_seq": 12,
        "socket_options": "[{keepalive, true}, {nodelay,false}] % all of it\n"});
    fine("1.2", numbers.clone());
    fine("3.2.3", numbers);
    fine("1.6", json!({"use_checkpoints": false, "checkpoint_interval": 5000}));
    fine("2.0", json!({"selector": {"a": {"$gt": 1}}, "since_seq": "12-g1AA"}));
    fine("2.0", json!({"filter": "_view", "query_params": {"view": "ddoc/by_name"}}));
    fine(
        "2.2",
        json!({"create_target": true, "create_target_params": {"q": 8, "n": "3", "placement": "a:1"}}),
    );
    fine("3.0", json!({"source_proxy": "socks5://p:1080", "target_proxy": "", "proxy": ""}));
    fine(
        "3.5",
        json!({"winning_revs_only": true, "use_bulk_get": false, "doc_ids": null, "filter": "_design"}),
    );
    fine("3.5", json!({"ibrowse_options": "[{prefer_ipv6, true}]", "socket_options": "[]"}));
    fine("1.7", json!({"source": "orders", "target": "a/b$c"}));
}

#[test]
fn all_is_said_at_once_and_sorted() {
    let doc = json!({"_replication_state": "completed", "sorce": "a", "target": {"headers": 5}, "continuous": "true",
        "worker_processes": -1, "params": {"filter": 5, "x": 1}});
    let all = found(&doc, "3.5.0", Origin::ToSave);
    expect![[r#"
        ! _replication_state: with `completed` CouchDB never starts the replication; take all `_replication_*` members away before the document is saved
        ! continuous: expected `true` or `false`, got the string `"true"`; write it without quotes
        ! params.filter: CouchDB reads `filter` only at the top of the document; move it up
        ! params.filter: expected `DDOC/NAME`, got `5`; write the design document's name without `_design/`, a slash, the filter's name
        ! params.x: CouchDB ignores `params` and all in it, and has no option of this name; take it away
        ! sorce: CouchDB does not know it and ignores it; did you mean `source`?
        ! source: expected an endpoint, got none; write `"http://HOST:5984/DATABASE"`
        ! target.headers: expected an object, got a number; write `{"Name": "value"}`
        ! target.url: expected a URL, got none; write `"http://HOST:5984/DATABASE"`
        ! worker_processes: expected a whole number, 1 or more, got `-1`; write a larger one, or leave it out for the server's own
    "#]].assert_eq(&all);
    let turned: Value = serde_json::from_str(&doc.to_string()).unwrap();
    assert_eq!(found(&turned, "3.5.0", Origin::ToSave), all);
    for other in [json!([]), json!("a"), json!(null)] {
        assert_eq!(super::check(&other, None, Origin::Stored).len(), 1, "{other}");
    }
    expect![[r#"
        ! source: expected an endpoint, got none; write `"http://HOST:5984/DATABASE"`
        ! target: expected an endpoint, got none; write `"http://HOST:5984/DATABASE"`
    "#]]
    .assert_eq(&found(&json!({}), "1.7", Origin::Stored));
}

#[test]
fn unknown_members_are_named_with_the_nearest_known_one() {
    check(
        "3.5.0",
        json!({"selecter": {}, "createTarget": true, "Continuous": true, "resource": 1, "comment": "mine",
            "timeout": 5, "heartbeat": 5, "headers": {}, "id": "x", "_filter": 1, "_ids": 2, "oauth": {},
            "worker-batch-size": 1}),
        expect![[r#"
            ! Continuous: CouchDB does not know it and ignores it; did you mean `continuous`?
            ! _filter: CouchDB refuses a document with a member of its own that it does not know; take it away, or write it without `_`
            ! _ids: CouchDB refuses a document with a member of its own that it does not know; did you mean `_id`?
            ? comment: CouchDB does not know it and ignores it; take it away, unless it is a note of your own
            ! createTarget: CouchDB does not know it and ignores it; did you mean `create_target`?
            ! headers: CouchDB reads it only within `source` or `target`, as a part of an endpoint; write `"source": {"url": …, "headers": {…}}`
            ? heartbeat: CouchDB's replicator has no such option: it asks for signs of life at a third of `connection_timeout` itself; take it away; for a slow source raise `connection_timeout` (milliseconds)
            ? id: it names a replication only for `_replicate`; in a document CouchDB does not use it; take it away
            ! oauth: CouchDB reads it only within `auth` of an endpoint, and only up to 2.1; put it into `source.auth`, or use another login
            ? resource: CouchDB does not know it and ignores it; take it away, unless it is a note of your own
            ! selecter: CouchDB does not know it and ignores it; did you mean `selector`?
            ! timeout: CouchDB does not know it and ignores it; did you mean `connection_timeout`?
            ! worker-batch-size: CouchDB does not know it and ignores it; did you mean `worker_batch_size`?
        "#]],
    );
}

#[test]
fn options_below_params_belong_to_the_top() {
    check(
        "3.5.0",
        json!({"params": {"socket_options": {"keepalive": true}, "continuous": true, "contnuous": 1, "zebra": 2}}),
        expect![[r#"
            ! params.continuous: CouchDB reads `continuous` only at the top of the document; move it up
            ! params.contnuous: CouchDB ignores `params` and all in it, and has no option of this name; take it away
            ! params.socket_options: CouchDB reads `socket_options` only at the top of the document; move it up
            ! params.socket_options: expected a string with an Erlang list such as `"[{keepalive, true}, {nodelay, false}]"`, got an object; write `"[{keepalive, true}, {nodelay, false}]"`
            ! params.zebra: CouchDB ignores `params` and all in it, and has no option of this name; take it away
        "#]],
    );
    check(
        "1.7",
        json!({"params": []}),
        expect![[r#"
        ? params: CouchDB does not know it and ignores it; take its members up to the top of the document
    "#]],
    );
    check(
        "1.7",
        json!({"params": {}}),
        expect![[r#"
        ? params: CouchDB does not know it and ignores it; take it away
    "#]],
    );
}

#[test]
fn types_and_ranges() {
    check(
        "3.5.0",
        json!({"worker_processes": 0, "worker_batch_size": -5, "http_connections": "x", "connection_timeout": 30,
            "retries_per_request": -1, "checkpoint_interval": 1.5, "use_checkpoints": "false", "use_bulk_get": 1,
            "winning_revs_only": null, "create_target": "true", "since_seq": false}),
        expect![[r#"
            ! checkpoint_interval: expected a whole number of milliseconds, 0 or more, got `1.5`; write digits alone, and no point
            ? connection_timeout: is in milliseconds: `30` is less than a second; write 30000 for 30 s
            ! create_target: expected `true` or `false`, got the string `"true"`; write it without quotes
            ! http_connections: expected a whole number, 1 or more, got a string; write digits alone, and no point
            ? retries_per_request: expected a whole number, 0 or more, got `-1`; write a larger one, or leave it out for the server's own
            ! since_seq: expected a `seq` of the source's `_changes`, got `false`; write it as `_changes` gives it: a number from CouchDB 1.x, a string from later ones
            ! use_bulk_get: expected `true` or `false`, got `1`; write `true` or `false`, without quotes
            ! use_checkpoints: expected `true` or `false`, got the string `"false"`; write it without quotes
            ! winning_revs_only: expected `true` or `false`, got `null`; write `true` or `false`, without quotes
            ? worker_batch_size: expected a whole number, 1 or more, got `-5`; write a larger one, or leave it out for the server's own
            ! worker_processes: expected a whole number, 1 or more, got `0`; write a larger one, or leave it out for the server's own
        "#]],
    );
    check(
        "3.5.0",
        json!({"since_seq": -3, "checkpoint_interval": -1, "connection_timeout": true, "continuous": [],
            "create_target_params": {"q": 0, "n": [], "partioned": true, "partitioned": 5, "placement": 1, "deep": {}}}),
        expect![[r#"
            ! checkpoint_interval: expected a whole number of milliseconds, 0 or more, got `-1`; write a larger one, or leave it out for the server's own
            ! connection_timeout: expected a whole number of milliseconds, 1 or more, got `true`; write digits alone, and no point
            ! continuous: expected `true` or `false`, got an array; write `true` or `false`, without quotes
            ? create_target_params: has no effect without `"create_target": true`; add it, or take the parameters away
            ! create_target_params.deep: expected a value that fits into a query, got an object; take it away
            ! create_target_params.n: expected a whole number, 1 or more, got an array; leave it out for the server's own
            ? create_target_params.partioned: CouchDB makes databases with `q`, `n`, `placement` and `partitioned` alone; did you mean `partitioned`?
            ! create_target_params.partitioned: expected `true` or `false`, got `5`; write `true` or `false`, without quotes
            ! create_target_params.placement: expected a string such as `"zone1:2"`, got `1`; write it in quotes
            ! create_target_params.q: expected a whole number, 1 or more, got `0`; leave it out for the server's own
            ! since_seq: expected a `seq` of the source's `_changes`, got `-3`; write it as `_changes` gives it: a number from CouchDB 1.x, a string from later ones
        "#]],
    );
    check(
        "3.5.0",
        json!({"since_seq": {}, "create_target_params": 5, "cancel": true}),
        expect![[r#"
            ! cancel: it cancels a replication only at `_replicate`; a document with it starts one all the same, or fails; delete the document to cancel its replication
            ! create_target_params: expected an object, got `5`; write `{"q": 8}`
            ! since_seq: expected a `seq` of the source's `_changes`, got an object; write it as `_changes` gives it: a number from CouchDB 1.x, a string from later ones
        "#]],
    );
    check(
        "3.5.0",
        json!({"since_seq": "", "cancel": "true", "_id": 5}),
        expect![[r#"
        ! _id: expected a string, got `5`; write it in quotes
        ! cancel: expected `true` or `false`, got the string `"true"`; take it away: it has a use only at `_replicate`
        ! since_seq: expected a `seq` of the source's `_changes`, got an empty string; write it as `_changes` gives it: a number from CouchDB 1.x, a string from later ones
    "#]],
    );
}

#[test]
fn options_of_sockets_are_erlang() {
    check(
        "3.5.0",
        json!({"socket_options": "[{keepalive, true}, {nodely, false}, {potato, 1}, inet6]"}),
        expect![[r#"
            ! socket_options: option 4: expected a pair `{name, value}`, got something else; write `"[{keepalive, true}, {nodelay, false}]"`
            ? socket_options: option 2 is left out: CouchDB takes `buffer`, `keepalive`, `nodelay`, `priority`, `recbuf`, `sndbuf`; did you mean `nodelay`?
            ? socket_options: option 3 is left out: CouchDB takes `buffer`, `keepalive`, `nodelay`, `priority`, `recbuf`, `sndbuf`; take it away, or let it through in CouchDB's configuration, section `[replicator]`
        "#]],
    );
    check(
        "3.2.3",
        json!({"socket_options": "[{keepalive, yes}, {sndbuf, big}, {\"a\", 1}, {potato, 1}]"}),
        expect![[r#"
            ! socket_options: option 1, `keepalive`: expected `true` or `false`, got something else; no connection can be opened with it
            ! socket_options: option 2, `sndbuf`: expected a whole number, got something else; no connection can be opened with it
            ! socket_options: option 3: expected a name in front, got something else; write `"[{keepalive, true}, {nodelay, false}]"`
            ? socket_options: option 4 goes to Erlang as it is; one that it does not know lets nothing connect; take it away unless Erlang's `inet` has it
        "#]],
    );
    check(
        "1.7.1",
        json!({"socket_options": {"keepalive": true}}),
        expect![[r#"
        ! socket_options: expected a string with an Erlang list such as `"[{keepalive, true}, {nodelay, false}]"`, got an object; write `"[{keepalive, true}, {nodelay, false}]"`
    "#]],
    );
    check(
        "3.5.0",
        json!({"ibrowse_options": "[{prefer_ipv4, true}]"}),
        expect![[r#"
            ? ibrowse_options: option 1 is left out: CouchDB takes `prefer_ipv6`; did you mean `prefer_ipv6`?
        "#]],
    );
    let term = |text: &str, expected: &str| {
        let found = match term::parse(text) {
            Ok(term) => format!("{term:?}"),
            Err(found) => found.to_owned(),
        };
        assert_eq!(found, expected, "{text}");
    };
    term(
        " [ {a, -1.5e3}, 'B c', [], {} ] ",
        r#"List([Tuple([Atom("a"), Float]), Atom("B c"), List([]), Tuple([])])"#,
    );
    term(r#"["x\"y", <<"b">>, <<>>, 16#ff]"#, "List([Text, Text, Text, Integer])");
    term("[{keepalive, true}", "one that ends too early");
    term("[{keepalive true}]", "one with a comma or a bracket missing");
    term("[{keepalive: true}]", "one with `:` or `=` between name and value");
    term(r#"{"keepalive": true}"#, "one with `:` or `=` between name and value");
    term("[{keepalive, true}].", "one with something behind it");
    term("[{Keepalive, true}]", "one with a word that does not begin in lower case");
    term("[{'a, true}]", "one with a quote that has no end");
    term("", "one that ends too early");
    term("[] % all", "one with something behind it");
    term("[ % all\n 1]", "List([Integer])");
    term("[-]", "one with a sign without a number");
    term(&"[".repeat(50), "one with too many brackets");
}

#[test]
fn filters() {
    check(
        "3.5.0",
        json!({"doc_ids": ["a"], "filter": "a/b", "selector": {}}),
        expect![[r#"
        ! doc_ids: expected one of `doc_ids`, `filter` and `selector`, got `doc_ids` and `filter` and `selector`; keep one; a selector can name ids: `{"_id": {"$in": […]}}`
    "#]],
    );
    check(
        "2.0",
        json!({"doc_ids": ["a"], "selector": {}}),
        expect![[r#"
        ! doc_ids: expected one of `doc_ids`, `filter` and `selector`, got `doc_ids` and `selector`; keep one; a selector can name ids: `{"_id": {"$in": […]}}`
    "#]],
    );
    check(
        "1.7.1",
        json!({"doc_ids": ["a"], "filter": "a/b"}),
        expect![[r#"
        ? filter: CouchDB 1.x replicates what `doc_ids` names and does not ask the filter; keep one of both
    "#]],
    );
    check(
        "1.7.1",
        json!({"filter": "_view", "selector": {}}),
        expect![[r#"
        ! filter: expected `DDOC/NAME`, got a string without a name on both sides of `/`; write the design document's name without `_design/`, a slash, the filter's name
        ! selector: CouchDB 1.7.1 does not know it and ignores it (known since 2.0); take it away, or use a newer CouchDB
    "#]],
    );
    check(
        "3.5.0",
        json!({"filter": "_view"}),
        expect![[r#"
        ! query_params.view: expected `DDOC/VIEW` for the filter `_view`, got none; write the design document's name without `_design/`
    "#]],
    );
    check(
        "3.5.0",
        json!({"filter": "_view", "query_params": {"view": "by_name"}}),
        expect![[r#"
        ! query_params.view: expected `DDOC/VIEW` for the filter `_view`, got a string of another form; write the design document's name without `_design/`
    "#]],
    );
    check(
        "3.5.0",
        json!({"filter": "_design/app/mine", "query_params": []}),
        expect![[r#"
        ! filter: expected `DDOC/NAME`, got one that begins with `_design/`; write the design document's name without `_design/`, a slash, the filter's name
        ! query_params: expected an object, got an array; write `{"name": "value"}`
    "#]],
    );
    check(
        "3.5.0",
        json!({"filter": "mine", "doc_ids": null}),
        expect![[r#"
        ! filter: expected `DDOC/NAME`, got a string without a name on both sides of `/`; write the design document's name without `_design/`, a slash, the filter's name
    "#]],
    );
    check(
        "3.5.0",
        json!({"filter": "", "selector": null}),
        expect![[r#"
        ! filter: expected `DDOC/NAME`, got an empty string; write the design document's name without `_design/`, a slash, the filter's name
        ! filter: expected one of `doc_ids`, `filter` and `selector`, got `filter` and `selector`; keep one; a selector can name ids: `{"_id": {"$in": […]}}`
        ! selector: expected an object, a Mango selector, got `null`; write `{"type": "order"}`
    "#]],
    );
    check(
        "3.5.0",
        json!({"query_params": {"a": 1}, "doc_ids": ["a", 5, null]}),
        expect![[r#"
        ! doc_ids[1]: expected a string, got a number, and 1 more; write ids as strings, in quotes
        ? query_params: has no effect without `filter`; name the filter that they are for, or take them away
    "#]],
    );
    check(
        "3.5.0",
        json!({"doc_ids": []}),
        expect![[r#"
        ? doc_ids: is empty: nothing is replicated; name documents, or take it away for all of them
    "#]],
    );
    check(
        "3.2.3",
        json!({"doc_ids": null}),
        expect![[r#"
        ! doc_ids: expected an array of strings, got `null`; write `["id1", "id2"]`
    "#]],
    );
}

#[test]
fn what_a_version_does_not_know_yet() {
    let all = json!({"worker_processes": 1, "use_checkpoints": true, "checkpoint_interval": 5000, "selector": {},
        "create_target": true, "create_target_params": {}, "source_proxy": "http://p", "winning_revs_only": true,
        "use_bulk_get": true, "ibrowse_options": "[{prefer_ipv6, true}]"});
    check(
        "1.1.2",
        all.clone(),
        expect![[r#"
        ? checkpoint_interval: CouchDB 1.1.2 does not know it and ignores it (known since 1.6); take it away, or use a newer CouchDB
        ? create_target_params: CouchDB 1.1.2 does not know it and ignores it (known since 2.2); take it away, or use a newer CouchDB
        ? ibrowse_options: CouchDB 1.1.2 does not know it and ignores it (known since 3.3.3); take it away, or use a newer CouchDB
        ! selector: CouchDB 1.1.2 does not know it and ignores it (known since 2.0); take it away, or use a newer CouchDB
        ! source_proxy: CouchDB 1.1.2 does not know it and ignores it (known since 3.0); take it away, or use a newer CouchDB
        ? use_bulk_get: CouchDB 1.1.2 does not know it and ignores it (known since 3.3); take it away, or use a newer CouchDB
        ! use_checkpoints: CouchDB 1.1.2 does not know it and ignores it (known since 1.6); take it away, or use a newer CouchDB
        ! winning_revs_only: CouchDB 1.1.2 does not know it and ignores it (known since 3.3); take it away, or use a newer CouchDB
        ? worker_processes: CouchDB 1.1.2 does not know it and ignores it (known since 1.2); take it away, or use a newer CouchDB
    "#]],
    );
    check(
        "2.2.0",
        all.clone(),
        expect![[r#"
        ? ibrowse_options: CouchDB 2.2.0 does not know it and ignores it (known since 3.3.3); take it away, or use a newer CouchDB
        ! source_proxy: CouchDB 2.2.0 does not know it and ignores it (known since 3.0); take it away, or use a newer CouchDB
        ? use_bulk_get: CouchDB 2.2.0 does not know it and ignores it (known since 3.3); take it away, or use a newer CouchDB
        ! winning_revs_only: CouchDB 2.2.0 does not know it and ignores it (known since 3.3); take it away, or use a newer CouchDB
    "#]],
    );
    check(
        "3.3.2",
        all.clone(),
        expect![[r#"
        ? ibrowse_options: CouchDB 3.3.2 does not know it and ignores it (known since 3.3.3); take it away, or use a newer CouchDB
    "#]],
    );
    fine("3.3.3", all.clone());
    fine("3.3", all);
}

#[test]
fn endpoints() {
    check(
        "3.5.0",
        json!({"source": "orders", "target": "h:5984/orders"}),
        expect![[r#"
        ! source: expected a URL, got a name: CouchDB 3.0 and later have no local endpoints; write its URL, with a login: `http://127.0.0.1:5984/DATABASE`
        ! target: expected a URL that begins with `http://` or `https://`, got one without a scheme; write `http://` or `https://` in front
    "#]],
    );
    check(
        "2.3.1",
        json!({"source": "orders", "target": ""}),
        expect![[r#"
        ! source: expected a URL, got a name: CouchDB 2.x looks for it among the node's own databases (port 5986); write its URL, with a login: `http://127.0.0.1:5984/DATABASE`
        ! target: expected a URL that begins with `http://` or `https://`, got an empty string; write the database's URL
    "#]],
    );
    check(
        "1.7.1",
        json!({"source": "Orders", "target": "ftp://h/x"}),
        expect![[r#"
        ! source: expected a database's name: `a` to `z`, digits and `_$()+-/`, a letter first; got others; write the name as `_all_dbs` shows it
        ! target: expected a URL that begins with `http://` or `https://`, got another scheme; replications speak HTTP alone
    "#]],
    );
    check(
        "3.5.0",
        json!({"source": "HTTP://h/a", "target": ["http://h/a"]}),
        expect![[r#"
            ! source: expected a URL that begins with `http://` or `https://`, got one in upper case; write the scheme in lower case
            ! target: expected a URL, or an object with `url`, got an array; write `"http://HOST:5984/DATABASE"`
        "#]],
    );
    check(
        "3.5.0",
        json!({"source": "http:///a", "target": "http://h:99999/a"}),
        expect![[r#"
        ! source: expected a URL with a host, got none; write the host behind `://`
        ! target: expected a port from 1 to 65535 behind the host's `:`, got another; write a number; a `:`, `/` or `@` of a login must be percent-encoded
    "#]],
    );
    check(
        "3.5.0",
        json!({"source": "http://h", "target": "http://[::1]:5984/a b?x=1"}),
        expect![[r#"
            ? source: names no database: CouchDB would ask the server's root for one; write the database's name behind the host, unless the host stands for one
            ! target: holds something that no URL can hold, or has it in a wrong place; percent-encode blanks, letters beyond ASCII, `@`, `|` and the like
        "#]],
    );
    check(
        "3.5.0",
        json!({"source": "http://h/a?x=1", "target": {"url": "orders", "usernme": 1}}),
        expect![[r#"
            ? source: has a query: CouchDB appends its own paths behind it, and a CouchDB there answers with nothing; take the `?` and what follows away, unless the endpoint wants it so
            ! target.url: expected a URL that begins with `http://` or `https://`, got one without a scheme; write `"http://HOST:5984/DATABASE"`
            ! target.usernme: CouchDB does not know it in an endpoint and ignores it; write `"auth": {"basic": {"username": …, "password": …}}`
        "#]],
    );
    check(
        "3.5.0",
        json!({"source": {"uri": "http://h/a", "continuous": true, "password": "p", "x": 1, "headers": {"A": 5}},
            "target": {"url": 5, "headers": [], "auth": []}}),
        expect![[r#"
            ! source.continuous: CouchDB does not know it in an endpoint and ignores it; it belongs to the top of the document
            ! source.headers.A: expected a string, got a number; write the value in quotes
            ! source.password: CouchDB does not know it in an endpoint and ignores it; write `"auth": {"basic": {"username": …, "password": …}}`
            ! source.uri: CouchDB does not know it in an endpoint and ignores it; did you mean `url`?
            ! source.url: expected a URL, got none; write `"http://HOST:5984/DATABASE"`
            ? source.x: CouchDB does not know it in an endpoint and ignores it; take it away
            ! target.auth: expected an object, got an array; write `{"basic": {"username": …, "password": …}}`
            ! target.headers: expected an object, got an array; write `{"Name": "value"}`
            ! target.url: expected a URL that begins with `http://` or `https://`, got a number; write `"http://HOST:5984/DATABASE"`
        "#]],
    );
    check(
        "3.5.0",
        json!({"proxy": "http://p:1", "source_proxy": "p:1", "target_proxy": "ftp://p"}),
        expect![[r#"
            ! source_proxy: expected a URL, got one without a scheme; write `http://HOST:PORT`, `https://HOST:PORT` or `socks5://HOST:PORT`
            ! source_proxy: expected either `proxy` or `source_proxy`, got both; `proxy` is for both sides: keep it, or `source_proxy` and `target_proxy`
            ! target_proxy: expected either `proxy` or `target_proxy`, got both; `proxy` is for both sides: keep it, or `source_proxy` and `target_proxy`
            ! target_proxy: expected the scheme `http`, `https` or `socks5`, got another; write `http://HOST:PORT`, `https://HOST:PORT` or `socks5://HOST:PORT`
        "#]],
    );
    check(
        "2.3.1",
        json!({"proxy": "ftp://p"}),
        expect![[r#"
        ? proxy: expected the scheme `http`, `https` or `socks5`, got another; write `http://HOST:PORT`, `https://HOST:PORT` or `socks5://HOST:PORT`
    "#]],
    );
    check(
        "2.3.1",
        json!({"proxy": 5}),
        expect![[r#"
        ! proxy: expected a URL, got `5`; write `http://HOST:PORT`, `https://HOST:PORT` or `socks5://HOST:PORT`
    "#]],
    );
    check(
        "2.2.0",
        json!({"create_target": true, "create_target_params": {"q": 1}, "target": "http://h/a?q=8"}),
        expect![[r#"
            ! create_target_params: the target's URL has a `?` already: the parameters would follow a second one; take the query out of the target's URL
            ? target: has a query: CouchDB appends its own paths behind it, and a CouchDB there answers with nothing; take the `?` and what follows away, unless the endpoint wants it so
        "#]],
    );
    check(
        "2.2.0",
        json!({"create_target_params": {"q": 1}}),
        expect![[r#"
        ? create_target_params: has no effect without `"create_target": true`; add it, or take the parameters away
    "#]],
    );
    check(
        "1.7.1",
        json!({"create_target": true, "target": "orders"}),
        expect![[r#"
        ! create_target: CouchDB 1.x makes a local target only for `user_ctx` with the role `_admin`; create the database yourself, or name the target by its URL with a login
    "#]],
    );
    check(
        "1.7.1",
        json!({"create_target": true, "target": "orders", "user_ctx": {"name": "ann", "roles": ["_admin"]}}),
        expect![[r#"
            ? user_ctx.roles: with `_admin` the replication may write anything into a local target, design documents too; name the roles of a user who may do just what is needed
        "#]],
    );
    fine("1.7.1", json!({"create_target": true, "target": "http://h/orders"}));
}

#[test]
fn logins_are_warned_about() {
    let login = json!({"basic": {"username": "u", "password": "p"}});
    check(
        "3.5.0",
        json!({"source": "https://u:p@h/a", "proxy": "http://u:p@proxy"}),
        expect![[r#"
            ? proxy: holds a password in clear, which error texts may repeat; use a login that may do just what this replication needs, and let admins alone read the database
            ? source: holds a password in clear, which error texts may repeat; `auth.basic` keeps it out of URLs in logs and errors; use a login that may do just what this replication needs, and let admins alone read the database
        "#]],
    );
    check(
        "3.1.2",
        json!({"source": {"url": "https://h/a", "auth": login.clone()}}),
        expect![[r#"
        ? source.auth: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
        ! source.auth.basic: CouchDB 3.1.2 does not know it and sends no login (known since 3.2); write the login into the URL, or into `headers`
    "#]],
    );
    check(
        "3.5.0",
        json!({"source": {"url": "https://h/a", "auth": login, "headers": {"authorization": "Basic x"}}}),
        expect![[r#"
            ? source.auth: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
            ? source.headers.authorization: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
        "#]],
    );
    check(
        "3.5.0",
        json!({"source": {"url": "https://h/a", "auth": {"basic": {"username": 5}, "oauth": {}, "iam": {}, "password": 1}},
            "target": {"url": "https://h/a", "auth": {"basic": "u:p"}}}),
        expect![[r#"
            ? source.auth: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
            ! source.auth.basic.password: expected a string, got none; CouchDB sends no login without it
            ! source.auth.basic.username: expected a string, got a number; CouchDB sends no login without it
            ? source.auth.iam: CouchDB itself does not know it; a plug-in may; take it away unless one does
            ! source.auth.oauth: CouchDB 2.2 and later do not know it and send no login; use another login
            ! source.auth.password: CouchDB does not know it here and sends no login; write `{"basic": {"username": …, "password": …}}` (3.2 and later)
            ? target.auth: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
            ! target.auth.basic: expected an object with `username` and `password`, got a string; CouchDB sends no login without them
        "#]],
    );
    check(
        "2.1.2",
        json!({"source": {"url": "https://h/a", "auth": {"oauth": {"token": 5, "signature_method": "MD5"}}},
            "target": {"url": "https://h/a", "auth": {"oauth": 1}}}),
        expect![[r#"
            ? source.auth: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
            ! source.auth.oauth.consumer_key: expected a string, got none; CouchDB cannot start the replication without it
            ! source.auth.oauth.consumer_secret: expected a string, got none; CouchDB cannot start the replication without it
            ! source.auth.oauth.signature_method: expected one of `PLAINTEXT`, `HMAC-SHA1`, `RSA-SHA1`, got another; leave it out for `HMAC-SHA1`
            ! source.auth.oauth.token: expected a string, got a number; CouchDB cannot start the replication without it
            ! source.auth.oauth.token_secret: expected a string, got none; CouchDB cannot start the replication without it
            ? target.auth: holds a login in clear; use a login that may do just what this replication needs, and let admins alone read the database
            ! target.auth.oauth: expected an object, got a number; write `{"consumer_key": …, "token": …}`
        "#]],
    );
    check(
        "1.7.1",
        json!({"user_ctx": {"name": "ann", "roles": ["_admin"]}}),
        expect![[r#"
        ? user_ctx.roles: with `_admin` the replication may write anything into a local target, design documents too; name the roles of a user who may do just what is needed
    "#]],
    );
    check(
        "3.5.0",
        json!({"user_ctx": {"name": "", "roles": ["_admin"]}}),
        expect![[r#"
        ? user_ctx.name: expected a name that is not empty, or `null`, got an empty string; write the user's name
        ? user_ctx.roles: `_admin` has no effect: 3.0 and later have no local endpoints; take it away
    "#]],
    );
    check(
        "3.2.3",
        json!({"user_ctx": {"name": 5, "roles": [5]}}),
        expect![[r#"
            ! user_ctx.name: expected a name that is not empty, or `null`, got `5`; write the user's name
            ? user_ctx.roles: expected an array of strings, got an array with something else; write `["role"]`
        "#]],
    );
    check(
        "3.5.0",
        json!({"user_ctx": null}),
        expect![[r#"
        ! user_ctx: expected an object, got `null`; write `{"name": …, "roles": […]}`, or take it away
    "#]],
    );
}

#[test]
fn a_state_that_was_left_in_is_found_before_it_is_saved() {
    check(
        "3.5.0",
        json!({"_replication_state": "failed", "_replication_id": "x"}),
        expect![[r#"
        ? _replication_id: CouchDB writes it itself, and does not read it; take all `_replication_*` members away before the document is saved
        ! _replication_state: with `failed` CouchDB never starts the replication, nor checks the document; take all `_replication_*` members away before the document is saved
    "#]],
    );
    check(
        "1.7.1",
        json!({"_replication_state": "failed"}),
        expect![[r#"
        ? _replication_state: is no state of this CouchDB: it writes `error` in its place, and then starts the replication; take all `_replication_*` members away before the document is saved
    "#]],
    );
    check(
        "2.1",
        json!({"_replication_state": "triggered", "_replication_stats": {}}),
        expect![[r#"
        ? _replication_state: CouchDB writes it itself; with this one it starts the replication all the same; take all `_replication_*` members away before the document is saved
        ? _replication_stats: CouchDB writes it itself, and does not read it; take all `_replication_*` members away before the document is saved
    "#]],
    );
    check(
        "2.1",
        json!({"_replication_state": 5}),
        expect![[r#"
            ! _replication_state: is no state that CouchDB writes: with it no replication is started any more, whatever its document; take all `_replication_*` members away before the document is saved
        "#]],
    );
}

#[test]
fn a_state_that_couchdb_wrote_is_fine_and_another_is_found() {
    let (time, stats) = ("2026-11-21T21:04:54+00:00", json!({"docs_read": 1}));
    let nothing = || expect![[""]];
    let completed = json!({"_replication_state": "completed", "_replication_state_time": time,
        "_replication_stats": stats, "_replication_id": "x", "owner": null});
    stored("1.7.1", completed.clone(), nothing());
    stored("3.5.0", completed, nothing());
    stored("1.7.1", json!({"_replication_id": "x"}), nothing());
    let failed = json!({"_replication_state": "failed", "_replication_state_time": time,
        "_replication_state_reason": "x"});
    stored("3.5.0", failed.clone(), nothing());
    stored(
        "1.7.1",
        failed,
        expect![[r#"
            ? _replication_state: `failed` is no state of this CouchDB: it writes `error` in its place, and then starts the replication; save the document without its `_replication_*` members; CouchDB starts it then
        "#]],
    );
    stored(
        "3.5.0",
        json!({"_replication_state": "completed"}),
        expect![[r#"
        ! _replication_state: `completed` without `_replication_state_time`: somebody else wrote it, not CouchDB; CouchDB does not start the replication with it; save the document without its `_replication_*` members; CouchDB starts it then
    "#]],
    );
    stored(
        "3.5.0",
        json!({"_replication_state": "completed", "_replication_state_time": time}),
        expect![[r#"
            ! _replication_state: `completed` without `_replication_stats`: somebody else wrote it, not CouchDB; CouchDB does not start the replication with it; save the document without its `_replication_*` members; CouchDB starts it then
        "#]],
    );
    stored("1.1", json!({"_replication_state": "completed", "_replication_state_time": time}), nothing());
    stored(
        "3.5.0",
        json!({"_replication_state": "failed", "_replication_state_time": time}),
        expect![[r#"
        ! _replication_state: `failed` without `_replication_state_reason`: somebody else wrote it, not CouchDB; CouchDB does not start the replication with it; save the document without its `_replication_*` members; CouchDB starts it then
    "#]],
    );
    stored(
        "3.5.0",
        json!({"_replication_state": "triggered"}),
        expect![[r#"
        ? _replication_state: `triggered` without `_replication_state_time`: somebody else wrote it, not CouchDB; CouchDB starts the replication all the same; save the document without its `_replication_*` members; CouchDB starts it then
    "#]],
    );
    stored(
        "3.5.0",
        json!({"_replication_state": "running"}),
        expect![[r#"
            ! _replication_state: expected one of `triggered`, `completed`, `error`, `failed`, got another word; it is no state that CouchDB writes: with it no replication is started any more, whatever its document; save the document without its `_replication_*` members, then restart CouchDB
        "#]],
    );
    stored(
        "1.7.1",
        json!({"_replication_state": null}),
        expect![[r#"
            ? _replication_state: expected one of `triggered`, `completed`, `error`, got `null`; it is no state of this CouchDB: it writes `error` in its place, and then starts the replication; save the document without its `_replication_*` members; CouchDB starts it then
        "#]],
    );
    stored(
        "1.7.1",
        json!({"_replication_state_reason": "x", "_replication_stats": {}}),
        expect![[r#"
        ? _replication_state_reason: stands without `_replication_state`: somebody else wrote it, not CouchDB; take it away; CouchDB does not read it
        ? _replication_stats: stands without `_replication_state`: somebody else wrote it, not CouchDB; take it away; CouchDB does not read it
    "#]],
    );
}

/// Replication documents as 1.7.1, 2.2.0 and 3.5.0 kept them: all were taken, some failed for reasons outside.
#[test]
fn what_real_servers_wrote_gives_warnings_at_most() {
    let answers = [
        ("1.7.1", include_str!("../../../tests/data/1.7.1/replicator_changes_35s.json")),
        ("2.2.0", include_str!("../../../tests/data/2.2.0/replicator_changes_35s.json")),
        ("3.5.0", include_str!("../../../tests/data/3.5.0/replicator_changes_35s.json")),
    ];
    for (version, answer) in answers {
        let answer: Value = serde_json::from_str(answer).unwrap();
        let body: Value = serde_json::from_str(answer["body"].as_str().unwrap()).unwrap();
        let rows = body["results"].as_array().unwrap();
        let docs: Vec<&Value> = rows.iter().map(|row| &row["doc"]).collect();
        assert!(docs.iter().filter(|doc| doc["source"].is_string()).count() >= 5, "{version}");
        for doc in docs {
            let findings = super::check(doc, Some(version.parse().unwrap()), Origin::Stored);
            let odd =
                findings.iter().find(|finding| !finding.message.starts_with("holds a password in clear"));
            assert_eq!(odd, None, "{version} {doc}");
        }
    }
}

/// Every string in a document may be a secret: each is one, wherever one may stand.
#[test]
fn no_text_of_a_document_stands_in_a_finding() {
    const CANARY: &str = "canary";
    let url = "https://canary:canary@h/canary?canary=canary#canary";
    let values = [
        json!(CANARY),
        json!(url),
        json!({"name": CANARY}),
        json!([CANARY]),
        json!("canary@"),
        json!("canary://"),
    ];
    let endpoint = |value: &Value| {
        json!({"url": value, "headers": {"Authorization": value, "X": value}, "canary@h": value, "password": value,
            "auth": {"basic": {"username": value, "password": value}, "oauth": value, "password": value, "iam": value}})
    };
    let mut n_findings = 0;
    for value in &values {
        let mut members: Map<String, Value> =
            fields::names().map(|name| (name.to_owned(), value.clone())).collect();
        let endpoints = [value.clone(), endpoint(value)];
        for name in [
            "params",
            "sorce",
            "heartbeat",
            "_replication_state",
            "_replication_stats",
            "_x",
            "_id",
            "https://canary@h",
            "_canary@",
            "headers",
            "auth",
        ] {
            members.insert(name.to_owned(), value.clone());
        }
        members.insert("params".to_owned(), Value::Object(members.clone()));
        for end in endpoints {
            for option in
                ["[{canary, canary}, canary, {keepalive, canary}]", "[{\"canary\", 1}]", "canary", "[canary"]
            {
                members.insert("source".to_owned(), end.clone());
                members.insert("target".to_owned(), endpoint(&end));
                members.insert("socket_options".to_owned(), option.into());
                members.insert("user_ctx".to_owned(), json!({"name": value, "roles": value}));
                members.insert(
                    "create_target_params".to_owned(),
                    json!({"placement": value, "q": value, "x": value}),
                );
                for (version, origin) in
                    [("1.1", Origin::ToSave), ("2.1", Origin::Stored), ("3.5", Origin::ToSave)]
                {
                    let text = found(&Value::Object(members.clone()), version, origin);
                    assert!(!text.contains(CANARY), "{text}");
                    n_findings += text.lines().count();
                }
            }
        }
    }
    assert!(n_findings > 1_000, "{n_findings}");
}

#[test]
fn a_rewrite_by_couchdb_is_no_edit() {
    let of = |text: &str| fingerprint(&serde_json::from_str(text).unwrap());
    let written =
        r#"{"_id":"a","_rev":"1-a","source":{"url":"x","headers":{"b":1,"a":2}},"doc_ids":["a","b"]}"#;
    let check = |text: &str, same: bool| assert_eq!(of(written) == of(text), same, "{text}");
    check(r#"{"doc_ids":["a","b"],"source":{"headers":{"a":2,"b":1},"url":"x"}}"#, true);
    check(
        r#"{"_id":"b","_rev":"2-b","source":{"url":"x","headers":{"b":1,"a":2}},"doc_ids":["a","b"],"owner":"ann",
            "_replication_state":"completed","_replication_stats":{},"_conflicts":[]}"#,
        true,
    );
    check(r#"{"source":{"url":"x","headers":{"b":1,"a":2}},"doc_ids":["b","a"]}"#, false);
    check(r#"{"source":{"url":"y","headers":{"b":1,"a":2}},"doc_ids":["a","b"]}"#, false);
    check(r#"{"source":{"url":"x","headers":{"b":1,"a":2}},"doc_ids":["a","b"],"continuous":true}"#, false);
    // Kept over restarts and upgrades: never another.
    assert_eq!(format!("{:x}", of(written)), "2b6f356c883931ac");
}

#[test]
fn a_text_holds_one_document_or_several() {
    let check = |text: &str, expected: Expect| {
        let found = match documents(text) {
            Ok(documents) => documents.iter().map(|(place, doc)| format!("`{place}` {doc}\n")).collect(),
            Err(finding) => finding.to_string(),
        };
        expected.assert_eq(&found);
    };
    check(
        "\u{feff}{\"a\":1}\n",
        expect![[r#"
            `` {"a":1}
        "#]],
    );
    check(
        "[{\"a\":1}, 5]",
        expect![[r#"
            `[0]` {"a":1}
            `[1]` 5
        "#]],
    );
    check(
        "{\"docs\":[{\"a\":1}]}",
        expect![[r#"
            `docs[0]` {"a":1}
        "#]],
    );
    check(
        "{\"docs\":5}",
        expect![[r#"
            `` {"docs":5}
        "#]],
    );
    check("[]", expect![[""]]);
    check(
        "",
        expect![
            "line 1, column 0: expected JSON, got a text that ends too early; look for a missing quote, comma or bracket, or a comma too many, just before it"
        ],
    );
    check(
        "{\"a\":\n  \"canary\",}",
        expect![
            "line 2, column 12: expected JSON, got something else; look for a missing quote, comma or bracket, or a comma too many, just before it"
        ],
    );
    check(
        "{\"a\": 1",
        expect![
            "line 1, column 7: expected JSON, got a text that ends too early; look for a missing quote, comma or bracket, or a comma too many, just before it"
        ],
    );
}

#[test]
fn versions_are_read() {
    let check = |text: &str, expected: &str| {
        let found = text.parse::<Version>().map_or_else(|error| error, |version| version.to_string());
        assert_eq!(found, expected, "{text}");
    };
    check("1.7", "1.7");
    check("3.5.0", "3.5.0");
    check("3", "3");
    check("4.0.0-a1b2c3", "4.0.0");
    check("2.1.0.4", "2.1.0");
    for odd in ["", "x", "0.0.0", "v3", "99999999"] {
        check(odd, "expected a version of CouchDB such as `1.7` or `3.5.0`");
    }
    assert!("3.3".parse::<Version>().unwrap() > Version::new(3, 3, 3));
    assert!("3".parse::<Version>().unwrap() > Version::new(3, 5, 0));
    assert!(Version::NEWEST > Version::new(3, 5, 2));
}
