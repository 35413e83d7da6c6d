//! Pre-training, resuming, generating and scoring with the Moonlight family: the library behind `moonlight`.

pub mod bigram;
pub mod data;
pub mod recipe;
pub mod schedule;
pub mod tokenizer;
