//! What is in a checkpoint, what is wrong with it, and how far two are apart.

pub(crate) mod compare;
pub(crate) mod digests;
pub(crate) mod summary;
pub(crate) mod validation;
