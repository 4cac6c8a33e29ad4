//! The kill test: thousands of writes, a hundred SIGKILLs through a real BEAM, nothing lost.

use couch_hookd::standin::couch::Flavour;

use crate::kills::{Size, StoodIn, kill_through_the_beam};
use crate::world::{Ini, couch, long, receiver};

/// A third of the 20,000 writes and 100 kills that all versions share.
fn kills_stood_in(flavour: Flavour) {
    let size = match long() {
        true => Size { writes: 6_700, docs: 670, kills: 34, life: (50, 900) },
        false => Size { writes: 800, docs: 80, kills: 4, life: (50, 500) },
    };
    let couch = couch(flavour, &["orders"]);
    let receiver = receiver();
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let name = format!("{flavour:?} stood in for");
    let numbers = kill_through_the_beam(&name, &ini, &StoodIn(&couch), "orders", &receiver, size);
    println!("{numbers}");
}

#[test]
fn kills_through_a_real_beam_on_1_7_lose_nothing() {
    if !super::beam_is_there() {
        return;
    }
    kills_stood_in(Flavour::V1);
}

#[test]
fn kills_through_a_real_beam_on_2_2_lose_nothing() {
    if !super::beam_is_there() {
        return;
    }
    kills_stood_in(Flavour::V2);
}

#[test]
fn kills_through_a_real_beam_on_3_5_lose_nothing() {
    if !super::beam_is_there() {
        return;
    }
    kills_stood_in(Flavour::V3);
}
