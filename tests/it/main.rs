//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod about;
mod bad_input;
mod batches;
mod canaries;
mod cli;
mod commands;
mod commands_letters;
mod commands_look;
mod commands_replications;
mod configuring;
mod conflicts;
mod couch;
mod databases;
mod databases_kills;
mod databases_watched;
mod divided;
mod docs;
mod ending;
mod endpoints;
mod explain;
mod feeds;
mod formats;
mod guard;
mod host;
mod http_client;
mod kills;
mod leases;
mod lookout;
mod notified;
mod patterns;
mod patterns_changed;
mod receiver;
mod recreation;
mod replications;
mod replications_check;
mod replications_faults;
mod replications_kills;
mod replications_many;
mod replications_watched;
mod secrets;
mod sharing;
mod standin;
mod standin_recorded;
mod standin_replicator;
mod trial;
mod world;

mod outside;
mod tidy;
