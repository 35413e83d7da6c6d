//! One optimizer step: forward and backward over the micro-batches, clipping, update, bias rule.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use moonlight_model::{ForwardReport, Probe};
use moonlight_optim::MuonAdamW;
use moonlight_optim::distributed::sum_of_squares;

use super::backward::{Sparing, Summing, Taker, Updating, backward};
use super::trainee::{MicroBatch, MicroOutcome, Trainee};
use crate::data::HostBatch;

/// What a step is taken with.
pub(crate) struct StepSettings {
    /// The learning rate of this step.
    pub(crate) learning_rate: f64,
    /// The largest global norm of the gradient; 0 for no limit.
    pub(crate) gradient_clip: f64,
    /// Weight of the sequence-wise balance loss.
    pub(crate) balance_weight: f64,
    /// `u` of the bias rule.
    pub(crate) bias_update_rate: f64,
    /// What the forward passes report.
    pub(crate) probe: Probe,
    /// How memory is spared.
    pub(crate) sparing: Sparing,
    /// Whether each layer is updated as soon as its gradients are there: no clipping, and one micro-batch a step.
    pub(crate) fused: bool,
    /// The seed of the adapters' dropout, where they have one.
    pub(crate) dropout_seed: Option<u64>,
}

/// What a step has to tell.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepOutcome {
    /// Mean over all predicted tokens of the step, nats.
    pub(crate) loss: f64,
    /// Global norm of the gradient before clipping.
    pub(crate) gradient_norm: f64,
    /// Tokens of each expert over all micro-batches; `None` for dense layers.
    pub(crate) expert_loads: Vec<Option<Vec<u64>>>,
    /// The largest attention logit and the share of logits above 100, where they were asked for.
    pub(crate) attention: Option<(f64, f64)>,
    /// The largest attention logit of each head of each layer, where they were asked for; else empty.
    pub(crate) head_logits: Vec<Vec<f64>>,
}

/// A loss or a gradient that is no number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NotFinite {
    pub(crate) what: &'static str,
    pub(crate) value: f64,
    /// Which of several workers had it, where that is known.
    pub(crate) worker: Option<usize>,
}

/// What a step is in all, of which the batches at hand may be a share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Whole {
    /// Predicted tokens, each as much as it counts.
    pub(crate) predicted: f64,
    /// Sequences.
    pub(crate) sequences: usize,
}

impl Whole {
    pub(crate) fn of(batches: &[HostBatch]) -> Self {
        Self {
            predicted: batches.iter().map(HostBatch::predicted).sum(),
            sequences: batches.iter().map(|batch| batch.batch).sum(),
        }
    }
}

/// Takes the step: forward and backward over its micro-batches, clipping, update, bias rule.
///
/// The loss of the step is the mean over all predicted tokens of all micro-batches, each as much as it counts, however
/// unevenly they are spread and whatever the sum of their weights. Where that sum is 0 there is nothing to take a mean of:
/// the loss is 0, and model and optimizer stay as they are, momentum, decay and the routers' bias included. The model is
/// also as it was where the loss or the gradient is no number, but for a `fused` step, which has no gradient to look at
/// before it has updated some layers.
pub(crate) fn step(
    trainee: &mut Trainee,
    optimizer: &mut MuonAdamW,
    batches: &[HostBatch],
    settings: &StepSettings,
    device: &Device,
) -> Result<StepOutcome, NotFinite> {
    if Whole::of(batches).predicted == 0.0 {
        return Ok(StepOutcome::default());
    }
    let outcome = if settings.fused {
        fused(trainee, optimizer, batches, settings, device)?
    } else {
        let (gradients, outcome) = gradient(trainee, batches, settings, device)?;
        let stepped = optimizer.step(settings.learning_rate, trainee.take_model(), gradients);
        trainee.model = stepped.expect("one rank has no other to lose");
        outcome
    };
    trainee.model = trainee.take_model().update_router_bias(&outcome.expert_loads, settings.bias_update_rate);
    Ok(outcome)
}

/// The gradient of a step, clipped, and what the step has to tell.
fn gradient(
    trainee: &Trainee,
    batches: &[HostBatch],
    settings: &StepSettings,
    device: &Device,
) -> Result<(GradientsParams, StepOutcome), NotFinite> {
    let mut taker = Summing::new(&trainee.model);
    let mut outcome = passes(&mut taker, batches, Whole::of(batches), settings, device)?;
    let mut gradients = taker.finish();
    outcome.gradient_norm = finite("gradient norm", global_norm(&trainee.model, &gradients))?;
    if settings.gradient_clip > 0.0 {
        // The quotient of torch's `clip_grad_norm_`.
        let scale = settings.gradient_clip / (outcome.gradient_norm + 1e-6);
        if scale < 1.0 {
            gradients = scaled(&trainee.model, gradients, scale);
        }
    }
    Ok((gradients, outcome))
}

/// A step that updates each layer as soon as its gradients are there. There is no norm to clip by before the last of them.
fn fused(
    trainee: &mut Trainee,
    optimizer: &mut MuonAdamW,
    batches: &[HostBatch],
    settings: &StepSettings,
    device: &Device,
) -> Result<StepOutcome, NotFinite> {
    let mut taker = Updating::new(trainee, optimizer, settings.learning_rate);
    let mut outcome = passes(&mut taker, batches, Whole::of(batches), settings, device)?;
    outcome.gradient_norm = finite("gradient norm", taker.norm())?;
    Ok(outcome)
}

/// Forward and backward of each micro-batch; the gradient norm is not yet in what they tell.
pub(super) fn passes(
    taker: &mut impl Taker,
    batches: &[HostBatch],
    whole: Whole,
    settings: &StepSettings,
    device: &Device,
) -> Result<StepOutcome, NotFinite> {
    let predicted = whole.predicted;
    let mut told = StepOutcome::default();
    for (index, batch) in batches.iter().enumerate() {
        taker.model().set_dropout_seed(settings.dropout_seed.map(|seed| seed.wrapping_add(index as u64)));
        let share = batch.batch as f64 / whole.sequences as f64;
        if index + 1 == batches.len() {
            taker.last_pass();
        }
        let input = MicroBatch {
            batch: batch.to_device(device),
            loss_scale: 1.0 / predicted,
            balance_weight: settings.balance_weight,
            balance_scale: share,
            probe: settings.probe,
        };
        let passed = backward(taker, input, settings.sparing);
        taker.model().set_dropout_seed(None);
        let MicroOutcome { loss_sum, report } = passed?;
        told.loss += loss_sum / predicted;
        add_loads(&mut told.expert_loads, report.expert_loads());
        add_head_logits(&mut told.head_logits, &report);
        if let Some((largest, above)) = attention_of(&report) {
            let (old_largest, old_share) = told.attention.unwrap_or((f64::NEG_INFINITY, 0.0));
            told.attention = Some((largest.max(old_largest), old_share + above * share));
        }
    }
    Ok(told)
}

pub(super) fn finite(what: &'static str, value: f64) -> Result<f64, NotFinite> {
    if value.is_finite() { Ok(value) } else { Err(NotFinite { what, value, worker: None }) }
}

fn add_loads(sum: &mut Vec<Option<Vec<u64>>>, loads: Vec<Option<Vec<u64>>>) {
    if sum.is_empty() {
        *sum = loads;
        return;
    }
    for (sum, load) in sum.iter_mut().zip(loads) {
        if let (Some(sum), Some(load)) = (sum, load) {
            sum.iter_mut().zip(load).for_each(|(sum, load)| *sum += load);
        }
    }
}

/// The larger of each head's logits so far and those of one more pass.
fn add_head_logits(so_far: &mut Vec<Vec<f64>>, report: &ForwardReport) {
    let layers = report.layers.iter().map_while(|layer| layer.max_attention_logit.clone());
    for (index, logits) in layers.enumerate() {
        let logits: Vec<f64> = logits.into_data().iter::<f64>().collect();
        match so_far.get_mut(index) {
            Some(largest) => largest.iter_mut().zip(logits).for_each(|(largest, logit)| *largest = largest.max(logit)),
            None => so_far.push(logits),
        }
    }
}

/// The largest logit of all layers and heads, and the mean over the layers of the share above 100.
fn attention_of(report: &ForwardReport) -> Option<(f64, f64)> {
    let mut result: Option<(f64, f64)> = None;
    for layer in &report.layers {
        let largest = layer.max_attention_logit.clone()?.max().into_scalar::<f32>();
        let share = layer.share_above_100.clone()?.into_scalar::<f32>();
        let (old_largest, old_share) = result.unwrap_or((f64::NEG_INFINITY, 0.0));
        result = Some((old_largest.max(largest.into()), old_share + f64::from(share) / report.layers.len() as f64));
    }
    result
}

/// The square root of the sum of all squares.
pub(crate) fn global_norm<M: Module>(module: &M, gradients: &GradientsParams) -> f64 {
    struct Squares<'a>(&'a GradientsParams, f64);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(param.id) {
                self.1 += sum_of_squares(gradient);
            }
        }
    }
    let mut squares = Squares(gradients, 0.0);
    module.visit(&mut squares);
    squares.1.sqrt()
}

fn scaled<M: Module>(module: &M, gradients: GradientsParams, scale: f64) -> GradientsParams {
    struct Scale(GradientsParams, GradientsParams, f64);
    impl ModuleVisitor for Scale {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.remove::<D>(param.id) {
                self.1.register(param.id, gradient * self.2);
            }
        }
    }
    let mut visitor = Scale(gradients, GradientsParams::new(), scale);
    module.visit(&mut visitor);
    visitor.1
}
