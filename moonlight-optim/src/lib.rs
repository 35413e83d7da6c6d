//! Muon for [Burn](burn), as in "Muon is Scalable for LLM Training" (arXiv 2502.16982), for any Burn module.
//!
//! Muon replaces the update of a weight matrix by the nearest orthogonal one. [`Muon`] is an `impl burn::optim::Optimizer`
//! that takes matrices and stacks of matrices (`[experts, in, out]`), on any backend. A model needs AdamW beside it, for
//! embeddings, the output head, norms and biases; [`ParameterRules`] says which parameter goes where and checks that
//! against the module, and [`Assignment::build`] makes the optimizer of it, a [`MuonAdamW`].
//!
//! ```
//! use burn::module::Module;
//! use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
//! use burn::optim::GradientsParams;
//! use burn::tensor::{Device, Int, Tensor};
//! use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules, update_rms};
//!
//! // A module of yours.
//! #[derive(Module, Debug)]
//! struct Model {
//!     tokens: Embedding,
//!     hidden: Linear,
//!     output: Linear,
//! }
//!
//! let device = Device::default().autodiff();
//! let mut model = Model {
//!     tokens: EmbeddingConfig::new(10, 16).init(&device),
//!     hidden: LinearConfig::new(16, 32).init(&device),
//!     output: LinearConfig::new(32, 10).init(&device),
//! };
//!
//! // Muon for all matrices but embeddings, which are found by their type, and what matches the patterns given.
//! let rules = ParameterRules::muon_except(["output.*"], MuonConfig::new(), AdamWConfig::new());
//! let assignment = rules.assign(&model)?;
//! assert_eq!(
//!     assignment.to_string(),
//!     "\
//! parameter      shape     optimizer  why
//! tokens.weight  [10, 16]  adamw      embedding
//! hidden.weight  [16, 32]  muon       matrix
//! hidden.bias    [32]      adamw      not a matrix
//! output.weight  [32, 10]  adamw      excepted by `output.*`
//! output.bias    [10]      adamw      excepted by `output.*`
//!
//! muon: 1 tensor, 512 elements
//! adamw: 4 tensors, 522 elements"
//! );
//!
//! let mut optimizer = assignment.build(OptimizerOptions::new())?;
//! for _ in 0..3 {
//!     let tokens = Tensor::<2, Int>::from_data([[1, 2, 3, 4]], &device);
//!     let logits = model.output.forward(model.hidden.forward(model.tokens.forward(tokens)));
//!     let grads = GradientsParams::from_grads(logits.square().mean().backward(), &model);
//!     let before = model.clone();
//!     model = optimizer.step(0.02, model, grads)?;
//!     // Updates of both groups have a similar RMS, so that one learning rate serves both.
//!     println!("{:?}", update_rms(&before, &model, &assignment, 0.02));
//! }
//!
//! // Stop, and resume in another process, whose module has other `ParamId`s: state is matched by parameter path.
//! # let dir = tempfile::tempdir()?;
//! # let file = dir.path().join("optimizer.bpk");
//! optimizer.save(&file)?;
//! let optimizer = assignment.load(&[&file], OptimizerOptions::new())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # From AdamW to Muon
//!
//! A project that trains with Burn's `AdamWConfig::new().init()` changes six lines (`examples/own_burn_program.rs` is a whole
//! program):
//!
//! ```
//! # use burn::nn::{Linear, LinearConfig};
//! # use burn::optim::GradientsParams;
//! # use burn::tensor::{Device, Tensor};
//! # #[derive(burn::module::Module, Debug)]
//! # struct Net { hidden: Linear, output: Linear }
//! # let device = Device::default().autodiff();
//! # let mut model =
//! #     Net { hidden: LinearConfig::new(8, 16).init(&device), output: LinearConfig::new(16, 4).init(&device) };
//! # let loss = |model: &Net| {
//! #     model.output.forward(model.hidden.forward(Tensor::<2>::ones([2, 8], &device))).square().mean()
//! # };
//! // Before: use burn::optim::AdamWConfig;
//! use moonlight_optim::{AdamWConfig, MuonConfig, OptimizerOptions, ParameterRules};
//!
//! // Before: let mut optimizer = AdamWConfig::new().init();
//! let rules = ParameterRules::muon_except(["output.*"], MuonConfig::new(), AdamWConfig::new());
//! let assignment = rules.assign(&model)?;
//! println!("{assignment}");
//! let mut optimizer = assignment.build(OptimizerOptions::new())?;
//!
//! let grads = GradientsParams::from_grads(loss(&model).backward(), &model);
//! // Before, at the same learning rate: model = optimizer.step(3e-4, model, grads);
//! model = optimizer.step(3e-4, model, grads)?;
//! # let _ = model;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! burn-train's `Learner`, and whatever else takes Burn's own `ModuleOptimizer`, gets one by
//! [`Assignment::to_module_optimizer`]; each loads what the other saved.
//!
//! # The update
//!
//! ```text
//! M <- mu M + grad
//! O  = NewtonSchulz(mu M + grad)
//! W <- W - lr * (0.2 sqrt(max(A, B)) O + weight_decay W)
//! ```
//!
//! with `mu` 0.95, five Newton-Schulz steps and weight decay 0.1. All options, with defaults and sources, are in the table of
//! [`MuonConfig`]; the main ones:
//!
//! * the factor on the update: [`UpdateScale`]; the polynomials: [`Coefficients`], their number, the type of the products
//!   ([`Precision`]) and the form of the iteration ([`NewtonSchulzForm`]);
//! * heads and fused projections as matrices of their own: [`Blocks`], best on a [`Rule`]; convolution kernels:
//!   [`MatrixView`];
//! * NorMuon and AdaMuon: [`Adaptive`]; decay that is cautious, scheduled or independent of the learning rate: [`Decay`];
//!   momentum that warms up or is kept in bf16;
//! * parameters in half precision, with stochastic rounding or master weights: [`Rounding`].
//!
//! [`MuonAdamW`] steps all equal matrices of a module together, bit for bit as one by one, on one rank or on several, each
//! with a part of the state ([`distributed`]). [`QkClip`] limits attention logits after a step. [`group_metrics`],
//! [`diagnostics::orthogonality_error`] and [`diagnostics::Spectrum`] measure updates and weights.
//!
//! Burn's own Muon takes matrices only, and its scale for Keller Jordan's rule reads a matrix as PyTorch stores it,
//! `[out, in]`, while Burn's `Linear` stores `[in, out]`. Scales here that tell the two apart are right for Burn's layers,
//! or for PyTorch's layout with [`WeightLayout::OutIn`].
//!
//! # Gradients of zero, NaN and infinity
//!
//! A zero gradient gives a zero update. A NaN or an infinity in a gradient makes that matrix NaN, and no other matrix of
//! its stack: it shows in the next loss, rather than being passed over. Gradients of any finite size, 1e-38 or 1e38, are
//! orthogonalised without overflow; with the default epsilon of 1e-7, as in the report's code, those much smaller than
//! that are treated as nearly zero, and with an epsilon of 0 the size does not matter at all.
//!
//! # Speed
//!
//! On the CPU backend (feature `cpu`, on by default) Newton-Schulz runs in kernels of this crate: in f32, and in bf16 where
//! the processor has AVX512-BF16. Symmetric products are computed by half, and matrices that are not square iterate on
//! their Gram matrix where that is cheaper. The README has figures against PyTorch. Other backends run it in Burn's
//! operations, a stack at a time.

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
