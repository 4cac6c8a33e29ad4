//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod beam;
mod ending;
mod endpoints;
mod host;
mod http_client;
mod kills;
mod real_couch;
mod receiver;
mod secrets;
mod sharing;
mod standin;
mod standin_recorded;
mod tidy;
mod world;
