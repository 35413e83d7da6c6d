//! Analysis of finished runs: spectra of the weights, plots of the metrics.

pub mod plots;
pub mod spectrum;
