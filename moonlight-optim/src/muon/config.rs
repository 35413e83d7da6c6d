//! Settings of Muon.

use burn::config::{Config, config_to_json};
use burn::optim::ModuleOptimizer;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::Muon;
use crate::{Adaptive, Blocks, Coefficients, Decay, Form, MixedPrecision, NewtonSchulz, Rounding, Scale, WeightLayout};

/// The type of the products inside Newton-Schulz.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16, as in the report's training: faster where the device has units for it.
    Bf16,
    /// f16: 8 times more precise than bf16. Its largest number, 65504, is far above anything in the iteration.
    F16,
}

/// The type that momentum is stored in between steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MomentumPrecision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16: half of the memory. Each step's sum is computed in f32 and rounded once.
    Bf16,
}

/// How a stored parameter is read as matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MatrixView {
    /// `[A, B]`, or a stack `[batch, A, B]`.
    #[default]
    Stack,
    /// A convolution kernel `[out, in, ...]` of rank 3 to 5, as one matrix `[out, in * ...]`, as Keller Jordan reads it. The
    /// outputs are the rows, whatever [`MuonConfig::layout`] says.
    Kernel,
}

impl MatrixView {
    /// Whether a parameter of this rank can be read so.
    pub fn takes(self, rank: usize) -> bool {
        match self {
            MatrixView::Stack => (2..=3).contains(&rank),
            MatrixView::Kernel => (3..=5).contains(&rank),
        }
    }

    /// `[batch, A, B]` of a shape that it takes.
    pub fn stack(self, shape: &[usize]) -> [usize; 3] {
        match (self, shape) {
            (MatrixView::Kernel, [outputs, rest @ ..]) => [1, *outputs, rest.iter().product()],
            (MatrixView::Stack, [batch, rows, columns]) => [*batch, *rows, *columns],
            (MatrixView::Stack, [.., rows, columns]) => [1, *rows, *columns],
            _ => [1, 1, shape.iter().product()],
        }
    }
}

/// A lower momentum at the start: linear from `start` to [`MuonConfig::momentum`] over `steps` steps, as in
/// modded-nanogpt (0.85 to 0.95 over 300).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MomentumWarmup {
    /// The momentum of the first step.
    pub start: f64,
    /// Steps until the full momentum.
    pub steps: usize,
}

/// Settings of [`Muon`]; the defaults are those of "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2 and
/// its released code), called "the report" below.
///
/// | field (serde name) | default | alternatives | source |
/// |---|---|---|---|
/// | `momentum` | 0.95 | `0..1` | the report |
/// | `momentum_warmup` | none | `{ start, steps }` | modded-nanogpt |
/// | `momentum_precision` (`momentum_dtype`) | `f32` | `bf16` | half of Muon's state |
/// | `nesterov` | `true` | `false`: orthogonalise `M` itself | Keller Jordan |
/// | `weight_decay` | 0.1 | any | the report |
/// | `decay` | constant, times the learning rate | [`Decay`]: cosine or inverse-square schedule, independent, cautious | arXiv 2309.14322, 2510.12402 |
/// | `scale` | `report`: `0.2 sqrt(max(A, B))` | [`Scale`]: `update_norm`, `hidden_size`, `keller_jordan`, `spectral`, `unit` | the report, equations 4 to 6; arXiv 2310.17813 |
/// | `layout` | `in_out`: Burn's `Linear` | `out_in`: PyTorch's | |
/// | `view` | `stack`: `[A, B]` or `[batch, A, B]` | `kernel`: a convolution kernel as one matrix | Keller Jordan |
/// | `blocks` | `whole` | [`Blocks`]: rows or columns, e.g. one block per head | torchtitan's Moonlight |
/// | `adaptive` | `off` | [`Adaptive`]: `nor_muon`, `ada_muon` | arXiv 2510.05491, 2507.11005 |
/// | `rounding` | `nearest` | [`Rounding`]: `stochastic`, `master` | for parameters in half precision |
/// | `coefficients` | `report` | [`Coefficients`]: `quintic`, `polar_express`, `cans`, `aol`, `deepseek_v4`, `custom` | see each |
/// | `steps` (`newton_schulz_steps`) | the table's own: 5 for `report` | any | the report |
/// | `epsilon` (`newton_schulz_epsilon`) | 1e-7 | 0: independent of the gradient's size | the report's code |
/// | `precision` (`newton_schulz_dtype`) | `f32` | `bf16`, `f16` | the report trains in bf16 |
/// | `form` | `auto`: the cheaper one per shape | [`Form`]: `direct`, `gram` | Dao-AILab/gram-newton-schulz |
///
/// A config is read and written by serde under the names above, every field is optional, unknown names are errors.
/// [`Config::save`] and [`Config::load`] write and read it as JSON.
///
/// ```
/// use moonlight_optim::{MuonConfig, Scale};
///
/// let config = MuonConfig::new().with_weight_decay(0.0).with_scale(Scale::KellerJordan);
/// let muon = config.build();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// Momentum `mu` in `M <- mu M + grad`. Default: 0.95.
    pub momentum: f64,
    /// A lower momentum at the start. Default: none.
    pub momentum_warmup: Option<MomentumWarmup>,
    /// The type that momentum is stored in: `f32` or `bf16`. Default: `f32`.
    #[serde(rename = "momentum_dtype", alias = "momentum_precision")]
    pub momentum_precision: MomentumPrecision,
    /// Whether Newton-Schulz gets `mu M + grad` (Nesterov) or `M`. Default: `true`.
    pub nesterov: bool,
    /// Decoupled weight decay: `W <- W - lr * weight_decay * W`, at the learning rate before any scale. Default: 0.1.
    pub weight_decay: f64,
    /// Schedule and kind of the decay. Default: constant, times the learning rate, on every weight.
    pub decay: Decay,
    /// The factor on the orthogonalised update. Default: `report`, `0.2 sqrt(max(A, B))`.
    pub scale: Scale,
    /// Which side of a stored matrix is the layer's input; used only by scales that are not symmetric. Default: `in_out`.
    pub layout: WeightLayout,
    /// Stacks of matrices, or convolution kernels. Default: `stack`.
    pub view: MatrixView,
    /// The blocks that each matrix is split into, every one orthogonalised alone. Default: `whole`.
    pub blocks: Blocks,
    /// Second moments of the update: NorMuon, AdaMuon. Default: `off`.
    pub adaptive: Adaptive,
    /// How parameters in half precision are stored. Used by [`MuonConfig::init`] and by parameter groups. Default:
    /// `nearest`.
    pub rounding: Rounding,
    /// The polynomials of Newton-Schulz. Default: `report`.
    pub coefficients: Coefficients,
    /// The number of Newton-Schulz steps. Default: as many as the coefficients come with, 5 for the report's.
    #[serde(rename = "newton_schulz_steps", alias = "steps")]
    pub steps: Option<usize>,
    /// Added to a matrix's norm before dividing by it. Default: 1e-7.
    #[serde(rename = "newton_schulz_epsilon", alias = "epsilon")]
    pub epsilon: f64,
    /// The type of the products inside Newton-Schulz: `f32`, `bf16` or `f16`. Default: `f32`.
    #[serde(rename = "newton_schulz_dtype", alias = "precision")]
    pub precision: Precision,
    /// The form of the iteration. Default: `auto`, the cheaper one for each shape.
    pub form: Form,
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
            scale: Scale::default(),
            layout: WeightLayout::default(),
            view: MatrixView::default(),
            blocks: Blocks::default(),
            adaptive: Adaptive::default(),
            rounding: Rounding::default(),
            coefficients: Coefficients::default(),
            steps: None,
            epsilon: 1e-7,
            precision: Precision::default(),
            form: Form::default(),
        }
    }
}

/// [`Config::save`] and [`Config::load`]; unlike a derived config's, a file may leave out any field.
impl Config for MuonConfig {}

impl std::fmt::Display for MuonConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&config_to_json(self))
    }
}

impl MuonConfig {
    /// The report's settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keller Jordan's settings (`SingleDeviceMuonWithAuxAdam` of KellerJordan/Muon): scale `sqrt(max(1, out / in))`, no
    /// decay. His learning rate is 0.02.
    pub fn keller_jordan() -> Self {
        Self::default().with_scale(Scale::KellerJordan).with_weight_decay(0.0)
    }

    /// The settings of Kimi K2 (arXiv 2507.20534): the report's, to be used with [`QkClip`](crate::QkClip).
    pub fn kimi_k2() -> Self {
        Self::default()
    }

    crate::setters::setters! {
        with_momentum(momentum: f64);
        with_momentum_precision(momentum_precision: MomentumPrecision);
        with_nesterov(nesterov: bool);
        with_weight_decay(weight_decay: f64);
        with_decay(decay: Decay);
        with_scale(scale: Scale);
        with_layout(layout: WeightLayout);
        with_view(view: MatrixView);
        with_blocks(blocks: Blocks);
        with_adaptive(adaptive: Adaptive);
        with_rounding(rounding: Rounding);
        with_coefficients(coefficients: Coefficients);
        with_epsilon(epsilon: f64);
        with_precision(precision: Precision);
        with_form(form: Form);
    }

    /// Sets [`MuonConfig::steps`].
    pub fn with_steps(mut self, steps: usize) -> Self {
        self.steps = Some(steps);
        self
    }

    /// Sets [`MuonConfig::momentum_warmup`]: from `start` over `steps` steps.
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

    /// The optimizer of one parameter group (see [`ParameterRules`](crate::ParameterRules)).
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

    /// Muon for every parameter of a module. Only for a module that consists of matrices alone; any other needs
    /// [`ParameterRules`](crate::ParameterRules).
    pub fn init(&self) -> ModuleOptimizer {
        ModuleOptimizer::from(self.mixed())
    }

    /// The shape of [`MuonState::second_moment`](super::MuonState::second_moment) for a parameter of this shape, which the
    /// view takes.
    pub(crate) fn second_moment_shape(&self, shape: &[usize]) -> Option<[usize; 3]> {
        let [batch, rows, columns] = self.view.stack(shape);
        let blocks = |cut: bool| if cut { self.blocks.sizes(rows, columns).map_or(1, |sizes| sizes.len()) } else { 1 };
        match (self.adaptive, self.layout_of_view()) {
            (Adaptive::Off, _) => None,
            (Adaptive::AdaMuon { .. }, _) => Some([batch, rows, columns]),
            (Adaptive::NorMuon { .. }, WeightLayout::InOut) => {
                Some([batch, blocks(matches!(self.blocks, Blocks::Rows(_))), columns])
            }
            (Adaptive::NorMuon { .. }, WeightLayout::OutIn) => {
                Some([batch, rows, blocks(matches!(self.blocks, Blocks::Columns(_)))])
            }
        }
    }

    /// Which side of a matrix is the input, under the view.
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
