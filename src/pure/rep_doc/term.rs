//! Erlang terms as CouchDB reads options of sockets: `[{keepalive, true}, {nodelay, false}]`.
//!
//! Guarantees to take what `couch_util:parse_term/1` takes of lists, tuples, atoms, numbers, strings and binaries, and
//! to refuse the rest with a reason that holds nothing of the text. Leaves maps, funs and records alone: no option
//! has one.

/// Brackets within brackets; no option has so many.
const DEPTH_MAX: usize = 16;

/// One term. Texts of strings and binaries are not kept: no option has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Term {
    Atom(String),
    Integer,
    Float,
    Text,
    List(Vec<Term>),
    Tuple(Vec<Term>),
}

/// Reads one term, all of the text.
///
/// # Errors
/// What was found instead, fit for `got …`.
pub(crate) fn parse(text: &str) -> Result<Term, &'static str> {
    let mut reader = Reader { rest: text };
    let term = reader.term(0)?;
    reader.skip_blanks();
    match reader.rest.is_empty() {
        true => Ok(term),
        false => Err("one with something behind it"),
    }
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    /// Blanks, and comments from `%` to the end of the line; one that ends with the text stays, since CouchDB puts a
    /// full stop behind the text.
    fn skip_blanks(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            match self.rest.strip_prefix('%').and_then(|comment| comment.split_once('\n')) {
                Some((_, rest)) => self.rest = rest,
                None => return,
            }
        }
    }

    fn take(&mut self, token: &str) -> bool {
        self.skip_blanks();
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn term(&mut self, depth: usize) -> Result<Term, &'static str> {
        if depth > DEPTH_MAX {
            return Err("one with too many brackets");
        }
        if self.take("[") {
            return self.until("]", depth).map(Term::List);
        }
        if self.take("{") {
            return self.until("}", depth).map(Term::Tuple);
        }
        if self.take("<<") {
            self.skip_blanks();
            if self.rest.starts_with('"') {
                self.quoted('"')?;
            }
            return if self.take(">>") { Ok(Term::Text) } else { Err("one with a binary that has no end") };
        }
        match self.rest.chars().next() {
            None => Err("one that ends too early"),
            Some('"') => self.quoted('"').map(|_| Term::Text),
            Some('\'') => self.quoted('\'').map(Term::Atom),
            Some(first) if first.is_ascii_lowercase() => {
                Ok(Term::Atom(self.word(|c| c.is_alphanumeric() || c == '_' || c == '@')))
            }
            Some(first) if first.is_ascii_digit() || first == '-' || first == '+' => self.number(),
            Some(first) if first.is_ascii_uppercase() || first == '_' => {
                Err("one with a word that does not begin in lower case")
            }
            Some(':' | '=') => Err("one with `:` or `=` between name and value"),
            Some(_) => Err("one with something that is no Erlang"),
        }
    }

    /// Terms separated by commas, up to a bracket.
    fn until(&mut self, end: &str, depth: usize) -> Result<Vec<Term>, &'static str> {
        let mut terms = Vec::new();
        if self.take(end) {
            return Ok(terms);
        }
        loop {
            terms.push(self.term(depth + 1)?);
            if self.take(end) {
                return Ok(terms);
            }
            if !self.take(",") {
                self.skip_blanks();
                return Err(match self.rest.chars().next() {
                    None => "one that ends too early",
                    Some(':' | '=') => "one with `:` or `=` between name and value",
                    Some(_) => "one with a comma or a bracket missing",
                });
            }
        }
    }

    fn quoted(&mut self, quote: char) -> Result<String, &'static str> {
        let mut chars = self.rest.char_indices().skip(1);
        let mut text = String::new();
        while let Some((at, char)) = chars.next() {
            match char {
                '\\' => text.extend(chars.next().map(|(_, char)| char)),
                char if char == quote => {
                    self.rest = &self.rest[at + 1..];
                    return Ok(text);
                }
                char => text.push(char),
            }
        }
        Err("one with a quote that has no end")
    }

    fn number(&mut self) -> Result<Term, &'static str> {
        let sign = usize::from(self.rest.starts_with(['-', '+']));
        self.rest = &self.rest[sign..];
        match self.word(|c| c.is_ascii_alphanumeric() || "._#".contains(c)) {
            word if word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.') => Ok(Term::Float),
            word if word.starts_with(|c: char| c.is_ascii_digit()) => Ok(Term::Integer),
            _ => Err("one with a sign without a number"),
        }
    }

    fn word(&mut self, belongs: impl Fn(char) -> bool) -> String {
        let end = self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word.to_owned()
    }
}
