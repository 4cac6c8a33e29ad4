//! `webhook.test`: the event that `couch-hookd test` sends, so that a receiver can be tried without a change in CouchDB.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::pure::format::Format;
use crate::pure::message::{Rfc3339, WebhookId};

/// The type in the payload.
pub const EVENT_TYPE: &str = "webhook.test";

/// The id of one test: never that of a change, never twice the same, as long as `random` is.
pub fn id(webhook: &str, random: [u8; 16]) -> WebhookId {
    WebhookId::of(&(EVENT_TYPE, webhook, random))
}

/// The body of the request in the webhook's format; in `raw`, which knows only CouchDB's own lines, that of `standard`:
///
/// `{"id":"msg_…","type":"webhook.test","timestamp":"2026-11-21T20:46:41.123Z","source":"https://couch.example","data":
/// {"webhook":"orders","about":"orders","message":"webhook orders: a test"}}`
pub fn body(format: Format, id: WebhookId, webhook: &str, source: &str, at: Timestamp) -> Vec<u8> {
    let (id, at, message) = (id.to_string(), Rfc3339(at).to_string(), format!("webhook {webhook}: a test"));
    let data = json!({"webhook": webhook, "about": webhook, "message": message});
    let standard =
        |name: &str| json!({name: id, "type": EVENT_TYPE, "timestamp": at, "source": source, "data": data});
    let body: Value = match format {
        Format::Standard | Format::Raw => standard("id"),
        Format::CouchdbDoc => standard("_id"),
        Format::CloudEvents => json!({
            "specversion": "1.0",
            "id": id,
            "source": source,
            "type": format!("couch-hookd.{EVENT_TYPE}"),
            "subject": webhook,
            "time": at,
            "datacontenttype": "application/json",
            "data": data,
        }),
        Format::Slack => json!({"text": format!("*{EVENT_TYPE}* {message}")}),
    };
    body.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_of_the_webhooks_format() {
        let id = id("orders", [7; 16]);
        let at = "2026-11-21T20:46:41.123456Z".parse().unwrap();
        let body = |format| -> Value {
            serde_json::from_slice(&body(format, id, "orders", "https://couch.example", at)).unwrap()
        };
        let standard = body(Format::Standard);
        assert_eq!(
            (&standard["id"], &standard["type"], &standard["timestamp"], &standard["source"]),
            (
                &json!(id.to_string()),
                &json!("webhook.test"),
                &json!("2026-11-21T20:46:41.123Z"),
                &json!("https://couch.example")
            )
        );
        assert_eq!(standard["data"]["webhook"], "orders");
        assert_eq!(body(Format::CouchdbDoc)["_id"], standard["id"]);
        assert_eq!(body(Format::CloudEvents)["type"], "couch-hookd.webhook.test");
        assert_eq!(body(Format::CloudEvents)["id"], standard["id"]);
        assert_eq!(body(Format::Slack)["text"], "*webhook.test* webhook orders: a test");
        assert_ne!(super::id("orders", [8; 16]), id);
    }
}
