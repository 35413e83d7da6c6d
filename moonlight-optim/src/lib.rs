#![doc = include_str!("../README.md")]
//!
//! # Where to start
//!
//! | to | see |
//! |---|---|
//! | choose which parameters Muon gets | [`ParameterRules`], [`Rule`], [`Assignment`] |
//! | choose the options of Muon | the table of [`MuonConfig`] |
//! | step, clip, save and load | [`MuonAdamW`] |
//! | use burn-train or another Burn optimizer | [`Assignment::to_module_optimizer`], [`GroupOptimizer`] |
//! | train on several ranks | [`distributed`] |
//! | step single matrices | [`Muon`], an `impl burn::optim::Optimizer` |
//! | orthogonalize a matrix | [`NewtonSchulz`] |
//! | limit attention logits | [`QkClip`] |
//! | measure updates and weights | [`group_metrics`], [`diagnostics`] |
//!
//! # The update
//!
//! ```text
//! M <- mu M + grad
//! O  = NewtonSchulz(mu M + grad)
//! W <- W - lr * (0.2 sqrt(max(A, B)) O + weight_decay W)
//! ```
//!
//! The defaults are a momentum `mu` of 0.95, five Newton-Schulz steps and a weight decay of 0.1.
//!
//! # Saving and resuming
//!
//! State is matched by parameter path, since Burn's `ParamId`s differ in every process.
//!
//! ```
//! # use burn::nn::{Linear, LinearConfig};
//! # use burn::optim::GradientsParams;
//! # use burn::tensor::{Device, Tensor};
//! # use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};
//! # let device = Device::default().autodiff();
//! # let mut model: Linear = LinearConfig::new(8, 16).init(&device);
//! # let rules = ParameterRules::muon_except(Vec::<String>::new(), MuonConfig::new(), AdamWConfig::new());
//! # let assignment = rules.assign(&model)?;
//! # let mut optimizer = assignment.build(OptimizerOptions::new())?;
//! # let loss = model.forward(Tensor::<2>::ones([2, 8], &device)).square().mean();
//! # let gradients = GradientsParams::from_grads(loss.backward(), &model);
//! # model = optimizer.step(0.02, model, gradients)?;
//! # let dir = tempfile::tempdir()?;
//! # let file = dir.path().join("optimizer.bpk");
//! optimizer.save(&file)?;
//! // In another process, with the module loaded from its own checkpoint:
//! let optimizer = rules.assign(&model)?.load(&[&file], OptimizerOptions::new())?;
//! # let _ = (model, optimizer);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Gradients of zero, NaN and infinity
//!
//! A zero gradient gives a zero update. NaN or infinity in a gradient makes its own matrix NaN, and no other matrix of the
//! stack, so that it shows in the next loss.
//!
//! Finite gradients are orthogonalized without overflow, from 1e-38 to 1e38. With the default epsilon of 1e-7, which is that of
//! the report's code, gradients whose norm is much smaller count as nearly zero; with an epsilon of 0 their norm does not matter.

mod adamw;
mod adaptive;
mod block_split;
pub mod coefficients;
mod decay;
pub mod diagnostics;
pub mod distributed;
#[cfg(feature = "cpu")]
mod flex;
mod load_balance;
pub mod memory;
#[cfg(test)]
mod messages;
mod mixed_precision;
mod module_values;
mod muon;
mod muon_adamw;
mod name_or_table;
mod newton_schulz;
mod qk_clip;
#[doc(hidden)]
pub mod reference;
mod rules;
mod scale;
mod setters;
mod state;

pub use adamw::AdamWConfig;
pub use adaptive::Adaptive;
pub use block_split::Blocks;
pub use coefficients::{Coefficients, Preconditioning};
pub use decay::{Decay, DecaySchedule, decay_for_width};
pub use diagnostics::{GroupMetrics, group_metrics, update_rms};
pub use mixed_precision::{MixedPrecision, MixedPrecisionState, Rounding};
pub use module_values::replace_value;
pub use muon::{MatrixView, MomentumPrecision, MomentumWarmup, Muon, MuonConfig, MuonState, Precision};
pub use muon_adamw::{MuonAdamW, OptimizerError, OptimizerOptions};
pub use newton_schulz::{NewtonSchulz, NewtonSchulzForm, newton_schulz};
pub use qk_clip::{HeadLayout, QkClip};
pub use rules::{
    AssignedParameter, Assignment, GroupOptimizer, GroupSettings, Parameter, ParameterRules, Rule, RuleError,
};
pub use scale::{UpdateScale, WeightLayout};
pub use state::StateError;
