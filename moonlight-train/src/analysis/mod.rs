//! Analysis of finished runs (spectra of the weights, plots of the metrics), and of a router's gates.

pub mod gate_factor;
pub mod plots;
pub mod spectrum;
