//! Keeps the README and `docs/` true: what is generated is current, what is shown is what the code makes.
//!
//! `UPDATE_EXPECT=1 cargo test --test it docs` rewrites the generated parts of the README.

use std::path::Path;

use couch_hookd::config::keys;
use couch_hookd::pure::about;
use couch_hookd::pure::changes::{Item, Parser, Row, RowDoc, Shape};
use couch_hookd::pure::database_events;
use couch_hookd::pure::format::Format;
use couch_hookd::pure::message::{Telling, Watch, WebhookId};
use couch_hookd::pure::seq::Seq;
use couch_hookd::pure::transitions;
use expect_test::expect_file;
use serde_json::Value;

#[test]
fn the_readme_holds_the_current_keys_and_receivers() {
    let mut text = read("README.md");
    text = with_part(&text, "keys", &keys::reference_markdown());
    text = with_part(&text, "commands", &couch_hookd::cli::reference_markdown());
    for (file, language) in [("receiver.py", "python"), ("receiver.mjs", "js"), ("receiver.php", "php")] {
        let code = read(&format!("docs/verify/{file}"));
        assert!(code.lines().count() <= 26, "{file}: expected a receiver that is read at a glance");
        text = with_part(&text, file, &format!("```{language}\n{code}```\n"));
    }
    expect_file!["../../README.md"].assert_eq(&text);
}

#[test]
fn links_of_the_documents_lead_to_files() {
    for document in ["README.md", "docs/events.md", "packaging/README.md"] {
        let folder = Path::new(document).parent().unwrap();
        for link in read(document).split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let file = link.split('#').next().unwrap();
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(file);
            assert!(link.contains("://") || path.exists(), "{document}: expected a file at `{link}`");
        }
    }
}

#[test]
fn every_example_fits_the_schema() {
    let text = read("docs/events.md");
    let examples: Vec<Value> =
        code_blocks(&text, "json").map(|json| serde_json::from_str(json).unwrap()).collect();
    assert!(examples.len() >= 5, "expected the examples of docs/events.md, got {}", examples.len());
    for example in &examples {
        assert_eq!(faults(example), [""; 0], "{example}");
    }
    assert!(text.contains("\"reason\":\"too_large\""), "no example of a document left out");
}

/// The event of the first example, in each of the other formats.
#[test]
fn the_examples_of_formats_are_what_the_code_makes() {
    let text = read("docs/events.md");
    let first: Value = serde_json::from_str(code_blocks(&text, "json").next().unwrap()).unwrap();
    let data = &first["data"];
    let line = serde_json::json!({
        "seq": data["seq"], "id": data["id"], "changes": [{"rev": data["rev"]}], "doc": data["doc"],
    });
    let mut items = Vec::new();
    let mut parser = Parser::new(Shape::Lines, 1 << 20).keeping_lines(true);
    parser.push(line.to_string().as_bytes(), &mut items).unwrap();
    let Some(Item::Row(row)) = items.pop() else { panic!("expected a row") };
    let at = first["timestamp"].as_str().unwrap().parse().unwrap();
    for (word, format) in Format::WORDS {
        let label = if format == Format::Standard { "json".to_owned() } else { format!("json {word}") };
        let shown: Value = serde_json::from_str(code_blocks(&text, &label).next().unwrap()).unwrap();
        let telling = Telling { format, ..telling() };
        let event = telling.arrived(row.clone(), "83146ee2921be552562ce8f00b98b5b3", at).event.unwrap();
        let made: Value = serde_json::from_slice(&telling.body(&event)).unwrap();
        assert_eq!(made, shown, "{word}");
    }
}

#[test]
fn every_other_example_fits_its_schema_and_every_type_is_described() {
    check_examples("daemon", 4, &about::TYPES);
    check_examples("replication", 2, &transitions::TYPES);
    check_examples("database", 5, &database_events::TYPES);
}

/// The examples labelled so, the schema named so, and the table of types.
fn check_examples(label: &str, n_examples: usize, types: &[&str]) {
    let text = read("docs/events.md");
    let schema = schema_of(label);
    let examples: Vec<Value> = code_blocks(&text, &format!("json {label}"))
        .map(|json| serde_json::from_str(json).unwrap())
        .collect();
    assert_eq!(examples.len(), n_examples);
    for example in &examples {
        assert_fits(label, example);
    }
    let listed: Vec<&str> =
        schema["properties"]["type"]["enum"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(listed, types);
    for event_type in types {
        assert!(text.contains(&format!("| `{event_type}` |")), "{event_type} is not in the table of types");
    }
}

#[test]
fn the_example_of_a_batch_is_one() {
    let text = read("docs/events.md");
    let batch: Value = serde_json::from_str(code_blocks(&text, "json batch").next().unwrap()).unwrap();
    let events = batch["data"].as_array().unwrap();
    let ids: Vec<&str> = events.iter().map(|event| event["id"].as_str().unwrap()).collect();
    assert_eq!(batch["id"], WebhookId::of(&ids).to_string());
    for event in events {
        assert_eq!(faults(event), [""; 0], "{event}");
    }
}

#[test]
fn every_shape_of_a_body_fits_the_schema() {
    let check = |telling: &Telling, row: Row, expected_members: &str| {
        let event = telling.arrived(row, "5f0c", "2026-11-22T00:52:43.622Z".parse().unwrap()).event.unwrap();
        let body: Value = serde_json::from_slice(&telling.body(&event)).unwrap();
        assert_eq!(faults(&body), [""; 0], "{body}");
        let data: Vec<&str> = body["data"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(data.join(" "), format!("{expected_members} webhook"), "{body}");
    };
    let plain = telling();
    let doc = r#"{"_id":"a","_rev":"3-c","n":1.0}"#;
    check(&plain, row("42", doc), "db deleted doc generation id rev seq");
    check(&plain, row(r#""42-g1""#, doc), "db deleted doc generation id rev seq");
    check(&plain, row(r#"[42,"g1"]"#, doc), "db deleted doc generation id rev seq");
    check(&plain, row("null", doc), "db deleted doc generation id rev");
    check(
        &plain,
        row("1", r#"{"_id":"a","_rev":"3-c","_deleted":true}"#),
        "db deleted generation id rev seq",
    );
    let own = r#"{"_id":"a","_rev":"3-c","_deleted":true,"by":"ann"}"#;
    check(&plain, row("1", own), "db deleted doc generation id rev seq");
    check(&plain, Row { doc: RowDoc::Null, ..row("1", doc) }, "db deleted doc_omitted generation id rev seq");
    let large = Row { doc: RowDoc::TooLarge { bytes: 2_000_000 }, ..row("1", doc) };
    check(&plain, large, "db deleted doc_omitted generation id rev seq");
    let conflicts = Telling { conflicts: true, ..telling() };
    let conflict = r#"{"_id":"a","_rev":"3-c","_conflicts":["3-b"]}"#;
    check(&conflicts, row("1", conflict), "conflicts db deleted doc generation id rev seq");
    let bare = Telling { include_docs: false, ..telling() };
    check(&bare, row("1", doc), "db deleted generation id rev seq");
}

#[test]
fn the_schema_is_missed_by_what_it_does_not_describe() {
    let good: Value =
        serde_json::from_str(code_blocks(&read("docs/events.md"), "json").next().unwrap()).unwrap();
    let check = |pointer: &str, name: &str, value: Option<Value>, expected: &str| {
        let mut body = good.clone();
        let object = body.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        match value {
            Some(value) => object.insert(name.to_owned(), value),
            None => object.remove(name),
        };
        assert_eq!(faults(&body), [expected]);
    };
    check("", "topic", Some(1.into()), "/topic is not described");
    check("/data", "generation", Some("1".into()), "/data/generation: expected \"integer\", got \"1\"");
    check("/data", "rev", None, "/data/rev is missing");
    check(
        "",
        "type",
        Some("document.created".into()),
        "/type: expected one of [\"document.updated\",\"document.deleted\",\"document.conflicted\",\"document.resolved\"], got \"document.created\"",
    );
}

#[test]
fn the_worked_examples_of_the_webhook_id_are_right() {
    let text = read("docs/events.md");
    let mut n_examples = 0;
    for block in code_blocks(&text, "sh") {
        let lines: Vec<&str> = block.lines().collect();
        for pair in lines.chunks(2) {
            let parts: Value = serde_json::from_str(pair[0].split('\'').nth(3).unwrap()).unwrap();
            let id = WebhookId::of(&parts).to_string();
            assert_eq!(pair[1].trim_start_matches("# "), id.trim_start_matches("msg_"));
            assert!(text.contains(&format!("{{\"id\":\"{id}\"")), "expected an example with the id `{id}`");
            n_examples += 1;
        }
    }
    assert_eq!(n_examples, 3);
}

fn telling() -> Telling {
    Telling {
        webhook: "orders".to_owned(),
        db: "orders".to_owned(),
        source: "https://couch.example/orders".to_owned(),
        events: vec!["document.*".to_owned()],
        include_docs: true,
        conflicts: false,
        conflict_docs: false,
        design_docs: false,
        payload_bytes_max: 1 << 20,
        format: Format::Standard,
        watch: Watch::Changes,
    }
}

fn row(seq: &str, doc: &str) -> Row {
    let doc = couch_hookd::pure::document::Document::parse(doc.to_owned()).unwrap();
    Row {
        seq: Seq::from_json(seq),
        id: "a".to_owned(),
        revs: vec!["3-c".to_owned()],
        deleted: doc.get().contains("_deleted"),
        doc: RowDoc::Json(doc),
        line: None,
    }
}

/// Fails when a body is not what docs/LABEL-event.schema.json says.
#[track_caller]
pub(crate) fn assert_fits(label: &str, body: &Value) {
    let mut faults = Vec::new();
    collect_faults(body, &schema_of(label), "", &mut faults);
    assert_eq!(faults, [""; 0], "{body}");
}

fn schema_of(label: &str) -> Value {
    serde_json::from_str(&read(&format!("docs/{label}-event.schema.json"))).unwrap()
}

/// What of a body docs/event.schema.json does not allow, or does not tell of. Knows the words that the schema uses for
/// single members; the whole of it is `jsonschema`'s business, in tests/interop/demo.py.
fn faults(body: &Value) -> Vec<String> {
    let schema: Value = serde_json::from_str(&read("docs/event.schema.json")).unwrap();
    let mut faults = Vec::new();
    collect_faults(body, &schema, "", &mut faults);
    faults
}

fn collect_faults(value: &Value, schema: &Value, place: &str, faults: &mut Vec<String>) {
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        one => vec![one.clone()],
    };
    if !types.iter().any(|name| is_of_type(value, name.as_str().unwrap())) {
        faults.push(format!("{place}: expected {}, got {value}", schema["type"]));
    }
    if schema["enum"].as_array().is_some_and(|allowed| !allowed.contains(value)) {
        faults.push(format!("{place}: expected one of {}, got {value}", schema["enum"]));
    }
    let (Some(object), Some(properties)) = (value.as_object(), schema["properties"].as_object()) else {
        return;
    };
    for name in schema["required"].as_array().into_iter().flatten().map(|name| name.as_str().unwrap()) {
        if !object.contains_key(name) {
            faults.push(format!("{place}/{name} is missing"));
        }
    }
    for (name, member) in object {
        match properties.get(name) {
            Some(schema) => collect_faults(member, schema, &format!("{place}/{name}"), faults),
            None => faults.push(format!("{place}/{name} is not described")),
        }
    }
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64(),
        "null" => value.is_null(),
        other => panic!("this test does not know the type `{other}`"),
    }
}

/// The texts of code blocks in one language.
fn code_blocks<'a>(text: &'a str, language: &str) -> impl Iterator<Item = &'a str> {
    let open = format!("{language}\n");
    text.split("\n```").skip(1).filter_map(move |block| block.strip_prefix(&open))
}

/// `text` with another part between `<!-- name -->` and the next `<!-- end -->`.
fn with_part(text: &str, name: &str, part: &str) -> String {
    let begin = format!("<!-- {name} -->\n");
    let (before, rest) = text.split_once(&begin).expect("the document has the part's marker");
    let (_, after) = rest.split_once("<!-- end -->").expect("the part has an end");
    format!("{before}{begin}\n{}\n\n<!-- end -->{after}", part.trim())
}

fn read(path: &str) -> String {
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&whole).unwrap_or_else(|error| panic!("{path}: {error}"))
}
