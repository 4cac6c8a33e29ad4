//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod host;
mod real_couch;
mod tidy;
mod http_client;
mod receiver;
mod standin;
mod standin_recorded;
