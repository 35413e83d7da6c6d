//! Errors of conversations and chat templates.

use std::path::PathBuf;

use moonlight_convert::Printable;

use super::template_input::REASONING_FIELDS;
use crate::records::JsonError;
use crate::tokenizer::TokenizerError;

/// The limit of messages that are rendered to find the learned spans of one conversation, summed over all renderings; it takes
/// about ten seconds. A template that rewrites earlier turns needs `turns * messages`.
pub(super) const MAX_RENDERED_MESSAGES: usize = 8_000_000;

/// Why a conversation cannot be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// Neither the directory nor the tokenizer has a template.
    #[error("`{}` has no chat template", Printable(dir.display()))]
    NoTemplate {
        /// The directory of the model.
        dir: PathBuf,
    },
    /// A template that cannot be read or parsed.
    #[error("the chat template in `{}` is invalid: {}", Printable(path.display()), Printable(problem))]
    InvalidTemplate {
        /// The file with the template, or with settings that belong to it.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
    },
    /// A template that raises an exception, fails or exceeds a limit.
    #[error("the chat template does not accept this conversation: {}", Printable(problem))]
    RenderFailed {
        /// The message of the exception, or the limit.
        problem: String,
    },
    /// The assistant's text cannot be distinguished from that of others in the output of the template.
    #[error(
        "the assistant's text of message {message} is not found in the output of the chat template: {}",
        Printable(problem)
    )]
    AssistantSpanNotFound {
        /// The message, from 1.
        message: usize,
        /// The reason, as the rest of the sentence.
        problem: String,
    },
    /// A conversation with too many turns for a template that rewrites earlier turns.
    #[error(
        "the chat template rewrites the conversation, so that finding the assistant's text in {turns} of {messages} \
             messages renders {} messages, more than the limit of {}",
        turns.saturating_mul(*messages),
        MAX_RENDERED_MESSAGES
    )]
    TooManyTurns {
        /// The messages of the assistant.
        turns: usize,
        /// All messages.
        messages: usize,
    },
    /// Turns of different weights, with more or fewer `{% generation %}` blocks than turns.
    #[error(
        "the chat template writes {blocks} `{{% generation %}}` blocks for {turns} assistant messages with different weights, \
             so that the weight of a block is not known"
    )]
    GenerationBlocks {
        /// The blocks.
        blocks: usize,
        /// The messages of the assistant.
        turns: usize,
    },
    /// A text that the tokenizer cannot encode.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A record that is not a conversation, or that has nothing to learn.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
}

impl ChatError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoTemplate { .. } => {
                Some("give a base model a text to continue, or add a `chat_template.jinja` to the directory".into())
            }
            Self::AssistantSpanNotFound { .. } | Self::TooManyTurns { .. } | Self::GenerationBlocks { .. } => Some(
                "put `{% generation %}` and `{% endgeneration %}` around the text of each assistant message in the template"
                    .into(),
            ),
            Self::Conversation(error) => error.hint(),
            Self::Tokenizer(error) => error.hint(),
            Self::InvalidTemplate { .. } | Self::RenderFailed { .. } => None,
        }
    }
}

/// Why a record is not a conversation, or has nothing to learn.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConversationError {
    /// Bytes that are not JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// None of the [formats](super::ConversationFormat).
    #[error("{}", if keys.is_empty() { "the record is not a JSON object".to_owned() } else {
        format!("the record is not a conversation: it has {}", quoted_keys(keys)) })]
    UnknownFormat {
        /// The keys of the record; none for JSON that is not an object.
        keys: Vec<String>,
    },
    /// A role that neither this crate nor the template knows.
    #[error("`{place}` has the unknown role `{}`", Printable(role))]
    Role {
        /// The message, as `messages[0]`.
        place: String,
        /// The role.
        role: String,
    },
    /// A part of the record that is not as expected.
    #[error("{} {problem}", quoted_place(place))]
    Message {
        /// The message or field, as `messages[0]`, or `the record`.
        place: String,
        /// The rest of the sentence.
        problem: String,
    },
    /// A record for preference learning (DPO, KTO).
    #[error("the record is a preference record (it has `{key}`), which is not supported")]
    Preference {
        /// The field by which it was recognized.
        key: &'static str,
    },
    /// A prompt or a completion that is a string.
    #[error("`{key}` is a string, not a list of messages")]
    TextPrompt {
        /// `prompt` or `completion`.
        key: &'static str,
        /// Whether both are strings.
        both: bool,
    },
    /// An Alpaca record without an answer.
    #[error("`output` has no content; the record has {}", quoted_keys(keys))]
    NoOutput {
        /// The keys of the record.
        keys: Vec<String>,
    },
    /// A character of the conversation that is itself an escape, and could not be restored.
    #[error(
        "the conversation contains the character U+{:X}, which is reserved for escaping special tokens",
        u32::from(*character)
    )]
    ReservedCharacter {
        /// The character.
        character: char,
    },
    /// A turn whose only value is in a field that the template does not write.
    #[error(
        "message {message} has only {}, and the chat template does not read `{}`",
        description(field),
        Printable(field)
    )]
    UnwrittenField {
        /// The message, from 1.
        message: usize,
        /// The field.
        field: String,
    },
    /// A variable that a record must not set.
    #[error("`chat_template_kwargs` sets the reserved variable `{}`", Printable(name))]
    ReservedVariable {
        /// The variable.
        name: String,
    },
    /// No message of the assistant.
    #[error("the conversation has no assistant message")]
    NoAssistant,
    /// No message of the assistant with a weight above 0.
    #[error("every assistant message has the weight 0: there is nothing to learn")]
    NothingLearned,
}

impl ConversationError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Json(error) => error.hint(),
            Self::UnknownFormat { .. } => Some(
                "a record has `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion` (TRL), or \
                 `instruction` and `output` (Alpaca)"
                    .into(),
            ),
            Self::Preference { key: key @ ("label" | "kto_tag") } => {
                Some(format!("drop the records whose answers are labeled as bad, then the field `{key}`"))
            }
            Self::Preference { .. } => Some("write the answer to learn as the last of the record's `messages`".into()),
            Self::TextPrompt { key, both: false } => {
                let role = if *key == "prompt" { "user" } else { "assistant" };
                Some(format!("write it as messages: [{{\"role\": \"{role}\", \"content\": \"...\"}}]"))
            }
            Self::NoOutput { keys } => {
                let known = [
                    ("output", ["response", "answer", "completion", "target"]),
                    ("input", ["context", "passage", "inputs", "reference"]),
                ];
                let missing = known.iter().filter(|(name, _)| !keys.iter().any(|key| key == name));
                let renamed: Vec<String> = missing
                    .filter_map(|(name, others)| {
                        let found = others.iter().find(|other| keys.iter().any(|key| key == *other))?;
                        Some(format!("`{found}` to `{name}`"))
                    })
                    .collect();
                Some(match renamed.is_empty() {
                    true => "rename the field with the answer to `output`".into(),
                    false => format!("rename {}", renamed.join(" and ")),
                })
            }
            Self::ReservedCharacter { .. } => {
                Some("replace it; it is a private-use character, which no script uses".into())
            }
            Self::NothingLearned => Some("drop the record, or set data.broken = \"skip\"".into()),
            Self::TextPrompt { .. } => Some(
                "write `messages`, or rename `prompt` to `instruction` and `completion` to `output` (Alpaca)".into(),
            ),
            Self::UnwrittenField { field, .. } if REASONING_FIELDS.contains(&field.as_str()) => {
                Some("choose a template that writes it with data.chat_template, or move it into `content`".into())
            }
            Self::UnwrittenField { .. } => Some("choose a template that supports tools with data.chat_template".into()),
            Self::Role { .. } => Some(
                "roles are system, user (human), assistant (gpt), and those that the chat template mentions, such as \
                 `tool`; choose one that knows the role with data.chat_template"
                    .into(),
            ),
            Self::Message { .. } | Self::ReservedVariable { .. } | Self::NoAssistant => None,
        }
    }
}

/// The first few keys of a record.
fn quoted_keys(keys: &[String]) -> String {
    let named = |key: &String| match key.as_str() {
        "" => "a field without a name".to_owned(),
        key => format!("`{}`", Printable(key)),
    };
    keys.iter().take(6).map(named).collect::<Vec<_>>().join(", ")
}

/// The place of an error that concerns the whole record.
pub(super) const THE_RECORD: &str = "the record";

fn quoted_place(place: &str) -> String {
    if place == THE_RECORD { place.to_owned() } else { format!("`{place}`") }
}

/// The content of a message whose only value is in `field`, as words for a message.
fn description(field: &str) -> &'static str {
    match field {
        field if REASONING_FIELDS.contains(&field) => "reasoning",
        "tool_calls" | "function_call" => "tool calls",
        _ => "a field that is not `content`",
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::error::tests::render;

    #[test]
    fn messages_of_chat_errors() {
        let errors = [
            ChatError::NoTemplate { dir: "models/base".into() },
            ChatError::InvalidTemplate {
                path: "model/chat_template.jinja".into(),
                problem: "syntax error: unexpected end of input (line 2)".into(),
            },
            ChatError::RenderFailed { problem: "roles must alternate".into() },
            ChatError::AssistantSpanNotFound { message: 2, problem: "the text of message 3 is within it".into() },
            ChatError::TooManyTurns { turns: 5000, messages: 10_000 },
            ChatError::GenerationBlocks { blocks: 3, turns: 2 },
            ChatError::Tokenizer(TokenizerError::NoBos("tokenizer".into())),
            ChatError::Conversation(ConversationError::NoAssistant),
        ];
        // A new variant does not compile here: add an example of it above.
        let is_covered = |error: &ChatError| match error {
            ChatError::NoTemplate { .. }
            | ChatError::InvalidTemplate { .. }
            | ChatError::RenderFailed { .. }
            | ChatError::AssistantSpanNotFound { .. }
            | ChatError::TooManyTurns { .. }
            | ChatError::GenerationBlocks { .. }
            | ChatError::Tokenizer(_)
            | ChatError::Conversation(_) => true,
        };
        assert!(errors.iter().all(is_covered));
        assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }

    #[test]
    fn messages_of_conversation_errors() {
        let keys = |keys: &[&str]| keys.iter().map(ToString::to_string).collect();
        let errors = [
            ConversationError::Json(JsonError::TooManyValues),
            ConversationError::UnknownFormat { keys: Vec::new() },
            ConversationError::UnknownFormat { keys: keys(&["text", "id"]) },
            ConversationError::Role { place: "messages[1]".into(), role: "robot".into() },
            ConversationError::Message { place: "messages[1]".into(), problem: "has no content".into() },
            ConversationError::Preference { key: "label" },
            ConversationError::Preference { key: "chosen" },
            ConversationError::TextPrompt { key: "prompt", both: false },
            ConversationError::TextPrompt { key: "prompt", both: true },
            ConversationError::NoOutput { keys: keys(&["instruction", "context", "response"]) },
            ConversationError::NoOutput { keys: keys(&["instruction"]) },
            ConversationError::ReservedCharacter { character: '\u{f8001}' },
            ConversationError::UnwrittenField { message: 2, field: "tool_calls".into() },
            ConversationError::UnwrittenField { message: 2, field: "reasoning_content".into() },
            ConversationError::ReservedVariable { name: "messages".into() },
            ConversationError::NoAssistant,
            ConversationError::NothingLearned,
        ];
        let is_covered = |error: &ConversationError| match error {
            ConversationError::Json(_)
            | ConversationError::UnknownFormat { .. }
            | ConversationError::Role { .. }
            | ConversationError::Message { .. }
            | ConversationError::Preference { .. }
            | ConversationError::TextPrompt { .. }
            | ConversationError::NoOutput { .. }
            | ConversationError::ReservedCharacter { .. }
            | ConversationError::UnwrittenField { .. }
            | ConversationError::ReservedVariable { .. }
            | ConversationError::NoAssistant
            | ConversationError::NothingLearned => true,
        };
        assert!(errors.iter().all(is_covered));
        assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }
}
