//! Conversations as people keep them: one [record](crate::records) in any of three shapes.
//!
//! | shape | a record |
//! |---|---|
//! | OpenAI's | `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 0}]}` |
//! | ShareGPT's | `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}` |
//! | Alpaca's | `{"instruction": "...", "input": "...", "output": "..."}` |
//!
//! The keys decide the shape. Keys that are not named here are ignored: data sets carry ids and sources.

use serde_json::{Map, Value};

use super::{ConversationError, Message};
use crate::records::parse;

/// Which of the three shapes a record has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// `messages` of `role` and `content`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `instruction`, perhaps `input`, and `output`; perhaps `system` and `history`.
    Alpaca,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Messages => "`messages` (OpenAI)",
            Self::ShareGpt => "`conversations` (ShareGPT)",
            Self::Alpaca => "`instruction` (Alpaca)",
        })
    }
}

/// A message and how much its words count in the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Who says what.
    pub message: Message,
    /// Factor on the loss of each token: 1 where the record says nothing, 0 for words that are not learned. Only the
    /// assistant's words are ever learned; elsewhere it is 0.
    pub weight: f32,
}

impl Turn {
    fn new(role: &str, content: impl Into<String>, weight: f32) -> Self {
        let weight = if role == "assistant" { weight } else { 0.0 };
        Self { message: Message::new(role, content), weight }
    }
}

/// A record that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// The shape that it had.
    pub shape: Shape,
    /// What was said, in order.
    pub turns: Vec<Turn>,
}

impl Conversation {
    /// Reads a record. `knows_role` says of a role beside `system`, `user` and `assistant` whether it is one.
    ///
    /// # Errors
    ///
    /// [`ConversationError`]: bytes that are no UTF-8, text that is no JSON, none of the shapes, a role that nobody knows,
    /// a message without text, no message of the assistant's, nothing to learn.
    pub fn parse(record: &[u8], knows_role: impl Fn(&str) -> bool) -> Result<Self, ConversationError> {
        Self::from_json(&parse(record)?.value, knows_role)
    }

    /// Like [`parse`](Conversation::parse), of JSON that was read already.
    ///
    /// # Errors
    ///
    /// As [`parse`](Conversation::parse), but for the first two.
    pub fn from_json(value: &Value, knows_role: impl Fn(&str) -> bool) -> Result<Self, ConversationError> {
        let Value::Object(record) = value else { return Err(ConversationError::Shape { keys: Vec::new() }) };
        let (shape, turns) = if let Some(messages) = record.get("messages") {
            (Shape::Messages, messages_of("messages", messages, &knows_role)?)
        } else if let Some(messages) = record.get("conversations") {
            (Shape::ShareGpt, messages_of("conversations", messages, &knows_role)?)
        } else if record.contains_key("instruction") {
            (Shape::Alpaca, alpaca(record)?)
        } else {
            return Err(ConversationError::Shape { keys: record.keys().cloned().collect() });
        };
        let mut of_assistant = turns.iter().filter(|turn| turn.message.role == "assistant").peekable();
        if of_assistant.peek().is_none() {
            return Err(ConversationError::NoAssistant);
        }
        if of_assistant.all(|turn| turn.weight == 0.0) {
            return Err(ConversationError::NothingLearned);
        }
        Ok(Self { shape, turns })
    }

    /// The messages alone.
    pub fn messages(&self) -> Vec<Message> {
        self.turns.iter().map(|turn| turn.message.clone()).collect()
    }
}

fn messages_of(key: &str, value: &Value, knows_role: &impl Fn(&str) -> bool) -> Result<Vec<Turn>, ConversationError> {
    let wrong = |place: String, problem: &str| ConversationError::Message { place, problem: problem.into() };
    let Value::Array(messages) = value else { return Err(wrong(key.into(), "is not a list of messages")) };
    let mut turns = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let place = format!("{key}[{index}]");
        let Value::Object(message) = message else { return Err(wrong(place, "is not a message")) };
        let Some(Value::String(role)) = message.get("role").or_else(|| message.get("from")) else {
            return Err(wrong(place, "does not say who speaks: it lacks `role` (or `from`)"));
        };
        let role = match role.as_str() {
            // The names that ShareGPT's exports and those that followed them use.
            "human" => "user",
            "gpt" | "chatgpt" | "bot" | "model" => "assistant",
            role @ ("system" | "user" | "assistant") => role,
            role if knows_role(role) => role,
            role => return Err(ConversationError::Role { place, role: role.into() }),
        };
        let content = message.get("content").or_else(|| message.get("value"));
        let content = text_of(content).map_err(|problem| wrong(place.clone(), problem))?;
        let weight = weight_of(message).map_err(|problem| wrong(place, problem))?;
        turns.push(Turn::new(role, content, weight));
    }
    Ok(turns)
}

/// A text, or OpenAI's list of parts that are texts.
fn text_of(content: Option<&Value>) -> Result<String, &'static str> {
    match content {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| match part["type"].as_str() {
                Some("text") => part["text"].as_str().ok_or("has a part without text"),
                _ => Err("has a part that is not text"),
            })
            .collect(),
        None | Some(Value::Null) => Err("has no content"),
        Some(_) => Err("has content that is not text"),
    }
}

fn weight_of(message: &Map<String, Value>) -> Result<f32, &'static str> {
    match message.get("weight") {
        None | Some(Value::Null) => Ok(1.0),
        Some(Value::Bool(learned)) => Ok(f32::from(u8::from(*learned))),
        Some(value) => match value.as_f64() {
            Some(weight) if weight >= 0.0 => match weight as f32 {
                0.0 if weight > 0.0 => Err("has a `weight` that is smaller than an f32 can be (1.4e-45)"),
                weight if weight.is_infinite() => Err("has a `weight` that is larger than an f32 can be (3.4e38)"),
                weight => Ok(weight),
            },
            _ => Err("has a `weight` that is not a number from 0"),
        },
    }
}

/// Alpaca's record: the instruction and the input, a line break between them, are what the user says (as LLaMA-Factory
/// reads it); `history` holds earlier pairs.
fn alpaca(record: &Map<String, Value>) -> Result<Vec<Turn>, ConversationError> {
    let wrong =
        |place: &str, problem: &str| ConversationError::Message { place: place.into(), problem: problem.into() };
    let text = |key: &str| text_of(record.get(key)).map_err(|problem| wrong(key, problem));
    let absent = |key: &str| matches!(record.get(key), None | Some(Value::Null));
    let weight = weight_of(record).map_err(|problem| wrong("the record", problem))?;
    let mut turns = Vec::new();
    if !absent("system") {
        let system = text("system")?;
        if !system.is_empty() {
            turns.push(Turn::new("system", system, 0.0));
        }
    }
    if !absent("history") {
        let pairs = record["history"].as_array().ok_or_else(|| wrong("history", "is not a list of pairs"))?;
        for pair in pairs {
            let [Some(question), Some(answer)] = [0, 1].map(|index| pair.get(index).and_then(Value::as_str)) else {
                return Err(wrong("history", "has an entry that is not a question and its answer"));
            };
            turns.push(Turn::new("user", question, 0.0));
            turns.push(Turn::new("assistant", answer, weight));
        }
    }
    let mut question = text("instruction")?;
    if !absent("input") {
        let input = text("input")?;
        if !input.is_empty() {
            question = if question.is_empty() { input } else { format!("{question}\n{input}") };
        }
    }
    turns.push(Turn::new("user", question, 0.0));
    turns.push(Turn::new("assistant", text("output")?, weight));
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Conversation, ConversationError> {
        Conversation::parse(line.as_bytes(), |_| false)
    }

    /// Role, words and weight of each turn.
    fn turns(line: &str) -> Vec<(String, String, f32)> {
        let turns = parse(line).unwrap().turns.into_iter();
        turns.map(|turn| (turn.message.role, turn.message.content, turn.weight)).collect()
    }

    fn turn(role: &str, content: &str, weight: f32) -> (String, String, f32) {
        (role.into(), content.into(), weight)
    }

    #[test]
    fn three_shapes_say_the_same() {
        let expected = vec![turn("system", "S", 0.0), turn("user", "Q\nI", 0.0), turn("assistant", "A", 1.0)];
        for (line, shape) in [
            (
                r#"{"id": 3, "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\nI"},
                    {"role": "assistant", "content": "A"}], "source": "x"}"#,
                Shape::Messages,
            ),
            (
                r#"{"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q\nI"},
                    {"from": "gpt", "value": "A"}]}"#,
                Shape::ShareGpt,
            ),
            (r#"{"instruction": "Q", "input": "I", "output": "A", "system": "S"}"#, Shape::Alpaca),
        ] {
            assert_eq!(turns(line), expected);
            assert_eq!(parse(line).unwrap().shape, shape);
        }
        let alpaca = r#"{"instruction": "Q", "input": "", "output": "A", "history": [["q", "a"]]}"#;
        let expected = [("user", "q", 0.0), ("assistant", "a", 1.0), ("user", "Q", 0.0), ("assistant", "A", 1.0)];
        assert_eq!(turns(alpaca), expected.map(|(role, words, weight)| turn(role, words, weight)));
    }

    #[test]
    fn weights_are_the_assistants() {
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
    fn what_is_wrong_is_one_sentence() {
        let user = r#"{"role": "user", "content": "Q"}"#;
        let with = |message: &str| format!(r#"{{"messages": [{user}, {message}]}}"#);
        for (line, expected) in [
            ("{".to_owned(), "the record is not JSON: EOF while parsing an object"),
            ("[1]".into(), "the record is not a JSON object"),
            (r#"{"text": "x", "id": 1}"#.into(), "the record is no conversation: it has `text`, `id`"),
            (r#"{"messages": 3}"#.into(), "`messages` is not a list of messages"),
            (format!(r#"{{"messages": [{user}]}}"#), "the conversation has no assistant message"),
            (r#"{"messages": []}"#.into(), "the conversation has no assistant message"),
            (with(r#"{"role": "robot", "content": "A"}"#), "`messages[1]` has the unknown role `robot`"),
            (with(r#"{"role": "assistant"}"#), "`messages[1]` has no content"),
            (with(r#"{"role": "assistant", "content": null}"#), "`messages[1]` has no content"),
            (with(r#"{"role": "assistant", "content": 3}"#), "`messages[1]` has content that is not text"),
            (with(r#"{"content": "A"}"#), "`messages[1]` does not say who speaks: it lacks `role` (or `from`)"),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": -1}"#),
                "`messages[1]` has a `weight` that is not a number from 0",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": 1e-46}"#),
                "`messages[1]` has a `weight` that is smaller than an f32 can be (1.4e-45)",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": 3.5e38}"#),
                "`messages[1]` has a `weight` that is larger than an f32 can be (3.4e38)",
            ),
            (
                with(r#"{"role": "assistant", "content": "A", "weight": 0}"#),
                "every assistant message has the weight 0: there is nothing to learn",
            ),
            (r#"{"instruction": "Q"}"#.into(), "`output` has no content"),
        ] {
            let error = parse(&line).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{line}: {error}");
        }
        let broken = Conversation::parse(b"{\"messages\": \"\xff\"}", |_| false).unwrap_err();
        assert_eq!(broken.to_string(), "the record is not UTF-8: its byte 15 is wrong");
    }

    #[test]
    fn a_role_that_the_template_knows_is_one() {
        let line = r#"{"messages": [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]}"#;
        assert!(parse(line).is_err());
        let read = Conversation::parse(line.as_bytes(), |role| role == "tool").unwrap();
        assert_eq!(read.messages()[0], Message::new("tool", "3"));
    }
}
