//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::oneshot;

use super::app::{App, BodyMemory};
use super::decoder::TokenTexts;
use super::error::ApiError;
use super::generation::{Decoding, Finish, Generation, Update, Work};
use super::logprobs::ChatLogprobs;
use super::reply::{EventSender, Gone, Head, UsageReport, answer_with_events};
use super::request::{ChatRequest, Settings};
use super::tools::{Delta, ToolFormat, ToolParser};
use crate::chat::{ChatEncoder, Message};

/// A request that is ready to run.
struct Job {
    settings: Settings,
    tools: Option<ToolFormat>,
    prompt: Vec<u32>,
    _memory: BodyMemory,
}

/// The route.
pub(super) async fn chat_completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (body, memory) = app.read_body(request).await?;
    let encoder = app.chat()?;
    let (state, defaults) = (app.clone(), app.text.defaults);
    let encode = move || {
        let request = ChatRequest::parse(&body, encoder.template(), &defaults)?;
        drop(body);
        state.check_model(&request.settings.model)?;
        let texts = request.messages.iter().map(Message::fields).chain([&request.fields]);
        state.check_text(texts.flat_map(|fields| fields.values().map(text_bytes)).sum())?;
        let prompt = prompt_tokens(&encoder, &request)?;
        let most = request.settings.max_tokens.unwrap_or(usize::MAX).min(state.context());
        request.settings.check_size(1, most)?;
        Ok(Job { settings: request.settings, tools: request.tools, prompt, _memory: memory })
    };
    let job = app.encode(encode).await?;
    if job.settings.stream.is_none() {
        return complete(&app, job).await;
    }
    answer_with_events(|sender, started| async move { stream(&app, job, &sender, started).await }).await
}

/// The bytes of the texts in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(map) => map.values().map(text_bytes).sum(),
        _ => 0,
    }
}

/// Fields of messages that need not be read by the template: `tool_call_id` assigns results to calls, which templates do by their
/// order, and templates leave out the reasoning of earlier answers.
const MAY_BE_UNREAD: [&str; 4] =
    ["messages[].tool_call_id", "messages[].reasoning_content", "messages[].reasoning", "messages[].thinking"];

/// The tokens of the conversation. A field that the template does not write is refused.
fn prompt_tokens(encoder: &ChatEncoder, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
    let prompt = encoder.prompt(&request.messages, &request.fields)?;
    // The name in the result of a tool is that of the call.
    let is_result = |message: &Message| ["tool", "function"].contains(&message.role());
    let only_results_have_names =
        request.messages.iter().all(|message| is_result(message) || !message.fields().contains_key("name"));
    let is_refused = |name: &&String| {
        !(MAY_BE_UNREAD.contains(&name.as_str()) || only_results_have_names && name.as_str() == "messages[].name")
    };
    match prompt.unread.iter().find(is_refused) {
        Some(name) => Err(ApiError::unsupported(name, "the chat template does not read it")),
        None => Ok(prompt.tokens),
    }
}

/// An answer, so far.
#[derive(Default)]
struct Answer {
    parser: Option<ToolParser>,
}

/// What an update adds to an answer.
#[derive(Default)]
struct Added {
    deltas: Vec<Delta>,
    logprobs: Option<ChatLogprobs>,
    finish: Option<&'static str>,
}

impl Answer {
    fn new(tools: Option<ToolFormat>) -> Self {
        Self { parser: tools.map(ToolParser::new) }
    }

    fn text(&mut self, text: String) -> Vec<Delta> {
        match &mut self.parser {
            Some(parser) => parser.push(&text),
            None if text.is_empty() => Vec::new(),
            None => vec![Delta::Content(text)],
        }
    }

    fn finish(&mut self, finish: Finish) -> (Vec<Delta>, &'static str) {
        let Some(parser) = &mut self.parser else { return (Vec::new(), finish.name()) };
        let deltas = parser.finish();
        let name = if finish == Finish::Stop && parser.calls() > 0 { "tool_calls" } else { finish.name() };
        (deltas, name)
    }

    fn add(&mut self, update: Update, texts: Option<&TokenTexts<'_>>, usage: &mut UsageReport, index: usize) -> Added {
        match update {
            // A conversation is not repeated in its answer.
            Update::Prompt(_) => Added::default(),
            Update::Piece(piece) => {
                let logprobs = texts.filter(|_| !piece.logprobs.is_empty());
                let logprobs = logprobs.map(|texts| ChatLogprobs::new(&piece.logprobs, texts));
                Added { deltas: self.text(piece.text), logprobs, finish: None }
            }
            Update::End { finish, tokens } => {
                usage.add(tokens, index == 0);
                let (deltas, finish) = self.finish(finish);
                Added { deltas, logprobs: None, finish: Some(finish) }
            }
        }
    }
}

/// Special tokens whose text marks tool calls.
fn kept_tokens(app: &App, tools: Option<ToolFormat>) -> Vec<(u32, String)> {
    let markers = tools.map_or([].as_slice(), ToolFormat::markers);
    let special = |marker: &&str| Some((app.tokenizer.special(marker)?, (*marker).to_owned()));
    markers.iter().filter_map(special).collect()
}

impl Job {
    fn work(&mut self, app: &App) -> Work {
        let prompts = vec![std::mem::take(&mut self.prompt)];
        let request = app.engine_request(&self.settings, &app.text.end_of_turn, false);
        Work { prompts, n: self.settings.n, request }
    }
}

#[derive(Serialize)]
struct ChatCompletion {
    #[serde(flatten)]
    head: Head,
    choices: Vec<Choice>,
    usage: UsageReport,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: AnswerMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct AnswerMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

#[derive(Serialize)]
struct Call {
    /// Only in a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl Choice {
    fn new(index: usize, with_logprobs: bool) -> Self {
        let message = AnswerMessage { role: "assistant", content: None, refusal: None, tool_calls: Vec::new() };
        Self { index, message, logprobs: with_logprobs.then(ChatLogprobs::default), finish_reason: None }
    }

    fn add(&mut self, added: Added) {
        for delta in added.deltas {
            match delta {
                Delta::Content(text) => self.message.content.get_or_insert_default().push_str(&text),
                Delta::CallStart { id, name, .. } => {
                    let function = Function { name: Some(name), arguments: String::new() };
                    self.message.tool_calls.push(Call { index: None, id: Some(id), kind: Some("function"), function });
                }
                Delta::CallArguments { index, text } => {
                    self.message.tool_calls[index].function.arguments.push_str(&text);
                }
            }
        }
        if let (Some(all), Some(more)) = (&mut self.logprobs, added.logprobs) {
            all.append(more);
        }
        if added.finish.is_some() {
            self.finish_reason = added.finish;
            // An empty answer is a text, and a message with calls may have none.
            if self.message.tool_calls.is_empty() {
                self.message.content.get_or_insert_default();
            }
        }
    }
}

/// The answer as one object.
async fn complete(app: &App, mut job: Job) -> Result<Response, ApiError> {
    let kept = kept_tokens(app, job.tools);
    let work = job.work(app);
    let Job { settings, tools, .. } = &job;
    let decoding = Decoding { tokenizer: &app.tokenizer, kept: &kept, stops: &settings.stop, metrics: &app.metrics };
    let mut generation = Generation::start(&app.engine, work, decoding)?;
    let texts = settings.logprobs.map(|_| TokenTexts::new(&app.tokenizer));
    let mut answers: Vec<Answer> = (0..settings.n).map(|_| Answer::new(*tools)).collect();
    let mut choices: Vec<Choice> = (0..settings.n).map(|index| Choice::new(index, texts.is_some())).collect();
    let mut usage = UsageReport::default();
    while let Some((index, update)) = generation.next().await? {
        let added = answers[index].add(update, texts.as_ref(), &mut usage, index);
        choices[index].add(added);
    }
    let head = Head::new("chatcmpl", "chat.completion", &settings.model);
    Ok(Json(ChatCompletion { head, choices, usage }).into_response())
}

#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<ChunkChoice>,
    /// Absent unless the client asked for it; then null except in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageReport>>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

impl From<Delta> for ChunkDelta {
    fn from(delta: Delta) -> Self {
        let call = |index, id, kind, function| Self {
            tool_calls: vec![Call { index: Some(index), id, kind, function }],
            ..Self::default()
        };
        match delta {
            Delta::Content(text) => Self { content: Some(text), ..Self::default() },
            Delta::CallStart { index, id, name } => {
                let function = Function { name: Some(name), arguments: String::new() };
                call(index, Some(id), Some("function"), function)
            }
            Delta::CallArguments { index, text } => call(index, None, None, Function { name: None, arguments: text }),
        }
    }
}

/// The answer as events. The first refusal of the engine is returned by `started`, so that it has a status.
async fn stream(
    app: &App,
    mut job: Job,
    sender: &EventSender,
    started: oneshot::Sender<Result<(), ApiError>>,
) -> Result<(), Gone> {
    let kept = kept_tokens(app, job.tools);
    let work = job.work(app);
    let Job { settings, tools, .. } = &job;
    let decoding = Decoding { tokenizer: &app.tokenizer, kept: &kept, stops: &settings.stop, metrics: &app.metrics };
    let mut generation = match Generation::start(&app.engine, work, decoding) {
        Ok(generation) => generation,
        Err(error) => return started.send(Err(error)).map_err(|_| Gone),
    };
    started.send(Ok(())).map_err(|_| Gone)?;
    let texts = settings.logprobs.map(|_| TokenTexts::new(&app.tokenizer));
    let mut answers: Vec<Answer> = (0..settings.n).map(|_| Answer::new(*tools)).collect();
    let include_usage = settings.stream.is_some_and(|stream| stream.include_usage);
    let head = Head::new("chatcmpl", "chat.completion.chunk", &settings.model);
    let chunk = |index, delta, logprobs, finish_reason| Chunk {
        head: &head,
        choices: vec![ChunkChoice { index, delta, logprobs, finish_reason }],
        usage: include_usage.then_some(None),
    };
    for index in 0..settings.n {
        let delta = ChunkDelta { role: Some("assistant"), content: Some(String::new()), ..ChunkDelta::default() };
        sender.send(&chunk(index, delta, None, None)).await?;
    }
    let mut usage = UsageReport::default();
    loop {
        let (index, update) = match generation.next().await {
            Ok(Some(update)) => update,
            Ok(None) => break,
            Err(error) => {
                sender.error(&error).await?;
                return sender.done().await;
            }
        };
        let Added { deltas, mut logprobs, finish } = answers[index].add(update, texts.as_ref(), &mut usage, index);
        for delta in deltas {
            sender.send(&chunk(index, delta.into(), logprobs.take(), None)).await?;
        }
        // Log-probabilities of tokens whose text is held back have an event without text.
        if logprobs.is_some() || finish.is_some() {
            sender.send(&chunk(index, ChunkDelta::default(), logprobs, finish)).await?;
        }
    }
    if include_usage {
        sender.send(&Chunk { head: &head, choices: Vec::new(), usage: Some(Some(usage)) }).await?;
    }
    sender.done().await
}
