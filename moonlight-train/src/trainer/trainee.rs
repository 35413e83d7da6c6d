//! The model as burn-train sees it.

use burn::module::Module;
use burn::tensor::Device;
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use moonlight_model::{CausalLm, ForwardStats, LmBatch, Probe};

use crate::metrics::Figures;

/// A model with a training step and a validation step.
#[derive(Module, Debug)]
pub struct Trainee {
    /// The model; parameter paths in files and tables begin inside it.
    pub model: CausalLm,
}

/// One forward and backward pass of a step.
#[derive(Debug)]
pub struct MicroBatch {
    /// The tokens.
    pub batch: LmBatch,
    /// Factor on the sum of losses: one over the predicted tokens of the whole step.
    pub loss_scale: f64,
    /// Weight of the sequence-wise balance loss.
    pub balance_weight: f64,
    /// Factor on the balance loss: this batch's share of the step's sequences.
    pub balance_scale: f64,
    /// What to report.
    pub probe: Probe,
}

/// What a forward and backward pass tells.
#[derive(Debug)]
pub struct MicroOutcome {
    /// Sum of the losses of all predicted tokens, nats.
    pub loss_sum: f64,
    /// Expert loads, and what the probe asked for.
    pub report: ForwardStats,
}

impl TrainStep for Trainee {
    type Input = MicroBatch;
    type Output = Figures;

    /// Not called by our strategy, which wants the outcome of each micro-batch; see [`Trainee::step`].
    fn step(&self, input: MicroBatch) -> TrainOutput<Figures> {
        let output = Trainee::step(self, input);
        TrainOutput { grads: output.grads, item: Figures { loss: Some(output.item.loss_sum), ..Figures::default() } }
    }
}

impl Trainee {
    /// The model itself, so that an update can let go of each old parameter at once. What stands in its place until it
    /// is put back holds nothing: parameters that are never used are never drawn.
    pub(super) fn take_model(&mut self) -> CausalLm {
        let stand_in = self.model.config().init(&Device::default());
        std::mem::replace(&mut self.model, stand_in)
    }

    /// Forward and backward of one micro-batch.
    pub fn step(&self, input: MicroBatch) -> TrainOutput<MicroOutcome> {
        let output = self.model.loss(&input.batch, input.balance_weight, input.probe);
        let loss_sum = f64::from(output.loss_sum.clone().into_scalar::<f32>());
        let mut objective = output.loss_sum * input.loss_scale;
        if let Some(balance) = output.balance_loss {
            objective = objective + balance * input.balance_scale;
        }
        let outcome = MicroOutcome { loss_sum, report: output.stats };
        TrainOutput::new(&self.model, objective.backward(), outcome)
    }

    /// The sum of the losses of a batch, nats, without gradients.
    pub fn loss_sum(&self, batch: &LmBatch) -> f64 {
        f64::from(self.model.loss(batch, 0.0, Probe::default()).loss_sum.into_scalar::<f32>())
    }
}

impl InferenceStep for Trainee {
    type Input = LmBatch;
    type Output = Figures;

    fn step(&self, input: LmBatch) -> Figures {
        Figures { loss: Some(self.loss_sum(&input)), ..Figures::default() }
    }
}
