//! Signatures of webhook requests: Standard Webhooks 1.0.0, symmetric (`v1`).
//!
//! Signs with every secret given and, for receivers and for `signature verify`, says *why* a signature does not
//! match, the usual mistakes by name. Comparison takes constant time. No secret ever stands in what is said.
//! Leaves to others: which secrets, what the time is, and the other headers.
//!
//! Signed is `ID.TIMESTAMP.BODY`, the body byte for byte; the header is `v1,` and base64 of the HMAC-SHA256,
//! several separated by blanks. Source: standard-webhooks/standard-webhooks, `spec/standard-webhooks.md`, 1.0.0.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD, URL_SAFE};
use ring::hmac;

/// What every symmetric secret begins with.
pub const SECRET_PREFIX: &str = "whsec_";

/// How far `webhook-timestamp` may be from the receiver's clock, as the reference libraries have it.
pub const TOLERANCE: Duration = Duration::from_secs(300);

/// Fewest bytes of a secret, decoded. Source: the specification, "Secrets".
const KEY_BYTES_MIN: usize = 24;
/// Most bytes of a secret, decoded.
const KEY_BYTES_MAX: usize = 64;

/// Padding may be left out: some dashboards cut it, and the bytes are the same.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A signing secret, decoded.
#[derive(Clone)]
pub struct Key {
    bytes: Vec<u8>,
    /// The same, made ready once.
    ready: hmac::Key,
    /// As it was written, to recognise receivers and senders that forget to decode it.
    text: String,
}

impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        self.text == other.text
    }
}

impl Eq for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(***)")
    }
}

impl Key {
    /// Reads `whsec_` and base64 of 24 to 64 bytes; blanks around it are dropped, missing padding is accepted.
    ///
    /// # Errors
    /// What is wrong with it, without showing it.
    pub fn parse(text: &str) -> Result<Key, String> {
        let text = text.trim();
        let Some(encoded) = text.strip_prefix(SECRET_PREFIX) else {
            return Err(match text {
                "" => "expected `whsec_` and base64 of 24 to 64 bytes, got nothing".to_owned(),
                _ if text.starts_with("whsk_") || text.starts_with("whpk_") => {
                    "an asymmetric key (`whsk_`, `whpk_`) is not supported, expected one that begins with `whsec_`"
                        .to_owned()
                }
                _ if LENIENT.decode(text).is_ok_and(|bytes| bytes.len() >= KEY_BYTES_MIN) => {
                    "expected `whsec_` in front of the base64".to_owned()
                }
                _ => "expected `whsec_` and base64 of 24 to 64 bytes, got something without `whsec_`".to_owned(),
            });
        };
        let bytes = LENIENT.decode(encoded).map_err(|_| {
            if encoded.contains(['-', '_']) && URL_SAFE.decode(pad(encoded)).is_ok() {
                "expected standard base64 after `whsec_`, got the URL-safe kind: write `+` for `-` and `/` for `_`"
                    .to_owned()
            } else {
                format!("expected base64 after `whsec_`, got {} characters that are not", encoded.chars().count())
            }
        })?;
        if !(KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&bytes.len()) {
            return Err(format!(
                "expected {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes in base64 after `whsec_`, got {}",
                bytes.len()
            ));
        }
        let ready = hmac::Key::new(hmac::HMAC_SHA256, &bytes);
        Ok(Key { bytes, ready, text: text.to_owned() })
    }
}

/// Writes a new secret from random bytes: `whsec_` and 44 characters of base64.
pub fn new_secret(bytes: [u8; 32]) -> String {
    format!("{SECRET_PREFIX}{}", STANDARD.encode(bytes))
}

/// The value of `webhook-signature`: `v1,…`, one for each key in their order, separated by blanks.
///
/// `timestamp` is in seconds since 1970, the value of `webhook-timestamp` of this attempt. `None` without keys.
pub fn sign(keys: &[Key], id: &str, timestamp: i64, body: &[u8]) -> Option<String> {
    let timestamp = timestamp.to_string();
    let parts = [id.as_bytes(), b".", timestamp.as_bytes(), b".", body];
    // Of one signature, with the blank behind it.
    const BYTES: usize = 48;
    let mut signatures = String::with_capacity(BYTES * keys.len());
    for key in keys {
        signatures.push_str(if signatures.is_empty() { "v1," } else { " v1," });
        STANDARD.encode_string(mac(&key.ready, &parts), &mut signatures);
    }
    (!signatures.is_empty()).then_some(signatures)
}

/// Why a request is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// There is no secret to verify with.
    NoSecret,
    /// `webhook-id`, `webhook-timestamp` or `webhook-signature` is not there.
    NoHeader(&'static str),
    /// `webhook-timestamp` is not a number of seconds.
    BadTimestamp {
        /// What stood there, at most 40 characters.
        found: String,
    },
    /// Signed rightly, but longer ago than the tolerance: a replay, or clocks that differ.
    TooOld {
        /// Age in seconds.
        seconds: u64,
    },
    /// Signed rightly, but in the future: clocks differ.
    TooNew {
        /// How far ahead, in seconds.
        seconds: u64,
    },
    /// `webhook-signature` holds no `v1,…`.
    NoV1,
    /// A `v1,` is there, but what follows is not base64 of 32 bytes.
    NotBase64,
    /// The body was changed, or signed with another secret; the mistake when it is a known one.
    Different(Option<Mistake>),
}

/// A usual mistake, recognised because the signature matches when we make it, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// The text after `whsec_` was the key, not the bytes it stands for.
    SecretNotDecoded,
    /// The whole text, `whsec_` included, was the key.
    PrefixInSecret,
    /// The body that was signed ends in a line break, this one does not.
    NewlineLost,
    /// This body ends in a line break, the one that was signed does not.
    NewlineAdded,
    /// The body that was signed was the same JSON with other blanks: parsed and written again.
    JsonRewritten,
    /// Signed was `TIMESTAMP.ID.BODY`.
    IdAndTimestampSwapped,
    /// Signed was the body alone.
    BodyOnly,
    /// Signed was `TIMESTAMP.BODY`.
    IdForgotten,
    /// Signed was `ID.BODY`.
    TimestampForgotten,
    /// The signature is written in hexadecimal.
    Hexadecimal,
    /// The signature is written in URL-safe base64.
    UrlSafeBase64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::NoSecret => f.write_str("no secret to verify with"),
            Mismatch::NoHeader(name) => write!(f, "no header `{name}`"),
            Mismatch::BadTimestamp { found } => {
                write!(f, "header `webhook-timestamp`: expected seconds since 1970, got `{found}`")
            }
            Mismatch::TooOld { seconds } => {
                write!(f, "signed {seconds} s ago: a replay, or the two clocks differ")
            }
            Mismatch::TooNew { seconds } => {
                write!(f, "signed {seconds} s in the future: the two clocks differ")
            }
            Mismatch::NoV1 => {
                f.write_str("header `webhook-signature`: expected `v1,` and base64, found no `v1,`")
            }
            Mismatch::NotBase64 => {
                f.write_str("header `webhook-signature`: expected base64 of 32 bytes after `v1,`")
            }
            Mismatch::Different(None) => {
                f.write_str(
                    "the signature does not match: the id, the timestamp or the body was changed, or another secret signed it",
                )
            }
            Mismatch::Different(Some(mistake)) => write!(f, "the signature does not match: {mistake}"),
        }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mistake::SecretNotDecoded => {
                "the secret was used as text; decode the base64 after `whsec_` first"
            }
            Mistake::PrefixInSecret => {
                "the secret was used with its `whsec_`; drop that and decode the base64 after it"
            }
            Mistake::NewlineLost => "the body that was signed ends in a line break that is missing here",
            Mistake::NewlineAdded => "a line break was added to the body after it was signed",
            Mistake::JsonRewritten => {
                "the body was parsed and written again with other blanks; take the bytes as they came"
            }
            Mistake::IdAndTimestampSwapped => "id and timestamp were swapped; sign `ID.TIMESTAMP.BODY`",
            Mistake::BodyOnly => "the body alone was signed; sign `ID.TIMESTAMP.BODY`",
            Mistake::IdForgotten => "the id was left out; sign `ID.TIMESTAMP.BODY`",
            Mistake::TimestampForgotten => "the timestamp was left out; sign `ID.TIMESTAMP.BODY`",
            Mistake::Hexadecimal => "it is written in hexadecimal; write it in base64",
            Mistake::UrlSafeBase64 => "it is written in URL-safe base64; write `+` and `/`, not `-` and `_`",
        })
    }
}

/// Verifies a request as a receiver must: one signature by one of the keys is enough.
///
/// `headers` are names in any case and values. The signature is judged before the age, so that an old request
/// with a wrong secret is told the more useful of the two. `now_seconds` is the receiver's clock.
///
/// # Errors
/// Why it is not accepted.
pub fn verify(
    keys: &[Key],
    headers: &[(String, String)],
    body: &[u8],
    now_seconds: i64,
    tolerance: Duration,
) -> Result<(), Mismatch> {
    if keys.is_empty() {
        return Err(Mismatch::NoSecret);
    }
    let id = header(headers, "webhook-id")?;
    let written = header(headers, "webhook-timestamp")?;
    let signatures = header(headers, "webhook-signature")?;
    let Ok(timestamp) = written.parse::<i64>() else {
        return Err(Mismatch::BadTimestamp { found: written.chars().take(40).collect() });
    };
    let v1: Vec<&str> = signatures.split_whitespace().filter_map(|one| one.strip_prefix("v1,")).collect();
    if v1.is_empty() {
        return Err(Mismatch::NoV1);
    }
    let decoded: Vec<Vec<u8>> = v1.iter().filter_map(|text| LENIENT.decode(text).ok()).collect();
    let signed = Signed { id, timestamp: written, body };
    if !decoded.iter().any(|given| keys.iter().any(|key| matches(&key.bytes, &signed.right(), given))) {
        let mistake = find_mistake(keys, &signed, &v1, &decoded);
        let readable = decoded.iter().any(|given| given.len() == 32);
        return Err(if mistake.is_none() && !readable {
            Mismatch::NotBase64
        } else {
            Mismatch::Different(mistake)
        });
    }
    let age = now_seconds.saturating_sub(timestamp);
    let limit = i64::try_from(tolerance.as_secs()).unwrap_or(i64::MAX);
    if age > limit {
        return Err(Mismatch::TooOld { seconds: age.unsigned_abs() });
    }
    if age < -limit {
        return Err(Mismatch::TooNew { seconds: age.unsigned_abs() });
    }
    Ok(())
}

/// What goes into a signature.
struct Signed<'a> {
    id: &'a str,
    timestamp: &'a str,
    body: &'a [u8],
}

impl<'a> Signed<'a> {
    fn right(&self) -> Vec<&'a [u8]> {
        vec![self.id.as_bytes(), b".", self.timestamp.as_bytes(), b".", self.body]
    }

    fn with_body<'b>(&'b self, body: &'b [u8]) -> Vec<&'b [u8]> {
        vec![self.id.as_bytes(), b".", self.timestamp.as_bytes(), b".", body]
    }
}

/// Makes each usual mistake and looks whether the signature then matches.
fn find_mistake(keys: &[Key], signed: &Signed<'_>, v1: &[&str], decoded: &[Vec<u8>]) -> Option<Mistake> {
    let hit = |key: &[u8], parts: &[&[u8]]| decoded.iter().any(|given| matches(key, parts, given));
    let (id, timestamp, body) = (signed.id.as_bytes(), signed.timestamp.as_bytes(), signed.body);
    let with_newline = [body, b"\n"].concat();
    let without_newline = body.strip_suffix(b"\n").unwrap_or(body);
    let without_newline = without_newline.strip_suffix(b"\r").unwrap_or(without_newline);
    let rewritten = [rewrite_json(body, "", ""), rewrite_json(body, " ", " "), rewrite_json(body, "", " ")];
    for key in keys {
        let bytes = key.bytes.as_slice();
        let undecoded = key.text.strip_prefix(SECRET_PREFIX).unwrap_or(&key.text);
        let candidates = [
            (Mistake::SecretNotDecoded, undecoded.as_bytes(), signed.right()),
            (Mistake::PrefixInSecret, key.text.as_bytes(), signed.right()),
            (Mistake::NewlineLost, bytes, signed.with_body(&with_newline)),
            (Mistake::NewlineAdded, bytes, signed.with_body(without_newline)),
            (Mistake::IdAndTimestampSwapped, bytes, vec![timestamp, b".", id, b".", body]),
            (Mistake::BodyOnly, bytes, vec![body]),
            (Mistake::IdForgotten, bytes, vec![timestamp, b".", body]),
            (Mistake::TimestampForgotten, bytes, vec![id, b".", body]),
        ];
        if let Some((mistake, ..)) = candidates.iter().find(|(_, key, parts)| hit(key, parts)) {
            return Some(*mistake);
        }
        if rewritten.iter().any(|body| hit(bytes, &signed.with_body(body))) {
            return Some(Mistake::JsonRewritten);
        }
        let url_safe = v1.iter().filter_map(|text| URL_SAFE.decode(pad(text)).ok());
        if url_safe.into_iter().any(|given| matches(bytes, &signed.right(), &given)) {
            return Some(Mistake::UrlSafeBase64);
        }
        let hexadecimal = v1.iter().filter_map(|text| from_hex(text));
        if hexadecimal.into_iter().any(|given| matches(bytes, &signed.right(), &given)) {
            return Some(Mistake::Hexadecimal);
        }
    }
    None
}

fn header<'a>(headers: &'a [(String, String)], name: &'static str) -> Result<&'a str, Mismatch> {
    let found = headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.trim()).filter(|value| !value.is_empty()).ok_or(Mismatch::NoHeader(name))
}

fn mac(key: &hmac::Key, parts: &[&[u8]]) -> hmac::Tag {
    let mut mac = hmac::Context::with_key(key);
    for part in parts {
        mac.update(part);
    }
    mac.sign()
}

fn matches(key: &[u8], parts: &[&[u8]], given: &[u8]) -> bool {
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, key), &parts.concat(), given).is_ok()
}

/// The same JSON with other blanks: `after_comma` and `after_colon` outside of strings, nothing else.
fn rewrite_json(body: &[u8], after_comma: &str, after_colon: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + body.len() / 8);
    let (mut inside, mut escaped) = (false, false);
    for &byte in body {
        if inside {
            out.push(byte);
            inside = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            b',' => out.extend([&b","[..], after_comma.as_bytes()].concat()),
            b':' => out.extend([&b":"[..], after_colon.as_bytes()].concat()),
            _ => {
                out.push(byte);
                inside = byte == b'"';
            }
        }
    }
    out
}

fn pad(text: &str) -> String {
    format!("{text}{}", &"==="[..(4 - text.len() % 4) % 4])
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.chars().map(|digit| digit.to_digit(16).map(|v| v as u8)).collect::<Option<_>>()?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vector of the reference libraries' own tests.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const TIME: i64 = 1_614_265_330;
    const BODY: &[u8] = b"{\"test\": 2432232314}";
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    fn key(text: &str) -> Key {
        Key::parse(text).unwrap()
    }

    fn other() -> Key {
        key(&new_secret([7; 32]))
    }

    fn headers(signature: &str) -> Vec<(String, String)> {
        [("Webhook-Id", ID), ("webhook-timestamp", "1614265330"), ("WEBHOOK-SIGNATURE", signature)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec()
    }

    #[track_caller]
    fn check(signature: &str, body: &[u8], expected: &str) {
        let result = verify(&[key(SECRET)], &headers(signature), body, TIME, TOLERANCE);
        let said = result.map_or_else(|why| why.to_string(), |()| "ok".to_owned());
        assert!(said.contains(expected), "expected `{expected}`, got `{said}`");
        assert!(!said.contains("MfKQ9"), "a secret was said");
    }

    fn made(key: &[u8], parts: &[&[u8]]) -> String {
        format!("v1,{}", STANDARD.encode(mac(&hmac::Key::new(hmac::HMAC_SHA256, key), parts)))
    }

    #[test]
    fn signs_as_the_reference_libraries_do() {
        assert_eq!(sign(&[key(SECRET)], ID, TIME, BODY).as_deref(), Some(SIGNATURE));
        let both = sign(&[other(), key(SECRET)], ID, TIME, BODY).unwrap();
        assert_eq!(both.split(' ').nth(1), Some(SIGNATURE));
        assert_eq!(sign(&[], ID, TIME, BODY), None);
    }

    #[test]
    fn one_signature_by_one_key_is_enough() {
        check(SIGNATURE, BODY, "ok");
        check(&format!("v2,abc v1,AAAA {SIGNATURE}"), BODY, "ok");
        check(SIGNATURE.trim_end_matches('='), BODY, "ok");
        let rotated = verify(&[other(), key(SECRET)], &headers(SIGNATURE), BODY, TIME, TOLERANCE);
        assert_eq!(rotated, Ok(()));
    }

    #[test]
    fn says_which_usual_mistake_was_made() {
        let secret = key(SECRET);
        let k = secret.bytes.as_slice();
        let (id, time) = (ID.as_bytes(), b"1614265330".as_slice());
        check(&made(&SECRET.as_bytes()[6..], &[id, b".", time, b".", BODY]), BODY, "decode the base64");
        check(&made(SECRET.as_bytes(), &[id, b".", time, b".", BODY]), BODY, "with its `whsec_`");
        check(SIGNATURE, b"{\"test\": 2432232314}\n", "line break was added");
        check(&made(k, &[id, b".", time, b".", BODY, b"\n"]), BODY, "missing here");
        check(SIGNATURE, b"{\"test\":2432232314}", "written again");
        check(&made(k, &[time, b".", id, b".", BODY]), BODY, "swapped");
        check(&made(k, &[BODY]), BODY, "body alone");
        check(&made(k, &[time, b".", BODY]), BODY, "id was left out");
        check(&made(k, &[id, b".", BODY]), BODY, "timestamp was left out");
        check(&SIGNATURE.replace('+', "-").replace('/', "_"), BODY, "URL-safe");
        let bytes = STANDARD.decode(&SIGNATURE[3..]).unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        check(&format!("v1,{hex}"), BODY, "hexadecimal");
        check(SIGNATURE, b"{\"test\": 2432232315}", "body was changed, or another secret");
        check("v1a,xxx", BODY, "found no `v1,`");
        check("v1,???", BODY, "expected base64 of 32 bytes");
    }

    #[test]
    fn says_what_is_wrong_with_headers_and_clocks() {
        let keys = [key(SECRET)];
        for missing in 0..3 {
            let mut headers = headers(SIGNATURE);
            headers.remove(missing);
            let name = ["webhook-id", "webhook-timestamp", "webhook-signature"][missing];
            assert_eq!(verify(&keys, &headers, BODY, TIME, TOLERANCE), Err(Mismatch::NoHeader(name)));
        }
        let at = |now| verify(&keys, &headers(SIGNATURE), BODY, now, TOLERANCE);
        assert_eq!(at(TIME + 300), Ok(()));
        assert_eq!(at(TIME + 301), Err(Mismatch::TooOld { seconds: 301 }));
        assert_eq!(at(TIME - 300), Ok(()));
        assert_eq!(at(TIME - 301), Err(Mismatch::TooNew { seconds: 301 }));
        let mut odd = headers(SIGNATURE);
        odd[1].1 = "2021-02-25".to_owned();
        let said = verify(&keys, &odd, BODY, TIME, TOLERANCE).unwrap_err().to_string();
        assert_eq!(said, "header `webhook-timestamp`: expected seconds since 1970, got `2021-02-25`");
        assert_eq!(verify(&[], &odd, BODY, TIME, TOLERANCE), Err(Mismatch::NoSecret));
    }

    #[test]
    fn secrets_are_read_or_refused_without_being_shown() {
        #[track_caller]
        fn refused(text: &str, expected: &str) {
            let said = Key::parse(text).unwrap_err();
            assert!(said.contains(expected), "expected `{expected}`, got `{said}`");
            assert!(!said.contains("c3VwZXJz"), "a secret was said: {said}");
        }
        assert_eq!(key(&format!("  {SECRET}\n")), key(SECRET));
        assert_eq!(new_secret([0; 32]).len(), 6 + 44);
        assert_eq!(key(new_secret([9; 32]).trim_end_matches('=')).bytes, [9; 32]);
        assert_eq!(key(&format!("whsec_{}", STANDARD.encode([1; 64]))).bytes.len(), 64);
        refused("", "got nothing");
        refused("c3VwZXJzZWNyZXQ", "without `whsec_`");
        refused(&STANDARD.encode([b'c'; 32]), "in front of");
        refused("whsec_c3VwZXJzZWNyZXQ=", "got 11");
        refused(&format!("whsec_{}", STANDARD.encode([1; 65])), "got 65");
        refused("whsec_c3VwZXJz ZWNyZXQ!", "expected base64");
        refused(&format!("whsec_{}", URL_SAFE.encode([0xfb; 32])), "URL-safe");
        refused("whsk_c3VwZXJzZWNyZXQ=", "asymmetric");
        assert_eq!(format!("{:?}", key(SECRET)), "Key(***)");
    }
}
