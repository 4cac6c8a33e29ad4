//! The databases of a pattern divided among daemons (`lease = shared`): which are ours now.
//!
//! Every daemon that shares a webhook is a *member*: it holds a lease of its own (`pure::lease`), under a name that no other
//! member and no earlier membership of its own has. A database belongs to the member that `pure::rendezvous` gives it
//! of those that are there. Each member says in its lease whom it *knows*: for whom it tells nothing any more that is
//! theirs.
//!
//! Guarantees, as far as leases do: a database is told by one member at a time. For a member is asked for its
//! databases only by those that were there before it, and takes none before each of these knows it; those that came
//! later looked after they had written and so see it, until it is gone. A member that has not renewed its lease for a TTL
//! is taken out under its `_rev`: then its own time was over before.
//!
//! Leaves to others: the clock, requests, and to end what is told of a database that is ours no more
//! ([`Members::on_settled`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::pure::lease::{Doc, Times};
use crate::pure::rendezvous;

/// Another member as CouchDB shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its lease.
    pub doc: Doc,
    /// For whom it tells nothing any more.
    pub knows: BTreeSet<String>,
}

/// What is whose at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Division {
    me: String,
    /// Others that are there, and whether they may still tell what is ours.
    others: BTreeMap<String, bool>,
    /// Whether anything is ours at all.
    in_force: bool,
}

impl Division {
    /// Whether a database is ours to tell.
    pub fn is_mine(&self, db: &str) -> bool {
        self.in_force
            && self
                .others
                .iter()
                .all(|(other, in_doubt)| !in_doubt && rendezvous::is_before(&self.me, other, db))
    }

    /// Whether all that is ours is ours by now: nobody may still be telling some of it.
    pub fn is_settled(&self) -> bool {
        self.in_force && self.others.values().all(|in_doubt| !in_doubt)
    }

    /// Our own name among the members.
    pub fn me(&self) -> &str {
        &self.me
    }

    /// All that are there, we among them.
    pub fn members(&self) -> BTreeSet<String> {
        self.others.keys().cloned().chain([self.me.clone()]).collect()
    }
}

/// One member's view of all.
#[derive(Debug)]
pub struct Members {
    me: String,
    times: Times,
    /// Others that are there: since when their lease stands still.
    seen: BTreeMap<String, (Member, Duration)>,
    patience: Duration,
    /// Those that were there before us; `None` before the first look.
    elders: Option<BTreeSet<String>>,
    division: Division,
    generation: u64,
    /// Those for whom everything is let go.
    knows: BTreeSet<String>,
}

impl Members {
    /// A member that holds its lease from now on. `jitter` in `0.0..1.0`: who takes out others first.
    pub fn new(me: &str, times: Times, jitter: f64) -> Members {
        Members {
            me: me.to_owned(),
            times,
            seen: BTreeMap::new(),
            patience: times.ttl.mul_f64(jitter / 10.0),
            elders: None,
            division: Division::default(),
            generation: 0,
            knows: BTreeSet::new(),
        }
    }

    /// All members but us, asked for after our own lease was written.
    pub fn on_look(&mut self, found: BTreeMap<String, Member>, now: Duration) {
        let mut seen = BTreeMap::new();
        for (id, member) in found.into_iter().filter(|(id, member)| *id != self.me && !member.doc.released) {
            let since = match self.seen.get(&id) {
                Some((before, since)) if before.doc.rev == member.doc.rev => *since,
                _ => now,
            };
            seen.insert(id, (member, since));
        }
        self.seen = seen;
        let elders = self.elders.get_or_insert_with(|| self.seen.keys().cloned().collect());
        let in_doubt = |id: &String, member: &Member| elders.contains(id) && !member.knows.contains(&self.me);
        let others = self.seen.iter().map(|(id, (member, _))| (id.clone(), in_doubt(id, member)));
        let division = Division { me: self.me.clone(), others: others.collect(), in_force: true };
        self.knows.retain(|id| division.others.contains_key(id));
        if division != self.division {
            self.division = division;
            self.generation += 1;
        }
    }

    /// Nothing is told any more that was not ours at this generation.
    pub fn on_settled(&mut self, generation: u64) {
        if generation == self.generation {
            self.knows = self.division.others.keys().cloned().collect();
        }
    }

    /// Changes whenever something may be ours that was not, or the other way round.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What is whose now.
    pub fn division(&self) -> &Division {
        &self.division
    }

    /// What our lease has to say.
    pub fn knows(&self) -> &BTreeSet<String> {
        &self.knows
    }

    /// Members that are to be taken out, over which `_rev`.
    pub fn to_expel(&self, now: Duration) -> Vec<(String, String)> {
        let stands = |since: Duration, member: &Member| {
            now >= since + self.times.ttl.max(member.doc.ttl) + self.patience
        };
        let still = self.seen.iter().filter(|(_, (member, since))| stands(*since, member));
        still.map(|(id, (member, _))| (id.clone(), member.doc.rev.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pure::size::size;

    const TTL: Duration = Duration::from_secs(15);
    const DBS: usize = 40;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// CouchDB: members' leases, with what each knows.
    #[derive(Default)]
    struct Couch {
        members: BTreeMap<String, Member>,
        n_writes: u64,
    }

    impl Couch {
        /// Whether it was taken; `None` for `knows` takes the member out.
        fn write(&mut self, id: &str, over: Option<&str>, knows: Option<BTreeSet<String>>) -> Option<String> {
            if self.members.get(id).map(|member| member.doc.rev.as_str()) != over {
                return None;
            }
            self.n_writes += 1;
            let rev = format!("{}-x", self.n_writes);
            match knows {
                None => drop(self.members.remove(id)),
                Some(knows) => {
                    let holder = id.to_owned();
                    let doc = Doc { rev: rev.clone(), holder, n: self.n_writes, released: false, ttl: TTL };
                    self.members.insert(id.to_owned(), Member { doc, knows });
                }
            }
            Some(rev)
        }
    }

    /// A daemon: its membership, and the databases that it tells.
    struct Daemon {
        name: String,
        n_joined: u32,
        member: Option<(Members, String, Duration)>,
        telling: BTreeSet<usize>,
        stopped_until: Duration,
    }

    impl Daemon {
        fn id(&self) -> String {
            format!("{}.{}", self.name, self.n_joined)
        }

        fn is_valid(&self, now: Duration) -> bool {
            self.member.as_ref().is_some_and(|(_, _, until)| now < *until)
        }

        /// One step of what its threads do, in any order.
        fn step(&mut self, couch: &mut Couch, now: Duration, rng: &mut fastrand::Rng) {
            let own = Times::of(TTL).own();
            let Some((members, rev, until)) = &mut self.member else {
                self.n_joined += 1;
                let id = self.id();
                let rev = couch.write(&id, None, Some(BTreeSet::new())).expect("the name is new");
                self.member = Some((Members::new(&id, Times::of(TTL), rng.f64()), rev, now + own));
                return;
            };
            let id = format!("{}.{}", self.name, self.n_joined);
            match rng.u8(..6) {
                0 | 1 => {
                    members.on_look(couch.members.clone(), now);
                    if !couch.members.contains_key(&id) {
                        // Taken out: nothing of it counts any more.
                        self.member = None;
                        self.telling.clear();
                    }
                }
                2 => match couch.write(&id, Some(rev), Some(members.knows().clone())) {
                    Some(new) => (*rev, *until) = (new, now + own),
                    None => {
                        self.member = None;
                        self.telling.clear();
                    }
                },
                3 => {
                    for (other, over) in members.to_expel(now) {
                        couch.write(&other, Some(&over), None);
                    }
                }
                // What is not ours any more is let go first, one by one.
                4 => {
                    let mine = |db: &usize| members.division().is_mine(&format!("tenant-{db}"));
                    match self.telling.iter().copied().find(|db| !mine(db)) {
                        Some(db) => drop(self.telling.remove(&db)),
                        None => members.on_settled(members.generation()),
                    }
                }
                _ => {
                    let db = rng.usize(..DBS);
                    if members.division().is_mine(&format!("tenant-{db}")) {
                        self.telling.insert(db);
                    }
                }
            }
        }
    }

    fn simulate(seed: u64) -> (usize, usize) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut couch = Couch::default();
        let new = |n: u32| Daemon {
            name: format!("d{n}"),
            n_joined: 0,
            member: None,
            telling: BTreeSet::new(),
            stopped_until: Duration::ZERO,
        };
        let mut daemons: Vec<Daemon> = (0..3).map(new).collect();
        let (mut now, mut n_told, mut n_started) = (s(1_000), 0, 3);
        for _ in 0..6_000 {
            now += Duration::from_millis(rng.u64(0..60));
            let at = rng.usize(..3);
            if daemons[at].stopped_until <= now {
                daemons[at].step(&mut couch, now, &mut rng);
            }
            if rng.u32(..800) == 0 {
                // Stopped for long, killed and followed by another, or gone for a while.
                let at = rng.usize(..3);
                match rng.u8(..2) {
                    0 => daemons[at].stopped_until = now + s(rng.u64(1..40)),
                    _ => {
                        daemons[at] = new(n_started);
                        n_started += 1;
                    }
                }
            }
            let mut told = [0; DBS];
            for daemon in daemons.iter().filter(|one| one.stopped_until <= now && one.is_valid(now)) {
                daemon.telling.iter().for_each(|db| told[*db] += 1);
            }
            assert!(told.iter().all(|n| *n <= 1), "seed {seed}: told by two: {told:?}");
            n_told += told.iter().sum::<usize>();
        }
        (n_told, 6_000 * DBS)
    }

    #[test]
    fn in_a_simulation_no_database_is_told_by_two() {
        let (mut told, mut all) = (0, 0);
        for seed in 0..size(30, 150) {
            let (n, of) = simulate(seed);
            (told, all) = (told + n, all + of);
        }
        assert!(told * 10 > all * 4, "{told} of {all}");
    }

    #[test]
    fn a_newcomer_takes_its_part_when_those_before_it_have_let_it_go() {
        let mut couch = Couch::default();
        let times = Times::of(TTL);
        couch.write("a.1", None, Some(BTreeSet::new()));
        let mut a = Members::new("a.1", times, 0.0);
        a.on_look(couch.members.clone(), s(0));
        let mine = |members: &Members| {
            let mine = (0..100).filter(|n| members.division().is_mine(&format!("tenant-{n}")));
            mine.collect::<Vec<_>>()
        };
        assert_eq!(mine(&a).len(), 100);
        couch.write("b.1", None, Some(BTreeSet::new()));
        let mut b = Members::new("b.1", times, 0.0);
        b.on_look(couch.members.clone(), s(1));
        assert_eq!(mine(&b).len(), 0, "`a` does not know it yet");
        let before = a.generation();
        a.on_look(couch.members.clone(), s(1));
        assert!(a.generation() > before && (30..70).contains(&mine(&a).len()));
        assert!(a.knows().is_empty(), "it may still tell what is `b`'s");
        a.on_settled(before);
        assert!(a.knows().is_empty());
        a.on_settled(a.generation());
        let rev = couch.members["a.1"].doc.rev.clone();
        couch.write("a.1", Some(&rev), Some(a.knows().clone()));
        b.on_look(couch.members.clone(), s(2));
        assert_eq!(mine(&b).len() + mine(&a).len(), 100);
        // `a` dies: its part is taken only when it was taken out.
        b.on_look(couch.members.clone(), s(16));
        assert_eq!(b.to_expel(s(16)), []);
        let expelled = b.to_expel(s(17));
        assert_eq!(expelled.len(), 1);
        couch.write("a.1", Some(&expelled[0].1), None);
        b.on_look(couch.members.clone(), s(17));
        assert_eq!(mine(&b).len(), 100);
    }
}
