//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod bad_input;
mod cli;
mod commands;
mod commands_letters;
mod commands_look;
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
mod recreation;
mod secrets;
mod sharing;
mod standin;
mod standin_recorded;
mod world;

mod outside;
mod tidy;
