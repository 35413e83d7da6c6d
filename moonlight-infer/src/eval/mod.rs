//! Evaluation of a model on local files, by the definitions of lm-evaluation-harness (0.4).
//!
//! | format | rows | metrics |
//! |---|---|---|
//! | `mmlu`, `arc`, `hellaswag` | multiple choice, in the layout that the data set has on the Hub | `acc`: the right choice has the largest log-likelihood; `acc_norm`: the largest per character; `acc_bytes`: the largest per byte |
//! | `perplexity` | `{"text": ...}` | `word_perplexity`, `byte_perplexity`, `bits_per_byte`, and `token_perplexity` |
//! | `chat` | conversations | `nll`: nats per learned token; `exact_match`: greedy decoding yields exactly the assistant's text |
//!
//! The standard error of a mean is the analytic one (for accuracies, binomial); that of a ratio of sums is from the bootstrap.
//! A context that is too long for the model is truncated on the left; a long text is scored in windows. Few-shot examples are
//! the first rows of `shots_from`, of the same subject if rows have one. (The harness does the same for MMLU, and samples the
//! examples for other tasks.)
//!
//! Texts are tokenized as in the harness: a context starts with BOS if the tokenizer adds BOS to texts
//! ([`Tokenizer::prefix`]), an empty context is replaced by BOS, or by EOS without a BOS, and special tokens in texts are
//! parsed. Two behaviors of the harness (0.4.13) are defects. They are reproduced, with a note, unless [`Task::fix_harness`]
//! is set:
//!
//! | the harness | with `fix_harness` |
//! |---|---|
//! | cuts the tokens of context and choice after as many tokens as the context alone has, although a token may cross the boundary: a choice that is left without tokens has the log-likelihood 0 and wins; the others are scored after a context that differs from the tokenized text | context and choice are tokenized as one text, and scored from the first token in which any choice of the row differs from the context |
//! | adds BOS to a text to which the tokenizer has already added BOS, and scores the second BOS | there is one BOS, which is not scored |

mod conversations;
mod multiple_choice;
mod perplexity;
mod python_str;
mod requests;
mod statistics;
mod task;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use moonlight_convert::printable;
use moonlight_model::CausalLm;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::InferError;
use crate::tokenizer::Tokenizer;
use conversations::evaluate_conversations;
use multiple_choice::evaluate_choices;
use perplexity::evaluate_perplexity;
pub use statistics::Estimate;
pub use task::TaskFormat;
use task::read_rows;

/// A file to evaluate, and the options of the evaluation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// The file, of any [kind](crate::records).
    pub path: PathBuf,
    /// The format of its rows; `None` to detect it from the keys of the first row.
    pub format: Option<TaskFormat>,
    /// The number of few-shot examples before each question.
    pub shots: usize,
    /// The file with the examples; `None` for the other rows of the task.
    pub shots_from: Option<PathBuf>,
    /// The number of rows to evaluate; 0 for all.
    pub limit: usize,
    /// Whether to correct the two defects of lm-evaluation-harness (see [the table](self)), instead of reproducing them.
    pub fix_harness: bool,
}

/// The result of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The file.
    pub task: PathBuf,
    /// The format of its rows.
    pub format: TaskFormat,
    /// The number of rows that were evaluated.
    pub rows: usize,
    /// The number of few-shot examples before each question.
    pub shots: usize,
    /// The metrics, in the order of [the table](self).
    pub metrics: Vec<Metric>,
    /// A note for each defect of the harness that affects the metrics.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// A record for each row, in order: its line, scores and choice.
    #[serde(skip)]
    pub records: Vec<Value>,
}

/// A metric of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// The name, as in the harness.
    pub name: String,
    /// The value and its standard error.
    #[serde(flatten)]
    pub estimate: Estimate,
}

/// The model to evaluate.
#[derive(Debug, Clone, Copy)]
pub struct EvalModel<'a> {
    /// The weights.
    pub model: &'a CausalLm,
    /// The tokenizer of the model.
    pub tokenizer: &'a Tokenizer,
    /// The directory with the chat template; `None` for the template next to the tokenizer.
    pub dir: Option<&'a Path>,
}

/// Evaluates a model on a task.
///
/// # Errors
///
/// [`InferError`]: a file that cannot be read, a row that does not have the format (with file and line), a conversation that
/// does not fit into the model's context, or conversations for a model without a chat template.
pub fn evaluate(model: EvalModel<'_>, task: &Task) -> Result<Evaluation, InferError> {
    let rows = read_rows(&task.path, task.limit)?;
    let format = match task.format {
        Some(format) => format,
        None => TaskFormat::detect(&rows[0].fields).ok_or_else(|| {
            let hint =
                "rows are those of MMLU, ARC or HellaSwag, conversations, or `{\"text\": ...}`; choose with `--format`";
            InferError::line(
                &task.path,
                rows[0].line,
                "the keys of the row are not those of any format",
                Some(hint.into()),
            )
        })?,
    };
    if task.shots > 0 && !format.has_choices() {
        return Err(InferError::ShotsWithoutChoices { format: format.to_string() });
    }
    let TaskResult { metrics, records, notes } = match format {
        TaskFormat::Mmlu | TaskFormat::Arc | TaskFormat::HellaSwag => evaluate_choices(model, task, format, &rows)?,
        TaskFormat::Perplexity => evaluate_perplexity(model, task, &rows)?,
        TaskFormat::Chat => evaluate_conversations(model, task, &rows)?,
    };
    let metrics = metrics.into_iter().map(|(name, estimate)| Metric { name: name.into(), estimate }).collect();
    let (task, rows, shots) = (task.path.clone(), rows.len(), task.shots);
    Ok(Evaluation { task, format, rows, shots, metrics, notes, records })
}

/// Metrics by name, a record for each row, and notes.
struct TaskResult {
    metrics: Vec<(&'static str, Estimate)>,
    records: Vec<Value>,
    notes: Vec<String>,
}

/// A text table of evaluations, with a line for each metric.
pub fn table(evaluations: &[Evaluation]) -> String {
    let mut text =
        format!("{:<32} {:<10} {:>6} {:>5}  {:<16} {:>10}\n", "task", "format", "rows", "shots", "metric", "value");
    for evaluation in evaluations {
        let name = evaluation.task.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let task = printable(&name);
        for Metric { name, estimate: Estimate { value, stderr } } in &evaluation.metrics {
            let stderr = stderr.map(|stderr| format!(" ± {stderr:.4}")).unwrap_or_default();
            let (format, rows, shots) = (evaluation.format.to_string(), evaluation.rows, evaluation.shots);
            text.push_str(&format!("{task:<32} {format:<10} {rows:>6} {shots:>5}  {name:<16} {value:>10.4}{stderr}\n"));
        }
    }
    text
}

/// An evaluation as JSON: `{"task", "format", "rows", "shots", "metrics": {NAME: {"value", "stderr"}}, "notes": [TEXT]}`.
pub fn to_json(evaluation: &Evaluation) -> Value {
    let metrics: Map<String, Value> =
        evaluation.metrics.iter().map(|metric| (metric.name.clone(), json!(metric.estimate))).collect();
    json!({
        "task": evaluation.task, "format": evaluation.format, "rows": evaluation.rows, "shots": evaluation.shots,
        "metrics": metrics, "notes": evaluation.notes,
    })
}
