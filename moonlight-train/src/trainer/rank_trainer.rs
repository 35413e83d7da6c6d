//! One rank's part of a run: its model, its optimizer, its share of the data.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use burn::train::Interrupter;
use moonlight_model::{CausalLm, Probe};
use moonlight_optim::distributed::{Communicator, even_cuts};
use moonlight_optim::{Assignment, MuonAdamW, update_rms};

use super::backward::MemoryOptions;
use super::exchange::{all_gather, any, exchange_fields};
use super::model_cell::ModelCell;
use super::sample::SampleWriter;
use super::step::{StepSettings, UpdateMode, step};
use super::step_error::StepError;
use super::step_result::StepTotals;
use super::{qk_clip, save};
use crate::checkpoint::{Checkpoints, TrainerState};
use crate::data::{BatchRequest, Dataset, Prefetcher, mask_scale};
use crate::error::TrainError;
use crate::metrics::{Metrics, Split, resident_memory_mib};
use crate::recipe::{Checkpointing, Recipe};
use crate::schedule::Schedule;

/// 2^64 divided by the golden ratio. Multiplied by it, adjacent numbers become seeds that are far apart.
const SEED_STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

/// The trainer of one rank: what the loop in `train_loop.rs` calls.
pub(super) struct RankTrainer {
    pub(super) recipe: Recipe,
    pub(super) schedule: Schedule,
    pub(super) dataset: Arc<Dataset>,
    pub(super) data: Prefetcher,
    pub(super) model: ModelCell,
    pub(super) optimizer: MuonAdamW,
    pub(super) assignment: Assignment,
    /// The autodiff device.
    pub(super) device: Device,
    pub(super) checkpoints: Checkpoints,
    pub(super) state: TrainerState,
    /// Steps taken before this process started.
    pub(super) resumed_at: u64,
    /// Whether the recipe has `[distributed]`, even with one rank, or a launcher started several processes. Such a run logs
    /// how much it sent.
    pub(super) distributed: bool,
    /// Writes samples; `None` on all ranks but the first, and if the recipe asks for none.
    pub(super) samples: Option<SampleWriter>,
}

/// The loss of a validation batch.
struct BatchLoss {
    /// Over all predicted tokens, in nats.
    loss_sum: f64,
    /// The sum of the loss weights.
    predicted: f64,
}

exchange_fields!(BatchLoss { loss_sum, predicted });

impl RankTrainer {
    /// This rank.
    pub(super) fn communicator(&self) -> &Communicator {
        self.optimizer.communicator()
    }

    /// Whether this is rank 0, which reports for all ranks.
    fn is_leader(&self) -> bool {
        self.communicator().rank() == 0
    }

    /// Whether any rank was asked to stop.
    pub(super) fn any_rank_stops(&self, interrupter: &Interrupter) -> Result<bool, TrainError> {
        Ok(any(self.communicator(), interrupter.should_stop())?)
    }

    /// Takes the next step.
    pub(super) fn step(&mut self) -> Result<Metrics, TrainError> {
        let started = Instant::now();
        // The first step compiles and tunes kernels, for which each rank takes its own time: none may time out meanwhile.
        let _busy = (self.state.step == self.resumed_at).then(|| self.communicator().busy());
        let index = self.state.step;
        let settings = self.settings(index);
        let probed = self.is_probed(index);
        // A second handle keeps the old weights alive through the update, so a probed step needs them in memory twice.
        let before = (probed && self.is_leader()).then(|| CausalLm::clone(&self.model));

        // The next step's batches are prefetched during this step; after the last step there is none.
        let next = (index + 1 < self.recipe.train.steps).then(|| self.batch_request(index + 1));
        let batches = self.data.next(&self.batch_request(index), next)?;
        let totals = StepTotals::local(&batches).all_reduce(self.communicator());
        let totals = totals.map_err(|error| self.step_error(index, error))?;
        let result = step(&mut self.model, &mut self.optimizer, &batches, totals, &settings, &self.device);
        let result = result.map_err(|error| self.step_error(index, error))?;

        // Measured before QK-clip, which is not part of the optimizer's update.
        let rate = settings.learning_rate;
        let rms = before.map(|before| update_rms(&before, &*self.model, &self.assignment, rate)).unwrap_or_default();
        let rms = |group: &str| rms.iter().find(|(name, _)| name == group).map(|(_, rms)| *rms);
        if let Some(clip) = self.recipe.optimizer.qk_clip() {
            let clipped = |model| Ok::<_, TrainError>(qk_clip::clip(model, &result.head_logits, clip));
            self.model.update(clipped)?;
        }
        self.state.step += 1;
        self.state.tokens += totals.tokens;
        self.state.data = self.data.position();
        Ok(Metrics {
            split: Split::Train,
            step: self.state.step,
            tokens: self.state.tokens,
            lr: Some(rate),
            tokens_per_second: Some(totals.tokens as f64 / started.elapsed().as_secs_f64()),
            memory_mib: resident_memory_mib(),
            update_rms_muon: rms("muon"),
            update_rms_adamw: rms("adamw"),
            ..result.metrics()
        })
    }

    /// The settings of the step `index`, from 0. Seeds the device for it.
    ///
    /// Every random number of a step, for dropout or stochastic rounding, follows from the run's seed and the step's number,
    /// so that a resumed run draws the same ones.
    fn settings(&self, index: u64) -> StepSettings {
        let Recipe { train, moe, optimizer, lora, .. } = &self.recipe;
        let step_seed = self.recipe.run.seed.wrapping_add(index.wrapping_mul(SEED_STRIDE));
        self.device.seed(step_seed);
        let dropout = lora.as_ref().is_some_and(|lora| lora.adapters.dropout > 0.0);
        // Ranks see different sequences, so each needs its own dropout masks. The rank is in the upper half of the seed, because
        // micro-batches count up in the lower one.
        let rank = (self.communicator().rank() as u64) << 32;
        StepSettings {
            learning_rate: self.schedule.rate(index),
            gradient_clip: train.gradient_clip,
            balance_weight: moe.sequence_balance_weight,
            bias_update_rate: self.schedule.bias_update_rate(index).unwrap_or(moe.bias_update_rate),
            probe: Probe { attention_logits: self.is_probed(index) || optimizer.qk_clip().is_some() },
            memory: MemoryOptions {
                recompute: train.activation_checkpointing == Checkpointing::Block,
                loss_chunk_tokens: train.loss_chunk_tokens,
            },
            update: if train.fuse_update { UpdateMode::DuringBackward } else { UpdateMode::AfterBackward },
            dropout_seed: dropout.then(|| step_seed.wrapping_mul(SEED_STRIDE).wrapping_add(rank)),
        }
    }

    /// Whether the step measures attention logits and the size of its update.
    fn is_probed(&self, index: u64) -> bool {
        let every = self.recipe.train.probe_every;
        every > 0 && (index + 1).is_multiple_of(every)
    }

    /// This rank's share of a step's sequences, in micro-batches of at most the recipe's size.
    fn batch_request(&self, index: u64) -> BatchRequest {
        let train = &self.recipe.train;
        let passes = self.schedule.gradient_accumulation(index).unwrap_or(train.gradient_accumulation);
        // A saturated product is an error later: the stream refuses a step of more than `MAX_STEP_TOKENS` tokens.
        let sequences = passes.saturating_mul(train.batch_size);
        let cuts = even_cuts(sequences, self.communicator().size());
        let share = cuts[self.communicator().rank()]..cuts[self.communicator().rank() + 1];
        let batches = share.len().div_ceil(train.batch_size).max(1);
        BatchRequest { sequences, share, batches }
    }

    fn step_error(&self, index: u64, error: StepError) -> TrainError {
        match error {
            StepError::Collective(error) => error.into(),
            // Every rank returns this error; the leader reports it.
            StepError::NonFinite(_) if !self.is_leader() => TrainError::RemoteFailure,
            StepError::NonFinite(found) => TrainError::NonFinite {
                step: index + 1,
                what: found.what,
                value: found.value,
                rank: found.rank,
                last_checkpoint: self.checkpoints.newest(),
            },
        }
    }

    /// The mean loss over the validation batches, the same ones each time; `None` if the recipe has no validation data.
    pub(super) fn validate(&mut self) -> Result<Option<Metrics>, TrainError> {
        let started = Instant::now();
        let model = self.model.valid();
        let device = self.device.clone().inner();
        let comm = self.communicator();
        let train = &self.recipe.train;
        let limit = if train.validate_batches == 0 { usize::MAX } else { train.validate_batches };
        // Batch `i` goes to rank `i % world_size`. All losses are gathered and then summed in the order of the batches, so
        // that the result has the same bits for every number of ranks.
        let mut losses = Vec::new();
        for (index, batch) in self.dataset.valid_batches(train.batch_size).take(limit).enumerate() {
            let batch = batch?;
            losses.push(match index % comm.size() == comm.rank() {
                true => BatchLoss {
                    loss_sum: {
                        let scale = mask_scale(batch.predicted());
                        let output = model.loss(&batch.to_device_scaled(&device, scale), 0.0, Probe::default());
                        f64::from(output.loss_sum.into_scalar::<f32>()) / scale
                    },
                    predicted: batch.predicted(),
                },
                false => BatchLoss { loss_sum: 0.0, predicted: 0.0 },
            });
        }
        let all = all_gather(comm, &losses)?;
        let (mut loss_sum, mut predicted) = (0.0, 0.0);
        for index in 0..losses.len() {
            let batch = &all[index % comm.size()][index];
            loss_sum += batch.loss_sum;
            predicted += batch.predicted;
        }
        if predicted <= 0.0 {
            return Ok(None);
        }
        let loss = loss_sum / predicted;
        if self.is_leader() {
            tracing::debug!("validated {} batches in {:.1} s", losses.len(), started.elapsed().as_secs_f64());
        }
        self.state.update_best(loss);
        Ok(Some(Metrics {
            split: Split::Valid,
            step: self.state.step,
            tokens: self.state.tokens,
            loss: Some(loss),
            perplexity: Some(loss.exp()),
            ..Metrics::default()
        }))
    }

    /// Writes a sample of the model into `samples.jsonl`. The other ranks wait for the first one in their next collective.
    pub(super) fn write_sample(&mut self) {
        let Some(samples) = &mut self.samples else { return };
        let _busy = self.optimizer.communicator().busy();
        samples.write(&self.model.valid(), self.state.step);
    }

    /// Writes the checkpoint of the current step and returns its folder.
    pub(super) fn save(&self) -> Result<PathBuf, TrainError> {
        save::save(&self.checkpoints, &self.model, &self.optimizer, &self.state)
    }
}
