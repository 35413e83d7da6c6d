//! A study: the TOML file that `moonlight sweep` runs and `moonlight report` reports.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::budget::Budget;
use super::report::Section;
use crate::error::TrainError;

/// The tier that a study describes outside of `[tiers]`.
pub const SMALL_TIER: &str = "small";

/// The longest product of axes; more was not meant.
const MAX_POINTS: usize = 10_000;

/// A file with a study.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct StudyFile {
    title: String,
    question: String,
    claim: String,
    #[serde(default)]
    others: String,
    limits: String,
    #[serde(default)]
    found: String,
    // The small tier. `#[serde(flatten)]` would accept unknown keys.
    recipe: PathBuf,
    budget: Budget,
    #[serde(default)]
    set: BTreeMap<String, toml::Value>,
    axes: Vec<Axis>,
    tune: Option<Tune>,
    seeds: Vec<u64>,
    #[serde(default)]
    spectra: Spectra,
    #[serde(default)]
    tiers: BTreeMap<String, Overrides>,
    #[serde(default)]
    sections: Vec<Section>,
}

/// What is run: a base recipe, and how its keys vary.
#[derive(Debug, Clone)]
pub struct Tier {
    /// The recipe that all runs share; in the file relative to the study.
    pub recipe: PathBuf,
    /// After which no further run is started; `--budget` overrides it.
    pub budget: Budget,
    /// Keys of the recipe for all runs.
    pub set: BTreeMap<String, toml::Value>,
    /// What is compared. A point of the study has a value of each axis.
    pub axes: Vec<Axis>,
    /// The key that is tuned before the comparison, usually the learning rate.
    pub tune: Option<Tune>,
    /// The seeds of each point.
    pub seeds: Vec<u64>,
    /// Which checkpoints have their singular values measured.
    pub spectra: Spectra,
}

/// What a tier changes in the small one.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Overrides {
    recipe: Option<PathBuf>,
    budget: Option<Budget>,
    set: BTreeMap<String, toml::Value>,
    axes: Vec<Axis>,
    tune: Option<Tune>,
    seeds: Option<Vec<u64>>,
    spectra: Option<Spectra>,
}

/// Alternatives: each point of the study has one of them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    /// The name in tables.
    pub name: String,
    /// The alternatives.
    pub values: Vec<AxisValue>,
}

/// One alternative.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AxisValue {
    /// The name in tables and in the names of runs.
    pub name: String,
    /// Keys of the recipe. A string may contain `{run:STUDY/AXIS=VALUE,...}`, the folder of the tuned run of another study at
    /// that point with the same seed.
    #[serde(default)]
    pub set: BTreeMap<String, toml::Value>,
    /// A factor on `tune.start`: where the search begins for this alternative.
    #[serde(default = "one")]
    pub start_factor: f64,
}

/// How a key is tuned: on a grid of factors that grows until its best value is not at an edge.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tune {
    /// The key of the recipe.
    #[serde(default = "learning_rate")]
    pub key: String,
    /// The axes with a search for each of their values. At the others the first value is tuned, and all values share its result.
    pub by: Vec<String>,
    /// The middle of the first three values.
    pub start: f64,
    /// The ratio of neighbors in the grid.
    #[serde(default = "two")]
    pub factor: f64,
    /// How many of `seeds` a value is tried with.
    #[serde(default = "one_seed")]
    pub seeds: usize,
}

/// Which checkpoints of a run have their singular values measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spectra {
    /// The last.
    #[default]
    Last,
    /// All that the run keeps: set `train.checkpoint_every`, and `train.keep = 0`.
    All,
}

fn one() -> f64 {
    1.0
}

fn two() -> f64 {
    2.0
}

fn one_seed() -> usize {
    1
}

fn learning_rate() -> String {
    "optimizer.learning_rate".into()
}

/// A study with one of its tiers chosen.
#[derive(Debug, Clone)]
pub struct Study {
    /// The file's name without its extension.
    pub name: String,
    /// The folder of the file.
    pub folder: PathBuf,
    /// The title of the page.
    pub title: String,
    /// What the study asks; Markdown, as the next four.
    pub question: String,
    /// What "Muon is Scalable for LLM Training" (arXiv 2502.16982) says.
    pub claim: String,
    /// What others found.
    pub others: String,
    /// What this study cannot say.
    pub limits: String,
    /// The conclusion that people have drawn from the tables; empty before they have.
    pub found: String,
    /// The name of the tier.
    pub tier_name: String,
    /// What is run.
    pub tier: Tier,
    /// What the report shows.
    pub sections: Vec<Section>,
}

impl Study {
    /// Reads a study and chooses a tier.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is not a study, and a tier that it does not have.
    pub fn open(path: &Path, tier_name: &str) -> Result<Self, TrainError> {
        let text = fs::read_to_string(path).map_err(TrainError::read(path))?;
        Self::parse(&text, path, tier_name)
    }

    fn parse(text: &str, path: &Path, tier_name: &str) -> Result<Self, TrainError> {
        let invalid = |problem: String| TrainError::Study { path: path.to_owned(), problem };
        let file: StudyFile = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start].lines().count().max(1));
            invalid(match line {
                Some(line) => format!("line {line}: {}", error.message()),
                None => error.message().to_owned(),
            })
        })?;
        let StudyFile { recipe, budget, set, axes, tune, seeds, spectra, .. } = file;
        let mut tier = Tier { recipe, budget, set, axes, tune, seeds, spectra };
        if tier_name != SMALL_TIER {
            let overrides = file.tiers.get(tier_name).ok_or_else(|| {
                let known: Vec<_> = [SMALL_TIER].into_iter().chain(file.tiers.keys().map(String::as_str)).collect();
                TrainError::Request {
                    problem: format!("`{}` has no tier `{tier_name}`", path.display()),
                    hint: Some(format!("choose one of: {}", known.join(", "))),
                }
            })?;
            overrides.clone().apply(&mut tier);
        }
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        tier.recipe = folder.join(&tier.recipe);
        tier.check().map_err(invalid)?;
        Ok(Self {
            name: path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
            folder,
            title: file.title,
            question: file.question,
            claim: file.claim,
            others: file.others,
            limits: file.limits,
            found: file.found,
            tier_name: tier_name.to_owned(),
            tier,
            sections: file.sections,
        })
    }

    /// The folder of the study's runs.
    pub fn run_dir(&self) -> PathBuf {
        Path::new("runs/studies").join(&self.name)
    }

    /// The table of runs: next to the study, so that it is kept with it.
    pub fn table_path(&self) -> PathBuf {
        self.folder.join("results").join(format!("{}.{}.jsonl", self.name, self.tier_name))
    }
}

impl Overrides {
    fn apply(self, tier: &mut Tier) {
        tier.set.extend(self.set);
        for axis in self.axes {
            match tier.axes.iter_mut().find(|old| old.name == axis.name) {
                Some(old) => *old = axis,
                None => tier.axes.push(axis),
            }
        }
        tier.recipe = self.recipe.unwrap_or_else(|| std::mem::take(&mut tier.recipe));
        tier.budget = self.budget.unwrap_or(tier.budget);
        tier.tune = self.tune.or_else(|| tier.tune.take());
        tier.seeds = self.seeds.unwrap_or_else(|| std::mem::take(&mut tier.seeds));
        tier.spectra = self.spectra.unwrap_or(tier.spectra);
    }
}

impl Tier {
    /// Checks what types cannot express; the error is a sentence.
    fn check(&self) -> Result<(), String> {
        if self.seeds.is_empty() {
            return Err("`seeds` is empty: write at least one seed".into());
        }
        let points = self.axes.iter().try_fold(1usize, |count, axis| count.checked_mul(axis.values.len()));
        if !points.is_some_and(|points| (1..=MAX_POINTS).contains(&points)) {
            return Err(format!("the axes have no value or more than {MAX_POINTS} combinations"));
        }
        for axis in &self.axes {
            let mut names: Vec<_> = axis.values.iter().map(|value| value.name.as_str()).collect();
            names.sort_unstable();
            if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(format!("the axis `{}` has the value `{}` twice", axis.name, twice[0]));
            }
            let plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-+".contains(c));
            if let Some(name) =
                names.into_iter().chain([axis.name.as_str()]).find(|name| name.is_empty() || !plain(name))
            {
                return Err(format!("`{name}` names an axis or a value: use letters, digits, `.`, `_`, `-` and `+`"));
            }
        }
        if let Some(tune) = &self.tune {
            if let Some(name) = tune.by.iter().find(|name| !self.axes.iter().any(|axis| axis.name == **name)) {
                return Err(format!("`tune.by` names the axis `{name}`, which is not among the axes"));
            }
            if !(tune.factor > 1.0 && tune.start > 0.0) {
                return Err("`tune.start` must be above 0 and `tune.factor` above 1".into());
            }
            if tune.seeds == 0 || tune.seeds > self.seeds.len() {
                return Err(format!("`tune.seeds` is {}, but there are {} seeds", tune.seeds, self.seeds.len()));
            }
        }
        Ok(())
    }
}
