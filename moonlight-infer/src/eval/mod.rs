//! Evaluation of a model on local files, by the definitions of lm-evaluation-harness (0.4).
//!
//! | format | rows | figures |
//! |---|---|---|
//! | `mmlu`, `arc`, `hellaswag` | multiple choice, in the layout that the data set has on the Hub | `acc`: the choice with the largest log-likelihood is right; `acc_norm`: the largest by character; `acc_bytes`: by byte |
//! | `perplexity` | `{"text": ...}` | `word_perplexity`, `byte_perplexity`, `bits_per_byte`, and `token_perplexity` |
//! | `chat` | conversations | `nll`: nats per learned token; `exact_match`: the greedy answer is the assistant's words to the letter |
//!
//! The standard errors are that of the mean (for shares, the binomial one) and, for what is a quotient of sums, the
//! bootstrap's. A context that is longer than the model's loses its beginning; a text is cut into windows that are each
//! predicted from what the window holds before. Examples are the first rows of the file that `shots_from` names, of the same
//! subject where rows have one (the harness does so for MMLU and draws them elsewhere).
//!
//! Texts become tokens as in the harness: the tokenizer puts BOS before a context where it puts one before texts
//! ([`Tokenizer::prefix`]), a text without a context follows BOS, else EOS, and special tokens are read out of texts. Where
//! the harness (0.4.13) is wrong, its figures are given all the same, with a note; [`Task::fix_harness`] does what is right:
//!
//! | the harness | with `fix_harness` |
//! |---|---|
//! | takes a choice's tokens from where those of the context end, though a token may reach over the seam: a choice with no token left has the log-likelihood 0, and wins; others follow a context that the tokenizer does not write | scores the tokens of context and choice as one text, from the first that any choice of the row has otherwise than the context |
//! | puts BOS before a text that the tokenizer has begun with BOS, and counts how well BOS predicts BOS | has one BOS, which is given |

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
use task::{Question, Row, rows};

/// Logits that are in memory at once, at most (unless one sequence has more): 256 MiB in f32.
const MAX_LOGITS: usize = 64 << 20;
/// Sequences in a batch, at most.
const MAX_BATCH: usize = 32;

/// What to evaluate, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// The file, of any [kind](crate::records).
    pub path: PathBuf,
    /// What its rows are; without it the keys of the first row decide.
    pub format: Option<TaskFormat>,
    /// Examples before each question.
    pub shots: usize,
    /// The file of the examples; else the task's own, the question itself left out.
    pub shots_from: Option<PathBuf>,
    /// Rows to take; 0 for all.
    pub limit: usize,
    /// Whether to do what is right where lm-evaluation-harness is wrong (see the table above) instead of what it does.
    pub fix_harness: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The file.
    pub task: PathBuf,
    /// What its rows were.
    pub format: TaskFormat,
    /// Rows that were evaluated.
    pub rows: usize,
    /// Examples before each question.
    pub shots: usize,
    /// The figures.
    pub metrics: Vec<Metric>,
    /// What is to be known of the figures: where they are the harness's and wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// A record for each row, in order.
    #[serde(skip)]
    pub records: Vec<Value>,
}

/// A figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Its name, as in the harness.
    pub name: String,
    /// Its value and standard error.
    #[serde(flatten)]
    pub estimate: Estimate,
}

/// A model with its tokenizer and chat template.
#[derive(Debug, Clone, Copy)]
pub struct EvalModel<'a> {
    /// The model.
    pub model: &'a CausalLm,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its folder, whose chat template is used; else the tokenizer's.
    pub dir: Option<&'a Path>,
}

/// Evaluates a model on a task.
///
/// # Errors
///
/// A file that cannot be read, a row that is none of the format (with file and line), a conversation that does not fit into
/// the model's context, a model without a chat template where rows are conversations.
pub fn evaluate(reader: EvalModel<'_>, task: &Task) -> Result<Evaluation, InferError> {
    let rows = rows(&task.path, task.limit)?;
    let format = match task.format {
        Some(format) => format,
        None => TaskFormat::of(&rows[0].fields).ok_or_else(|| {
            let hint = "rows are MMLU's, ARC's, HellaSwag's, conversations or `{\"text\": ...}`; name it by `--format`";
            InferError::line(&task.path, rows[0].line, "the row has the keys of no format", Some(hint.into()))
        })?,
    };
    if task.shots > 0 && !format.has_choices() {
        return Err(InferError::ShotsWithoutChoices { format: format.to_string() });
    }
    let TaskResult { metrics, records, notes } = match format {
        TaskFormat::Mmlu | TaskFormat::Arc | TaskFormat::HellaSwag => choices(reader, task, format, &rows)?,
        TaskFormat::Perplexity => perplexity(reader, task, &rows)?,
        TaskFormat::Chat => conversations(reader, task, &rows)?,
    };
    let metrics = metrics.into_iter().map(|(name, estimate)| Metric { name: name.into(), estimate }).collect();
    let (task, rows, shots) = (task.path.clone(), rows.len(), task.shots);
    Ok(Evaluation { task, format, rows, shots, metrics, notes, records })
}

/// Figures by name, a record for each row, and what is to be known of them.
struct TaskResult {
    metrics: Vec<(&'static str, Estimate)>,
    records: Vec<Value>,
    notes: Vec<String>,
}

fn choices(reader: EvalModel<'_>, task: &Task, format: TaskFormat, rows: &[Row]) -> Result<TaskResult, InferError> {
    let read = |path: &Path, row: &Row| {
        Question::read(format, &row.fields).map_err(|problem| InferError::line(path, row.line, problem, None))
    };
    let questions = rows.iter().map(|row| read(&task.path, row)).collect::<Result<Vec<_>, _>>()?;
    let examples = match &task.shots_from {
        Some(path) => {
            let rows = task::rows(path, 0)?;
            rows.iter().map(|row| read(path, row)).collect::<Result<Vec<_>, _>>()?
        }
        None => questions.clone(),
    };
    let encoder = TextEncoder::new(reader.tokenizer)?;
    let context_length = reader.model.config().max_position_embeddings;
    let (mut requests, mut first, mut merged) = (Vec::new(), Vec::new(), Vec::new());
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
            merged.push(row.line);
        }
        for choice in encoded {
            let scored = choice.request.scored();
            if scored > context_length {
                let problem = format!("a choice has {scored} tokens, and the model's context {context_length}");
                return Err(here(problem, Some("the harness refuses such rows, too".into())));
            }
            requests.push(choice.request.within(context_length));
        }
    }
    let scores = scored(reader.model, &requests)?;
    let mut figures: [Vec<f64>; 3] = Default::default();
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
        for (figures, choice) in figures.iter_mut().zip(chosen) {
            figures.push(f64::from(u8::from(choice == question.gold)));
        }
        records.push(json!({
            "line": row.line, "gold": question.gold, "choice": chosen[0], "choice_norm": chosen[1],
            "choice_bytes": chosen[2], "loglikelihoods": sums,
        }));
    }
    let [acc, norm, bytes] = figures.map(|values| mean(&values));
    let metrics = vec![("acc", acc), ("acc_norm", norm), ("acc_bytes", bytes)];
    Ok(TaskResult { metrics, records, notes: boundary_note(&merged, task.fix_harness).into_iter().collect() })
}

/// Of rows in which a token reaches from the context into a choice, by their lines.
fn boundary_note(lines: &[usize], fixed: bool) -> Option<String> {
    let first = lines.first()?;
    let count = lines.len();
    let what = format!(
        "in {count} rows (the first on line {first}) the tokenizer has one token for the end of the context and the first_token \
         of a choice"
    );
    Some(match fixed {
        true => format!("{what}; such tokens are counted with the choice"),
        false => format!(
            "{what}: lm-evaluation-harness leaves such tokens out, and a choice of which nothing is left wins with the \
             log-likelihood 0; `--fix-harness` counts them"
        ),
    })
}

/// numpy's `argmax`: the first of the largest, NaN above all.
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

fn perplexity(reader: EvalModel<'_>, task: &Task, rows: &[Row]) -> Result<TaskResult, InferError> {
    let context = reader.model.config().max_position_embeddings;
    let encoder = TextEncoder::new(reader.tokenizer)?;
    let (mut requests, mut twice) = (Vec::new(), Vec::new());
    let mut documents = Vec::new();
    for row in rows {
        let field = |name: &str| row.fields.get(name).and_then(Value::as_str);
        // The harness scores a page of WikiText without the spaces around signs, and divides by the words and bytes that it
        // has with them.
        let (text, scored) = match (row.fields.contains_key("text"), field("page")) {
            (false, Some(page)) => (Some(page), Cow::Owned(python_str::wikitext_detokenizer(page))),
            _ => (field("text"), Cow::Borrowed(field("text").unwrap_or_default())),
        };
        let text = text.ok_or_else(|| InferError::line(&task.path, row.line, "the row has no `text`", None))?;
        let here = |error: TokenizerError| InferError::line(&task.path, row.line, &error, error.hint());
        let tokens = encoder.encode(&scored).map_err(here)?;
        let begun = encoder.first_token().is_some_and(|first| tokens.first() == Some(&first));
        if begun && !task.fix_harness {
            twice.push(row.line);
        }
        let tokens = if begun && task.fix_harness { &tokens[1..] } else { &tokens };
        let windows = windows(tokens, encoder.first_token(), context);
        documents.push((text, requests.len()..requests.len() + windows.len()));
        requests.extend(windows);
    }
    let scores = scored(reader.model, &requests)?;
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
            "{} texts (the first on line {first}) begin with a token that lm-evaluation-harness puts before texts once more: \
             how well it predicts itself is counted, too; `--fix-harness` gives it once, and `--no-bos` keeps the tokenizer \
             from adding it",
            twice.len()
        )
    });
    Ok(TaskResult { metrics, records, notes: note.into_iter().collect() })
}

/// The pieces that Python's `re.split(r"\s+", text)` gives: one more than there are stretches of white space.
fn count_words(text: &str) -> usize {
    let white: Vec<bool> = text.chars().map(python_str::is_space).collect();
    1 + white.chunk_by(|a, b| a == b).filter(|stretch| stretch[0]).count()
}

fn conversations(reader: EvalModel<'_>, task: &Task, rows: &[Row]) -> Result<TaskResult, InferError> {
    let template = match reader.dir {
        Some(dir) => ChatTemplate::from_model_dir(dir, reader.tokenizer)?,
        None => ChatTemplate::for_tokenizer(reader.tokenizer)?,
    };
    let encoder = ChatEncoder::new(template, reader.tokenizer.clone());
    let context = reader.model.config().max_position_embeddings;
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
    let scores = scored(reader.model, &requests)?;
    let (mut losses, mut matches, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for ((row, scored), weights) in rows.iter().zip(&scores).zip(&weights) {
        let learned: Vec<(&TokenScore, f32)> = scored.iter().zip(weights.iter().skip(1).copied()).collect();
        let (mut sum, mut count, mut exact) = (0.0, 0.0, Vec::new());
        // Greedy decoding gives the answer if and only if each of its tokens is the likeliest given those before it.
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
    // The sum of nothing is -0 otherwise.
    scored.iter().fold(0.0, |sum, scored| sum + f64::from(scored.logprob))
}

/// The scored tokens of each request, in the order of the requests; batches are made of requests of like length.
fn scored(model: &CausalLm, requests: &[Request]) -> Result<Vec<Vec<TokenScore>>, InferError> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(requests[index].tokens.len()));
    let vocab = model.config().vocab_size;
    let mut scores = vec![Vec::new(); requests.len()];
    let mut at = 0;
    while at < order.len() {
        let longest = requests[order[at]].tokens.len().max(1);
        let rows = (MAX_LOGITS / (longest * vocab)).clamp(1, MAX_BATCH).min(order.len() - at);
        let batch = &order[at..at + rows];
        // The last token is predicted, not read.
        let sequences: Vec<&[u32]> = batch.iter().map(|&index| requests[index].tokens.as_slice()).collect();
        for (&index, scored) in batch.iter().zip(score_batch(model, &sequences)?) {
            scores[index] = scored[(requests[index].from - 1).min(scored.len())..].to_vec();
        }
        at += rows;
    }
    Ok(scores)
}

/// A table of evaluations, a line for each figure.
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
