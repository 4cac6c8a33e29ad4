//! Keeps the rules of STYLE that neither rustc nor clippy knows.

use std::path::{Path, PathBuf};

/// Who may import what from this crate: the first match counts; `*` = anything.
const IMPORTS: &[(&str, &[&str])] = &[
    ("src/main.rs", &["*"]),
    ("src/cli", &["*"]),
    ("src/daemon", &["*"]),
    ("src/demo", &["*"]),
    ("src/pure/", &["pure", "error"]),
    ("src/error.rs", &["pure", "error"]),
    ("src/config/source.rs", &["pure", "error", "config", "sys", "log", "couch", "host"]),
    ("src/config/", &["pure", "error", "config"]),
    ("src/sys.rs", &["pure", "error", "config"]),
    ("src/log.rs", &["pure", "error", "config", "sys"]),
    ("src/tls.rs", &["pure", "error", "config", "sys", "log"]),
    ("src/names.rs", &["pure", "sys", "socket"]),
    ("src/socket.rs", &["sys"]),
    ("src/couch/", &["pure", "error", "config", "sys", "log", "names", "tls", "couch"]),
    ("src/host/", &["pure", "error", "config", "sys", "log", "host"]),
    ("src/standin/", &["pure", "error", "sys", "log", "standin"]),
    (
        "src/pipeline/",
        &[
            "pure",
            "error",
            "config",
            "sys",
            "log",
            "names",
            "socket",
            "tls",
            "couch",
            "host",
            "replication",
            "pipeline",
        ],
    ),
    ("src/replication/", &["pure", "error", "config", "sys", "log", "couch", "replication"]),
    ("src/status/", &["pure::snapshot", "log", "sys", "error", "status"]),
    ("src/lib.rs", &[]),
];

/// Files that are tests as a whole, of modules behind `#[cfg(test)]`.
const TESTS: &[&str] = &[
    "src/daemon/leases/tests.rs",
    "src/pure/simulation.rs",
    "src/pure/database_events/tests.rs",
    "src/pure/dispatch/tests.rs",
    "src/pure/endpoint/tests.rs",
    "src/pure/flow/tests.rs",
    "src/pure/lease/tests.rs",
    "src/pure/rep_doc/tests.rs",
    "src/pure/rep_error/tests.rs",
    "src/pure/transitions/tests.rs",
];

/// Who makes HTTP requests, and what that needs.
const UREQ: &[&str] = &[
    "src/couch/client.rs",
    "src/names.rs",
    "src/pipeline/agents.rs",
    "src/pipeline/webhook",
    "src/socket.rs",
    "src/tls.rs",
];

/// Texts that may stand only in the named files, beside tests.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("ureq::", UREQ),
    ("use ureq", UREQ),
    ("stdin()", &["src/host/", "src/cli", "src/main.rs", "src/demo"]),
    ("stdout()", &["src/host/", "src/cli", "src/main.rs", "src/demo"]),
    ("println!(", &["src/cli", "src/demo"]),
    (" print!(", &["src/cli", "src/demo"]),
    ("dbg!(", &[]),
    ("process::exit(", &["src/main.rs", "src/host/ending.rs"]),
];

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in rust_files(&["src", "tests", "benches", "examples"]) {
        assert!(text.starts_with("//! "), "{path}: expected to open with `//! `");
    }
}

#[test]
fn every_import_is_in_the_table() {
    let mut faults = Vec::new();
    for (path, text) in code_files() {
        let Some((_, allowed)) = IMPORTS.iter().find(|(prefix, _)| path.starts_with(prefix)) else {
            faults.push(format!("{path}: expected a line for it in IMPORTS of tests/it/tidy.rs"));
            continue;
        };
        let code = without_tests(&text);
        for module in imports(code) {
            let fits = |allowed: &&str| {
                *allowed == "*" || module == *allowed || module.starts_with(&format!("{allowed}::"))
            };
            if !allowed.iter().any(fits) {
                faults.push(format!("{path}: may import {allowed:?}, got `crate::{module}`"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn ureq_and_the_standard_streams_stay_where_they_belong() {
    let mut faults = Vec::new();
    for (path, text) in code_files() {
        for (number, line) in without_tests(&text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for (needle, allowed) in ONLY_IN {
                if code.contains(needle) && !allowed.iter().any(|prefix| path.starts_with(prefix)) {
                    faults.push(format!("{path}:{}: `{needle}` belongs into {allowed:?}", number + 1));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn imports_are_found_however_they_are_written() {
    let check = |code: &str, expected: &[&str]| assert_eq!(imports(code), expected, "{code}");
    check("use crate::error::Result;", &["error::Result"]);
    check("use crate::{error::Kind, pure::seq::Seq};", &["error::Kind", "pure::seq::Seq"]);
    check(
        "use crate::{\n    pure::{seq, changes::{Row, Item}},\n    sys,\n};",
        &["pure::seq", "pure::changes::Row", "pure::changes::Item", "sys"],
    );
    check("pub(crate) use crate::log;\nfn f() { crate::sys::now() }", &["log", "sys::now"]);
    check("// use crate::nothing\n/// [`crate::log::Sink`]\n", &[]);
}

/// Paths behind every `crate::`, groups spread out; comments left out.
fn imports(code: &str) -> Vec<String> {
    let code: String =
        code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for part in code.split("crate::").skip(1) {
        spread("", part, &mut found);
    }
    found
}

/// Reads one path or `{…}` group from the start of `text`; gives what follows it.
fn spread<'a>(prefix: &str, text: &'a str, found: &mut Vec<String>) -> &'a str {
    let word_end =
        text.find(|char: char| !(char.is_alphanumeric() || char == '_' || char == ':')).unwrap_or(text.len());
    let (word, rest) = text.split_at(word_end);
    let path = format!("{prefix}{word}");
    let Some(mut rest) = rest.strip_prefix('{') else {
        if !path.is_empty() {
            found.push(path.trim_end_matches("::").to_owned());
        }
        return rest;
    };
    loop {
        rest = rest.trim_start_matches([',', ' ', '\n']);
        if let Some(rest) = rest.strip_prefix('}') {
            return rest;
        }
        let before = rest.len();
        rest = spread(&path, rest, found);
        if rest.len() == before {
            return rest;
        }
    }
}

/// Files of the program itself.
fn code_files() -> impl Iterator<Item = (String, String)> {
    rust_files(&["src"]).into_iter().filter(|(path, _)| !TESTS.contains(&path.as_str()))
}

/// What stands before the file's own tests.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or_default()
}

/// All Rust files below the folders, with paths from the root of the repository, sorted.
fn rust_files(folders: &[&str]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut files = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let skip = path.ends_with("node_modules") || path.ends_with(".venv");
            let entries = if skip { None } else { std::fs::read_dir(&path).ok() };
            waiting.extend(entries.into_iter().flatten().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            files.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
    files.sort();
    files
}
