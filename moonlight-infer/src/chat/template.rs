//! The chat template of a model: a Jinja program that renders messages as text.
//!
//! transformers adds a tag to Jinja, `{% generation %} ... {% endgeneration %}`, around what the assistant writes. The engine
//! does not support it, so it is rewritten to a scoped block with a variable at each end. The variables are empty in normal
//! renderings, and marks when the learned spans are searched for.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{DateTime, Local};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind};
use moonlight_convert::{Printable, printable};
use serde_json::Value;

use super::sandbox::{self, MAX_SOURCE_BYTES, Overrun, PARSE_TIME, STEP_LIMITS};
use super::template_input::TemplateInput;
use super::{ChatError, Message};
use crate::model_files::{self, ModelFiles};
use crate::moonlight_template::{MOONLIGHT_TEMPLATE, MOONLIGHT_TOKENS};
use crate::tokenizer::Tokenizer;

/// The name of the only template in the environment.
const NAME: &str = "chat";

/// The variables at the ends of a `{% generation %}` block.
const GENERATION: [&str; 2] = ["moonlight_generation_begin", "moonlight_generation_end"];

const JINJA: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";
const TOKENS_MAP: &str = "special_tokens_map.json";

/// The origin of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateSource {
    /// A file: `chat_template.jinja`, or `tokenizer_config.json` with a `chat_template` in it.
    File(PathBuf),
    /// [`MOONLIGHT_TEMPLATE`], for a tokenizer with its special tokens.
    Moonlight,
}

impl std::fmt::Display for TemplateSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "{}", Printable(path.display())),
            Self::Moonlight => formatter.write_str("Moonlight's own"),
        }
    }
}

/// A chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    /// One for each of the [`STEP_LIMITS`], because fuel is a setting of the environment.
    environments: Vec<Arc<Environment<'static>>>,
    /// Set when a conversation exceeds the time limit. Its thread may still be running, so the template is not run again:
    /// each run could leave another such thread.
    timed_out: AtomicBool,
    source: TemplateSource,
    /// The source text, unchanged.
    text: String,
    /// The names and texts of `bos_token`, `eos_token` and the like, which are variables of the template.
    names: Vec<(&'static str, String)>,
    /// The variables that the template reads and does not set.
    variables: HashSet<String>,
    /// The separate template for conversations with tools, if there is one: the entry `tool_use` of a list of templates in
    /// `tokenizer_config.json`.
    tool_template: Option<Box<ChatTemplate>>,
}

impl ChatTemplate {
    /// The template of a model's directory: `chat_template.jinja`, else the one in `tokenizer_config.json`, else
    /// [`MOONLIGHT_TEMPLATE`] if the tokenizer has its special tokens.
    ///
    /// # Errors
    ///
    /// [`ChatError::NoTemplate`] if there is none, [`ChatError::InvalidTemplate`] for a file that cannot be read or a
    /// template that cannot be parsed.
    pub fn from_model_dir(dir: &Path, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let files = ModelFiles::new(dir);
        let unreadable = |(path, problem): (PathBuf, String)| ChatError::InvalidTemplate { path, problem };
        let jinja = files.read(JINJA, MAX_SOURCE_BYTES as u64).map_err(unreadable)?;
        let config = files.read(CONFIG, model_files::MAX_SETTINGS_BYTES).map_err(unreadable)?;
        let map = files.read(TOKENS_MAP, model_files::MAX_SETTINGS_BYTES).map_err(unreadable)?;
        Self::from_parts(dir, [jinja.as_deref(), config.as_deref(), map.as_deref()], tokenizer)
    }

    /// The template that comes with a tokenizer: from the files next to it, in the order of
    /// [`from_model_dir`](ChatTemplate::from_model_dir).
    ///
    /// # Errors
    ///
    /// As [`from_model_dir`](ChatTemplate::from_model_dir).
    pub fn for_tokenizer(tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let files = tokenizer.files();
        let file = |name| files.iter().find(|file| file.name == name).map(|file| file.contents.as_slice());
        Self::from_parts(Path::new(tokenizer.name()), [JINJA, CONFIG, TOKENS_MAP].map(file), tokenizer)
    }

    /// The template in a given file, with the special tokens of a tokenizer.
    ///
    /// # Errors
    ///
    /// [`ChatError::InvalidTemplate`] for a file that cannot be read or parsed.
    pub fn from_file(path: &Path, tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let invalid = |problem: String| ChatError::InvalidTemplate { path: path.into(), problem };
        let text = model_files::read_named(path, MAX_SOURCE_BYTES as u64).map_err(invalid)?;
        let text = String::from_utf8(text).map_err(|error| invalid(error.to_string()))?;
        let files = tokenizer.files();
        let [config, map] = [CONFIG, TOKENS_MAP].map(|name| {
            let file = files.iter().find(|file| file.name == name).map(|file| file.contents.as_slice());
            read(file).map_err(|problem| ChatError::InvalidTemplate { path: name.into(), problem })
        });
        Self::new(text, TemplateSource::File(path.into()), names(&config?, &map?))
    }

    /// A template from its source text, for tests and fuzzing.
    ///
    /// # Errors
    ///
    /// [`ChatError::InvalidTemplate`] for a text that cannot be parsed.
    #[doc(hidden)]
    pub fn from_source(source: &str) -> Result<Self, ChatError> {
        Self::new(source.into(), TemplateSource::File(JINJA.into()), Vec::new())
    }

    fn from_parts(
        dir: &Path,
        [jinja, config, map]: [Option<&[u8]>; 3],
        tokenizer: &Tokenizer,
    ) -> Result<Self, ChatError> {
        let invalid = |name: &str, problem| ChatError::InvalidTemplate { path: dir.join(name), problem };
        let config = read(config).map_err(|problem| invalid(CONFIG, problem))?;
        let map = read(map).map_err(|problem| invalid(TOKENS_MAP, problem))?;
        let names = names(&config, &map);
        let (text, source) = if let Some(jinja) = jinja {
            let path = dir.join(JINJA);
            let text = String::from_utf8(jinja.to_owned());
            let text =
                text.map_err(|error| ChatError::InvalidTemplate { path: path.clone(), problem: error.to_string() })?;
            (text, TemplateSource::File(path))
        } else if let Some(text) = named_template(&config["chat_template"], "default") {
            let source = TemplateSource::File(dir.join(CONFIG));
            let mut template = Self::new(text.to_owned(), source.clone(), names.clone())?;
            if config["chat_template"].is_array()
                && let Some(text) = named_template(&config["chat_template"], "tool_use")
            {
                template.tool_template = Some(Box::new(Self::new(text.to_owned(), source, names)?));
            }
            return Ok(template);
        } else if MOONLIGHT_TOKENS.iter().all(|token| tokenizer.added(token).is_some()) {
            (MOONLIGHT_TEMPLATE.to_owned(), TemplateSource::Moonlight)
        } else {
            return Err(ChatError::NoTemplate { dir: dir.to_owned() });
        };
        Self::new(text, source, names)
    }

    fn new(text: String, source: TemplateSource, names: Vec<(&'static str, String)>) -> Result<Self, ChatError> {
        let invalid = |problem: String| ChatError::InvalidTemplate {
            path: match &source {
                TemplateSource::File(path) => path.clone(),
                TemplateSource::Moonlight => NAME.into(),
            },
            problem,
        };
        if text.len() > MAX_SOURCE_BYTES {
            return Err(invalid(format!("it has {} bytes, more than the limit of {MAX_SOURCE_BYTES}", text.len())));
        }
        // As in Jinja, which normalizes the line ends of a source (`newline_sequence`).
        let marked = replace_generation_blocks(&text.replace("\r\n", "\n").replace('\r', "\n"));
        let parsed = sandbox::run(PARSE_TIME, move || {
            let environment = environment(&marked)?;
            let template = environment.get_template(NAME).map_err(|error| error_message(&error))?;
            let variables = template.undeclared_variables(false);
            Ok((environment, variables))
        });
        let parsed = parsed.map_err(|overrun| overrun.to_string()).flatten();
        let (environment, variables) = parsed.map_err(invalid)?;
        let with_limit = |&steps: &u64| {
            let mut environment = environment.clone();
            environment.set_fuel(Some(steps));
            Arc::new(environment)
        };
        let environments = STEP_LIMITS.iter().map(with_limit).collect();
        let timed_out = AtomicBool::new(false);
        Ok(Self { environments, timed_out, source, text, names, variables, tool_template: None })
    }

    /// The file that the template was read from, or the built-in template.
    pub fn source(&self) -> &TemplateSource {
        &self.source
    }

    /// The source text, unchanged.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the template was read from a file, rather than being built in.
    pub fn is_from_file(&self) -> bool {
        matches!(self.source, TemplateSource::File(_))
    }

    /// Everything that determines a rendering except the conversation: a key for caches of rendered conversations.
    pub fn fingerprint(&self) -> String {
        let names: Vec<String> = self.names.iter().map(|(key, name)| format!("\0{key}\0{name}")).collect();
        let tool_template = self.tool_template.as_ref().map_or("", |template| &template.text);
        format!("{}\0{tool_template}{}", self.text, names.concat())
    }

    /// Whether the template calls `strftime_now`, so that its output changes from day to day.
    pub fn uses_date(&self) -> bool {
        let templates = [Some(self), self.tool_template.as_deref()];
        templates.into_iter().flatten().any(|template| template.uses_variable("strftime_now"))
    }

    /// The template to use for a conversation with `tools`, or without.
    pub(super) fn variant_for_tools(&self, tools: bool) -> &Self {
        self.tool_template.as_deref().filter(|_| tools).unwrap_or(self)
    }

    /// The source text of the template for conversations with tools; `None` if it does not read `tools`.
    pub fn tools_source(&self) -> Option<&str> {
        let template = self.variant_for_tools(true);
        template.uses_variable("tools").then_some(template.text.as_str())
    }

    /// Whether the template mentions a role as a quoted string. `tool`, `developer` and `function` are also known to a
    /// template that does not distinguish roles at all (it does not mention `user`).
    pub fn knows_role(&self, role: &str) -> bool {
        self.quotes_text(role)
            || self.tool_template.as_ref().is_some_and(|template| template.quotes_text(role))
            || (["tool", "developer", "function"].contains(&role) && !self.quotes_text("user"))
    }

    fn quotes_text(&self, text: &str) -> bool {
        !text.contains(['\'', '"'])
            && ['\'', '"'].iter().any(|quote| self.text.contains(&format!("{quote}{text}{quote}")))
    }

    /// Whether the template reads a variable that it does not set itself.
    pub(super) fn uses_variable(&self, name: &str) -> bool {
        self.variables.contains(name)
    }

    /// Whether the template uses `add_generation_prompt`.
    pub(super) fn has_generation_prompt(&self) -> bool {
        self.text.contains("add_generation_prompt")
    }

    /// The strings at which the template splits texts, or which it looks for at their ends: the tags of reasoning, and the
    /// quoted arguments of `split`, `startswith` and `endswith`.
    pub(super) fn split_markers(&self) -> Vec<String> {
        let mut markers = vec!["<think>".to_owned(), "</think>".to_owned()];
        let calls = ["split(", "startswith(", "endswith("].into_iter().flat_map(|call| self.text.match_indices(call));
        for (at, call) in calls {
            let argument = self.text[at + call.len()..].trim_start();
            let Some(quote) = argument.chars().next().filter(|quote| ['\'', '"'].contains(quote)) else { continue };
            let Some((marker, _)) = argument[1..].split_once(quote) else { continue };
            let is_tag = marker.len() > 2 && !marker.contains('\\') && !marker.contains(char::is_whitespace);
            if is_tag && !markers.iter().any(|known| known == marker) {
                markers.push(marker.to_owned());
            }
        }
        markers
    }

    /// Whether the template has `{% generation %}` blocks.
    pub(super) fn has_generation_blocks(&self) -> bool {
        tags(&self.text).next().is_some()
    }

    /// Renders a conversation as text; with `add_generation_prompt` it ends where the assistant starts to write.
    ///
    /// # Errors
    ///
    /// [`ChatError::RenderFailed`] if the template raises an exception, fails, or exceeds a limit.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let input = TemplateInput::from_messages(messages);
        self.render_input(&input, &input.values, add_generation_prompt, ["", ""])
    }

    /// Does the same as [`render`](ChatTemplate::render) for `messages` with the variables of `input`, and with `marks`
    /// around the output of `{% generation %}` blocks.
    pub(super) fn render_input(
        &self,
        input: &TemplateInput,
        messages: &[minijinja::Value],
        add_generation_prompt: bool,
        marks: [&str; 2],
    ) -> Result<String, ChatError> {
        use minijinja::Value;
        let failed = |problem: String| ChatError::RenderFailed { problem };
        if self.timed_out.load(Ordering::Relaxed) {
            return Err(failed("it exceeded the time limit for an earlier conversation, and is not run again".into()));
        }
        let named = self.names.iter().map(|(key, name)| ((*key).to_owned(), Value::from(name.as_str())));
        let mut context: Vec<(String, Value)> = named.collect();
        context.extend(input.variables.iter().cloned());
        context.push(("messages".into(), Value::from(messages.to_vec())));
        context.push(("add_generation_prompt".into(), add_generation_prompt.into()));
        context.extend(GENERATION.iter().zip(marks).map(|(key, mark)| ((*key).to_owned(), mark.into())));
        let environment = self.environments[input.budget.level()].clone();
        let rendered = sandbox::run(input.budget.time(), move || {
            // The error leaves the thread as a string, because the engine's error may contain values of the template.
            let context = Value::from_pairs(context);
            let rendered = environment.get_template(NAME).and_then(|template| template.render(context));
            rendered.map_err(|error| (error.kind() == ErrorKind::OutOfFuel, error_message(&error)))
        });
        match rendered {
            Ok(Ok(text)) => Ok(text),
            Ok(Err((true, _))) => Err(failed(format!(
                "it exceeds the limit of {} steps for {} messages (an instruction or 64 bytes of text is a step)",
                input.budget.steps(),
                messages.len()
            ))),
            Ok(Err((false, problem))) => Err(failed(problem)),
            Err(overrun) => Err(self.overrun(overrun)),
        }
    }

    /// The error of a run that was stopped; after a timeout the template is not run again.
    pub(super) fn overrun(&self, overrun: Overrun) -> ChatError {
        if overrun == Overrun::Time {
            self.timed_out.store(true, Ordering::Relaxed);
        }
        ChatError::RenderFailed { problem: overrun.to_string() }
    }
}

/// The environment in which transformers renders templates (`apply_chat_template` of its `chat_template_utils.py`), with
/// limits, and the template in it.
fn environment(source: &str) -> Result<Environment<'static>, String> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    let syntax = syntax.expect("the delimiters are the default ones");
    let source = sandbox::guard_source(source, &syntax)?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    sandbox::install_guards(&mut environment);
    environment.add_function("raise_exception", |message: minijinja::Value| -> Result<String, minijinja::Error> {
        let message = message.as_str().unwrap_or("it raises an exception").to_owned();
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    // Read once, so that a data set that is tokenized across midnight has one date.
    let now = Local::now();
    environment.add_function("strftime_now", move |format: &str| strftime(&now, format));
    environment.add_template_owned(NAME, source).map_err(|error| error_message(&error))?;
    Ok(environment)
}

/// Formats a time as Python's `strftime` does. A directive that `chrono` does not have is an error.
fn strftime(time: &DateTime<Local>, format: &str) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut text = String::new();
    match write!(text, "{}", time.format(format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(sandbox::invalid_operation(format!("`strftime_now` does not support `{format}`"))),
    }
}

/// Parses a file of settings as JSON; null if there is no file.
fn read(config: Option<&[u8]>) -> Result<Value, String> {
    let read = |config| serde_json::from_slice(config).map_err(|error| format!("it is not JSON: {error}"));
    config.map_or(Ok(Value::Null), read)
}

/// The special tokens that templates use as variables: those of `tokenizer_config.json`, and those that only
/// `special_tokens_map.json` has.
fn names(config: &Value, map: &Value) -> Vec<(&'static str, String)> {
    const NAMES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let names = NAMES.into_iter().filter_map(|key| {
        let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
        Some((key, text(&config[key]).or_else(|| text(&map[key]))?))
    });
    names.collect()
}

/// A `{% generation %}` or `{% endgeneration %}` tag.
struct Tag {
    range: std::ops::Range<usize>,
    is_end: bool,
    /// The sign of white-space control (`-`, `+`) at each end, or an empty string.
    signs: [String; 2],
}

/// The tags of `{% generation %}` blocks.
fn tags(text: &str) -> impl Iterator<Item = Tag> + '_ {
    text.match_indices("{%").filter_map(move |(start, _)| {
        let length = text[start + 2..].find("%}")? + 4; // both delimiters; `{%}` is not a tag
        let inner = &text[start + 2..start + length - 2];
        let word = inner.trim_start_matches(['-', '+']);
        let left = inner[..inner.len() - word.len()].to_owned();
        let bare = word.trim_end_matches(['-', '+']);
        let right = word[bare.len()..].to_owned();
        let is_end = match bare.trim() {
            "generation" => false,
            "endgeneration" => true,
            _ => return None,
        };
        Some(Tag { range: start..start + length, is_end, signs: [left, right] })
    })
}

/// The source with ordinary blocks and mark variables in place of `{% generation %}` blocks.
fn replace_generation_blocks(text: &str) -> String {
    let mut marked = String::with_capacity(text.len());
    let mut end = 0;
    for Tag { range, is_end, signs: [left, right] } in tags(text) {
        let [begin_mark, end_mark] = GENERATION;
        marked.push_str(&text[end..range.start]);
        // Two nested blocks with the mark between them, so that both ends of the tag keep their white-space control. The
        // outer one is `with`, because a variable that is set in a generation block is not visible after the block.
        marked.push_str(&match is_end {
            false => format!("{{%{left} with %}}{{{{ {begin_mark} }}}}{{% if true {right}%}}"),
            true => format!("{{%{left} endif %}}{{{{ {end_mark} }}}}{{% endwith {right}%}}"),
        });
        end = range.end;
    }
    marked.push_str(&text[end..]);
    marked
}

/// The template called `name` in the value of `chat_template`, which is a string (of any name) or a list of named templates.
fn named_template<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    let named = |entry: &&Value| entry["name"] == name;
    value.as_str().or_else(|| value.as_array()?.iter().find(named)?["template"].as_str())
}

/// An error of the engine as part of a message. It is truncated, because a template may raise an exception of any length.
pub(super) fn error_message(error: &minijinja::Error) -> String {
    const MAX_CHARACTERS: usize = 500;
    // The outer error of a macro or an included template only names the place; its source has the cause.
    let mut error = error;
    while let Some(inner) = std::error::Error::source(error).and_then(|source| source.downcast_ref()) {
        error = inner;
    }
    let mut text = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    if let Some((end, _)) = text.char_indices().nth(MAX_CHARACTERS) {
        text.truncate(end);
        text.push('…');
    }
    let text = printable(&text);
    match error.line() {
        Some(line) => format!("{text} (line {line})"),
        None => text.into_owned(),
    }
}
