//! What stands before the first step: data, model, optimizer, and the checkpoint to go on from.

use std::fs;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor};
use moonlight_convert::load;
use moonlight_model::{CausalLm, ModelConfig};
use moonlight_optim::{AdamWConfig, Assignment, MuonConfig, ParameterRules, Scale};
use serde_json::{Value, json};

use super::judge::{self, judge};
use super::strategy::Run;
use super::trainee::Trainee;
use crate::checkpoint::{Checkpoints, Found, TrainerState};
use crate::data::Corpus;
use crate::device::{self, Target};
use crate::error::TrainError;
use crate::metrics::MetricsFile;
use crate::recipe::{ModelSource, NO_TOKENIZER, OptimizerName, OptimizerRecipe, Recipe, ScaleName};
use crate::schedule::Schedule;
use crate::tensorboard::EventWriter;
use crate::tokenizer::{Companion, Tokenizer};

/// The file that says where generation stops.
const GENERATION_CONFIG: &str = "generation_config.json";

/// A run at its first or next step.
pub struct Prepared {
    pub(super) trainee: Trainee,
    pub(super) run: Run,
}

/// Opens everything that a recipe names. Nothing is written before all of it was found to be right.
pub(super) fn prepare(recipe: &Recipe, target: &Target, resume: bool, lines: bool) -> Result<Prepared, TrainError> {
    let folder = recipe.run.folder();
    if folder.exists() && !resume {
        return Err(TrainError::RunExists(folder));
    }
    let tokenizer = match recipe.data.tokenizer.as_str() {
        NO_TOKENIZER => None,
        name => Some(Tokenizer::open(name)?),
    };
    let config = recipe.model.config_for(tokenizer.as_ref())?;
    let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, recipe.train.steps)
        .map_err(|error| TrainError::Request { problem: error.to_string(), hint: None })?;
    let corpus = Corpus::open(&recipe.data, tokenizer.as_ref(), config.vocab_size, recipe.run.seed)?;
    let mut stream = corpus.train_stream(recipe.train.batch_size);

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
    let device = target.device.clone().autodiff();
    let resumed = if resume { newest_whole(&checkpoints, &device)? } else { None };
    let (model, state, from) = match resumed {
        Some((found, model)) => (model, found.state.clone(), Some(found)),
        None => {
            let dtype = device::dtype(&recipe.model.dtype, target)?;
            let model = match &companions_from {
                Some(path) => load(path, &device, dtype)?.model,
                None => {
                    device.seed(recipe.run.seed);
                    // All at once and in order, so that the seed alone decides.
                    cast(config.init(&device).materialize(), dtype.unwrap_or(DType::F32))
                }
            };
            (model, TrainerState::new(stream.position()), None)
        }
    };
    let assignment = rules(&recipe.optimizer, config.hidden_size).assign(&model)?;
    let optimizer = match &from {
        Some(found) => {
            stream.seek(state.data)?;
            let path = found.optimizer();
            assignment.load_optimizer(&path).map_err(|source| TrainError::OptimizerState { path, source })?
        }
        None => assignment.optimizer(),
    };

    // Where the run goes on, what was found before its first step is known.
    let judged = if state.step == 0 { judge(recipe, &model.clone().valid(), tokenizer.as_ref())? } else { None };

    fs::create_dir_all(&folder).map_err(TrainError::write(&folder))?;
    if let Some((table, found)) = judged {
        judge::keep(&folder, "before", found)?;
        if lines {
            eprint!("evaluation before:\n{table}");
        }
    }
    write(&folder.join("recipe.toml"), &recipe.to_toml())?;
    write(&folder.join("optimizer.txt"), &assignment.to_string())?;
    let metrics = MetricsFile::open(&folder.join("metrics.jsonl"), state.step)?;
    let events = folder.join("tensorboard");
    let tensorboard = recipe.train.tensorboard.then(|| EventWriter::create(&events)).transpose();
    let tensorboard = tensorboard.map_err(TrainError::write(&events))?;
    if lines {
        announce(&model, &assignment, &corpus, &state);
    }
    let run = Run {
        recipe: recipe.clone(),
        schedule,
        corpus,
        stream,
        optimizer,
        assignment,
        device,
        checkpoints,
        metrics,
        tensorboard,
        state,
        lines,
    };
    Ok(Prepared { trainee: Trainee { model }, run })
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

/// The newest checkpoint that opens, with its model; a damaged one is named and passed over.
fn newest_whole(checkpoints: &Checkpoints, device: &Device) -> Result<Option<(Found, CausalLm)>, TrainError> {
    for found in checkpoints.found()? {
        match load(&found.path, device, None) {
            Ok(loaded) => return Ok(Some((found, loaded.model))),
            Err(error) => eprintln!("warning: passing over a damaged checkpoint: {error}"),
        }
    }
    Ok(None)
}

/// The optimizers that a recipe asks for, for a model of this width.
pub(super) fn rules(recipe: &OptimizerRecipe, hidden: usize) -> ParameterRules {
    let adamw = AdamWConfig::new()
        .with_betas(recipe.betas[0] as f32, recipe.betas[1] as f32)
        .with_epsilon(recipe.epsilon as f32)
        .with_weight_decay(recipe.weight_decay);
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
                .with_steps(recipe.newton_schulz_steps);
            ParameterRules::moonlight(muon, adamw)
        }
    }
}

fn announce(model: &CausalLm, assignment: &Assignment, corpus: &Corpus, state: &TrainerState) {
    let count = model.config().parameter_count();
    let million = |count: u64| count as f64 / 1e6;
    eprintln!("{assignment:#}");
    eprintln!(
        "model: {:.2} M parameters, {:.2} M activated, {:.2} M in embeddings",
        million(count.total),
        million(count.activated),
        million(count.embeddings)
    );
    eprintln!(
        "data: {} training tokens in {} sequences, {} validation tokens",
        corpus.train_tokens(),
        corpus.train_sequences(),
        corpus.valid_tokens()
    );
    for note in corpus.notes() {
        eprintln!("note: {note}");
    }
    if state.step > 0 {
        eprintln!("going on behind step {}", state.step);
    }
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
