//! `webhook.test`: the event that `couch-hookd test` sends, so that a receiver can be tried without a change in CouchDB.

use jiff::Timestamp;
use serde::Serialize;

use crate::pure::message::{Rfc3339, WebhookId};

/// The type in the payload.
pub const EVENT_TYPE: &str = "webhook.test";

/// The id of one test: never that of a change, never twice the same, as long as `random` is.
pub fn id(webhook: &str, random: [u8; 16]) -> WebhookId {
    WebhookId::of(&(EVENT_TYPE, webhook, random))
}

/// The body of the request:
///
/// `{"id":"msg_…","type":"webhook.test","timestamp":"2026-11-21T20:46:41.123Z","source":"https://couch.example","data":{"webhook":"orders"}}`
pub fn body(id: WebhookId, webhook: &str, source: &str, at: Timestamp) -> Vec<u8> {
    #[derive(Serialize)]
    struct Body<'a> {
        id: String,
        r#type: &'a str,
        timestamp: String,
        source: &'a str,
        data: Data<'a>,
    }
    #[derive(Serialize)]
    struct Data<'a> {
        webhook: &'a str,
    }
    let timestamp = Rfc3339(at).to_string();
    let body = Body { id: id.to_string(), r#type: EVENT_TYPE, timestamp, source, data: Data { webhook } };
    serde_json::to_vec(&body).expect("texts serialize")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_that_of_any_event() {
        let id = id("orders", [7; 16]);
        let at = "2026-11-21T20:46:41.123456Z".parse().unwrap();
        let body = String::from_utf8(body(id, "orders", "https://couch.example", at)).unwrap();
        let expected = format!(
            r#"{{"id":"{id}","type":"webhook.test","timestamp":"2026-11-21T20:46:41.123Z","source":"https://couch.example","data":{{"webhook":"orders"}}}}"#
        );
        assert_eq!(body, expected);
        assert_ne!(super::id("orders", [8; 16]), id);
    }
}
