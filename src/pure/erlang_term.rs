//! Erlang terms as CouchDB prints them (`io_lib:format("~p")`): what the reasons of failed replications are made of.
//!
//! Reads one term from the start of a text, over several lines, cut off or not: `{a,"b",[<<"c">>|...]}`. Guarantees
//! to end for every text, with no more than `DEPTH_MAX` levels on the stack. Never decides what may be shown.

/// Deeper terms are taken for unreadable. Real ones have about a dozen levels.
const DEPTH_MAX: usize = 24;

/// A term.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// `econnrefused`, `'EXIT'`: without the quotes.
    Atom(String),
    /// `503`, `-1.5e3`, as written.
    Number(String),
    /// `"text"`: escapes resolved, literals that were wrapped over lines joined.
    Text(String),
    /// `<<"text">>`, likewise.
    Binary(String),
    /// `<<1,2,3>>`: bytes that are no printable text.
    Bytes,
    /// `<0.12.0>`, `#Ref<0.1.2.3>`, `#Fun<m.0.1>`.
    Opaque(String),
    /// `{a,b}`.
    Tuple(Vec<Term>),
    /// `[a,b]`, `[a|b]`.
    List(Vec<Term>),
    /// `#{a => b}`: keys and values by turns.
    Map(Vec<Term>),
    /// `...`, or where the text ends too early: from here on nothing is known.
    Cut,
}

impl Term {
    /// The text of a string or a binary.
    pub fn text(&self) -> Option<&str> {
        match self {
            Term::Text(text) | Term::Binary(text) => Some(text),
            _ => None,
        }
    }

    /// The name of an atom.
    pub fn atom(&self) -> Option<&str> {
        match self {
            Term::Atom(name) => Some(name),
            _ => None,
        }
    }
}

/// Reads the term at the start of `text`; gives it and what follows. `None` where no term is.
pub fn read(text: &str) -> Option<(Term, &str)> {
    let mut reader = Reader { rest: text, depth: 0 };
    let term = reader.term()?;
    Some((term, reader.rest))
}

struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Reader<'a> {
    fn term(&mut self) -> Option<Term> {
        self.blanks();
        let Some(first) = self.rest.chars().next() else { return Some(Term::Cut) };
        match first {
            '{' => self.items(1, '}').map(Term::Tuple),
            '[' => self.items(1, ']').map(Term::List),
            '"' => Some(self.texts().map_or(Term::Cut, Term::Text)),
            '\'' => Some(self.quoted('\'').map_or(Term::Cut, Term::Atom)),
            '#' if self.rest.starts_with("#{") => self.items(2, '}').map(Term::Map),
            '<' if self.rest.starts_with("<<") => Some(self.binary()),
            '<' => self.opaque("<"),
            '#' => ["#Ref<", "#Fun<", "#Port<"].iter().find_map(|start| self.opaque(start)),
            '.' if self.take("...") => Some(Term::Cut),
            '-' | '0'..='9' => {
                let number = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+' | '#');
                Some(Term::Number(self.take_while(number).to_owned()))
            }
            'a'..='z' => {
                let name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '@');
                Some(Term::Atom(self.take_while(name).to_owned()))
            }
            _ => None,
        }
    }

    /// What stands between an opening of `n` bytes and `close`.
    fn items(&mut self, n: usize, close: char) -> Option<Vec<Term>> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return None;
        }
        self.rest = &self.rest[n..];
        let mut items = Vec::new();
        loop {
            self.blanks();
            if self.take("=>") || self.take(",") || self.take("|") {
                continue;
            }
            match self.rest.chars().next() {
                None => {
                    items.push(Term::Cut);
                    break;
                }
                Some(found) if found == close => {
                    self.rest = &self.rest[1..];
                    break;
                }
                Some(_) => items.push(self.term()?),
            }
        }
        self.depth -= 1;
        Some(items)
    }

    /// Literals that follow each other are one text: long ones are wrapped so.
    fn texts(&mut self) -> Option<String> {
        let mut text = self.quoted('"')?;
        loop {
            let before = self.rest;
            self.blanks();
            if !self.rest.starts_with('"') {
                self.rest = before;
                return Some(text);
            }
            text += &self.quoted('"')?;
        }
    }

    /// A quoted text; `None` when it does not end, and then nothing is left to read.
    fn quoted(&mut self, quote: char) -> Option<String> {
        let inside = &std::mem::take(&mut self.rest)[1..];
        let mut text = String::new();
        let mut chars = inside.char_indices();
        while let Some((at, char)) = chars.next() {
            match char {
                _ if char == quote => {
                    self.rest = &inside[at + 1..];
                    return Some(text);
                }
                '\\' => match chars.next()?.1 {
                    'n' | 't' | 'r' | 'v' | 'f' | 'b' | 's' | 'e' | 'd' => text.push(' '),
                    'x' => {
                        // `\x{20AC}`: which character it was does not matter to anybody.
                        if chars.next()?.1 == '{' {
                            chars.find(|(_, char)| *char == '}')?;
                        }
                        text.push('\u{fffd}');
                    }
                    other => text.push(other),
                },
                other => text.push(other),
            }
        }
        None
    }

    fn binary(&mut self) -> Term {
        self.rest = &self.rest[2..];
        self.blanks();
        let text =
            if self.rest.starts_with('"') { self.texts().map(Term::Binary) } else { Some(Term::Bytes) };
        let empty = self.rest.starts_with(">>") && text == Some(Term::Bytes);
        // `/utf8`, `...`, the numbers.
        self.rest = self.rest.find(">>").map_or("", |at| &self.rest[at + 2..]);
        if empty { Term::Binary(String::new()) } else { text.unwrap_or(Term::Cut) }
    }

    fn opaque(&mut self, start: &str) -> Option<Term> {
        let inside = self.rest.strip_prefix(start)?;
        let end = inside.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_')))?;
        self.rest = inside[end..].strip_prefix('>')?;
        Some(Term::Opaque(format!("{start}{}>", &inside[..end])))
    }

    fn blanks(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let (taken, rest) = self.rest.split_at(self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len()));
        self.rest = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: expect_test::Expect) {
        let found = read(text).map(|(term, rest)| format!("{term:?} {rest:?}"));
        expected.assert_eq(&found.unwrap_or_else(|| "no term".to_owned()));
    }

    #[test]
    fn terms_are_read_over_lines_and_joined() {
        check(
            "{a,\n  'B c',[<<\"x\">>|-1.5e3],\"aa\"\n   \"bb\"} tail",
            expect_test::expect![[
                r#"Tuple([Atom("a"), Atom("B c"), List([Binary("x"), Number("-1.5e3")]), Text("aabb")]) " tail""#
            ]],
        );
        check(
            "[<0.12.0>,#Ref<0.1.2>,#Fun<m.0.1>,#{k => \"v\"},<<>>,<<1,2>>,<<\"a\"/utf8>>,<<\"b\"...>>]",
            expect_test::expect![[
                r##"List([Opaque("<0.12.0>"), Opaque("#Ref<0.1.2>"), Opaque("#Fun<m.0.1>"), Map([Atom("k"), Text("v")]), Binary(""), Bytes, Binary("a"), Binary("b")]) """##
            ]],
        );
        check(
            r#"{"q\"\\\n","\x{20AC}u"}"#,
            expect_test::expect![[r#"Tuple([Text("q\"\\ "), Text("�u")]) """#]],
        );
    }

    #[test]
    fn what_is_cut_off_ends_as_cut() {
        check("{a,...}", expect_test::expect![[r#"Tuple([Atom("a"), Cut]) """#]]);
        check("[a|...]", expect_test::expect![[r#"List([Atom("a"), Cut]) """#]]);
        check("{a,[b,", expect_test::expect![[r#"Tuple([Atom("a"), List([Atom("b"), Cut]), Cut]) """#]]);
        check("{a,\"unfinished", expect_test::expect![[r#"Tuple([Atom("a"), Cut, Cut]) """#]]);
        check("{a,<<\"unfinished", expect_test::expect![[r#"Tuple([Atom("a"), Cut, Cut]) """#]]);
        check("{a,\"unfinished\\", expect_test::expect![[r#"Tuple([Atom("a"), Cut, Cut]) """#]]);
        check("{a,\"unfinished\\x{2", expect_test::expect![[r#"Tuple([Atom("a"), Cut, Cut]) """#]]);
        check("", expect_test::expect![[r#"Cut """#]]);
    }

    #[test]
    fn what_is_no_term_is_none() {
        for text in ["Text", "{\"a\":1}", "{a,Text}", "<http://h>", "#Ref<u:p@h>", "?", "{a;b}"] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(read(&"{".repeat(100_000)), None);
        assert!(read(&format!("{}{}", "{".repeat(DEPTH_MAX), "}".repeat(DEPTH_MAX))).is_some());
    }
}
