//! A step of several workers: each on its share of the sequences, sums over all, and the same update everywhere.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor};
use moonlight_model::CausalLm;
use moonlight_optim::MuonAdamW;
use moonlight_optim::distributed::{CollectiveError, Traffic, Worker, even_cuts, sum_of_squares};

use super::backward::Taker;
use super::step::{NotFinite, StepOutcome, StepSettings, Whole, finite, passes};
use super::trainee::Trainee;
use crate::checkpoint::{Checkpoints, Keeping, TrainerState};
use crate::data::HostBatch;
use crate::error::TrainError;

/// What a step of several workers did not come through.
pub(super) enum Broken {
    /// A loss or a gradient, on all workers alike.
    NotFinite(NotFinite),
    /// The workers lost each other.
    Lost(CollectiveError),
}

impl From<CollectiveError> for Broken {
    fn from(error: CollectiveError) -> Self {
        Self::Lost(error)
    }
}

impl From<NotFinite> for Broken {
    fn from(error: NotFinite) -> Self {
        Self::NotFinite(error)
    }
}

/// This worker's share of a number of sequences, and in how many batches of at most `most` it takes them.
pub(super) fn share(worker: &Worker, sequences: usize, most: usize) -> (Range<usize>, usize) {
    let cuts = even_cuts(sequences, worker.size());
    let share = cuts[worker.rank()]..cuts[worker.rank() + 1];
    let batches = share.len().div_ceil(most).max(1);
    (share, batches)
}

/// The sums over all workers of a step's sizes: what it is in all, and its tokens.
pub(super) fn whole(worker: &Worker, batches: &[HostBatch], sequences: usize) -> Result<(Whole, u64), CollectiveError> {
    let own = Whole::of(batches);
    let tokens: u64 = batches.iter().map(HostBatch::token_count).sum();
    let all = worker.numbers(vec![own.predicted, tokens as f64])?;
    let predicted = all.iter().map(|numbers| numbers[0]).sum();
    let tokens = all.iter().map(|numbers| numbers[1]).sum::<f64>() as u64;
    Ok((Whole { predicted, sequences }, tokens))
}

/// Takes the step. The model is as it was where the loss or the gradient is no number, which all workers find alike.
pub(super) fn step(
    trainee: &mut Trainee,
    optimizer: &mut MuonAdamW,
    batches: &[HostBatch],
    whole: Whole,
    settings: &StepSettings,
    device: &Device,
) -> Result<StepOutcome, Broken> {
    // All workers know the whole, and none of them waits for a sum here.
    if whole.predicted == 0.0 {
        return Ok(StepOutcome::default());
    }
    let worker = optimizer.worker().clone();
    let mut taker = Reducing { model: &trainee.model, optimizer, sums: Sums::Open(GradientsAccumulator::new()) };
    let own = passes(&mut taker, batches, whole, settings, device)?;
    taker.finish();
    let squares = optimizer.squares(&trainee.model)?;
    let outcome = summed(&worker, own, squares)?;
    let mut scale = 1.0;
    if settings.gradient_clip > 0.0 {
        // The quotient of torch's `clip_grad_norm_`.
        scale = (settings.gradient_clip / (outcome.gradient_norm + 1e-6)).min(1.0);
    }
    trainee.model = optimizer.apply(settings.learning_rate, scale, trainee.take_model())?;
    trainee.model = trainee.take_model().update_router_bias(&outcome.expert_loads, settings.bias_update_rate);
    Ok(outcome)
}

/// What the step has to tell, from what each worker's share has.
fn summed(worker: &Worker, own: StepOutcome, squares: f64) -> Result<StepOutcome, Broken> {
    let (largest, above) = own.attention.unwrap_or((f64::NEG_INFINITY, 0.0));
    let mut numbers = vec![own.loss, squares, largest, above];
    // Counts below 2^53 are exact.
    numbers.extend(own.expert_loads.iter().flatten().flatten().map(|&load| load as f64));
    let heads = numbers.len();
    numbers.extend(own.head_logits.iter().flatten());
    let all = worker.numbers(numbers)?;
    let sum = |index: usize| all.iter().map(|numbers| numbers[index]).sum::<f64>();
    let largest = |index: usize| all.iter().map(|numbers| numbers[index]).fold(f64::NEG_INFINITY, f64::max);
    if let Some((rank, broken)) = all.iter().enumerate().find(|(_, numbers)| !numbers[0].is_finite()) {
        return Err(NotFinite { what: "loss", value: broken[0], worker: Some(rank) }.into());
    }
    let mut index = 4;
    let mut next = || {
        index += 1;
        index - 1
    };
    let loads = own
        .expert_loads
        .iter()
        .map(|layer| layer.as_ref().map(|loads| loads.iter().map(|_| sum(next()) as u64).collect::<Vec<_>>()));
    let expert_loads = loads.collect();
    let mut index = heads;
    let mut next = || {
        index += 1;
        index - 1
    };
    let logits = own.head_logits.iter().map(|layer| layer.iter().map(|_| largest(next())).collect());
    let head_logits = logits.collect();
    Ok(StepOutcome {
        loss: sum(0),
        gradient_norm: finite("gradient norm", sum(1).sqrt())?,
        expert_loads,
        attention: own.attention.map(|_| (largest(2), sum(3))),
        head_logits,
    })
}

/// Sums the gradients of a worker's micro-batches, and lets those of each stage of the last one go on their way while the
/// pass goes on.
struct Reducing<'a> {
    model: &'a CausalLm,
    optimizer: &'a mut MuonAdamW,
    sums: Sums,
}

enum Sums {
    /// There are more micro-batches to come.
    Open(GradientsAccumulator<CausalLm>),
    /// Those of all micro-batches but the last.
    Earlier(GradientsParams),
}

impl Reducing<'_> {
    /// What the last micro-batch gave no gradient to.
    fn finish(self) {
        if let Sums::Earlier(rest) = self.sums {
            self.optimizer.offer(self.model, rest);
        }
    }
}

impl Taker for Reducing<'_> {
    fn model(&self) -> &CausalLm {
        self.model
    }

    fn take(&mut self, gradients: GradientsParams) {
        match &mut self.sums {
            Sums::Open(sums) => sums.accumulate(self.model, gradients),
            Sums::Earlier(earlier) => {
                let mut adding = Adding { earlier, new: gradients, sums: GradientsParams::new() };
                self.model.visit(&mut adding);
                let sums = adding.sums;
                self.optimizer.offer(self.model, sums);
            }
        }
    }

    fn last_pass(&mut self) {
        if let Sums::Open(sums) = &mut self.sums {
            self.sums = Sums::Earlier(sums.grads());
        }
    }

    fn must_finish(&self) -> bool {
        true
    }
}

/// Adds the gradients of one stage to what came earlier, in Burn's order.
struct Adding<'a> {
    earlier: &'a mut GradientsParams,
    new: GradientsParams,
    sums: GradientsParams,
}

impl ModuleVisitor for Adding<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(new) = self.new.remove::<D>(param.id) else { return };
        let sum = match self.earlier.remove::<D>(param.id) {
            Some(earlier) => earlier.add(new),
            None => new,
        };
        self.sums.register(param.id, sum);
    }
}

/// The mean loss over batches that the workers share, batch by batch as one worker takes it: `losses` has this worker's
/// sums of losses and predicted tokens, and zeros where another has the batch.
pub(super) fn mean_loss(worker: &Worker, losses: &[(f64, f64)]) -> Result<Option<f64>, CollectiveError> {
    let own = losses.iter().flat_map(|&(loss, predicted)| [loss, predicted]).collect();
    let all = worker.numbers(own)?;
    let (mut loss_sum, mut predicted) = (0.0, 0.0);
    for index in 0..losses.len() {
        let by = &all[index % worker.size()];
        loss_sum += by[2 * index];
        predicted += by[2 * index + 1];
    }
    Ok((predicted > 0.0).then(|| loss_sum / predicted))
}

/// One result for all: where a worker failed, it keeps its own error and the others get [`TrainError::Elsewhere`].
pub(super) fn agree<T>(worker: &Worker, own: Result<T, TrainError>) -> Result<T, TrainError> {
    let failed = worker.numbers(vec![f64::from(u8::from(own.is_err()))])?;
    match own {
        Ok(_) if failed.iter().any(|failed| failed[0] > 0.0) => Err(TrainError::Elsewhere),
        own => own,
    }
}

/// The text that worker 0 has, `None` where it has none.
fn told(worker: &Worker, own: Option<&str>) -> Result<Option<String>, TrainError> {
    let own = own.unwrap_or_default().as_bytes();
    let length = worker.numbers(vec![own.len() as f64])?[0][0] as usize;
    let mut bytes: Vec<f64> = own.iter().map(|&byte| f64::from(byte)).collect();
    bytes.resize(length, 0.0);
    let bytes = worker.numbers(bytes)?.swap_remove(0);
    let text = String::from_utf8_lossy(&bytes.into_iter().map(|byte| byte as u8).collect::<Vec<_>>()).into_owned();
    Ok((!text.is_empty()).then_some(text))
}

/// The number that worker 0 has, or none.
pub(super) fn told_number(worker: &Worker, own: Option<u64>) -> Result<Option<u64>, TrainError> {
    let number = worker.numbers(vec![own.map_or(-1.0, |number| number as f64)])?[0][0];
    Ok((number >= 0.0).then_some(number as u64))
}

/// Writes a checkpoint: worker 0 the weights, each its part of the optimizer's state, all at the same time. It gets its
/// name when all of it is there.
pub(super) fn save(
    checkpoints: &Checkpoints,
    model: &CausalLm,
    optimizer: &MuonAdamW,
    state: &TrainerState,
) -> Result<PathBuf, TrainError> {
    let worker = optimizer.worker();
    if worker.rank() > 0 {
        let Some(dir) = told(worker, None)? else { return Err(TrainError::Elsewhere) };
        let written = {
            let _busy = worker.busy();
            write_part(Path::new(&dir), optimizer)
        };
        agree(worker, written)?;
        agree(worker, Ok(()))?;
        return Ok(checkpoints.path(state.step));
    }
    let mut parts = Parts { optimizer, dir_told: false, disagreed: false };
    let saved = {
        let _busy = worker.busy();
        checkpoints.save(model, &mut parts, state)
    };
    if !parts.dir_told {
        told(worker, None)?;
        return saved;
    }
    if parts.disagreed { saved } else { agree(worker, saved) }
}

/// The optimizer's state of a checkpoint, in a file for each worker.
struct Parts<'a> {
    optimizer: &'a MuonAdamW,
    dir_told: bool,
    disagreed: bool,
}

impl Keeping for Parts<'_> {
    fn begin(&mut self, dir: &Path) -> Result<(), TrainError> {
        self.dir_told = true;
        // From wherever the others work.
        let dir = std::path::absolute(dir).map_err(TrainError::read(dir))?;
        told(self.optimizer.worker(), Some(&dir.to_string_lossy()))?;
        write_part(&dir, self.optimizer)
    }

    fn end(&mut self, _dir: &Path, written: Result<(), TrainError>) -> Result<(), TrainError> {
        let agreed = agree(self.optimizer.worker(), written);
        self.disagreed = agreed.is_err();
        agreed
    }
}

fn write_part(dir: &Path, optimizer: &MuonAdamW) -> Result<(), TrainError> {
    let worker = optimizer.worker();
    let path = Checkpoints::part(dir, worker.rank(), worker.size());
    if !dir.exists() {
        return Err(TrainError::Request {
            problem: format!("worker {} does not see the folder `{}` that worker 0 made", worker.rank(), dir.display()),
            hint: Some("runs on several machines need a `run.dir` that all of them share".into()),
        });
    }
    optimizer.save(&path).map_err(|source| TrainError::OptimizerState { path: path.clone(), source })?;
    // Whoever makes the checkpoint whole flushes what it sees, which on a shared file system need not be all.
    File::open(&path).and_then(|file| file.sync_all()).map_err(TrainError::write(&path))
}

/// All workers start from the same weights.
pub(super) fn check_weights(worker: &Worker, model: &CausalLm) -> Result<(), TrainError> {
    struct Sum(Vec<f64>);
    impl ModuleVisitor for Sum {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let squares = sum_of_squares(param.val().inner());
            self.0[0] += squares;
            // Where it stands counts as well.
            self.0[2] += 1.0;
            self.0[1] += squares * self.0[2];
        }
    }
    let mut sum = Sum(vec![0.0; 3]);
    model.visit(&mut sum);
    let all = worker.numbers(sum.0)?;
    match all.iter().position(|of| of != &all[0]) {
        None => Ok(()),
        Some(_) if worker.rank() > 0 => Err(TrainError::Elsewhere),
        Some(rank) => Err(TrainError::Request {
            problem: format!("worker {rank} starts from other weights than worker 0"),
            hint: Some("all workers need the same files, and devices of the same kind".into()),
        }),
    }
}

/// What the workers did, for the end of a run: bytes sent and state held, beside the formula.
pub(super) fn account(
    optimizer: &MuonAdamW,
    model: &CausalLm,
    sent: Traffic,
    steps: u64,
) -> Result<String, TrainError> {
    let worker = optimizer.worker();
    let (state, momentum) = optimizer.state_bytes();
    let own = [sent.reduce_scatter, sent.all_to_all, sent.all_gather, sent.numbers, state, momentum];
    let all = worker.numbers(own.map(|bytes| bytes as f64).to_vec())?;
    let workers = worker.size() as f64;
    let mean = |index: usize| all.iter().map(|of| of[index]).sum::<f64>() / workers;
    let largest = |index: usize| all.iter().map(|of| of[index]).fold(0.0, f64::max);
    let a_step = |index: usize| mean(index) / steps.max(1) as f64;
    let [gradients, gathered, parameters] = optimizer.traffic_by_formula(model);
    let megabytes = |bytes: f64| format!("{:.3} MB", bytes / 1e6);
    let ratio = |momentum: f64, rest: f64| if rest > 0.0 { (momentum + rest) / rest } else { 1.0 };
    let imbalance = |index: usize| if mean(index) > 0.0 { largest(index) / mean(index) } else { 1.0 };
    Ok(format!(
        "workers: {}\n\
         sent by a worker in a step: gradients {}, momentum {}, parameters {}, numbers {}\n\
         by the formula:             gradients {}, momentum {}, parameters {}\n\
         against a sharded AdamW:    {:.4} (the report: from 1 to (4 + 2 + 4) / (4 + 4) = 1.25)\n\
         optimizer state of a worker: {} in the mean, {} at most ({:.3}), of {} in all\n\
         momentum of a worker:        {} in the mean, {} at most ({:.3})",
        worker.size(),
        megabytes(a_step(0)),
        megabytes(a_step(1)),
        megabytes(a_step(2)),
        megabytes(a_step(3)),
        megabytes(gradients),
        megabytes(gathered),
        megabytes(parameters),
        ratio(a_step(1), a_step(0) + a_step(2)),
        megabytes(mean(4)),
        megabytes(largest(4)),
        imbalance(4),
        megabytes(mean(4) * workers),
        megabytes(mean(5)),
        megabytes(largest(5)),
        imbalance(5),
    ))
}
