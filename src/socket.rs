//! TCP connections for requests that are made by the thousand: one write each, and few other system calls.
//!
//! `ureq`'s own sends a request's head and its body in a write each, sets both time limits of the socket anew for each
//! of them, and asks in three calls whether a pooled connection is still open: measured, a third of the system
//! calls of a delivery. Guarantees that what was written is sent before an answer is waited for, and that no call
//! lasts longer than `ureq`'s limit by more than `SLACK`. Uses the part of `ureq`'s interface that may change with a
//! minor version; then this stops to build, no more.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, NextTimeout, RustlsConnector, ShutdownHandle, Transport,
};
use ureq::{Error, Timeout};

use crate::sys;

/// A limit of a socket may stay as it is while it is later than wanted by no more.
const SLACK: Duration = Duration::from_millis(50);
/// Room that is kept for the next piece of a request, in bytes: what is there is sent before it gets scarcer.
const ROOM_MIN: usize = 8 * 1024;
/// Room for what `ureq` copies through, in bytes.
const SCRATCH_MIN: usize = 10 * 1024;

/// Opens connections of this kind, with TLS where the URL asks for it. Knows no proxy. Clones share what TLS needs.
#[derive(Debug, Clone, Default)]
pub struct Sockets {
    tls: Arc<RustlsConnector>,
    gate: Option<Gate>,
}

impl Sockets {
    /// Connections that send nothing while `gate` is shut: what was to be sent fails. It is asked before every write, so
    /// whoever was stopped in the middle of a connection, or a request, sends no more of it.
    pub fn gated(gate: Gate) -> Sockets {
        Sockets { gate: Some(gate), ..Sockets::default() }
    }
}

/// Whether something may be sent now.
#[derive(Clone)]
pub struct Gate(pub Arc<dyn Fn() -> bool + Send + Sync>);

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

impl Connector for Sockets {
    type Out = <RustlsConnector as Connector<Socket>>::Out;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Self::Out>, Error> {
        let socket = Plain.connect(details, None)?;
        let socket = socket.map(|socket| Socket { gate: self.gate.clone(), ..socket });
        self.tls.connect(details, socket)
    }
}

/// Opens connections of this kind, without TLS: the first of a chain.
#[derive(Debug)]
pub struct Plain;

impl Connector for Plain {
    type Out = Socket;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Socket>, Error> {
        let stream = Arc::new(open(details)?);
        stream.set_nodelay(true)?;
        let handle: Weak<TcpStream> = Arc::downgrade(&stream);
        (details.register_shutdown)(handle as Weak<dyn ShutdownHandle>)?;
        let config = details.config;
        let buffers = Buffer::new(config.input_buffer_size(), config.output_buffer_size());
        Ok(Some(Socket {
            stream,
            buffers,
            read_limit: None,
            write_limit: None,
            just_read: false,
            gate: None,
        }))
    }
}

/// The first address that somebody answers at. Each gets its share of the time that is left.
fn open(details: &ConnectionDetails<'_>) -> Result<TcpStream, Error> {
    let limit = details.timeout.not_zero().map(|limit| *limit);
    let deadline = limit.map(|limit| sys::now() + limit);
    let mut failure = Error::ConnectionFailed;
    for (n, address) in details.addrs.iter().enumerate() {
        let opened = match deadline {
            None => TcpStream::connect(address),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(sys::now());
                if left.is_zero() {
                    return Err(Error::Timeout(details.timeout.reason));
                }
                let n_left = u32::try_from(details.addrs.len() - n).unwrap_or(1);
                TcpStream::connect_timeout(address, left / n_left)
            }
        };
        failure = match opened {
            Ok(stream) => return Ok(stream),
            Err(error) if is_late(&error) => Error::Timeout(Timeout::Connect),
            Err(error) => Error::Io(error),
        };
    }
    Err(failure)
}

/// One connection.
#[derive(Debug)]
pub struct Socket {
    /// Shared, weakly, with whoever may have to end it.
    stream: Arc<TcpStream>,
    buffers: Buffer,
    read_limit: Option<Duration>,
    write_limit: Option<Duration>,
    /// Something came, and nobody has asked since whether it is still open.
    just_read: bool,
    gate: Option<Gate>,
}

impl Socket {
    /// Sends what is held.
    fn flush(&mut self, timeout: NextTimeout) -> Result<(), Error> {
        let held = std::mem::take(&mut self.buffers.held);
        if held == 0 {
            return Ok(());
        }
        let timeout = timeout.for_write();
        let (limit, began) = (limit_of(timeout)?, sys::now());
        let mut n_sent = 0;
        while n_sent < held {
            // A reader that takes it in drips gets no more time than one that takes nothing.
            let left = limit.map(|limit| limit.saturating_sub(sys::now() - began));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Error::Timeout(timeout.reason));
            }
            if let Some(limit) = new_limit(self.write_limit, left) {
                self.stream.set_write_timeout(limit)?;
                self.write_limit = limit;
            }
            if self.gate.as_ref().is_some_and(|gate| !(gate.0)()) {
                return Err(Error::Io(ErrorKind::PermissionDenied.into()));
            }
            match (&*self.stream).write(&self.buffers.output[n_sent..held]) {
                Ok(0) => return Err(Error::Io(ErrorKind::WriteZero.into())),
                Ok(n) => n_sent += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(named(error, timeout)),
            }
        }
        Ok(())
    }
}

impl Transport for Socket {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.buffers.held += amount;
        match self.buffers.output.len() - self.buffers.held < ROOM_MIN {
            true => self.flush(timeout),
            false => Ok(()),
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.flush(timeout)?;
        let timeout = timeout.for_read();
        let mut limit = limit_of(timeout)?;
        let began = sys::now();
        loop {
            if let Some(limit) = new_limit(self.read_limit, limit) {
                self.stream.set_read_timeout(limit)?;
                self.read_limit = limit;
            }
            match (&*self.stream).read(self.buffers.input_append_buf()) {
                Ok(n) => {
                    self.buffers.input_appended(n);
                    self.just_read = n > 0;
                    return Ok(n > 0);
                }
                // Linux does not go on with a read that has a limit: we do, with what is left of it.
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    let left = limit_of(timeout)?.map(|limit| limit.saturating_sub(sys::now() - began));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Err(Error::Timeout(timeout.reason));
                    }
                    limit = left;
                }
                Err(error) => return Err(named(error, timeout)),
            }
        }
    }

    /// Whether nothing has come that nobody asked for, its end least of all. `ureq` asks when an answer is read and once
    /// more before the next request: the second time counts.
    fn is_open(&mut self) -> bool {
        if std::mem::take(&mut self.just_read) {
            return true;
        }
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
    }
}

/// How long a call may last; `None` for ever.
fn limit_of(timeout: NextTimeout) -> Result<Option<Duration>, Error> {
    match timeout.after.is_zero() {
        true => Err(Error::Timeout(timeout.reason)),
        false => Ok(timeout.not_zero().map(|limit| *limit)),
    }
}

/// What a socket's limit is to be set to, if what it is will not do.
fn new_limit(is: Option<Duration>, wanted: Option<Duration>) -> Option<Option<Duration>> {
    match (is, wanted) {
        (None, None) => None,
        (Some(is), Some(wanted)) if wanted <= is && is <= wanted + SLACK => None,
        // A little later, so that the next request finds it good enough, too.
        (_, Some(wanted)) => Some(Some(wanted + SLACK / 2)),
        (_, None) => Some(None),
    }
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

fn named(error: io::Error, timeout: NextTimeout) -> Error {
    if is_late(&error) { Error::Timeout(timeout.reason) } else { Error::Io(error) }
}

/// What came and is not read yet, and what is to be sent. Takes its memory when first used.
#[derive(Debug)]
struct Buffer {
    sizes: (usize, usize),
    input: Vec<u8>,
    /// Of `input`: what came and is not consumed.
    unread: std::ops::Range<usize>,
    /// Whether what was last looked at could be used.
    progress: bool,
    output: Vec<u8>,
    /// Of `output`: written and not sent.
    held: usize,
}

impl Buffer {
    fn new(input: usize, output: usize) -> Buffer {
        let sizes = (input.max(SCRATCH_MIN), output.max(2 * ROOM_MIN));
        Buffer { sizes, input: Vec::new(), unread: 0..0, progress: false, output: Vec::new(), held: 0 }
    }

    /// Makes room behind what is unread.
    fn make_room(&mut self) {
        if self.input.len() < self.sizes.0 {
            self.input.resize(self.sizes.0, 0);
        }
        self.input.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
    }
}

impl Buffers for Buffer {
    fn output(&mut self) -> &mut [u8] {
        self.output.resize(self.sizes.1, 0);
        &mut self.output[self.held..]
    }

    fn input(&self) -> &[u8] {
        &self.input[self.unread.clone()]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        self.make_room();
        &mut self.input[self.unread.end..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.unread.end += amount;
    }

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        self.unread.start += amount;
    }

    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        self.make_room();
        // An answer that came before the request was sent may fill it.
        let wanted = self.unread.end + SCRATCH_MIN;
        if self.input.len() < wanted {
            self.input.resize(wanted, 0);
        }
        self.output.resize(self.sizes.1, 0);
        (&mut self.input[self.unread.end..], &mut self.output[self.held..])
    }

    fn can_use_input(&self) -> bool {
        !self.unread.is_empty() && self.progress
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use ureq::config::Config;

    use super::*;

    /// An agent of these connections, and what a server read at once of each of its requests, answered with `answer`.
    fn ask(bodies: &[&[u8]], answer: &'static [u8]) -> (Vec<Result<u16, Error>>, Vec<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let n_requests = bodies.len();
        let (to, all_heard) = crossbeam_channel::bounded(1);
        let server = sys::spawn("server", move || {
            let mut heard = Vec::new();
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = vec![0; 1 << 20];
            while heard.len() < n_requests {
                let n = stream.read(&mut buffer).unwrap();
                heard.push(buffer[..n].to_vec());
                if stream.write_all(answer).is_err() || answer.is_empty() {
                    break;
                }
            }
            to.send(heard).unwrap();
        });
        let config =
            Config::builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(20)));
        let resolver = ureq::unversioned::resolver::DefaultResolver::default();
        let agent = ureq::Agent::with_parts(config.build(), Sockets::default(), resolver);
        let send = |body: &&[u8]| {
            let mut answer = agent.post(&url).send(*body)?;
            answer.body_mut().read_to_vec()?;
            Ok(answer.status().as_u16())
        };
        let answers = bodies.iter().map(send).collect();
        server.unwrap().join().unwrap();
        (answers, all_heard.recv().unwrap())
    }

    #[test]
    fn head_and_body_leave_together_and_connections_are_used_again() {
        let (answers, heard) = ask(&[b"first", b"second"], b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
        assert!(answers.iter().all(|answer| matches!(answer, Ok(200))), "{answers:?}");
        for (request, body) in heard.iter().zip(["first", "second"]) {
            let text = String::from_utf8_lossy(request);
            assert!(
                text.starts_with("POST / HTTP/1.1\r\n") && text.ends_with(&format!("\r\n\r\n{body}")),
                "{text}"
            );
        }
    }

    #[test]
    fn an_end_without_an_answer_is_an_error() {
        let (answers, _) = ask(&[b"x"], b"");
        assert!(matches!(answers[0], Err(Error::Io(_))), "{answers:?}");
    }

    #[test]
    fn a_limit_is_set_anew_only_when_it_would_be_noticed() {
        let seconds = |seconds| Some(Duration::from_secs_f64(seconds));
        let check = |is, wanted, expected| assert_eq!(new_limit(is, wanted), expected, "{is:?} {wanted:?}");
        check(None, None, None);
        check(None, seconds(15.0), Some(seconds(15.025)));
        check(seconds(15.025), seconds(14.999), None);
        check(seconds(15.025), seconds(14.97), Some(seconds(14.995)));
        check(seconds(1.0), seconds(15.0), Some(seconds(15.025)));
        check(seconds(15.0), None, Some(None));
    }

    #[test]
    fn what_is_unread_stays_whole_however_it_is_consumed() {
        let mut buffer = Buffer::new(1, 1);
        let text: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let (mut given, mut taken) = (0, Vec::new());
        while taken.len() < text.len() {
            let room = buffer.input_append_buf();
            let n = room.len().min(text.len() - given);
            room[..n].copy_from_slice(&text[given..given + n]);
            buffer.input_appended(n);
            given += n;
            assert!(buffer.tmp_and_output().0.len() >= SCRATCH_MIN);
            let n = buffer.input().len().div_ceil(3);
            taken.extend_from_slice(&buffer.input()[..n]);
            buffer.input_consume(n);
        }
        assert_eq!(taken, text);
    }
}
