//! Requests: the fields of OpenAI's API that are supported, checked.
//!
//! Every field is used, listed in [`WITHOUT_EFFECT`], or refused by its name.

mod chat;
mod completion;
mod messages;

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::value::RawValue;

pub(super) use chat::ChatRequest;
pub(super) use completion::{CompletionRequest, Prompt};

use super::defaults::SamplingDefaults;
use super::error::ApiError;
use super::fields::{Fields, expected_error, parse_field};
use crate::engine::Penalties;
use crate::generate::Sampling;

/// Fields that do not bear on the result: notes of the client, and hints for OpenAI's own operation.
const WITHOUT_EFFECT: [&str; 7] =
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"];

/// The limit of answers to one prompt; OpenAI's.
const MAX_ANSWERS: i64 = 128;
/// The limit of alternatives for each token; that of OpenAI's chat API.
const MAX_TOP_LOGPROBS: i64 = 20;
/// The limit of stop strings, each of at most [`MAX_STOP_BYTES`]; OpenAI's limit is 4.
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// The limit of tokens with a bias; OpenAI's.
const MAX_BIASES: usize = 1024;
/// The limit of log-probabilities in one answer that is not streamed, because it is in memory as a whole.
const MAX_LOGPROBS: usize = 4 << 20;

/// What both kinds of request have.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    pub(super) model: String,
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) stream: Option<StreamSettings>,
    pub(super) stop: Vec<String>,
    pub(super) sampling: Sampling,
    pub(super) penalties: Penalties,
    pub(super) ignore_eos: bool,
    /// The number of alternatives for each token.
    pub(super) logprobs: Option<usize>,
    /// The most new tokens; `None` for what fits into the context.
    pub(super) max_tokens: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamSettings {
    pub(super) include_usage: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
    /// Random padding of each event, against observers of encrypted connections. There is no encryption here.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

impl Settings {
    /// Takes the fields that both kinds of request have; `logprobs` and `max_tokens` are those of a kind.
    fn take(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<Self, ApiError> {
        fields.ignore(&WITHOUT_EFFECT);
        let model = fields.take_name("model")?;
        let n = fields.take_integer("n", 1, MAX_ANSWERS)?.unwrap_or(1) as usize;
        let stream = fields.take_bool("stream")?;
        let options: Option<StreamOptions> =
            fields.take("stream_options", "must be an object with `include_usage` and `include_obfuscation`")?;
        if options.is_some() && !stream {
            return Err(ApiError::field("stream_options", "is only for `stream: true`"));
        }
        let include_usage = options.and_then(|options| options.include_usage).unwrap_or(false);
        Ok(Self {
            model,
            n,
            stream: stream.then_some(StreamSettings { include_usage }),
            stop: take_stop(fields)?,
            sampling: take_sampling(fields, defaults)?,
            penalties: take_penalties(fields, defaults)?,
            ignore_eos: fields.take_bool("ignore_eos")?,
            logprobs: None,
            max_tokens: None,
        })
    }

    /// Refuses a request whose answer would be too large to be in memory as a whole. `tokens` is the most that an answer has.
    pub(super) fn check_size(&self, prompts: usize, tokens: usize) -> Result<(), ApiError> {
        let Some(top) = self.logprobs.filter(|_| self.stream.is_none()) else { return Ok(()) };
        let values = (prompts * self.n).saturating_mul(tokens).saturating_mul(top + 1);
        if values > MAX_LOGPROBS {
            let problem = format!(
                "asks for up to {values} values, more than {MAX_LOGPROBS} in one answer: lower `n` or the limit of tokens, or \
                 stream"
            );
            return Err(ApiError::field("logprobs", problem));
        }
        Ok(())
    }
}

fn take_stop(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    const EXPECTED: &str = "must be a string or a list of strings";
    let Some(raw) = fields.take_raw("stop") else { return Ok(Vec::new()) };
    let strings = match raw.get().starts_with('"') {
        true => vec![parse_field("stop", raw, EXPECTED)?],
        false => parse_field::<Vec<String>>("stop", raw, EXPECTED)?,
    };
    let is_valid = |string: &String| !string.is_empty() && string.len() <= MAX_STOP_BYTES;
    if strings.len() > MAX_STOP_STRINGS || !strings.iter().all(is_valid) {
        let problem = format!("must be at most {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::field("stop", problem));
    }
    Ok(strings)
}

fn take_sampling(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<Sampling, ApiError> {
    let temperature = fields.take_number("temperature", "must be a number of at least 0", |value| value >= 0.0)?;
    let share = |value: f64| (0.0..=1.0).contains(&value);
    let top_p = fields.take_number("top_p", "must be a number from 0 to 1", share)?;
    // -1 is vLLM's value for all tokens.
    let top_k = fields.take_integer("top_k", -1, i64::from(u32::MAX))?.map(|top_k| top_k.max(0) as usize);
    let seed = fields.take_integer("seed", i64::MIN, i64::MAX)?;
    Ok(Sampling {
        temperature: temperature.unwrap_or(defaults.temperature),
        top_p: top_p.unwrap_or(defaults.top_p),
        top_k: top_k.unwrap_or(defaults.top_k),
        // Without a seed every answer is a new one.
        seed: seed.map_or_else(rand::random, |seed| seed as u64),
    })
}

fn take_penalties(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<Penalties, ApiError> {
    let mut penalty = |name| {
        let number = fields.take_number(name, "must be a number from -2 to 2", |value| value.abs() <= 2.0)?;
        Ok::<_, ApiError>(number.unwrap_or(0.0) as f32)
    };
    let (presence, frequency) = (penalty("presence_penalty")?, penalty("frequency_penalty")?);
    let is_factor = |value: f64| value > 0.0 && (value as f32) > 0.0 && (value as f32).is_finite();
    let repetition = fields.take_number("repetition_penalty", "must be a number above 0", is_factor)?;
    Ok(Penalties {
        presence,
        frequency,
        repetition: repetition.unwrap_or(defaults.repetition_penalty) as f32,
        logit_bias: take_logit_bias(fields)?,
    })
}

fn take_logit_bias(fields: &mut Fields<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    let expected = format!("must be an object of at most {MAX_BIASES} token ids with numbers from -100 to 100");
    let Some(raw) = fields.take_raw(NAME) else { return Ok(Vec::new()) };
    let biases: HashMap<&str, &RawValue> = parse_field(NAME, raw, &expected)?;
    let mut list = Vec::with_capacity(biases.len());
    for (token, bias) in &biases {
        let bias = serde_json::from_str::<f32>(bias.get()).ok().filter(|bias| bias.abs() <= 100.0);
        let (Ok(token), Some(bias)) = (token.parse(), bias) else { return Err(expected_error(NAME, raw, &expected)) };
        list.push((token, bias));
    }
    if list.len() > MAX_BIASES {
        return Err(expected_error(NAME, raw, &expected));
    }
    list.sort_unstable_by_key(|&(token, _)| token);
    Ok(list)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::chat::ChatTemplate;

    /// JSON of any shape, with names and values that requests have.
    fn any_json() -> impl Strategy<Value = Value> {
        const WORDS: [&str; 14] = [
            "role",
            "content",
            "user",
            "assistant",
            "tool",
            "type",
            "text",
            "function",
            "name",
            "arguments",
            "tool_calls",
            "{\"a\": 1}",
            "",
            "é\u{0}",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (0..WORDS.len()).prop_map(|word| WORDS[word].into()),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let entry = (0..WORDS.len(), inner.clone()).prop_map(|(word, value)| (WORDS[word].to_owned(), value));
            prop_oneof![
                prop::collection::vec(inner, 0..4).prop_map(Value::from),
                prop::collection::vec(entry, 0..4).prop_map(|entries| Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    const FIELDS: [&str; 24] = [
        "n",
        "stream",
        "stream_options",
        "stop",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "ignore_eos",
        "prompt",
        "logprobs",
        "max_tokens",
        "echo",
        "best_of",
        "messages",
        "top_logprobs",
        "tools",
        "tool_choice",
        "chat_template_kwargs",
        "response_format",
        "other",
    ];

    proptest! {
        /// No request panics, and what is accepted is within the limits.
        #[test]
        fn any_request_is_checked(
            fields in prop::collection::vec((0..FIELDS.len(), any_json()), 0..5),
            bytes in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let template = ChatTemplate::from_source("{{ messages }}{{ tools }}<tool_call>'user''tool'").unwrap();
            let defaults = SamplingDefaults::default();
            for prompt in [json!({"model": "m", "prompt": "x"}), json!({"model": "m", "messages": [{"role": "user", "content": "x"}]})] {
                let mut body: Map<String, Value> = prompt.as_object().unwrap().clone();
                body.extend(fields.iter().map(|(field, value)| (FIELDS[*field].to_owned(), value.clone())));
                let body = Value::from(body).to_string();
                let settings = [
                    CompletionRequest::parse(body.as_bytes(), &defaults).map(|request| request.settings),
                    ChatRequest::parse(body.as_bytes(), &template, &defaults).map(|request| request.settings),
                ];
                for settings in settings.into_iter().flatten() {
                    prop_assert!((1..=128).contains(&settings.n) && settings.sampling.temperature >= 0.0);
                    prop_assert!(settings.logprobs.is_none_or(|top| top <= 20) && settings.stop.len() <= 16);
                }
            }
            let _ = CompletionRequest::parse(&bytes, &defaults);
            let _ = ChatRequest::parse(&bytes, &template, &defaults);
        }
    }

    #[test]
    fn values_of_the_model_are_used_where_a_request_has_none() {
        let defaults = SamplingDefaults { temperature: 0.6, top_p: 0.9, top_k: 40, repetition_penalty: 1.1 };
        let settings = |more: &str| {
            let body = format!("{{\"model\": \"m\", \"prompt\": \"x\"{more}}}");
            CompletionRequest::parse(body.as_bytes(), &defaults).unwrap().settings
        };
        let plain = settings("");
        assert_eq!((plain.sampling.temperature, plain.sampling.top_p, plain.sampling.top_k), (0.6, 0.9, 40));
        assert_eq!((plain.penalties.repetition, plain.max_tokens), (1.1, Some(16)));
        assert_ne!(plain.sampling.seed, settings("").sampling.seed, "each request has another seed");
        let own = settings(", \"temperature\": 0, \"top_k\": -1, \"seed\": -1, \"repetition_penalty\": 1");
        assert_eq!((own.sampling.temperature, own.sampling.top_k, own.sampling.seed), (0.0, 0, u64::MAX));
        assert_eq!(own.penalties.repetition, 1.0);
    }
}
