//! The settings of one run of a study: its recipe with every `--set`, its name, and the key by which the table finds it again.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};

use toml::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::points::{Progress, Wanted};
use super::run_table::RunTable;
use super::study_file::{Study, Tier, Tune};
use crate::error::TrainError;

/// Keys that a study sets by itself, or that do not change what a run learns.
const FREE: [&str; 5] = ["run.name", "run.dir", "run.device", "data.cache_dir", "sample"];

/// What is the same for all runs of a study.
#[derive(Debug, Clone)]
pub struct BaseRecipe {
    table: toml::Table,
    /// What the studies that provide weights are, by their files: a run that starts from weights is another if they are.
    bases: BTreeMap<PathBuf, String>,
}

/// One run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSettings {
    /// The folder's name: the point, the tuned value, the seed, and the key's first digits.
    pub name: String,
    /// Sixteen hexadecimal digits that follow from the recipe and every setting.
    pub key: String,
    /// `key=value` for each `--set`.
    pub sets: Vec<String>,
}

impl BaseRecipe {
    /// Reads the recipe of the study's tier.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is not TOML.
    pub fn read(study: &Study) -> Result<Self, TrainError> {
        let table = read_table(&study.tier.recipe)?;
        let mut bases = BTreeMap::new();
        for value in study
            .tier
            .axes
            .iter()
            .flat_map(|axis| &axis.values)
            .flat_map(|value| value.set.values())
            .chain(study.tier.set.values())
        {
            let Some(base) = value.as_str().and_then(|text| parse(study, text)) else { continue };
            if let Entry::Vacant(entry) = bases.entry(base.study) {
                let provider = Study::open(entry.key(), &study.tier_name)?;
                let recipe = read_table(&provider.tier.recipe)?;
                let Tier { set, axes, tune, .. } = &provider.tier;
                let text = serde_json::to_string(&recipe).unwrap_or_default() + &format!("{set:?}{axes:?}{tune:?}");
                entry.insert(text);
            }
        }
        Ok(Self { table, bases })
    }

    /// The settings of a run. A `{run:...}` in a value must have been replaced by [`resolve`] before it is trained; the key and the
    /// name contain it as it was written.
    pub fn run(&self, study: &Study, wanted: &Wanted) -> RunSettings {
        let tier = &study.tier;
        let mut set: BTreeMap<String, Value> = tier.set.clone();
        let mut labels = Vec::new();
        for (_, value) in wanted.point.values(&tier.axes) {
            set.extend(value.set.clone());
            labels.push(value.name.clone());
        }
        if let (Some(Tune { key, .. }), Some(value)) = (&tier.tune, wanted.tuned) {
            set.insert(key.clone(), Value::Float(value));
            labels.push(format!("{value:e}"));
        }
        set.insert("run.seed".into(), Value::Integer(wanted.seed as i64));
        labels.push(format!("s{}", wanted.seed));
        let mut table = self.table.clone();
        for (key, value) in &set {
            insert(&mut table, key, value.clone());
        }
        for key in FREE {
            remove(&mut table, key);
        }
        // serde_json writes the entries of `toml::Table` in the order of their names.
        let mut canonical = serde_json::to_string(&table).unwrap_or_default();
        for base in set.values().filter_map(|value| parse(study, value.as_str()?)) {
            canonical.extend(self.bases.get(&base.study).map(String::as_str));
        }
        let key = format!("{:016x}", xxh3_64(canonical.as_bytes()));
        let name = format!("{}-{}", labels.join("-"), &key[..6]);
        let sets = set.iter().map(|(key, value)| format!("{key}={value}")).collect();
        RunSettings { name, key, sets }
    }
}

fn read_table(path: &Path) -> Result<toml::Table, TrainError> {
    let text = fs::read_to_string(path).map_err(TrainError::read(path))?;
    toml::from_str(&text)
        .map_err(|error| TrainError::Study { path: path.to_owned(), problem: error.message().to_owned() })
}

/// A run of another study that provides the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseRun {
    /// What is between the braces of `{run:...}`.
    pub reference: String,
    /// The study's file.
    pub study: PathBuf,
    /// The name of a value for each axis that is given.
    pub point: BTreeMap<String, String>,
}

const OPEN: &str = "{run:";

/// The runs of other studies that the settings name.
pub fn base_runs(study: &Study, settings: &RunSettings) -> Vec<BaseRun> {
    settings.sets.iter().filter_map(|set| parse(study, set)).collect()
}

fn parse(study: &Study, set: &str) -> Option<BaseRun> {
    let (_, rest) = set.split_once(OPEN)?;
    let (inside, _) = rest.split_once('}')?;
    let (name, point) = inside.split_once('/').unwrap_or((inside, ""));
    let point = point.split(',').filter_map(|pair| pair.split_once('=')).map(|(a, b)| (a.into(), b.into())).collect();
    Some(BaseRun { reference: inside.into(), study: study.folder.join(format!("{name}.toml")), point })
}

/// The run that a [`BaseRun`] means, for a run with `seed`: the tuned one at its point. `None` until its search has ended.
pub fn find_base(base: &Study, table: &RunTable, point: &BTreeMap<String, String>, seed: u64) -> Option<Wanted> {
    let progress = Progress::new(base, table);
    let matches = |wanted: &&Wanted| {
        let names = wanted.point.names(&base.tier.axes);
        wanted.seed == seed && point.iter().all(|(axis, value)| names.get(axis) == Some(value))
    };
    let best = |wanted: &&Wanted| progress.tuned(base, &wanted.point) == Some(wanted.tuned);
    progress.done.iter().chain(&progress.ready).filter(matches).find(best).cloned()
}

/// Replaces each `{run:...}` by the folder that belongs to its [`BaseRun::reference`]; `None` if one has no folder.
pub fn resolve(sets: &[String], folder: impl Fn(&str) -> Option<PathBuf>) -> Option<Vec<String>> {
    let one = |set: &String| {
        let Some((before, rest)) = set.split_once(OPEN) else { return Some(set.clone()) };
        let (inside, after) = rest.split_once('}')?;
        Some(format!("{before}{}{after}", folder(inside)?.display()))
    };
    sets.iter().map(one).collect()
}

fn insert(table: &mut toml::Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value)),
        Some((first, rest)) => {
            let inner = table.entry(first).or_insert_with(|| Value::Table(toml::Table::new()));
            if !inner.is_table() {
                *inner = Value::Table(toml::Table::new());
            }
            if let Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

fn remove(table: &mut toml::Table, key: &str) {
    match key.split_once('.') {
        None => drop(table.remove(key)),
        Some((first, rest)) => {
            if let Some(Value::Table(inner)) = table.get_mut(first) {
                remove(inner, rest);
            }
        }
    }
}
