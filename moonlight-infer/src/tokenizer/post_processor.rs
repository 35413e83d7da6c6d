//! The `post_processor` of a `tokenizer.json`: the tokens that it adds before and after a text.
//!
//! It is not parsed by the `tokenizers` crate, which panics or allocates without bound for some files: those with two
//! templates in a sequence, or with a template that contains the text twice.

use serde_json::Value;

/// The limit of tokens before or after a text.
const MAX_AFFIX_TOKENS: usize = 64;
/// The limit of nested sequences.
const MAX_DEPTH: usize = 8;

/// The tokens before and after a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct AffixTokens {
    pub(super) prefix: Vec<u32>,
    pub(super) suffix: Vec<u32>,
}

impl AffixTokens {
    /// The tokens that transformers adds to a single text with `add_special_tokens = true`.
    ///
    /// # Errors
    ///
    /// A description of what is not supported, as part of a sentence.
    pub(super) fn read(processor: Option<&Value>) -> Result<Self, String> {
        let mut affixes = Self::default();
        match processor {
            None | Some(Value::Null) => {}
            Some(processor) => affixes.add(processor, MAX_DEPTH)?,
        }
        if affixes.prefix.len().max(affixes.suffix.len()) > MAX_AFFIX_TOKENS {
            return Err(format!("its post_processor adds more than {MAX_AFFIX_TOKENS} tokens to a text"));
        }
        Ok(affixes)
    }

    fn is_empty(&self) -> bool {
        self.prefix.is_empty() && self.suffix.is_empty()
    }

    fn add(&mut self, processor: &Value, depth: usize) -> Result<(), String> {
        let more = match processor["type"].as_str() {
            // It only changes offsets.
            Some("ByteLevel") => return Ok(()),
            Some("Sequence") => {
                let parts = processor["processors"].as_array().ok_or("its post_processor has no `processors`")?;
                if depth == 0 {
                    return Err(format!("its post_processor has sequences nested more than {MAX_DEPTH} levels deep"));
                }
                return parts.iter().try_for_each(|part| self.add(part, depth - 1));
            }
            Some("TemplateProcessing") => template(processor)?,
            // [CLS] text [SEP]
            Some("BertProcessing" | "RobertaProcessing") => {
                Self { prefix: vec![pair(processor, "cls")?], suffix: vec![pair(processor, "sep")?] }
            }
            Some(other) => {
                return Err(format!("its post_processor has the unknown type `{}`", other.escape_debug()));
            }
            None => return Err("its post_processor has no `type`".into()),
        };
        if more.is_empty() {
            return Ok(());
        }
        if !self.is_empty() {
            return Err("its post_processor has two parts that each add tokens to a text".into());
        }
        *self = more;
        Ok(())
    }
}

/// The tokens of the `single` template, which consists of special tokens, the text once, and special tokens.
fn template(processor: &Value) -> Result<AffixTokens, String> {
    let damaged = || "its post_processor has a damaged template".to_owned();
    let pieces = processor["single"].as_array().ok_or_else(damaged)?;
    let (mut affixes, mut texts) = (AffixTokens::default(), 0);
    for piece in pieces {
        if let Some(sequence) = piece.get("Sequence") {
            if sequence["id"] != "A" {
                return Err("its post_processor has a template for one text that contains a second".into());
            }
            texts += 1;
            continue;
        }
        let name = piece["SpecialToken"]["id"].as_str().ok_or_else(damaged)?;
        let ids = processor["special_tokens"][name]["ids"]
            .as_array()
            .ok_or_else(|| format!("its post_processor adds the token `{}` without an id", name.escape_debug()))?;
        let side = if texts == 0 { &mut affixes.prefix } else { &mut affixes.suffix };
        for id in ids.iter().take(MAX_AFFIX_TOKENS + 1) {
            side.push(id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(damaged)?);
        }
        if side.len() > MAX_AFFIX_TOKENS {
            return Err(format!("its post_processor adds more than {MAX_AFFIX_TOKENS} tokens to a text"));
        }
    }
    match texts {
        1 => Ok(affixes),
        _ => Err(format!("its post_processor has a template that contains the text {texts} times")),
    }
}

/// The id of a `[token, id]` pair.
fn pair(processor: &Value, key: &str) -> Result<u32, String> {
    let id = processor[key].get(1).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| format!("its post_processor has no `{key}`"))
}
