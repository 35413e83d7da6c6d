//! What the files next to a tokenizer say: the special tokens, the tokens around a text, the chat templates.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use moonlight_model::ModelConfig;
use serde_json::Value;

use super::vocabulary::Vocabulary;
use crate::error::CheckpointError;
use crate::io::confined_dir::ConfinedDir;
use crate::printable::printable;
use crate::tokenizer::SpecialNames;

/// Size limit in bytes of a file of settings or a template, as in the program that reads them.
const LONGEST: u64 = 10_000_000;
const CONFIG: &str = "tokenizer_config.json";
const TOKENS_MAP: &str = "special_tokens_map.json";
const GENERATION: &str = "generation_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const MORE_TEMPLATES: &str = "additional_chat_templates";
/// The most named templates.
const MOST_TEMPLATES: usize = 64;
/// The name of the template that is used without a name.
const DEFAULT: &str = "default";

/// The settings of a model's directory.
#[derive(Debug, Default)]
pub(super) struct Settings {
    config: Value,
    tokens_map: Value,
    generation: Value,
    /// The template that is used without a name.
    pub(super) template: Option<String>,
    /// Templates by name, such as `tool_use`.
    pub(super) named_templates: BTreeMap<String, String>,
}

impl Settings {
    pub(super) fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let confined = ConfinedDir::new(dir).map_err(CheckpointError::read(dir))?;
        let invalid = |name: &str, problem: String| CheckpointError::Tokenizer { path: dir.join(name), problem };
        let json = |name: &str| match confined.read(name, LONGEST)? {
            None => Ok(Value::Null),
            Some(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| invalid(name, format!("it is not JSON: {error}")))
            }
        };
        let text = |name: &str| {
            let bytes = confined.read(name, LONGEST)?;
            let text = bytes.map(String::from_utf8).transpose();
            text.map_err(|_| invalid(name, "it is not UTF-8 text".into()))
        };
        let (config, tokens_map, generation) = (json(CONFIG)?, json(TOKENS_MAP)?, json(GENERATION)?);
        let mut settings = Self { config, tokens_map, generation, template: text(TEMPLATE)?, ..Self::default() };
        for name in additional_templates(dir) {
            if let Some(text) = text(&format!("{MORE_TEMPLATES}/{name}.jinja"))? {
                settings.named_templates.insert(name, text);
            }
        }
        settings.add_templates_of_config();
        Ok(settings)
    }

    /// The `chat_template` of `tokenizer_config.json`, a text or a list of named ones. Files take precedence.
    fn add_templates_of_config(&mut self) {
        let template = &self.config["chat_template"];
        if let Some(text) = template.as_str() {
            self.template.get_or_insert_with(|| text.to_owned());
        }
        for entry in template.as_array().into_iter().flatten() {
            let (Some(name), Some(text)) = (entry["name"].as_str(), entry["template"].as_str()) else { continue };
            match name {
                DEFAULT => drop(self.template.get_or_insert_with(|| text.to_owned())),
                name => drop(self.named_templates.entry(name.to_owned()).or_insert_with(|| text.to_owned())),
            }
        }
    }

    /// The token that a key such as `pad_token` names.
    pub(super) fn named_token(&self, key: &str, vocabulary: &Vocabulary) -> Option<u32> {
        let texts = [&self.config, &self.tokens_map].map(|file| {
            let value = &file[key];
            value.as_str().or_else(|| value["content"].as_str())
        });
        texts.into_iter().flatten().find(|text| !text.is_empty()).and_then(|text| vocabulary.id(text))
    }

    /// The tokens that end a generation: those of `generation_config.json`, else those of the model's config.
    pub(super) fn ends(&self, model: &ModelConfig) -> Vec<u32> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Vec<u32> = match &self.generation["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(id).collect(),
            one => id(one).into_iter().collect(),
        };
        if ids.is_empty() { model.eos_token_id.clone() } else { ids }
    }
}

/// The names of the files in `additional_chat_templates`, in order.
fn additional_templates(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir.join(MORE_TEMPLATES)).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().to_str()?.strip_suffix(".jinja").map(str::to_owned));
    let mut names: Vec<String> = names.take(MOST_TEMPLATES).collect();
    names.sort_unstable();
    names
}

/// BOS, EOS and the others of a tokenizer.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
    pub(super) unknown: Option<u32>,
    /// Other tokens that end a generation.
    pub(super) more_ends: Vec<u32>,
}

impl SpecialIds {
    /// The tokens that the files name. `tokenizer_config.json` takes precedence over the config of the model, as in
    /// llama.cpp's converter; with `tiktoken.model` it is the other way round, because there the name of EOS is that of the
    /// base model also for one that ends a turn by another token.
    pub(super) fn new(
        settings: &Settings,
        names: &SpecialNames,
        vocabulary: &Vocabulary,
        model: &ModelConfig,
        from_tiktoken: bool,
    ) -> Self {
        let default = |name: &'static str| from_tiktoken.then_some(name);
        let named = |name: &Option<String>, otherwise: Option<&str>| {
            name.as_deref().or(otherwise).and_then(|name| vocabulary.id(name))
        };
        let bos = named(&names.bos, default("[BOS]")).or(model.bos_token_id).or(names.bos_id);
        let ends = settings.ends(model);
        let named_eos = named(&names.eos, default("[EOS]"));
        let eos = match from_tiktoken {
            true => ends.first().copied().or(named_eos),
            false => named_eos.or_else(|| ends.first().copied()),
        };
        let mut more_ends = Vec::new();
        for end in ends {
            if Some(end) != eos && !more_ends.contains(&end) {
                more_ends.push(end);
            }
        }
        let unknown = settings.named_token("unk_token", vocabulary).or(vocabulary.unknown);
        Self { bos, eos, pad: settings.named_token("pad_token", vocabulary), unknown, more_ends }
    }
}

/// The tokens before and after a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Affixes {
    pub(super) prefix: Vec<u32>,
    pub(super) suffix: Vec<u32>,
}

/// The tokens that a `post_processor` adds to a single text.
///
/// # Errors
///
/// The rest of a sentence that begins with the tokenizer.
pub(super) fn affixes(processor: &Value) -> Result<Affixes, String> {
    let mut affixes = Affixes::default();
    let inner = match processor["type"].as_str() {
        Some("Sequence") => processor["processors"].as_array().map(Vec::as_slice).unwrap_or_default(),
        _ => std::slice::from_ref(processor),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    for step in inner {
        match step["type"].as_str() {
            // It only changes offsets.
            None | Some("ByteLevel") => {}
            Some("TemplateProcessing") => {
                let mut after = false;
                for piece in step["single"].as_array().into_iter().flatten() {
                    let Some(name) = piece["SpecialToken"]["id"].as_str() else {
                        after = true;
                        continue;
                    };
                    let ids = step["special_tokens"][name]["ids"].as_array();
                    let ids: Option<Vec<u32>> = ids.and_then(|ids| ids.iter().map(id).collect());
                    let ids = ids.ok_or_else(|| format!("adds the token `{}` without an id", printable(name)))?;
                    if after { affixes.suffix.extend(ids) } else { affixes.prefix.extend(ids) }
                }
            }
            Some("BertProcessing" | "RobertaProcessing") => {
                affixes.prefix.extend(id(&step["cls"][1]));
                affixes.suffix.extend(id(&step["sep"][1]));
            }
            Some(other) => return Err(format!("has the post-processor `{}`, which is not known", printable(other))),
        }
    }
    if affixes.prefix.len().max(affixes.suffix.len()) > 1 {
        return Err("adds more than one token before or after a text, which llama.cpp cannot".into());
    }
    Ok(affixes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn templates_of_files_take_precedence() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path();
        let list = json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
        fs::write(dir.join(CONFIG), json!({"chat_template": list}).to_string()).unwrap();
        let read = || Settings::read(dir).unwrap();
        let named =
            |settings: &Settings| settings.named_templates.iter().map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>();
        assert_eq!((read().template.as_deref(), named(&read())), (Some("d"), vec!["tool_use t".to_owned()]));
        fs::write(dir.join(TEMPLATE), "file").unwrap();
        fs::create_dir(dir.join(MORE_TEMPLATES)).unwrap();
        fs::write(dir.join(MORE_TEMPLATES).join("tool_use.jinja"), "tools").unwrap();
        fs::write(dir.join(MORE_TEMPLATES).join("rag.jinja"), "rag").unwrap();
        assert_eq!(
            (read().template.as_deref(), named(&read())),
            (Some("file"), vec!["rag rag".into(), "tool_use tools".into()])
        );
        fs::write(dir.join(CONFIG), "{").unwrap();
        assert!(Settings::read(dir).unwrap_err().to_string().contains("it is not JSON"));
    }

    #[test]
    fn one_token_may_be_added_at_each_end() {
        let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
        let text = || json!({"Sequence": {"id": "A", "type_id": 0}});
        let template = |single: Value| {
            let tokens = json!({"<s>": {"ids": [1]}, "</s>": {"ids": [2]}});
            json!({"type": "TemplateProcessing", "single": single, "special_tokens": tokens})
        };
        let both = template(json!([piece("<s>"), text(), piece("</s>")]));
        assert_eq!(affixes(&both), Ok(Affixes { prefix: vec![1], suffix: vec![2] }));
        let byte_level = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, both]});
        assert_eq!(affixes(&byte_level), Ok(Affixes { prefix: vec![1], suffix: vec![2] }));
        assert_eq!(affixes(&Value::Null), Ok(Affixes::default()));
        let roberta = json!({"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]});
        assert_eq!(affixes(&roberta), Ok(Affixes { prefix: vec![1], suffix: vec![2] }));
        let twice = affixes(&template(json!([piece("<s>"), piece("</s>"), text()]))).unwrap_err();
        assert!(twice.contains("more than one token"), "{twice}");
        assert!(
            affixes(&template(json!([piece("<x>"), text()]))).unwrap_err().contains("the token `<x>` without an id")
        );
        assert!(affixes(&json!({"type": "New"})).unwrap_err().contains("the post-processor `New`"));
    }
}
