//! What follows an answer, seen from outside: outages, suspicion, dead letters, `Retry-After`, 410, redirects.

use couch_hookd::standin::couch::Flavour;

use crate::world::{World, write};

#[test]
fn everything_is_told_once_and_in_order() {
    let world = World::start(Flavour::V3, "");
    write(&world.couch, "orders", 50);
    write(&world.couch, "orders", 50);
    world.wait_for_all("orders");
}
