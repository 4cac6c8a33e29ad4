//! CloudEvents read by the SDK from PyPI, single ones and batches: what the real daemon sent, not what we think of it.

use std::io::Write;
use std::process::{Command, Stdio};

use couch_hookd::standin::couch::Flavour;
use couch_hookd::standin::record::Delivery;
use serde_json::{Map, Value, json};

use crate::world::{World, couch, receiver_with, secret, write};

/// Hands requests to tests/interop/cloudevents_sdk.py; gives its last line.
fn read_by_the_sdk(python: &str, requests: &[Delivery]) -> Result<String, String> {
    let mut child = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/cloudevents_sdk.py"))
        .args(["--secret", &secret()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for one in requests {
        let headers: Map<String, Value> =
            one.headers.iter().map(|(name, value)| (name.to_lowercase(), json!(value))).collect();
        writeln!(stdin, "{}", json!({"headers": headers, "body": String::from_utf8_lossy(&one.body)}))
            .unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.success() {
        true => Ok(said),
        false => Err(format!("{said}\n{}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn sent(lines: &str, n: usize) -> Vec<Delivery> {
    let couch = couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", n);
    couch.delete("orders", "d3").unwrap();
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let world = World::start_on(couch, receiver, &format!("format = cloudevents\n{lines}"));
    world.wait_for_all("orders");
    world.receiver.look(|record| record.deliveries().to_vec())
}

#[test]
fn the_sdk_reads_what_we_send() {
    let Some(python) = super::interop_python() else { return };
    let requests = sent("", 20);
    assert_eq!(read_by_the_sdk(&python, &requests).unwrap(), "20 requests, 20 events, 1 of them deletions");
    let requests = sent("batch_max = 8\nbatch_wait = 200ms", 20);
    let said = read_by_the_sdk(&python, &requests).unwrap();
    assert!(requests.len() < 15 && said.ends_with("20 events, 1 of them deletions"), "{said}");
    // What the script must notice, so that its word means something.
    let mut wrong = requests[0].clone();
    wrong.body.push(b' ');
    assert!(read_by_the_sdk(&python, &[wrong]).unwrap_err().contains("signature"));
}
