//! Recipes: one strict TOML file says everything about a run.
//!
//! A section is a struct with serde's derives; its field names are the keys, its `Default` has the defaults, its docs are what
//! editors and `docs/src/reference/recipe.md` show, and its `check` has what a type cannot say. Reading has two parts:
//!
//! 1. [`Draft::parse`] reads text, lays `--set section.key=value` over it, and checks every key by itself and beside the others. It
//!    touches no disk. An unknown key, a wrong type or an impossible value is an error that names the key and the line.
//! 2. [`Draft::resolve`] finds the model that the recipe names, and what follows from it: the folder of the weights, or the whole
//!    shape; the longest sequence; the tokenizer.
//!
//! [`Recipe::load`] does both. [`Recipe::to_toml`] writes the resolved recipe with every default spelled out; reading that gives the
//! same recipe.
//!
//! Paths and globs are relative to the working directory, except a `[model] preset` that is a file, which is
//! relative to the recipe that names it. Zero means "no limit" or "never" where the key says so.

mod check;
mod data;
mod distributed;
mod document;
mod error;
mod eval;
mod lora;
mod model;
mod optimizer;
mod reader;
mod run;
mod schedule;
mod schema;
mod train;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use data::{Bos, BrokenRecords, DataConfig, DataFormat, LongRecords, NO_TOKENIZER, TokenizerName};
pub use distributed::DistributedRecipe;
pub use error::RecipeError;
pub use eval::EvalConfig;
pub use lora::LoraRecipe;
pub use model::{ModelDtype, ModelRecipe, Quantize};
pub use optimizer::{OptimizerName, OptimizerRecipe};
pub use run::{DeviceName, RunConfig, SampleConfig};
pub use schema::schema;
pub use train::{Checkpointing, MoeRecipe, TrainConfig};

use check::Check;
use document::Node;

use crate::data::MAX_STEP_TOKENS;
use crate::schedule::{AccumulationChange, ScheduleConfig};

/// A resolved recipe: what `moonlight train` was asked to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The run's name, folder, seed and device.
    #[serde(default)]
    pub run: RunConfig,
    /// Where the model comes from.
    #[serde(default)]
    pub model: ModelRecipe,
    /// What the model reads.
    #[serde(default)]
    pub data: DataConfig,
    /// Muon or AdamW, and their settings.
    #[serde(default)]
    pub optimizer: OptimizerRecipe,
    /// The learning rate over the steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// Steps, batches, validation, checkpoints.
    #[serde(default)]
    pub train: TrainConfig,
    /// The balance of the experts.
    #[serde(default)]
    pub moe: MoeRecipe,
    /// Adapters beside a frozen model; absent where the model itself is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraRecipe>,
    /// Several workers; absent where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distributed: Option<DistributedRecipe>,
    /// What the trained model writes at the end.
    #[serde(default)]
    pub sample: SampleConfig,
    /// What the model is asked before and after.
    #[serde(default)]
    pub eval: EvalConfig,
}

/// A recipe as it was written, checked as far as that can be done without looking for its model.
#[derive(Debug)]
pub struct Draft {
    recipe: Recipe,
    document: Node,
    /// The folder that it was read from.
    folder: Option<PathBuf>,
}

impl Draft {
    /// Reads the text of a recipe from `path`, lays each `section.key=value` of `sets` over it, fills in defaults and checks it.
    ///
    /// # Errors
    ///
    /// [`RecipeError`], which names the key and the place.
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        let mut document = Node::parse(text, &path.display().to_string())?;
        for set in sets {
            document.set(set)?;
        }
        // A misspelt key is often a required one: it is reported before the absence of the latter.
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

    /// The recipe with its model found and with the defaults that follow from it: looks at the disk and in the Hub's cache, and
    /// fetches nothing.
    ///
    /// # Errors
    ///
    /// [`RecipeError`] for a model that cannot be found or is none, and for what does not go with it.
    pub fn resolve(self) -> Result<Recipe, RecipeError> {
        let Self { mut recipe, document, folder } = self;
        let mut check = Check::new(&document);
        if let Some(config) = recipe.model.resolve(folder.as_deref(), &mut check) {
            let longest = config.max_position_embeddings;
            if !check.has("data.sequence_length") {
                recipe.data.sequence_length = recipe.data.sequence_length.min(longest);
            }
            recipe.data.check_length(longest, &mut check);
        }
        if !check.has("data.tokenizer") {
            recipe.data.tokenizer = TokenizerName::default_for(recipe.data.format, recipe.model.path.as_deref());
        }
        check.finish()?;
        Ok(recipe)
    }
}

impl Recipe {
    /// Reads a recipe, lays each `section.key=value` of `sets` over it, fills in defaults, checks it and finds its model.
    ///
    /// # Errors
    ///
    /// [`RecipeError`], which names the key and the place.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| RecipeError::Read { path: path.to_owned(), problem: error.to_string() })?;
        Self::parse(&text, path, sets)
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
            // The report's last stage and DeepSeek-V3's freeze the bias; fine-tuning starts from there.
            self.moe.bias_update_rate = 0.0;
        }
    }

    /// Everything that can be wrong but for the model.
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
                "updates each layer by the gradients of one worker; with `[distributed]` they are summed first".into()
            });
        }
        self.sample.check(check);
        self.eval.check(check);
        // How long the schedule of a run of epochs is depends on its data.
        if self.train.steps > 0 || self.train.epochs == 0.0 {
            schedule::check_length(&self.schedule, self.optimizer.learning_rate, self.train.steps, check);
        }
    }

    /// That a step's tokens, which are laid out before it, are not more than can be.
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

    /// The recipe with the steps that its epochs of `sequences` sequences are; as it is where it has no `epochs`. The last
    /// step may go on into the next epoch.
    ///
    /// # Errors
    ///
    /// Steps that the recipe gives as well and that are others, or more steps than any run has.
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
                format!("is {epochs:e}, which are {found:e} steps"),
                "give `train.steps`",
            ));
        }
        self.train.steps = found as u64;
        if ![0, self.train.steps].contains(&steps) {
            let problem = format!("is {steps}, but `train.epochs = {epochs}` of these data are {found} steps");
            return Err(here("train.steps", problem, "leave one of the two out"));
        }
        Ok(self)
    }

    /// The recipe as TOML, every default spelled out.
    pub fn to_toml(&self) -> String {
        // A recipe holds nothing that TOML cannot: no nulls, no numbers beyond i64 that the reader would accept.
        toml::to_string(self).unwrap_or_else(|error| format!("# this recipe cannot be written as TOML: {error}\n"))
    }
}

/// The steps that so many batches are, `passes` each, but for the changes on the way.
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
