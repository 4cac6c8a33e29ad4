//! The one integration binary.

mod standin;
