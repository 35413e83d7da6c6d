//! The loop over steps, as a learning strategy of burn-train's.
//!
//! burn-train counts epochs; here an epoch is the stretch between two validations, so that the dashboard shows its
//! progress, and everything that matters (schedule, validation, checkpoints, resuming) is keyed by the step.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use burn::data::dataloader::Progress;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::{
    EventProcessorTraining, Interrupter, Learner, LearnerEvent, SupervisedLearningStrategy,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem, ValidLoader,
};
use moonlight_model::{CausalLm, Probe};
use moonlight_optim::distributed::{Traffic, Worker};
use moonlight_optim::{Assignment, update_rms};

use super::backward::Sparing;
use super::qk_clip;
use super::step::{NotFinite, StepSettings, step};
use super::stepper::Stepper;
use super::terminal;
use super::together::{self, Broken};
use super::trainee::Trainee;
use crate::checkpoint::{Best, Checkpoints, TrainerState};
use crate::data::{Ahead, Corpus, HostBatch, Want};
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
    pub(super) corpus: Arc<Corpus>,
    pub(super) data: Ahead,
    pub(super) optimizer: Stepper,
    pub(super) assignment: Assignment,
    /// The device with gradients.
    pub(super) device: Device,
    pub(super) checkpoints: Checkpoints,
    /// Where figures are written; the other ones of several workers have nowhere.
    pub(super) records: Option<Records>,
    pub(super) state: TrainerState,
    /// Whether each figure is also a line on stderr.
    pub(super) lines: bool,
}

/// The files that figures go to.
pub(super) struct Records {
    pub(super) metrics: MetricsFile,
    pub(super) tensorboard: Option<EventWriter>,
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
    /// What several workers sent and held.
    pub account: Option<String>,
    /// Whether this process is the one that concludes the run.
    pub leads: bool,
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
        let TrainingComponents { event_processor, interrupter, .. } = components;
        let mut stage = Stage { processor: Some(event_processor), interrupter };
        if let Some(mut run) = run {
            let outcome = run.run(&mut trainee, &mut stage);
            *self.outcome.lock().unwrap_or_else(|lock| lock.into_inner()) = Some(outcome);
        }
        (trainee, stage.processor.expect("the stage was given one"))
    }
}

/// burn-train's side of the loop.
pub(super) struct Stage {
    /// Shows the figures; nobody does for the other ones of several workers.
    processor: Option<SupervisedTrainingEventProcessor<Trainee>>,
    interrupter: Interrupter,
}

impl Stage {
    /// A stage without an audience.
    pub(super) fn silent(interrupter: Interrupter) -> Self {
        Self { processor: None, interrupter }
    }

    fn train(&mut self, event: LearnerEvent<Figures>) {
        if let Some(processor) = &mut self.processor {
            self.interrupter.fail_on_error(processor.process_train(event));
        }
    }

    fn valid(&mut self, event: LearnerEvent<Figures>) {
        if let Some(processor) = &mut self.processor {
            self.interrupter.fail_on_error(processor.process_valid(event));
        }
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

    pub(super) fn run(&mut self, trainee: &mut Trainee, stage: &mut Stage) -> Result<Finished, TrainError> {
        let (steps, first) = (self.recipe.train.steps, self.state.step);
        let mut sent = Traffic::default();
        let epoch_steps = Self::epoch_steps(&self.recipe);
        let mut valid_loss = None;
        let mut saved = None;
        let mut in_epoch = false;
        while self.state.step < steps && !self.stops(stage)? {
            let epoch = self.state.step / epoch_steps + 1;
            if !in_epoch {
                let total_items = epoch_steps.min(steps - (epoch - 1) * epoch_steps) as usize;
                stage.train(LearnerEvent::StartSplit { epoch_number: epoch as usize, total_items });
                in_epoch = true;
            }
            if !self.lines && stage.processor.is_some() {
                terminal::keep_interrupt_key();
            }
            let before = self.optimizer.worker().map(Worker::traffic).unwrap_or_default();
            let figures = self.step(trainee, self.state.step == first)?;
            sent = sent + (self.optimizer.worker().map(Worker::traffic).unwrap_or_default() - before);
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
        let account = match &self.optimizer {
            Stepper::Alone(_) => None,
            Stepper::Together(optimizer) => {
                Some(together::account(optimizer, &trainee.model, sent, self.state.step - first)?)
            }
        };
        let (step, tokens, leads) = (self.state.step, self.state.tokens, self.records.is_some());
        Ok(Finished { step, tokens, valid_loss, interrupted, checkpoint, account, leads })
    }

    /// Whether somebody asked for an end; several workers end behind the same step.
    fn stops(&self, stage: &Stage) -> Result<bool, TrainError> {
        let asked = stage.interrupter.should_stop();
        let Some(worker) = self.optimizer.worker() else { return Ok(asked) };
        Ok(worker.numbers(vec![f64::from(u8::from(asked))])?.iter().any(|asked| asked[0] > 0.0))
    }

    pub(super) fn step(&mut self, trainee: &mut Trainee, first: bool) -> Result<Figures, TrainError> {
        let started = Instant::now();
        // The first step is when kernels are compiled and tuned, at each worker's own pace.
        let _busy = self.optimizer.worker().filter(|_| first).map(Worker::busy);
        // What a step draws, for dropout or rounding, comes from the seed and its number: a resumed run draws the same.
        let step_seed = self.recipe.run.seed.wrapping_add(self.state.step.wrapping_mul(SEED_STRIDE));
        self.device.seed(step_seed);
        let train = &self.recipe.train;
        let worker = self.optimizer.worker().map_or(0, Worker::rank);
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
                // Each worker drops other inputs.
                .map(|_| step_seed.wrapping_mul(SEED_STRIDE).wrapping_add((worker as u64) << 32)),
        };
        let before = (probed && self.records.is_some()).then(|| trainee.model.clone());
        let worker_leads = self.records.is_some();
        let not_finite = |broken: NotFinite| TrainError::NotFinite {
            step: index + 1,
            what: broken.what,
            value: broken.value,
            worker: broken.worker,
            last_checkpoint: self.checkpoints.newest(),
        };
        let want = self.want(index);
        let then = (index + 1 < train.steps).then(|| self.want(index + 1));
        let batches = self.data.next(&want, then)?;
        let (outcome, tokens) = match &mut self.optimizer {
            Stepper::Alone(optimizer) => {
                let tokens: u64 = batches.iter().map(HostBatch::token_count).sum();
                (step(trainee, optimizer, &batches, &settings, &self.device).map_err(not_finite)?, tokens)
            }
            Stepper::Together(optimizer) => {
                let (whole, tokens) = together::whole(optimizer.worker(), &batches, want.sequences)?;
                let outcome = together::step(trainee, optimizer, &batches, whole, &settings, &self.device);
                let outcome = outcome.map_err(|broken| match broken {
                    Broken::Lost(error) => error.into(),
                    // All found it, and one says so.
                    Broken::NotFinite(broken) if worker_leads => not_finite(broken),
                    Broken::NotFinite(_) => TrainError::Elsewhere,
                })?;
                (outcome, tokens)
            }
        };
        let rms = before.map(|before| self.update_rms(&before, &trainee.model, settings.learning_rate));
        if let Some(clip) = clip {
            trainee.model = qk_clip::clip(trainee.take_model(), &outcome.head_logits, clip);
        }
        let rms_of = |group: &str| {
            rms.as_ref().and_then(|rms| rms.iter().find(|(name, _)| name == group)).map(|(_, value)| *value)
        };
        self.state.step += 1;
        self.state.tokens += tokens;
        self.state.data = self.data.position();
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

    /// What a step reads: all of its sequences, or this worker's share.
    fn want(&self, step: u64) -> Want {
        let train = &self.recipe.train;
        let passes = self.schedule.gradient_accumulation(step).unwrap_or(train.gradient_accumulation);
        let sequences = passes * train.batch_size;
        match self.optimizer.worker() {
            None => Want { sequences, share: 0..sequences, batches: passes },
            Some(worker) => {
                let (share, batches) = together::share(worker, sequences, train.batch_size);
                Want { sequences, share, batches }
            }
        }
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
        // Several workers take turns.
        let alone = Worker::alone();
        let worker = self.optimizer.worker().unwrap_or(&alone);
        let mut losses = Vec::new();
        for (index, batch) in self.corpus.valid_batches(self.recipe.train.batch_size).take(limit).enumerate() {
            let batch = batch?;
            losses.push(match index % worker.size() == worker.rank() {
                true => (model.loss_sum(&batch.to_device(&device)), batch.predicted()),
                false => (0.0, 0.0),
            });
        }
        let loss = together::mean_loss(worker, &losses)?;
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
        let Some(Records { metrics, tensorboard }) = &mut self.records else { return Ok(()) };
        metrics.write(figures)?;
        if let Some(writer) = tensorboard {
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
        match &self.optimizer {
            Stepper::Alone(optimizer) => self.checkpoints.save(model, &mut &**optimizer, &self.state),
            Stepper::Together(optimizer) => together::save(&self.checkpoints, model, optimizer, &self.state),
        }
    }
}
