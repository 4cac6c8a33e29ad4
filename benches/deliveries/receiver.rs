//! A receiver that does as little as one can: reads a request, counts it, answers 200.
//!
//! Guarantees that every delivery is counted, each change once, and that the first request of every connection has
//! a signature that is right. A thread per connection, one read and one write per request when they fit.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use couch_hookd::pure::signature::{Key, TOLERANCE, verify};
use couch_hookd::sys;

/// Longest request, in bytes.
const REQUEST_BYTES_MAX: usize = 64 * 1024;
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
/// What stands before the number of a change in a body.
const NUMBER_AFTER: &[u8] = b"\"id\":\"doc-";

/// A running receiver. It ends with the process.
pub(crate) struct Receiver {
    shared: Arc<Shared>,
    address: SocketAddr,
}

struct Shared {
    key: Key,
    n_requests: AtomicU64,
    round: Mutex<Round>,
}

#[derive(Default)]
struct Round {
    /// A bit for every change.
    seen: Arc<Vec<AtomicU64>>,
    first: Option<Instant>,
    n_bad_signatures: u64,
    n_signatures: u64,
}

/// What a round gave.
#[derive(Debug)]
pub(crate) struct Counts {
    /// Requests.
    pub(crate) n_requests: u64,
    /// Changes told at least once.
    pub(crate) n_changes: u64,
    /// Signatures looked at, and how many of them were wrong.
    pub(crate) n_signatures: u64,
    /// Wrong ones.
    pub(crate) n_bad_signatures: u64,
    /// When the first request came.
    pub(crate) first: Option<Instant>,
}

impl Receiver {
    /// Starts one on a free port of loopback.
    pub(crate) fn start(secret: &str) -> Receiver {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
        let address = listener.local_addr().expect("it listens");
        let key = Key::parse(secret).expect("it is a secret");
        let shared = Arc::new(Shared { key, n_requests: AtomicU64::new(0), round: Mutex::default() });
        let serving = Arc::clone(&shared);
        let accept = move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&serving);
                // It ends when the sender hangs up.
                let _connection = sys::spawn("receiver", move || serve(&shared, stream));
            }
        };
        let _accepting = sys::spawn("receiver:accept", accept).expect("there is room for a thread");
        Receiver { shared, address }
    }

    /// Where it is.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// Begins to count anew. Connections of the round before are closed by then.
    pub(crate) fn reset(&self, n_changes: u64) {
        let words = usize::try_from(n_changes / 64 + 1).expect("it fits into memory");
        let seen = Arc::new((0..words).map(|_| AtomicU64::new(0)).collect());
        *self.shared.round.lock().expect("nobody panics") = Round { seen, ..Round::default() };
        self.shared.n_requests.store(0, Ordering::SeqCst);
    }

    /// Requests since the reset.
    pub(crate) fn n_requests(&self) -> u64 {
        self.shared.n_requests.load(Ordering::SeqCst)
    }

    /// What came since the reset.
    pub(crate) fn counts(&self) -> Counts {
        let round = self.shared.round.lock().expect("nobody panics");
        let n_changes =
            round.seen.iter().map(|word| u64::from(word.load(Ordering::SeqCst).count_ones())).sum();
        Counts {
            n_requests: self.n_requests(),
            n_changes,
            n_signatures: round.n_signatures,
            n_bad_signatures: round.n_bad_signatures,
            first: round.first,
        }
    }
}

fn serve(shared: &Shared, mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; REQUEST_BYTES_MAX];
    let mut n_bytes = 0;
    let mut seen = None;
    loop {
        let Some((head, length)) =
            find_head(&buffer[..n_bytes]).filter(|(head, length)| n_bytes >= head + length)
        else {
            match stream.read(&mut buffer[n_bytes..]) {
                Ok(0) | Err(_) => return,
                Ok(n) => n_bytes += n,
            }
            continue;
        };
        let (headers, body) = (&buffer[..head], &buffer[head..head + length]);
        let seen = seen.get_or_insert_with(|| start(shared, headers, body));
        if let Some(number) = number_of(body)
            && let Some(word) = seen.get(number / 64)
        {
            word.fetch_or(1 << (number % 64), Ordering::Relaxed);
        }
        shared.n_requests.fetch_add(1, Ordering::SeqCst);
        if stream.write_all(ANSWER).is_err() {
            return;
        }
        buffer.copy_within(head + length..n_bytes, 0);
        n_bytes -= head + length;
    }
}

/// Looks at a connection's first request.
fn start(shared: &Shared, headers: &[u8], body: &[u8]) -> Arc<Vec<AtomicU64>> {
    let mut round = shared.round.lock().expect("nobody panics");
    round.first.get_or_insert_with(sys::now);
    let headers: Vec<(String, String)> = String::from_utf8_lossy(headers)
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    round.n_signatures += 1;
    let keys = std::slice::from_ref(&shared.key);
    let verified = verify(keys, &headers, body, sys::wall().as_second(), TOLERANCE);
    round.n_bad_signatures += u64::from(verified.is_err());
    Arc::clone(&round.seen)
}

/// Length of the head, and of the body that it announces.
fn find_head(bytes: &[u8]) -> Option<(usize, usize)> {
    let end = find(bytes, b"\r\n\r\n")? + 4;
    let head = &bytes[..end];
    let at = find(head, b"ontent-length: ").or_else(|| find(head, b"ontent-Length: "))? + 15;
    let digits = head[at..].iter().take_while(|byte| byte.is_ascii_digit());
    Some((end, digits.fold(0, |number, digit| 10 * number + usize::from(digit - b'0'))))
}

/// The number of the change in a body, counted from 0.
fn number_of(body: &[u8]) -> Option<usize> {
    let at = find(body, NUMBER_AFTER)? + NUMBER_AFTER.len();
    std::str::from_utf8(body.get(at..at + 9)?).ok()?.parse::<usize>().ok()?.checked_sub(1)
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, needle)
}
