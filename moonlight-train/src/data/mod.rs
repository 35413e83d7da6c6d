//! What the model reads: files to tokens, tokens to sequences, sequences to batches.
//!
//! * `files.rs`: globs to files.
//! * `compressed.rs`: what is in a file, unpacked where it is compressed.
//! * `tokenise.rs`: files to documents of tokens, in parallel; conversations with a weight for each token.
//! * `report.rs`: what was found on the way.
//! * `store.rs`: the documents on disk, mapped into memory, kept for the next run.
//! * `packing.rs`: which documents share a sequence, where none may be cut.
//! * `sequences.rs`: documents to sequences, packed or one by one.
//! * `order.rs`: the order of an epoch.
//! * `stream.rs`: batches without end, from any position.
//! * `ahead.rs`: the next step's batches, made while a step is computed.
//! * `inspect.rs`: figures and samples, to look at before a run.

mod ahead;
mod batch;
mod compressed;
mod corpus;
mod error;
mod files;
mod hash;
mod inspect;
mod order;
mod packing;
mod report;
mod sequences;
mod store;
mod stream;
mod tokenise;

pub use ahead::{Ahead, Want};
pub use batch::HostBatch;
pub use corpus::Corpus;
pub use error::DataError;
pub use inspect::{Figures, Inspection, Sample};
pub use stream::{DataPosition, TrainStream};

#[cfg(test)]
mod tests;
