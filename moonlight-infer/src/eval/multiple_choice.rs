//! Multiple choice: the log-likelihood of each choice after the context.

use std::path::Path;

use serde_json::json;

use super::requests::{TextEncoder, log_likelihood, score_requests};
use super::statistics::mean;
use super::task::{self, Question, Row};
use super::{EvalModel, Task, TaskFormat, TaskResult};
use crate::error::InferError;

pub(super) fn evaluate_choices(
    model: EvalModel<'_>,
    task: &Task,
    format: TaskFormat,
    rows: &[Row],
) -> Result<TaskResult, InferError> {
    let read = |path: &Path, row: &Row| {
        Question::parse(format, &row.fields).map_err(|problem| InferError::line(path, row.line, problem, None))
    };
    let questions = rows.iter().map(|row| read(&task.path, row)).collect::<Result<Vec<_>, _>>()?;
    let examples = match &task.shots_from {
        Some(path) => {
            let rows = task::read_rows(path, 0)?;
            rows.iter().map(|row| read(path, row)).collect::<Result<Vec<_>, _>>()?
        }
        None => questions.clone(),
    };
    let encoder = TextEncoder::new(model.tokenizer)?;
    let context_length = model.model.config().max_position_embeddings;
    // `starts` has the index of each row's first request, and `crossing` the lines in which a token crosses the boundary.
    let (mut requests, mut starts, mut crossing) = (Vec::new(), Vec::new(), Vec::new());
    for (question, row) in questions.iter().zip(rows) {
        // Without `shots_from` the examples include the question itself.
        let usable = examples.iter().filter(|example| example.subject == question.subject && *example != question);
        let shots: Vec<String> = usable.take(task.shots).map(|example| example.with_answer() + "\n\n").collect();
        if shots.len() < task.shots {
            return Err(InferError::TooFewExamples { examples: shots.len(), shots: task.shots });
        }
        let context = format!("{}{}{}", question.description, shots.concat(), question.context);
        starts.push(requests.len());
        let here = |problem: String, hint: Option<String>| InferError::line(&task.path, row.line, problem, hint);
        // The space is the harness's `target_delimiter`.
        let choices: Vec<String> = question.choices.iter().map(|choice| format!(" {choice}")).collect();
        let encoded = match task.fix_harness {
            true => encoder.choices(&context, &choices)?,
            false => encoder.choices_as_harness(&context, &choices)?,
        };
        if encoded.iter().any(|choice| choice.crosses_boundary) {
            crossing.push(row.line);
        }
        for choice in encoded {
            let scored = choice.request.scored();
            if scored > context_length {
                let problem =
                    format!("a choice has {scored} tokens, more than the model's context of {context_length}");
                return Err(here(problem, Some("remove the row; lm-evaluation-harness refuses it, too".into())));
            }
            requests.push(choice.request.within(context_length));
        }
    }
    let scores = score_requests(model.model, &requests)?;
    let mut correct: [Vec<f64>; 3] = Default::default();
    let mut records = Vec::with_capacity(rows.len());
    for ((question, row), start) in questions.iter().zip(rows).zip(starts) {
        let choice_scores = &scores[start..start + question.choices.len()];
        let sums: Vec<f64> = choice_scores.iter().map(|scored| log_likelihood(scored)).collect();
        let best = |length: &dyn Fn(&str) -> f64| {
            let values = sums.iter().zip(&question.choices).map(|(sum, choice)| sum / length(choice));
            first_largest(values)
        };
        let chosen =
            [best(&|_| 1.0), best(&|choice| choice.chars().count() as f64), best(&|choice| choice.len() as f64)];
        for (correct, choice) in correct.iter_mut().zip(chosen) {
            correct.push(f64::from(u8::from(choice == question.gold)));
        }
        records.push(json!({
            "line": row.line, "gold": question.gold, "choice": chosen[0], "choice_norm": chosen[1],
            "choice_bytes": chosen[2], "loglikelihoods": sums,
        }));
    }
    let [acc, norm, bytes] = correct.map(|values| mean(&values));
    let metrics = vec![("acc", acc), ("acc_norm", norm), ("acc_bytes", bytes)];
    Ok(TaskResult { metrics, records, notes: boundary_note(&crossing, task.fix_harness).into_iter().collect() })
}

/// The note about rows in which a token crosses the boundary between context and choice; `lines` are those of the rows.
fn boundary_note(lines: &[usize], fixed: bool) -> Option<String> {
    let first = lines.first()?;
    let count = lines.len();
    let what =
        format!("in {count} rows (the first on line {first}) a token crosses the boundary between context and choice");
    Some(match fixed {
        true => format!("{what}; it is scored with the choice"),
        false => format!(
            "{what}: lm-evaluation-harness drops it, and a choice without tokens wins with the log-likelihood 0; \
             `--fix-harness` scores it"
        ),
    })
}

/// The index that NumPy's `argmax` returns: the first of the largest values, where NaN is larger than any number.
fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.enumerate() {
        if value.is_nan() {
            return index;
        }
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}
