//! The options of Muon.

use burn::config::{Config, config_to_json};
use burn::optim::ModuleOptimizer;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::Muon;
use crate::{
    Adaptive, Blocks, Coefficients, Decay, MixedPrecision, NewtonSchulz, NewtonSchulzForm, Rounding, UpdateScale,
    WeightLayout,
};

/// The dtype of the matrix products in Newton-Schulz.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16, as in the report's training: faster where the device has units for it (AVX512-BF16 on the CPU).
    Bf16,
    /// f16: 8 times more precise than bf16. Its largest value, 65504, is far above anything in the iteration.
    F16,
}

/// The dtype in which momentum is stored between steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MomentumPrecision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16: half of the memory. Each step computes the new momentum in f32 and rounds it once.
    Bf16,
}

/// How the shape of a parameter is read as matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MatrixView {
    /// `[A, B]`, or a stack `[batch, A, B]`.
    #[default]
    Stack,
    /// A convolution kernel `[out, in, ...]` of 3 to 5 dimensions, as one matrix `[out, in * ...]`, as in Keller Jordan's Muon.
    /// Outputs are rows, whatever [`MuonConfig::layout`] is.
    Kernel,
}

impl MatrixView {
    /// Whether a parameter with `rank` dimensions can be read this way.
    pub fn accepts(self, rank: usize) -> bool {
        match self {
            MatrixView::Stack => (2..=3).contains(&rank),
            MatrixView::Kernel => (3..=5).contains(&rank),
        }
    }

    /// The shape as a stack `[batch, A, B]`, for a shape that passes [`MatrixView::accepts`].
    pub fn stack(self, shape: &[usize]) -> [usize; 3] {
        match (self, shape) {
            (MatrixView::Kernel, [outputs, rest @ ..]) => [1, *outputs, rest.iter().product()],
            (MatrixView::Stack, [batch, rows, columns]) => [*batch, *rows, *columns],
            (MatrixView::Stack, [.., rows, columns]) => [1, *rows, *columns],
            _ => [1, 1, shape.iter().product()],
        }
    }
}

/// Momentum warm-up: linear from `start` to [`MuonConfig::momentum`] over `steps` steps, as in modded-nanogpt (0.85 to 0.95
/// over 300).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MomentumWarmup {
    /// The momentum of the first step.
    pub start: f64,
    /// The number of steps until the full momentum.
    pub steps: usize,
}

/// Configuration to create a [`Muon`] optimizer.
///
/// The defaults are those of "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2, and its released code),
/// called "the report" below. They suit a model that was tuned for AdamW: learning rate and weight decay can be kept.
///
/// | field | default | alternatives | when to use which | source |
/// |---|---|---|---|---|
/// | `momentum` | 0.95 | 0 to 1 | the default | the report |
/// | `momentum_warmup` | none | `{ start, steps }` | to follow modded-nanogpt's short runs | modded-nanogpt |
/// | `momentum_precision` (`momentum_dtype`) | `f32` | `bf16` | `bf16` halves Muon's state where memory is short | |
/// | `nesterov` | `true` | `false`: orthogonalize `M` itself | `false` only to reproduce a run without it | Keller Jordan |
/// | `weight_decay` | 0.1 | 0 and above | the report found decay necessary in long runs | the report, 2.2 |
/// | `decay` | constant, times the learning rate | [`Decay`]: scheduled, independent, cautious | to reproduce a run that uses it | arXiv 2309.14322, 2510.12402 |
/// | `scale` | `report`: `0.2 sqrt(max(A, B))` | [`UpdateScale`]: `update_norm`, `hidden_size`, `keller_jordan`, `spectral`, `unit` | `report` with a learning rate found for AdamW; `keller_jordan` with one of about 0.02; `spectral` to transfer learning rates over widths | the report, eq. 4 to 6; arXiv 2310.17813 |
/// | `layout` | `in_out`: Burn's `Linear` | `out_in`: PyTorch's | `out_in` for weights that a module stores as `[out, in]`; the report's scale does not depend on it | |
/// | `view` | `stack`: `[A, B]` or `[batch, A, B]` | `kernel` | `kernel` for the weights of convolutions | Keller Jordan |
/// | `blocks` | `whole` | [`Blocks`]: rows or columns | to orthogonalize heads, or the parts of a fused projection, separately; best set on a [`Rule`](crate::Rule) | torchtitan's Moonlight |
/// | `adaptive` | `off` | [`Adaptive`]: `nor_muon`, `ada_muon` | second moments of the update; NorMuon costs almost no memory, AdaMuon doubles the state | arXiv 2510.05491, 2507.11005 |
/// | `rounding` | `nearest` | [`Rounding`]: `stochastic`, `master` | for bf16 and f16 parameters: `master` if there is memory for 4 more bytes per element, else `stochastic` | |
/// | `coefficients` | `report` | [`Coefficients`]: `quintic`, `polar_express`, `cans`, `aol`, `deepseek_v4`, `custom` | `polar_express` to converge to 1; `aol` to save a step; the others to reproduce a run | see each |
/// | `steps` (`newton_schulz_steps`) | the coefficients' own number, 5 for `report` | any | more steps are more exact; with `report` they gave no better model | the report, 2.1 |
/// | `epsilon` (`newton_schulz_epsilon`) | 1e-7 | 0 and above | 0 makes the update independent of the gradient's norm | the report's code |
/// | `precision` (`newton_schulz_dtype`) | `f32` | `bf16`, `f16` | `bf16` where the device has units for it | the report trains in bf16 |
/// | `form` | `auto`: the cheaper one for each shape | [`NewtonSchulzForm`]: `direct`, `gram` | `direct` for the smallest rounding error | Dao-AILab/gram-newton-schulz |
///
/// Serde uses the field names of the first column. Where a second name is in parentheses, serde writes that one and reads
/// both. Every field may be left out; an unknown name is an error. [`Config::save`] and [`Config::load`] use JSON.
///
/// ```
/// use moonlight_optim::{MuonConfig, UpdateScale};
///
/// // For one parameter group. `.init()` gives an optimizer for a module that has only matrices.
/// let muon = MuonConfig::new().with_weight_decay(0.0).with_scale(UpdateScale::KellerJordan).build();
///
/// let read: MuonConfig = serde_json::from_str(r#"{ "scale": "keller_jordan", "weight_decay": 0.0 }"#)?;
/// assert_eq!(&read, muon.config());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// Momentum `mu` in `M <- mu M + grad`. Default: 0.95.
    pub momentum: f64,
    /// Momentum warm-up: a lower momentum at the start. Default: none.
    pub momentum_warmup: Option<MomentumWarmup>,
    /// The dtype in which momentum is stored: `f32` or `bf16`. Default: `f32`.
    #[serde(rename = "momentum_dtype", alias = "momentum_precision")]
    pub momentum_precision: MomentumPrecision,
    /// Whether Newton-Schulz gets `mu M + grad` (Nesterov) or `M`. Default: `true`.
    pub nesterov: bool,
    /// Decoupled weight decay: `W <- W - lr * weight_decay * W`, with the learning rate itself, not times `scale`. Default:
    /// 0.1.
    pub weight_decay: f64,
    /// Schedule and kind of the decay. Default: constant, times the learning rate, on every weight.
    pub decay: Decay,
    /// The factor on the orthogonalized update. Default: `report`, `0.2 sqrt(max(A, B))`.
    pub scale: UpdateScale,
    /// Which side of a stored matrix is the layer's input. Only scales that are not symmetric, and NorMuon, depend on it.
    /// Default: `in_out`.
    pub layout: WeightLayout,
    /// Whether parameters are stacks of matrices or convolution kernels. Default: `stack`.
    pub view: MatrixView,
    /// The blocks that each matrix is split into; each is orthogonalized by itself. Default: `whole`.
    pub blocks: Blocks,
    /// Second moments of the update: NorMuon, AdaMuon. Default: `off`.
    pub adaptive: Adaptive,
    /// How the updates of bf16 and f16 parameters are rounded. [`MuonConfig::init`] and parameter groups follow it;
    /// [`MuonConfig::build`] always rounds to nearest. Default: `nearest`.
    pub rounding: Rounding,
    /// The polynomials of Newton-Schulz. Default: `report`.
    pub coefficients: Coefficients,
    /// The number of Newton-Schulz steps. Default: as many as the coefficients come with, 5 for the report's.
    #[serde(rename = "newton_schulz_steps", alias = "steps")]
    pub steps: Option<usize>,
    /// Added to a matrix's norm before dividing by it. Default: 1e-7.
    #[serde(rename = "newton_schulz_epsilon", alias = "epsilon")]
    pub epsilon: f64,
    /// The dtype of the matrix products in Newton-Schulz: `f32`, `bf16` or `f16`. Default: `f32`.
    #[serde(rename = "newton_schulz_dtype", alias = "precision")]
    pub precision: Precision,
    /// The form of the iteration. Default: `auto`, the cheaper one for each shape.
    pub form: NewtonSchulzForm,
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            momentum_warmup: None,
            momentum_precision: MomentumPrecision::default(),
            nesterov: true,
            weight_decay: 0.1,
            decay: Decay::default(),
            scale: UpdateScale::default(),
            layout: WeightLayout::default(),
            view: MatrixView::default(),
            blocks: Blocks::default(),
            adaptive: Adaptive::default(),
            rounding: Rounding::default(),
            coefficients: Coefficients::default(),
            steps: None,
            epsilon: 1e-7,
            precision: Precision::default(),
            form: NewtonSchulzForm::default(),
        }
    }
}

/// [`Config::save`] and [`Config::load`]. Implemented by hand: Burn's derive requires every field in a file.
impl Config for MuonConfig {}

impl std::fmt::Display for MuonConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&config_to_json(self))
    }
}

impl MuonConfig {
    /// The report's config.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keller Jordan's config (`SingleDeviceMuonWithAuxAdam` of KellerJordan/Muon): scale `sqrt(max(1, out / in))`, no decay.
    /// Its learning rate is 0.02.
    pub fn keller_jordan() -> Self {
        Self::default().with_scale(UpdateScale::KellerJordan).with_weight_decay(0.0)
    }

    /// The config of Kimi K2 (arXiv 2507.20534): the report's. Kimi K2 combines it with [`QkClip`](crate::QkClip).
    pub fn kimi_k2() -> Self {
        Self::default()
    }

    crate::setters::setters! {
        with_momentum(momentum: f64);
        with_momentum_precision(momentum_precision: MomentumPrecision);
        with_nesterov(nesterov: bool);
        with_weight_decay(weight_decay: f64);
        with_decay(decay: Decay);
        with_scale(scale: UpdateScale);
        with_layout(layout: WeightLayout);
        with_view(view: MatrixView);
        with_blocks(blocks: Blocks);
        with_adaptive(adaptive: Adaptive);
        with_rounding(rounding: Rounding);
        with_coefficients(coefficients: Coefficients);
        with_epsilon(epsilon: f64);
        with_precision(precision: Precision);
        with_form(form: NewtonSchulzForm);
    }

    /// Sets [`MuonConfig::steps`].
    pub fn with_steps(mut self, steps: usize) -> Self {
        self.steps = Some(steps);
        self
    }

    /// Sets [`MuonConfig::momentum_warmup`]: from a momentum of `start`, over `steps` steps.
    pub fn with_momentum_warmup(mut self, start: f64, steps: usize) -> Self {
        self.momentum_warmup = Some(MomentumWarmup { start, steps });
        self
    }

    /// The momentum at step `step` (from 0).
    pub fn momentum_at(&self, step: usize) -> f64 {
        match self.momentum_warmup {
            Some(MomentumWarmup { start, steps }) if step < steps => {
                start + (self.momentum - start) * step as f64 / steps as f64
            }
            _ => self.momentum,
        }
    }

    /// The optimizer for single parameters, which [`ParameterRules`](crate::ParameterRules) and [`Muon::step_batch`] use.
    pub fn build(&self) -> Muon {
        let newton_schulz = NewtonSchulz {
            epsilon: self.epsilon,
            dtype: match self.precision {
                Precision::F32 => None,
                Precision::Bf16 => Some(DType::BF16),
                Precision::F16 => Some(DType::F16),
            },
            form: self.form.clone(),
            ..NewtonSchulz::new(&self.coefficients, self.steps.unwrap_or_else(|| self.coefficients.default_steps()))
        };
        Muon { config: self.clone(), newton_schulz }
    }

    /// Initialize Muon for every parameter of a module, as Burn's own configs do. Muon panics for a vector, so a module
    /// with parameters that are not matrices needs [`ParameterRules`](crate::ParameterRules).
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.mixed())
    }

    /// The shape of [`MuonState::second_moment`](super::MuonState::second_moment) for a parameter of this shape, if the settings
    /// keep one.
    pub(crate) fn second_moment_shape(&self, shape: &[usize]) -> Option<[usize; 3]> {
        let [batch, rows, columns] = self.view.stack(shape);
        // NorMuon averages over a layer's inputs: if that side is split, each block has its own average.
        let averages =
            |split: bool| if split { self.blocks.sizes(rows, columns).map_or(1, |sizes| sizes.len()) } else { 1 };
        match (self.adaptive, self.layout_of_view()) {
            (Adaptive::Off, _) => None,
            (Adaptive::AdaMuon { .. }, _) => Some([batch, rows, columns]),
            (Adaptive::NorMuon { .. }, WeightLayout::InOut) => {
                Some([batch, averages(matches!(self.blocks, Blocks::Rows(_))), columns])
            }
            (Adaptive::NorMuon { .. }, WeightLayout::OutIn) => {
                Some([batch, rows, averages(matches!(self.blocks, Blocks::Columns(_)))])
            }
        }
    }

    /// Which side of a matrix is the layer's input. A kernel is read as `[out, in * ...]` whatever the layout is.
    pub(super) fn layout_of_view(&self) -> WeightLayout {
        match self.view {
            MatrixView::Stack => self.layout,
            MatrixView::Kernel => WeightLayout::OutIn,
        }
    }

    /// [`MuonConfig::build`] with [`MuonConfig::rounding`].
    pub(crate) fn mixed(&self) -> MixedPrecision<Muon> {
        MixedPrecision { optimizer: self.build(), rounding: self.rounding }
    }
}
