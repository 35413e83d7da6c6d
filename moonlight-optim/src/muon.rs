//! Muon: momentum, orthogonalised.

use burn::optim::{LearningRate, ModuleOptimizer, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Tensor};
use burn_pack::Scalar;
use serde::{Deserialize, Serialize};

use crate::newton_schulz::full_precision;
use crate::{
    Adaptive, Blocks, Coefficients, Decay, Form, MixedPrecision, NewtonSchulz, Preconditioning, Rounding, Scale,
    WeightLayout,
};

/// The type of the products inside Newton-Schulz.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16, as in the report's training: quicker where the device has units for it.
    Bf16,
    /// f16: 8 times more exact than bf16. Its largest number, 65504, is far from anything that the iteration holds.
    F16,
}

/// The type that momentum is kept in between steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MomentumPrecision {
    /// f32 (f64 for f64 parameters).
    #[default]
    F32,
    /// bf16: half of the state. Each step's sum is computed in f32 and rounded once.
    Bf16,
}

/// How a stored parameter is read as matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// A lower momentum at the start: from `start` to [`MuonConfig::momentum`] on a straight line over `steps` steps, as
/// modded-nanogpt has it (0.85 to 0.95 over 300).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MomentumWarmup {
    /// The momentum of the first step.
    pub start: f64,
    /// Steps until the full momentum.
    pub steps: usize,
}

/// Settings of [`Muon`]; the defaults are the report's (arXiv 2502.16982, 2.2 and its released code).
///
/// ```
/// use moonlight_optim::{MuonConfig, Scale};
///
/// let config = MuonConfig::new().with_weight_decay(0.0).with_scale(Scale::KellerJordan);
/// let muon = config.build();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// Momentum `mu` in `M <- mu M + grad`. 0.95.
    pub momentum: f64,
    /// A lower momentum at the start. None.
    pub momentum_warmup: Option<MomentumWarmup>,
    /// The type that momentum is kept in. f32.
    pub momentum_precision: MomentumPrecision,
    /// Whether Newton-Schulz gets `mu M + grad` (Nesterov) or `M`. `true`.
    pub nesterov: bool,
    /// Decoupled weight decay: `W <- W - lr * weight_decay * W`, at the learning rate before any scale. 0.1.
    pub weight_decay: f64,
    /// Schedule and kind of the decay. Constant, times the learning rate, on every weight.
    pub decay: Decay,
    /// The factor on the orthogonalised update. `0.2 sqrt(max(A, B))`.
    pub scale: Scale,
    /// Which side of a stored matrix is the layer's input; read only by scales that are not symmetric.
    pub layout: WeightLayout,
    /// Stacks of matrices, or convolution kernels. Stacks.
    pub view: MatrixView,
    /// How each matrix is cut up. It is not.
    pub blocks: Blocks,
    /// Second moments of the update: NorMuon, AdaMuon. None.
    pub adaptive: Adaptive,
    /// How parameters in half precision are stored. To nearest. Read by [`MuonConfig::init`] and by parameter groups.
    pub rounding: Rounding,
    /// The polynomials of Newton-Schulz.
    pub coefficients: Coefficients,
    /// The number of Newton-Schulz steps; as many as the coefficients come with if `None`, 5 for the report's.
    pub steps: Option<usize>,
    /// Added to a matrix's norm before dividing by it. 1e-7.
    pub epsilon: f64,
    /// The type of the products inside Newton-Schulz. f32.
    pub precision: Precision,
    /// The form of the iteration. The cheaper one for each shape.
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

    /// The momentum at step `step` (from 0).
    pub fn momentum_at(&self, step: usize) -> f64 {
        match self.momentum_warmup {
            Some(MomentumWarmup { start, steps }) if step < steps => {
                start + (self.momentum - start) * step as f64 / steps as f64
            }
            _ => self.momentum,
        }
    }

    /// Sets [`MuonConfig::momentum`].
    pub fn with_momentum(mut self, momentum: f64) -> Self {
        self.momentum = momentum;
        self
    }

    /// Sets [`MuonConfig::nesterov`].
    pub fn with_nesterov(mut self, nesterov: bool) -> Self {
        self.nesterov = nesterov;
        self
    }

    /// Sets [`MuonConfig::weight_decay`].
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets [`MuonConfig::scale`].
    pub fn with_scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// Sets [`MuonConfig::layout`].
    pub fn with_layout(mut self, layout: WeightLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Sets [`MuonConfig::coefficients`].
    pub fn with_coefficients(mut self, coefficients: Coefficients) -> Self {
        self.coefficients = coefficients;
        self
    }

    /// Sets [`MuonConfig::steps`].
    pub fn with_steps(mut self, steps: usize) -> Self {
        self.steps = Some(steps);
        self
    }

    /// Sets [`MuonConfig::epsilon`].
    pub fn with_epsilon(mut self, epsilon: f64) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets [`MuonConfig::precision`].
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Sets [`MuonConfig::momentum_precision`].
    pub fn with_momentum_precision(mut self, momentum_precision: MomentumPrecision) -> Self {
        self.momentum_precision = momentum_precision;
        self
    }

    /// Sets [`MuonConfig::decay`].
    pub fn with_decay(mut self, decay: Decay) -> Self {
        self.decay = decay;
        self
    }

    /// Sets [`MuonConfig::view`].
    pub fn with_view(mut self, view: MatrixView) -> Self {
        self.view = view;
        self
    }

    /// Sets [`MuonConfig::blocks`].
    pub fn with_blocks(mut self, blocks: Blocks) -> Self {
        self.blocks = blocks;
        self
    }

    /// Sets [`MuonConfig::adaptive`].
    pub fn with_adaptive(mut self, adaptive: Adaptive) -> Self {
        self.adaptive = adaptive;
        self
    }

    /// Sets [`MuonConfig::rounding`].
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        self.rounding = rounding;
        self
    }

    /// Sets [`MuonConfig::momentum_warmup`]: from `start` over `steps` steps.
    pub fn with_momentum_warmup(mut self, start: f64, steps: usize) -> Self {
        self.momentum_warmup = Some(MomentumWarmup { start, steps });
        self
    }

    /// Sets [`MuonConfig::form`].
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }

    /// The optimizer, to be given to a parameter group (see [`ParameterRules`](crate::ParameterRules)).
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

    /// The shape of [`MuonState::second_moment`] for a parameter of this shape, which the view takes.
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

    /// Which side of a matrix is the input, as the view has it.
    fn layout_of_view(&self) -> WeightLayout {
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

/// The Muon optimizer, for matrices `[A, B]` and for stacks of matrices `[batch, A, B]`.
///
/// ```text
/// M <- mu M + grad
/// O  = NewtonSchulz(mu M + grad)                 (Nesterov; or of M)
/// W <- W - lr * (0.2 sqrt(max(A, B)) O + weight_decay W)
/// ```
///
/// Every matrix of a stack, and every block of a matrix, is orthogonalised and scaled as if it stood alone, from its own
/// two dimensions.
///
/// A zero gradient with zero momentum gives a zero update. A gradient that holds a NaN or an infinity makes the
/// parameter's own matrix NaN, visibly, and no other matrix of its stack; as with AdamW the momentum keeps the NaN, so
/// a loop that wants to go on must look at its gradients before it steps.
///
/// Momentum and update are computed in f32 (f64 for f64 parameters) and the parameter is rounded once, so bf16
/// parameters keep an f32 momentum.
///
/// [`Muon::step`](Optimizer::step) is a function of parameter, gradient and state, and so is [`Muon::step_batch`] for
/// equal matrices at once: whoever owns some matrices can call it for those, on any machine. [`share_out`](crate::share_out)
/// says who owns what.
///
/// # Panics
///
/// [`Optimizer::step`] panics for a parameter whose rank the [`MatrixView`] does not take, where the update has no meaning,
/// and for [`Blocks`] that do not fill the matrix. [`ParameterRules`](crate::ParameterRules) turns both into errors before
/// the first step.
#[derive(Clone, Debug)]
pub struct Muon {
    config: MuonConfig,
    newton_schulz: NewtonSchulz,
}

/// What Muon keeps for a parameter: one buffer of its shape, half of what AdamW keeps.
#[derive(Clone, Debug)]
pub struct MuonState<const D: usize> {
    /// `M`, in f32 (f64 for f64 parameters) or bf16.
    pub momentum: Tensor<D>,
    /// What [`Adaptive`] keeps: for AdaMuon `[batch, A, B]`, for NorMuon `[batch, 1, out]` or `[batch, out, 1]` (of the
    /// side that is not out, one for each block).
    pub second_moment: Option<Tensor<3>>,
    /// Steps taken.
    pub step: usize,
}

impl<const D: usize> RecordState for MuonState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, "momentum", self.momentum.clone().into_data());
        if let Some(second_moment) = &self.second_moment {
            out.push_tensor(prefix, "second_moment", second_moment.clone().into_data());
        }
        out.push_scalar(prefix, "step", Scalar::from(self.step));
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        // The stored type, not the device's default: a state must come back bit for bit.
        let data = src.take_tensor(prefix, "momentum")?;
        let dtype = data.dtype();
        let momentum = Tensor::from_data(data, (device, dtype));
        let second_moment = src.take_tensor(prefix, "second_moment").map(|data| {
            let dtype = data.dtype();
            Tensor::from_data(data, (device, dtype))
        });
        // States of before there were steps in them have none.
        let step = src.take_scalar(prefix, "step").and_then(|step| usize::try_from(step).ok()).unwrap_or(0);
        Some(Self { momentum, second_moment, step })
    }
}

/// Parameter, gradient and state of one matrix of a batch.
type Member<const D: usize> = (Tensor<D>, Tensor<D>, Option<MuonState<D>>);

impl Muon {
    /// The settings it was built from.
    pub fn config(&self) -> &MuonConfig {
        &self.config
    }

    /// The iteration that it orthogonalises with.
    pub fn newton_schulz(&self) -> &NewtonSchulz {
        &self.newton_schulz
    }

    /// The update of a parameter for a momentum (Nesterov already applied): orthogonalised and scaled, before the
    /// learning rate and without decay, `[batch, A, B]` to `[batch, A, B]`; and the second moment after it, if there is one.
    ///
    /// # Panics
    ///
    /// For [`Blocks`] that do not fill the matrix.
    pub fn direction(&self, momentum: Tensor<3>, second_moment: Option<Tensor<3>>) -> (Tensor<3>, Option<Tensor<3>>) {
        let blocks = &self.config.blocks;
        if *blocks == Blocks::Whole {
            return self.block_direction(momentum, second_moment);
        }
        let [batch, rows, columns] = momentum.dims();
        let Some(sizes) = blocks.sizes(rows, columns) else {
            panic!("{blocks} do not fill a matrix of [{rows}, {columns}]");
        };
        let parts = blocks.cut(&momentum, &sizes);
        // A second moment has the block's size along the side that is cut, or one number for each block.
        let mut seconds: Vec<Option<Tensor<3>>> = match &second_moment {
            Some(second) => {
                let one_each = blocks.extent(second) == sizes.len();
                let ones = vec![1; sizes.len()];
                blocks.cut(second, if one_each { &ones } else { &sizes }).into_iter().map(Some).collect()
            }
            None => vec![None; sizes.len()],
        };
        // Blocks of equal size go through as one stack.
        let mut updates: Vec<Option<Tensor<3>>> = vec![None; sizes.len()];
        for first in 0..sizes.len() {
            if updates[first].is_some() {
                continue;
            }
            let members: Vec<usize> = (first..sizes.len()).filter(|&block| sizes[block] == sizes[first]).collect();
            let stacked = Tensor::cat(members.iter().map(|&block| parts[block].clone()).collect(), 0);
            let second = members.iter().map(|&block| seconds[block].take()).collect::<Option<Vec<_>>>();
            let (update, second) = self.block_direction(stacked, second.map(|seconds| Tensor::cat(seconds, 0)));
            for (place, &block) in members.iter().enumerate() {
                let own = |x: &Tensor<3>| x.clone().narrow(0, place * batch, batch);
                updates[block] = Some(own(&update));
                seconds[block] = second.as_ref().map(own);
            }
        }
        let update = blocks.join(updates.into_iter().flatten().collect());
        let seconds: Option<Vec<_>> = seconds.into_iter().collect();
        (update, seconds.map(|seconds| blocks.join(seconds)))
    }

    fn block_direction(&self, momentum: Tensor<3>, second: Option<Tensor<3>>) -> (Tensor<3>, Option<Tensor<3>>) {
        let [_, rows, columns] = momentum.dims();
        let layout = self.config.layout_of_view();
        let adaptive = self.config.adaptive;
        let input = adaptive.input(momentum);
        // Of a square matrix AOL rescales the outputs, as its authors do, where the rows of a matrix are outputs.
        let aol = self.newton_schulz.preconditioning == Preconditioning::Aol;
        let update = if aol && rows == columns && layout == WeightLayout::InOut {
            self.newton_schulz.apply(input.swap_dims(1, 2)).swap_dims(1, 2)
        } else {
            self.newton_schulz.apply(input)
        };
        let (update, second) = adaptive.apply(update, second, layout);
        let update = match (self.config.scale.factor(rows, columns, layout), self.config.scale) {
            (Some(factor), _) => update.mul_scalar(factor),
            (None, Scale::UpdateNorm { factor }) => {
                let mean_square = update.clone().square().mean_dims(&[1, 2]); // [batch, 1, 1]
                // An update of zeros stays one.
                let rms = mean_square.sqrt().add_scalar(f64::from(f32::MIN_POSITIVE));
                update.mul(rms.recip().mul_scalar(factor))
            }
            (None, _) => update,
        };
        (update, second)
    }

    /// A step of equal matrices at once: `(parameter, gradient, state)` of each to `(parameter, state)` of each, as
    /// [`Optimizer::step`] gives them one by one, bit for bit, in one Newton-Schulz for all that have taken equally many
    /// steps.
    ///
    /// # Panics
    ///
    /// If the parameters are not of one shape and type, and as [`Optimizer::step`].
    pub fn step_batch<const D: usize>(
        &self,
        lr: LearningRate,
        parameters: Vec<Member<D>>,
    ) -> Vec<(Tensor<D>, MuonState<D>)> {
        let Some((first, _, _)) = parameters.first() else { return Vec::new() };
        let (shape, dtype) = (first.shape(), first.dtype());
        assert!(
            parameters.iter().all(|(tensor, _, _)| tensor.shape() == shape && tensor.dtype() == dtype),
            "the parameters of a batch have one shape and one type"
        );
        let stack = self.stack(shape.as_slice());
        let members = parameters.into_iter().map(|(tensor, grad, state)| {
            let state = state.map(|state| MuonState {
                momentum: state.momentum.reshape(stack),
                second_moment: state.second_moment,
                step: state.step,
            });
            (tensor.reshape(stack), grad.reshape(stack), state)
        });
        let stepped = self.step_stacks(lr, members.collect());
        let restored = stepped.into_iter().map(|(tensor, state)| {
            let MuonState { momentum, second_moment, step } = state;
            let momentum = momentum.reshape(shape.clone());
            (tensor.reshape(shape.clone()), MuonState { momentum, second_moment, step })
        });
        restored.collect()
    }

    /// [`Muon::step_batch`] of parameters that are stacks `[batch, A, B]` already.
    pub(crate) fn step_stacks(&self, lr: LearningRate, parameters: Vec<Member<3>>) -> Vec<(Tensor<3>, MuonState<3>)> {
        let batch = parameters.first().map_or(0, |(tensor, _, _)| tensor.dims()[0]);
        let mut results: Vec<Option<(Tensor<3>, MuonState<3>)>> = vec![None; parameters.len()];
        let age = |state: &Option<MuonState<3>>| state.as_ref().map(|state| state.step);
        let mut waiting: Vec<(usize, Member<3>)> = parameters.into_iter().enumerate().collect();
        while let Some((_, (_, _, state))) = waiting.first() {
            let together = age(state);
            let (now, later): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(_, (_, _, state))| age(state) == together);
            waiting = later;
            let (places, now): (Vec<usize>, Vec<Member<3>>) = now.into_iter().unzip();
            #[cfg(feature = "cpu")]
            let now = match self.step_plainly(lr, together.unwrap_or(0), now) {
                Ok(stepped) => {
                    places.into_iter().zip(stepped).for_each(|(place, stepped)| results[place] = Some(stepped));
                    continue;
                }
                Err(now) => now,
            };
            let (mut tensors, mut grads) = (Vec::with_capacity(now.len()), Vec::with_capacity(now.len()));
            let (mut momenta, mut seconds) = (Vec::new(), Vec::new());
            for (tensor, grad, state) in now {
                tensors.push(tensor);
                grads.push(grad);
                if let Some(state) = state {
                    momenta.push(state.momentum);
                    seconds.extend(state.second_moment);
                }
            }
            let state = together.map(|step| MuonState {
                momentum: Tensor::cat(momenta, 0),
                second_moment: (seconds.len() == places.len()).then(|| Tensor::cat(seconds, 0)),
                step,
            });
            let (tensor, state) = self.step_stack(lr, Tensor::cat(tensors, 0), Tensor::cat(grads, 0), state);
            for (index, place) in places.into_iter().enumerate() {
                let own = |x: &Tensor<3>| x.clone().narrow(0, index * batch, batch);
                let second_moment = state.second_moment.as_ref().map(own);
                let state = MuonState { momentum: own(&state.momentum), second_moment, step: state.step };
                results[place] = Some((own(&tensor), state));
            }
        }
        results.into_iter().flatten().collect()
    }

    /// A step of members of one age in the CPU backend's kernel, if it has one for these settings; gives them back if not.
    #[cfg(feature = "cpu")]
    fn step_plainly(
        &self,
        lr: LearningRate,
        step: usize,
        members: Vec<Member<3>>,
    ) -> Result<Vec<(Tensor<3>, MuonState<3>)>, Vec<Member<3>>> {
        let config = &self.config;
        let Some((first, _, _)) = members.first() else { return Ok(Vec::new()) };
        let shape @ [_, rows, columns] = first.dims();
        let plain = config.adaptive == Adaptive::Off
            && config.blocks == Blocks::Whole
            && !config.decay.cautious
            && config.momentum_precision == MomentumPrecision::F32
            && self.newton_schulz.preconditioning == Preconditioning::Frobenius;
        let Some(factor) = config.scale.factor(rows, columns, config.layout_of_view()).filter(|_| plain) else {
            return Err(members);
        };
        let tensors = members.iter().flat_map(|(tensor, grad, state)| {
            [tensor, grad].into_iter().chain(state.as_ref().map(|state| &state.momentum))
        });
        if !crate::flex::takes(&self.newton_schulz, shape, tensors) {
            return Err(members);
        }
        let numbers = crate::flex::Step {
            momentum: config.momentum_at(step),
            nesterov: config.nesterov,
            kept: 1.0 - config.decay.fraction(config.weight_decay, lr, step),
            factor,
            learning_rate: lr,
        };
        let operands =
            members.into_iter().map(|(tensor, grad, state)| (tensor, grad, state.map(|state| state.momentum)));
        let stepped = crate::flex::step_many(&self.newton_schulz, numbers, operands.collect());
        let stepped = stepped.into_iter().map(|crate::flex::Stepped { tensor, momentum }| {
            (tensor, MuonState { momentum, second_moment: None, step: step + 1 })
        });
        Ok(stepped.collect())
    }

    /// `[batch, A, B]` of a parameter's shape.
    fn stack(&self, shape: &[usize]) -> [usize; 3] {
        let view = self.config.view;
        assert!(
            view.takes(shape.len()),
            "Muon orthogonalises matrices `[A, B]` and stacks of matrices `[batch, A, B]`; a parameter of shape {shape:?} \
             is neither and belongs in another parameter group"
        );
        view.stack(shape)
    }

    /// A step of a stack `[batch, A, B]`, by a kernel where there is one.
    fn step_alone(&self, lr: LearningRate, member: Member<3>) -> (Tensor<3>, MuonState<3>) {
        #[cfg(feature = "cpu")]
        let member = {
            let step = member.2.as_ref().map_or(0, |state| state.step);
            match self.step_plainly(lr, step, vec![member]).map(|mut stepped| stepped.pop()) {
                Ok(Some(stepped)) => return stepped,
                Err(mut members) if members.len() == 1 => members.remove(0),
                _ => unreachable!("one goes in, and one comes out"),
            }
        };
        let (tensor, grad, state) = member;
        self.step_stack(lr, tensor, grad, state)
    }

    /// A step of a stack `[batch, A, B]` in Burn's operations, but for Newton-Schulz.
    fn step_stack(
        &self,
        lr: LearningRate,
        tensor: Tensor<3>,
        grad: Tensor<3>,
        state: Option<MuonState<3>>,
    ) -> (Tensor<3>, MuonState<3>) {
        let nesterov = self.config.nesterov;
        let stored = tensor.dtype();
        let dtype = full_precision(stored);
        let (old, second_moment, step) = match state {
            Some(state) => (Some(state.momentum), state.second_moment, state.step),
            None => (None, None, 0),
        };
        let mu = self.config.momentum_at(step);

        let grad = grad.cast(dtype);
        let momentum = match old {
            Some(old) => old.cast(dtype).mul_scalar(mu).add(grad.clone()),
            None => grad.clone(),
        };
        let input = if nesterov { momentum.clone().mul_scalar(mu).add(grad) } else { momentum.clone() };
        let (update, second_moment) = self.direction(input, second_moment);

        let tensor = self.moved(lr, step, tensor.cast(dtype), update).cast(stored);
        let momentum = match self.config.momentum_precision {
            MomentumPrecision::F32 => momentum,
            MomentumPrecision::Bf16 => momentum.cast(DType::BF16),
        };
        (tensor, MuonState { momentum, second_moment, step: step + 1 })
    }
}

impl Muon {
    /// A parameter in full precision, decayed and moved by an update, in step `step`.
    pub(crate) fn moved<const D: usize>(
        &self,
        lr: LearningRate,
        step: usize,
        tensor: Tensor<D>,
        update: Tensor<D>,
    ) -> Tensor<D> {
        let MuonConfig { weight_decay, decay, .. } = self.config;
        let lost = decay.fraction(weight_decay, lr, step);
        let tensor = match (lost != 0.0, decay.cautious) {
            (false, _) => tensor,
            (true, false) => tensor.mul_scalar(1.0 - lost),
            (true, true) => {
                let agrees = tensor.clone().mul(update.clone()).greater_equal_elem(0.0);
                let decayed = tensor.clone().mul_scalar(1.0 - lost);
                tensor.mask_where(agrees, decayed)
            }
        };
        tensor.sub(update.mul_scalar(lr))
    }
}

impl Optimizer for Muon {
    type State<const D: usize> = MuonState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let shape = tensor.shape();
        let stack = self.stack(shape.as_slice());
        let state = state.map(|state| MuonState {
            momentum: state.momentum.reshape(stack),
            second_moment: state.second_moment,
            step: state.step,
        });
        let (tensor, state) = self.step_alone(lr, (tensor.reshape(stack), grad.reshape(stack), state));
        let MuonState { momentum, second_moment, step } = state;
        let momentum = momentum.reshape(shape.clone());
        (tensor.reshape(shape), Some(MuonState { momentum, second_moment, step }))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        MuonState {
            momentum: state.momentum.to_device(device),
            second_moment: state.second_moment.map(|second| second.to_device(device)),
            step: state.step,
        }
    }
}

#[cfg(test)]
mod tests;
