//! One optimizer step: forward and backward over the micro-batches, gradient clipping, update, router bias.

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
    /// As soon as a layer's gradients exist, which are then freed (LOMO, arXiv 2306.09782). Not possible with clipping, which
    /// needs the norm of all gradients first, nor with several micro-batches or ranks, whose gradients must be summed first.
    DuringBackward,
}

/// The settings of one step.
pub(crate) struct StepSettings {
    pub(crate) learning_rate: f64,
    /// The largest global L2 norm of the gradient; 0 for no limit.
    pub(crate) gradient_clip: f64,
    /// Weight of the sequence-wise balance loss.
    pub(crate) balance_weight: f64,
    /// `u` in `b += u (sign(e) - mean(sign(e)))`, the rule that balances the experts.
    pub(crate) bias_update_rate: f64,
    /// What the forward passes report.
    pub(crate) probe: Probe,
    pub(crate) memory: MemoryOptions,
    pub(crate) update: UpdateMode,
    /// The seed of the adapters' dropout on this rank; `None` without adapters or dropout.
    pub(crate) dropout_seed: Option<u64>,
}

/// Takes a step: forward and backward over this rank's micro-batches, gradient clipping, update, router bias. `totals` is
/// the size of the step over all ranks.
///
/// The loss is the mean over all predicted tokens of all micro-batches, weighted by their loss weights. If the weights sum
/// to 0 there is no mean: the returned loss is 0, and the step changes neither the model (no weight decay, no router bias)
/// nor the optimizer's momentum.
pub(crate) fn step(
    model: &mut ModelCell,
    optimizer: &mut MuonAdamW,
    batches: &[HostBatch],
    totals: StepTotals,
    settings: &StepSettings,
    device: &Device,
) -> Result<StepResult, StepError> {
    // Every rank has the same totals, so all of them return here and none is left waiting in a collective.
    if totals.predicted == 0.0 {
        return Ok(StepResult::default());
    }
    let comm = optimizer.communicator().clone();
    let result = match settings.update {
        UpdateMode::DuringBackward => {
            let mut sink = UpdatingSink::new(model, optimizer, settings.learning_rate);
            let mut local = run_micro_batches(&mut sink, batches, totals, settings, device)?;
            local.gradient_squares = sink.squares();
            local.all_reduce(&comm)?
        }
        UpdateMode::AfterBackward => {
            let mut sink = ReducingSink::new(model, optimizer);
            let mut local = run_micro_batches(&mut sink, batches, totals, settings, device)?;
            sink.finish();
            // The norm is that of the gradient summed over ranks: each rank measures the parts it owns after the reduction.
            local.gradient_squares = optimizer.local_sum_of_squares(&**model)?;
            // A non-finite loss or norm returns here on every rank, before the model is touched.
            let result = local.all_reduce(&comm)?;
            // The update multiplies each gradient by this while it reads it, which saves a pass over all gradients.
            let scale = clip_factor(settings.gradient_clip, result.gradient_norm());
            model.update(|model| optimizer.apply(settings.learning_rate, scale, model))?;
            result
        }
    };
    let rate = settings.bias_update_rate;
    model.update(|model| Ok::<_, StepError>(model.update_router_bias(&result.expert_loads, rate)))?;
    Ok(result)
}

/// The factor on a gradient of this norm. The `1e-6` is that of torch's `clip_grad_norm_`.
fn clip_factor(limit: f64, norm: f64) -> f64 {
    if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Forward and backward of each of this rank's micro-batches. The result's `gradient_squares` is left at 0.
fn run_micro_batches(
    sink: &mut impl GradientSink,
    batches: &[HostBatch],
    totals: StepTotals,
    settings: &StepSettings,
    device: &Device,
) -> Result<StepResult, StepError> {
    let mut result = StepResult::default();
    // Only ratios of loss weights matter. The power of two keeps their sum within f32 however small or large they are.
    let scale = mask_scale(totals.predicted);
    let predicted = totals.predicted * scale;
    for (index, batch) in batches.iter().enumerate() {
        // Set before the pass and not drawn in it, so that a recomputed layer drops the same values as in the forward pass.
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
        result.add_micro_batch(loss_sum / predicted, &stats, share);
    }
    if settings.dropout_seed.is_some() {
        // Validation runs without dropout.
        sink.model().set_dropout_seed(None);
    }
    Ok(result)
}
