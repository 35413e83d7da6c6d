//! What can be wrong with a conversation or its template.

use std::path::PathBuf;

use moonlight_convert::Printable;

use super::template_input::REASONING_FIELDS;
use crate::records::JsonError;
use crate::tokenizer::TokenizerError;

/// Messages that are rendered for one conversation, all renderings together, before a template that rewrites earlier turns
/// is given up: some ten seconds.
pub(super) const MAX_RENDERED_MESSAGES: usize = 8_000_000;

/// Why a conversation has no tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// Neither the folder nor the tokenizer knows how to talk.
    #[error("`{}` has no chat template", Printable(dir.display()))]
    NoTemplate {
        /// The model's folder.
        dir: PathBuf,
    },
    /// A template that cannot be read or is none.
    #[error("the chat template of `{}` is broken: {}", Printable(path.display()), Printable(problem))]
    InvalidTemplate {
        /// The file that holds it.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A template that refuses a conversation, or fails at it.
    #[error("the chat template does not take this conversation: {}", Printable(problem))]
    RenderFailed {
        /// What it says.
        problem: String,
    },
    /// A template in whose text the assistant's words cannot be found.
    #[error(
        "the assistant's words cannot be found in what the chat template makes of message {message}: {}",
        Printable(problem)
    )]
    AssistantSpanNotFound {
        /// Its number, from 1.
        message: usize,
        /// What was tried.
        problem: String,
    },
    /// A conversation that a template rewrites turn by turn, with more turns than can be gone through so.
    #[error(
        "the chat template rewrites the conversation, so that the assistant's words in {turns} of its {messages} messages \
             would each need the whole of it: the limit is {} messages in all",
        MAX_RENDERED_MESSAGES
    )]
    TooManyTurns {
        /// The assistant's messages.
        turns: usize,
        /// All messages.
        messages: usize,
    },
    /// `{% generation %}` blocks that are not one for each message, of messages that do not all count the same.
    #[error(
        "the chat template has {blocks} `{{% generation %}}` blocks for {turns} messages of the assistant's, of which not \
             all are learned alike: there is no telling which is which"
    )]
    GenerationBlocks {
        /// The blocks.
        blocks: usize,
        /// The assistant's messages.
        turns: usize,
    },
    /// Words that the tokenizer has no tokens for.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A record that is no conversation.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
}

impl ChatError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoTemplate { .. } => {
                Some("give a base model a text to continue, or put its `chat_template.jinja` into the folder".into())
            }
            Self::AssistantSpanNotFound { .. } | Self::TooManyTurns { .. } | Self::GenerationBlocks { .. } => Some(
                "put `{% generation %}` and `{% endgeneration %}` around the assistant's words in the template".into(),
            ),
            Self::Conversation(error) => error.hint(),
            Self::Tokenizer(error) => error.hint(),
            Self::InvalidTemplate { .. } | Self::RenderFailed { .. } => None,
        }
    }
}

/// Why a record is no conversation, or not one that can be learned from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConversationError {
    /// Bytes that are not JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// None of the shapes.
    #[error("{}", if keys.is_empty() { "the record is not a JSON object".to_owned() } else {
        format!("the record is no conversation: it has {}", list(keys)) })]
    UnknownFormat {
        /// The keys that it has.
        keys: Vec<String>,
    },
    /// Someone whom neither we nor the template know.
    #[error("`{place}` has the unknown role `{}`", Printable(role))]
    Role {
        /// The message.
        place: String,
        /// Its role.
        role: String,
    },
    /// A message that is not one.
    #[error("{} {problem}", shown(place))]
    Message {
        /// The message.
        place: String,
        /// What is wrong, as the rest of a sentence.
        problem: String,
    },
    /// A record of TRL's for learning from preferences.
    #[error("the record is one of preferences (it has `{key}`), and those are not learned from")]
    Preference {
        /// What tells it.
        key: &'static str,
    },
    /// A prompt and its completion that are texts, and no messages.
    #[error("`{key}` is a text and not a list of messages")]
    TextPrompt {
        /// Which of the two.
        key: &'static str,
        /// Whether both are.
        both: bool,
    },
    /// A record of Alpaca's kind without an answer.
    #[error("`output` has no content; the record has {}", list(keys))]
    NoOutput {
        /// The keys that it has.
        keys: Vec<String>,
    },
    /// A character that stands for another while a template writes.
    #[error("the conversation holds the character U+{:X}, which is needed to tell words from special tokens", u32::from(*character))]
    ReservedCharacter {
        /// The character.
        character: char,
    },
    /// A turn in which a tool is called, by a template that does not write calls.
    #[error(
        "message {message} says nothing but {}, and the chat template does not read its `{}`",
        said_by(field),
        Printable(field)
    )]
    UnwrittenField {
        /// Its number, from 1.
        message: usize,
        /// The field.
        field: String,
    },
    /// A variable that is not the record's to set.
    #[error("`chat_template_kwargs` sets `{}`, which is not its to set", Printable(name))]
    ReservedVariable {
        /// Its name.
        name: String,
    },
    /// Nobody to learn from.
    #[error("the conversation has no assistant message")]
    NoAssistant,
    /// Nothing to learn.
    #[error("every assistant message has the weight 0: there is nothing to learn")]
    NothingLearned,
}

impl ConversationError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Json(error) => error.hint(),
            Self::UnknownFormat { .. } => Some(
                "a record has `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion` (TRL), or \
                 `instruction` and `output` (Alpaca)"
                    .into(),
            ),
            Self::Preference { key: key @ ("label" | "kto_tag") } => {
                Some(format!("leave out the records whose answers are marked as bad, and then the field `{key}`"))
            }
            Self::Preference { .. } => {
                Some("write the answer that is to be learned as the last of its `messages`".into())
            }
            Self::TextPrompt { key, both: false } => {
                let role = if *key == "prompt" { "user" } else { "assistant" };
                Some(format!("write it as messages: [{{\"role\": \"{role}\", \"content\": \"...\"}}]"))
            }
            Self::NoOutput { keys } => {
                let known = [
                    ("output", ["response", "answer", "completion", "target"]),
                    ("input", ["context", "passage", "inputs", "reference"]),
                ];
                let renamed = known.iter().filter(|(name, _)| !keys.iter().any(|key| key == name)).filter_map(|(name, others)| {
                    let found = others.iter().find(|other| keys.iter().any(|key| key == *other))?;
                    Some(format!("`{found}` to `{name}`"))
                });
                let renamed: Vec<String> = renamed.collect();
                Some(match renamed.is_empty() {
                    true => "give the field with the answer the name `output`".into(),
                    false => format!("rename {}", renamed.join(" and ")),
                })
            }
            Self::ReservedCharacter { .. } => Some("replace it: it is one of those for private use, which no script has".into()),
            Self::NothingLearned => Some("leave the record out, or set data.broken = \"skip\"".into()),
            Self::TextPrompt { .. } => Some(
                "write `messages`, or rename `prompt` to `instruction` and `completion` to `output` (Alpaca)".into(),
            ),
            Self::UnwrittenField { field, .. } if REASONING_FIELDS.contains(&field.as_str()) => {
                Some("name a chat template that writes it by data.chat_template, or write it into `content`".into())
            }
            Self::UnwrittenField { .. } => Some("name a chat template that knows tools by data.chat_template".into()),
            Self::Role { .. } => Some(
                "roles are system, user (human) and assistant (gpt), and others that the chat template names, as `tool`; \
                 name one that knows the role by data.chat_template"
                    .into(),
            ),
            _ => None,
        }
    }
}

fn list(keys: &[String]) -> String {
    let named = |key: &String| match key.as_str() {
        "" => "a field without a name".to_owned(),
        key => format!("`{}`", Printable(key)),
    };
    keys.iter().take(6).map(named).collect::<Vec<_>>().join(", ")
}

/// A place in a record that is all of it.
pub(super) const THE_RECORD: &str = "the record";

fn shown(place: &str) -> String {
    if place == THE_RECORD { place.to_owned() } else { format!("`{place}`") }
}

/// What a message does that has nothing but this field.
fn said_by(field: &str) -> &'static str {
    match field {
        field if REASONING_FIELDS.contains(&field) => "what the assistant thinks",
        "tool_calls" | "function_call" => "calls a tool",
        _ => "what a field beside `content` holds",
    }
}
