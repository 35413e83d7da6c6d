//! Evaluation of a model on local files, by the definitions of lm-evaluation-harness (0.4).
//!
//! | format | rows | metrics |
//! |---|---|---|
//! | `mmlu`, `arc`, `hellaswag` | multiple choice, in the layout that the data set has on the Hub | `acc`: the choice with the largest log-likelihood is the right one; `acc_norm`: the largest per character; `acc_bytes`: per byte |
//! | `perplexity` | `{"text": ...}` | `word_perplexity`, `byte_perplexity`, `bits_per_byte`, and `token_perplexity` |
//! | `chat` | conversations | `nll`: nats per learned token; `exact_match`: greedy decoding gives the assistant's text exactly |
//!
//! Standard errors are that of the mean (for accuracies, the binomial one) and, for ratios of sums, that of the bootstrap. A
//! context that is too long for the model is truncated on the left; a long text is scored in windows. Few-shot examples are
//! the first rows of `shots_from`, of the same subject where rows have one (the harness does so for MMLU, and samples them for
//! other tasks).
//!
//! Texts are tokenized as in the harness: the tokenizer adds BOS to a context if it adds BOS to texts
//! ([`Tokenizer::prefix`]), an empty context is replaced by BOS, else EOS, and special tokens in texts are parsed. Two
//! behaviors of the harness (0.4.13) are defects. They are reproduced, with a note, unless [`Task::fix_harness`] is set:
//!
//! | the harness | with `fix_harness` |
//! |---|---|
//! | takes as the tokens of a choice those after the length of the tokenized context, although a token may cross the boundary: a choice without tokens has the log-likelihood 0, and wins; other choices follow a context that the tokenizer does not write | scores context and choice tokenized as one text, from the first token in which any choice of the row differs from the context |
//! | adds BOS to a text to which the tokenizer has added BOS, and scores the second one | has one BOS, which is not scored |

mod python_str;
mod requests;
mod statistics;
mod task;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use moonlight_convert::printable;
use moonlight_model::CausalLm;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::chat::{ChatEncoder, ChatTemplate};
use crate::error::InferError;
use crate::score::{TokenScore, score_batch};
use crate::tokenizer::{Tokenizer, TokenizerError};
use requests::{Request, TextEncoder, windows};

pub use statistics::Estimate;
pub use task::TaskFormat;

use statistics::{mean, ratio};
use task::{Question, Row, read_rows};

/// The limit of logits in memory, 256 MiB in f32; one sequence may have more.
const MAX_LOGITS: usize = 64 << 20;
/// The limit of sequences in a batch.
const MAX_BATCH: usize = 32;

/// What to evaluate, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// The file, of any [kind](crate::records).
    pub path: PathBuf,
    /// The format of its rows; `None` to detect it from the keys of the first row.
    pub format: Option<TaskFormat>,
    /// Few-shot examples before each question.
    pub shots: usize,
    /// The file of the examples; without it the other rows of the task.
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
    /// Few-shot examples before each question.
    pub shots: usize,
    /// The metrics, in the order of [the table](self).
    pub metrics: Vec<Metric>,
    /// Where a defect of the harness affects the metrics.
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
    /// The directory with the chat template; without it the template next to the tokenizer.
    pub dir: Option<&'a Path>,
}

/// Evaluates a model on a task.
///
/// # Errors
///
/// [`InferError`]: a file that cannot be read, a row that is not of the format (with file and line), a conversation that does
/// not fit into the model's context, conversations for a model without a chat template.
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

fn evaluate_choices(
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
    // All requests; the index of the first of each row; the lines of rows in which a token crosses the boundary.
    let (mut requests, mut first, mut crossing) = (Vec::new(), Vec::new(), Vec::new());
    for (question, row) in questions.iter().zip(rows) {
        let usable = examples.iter().filter(|example| example.subject == question.subject && *example != question);
        let shots: Vec<String> = usable.take(task.shots).map(|example| example.with_answer() + "\n\n").collect();
        if shots.len() < task.shots {
            return Err(InferError::TooFewExamples { examples: shots.len(), shots: task.shots });
        }
        let context = format!("{}{}{}", question.description, shots.concat(), question.context);
        first.push(requests.len());
        let here = |problem: String, hint: Option<String>| InferError::line(&task.path, row.line, problem, hint);
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
    for ((question, row), start) in questions.iter().zip(rows).zip(first) {
        let of_choice = &scores[start..start + question.choices.len()];
        let sums: Vec<f64> = of_choice.iter().map(|scored| log_likelihood(scored)).collect();
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

/// The note on rows in which a token crosses the boundary between context and choice, by their lines.
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

/// NumPy's `argmax`: the first of the largest values, and NaN is larger than all.
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

fn evaluate_perplexity(model: EvalModel<'_>, task: &Task, rows: &[Row]) -> Result<TaskResult, InferError> {
    let context = model.model.config().max_position_embeddings;
    let encoder = TextEncoder::new(model.tokenizer)?;
    let (mut requests, mut twice) = (Vec::new(), Vec::new());
    let mut documents = Vec::new();
    for row in rows {
        let field = |name: &str| row.fields.get(name).and_then(Value::as_str);
        // The harness scores a page of WikiText detokenized, and divides by the words and bytes of the original.
        let (text, scored) = match (row.fields.contains_key("text"), field("page")) {
            (false, Some(page)) => (Some(page), Cow::Owned(python_str::wikitext_detokenizer(page))),
            _ => (field("text"), Cow::Borrowed(field("text").unwrap_or_default())),
        };
        let text = text.ok_or_else(|| InferError::line(&task.path, row.line, "the row has no `text`", None))?;
        let here = |error: TokenizerError| InferError::line(&task.path, row.line, &error, error.hint());
        let tokens = encoder.encode(&scored).map_err(here)?;
        let has_first = encoder.first_token().is_some_and(|first| tokens.first() == Some(&first));
        if has_first && !task.fix_harness {
            twice.push(row.line);
        }
        let tokens = if has_first && task.fix_harness { &tokens[1..] } else { &tokens };
        let windows = windows(tokens, encoder.first_token(), context);
        documents.push((text, requests.len()..requests.len() + windows.len()));
        requests.extend(windows);
    }
    let scores = score_requests(model.model, &requests)?;
    let (mut words, mut bytes, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let mut records = Vec::new();
    for (row, (text, windows)) in rows.iter().zip(documents) {
        let scored: Vec<TokenScore> = scores[windows].concat();
        let sum = log_likelihood(&scored);
        let word_count = count_words(text);
        words.push((sum, word_count as f64));
        bytes.push((sum, text.len() as f64));
        tokens.push((sum, scored.len() as f64));
        records.push(json!({
            "line": row.line, "loglikelihood": sum, "words": word_count, "bytes": text.len(), "tokens": scored.len(),
        }));
    }
    let perplexity = |rows: &[(f64, f64)]| ratio(rows, |sum, count| (-sum / count).exp());
    let bits = ratio(&bytes, |sum, count| -sum / count / std::f64::consts::LN_2);
    let metrics = vec![
        ("word_perplexity", perplexity(&words)),
        ("byte_perplexity", perplexity(&bytes)),
        ("bits_per_byte", bits),
        ("token_perplexity", perplexity(&tokens)),
    ];
    let note = twice.first().map(|first| {
        format!(
            "{} texts (the first on line {first}) start with the token that lm-evaluation-harness adds to a text, so that it is \
             scored as predicted by itself; `--fix-harness` has it once, and with `--no-bos` the tokenizer does not add it",
            twice.len()
        )
    });
    Ok(TaskResult { metrics, records, notes: note.into_iter().collect() })
}

/// The number of words as the harness counts them, by Python's `re.split(r"\s+", text)`: one more than there are runs of white
/// space.
fn count_words(text: &str) -> usize {
    let white: Vec<bool> = text.chars().map(python_str::is_space).collect();
    1 + white.chunk_by(|a, b| a == b).filter(|run| run[0]).count()
}

fn evaluate_conversations(model: EvalModel<'_>, task: &Task, rows: &[Row]) -> Result<TaskResult, InferError> {
    let template = match model.dir {
        Some(dir) => ChatTemplate::from_model_dir(dir, model.tokenizer)?,
        None => ChatTemplate::for_tokenizer(model.tokenizer)?,
    };
    let encoder = ChatEncoder::new(template, model.tokenizer.clone());
    let context = model.model.config().max_position_embeddings;
    let (mut requests, mut weights) = (Vec::new(), Vec::new());
    for row in rows {
        let here = |problem: String, hint| InferError::line(&task.path, row.line, problem, hint);
        let read = encoder.parse(row.text.as_bytes()).and_then(|conversation| encoder.weighted_tokens(&conversation));
        let read = read.map_err(|error| here(error.to_string(), error.hint()))?;
        if read.tokens.len() > context + 1 {
            let problem = format!("{} tokens are more than the model's context of {context}", read.tokens.len());
            return Err(here(problem, None));
        }
        requests.push(Request { tokens: read.tokens, from: 1 });
        weights.push(read.weights);
    }
    let scores = score_requests(model.model, &requests)?;
    let (mut losses, mut matches, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for ((row, scored), weights) in rows.iter().zip(&scores).zip(&weights) {
        let learned: Vec<(&TokenScore, f32)> = scored.iter().zip(weights.iter().skip(1).copied()).collect();
        let (mut sum, mut count, mut exact) = (0.0, 0.0, Vec::new());
        // Greedy decoding gives the answer if and only if each token of it is the most likely one after those before it. So
        // one forward pass is enough, and nothing is generated.
        for answer in learned.chunk_by(|a, b| (a.1 > 0.0) == (b.1 > 0.0)).filter(|part| part[0].1 > 0.0) {
            sum -= answer.iter().map(|(scored, weight)| f64::from(scored.logprob) * f64::from(*weight)).sum::<f64>();
            count += answer.iter().map(|(_, weight)| f64::from(*weight)).sum::<f64>();
            exact.push(answer.iter().all(|(scored, _)| scored.greedy));
        }
        losses.push((sum, count));
        matches.extend(exact.iter().map(|&exact| f64::from(u8::from(exact))));
        records.push(json!({"line": row.line, "nll": sum / count, "exact_match": exact}));
    }
    let metrics = vec![("nll", ratio(&losses, |sum, count| sum / count)), ("exact_match", mean(&matches))];
    Ok(TaskResult { metrics, records, notes: Vec::new() })
}

fn log_likelihood(scored: &[TokenScore]) -> f64 {
    // `sum` of an empty iterator is -0.0.
    scored.iter().fold(0.0, |sum, scored| sum + f64::from(scored.logprob))
}

/// Scores requests. Batches have requests of similar length, to save padding; the result is in the order of the requests.
fn score_requests(model: &CausalLm, requests: &[Request]) -> Result<Vec<Vec<TokenScore>>, InferError> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(requests[index].tokens.len()));
    let vocab = model.config().vocab_size;
    let mut scores = vec![Vec::new(); requests.len()];
    let mut at = 0;
    while at < order.len() {
        let longest = requests[order[at]].tokens.len().max(1);
        let rows = (MAX_LOGITS / (longest * vocab)).clamp(1, MAX_BATCH).min(order.len() - at);
        let batch = &order[at..at + rows];
        let sequences: Vec<&[u32]> = batch.iter().map(|&index| requests[index].tokens.as_slice()).collect();
        for (&index, scored) in batch.iter().zip(score_batch(model, &sequences)?) {
            // The first score is that of the second token.
            scores[index] = scored[(requests[index].from - 1).min(scored.len())..].to_vec();
        }
        at += rows;
    }
    Ok(scores)
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
