//! Bodies of requests: one event, or several, in the shape that a webhook's `format` asks for.
//!
//! Guarantees that `doc` stands byte for byte in every shape that holds it, that what `message` left out of an event
//! (secrets of `_users` and of replications) is in none, and that the same event has the same body. Signing and sending
//! are left to others.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::pure::conflict::LeafDocs;
use crate::pure::message::{DELETED, Event, EventDoc, Rfc3339, Telling, UPDATED, Watch, WebhookId};

/// The shape of a webhook's bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `{"id":"msg_5f…","type":"document.updated","timestamp":"…","source":"…","data":{…}}`
    Standard,
    /// CloudEvents 1.0, structured mode.
    CloudEvents,
    /// The change line as CouchDB wrote it.
    Raw,
    /// `{"text":"…"}`, for chats.
    Slack,
    /// A document for a CouchDB, its `_id` the `webhook-id`.
    CouchdbDoc,
}

/// What stands in the last segment of a `source` as it is: RFC 3986's unreserved characters.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Characters of a Slack text that come from somebody else, at most: ids may be long, messages of chats may not.
const SLACK_CHARS_MAX: usize = 300;

impl Format {
    /// Every one, by its word in the configuration.
    pub const WORDS: [(&'static str, Format); 5] = [
        ("standard", Format::Standard),
        ("cloudevents", Format::CloudEvents),
        ("raw", Format::Raw),
        ("slack", Format::Slack),
        ("couchdb_doc", Format::CouchdbDoc),
    ];

    /// By its word.
    pub fn parse(word: &str) -> Option<Format> {
        Format::WORDS.into_iter().find(|(name, _)| *name == word).map(|(_, format)| format)
    }

    /// `content-type` of a request with one event.
    pub fn content_type(self) -> &'static str {
        match self {
            // Source: CloudEvents HTTP protocol binding 1.0.2 §3.2.1.
            Format::CloudEvents => "application/cloudevents+json; charset=utf-8",
            Format::Standard | Format::Raw | Format::Slack | Format::CouchdbDoc => "application/json",
        }
    }

    /// `content-type` of a request with several.
    pub fn batch_content_type(self) -> &'static str {
        match self {
            // Source: CloudEvents HTTP protocol binding 1.0.2 §3.3.1.
            Format::CloudEvents => "application/cloudevents-batch+json; charset=utf-8",
            other => other.content_type(),
        }
    }

    /// Whether a request can hold several events.
    pub fn takes_batches(self) -> bool {
        matches!(self, Format::Standard | Format::CloudEvents)
    }

    /// Statuses that mean "I have it already": a CouchDB that took the document before answers 409.
    pub fn delivered_on(self) -> &'static [u16] {
        match self {
            Format::CouchdbDoc => &[409],
            Format::Standard | Format::CloudEvents | Format::Raw | Format::Slack => &[],
        }
    }
}

/// The body of a request that tells one event.
pub fn body(telling: &Telling, event: &Event) -> Vec<u8> {
    let mut out = Vec::with_capacity(event.bytes() + 200);
    push_event(&mut out, telling, event);
    out
}

/// The body of a request that tells several, in their order:
/// `{"id":"msg_…","type":"batch","timestamp":"…","data":[EVENT,EVENT]}`, in CloudEvents `[EVENT,EVENT]`. Its time is
/// that of its latest event.
pub fn batch_body<'a>(
    id: WebhookId,
    parts: impl Iterator<Item = (&'a Telling, &'a Event)> + Clone,
) -> Vec<u8> {
    let n_bytes: usize = parts.clone().map(|(_, event)| event.bytes() + 200).sum();
    let mut out = Vec::with_capacity(n_bytes);
    let is_list = parts.clone().all(|(telling, _)| telling.format == Format::CloudEvents);
    if !is_list {
        let latest = parts.clone().map(|(_, event)| event.read_at).max().unwrap_or_default();
        push_str(&mut out, "{\"id\":\"");
        out.extend_from_slice(&id.text());
        push_str(&mut out, "\",\"type\":\"batch\",\"timestamp\":\"");
        out.extend_from_slice(&Rfc3339(latest).text());
        push_str(&mut out, "\",\"data\":");
    }
    for (nth, (telling, event)) in parts.enumerate() {
        out.push(if nth == 0 { b'[' } else { b',' });
        push_event(&mut out, telling, event);
    }
    push_str(&mut out, if is_list { "]" } else { "]}" });
    out
}

fn push_event(out: &mut Vec<u8>, telling: &Telling, event: &Event) {
    match telling.format {
        Format::Standard => push_standard(out, "{\"id\":\"", telling, event),
        // Members that begin with `_` are CouchDB's own at the top of a document only: those of `doc` lie deeper.
        Format::CouchdbDoc => push_standard(out, "{\"_id\":\"", telling, event),
        Format::CloudEvents => push_cloudevent(out, telling, event),
        Format::Raw => push_raw(out, event),
        Format::Slack => push_slack(out, telling, event),
    }
}

/// `{"id":"msg_5f…","type":"document.updated","timestamp":"2026-11-21T20:46:41.123Z","source":"…","data":{…}}`
fn push_standard(out: &mut Vec<u8>, open: &str, telling: &Telling, event: &Event) {
    push_str(out, open);
    out.extend_from_slice(&event.id.text());
    push_str(out, "\",\"type\":\"");
    push_str(out, event.event_type());
    push_str(out, "\",\"timestamp\":\"");
    out.extend_from_slice(&Rfc3339(event.read_at).text());
    push_str(out, "\",\"source\":");
    push_text(out, &source(telling, event));
    push_str(out, ",\"data\":");
    push_data(out, telling, event);
    out.push(b'}');
}

/// Where people know the database that is told of.
fn source<'a>(telling: &'a Telling, event: &Event) -> Cow<'a, str> {
    match &event.about {
        // Kept in `state_db`, about another one.
        Some(about) if telling.watch == Watch::Databases => {
            let server = telling.source.rsplit_once('/').map_or("", |(server, _)| server);
            Cow::Owned(format!("{server}/{}", utf8_percent_encode(&about.subject, SEGMENT)))
        }
        _ => Cow::Borrowed(&telling.source),
    }
}

/// Types and `subject` after the adapter for CouchDB; `id` and `data` are ours, because a `seq` names nothing for long.
///
/// Source: cloudevents/spec, `adapters/couchdb.md`; CloudEvents 1.0.2, "Type System" and "Context Attributes".
fn push_cloudevent(out: &mut Vec<u8>, telling: &Telling, event: &Event) {
    push_str(out, "{\"specversion\":\"1.0\",\"id\":\"");
    out.extend_from_slice(&event.id.text());
    push_str(out, "\",\"source\":");
    push_text(out, &source(telling, event));
    let event_type = event.event_type();
    let adapters = matches!(event_type, UPDATED | DELETED);
    push_str(out, if adapters { ",\"type\":\"org.apache.couchdb." } else { ",\"type\":\"couch-hookd." });
    push_str(out, event_type);
    push_str(out, "\",");
    let subject = event.about.as_ref().map_or(&event.doc_id, |about| &about.subject);
    if is_attribute_text(subject) {
        push_str(out, "\"subject\":");
        push_text(out, subject);
        out.push(b',');
    }
    push_str(out, "\"time\":\"");
    out.extend_from_slice(&Rfc3339(event.read_at).text());
    push_str(out, "\",\"datacontenttype\":\"application/json\",");
    if let Some(seq) = &event.seq {
        // Text always: an integer of CloudEvents has 32 bits.
        push_str(out, "\"couchdbseq\":");
        push_text(out, &seq.as_since());
        out.push(b',');
    }
    push_str(out, "\"data\":");
    push_data(out, telling, event);
    out.push(b'}');
}

/// Whether CloudEvents allows a text as an attribute: not empty, no control characters, no noncharacters.
fn is_attribute_text(text: &str) -> bool {
    let fine = |letter: char| {
        let code = u32::from(letter);
        !letter.is_control() && code & 0xfffe != 0xfffe && !(0xfdd0..=0xfdef).contains(&code)
    };
    !text.is_empty() && text.chars().all(fine)
}

/// `{"seq":…,"id":…,"changes":[{"rev":…}],"deleted":true,"doc":{…}}`: the line itself where it was kept.
fn push_raw(out: &mut Vec<u8>, event: &Event) {
    let mut doc = Vec::new();
    match &event.doc {
        EventDoc::Json(json) => push_str(&mut doc, json.get()),
        EventDoc::Gone => push_str(&mut doc, "null"),
        EventDoc::TooLarge(bytes) => {
            push(
                &mut doc,
                format_args!("null,\"doc_omitted\":{{\"reason\":\"too_large\",\"bytes\":{bytes}}}"),
            );
        }
        EventDoc::Absent => {}
    }
    if let Some(line) = &event.line {
        let (before, after) = line.around_doc();
        push_str(out, before);
        if let Some(after) = after {
            out.extend_from_slice(if doc.is_empty() { b"null" } else { &doc });
            push_str(out, after);
        }
        return;
    }
    push_str(out, "{\"seq\":");
    push_str(out, event.seq.as_ref().map_or("null", |seq| seq.as_json()));
    push_str(out, ",\"id\":");
    push_text(out, &event.doc_id);
    push_str(out, ",\"changes\":[");
    for (nth, rev) in std::iter::once(&event.rev).chain(&event.conflicts).enumerate() {
        push_str(out, if nth == 0 { "{\"rev\":" } else { ",{\"rev\":" });
        push_text(out, rev);
        out.push(b'}');
    }
    push_str(out, if event.deleted { "],\"deleted\":true" } else { "]" });
    if !doc.is_empty() {
        push_str(out, ",\"doc\":");
        out.extend_from_slice(&doc);
    }
    out.push(b'}');
}

/// `{"text":"*document.updated* order:17 in orders, revision 3-9f… (webhook orders)"}`; nothing of the document.
fn push_slack(out: &mut Vec<u8>, telling: &Telling, event: &Event) {
    if let Some(about) = &event.about {
        let text =
            format!("*{}* {} (webhook {})", about.event_type, slack_text(&about.message), telling.webhook);
        push_str(out, "{\"text\":");
        push_text(out, &text);
        out.push(b'}');
        return;
    }
    let text = format!(
        "*{}* {} in {}, revision {} (webhook {})",
        event.event_type(),
        slack_text(&event.doc_id),
        slack_text(&telling.db),
        slack_text(&event.rev),
        telling.webhook
    );
    push_str(out, "{\"text\":");
    push_text(out, &text);
    out.push(b'}');
}

/// Somebody else's text for Slack: on one line, cut, its three control characters escaped.
///
/// Source: docs.slack.dev, "Formatting message text", "Escaping text".
fn slack_text(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for (nth, letter) in text.chars().enumerate() {
        match letter {
            _ if nth == SLACK_CHARS_MAX => {
                shown.push('…');
                break;
            }
            '&' => shown.push_str("&amp;"),
            '<' => shown.push_str("&lt;"),
            '>' => shown.push_str("&gt;"),
            letter if letter.is_control() => shown.push(' '),
            letter => shown.push(letter),
        }
    }
    shown
}

/// `{"webhook":"orders","db":"orders","id":"order:17","rev":"3-9f…","generation":3,"deleted":false,"seq":…,"doc":{…}}`
fn push_data(out: &mut Vec<u8>, telling: &Telling, event: &Event) {
    if let Some(about) = &event.about {
        push_str(out, &about.data);
        return;
    }
    push_str(out, "{\"webhook\":");
    push_text(out, &telling.webhook);
    push_str(out, ",\"db\":");
    push_text(out, &telling.db);
    push_str(out, ",\"id\":");
    push_text(out, &event.doc_id);
    push_str(out, ",\"rev\":");
    push_text(out, &event.rev);
    if let Some(generation) = generation(&event.rev) {
        push_str(out, ",\"generation\":");
        push(out, generation);
    }
    push_str(out, if event.deleted { ",\"deleted\":true" } else { ",\"deleted\":false" });
    if telling.conflicts {
        push_str(out, ",\"conflicts\":");
        serde_json::to_writer(&mut *out, &event.conflicts).expect("texts serialize");
        push_leaf_docs(out, event.leaf_docs());
    }
    if let Some(seq) = &event.seq {
        push_str(out, ",\"seq\":");
        push_str(out, seq.as_json());
    }
    match &event.doc {
        EventDoc::Absent => {}
        EventDoc::Gone => push_str(out, ",\"doc_omitted\":{\"reason\":\"gone\"}"),
        EventDoc::TooLarge(bytes) => {
            push_str(out, ",\"doc_omitted\":{\"reason\":\"too_large\",\"bytes\":");
            push(out, bytes);
            out.push(b'}');
        }
        EventDoc::Json(doc) => {
            push_str(out, ",\"doc\":");
            push_str(out, doc.get());
        }
    }
    out.push(b'}');
}

/// `,"conflict_docs":[{…},{…}]`, or why not.
fn push_leaf_docs(out: &mut Vec<u8>, docs: &LeafDocs) {
    match docs {
        LeafDocs::Unread => {}
        LeafDocs::Json(docs) => {
            push_str(out, ",\"conflict_docs\":");
            push_str(out, docs);
        }
        LeafDocs::Unreadable => push_str(out, ",\"conflict_docs_omitted\":{\"reason\":\"unreadable\"}"),
        LeafDocs::TooLarge(bytes) => {
            push_str(out, ",\"conflict_docs_omitted\":{\"reason\":\"too_large\"");
            if let Some(bytes) = bytes {
                push(out, format_args!(",\"bytes\":{bytes}"));
            }
            out.push(b'}');
        }
    }
}

/// The number in front of a revision: 3 of `3-9f…`.
pub fn generation(rev: &str) -> Option<u64> {
    rev.split_once('-').and_then(|(number, _)| number.parse().ok())
}

/// Appends a text as it is.
pub(crate) fn push_str(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
}

fn push(out: &mut Vec<u8>, value: impl fmt::Display) {
    std::io::Write::write_fmt(out, format_args!("{value}")).expect("memory takes all text");
}

/// Appends a text as JSON.
pub(crate) fn push_text(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("text serializes");
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::pure::changes::{Item, Parser, Row, Shape};
    use crate::pure::message::Watch;

    /// The row of a feed, its text kept.
    fn row(text: &str) -> Row {
        let mut items = Vec::new();
        let mut parser = Parser::new(Shape::Lines, 1 << 20).keeping_lines(true);
        parser.push(text.as_bytes(), &mut items).unwrap();
        match items.remove(0) {
            Item::Row(row) => row,
            other => panic!("expected a row, got {other:?}"),
        }
    }

    fn telling(format: Format) -> Telling {
        Telling {
            webhook: "orders".into(),
            db: "orders".into(),
            source: "https://couch.example/orders".into(),
            events: vec!["document.*".into()],
            include_docs: true,
            conflicts: false,
            conflict_docs: false,
            design_docs: false,
            payload_bytes_max: 1 << 20,
            format,
            watch: Watch::Changes,
        }
    }

    fn event(telling: &Telling, line: &str) -> Event {
        let read_at = "2026-11-21T20:46:41.123Z".parse().unwrap();
        telling.arrived(row(line), "5f0c", read_at).event.unwrap()
    }

    fn body_of(telling: &Telling, line: &str) -> String {
        String::from_utf8(body(telling, &event(telling, line))).unwrap()
    }

    /// Numbers that no float holds, blanks, an order of keys: all of it must survive.
    const DOC: &str =
        r#"{"_id":"order:17","_rev":"3-9f", "n":12345678901234567890123,"x":1.0,"z":-0.0,"a":1e5}"#;

    fn line(doc: &str) -> String {
        format!(r#"{{"seq":"42-g1","id":"order:17","changes":[{{"rev":"3-9f"}}],"doc":{doc}}}"#)
    }

    #[test]
    fn a_document_stands_byte_for_byte_in_every_format_that_holds_it() {
        for format in [Format::Standard, Format::CloudEvents, Format::Raw, Format::CouchdbDoc] {
            let text = body_of(&telling(format), &line(DOC));
            assert!(text.contains(DOC), "{text}");
            serde_json::from_str::<Value>(&text).unwrap();
        }
        let text = body_of(&telling(Format::Slack), &line(DOC));
        assert!(!text.contains("1234567"), "a chat is told of a document, not what it holds: {text}");
    }

    #[test]
    fn raw_is_the_line_as_couchdb_wrote_it() {
        let check = |line: &str| assert_eq!(body_of(&telling(Format::Raw), line), line);
        check(&line(DOC));
        check(&line("null"));
        check(
            r#"{"doc":{"_id":"a","_rev":"1-x"},"changes":[{"rev":"1-x"},{"rev":"1-y"}],"id":"a","seq":7,"new":1}"#,
        );
        check(
            r#"{"seq":7,"id":"a","changes":[{"rev":"2-x"}],"deleted":true,"doc":{"_id":"a","_rev":"2-x","_deleted":true}}"#,
        );
        check(r#"{"seq":7,"id":"a\u00e9","changes":[{"rev":"2-x"}]}"#);
        let small = Telling { payload_bytes_max: 20, ..telling(Format::Raw) };
        assert_eq!(
            body_of(&small, &line(DOC)),
            line(&format!(r#"null,"doc_omitted":{{"reason":"too_large","bytes":{}}}"#, DOC.len()))
        );
    }

    #[test]
    fn raw_without_its_line_says_the_same() {
        let telling = telling(Format::Raw);
        for text in [
            line(DOC).as_str(),
            r#"{"seq":7,"id":"a","changes":[{"rev":"2-x"}],"deleted":true,"doc":{"_id":"a","_rev":"2-x","_deleted":true}}"#,
            r#"{"seq":null,"id":"a","changes":[{"rev":"2-x"}]}"#,
        ] {
            let event = Event { line: None, ..event(&telling, text) };
            assert_eq!(String::from_utf8(body(&telling, &event)).unwrap(), text);
        }
    }

    #[test]
    fn secrets_of_users_and_replications_stay_in_every_format() {
        let user = r#"{"seq":1,"id":"org.couchdb.user:a","changes":[{"rev":"1-a"}],"doc":{"_id":"org.couchdb.user:a","_rev":"1-a","name":"a","salt":"CANARY","roles":["x"]}}"#;
        let replication = r#"{"seq":1,"id":"r","changes":[{"rev":"1-a"}],"doc":{"_id":"r","_rev":"1-a","source":"https://u:CANARY@h/db","continuous":true}}"#;
        for (_, format) in Format::WORDS {
            for (db, line) in
                [("_users", user), ("_replicator", replication), ("eu/_replicator", replication)]
            {
                let text = body_of(&Telling { db: db.into(), ..telling(format) }, line);
                assert!(!text.contains("CANARY"), "{text}");
                serde_json::from_str::<Value>(&text).unwrap();
            }
        }
    }

    #[test]
    fn a_cloudevent_holds_what_the_adapter_says() {
        let telling = telling(Format::CloudEvents);
        let text = body_of(&telling, &line("{\"_id\":\"order:17\",\"_rev\":\"3-9f\"}"));
        let id = event(&telling, &line(DOC)).id;
        assert_eq!(
            text,
            format!(
                r#"{{"specversion":"1.0","id":"{id}","source":"https://couch.example/orders","type":"org.apache.couchdb.document.updated","subject":"order:17","time":"2026-11-21T20:46:41.123Z","datacontenttype":"application/json","couchdbseq":"42-g1","data":{{"webhook":"orders","db":"orders","id":"order:17","rev":"3-9f","generation":3,"deleted":false,"seq":"42-g1","doc":{{"_id":"order:17","_rev":"3-9f"}}}}}}"#
            )
        );
        let seq = |line: &str| serde_json::from_str::<Value>(&body_of(&telling, line)).unwrap();
        let one = seq(r#"{"seq":42,"id":"a\u0007","changes":[{"rev":"1-x"}],"deleted":true}"#);
        assert_eq!((&one["couchdbseq"], &one["subject"]), (&"42".into(), &Value::Null), "{one}");
        assert_eq!(one["type"], "org.apache.couchdb.document.deleted");
        for name in one.as_object().unwrap().keys() {
            assert!(name.len() <= 20 && name.bytes().all(|b| b.is_ascii_lowercase()), "{name}");
        }
    }

    #[test]
    fn a_document_for_couchdb_has_no_member_of_couchdbs_own_but_its_id() {
        let text = body_of(&telling(Format::CouchdbDoc), &line(DOC));
        let doc: Value = serde_json::from_str(&text).unwrap();
        let own: Vec<&String> =
            doc.as_object().unwrap().keys().filter(|name| name.starts_with('_')).collect();
        assert_eq!(own, ["_id"]);
        assert_eq!(doc["_id"], event(&telling(Format::CouchdbDoc), &line(DOC)).id.to_string());
        assert_eq!(doc["data"]["doc"]["_rev"], "3-9f");
    }

    #[test]
    fn a_text_for_slack_commands_nothing() {
        let line = r#"{"seq":1,"id":"<!channel> & <@U1>\n","changes":[{"rev":"1-x"}]}"#;
        assert_eq!(
            body_of(&telling(Format::Slack), line),
            "{\"text\":\"*document.updated* &lt;!channel&gt; &amp; &lt;@U1&gt;  in orders, revision 1-x (webhook orders)\"}"
        );
        let long = format!(r#"{{"seq":1,"id":"{}","changes":[{{"rev":"1-x"}}]}}"#, "é".repeat(400));
        let text = body_of(&telling(Format::Slack), &long);
        assert_eq!(text.matches('é').count(), SLACK_CHARS_MAX);
    }

    #[test]
    fn a_batch_holds_its_events_as_they_are() {
        let lines = [line(DOC), line(DOC).replace("order:17", "order:18")];
        for format in [Format::Standard, Format::CloudEvents] {
            let telling = telling(format);
            let events: Vec<Event> = lines.iter().map(|line| event(&telling, line)).collect();
            let id = WebhookId::of(&"x");
            let text =
                String::from_utf8(batch_body(id, events.iter().map(|event| (&telling, event)))).unwrap();
            let singles: Vec<String> = lines.iter().map(|line| body_of(&telling, line)).collect();
            let list = format!("[{}]", singles.join(","));
            let expected = match format {
                Format::CloudEvents => list,
                _ => format!(
                    r#"{{"id":"{id}","type":"batch","timestamp":"2026-11-21T20:46:41.123Z","data":{list}}}"#
                ),
            };
            assert_eq!(text, expected);
        }
    }
}
