//! The perplexity of texts per word, byte and token.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::python_str;
use super::requests::{TextEncoder, log_likelihood, score_requests, windows};
use super::statistics::ratio;
use super::task::Row;
use super::{EvalModel, Task, TaskResult};
use crate::error::InferError;
use crate::score::TokenScore;
use crate::tokenizer::TokenizerError;

pub(super) fn evaluate_perplexity(model: EvalModel<'_>, task: &Task, rows: &[Row]) -> Result<TaskResult, InferError> {
    let context = model.model.config().max_position_embeddings;
    let encoder = TextEncoder::new(model.tokenizer)?;
    // `doubled`: the lines whose text would start with BOS twice.
    let (mut requests, mut doubled) = (Vec::new(), Vec::new());
    let mut documents = Vec::new();
    for row in rows {
        let field = |name: &str| row.fields.get(name).and_then(Value::as_str);
        // The harness scores the detokenized text of a WikiText page, but divides by the words and bytes of the original.
        let (text, scored) = match (row.fields.contains_key("text"), field("page")) {
            (false, Some(page)) => (Some(page), Cow::Owned(python_str::wikitext_detokenizer(page))),
            _ => (field("text"), Cow::Borrowed(field("text").unwrap_or_default())),
        };
        let text = text.ok_or_else(|| InferError::line(&task.path, row.line, "the row has no `text`", None))?;
        let here = |error: TokenizerError| InferError::line(&task.path, row.line, &error, error.hint());
        let tokens = encoder.encode(&scored).map_err(here)?;
        let has_first = encoder.first_token().is_some_and(|first| tokens.first() == Some(&first));
        if has_first && !task.fix_harness {
            doubled.push(row.line);
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
    let note = doubled.first().map(|first| {
        format!(
            "{} texts (the first on line {first}) start with the token that lm-evaluation-harness adds to a text, so that it is \
             scored as predicted by itself; `--fix-harness` has it once, and with `--no-bos` the tokenizer does not add it",
            doubled.len()
        )
    });
    Ok(TaskResult { metrics, records, notes: note.into_iter().collect() })
}

/// The number of words as the harness counts them, with Python's `re.split(r"\s+", text)`: one more than the number of runs of
/// white space.
pub(super) fn count_words(text: &str) -> usize {
    let white: Vec<bool> = text.chars().map(python_str::is_space).collect();
    1 + white.chunk_by(|a, b| a == b).filter(|run| run[0]).count()
}
