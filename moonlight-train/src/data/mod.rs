//! Training data: files to tokens, tokens to sequences, sequences to batches.
//!
//! * `files.rs`: globs to files.
//! * `text_file.rs`: whether a file of texts is one document or has a document in each record.
//! * `tokenize.rs`: files to documents of tokens, in parallel; conversations with a weight for each token.
//! * `report.rs`: what was found while reading, such as broken records.
//! * `token_store.rs`: documents of tokens on disk, kept for later runs and checked when they are opened.
//! * `packing.rs`: which documents share a sequence if none may be cut.
//! * `sequences.rs`: documents to sequences, packed or one by one.
//! * `shuffle.rs`: the order of an epoch.
//! * `stream.rs`: an endless stream of batches, from any position, and the share of each rank.
//! * `prefetch.rs`: the next step's batches, read while a step is computed.
//! * `dataset.rs`: the training and validation data of a run.
//! * `bigram.rs`: the loss of a bigram model of the data, a baseline.
//! * `digest.rs`: a hash of the text, by which studies tell results apart.
//! * `inspect.rs`: statistics and samples for `moonlight data inspect`.

mod batch;
mod bigram;
mod cuts;
mod dataset;
mod digest;
mod error;
mod files;
#[doc(hidden)]
pub mod fuzz;
mod hash;
mod inspect;
mod packing;
mod prefetch;
mod report;
mod sequences;
mod shuffle;
mod stream;
mod text_file;
mod token_store;
mod tokenize;

pub use batch::HostBatch;
pub(crate) use batch::mask_scale;
pub use bigram::bigram_loss;
pub use dataset::Dataset;
pub(crate) use digest::text_digest;
pub use error::DataError;
pub use inspect::{Inspection, Sample, SplitStats};
pub use prefetch::{BatchRequest, Prefetcher};
pub(crate) use stream::MAX_STEP_TOKENS;
pub use stream::{DataPosition, TrainStream};

#[cfg(test)]
mod tests;
