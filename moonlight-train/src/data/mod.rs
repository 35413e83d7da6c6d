//! What the model reads: files to tokens, tokens to sequences, sequences to batches.
//!
//! * `files.rs`: globs to files.
//! * `tokenise.rs`: files to documents of tokens, in parallel.
//! * `store.rs`: the documents on disk, mapped into memory, kept for the next run.
//! * `sequences.rs`: documents to sequences, packed or one by one.
//! * `order.rs`: the order of an epoch.
//! * `stream.rs`: batches without end, from any position.

mod batch;
mod corpus;
mod error;
mod files;
mod hash;
mod order;
mod sequences;
mod store;
mod stream;
mod tokenise;

pub use batch::HostBatch;
pub use corpus::Corpus;
pub use error::DataError;
pub use stream::{DataPosition, TrainStream};

#[cfg(test)]
mod tests;
