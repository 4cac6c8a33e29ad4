//! Whether a webhook's endpoint can be reached: its name resolves, it connects, TLS succeeds. Nothing is sent.
//!
//! The endpoint's clock, which decides whether it takes our signatures for fresh, cannot be seen without a request.

use crate::cli::check::report::{Level, Report};
use crate::config::Webhook;
use crate::error::Result;
use crate::pipeline::webhook;
use crate::pure::url::{self, Url};

/// Tries one endpoint.
pub(crate) fn check(webhook: &Webhook, report: &mut Report<'_>) -> Result<()> {
    let subject = format!("webhook `{}`, endpoint {}", webhook.name, url::shown(webhook.endpoint.expose()));
    let is_https = Url::parse(webhook.endpoint.expose()).is_ok_and(|url| url.is_https());
    match webhook::reach(webhook) {
        Ok(()) if is_https => report.say(Level::Ok, &subject, "connects, and its certificate is trusted"),
        Ok(()) => report.say(Level::Ok, &subject, "connects"),
        Err(error) => report.say(Level::Error, &subject, &format!("cannot be reached: {error}")),
    }
}
