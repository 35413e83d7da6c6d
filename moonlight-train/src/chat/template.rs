//! The chat template of a model: a Jinja program that turns messages into text.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Value, json};

use super::{ChatError, Message};
use crate::tokenizer::Tokenizer;

/// Moonlight's template, as published in its `tokenizer_config.json`: no line breaks, no `[BOS]`, and a system message
/// where the conversation has none.
pub const MOONLIGHT_TEMPLATE: &str = "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != \
     'system' -%}<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}{%- if \
     message['role'] == 'system' -%}<|im_system|>{%- endif -%}{%- if message['role'] == 'user' -%}<|im_user|>{%- endif \
     -%}{%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}{{ message['role'] \
     }}<|im_middle|>{{message['content']}}<|im_end|>{%- endfor -%}{%- if add_generation_prompt \
     -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}";

/// The special tokens of [`MOONLIGHT_TEMPLATE`].
const MOONLIGHT_TOKENS: [&str; 5] = ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"];

/// The one template of the environment.
const NAME: &str = "chat";

/// Where a template came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateSource {
    /// A file of the model's folder: `chat_template.jinja`, or `tokenizer_config.json` with a `chat_template` in it.
    File(PathBuf),
    /// [`MOONLIGHT_TEMPLATE`], for a tokenizer with its special tokens.
    Moonlight,
}

impl std::fmt::Display for TemplateSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "{}", path.display()),
            Self::Moonlight => formatter.write_str("Moonlight's own"),
        }
    }
}

/// A chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: TemplateSource,
    /// `bos_token`, `eos_token` and the like, which templates may write.
    names: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// The template of a model's folder: `chat_template.jinja`, else that of `tokenizer_config.json`, else Moonlight's
    /// where the tokenizer has its special tokens.
    ///
    /// # Errors
    ///
    /// [`ChatError::NoTemplate`] where there is none of them, [`ChatError::Broken`] for one that is no template.
    pub fn of_model(dir: &Path, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let config_path = dir.join("tokenizer_config.json");
        let config: Value = std::fs::read_to_string(&config_path)
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or(Value::Null);
        let file = dir.join("chat_template.jinja");
        let (text, source) = if file.is_file() {
            let broken =
                |problem: std::io::Error| ChatError::Broken { path: file.clone(), problem: problem.to_string() };
            (std::fs::read_to_string(&file).map_err(broken)?, TemplateSource::File(file))
        } else if let Some(text) = default_template(&config["chat_template"]) {
            (text.to_owned(), TemplateSource::File(config_path))
        } else if MOONLIGHT_TOKENS.iter().all(|token| tokenizer.special(token).is_some()) {
            (MOONLIGHT_TEMPLATE.to_owned(), TemplateSource::Moonlight)
        } else {
            return Err(ChatError::NoTemplate { dir: dir.to_owned() });
        };
        let names = ["bos_token", "eos_token", "pad_token", "unk_token"].into_iter().filter_map(|key| {
            let value = &config[key];
            let text = value.as_str().or_else(|| value["content"].as_str())?;
            Some((key, text.to_owned()))
        });
        Self::new(text, source, names.collect())
    }

    fn new(text: String, source: TemplateSource, names: Vec<(&'static str, String)>) -> Result<Self, ChatError> {
        // The environment that transformers gives templates: `apply_chat_template` of its `chat_template_utils.py`.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, text).map_err(|error| ChatError::Broken {
            path: match &source {
                TemplateSource::File(path) => path.clone(),
                TemplateSource::Moonlight => NAME.into(),
            },
            problem: sentence(&error),
        })?;
        Ok(Self { environment, source, names })
    }

    /// Where the template came from.
    pub fn source(&self) -> &TemplateSource {
        &self.source
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant begins to speak.
    ///
    /// # Errors
    ///
    /// [`ChatError::Refused`] where the template fails, on purpose or not.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let refused = |error: minijinja::Error| ChatError::Refused { problem: sentence(&error) };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let mut context = serde_json::Map::new();
        context.insert("messages".into(), json!(messages));
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.extend(self.names.iter().map(|(key, name)| ((*key).to_owned(), name.as_str().into())));
        template.render(Serde(context)).map_err(refused)
    }
}

/// `chat_template` is a text, or a list of named ones of which `default` is meant.
fn default_template(value: &Value) -> Option<&str> {
    let named = |entry: &&Value| entry["name"] == "default";
    value.as_str().or_else(|| value.as_array()?.iter().find(named)?["template"].as_str())
}

/// An error of the engine as part of a sentence.
fn sentence(error: &minijinja::Error) -> String {
    let text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{text} (line {line})"),
        None => text,
    }
}
