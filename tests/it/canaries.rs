//! Secrets planted in every place that a replication document or a user's can hold one, and searched for in all that
//! leaves: requests, log, letters, records, `_local` documents, what commands print, files.
//!
//! One daemon tells them in every format, alone and in batches, with events that are refused and events that are told
//! at the third try, to an endpoint that repeats in its answers what it was sent.

use std::collections::BTreeMap;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::Delivery;
use couch_hookd::standin::replicator::{Replication, ReplicationState};
use serde_json::{Value, json};

use crate::commands::{Desk, wait_until_alive_of};
use crate::host::WAIT_MAX;
use crate::world::{Daemon, FLAVOURS, Ini, STATE_DB, couch, letters, long, on_each, receiver_with};

/// Begins every planted text; what follows says where it was planted.
const PLANTED: &str = "pl4nted";

/// Base64 of `name:password`, as headers have it; none of it reads `pl4nted`.
fn login(name: &str, password: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(format!("{PLANTED}-{name}:{PLANTED}-{password}"))
}

/// Every spelling of what must not be seen.
fn needles() -> Vec<String> {
    let encoded = |text: &str| text.replacen("pl4", "%70l4", 1);
    vec![PLANTED.to_owned(), encoded(PLANTED), login("header", "header"), login("auth", "auth")]
}

/// Fails when `text` holds something that was planted.
#[track_caller]
fn assert_none(what: &str, text: &str) {
    let text_lower = text.to_lowercase();
    for needle in needles() {
        let Some(at) = text_lower.find(&needle.to_lowercase()) else { continue };
        let start = (0..=at.saturating_sub(300)).rev().find(|at| text_lower.is_char_boundary(*at));
        let near: String = text_lower[start.unwrap_or(0)..].chars().take(700).collect();
        panic!("{what} holds `{needle}`: …{near}…");
    }
}

/// A planted text.
fn p(place: &str) -> String {
    format!("{PLANTED}-{place}")
}

/// An endpoint with everything that may be secret in its URL.
fn url(place: &str) -> String {
    format!("http://{}:%70l4nted%40{place}@h.example/{place}?token={}", p("user"), p("query"))
}

/// Reasons as CouchDB gives them, with what it has been seen to put into them.
fn reasons() -> Vec<String> {
    let (user, password, query) = (p("user"), p("password"), p("query"));
    vec![
        format!(
            "{{replication_auth_error,\n    {{session_request_failed,\"http://h.example/_session\",\"{user}\",\n        {{conn_failed,{{error,econnrefused}}}}}}}}"
        ),
        format!(
            "{{http_request_failed,\"GET\",\n    \"http://{user}:{password}@h.example/x?token={query}\",\n    {{error,{{code,500}}}}}}"
        ),
        format!(
            "unauthorized: unauthorized to access or create database http://{user}:{password}@h.example/x"
        ),
        format!(
            "Couldn't open document `_design/f` from source database `http://{user}:*****@h.example/x/`: {{badmatch,[{{\"Authorization\",\"Basic {}\"}},{{\"X\",\"{}\"}}]}}",
            login("header", "header"),
            p("header")
        ),
        format!(
            "{{{{badmatch,{{basic_auth,{{\"{user}\",\"{password}\"}}}}}},[{{couch_replicator_httpc,send_req,[<<\"{password}\">>],[]}}]}}"
        ),
        format!(
            "{{bulk_docs_failed,500,{{[{{<<\"error\">>,<<\"e\">>}},{{<<\"doc\">>,<<\"{}\">>}},{{<<\"reason\">>,<<\"at http://{user}:{password}@h.example/\">>}}]}}}}",
            p("doc")
        ),
        format!("Invalid proxy url socks5://{user}:{password}@h.example:1080"),
        format!("failed: Cookie: AuthSession={password}"),
    ]
}

/// A replication document with a secret in every place that can hold one.
fn replication(reason: &str) -> Value {
    json!({
        "source": url("source"),
        "target": {
            "url": url("target"),
            "headers": {"Authorization": format!("Basic {}", login("header", "header")), "X-Key": p("header"), "X-List": [p("list")]},
            "auth": {
                "basic": {"username": p("user"), "password": p("auth")},
                "iam": {"api_key": p("iam")},
                "oauth": {"consumer_secret": p("oauth"), "token_secret": p("oauth"), "consumer_key": p("oauth"), "token": p("oauth")},
            },
        },
        "headers": {"Authorization": format!("Basic {}", login("auth", "auth"))},
        "auth": {"basic": {"username": p("user"), "password": p("auth")}},
        "oauth": {"token": p("oauth")},
        "proxy": format!("http://{}:{}@proxy.example:3128", p("user"), p("proxy")),
        "source_proxy": format!("socks5://{}:{}@proxy.example:1080", p("user"), p("source-proxy")),
        "target_proxy": format!("http://{}:{}@proxy.example:3128", p("user"), p("target-proxy")),
        "user_ctx": {"name": p("ctx"), "roles": [p("role")]},
        "query_params": {"key": p("param"), p("param-name"): 1},
        "selector": {"secret": p("selector")},
        "doc_ids": [p("doc-id")],
        "socket_options": format!("[{{keepalive,true}},{{raw,\"{}\"}}]", p("socket")),
        "since_seq": p("since"),
        "create_target_params": {"q": p("q")},
        "note": p("note"),
        "continuous": true,
        "_replication_state": "error",
        "_replication_state_reason": reason,
        "_replication_stats": {"docs_read": 3, "note": p("stats"), "more": {"note": p("stats")}},
    })
}

/// A user's document, likewise.
fn user(name: &str) -> Value {
    json!({
        "name": name, "type": "user", "roles": ["reader"],
        "password": p("password"), "password_sha": p("sha"), "salt": p("salt"), "derived_key": p("key"),
        "simple": p("simple"), "pbkdf2_prf": p("prf"), "totp": {"key": p("totp")}, "oauth": {"consumer_keys": {"a": p("oauth")}},
        "email": p("email"), p("member"): true,
    })
}

/// A webhook: its name, and the lines of its section.
type Webhook = (String, String);

/// One webhook for every format, one for every format that takes batches, on this database.
fn in_every_format(watch: &str, db: &str, formats: &[&str]) -> Vec<Webhook> {
    let prefix = db.replace('/', "-").trim_start_matches('_').to_owned();
    let lines = |format: &str, more: &str| {
        format!("watch = {watch}\ndb = {db}\nformat = {format}\nretry_schedule = 100ms\n{more}")
    };
    let single = formats.iter().map(|format| (format!("{prefix}-{format}"), lines(format, "")));
    let batches = formats.iter().filter(|format| ["standard", "cloudevents"].contains(format));
    let batches = batches.map(|format| {
        (format!("{prefix}-{format}-batch"), lines(format, "batch_max = 4\nbatch_wait = 20ms"))
    });
    single.chain(batches).collect()
}

/// Refuses `turned-away`, takes `third-try` at the third try, and repeats what it got in the answer.
fn refuse_some(receiver: &Receiver) {
    let tries: std::sync::Mutex<BTreeMap<String, u32>> = std::sync::Mutex::default();
    receiver.answer(move |one| {
        let body = String::from_utf8_lossy(&one.body).into_owned();
        let echo = |status| Reaction::StatusWith { status, headers: Vec::new(), body: format!("got {body}") };
        if body.contains("turned-away") {
            return echo(422);
        }
        let mut tries = tries.lock().unwrap();
        let n = tries.entry(one.webhook.clone()).or_default();
        if body.contains("third-try") && *n < 2 {
            *n += 1;
            return echo(500);
        }
        Reaction::Status(200)
    });
}

fn is_told(deliveries: &[Delivery], webhook: &str, id: &str) -> bool {
    let told = |one: &&Delivery| String::from_utf8_lossy(&one.body).contains(id);
    deliveries.iter().filter(|one| one.webhook == webhook && one.accepted()).any(|one| told(&one))
}

/// Waits until every webhook told of every document but `turned-away`, of which it has a letter; then searches.
fn search(
    couch: &StandIn,
    receiver: &Receiver,
    daemon: &Daemon,
    ini: &Ini,
    webhooks: &[Webhook],
    ids: &[String],
) {
    for (webhook, _) in webhooks {
        for id in ids.iter().filter(|id| !id.contains("turned-away")) {
            let told = receiver.wait_until(WAIT_MAX, |record| is_told(record.deliveries(), webhook, id));
            assert!(told, "`{webhook}` never told of `{id}`\n{}", daemon.transcript());
        }
    }
    let stored = couch.wait_until(WAIT_MAX, |seen| {
        let winners = seen.winners(STATE_DB);
        webhooks.iter().all(|(name, _)| {
            let of = format!("\"webhook\":\"{name}\"");
            winners.iter().any(|(id, winner)| id.starts_with("msg_") && winner.json.contains(&of))
        })
    });
    assert!(stored, "not every webhook has a letter\n{}", daemon.transcript());
    let desk = Desk::new(ini);
    let mut outputs = vec![
        desk.say(&["dead-letters", "list"]),
        desk.say(&["dead-letters", "list", "--json"]),
        desk.say(&["status"]),
        desk.say(&["status", "--json"]),
        desk.say(&["check"]),
    ];
    for letter in letters(couch) {
        outputs.push(desk.say(&["dead-letters", "show", letter["_id"].as_str().unwrap()]));
    }
    for (webhook, _) in webhooks {
        outputs.push(desk.say(&["explain", webhook]));
        outputs.push(desk.say(&["explain", webhook, "--json"]));
    }
    for db in couch.look(|seen| seen.databases()).iter().filter(|db| db.ends_with("_replicator")) {
        for id in ids {
            outputs.push(desk.say(&["replications", "check", id, "--database", db]));
        }
    }
    outputs.push(desk.say(&["tail", &webhooks[0].0, "--for", "1s", "--json"]));
    for said in outputs {
        assert_none("what a command printed", &format!("{}\n{}", said.out, said.err));
    }
    receiver.look(|record| {
        for one in record.deliveries() {
            assert_none("a request", &String::from_utf8_lossy(&one.body));
            assert_none("a header", &format!("{:?}", one.headers));
        }
    });
    for (id, winner) in couch.winners(STATE_DB) {
        assert_none(&format!("`{id}` in `{STATE_DB}`"), &winner.json);
    }
    for db in couch.look(|seen| seen.databases()) {
        for (webhook, _) in webhooks {
            let numbered = (0..64).map(|n| format!("couch-hookd.{webhook}.{n}"));
            for id in numbered.chain([format!("couch-hookd.{webhook}"), "couch-hookd".to_owned()]) {
                let json = couch.look(|seen| seen.local(&db, &id)).unwrap_or_default();
                assert_none(&format!("`_local/{id}` in `{db}`"), &json);
            }
        }
    }
    assert_none("the log", &daemon.transcript());
    for file in daemon.files() {
        assert_none("a file", &String::from_utf8_lossy(&std::fs::read(file).unwrap()));
    }
}

/// Starts a daemon with these webhooks and hands all of it to [`search`].
fn tell(couch: &StandIn, webhooks: &[Webhook], ids: &[String]) {
    let receiver = receiver_with(|options| options.keep_bodies = true);
    refuse_some(&receiver);
    let ini = Ini::new(&couch.url()).hookd("log_level = debug");
    let ini = webhooks.iter().fold(ini, |ini, (name, lines)| ini.webhook(name, &receiver.url(), lines));
    let daemon = Daemon::start(&ini);
    wait_until_alive_of(couch, &webhooks[0].0);
    search(couch, &receiver, &daemon, &ini, webhooks, ids);
}

const FORMATS: [&str; 5] = ["standard", "cloudevents", "raw", "slack", "couchdb_doc"];

/// `turned-away`, `third-try`, and a document for every reason.
fn ids() -> Vec<String> {
    let numbered = (0..reasons().len()).map(|n| format!("rep{n}"));
    numbered.chain(["turned-away".to_owned(), "third-try".to_owned()]).collect()
}

#[test]
fn nothing_planted_in_a_replication_leaves_with_its_changes() {
    for db in ["_replicator", "team/_replicator"] {
        let couch = couch(Flavour::V3, &[db]);
        let (reasons, ids) = (reasons(), ids());
        for (n, id) in ids.iter().enumerate() {
            couch.put(db, id, &replication(&reasons[n % reasons.len()])).unwrap();
        }
        tell(&couch, &in_every_format("changes", db, &FORMATS), &ids);
    }
}

#[test]
fn nothing_planted_in_a_user_leaves() {
    let couch = couch(Flavour::V3, &["_users"]);
    let ids: Vec<String> =
        ["anna", "turned-away", "third-try"].map(|name| format!("org.couchdb.user:{name}")).into();
    for id in &ids {
        couch.put("_users", id, &user(id.trim_start_matches("org.couchdb.user:"))).unwrap();
    }
    tell(&couch, &in_every_format("changes", "_users", &FORMATS), &ids);
}

/// On 1.x the documents say it, on 2.x and 3.x the scheduler.
#[test]
fn nothing_planted_in_a_replication_leaves_with_its_state() {
    // There is no line of a feed to send.
    let formats: Vec<&str> = FORMATS.into_iter().filter(|format| *format != "raw").collect();
    let flavours: &[Flavour] = if long() { &FLAVOURS } else { &[Flavour::V1, Flavour::V3] };
    on_each(flavours, |flavour| {
        let couch = couch(flavour, &["_replicator"]);
        let (reasons, ids) = (reasons(), ids());
        for (n, id) in ids.iter().enumerate() {
            let reason = &reasons[n % reasons.len()];
            let mut doc = replication(reason);
            doc.as_object_mut().unwrap().retain(|name, _| !name.starts_with("_replication"));
            couch.put_replication("_replicator", id, &doc).unwrap();
            let failing = Replication::failing(ReplicationState::Crashing, reason, 2);
            couch.replicate("_replicator", id, failing).unwrap();
        }
        let mut webhooks = in_every_format("replications", "_replicator", &formats);
        for (_, lines) in &mut webhooks {
            *lines += "\nevents = *\npoll_interval = 100ms";
        }
        tell(&couch, &webhooks, &ids);
    });
}
