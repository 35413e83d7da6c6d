//! Setting up a run: data, model, optimizer, and the checkpoint to resume from.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};
use moonlight_convert::adapter::{AdapterError, read_adapter};
use moonlight_convert::{Checkpoint, CheckpointError, ConfinedDir, load};
use moonlight_infer::device::{self, ComputeDevice};
use moonlight_infer::tokenizer::{Tokenizer, TokenizerFile};
use moonlight_infer::{InferError, load_base};
use moonlight_model::kernels::set_f32_matmul;
use moonlight_model::{CausalLm, ModelConfig, QuantBits};
use moonlight_optim::distributed::Communicator;
use moonlight_optim::{Assignment, MuonAdamW, OptimizerError, OptimizerOptions, StateError};
use serde_json::{Value, json};

use super::freeze;
use super::model_cell::ModelCell;
use super::outcome::Trained;
use super::rank_trainer::RankTrainer;
use super::run_eval::{self, run_eval};
use super::run_folder::RunFolder;
use super::same_run::{check_same_run, run_identity};
use super::sample::SampleWriter;
use crate::checkpoint::{Checkpoints, FoundCheckpoint, TrainerState};
use crate::data::{Dataset, Prefetcher};
use crate::error::TrainError;
use crate::metrics::{ConsoleLines, LogEvery, MetricsFile, Reporter};
use crate::plan::{MemoryPlan, MemorySettings, Threads, available_memory};
use crate::recipe::{LoraRecipe, Quantize, Recipe};
use crate::schedule::Schedule;
use crate::tensorboard::EventFile;

/// The file that names the tokens at which generation stops.
const GENERATION_CONFIG: &str = "generation_config.json";
/// A longer `generation_config.json` is refused unread.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Everything that a recipe names, opened and checked. The ranks of a process share it.
pub(super) struct Setup {
    /// The recipe, with `train.steps` computed from its epochs and the data.
    pub(super) recipe: Recipe,
    pub(super) model: CausalLm,
    pub(super) state: TrainerState,
    /// The checkpoint that the run resumes from.
    pub(super) resumed: Option<FoundCheckpoint>,
    /// The locked folder of the run; `None` in all processes but the first, which holds the lock for them.
    folder: Option<RunFolder>,
    assignment: Assignment,
    schedule: Schedule,
    dataset: Arc<Dataset>,
    checkpoints: Checkpoints,
    tokenizer: Option<Tokenizer>,
    /// Set when the run begins, in the first process, if the recipe asks for samples.
    samples: Option<SampleWriter>,
}

/// Where a run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResumePoint {
    /// Its first step, in a folder that must not exist.
    Start,
    /// The newest complete checkpoint; the first step if the run has no checkpoint.
    Newest,
    /// What process 0 found: the checkpoint of this step, or none.
    AtStep(Option<u64>),
}

impl Setup {
    /// Opens everything that a recipe names, and the checkpoint to resume from. Locks the run's folder, but writes no file
    /// into it before everything is checked.
    pub(super) fn open(recipe: &Recipe, target: &ComputeDevice, from: ResumePoint) -> Result<Self, TrainError> {
        let path = recipe.run.folder();
        let folder = match from {
            ResumePoint::AtStep(_) => None,
            from => Some(RunFolder::claim(&path, from == ResumePoint::Newest)?),
        };
        tracing::debug!("opening the data and the model of the run `{}`", path.display());
        let tokenizer = recipe.data.open_tokenizer()?;
        let config = recipe.model.config_for(tokenizer.as_ref())?;
        check_memory(recipe, &config, target)?;
        let dataset = Dataset::open(&recipe.data, tokenizer.as_ref(), config.vocab_size, recipe.run.seed)?;
        let recipe = recipe.clone().with_steps(dataset.train_sequences())?;
        let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps)
            .map_err(|error| TrainError::Request { problem: error.to_string(), hint: None })?;
        let weights = recipe.model.path.as_deref();
        let checkpoints = Checkpoints::new(
            path.join("checkpoints"),
            recipe.train.keep,
            recipe.train.keep_best,
            companions(tokenizer.as_ref(), &dataset, &config, weights)?,
            weights.map(Path::to_owned),
        );
        let checkpoints = if recipe.lora.is_some() { checkpoints.for_adapters() } else { checkpoints };
        let weights = Weights { recipe: &recipe, path: weights, target, checkpoints: &checkpoints };
        set_f32_matmul(recipe.model.matmul.setting());
        let (model, resumed) = weights.open(&config, from)?;
        let dtype = device::parse_dtype(recipe.model.dtype.as_str(), target)?;
        let identity = run_identity(&recipe, &model, tokenizer.as_ref(), &dataset, dtype)?;
        let start = dataset.train_stream(recipe.train.batch_size);
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
        let dataset = Arc::new(dataset);
        let samples = None;
        Ok(Self {
            recipe,
            model,
            state,
            resumed,
            folder,
            assignment,
            schedule,
            dataset,
            checkpoints,
            tokenizer,
            samples,
        })
    }

    /// Writes recipe, optimizer assignment and data sizes into the run's folder, logs them, and opens the files for its
    /// metrics. With `lines`, metrics are logged as well.
    pub(super) fn begin(&mut self, lines: bool) -> Result<Vec<Box<dyn Reporter>>, TrainError> {
        // A resumed run has this evaluation already.
        let before = match self.state.step {
            0 => run_eval(&self.recipe, &self.model.clone().valid(), self.tokenizer.as_ref())?,
            _ => None,
        };
        if let Some(folder) = &mut self.folder {
            folder.begin();
        }
        self.samples = SampleWriter::open(&self.recipe, self.tokenizer.as_ref(), self.state.step)?;
        let Self { recipe, state, assignment, dataset, .. } = &*self;
        let folder = recipe.run.folder();
        if let Some(results) = before {
            run_eval::record(&folder, "before", results)?;
        }
        write(&folder.join("recipe.toml"), &recipe.to_toml())?;
        write(&folder.join("optimizer.txt"), &assignment.to_string())?;
        let notes: String = dataset.notes().iter().map(|note| format!("{note}\n")).collect();
        write(&folder.join("data.txt"), &(sizes(dataset) + "\n" + &notes))?;
        let mut reporters: Vec<Box<dyn Reporter>> =
            vec![Box::new(MetricsFile::open(&folder.join("metrics.jsonl"), state.step)?)];
        if recipe.train.tensorboard {
            reporters.push(Box::new(EventFile::create(&folder.join("tensorboard"))));
        }
        let (every, last_step) = (recipe.train.log_every, recipe.train.steps);
        if lines {
            reporters.push(Box::new(ConsoleLines::new(state.step, last_step)));
        }
        self.announce();
        Ok(vec![Box::new(LogEvery { every, last_step, reporter: reporters })])
    }

    /// The trainers of this process's ranks, and what the final report needs in addition to the trained model.
    pub(super) fn into_trainers(
        self,
        ranks: &[(Communicator, ComputeDevice)],
        distributed: bool,
    ) -> Result<(Vec<RankTrainer>, ReportInputs), TrainError> {
        let mut trainers = Vec::with_capacity(ranks.len());
        // The first rank takes the model itself. The others get copies on their own devices, with their own autodiff graphs.
        let mut models: Vec<CausalLm> = ranks
            .iter()
            .skip(1)
            .map(|(_, target)| self.model.clone().fork(&target.device.clone().autodiff()))
            .collect();
        models.insert(0, self.model);
        let mut samples = self.samples;
        for ((comm, target), model) in ranks.iter().zip(models) {
            let mut data = self.dataset.train_stream(self.recipe.train.batch_size);
            if self.resumed.is_some() {
                data.seek(self.state.data)?;
            }
            trainers.push(RankTrainer {
                schedule: self.schedule.clone(),
                dataset: self.dataset.clone(),
                data: Prefetcher::new(data),
                model: ModelCell::new(model),
                optimizer: optimizer(&self.assignment, &self.recipe, comm.clone(), self.resumed.as_ref())?,
                assignment: self.assignment.clone(),
                device: target.device.clone().autodiff(),
                checkpoints: self.checkpoints.clone(),
                recipe: self.recipe.clone(),
                state: self.state.clone(),
                resumed_at: self.state.step,
                distributed,
                samples: samples.take(),
            });
        }
        Ok((trainers, ReportInputs { dataset: self.dataset, tokenizer: self.tokenizer, folder: self.folder }))
    }

    /// Logs the model, which optimizer takes which parameters, and the data.
    fn announce(&self) {
        let Self { recipe, model, state, assignment, dataset, .. } = self;
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
            // Adapters are all that is trained, and each consists of two matrices.
            let trained: Vec<_> = assignment.rows().iter().filter(|row| row.is_optimized()).collect();
            let elements: usize = trained.iter().map(|row| row.elements()).sum();
            tracing::info!("lora: {:.2} M parameters in {} adapters", million(elements as u64), trained.len() / 2);
        }
        tracing::info!("data: {}", sizes(dataset));
        if recipe.train.epochs > 0.0 {
            tracing::info!("steps: {} for {} epochs", recipe.train.steps, recipe.train.epochs);
        }
        for note in dataset.notes() {
            tracing::info!("note: {note}");
        }
        for note in model.config().training_notes() {
            tracing::info!("note: {note}");
        }
        // Tensors of the base that the model does not have will be missing from its checkpoints. Adapters are saved without
        // their base in any case.
        if let Some(base) = recipe.model.path.as_deref().filter(|_| !model.has_adapters()) {
            for note in Checkpoint::open(base).map(|base| base.skipped_notes()).unwrap_or_default() {
                tracing::info!("note: {note}");
            }
        }
        if state.step > 0 {
            tracing::info!("resumed after step {}", state.step);
        }
    }
}

/// What the final report needs in addition to the trained model.
pub(super) struct ReportInputs {
    dataset: Arc<Dataset>,
    tokenizer: Option<Tokenizer>,
    /// Locked until the report is written.
    folder: Option<RunFolder>,
}

impl ReportInputs {
    /// Adds the model.
    pub(super) fn with_model(self, model: CausalLm) -> Trained {
        Trained { model, dataset: self.dataset, tokenizer: self.tokenizer, _folder: self.folder }
    }
}

/// A rank's optimizer, with its part of the checkpoint's state.
fn optimizer(
    assignment: &Assignment,
    recipe: &Recipe,
    comm: Communicator,
    resumed: Option<&FoundCheckpoint>,
) -> Result<MuonAdamW, TrainError> {
    let config = recipe.distributed.clone().unwrap_or_default().config();
    let options = OptimizerOptions::new().with_communicator(comm).with_distributed(config);
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

/// The sources of a run's weights.
struct Weights<'a> {
    recipe: &'a Recipe,
    /// The weights that the recipe starts from; `None` to initialize them.
    path: Option<&'a Path>,
    target: &'a ComputeDevice,
    checkpoints: &'a Checkpoints,
}

impl Weights<'_> {
    /// Logs that quantized weights are dequantized, which takes more memory than the files suggest.
    fn log_dequantized(&self) -> Result<(), TrainError> {
        let Some(path) = self.path.filter(|_| self.recipe.model.quantize == Quantize::None) else { return Ok(()) };
        if let Some(bits) = Checkpoint::open(path)?.stored_bits() {
            let name = match bits {
                QuantBits::Eight => "int8",
                QuantBits::Four => "int4",
            };
            let keep = match &self.recipe.lora {
                Some(_) => format!("; `model.quantize = \"{name}\"` keeps them"),
                None => ", because they are trained".into(),
            };
            tracing::info!("the weights of `{}` are stored as {name} and are dequantized{keep}", path.display());
        }
        Ok(())
    }

    /// The model that the run starts from, and the checkpoint that contains it if the run resumes.
    fn open(&self, config: &ModelConfig, from: ResumePoint) -> Result<(CausalLm, Option<FoundCheckpoint>), TrainError> {
        let Self { recipe, path, target, checkpoints } = *self;
        let device = target.device.clone().autodiff();
        let dtype = device::parse_dtype(recipe.model.dtype.as_str(), target)?;
        self.log_dequantized()?;
        // Checkpoints of a LoRA run contain adapters only. Their base model is loaded once, however many checkpoints are tried.
        let base = match (&recipe.lora, path) {
            (Some(_), Some(path)) => Some(load_base(path, &device, dtype, recipe.model.quantize.on_load())?),
            _ => None,
        };
        let adapters = base.as_ref().zip(recipe.lora.as_ref());
        let open = |found: &FoundCheckpoint| match adapters {
            None => Ok(load(&found.path, &device, None)?.model),
            Some((base, lora)) => adapted(base.clone(), &found.path, lora),
        };
        let resumed = match from {
            ResumePoint::Start | ResumePoint::AtStep(None) => None,
            ResumePoint::Newest => checkpoints.newest_complete(|found| {
                let model = open(found).map_err(damage)?;
                check_state(recipe, &model, found)?;
                Ok(model)
            })?,
            ResumePoint::AtStep(Some(step)) => {
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
                // `materialize` draws all weights now, in the order of the module. Weights drawn lazily would depend on what
                // else draws from the device's generator before their first use.
                cast(config.init(&device).materialize(), dtype.unwrap_or(DType::F32))
            }
        };
        Ok((model, None))
    }
}

/// Files that every checkpoint needs next to its weights: those of the tokenizer. For conversations also the chat template
/// of the data, unless it is the tokenizer's own, and a `generation_config.json` that makes servers stop at the end of the
/// assistant's turn.
fn companions(
    tokenizer: Option<&Tokenizer>,
    dataset: &Dataset,
    config: &ModelConfig,
    from: Option<&Path>,
) -> Result<Vec<TokenizerFile>, TrainError> {
    let mut companions = tokenizer.map(Tokenizer::files).unwrap_or_default();
    if let Some(template) = dataset.template() {
        companions.retain(|companion| companion.name != template.name);
        companions.push(template.clone());
    }
    if let Some(end) = dataset.end_of_turn() {
        let text = match from {
            Some(from) => confined(from)?.read(GENERATION_CONFIG, MAX_CONFIG_BYTES)?,
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
        companions.push(TokenizerFile { name: GENERATION_CONFIG.into(), contents });
    }
    Ok(companions)
}

/// A model's folder, read without leaving it through links.
fn confined(dir: &Path) -> Result<ConfinedDir, TrainError> {
    ConfinedDir::new(dir).map_err(TrainError::read(dir))
}

/// Refuses a run that does not fit into memory. On a GPU the available memory is not known, and no run is refused.
fn check_memory(recipe: &Recipe, config: &ModelConfig, target: &ComputeDevice) -> Result<(), TrainError> {
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
            format!("set {}, or start without this check by `train.check_memory = false`", changes.join(" and "))
        }
        _ => "look at `moonlight plan`, or start without this check by `train.check_memory = false`".into(),
    };
    Err(TrainError::Request {
        problem: format!(
            "a step needs {:.2} GB of memory, but {:.2} GB are available",
            gigabytes(plan.peak()),
            gigabytes(available)
        ),
        hint: Some(hint),
    })
}

/// Classifies an error of opening a checkpoint: `Ok` describes damage; `Err` is any other failure, such as a file that cannot
/// be read at the moment.
fn damage(error: TrainError) -> Result<String, TrainError> {
    match error {
        TrainError::File(_)
        | TrainError::Lora(_)
        | TrainError::Infer(InferError::Checkpoint(CheckpointError::File(_))) => Err(error),
        TrainError::Infer(_) | TrainError::OptimizerState { .. } => Ok(error.to_string()),
        error => Err(error),
    }
}

/// Reads the optimizer's state of a checkpoint of an earlier version: without a manifest, damage shows only then.
fn check_state(recipe: &Recipe, model: &CausalLm, found: &FoundCheckpoint) -> Result<(), Result<String, TrainError>> {
    if found.state.identity.is_some() {
        return Ok(()); // a checkpoint with an identity has a manifest, which was compared
    }
    let assigned = recipe.optimizer.rules(model.config().hidden_size).assign(model);
    let assignment = assigned.map_err(|error| Err(TrainError::from(error)))?;
    match optimizer(&assignment, recipe, Communicator::single_rank(), Some(found)) {
        // A state of another optimizer or model is not damaged: `check_same_run` reports the difference later.
        Err(TrainError::OptimizerState { source: source @ StateError::Unreadable(_), path }) => {
            Err(Ok(TrainError::OptimizerState { path, source }.to_string()))
        }
        _ => Ok(()),
    }
}

/// The base model with the adapters of a folder. Their dropout is the recipe's, since it is a setting of the training.
fn adapted(base: CausalLm, dir: &Path, lora: &LoraRecipe) -> Result<CausalLm, TrainError> {
    let mut adapters = read_adapter(base.config(), dir)?;
    adapters.iter_mut().for_each(|adapter| adapter.settings.dropout = lora.adapters.dropout);
    base.with_adapters(adapters).map_err(|source| AdapterError::Mismatch { dir: dir.to_owned(), source }.into())
}

/// The sizes of the data, as text.
fn sizes(dataset: &Dataset) -> String {
    format!(
        "{} training tokens in {} sequences, {} validation tokens",
        dataset.train_tokens(),
        dataset.train_sequences(),
        dataset.valid_tokens()
    )
}

fn write(path: &Path, text: &str) -> Result<(), TrainError> {
    fs::write(path, text).map_err(TrainError::write(path))
}

/// Casts the weights. The router's correction bias, the only parameter without a gradient, stays f32.
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
