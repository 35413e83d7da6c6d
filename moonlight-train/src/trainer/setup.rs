//! Setting up a run: data, model, optimizer, and the checkpoint to resume from.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};
use moonlight_convert::adapter::{AdapterError, read_adapter};
use moonlight_convert::{Checkpoint, CheckpointError, ConfinedDir, load};
use moonlight_infer::device::{self, Target};
use moonlight_infer::tokenizer::{Companion, Tokenizer};
use moonlight_infer::{InferError, load_base};
use moonlight_model::{CausalLm, ModelConfig};
use moonlight_optim::distributed::Worker;
use moonlight_optim::{Assignment, MuonAdamW, OptimizerError, OptimizerOptions, StateError};
use serde_json::{Value, json};

use super::freeze;
use super::model_cell::ModelCell;
use super::outcome::Trained;
use super::rank_trainer::RankTrainer;
use super::run_eval::{self, run_eval};
use super::run_folder::RunFolder;
use super::same_run::{check_same_run, run_identity};
use crate::checkpoint::{Checkpoints, Found, TrainerState};
use crate::data::{Dataset, Prefetcher};
use crate::error::TrainError;
use crate::metrics::{ConsoleLines, LogEvery, MetricsFile, Reporter};
use crate::plan::{MemoryPlan, MemorySettings, Threads, available_memory};
use crate::recipe::{LoraRecipe, Recipe};
use crate::schedule::Schedule;
use crate::tensorboard::EventFile;

/// The file with the tokens at which generation stops.
const GENERATION_CONFIG: &str = "generation_config.json";
/// A longer one is none.
const LONGEST_CONFIG: u64 = 16 << 20;

/// Everything that a recipe names, opened and checked. The ranks of a process share it.
pub(super) struct Setup {
    /// With the number of steps that its epochs are for these data.
    pub(super) recipe: Recipe,
    pub(super) model: CausalLm,
    pub(super) state: TrainerState,
    /// The checkpoint that the run resumes from.
    pub(super) resumed: Option<Found>,
    /// The run's folder; `None` in a process that follows another one.
    folder: Option<RunFolder>,
    assignment: Assignment,
    schedule: Schedule,
    corpus: Arc<Dataset>,
    checkpoints: Checkpoints,
    tokenizer: Option<Tokenizer>,
}

/// Where a run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResumePoint {
    /// At its first step, in a folder that must not exist.
    Start,
    /// From the newest whole checkpoint; at the first step if there is no checkpoint at all.
    Newest,
    /// From the checkpoint of the step that another process found, or at the first step.
    Found(Option<u64>),
}

impl Setup {
    /// Opens everything that a recipe names, and the checkpoint to resume from. The run's folder is claimed; no file of the run
    /// is written before everything has been checked.
    pub(super) fn open(recipe: &Recipe, target: &Target, from: ResumePoint) -> Result<Self, TrainError> {
        let path = recipe.run.folder();
        let folder = match from {
            ResumePoint::Found(_) => None,
            from => Some(RunFolder::claim(&path, from == ResumePoint::Newest)?),
        };
        let tokenizer = recipe.data.open_tokenizer()?;
        let config = recipe.model.config_for(tokenizer.as_ref())?;
        check_memory(recipe, &config, target)?;
        let corpus = Dataset::open(&recipe.data, tokenizer.as_ref(), config.vocab_size, recipe.run.seed)?;
        let recipe = recipe.clone().with_steps(corpus.train_sequences())?;
        let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps)
            .map_err(|error| TrainError::Request { problem: error.to_string(), hint: None })?;
        let weights = recipe.model.path.as_deref();
        let checkpoints = Checkpoints::new(
            path.join("checkpoints"),
            recipe.train.keep,
            recipe.train.keep_best,
            companions(tokenizer.as_ref(), &corpus, &config, weights)?,
            weights.map(Path::to_owned),
        );
        let checkpoints = if recipe.lora.is_some() { checkpoints.of_adapters() } else { checkpoints };
        let weights = Weights { recipe: &recipe, path: weights, target, checkpoints: &checkpoints };
        let (model, resumed) = weights.open(&config, from)?;
        let dtype = device::dtype(recipe.model.dtype.as_str(), target)?;
        let identity = run_identity(&recipe, &model, tokenizer.as_ref(), &corpus, dtype)?;
        let start = corpus.train_stream(recipe.train.batch_size);
        let mut state = match &resumed {
            Some(found) => {
                check_same_run(&identity, &config, &model, found)?;
                start.clone().seek(found.state.data)?;
                found.state.clone()
            }
            None => TrainerState::new(start.position()),
        };
        state.identity = Some(identity);
        let checkpoints = checkpoints.resumed_from(resumed.as_ref().map(|found| found.state.step));
        let model = freeze::freeze(model, &recipe.train.freeze, recipe.optimizer.qk_clip().is_some())?;
        let assignment = recipe.optimizer.rules(config.hidden_size).assign(&model)?;
        let corpus = Arc::new(corpus);
        Ok(Self { recipe, model, state, resumed, folder, assignment, schedule, corpus, checkpoints, tokenizer })
    }

    /// Writes into the run's folder and logs what the run consists of, and opens the files that its metrics go to; with
    /// `lines` they are logged as well.
    pub(super) fn begin(&mut self, lines: bool) -> Result<Vec<Box<dyn Reporter>>, TrainError> {
        // A run that resumes has been evaluated before its first step.
        let before = match self.state.step {
            0 => run_eval(&self.recipe, &self.model.clone().valid(), self.tokenizer.as_ref())?,
            _ => None,
        };
        if let Some(folder) = &mut self.folder {
            folder.begin();
        }
        let Self { recipe, state, assignment, corpus, .. } = &*self;
        let folder = recipe.run.folder();
        if let Some(results) = before {
            run_eval::record(&folder, "before", results)?;
        }
        write(&folder.join("recipe.toml"), &recipe.to_toml())?;
        write(&folder.join("optimizer.txt"), &assignment.to_string())?;
        let notes: String = corpus.notes().iter().map(|note| format!("{note}\n")).collect();
        write(&folder.join("data.txt"), &(sizes(corpus) + "\n" + &notes))?;
        let mut reporters: Vec<Box<dyn Reporter>> =
            vec![Box::new(MetricsFile::open(&folder.join("metrics.jsonl"), state.step)?)];
        if recipe.train.tensorboard {
            reporters.push(Box::new(EventFile::create(&folder.join("tensorboard"))));
        }
        if lines {
            reporters.push(Box::new(ConsoleLines));
        }
        self.announce();
        let (every, last_step) = (recipe.train.log_every, recipe.train.steps);
        Ok(vec![Box::new(LogEvery { every, last_step, reporter: reporters })])
    }

    /// The trainers of this process's ranks, and what the final report needs beside a trained model.
    pub(super) fn into_trainers(
        self,
        ranks: &[(Worker, Target)],
        distributed: bool,
    ) -> Result<(Vec<RankTrainer>, Leftovers), TrainError> {
        let mut trainers = Vec::with_capacity(ranks.len());
        // The first rank has the model itself. The others have copies on their devices, each with a graph of its own.
        let mut models: Vec<CausalLm> = ranks
            .iter()
            .skip(1)
            .map(|(_, target)| self.model.clone().fork(&target.device.clone().autodiff()))
            .collect();
        models.insert(0, self.model);
        for ((worker, target), model) in ranks.iter().zip(models) {
            let mut data = self.corpus.train_stream(self.recipe.train.batch_size);
            if self.resumed.is_some() {
                data.seek(self.state.data)?;
            }
            trainers.push(RankTrainer {
                schedule: self.schedule.clone(),
                corpus: self.corpus.clone(),
                data: Prefetcher::new(data),
                model: ModelCell::new(model),
                optimizer: optimizer(&self.assignment, &self.recipe, worker.clone(), self.resumed.as_ref())?,
                assignment: self.assignment.clone(),
                device: target.device.clone().autodiff(),
                checkpoints: self.checkpoints.clone(),
                recipe: self.recipe.clone(),
                state: self.state.clone(),
                resumed_at: self.state.step,
                distributed,
            });
        }
        Ok((trainers, Leftovers { corpus: self.corpus, tokenizer: self.tokenizer, folder: self.folder }))
    }

    /// Logs the model, the division of its parameters, and the data.
    fn announce(&self) {
        let Self { recipe, model, state, assignment, corpus, .. } = self;
        let count = model.config().parameter_count();
        let million = |count: u64| count as f64 / 1e6;
        tracing::info!("{assignment:#}");
        tracing::info!(
            "model: {:.2} M parameters, {:.2} M activated, {:.2} M in embeddings",
            million(count.total),
            million(count.activated),
            million(count.embeddings)
        );
        if model.has_adapters() {
            // Nothing else is trained, and each adapter is two matrices.
            let trained: Vec<_> = assignment.rows().iter().filter(|row| row.is_optimized()).collect();
            let elements: usize = trained.iter().map(|row| row.elements()).sum();
            tracing::info!("lora: {:.2} M parameters in {} adapters", million(elements as u64), trained.len() / 2);
        }
        tracing::info!("data: {}", sizes(corpus));
        if recipe.train.epochs > 0.0 {
            tracing::info!("steps: {} for {} epochs", recipe.train.steps, recipe.train.epochs);
        }
        for note in corpus.notes() {
            tracing::info!("note: {note}");
        }
        for note in model.config().training_notes() {
            tracing::info!("note: {note}");
        }
        // What is saved lacks these, so that a run says so. A checkpoint of adapters holds nothing of the base in any case.
        if let Some(base) = recipe.model.path.as_deref().filter(|_| !model.has_adapters()) {
            for note in Checkpoint::open(base).map(|base| base.skipped_notes()).unwrap_or_default() {
                tracing::info!("note: {note}");
            }
        }
        if state.step > 0 {
            tracing::info!("resuming from step {}", state.step);
        }
    }
}

/// What remains of a setup when its trainers are made.
pub(super) struct Leftovers {
    corpus: Arc<Dataset>,
    tokenizer: Option<Tokenizer>,
    /// Held until the run is over.
    folder: Option<RunFolder>,
}

impl Leftovers {
    /// With the model that was trained.
    pub(super) fn with_model(self, model: CausalLm) -> Trained {
        Trained { model, corpus: self.corpus, tokenizer: self.tokenizer, _folder: self.folder }
    }
}

/// A rank's optimizer, with its part of the checkpoint's state.
fn optimizer(
    assignment: &Assignment,
    recipe: &Recipe,
    worker: Worker,
    resumed: Option<&Found>,
) -> Result<MuonAdamW, TrainError> {
    let config = recipe.distributed.clone().unwrap_or_default().config();
    let options = OptimizerOptions::new().with_worker(worker).with_distributed(config);
    let Some(found) = resumed else { return Ok(assignment.build(options)?) };
    let files = found.optimizer();
    assignment.load(&files, options).map_err(|error| match error {
        OptimizerError::State(source) => {
            let path = if let [file] = files.as_slice() { file } else { &found.path };
            TrainError::OptimizerState { path: path.clone(), source }
        }
        error => error.into(),
    })
}

/// Where the weights of a run come from.
struct Weights<'a> {
    recipe: &'a Recipe,
    /// The model that the recipe names; `None` for a fresh one.
    path: Option<&'a Path>,
    target: &'a Target,
    checkpoints: &'a Checkpoints,
}

impl Weights<'_> {
    /// The model at the run's start, or that of a checkpoint.
    fn open(&self, config: &ModelConfig, from: ResumePoint) -> Result<(CausalLm, Option<Found>), TrainError> {
        let Self { recipe, path, target, checkpoints } = *self;
        let device = target.device.clone().autodiff();
        let dtype = device::dtype(recipe.model.dtype.as_str(), target)?;
        // The base model of the adapters in every checkpoint of the run.
        let base = match (&recipe.lora, path) {
            (Some(_), Some(path)) => Some(load_base(path, &device, dtype, recipe.model.quantise.bits())?),
            _ => None,
        };
        let adapters = base.as_ref().zip(recipe.lora.as_ref());
        let open = |found: &Found| match adapters {
            None => Ok(load(&found.path, &device, None)?.model),
            Some((base, lora)) => adapted(base.clone(), &found.path, lora),
        };
        let resumed = match from {
            ResumePoint::Start | ResumePoint::Found(None) => None,
            ResumePoint::Newest => checkpoints.newest_whole(|found| {
                let model = open(found).map_err(damage)?;
                check_state(recipe, &model, found)?;
                Ok(model)
            })?,
            ResumePoint::Found(Some(step)) => {
                let found = checkpoints.at(step)?;
                let model = open(&found)?;
                Some((found, model))
            }
        };
        if let Some((found, model)) = resumed {
            return Ok((model, Some(found)));
        }
        let model = match (&recipe.lora, base, path) {
            (Some(lora), Some(base), _) => match &lora.path {
                Some(path) => adapted(base, path, lora)?,
                None => base.with_lora(&lora.config(), recipe.run.seed)?,
            },
            (_, _, Some(path)) => load(path, &device, dtype)?.model,
            (_, _, None) => {
                device.seed(recipe.run.seed);
                // All at once and in order, so that the weights depend on the seed alone.
                cast(config.init(&device).materialize(), dtype.unwrap_or(DType::F32))
            }
        };
        Ok((model, None))
    }
}

/// The tokenizer's files. If the data are conversations, also the chat template they were made with, unless it is the
/// tokenizer's, and a `generation_config.json` that makes servers stop at the end of the assistant's turn.
fn companions(
    tokenizer: Option<&Tokenizer>,
    corpus: &Dataset,
    config: &ModelConfig,
    from: Option<&Path>,
) -> Result<Vec<Companion>, TrainError> {
    let mut companions = tokenizer.map(Tokenizer::companions).unwrap_or_default();
    if let Some(template) = corpus.template() {
        companions.retain(|companion| companion.name != template.name);
        companions.push(template.clone());
    }
    if let Some(end) = corpus.end_of_turn() {
        let text = match from {
            Some(from) => confined(from)?.read(GENERATION_CONFIG, LONGEST_CONFIG)?,
            None => None,
        };
        let own = text.map(|text| serde_json::from_slice(&text)).transpose();
        let own = own.map_err(|error| TrainError::Request {
            problem: format!(
                "`{}` cannot be parsed: {error}",
                from.unwrap_or(Path::new("")).join(GENERATION_CONFIG).display()
            ),
            hint: None,
        })?;
        let mut generation: Value = own.unwrap_or_else(|| {
            json!({"_from_model_config": true, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id})
        });
        let mut stops: Vec<Value> = match generation["eos_token_id"].take() {
            Value::Array(stops) => stops,
            Value::Null => Vec::new(),
            stop => vec![stop],
        };
        if !stops.contains(&end.into()) {
            stops.push(end.into());
        }
        generation["eos_token_id"] = stops.into();
        let contents = serde_json::to_vec_pretty(&generation).unwrap_or_default();
        companions.push(Companion { name: GENERATION_CONFIG.into(), contents });
    }
    Ok(companions)
}

/// The files of a model's folder.
fn confined(dir: &Path) -> Result<ConfinedDir, TrainError> {
    ConfinedDir::new(dir).map_err(TrainError::read(dir))
}

/// Refuses a run that cannot fit into memory. Where the available memory is not known, as on a GPU, nothing is refused.
fn check_memory(recipe: &Recipe, config: &ModelConfig, target: &Target) -> Result<(), TrainError> {
    let Some(available) = available_memory().filter(|_| target.is_cpu && recipe.train.check_memory) else {
        return Ok(());
    };
    let plan = MemoryPlan::new(config.clone(), MemorySettings::for_recipe(recipe, config, true, Threads::available())?);
    if plan.peak() <= available {
        return Ok(());
    }
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let advice = plan.advice(available);
    let hint = match advice.last() {
        Some(last) if last.peak <= available => {
            let changes: Vec<_> = advice.iter().map(|advice| format!("`{}`", advice.change)).collect();
            format!("it fits with {}; `train.check_memory = false` starts it all the same", changes.join(" and "))
        }
        _ => "`moonlight plan` says what takes it; `train.check_memory = false` starts it all the same".into(),
    };
    Err(TrainError::Request {
        problem: format!(
            "a step needs {:.2} GB of memory, and {:.2} GB are available",
            gigabytes(plan.peak()),
            gigabytes(available)
        ),
        hint: Some(hint),
    })
}

/// An error of opening a checkpoint: what it says of damage, or a failure to read that says nothing of the checkpoint.
fn damage(error: TrainError) -> Result<String, TrainError> {
    match error {
        TrainError::File(_)
        | TrainError::Lora(_)
        | TrainError::Infer(InferError::Checkpoint(CheckpointError::File(_))) => Err(error),
        TrainError::Infer(_) | TrainError::OptimizerState { .. } => Ok(error.to_string()),
        error => Err(error),
    }
}

/// Reads the optimizer's state of a checkpoint that no manifest vouches for, as far as it is the recipe's.
fn check_state(recipe: &Recipe, model: &CausalLm, found: &Found) -> Result<(), Result<String, TrainError>> {
    if found.state.identity.is_some() {
        return Ok(()); // its manifest was checked
    }
    let assigned = recipe.optimizer.rules(model.config().hidden_size).assign(model);
    let assignment = assigned.map_err(|error| Err(TrainError::from(error)))?;
    match optimizer(&assignment, recipe, Worker::alone(), Some(found)) {
        // Of another optimizer or model: no damage, and an error of its own later.
        Err(TrainError::OptimizerState { source: source @ StateError::Unreadable(_), path }) => {
            Err(Ok(TrainError::OptimizerState { path, source }.to_string()))
        }
        _ => Ok(()),
    }
}

/// The base with the adapters of a folder, and the dropout of the recipe.
fn adapted(base: CausalLm, dir: &Path, lora: &LoraRecipe) -> Result<CausalLm, TrainError> {
    let mut adapters = read_adapter(base.config(), dir)?;
    adapters.iter_mut().for_each(|adapter| adapter.settings.dropout = lora.adapters.dropout);
    base.with_adapters(adapters).map_err(|source| AdapterError::Misfit { dir: dir.to_owned(), source }.into())
}

/// How much there is to learn from.
fn sizes(corpus: &Dataset) -> String {
    format!(
        "{} training tokens in {} sequences, {} validation tokens",
        corpus.train_tokens(),
        corpus.train_sequences(),
        corpus.valid_tokens()
    )
}

fn write(path: &Path, text: &str) -> Result<(), TrainError> {
    fs::write(path, text).map_err(TrainError::write(path))
}

/// The weights in a dtype; the router's correction bias, which has no gradient, stays f32.
fn cast(model: CausalLm, dtype: DType) -> CausalLm {
    struct Cast(DType);
    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if param.is_require_grad() {
                param.map(|tensor| tensor.cast(self.0).detach().require_grad())
            } else {
                param
            }
        }
    }
    if dtype == DType::F32 { model } else { model.map(&mut Cast(dtype)) }
}
