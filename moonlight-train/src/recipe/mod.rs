//! Recipes: one strict TOML file says everything about a run.
//!
//! [`Recipe::load`] reads a file, lays `--set section.key=value` over it, fills in the defaults and checks every
//! value; an unknown key, a wrong type or an impossible value is an error that names the key and the line.
//! [`Recipe::to_toml`] writes the resolved recipe with every default spelled out; reading that gives the same recipe.
//!
//! Paths and globs are relative to the working directory, except a `[model] preset` that is a file, which is
//! relative to the recipe that names it. Zero means "no limit" or "never" where the key says so.

mod data;
mod distributed;
mod error;
mod eval;
mod lora;
mod model;
mod optimizer;
mod run;
mod schedule;
mod section;
mod train;
mod tree;

use std::path::Path;

use serde::Serialize;

pub use data::{BYTES_CHAT_TOKENIZER, BYTES_TOKENIZER, Broken, DataConfig, DataFormat, NO_TOKENIZER, TooLong};
pub use distributed::{DistributedRecipe, FormName};
pub use error::RecipeError;
pub use eval::EvalConfig;
pub use lora::LoraRecipe;
pub use model::{ModelRecipe, ModelSource, Quantise};
pub use moonlight_infer::expand;
pub use optimizer::{HalfOrFull, OptimizerName, OptimizerRecipe, RoundingName, ScaleName};
pub use run::{RunConfig, SampleConfig};
pub use schedule::{AccumulationChange, ScheduleConfig, ScheduleName, Stage, StageShape};
pub use train::{Checkpointing, MoeRecipe, TrainConfig};

use section::Reader;
use tree::Tree;

use crate::schedule::Schedule;

/// A resolved recipe: what `moonlight train` was asked to do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// `[run]`: the run's name, folder, seed and device.
    pub run: RunConfig,
    /// `[model]`: where the model comes from.
    pub model: ModelRecipe,
    /// `[data]`: what it reads.
    pub data: DataConfig,
    /// `[optimizer]`: Muon or AdamW, and its constants.
    pub optimizer: OptimizerRecipe,
    /// `[schedule]`: the learning rate over the steps.
    pub schedule: ScheduleConfig,
    /// `[train]`: steps, batches, validation, checkpoints.
    pub train: TrainConfig,
    /// `[moe]`: the balance of the experts.
    pub moe: MoeRecipe,
    /// `[lora]`: adapters beside a frozen model; absent where the model itself is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraRecipe>,
    /// `[distributed]`: several workers; absent where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distributed: Option<DistributedRecipe>,
    /// `[sample]`: what the trained model writes at the end.
    pub sample: SampleConfig,
    /// `[eval]`: what it is asked before and after.
    pub eval: EvalConfig,
}

impl Recipe {
    /// Reads a recipe, lays each `section.key=value` of `sets` over it, fills in defaults and checks it.
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
        let file = path.display().to_string();
        let mut tree = Tree::parse(text, &file)?;
        for set in sets {
            tree.set(set)?;
        }
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let mut reader = Reader::new(tree, &file);
        let run = reader.section("run", |section| RunConfig::read(section, &stem));
        let model = reader.section("model", |section| ModelRecipe::read(section, path.parent()));
        let limit = model.max_position_embeddings();
        let data = reader.section("data", |section| DataConfig::read(section, &run, &model, limit));
        let optimizer = reader.section("optimizer", OptimizerRecipe::read);
        let schedule = reader.section("schedule", ScheduleConfig::read);
        let train = reader.section("train", |section| TrainConfig::read(section, &schedule));
        let moe = reader.section("moe", |section| MoeRecipe::read(section, &model));
        let lora = reader.section("lora", LoraRecipe::read);
        if lora.is_some()
            && let Some(conflict) = LoraRecipe::conflict(&file, &model, &optimizer, &schedule, &train, &moe)
        {
            reader.problem(conflict);
        }
        if lora.is_none() && model.quantise != Quantise::None {
            reader.problem(RecipeError::Invalid {
                place: file.clone(),
                key: "model.quantise".into(),
                problem: "is for weights that stand still, and without `[lora]` they are what is trained".into(),
                hint: Some("add a `[lora]` section, or train in `dtype = \"bf16\"`".into()),
            });
        }
        let distributed = reader.section("distributed", DistributedRecipe::read);
        if distributed.is_some() && train.fuse_update {
            reader.problem(RecipeError::Invalid {
                place: file.clone(),
                key: "train.fuse_update".into(),
                problem:
                    "updates each layer by the gradients of one worker; with `[distributed]` they are summed first"
                        .into(),
                hint: None,
            });
        }
        let sample = reader.section("sample", SampleConfig::read);
        let eval = reader.section("eval", EvalConfig::read);
        // How long the schedule of a run of epochs is depends on its data.
        if (train.steps > 0 || train.epochs == 0.0)
            && let Err(error) = Schedule::new(&schedule, optimizer.learning_rate, train.steps)
        {
            reader.problem(RecipeError::Invalid {
                place: file,
                key: error.key.into(),
                problem: error.problem,
                hint: None,
            });
        }
        reader.finish()?;
        Ok(Self { run, model, data, optimizer, schedule, train, moe, lora, distributed, sample, eval })
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
mod tests;
