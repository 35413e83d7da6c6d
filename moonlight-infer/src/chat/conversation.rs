//! Conversations as data sets store them: one [record](crate::records) in any of four formats.
//!
//! | format | a record |
//! |---|---|
//! | OpenAI's | `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 0}]}` |
//! | ShareGPT's | `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}` |
//! | TRL's | `{"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}` |
//! | Alpaca's | `{"instruction": "...", "input": "...", "output": "..."}` |
//!
//! The first of these keys with a value decides the format. A null counts as an absent key, because a row of a table has a
//! null for each column that only other rows use. Messages keep all their fields. The other fields of the record (`tools`,
//! `documents`, `chat_template_kwargs`) become variables of the template. Fields that nothing reads are reported in
//! [`WeightedTokens::unread`](super::WeightedTokens::unread).
//!
//! ShareGPT records are converted to OpenAI's format as LLaMA-Factory does it: `function_call` becomes an assistant turn with
//! `tool_calls`, `observation` a `tool` turn, and `system` the first message; bare functions in `tools` are wrapped.

use serde_json::{Map, Value, json};

use super::error::THE_RECORD;
use super::template_input::REASONING_FIELDS;
use super::{ConversationError, Message};
use crate::records::parse;

/// The format of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConversationFormat {
    /// `messages` of `role` and `content`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `instruction` and `output`; optional `input`, `system` and `history`.
    Alpaca,
    /// `prompt` and `completion`, two lists of messages; only the completion is learned.
    PromptCompletion,
}

impl std::fmt::Display for ConversationFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Messages => "`messages` (OpenAI)",
            Self::ShareGpt => "`conversations` (ShareGPT)",
            Self::Alpaca => "`instruction` (Alpaca)",
            Self::PromptCompletion => "`prompt` and `completion` (TRL)",
        })
    }
}

/// A message and its weight in the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Role, content and further fields.
    pub message: Message,
    /// The non-negative factor on the loss of each token of the message. 1 unless the record sets it; 0 for every role except
    /// `assistant`.
    pub weight: f32,
}

impl Turn {
    /// A message with `weight` if it is the assistant's, otherwise with 0.
    pub fn new(message: Message, weight: f32) -> Self {
        let weight = if message.role() == "assistant" { weight } else { 0.0 };
        Self { message, weight }
    }

    fn from_text(role: &str, content: impl Into<String>, weight: f32) -> Self {
        Self::new(Message::new(role, content), weight)
    }
}

/// A parsed record.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The format of the record.
    pub format: ConversationFormat,
    /// The messages, in order.
    pub turns: Vec<Turn>,
    /// The other fields of the record: `tools`, variables of the template, and fields that the template may not use.
    pub fields: Map<String, Value>,
}

/// Fields that set the weight of a message, in this order: OpenAI's, two of axolotl's, LoongForge's and ms-swift's.
const WEIGHT_FIELDS: [&str; 5] = ["weight", "train", "training", "loss_mask", "loss"];
/// axolotl's fields that select ranges of characters of a message.
const WEIGHT_DETAIL_FIELDS: [&str; 2] = ["train_detail", "training_detail"];
/// Types of content parts that have no text.
const MEDIA_PART_TYPES: [&str; 10] = [
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "file",
    "input_file",
];

/// Whether this module uses the field of a message, so that the field counts as read even if the template ignores it.
pub(super) fn is_read_here(field: &str) -> bool {
    ["role", "content", "from", "value"].contains(&field) || WEIGHT_FIELDS.contains(&field)
}

impl From<Vec<Turn>> for Conversation {
    fn from(turns: Vec<Turn>) -> Self {
        Self { format: ConversationFormat::Messages, turns, fields: Map::new() }
    }
}

impl Conversation {
    /// Parses a record. `knows` returns whether the template mentions a role other than `system`, `user` and `assistant`, or
    /// a type of content parts.
    ///
    /// # Errors
    ///
    /// [`ConversationError`]: bytes that are not UTF-8 or not JSON, none of the formats, an unknown role, a message without
    /// content, no message of the assistant, or none with a weight above 0.
    pub fn parse(record: &[u8], knows: impl Fn(&str) -> bool) -> Result<Self, ConversationError> {
        Self::from_json(&parse(record)?.value, knows)
    }

    /// Like [`parse`](Conversation::parse), from parsed JSON.
    ///
    /// # Errors
    ///
    /// As [`parse`](Conversation::parse), except for the first two.
    pub fn from_json(value: &Value, knows: impl Fn(&str) -> bool) -> Result<Self, ConversationError> {
        let Value::Object(record) = value else { return Err(ConversationError::UnknownFormat { keys: Vec::new() }) };
        let mut fields: Map<String, Value> = record
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        // An empty list counts as absent: a table with a column for each format has one in the columns that a row does not
        // use.
        let has = |key: &str| fields.get(key).is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty()));
        if let Some(key) = preference_field(&fields, has("messages")) {
            return Err(ConversationError::Preference { key });
        }
        let weight = record_weight(&fields)?;
        let (format, mut turns) = if has("messages") {
            (ConversationFormat::Messages, take_messages(&mut fields, "messages", &knows)?)
        } else if has("conversations") {
            (ConversationFormat::ShareGpt, take_messages(&mut fields, "conversations", &knows)?)
        } else if has("prompt") && has("completion") {
            (ConversationFormat::PromptCompletion, prompt_and_completion(&mut fields, &knows)?)
        } else if has("instruction") {
            (ConversationFormat::Alpaca, alpaca(&mut fields)?)
        } else if fields.contains_key("messages") || fields.contains_key("conversations") {
            // The list is empty: the format is known, and only the messages are missing.
            return Err(ConversationError::NoAssistant);
        } else {
            return Err(ConversationError::UnknownFormat { keys: fields.keys().cloned().collect() });
        };
        if let Some(weight) = weight {
            turns.iter_mut().for_each(|turn| turn.weight *= weight);
            fields.retain(|key, value| !sets_record_weight(key, value));
        }
        if let Some(Value::String(system)) = fields.get("system")
            && turns.first().is_none_or(|turn| turn.message.role() != "system")
        {
            if !system.is_empty() {
                turns.insert(0, Turn::from_text("system", system.as_str(), 0.0));
            }
            fields.shift_remove("system");
        }
        if let Some(tools) = fields.shift_remove("tools") {
            fields.extend(parse_tools(tools, format)?.map(|tools| ("tools".to_owned(), tools)));
        }
        let mut assistant_turns = turns.iter().filter(|turn| turn.message.role() == "assistant").peekable();
        if assistant_turns.peek().is_none() {
            return Err(ConversationError::NoAssistant);
        }
        if assistant_turns.all(|turn| turn.weight == 0.0) {
            return Err(ConversationError::NothingLearned);
        }
        Ok(Self { format, turns, fields })
    }

    /// The messages without their weights.
    pub fn messages(&self) -> Vec<Message> {
        self.turns.iter().map(|turn| turn.message.clone()).collect()
    }
}

fn invalid(place: impl Into<String>, problem: impl Into<String>) -> ConversationError {
    ConversationError::Message { place: place.into(), problem: problem.into() }
}

/// Removes the field `key` from the record and parses it as messages.
fn take_messages(
    fields: &mut Map<String, Value>,
    key: &str,
    knows: &impl Fn(&str) -> bool,
) -> Result<Vec<Turn>, ConversationError> {
    let Some(Value::Array(messages)) = fields.shift_remove(key) else {
        return Err(invalid(key, "is not a list of messages"));
    };
    let turn = |(index, message)| parse_turn(format!("{key}[{index}]"), message, knows);
    messages.into_iter().enumerate().map(turn).collect()
}

/// The field that makes this a preference record: a better and a worse answer (DPO), or a label of one answer as good or bad
/// (KTO). In a record with `messages`, `chosen` and `rejected` are ignored: the last message is the answer to learn.
fn preference_field(fields: &Map<String, Value>, has_messages: bool) -> Option<&'static str> {
    let has_value = |key: &str| fields.get(key).is_some_and(|value| !is_empty_value(value));
    let is_bool = |key: &str| fields.get(key).is_some_and(Value::is_boolean);
    let dpo_field = || ["chosen", "rejected"].into_iter().find(|key| !has_messages && has_value(key));
    // Only booleans: a `label` of another type is a class or a source, not a preference.
    ["label", "kto_tag"].into_iter().find(|key| is_bool(key)).or_else(dpo_field)
}

/// The messages of TRL's format: those of the prompt with the weight 0, then those of the completion.
fn prompt_and_completion(
    fields: &mut Map<String, Value>,
    knows: &impl Fn(&str) -> bool,
) -> Result<Vec<Turn>, ConversationError> {
    let is_text = |key: &str| fields.get(key).is_some_and(Value::is_string);
    for key in ["prompt", "completion"] {
        if is_text(key) {
            return Err(ConversationError::TextPrompt { key, both: is_text("prompt") && is_text("completion") });
        }
    }
    let mut turns = take_messages(fields, "prompt", knows)?;
    turns.iter_mut().for_each(|turn| turn.weight = 0.0);
    turns.extend(take_messages(fields, "completion", knows)?);
    Ok(turns)
}

/// The role that one of ShareGPT's names stands for; `None` for an unknown role. A role that the template knows is kept, even
/// if it is one of the names that are otherwise replaced, such as `function_call`.
fn normalize_role<'a>(role: &'a str, knows: &impl Fn(&str) -> bool) -> Option<&'a str> {
    Some(match role {
        "human" => "user",
        "gpt" | "chatgpt" | "bot" | "model" => "assistant",
        "system" | "user" | "assistant" => role,
        _ if knows(role) => role,
        "function_call" | "tool_call" => "assistant",
        "observation" | "tool_response" | "function_response" if knows("tool") => "tool",
        _ => return None,
    })
}

fn parse_turn(place: String, message: Value, knows: &impl Fn(&str) -> bool) -> Result<Turn, ConversationError> {
    let Value::Object(mut message) = message else { return Err(invalid(place, "is not a message")) };
    message.retain(|_, value| !value.is_null());
    for (key, other) in [("role", "from"), ("content", "value")] {
        let Some(value) = message.get(other).cloned() else { continue };
        match message.get(key) {
            None => {
                message = message
                    .into_iter()
                    .map(|(name, value)| (if name == other { key.to_owned() } else { name }, value))
                    .collect();
            }
            // Some exports write the same value under both names.
            Some(known) if *known == value => {
                message.shift_remove(other);
            }
            Some(_) => return Err(invalid(place, format!("has both `{key}` and `{other}`, and they differ"))),
        }
    }
    merge_reasoning(&mut message).map_err(|problem| invalid(place.clone(), problem))?;
    let Some(Value::String(written)) = message.get("role") else {
        return Err(invalid(place, "has no `role` (or `from`)"));
    };
    let is_call = ["function_call", "tool_call"].contains(&written.as_str()) && !knows(written);
    let Some(role) = normalize_role(written, knows).map(str::to_owned) else {
        return Err(ConversationError::Role { place, role: written.clone() });
    };
    message.insert("role".into(), Value::String(role.clone()));
    if is_call {
        parse_tool_calls(&mut message).map_err(|problem| invalid(place.clone(), problem))?;
    }
    normalize_tool_calls(&mut message).map_err(|problem| invalid(place.clone(), problem))?;
    check_content(&mut message, &role, knows).map_err(|problem| invalid(place.clone(), problem))?;
    let weight = message_weight(&message, role == "assistant").map_err(|problem| invalid(place, problem))?;
    Ok(Turn::new(Message(message), weight))
}

/// Keeps one of the fields with the reasoning and removes empty ones and copies. The template gets the reasoning under all
/// names that it may read ([`with_reasoning`](super::template_input::with_reasoning)).
fn merge_reasoning(message: &mut Map<String, Value>) -> Result<(), String> {
    let mut found: Option<&str> = None;
    for name in REASONING_FIELDS {
        match (message.get(name).filter(|value| !is_empty_value(value)), found) {
            (None, _) => {}
            (Some(_), None) => found = Some(name),
            (Some(value), Some(first)) if message.get(first) == Some(value) => {}
            (Some(_), Some(first)) => return Err(format!("has both `{first}` and `{name}`, and they differ")),
        }
    }
    if let Some(kept) = found {
        message.retain(|name, _| name == kept || !REASONING_FIELDS.contains(&name.as_str()));
    }
    Ok(())
}

/// Replaces the text of a ShareGPT `function_call` turn by `tool_calls`. The text is a call or a list of calls as JSON,
/// optionally after reasoning in `<think>` tags.
fn parse_tool_calls(message: &mut Map<String, Value>) -> Result<(), String> {
    let Some(Value::String(text)) = message.get("content") else { return Err("has no call".into()) };
    let mut call = text.trim();
    let mut reasoning = None;
    if let Some((inner, rest)) = call.strip_prefix("<think>").and_then(|text| text.split_once("</think>")) {
        (reasoning, call) = (Some(inner.trim().to_owned()), rest.trim());
    }
    let read = parse_json_text(call)
        .ok_or_else(|| "is a call that is not JSON: `{\"name\": \"...\", \"arguments\": {...}}`".to_owned())?;
    let calls = match read {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    if calls.is_empty() || calls.iter().any(|call| !call["name"].is_string()) {
        return Err("has a call without a `name`".into());
    }
    let wrapped: Vec<Value> =
        calls.into_iter().map(|function| json!({"type": "function", "function": function})).collect();
    message.insert("content".into(), "".into());
    if let Some(reasoning) = reasoning {
        message.insert("reasoning_content".into(), reasoning.into());
    }
    message.insert("tool_calls".into(), wrapped.into());
    Ok(())
}

/// The JSON in a string, parsed by the rules for records ([`parse`]).
fn parse_json_text(text: &str) -> Option<Value> {
    parse(text.as_bytes()).ok().map(|parsed| parsed.value)
}

/// Parses `tool_calls` that are a string of JSON, and removes the nulls that tables put into the calls.
fn normalize_tool_calls(message: &mut Map<String, Value>) -> Result<(), String> {
    let Some(calls) = message.get_mut("tool_calls") else { return Ok(()) };
    if let Value::String(text) = calls {
        *calls = match text.trim() {
            "" => Value::Null,
            text => parse_json_text(text).ok_or("has `tool_calls` that are a string and not JSON")?,
        };
    }
    match calls {
        Value::Null => drop(message.shift_remove("tool_calls")),
        Value::Array(calls) => {
            for call in calls {
                let Value::Object(call) = call else { return Err("has `tool_calls` that are not objects".into()) };
                call.retain(|_, value| !value.is_null());
                if let Some(Value::Object(function)) = call.get_mut("function") {
                    function.retain(|_, value| !value.is_null());
                }
            }
        }
        _ => return Err("has `tool_calls` that are not a list".into()),
    }
    Ok(())
}

/// Checks the content: a string, OpenAI's list of parts, or nothing if another field has a value (`tool_calls`). For `tool`
/// and other roles that the template knows, the content may be any JSON: it is whatever a tool returned.
fn check_content(message: &mut Map<String, Value>, role: &str, knows: &impl Fn(&str) -> bool) -> Result<(), String> {
    let is_tool = !["system", "user", "assistant"].contains(&role);
    match message.get_mut("content") {
        Some(Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => {
            for part in parts {
                match part {
                    Value::String(_) => {}
                    Value::Object(part) => {
                        part.retain(|_, value| !value.is_null());
                        match part.get("type").and_then(Value::as_str) {
                            Some("text") if part.get("text").is_some_and(Value::is_string) => {}
                            Some("text") => return Err("has a part without text".into()),
                            Some(kind) if MEDIA_PART_TYPES.contains(&kind) => {
                                return Err(format!("has a part of the type `{kind}`, and only text is supported"));
                            }
                            Some(kind) if knows(kind) || is_tool => {}
                            Some(kind) => {
                                return Err(format!(
                                    "has a part of the type `{kind}`, which the chat template does not mention"
                                ));
                            }
                            None if is_tool => {}
                            None => return Err("has a part without a `type`".into()),
                        }
                    }
                    _ if is_tool => {}
                    _ => return Err("has a part that is not text".into()),
                }
            }
            Ok(())
        }
        Some(_) if is_tool => Ok(()),
        Some(_) => Err("has content that is not text".into()),
        None => {
            let replaces_content = |(name, value): (&String, &Value)| {
                !is_read_here(name) && !matches!(name.as_str(), "id" | "name") && !is_empty_value(value)
            };
            match message.iter().any(replaces_content) {
                true => Ok(()),
                false => Err("has no content".into()),
            }
        }
    }
}

/// Whether a value is null, or has no characters, items or entries. Such a value is not reported as unread.
pub(super) fn is_empty_value(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The weight of a message: the product of the fields that set it.
fn message_weight(message: &Map<String, Value>, is_assistant: bool) -> Result<f32, String> {
    for key in WEIGHT_DETAIL_FIELDS {
        if message.contains_key(key) {
            return Err(format!("has `{key}`, which is not supported: only whole messages have a weight (`train`)"));
        }
    }
    let mut product = 1.0;
    for key in WEIGHT_FIELDS {
        let weight = match message.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Bool(learned)) => f32::from(u8::from(*learned)),
            Some(value) => match value.as_f64() {
                Some(weight) if weight >= 0.0 => match weight as f32 {
                    // Rounding to 0 would silently exclude the message from the loss.
                    0.0 if weight > 0.0 => {
                        return Err(format!("has a `{key}` below the smallest f32 (1.4e-45)"));
                    }
                    weight if weight.is_infinite() => {
                        return Err(format!("has a `{key}` above the largest f32 (3.4e38)"));
                    }
                    weight => weight,
                },
                _ => return Err(format!("has a `{key}` that is not a non-negative number")),
            },
        };
        // `weight` is ignored for other roles. The other fields ask to train on this message, which is refused.
        if !is_assistant && key != "weight" && weight != 0.0 {
            return Err(format!(
                "is marked as learned by `{key}`, and is not the assistant's: only the assistant's text is learned"
            ));
        }
        product *= weight;
    }
    Ok(product)
}

/// Whether a field of the record sets the weight of all its messages. `loss` does so only as a boolean: a number is the loss
/// of some model on the record.
fn sets_record_weight(key: &str, value: &Value) -> bool {
    WEIGHT_FIELDS.contains(&key) && (key != "loss" || value.is_boolean())
}

/// The factor that the record sets on the weights of all its turns; `None` if it sets none.
fn record_weight(fields: &Map<String, Value>) -> Result<Option<f32>, ConversationError> {
    // Unsupported fields are included, so that the errors below report them.
    let is_weight_field = |(key, value): &(&String, &Value)| {
        WEIGHT_DETAIL_FIELDS.contains(&key.as_str())
            || sets_record_weight(key, value)
            || key.as_str() == "loss" && value.is_array()
    };
    let mut set = Map::new();
    for (key, value) in fields.iter().filter(is_weight_field) {
        if value.is_array() {
            let problem = format!("has a list as `{key}`, which is not supported: set `{key}` in each message");
            return Err(invalid(THE_RECORD, problem));
        }
        set.insert(key.clone(), value.clone());
    }
    let weight = message_weight(&set, true).map_err(|problem| invalid(THE_RECORD, problem))?;
    Ok(Some(weight).filter(|_| !set.is_empty()))
}

/// The tools of a record: a list, or a string with a list as JSON. ShareGPT's tools are bare functions, and are wrapped.
fn parse_tools(tools: Value, format: ConversationFormat) -> Result<Option<Value>, ConversationError> {
    let tools = match tools {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => {
            parse_json_text(&text).ok_or_else(|| invalid("tools", "is a string that is not JSON"))?
        }
        tools => tools,
    };
    match tools {
        Value::Null => Ok(None),
        Value::Array(mut tools) => {
            for tool in &mut tools {
                if !tool.is_object() {
                    return Err(invalid("tools", "has an entry that is not an object"));
                }
                if format == ConversationFormat::ShareGpt && tool["function"].is_null() && tool["name"].is_string() {
                    *tool = json!({"type": "function", "function": tool.take()});
                }
            }
            Ok(Some(Value::Array(tools)))
        }
        _ => Err(invalid("tools", "is not a list of tools")),
    }
}

/// The messages of Alpaca's format. The user's message is the instruction and the input, joined by a line break as in
/// LLaMA-Factory; `history` has earlier pairs of question and answer. The caller handles `system`, as for every format.
fn alpaca(record: &mut Map<String, Value>) -> Result<Vec<Turn>, ConversationError> {
    if !record.contains_key("output") {
        return Err(ConversationError::NoOutput { keys: record.keys().cloned().collect() });
    }
    let mut turns = Vec::new();
    match record.shift_remove("history") {
        None => {}
        Some(Value::Array(pairs)) => {
            for pair in pairs {
                let texts = pair.as_array().map(|pair| pair.iter().map(Value::as_str).collect::<Vec<_>>());
                let Some([Some(question), Some(answer)]) = texts.as_deref() else {
                    return Err(invalid("history", "has an entry that is not a pair of question and answer"));
                };
                turns.push(Turn::from_text("user", *question, 0.0));
                turns.push(Turn::from_text("assistant", *answer, 1.0));
            }
        }
        Some(_) => return Err(invalid("history", "is not a list of pairs")),
    }
    if record.get("system").is_some_and(|system| !system.is_string()) {
        return Err(invalid("system", "has content that is not text"));
    }
    let mut text = |key: &str| match record.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(invalid(key, "has content that is not text")),
        None => Err(invalid(key, "has no content")),
    };
    let mut question = text("instruction")?;
    let answer = text("output")?;
    let input = match text("input") {
        Ok(input) => input,
        Err(ConversationError::Message { problem, .. }) if problem == "has no content" => String::new(),
        Err(error) => return Err(error),
    };
    if !input.is_empty() {
        question = if question.is_empty() { input } else { format!("{question}\n{input}") };
    }
    turns.push(Turn::from_text("user", question, 0.0));
    turns.push(Turn::from_text("assistant", answer, 1.0));
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Conversation, ConversationError> {
        Conversation::parse(line.as_bytes(), |_| false)
    }

    /// Role, text and weight of each turn.
    fn turns(line: &str) -> Vec<(String, String, f32)> {
        let turns = parse(line).unwrap().turns.into_iter();
        turns
            .map(|turn| (turn.message.role().into(), turn.message.text().unwrap_or("(no text)").into(), turn.weight))
            .collect()
    }

    fn turn(role: &str, content: &str, weight: f32) -> (String, String, f32) {
        (role.into(), content.into(), weight)
    }

    #[test]
    fn three_formats_of_the_same_conversation_are_equal() {
        let expected = vec![turn("system", "S", 0.0), turn("user", "Q\nI", 0.0), turn("assistant", "A", 1.0)];
        for (line, format) in [
            (
                r#"{"id": 3, "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\nI"},
                    {"role": "assistant", "content": "A"}], "source": "x"}"#,
                ConversationFormat::Messages,
            ),
            (
                r#"{"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q\nI"},
                    {"from": "gpt", "value": "A"}]}"#,
                ConversationFormat::ShareGpt,
            ),
            (r#"{"instruction": "Q", "input": "I", "output": "A", "system": "S"}"#, ConversationFormat::Alpaca),
        ] {
            assert_eq!(turns(line), expected);
            assert_eq!(parse(line).unwrap().format, format);
        }
        let alpaca = r#"{"instruction": "Q", "input": "", "output": "A", "history": [["q", "a"]]}"#;
        let expected = [("user", "q", 0.0), ("assistant", "a", 1.0), ("user", "Q", 0.0), ("assistant", "A", 1.0)];
        assert_eq!(turns(alpaca), expected.map(|(role, words, weight)| turn(role, words, weight)));
    }

    #[test]
    fn only_the_assistants_messages_have_a_weight() {
        let line = r#"{"messages": [{"role": "user", "content": "Q", "weight": 1}, {"role": "assistant", "content": "A",
            "weight": 0}, {"role": "user", "content": [{"type": "text", "text": "R"}]}, {"role": "assistant", "content":
            "B", "weight": 0.25}]}"#;
        let weights: Vec<f32> = turns(line).into_iter().map(|turn| turn.2).collect();
        assert_eq!(weights, [0.0, 0.0, 0.0, 0.25]);
        let line = r#"{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 2},
            {"from": "gpt", "value": "B", "weight": null}]}"#;
        assert_eq!(turns(line).into_iter().map(|turn| turn.2).collect::<Vec<_>>(), [0.0, 2.0, 1.0]);
    }

    #[test]
    fn a_weight_of_the_record_multiplies_those_of_its_messages() {
        let weights =
            |line: &str| parse(line).map(|read| read.turns.iter().map(|turn| turn.weight).collect::<Vec<_>>());
        let shapes = [
            r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "assistant",
                "content": "B", "weight": 0.5}], MORE}"#,
            r#"{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}, {"from": "gpt", "value":
                "B", "weight": 0.5}], MORE}"#,
            r#"{"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"},
                {"role": "assistant", "content": "B", "weight": 0.5}], MORE}"#,
        ];
        let alpaca = r#"{"instruction": "Q", "output": "A", MORE}"#;
        for shape in shapes.iter().chain([&alpaca]) {
            let with = |more: &str| shape.replace("MORE", more);
            let half: Vec<f32> = if *shape == alpaca { vec![0.0, 0.5] } else { vec![0.0, 0.5, 0.25] };
            assert_eq!(weights(&with(r#""weight": 0.5, "train": true"#)).unwrap(), half, "{shape}");
            assert!(parse(&with(r#""weight": 0.5"#)).unwrap().fields.is_empty());
            for none in
                ["\"weight\": 0", "\"train\": false", "\"training\": false", "\"loss_mask\": 0", "\"loss\": false"]
            {
                assert_eq!(weights(&with(none)), Err(ConversationError::NothingLearned), "{shape} {none}");
            }
            let error = parse(&with(r#""loss_mask": [0, 1]"#)).unwrap_err().to_string();
            assert!(error.starts_with("the record has a list as `loss_mask`"), "{error}");
            let error = parse(&with(r#""weight": "much""#)).unwrap_err().to_string();
            assert_eq!(error, "the record has a `weight` that is not a non-negative number");
            // A number in `loss` is a model's loss on the record, not a weight.
            assert_eq!(parse(&with(r#""loss": 2.5, "weight": null"#)).unwrap().fields.len(), 1);
        }
    }

    #[test]
    fn preference_records_are_refused_in_every_format() {
        let (user, answer) = (r#"{"role": "user", "content": "Q"}"#, r#"{"role": "assistant", "content": "A"}"#);
        let messages = format!(r#""messages": [{user}, {answer}]"#);
        let shapes = [
            format!(r#""conversations": [{user}, {answer}]"#),
            format!(r#""prompt": [{user}], "completion": [{answer}]"#),
            r#""instruction": "Q", "output": "A""#.to_owned(),
            r#""prompt": "Q""#.to_owned(),
            messages.clone(),
        ];
        for shape in &shapes {
            for (key, value) in [
                ("label", "false"),
                ("label", "true"),
                ("kto_tag", "true"),
                ("chosen", "\"B\""),
                ("rejected", "{\"from\": \"gpt\", \"value\": \"B\"}"),
                ("chosen", "[{\"role\": \"assistant\", \"content\": \"B\"}]"),
            ] {
                let read = parse(&format!("{{{shape}, \"{key}\": {value}}}"));
                if *shape == messages && ["chosen", "rejected"].contains(&key) {
                    assert!(read.unwrap().fields.contains_key(key));
                } else {
                    assert_eq!(read, Err(ConversationError::Preference { key }), "{shape} {key}");
                }
            }
        }
        // Other labels and empty answers do not make a preference record.
        assert!(parse(&format!(r#"{{{messages}, "label": 3}}"#)).is_ok());
        let empty =
            r#"{"instruction": "Q", "output": "A", "chosen": "", "rejected": [], "label": "false", "kto_tag": null}"#;
        assert_eq!(turns(empty).len(), 2);
    }

    #[test]
    fn hints_fit_the_record() {
        let hint = |line: &str| parse(line).unwrap_err().hint().unwrap();
        let dolly = hint(r#"{"instruction": "Q", "context": "C", "response": "A", "category": "x"}"#);
        assert_eq!(dolly, "rename `response` to `output` and `context` to `input`");
        let (list, text) = (r#"[{"role": "user", "content": "Q"}]"#, "\"A\"");
        let hint_for =
            |prompt: &str, completion: &str| hint(&format!(r#"{{"prompt": {prompt}, "completion": {completion}}}"#));
        assert!(hint_for(text, text).contains("`instruction`"));
        assert_eq!(hint_for(list, text), "write it as messages: [{\"role\": \"assistant\", \"content\": \"...\"}]");
        assert_eq!(hint_for(text, list), "write it as messages: [{\"role\": \"user\", \"content\": \"...\"}]");
    }

    #[test]
    fn reasoning_is_kept_once() {
        let with = |more: &str| {
            let line = format!(
                r#"{{"messages": [{{"role": "user", "content": "Q"}}, {{"role": "assistant", "content": "A", {more}}}]}}"#
            );
            parse(&line).unwrap().turns[1].message.fields().clone()
        };
        for more in [
            r#""reasoning_content": "so", "reasoning": "so""#,
            r#""reasoning_content": "so", "thinking": "", "reasoning": null"#,
        ] {
            assert_eq!(
                with(more),
                *json!({"role": "assistant", "content": "A", "reasoning_content": "so"}).as_object().unwrap()
            );
        }
        let fields = with(r#""reasoning_content": "", "reasoning": "so""#);
        assert_eq!(fields, *json!({"role": "assistant", "content": "A", "reasoning": "so"}).as_object().unwrap());
    }

    #[test]
    fn invalid_records_have_messages() {
        let user = r#"{"role": "user", "content": "Q"}"#;
        let with = |message: &str| format!(r#"{{"messages": [{user}, {message}]}}"#);
        for (line, expected) in [
            ("{".to_owned(), "the record is not JSON: EOF while parsing an object"),
            ("[1]".into(), "the record is not a JSON object"),
            (r#"{"text": "x", "id": 1}"#.into(), "the record is not a conversation: it has `text`, `id`"),
            (r#"{"messages": 3}"#.into(), "`messages` is not a list of messages"),
            (format!(r#"{{"messages": [{user}]}}"#), "the conversation has no assistant message"),
            (r#"{"messages": []}"#.into(), "the conversation has no assistant message"),
            (with(r#"{"role": "robot", "content": "A"}"#), "`messages[1]` has the unknown role `robot`"),
            (with(r#"{"role": "assistant"}"#), "`messages[1]` has no content"),
            (with(r#"{"role": "assistant", "content": null}"#), "`messages[1]` has no content"),
            (with(r#"{"role": "assistant", "content": 3}"#), "`messages[1]` has content that is not text"),
            (with(r#"{"content": "A"}"#), "`messages[1]` has no `role` (or `from`)"),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": -1}"#),
                "`messages[1]` has a `weight` that is not a non-negative number",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": 1e-46}"#),
                "`messages[1]` has a `weight` below the smallest f32 (1.4e-45)",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": 3.5e38}"#),
                "`messages[1]` has a `weight` above the largest f32 (3.4e38)",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": 0}"#),
                "every assistant message has the weight 0: there is nothing to learn",
            ),
            (r#"{"instruction": "Q"}"#.into(), "`output` has no content; the record has `instruction`"),
            (
                r#"{"instruction": "Q", "output": "A", "history": [["q", "a", "b"]]}"#.into(),
                "`history` has an entry that is not a pair of question and answer",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "reasoning": "x", "reasoning_content": "y"}"#),
                "`messages[1]` has both `reasoning_content` and `reasoning`, and they differ",
            ),
        ] {
            let error = parse(&line).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{line}: {error}");
        }
        let broken = Conversation::parse(b"{\"messages\": \"\xff\"}", |_| false).unwrap_err();
        assert_eq!(broken.to_string(), "the record is not UTF-8: byte 15 is invalid");
    }

    #[test]
    fn a_role_that_the_template_knows_is_one() {
        let line = r#"{"messages": [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]}"#;
        assert!(parse(line).is_err());
        let read = Conversation::parse(line.as_bytes(), |role| role == "tool").unwrap();
        assert_eq!(read.messages()[0].role(), "tool");
    }
}
