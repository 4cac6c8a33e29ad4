//! Reading and writing CouchDB: the stand-in with the rules of three versions, and the real one that `COUCHDB_URL`
//! (with an admin's login) names.

use std::ops::ControlFlow;
use std::time::Duration;

use couch_hookd::config::{Filter, Hookd, LogFormat};
use couch_hookd::couch::client::{Generation, Server, db_path};
use couch_hookd::couch::feed::{Feed, FeedEnd, FeedKind, FeedRequest, resolve_now};
use couch_hookd::couch::{local_docs, state_db};
use couch_hookd::error::Kind;
use couch_hookd::pure::changes::{Item, RowDoc};
use couch_hookd::pure::checkpoint::{Checkpoint, StateKey};
use couch_hookd::pure::secret::Secret;
use couch_hookd::pure::seq::Seq;
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::sys;
use http::Method;

/// A server and a database of its own, deleted at the end.
pub(crate) struct World {
    pub(crate) url: String,
    pub(crate) server: Server,
    pub(crate) generation: Generation,
    pub(crate) db: String,
}

/// Checks with every server there is.
pub(crate) fn each_world(name: &str, check: impl Fn(World)) {
    for flavour in [Flavour::V1, Flavour::V2, Flavour::V3] {
        let admin = Some(("admin".to_owned(), "admin".to_owned()));
        let standin = StandIn::start(Options { admin, ..Options::new(flavour) }).unwrap();
        check(World::new(&standin.url().replace("://", "://admin:admin@"), name));
    }
    if let Ok(url) = std::env::var("COUCHDB_URL") {
        check(World::new(&url, name));
    }
}

impl World {
    pub(crate) fn new(url: &str, name: &str) -> World {
        let server = Server::new(&hookd(url)).unwrap();
        let generation = server.welcome().unwrap().generation;
        // Needs encoding: such names exist.
        let db = format!("hookd-it/{name}-{}", std::process::id());
        let world = World { url: url.to_owned(), server, generation, db };
        world.create();
        world
    }

    /// Deletes the database, if there is one, and makes it again.
    pub(crate) fn create(&self) {
        let _ = self.server.request(&Method::DELETE, &db_path(&self.db, &[]), None, &[]);
        self.server.request(&Method::PUT, &db_path(&self.db, &[]), None, &[]).unwrap();
    }

    pub(crate) fn put(&self, id: &str, body: &str) {
        self.server.put_json(&db_path(&self.db, &[id]), body).unwrap();
    }

    fn request(&self, since: &Seq, kind: FeedKind) -> FeedRequest {
        FeedRequest {
            db: self.db.clone(),
            since: since.clone(),
            kind,
            filter: None,
            include_docs: true,
            conflicts: false,
            doc_bytes_max: 10_000,
            keeps_lines: false,
            silence: Some(Duration::from_secs(20)),
            deadline: None,
        }
    }

    fn page(&self, since: &Seq) -> FeedRequest {
        self.request(since, FeedKind::Page { limit: 100 })
    }

    /// Ids in the order of the alphabet, and the last position.
    fn read(&self, request: &FeedRequest) -> (Vec<String>, Seq) {
        let mut ids = Vec::new();
        let mut last = None;
        let end = Feed::new(&self.server).read(request, &mut |items| {
            for item in items.drain(..) {
                match item {
                    Item::Row(row) => ids.push(row.id),
                    Item::End { last_seq, .. } => last = last_seq,
                    Item::Fault { .. } => panic!("faults are errors"),
                }
            }
            ControlFlow::Continue(())
        });
        assert_eq!(end.unwrap(), FeedEnd::Complete);
        ids.sort();
        (ids, last.unwrap())
    }

    fn fails(&self, request: &FeedRequest) -> Kind {
        Feed::new(&self.server).read(request, &mut |_| ControlFlow::Continue(())).unwrap_err().kind()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.server.request(&Method::DELETE, &db_path(&self.db, &[]), None, &[]);
    }
}

/// From a URL, with a login in it or without.
pub(crate) fn hookd(url: &str) -> Hookd {
    let (scheme, rest) = url.split_once("://").unwrap();
    let (login, host) = rest.split_once('@').unwrap_or(("", rest));
    let login = login.split_once(':');
    Hookd {
        couchdb_url: format!("{scheme}://{}", host.trim_end_matches('/')),
        username: login.map(|(username, _)| username.to_owned()),
        password: login.map(|(_, password)| Secret::new(password)),
        ca_file: None,
        state_db: "couch_hookd".to_owned(),
        log_level: log::LevelFilter::Info,
        log_format: LogFormat::Text,
        public_url: None,
        register: false,
        checkpoint_interval: Duration::from_secs(5),
        deliveries_max: 64,
        dead_letters_max: 10_000,
        guard: couch_hookd::pure::guard::Guard::off(),
        feed_rotate: Duration::from_secs(60),
        feed_timeout: Duration::from_secs(60),
        feed_connections: 16,
        sweep_interval: Duration::from_secs(60),
        sweep_rate: 40,
    }
}

#[test]
fn pages_lines_filters_and_faults() {
    each_world("feed", |world| {
        assert!(world.server.nodes().unwrap() >= 1);
        let doc = r#""n":12345678901234567890123,"a":"größe"}"#;
        let start = resolve_now(&world.server, &world.db, world.generation).unwrap();
        for id in ["a", "b/c", "_design/d"] {
            world.put(id, &format!("{{\"type\":\"{id}\",{doc}"));
        }
        for since in [&start, &Seq::zero()] {
            let (ids, last) = world.read(&world.page(since));
            assert_eq!(ids, ["_design/d", "a", "b/c"]);
            assert!(world.read(&world.page(&last)).0.is_empty());
        }
        let timeout = Duration::from_millis(300);
        let (ids, last) = world.read(&world.request(&start, FeedKind::Continuous { timeout }));
        assert_eq!(ids.len(), 3);
        assert!(world.read(&world.request(&last, FeedKind::Continuous { timeout })).0.is_empty());
        let now = resolve_now(&world.server, &world.db, world.generation).unwrap();
        assert!(world.read(&world.page(&now)).0.is_empty());

        let filtered = |filter| FeedRequest { filter: Some(filter), ..world.page(&start) };
        let (ids, _) = world.read(&filtered(Filter::DocIds(vec!["b/c".to_owned(), "none".to_owned()])));
        assert_eq!(ids, ["b/c"]);
        let selector = filtered(Filter::Selector("{\"type\":\"a\"}".to_owned()));
        match world.generation {
            Generation::One => assert_eq!(world.fails(&selector), Kind::BadRequest),
            _ => assert_eq!(world.read(&selector).0, ["a"]),
        }
        let missing = |name: &str| Filter::Function { name: name.to_owned(), params: Vec::new() };
        assert_eq!(world.fails(&filtered(missing("d/none"))), Kind::BadRequest);
        assert_eq!(world.fails(&filtered(missing("none/none"))), Kind::BadRequest);
        let garbage = Seq::from_json("\"garbage\"").unwrap();
        assert_eq!(world.fails(&world.page(&garbage)), Kind::BadSince);
        let gone = FeedRequest { db: "hookd-it/none".to_owned(), ..world.page(&start) };
        assert_eq!(world.fails(&gone), Kind::NotFound);
    });
}

#[test]
fn documents_come_as_couchdb_spells_them() {
    each_world("bytes", |world| {
        let body = r#"{"z":1.0,"n":12345678901234567890123,"u":" ","a":{"y":[],"b":null}}"#;
        world.put("a", body);
        let reply = world.server.request(&Method::GET, &db_path(&world.db, &["a"]), None, &[]).unwrap();
        world.put("long", &format!("{{\"x\":\"{}\"}}", "y".repeat(20_000)));
        let mut docs = Vec::new();
        Feed::new(&world.server)
            .read(&world.page(&Seq::zero()), &mut |items| {
                docs.extend(items.drain(..).filter_map(|item| match item {
                    Item::Row(row) => Some((row.id, row.doc)),
                    _ => None,
                }));
                ControlFlow::Continue(())
            })
            .unwrap();
        docs.sort_by(|a, b| a.0.cmp(&b.0));
        match &docs[..] {
            [(_, RowDoc::Json(json)), (_, RowDoc::TooLarge { bytes })] => {
                assert_eq!(json.get(), String::from_utf8(reply.body).unwrap().trim_end());
                assert!(*bytes > 20_000);
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_row_comes_at_once_and_a_waiting_feed_can_be_closed() {
    each_world("close", |world| {
        let mut feed = Feed::new(&world.server);
        let closer = feed.closer();
        let request = world.request(&Seq::zero(), FeedKind::Continuous { timeout: Duration::from_secs(15) });
        let (tell, told) = crossbeam_channel::bounded(16);
        let thread = sys::spawn("test", move || {
            let end = feed.read(&request, &mut |items| {
                tell.send(items.len()).unwrap();
                ControlFlow::Continue(())
            });
            assert_eq!(end.unwrap(), FeedEnd::Closed);
        })
        .unwrap();
        world.put("a", "{}");
        let started = sys::now();
        told.recv_timeout(Duration::from_secs(5)).unwrap();
        closer.close();
        thread.join().unwrap();
        assert!(sys::now() - started < Duration::from_secs(5));
    });
}

#[test]
fn marks_and_checkpoints_live_and_die_with_their_database() {
    each_world("marks", |world| {
        let key = StateKey::new([7; 32]);
        let open = |known: Option<&_>| {
            let pause = |_| sys::sleep(Duration::from_millis(10));
            local_docs::open(&world.server, world.generation, &world.db, "w", &key, known, None, &pause)
                .unwrap()
        };
        world.put("a", "{}");
        let first = open(None);
        assert!(!first.recreated && first.checkpoint.is_none());
        assert_eq!(first.doc_count, 1);
        let (_, last) = world.read(&world.page(&Seq::zero()));
        let mut checkpoint = Checkpoint {
            through_seq: last,
            mark: first.mark,
            delivered: Vec::new(),
            time: sys::wall(),
            version: "0.1.0".to_owned(),
            seek: None,
        };
        let mut rev = None;
        for _ in 0..3 {
            let write = |rev: Option<&str>| {
                local_docs::write_checkpoint(&world.server, &world.db, "w", &key, &checkpoint, rev)
            };
            rev = Some(write(rev.as_deref()).unwrap());
        }
        let again = open(Some(&first.mark));
        assert_eq!(again.checkpoint.as_ref(), Some(&checkpoint));
        assert_eq!((again.mark, again.checkpoint_rev, again.recreated), (first.mark, rev.clone(), false));

        world.create();
        let stale =
            local_docs::write_checkpoint(&world.server, &world.db, "w", &key, &checkpoint, rev.as_deref());
        assert_eq!(stale.is_err(), world.generation == Generation::One, "2.x and 3.x take a stale `_rev`");
        let new = open(Some(&first.mark));
        assert!(new.recreated && new.mark != first.mark && new.checkpoint.is_none());
        checkpoint.mark = new.mark;
        checkpoint.through_seq = resolve_now(&world.server, &world.db, world.generation).unwrap();
        let rev = new.checkpoint_rev.as_deref();
        local_docs::write_checkpoint(&world.server, &world.db, "w", &key, &checkpoint, rev).unwrap();
        let settled = open(Some(&new.mark));
        assert_eq!((settled.checkpoint, settled.recreated), (Some(checkpoint), false));
    });
}

#[test]
fn our_own_database_is_closed_and_keeps_records_and_letters() {
    each_world("state", |world| {
        let key = state_db::ensure(&world.server, &world.db, Some("hookd")).unwrap();
        assert_eq!(state_db::ensure(&world.server, &world.db, Some("hookd")).unwrap(), key);
        let mut stranger = hookd(&world.url);
        stranger.username = None;
        let path = db_path(&world.db, &["couch-hookd"]);
        let error = Server::new(&stranger).unwrap().request(&Method::GET, &path, None, &[]).unwrap_err();
        assert!(matches!(error.kind(), Kind::Forbidden | Kind::Unauthorized), "{error}");

        let (server, db) = (&world.server, &world.db);
        let mut record = state_db::WebhookRecord { fingerprint: "9a".to_owned(), ..Default::default() };
        record.rev = Some(state_db::write_record(server, db, "w", &record).unwrap());
        assert_eq!(state_db::read_record(server, db, "w").unwrap(), Some(record));
        let letter = |n: u32| state_db::DeadLetter {
            id: format!("msg_{n:032x}"),
            webhook: "w".to_owned(),
            db: "orders".to_owned(),
            mark: couch_hookd::pure::checkpoint::Mark::new([1; 16]),
            doc_id: format!("order:{n}"),
            rev: "1-a".to_owned(),
            revs: vec!["1-a".to_owned()],
            seq: None,
            event_type: "document.updated".to_owned(),
            class: match n {
                7 => state_db::DeadLetterClass::Suspect,
                _ => state_db::DeadLetterClass::Refused,
            },
            status: Some(422),
            answer: "no".to_owned(),
            attempts: 3,
            first_attempt_at: sys::wall(),
            stored_at: sys::wall(),
            payload: None,
        };
        for n in 0..205 {
            state_db::store_dead_letter(server, db, &letter(n)).unwrap();
        }
        state_db::store_dead_letter(server, db, &letter(7)).unwrap();
        assert_eq!(state_db::count_dead_letters(server, db, "w", 1_000).unwrap(), 205);
        assert_eq!(state_db::count_dead_letters(server, db, "v", 1_000).unwrap(), 0);
        assert_eq!(state_db::list_suspects(server, db, "w").unwrap()[0].doc_id, "order:7");
        state_db::delete_dead_letter(server, db, &letter(7).id).unwrap();
        assert!(!state_db::dead_letter_exists(server, db, &letter(7).id).unwrap());
        state_db::store_dead_letter(server, db, &letter(7)).unwrap();
        assert!(state_db::dead_letter_exists(server, db, &letter(7).id).unwrap());
    });
}
