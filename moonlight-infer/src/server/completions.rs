//! `/v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio::sync::oneshot;

use super::app::{App, BodyMemory};
use super::decoder::{Piece, TokenTexts};
use super::error::ApiError;
use super::generation::{Decoding, Generation, Update, Work};
use super::logprobs::CompletionLogprobs;
use super::reply::{EventSender, Gone, Head, UsageReport, answer_with_events};
use super::request::{CompletionRequest, Prompt, Settings};
use crate::engine::TokenLogprobs;
use crate::tokenizer::{AddBos, Tokenizer};

/// A request that is ready to run.
struct Job {
    settings: Settings,
    echo: bool,
    prompts: Vec<EncodedPrompt>,
    _memory: BodyMemory,
}

struct EncodedPrompt {
    tokens: Vec<u32>,
    /// The text to repeat; empty without `echo`.
    text: String,
}

/// The route.
pub(super) async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (body, memory) = app.read_body(request).await?;
    let state = app.clone();
    let encode = move || {
        let request = CompletionRequest::parse(&body, &state.text.defaults)?;
        drop(body);
        let CompletionRequest { settings, prompts, echo, add_special_tokens } = request;
        state.check_model(&settings.model)?;
        let tokenizer = match add_special_tokens {
            true => state.tokenizer.clone(),
            false => state.tokenizer.clone().with_bos(AddBos::Never)?,
        };
        let prompts: Vec<EncodedPrompt> = prompts
            .into_iter()
            .map(|prompt| encode_prompt(prompt, &state, &tokenizer, echo))
            .collect::<Result<_, _>>()?;
        let new = settings.max_tokens.unwrap_or(usize::MAX).min(state.context());
        prompts.iter().try_for_each(|prompt| state.check_prompt(&prompt.tokens, new))?;
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().filter(|_| echo).unwrap_or(0);
        settings.check_size(prompts.len(), longest + new)?;
        Ok(Job { settings, echo, prompts, _memory: memory })
    };
    let job = app.encode(encode).await?;
    if job.settings.stream.is_none() {
        return complete(&app, job).await;
    }
    answer_with_events(|sender, started| async move { stream(&app, job, &sender, started).await }).await
}

fn encode_prompt(prompt: Prompt, app: &App, tokenizer: &Tokenizer, echo: bool) -> Result<EncodedPrompt, ApiError> {
    Ok(match prompt {
        Prompt::Text(text) => {
            app.check_text(text.len())?;
            let tokens = tokenizer.encode_text(&text)?;
            EncodedPrompt { tokens, text: if echo { text } else { String::new() } }
        }
        Prompt::Tokens(tokens) => {
            let text = if echo { tokenizer.decode(&tokens) } else { String::new() };
            EncodedPrompt { tokens, text }
        }
    })
}

/// The part of an answer that an update adds.
#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
}

/// What is needed to write the answers.
struct Writer<'a> {
    job: &'a Job,
    tokenizer: &'a Tokenizer,
    /// `Some` if log-probabilities were asked for.
    texts: Option<TokenTexts<'a>>,
    usage: UsageReport,
}

impl<'a> Writer<'a> {
    fn new(app: &'a App, job: &'a Job) -> Self {
        Self {
            job,
            tokenizer: &app.tokenizer,
            texts: job.settings.logprobs.map(|_| TokenTexts::new(&app.tokenizer)),
            usage: UsageReport::default(),
        }
    }

    fn prompt(&self, index: usize) -> &'a EncodedPrompt {
        &self.job.prompts[index / self.job.settings.n]
    }

    /// The choice at the start of its text: with its prompt if that is repeated and has no log-probabilities, which come later.
    fn start(&self, index: usize) -> Choice {
        let has_prompt = self.job.echo && self.texts.is_none();
        let text = if has_prompt { self.prompt(index).text.clone() } else { String::new() };
        let logprobs = self.texts.as_ref().map(|_| CompletionLogprobs::default());
        Choice { index, text, logprobs, finish_reason: None }
    }

    /// Adds an update to a choice.
    fn add(&mut self, choice: &mut Choice, update: Update) {
        match update {
            Update::Prompt(logprobs) => {
                choice.text.push_str(&self.prompt(choice.index).text);
                self.add_prompt(choice, &logprobs);
            }
            Update::Piece(Piece { text, logprobs }) => {
                choice.text.push_str(&text);
                if let (Some(texts), Some(all)) = (&self.texts, &mut choice.logprobs) {
                    let start = self.job.prompts[choice.index / self.job.settings.n].text.chars().count();
                    all.extend(&logprobs, start, texts);
                }
            }
            Update::End { finish, tokens } => {
                self.usage.add(tokens, choice.index.is_multiple_of(self.job.settings.n));
                choice.finish_reason = Some(finish.name());
            }
        }
    }

    fn add_prompt(&self, choice: &mut Choice, logprobs: &[Option<TokenLogprobs>]) {
        let (Some(texts), Some(all)) = (&self.texts, &mut choice.logprobs) else { return };
        let mut stream = self.tokenizer.stream();
        let EncodedPrompt { tokens, text } = self.prompt(choice.index);
        let (mut offset, mut bytes) = (0, 0);
        for (token, logprobs) in tokens.iter().zip(logprobs) {
            all.push(*token, logprobs.as_ref(), offset, texts);
            let mut part = stream.push(*token);
            // A special token that the prompt spells is a part of its text; one that the tokenizer added is not.
            if part.is_empty() && self.tokenizer.is_added(*token) {
                let spelled = texts.text(*token);
                if text.get(bytes..).is_some_and(|rest| rest.starts_with(&spelled)) {
                    part = spelled;
                }
            }
            offset += part.chars().count();
            bytes += part.len();
        }
    }
}

impl Job {
    fn work(&self, app: &App) -> Work {
        let prompts = self.prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
        Work { prompts, n: self.settings.n, request: app.engine_request(&self.settings, &app.text.eos, self.echo) }
    }

    fn answers(&self) -> usize {
        self.prompts.len() * self.settings.n
    }
}

#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<Choice>,
    /// In a stream absent unless the client asked for it; then null except in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageReport>>,
}

/// The answers as one object.
async fn complete(app: &App, job: Job) -> Result<Response, ApiError> {
    let decoding = Decoding { tokenizer: &app.tokenizer, kept: &[], stops: &job.settings.stop, metrics: &app.metrics };
    let mut generation = Generation::start(&app.engine, job.work(app), decoding)?;
    let mut writer = Writer::new(app, &job);
    let mut choices: Vec<Choice> = (0..job.answers()).map(|index| writer.start(index)).collect();
    while let Some((index, update)) = generation.next().await? {
        writer.add(&mut choices[index], update);
    }
    let head = Head::new("cmpl", "text_completion", &job.settings.model);
    Ok(Json(Completion { head: &head, choices, usage: Some(Some(writer.usage)) }).into_response())
}

/// The answers as events. The first refusal of the engine is returned by `started`, so that it has a status.
async fn stream(
    app: &App,
    job: Job,
    sender: &EventSender,
    started: oneshot::Sender<Result<(), ApiError>>,
) -> Result<(), Gone> {
    let decoding = Decoding { tokenizer: &app.tokenizer, kept: &[], stops: &job.settings.stop, metrics: &app.metrics };
    let mut generation = match Generation::start(&app.engine, job.work(app), decoding) {
        Ok(generation) => generation,
        Err(error) => return started.send(Err(error)).map_err(|_| Gone),
    };
    started.send(Ok(())).map_err(|_| Gone)?;
    let mut writer = Writer::new(app, &job);
    let include_usage = job.settings.stream.is_some_and(|stream| stream.include_usage);
    let head = Head::new("cmpl", "text_completion", &job.settings.model);
    let chunk = |mut choice: Choice| {
        choice.logprobs = choice.logprobs.filter(|logprobs| !logprobs.is_empty());
        Completion { head: &head, choices: vec![choice], usage: include_usage.then_some(None) }
    };
    for index in 0..job.answers() {
        let choice = writer.start(index);
        if !choice.text.is_empty() {
            sender.send(&chunk(choice)).await?;
        }
    }
    loop {
        let (index, update) = match generation.next().await {
            Ok(Some(update)) => update,
            Ok(None) => break,
            Err(error) => {
                sender.error(&error).await?;
                return sender.done().await;
            }
        };
        let logprobs = writer.texts.as_ref().map(|_| CompletionLogprobs::default());
        let mut choice = Choice { index, text: String::new(), logprobs, finish_reason: None };
        writer.add(&mut choice, update);
        sender.send(&chunk(choice)).await?;
    }
    if include_usage {
        let usage = Some(Some(writer.usage));
        sender.send(&Completion { head: &head, choices: Vec::new(), usage }).await?;
    }
    sender.done().await
}
