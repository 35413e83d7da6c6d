//! The Rust code of the manual: `cargo test -p moonlight-book` compiles and runs its blocks.
//!
//! A page with such a block has a line here.

#[cfg(doctest)]
#[doc = include_str!("../../src/guides/muon.md")]
mod muon {}

#[cfg(doctest)]
#[doc = include_str!("../../src/guides/libraries.md")]
mod libraries {}
