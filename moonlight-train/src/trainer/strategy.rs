//! The loop over steps, as a learning strategy of burn-train's.
//!
//! burn-train counts epochs; here an epoch is the stretch between two validations, so that the dashboard shows its
//! progress, and everything that matters (schedule, validation, checkpoints, resuming) is keyed by the step.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use burn::data::dataloader::Progress;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::{
    EventProcessorTraining, Interrupter, Learner, LearnerEvent, SupervisedLearningStrategy,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem, ValidLoader,
};
use moonlight_model::{CausalLm, Probe};
use moonlight_optim::{Assignment, BatchedOptimizer, update_rms};

use super::backward::Sparing;
use super::qk_clip;
use super::step::{StepSettings, step};
use super::terminal;
use super::trainee::Trainee;
use crate::checkpoint::{Best, Checkpoints, TrainerState};
use crate::data::{Corpus, HostBatch, TrainStream};
use crate::error::TrainError;
use crate::metrics::{Figures, MetricsFile, Split, resident_memory_mib};
use crate::recipe::{Checkpointing, Recipe};
use crate::schedule::Schedule;
use crate::tensorboard::EventWriter;

/// The golden ratio in 64 bits: seeds of neighbouring steps and of neighbouring runs do not meet.
const SEED_STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

/// Everything that the loop works with.
pub(super) struct Run {
    pub(super) recipe: Recipe,
    pub(super) schedule: Schedule,
    pub(super) corpus: Corpus,
    pub(super) stream: TrainStream,
    pub(super) optimizer: BatchedOptimizer,
    pub(super) assignment: Assignment,
    /// The device with gradients.
    pub(super) device: Device,
    pub(super) checkpoints: Checkpoints,
    pub(super) metrics: MetricsFile,
    pub(super) tensorboard: Option<EventWriter>,
    pub(super) state: TrainerState,
    /// Whether each figure is also a line on stderr.
    pub(super) lines: bool,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Steps taken.
    pub step: u64,
    /// Tokens read.
    pub tokens: u64,
    /// The last validation loss, nats.
    pub valid_loss: Option<f64>,
    /// Whether it was asked to stop before its last step.
    pub interrupted: bool,
    /// The checkpoint of the last step.
    pub checkpoint: PathBuf,
}

/// The strategy: takes the run once and leaves how it ended.
pub(super) struct StepStrategy {
    run: Mutex<Option<Run>>,
    outcome: Mutex<Option<Result<Finished, TrainError>>>,
}

impl StepStrategy {
    pub(super) fn new(run: Run) -> Self {
        Self { run: Mutex::new(Some(run)), outcome: Mutex::new(None) }
    }

    /// How the run ended; `None` before it did.
    pub(super) fn take_outcome(&self) -> Option<Result<Finished, TrainError>> {
        self.outcome.lock().unwrap_or_else(|lock| lock.into_inner()).take()
    }
}

impl SupervisedLearningStrategy<Trainee> for StepStrategy {
    fn fit(
        &self,
        components: TrainingComponents<Trainee>,
        learner: Learner<Trainee>,
        _train: TrainLoader<Trainee>,
        _valid: ValidLoader<Trainee>,
        _starting_epoch: usize,
    ) -> (Trainee, SupervisedTrainingEventProcessor<Trainee>) {
        let run = self.run.lock().unwrap_or_else(|lock| lock.into_inner()).take();
        let mut trainee = learner.model();
        drop(learner); // or it would keep the initial weights
        let mut stage = Stage { processor: components.event_processor, interrupter: components.interrupter };
        if let Some(mut run) = run {
            let outcome = run.run(&mut trainee, &mut stage);
            *self.outcome.lock().unwrap_or_else(|lock| lock.into_inner()) = Some(outcome);
        }
        (trainee, stage.processor)
    }
}

/// burn-train's side of the loop.
struct Stage {
    processor: SupervisedTrainingEventProcessor<Trainee>,
    interrupter: Interrupter,
}

impl Stage {
    fn train(&mut self, event: LearnerEvent<Figures>) {
        self.interrupter.fail_on_error(self.processor.process_train(event));
    }

    fn valid(&mut self, event: LearnerEvent<Figures>) {
        self.interrupter.fail_on_error(self.processor.process_valid(event));
    }
}

fn item(figures: Figures, done: u64, of: u64, lr: Option<f64>) -> LearnerEvent<Figures> {
    let step = figures.step as usize;
    let progress = Progress { items_processed: done as usize, items_total: of as usize, unit: Some("steps".into()) };
    LearnerEvent::ProcessedItem(TrainingItem::new(figures, progress, Some(step), lr.map(Into::into)))
}

impl Run {
    /// Steps between two validations: an epoch for the dashboard.
    pub(super) fn epoch_steps(recipe: &Recipe) -> u64 {
        match recipe.train.validate_every {
            0 => recipe.train.steps.max(1),
            every => every.min(recipe.train.steps.max(1)),
        }
    }

    fn run(&mut self, trainee: &mut Trainee, stage: &mut Stage) -> Result<Finished, TrainError> {
        let steps = self.recipe.train.steps;
        let epoch_steps = Self::epoch_steps(&self.recipe);
        let mut valid_loss = None;
        let mut saved = None;
        let mut in_epoch = false;
        while self.state.step < steps && !stage.interrupter.should_stop() {
            let epoch = self.state.step / epoch_steps + 1;
            if !in_epoch {
                let total_items = epoch_steps.min(steps - (epoch - 1) * epoch_steps) as usize;
                stage.train(LearnerEvent::StartSplit { epoch_number: epoch as usize, total_items });
                in_epoch = true;
            }
            if !self.lines {
                terminal::keep_interrupt_key();
            }
            let figures = self.step(trainee)?;
            saved = None;
            let done = (self.state.step - 1) % epoch_steps + 1;
            let lr = figures.lr;
            if self.state.step.is_multiple_of(self.recipe.train.log_every) || self.state.step == steps {
                self.record(&figures)?;
            }
            stage.train(item(figures, done, epoch_steps, lr));
            let last = self.state.step == steps;
            if done == epoch_steps || last {
                stage.train(LearnerEvent::EndSplit(epoch as usize));
                in_epoch = false;
                valid_loss = self.validate(trainee, stage, epoch)?.or(valid_loss);
                stage.train(LearnerEvent::EndEpoch(epoch as usize));
            }
            let every = self.recipe.train.checkpoint_every;
            if last || (every > 0 && self.state.step.is_multiple_of(every)) {
                saved = Some(self.save(&trainee.model)?);
            }
        }
        let checkpoint = match saved {
            Some(path) => path,
            None => self.save(&trainee.model)?,
        };
        let interrupted = self.state.step < steps;
        Ok(Finished { step: self.state.step, tokens: self.state.tokens, valid_loss, interrupted, checkpoint })
    }

    pub(super) fn step(&mut self, trainee: &mut Trainee) -> Result<Figures, TrainError> {
        let started = Instant::now();
        // What a step draws, for dropout or rounding, comes from the seed and its number: a resumed run draws the same.
        let step_seed = self.recipe.run.seed.wrapping_add(self.state.step.wrapping_mul(SEED_STRIDE));
        self.device.seed(step_seed);
        let train = &self.recipe.train;
        let index = self.state.step;
        let probed = train.probe_every > 0 && (index + 1).is_multiple_of(train.probe_every);
        let clip = self.recipe.optimizer.qk_clip();
        let settings = StepSettings {
            learning_rate: self.schedule.rate(index),
            gradient_clip: train.gradient_clip,
            balance_weight: self.recipe.moe.sequence_balance_weight,
            bias_update_rate: self.schedule.bias_update_rate(index).unwrap_or(self.recipe.moe.bias_update_rate),
            probe: Probe { attention_logits: probed || clip.is_some() },
            sparing: Sparing {
                recompute: train.activation_checkpointing == Checkpointing::Block,
                loss_chunk_tokens: train.loss_chunk_tokens,
            },
            fused: train.fuse_update,
            dropout_seed: self
                .recipe
                .lora
                .as_ref()
                .filter(|lora| lora.dropout > 0.0)
                .map(|_| step_seed.wrapping_mul(SEED_STRIDE)),
        };
        let passes = self.schedule.gradient_accumulation(index).unwrap_or(train.gradient_accumulation);
        let batches = (0..passes).map(|_| self.stream.next_batch()).collect::<Result<Vec<_>, _>>()?;
        let tokens: u64 = batches.iter().map(HostBatch::token_count).sum();
        let before = probed.then(|| trainee.model.clone());
        let outcome = step(trainee, &mut self.optimizer, &batches, &settings, &self.device).map_err(|broken| {
            TrainError::NotFinite {
                step: index + 1,
                what: broken.what,
                value: broken.value,
                last_checkpoint: self.checkpoints.newest(),
            }
        })?;
        let rms = before.map(|before| self.update_rms(&before, &trainee.model, settings.learning_rate));
        if let Some(clip) = clip {
            trainee.model = qk_clip::clip(trainee.take_model(), &outcome.head_logits, clip);
        }
        let rms_of = |group: &str| {
            rms.as_ref().and_then(|rms| rms.iter().find(|(name, _)| name == group)).map(|(_, value)| *value)
        };
        self.state.step += 1;
        self.state.tokens += tokens;
        self.state.data = self.stream.position();
        let balance = Figures::balance(&outcome.expert_loads);
        Ok(Figures {
            split: Split::Train,
            step: self.state.step,
            tokens: self.state.tokens,
            loss: Some(outcome.loss),
            perplexity: Some(outcome.loss.exp()),
            lr: Some(settings.learning_rate),
            grad_norm: Some(outcome.gradient_norm),
            tokens_per_second: Some(tokens as f64 / started.elapsed().as_secs_f64()),
            memory_mib: resident_memory_mib(),
            expert_imbalance: balance.map(|(imbalance, _)| imbalance),
            dead_experts: balance.map(|(_, dead)| dead),
            max_attention_logit: outcome.attention.map(|(largest, _)| largest),
            share_above_100: outcome.attention.map(|(_, share)| share),
            update_rms_muon: rms_of("muon"),
            update_rms_adamw: rms_of("adamw"),
        })
    }

    fn update_rms(&self, before: &CausalLm, after: &CausalLm, rate: f64) -> Vec<(String, f64)> {
        update_rms(before, after, &self.assignment, rate)
    }

    /// The mean loss over the validation batches, always the same ones; `None` where the recipe has no validation data.
    fn validate(&mut self, trainee: &Trainee, stage: &mut Stage, epoch: u64) -> Result<Option<f64>, TrainError> {
        let model = trainee.valid();
        let device = self.device.clone().inner();
        let limit = match self.recipe.train.validate_batches {
            0 => usize::MAX,
            limit => limit,
        };
        stage.valid(LearnerEvent::StartSplit { epoch_number: epoch as usize, total_items: 1 });
        let (mut loss_sum, mut predicted) = (0.0, 0.0);
        for batch in self.corpus.valid_batches(self.recipe.train.batch_size).take(limit) {
            let batch = batch?;
            loss_sum += model.loss_sum(&batch.to_device(&device));
            predicted += batch.predicted();
        }
        let loss = (predicted > 0.0).then(|| loss_sum / predicted);
        if let Some(loss) = loss {
            let figures = Figures {
                split: Split::Valid,
                step: self.state.step,
                tokens: self.state.tokens,
                loss: Some(loss),
                perplexity: Some(loss.exp()),
                ..Figures::default()
            };
            self.record(&figures)?;
            stage.valid(item(figures, 1, 1, None));
            if self.state.best.is_none_or(|best| loss < best.loss) {
                self.state.best = Some(Best { step: self.state.step, loss });
            }
        }
        stage.valid(LearnerEvent::EndSplit(epoch as usize));
        Ok(loss)
    }

    fn record(&mut self, figures: &Figures) -> Result<(), TrainError> {
        self.metrics.write(figures)?;
        if let Some(writer) = &mut self.tensorboard {
            for (tag, value) in figures.scalars() {
                writer.scalar(&tag, figures.step, value).map_err(TrainError::write("tensorboard"))?;
            }
        }
        if self.lines {
            eprintln!("{}", figures.line());
        }
        Ok(())
    }

    fn save(&mut self, model: &CausalLm) -> Result<PathBuf, TrainError> {
        self.checkpoints.save(model, &self.optimizer, &self.state)
    }
}
