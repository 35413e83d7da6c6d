//! What a run and its data show: the spectra of the weights, a bigram model of the data to compare with, and plots.

pub mod bigram;
pub mod plots;
pub mod spectrum;
