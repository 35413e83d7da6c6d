//! `evaluation.json` of a run: what the model can do before the first step and after the last.

use std::fs;
use std::path::Path;

use moonlight_model::CausalLm;
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::eval::{Reader, evaluate, table, to_json};
use crate::recipe::Recipe;
use crate::tokenizer::Tokenizer;

const FILE: &str = "evaluation.json";

/// Evaluates a model on the tasks of a recipe; nothing where it names none. Text for the reader, JSON for the file.
pub(super) fn judge(
    recipe: &Recipe,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<(String, Value)>, TrainError> {
    let tasks = recipe.eval.tasks();
    if tasks.is_empty() {
        return Ok(None);
    }
    let tokenizer = tokenizer.ok_or_else(|| TrainError::Request {
        problem: "`eval.tasks` need a tokenizer, and `data.tokenizer` is `none`".into(),
        hint: None,
    })?;
    let reader = Reader { model, tokenizer, dir: None };
    let evaluations = tasks.iter().map(|task| evaluate(reader, task)).collect::<Result<Vec<_>, _>>()?;
    Ok(Some((table(&evaluations), evaluations.iter().map(to_json).collect())))
}

/// Puts what was found `before` or `after` into the run's file, beside what is there.
pub(super) fn keep(folder: &Path, when: &str, found: Value) -> Result<(), TrainError> {
    let path = folder.join(FILE);
    let mut all = earlier(folder);
    all.insert(when.into(), found);
    let text = serde_json::to_string_pretty(&all).unwrap_or_default() + "\n";
    fs::write(&path, text).map_err(TrainError::write(&path))
}

/// What the run's file holds already.
fn earlier(folder: &Path) -> Map<String, Value> {
    let text = fs::read_to_string(folder.join(FILE)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}
