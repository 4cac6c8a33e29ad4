//! From something told of a database to the event that is sent.

use jiff::Timestamp;

use crate::pure::about::About;
use crate::pure::database_events::TYPES;
use crate::pure::message::{Event, Telling, WebhookId};
use crate::pure::remembered::Kept;

/// The event that a kept one is, in the database that bears `mark`; `None` when it is not wanted.
pub fn event(telling: &Telling, kept: &Kept, mark: &str) -> Option<Event> {
    let event_type = TYPES.into_iter().find(|name| *name == kept.event_type)?;
    let id = WebhookId::of(&(&telling.webhook, &telling.db, mark, &kept.key, event_type, kept.n));
    telling.wants_type(event_type).then(|| made(id, event_type, &kept.key, kept.at, kept.data.clone()))
}

/// The event whose dead letter holds this `payload`; its id is the letter's own.
pub fn event_of_letter(
    id: WebhookId,
    event_type: &str,
    key: &str,
    at: Timestamp,
    payload: &str,
) -> Option<Event> {
    let event_type = TYPES.into_iter().find(|name| *name == event_type)?;
    Some(made(id, event_type, key, at, payload.to_owned()))
}

fn made(id: WebhookId, event_type: &'static str, db: &str, at: Timestamp, data: String) -> Event {
    let what = event_type.strip_prefix("database.").unwrap_or(event_type).replace('_', " ");
    let message = format!("database {db}: {what}");
    let about =
        About { event_type, subject: db.to_owned(), message, data: data.into_boxed_str(), is_kept: true };
    about.into_event(id, db.to_owned(), String::new(), at)
}
