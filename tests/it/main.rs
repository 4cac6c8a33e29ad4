//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod couch;
mod docs;
mod host;
mod http_client;
mod receiver;
mod standin;
mod standin_recorded;

mod outside;
mod tidy;
