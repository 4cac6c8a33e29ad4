//! couch-hookd: turns what happens inside CouchDB into signed webhooks, losing nothing. The map of the code.
//!
//! ```text
//! host ---> config ---> daemon ---> pipeline, one per webhook
//!                                   feed_reader --rows--> dispatcher --attempts--> webhook (workers)
//!                                        |                 drives pure::dispatch <--outcomes--'
//!                            couch::feed, or replication   |--> store         dead letters, the webhook's record
//!                                                          '--> checkpointer  couch::local_docs
//! Databases found by pattern: lookout (hints, sweep) --sightings--> dispatcher --readings--> reader_pool, in turns
//! ```
//!
//! | part | what it is | start reading at |
//! |---|---|---|
//! | `pure` | every decision, without I/O, clock, threads | `flow` (one database of a webhook), `endpoint` (whom to suspect), `dispatch` (both together), `simulation` (tries to lose an event), `roster` (databases found by pattern), `remembered` (of what has no feed), `lease` and `share` (several daemons) |
//! | `couch` | CouchDB over HTTP | `feed`, `local_docs` (marks, checkpoints), `state_db` (dead letters, records), `conflicts`, `requests` and `alive` (how commands reach a daemon), `databases` and `db_updates` (which there are, which changed), `leases`, `gate` (logins) |
//! | `replication` | how replications are, in the place of a feed | `mod` (opened, paged, waited on), `look`; what counts is `pure::transitions` |
//! | `pipeline` | the threads of a webhook | `dispatcher` (`found`: databases by pattern), `lookout`, `reader_pool`, `watcher` (`watch = databases`), `activation` (what `since = now` means), `desk` and `obey` (requests of commands), `replay`, `agents` (connections), `hints` (what is said of databases), `report` and `board` (how it is) |
//! | `config` | sections to typed values | `keys` (the one table), `source` |
//! | `host` | being started | `stdio` and `update_notification` (the only users of stdin and stdout), `ending`, `config_poller`, `standalone`, `systemd` |
//! | `daemon` | starts, applies configurations, stops | `run`; `leases` (who may tell) |
//! | `cli` | one file a command | `run`, `check`, `watch`, `ask` (what operates a webhook) |
//! | `standin`, `demo` | a CouchDB and a receiver to show and to test with | `standin::couch`, `standin::receiver` |
//! | `sys`, `log`, `error`, `tls`, `names`, `socket` | clock, randomness and threads; logging; kinds; roots; name look-ups; connections | |
//!
//! What must stay true: a checkpoint never passes a change that is neither delivered nor a dead letter nor replaced
//! (`pure::watermark`); a feed that was lost goes on from the *stored* checkpoint, after its mark was read; one
//! request per document at a time (`pure::lanes`); a dead letter is stored before the watermark passes it; every
//! channel and buffer has a bound; only `host::stdio` writes to stdout, and under `[update_notification]` nobody does; no secret is ever formatted
//! (`pure::secret`, `pure::redact`). Who may import whom is kept by `tests/it/tidy.rs`.

pub mod cli;
pub mod config;
pub mod couch;
pub mod daemon;
pub mod demo;
pub mod error;
pub mod host;
pub mod log;
pub mod names;
pub mod pipeline;
pub mod pure;
pub mod replication;
pub mod socket;
pub mod standin;
pub mod sys;
pub mod tls;
