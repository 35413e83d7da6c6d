//! Muon's step.

use burn::optim::{LearningRate, Optimizer};
use burn::tensor::{DType, Device, Tensor};

use super::{MomentumPrecision, MuonConfig, MuonState};
use crate::newton_schulz::full_precision;
use crate::{Blocks, NewtonSchulz, Preconditioning, UpdateScale, WeightLayout};

/// The Muon optimizer, created by [`MuonConfig::build`].
///
/// ```text
/// M <- mu M + grad
/// O  = NewtonSchulz(mu M + grad)                 (without Nesterov: of M)
/// W <- W - lr * (0.2 sqrt(max(A, B)) O + weight_decay W)
/// ```
///
/// "Muon is Scalable for LLM Training" (arXiv 2502.16982), equations 1 and 4, with the defaults of [`MuonConfig`].
///
/// # Shapes
///
/// Parameter and gradient: a matrix `[A, B]` or a stack of matrices `[batch, A, B]`; with [`MatrixView::Kernel`] a
/// convolution kernel `[out, in, ...]`. Every matrix of a stack, and every block of a matrix ([`Blocks`]), is orthogonalized
/// separately and scaled by its own dimensions.
///
/// # Precision
///
/// Momentum and update are computed in f32 (f64 for f64 parameters), and the parameter is rounded once. bf16 parameters
/// have an f32 momentum too, unless [`MuonConfig::momentum_precision`] is bf16.
///
/// A zero gradient with zero momentum gives a zero update. A gradient that contains NaN or infinity makes the whole matrix
/// NaN, and no other matrix of its stack. As with AdamW the momentum stays NaN from then on: check gradients before a step.
///
/// # Several ranks
///
/// [`Muon::step`](Optimizer::step) is a function of parameter, gradient and state, and so is [`Muon::step_batch`] for equal
/// matrices at once: each rank can call it for the matrices that it owns. [`balance`](crate::distributed::balance) assigns
/// matrices to ranks. [`MuonAdamW`](crate::MuonAdamW) does all of this.
///
/// [`MatrixView`]: crate::MatrixView
/// [`MatrixView::Kernel`]: crate::MatrixView::Kernel
///
/// # Panics
///
/// [`Optimizer::step`] panics for a parameter whose number of dimensions the [`MatrixView`] does not take, and for [`Blocks`]
/// that do not fill the matrix. [`ParameterRules`](crate::ParameterRules) turns both into errors before the first step.
///
/// ```
/// use burn::optim::Optimizer;
/// use burn::tensor::{Device, Tensor};
/// use moonlight_optim::MuonConfig;
///
/// let muon = MuonConfig::new().build();
/// let device = Device::default();
/// let (weight, grad) = (Tensor::<2>::ones([4, 6], &device), Tensor::<2>::ones([4, 6], &device));
/// let (weight, state) = muon.step(0.02, weight, grad, None);
/// assert_eq!(weight.dims(), [4, 6]);
/// assert_eq!(state.unwrap().momentum.dims(), [4, 6]);
/// ```
#[derive(Clone, Debug)]
pub struct Muon {
    pub(super) config: MuonConfig,
    pub(super) newton_schulz: NewtonSchulz,
}

/// Parameter, gradient and state of one member of a batch.
type Member<const D: usize> = (Tensor<D>, Tensor<D>, Option<MuonState<D>>);

impl Muon {
    /// The config that this optimizer was built from.
    pub fn config(&self) -> &MuonConfig {
        &self.config
    }

    /// The iteration that orthogonalizes the momentum.
    pub fn newton_schulz(&self) -> &NewtonSchulz {
        &self.newton_schulz
    }

    /// The orthogonalized and scaled update, before learning rate and decay. `momentum` is the input of Newton-Schulz: Nesterov
    /// is already applied. Also returns the new second moment, for an [`Adaptive`](crate::Adaptive) variant.
    ///
    /// # Shapes
    ///
    /// - momentum: `[batch, A, B]`
    /// - second moment: see [`MuonState::second_moment`]
    /// - update: `[batch, A, B]`
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
        let parts = blocks.split(&momentum, &sizes);
        // Along the split side, a second moment has either one entry per element, and is split like the matrix, or one per
        // block: NorMuon's average over inputs, if the input side is split.
        let mut seconds: Vec<Option<Tensor<3>>> = match &second_moment {
            Some(second) => {
                let one_per_block = blocks.extent(second) == sizes.len();
                let ones = vec![1; sizes.len()];
                blocks.split(second, if one_per_block { &ones } else { &sizes }).into_iter().map(Some).collect()
            }
            None => vec![None; sizes.len()],
        };
        // Blocks of equal size are orthogonalized as one stack.
        let mut updates: Vec<Option<Tensor<3>>> = vec![None; sizes.len()];
        for first in 0..sizes.len() {
            if updates[first].is_some() {
                continue;
            }
            let members: Vec<usize> = (first..sizes.len()).filter(|&block| sizes[block] == sizes[first]).collect();
            let stacked = Tensor::cat(members.iter().map(|&block| parts[block].clone()).collect(), 0); // [members * batch, ...]
            let second = members.iter().map(|&block| seconds[block].take()).collect::<Option<Vec<_>>>();
            let (update, second) = self.block_direction(stacked, second.map(|seconds| Tensor::cat(seconds, 0)));
            for (place, &block) in members.iter().enumerate() {
                let of_member = |x: &Tensor<3>| x.clone().narrow(0, place * batch, batch);
                updates[block] = Some(of_member(&update));
                seconds[block] = second.as_ref().map(of_member);
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
        // AOL scales the shorter side, and the rows of a square matrix. Rows are outputs in its authors' `[out, in]`, but inputs
        // in Burn's `[in, out]`, which is therefore transposed: outputs are scaled in either layout.
        let aol = self.newton_schulz.preconditioning == Preconditioning::Aol;
        let update = if aol && rows == columns && layout == WeightLayout::InOut {
            self.newton_schulz.apply(input.swap_dims(1, 2)).swap_dims(1, 2)
        } else {
            self.newton_schulz.apply(input)
        };
        let (update, second) = adaptive.apply(update, second, layout);
        let update = match (self.config.scale.factor(rows, columns, layout), self.config.scale) {
            (Some(factor), _) => update.mul_scalar(factor),
            (None, UpdateScale::UpdateNorm { factor }) => {
                let mean_square = update.clone().square().mean_dims(&[1, 2]); // [batch, 1, 1]
                // Adding the smallest normal f32 keeps an update of zeros from becoming 0 / 0.
                let rms = mean_square.sqrt().add_scalar(f64::from(f32::MIN_POSITIVE));
                update.mul(rms.recip().mul_scalar(factor))
            }
            (None, _) => update,
        };
        (update, second)
    }

    /// Steps several parameters of one shape at once. Takes `(parameter, gradient, state)` of each and returns
    /// `(parameter, state)` of each, in the same order and with the same bits as [`Optimizer::step`] gives one by one.
    /// Parameters that have taken the same number of steps share one batched Newton-Schulz.
    ///
    /// # Panics
    ///
    /// If the parameters differ in shape or dtype, and as [`Optimizer::step`].
    pub fn step_batch<const D: usize>(
        &self,
        lr: LearningRate,
        parameters: Vec<Member<D>>,
    ) -> Vec<(Tensor<D>, MuonState<D>)> {
        let Some((first, _, _)) = parameters.first() else { return Vec::new() };
        let (shape, dtype) = (first.shape(), first.dtype());
        assert!(
            parameters.iter().all(|(tensor, _, _)| tensor.shape() == shape && tensor.dtype() == dtype),
            "the parameters of a batch have one shape and one dtype"
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

    /// [`Muon::step_batch`] of parameters that are already stacks `[batch, A, B]`.
    pub(crate) fn step_stacks(&self, lr: LearningRate, parameters: Vec<Member<3>>) -> Vec<(Tensor<3>, MuonState<3>)> {
        let batch = parameters.first().map_or(0, |(tensor, _, _)| tensor.dims()[0]);
        let mut results: Vec<Option<(Tensor<3>, MuonState<3>)>> = vec![None; parameters.len()];
        // Only members at the same step share a call, since momentum warm-up and decay schedules depend on the step. A member
        // without state (`None`) starts with its gradient as momentum, so it is not grouped with one at step 0 that has state;
        // one whose state was saved by other settings may lack a second moment, and then starts that one alone.
        let key_of =
            |state: &Option<MuonState<3>>| state.as_ref().map(|state| (state.step, state.second_moment.is_some()));
        let mut waiting: Vec<(usize, Member<3>)> = parameters.into_iter().enumerate().collect();
        while let Some((_, (_, _, state))) = waiting.first() {
            let key = key_of(state);
            let step = key.map(|(step, _)| step);
            let (now, later): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(_, (_, _, state))| key_of(state) == key);
            waiting = later;
            let (indices, now): (Vec<usize>, Vec<Member<3>>) = now.into_iter().unzip();
            #[cfg(feature = "cpu")]
            let now = match self.step_in_kernel(lr, step.unwrap_or(0), now) {
                Ok(stepped) => {
                    indices.into_iter().zip(stepped).for_each(|(index, stepped)| results[index] = Some(stepped));
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
            // Stacks of equal shape are concatenated to one larger stack, [members * batch, A, B].
            let state = step.map(|step| MuonState {
                momentum: Tensor::cat(momenta, 0),
                second_moment: (!seconds.is_empty()).then(|| Tensor::cat(seconds, 0)),
                step,
            });
            let (tensor, state) = self.step_stack(lr, Tensor::cat(tensors, 0), Tensor::cat(grads, 0), state);
            for (place, index) in indices.into_iter().enumerate() {
                let of_member = |x: &Tensor<3>| x.clone().narrow(0, place * batch, batch);
                let second_moment = state.second_moment.as_ref().map(of_member);
                let state = MuonState { momentum: of_member(&state.momentum), second_moment, step: state.step };
                results[index] = Some((of_member(&tensor), state));
            }
        }
        results.into_iter().flatten().collect()
    }

    /// Steps members at the same step with the CPU kernel, which fuses momentum, Newton-Schulz, decay and update. Returns the
    /// members as `Err` if the kernel does not support the settings or the tensors: it implements plain Muon only.
    #[cfg(feature = "cpu")]
    fn step_in_kernel(
        &self,
        lr: LearningRate,
        step: usize,
        members: Vec<Member<3>>,
    ) -> Result<Vec<(Tensor<3>, MuonState<3>)>, Vec<Member<3>>> {
        let config = &self.config;
        let Some((first, _, _)) = members.first() else { return Ok(Vec::new()) };
        let shape @ [_, rows, columns] = first.dims();
        let plain = config.adaptive == crate::Adaptive::Off
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
        if !crate::flex::supports_step(&self.newton_schulz, shape, tensors) {
            return Err(members);
        }
        let scalars = crate::flex::StepScalars {
            momentum: config.momentum_at(step),
            nesterov: config.nesterov,
            kept: 1.0 - config.decay.fraction(config.weight_decay, lr, step),
            factor,
            learning_rate: lr,
        };
        let operands =
            members.into_iter().map(|(tensor, grad, state)| (tensor, grad, state.map(|state| state.momentum)));
        let stepped = crate::flex::step_many(&self.newton_schulz, scalars, operands.collect());
        let stepped = stepped.into_iter().map(|crate::flex::Stepped { tensor, momentum }| {
            (tensor, MuonState { momentum, second_moment: None, step: step + 1 })
        });
        Ok(stepped.collect())
    }

    /// The shape `[batch, A, B]` in which a parameter is stepped.
    fn stack(&self, shape: &[usize]) -> [usize; 3] {
        let view = self.config.view;
        assert!(
            view.accepts(shape.len()),
            "Muon orthogonalizes matrices `[A, B]` and stacks of matrices `[batch, A, B]`; a parameter of shape {shape:?} \
             is neither and belongs in another parameter group"
        );
        view.stack(shape)
    }

    /// A step of one stack `[batch, A, B]`, by the CPU kernel if that supports it.
    fn step_one(&self, lr: LearningRate, member: Member<3>) -> (Tensor<3>, MuonState<3>) {
        #[cfg(feature = "cpu")]
        let member = {
            let step = member.2.as_ref().map_or(0, |state| state.step);
            match self.step_in_kernel(lr, step, vec![member]).map(|mut stepped| stepped.pop()) {
                Ok(Some(stepped)) => return stepped,
                Err(mut members) if members.len() == 1 => members.remove(0),
                _ => unreachable!("one member gives one result"),
            }
        };
        let (tensor, grad, state) = member;
        self.step_stack(lr, tensor, grad, state)
    }

    /// A step of a stack `[batch, A, B]` in Burn's operations. Newton-Schulz alone may still run in a kernel.
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

        let tensor = self.decay_and_update(lr, step, tensor.cast(dtype), update).cast(stored);
        // Only the stored momentum is rounded: the update above used the f32 sum.
        let momentum = match self.config.momentum_precision {
            MomentumPrecision::F32 => momentum,
            MomentumPrecision::Bf16 => momentum.cast(DType::BF16),
        };
        (tensor, MuonState { momentum, second_moment, step: step + 1 })
    }
}

impl Muon {
    /// `W <- (1 - decay) W - lr update`, for a parameter in full precision at step `step`. The CPU kernel computes the same
    /// products in the same order, so that both give the same bits.
    pub(crate) fn decay_and_update<const D: usize>(
        &self,
        lr: LearningRate,
        step: usize,
        tensor: Tensor<D>,
        update: Tensor<D>,
    ) -> Tensor<D> {
        let MuonConfig { weight_decay, decay, .. } = self.config;
        let fraction = decay.fraction(weight_decay, lr, step);
        let tensor = match (fraction != 0.0, decay.cautious) {
            (false, _) => tensor,
            (true, false) => tensor.mul_scalar(1.0 - fraction),
            // The update is subtracted, so where it has the weight's sign it shrinks the weight, as decay does.
            (true, true) => {
                let agrees = tensor.clone().mul(update.clone()).greater_equal_elem(0.0);
                let decayed = tensor.clone().mul_scalar(1.0 - fraction);
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
        let (tensor, state) = self.step_one(lr, (tensor.reshape(stack), grad.reshape(stack), state));
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
