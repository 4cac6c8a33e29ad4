//! Finds where JSON values end, in any split of their bytes.
//!
//! Guarantees that each byte is looked at once, strings in bulk, and that memory is bounded. Does not check that what it
//! passes is JSON: it counts brackets and knows strings, no more. Checking is left to who parses the result.

use memchr::memchr2;

/// The longest row without its `doc`, and the longest head of a page, in bytes: a document with 1,000 conflicts
/// has a row of 60 KiB under `style=all_docs`.
pub(crate) const ENVELOPE_BYTES_MAX: usize = 1024 * 1024;

/// Reads one JSON object, except the value of one member of it.
#[derive(Debug)]
pub(crate) struct Object {
    /// The member whose value somebody else reads and replaces.
    special: &'static [u8],
    /// What was read: the object with other values in the place of the special one's.
    pub(crate) text: Vec<u8>,
    /// Open brackets; 1 directly within the object.
    depth: u32,
    string: StringState,
    /// Directly within the object: whether a member's name comes next, or is being read.
    in_name: bool,
    /// How much of the name agrees with `special`.
    name: Name,
    /// How often the special member came.
    pub(crate) n_special: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StringState {
    Outside,
    Inside,
    /// After a backslash.
    Escaped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    /// So many bytes, all as in the special name.
    Agrees(usize),
    Differs,
}

pub(crate) enum Event {
    /// All bytes are taken, the object goes on.
    More,
    /// The colon of the special member is taken; its value comes next.
    Special,
    /// The closing bracket is taken.
    Closed,
}

impl Object {
    pub(crate) fn new(special: &'static [u8]) -> Object {
        Object {
            special,
            text: Vec::new(),
            depth: 0,
            string: StringState::Outside,
            in_name: false,
            name: Name::Differs,
            n_special: 0,
        }
    }

    /// The opening bracket was taken.
    pub(crate) fn start(&mut self) {
        self.text.clear();
        self.text.push(b'{');
        self.depth = 1;
        self.string = StringState::Outside;
        self.in_name = true;
        self.name = Name::Agrees(0);
        self.n_special = 0;
    }

    /// Takes bytes up to the first event; says how many.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(usize, Event), TooLong> {
        let (n_taken, event) = self.scan(bytes);
        if self.text.len() + n_taken > ENVELOPE_BYTES_MAX {
            return Err(TooLong);
        }
        self.text.extend_from_slice(&bytes[..n_taken]);
        Ok((n_taken, event))
    }

    fn scan(&mut self, bytes: &[u8]) -> (usize, Event) {
        let mut at = 0;
        while at < bytes.len() {
            if self.string != StringState::Outside {
                let end = skip_string(&mut self.string, bytes, at);
                if self.depth == 1 && self.in_name {
                    let is_closed = self.string == StringState::Outside;
                    self.compare_name(&bytes[at..end - usize::from(is_closed)]);
                }
                at = end;
                continue;
            }
            let byte = bytes[at];
            at += 1;
            match byte {
                b'"' => self.string = StringState::Inside,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at, Event::Closed);
                    }
                }
                b',' if self.depth == 1 => {
                    self.in_name = true;
                    self.name = Name::Agrees(0);
                }
                b':' if self.depth == 1 && self.in_name => {
                    self.in_name = false;
                    if self.name == Name::Agrees(self.special.len()) {
                        self.n_special += 1;
                        return (at, Event::Special);
                    }
                }
                _ => {}
            }
        }
        (at, Event::More)
    }

    fn compare_name(&mut self, part: &[u8]) {
        self.name = match self.name {
            Name::Agrees(n_bytes) if self.special[n_bytes..].starts_with(part) => {
                Name::Agrees(n_bytes + part.len())
            }
            _ => Name::Differs,
        };
    }
}

/// The object has more than [`ENVELOPE_BYTES_MAX`] bytes without its special value.
#[derive(Debug)]
pub(crate) struct TooLong;

/// A value that was read.
#[derive(Debug, PartialEq)]
pub(crate) enum Kept {
    /// Its bytes, not checked to be JSON.
    Text(Vec<u8>),
    /// It was dropped.
    TooLong {
        /// How long it was.
        n_bytes: u64,
    },
}

/// Reads one JSON value, keeping it as text unless it is too long.
#[derive(Debug)]
pub(crate) struct Text {
    bytes_max: usize,
    text: Vec<u8>,
    n_bytes: u64,
    /// Open brackets.
    depth: u32,
    string: StringState,
    /// Whether its first byte was seen.
    is_started: bool,
}

impl Text {
    pub(crate) fn new(bytes_max: usize) -> Text {
        Text {
            bytes_max,
            text: Vec::new(),
            n_bytes: 0,
            depth: 0,
            string: StringState::Outside,
            is_started: false,
        }
    }

    pub(crate) fn start(&mut self) {
        *self = Text::new(self.bytes_max);
    }

    /// Whether a part of the value was taken.
    pub(crate) fn is_started(&self) -> bool {
        self.is_started
    }

    /// The longest value that is kept, in bytes.
    pub(crate) fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Takes bytes up to the end of the value; says how many, and whether it has ended.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> (usize, bool) {
        let n_blanks = if self.is_started {
            0
        } else {
            bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')).count()
        };
        let (n_taken, is_done) = self.scan(&bytes[n_blanks..]);
        let part = &bytes[n_blanks..n_blanks + n_taken];
        self.is_started |= n_taken > 0;
        self.n_bytes += part.len() as u64;
        if self.n_bytes <= self.bytes_max as u64 {
            self.text.extend_from_slice(part);
        } else {
            self.text = Vec::new();
        }
        (n_blanks + n_taken, is_done)
    }

    fn scan(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut at = 0;
        while at < bytes.len() {
            if self.string != StringState::Outside {
                at = skip_string(&mut self.string, bytes, at);
                if self.string == StringState::Outside && self.depth == 0 {
                    return (at, true);
                }
                continue;
            }
            match bytes[at] {
                b'"' => self.string = StringState::Inside,
                b'{' | b'[' => self.depth += 1,
                // A bare number or word ends before what follows it.
                b'}' | b']' | b',' if self.depth == 0 => return (at, true),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
            at += 1;
        }
        (at, false)
    }

    /// Memory held, in bytes.
    #[cfg(test)]
    pub(crate) fn text_capacity(&self) -> usize {
        self.text.capacity()
    }

    /// What was read.
    pub(crate) fn take(&mut self) -> Kept {
        if self.n_bytes > self.bytes_max as u64 {
            return Kept::TooLong { n_bytes: self.n_bytes };
        }
        Kept::Text(std::mem::take(&mut self.text))
    }
}

/// Goes on from `at` within a string; gives the place behind its closing quote, or the end of the bytes.
fn skip_string(state: &mut StringState, bytes: &[u8], mut at: usize) -> usize {
    loop {
        if *state == StringState::Escaped {
            if at == bytes.len() {
                return at;
            }
            at += 1;
            *state = StringState::Inside;
        }
        match memchr2(b'"', b'\\', &bytes[at..]) {
            None => return bytes.len(),
            Some(n_bytes) => {
                at += n_bytes + 1;
                if bytes[at - 1] == b'"' {
                    *state = StringState::Outside;
                    return at;
                }
                *state = StringState::Escaped;
            }
        }
    }
}
