//! Recipes: one strict TOML file describes a run completely.
//!
//! A section is a struct with serde's derives. Its field names are the keys, its `Default` has the defaults, its doc comments
//! are what editors and the reference page show, and its `check` has the rules that a type cannot express. Reading has two
//! parts:
//!
//! 1. [`Draft::parse`] reads text, applies each `--set section.key=value`, and checks every key on its own and with the others,
//!    without access to the disk. An unknown key, a wrong type or an impossible value is an error that names key and line.
//! 2. [`Draft::resolve`] finds the model that the recipe names, and what follows from it: the folder of the weights or the
//!    complete shape, the longest sequence, the tokenizer.
//!
//! [`Recipe::load`] does both. [`Recipe::to_toml`] writes the resolved recipe with every default; reading that text returns
//! the same recipe.
//!
//! Paths and globs are relative to the working directory, except for a `model.preset` that is a file, which is relative to the
//! recipe. 0 means "no limit" or "never" for the keys whose description says so.

mod check;
mod data;
mod distributed;
mod document;
mod error;
mod eval;
mod lora;
mod model;
mod old_names;
mod optimizer;
mod reader;
mod run;
mod schedule;
mod schema;
mod train;

use std::path::{Path, PathBuf};

use moonlight_model::ModelConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use data::{Bos, BrokenRecords, DataConfig, DataFormat, LongRecords, NO_TOKENIZER, TokenizerName};
pub use distributed::DistributedRecipe;
pub use error::RecipeError;
pub use eval::EvalConfig;
pub use lora::LoraRecipe;
pub use model::{ModelDtype, ModelRecipe, Quantize, named_config};
pub(crate) use old_names::RENAMED_KEYS;
pub use optimizer::{OptimizerName, OptimizerRecipe};
pub use run::{DeviceName, RunConfig, SampleConfig};
pub use schema::schema;
pub use train::{Checkpointing, MoeRecipe, TrainConfig};

use check::Check;
use document::Node;

use crate::data::MAX_STEP_TOKENS;
use crate::schedule::{AccumulationChange, ScheduleConfig};

/// A resolved recipe: everything that `moonlight train` needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The run's name, its folder, its seed and its device.
    #[serde(default)]
    pub run: RunConfig,
    /// The weights to start from, or the shape to initialize.
    #[serde(default)]
    pub model: ModelRecipe,
    /// The files that the model learns from.
    #[serde(default)]
    pub data: DataConfig,
    /// Muon or AdamW, and their settings.
    #[serde(default)]
    pub optimizer: OptimizerRecipe,
    /// The learning rate and the batch over the steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// Steps, batches, validation, checkpoints, memory and what is logged.
    #[serde(default)]
    pub train: TrainConfig,
    /// How the load of the experts is balanced.
    #[serde(default)]
    pub moe: MoeRecipe,
    /// Low-rank adapters; `None` if the model itself is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraRecipe>,
    /// Several ranks; `None` for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distributed: Option<DistributedRecipe>,
    /// The text that the trained model writes at the end.
    #[serde(default)]
    pub sample: SampleConfig,
    /// Tasks before the first step and after the last.
    #[serde(default)]
    pub eval: EvalConfig,
}

/// A recipe as it was written, checked as far as possible without its model.
#[derive(Debug)]
pub struct Draft {
    recipe: Recipe,
    document: Node,
    /// The folder that contains the recipe.
    folder: Option<PathBuf>,
}

/// A recipe for a plan: it has the shape of its model, but needs neither weights nor tokenizer nor data.
#[derive(Debug)]
pub struct ShapedRecipe {
    /// The recipe. Its paths need not exist.
    pub recipe: Recipe,
    /// The shape of its model.
    pub config: ModelConfig,
    /// A sentence on the source of the shape, unless that is the recipe's own keys or weights.
    pub assumed: Option<String>,
}

impl Draft {
    /// Reads a file and [parses](Self::parse) it.
    ///
    /// # Errors
    ///
    /// [`RecipeError`], which names the key and the place.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| RecipeError::Read { path: path.to_owned(), problem: error.to_string() })?;
        Self::parse(&text, path, sets)
    }

    /// Parses the text of the recipe at `path`, applies each `section.key=value` of `sets`, fills in defaults and checks it.
    ///
    /// # Errors
    ///
    /// [`RecipeError`], which names the key and the place.
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        let mut document = Node::parse(text, &path.display().to_string())?;
        for set in sets {
            document.set(set)?;
        }
        for (old, new) in RENAMED_KEYS {
            document.rename(old, new)?;
        }
        // First, because a misspelled key is often a required one, and the hint with its spelling helps more than the error that
        // it is missing.
        if let Some(unknown) = schema::unknown_key(&document) {
            return Err(unknown);
        }
        let mut recipe: Recipe = reader::read(&document)?;
        let mut check = Check::new(&document);
        recipe.fill(path, &check);
        recipe.check(&mut check);
        check.finish()?;
        Ok(Self { recipe, document, folder: path.parent().map(Path::to_owned) })
    }

    /// Where the data are, as the recipe says it.
    pub(crate) fn data(&self) -> &DataConfig {
        &self.recipe.data
    }

    /// Finds the recipe's model and fills in the defaults that follow from it. Reads the disk and the Hub's cache, and downloads
    /// nothing.
    ///
    /// # Errors
    ///
    /// [`RecipeError`] for a model that is absent or invalid, and for keys that it does not support.
    pub fn resolve(self) -> Result<Recipe, RecipeError> {
        let Self { mut recipe, document, folder } = self;
        let mut check = Check::new(&document);
        if let Some(config) = recipe.model.resolve(folder.as_deref(), &mut check) {
            recipe.data.fit_length(config.max_position_embeddings, &mut check);
        }
        if !check.has("data.tokenizer") {
            recipe.data.tokenizer = TokenizerName::default_for(recipe.data.format, recipe.model.path.as_deref());
        }
        check.finish()?;
        Ok(recipe)
    }

    /// Finds the shape of the model and nothing else: weights, data and tokenizer may be absent.
    ///
    /// The shape is the first of these that exists: that of `named` (as [`named_config`] reads it), that of the `config.json` at
    /// `model.path`, that of `model.preset`, and the recipe's own keys. The tokenizer is opened only for a shape without
    /// `vocab_size`.
    ///
    /// # Errors
    ///
    /// [`RecipeError`] for a shape that cannot be found, and for keys that do not match it.
    pub fn resolve_shape(self, named: Option<&str>) -> Result<ShapedRecipe, RecipeError> {
        let Self { mut recipe, document, folder } = self;
        let mut check = Check::new(&document);
        let shaped = recipe.model.resolve_shape(named, folder.as_deref(), &recipe.data.tokenizer, &mut check);
        if let Some((config, _)) = &shaped {
            recipe.data.fit_length(config.max_position_embeddings, &mut check);
        }
        check.finish()?;
        let (config, assumed) = shaped.expect("the check has a problem if there is no shape");
        Ok(ShapedRecipe { recipe, config, assumed })
    }
}

impl Recipe {
    /// Reads a recipe, applies each `section.key=value` of `sets`, fills in defaults, checks it and finds its model.
    ///
    /// # Errors
    ///
    /// [`RecipeError`], which names the key and the place.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        Draft::load(path, sets)?.resolve()
    }

    /// Like [`load`](Recipe::load), from text that was read from `path`.
    ///
    /// # Errors
    ///
    /// [`RecipeError`], which names the key and the place.
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        Draft::parse(text, path, sets)?.resolve()
    }

    /// Fills in the defaults that follow from other keys.
    fn fill(&mut self, path: &Path, written: &Check<'_>) {
        if !written.has("run.name") {
            self.run.name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        }
        if !written.has("data.cache_dir") {
            self.data.cache_dir = self.run.dir.join("token-cache");
        }
        if !written.has("data.tokenizer") {
            self.data.tokenizer = TokenizerName::default_for(self.data.format, None);
        }
        if !written.has("train.steps") && self.train.epochs == 0.0 {
            self.train.steps = self.schedule.stages.iter().map(|stage| stage.steps).sum();
        }
        if !written.has("moe.bias_update_rate") && self.model.path.is_some() {
            // DeepSeek-V3 and Moonlight froze the bias in their last stage of training; fine-tuning keeps it frozen.
            self.moe.bias_update_rate = 0.0;
        }
    }

    /// Checks everything that does not depend on the model.
    fn check(&self, check: &mut Check<'_>) {
        self.run.check(check);
        self.model.check(self.lora.is_some(), check);
        self.data.check(check);
        self.optimizer.check(check);
        schedule::check(&self.schedule, check);
        self.train.check(&self.schedule, check);
        self.check_step(check);
        self.moe.check(check);
        if let Some(lora) = &self.lora {
            lora.check(self, check);
        }
        if let Some(distributed) = &self.distributed {
            distributed.check(check);
            check.require("train.fuse_update", !self.train.fuse_update, || {
                "updates each layer before gradients are summed over ranks; leave it out with `[distributed]`".into()
            });
        }
        self.sample.check(check);
        self.eval.check(check);
        // With `epochs` the number of steps is known only after the data are read; `Schedule::new` checks it then.
        if self.train.steps > 0 || self.train.epochs == 0.0 {
            schedule::check_length(&self.schedule, self.optimizer.learning_rate, self.train.steps, check);
        }
    }

    /// Checks that a step's tokens, which are all in memory before it starts, are at most `MAX_STEP_TOKENS`.
    fn check_step(&self, check: &mut Check<'_>) {
        let TrainConfig { batch_size, gradient_accumulation, .. } = self.train;
        let sequence = [batch_size, self.data.sequence_length];
        let later =
            self.schedule.accumulation.iter().map(|change| ("schedule.accumulation", change.gradient_accumulation));
        for (key, passes) in std::iter::once(("train.gradient_accumulation", gradient_accumulation)).chain(later) {
            let tokens = sequence.iter().try_fold(passes, |product, &factor| product.checked_mul(factor));
            check.require(key, tokens.is_some_and(|tokens| tokens as u64 <= MAX_STEP_TOKENS), || {
                format!(
                    "is {passes}; with {batch_size} sequences of {} tokens a step has more than 2^32 tokens",
                    sequence[1]
                )
            });
        }
    }

    /// Computes `train.steps` from `train.epochs`, if that is set, for epochs of `sequences` sequences. The last step may
    /// continue into the next epoch.
    ///
    /// # Errors
    ///
    /// [`RecipeError`] if the recipe has another number of steps as well, or if there are less than 1 or too many.
    pub fn with_steps(mut self, sequences: u64) -> Result<Self, RecipeError> {
        let TrainConfig { steps, epochs, batch_size, gradient_accumulation, .. } = self.train;
        if epochs == 0.0 {
            return Ok(self);
        }
        let batches = (epochs * sequences as f64 / batch_size as f64).ceil();
        let found = steps_of(batches, gradient_accumulation, &self.schedule.accumulation);
        let here = |key: &str, problem, hint: &str| RecipeError::Invalid {
            place: self.run.name.clone(),
            key: key.into(),
            problem,
            hint: Some(hint.into()),
        };
        if !(1.0..9e15).contains(&found) {
            return Err(here(
                "train.epochs",
                format!("is {epochs:e}, which is {found:e} steps"),
                "set `train.steps` instead",
            ));
        }
        self.train.steps = found as u64;
        if ![0, self.train.steps].contains(&steps) {
            let problem = format!("is {steps}, but `train.epochs = {epochs}` is {found} steps with these data");
            return Err(here("train.steps", problem, "leave one of the two out"));
        }
        Ok(self)
    }

    /// The recipe as TOML, with every default.
    pub fn to_toml(&self) -> String {
        // Every recipe can be written as TOML: `None` is skipped, and the reader accepts no integer beyond i64.
        toml::to_string(self).unwrap_or_else(|error| format!("# this recipe cannot be written as TOML: {error}\n"))
    }
}

/// The number of steps for `batches` micro-batches: `passes` a step, until the first of `changes`.
fn steps_of(batches: f64, mut passes: usize, changes: &[AccumulationChange]) -> f64 {
    let (mut steps, mut left) = (0.0, batches);
    for change in changes {
        let until = change.from_step as f64 - steps;
        let taken = until * passes as f64;
        if taken >= left {
            break;
        }
        (steps, left, passes) = (change.from_step as f64, left - taken, change.gradient_accumulation);
    }
    steps + (left / passes as f64).ceil()
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
