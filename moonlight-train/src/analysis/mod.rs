//! What a run and its weights show: spectra and plots.

pub mod plots;
pub mod spectrum;
