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

mod statistics;
mod task;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use moonlight_convert::printable;
use moonlight_model::CausalLm;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::chat::{ChatEncoder, ChatTemplate};
use crate::error::InferError;
use crate::score::{Scored, score_batch};
use crate::tokenizer::{Tokenizer, TokenizerError};

pub use statistics::Estimate;
pub use task::TaskFormat;

use statistics::{mean, ratio};
use task::{Question, Row, rows};

/// Logits that are in memory at once, at most (unless one sequence has more): 256 MiB in f32.
const LOGITS: usize = 64 << 20;
/// Sequences in a batch, at most.
const BATCH: usize = 32;

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
pub struct Reader<'a> {
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
pub fn evaluate(reader: Reader<'_>, task: &Task) -> Result<Evaluation, InferError> {
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
    let (metrics, records) = match format {
        TaskFormat::Mmlu | TaskFormat::Arc | TaskFormat::HellaSwag => choices(reader, task, format, &rows)?,
        TaskFormat::Perplexity => perplexity(reader, task, &rows)?,
        TaskFormat::Chat => conversations(reader, task, &rows)?,
    };
    let metrics = metrics.into_iter().map(|(name, estimate)| Metric { name: name.into(), estimate }).collect();
    Ok(Evaluation { task: task.path.clone(), format, rows: rows.len(), shots: task.shots, metrics, records })
}

/// Figures by name, and a record for each row.
type Outcome = (Vec<(&'static str, Estimate)>, Vec<Value>);

fn choices(reader: Reader<'_>, task: &Task, format: TaskFormat, rows: &[Row]) -> Result<Outcome, InferError> {
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
    let (mut requests, mut first) = (Vec::new(), Vec::new());
    for question in &questions {
        let usable = examples.iter().filter(|example| example.subject == question.subject && *example != question);
        let shots: Vec<String> = usable.take(task.shots).map(|example| example.answered() + "\n\n").collect();
        if shots.len() < task.shots {
            return Err(InferError::TooFewExamples { examples: shots.len(), shots: task.shots });
        }
        let context = format!("{}{}{}", question.description, shots.concat(), question.context);
        first.push(requests.len());
        for choice in &question.choices {
            requests.push(pair(reader, &context, &format!(" {choice}"))?);
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
    Ok((vec![("acc", acc), ("acc_norm", norm), ("acc_bytes", bytes)], records))
}

/// numpy's `argmax`: the first of the largest.
fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

fn perplexity(reader: Reader<'_>, task: &Task, rows: &[Row]) -> Result<Outcome, InferError> {
    let context = reader.model.config().max_position_embeddings;
    let mut requests = Vec::new();
    let mut documents = Vec::new();
    for row in rows {
        let text = row.fields.get("text").or_else(|| row.fields.get("page")).and_then(Value::as_str);
        let text = text.ok_or_else(|| InferError::line(&task.path, row.line, "the row has no `text`", None))?;
        let here = |error: TokenizerError| InferError::line(&task.path, row.line, &error, error.hint());
        let tokens = reader.tokenizer.encode(text).map_err(here)?;
        let windows = windows(&tokens, beginning(reader), context);
        documents.push((text, requests.len()..requests.len() + windows.len()));
        requests.extend(windows);
    }
    let scores = scored(reader.model, &requests)?;
    let (mut words, mut bytes, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let mut records = Vec::new();
    for (row, (text, windows)) in rows.iter().zip(documents) {
        let scored: Vec<Scored> = scores[windows].concat();
        let sum = log_likelihood(&scored);
        let word_count = words_of(text);
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
    Ok((metrics, records))
}

/// The pieces that Python's `re.split(r"\s+", text)` gives: one more than there are stretches of white space.
fn words_of(text: &str) -> usize {
    let white: Vec<bool> = text.chars().map(char::is_whitespace).collect();
    1 + white.chunk_by(|a, b| a == b).filter(|stretch| stretch[0]).count()
}

/// A text in windows of the model's context, each token in one of them (the harness's `get_rolling_token_windows` with
/// `context_len = 1`): the first begins with `first`, each other with the token before it, and the last is as long as the
/// context, so that its tokens are predicted from as much as there is.
fn windows(tokens: &[u32], first: Option<u32>, context: usize) -> Vec<Request> {
    let mut windows = Vec::new();
    // Without a token to begin with, the text's own first token is given.
    let mut at = tokens.len().min(context + usize::from(first.is_none()));
    let begins: Vec<u32> = first.into_iter().chain(tokens[..at].iter().copied()).collect();
    if begins.len() > 1 {
        windows.push(Request { tokens: begins, from: 1 });
    }
    while at < tokens.len() {
        let end = tokens.len().min(at + context);
        let start = end - context - 1;
        windows.push(Request { tokens: tokens[start..end].to_vec(), from: at - start });
        at = end;
    }
    windows
}

fn conversations(reader: Reader<'_>, task: &Task, rows: &[Row]) -> Result<Outcome, InferError> {
    let template = match reader.dir {
        Some(dir) => ChatTemplate::of_model(dir, reader.tokenizer)?,
        None => ChatTemplate::of_tokenizer(reader.tokenizer)?,
    };
    let encoder = ChatEncoder::new(template, reader.tokenizer.clone());
    let context = reader.model.config().max_position_embeddings;
    let (mut requests, mut weights) = (Vec::new(), Vec::new());
    for row in rows {
        let here = |problem: String, hint| InferError::line(&task.path, row.line, problem, hint);
        let read = encoder.parse(row.text.as_bytes()).and_then(|conversation| encoder.weighted(&conversation));
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
        let learned: Vec<(&Scored, f32)> = scored.iter().zip(weights.iter().skip(1).copied()).collect();
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
    Ok((vec![("nll", ratio(&losses, |sum, count| sum / count)), ("exact_match", mean(&matches))], records))
}

/// Tokens of which those from `from` on are scored, given all before.
#[derive(Debug, Clone, PartialEq)]
struct Request {
    tokens: Vec<u32>,
    from: usize,
}

/// A context and its continuation, tokenized as one text (the harness's `_encode_pair`: spaces that end the context
/// belong to what follows); a context that is too long loses its beginning.
fn pair(reader: Reader<'_>, context: &str, continuation: &str) -> Result<Request, InferError> {
    let whole = format!("{context}{continuation}");
    let mut tokens = reader.tokenizer.encode(&whole)?;
    let mut from = reader.tokenizer.encode(context.trim_end())?.len();
    if from == 0 {
        match beginning(reader) {
            Some(first) => tokens.insert(0, first),
            None => return Err(InferError::NothingToBeginWith),
        }
        from = 1;
    }
    let longest = reader.model.config().max_position_embeddings + 1;
    let dropped = tokens.len().saturating_sub(longest);
    tokens.drain(..dropped);
    Ok(Request { tokens, from: from.saturating_sub(dropped).max(1) })
}

/// The token that is put before a text without a context: the one that begins a text, else the one that ends it.
fn beginning(reader: Reader<'_>) -> Option<u32> {
    reader.tokenizer.bos().or(reader.tokenizer.eos())
}

fn log_likelihood(scored: &[Scored]) -> f64 {
    scored.iter().map(|scored| f64::from(scored.logprob)).sum()
}

/// The scored tokens of each request, in the order of the requests; batches are made of requests of like length.
fn scored(model: &CausalLm, requests: &[Request]) -> Result<Vec<Vec<Scored>>, InferError> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(requests[index].tokens.len()));
    let vocab = model.config().vocab_size;
    let mut scores = vec![Vec::new(); requests.len()];
    let mut at = 0;
    while at < order.len() {
        let longest = requests[order[at]].tokens.len().max(1);
        let rows = (LOGITS / (longest * vocab)).clamp(1, BATCH).min(order.len() - at);
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

/// An evaluation as JSON: `{"task", "format", "rows", "shots", "metrics": {NAME: {"value", "stderr"}}}`.
pub fn to_json(evaluation: &Evaluation) -> Value {
    let metrics: Map<String, Value> =
        evaluation.metrics.iter().map(|metric| (metric.name.clone(), json!(metric.estimate))).collect();
    json!({
        "task": evaluation.task, "format": evaluation.format, "rows": evaluation.rows, "shots": evaluation.shots,
        "metrics": metrics,
    })
}
