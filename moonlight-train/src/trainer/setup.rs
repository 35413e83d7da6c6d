//! Setting up a run: data, model, optimizer, and the checkpoint to resume from.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor};
use moonlight_convert::adapter::{AdapterError, read_adapter};
use moonlight_convert::load;
use moonlight_infer::device::{self, Target};
use moonlight_infer::load_base;
use moonlight_infer::tokenizer::{Companion, Tokenizer};
use moonlight_model::{CausalLm, ModelConfig};
use moonlight_optim::distributed::Worker;
use moonlight_optim::{Assignment, MuonAdamW, OptimizerError, OptimizerOptions};
use serde_json::{Value, json};

use super::freeze;
use super::model_cell::ModelCell;
use super::outcome::Trained;
use super::rank_trainer::RankTrainer;
use super::run_eval::{self, run_eval};
use crate::checkpoint::{Checkpoints, Found, TrainerState};
use crate::data::{Dataset, Prefetcher};
use crate::error::TrainError;
use crate::metrics::{ConsoleLines, LogEvery, MetricsFile, Reporter};
use crate::plan::{MemorySettings, Plan, Threads, available_memory};
use crate::recipe::{LoraRecipe, Recipe};
use crate::schedule::Schedule;
use crate::tensorboard::EventWriter;

/// The file with the tokens at which generation stops.
const GENERATION_CONFIG: &str = "generation_config.json";

/// Everything that a recipe names, opened and checked. The ranks of a process share it.
pub(super) struct Setup {
    /// With the number of steps that its epochs are for these data.
    pub(super) recipe: Recipe,
    pub(super) model: CausalLm,
    pub(super) state: TrainerState,
    /// The checkpoint that the run resumes from.
    pub(super) resumed: Option<Found>,
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
    /// From the newest checkpoint that opens; at the first step if there is none.
    Newest,
    /// From the checkpoint of the step that another process found, or at the first step.
    Found(Option<u64>),
}

impl Setup {
    /// Opens everything that a recipe names; nothing is written yet.
    pub(super) fn open(recipe: &Recipe, target: &Target, from: ResumePoint) -> Result<Self, TrainError> {
        let folder = recipe.run.folder();
        if folder.exists() && from == ResumePoint::Start {
            return Err(TrainError::RunExists(folder));
        }
        let tokenizer = recipe.data.tokenizer.open()?;
        let config = recipe.model.config_for(tokenizer.as_ref())?;
        check_memory(recipe, &config, target)?;
        let corpus = Dataset::open(&recipe.data, tokenizer.as_ref(), config.vocab_size, recipe.run.seed)?;
        let recipe = recipe.clone().with_steps(corpus.train_sequences())?;
        let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps)
            .map_err(|error| TrainError::Request { problem: error.to_string(), hint: None })?;
        let weights = recipe.model.path.as_deref();
        let checkpoints = Checkpoints::new(
            folder.join("checkpoints"),
            recipe.train.keep,
            recipe.train.keep_best,
            companions(tokenizer.as_ref(), &corpus, &config, weights),
            weights.map(Path::to_owned),
        );
        let checkpoints = if recipe.lora.is_some() { checkpoints.of_adapters() } else { checkpoints };
        let weights = Weights { recipe: &recipe, path: weights, target, checkpoints: &checkpoints };
        let (model, resumed) = weights.open(&config, from)?;
        let state = match &resumed {
            Some(found) => found.state.clone(),
            None => TrainerState::new(corpus.train_stream(recipe.train.batch_size).position()),
        };
        let model = freeze::freeze(model, &recipe.train.freeze, recipe.optimizer.qk_clip().is_some())?;
        let assignment = recipe.optimizer.rules(config.hidden_size).assign(&model)?;
        let corpus = Arc::new(corpus);
        Ok(Self { recipe, model, state, resumed, assignment, schedule, corpus, checkpoints, tokenizer })
    }

    /// Makes the run's folder, logs what the run consists of, and opens the files that its metrics go to; with `lines`
    /// they are logged as well.
    pub(super) fn begin(&self, lines: bool) -> Result<Vec<Box<dyn Reporter>>, TrainError> {
        let Self { recipe, model, state, assignment, corpus, tokenizer, .. } = self;
        let folder = recipe.run.folder();
        // A run that resumes has been evaluated before its first step.
        let before = if state.step == 0 { run_eval(recipe, &model.clone().valid(), tokenizer.as_ref())? } else { None };

        fs::create_dir_all(&folder).map_err(TrainError::write(&folder))?;
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
            let events = folder.join("tensorboard");
            reporters.push(Box::new(EventWriter::create(&events).map_err(TrainError::write(&events))?));
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
        Ok((trainers, Leftovers { corpus: self.corpus, tokenizer: self.tokenizer }))
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
        if state.step > 0 {
            tracing::info!("resuming from step {}", state.step);
        }
    }
}

/// What remains of a setup when its trainers are made.
pub(super) struct Leftovers {
    corpus: Arc<Dataset>,
    tokenizer: Option<Tokenizer>,
}

impl Leftovers {
    /// With the model that was trained.
    pub(super) fn with_model(self, model: CausalLm) -> Trained {
        Trained { model, corpus: self.corpus, tokenizer: self.tokenizer }
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
        let resumed = match from {
            ResumePoint::Start | ResumePoint::Found(None) => None,
            ResumePoint::Newest => newest_complete(checkpoints, adapters, &device)?,
            ResumePoint::Found(Some(step)) => Some(at_step(checkpoints, step, adapters, &device)?),
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
) -> Vec<Companion> {
    let mut companions = tokenizer.map(Tokenizer::companions).unwrap_or_default();
    if let Some(template) = corpus.template() {
        companions.retain(|companion| companion.name != template.name);
        companions.push(template.clone());
    }
    if let Some(end) = corpus.end_of_turn() {
        let text = from.and_then(|from| fs::read_to_string(from.join(GENERATION_CONFIG)).ok());
        let mut generation = text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_else(|| {
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
    companions
}

/// Refuses a run that cannot fit into memory. Where the available memory is not known, as on a GPU, nothing is refused.
fn check_memory(recipe: &Recipe, config: &ModelConfig, target: &Target) -> Result<(), TrainError> {
    let Some(available) = available_memory().filter(|_| target.is_cpu && recipe.train.check_memory) else {
        return Ok(());
    };
    let plan = Plan::new(config.clone(), MemorySettings::of_recipe(recipe, config, true, Threads::here())?);
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

/// The newest checkpoint that opens, with its model; a damaged one is skipped with a warning.
fn newest_complete(
    checkpoints: &Checkpoints,
    base: Option<(&CausalLm, &LoraRecipe)>,
    device: &Device,
) -> Result<Option<(Found, CausalLm)>, TrainError> {
    for found in checkpoints.found()? {
        let opened = match base {
            None => load(&found.path, device, None).map(|loaded| loaded.model).map_err(TrainError::from),
            Some((base, lora)) => adapted(base.clone(), &found.path, lora),
        };
        match opened {
            Ok(model) => return Ok(Some((found, model))),
            Err(error) => tracing::warn!("passing over a damaged checkpoint: {error}"),
        }
    }
    Ok(None)
}

/// The checkpoint of a step, with its model.
fn at_step(
    checkpoints: &Checkpoints,
    step: u64,
    base: Option<(&CausalLm, &LoraRecipe)>,
    device: &Device,
) -> Result<(Found, CausalLm), TrainError> {
    let found = checkpoints.found()?.into_iter().find(|found| found.state.step == step);
    let found = found.ok_or_else(|| TrainError::Request {
        problem: format!("this process does not see the checkpoint `{}`", checkpoints.path(step).display()),
        hint: Some("runs on several machines need a `run.dir` that all of them share".into()),
    })?;
    let model = match base {
        None => load(&found.path, device, None)?.model,
        Some((base, lora)) => adapted(base.clone(), &found.path, lora)?,
    };
    Ok((found, model))
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
