//! Sole owner of stdin and stdout under `[update_notification]` (CouchDB 1.x to 2.1): takes what CouchDB says, says
//! nothing, notices when it is gone.
//!
//! ```text
//! stdin -> thread host:stdin -> pure::update_notification -> whoever is told, at once
//! getppid() -> thread host:parent
//! either sees the end -> `Closed` to the daemon; 900 ms later: exit 0 (`ending`)
//! ```
//!
//! Guarantees that stdin is read whatever else the process does, hangs in or fails at (CouchDB keeps what we do not
//! read in memory, without bound), so nothing is logged from here and whoever is told must not wait; that once
//! [`silence_stdout`] was called not a byte reaches stdout, whoever prints (one line there and CouchDB 1.x kills us and
//! loses events); that a stdin that cannot be read is no end, for a process that exits at once takes CouchDB's HTTP
//! down (CONTRACT §4). What hints are good for is left to the lookout.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::stat::{FileStat, SFlag, fstat};

use crate::error::{Error, Kind, Result};
use crate::host::ending::{self, Closed, Ending};
use crate::pure::update_notification::{Decoder, Told};
use crate::sys;

/// Bytes read at once: as many as a pipe holds.
const BUFFER_BYTES: usize = 64 << 10;
/// After an error of stdin it is read again this much later.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// The running reader. It runs to the end of the process: there is nothing to stop it for.
#[derive(Debug)]
pub struct Notifier {
    closed: Receiver<Closed>,
    ending: Ending,
    /// Dropped, it ends the parent watcher.
    _watch: Sender<()>,
    _threads: [sys::Thread; 2],
}

/// Starts on this process's stdin; `tell` gets what every line says, in order. The last resort is to exit with status 0.
///
/// # Errors
/// `Io` when no thread can be started.
pub fn start(tell: impl FnMut(Told) + Send + 'static) -> Result<Notifier> {
    start_on(std::io::stdin(), ending::parent, tell, ending::exit)
}

/// Starts on other ends, for tests: `parent` gives the parent's process id, `last_resort` runs
/// [`ending::LAST_RESORT_AFTER`] CouchDB is gone.
///
/// # Errors
/// `Io` when no thread can be started.
pub fn start_on(
    input: impl Read + Send + 'static,
    parent: impl Fn() -> i32 + Send + 'static,
    tell: impl FnMut(Told) + Send + 'static,
    last_resort: impl Fn() + Send + Sync + 'static,
) -> Result<Notifier> {
    let (ending, closed) = Ending::new(last_resort);
    let reading = ending.clone();
    // First of all: CouchDB writes already.
    let reader = sys::spawn("host:stdin", move || {
        drain(input, tell);
        reading.begin(Closed::StdinEnded);
    })?;
    let (watch, watched) = bounded(0);
    let watcher = ending.watch_parent(parent, watched)?;
    Ok(Notifier { closed, ending, _watch: watch, _threads: [reader, watcher] })
}

impl Notifier {
    /// Gives one message, to one receiver, when CouchDB is gone: take no more work, finish within 800 ms.
    pub fn closed(&self) -> Receiver<Closed> {
        self.closed.clone()
    }

    /// Whether CouchDB is gone.
    pub fn is_closed(&self) -> bool {
        self.ending.is_begun()
    }
}

/// Reads until the end of `input`, in this thread: what [`start`] does in its own, and all that is left to do for a process that
/// cannot start one.
pub fn drain(mut input: impl Read, mut tell: impl FnMut(Told)) {
    let (mut decoder, mut buffer) = (Decoder::default(), vec![0; BUFFER_BYTES]);
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(n_bytes) => decoder.on_bytes(&buffer[..n_bytes], &mut tell),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Whatever it is, exiting would be worse; that CouchDB is gone shows at our parent, too.
            Err(_) => sys::sleep(READ_AGAIN_AFTER),
        }
    }
}

/// Puts `/dev/null` in the place of stdout for the whole process, and of stderr where that is the same pipe
/// (`2>&1` in CouchDB's configuration). The pipe itself stays open to the end of the process: CouchDB would see it closed.
///
/// # Errors
/// `Io` when the system refuses that; stdout is then what it was.
pub fn silence_stdout() -> Result<()> {
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        Error::new(Kind::Io, format!("failed to keep stdout silent: {what}: {why}"))
    };
    let nothing = File::options().write(true).open("/dev/null").map_err(|why| failed("`/dev/null`", &why))?;
    let is_nothing = |end: FileStat| fstat(&nothing).is_ok_and(|nothing| end.st_rdev == nothing.st_rdev);
    if fstat(std::io::stdout()).is_ok_and(is_nothing) {
        // So it is after an `exec` of ours, which does not close the pipe.
        return Ok(());
    }
    let are_one = is_one_pipe(std::io::stdout(), std::io::stderr());
    let pipe = nix::unistd::dup(std::io::stdout()).map_err(|why| failed("dup", &why))?;
    nix::unistd::dup2_stdout(&nothing).map_err(|why| failed("dup2", &why))?;
    if are_one {
        nix::unistd::dup2_stderr(&nothing).map_err(|why| failed("dup2 of stderr", &why))?;
    }
    std::mem::forget(pipe);
    Ok(())
}

/// Whether both lead into the same pipe.
fn is_one_pipe(one: impl AsFd, other: impl AsFd) -> bool {
    let is_pipe = |stat: &FileStat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFIFO;
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => is_pipe(&one) && (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::{self, Write};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;
    use crate::pure::hint::Hint;

    const LONG: Duration = Duration::from_secs(10);

    fn updated(db: &str) -> Told {
        Told::Hint(Hint::Updated(db.to_owned()))
    }

    #[test]
    fn lines_are_told_as_they_come_and_the_end_ends_the_process_in_time() {
        let (input, mut couchdb) = std::io::pipe().unwrap();
        let ((tell, told), (exit, exited)) = (bounded(10), bounded(1));
        let notifier =
            start_on(input, || 7, move |one| tell.send(one).unwrap(), move || exit.send(()).unwrap())
                .unwrap();
        couchdb.write_all(b"{\"type\":\"updated\",\"db\":\"a\"}\n{\"type\":\"upd").unwrap();
        assert_eq!(told.recv_timeout(LONG), Ok(updated("a")));
        couchdb.write_all(b"ated\",\"db\":\"b\"}\n\xff\n{\"type\":\"updated\"").unwrap();
        assert_eq!(told.recv_timeout(LONG), Ok(updated("b")));
        assert_eq!(told.recv_timeout(LONG), Ok(Told::Damaged));
        assert!(!notifier.is_closed());
        let begun = sys::now();
        drop(couchdb);
        assert_eq!(notifier.closed().recv_timeout(LONG), Ok(Closed::StdinEnded));
        assert!(notifier.is_closed());
        assert!(exited.try_recv().is_err(), "the clean way goes first");
        exited.recv_timeout(LONG).unwrap();
        assert!(sys::now() - begun >= ending::LAST_RESORT_AFTER);
    }

    #[test]
    fn another_parent_is_the_end_though_stdin_stays_open() {
        let (input, _couchdb) = std::io::pipe().unwrap();
        let parent = Arc::new(AtomicI32::new(7));
        let (watched, (exit, exited)) = (parent.clone(), bounded(1));
        let parent_now = move || watched.load(Ordering::SeqCst);
        let notifier = start_on(input, parent_now, |_| (), move || exit.send(()).unwrap()).unwrap();
        parent.store(1, Ordering::SeqCst);
        assert_eq!(notifier.closed().recv_timeout(LONG), Ok(Closed::ParentGone));
        exited.recv_timeout(LONG).unwrap();
    }

    /// Gives these in turn, then the end.
    struct Script(VecDeque<io::Result<&'static str>>);

    impl Read for Script {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let text = self.0.pop_front().unwrap_or(Ok(""))?;
            buffer[..text.len()].copy_from_slice(text.as_bytes());
            Ok(text.len())
        }
    }

    #[test]
    fn a_stdin_that_cannot_be_read_is_read_again() {
        let script = [
            Err(io::ErrorKind::Interrupted.into()),
            Ok("{\"type\":\"updated\","),
            Err(io::ErrorKind::WouldBlock.into()),
            Err(io::Error::other("anything")),
            Ok("\"db\":\"a\"}\n"),
        ];
        let mut told = Vec::new();
        drain(Script(script.into_iter().collect()), |one| told.push(one));
        assert_eq!(told, [updated("a")]);
    }

    #[test]
    fn a_pipe_that_is_both_streams_is_known() {
        let ((_, one), (_, other)) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
        assert!(is_one_pipe(&one, one.try_clone().unwrap()));
        assert!(!is_one_pipe(&one, &other));
        let file = File::open("/dev/null").unwrap();
        assert!(!is_one_pipe(&file, &file), "a terminal or a file may be both");
    }
}
