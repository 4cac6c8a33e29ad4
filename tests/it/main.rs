//! The one integration binary.

#![allow(clippy::unwrap_used, reason = "all of it is test")]

mod host;
mod outside;
mod tidy;
