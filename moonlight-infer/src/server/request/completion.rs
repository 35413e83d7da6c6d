//! The body of `/v1/completions`.

use serde_json::value::RawValue;

use super::super::defaults::SamplingDefaults;
use super::super::error::ApiError;
use super::super::fields::{Fields, parse_field};
use super::{MAX_TOP_LOGPROBS, Settings};

/// The limit of answers in one request, over all prompts; OpenAI's limit of prompts.
const MAX_ANSWERS: usize = 2048;
/// OpenAI's default of `max_tokens`.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A text to continue, or its tokens.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A checked request.
#[derive(Debug, PartialEq)]
pub(in super::super) struct CompletionRequest {
    pub(in super::super) settings: Settings,
    /// At least one.
    pub(in super::super) prompts: Vec<Prompt>,
    /// Whether an answer begins with its prompt.
    pub(in super::super) echo: bool,
    /// Whether the tokenizer adds its prefix (BOS) to a text.
    pub(in super::super) add_special_tokens: bool,
}

impl CompletionRequest {
    /// Parses and checks a body.
    pub(in super::super) fn parse(body: &[u8], defaults: &SamplingDefaults) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut settings = Settings::take(&mut fields, defaults)?;
        let raw = fields.take_raw("prompt").ok_or(ApiError::Missing { name: "prompt" })?;
        let prompts = parse_prompts(raw)?;
        let answers = prompts.len() * settings.n;
        if answers > MAX_ANSWERS {
            return Err(ApiError::field("prompt", format!("asks for {answers} answers, more than {MAX_ANSWERS}")));
        }
        if prompts.is_empty() {
            return Err(ApiError::field("prompt", "must have at least one prompt"));
        }
        settings.logprobs = fields.take_integer("logprobs", 0, MAX_TOP_LOGPROBS)?.map(|count| count as usize);
        let max_tokens =
            fields.take_integer("max_tokens", 0, i64::MAX)?.map_or(DEFAULT_MAX_TOKENS, |most| most as usize);
        settings.max_tokens = Some(max_tokens);
        let echo = fields.take_bool("echo")?;
        let add_special_tokens = fields.take("add_special_tokens", "must be `true` or `false`")?.unwrap_or(true);
        let best_of = fields.take_integer("best_of", 1, i64::MAX)?;
        if best_of.is_some_and(|best_of| best_of != settings.n as i64) {
            return Err(ApiError::unsupported("best_of", "every answer is returned, so it must equal `n`"));
        }
        fields.refuse("suffix", &["\"\""], "the text is only continued at its end")?;
        fields.finish()?;
        Ok(Self { settings, prompts, echo, add_special_tokens })
    }
}

/// A text, a list of texts, a list of tokens, or a list of lists of tokens.
fn parse_prompts(raw: &RawValue) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "must be a text, a list of texts, a list of token ids, or a list of lists of token ids";
    let is_list = |first: char| {
        let inner = raw.get().strip_prefix('[').map(str::trim_start);
        inner.is_some_and(|inner| inner.starts_with(first))
    };
    let prompts: Vec<Prompt> = if raw.get().starts_with('"') {
        vec![Prompt::Text(parse_field("prompt", raw, EXPECTED)?)]
    } else if is_list('"') {
        parse_field::<Vec<String>>("prompt", raw, EXPECTED)?.into_iter().map(Prompt::Text).collect()
    } else if is_list('[') {
        parse_field::<Vec<Vec<u32>>>("prompt", raw, EXPECTED)?.into_iter().map(Prompt::Tokens).collect()
    } else {
        vec![Prompt::Tokens(parse_field("prompt", raw, EXPECTED)?)]
    };
    Ok(prompts)
}
