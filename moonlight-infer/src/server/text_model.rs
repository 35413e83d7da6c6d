//! [`TextModel`]: what turns texts and conversations into the tokens of the served models, and back.

use std::sync::Arc;

use super::defaults::SamplingDefaults;
use crate::chat::{ChatEncoder, ChatError};
use crate::error::InferError;
use crate::open::OpenedModel;
use crate::tokenizer::Tokenizer;

/// The texts of the served models. Models over one base share it: an adapter changes neither the tokenizer nor the template.
#[derive(Debug, Clone)]
pub struct TextModel {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Encodes conversations; `None` for a model without a chat template.
    pub chat: Option<Arc<ChatEncoder>>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Tokens that end an answer in a chat.
    pub end_of_turn: Vec<u32>,
    /// Values of the sampling that a request does not set.
    pub defaults: SamplingDefaults,
}

impl TextModel {
    /// That of an opened model.
    ///
    /// # Errors
    ///
    /// [`InferError::NoTokenizer`]; [`InferError::Chat`] for an invalid template (a missing one is none);
    /// [`InferError::ModelFile`] for an invalid `generation_config.json`.
    pub fn of(opened: &OpenedModel) -> Result<Self, InferError> {
        let tokenizer = opened.tokenizer()?.clone();
        let chat = match opened.chat_encoder() {
            Ok(chat) => Some(Arc::new(chat)),
            Err(InferError::Chat(ChatError::NoTemplate { .. })) => None,
            Err(error) => return Err(error),
        };
        let end_of_turn = chat.as_ref().map_or_else(|| opened.eos.clone(), |chat| opened.end_of_turn(chat));
        let defaults = SamplingDefaults::from_model_dir(&opened.dir)?;
        Ok(Self { tokenizer, chat, eos: opened.eos.clone(), end_of_turn, defaults })
    }
}
