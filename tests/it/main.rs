//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod bad_input;
mod cli;
mod configuring;
mod couch;
mod docs;
mod ending;
mod endpoints;
mod feeds;
mod host;
mod http_client;
mod kills;
mod receiver;
mod secrets;
mod sharing;
mod recreation;
mod standin;
mod standin_recorded;
mod world;

mod outside;
mod tidy;
