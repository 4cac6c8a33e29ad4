//! A client of a few lines for the servers of tests: sees chunks as they come, and bodies that are cut.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// Longest wait of a test for anything.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    /// Whether the body ended as its head said.
    pub(crate) whole: bool,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// A request whose answer may still be coming.
pub(crate) struct Open {
    reader: BufReader<TcpStream>,
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    body: Vec<u8>,
    pub(crate) ended: bool,
}

impl Open {
    pub(crate) fn send(
        base: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Option<Open> {
        let mut stream = TcpStream::connect(base.strip_prefix("http://").unwrap()).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).ok()?;
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        reader.read_line(&mut first).ok()?;
        let status = first.split(' ').nth(1)?.parse().unwrap();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_owned(), value.to_owned());
        }
        Some(Open { reader, status, headers, body: Vec::new(), ended: false })
    }

    /// Reads one chunk more; false at the end, whole or not.
    pub(crate) fn chunk(&mut self) -> bool {
        let mut size = String::new();
        if self.reader.read_line(&mut size).unwrap_or(0) == 0 {
            return false;
        }
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        if self.reader.read_exact(&mut chunk).is_err() {
            return false;
        }
        self.body.extend(&chunk[..size]);
        self.ended = size == 0;
        !self.ended
    }

    /// Reads until the body holds `text`.
    #[track_caller]
    pub(crate) fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.body).contains(text) {
            assert!(self.chunk(), "expected `{text}`, got `{}`", String::from_utf8_lossy(&self.body));
        }
    }

    pub(crate) fn rest(mut self) -> Reply {
        if let Some(length) = self.headers.get("Content-Length") {
            let mut body = vec![0; length.parse().unwrap()];
            self.ended = self.reader.read_exact(&mut body).is_ok();
            self.body = body;
        } else {
            while self.chunk() {}
        }
        let body = String::from_utf8(self.body).unwrap();
        Reply { status: self.status, headers: self.headers, body, whole: self.ended }
    }
}

pub(crate) fn ask(base: &str, method: &str, path: &str, body: &str) -> Reply {
    Open::send(base, method, path, &[("Accept", "application/json")], body).expect("an answer").rest()
}

pub(crate) fn get(base: &str, path: &str) -> Reply {
    ask(base, "GET", path, "")
}

/// Ids and seqs of a page's rows, and its `last_seq` as `since` takes it.
pub(crate) fn page(base: &str, path: &str) -> (Vec<(String, String, String)>, String) {
    let reply = get(base, path);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let json = reply.json();
    let rows = json["results"].as_array().unwrap().iter().map(|row| {
        let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
        (text(&row["id"]), text(&row["changes"][0]["rev"]), text(&row["seq"]))
    });
    let last_seq = &json["last_seq"];
    (rows.collect(), last_seq.as_str().map_or(last_seq.to_string(), str::to_owned))
}
