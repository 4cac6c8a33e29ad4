//! Which databases there are, how they are, and what `_db_updates` says: the stand-in with the rules of three versions,
//! and the real CouchDB that `COUCHDB_URL` names.

use std::time::Duration;

use couch_hookd::couch::client::{Generation, Server, db_path};
use couch_hookd::couch::databases::{Info, Looker, PAGE, Walk};
use couch_hookd::couch::db_updates::{DbUpdates, Heard};
use couch_hookd::couch::look_into::look_into;
use couch_hookd::error::Kind;
use couch_hookd::pure::checkpoint::Mark;
use couch_hookd::pure::database_events::Found;
use couch_hookd::pure::hint::Hint;
use couch_hookd::pure::seq::Seq;
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::sys;
use crossbeam_channel::{Receiver, bounded};
use http::Method;

use crate::couch::{World, each_world};
use crate::host::WAIT_MAX;

const FLAVOURS: [Flavour; 3] = [Flavour::V1, Flavour::V2, Flavour::V3];

fn names(server: &Server) -> Vec<String> {
    let (mut walk, mut all) = (Walk::default(), Vec::new());
    loop {
        let page = walk.next(server).unwrap();
        assert!(page.len() <= PAGE);
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

fn info(server: &Server, db: &str) -> Info {
    let mut looker = Looker::new(server);
    looker.find_out().unwrap();
    let infos = looker.infos(&[db.to_owned()]).unwrap();
    assert_eq!(infos.len(), 1);
    infos[0].1
}

#[test]
fn every_database_is_walked_over_once() {
    each_world("walk", |world| {
        let all = names(&world.server);
        assert!(all.contains(&world.db) && all.contains(&"_users".to_owned()), "{all:?}");
        let mut sorted = all.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(all, sorted);
    });
    for flavour in FLAVOURS {
        let couch = StandIn::start(Options::new(flavour)).unwrap();
        (0..2 * PAGE + 1).for_each(|n| couch.create_db(&format!("db{n:05}")));
        assert_eq!(names(&server(&couch)), couch.look(|seen| seen.databases()));
        let n_expected = if flavour == Flavour::V1 { 1 } else { 4 };
        assert_eq!(couch.n_requests("GET /_all_dbs"), n_expected, "{flavour:?}");
    }
}

#[test]
fn what_changes_looks_different_and_what_is_idle_does_not() {
    each_world("info", |world| {
        let (server, db) = (&world.server, &world.db);
        let empty = info(server, db);
        assert_eq!(info(server, db), empty);
        world.put("a", "{}");
        if world.generation == Generation::One {
            // It writes to the disk a second later, which makes the file longer.
            let path = db_path(db, &["_ensure_full_commit"]);
            server.request(&Method::POST, &path, Some("{}"), &[]).unwrap();
        }
        let one = info(server, db);
        assert_ne!(one, empty);
        assert_eq!(info(server, db), one);
        let mut looker = Looker::new(server);
        looker.find_out().unwrap();
        let asked: Vec<String> = [db, "hookd-it/none", "_users"].map(str::to_owned).to_vec();
        let infos = looker.infos(&asked).unwrap();
        assert_eq!(infos[..2], [(db.clone(), one), ("hookd-it/none".to_owned(), Info::Gone)]);
        assert!(matches!(infos[2], (_, Info::Seen(_))));
        assert_eq!(looker.is_single(), world.generation == Generation::One);
    });
}

/// Nothing else tells it on 1.x and 2.x: neither `update_seq` nor the counts (CONTRACT §6).
#[test]
fn a_database_made_again_with_the_same_documents_looks_different() {
    each_world("again", |world| {
        let fill = || ["a", "b", "c"].iter().for_each(|id| world.put(id, "{\"x\":1}"));
        fill();
        let mark = db_path(&world.db, &["_local/couch-hookd"]);
        world.server.put_json(&mark, "{\"mark\":\"5f0c5f0c5f0c5f0c5f0c5f0c5f0c5f0c\"}").unwrap();
        let before = info(&world.server, &world.db);
        world.create();
        fill();
        assert_ne!(info(&world.server, &world.db), before);
    });
}

#[test]
fn a_lowered_limit_and_a_server_without_dbs_info_are_coped_with() {
    let couch = StandIn::start(Options::new(Flavour::V2)).unwrap();
    let all: Vec<String> = (0..40).map(|n| format!("db{n}")).collect();
    all.iter().for_each(|db| couch.create_db(db));
    let server = server(&couch);
    let mut looker = Looker::new(&server);
    looker.find_out().unwrap();
    let known = looker.infos(&all).unwrap();
    assert_eq!(known.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), all);
    couch.quirks(|quirks| quirks.dbs_info_max = Some(7));
    assert_eq!(looker.infos(&all).unwrap(), known);
    assert!((1..=7).contains(&looker.at_once()), "{}", looker.at_once());
    couch.quirks(|quirks| quirks.no_dbs_info = true);
    looker.find_out().unwrap();
    assert!(looker.is_single());
    let n_before = couch.n_requests("GET /db");
    assert_eq!(looker.infos(&all).unwrap(), known);
    assert_eq!(couch.n_requests("GET /db") - n_before, 40);
}

#[test]
fn spellings_of_a_cluster_are_few() {
    let couch = StandIn::start(Options::new(Flavour::V3)).unwrap();
    couch.create_db("a");
    couch.quirks(|quirks| quirks.n_other_nodes = 2);
    let server = server(&couch);
    let seen: std::collections::HashSet<String> =
        (0..50).map(|_| format!("{:?}", info(&server, "a"))).collect();
    assert!((2..=6).contains(&seen.len()), "{seen:?}");
}

/// Follows in a thread of its own, until dropped.
struct Following {
    heard: Receiver<Heard>,
    close: Option<Box<dyn FnOnce()>>,
}

impl Following {
    fn start(server: &Server) -> Following {
        let mut updates = DbUpdates::new(server);
        let closer = updates.closer();
        let (to, heard) = bounded(10_000);
        let body = move || updates.follow(&mut |heard| drop(to.send(heard))).unwrap();
        let thread = sys::spawn("updates", body).unwrap();
        let close = move || {
            closer.close();
            thread.join().unwrap();
        };
        Following { heard, close: Some(Box::new(close)) }
    }

    #[track_caller]
    fn until(&self, hints: &[Hint]) {
        let mut left = hints.to_vec();
        while !left.is_empty() {
            match self.heard.recv_timeout(WAIT_MAX) {
                Ok(Heard::Hint(hint)) => left.retain(|wanted| *wanted != hint),
                Ok(_) => {}
                Err(_) => panic!("expected {left:?}"),
            }
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.close.take().unwrap()();
    }
}

#[test]
fn what_happens_is_hinted_at() {
    each_world("updates", |world| {
        let World { server, db, .. } = &world;
        let makes_it =
            world.generation != Generation::One && !names(server).contains(&"_global_changes".to_owned());
        if makes_it {
            assert_eq!(DbUpdates::new(server).follow(&mut |_| {}).unwrap_err().kind(), Kind::NotFound);
            server.request(&Method::PUT, "/_global_changes", None, &[]).unwrap();
        }
        let following = Following::start(server);
        // What happens before it is open is not hinted at.
        let hinted = Heard::Hint(Hint::Updated(db.clone()));
        let is_open = || {
            let recent = || following.heard.recv_timeout(Duration::from_millis(300)).ok();
            std::iter::from_fn(recent).any(|heard| heard == hinted)
        };
        let mut puts = (0..100).map(|n| world.server.put_json(&db_path(db, &[&format!("w{n}")]), "{}"));
        assert!(puts.any(|_| is_open()), "nothing is hinted at");
        let other = format!("{db}/other");
        server.request(&Method::PUT, &db_path(&other, &[]), None, &[]).unwrap();
        world.put("a", "{}");
        following.until(&[Hint::Created(other.clone()), Hint::Updated(db.clone())]);
        server.request(&Method::DELETE, &db_path(&other, &[]), None, &[]).unwrap();
        world.put("_design/v", "{}");
        following.until(&[Hint::Deleted(other.clone()), Hint::Updated(db.clone())]);
        drop(following);
        if makes_it {
            server.request(&Method::DELETE, "/_global_changes", None, &[]).unwrap();
        }
    });
}

#[test]
fn after_a_lost_connection_it_goes_on_behind_the_last_hint() {
    let couch = StandIn::start(Options::new(Flavour::V3)).unwrap();
    couch.create_db("_global_changes");
    couch.create_db("a");
    let server = server(&couch);
    let mut updates = DbUpdates::new(&server);
    let (to, heard) = bounded(10_000);
    let follow = |updates: &mut DbUpdates| updates.follow(&mut |heard| drop(to.send(heard)));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| follow(&mut updates).unwrap_err().kind());
        assert!(couch.wait_until(WAIT_MAX, |seen| {
            seen.requests().any(|one| one.query.contains(&("feed".to_owned(), "continuous".to_owned())))
        }));
        couch.put("a", "1", &serde_json::json!({})).unwrap();
        while heard.recv_timeout(WAIT_MAX).unwrap() != Heard::Hint(Hint::Updated("a".to_owned())) {}
        couch.stop();
        assert_eq!(thread.join().unwrap(), Kind::Cut);
    });
    couch.create_db("b");
    assert_eq!(follow(&mut updates).unwrap_err().kind(), Kind::Unreachable);
    couch.start_again().unwrap();
    let closer = updates.closer();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| follow(&mut updates));
        let mut hinted = std::iter::repeat_with(|| heard.recv_timeout(WAIT_MAX).unwrap());
        assert_eq!(
            hinted.find(|heard| !matches!(heard, Heard::Opened { goes_on: true })),
            Some(Heard::Hint(Hint::Created("b".to_owned())))
        );
        closer.close();
        thread.join().unwrap().unwrap();
    });
}

/// 3.x closes the connection of an open request where there is no `_global_changes` (CONTRACT §7).
#[test]
fn nothing_to_follow_is_told_from_a_server_that_is_down() {
    let couch = StandIn::start(Options::new(Flavour::V3)).unwrap();
    let server = server(&couch);
    let mut updates = DbUpdates::new(&server);
    let mut follow = || updates.follow(&mut |_| {}).unwrap_err().kind();
    assert_eq!(follow(), Kind::NotFound);
    couch.create_db("_global_changes");
    let cut = |request: &str| Fault { request: request.to_owned(), times: 1, kind: FaultKind::Cut };
    couch.quirks(|quirks| quirks.faults.push(cut("feed=continuous")));
    assert_eq!(follow(), Kind::Unreachable);
    couch.delete_db("_global_changes");
    assert_eq!(follow(), Kind::NotFound);
    couch.stop();
    assert_eq!(follow(), Kind::Unreachable);
}

#[test]
fn only_admins_are_told() {
    for flavour in FLAVOURS {
        let admin = Some(("admin".to_owned(), "admin".to_owned()));
        let users = vec![("hookd".to_owned(), "hookd".to_owned())];
        let couch = StandIn::start(Options { admin, users, ..Options::new(flavour) }).unwrap();
        let world = World::new(&couch.url().replace("://", "://admin:admin@"), "rights");
        let url = couch.url().replace("://", "://hookd:hookd@");
        let member = Server::new(&crate::couch::hookd(&url)).unwrap();
        assert_eq!(DbUpdates::new(&member).follow(&mut |_| {}).unwrap_err().kind(), Kind::Forbidden);
        let walked = Walk::default().next(&member).map_err(|error| error.kind());
        match flavour {
            Flavour::V3 => assert_eq!(walked, Err(Kind::Forbidden)),
            _ => assert!(walked.unwrap().contains(&world.db)),
        }
    }
}

fn server(couch: &StandIn) -> Server {
    Server::new(&crate::couch::hookd(&couch.url())).unwrap()
}

#[test]
fn a_look_into_a_database_tells_what_happened_since_the_last() {
    each_world("look", |world| {
        let World { server, db, generation, .. } = &world;
        let look = |known: Option<&Found>| {
            let known = known.map(|found| (found.mark, found.through.clone()));
            look_into(server, *generation, db, known.as_ref(), &sys::sleep).unwrap().unwrap()
        };
        let told = |found: &Found| (found.has_changed, found.ddocs.clone());
        let nothing = (false, Vec::new());
        world.put("a", "{}");
        let first = look(None);
        let idle = look(Some(&first));
        assert_eq!((idle.mark, told(&idle)), (first.mark, nothing.clone()));
        world.put("b", "{}");
        let second = look(Some(&first));
        assert_eq!((second.mark, told(&second)), (first.mark, (true, Vec::new())));
        assert_eq!(told(&look(Some(&second))), nothing, "from where the look before ended");
        world.put("_design/v", "{}");
        let third = look(Some(&second));
        assert_eq!(told(&third), (true, vec!["_design/v".to_owned()]));
        // More than a page, the design document somewhere among them.
        for n in 0..130 {
            world.put(&format!("many{n}"), "{}");
            if n == 60 {
                world.put("_design/w", "{}");
            }
        }
        let fourth = look(Some(&third));
        assert_eq!(told(&fourth), (true, vec!["_design/w".to_owned()]));
        assert_eq!(told(&look(Some(&fourth))), nothing);
        world.create();
        let again = look(Some(&fourth));
        assert_ne!(again.mark, fourth.mark);
        server.request(&Method::DELETE, &db_path(db, &[]), None, &[]).unwrap();
        let known = (again.mark, again.through);
        assert_eq!(look_into(server, *generation, db, Some(&known), &sys::sleep).unwrap(), None);
    });
}

/// 1.x: what a killed server lost is written anew under numbers that were used before.
#[test]
fn a_look_sees_that_a_server_went_back() {
    let couch = StandIn::start(Options::new(Flavour::V1)).unwrap();
    couch.create_db("a");
    let server = server(&couch);
    let look = |known: Option<&(Mark, Seq)>| {
        look_into(&server, Generation::One, "a", known, &sys::sleep).unwrap().unwrap()
    };
    look(None);
    (0..5).for_each(|n| drop(couch.put("a", &n.to_string(), &serde_json::json!({})).unwrap()));
    let Found { mark, through, .. } = look(None);
    assert_eq!(couch.crash_losing("a", 3), 3);
    couch.start_again().unwrap();
    let after = look(Some(&(mark, through)));
    assert!(after.has_changed && after.through.as_json() == "2", "{after:?}");
}
