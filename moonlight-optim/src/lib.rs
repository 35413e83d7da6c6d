//! Muon for Burn.

mod adamw;
pub mod coefficients;
mod muon;
mod newton_schulz;
pub mod reference;
mod rules;
mod scale;
mod state;
mod update_rms;

pub use adamw::{AdamWConfig, FullPrecision};
pub use coefficients::Coefficients;
pub use muon::{Muon, MuonConfig, MuonState, Precision};
pub use newton_schulz::{NewtonSchulz, newton_schulz};
pub use rules::{AssignedParameter, Assignment, BUFFER, GroupOptimizer, Parameter, ParameterRules, Rule, RuleError};
pub use scale::{Scale, WeightLayout};
pub use state::StateError;
pub use update_rms::update_rms;
