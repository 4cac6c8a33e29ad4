//! A document as CouchDB sent it, byte for byte, with the members that decide what is told about it.
//!
//! Guarantees that the text is JSON, and that a look at it costs one pass: a row is most of what a feed costs us.
//! What the members mean is left to `message`.

use std::fmt;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// A JSON text, checked.
#[derive(Debug, Clone)]
pub struct Document {
    text: Box<str>,
    head: Option<Box<Head>>,
}

/// The members of a document that decide what an event is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Head {
    /// `_rev`.
    #[serde(rename = "_rev")]
    pub rev: Option<String>,
    /// `_deleted`.
    #[serde(rename = "_deleted", default)]
    pub deleted: bool,
    /// `_conflicts`, in the order given.
    #[serde(rename = "_conflicts", default)]
    pub conflicts: Vec<String>,
}

impl Document {
    /// Takes a text that is JSON, of any type.
    ///
    /// # Errors
    /// Where it is none.
    pub fn parse(text: String) -> Result<Document, serde_json::Error> {
        let head = match serde_json::from_str::<Head>(&text) {
            Ok(head) => Some(Box::new(head)),
            // JSON, but no object, or one whose `_rev` is no text; or no JSON.
            Err(_) => serde_json::from_str::<IgnoredAny>(&text).map(|_| None)?,
        };
        Ok(Document { text: text.into_boxed_str(), head })
    }

    /// Takes an object that stands whole at the beginning of `bytes`, with its length; `None` for anything else, which
    /// may be an object that goes on behind them. Where it ends need not be looked for first.
    pub fn parse_start(bytes: &[u8]) -> Option<(Document, usize)> {
        if bytes.first() != Some(&b'{') {
            return None;
        }
        let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Head>();
        let head = values.next()?.ok()?;
        let n_bytes = values.byte_offset();
        let text = std::str::from_utf8(&bytes[..n_bytes]).ok()?;
        Some((Document { text: text.into(), head: Some(Box::new(head)) }, n_bytes))
    }

    /// The text.
    pub fn get(&self) -> &str {
        &self.text
    }

    /// Its members; `None` when it is no document.
    pub fn take_head(&mut self) -> Option<Head> {
        self.head.take().map(|head| *head)
    }
}

/// The members of a JSON object in their order, values byte for byte; none of what is no object.
pub fn members(doc: &str) -> Vec<(String, Box<RawValue>)> {
    struct Members(Vec<(String, Box<RawValue>)>);
    impl<'de> Deserialize<'de> for Members {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Members;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a JSON object")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                    let mut all = Vec::new();
                    while let Some(member) = map.next_entry()? {
                        all.push(member);
                    }
                    Ok(Members(all))
                }
            }
            deserializer.deserialize_map(Visitor)
        }
    }
    serde_json::from_str::<Members>(doc).map(|members| members.0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_json_is_taken_and_only_documents_have_members() {
        let check = |text: &str, expected: Option<Head>| {
            let mut document = Document::parse(text.to_owned()).unwrap();
            assert_eq!(document.get(), text);
            assert_eq!(document.take_head(), expected, "{text}");
        };
        let rev = Some("2-x".to_owned());
        check(r#"{"_id":"a","_rev":"2-x","n":1.0}"#, Some(Head { rev: rev.clone(), ..Head::default() }));
        check(
            r#"{"x":{"_rev":"no"},"_deleted":true,"_rev":"2-x","_conflicts":["1-b","1-a"]}"#,
            Some(Head { rev, deleted: true, conflicts: vec!["1-b".to_owned(), "1-a".to_owned()] }),
        );
        check("{}", Some(Head::default()));
        for text in [r#"{"_rev":7}"#, r#"{"_rev":"1-a","_rev":"1-b"}"#, r#""text""#, "[1,{}]", "12", "null"] {
            check(text, None);
        }
    }

    #[test]
    fn an_object_is_taken_from_the_beginning_and_nothing_that_may_go_on() {
        let check = |text: &[u8], expected: Option<&str>| {
            let whole = Document::parse_start(text);
            let found = whole.as_ref().map(|(document, n_bytes)| (document.get(), *n_bytes));
            assert_eq!(found, expected.map(|text| (text, text.len())), "{}", text.escape_ascii());
        };
        check(b"{}", Some("{}"));
        check(b"{\"a\":\"}\"},\n{", Some("{\"a\":\"}\"}"));
        check("{\"a\": [1.0,{\"ü\":-0.0}] }}]".as_bytes(), Some("{\"a\": [1.0,{\"ü\":-0.0}] }"));
        for text in ["", "{", "{\"a\":1", "{\"a\":tru}", "{\"_rev\":7}", " {}", "null", "12", "\"x\"", "[]"] {
            check(text.as_bytes(), None);
        }
        check(b"{\"x\":\"\xff\"}", None);
    }

    #[test]
    fn what_is_no_json_is_an_error() {
        for text in ["", "{", "{\"a\":tru}", "{\"_rev\":7", "{\"a\":1}x", "{\"a\":\"\u{1}\"}", "[1,]"] {
            assert!(Document::parse(text.to_owned()).is_err(), "{text}");
        }
    }
}
