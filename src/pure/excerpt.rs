//! The start of somebody else's text, for an error or a log line.
//!
//! Guarantees one line of at most so many characters, whatever the bytes are. Does not redact.

/// The first `n_chars` characters; line breaks and what cannot be seen are escaped, invalid UTF-8 is U+FFFD.
pub fn excerpt(text: &[u8], n_chars: usize) -> String {
    // No character has more than four bytes.
    let head = String::from_utf8_lossy(&text[..text.len().min(4 * n_chars)]);
    head.chars().take(n_chars).fold(String::new(), |mut shown, char| {
        match char {
            '"' | '\'' | '\\' => shown.push(char),
            _ => shown.extend(char.escape_debug()),
        }
        shown
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_line_of_a_known_length() {
        assert_eq!(excerpt(b"it's \"x\\y\"\r\n\x00\x1b[0m", 60), "it's \"x\\y\"\\r\\n\\0\\u{1b}[0m");
        assert_eq!(excerpt("größe✓".as_bytes(), 4), "größ");
        assert_eq!(excerpt(b"a\xffb", 3), "a\u{fffd}b");
        assert_eq!(excerpt("\u{2028}".as_bytes(), 1), "\\u{2028}");
    }
}
