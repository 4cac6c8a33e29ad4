//! How the stand-in spells places in a feed: integers on 1.x, opaque strings since.
//!
//! Guarantees that a row's seq, given back, goes on right behind that row, whatever the order of the next
//! answer; that strings differ from call to call for one and the same place; and what each version does with a
//! place in a database that was deleted and made again (CONTRACT §6).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::standin::couch::Flavour;
use crate::standin::docs::Refusal;
use crate::standin::store::{Database, Place};

/// What real seqs begin with behind their number; a constant of Erlang's external format.
const PREFIX: &str = "g1AAAA";

/// Spells a place as JSON.
///
/// `salt` makes two spellings of one place differ. `with_ids` is false for what 2.x gives for `limit=0` and in
/// `GET /db`: without the ids of the shards.
pub(crate) fn spell(flavour: Flavour, incarnation: u64, place: &Place, salt: u32, with_ids: bool) -> String {
    let sum: u64 = place.0.iter().sum();
    if flavour == Flavour::V1 {
        return sum.to_string();
    }
    let mut bytes = salt.to_be_bytes().to_vec();
    bytes.push(u8::from(with_ids));
    bytes.extend(incarnation.to_be_bytes());
    for at in &place.0 {
        bytes.extend(at.to_be_bytes());
    }
    bytes.push(check_byte(&bytes));
    format!("\"{sum}-{PREFIX}{}\"", URL_SAFE_NO_PAD.encode(bytes))
}

/// Reads `since=`.
///
/// # Errors
/// The version's answer to what is no seq.
pub(crate) fn read(db: &Database, flavour: Flavour, since: &str) -> Result<Place, Refusal> {
    if since == "now" {
        return Ok(db.end());
    }
    if flavour == Flavour::V1 {
        return since.parse::<u64>().map(|seq| Place(vec![seq])).map_err(|_| unknown(flavour));
    }
    if since == "0" || since.is_empty() {
        return Ok(db.beginning());
    }
    let malformed = || unknown(flavour);
    let (with_ids, incarnation, place) = decode(since.trim_matches('"')).ok_or_else(malformed)?;
    if incarnation != db.incarnation {
        // Without the shards' ids 2.x takes the numbers for its own: none of the rows come.
        return Ok(if flavour == Flavour::V2 && !with_ids { db.end() } else { db.beginning() });
    }
    if place.0.len() == db.end().0.len() { Ok(place) } else { Err(malformed()) }
}

/// What is said of a seq that is none of this server's.
pub(crate) fn unknown(flavour: Flavour) -> Refusal {
    match flavour {
        Flavour::V1 => Refusal::new(500, "unknown_error", "badarg"),
        _ => Refusal::new(400, "bad_request", "Malformed sequence supplied in 'since' parameter."),
    }
}

fn decode(since: &str) -> Option<(bool, u64, Place)> {
    let opaque = since.split_once('-').map_or(since, |(_, opaque)| opaque).strip_prefix(PREFIX)?;
    let bytes = URL_SAFE_NO_PAD.decode(opaque).ok()?;
    let (check, bytes) = bytes.split_last()?;
    if *check != check_byte(bytes) || bytes.len() < 13 {
        return None;
    }
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let place = Place(bytes[13..].chunks(8).map(number).collect());
    Some((bytes[4] == 1, number(&bytes[5..13]), place))
}

fn check_byte(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0x5a, |check, byte| check.rotate_left(3) ^ byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standin::docs::Incoming;

    fn filled(flavour: Flavour, incarnation: u64) -> Database {
        let mut db = Database::new(flavour, if flavour == Flavour::V1 { 1 } else { 3 }, incarnation, 0);
        for id in ["a", "b", "c", "d", "e"] {
            db.write(id, Incoming::parse("{}").unwrap()).unwrap();
        }
        db
    }

    fn since(seq: &str) -> &str {
        seq.trim_matches('"')
    }

    #[test]
    fn one_place_has_many_spellings_and_each_leads_back() {
        let db = filled(Flavour::V3, 1);
        let (one, two) =
            (spell(Flavour::V3, 1, &db.end(), 1, true), spell(Flavour::V3, 1, &db.end(), 2, true));
        assert_ne!(one, two);
        assert!(one.starts_with("\"5-g1AAAA"), "{one}");
        for seq in [one, two] {
            assert_eq!(read(&db, Flavour::V3, since(&seq)), Ok(db.end()));
        }
        let old = filled(Flavour::V1, 1);
        assert_eq!(spell(Flavour::V1, 1, &old.end(), 1, true), "5");
    }

    #[test]
    fn what_is_no_seq_gets_the_versions_answer() {
        assert_eq!(read(&filled(Flavour::V1, 1), Flavour::V1, "garbage").unwrap_err().status, 500);
        assert_eq!(read(&filled(Flavour::V1, 1), Flavour::V1, "99"), Ok(Place(vec![99])));
        for garbage in ["garbage", "5", "5-g1AAAAxyz", "5-g1AAAA"] {
            assert_eq!(
                read(&filled(Flavour::V2, 1), Flavour::V2, garbage).unwrap_err().status,
                400,
                "{garbage}"
            );
        }
    }

    #[test]
    fn a_place_in_an_earlier_database_leads_where_the_version_says() {
        for (flavour, with_ids, from_beginning) in [
            (Flavour::V3, true, true),
            (Flavour::V3, false, true),
            (Flavour::V2, true, true),
            (Flavour::V2, false, false),
        ] {
            let old = filled(flavour, 1);
            let seq = spell(flavour, 1, &old.end(), 1, with_ids);
            let new = filled(flavour, 2);
            let expected = if from_beginning { new.beginning() } else { new.end() };
            assert_eq!(read(&new, flavour, since(&seq)), Ok(expected), "{flavour:?} {with_ids}");
        }
    }
}
