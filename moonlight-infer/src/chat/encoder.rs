//! Conversations to weighted tokens: the template renders the text, the tokenizer encodes it, and the assistant mask decides
//! which tokens are learned.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};

use super::assistant_mask::SpanFinder;
use super::conversation::{is_empty_value, is_read_here};
use super::special_tokens::SpecialTokens;
use super::template_input::{REASONING_FIELDS, TemplateInput, with_reasoning};
use super::{ChatError, ChatTemplate, Conversation, ConversationError, Message, Turn, sandbox};
use crate::tokenizer::Tokenizer;

/// Variables that a record cannot set: those that transformers sets, and the globals of the environment.
const RESERVED_VARIABLES: [&str; 19] = [
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_assistant_tokens_mask",
    "raise_exception",
    "strftime_now",
    "range",
    "dict",
    "namespace",
    "cycler",
    "joiner",
    "loop",
    "self",
    "caller",
    "tools",
    "documents",
];

/// A template and a tokenizer, which turn conversations into tokens.
#[derive(Debug)]
pub struct ChatEncoder {
    core: Arc<EncoderCore>,
    tokenizer: Tokenizer,
}

/// The part of an encoder that is shared with the threads of the sandbox.
#[derive(Debug)]
pub(super) struct EncoderCore {
    pub(super) template: ChatTemplate,
    specials: SpecialTokens,
    /// Whether the template handles content that is a list of parts, by role and by whether there are tools. A probe is
    /// rendered once for each of them.
    handles_parts: Mutex<HashMap<(String, bool), bool>>,
}

/// Tokens, and the weight of each in the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedTokens {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// The weight of each token: that of its turn for what the assistant writes, 0 for everything else.
    pub weights: Vec<f32>,
    /// Fields with a value that neither the template nor the reader of records uses: those of the record by their name, those
    /// of its messages as `messages[].NAME`.
    pub unread: Vec<String>,
    /// Fields of the record that the template uses as variables; without `tools` and `documents`.
    pub given: Vec<String>,
}

/// The tokens of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatPrompt {
    /// The tokens, which end where the assistant starts to write.
    pub tokens: Vec<u32>,
    /// Fields with a value that the template does not use: those of the request by their name, those of its messages as
    /// `messages[].NAME`.
    pub unread: Vec<String>,
}

/// The fields of a record, by how they are used.
struct Variables {
    /// Variables of the template.
    values: Map<String, Value>,
    /// See [`WeightedTokens::given`].
    used: Vec<String>,
    /// See [`WeightedTokens::unread`].
    ignored: Vec<String>,
}

impl ChatEncoder {
    /// An encoder that renders with `template` and encodes with `tokenizer`.
    pub fn new(template: ChatTemplate, tokenizer: Tokenizer) -> Self {
        let specials = SpecialTokens::new(&tokenizer);
        Self { core: Arc::new(EncoderCore { template, specials, handles_parts: Mutex::default() }), tokenizer }
    }

    /// The template that renders the conversations.
    pub fn template(&self) -> &ChatTemplate {
        &self.core.template
    }

    /// The tokens of messages; with `add_generation_prompt` they end where the assistant starts to write.
    ///
    /// A special token that a message spells is encoded as text.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`], and [`ChatError::Tokenizer`] for a text that the tokenizer cannot encode.
    pub fn tokens(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>, ChatError> {
        let input = self.core.template_input(messages.iter(), Map::new())?;
        let text = self.core.template.render_input(&input, &input.values, add_generation_prompt, ["", ""])?;
        let mut tokens = Vec::new();
        self.core.specials.encode(&self.tokenizer, &text, &mut tokens)?;
        Ok(tokens)
    }

    /// The prompt for an answer to messages, with `tools`, `documents` and `chat_template_kwargs` in `fields`.
    ///
    /// A special token that a message or a field spells is encoded as text.
    ///
    /// # Errors
    ///
    /// Those of [`tokens`](Self::tokens), and [`ChatError::Conversation`] for a field that is not as the template expects it.
    pub fn prompt(&self, messages: &[Message], fields: &Map<String, Value>) -> Result<ChatPrompt, ChatError> {
        let Variables { values, ignored: mut unread, .. } = self.core.variables(fields)?;
        let template = self.core.template.variant_for_tools(!values["tools"].is_null());
        let input = self.core.template_input(messages.iter(), values)?;
        let text = template.render_input(&input, &input.values, true, ["", ""])?;
        let turns: Vec<Turn> = messages.iter().map(|message| Turn::new(message.clone(), 1.0)).collect();
        unread.extend(ignored_message_fields(&turns, &input)?);
        let mut tokens = Vec::new();
        self.core.specials.encode(&self.tokenizer, &text, &mut tokens)?;
        Ok(ChatPrompt { tokens, unread })
    }

    /// Parses a record in any [format](Conversation), with the roles that the template knows.
    ///
    /// # Errors
    ///
    /// Those of [`Conversation::parse`].
    pub fn parse(&self, record: &[u8]) -> Result<Conversation, ChatError> {
        Ok(Conversation::parse(record, |name| self.core.template.knows_role(name))?)
    }

    /// The tokens of a conversation with a weight for each: that of the turn for what the assistant writes, including its
    /// reasoning, tool calls and the special token at the end; 0 for everything else.
    ///
    /// The text is cut at the ends of the learned spans before it is encoded. The tokens before a span are therefore those
    /// that the model is given at inference, and no token crosses the boundary (such as two line breaks that are one token).
    ///
    /// # Errors
    ///
    /// [`ChatError::RenderFailed`] if the template fails, [`ChatError::AssistantSpanNotFound`] and
    /// [`ChatError::TooManyTurns`] if the assistant's text is not found in its output, [`ChatError::Tokenizer`] for a
    /// text that the tokenizer cannot encode, [`ChatError::Conversation`] for a tool call that the template does not write.
    pub fn weighted_tokens(&self, conversation: &Conversation) -> Result<WeightedTokens, ChatError> {
        let turns = &conversation.turns;
        let Variables { values: variables, used, mut ignored } = self.core.variables(&conversation.fields)?;
        let tools = !variables["tools"].is_null();
        let messages = turns.iter().map(|turn| &turn.message);
        let input = Arc::new(self.core.template_input(messages, variables)?);
        // All renderings are one job of the sandbox: switching threads takes longer than most of them.
        let (core, job_input) = (self.core.clone(), input.clone());
        let found = sandbox::run(input.budget.time(), move || core.span_finder(tools).spans(&job_input));
        let found = found.map_err(|overrun| self.core.template.variant_for_tools(tools).overrun(overrun)).flatten();
        let ignored_message_fields = || ignored_message_fields(turns, &input);
        let (text, spans) = match found {
            // The cause may be a tool call that the template does not write, which is the better error.
            Err(error @ ChatError::AssistantSpanNotFound { .. }) => {
                return Err(ignored_message_fields().err().unwrap_or(error));
            }
            found => found?,
        };
        ignored.extend(ignored_message_fields()?);
        let mut result = WeightedTokens { tokens: Vec::new(), weights: Vec::new(), unread: ignored, given: used };
        let mut add = |text: &str, weight: f32| -> Result<(), ChatError> {
            self.core.specials.encode(&self.tokenizer, text, &mut result.tokens)?;
            result.weights.resize(result.tokens.len(), weight);
            Ok(())
        };
        let weights: Vec<f32> =
            turns.iter().filter(|turn| turn.message.role() == "assistant").map(|turn| turn.weight).collect();
        // A block does not identify its turn, which matters only if the turns have different weights.
        if spans.len() != weights.len() && weights.iter().any(|weight| *weight != weights[0]) {
            return Err(ChatError::GenerationBlocks { blocks: spans.len(), turns: weights.len() });
        }
        let mut end = 0;
        for (index, span) in spans.into_iter().enumerate() {
            add(&text[end..span.start], 0.0)?;
            add(&text[span.clone()], weights.get(index).or(weights.first()).copied().unwrap_or_default())?;
            end = span.end;
        }
        add(&text[end..], 0.0)?;
        Ok(result)
    }

    /// The token that ends an answer (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`), at which a model that was trained with the
    /// template stops. `None` if the template does not write an added token there, special or not.
    pub fn end_token(&self) -> Option<u32> {
        let turn = |role: &str, weight| Turn::new(Message::new(role, "x"), weight);
        let turns = vec![turn("user", 0.0), turn("assistant", 1.0)];
        let WeightedTokens { tokens, weights, .. } = self.weighted_tokens(&Conversation::from(turns)).ok()?;
        let last = weights.iter().rposition(|&weight| weight > 0.0)?;
        Some(tokens[last]).filter(|&token| self.tokenizer.is_added(token))
    }

    #[cfg(test)]
    pub(super) fn core(&self) -> &EncoderCore {
        &self.core
    }
}

/// The fields of messages that have a value and were not read by the template.
///
/// # Errors
///
/// [`ConversationError::UnwrittenField`] for an assistant message without content whose other fields were not read.
fn ignored_message_fields(turns: &[Turn], input: &TemplateInput) -> Result<Vec<String>, ChatError> {
    let is_read = |name: &str| match REASONING_FIELDS.contains(&name) {
        // The reasoning is in the input under all of these names.
        true => REASONING_FIELDS.iter().any(|name| input.usage.is_read(name)),
        false => input.usage.is_read(name),
    };
    let mut ignored = BTreeSet::new();
    for (index, turn) in turns.iter().enumerate() {
        let fields = turn.message.fields();
        let for_template = |(name, value): &(&String, &Value)| !is_read_here(name) && !is_empty_value(value);
        let unread = fields.iter().filter(for_template).map(|(name, _)| name).filter(|name| !is_read(name));
        ignored.extend(unread.map(|name| format!("messages[].{name}")));
        // A turn whose only value is one that the template does not write would be learned as an empty answer.
        let is_blank = fields.get("content").is_none_or(|content| match content {
            Value::String(text) => text.trim().is_empty(),
            content => is_empty_value(content),
        });
        let in_place_of_content = fields
            .iter()
            .filter(for_template)
            .map(|(name, _)| name)
            .filter(|name| !["id", "name"].contains(&name.as_str()));
        if is_blank
            && turn.message.role() == "assistant"
            && !in_place_of_content.clone().any(|name| is_read(name))
            && let Some(field) = in_place_of_content.clone().next().cloned()
        {
            return Err(ConversationError::UnwrittenField { message: index + 1, field }.into());
        }
    }
    Ok(ignored.into_iter().collect())
}

impl EncoderCore {
    /// The messages in the form that the template gets: with their reasoning under each name for it, with lists of text parts
    /// joined if the template does not handle lists, and escaped.
    pub(super) fn template_input<'a>(
        &self,
        messages: impl Iterator<Item = &'a Message>,
        variables: Map<String, Value>,
    ) -> Result<TemplateInput, ChatError> {
        let tools = variables.get("tools").is_some_and(|tools| !tools.is_null());
        let mut prepared = Vec::new();
        for message in messages {
            let mut fields = message.fields().clone();
            if let Some(Value::Array(parts)) = fields.get("content")
                && let Some(text) = join_text_parts(parts)
                && !self.handles_parts(message.role(), tools)
            {
                fields.insert("content".into(), text.into());
            }
            prepared.push(self.specials.escape_map(with_reasoning(fields))?);
        }
        Ok(TemplateInput::new(prepared, self.specials.escape_map(variables)?))
    }

    /// The variables that the fields of a record set.
    fn variables(&self, fields: &Map<String, Value>) -> Result<Variables, ChatError> {
        let mut values = Map::new();
        let mut used = Vec::new();
        let mut ignored = Vec::new();
        let tools = fields.get("tools").cloned().unwrap_or_default();
        let template = self.template.variant_for_tools(!tools.is_null());
        let documents = fields.get("documents").filter(|_| template.uses_variable("documents"));
        if documents.is_some_and(|list| list.as_array().is_none_or(|list| !list.iter().all(Value::is_object))) {
            let problem = "is not a list of objects".into();
            return Err(ConversationError::Message { place: "documents".into(), problem }.into());
        }
        for (name, value) in fields {
            let is_used = template.uses_variable(name);
            match name.as_str() {
                "chat_template_kwargs" => {
                    let Value::Object(kwargs) = value else {
                        let (place, problem) = ("chat_template_kwargs".into(), "is not an object".into());
                        return Err(ConversationError::Message { place, problem }.into());
                    };
                    for (name, value) in kwargs.iter().filter(|(_, value)| !value.is_null()) {
                        let is_reserved = RESERVED_VARIABLES.contains(&name.as_str())
                            || is_token_variable(name)
                            || name.starts_with("moonlight_");
                        if is_reserved {
                            return Err(ConversationError::ReservedVariable { name: name.clone() }.into());
                        }
                        match template.uses_variable(name) {
                            true => drop(values.insert(name.clone(), value.clone())),
                            false => ignored.push(format!("chat_template_kwargs.{name}")),
                        }
                    }
                }
                "tools" | "documents" if is_used => {}
                _ if is_used && !RESERVED_VARIABLES.contains(&name.as_str()) && !is_token_variable(name) => {
                    values.entry(name.clone()).or_insert_with(|| value.clone());
                    used.push(name.clone());
                }
                _ if is_empty_value(value) => {}
                _ => ignored.push(name.clone()),
            }
        }
        values.insert("tools".into(), tools);
        values.insert("documents".into(), documents.cloned().unwrap_or_default());
        Ok(Variables { values, used, ignored })
    }

    /// Whether the template writes the parts of content that is a list, rather than printing the list itself.
    fn handles_parts(&self, role: &str, tools: bool) -> bool {
        let key = (role.to_owned(), tools);
        let known = || self.handles_parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&handles) = known().get(&key) {
            return handles;
        }
        const PROBE: &str = "moonlightprobe";
        let template = self.template.variant_for_tools(tools);
        let message = |role: &str, content: Value| {
            Message::from_fields(Map::from_iter([("role".into(), role.into()), ("content".into(), content)]))
        };
        let rendered = |content: Value| -> Option<String> {
            let probed = message(role, content)?;
            let messages = match role {
                "user" => vec![probed],
                "system" | "developer" => vec![probed, Message::new("user", "x")],
                _ => vec![Message::new("user", "x"), probed],
            };
            template.render(&messages, false).ok()
        };
        let list_output = rendered(json!([{"type": "text", "text": PROBE}]));
        let handles = match (list_output, rendered(PROBE.into())) {
            (Some(parts), Some(text)) => {
                // `'type'` or `"type"` in the output is from a list that was printed, as Python or as JSON.
                parts == text || (parts.contains(PROBE) && !parts.contains("'type'") && !parts.contains("\"type\""))
            }
            (None, Some(_)) => false,
            // The template renders neither: its own error is the one to report.
            _ => true,
        };
        known().insert(key, handles);
        handles
    }

    /// The finder of spans in the output of the template for conversations with tools, or without.
    fn span_finder(&self, tools: bool) -> SpanFinder<'_> {
        SpanFinder { template: self.template.variant_for_tools(tools), specials: &self.specials }
    }

    #[cfg(test)]
    pub(super) fn finder(&self) -> SpanFinder<'_> {
        self.span_finder(false)
    }
}

/// Whether a variable is `bos_token`, `eos_token` or the like.
fn is_token_variable(name: &str) -> bool {
    name.ends_with("_token")
}

/// The joined text of parts; `None` if a part is not text.
fn join_text_parts(parts: &[Value]) -> Option<String> {
    let text = |part: &Value| match part {
        Value::String(text) => Some(text.clone()),
        part if part["type"] == "text" => part["text"].as_str().map(str::to_owned),
        _ => None,
    };
    parts.iter().map(text).collect()
}
