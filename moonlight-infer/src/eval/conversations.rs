//! Conversations: the loss of the assistant's text, and whether greedy decoding yields it.

use serde_json::json;

use super::requests::{Request, score_requests};
use super::statistics::{mean, ratio};
use super::task::Row;
use super::{EvalModel, Task, TaskResult};
use crate::chat::{ChatEncoder, ChatTemplate};
use crate::error::InferError;
use crate::score::TokenScore;

pub(super) fn evaluate_conversations(
    model: EvalModel<'_>,
    task: &Task,
    rows: &[Row],
) -> Result<TaskResult, InferError> {
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
        // The last token is predicted but never read, so it does not need a position in the context.
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
        // Greedy decoding yields an answer if and only if each of its tokens is the most likely one after the tokens before
        // it. One forward pass is therefore enough, and nothing is generated.
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
