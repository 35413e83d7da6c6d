//! `moonlight generate`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use moonlight_convert::Printable;
use moonlight_infer::OpenedModel;
use moonlight_infer::generate::{Generated, Sampling, check_prompt, generate, generate_many};
use moonlight_infer::token_reader::TokenReader;
use moonlight_infer::tokenizer::Tokenizer;
use moonlight_model::CausalLm;
use serde_json::{Value, json};

use super::model::{ModelArguments, ParseArguments, TextArguments};
use super::output::{JsonLines, model_text, print};
use crate::error::TrainError;

/// Continue one prompt, or a file of prompts
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["prompt", "prompt_tokens", "prompts"])))]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    text: TextArguments,
    #[command(flatten)]
    parse: ParseArguments,
    /// The text to continue
    #[arg(long)]
    prompt: Option<String>,
    /// The token ids to continue, e.g. `1,2,3`
    #[arg(long, value_delimiter = ',', value_name = "TOKENS")]
    prompt_tokens: Option<Vec<u32>>,
    /// JSONL, a JSON array, CSV or parquet with a record `{"text": "..."}` or `{"tokens": [...]}` for each prompt; the continuations are
    /// printed as with `--json`, a line each, in the same order
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// The number of prompts to continue at once
    #[arg(long, default_value = "8", requires = "prompts", value_name = "TEXTS")]
    batch: NonZeroUsize,
    /// The file for the continuations of `--prompts` [default: stdout]
    #[arg(long, requires = "prompts", value_name = "FILE")]
    output: Option<PathBuf>,
    /// The most tokens to generate
    #[arg(long, default_value_t = 200)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArguments,
    /// Print one JSON object: prompt_tokens, tokens, text, stop (why it ended: eos or length) and stop_token (the token that ended it, or
    /// null)
    #[arg(long)]
    json: bool,
}

/// How the next token is chosen.
#[derive(Debug, Args)]
pub(super) struct SamplingArguments {
    /// Divide the logits by this; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, value_parser = not_negative)]
    temperature: f64,
    /// Sample from the fewest tokens whose probability adds up to this (nucleus sampling)
    #[arg(long, default_value_t = 1.0, value_parser = share)]
    top_p: f64,
    /// Sample from so many of the most likely tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// The seed of the sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArguments {
    pub(super) fn sampling(&self) -> Sampling {
        let Self { temperature, top_p, top_k, seed } = *self;
        Sampling { temperature, top_p, top_k, seed }
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text).and_then(|value| if value >= 0.0 { Ok(value) } else { Err("must not be negative".into()) })
}

fn share(text: &str) -> Result<f64, String> {
    let inside = |value: f64| value > 0.0 && value <= 1.0;
    number(text).and_then(|value| if inside(value) { Ok(value) } else { Err("must be above 0 and at most 1".into()) })
}

fn number(text: &str) -> Result<f64, String> {
    text.parse::<f64>().ok().filter(|value| value.is_finite()).ok_or_else(|| "not a number".into())
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    if let Some(prompts) = &arguments.prompts {
        let output = JsonLines::create(arguments.output.as_deref(), [prompts])?;
        return run_many(TokenReader::open(prompts)?, output, arguments);
    }
    let Opened { model, tokenizer, eos, end_of_turn } = arguments.open()?;
    let prompt = match (&arguments.prompt_tokens, &arguments.prompt, &tokenizer) {
        (Some(tokens), ..) => tokens.clone(),
        (None, Some(text), Some(tokenizer)) => tokenizer.encode_text(text)?,
        (None, ..) => {
            return Err(TrainError::Request {
                problem: "the model's directory has no tokenizer".into(),
                hint: Some("give the prompt as `--prompt-tokens 1,2,3`".into()),
            });
        }
    };
    let eos = with_end_of_turn(eos, end_of_turn, std::slice::from_ref(&prompt));
    let sampling = arguments.sampling.sampling();
    let mut stream = tokenizer.as_ref().map(|tokenizer| tokenizer.stream());
    let mut written = Ok(());
    let mut show = |text: &str| {
        if written.is_ok() {
            written = print(text);
        }
    };
    let generated = generate(&model, &prompt, arguments.max_new_tokens, sampling, &eos, |token| {
        if !arguments.json {
            match &mut stream {
                Some(stream) => show(&model_text(&stream.push(token))),
                None => show(&format!("{token} ")),
            }
        }
    })?;
    if arguments.json {
        show(&object(&prompt, &generated, tokenizer.as_ref()).to_string());
    } else if let Some(mut stream) = stream {
        show(&model_text(&stream.finish()));
    }
    show("\n");
    written
}

fn object(prompt: &[u32], generated: &Generated, tokenizer: Option<&Tokenizer>) -> Value {
    let text = tokenizer.map(|tokenizer| tokenizer.decode(&generated.tokens));
    json!({
        "prompt_tokens": prompt, "tokens": generated.tokens, "text": text, "stop": generated.stop,
        "stop_token": generated.stop_token,
    })
}

/// A model that is ready to continue prompts.
struct Opened {
    model: CausalLm,
    tokenizer: Option<Tokenizer>,
    eos: Vec<u32>,
    /// With `--parse-special`, the token that ends a turn of the chat template.
    end_of_turn: Option<u32>,
}

impl Arguments {
    fn open(&self) -> Result<Opened, TrainError> {
        if self.prompt_tokens.is_some() && (self.text.is_given() || self.parse.parse_special) {
            return Err(TrainError::Request {
                problem: "`--prompt-tokens` excludes `--bos`, `--no-bos` and `--parse-special`, which are for texts"
                    .into(),
                hint: Some("give the prompt as `--prompt TEXT`".into()),
            });
        }
        let opened = self.model.open()?;
        let parse_special = self.parse.parse_special;
        let end_of_turn = opened.chat_encoder().ok().filter(|_| parse_special).and_then(|chat| chat.end_token());
        let OpenedModel { model, tokenizer, eos, .. } = opened;
        let has_text = self.prompt_tokens.is_none();
        let tokenizer = match tokenizer {
            Some(tokenizer) if has_text => {
                let tokenizer = self.text.tokenizer(&tokenizer)?.with_parse_special(parse_special);
                if let [end, ..] = *tokenizer.suffix() {
                    let name = tokenizer.decode_with_special(&[end]);
                    tracing::info!("the tokenizer ends texts with `{}`, which is left out of prompts", Printable(name));
                }
                Some(tokenizer.for_prompts())
            }
            tokenizer => tokenizer,
        };
        Ok(Opened { model, tokenizer, eos, end_of_turn })
    }
}

/// Adds the token that ends a turn if every prompt contains it: the prompts are then conversations, and an answer ends like a turn.
fn with_end_of_turn(mut eos: Vec<u32>, end_of_turn: Option<u32>, prompts: &[Vec<u32>]) -> Vec<u32> {
    let in_chat = |token: &u32| !prompts.is_empty() && prompts.iter().all(|prompt| prompt.contains(token));
    eos.extend(end_of_turn.filter(in_chat));
    eos
}

/// Continues the prompts of a file. Continuations finish in any order; each is printed when all earlier ones are.
fn run_many(file: TokenReader, mut output: JsonLines, arguments: &Arguments) -> Result<(), TrainError> {
    let Opened { model, tokenizer, eos, end_of_turn } = arguments.open()?;
    let config = model.config();
    let mut prompts = Vec::new();
    file.for_each(tokenizer.as_ref(), |prompt| {
        check_prompt(&prompt, config.vocab_size, config.max_position_embeddings)?;
        prompts.push(prompt);
        Ok(())
    })?;
    let eos = with_end_of_turn(eos, end_of_turn, &prompts);
    let mut texts: Vec<Option<Generated>> = vec![None; prompts.len()];
    let mut printed = 0;
    let (batch, sampling) = (arguments.batch.get(), arguments.sampling.sampling());
    generate_many(&model, &prompts, batch, arguments.max_new_tokens, sampling, &eos, |index, text| {
        texts[index] = Some(text);
        while let Some(text) = texts.get_mut(printed).and_then(Option::take) {
            output.line(&object(&prompts[printed], &text, tokenizer.as_ref()))?;
            printed += 1;
        }
        Ok(())
    })?;
    output.finish()
}
