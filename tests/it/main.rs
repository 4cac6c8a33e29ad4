//! The one integration binary.

mod real_couch;
