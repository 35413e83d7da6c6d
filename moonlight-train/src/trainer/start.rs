//! What stands before the first step: data, model, optimizer, and the checkpoint to go on from.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor};
use moonlight_convert::adapter::{AdapterError, read_adapter};
use moonlight_convert::load;
use moonlight_model::{CausalLm, ModelConfig};
use moonlight_optim::{
    AdamWConfig, Assignment, MomentumPrecision, MuonAdamW, MuonConfig, OptimizerError, OptimizerOptions,
    ParameterRules, Precision, Rounding, Scale,
};
use serde_json::{Value, json};

use super::freeze;
use super::judge::{self, judge};
use super::stepper::Stepper;
use super::strategy::{Records, Run};
use super::trainee::Trainee;
use crate::checkpoint::{Checkpoints, Found, TrainerState};
use crate::data::{Ahead, Corpus};
use crate::device::{self, Target};
use crate::error::TrainError;
use crate::metrics::MetricsFile;
use crate::plan::{Plan, Setting, Threads, available_memory};
use crate::recipe::{
    HalfOrFull, LoraRecipe, ModelSource, NO_TOKENIZER, OptimizerName, OptimizerRecipe, Recipe, RoundingName, ScaleName,
};
use crate::schedule::Schedule;
use crate::tensorboard::EventWriter;
use crate::tokenizer::{Companion, Tokenizer};
use crate::weights::load_base;

/// The file that says where generation stops.
const GENERATION_CONFIG: &str = "generation_config.json";

/// A run at its first or next step.
pub struct Prepared {
    pub(super) trainee: Trainee,
    pub(super) run: Run,
}

/// Everything that a recipe names, opened and found to be right; nothing is written yet.
pub(super) struct Opened {
    /// With the number of steps that the data make of its epochs.
    pub(super) recipe: Recipe,
    pub(super) model: CausalLm,
    pub(super) state: TrainerState,
    /// The checkpoint that the run goes on from.
    pub(super) from: Option<Found>,
    pub(super) assignment: Assignment,
    schedule: Schedule,
    corpus: Arc<Corpus>,
    checkpoints: Checkpoints,
    tokenizer: Option<Tokenizer>,
}

/// Where a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// At its start, in a folder that is not there yet.
    Start,
    /// At the newest whole checkpoint, or at its start.
    Newest,
    /// At the checkpoint of a step, or at its start, as another process found.
    Found(Option<u64>),
}

/// What a run of one worker needs.
pub(super) fn prepare(recipe: &Recipe, target: &Target, resume: bool, lines: bool) -> Result<Prepared, TrainError> {
    let opened = open(recipe, target, if resume { From::Newest } else { From::Start })?;
    let optimizer = match &opened.from {
        Some(found) => found.load(&opened.assignment)?,
        None => opened.assignment.build(OptimizerOptions::new())?,
    };
    let records = opened.begin()?;
    let device = target.device.clone().autodiff();
    let run = opened.run(Stepper::Alone(Box::new(optimizer)), device, Some(records), lines)?;
    Ok(Prepared { trainee: Trainee { model: opened.model }, run })
}

impl Found {
    /// The optimizer of one rank with the state of the checkpoint.
    fn load(&self, assignment: &Assignment) -> Result<MuonAdamW, TrainError> {
        let files = self.optimizer();
        assignment.load(&files, OptimizerOptions::new()).map_err(|error| match error {
            OptimizerError::State(source) => TrainError::OptimizerState { path: files[0].clone(), source },
            error => error.into(),
        })
    }
}

/// Opens everything that a recipe names.
pub(super) fn open(recipe: &Recipe, target: &Target, from: From) -> Result<Opened, TrainError> {
    let folder = recipe.run.folder();
    if folder.exists() && from == From::Start {
        return Err(TrainError::RunExists(folder));
    }
    let tokenizer = match recipe.data.tokenizer.as_str() {
        NO_TOKENIZER => None,
        name => Some(Tokenizer::open(name)?),
    };
    let config = recipe.model.config_for(tokenizer.as_ref())?;
    check_memory(recipe, &config, target)?;
    let corpus = Corpus::open(&recipe.data, tokenizer.as_ref(), config.vocab_size, recipe.run.seed)?;
    let recipe = &recipe.clone().with_steps(corpus.train_sequences())?;
    let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps)
        .map_err(|error| TrainError::Request { problem: error.to_string(), hint: None })?;
    let stream = corpus.train_stream(recipe.train.batch_size);

    let companions_from = match &recipe.model.source {
        ModelSource::Path(path) => Some(path.clone()),
        ModelSource::Shape(_) => None,
    };
    let checkpoints = Checkpoints::new(
        folder.join("checkpoints"),
        recipe.train.keep,
        recipe.train.keep_best,
        companions(tokenizer.as_ref(), &corpus, &config, companions_from.as_deref()),
        companions_from.clone(),
    );
    let checkpoints = match &recipe.lora {
        Some(_) => checkpoints.of_adapters(),
        None => checkpoints,
    };
    let device = target.device.clone().autodiff();
    let dtype = device::dtype(&recipe.model.dtype, target)?;
    // The model that adapters stand beside, in every checkpoint of the run.
    let base = match (&recipe.lora, &companions_from) {
        (Some(_), Some(path)) => Some(load_base(path, &device, dtype, recipe.model.quantise.bits())?),
        _ => None,
    };
    let adapters = base.as_ref().zip(recipe.lora.as_ref());
    let resumed = match from {
        From::Start | From::Found(None) => None,
        From::Newest => newest_whole(&checkpoints, adapters, &device)?,
        From::Found(Some(step)) => Some(of_step(&checkpoints, step, adapters, &device)?),
    };
    let (model, state, from) = match resumed {
        Some((found, model)) => (model, found.state.clone(), Some(found)),
        None => {
            let model = match (&recipe.lora, base, &companions_from) {
                (Some(lora), Some(base), _) => match &lora.path {
                    Some(path) => adapted(base, path, lora)?,
                    None => base.with_lora(&lora.config(), recipe.run.seed)?,
                },
                (_, _, Some(path)) => load(path, &device, dtype)?.model,
                (_, _, None) => {
                    device.seed(recipe.run.seed);
                    // All at once and in order, so that the seed alone decides.
                    cast(config.init(&device).materialize(), dtype.unwrap_or(DType::F32))
                }
            };
            (model, TrainerState::new(stream.position()), None)
        }
    };
    let model = freeze::freeze(model, &recipe.train.freeze, recipe.optimizer.qk_clip().is_some())?;
    let assignment = rules(&recipe.optimizer, config.hidden_size).assign(&model)?;
    let corpus = Arc::new(corpus);
    let recipe = recipe.clone();
    Ok(Opened { recipe, model, state, from, assignment, schedule, corpus, checkpoints, tokenizer })
}

impl Opened {
    /// Makes the run's folder, says what is in the run, and opens its records.
    pub(super) fn begin(&self) -> Result<Records, TrainError> {
        let Self { recipe, model, state, assignment, corpus, tokenizer, .. } = self;
        let folder = recipe.run.folder();
        // Where the run goes on, what was found before its first step is known.
        let judged = if state.step == 0 { judge(recipe, &model.clone().valid(), tokenizer.as_ref())? } else { None };

        fs::create_dir_all(&folder).map_err(TrainError::write(&folder))?;
        if let Some((table, found)) = judged {
            judge::keep(&folder, "before", found)?;
            eprint!("evaluation before:\n{table}");
        }
        write(&folder.join("recipe.toml"), &recipe.to_toml())?;
        write(&folder.join("optimizer.txt"), &assignment.to_string())?;
        let notes: String = corpus.notes().iter().map(|note| format!("{note}\n")).collect();
        write(&folder.join("data.txt"), &(sizes(corpus) + "\n" + &notes))?;
        let metrics = MetricsFile::open(&folder.join("metrics.jsonl"), state.step)?;
        let events = folder.join("tensorboard");
        let tensorboard = recipe.train.tensorboard.then(|| EventWriter::create(&events)).transpose();
        let tensorboard = tensorboard.map_err(TrainError::write(&events))?;
        // Also before the dashboard, which gives the terminal back with it at the end.
        announce(model, assignment, corpus, recipe, state);
        Ok(Records { metrics, tensorboard })
    }

    /// The loop of a worker; the one with the records leads.
    pub(super) fn run(
        &self,
        optimizer: Stepper,
        device: Device,
        records: Option<Records>,
        lines: bool,
    ) -> Result<Run, TrainError> {
        let recipe = &self.recipe;
        let mut stream = self.corpus.train_stream(recipe.train.batch_size);
        if self.from.is_some() {
            stream.seek(self.state.data)?;
        }
        Ok(Run {
            recipe: recipe.clone(),
            schedule: self.schedule.clone(),
            corpus: self.corpus.clone(),
            data: Ahead::new(stream),
            optimizer,
            assignment: self.assignment.clone(),
            device,
            checkpoints: self.checkpoints.clone(),
            records,
            state: self.state.clone(),
            lines,
        })
    }
}

/// The tokenizer's files; where the data are conversations, also the chat template if they were made with another than
/// the tokenizer's, and a `generation_config.json` by which servers stop where the assistant does.
fn companions(
    tokenizer: Option<&Tokenizer>,
    corpus: &Corpus,
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

/// Refuses a run that cannot fit. Where the system does not say what it has, as of a GPU, the run has to find out.
fn check_memory(recipe: &Recipe, config: &ModelConfig, target: &Target) -> Result<(), TrainError> {
    let Some(available) = available_memory().filter(|_| target.is_cpu && recipe.train.check_memory) else {
        return Ok(());
    };
    let plan = Plan::new(config.clone(), Setting::of_recipe(recipe, config, true, Threads::here())?);
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

/// The newest checkpoint that opens, with its model; a damaged one is named and passed over.
fn newest_whole(
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
            Err(error) => eprintln!("warning: passing over a damaged checkpoint: {error}"),
        }
    }
    Ok(None)
}

/// The checkpoint of a step, with its model.
fn of_step(
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
    adapters.iter_mut().for_each(|adapter| adapter.settings.dropout = lora.dropout);
    base.with_adapters(adapters).map_err(|source| AdapterError::Misfit { dir: dir.to_owned(), source }.into())
}

/// The optimizers that a recipe asks for, for a model of this width.
pub(super) fn rules(recipe: &OptimizerRecipe, hidden: usize) -> ParameterRules {
    let rounding = match recipe.rounding {
        RoundingName::Nearest => Rounding::Nearest,
        RoundingName::Stochastic => Rounding::Stochastic,
        RoundingName::Master => Rounding::MasterWeights,
    };
    let adamw = AdamWConfig::new()
        .with_betas(recipe.betas[0], recipe.betas[1])
        .with_epsilon(recipe.epsilon)
        .with_weight_decay(recipe.weight_decay)
        .with_rounding(rounding);
    let factor = recipe.update_rms;
    let scale = match recipe.scale {
        ScaleName::Report => Scale::Report { factor },
        ScaleName::UpdateNorm => Scale::UpdateNorm { factor },
        ScaleName::HiddenSize => Scale::HiddenSize { factor, hidden },
        ScaleName::KellerJordan => Scale::KellerJordan,
        ScaleName::Spectral => Scale::Spectral,
        ScaleName::Unit => Scale::Unit,
    };
    match recipe.name {
        OptimizerName::AdamW => ParameterRules::adamw(adamw),
        OptimizerName::Muon => {
            let muon = MuonConfig::new()
                .with_momentum(recipe.momentum)
                .with_nesterov(recipe.nesterov)
                .with_weight_decay(recipe.weight_decay)
                .with_scale(scale)
                .with_steps(recipe.newton_schulz_steps)
                .with_rounding(rounding)
                .with_momentum_precision(match recipe.momentum_dtype {
                    HalfOrFull::F32 => MomentumPrecision::F32,
                    HalfOrFull::Bf16 => MomentumPrecision::Bf16,
                })
                .with_precision(match recipe.newton_schulz_dtype {
                    HalfOrFull::F32 => Precision::F32,
                    HalfOrFull::Bf16 => Precision::Bf16,
                });
            ParameterRules::moonlight(muon, adamw)
        }
    }
}

fn announce(model: &CausalLm, assignment: &Assignment, corpus: &Corpus, recipe: &Recipe, state: &TrainerState) {
    let count = model.config().parameter_count();
    let million = |count: u64| count as f64 / 1e6;
    eprintln!("{assignment:#}");
    eprintln!(
        "model: {:.2} M parameters, {:.2} M activated, {:.2} M in embeddings",
        million(count.total),
        million(count.activated),
        million(count.embeddings)
    );
    if model.has_adapters() {
        // Nothing else is trained, and each adapter is two matrices.
        let trained: Vec<_> = assignment.rows().iter().filter(|row| row.is_optimized()).collect();
        let elements: usize = trained.iter().map(|row| row.elements()).sum();
        eprintln!("lora: {:.2} M parameters in {} adapters", million(elements as u64), trained.len() / 2);
    }
    eprintln!("data: {}", sizes(corpus));
    if recipe.train.epochs > 0.0 {
        eprintln!("steps: {} for {} epochs", recipe.train.steps, recipe.train.epochs);
    }
    for note in corpus.notes() {
        eprintln!("note: {note}");
    }
    if state.step > 0 {
        eprintln!("going on behind step {}", state.step);
    }
}

/// How much there is to learn from.
fn sizes(corpus: &Corpus) -> String {
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

/// The weights in a dtype; the router's correction bias, which no gradient reaches, stays f32.
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
