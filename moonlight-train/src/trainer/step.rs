//! One optimizer step: forward and backward over the micro-batches, clipping, update, bias rule.

use burn::tensor::Device;
use moonlight_model::Probe;
use moonlight_optim::MuonAdamW;

use super::backward::{GradientSink, MemoryOptions, MicroBatch, ReducingSink, UpdatingSink, backward};
use super::model_cell::ModelCell;
use super::step_error::StepError;
use super::step_result::{StepResult, StepTotals};
use crate::data::{HostBatch, mask_scale};

/// When parameters are updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UpdateMode {
    /// After the backward pass of the last micro-batch.
    AfterBackward,
    /// As soon as a layer's gradients exist, which are then freed: no clipping, one micro-batch a step, and one rank.
    DuringBackward,
}

/// The settings of one step.
pub(crate) struct StepSettings {
    pub(crate) learning_rate: f64,
    /// The largest global norm of the gradient; 0 for no limit.
    pub(crate) gradient_clip: f64,
    /// Weight of the sequence-wise balance loss.
    pub(crate) balance_weight: f64,
    /// `u` of the bias rule.
    pub(crate) bias_update_rate: f64,
    /// What the forward passes report.
    pub(crate) probe: Probe,
    pub(crate) memory: MemoryOptions,
    pub(crate) update: UpdateMode,
    /// The seed of the adapters' dropout on this rank; `None` without adapters or dropout.
    pub(crate) dropout_seed: Option<u64>,
}

/// Takes a step: forward and backward over this rank's micro-batches, clipping, update, bias rule. `totals` are those of
/// all ranks' micro-batches; one rank is the ordinary case.
///
/// The loss of the step is the mean over all predicted tokens of all micro-batches, weighted by their loss weights. Where
/// these sum to 0 there is no mean: the loss is 0, and model and optimizer stay unchanged, including momentum, weight decay
/// and the routers' bias.
pub(crate) fn step(
    model: &mut ModelCell,
    optimizer: &mut MuonAdamW,
    batches: &[HostBatch],
    totals: StepTotals,
    settings: &StepSettings,
    device: &Device,
) -> Result<StepResult, StepError> {
    // All ranks have the same totals, so none is left waiting in a collective.
    if totals.predicted == 0.0 {
        return Ok(StepResult::default());
    }
    let worker = optimizer.communicator().clone();
    let result = match settings.update {
        UpdateMode::DuringBackward => {
            let mut sink = UpdatingSink::new(model, optimizer, settings.learning_rate);
            let mut local = run_micro_batches(&mut sink, batches, totals, settings, device)?;
            local.gradient_squares = sink.squares();
            local.all_reduce(&worker)?
        }
        UpdateMode::AfterBackward => {
            let mut sink = ReducingSink::new(model, optimizer);
            let mut local = run_micro_batches(&mut sink, batches, totals, settings, device)?;
            sink.finish();
            local.gradient_squares = optimizer.local_sum_of_squares(&**model)?;
            let result = local.all_reduce(&worker)?;
            let scale = clip_factor(settings.gradient_clip, result.gradient_norm());
            model.update(|model| optimizer.apply(settings.learning_rate, scale, model))?;
            result
        }
    };
    let rate = settings.bias_update_rate;
    model.update(|model| Ok::<_, StepError>(model.update_router_bias(&result.expert_loads, rate)))?;
    Ok(result)
}

/// What a gradient of this norm is multiplied by, as torch's `clip_grad_norm_` does.
fn clip_factor(limit: f64, norm: f64) -> f64 {
    if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Forward and backward of each of this rank's micro-batches; the squares of the gradient are left at 0.
fn run_micro_batches(
    sink: &mut impl GradientSink,
    batches: &[HostBatch],
    totals: StepTotals,
    settings: &StepSettings,
    device: &Device,
) -> Result<StepResult, StepError> {
    let mut result = StepResult::default();
    // Only the ratios of the weights count, so they may be as small or as large as numbers are.
    let scale = mask_scale(totals.predicted);
    let predicted = totals.predicted * scale;
    for (index, batch) in batches.iter().enumerate() {
        if let Some(seed) = settings.dropout_seed {
            sink.model().set_dropout_seed(Some(seed.wrapping_add(index as u64)));
        }
        let share = batch.batch as f64 / totals.sequences as f64;
        if index + 1 == batches.len() {
            sink.last_pass();
        }
        let input = MicroBatch {
            batch: batch.to_device_scaled(device, scale),
            loss_scale: 1.0 / predicted,
            balance_weight: settings.balance_weight,
            balance_scale: share,
            probe: settings.probe,
        };
        let (loss_sum, stats) = backward(sink, input, settings.memory)?;
        result.add(loss_sum / predicted, &stats, share);
    }
    if settings.dropout_seed.is_some() {
        // Validation and probes run without dropout.
        sink.model().set_dropout_seed(None);
    }
    Ok(result)
}
