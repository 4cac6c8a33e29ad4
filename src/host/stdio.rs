//! Sole owner of stdin and stdout under `[os_daemons]`: asks CouchDB, logs through it, notices when it is gone.
//!
//! ```text
//! stdin  -> thread host:stdin  -> replies (in the order of the gets) -> HostClient
//! HostClient, log -> thread host:stdout (log limits) -> stdout
//! getppid() -> thread host:parent
//! any of the three sees the end -> `Closed` to the daemon, errors `Stopped` to callers; 900 ms later: exit 0 (`ending`)
//! ```
//!
//! Guarantees: only whole protocol lines reach stdout, from one thread; one `get` at a time; an answer that comes
//! after its question was given up is never taken for the next question's; once the host is gone the process ends
//! within a second, whatever hangs. What the answers mean is left to `config`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, at, bounded, never, select};

use crate::error::{Error, Kind, Result};
use crate::host::ending::{self, Closed, Ending};
use crate::log::HostLog;
use crate::pure::log_limit::LogLimit;
use crate::pure::os_daemon::{self, Reply, Section};
use crate::sys;

/// How long an answer may take. CouchDB's daemon manager was seen held up for 7 s by another daemon and for 18 s by
/// a change of configuration; nothing waits for an answer but the next configuration.
pub const GET_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest reply that is kept: a section with 10,000 keys.
const REPLY_BYTES_MAX: usize = 4 << 20;
/// How long [`Stdio::stop`] waits for a host that does not read.
const STOP_MAX: Duration = Duration::from_millis(300);
/// Log lines on their way to the thread that writes them.
const LOG_LINES_MAX: usize = 1_000;
/// Requests on their way; one `get` at a time, and `register` waits for none.
const REQUESTS_MAX: usize = 64;
/// Replies that wait to be taken: never more than one, unless a host writes what nobody asked for.
const REPLIES_MAX: usize = 8;

/// The running connection to the host. End it with [`Stdio::stop`].
#[derive(Debug)]
pub struct Stdio {
    client: HostClient,
    log: Sender<HostLog>,
    closed: Receiver<Closed>,
    ending: Ending,
    /// Dropped to stop the parent watcher.
    watch: Sender<()>,
    watcher: sys::Thread,
    writer: sys::Thread,
    reader: sys::Thread,
}

/// Asks the host. Cheap to clone; questions of several threads wait for each other.
#[derive(Debug, Clone)]
pub struct HostClient {
    requests: Sender<Request>,
    asker: Arc<Mutex<Asker>>,
    timeout: Duration,
}

/// Starts on this process's stdin and stdout; the last resort is to exit with status 0.
///
/// # Errors
/// `Io` when no thread can be started.
pub fn start() -> Result<Stdio> {
    start_on(std::io::stdin(), std::io::stdout(), ending::parent, ending::exit)
}

/// Starts on other ends, for tests: `parent` gives the parent's process id, `last_resort` runs
/// [`ending::LAST_RESORT_AFTER`] the host is gone.
///
/// # Errors
/// `Io` when no thread can be started.
pub fn start_on(
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
    parent: impl Fn() -> i32 + Send + 'static,
    last_resort: impl Fn() + Send + Sync + 'static,
) -> Result<Stdio> {
    let (reply_to, replies) = bounded(REPLIES_MAX);
    let (request_to, requests) = bounded(REQUESTS_MAX);
    let (log, lines) = bounded(LOG_LINES_MAX);
    let (watch, watched) = bounded(0);
    let (ending, closed) = Ending::new(last_resort);
    let (reader_ending, writer_ending) = (ending.clone(), ending.clone());
    let writer = sys::spawn("host:stdout", move || {
        if let Err(error) = write_lines(output, &requests, &lines) {
            // Whoever sends from now on learns at once that nobody writes any more.
            drop((requests, lines));
            writer_ending.begin(Closed::StdoutFailed(error.to_string()));
        }
    })?;
    let watcher = ending.watch_parent(parent, watched)?;
    let reader = sys::spawn("host:stdin", move || {
        let reason = read_replies(BufReader::new(input), &reply_to);
        // Whoever waits for an answer learns at once that none will come.
        drop(reply_to);
        reader_ending.begin(reason);
    })?;
    let asker = Arc::new(Mutex::new(Asker { replies, n_owed: 0 }));
    let client = HostClient { requests: request_to, asker, timeout: GET_TIMEOUT };
    Ok(Stdio { client, log, closed, ending, watch, watcher, writer, reader })
}

impl Stdio {
    /// Asks the host.
    pub fn client(&self) -> HostClient {
        self.client.clone()
    }

    /// For [`crate::log::Sink::Host`].
    pub fn log(&self) -> Sender<HostLog> {
        self.log.clone()
    }

    /// Gives one message, to one receiver, when the host is gone: take no more work, finish within 800 ms.
    pub fn closed(&self) -> Receiver<Closed> {
        self.closed.clone()
    }

    /// Writes what waits and ends the threads, in 300 ms at most. What cannot be woken is left to the end of the
    /// process: a read of stdin, a write to a host that does not read, the last resort once the host is gone.
    ///
    /// # Errors
    /// What a thread panicked with.
    pub fn stop(self) -> Result<(), String> {
        if !self.ending.is_begun() {
            let (done, wait) = bounded(1);
            if self.client.requests.send_timeout(Request::Stop(done), STOP_MAX).is_ok() {
                // No answer means that the host went or does not read; the writer is then left.
                let _ = wait.recv_timeout(STOP_MAX);
            }
        }
        drop(self.watch);
        if self.ending.is_begun() {
            return Ok(());
        }
        self.watcher.join()?;
        for thread in [self.writer, self.reader] {
            if thread.is_finished() {
                thread.join()?;
            }
        }
        Ok(())
    }
}

impl HostClient {
    /// The section as CouchDB has it now; empty when there is none.
    ///
    /// # Errors
    /// `Timeout` when no answer came within [`GET_TIMEOUT`], or the answer to an earlier question is still to come;
    /// `Malformed` for an answer of another shape; `Stopped` when the host is gone.
    pub fn get_section(&self, section: &str) -> Result<Section> {
        match self.ask(os_daemon::get_section(section)) {
            Ok(Reply::Section(section)) => Ok(section),
            Ok(Reply::Value(_) | Reply::Null) => {
                Err(Error::new(Kind::Malformed, "reply to `get`: expected an object, got another value"))
            }
            Err(error) => Err(error),
        }
        .map_err(|error| error.context(format!("failed to get section `{section}` from CouchDB")))
    }

    /// Several sections, those that CouchDB has, one question after the other.
    ///
    /// # Errors
    /// As [`HostClient::get_section`]; the first failure ends it, because half an answer is none.
    pub fn get_sections(&self, names: &[&str]) -> Result<Sections> {
        let mut sections = Sections::new();
        for name in names {
            let section = self.get_section(name)?;
            if !section.is_empty() {
                sections.insert((*name).to_owned(), section);
            }
        }
        Ok(sections)
    }

    /// Asks CouchDB to kill and restart us whenever a key of the section is set (DESIGN §3 says why this is off).
    ///
    /// # Errors
    /// `Stopped` when the host is gone, `Timeout` when it does not read.
    pub fn register(&self, section: &str) -> Result<()> {
        self.send(os_daemon::register(section))
    }

    fn ask(&self, line: Vec<u8>) -> Result<Reply> {
        let deadline = sys::now() + self.timeout;
        let mut asker = self.asker.lock().unwrap_or_else(PoisonError::into_inner);
        // CouchDB answers every question, in order, or we are gone with it: what is owed comes before what we ask
        // now. Nothing is asked while something is owed: a host that is slow is not to be flooded.
        while asker.n_owed > 0 {
            asker.receive(deadline, "the answer to an earlier question")?;
            asker.n_owed -= 1;
        }
        self.send(line)?;
        let reply = asker.receive(deadline, "an answer");
        if reply.as_ref().is_err_and(|error| error.kind() == Kind::Timeout) {
            asker.n_owed += 1;
        }
        os_daemon::parse_reply(&reply?)
    }

    fn send(&self, line: Vec<u8>) -> Result<()> {
        self.requests.send_timeout(Request::Line(line), self.timeout).map_err(|error| match error {
            SendTimeoutError::Timeout(_) => Error::new(Kind::Timeout, "the host does not read what we write"),
            SendTimeoutError::Disconnected(_) => gone(),
        })
    }
}

/// Sections by name.
pub type Sections = BTreeMap<String, Section>;

#[derive(Debug)]
enum Request {
    Line(Vec<u8>),
    Stop(Sender<()>),
}

#[derive(Debug)]
struct Asker {
    replies: Receiver<Vec<u8>>,
    /// Answers still to come to questions that were given up.
    n_owed: u32,
}

impl Asker {
    fn receive(&self, deadline: Instant, what: &str) -> Result<Vec<u8>> {
        self.replies.recv_deadline(deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::new(Kind::Timeout, format!("{what} did not come in time")),
            RecvTimeoutError::Disconnected => gone(),
        })
    }
}

fn gone() -> Error {
    Error::new(Kind::Stopped, "the host is gone")
}

/// Hands on every line until the end. A line that nobody asked for finds no room one day and is dropped: the end
/// of stdin must be seen whatever a host writes.
fn read_replies(mut input: impl BufRead, replies: &Sender<Vec<u8>>) -> Closed {
    loop {
        let mut line = Vec::new();
        loop {
            let room = REPLY_BYTES_MAX.saturating_sub(line.len()) as u64;
            let mut skipped = Vec::new();
            let part = if room > 0 { &mut line } else { &mut skipped };
            match (&mut input).take(if room > 0 { room } else { 64 << 10 }).read_until(b'\n', part) {
                Ok(0) => return Closed::StdinEnded,
                Ok(_) if part.ends_with(b"\n") => break,
                Ok(_) => {}
                Err(error) => return Closed::StdinFailed(error.to_string()),
            }
        }
        let _ = replies.try_send(line);
    }
}

/// Writes requests at once and log lines at their pace, until told to stop.
fn write_lines(
    mut output: impl Write,
    requests: &Receiver<Request>,
    lines: &Receiver<HostLog>,
) -> std::io::Result<()> {
    let mut limit = LogLimit::new(sys::now());
    let mut lines = lines.clone();
    loop {
        while let Some(line) = limit.next_line(sys::now()) {
            write_line(&mut output, &os_daemon::log(line.level, &line.text))?;
        }
        let timer = limit.next_deadline().map_or_else(never, at);
        let mut flushed = None;
        select! {
            recv(requests) -> request => match request {
                Ok(Request::Line(line)) => write_line(&mut output, &line)?,
                Ok(Request::Stop(done)) => flushed = Some((done, true)),
                Err(_) => return Ok(()),
            },
            recv(lines) -> line => match line {
                Ok(HostLog::Flush(done)) => flushed = Some((done, false)),
                Ok(line) => note(&mut limit, line),
                Err(_) => lines = never(),
            },
            recv(timer) -> _ => {}
        }
        if let Some((done, stop)) = flushed {
            // What was logged before the flush was asked for is in the channel already.
            lines.try_iter().for_each(|line| note(&mut limit, line));
            for line in limit.drain(sys::now()) {
                write_line(&mut output, &os_daemon::log(line.level, &line.text))?;
            }
            // Whoever asked may have stopped waiting.
            let _ = done.try_send(());
            if stop {
                return Ok(());
            }
        }
    }
}

fn note(limit: &mut LogLimit, line: HostLog) {
    match line {
        HostLog::Line(line) => limit.on_line(line),
        HostLog::Lost(n_lines) => limit.on_lost(n_lines),
        // Another thread asked for the same flush; it is under way.
        HostLog::Flush(done) => drop(done),
    }
}

/// One line, one write: a line cut in two by a kill is the only harm left.
fn write_line(output: &mut impl Write, line: &[u8]) -> std::io::Result<()> {
    output.write_all(line)?;
    output.flush()
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter};
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;
    use crate::pure::log_limit::Line;

    /// CouchDB's end of the pipes.
    struct Host {
        stdio: Stdio,
        lines: BufReader<PipeReader>,
        answers: Option<PipeWriter>,
        parent: Arc<AtomicI32>,
        exited: Receiver<()>,
    }

    impl Host {
        fn new(timeout: Duration) -> Host {
            let (input, answers) = std::io::pipe().unwrap();
            let (lines, output) = std::io::pipe().unwrap();
            let parent = Arc::new(AtomicI32::new(7));
            let watched = parent.clone();
            let (exit, exited) = bounded(1);
            let mut stdio = start_on(
                input,
                output,
                move || watched.load(Ordering::SeqCst),
                move || exit.send(()).unwrap(),
            )
            .unwrap();
            stdio.client.timeout = timeout;
            Host { stdio, lines: BufReader::new(lines), answers: Some(answers), parent, exited }
        }

        fn line(&mut self) -> String {
            let mut line = String::new();
            self.lines.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        }

        fn answer(&mut self, bytes: &str) {
            self.answers.as_mut().unwrap().write_all(bytes.as_bytes()).unwrap();
        }

        /// Starts a question in another thread.
        fn ask(&self, section: &'static str) -> Receiver<Result<Section>> {
            let (client, (to, answer)) = (self.stdio.client(), bounded(1));
            let _thread = sys::spawn("ask", move || to.send(client.get_section(section)).unwrap()).unwrap();
            answer
        }
    }

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(50);

    fn value(answer: &Receiver<Result<Section>>) -> String {
        answer.recv_timeout(LONG).unwrap().unwrap()["v"].clone()
    }

    #[test]
    fn questions_go_out_one_at_a_time_and_get_their_own_answers() {
        let mut host = Host::new(LONG);
        let answer = host.ask("a");
        assert_eq!(host.line(), r#"["get","a"]"#);
        let second = host.ask("b");
        host.answer("{\"v\":");
        host.answer("\"1\"}\n");
        assert_eq!(value(&answer), "1");
        assert_eq!(host.line(), r#"["get","b"]"#);
        host.answer("{\"v\":\"2\"}\n");
        assert_eq!(value(&second), "2");
    }

    #[test]
    fn a_late_answer_is_never_taken_for_the_next_questions() {
        let mut host = Host::new(SHORT);
        let first = host.ask("a").recv_timeout(LONG).unwrap().unwrap_err();
        assert_eq!(first.kind(), Kind::Timeout);
        let second = host.ask("b").recv_timeout(LONG).unwrap().unwrap_err();
        assert_eq!(
            second.to_string(),
            "failed to get section `b` from CouchDB: the answer to an earlier question did not come in time"
        );
        host.stdio.client.timeout = LONG;
        let third = host.ask("c");
        assert_eq!(host.line(), r#"["get","a"]"#);
        host.answer("{\"v\":\"late\"}\n");
        assert_eq!(host.line(), r#"["get","c"]"#, "`b` was never sent");
        host.answer("{\"v\":\"c\"}\n");
        assert_eq!(value(&third), "c");
    }

    #[test]
    fn an_answer_of_any_size_is_read_and_a_broken_one_costs_only_its_question() {
        let mut host = Host::new(LONG);
        let answer = host.ask("a");
        let big = "x".repeat(1 << 20);
        host.answer(&format!("{{\"v\":\"{big}\"}}\n"));
        assert_eq!(value(&answer), big);
        let answer = host.ask("b");
        host.answer("<html>\n");
        assert_eq!(answer.recv_timeout(LONG).unwrap().unwrap_err().kind(), Kind::Malformed);
        let answer = host.ask("c");
        host.answer(&"x".repeat(REPLY_BYTES_MAX + 100_000));
        host.answer("\n");
        assert_eq!(answer.recv_timeout(LONG).unwrap().unwrap_err().kind(), Kind::Malformed);
        let answer = host.ask("d");
        host.answer("{\"v\":\"d\"}\n");
        assert_eq!(value(&answer), "d");
    }

    #[test]
    fn the_end_of_stdin_reaches_everybody_and_ends_the_process_in_time() {
        let mut host = Host::new(LONG);
        let answer = host.ask("a");
        assert_eq!(host.line(), r#"["get","a"]"#);
        let start = sys::now();
        host.answer("{\"v\":\"cut");
        drop(host.answers.take());
        assert_eq!(host.stdio.closed().recv_timeout(LONG), Ok(Closed::StdinEnded));
        assert_eq!(answer.recv_timeout(LONG).unwrap().unwrap_err().kind(), Kind::Stopped);
        assert_eq!(host.ask("b").recv_timeout(LONG).unwrap().unwrap_err().kind(), Kind::Stopped);
        assert!(host.exited.try_recv().is_err(), "the clean way goes first");
        host.exited.recv_timeout(LONG).unwrap();
        let took = sys::now() - start;
        assert!(took >= ending::LAST_RESORT_AFTER, "{took:?}");
        host.stdio.stop().unwrap();
    }

    #[test]
    fn another_parent_or_a_broken_stdout_is_the_end_too() {
        let host = Host::new(LONG);
        host.parent.store(1, Ordering::SeqCst);
        assert_eq!(host.stdio.closed().recv_timeout(LONG), Ok(Closed::ParentGone));
        host.exited.recv_timeout(LONG).unwrap();

        let mut host = Host::new(LONG);
        host.lines = BufReader::new(std::io::pipe().unwrap().0);
        let answer = host.ask("a");
        let closed = host.stdio.closed().recv_timeout(LONG).unwrap();
        assert!(matches!(&closed, Closed::StdoutFailed(why) if why.contains("Broken pipe")), "{closed:?}");
        host.exited.recv_timeout(LONG).unwrap();
        drop(host.answers);
        assert_eq!(answer.recv_timeout(LONG).unwrap().unwrap_err().kind(), Kind::Stopped);
    }

    #[test]
    fn a_flood_of_log_lines_is_held_back_while_questions_pass() {
        let mut host = Host::new(LONG);
        for i in 0..200 {
            let line = Line { level: log::Level::Info, text: format!("line {i}") };
            host.stdio.log().send(HostLog::Line(line)).unwrap();
        }
        for i in 0..20 {
            assert_eq!(host.line(), format!(r#"["log","line {i}",{{"level":"info"}}]"#));
        }
        let answer = host.ask("a");
        assert_eq!(host.line(), r#"["get","a"]"#);
        host.answer("{\"v\":\"1\"}\n");
        assert_eq!(value(&answer), "1");
    }

    #[test]
    fn stopping_writes_what_waits() {
        let mut host = Host::new(LONG);
        for i in 0..22 {
            let line = Line { level: log::Level::Error, text: format!("bad {i}") };
            host.stdio.log().send(HostLog::Line(line)).unwrap();
        }
        host.stdio.client().register("hookd").unwrap();
        host.stdio.stop().unwrap();
        let mut said = String::new();
        host.lines.read_to_string(&mut said).unwrap();
        assert!((0..22).all(|i| said.contains(&format!("bad {i}"))), "{said}");
        assert!(said.contains("[\"register\",\"hookd\"]\n"), "{said}");
        assert!(
            said.lines().all(|line| serde_json::from_str::<Vec<serde_json::Value>>(line).is_ok()),
            "{said}"
        );
    }
}
