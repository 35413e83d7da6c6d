//! Muon: momentum, orthogonalized by Newton-Schulz.

mod config;
mod state;
mod step;
#[cfg(test)]
mod tests;

pub use config::{MatrixView, MomentumPrecision, MomentumWarmup, MuonConfig, Precision};
pub use state::MuonState;
pub use step::Muon;
