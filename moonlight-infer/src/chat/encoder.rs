//! From the text of a template to tokens: what the template spells is special, what people say is not.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::{Map, Value, json};

use super::conversation::{is_empty_value, is_read_here};
use super::template_input::{TemplateInput, REASONING_FIELDS, with_reasoning};
use super::{ChatError, ChatTemplate, Conversation, ConversationError, Message, Turn, sandbox};
use crate::tokenizer::{Piece, Tokenizer};

/// Characters of a private-use plane. The `n`th replaces the `n`th special token where a message spells it, so that the
/// template may cut and trim the message as it likes, and the text is still distinguished from the template's own tokens.
const FIRST_PLACEHOLDER: u32 = 0x10_0000;
const MAX_PLACEHOLDERS: usize = 0xFFF0;

/// In a text by people, characters of the private-use plane before it stand for those that stand for something here: the same
/// ones from this on, and behind it the marks. No font that we know has anything there.
const FIRST_ESCAPED: u32 = 0xF_8000;
const ESCAPED_COUNT: u32 = 0x7F00;
const FIRST_ESCAPED_MARK: u32 = 0xF_FF00;

/// The last characters of the same plane mark the ends of the assistant's words.
pub(super) const MARKS: [char; 2] = ['\u{10FFFA}', '\u{10FFFB}'];
/// And these number them.
pub(super) const MARK_DIGITS: [char; 8] =
    ['\u{10FFF0}', '\u{10FFF1}', '\u{10FFF2}', '\u{10FFF3}', '\u{10FFF4}', '\u{10FFF5}', '\u{10FFF6}', '\u{10FFF7}'];

/// Variables that a record cannot set: transformers' own, and what the environment has.
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

/// A template and a tokenizer that turn conversations into tokens.
#[derive(Debug)]
pub struct ChatEncoder {
    core: Arc<EncoderCore>,
    tokenizer: Tokenizer,
}

/// What finds the assistant's words in a text, on a thread of the sandbox.
#[derive(Debug)]
pub(super) struct EncoderCore {
    pub(super) template: ChatTemplate,
    specials: SpecialTokens,
    /// Whether the template writes the parts of a list that is the content of a message of a role; asked once.
    takes_parts: Mutex<HashMap<(String, bool), bool>>,
}

/// Tokens, and how much each counts in the loss when it is predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedTokens {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// A weight for each; 0 for what is given and not learned.
    pub weights: Vec<f32>,
    /// Fields of the record, and `messages[].NAME` of its messages, that hold something and that neither the template nor
    /// the reader of records has read.
    pub unread: Vec<String>,
    /// Fields of the record that the template was given as variables, as it names them; not `tools` and `documents`.
    pub given: Vec<String>,
}

/// What becomes of the fields of a record.
struct Variables {
    /// What the template is given beside the messages.
    values: Map<String, Value>,
    /// Those of the fields that it names and that are not there for templates alone.
    given: Vec<String>,
    unread: Vec<String>,
}

impl ChatEncoder {
    /// Prepares the search for special tokens, which is kept.
    pub fn new(template: ChatTemplate, tokenizer: Tokenizer) -> Self {
        let specials = SpecialTokens::new(&tokenizer);
        Self { core: Arc::new(EncoderCore { template, specials, takes_parts: Mutex::default() }), tokenizer }
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.core.template
    }

    /// The tokens of messages; with `add_generation_prompt` they end where the assistant begins to speak.
    ///
    /// Words of a message that spell a special token are encoded as the text that they are.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`], and [`ChatError::Tokenizer`] for a text without tokens.
    pub fn tokens(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>, ChatError> {
        let given = self.core.given(messages.iter(), Map::new())?;
        let text = self.core.template.render_input(&given, &given.values, add_generation_prompt, ["", ""])?;
        let mut tokens = Vec::new();
        self.core.specials.encode(&self.tokenizer, &text, &mut tokens)?;
        Ok(tokens)
    }

    /// Reads a line of JSONL in any of the shapes that [`Conversation`] knows.
    ///
    /// # Errors
    ///
    /// Those of [`Conversation::parse`].
    pub fn parse(&self, line: &[u8]) -> Result<Conversation, ChatError> {
        Ok(Conversation::parse(line, |name| self.core.template.knows_role(name))?)
    }

    /// The tokens of a conversation with a weight for each: the turn's for the assistant's words and the special token
    /// that ends them, 0 for everything else. Its words are all that the template writes for the turn after the prompt for
    /// it: what it thinks and the tools that it calls included.
    ///
    /// Where the assistant begins to speak the text is cut before it is encoded, so that the tokens before are those
    /// that the model is given when it speaks itself; a token that would cross the cut (two line breaks that would be
    /// one token) never does.
    ///
    /// # Errors
    ///
    /// [`ChatError::RenderFailed`] where the template fails, [`ChatError::AssistantSpanNotFound`] and [`ChatError::TooManyTurns`] where the
    /// assistant's words cannot be found in what it makes, [`ChatError::Tokenizer`] for a text without tokens,
    /// [`ChatError::Conversation`] for a call that the template does not write.
    pub fn weighted_tokens(&self, conversation: &Conversation) -> Result<WeightedTokens, ChatError> {
        let turns = &conversation.turns;
        let Variables { values: variables, given: named, mut unread } = self.core.variables(&conversation.fields)?;
        let tools = !variables["tools"].is_null();
        let messages = turns.iter().map(|turn| &turn.message);
        let given = Arc::new(self.core.given(messages, variables)?);
        // All renderings are one job of the sandbox.
        let (core, of_job) = (self.core.clone(), given.clone());
        let found = sandbox::run(given.budget.time(), move || core.variant_for_tools(tools).spans(&of_job));
        let found = found.map_err(|overrun| self.core.template.variant_for_tools(tools).overrun(overrun)).flatten();
        let unread_of_messages = || unread_of_messages(turns, &given);
        let (text, spans) = match found {
            // Words that are not written may be the fault of a call that the template does not read.
            Err(error @ ChatError::AssistantSpanNotFound { .. }) => return Err(unread_of_messages().err().unwrap_or(error)),
            found => found?,
        };
        unread.extend(unread_of_messages()?);
        let mut result = WeightedTokens { tokens: Vec::new(), weights: Vec::new(), unread, given: named };
        let mut add = |text: &str, weight: f32| -> Result<(), ChatError> {
            self.core.specials.encode(&self.tokenizer, text, &mut result.tokens)?;
            result.weights.resize(result.tokens.len(), weight);
            Ok(())
        };
        let weights: Vec<f32> =
            turns.iter().filter(|turn| turn.message.role() == "assistant").map(|turn| turn.weight).collect();
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

    /// The token that ends what the assistant says, where the template writes an added one there (`<|im_end|>`,
    /// `<|eot_id|>`, `<end_of_turn>`), be it special or not: a model that was taught by it should stop there.
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

/// Fields of messages that hold something and that nobody has read.
fn unread_of_messages(turns: &[Turn], given: &TemplateInput) -> Result<Vec<String>, ChatError> {
    let is_read = |name: &str| match REASONING_FIELDS.contains(&name) {
        // They are given under each other's names.
        true => REASONING_FIELDS.iter().any(|name| given.names.is_read(name)),
        false => given.names.is_read(name),
    };
    let mut unread = BTreeSet::new();
    for (index, turn) in turns.iter().enumerate() {
        let fields = turn.message.fields();
        let of_use = |(name, value): &(&String, &Value)| !is_read_here(name) && !is_empty_value(value);
        let missed = fields.iter().filter(of_use).map(|(name, _)| name).filter(|name| !is_read(name));
        unread.extend(missed.clone().map(|name| format!("messages[].{name}")));
        // A turn that says nothing, but for what is not written, would be learned as an empty answer.
        let says_nothing = fields.get("content").is_none_or(|content| match content {
            Value::String(text) => text.trim().is_empty(),
            content => is_empty_value(content),
        });
        let calls =
            fields.iter().filter(of_use).map(|(name, _)| name).filter(|name| !["id", "name"].contains(&name.as_str()));
        if says_nothing
            && turn.message.role() == "assistant"
            && !calls.clone().any(|name| is_read(name))
            && let Some(field) = calls.clone().next().cloned()
        {
            return Err(ConversationError::UnwrittenField { message: index + 1, field }.into());
        }
    }
    Ok(unread.into_iter().collect())
}

impl EncoderCore {
    /// The messages as templates are given them: with their reasoning under each of its names, with parts joined where the
    /// template takes none, and in disguise.
    pub(super) fn given<'a>(
        &self,
        messages: impl Iterator<Item = &'a Message>,
        variables: Map<String, Value>,
    ) -> Result<TemplateInput, ChatError> {
        let tools = variables.get("tools").is_some_and(|tools| !tools.is_null());
        let mut given = Vec::new();
        for message in messages {
            let mut fields = message.fields().clone();
            if let Some(Value::Array(parts)) = fields.get("content")
                && let Some(join_text_parts) = join_text_parts(parts)
                && !self.takes_parts(message.role(), tools)
            {
                fields.insert("content".into(), join_text_parts.into());
            }
            given.push(self.specials.escape_map(with_reasoning(fields))?);
        }
        Ok(TemplateInput::new(given, self.specials.escape_map(variables)?))
    }

    /// The variables of a record.
    fn variables(&self, fields: &Map<String, Value>) -> Result<Variables, ChatError> {
        let mut variables = Map::new();
        let mut given_fields = Vec::new();
        let mut unread = Vec::new();
        let tools = fields.get("tools").cloned().unwrap_or_default();
        let template = self.template.variant_for_tools(!tools.is_null());
        let wrong = |problem: &str| ConversationError::Message {
            place: "chat_template_kwargs".into(),
            problem: problem.into(),
        };
        let documents = fields.get("documents").filter(|_| template.uses_variable("documents"));
        if documents.is_some_and(|list| list.as_array().is_none_or(|list| !list.iter().all(Value::is_object))) {
            let problem = "is not a list of documents, each a map".into();
            return Err(ConversationError::Message { place: "documents".into(), problem }.into());
        }
        for (name, value) in fields {
            let named = template.uses_variable(name);
            match name.as_str() {
                "chat_template_kwargs" => {
                    let Value::Object(given) = value else { return Err(wrong("is not a map of variables").into()) };
                    for (name, value) in given.iter().filter(|(_, value)| !value.is_null()) {
                        if RESERVED_VARIABLES.contains(&name.as_str()) || is_token_variable(name) || name.starts_with("moonlight_")
                        {
                            return Err(ConversationError::ReservedVariable { name: name.clone() }.into());
                        }
                        match template.uses_variable(name) {
                            true => drop(variables.insert(name.clone(), value.clone())),
                            false => unread.push(format!("chat_template_kwargs.{name}")),
                        }
                    }
                }
                "tools" | "documents" if named => {}
                _ if named && !RESERVED_VARIABLES.contains(&name.as_str()) && !is_token_variable(name) => {
                    variables.entry(name.clone()).or_insert_with(|| value.clone());
                    given_fields.push(name.clone());
                }
                _ if is_empty_value(value) => {}
                _ => unread.push(name.clone()),
            }
        }
        variables.insert("tools".into(), tools);
        variables.insert("documents".into(), documents.cloned().unwrap_or_default());
        Ok(Variables { values: variables, given: given_fields, unread })
    }

    /// Whether the template writes the parts of a content that is a list; else it would print the list.
    fn takes_parts(&self, role: &str, tools: bool) -> bool {
        let key = (role.to_owned(), tools);
        let known = || self.takes_parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&takes) = known().get(&key) {
            return takes;
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
        let of_parts = rendered(json!([{"type": "text", "text": PROBE}]));
        // Where neither goes it is the template's to say what is wrong.
        let takes = match (of_parts, rendered(PROBE.into())) {
            (Some(parts), Some(text)) => {
                parts == text || (parts.contains(PROBE) && !parts.contains("'type'") && !parts.contains("\"type\""))
            }
            (None, Some(_)) => false,
            _ => true,
        };
        known().insert(key, takes);
        takes
    }

    /// What finds the words in what the template for tools makes, or the other.
    fn variant_for_tools(&self, tools: bool) -> SpanFinder<'_> {
        SpanFinder { template: self.template.variant_for_tools(tools), specials: &self.specials }
    }

    #[cfg(test)]
    pub(super) fn finder(&self) -> SpanFinder<'_> {
        self.variant_for_tools(false)
    }
}

/// `bos_token` and the like.
fn is_token_variable(name: &str) -> bool {
    name.ends_with("_token")
}

/// Parts that are all texts as one.
fn join_text_parts(parts: &[Value]) -> Option<String> {
    let text = |part: &Value| match part {
        Value::String(text) => Some(text.clone()),
        part if part["type"] == "text" => part["text"].as_str().map(str::to_owned),
        _ => None,
    };
    parts.iter().map(text).collect()
}

/// A template and the special tokens in its text.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpanFinder<'a> {
    pub(super) template: &'a ChatTemplate,
    specials: &'a SpecialTokens,
}

impl SpanFinder<'_> {
    /// Where the last special token of a text ends, if only white space follows it.
    pub(super) fn end_of_last_special(&self, text: &str) -> Option<usize> {
        let end = self.specials.finder.find_iter(text).last()?.end();
        text[end..].trim().is_empty().then_some(end)
    }

    /// The length of the added token that a text begins with, special or not, white space before it included.
    pub(super) fn special_at_start(&self, text: &str) -> Option<usize> {
        let white = text.len() - text.trim_start().len();
        let found = self.specials.added.find(&text[white..])?;
        (found.start() == 0).then_some(white + found.end())
    }

    /// The first special token of a text.
    pub(super) fn first_special(&self, text: &str) -> Option<Range<usize>> {
        Some(self.specials.finder.find(text)?.range())
    }

    /// Where the added token of a text begins that a place lies in.
    pub(super) fn start_of_special_at(&self, text: &str, place: usize) -> Option<usize> {
        let mut found = self.specials.added.find_iter(text).take_while(|found| found.start() < place);
        found.find(|found| place < found.end()).map(|found| found.start())
    }
}

/// The special tokens of a tokenizer, to be found in texts.
#[derive(Debug)]
struct SpecialTokens {
    names: Vec<(String, u32)>,
    finder: AhoCorasick,
    /// Those that are not special as well.
    added: AhoCorasick,
}

impl SpecialTokens {
    fn new(tokenizer: &Tokenizer) -> Self {
        let mut names = tokenizer.specials();
        // One without a text would be found everywhere.
        names.retain(|(name, _)| !name.is_empty());
        names.truncate(MAX_PLACEHOLDERS);
        let finder = |names: Vec<&str>| {
            let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(names);
            finder.expect("a few hundred short names are no load for the automaton")
        };
        let added = finder(tokenizer.added_texts().take(MAX_PLACEHOLDERS).collect());
        Self { finder: finder(names.iter().map(|(name, _)| name.as_str()).collect()), added, names }
    }

    /// All that people wrote in a map, at any depth, keys included.
    fn escape_map(&self, map: Map<String, Value>) -> Result<Map<String, Value>, ConversationError> {
        map.into_iter().map(|(name, value)| Ok((self.escape(&name)?, self.escape_value(value)?))).collect()
    }

    fn escape_value(&self, value: Value) -> Result<Value, ConversationError> {
        Ok(match value {
            Value::String(text) => self.escape(&text)?.into(),
            Value::Array(items) => items.into_iter().map(|item| self.escape_value(item)).collect::<Result<_, _>>()?,
            Value::Object(map) => Value::Object(self.escape_map(map)?),
            value => value,
        })
    }

    /// Whether a character is a stand-in or a mark.
    fn is_reserved(&self, character: char) -> bool {
        self.placeholder_index(character).is_some() || MARKS.contains(&character) || MARK_DIGITS.contains(&character)
    }

    /// The character that stands for a stand-in or a mark that somebody wrote.
    fn escape_reserved(&self, character: char) -> Option<char> {
        match self.placeholder_index(character) {
            Some(index) => {
                u32::try_from(index).ok().filter(|&index| index < ESCAPED_COUNT).map(|index| FIRST_ESCAPED + index)
            }
            None => Some(FIRST_ESCAPED_MARK + (u32::from(character) & 0xFF)),
        }
        .and_then(char::from_u32)
    }

    /// The stand-in or the mark that such a character stands for.
    fn unescape_reserved(&self, character: char) -> Option<char> {
        let number = u32::from(character);
        let ours = match number {
            FIRST_ESCAPED..FIRST_ESCAPED_MARK => FIRST_PLACEHOLDER + (number - FIRST_ESCAPED),
            FIRST_ESCAPED_MARK..FIRST_PLACEHOLDER => 0x10_FF00 + (number - FIRST_ESCAPED_MARK),
            _ => return None,
        };
        char::from_u32(ours).filter(|&ours| self.is_reserved(ours))
    }

    /// Words with a stand-in for each special token that they spell, and with another character for a stand-in or a mark
    /// that somebody wrote. What cannot be told from it is refused.
    fn escape(&self, words: &str) -> Result<String, ConversationError> {
        // Nearly all words have none.
        let is_private = |character: char| u32::from(character) >= FIRST_ESCAPED;
        let words = match words.contains(is_private) {
            false => Cow::Borrowed(words),
            true => {
                let told = |character: char| match self.is_reserved(character) {
                    true => self.escape_reserved(character).ok_or(character),
                    false if self.unescape_reserved(character).is_some() => Err(character),
                    false => Ok(character),
                };
                let told: Result<String, char> = words.chars().map(told).collect();
                Cow::Owned(told.map_err(|character| ConversationError::ReservedCharacter { character })?)
            }
        };
        let words = words.as_ref();
        let mut escape_value = String::with_capacity(words.len());
        let mut end = 0;
        for found in self.finder.find_iter(words) {
            escape_value.push_str(&words[end..found.start()]);
            escape_value.extend(char::from_u32(FIRST_PLACEHOLDER + found.pattern().as_u32()));
            end = found.end();
        }
        escape_value.push_str(&words[end..]);
        Ok(escape_value)
    }

    fn placeholder_index(&self, character: char) -> Option<usize> {
        let index = u32::from(character).checked_sub(FIRST_PLACEHOLDER)? as usize;
        (index < self.names.len()).then_some(index)
    }

    fn encode(&self, tokenizer: &Tokenizer, text: &str, tokens: &mut Vec<u32>) -> Result<(), ChatError> {
        let ordinary = |text: &str, tokens: &mut Vec<u32>| -> Result<(), ChatError> {
            if !text.is_empty() {
                let words = self.unescape(text);
                let first = tokens.is_empty();
                tokens.extend(if first { tokenizer.encode(&words)? } else { tokenizer.encode_continuation(&words)? });
            }
            Ok(())
        };
        for piece in tokenizer.split_special(text) {
            match piece {
                Piece::Text(text) => ordinary(text, tokens)?,
                Piece::Token(token) => tokens.push(token),
            }
        }
        Ok(())
    }

    /// The words as they were.
    fn unescape(&self, text: &str) -> String {
        let mut words = String::with_capacity(text.len());
        for character in text.chars() {
            match self.placeholder_index(character) {
                Some(index) => words.push_str(&self.names[index].0),
                None => words.push(self.unescape_reserved(character).unwrap_or(character)),
            }
        }
        words
    }
}
