//! `evaluation.json` of a run: results of the recipe's tasks before the first step and after the last.

use std::fs;
use std::path::Path;

use moonlight_infer::eval::{EvalModel, evaluate, table, to_json};
use moonlight_infer::tokenizer::Tokenizer;
use moonlight_model::CausalLm;
use serde_json::{Map, Value};

use crate::error::TrainError;
use crate::recipe::Recipe;

const FILE: &str = "evaluation.json";

/// Evaluates a model on the tasks of a recipe: a table for the log, and JSON for the file. `None` if the recipe has no tasks.
pub(super) fn run_eval(
    recipe: &Recipe,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<(String, Value)>, TrainError> {
    let tasks = recipe.eval.tasks();
    if tasks.is_empty() {
        return Ok(None);
    }
    let tokenizer = tokenizer.ok_or_else(|| TrainError::Request {
        problem: "`eval.tasks` needs a tokenizer, but `data.tokenizer` is `none`".into(),
        hint: Some("set `data.tokenizer` to that of the model, or leave `eval.tasks` out".into()),
    })?;
    let reader = EvalModel { model, tokenizer, dir: None };
    let evaluations = tasks.iter().map(|task| evaluate(reader, task)).collect::<Result<Vec<_>, _>>()?;
    for evaluation in &evaluations {
        for note in &evaluation.notes {
            tracing::warn!("{}: {note}", evaluation.task.display());
        }
    }
    Ok(Some((table(&evaluations), evaluations.iter().map(to_json).collect())))
}

/// Logs the results under the key `before` or `after`, and adds them to `evaluation.json`.
pub(super) fn record(folder: &Path, when: &str, (table, results): (String, Value)) -> Result<(), TrainError> {
    let path = folder.join(FILE);
    let mut all = earlier(folder);
    all.insert(when.into(), results);
    let text = serde_json::to_string_pretty(&all).unwrap_or_default() + "\n";
    fs::write(&path, text).map_err(TrainError::write(&path))?;
    tracing::info!("evaluation {when}:\n{}", table.trim_end_matches('\n'));
    Ok(())
}

/// The results in the file; none if it is absent or damaged, since they can be computed again.
fn earlier(folder: &Path) -> Map<String, Value> {
    let text = fs::read_to_string(folder.join(FILE)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}
