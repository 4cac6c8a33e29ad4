//! Saying what is wrong once, and again every five minutes, instead of at every try.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::{Error, Kind};
use crate::sys;

/// The same fault is said again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(300);

/// One subject's faults.
#[derive(Debug, Default)]
pub struct Complaint {
    said: Option<(Kind, Instant)>,
}

impl Complaint {
    /// Whether this fault is to be said now.
    pub fn is_news(&mut self, kind: Kind, now: Instant) -> bool {
        let news = self.said.is_none_or(|(said, at)| said != kind || now >= at + AGAIN_AFTER);
        if news {
            self.said = Some((kind, now));
        }
        news
    }

    /// Whether something was said that is over now.
    pub fn over(&mut self) -> bool {
        self.said.take().is_some()
    }
}

/// A CouchDB that does not answer concerns every webhook, and is said once for all.
#[derive(Debug)]
pub struct Outage {
    url: String,
    complaint: Mutex<Complaint>,
}

impl Outage {
    /// `url` without userinfo, for the log.
    pub fn new(url: impl Into<String>) -> Outage {
        Outage { url: url.into(), complaint: Mutex::default() }
    }

    /// Whether this error is about the server as a whole.
    pub fn concerns(error: &Error) -> bool {
        matches!(error.kind(), Kind::Unreachable | Kind::Unauthorized | Kind::Locked)
    }

    /// Says that the server does not answer, or does not let us in, unless that was said.
    pub fn say(&self, error: &Error) {
        // A refused login, and our own gate that it shut, are one fault, in whatever order threads meet them.
        let kind = if error.kind() == Kind::Unauthorized { Kind::Locked } else { error.kind() };
        if !self.complaint.lock().expect("no thread panics with this lock").is_news(kind, sys::now()) {
            return;
        }
        match error.kind() {
            Kind::Unreachable => log::warn!("waiting for CouchDB at {} ({})", self.url, error.cause()),
            _ => log::error!("CouchDB at {} does not let us in: {}", self.url, error.cause()),
        }
    }

    /// Says that it answers again, if it was said not to.
    pub fn over(&self) {
        if self.complaint.lock().expect("no thread panics with this lock").over() {
            log::info!("CouchDB at {} answers", self.url);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_fault_is_news_once_in_five_minutes() {
        let now = sys::now();
        let mut complaint = Complaint::default();
        assert!(!complaint.over());
        assert!(complaint.is_news(Kind::Timeout, now));
        assert!(!complaint.is_news(Kind::Timeout, now + Duration::from_secs(299)));
        assert!(complaint.is_news(Kind::Server, now + Duration::from_secs(299)));
        assert!(complaint.is_news(Kind::Server, now + Duration::from_secs(599)));
        assert!(complaint.over());
        assert!(complaint.is_news(Kind::Server, now + Duration::from_secs(600)));
    }
}
