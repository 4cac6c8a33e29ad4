//! Where log lines go and how they look: CouchDB's log through the host, stderr, or a file in its place.
//!
//! Guarantees that one record is one line whatever its text holds, that nothing is ever written to stdout from
//! here, that a panic anywhere is logged as an error, and that other crates are heard from warning up only
//! (`ureq` tells each step of each request at debug, and endpoint paths at trace). The limits of hosted logging are `host::stdio`'s.
//! Text lines are `simplelog`'s; JSON lines and the journal's priorities, which it does not know, are ours.

use std::fs::File;
use std::io::{LineWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError, bounded};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::config::LogFormat;
use crate::error::{Error, Kind, Result};
use crate::pure::log_limit::Line;
use crate::pure::os_daemon::{MESSAGE_BYTES_MAX, one_line};
use crate::sys;

/// Where lines go.
#[derive(Debug)]
pub enum Sink {
    /// To CouchDB, over the thread that owns stdout. What finds no room in the channel goes to stderr when it is an
    /// error, and is counted otherwise.
    Host(Sender<HostLog>),
    /// To stderr, as text until [`set_format`] says otherwise, with `<N>` priorities and no time when it is the
    /// journal's; or to the file of [`set_file`], in the same formats.
    Stderr,
}

/// What the thread that owns stdout gets from us.
#[derive(Debug)]
pub enum HostLog {
    /// A line, to be limited and written.
    Line(Line),
    /// So many lines found no room in the channel.
    Lost(u64),
    /// Write everything that waits, then answer.
    Flush(Sender<()>),
}

/// How long [`flush`] waits for a host that does not read.
const FLUSH_MAX: Duration = Duration::from_millis(300);
/// Characters of a panic's text that are logged.
const PANIC_CHARS_MAX: usize = 1_000;

static JSON: AtomicBool = AtomicBool::new(false);
/// Whether lines go to stderr when nothing else is said, and so may go to a file instead.
static STDERR: AtomicBool = AtomicBool::new(false);
/// Whether a bar is drawn where the next line of stderr begins.
static BAR: AtomicBool = AtomicBool::new(false);
/// Back to the beginning of the line, and away with what stands there.
const CLEAR: &str = "\r\x1b[2K";
/// Length of a bar.
const BAR_CHARS: usize = 30;
static FILE: Mutex<Option<LogFile>> = Mutex::new(None);

/// What stands in the place of stderr.
struct LogFile {
    path: PathBuf,
    /// `None`: it could not be opened, and stderr has to do.
    file: Option<File>,
}

/// Installs the process's one logger and the panic hook.
///
/// # Errors
/// `Io` when a logger is installed already.
pub fn install(sink: Sink, level: LevelFilter) -> Result<()> {
    let logger = match sink {
        Sink::Host(to) => Logger { out: Out::Host { to, lost: Mutex::new(0) } },
        Sink::Stderr => {
            STDERR.store(true, Ordering::Relaxed);
            Logger::lines(FileOrStderr, FileOrStderr, is_journal())
        }
    };
    log::set_boxed_logger(Box::new(logger))
        .map_err(|_| Error::new(Kind::Io, "a logger is installed already"))?;
    set_level(level);
    std::panic::set_hook(Box::new(|panic| log::error!("{}", panic_text(panic))));
    Ok(())
}

/// Changes what is logged, at once. Trace is taken as debug.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level.min(LevelFilter::Debug));
}

/// Changes how lines on stderr and in files look, at once.
pub fn set_format(format: LogFormat) {
    JSON.store(format == LogFormat::Json, Ordering::Relaxed);
}

/// Sends lines to a file from now on instead of to stderr, or to stderr again; nothing happens when they go there
/// already, or to the host. Stderr is told where to look.
///
/// # Errors
/// `Io` when the file cannot be opened for appending; lines then go to stderr until [`reopen`] goes well.
pub fn set_file(path: Option<&Path>) -> Result<()> {
    let mut current = file();
    let is_same = current.as_ref().map(|file| &*file.path) == path;
    if is_same || !STDERR.load(Ordering::Relaxed) {
        return Ok(());
    }
    *current = None;
    let Some(path) = path else { return Ok(()) };
    let opened = open(path);
    if opened.is_ok() {
        let text =
            format!("couch-hookd: log lines go to `{}` from now on\n", one_line(&path.to_string_lossy()));
        // Whoever does not read this sees nothing else there either.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    let (file, outcome) = opened.map_or_else(|error| (None, Err(error)), |file| (Some(file), Ok(())));
    *current = Some(LogFile { path: path.to_owned(), file });
    outcome
}

/// Opens the log file anew, for whoever moved it away.
///
/// # Errors
/// As [`set_file`].
pub fn reopen() -> Result<()> {
    let mut current = file();
    let Some(LogFile { path, file }) = &mut *current else { return Ok(()) };
    *file = None;
    *file = Some(open(path)?);
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    let failed = |why: String| {
        let path = one_line(&path.to_string_lossy());
        Error::new(Kind::Io, format!("log file `{path}`: {why}; log lines go to stderr"))
    };
    // Asked first: opening a pipe would wait for its other end.
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            return Err(failed("expected a file, got something else".to_owned()));
        }
        _ => {}
    }
    // What is told there is not for everybody: names of databases and documents.
    let mut options = File::options();
    options.append(true).create(true).mode(0o640).open(path).map_err(|error| failed(error.to_string()))
}

fn file() -> MutexGuard<'static, Option<LogFile>> {
    FILE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line to the file when there is one that takes it, else to stderr.
#[derive(Clone)]
struct FileOrStderr;

impl Write for FileOrStderr {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if let Some(LogFile { file: Some(file), .. }) = &mut *file()
            && file.write_all(line).is_ok()
        {
            return Ok(line.len());
        }
        if BAR.swap(false, Ordering::Relaxed) {
            std::io::stderr().write_all(CLEAR.as_bytes())?;
        }
        std::io::stderr().write(line)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Draws how far something is, over the bar that was drawn before, where a person looks at stderr; whether one does.
/// `n_done == n` takes the bar away.
pub fn progress(what: &str, n_done: usize, n: usize) -> bool {
    let stderr = std::io::stderr();
    let is_seen = STDERR.load(Ordering::Relaxed)
        && !JSON.load(Ordering::Relaxed)
        && file().is_none()
        && std::io::IsTerminal::is_terminal(&stderr);
    if is_seen {
        let bar = if n_done < n { bar(what, n_done, n) } else { String::new() };
        BAR.store(n_done < n, Ordering::Relaxed);
        // A terminal that is gone sees nothing else either.
        let _ = stderr.lock().write_all(format!("{CLEAR}{bar}").as_bytes());
    }
    is_seen
}

fn bar(what: &str, n_done: usize, n: usize) -> String {
    let n_full = BAR_CHARS * n_done / n.max(1);
    let (full, empty) = ("#".repeat(n_full), ".".repeat(BAR_CHARS - n_full));
    format!("{} [{full}{empty}] {n_done} of {n}", one_line(what))
}

/// Writes out what waits; before the process ends. Takes 300 ms at most.
pub fn flush() {
    log::logger().flush();
}

struct Logger {
    out: Out,
}

enum Out {
    Host {
        to: Sender<HostLog>,
        lost: Mutex<u64>,
    },
    Lines {
        text: Box<dyn Log>,
        json: Mutex<Box<dyn Write + Send>>,
        /// For stderr, when it is the journal's.
        journal: Option<Box<dyn Log>>,
    },
}

impl Logger {
    /// All formats into the same place; one `write` per line, so that lines of two processes never mix.
    fn lines(
        text: impl Write + Send + Clone + 'static,
        json: impl Write + Send + 'static,
        journal: bool,
    ) -> Logger {
        let logger = |config| {
            let text = LineWriter::with_capacity(2 * MESSAGE_BYTES_MAX, text.clone());
            simplelog::WriteLogger::new(LevelFilter::Trace, config, text) as Box<dyn Log>
        };
        let journal = journal.then(|| logger(bare()));
        Logger { out: Out::Lines { text: logger(dated()), json: Mutex::new(Box::new(json)), journal } }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let max = log::max_level();
        let ours = metadata.target().starts_with("couch_hookd");
        metadata.level() <= max && (ours || metadata.level() <= Level::Warn)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        match &self.out {
            Out::Host { to, lost } => send(to, lost, Line { level: record.level(), text }),
            Out::Lines { json, .. } if JSON.load(Ordering::Relaxed) => {
                let line = json_line(record.level(), record.target(), &text, sys::wall());
                let mut json = json.lock().unwrap_or_else(PoisonError::into_inner);
                // A log that cannot be written has nowhere to say so.
                let _ = json.write_all(line.as_bytes());
            }
            Out::Lines { text: logger, journal, .. } => {
                let line = one_line(&text);
                let mut builder = Record::builder();
                builder.level(record.level()).target(record.target());
                match journal {
                    Some(journal) if file().is_none() => {
                        let priority = priority(record.level());
                        journal.log(&builder.args(format_args!("<{priority}>{line}")).build());
                    }
                    _ => logger.log(&builder.args(format_args!("{line}")).build()),
                }
            }
        }
    }

    fn flush(&self) {
        let Out::Host { to, .. } = &self.out else {
            return;
        };
        let (done, wait) = bounded(1);
        if to.send_timeout(HostLog::Flush(done), FLUSH_MAX).is_ok() {
            // Nobody answers when the host is gone; then there is nobody to tell either.
            let _ = wait.recv_timeout(FLUSH_MAX);
        }
    }
}

/// Never waits: a CouchDB that does not read must not stop deliveries.
fn send(to: &Sender<HostLog>, lost: &Mutex<u64>, line: Line) {
    let mut lost = lost.lock().unwrap_or_else(PoisonError::into_inner);
    if *lost > 0 && to.try_send(HostLog::Lost(*lost)).is_ok() {
        *lost = 0;
    }
    let level = line.level;
    let unsent = match to.try_send(HostLog::Line(line)) {
        Ok(()) => return,
        Err(TrySendError::Full(line) | TrySendError::Disconnected(line)) => line,
    };
    match unsent {
        HostLog::Line(line) if level == Level::Error => {
            let text = format!("couch-hookd: {}\n", one_line(&line.text));
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
        _ => *lost += 1,
    }
}

/// `2026-11-21T20:46:41.123456789Z [INFO] text`.
fn dated() -> simplelog::Config {
    let mut config = simplelog::ConfigBuilder::new();
    config
        .set_time_level(LevelFilter::Error)
        .set_time_format_rfc3339()
        .set_max_level(LevelFilter::Error)
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .set_level_padding(simplelog::LevelPadding::Off);
    config.build()
}

/// The text alone: the journal keeps time and priority itself.
fn bare() -> simplelog::Config {
    let mut config = simplelog::ConfigBuilder::new();
    config
        .set_time_level(LevelFilter::Off)
        .set_max_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off);
    config.build()
}

/// syslog's numbers, as sd-daemon(3) takes them in front of a line.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// `{"time":"2026-11-21T20:46:41.123Z","level":"info","target":"couch_hookd::daemon","message":"started"}`.
fn json_line(level: Level, target: &str, text: &str, now: jiff::Timestamp) -> String {
    #[derive(serde::Serialize)]
    struct Json<'a> {
        time: &'a str,
        level: &'a str,
        target: &'a str,
        message: &'a str,
    }
    let (time, level) = (format!("{now:.3}"), level.as_str().to_ascii_lowercase());
    let json = Json { time: &time, level: &level, target, message: &one_line(text) };
    serde_json::to_string(&json).expect("strings are always JSON") + "\n"
}

/// Whether stderr leads to the journal: `JOURNAL_STREAM` names its device and inode (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    let Ok(stat) = nix::sys::stat::fstat(std::io::stderr()) else {
        return false;
    };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// ``thread `feed:orders` panicked at src/x.rs:3:5: text``.
fn panic_text(panic: &std::panic::PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("?");
    let place = panic.location().map_or_else(String::new, |place| format!(" at {place}"));
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    let text: String = text.chars().take(PANIC_CHARS_MAX).collect();
    format!("thread `{name}` panicked{place}: {text}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn take(&self) -> Vec<String> {
            let lines = std::mem::take(&mut *self.0.lock().unwrap());
            lines.into_iter().map(|line| String::from_utf8(line).unwrap()).collect()
        }
    }

    fn say(logger: &Logger, level: Level, target: &str, text: &str) {
        logger.log(&Record::builder().level(level).target(target).args(format_args!("{text}")).build());
    }

    /// One test for all that hangs on the process's global level and format.
    #[test]
    fn lines_follow_level_format_and_sink_at_run_time() {
        set_level(LevelFilter::Info);
        let written = Written::default();
        let logger = Logger::lines(written.clone(), written.clone(), false);
        say(&logger, Level::Info, "couch_hookd::x", "one\ntwo");
        let lines = written.take();
        assert_eq!(lines.len(), 1, "one write per line: {lines:?}");
        let (time, rest) = lines[0].split_once(' ').unwrap();
        assert_eq!(rest, "[INFO] one\\ntwo\n");
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{time}");

        say(&logger, Level::Debug, "couch_hookd::x", "no");
        say(&logger, Level::Info, "ureq::run", "no");
        assert_eq!(written.take(), [""; 0]);
        say(&logger, Level::Warn, "ureq::run", "yes");
        assert_eq!(written.take().len(), 1);
        set_level(LevelFilter::Trace);
        assert_eq!(log::max_level(), LevelFilter::Debug, "at trace ureq prints endpoint paths");
        say(&logger, Level::Info, "ureq::run", "no");
        say(&logger, Level::Debug, "couch_hookd::x", "yes");
        assert_eq!(written.take().len(), 1);

        let journal = Logger::lines(written.clone(), written.clone(), true);
        for level in Level::iter() {
            say(&journal, level, "couch_hookd", "x");
        }
        assert_eq!(written.take(), ["<3>x\n", "<4>x\n", "<6>x\n", "<7>x\n"]);

        set_format(LogFormat::Json);
        say(&logger, Level::Warn, "couch_hookd", "a \"b\"\n");
        set_format(LogFormat::Text);
        let lines = written.take();
        let json: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!((json["level"].as_str(), json["message"].as_str()), (Some("warn"), Some("a \"b\"\\n")));
        assert_eq!(lines[0].matches('\n').count(), 1);
        a_file_takes_the_place_of_stderr();
    }

    fn a_file_takes_the_place_of_stderr() {
        let dir = std::env::temp_dir().join(format!("couch-hookd-log-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (path, moved) = (dir.join("hookd.log"), dir.join("hookd.log.1"));
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        set_file(Some(&path)).unwrap();
        assert!(file().is_none(), "lines that do not go to stderr stay where they are");
        STDERR.store(true, Ordering::Relaxed);
        set_file(Some(&path)).unwrap();
        let logger = Logger::lines(FileOrStderr, FileOrStderr, true);
        say(&logger, Level::Info, "couch_hookd", "one");
        std::fs::rename(&path, &moved).unwrap();
        set_file(Some(&path)).unwrap();
        say(&logger, Level::Info, "couch_hookd", "two");
        reopen().unwrap();
        say(&logger, Level::Info, "couch_hookd", "three");
        set_format(LogFormat::Json);
        say(&logger, Level::Info, "couch_hookd", "four");
        set_format(LogFormat::Text);
        let (first, second) = (read(&moved), read(&path));
        let ends = |text: &str| {
            text.lines().map(|line| line[line.find(' ').unwrap()..].to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(ends(&first), [" [INFO] one", " [INFO] two"], "{first}");
        assert!(
            second.contains(" [INFO] three\n{") && second.ends_with("\"message\":\"four\"}\n"),
            "{second}"
        );
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o007,
            0,
            "others read names there"
        );

        let error = set_file(Some(&dir)).unwrap_err().to_string();
        let expected = format!(
            "log file `{}`: expected a file, got something else; log lines go to stderr",
            dir.display()
        );
        assert_eq!(error, expected);
        say(&logger, Level::Info, "couch_hookd", "to stderr");
        let pipe = dir.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(set_file(Some(&pipe)).is_err(), "and nothing waits for a reader");
        assert!(reopen().is_err(), "still a pipe");
        std::fs::remove_file(&pipe).unwrap();
        reopen().unwrap();
        say(&logger, Level::Info, "couch_hookd", "five");
        assert!(read(&pipe).ends_with(" [INFO] five\n"));
        set_file(Some(Path::new("/dev/full"))).unwrap_err();
        set_file(None).unwrap();
        say(&logger, Level::Info, "couch_hookd", "to stderr");
        assert_eq!(read(&pipe).lines().count(), 1);
        STDERR.store(false, Ordering::Relaxed);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_host_that_does_not_read_never_stops_us_and_is_told_what_it_missed() {
        let (to, from) = bounded(2);
        let lost = Mutex::new(0);
        for i in 0..5 {
            send(&to, &lost, Line { level: Level::Info, text: format!("line {i}") });
        }
        assert_eq!(from.try_iter().count(), 2);
        send(&to, &lost, Line { level: Level::Info, text: "later".to_owned() });
        let got: Vec<HostLog> = from.try_iter().collect();
        assert!(
            matches!(&got[..], [HostLog::Lost(3), HostLog::Line(line)] if line.text == "later"),
            "{got:?}"
        );
    }

    #[test]
    fn times_in_json_are_to_the_millisecond() {
        let now = "2026-11-21T20:46:41.123456Z".parse().unwrap();
        assert_eq!(
            json_line(Level::Info, "couch_hookd", "started", now),
            "{\"time\":\"2026-11-21T20:46:41.123Z\",\"level\":\"info\",\"target\":\"couch_hookd\",\"message\":\"started\"}\n"
        );
    }
}
