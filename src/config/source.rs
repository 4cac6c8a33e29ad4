//! Where sections come from: ini files, `--set`, the environment, CouchDB.
//!
//! Merges them in the order flag, environment, file, and reads the files named by `KEY_file`. What cannot be
//! read is a finding, never an end; what keys and values mean is left to `config::parse`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::config::finding::{Finding, Origin, Raw, Value};
use crate::config::keys::{self, Kind, Section};
use crate::config::{is_ours, looks_ours, reader, values, webhook};
use crate::pure::ini::{self, Dialect};
use crate::pure::secret::Secret;
use crate::pure::url::Url;

/// Where `run` looks without `--config`.
pub const DEFAULT_PATH: &str = "/etc/couch-hookd/hookd.ini";

/// Where files that CouchDB's configuration names may lie, beside $CREDENTIALS_DIRECTORY.
const OWN_DIRECTORY: &str = "/etc/couch-hookd";

/// No ini file is longer; a larger one was named by mistake.
const INI_BYTES_MAX: u64 = 4 << 20;

/// No value is longer. A selector with thousands of ids fits.
const VALUE_BYTES_MAX: u64 = 1 << 20;

/// What lies over files and CouchDB's own configuration.
#[derive(Clone, Default)]
pub struct Overrides {
    /// Texts of `--set SECTION.KEY=VALUE`; the last one for a key counts.
    pub set: Vec<String>,
    /// The environment, as far as it is UTF-8. `COUCH_HOOKD_KEY` is `[hookd] KEY`; `COUCHDB_URL`, `COUCHDB_USER`
    /// and `COUCHDB_PASSWORD` count when nothing else is given; `CREDENTIALS_DIRECTORY` is systemd's.
    pub environment: BTreeMap<String, String>,
}

impl std::fmt::Debug for Overrides {
    /// Names only: both hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overrides").field("n_set", &self.set.len()).finish_non_exhaustive()
    }
}

impl Overrides {
    /// With the environment of this process.
    pub fn of_process(set: Vec<String>) -> Overrides {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Overrides { set, environment: std::env::vars_os().filter_map(text).collect() }
    }

    fn is_empty(&self) -> bool {
        let ours = |name: &String| name.starts_with("COUCH_HOOKD_") || name == "COUCHDB_URL";
        self.set.is_empty() && !self.environment.keys().any(ours)
    }
}

/// Everything a configuration is made of.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Ini files, and directories whose `*.ini` are read sorted; later ones count. Empty: [`DEFAULT_PATH`], which
    /// may be missing when something is given otherwise.
    pub config: Vec<PathBuf>,
    /// What lies over them.
    pub overrides: Overrides,
}

/// Reads files and what lies over them. CouchDB's own `local.ini` will do: of its sections only those are kept
/// that say where it listens.
pub fn load(sources: &Sources) -> Raw {
    load_or(sources, Path::new(DEFAULT_PATH))
}

/// Takes sections as CouchDB gives them: `_config` over HTTP, or the answers of an os_daemons host.
///
/// Shape: `{"hookd":{"username":"hookd"},"hookd.webhooks":{"orders":"https://…"}}`, of which `serde_json` makes
/// this type.
pub fn from_sections(
    sections: &BTreeMap<String, BTreeMap<String, String>>,
    origin: &Origin,
    overrides: &Overrides,
) -> Raw {
    let mut raw = Raw::default();
    let mut layer = Layer::default();
    for (section, keys) in sections.iter().filter(|(section, _)| is_kept(section)) {
        for (key, value) in keys {
            if is_ours(section) && (value.contains(" ;") || value.contains("\t;")) {
                let place = format!("{origin}: [{}] {}", values::shown(section), values::shown(key));
                let message = "a blank and `;` in it begin a comment as soon as CouchDB restarts and reads its files; \
                    inside JSON write \\u003b for `;`";
                raw.findings.push(Finding::warning(webhook_of(section), place, message));
            }
            // Before 3.3 CouchDB leaves blanks in front of a comment, and some around `=`.
            layer.put(section, key.trim(), value, origin.clone());
        }
    }
    layer.lay_over(&mut raw);
    finish(&mut raw, overrides);
    raw
}

/// As [`load`], with another default path.
pub(crate) fn load_or(sources: &Sources, default: &Path) -> Raw {
    let mut raw = Raw::default();
    let default = [default.to_path_buf()];
    let config: &[PathBuf] = match &sources.config[..] {
        [] if !sources.overrides.is_empty() && !default[0].exists() => &[],
        [] if !default[0].exists() => {
            let message =
                "there is no such file: expected it, or `--config`, `--set`, or COUCH_HOOKD_ variables";
            raw.findings.push(Finding::error(None, default[0].display().to_string(), message));
            &[]
        }
        [] => &default,
        given => given,
    };
    for path in config {
        if path.is_dir() {
            for path in ini_files_in(path, &mut raw.findings) {
                read_ini(&path, &mut raw);
            }
        } else {
            read_ini(path, &mut raw);
        }
    }
    finish(&mut raw, &sources.overrides);
    raw
}

/// What lies over files, then the files that values stand in.
fn finish(raw: &mut Raw, overrides: &Overrides) {
    environment(&overrides.environment, &mut raw.findings).lay_over(raw);
    arguments(&overrides.set, &mut raw.findings).lay_over(raw);
    fallbacks(&overrides.environment, raw).lay_over(raw);
    resolve_files(raw, overrides.environment.get("CREDENTIALS_DIRECTORY").map(Path::new));
}

fn ini_files_in(directory: &Path, findings: &mut Vec<Finding>) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    match fs::read_dir(directory) {
        Ok(entries) => {
            let inis = entries.flatten().map(|entry| entry.path());
            paths.extend(
                inis.filter(|path| path.extension().is_some_and(|ext| ext == "ini") && !path.is_dir()),
            );
        }
        Err(error) => {
            findings.push(Finding::error(
                None,
                directory.display().to_string(),
                format!("failed to list: {error}"),
            ));
            return paths;
        }
    }
    paths.sort();
    if paths.is_empty() {
        let message = "expected files *.ini in this directory, got none";
        findings.push(Finding::error(None, directory.display().to_string(), message));
    }
    paths
}

fn read_ini(path: &Path, raw: &mut Raw) {
    let text = match read_bounded(path, INI_BYTES_MAX) {
        Ok((text, _)) => text,
        Err(why) => return raw.findings.push(Finding::error(None, "configuration", why)),
    };
    let (entries, found) = ini::parse(&text, Dialect::Since3_3);
    for finding in found {
        let ours = |section: &str| is_ours(section) || looks_ours(section);
        let place = format!("{}:{}: [{}]", path.display(), finding.line, values::shown(&finding.section));
        if let Some(meant) = &finding.header {
            // Keys below it would count for the section above: neither of the two can be trusted.
            if ours(meant) || is_ours(&finding.section) {
                raw.findings.push(Finding::error(None, place, finding.message));
            }
        } else if is_ours(&finding.section) {
            let listed =
                (finding.section == "hookd.webhooks").then(|| first_word(&text, finding.line)).flatten();
            let webhook = webhook_of(&finding.section).map(str::to_owned).or(listed);
            raw.findings.push(Finding::error(webhook.as_deref(), place, finding.message));
        }
    }
    for finding in ini::differences(&text, is_ours) {
        let place = format!("{}:{}: [{}]", path.display(), finding.line, values::shown(&finding.section));
        raw.findings.push(Finding::warning(webhook_of(&finding.section), place, finding.message));
    }
    let mut layer = Layer::default();
    for ini::Entry { section, key, value, line } in entries {
        if is_kept(&section) {
            layer.put(&section, &key, &value, Origin::File { path: path.to_owned(), line });
        }
    }
    layer.lay_over(raw);
}

/// The webhook that a line of `[hookd.webhooks]` without `=` is probably about.
fn first_word(text: &[u8], line: usize) -> Option<String> {
    let line = text.split(|byte| *byte == b'\n').nth(line - 1)?;
    let word = std::str::from_utf8(line).ok()?.split_whitespace().next()?;
    webhook::is_name(word).then(|| word.to_owned())
}

/// Sections worth keeping: ours, those that were probably meant to be, and those that say where CouchDB listens.
fn is_kept(section: &str) -> bool {
    is_ours(section) || looks_ours(section) || section == "chttpd" || section == "httpd"
}

/// The webhook whose own section this is.
fn webhook_of(section: &str) -> Option<&str> {
    section.strip_prefix("hookd.webhook.").filter(|name| webhook::is_name(name))
}

/// Values of one source; a later layer replaces them.
#[derive(Default)]
struct Layer {
    sections: BTreeMap<String, BTreeMap<String, Value>>,
}

impl Layer {
    /// An empty value is no value.
    fn put(&mut self, section: &str, key: &str, value: &str, origin: Origin) {
        let text = value.trim();
        if !text.is_empty() && !key.is_empty() {
            let value = Value { text: Secret::new(text), origin };
            self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), value);
        }
    }

    /// A `KEY` takes the place of an earlier `KEY_file` and the other way round; both in one source contradict
    /// each other.
    fn lay_over(self, raw: &mut Raw) {
        for (section, values) in self.sections {
            for (key, value) in &values {
                let Some(bare) = file_key(&section, key, value) else { continue };
                if values.contains_key(bare) {
                    let place = reader::place(Some(value), &values::shown(&section), key);
                    let message =
                        format!("expected either `{}` or `{0}_file`, got both", values::shown(bare));
                    raw.findings.push(Finding::error(webhook_at(&section, bare), place, message));
                }
            }
            let under = raw.sections.entry(section.clone()).or_default();
            for (key, value) in values {
                if let Some(bare) = file_key(&section, &key, &value) {
                    under.remove(bare);
                }
                let file = format!("{key}_file");
                if under.get(&file).is_some_and(|value| file_key(&section, &file, value).is_some()) {
                    under.remove(&file);
                }
                under.insert(key, value);
            }
        }
    }
}

/// The key whose value stands in a file, when `key` is a `KEY_file`.
fn file_key<'a>(section: &str, key: &'a str, value: &Value) -> Option<&'a str> {
    let bare = key.strip_suffix("_file")?;
    let takes_file = |section: Section| {
        let exact = keys::find(section, key).is_some_and(|key| key.name != "header.*");
        !exact && keys::find(section, bare).is_some_and(keys::Key::takes_file)
    };
    let is_one = match section {
        "hookd" => takes_file(Section::Hookd),
        // `log_file = https://…` lists a webhook of that name.
        "hookd.webhooks" => !value.text.expose().contains("://"),
        _ => section.starts_with("hookd.webhook.") && takes_file(Section::Webhook),
    };
    is_one.then_some(bare)
}

/// The webhook that an error at a key holds back.
fn webhook_at<'a>(section: &'a str, key: &'a str) -> Option<&'a str> {
    if section == "hookd.webhooks" {
        Some(key).filter(|key| webhook::is_name(key))
    } else {
        webhook_of(section)
    }
}

/// `COUCH_HOOKD_KEY`. An unknown one is only a warning: Kubernetes makes such names of its own for a service
/// that is called like us.
fn environment(environment: &BTreeMap<String, String>, findings: &mut Vec<Finding>) -> Layer {
    let mut layer = Layer::default();
    for (variable, value) in environment {
        let Some(key) = variable.strip_prefix("COUCH_HOOKD_").map(str::to_ascii_lowercase) else { continue };
        let bare = key.strip_suffix("_file").unwrap_or(&key);
        if keys::find(Section::Hookd, &key).is_some() || keys::find(Section::Hookd, bare).is_some() {
            layer.put("hookd", &key, value, Origin::Environment(variable.clone()));
        } else {
            let nearest = keys::nearest(Section::Hookd, &key).map(|key| key.to_ascii_uppercase());
            let nearest =
                nearest.map(|key| format!("; the nearest one is `COUCH_HOOKD_{key}`")).unwrap_or_default();
            let place = Origin::Environment(variable.clone()).to_string();
            findings.push(Finding::warning(
                None,
                place,
                format!("is no key of [hookd] and not used{nearest}"),
            ));
        }
    }
    layer
}

/// `--set SECTION.KEY=VALUE`. Names of webhooks have no dots, so the section is unambiguous.
fn arguments(set: &[String], findings: &mut Vec<Finding>) -> Layer {
    let mut layer = Layer::default();
    for argument in set {
        let expected = "expected `SECTION.KEY=VALUE` such as `hookd.webhook.orders.timeout=5s`";
        let Some((target, value)) = argument.split_once('=') else {
            findings.push(Finding::error(None, "--set", format!("{expected}, got a text without `=`")));
            continue;
        };
        let split = match target.trim().strip_prefix("hookd.webhook.") {
            Some(rest) => {
                let split = rest.split_once('.');
                split.map(|(name, key)| (format!("hookd.webhook.{name}"), key))
            }
            None => target.trim().rsplit_once('.').map(|(section, key)| (section.to_owned(), key)),
        };
        match split {
            Some((section, key)) if !is_kept(&section) => {
                let section = values::shown(&section);
                let key = values::shown(key);
                let message = "expected section `hookd`, `hookd.webhooks` or `hookd.webhook.NAME`";
                findings.push(Finding::error(None, format!("--set: [{section}] {key}"), message));
            }
            Some((_, "")) | None => {
                let found = values::shown(target);
                findings.push(Finding::error(
                    None,
                    "--set",
                    format!("{expected}, got `{found}` in front of `=`"),
                ));
            }
            Some((section, key)) if value.trim().is_empty() => {
                let place = format!("--set: [{}] {}", values::shown(&section), values::shown(key));
                findings.push(Finding::error(webhook_at(&section, key), place, "expected a value, got none"));
            }
            Some((section, key)) => layer.put(&section, key, value, Origin::Argument),
        }
    }
    layer
}

/// `COUCHDB_URL`, `COUCHDB_USER` and `COUCHDB_PASSWORD`, when nothing else is given.
fn fallbacks(environment: &BTreeMap<String, String>, raw: &Raw) -> Layer {
    let mut layer = Layer::default();
    let given = |key: &str| raw.value("hookd", key).or_else(|| raw.value("hookd", &format!("{key}_file")));
    let mut take = |key: &str, variable: &str| {
        if let Some(value) = environment.get(variable) {
            layer.put("hookd", key, value, Origin::Environment(variable.to_owned()));
        }
    };
    if given("couchdb_url").is_none() {
        take("couchdb_url", "COUCHDB_URL");
    }
    let url = given("couchdb_url")
        .map(|value| value.text.expose())
        .or(environment.get("COUCHDB_URL").map(|url| &**url));
    let url_has_login = url.is_some_and(|url| Url::parse(url.trim()).is_ok_and(|url| url.has_userinfo()));
    if given("username").is_none() && given("password").is_none() && !url_has_login {
        take("username", "COUCHDB_USER");
        take("password", "COUCHDB_PASSWORD");
    }
    layer
}

/// Puts the contents of files in the place of their names, and makes paths whole.
fn resolve_files(raw: &mut Raw, credentials: Option<&Path>) {
    for (section, values) in raw.sections.iter_mut().filter(|(section, _)| is_ours(section)) {
        let mut resolved = BTreeMap::new();
        for (key, value) in std::mem::take(values) {
            let bare = file_key(section, &key, &value).map(str::to_owned);
            let kind = match section.as_str() {
                "hookd" => keys::find(Section::Hookd, &key),
                _ => keys::find(Section::Webhook, &key),
            };
            let is_path = bare.is_none() && kind.is_some_and(|key| key.kind == Kind::Path);
            if bare.is_none() && !is_path {
                resolved.insert(key, value);
                continue;
            }
            let place = reader::place(Some(&value), &values::shown(section), &key);
            let name = bare.unwrap_or(key);
            let webhook = webhook_at(section, &name);
            match whole_path(&value, credentials) {
                Err(why) => raw.findings.push(Finding::error(webhook, place, why)),
                Ok(path) if is_path => match read_bounded(&path, INI_BYTES_MAX) {
                    Ok(_) => {
                        let text = Secret::new(path.to_string_lossy());
                        resolved.insert(name, Value { text, origin: value.origin });
                    }
                    Err(why) => raw.findings.push(Finding::error(webhook, place, why)),
                },
                Ok(path) => match contents(&path) {
                    Ok((text, mode)) => {
                        if mode & 0o004 != 0 && is_secret(section, &name) {
                            let message = format!(
                                "others may read `{}` (mode {:03o}); `chmod o= {0}`",
                                path.display(),
                                mode & 0o777
                            );
                            raw.findings.push(Finding::warning(webhook, place, message));
                        }
                        resolved.insert(name, Value { text, origin: value.origin });
                    }
                    Err(why) => raw.findings.push(Finding::error(webhook, place, why)),
                },
            }
        }
        *values = resolved;
    }
}

fn is_secret(section: &str, key: &str) -> bool {
    let key = match section {
        "hookd.webhooks" => return true,
        "hookd" => keys::find(Section::Hookd, key),
        _ => keys::find(Section::Webhook, key),
    };
    key.is_some_and(keys::Key::is_secret)
}

fn whole_path(value: &Value, credentials: Option<&Path>) -> Result<PathBuf, String> {
    let path = Path::new(value.text.expose().trim());
    if value.origin == Origin::CouchConfig {
        return path_of_couchdb(path, credentials);
    }
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    let in_credentials = credentials.map(|directory| directory.join(path)).filter(|path| path.exists());
    match (in_credentials, &value.origin) {
        (Some(path), _) => Ok(path),
        (None, Origin::File { path: ini, .. }) => Ok(ini.parent().unwrap_or(Path::new("")).join(path)),
        (None, _) => {
            let path = values::shown(&path.to_string_lossy());
            Err(format!("expected an absolute path, or one in $CREDENTIALS_DIRECTORY, got `{path}`"))
        }
    }
}

/// A path that stands in `_config`. Whoever may write there must not read our files through us.
fn path_of_couchdb(path: &Path, credentials: Option<&Path>) -> Result<PathBuf, String> {
    let allowed = [credentials, Some(Path::new(OWN_DIRECTORY))];
    // Neither `..` nor a link leads out. A relative path is one in the first of them.
    let whole = credentials.unwrap_or(Path::new(OWN_DIRECTORY)).join(path).canonicalize().ok();
    let within = |directory: &Path| {
        directory
            .canonicalize()
            .is_ok_and(|directory| whole.as_ref().is_some_and(|whole| whole.starts_with(directory)))
    };
    match whole.as_ref().filter(|_| allowed.into_iter().flatten().any(within)) {
        Some(whole) => Ok(whole.clone()),
        None => Err(format!(
            "expected a file below $CREDENTIALS_DIRECTORY or `{OWN_DIRECTORY}`, which is all that CouchDB's \
             configuration may name with --from-couchdb, got `{}`",
            values::shown(&path.to_string_lossy())
        )),
    }
}

/// A value's text without the newline at its end, and the file's mode.
fn contents(path: &Path) -> Result<(Secret, u32), String> {
    let (bytes, mode) = read_bounded(path, VALUE_BYTES_MAX)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| format!("expected UTF-8 in `{}`, got other bytes", path.display()))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(format!("expected a value in `{}`, got an empty file", path.display()));
    }
    Ok((Secret::new(text), mode))
}

fn read_bounded(path: &Path, bytes_max: u64) -> Result<(Vec<u8>, u32), String> {
    let failed = |error: std::io::Error| format!("failed to read `{}`: {error}", path.display());
    // Asked before opening: opening a pipe would wait for its other end.
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(format!("expected a file at `{}`, got something else", path.display()));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        return Err(format!(
            "expected at most {} in `{}`, got more",
            keys::short_size(bytes_max),
            path.display()
        ));
    }
    Ok((bytes, metadata.permissions().mode()))
}
