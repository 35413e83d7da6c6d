//! The identity of a run, which its checkpoints record: a run resumes from its own checkpoint only.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::recipe::RENAMED_KEYS;

/// What a run consists of, in addition to its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The recipe with every default, as JSON.
    pub recipe: Value,
    /// The dtype of the weights: `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// A hash of the tokenizer's files.
    pub tokenizer: ContentHash,
    /// A hash of the tokens of the training data, their order and their division into sequences.
    pub train_data: ContentHash,
    /// A hash of the tokens of the validation data.
    pub valid_data: ContentHash,
    /// A hash of the base model of adapters; `None` if the model itself is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<ContentHash>,
}

/// A part of a run that is compared by its contents.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContentHash {
    /// What messages call it: a path in backticks, or a size.
    pub name: String,
    /// A hash of the contents, hexadecimal.
    pub hash: String,
}

impl PartialEq for ContentHash {
    /// Compares the hashes only: files may have been moved.
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

/// A value that differs between the run and a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key of the recipe in backticks, or the name of another part of the run.
    pub key: String,
    /// The value of the run that resumes.
    pub now: String,
    /// The value that the checkpoint was written with.
    pub then: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} and was {}", self.key, self.now, self.then)
    }
}

/// Whether a key of the recipe may change when a run resumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// It may: it does not affect the steps, or what it names is compared by its contents.
    Free,
    /// It may, and the change is logged: later steps differ from those of the original run.
    Announced,
    /// It may not: the state in the checkpoint would not fit, or would mean something else.
    Fixed,
}

/// The rules: a key, or a section if it ends in a dot. The first one that matches applies.
const RULES: &[(&str, Rule)] = &[
    ("run.seed", Rule::Fixed),
    ("run.", Rule::Free),
    // Free, because the dtype of the weights, the shape of the model and the contents of the base are compared instead.
    ("model.dtype", Rule::Free),
    ("model.matmul", Rule::Announced),
    ("model.path", Rule::Free),
    ("model.preset", Rule::Free),
    ("model.", Rule::Fixed),
    ("data.sequence_length", Rule::Fixed),
    ("data.pack", Rule::Fixed),
    ("data.shuffle", Rule::Fixed),
    // The other keys of `[data]` are free, because the tokens are compared instead.
    ("data.", Rule::Free),
    ("optimizer.name", Rule::Fixed),
    ("optimizer.rounding", Rule::Fixed),
    ("optimizer.layout", Rule::Fixed),
    ("optimizer.view", Rule::Fixed),
    ("optimizer.blocks", Rule::Fixed),
    ("optimizer.adaptive", Rule::Fixed),
    ("optimizer.", Rule::Announced),
    ("schedule.", Rule::Announced),
    ("moe.", Rule::Announced),
    ("train.freeze", Rule::Fixed),
    ("train.batch_size", Rule::Announced),
    ("train.gradient_accumulation", Rule::Announced),
    ("train.gradient_clip", Rule::Announced),
    ("train.steps", Rule::Announced),
    ("train.", Rule::Free),
    ("lora.dropout", Rule::Announced),
    ("lora.path", Rule::Free),
    ("lora.", Rule::Fixed),
    ("distributed.", Rule::Free),
    ("sample.", Rule::Free),
    ("eval.", Rule::Free),
];

fn rule(key: &str) -> Rule {
    let matches = |pattern: &str| match pattern.ends_with('.') {
        true => key.starts_with(pattern),
        false => key == pattern || key.strip_prefix(pattern).is_some_and(|rest| rest.starts_with('.')),
    };
    // A new section may lack a rule. Refusing a change of it is safe, ignoring one is not.
    RULES.iter().find(|(pattern, _)| matches(pattern)).map_or(Rule::Fixed, |(_, rule)| *rule)
}

/// The differences between a run and a checkpoint.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Differences with which the run may not resume.
    pub refused: Vec<Difference>,
    /// Differences that are logged; the run resumes.
    pub announced: Vec<Difference>,
}

impl RunIdentity {
    /// The differences between this run and `then`, the identity in a checkpoint.
    pub fn differences(&self, then: &Self) -> Differences {
        let mut differences = Differences::default();
        let (now_keys, mut then_keys) = (flattened(&self.recipe), flattened(&then.recipe));
        for (old, new) in RENAMED_KEYS {
            if let Some(value) = then_keys.remove(*old) {
                then_keys.insert((*new).to_owned(), value);
            }
        }
        let missing = Value::Null;
        let keys: std::collections::BTreeSet<&String> = now_keys.keys().chain(then_keys.keys()).collect();
        for key in keys {
            let value = |keys: &BTreeMap<String, Value>| keys.get(key).unwrap_or(&missing).clone();
            let (new, old) = (value(&now_keys), value(&then_keys));
            if new == old {
                continue;
            }
            let difference = Difference { key: format!("`{key}`"), now: shown(&new), then: shown(&old) };
            match rule(key) {
                Rule::Free => {}
                Rule::Announced => differences.announced.push(difference),
                Rule::Fixed => differences.refused.push(difference),
            }
        }
        let mut by_contents = |what: &str, now: &ContentHash, then: &ContentHash| {
            if now != then {
                let shown = |digest: &ContentHash, other: &ContentHash| match digest.name == other.name {
                    // With the same name for both, only the hash shows that the contents differ.
                    true => format!("{} ({})", digest.name, digest.hash.get(..12).unwrap_or(&digest.hash)),
                    false => digest.name.clone(),
                };
                let (key, now, then) = (what.to_owned(), shown(now, then), shown(then, now));
                differences.refused.push(Difference { key, now, then });
            }
        };
        by_contents("the tokenizer", &self.tokenizer, &then.tokenizer);
        by_contents("the training data", &self.train_data, &then.train_data);
        by_contents("the validation data", &self.valid_data, &then.valid_data);
        // If only one of them has a base, the keys of `[lora]` differ already.
        if let (Some(now), Some(then)) = (&self.base, &then.base) {
            by_contents("the base model", now, then);
        }
        if self.dtype != then.dtype {
            let (key, now, then) = ("the dtype of the weights".into(), self.dtype.clone(), then.dtype.clone());
            differences.refused.push(Difference { key, now, then });
        }
        differences
    }
}

/// The values of a recipe by `section.key`; keys of inner tables are appended with dots.
fn flattened(recipe: &Value) -> BTreeMap<String, Value> {
    fn walk(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    walk(&path, value, into);
                }
            }
            Value::Null => {}
            value => drop(into.insert(prefix.to_owned(), value.clone())),
        }
    }
    let mut keys = BTreeMap::new();
    walk("", recipe, &mut keys);
    keys
}

/// The value as messages show it.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "absent".into(),
        value => value.to_string(),
    }
}

/// The differences between the shape of a model and that of a checkpoint, both as keys of `config.json`.
pub fn shape_differences(now: &Value, then: &Value) -> Vec<Difference> {
    let (now, then) = (flattened(now), flattened(then));
    let keys: std::collections::BTreeSet<&String> = now.keys().chain(then.keys()).collect();
    let value = |keys: &BTreeMap<String, Value>, key: &String| keys.get(key).map_or("absent".into(), shown);
    let differs = keys.into_iter().filter(|key| now.get(*key) != then.get(*key));
    differs
        .map(|key| Difference { key: format!("`model.{key}`"), now: value(&now, key), then: value(&then, key) })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn digest(name: &str, hash: &str) -> ContentHash {
        ContentHash { name: name.into(), hash: hash.into() }
    }

    fn identity(recipe: Value) -> RunIdentity {
        RunIdentity {
            recipe,
            dtype: "f32".into(),
            tokenizer: digest("`a`", "1"),
            train_data: digest("10 tokens", "2"),
            valid_data: digest("5 tokens", "3"),
            base: None,
        }
    }

    #[test]
    fn only_listed_keys_may_change() {
        let then = identity(json!({"run": {"seed": 1, "dir": "a"}, "train": {"steps": 4, "keep": 2},
            "optimizer": {"learning_rate": 0.1, "name": "muon"}, "lora": null}));
        assert_eq!(then.differences(&then), Differences::default());
        let now = identity(json!({"run": {"seed": 2, "dir": "b"}, "train": {"steps": 8, "keep": 1},
            "optimizer": {"learning_rate": 0.2, "name": "muon"}, "lora": {"rank": 4}}));
        let Differences { refused, announced } = now.differences(&then);
        let keys = |differences: &[Difference]| differences.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(keys(&refused), ["`lora.rank` is 4 and was absent", "`run.seed` is 2 and was 1"]);
        assert_eq!(keys(&announced), ["`optimizer.learning_rate` is 0.2 and was 0.1", "`train.steps` is 8 and was 4"]);
    }

    #[test]
    fn a_checkpoint_may_have_the_former_name_of_a_key() {
        let (old, new) = RENAMED_KEYS[0];
        let with = |key: &str, value: &str| {
            let (section, key) = key.split_once('.').unwrap();
            identity(json!({section: {key: value}}))
        };
        let then = with(old, "int4");
        let now = |value: &str| with(new, value);
        assert_eq!(now("int4").differences(&then), Differences::default());
        let refused: Vec<_> = now("int8").differences(&then).refused.iter().map(ToString::to_string).collect();
        assert_eq!(refused, ["`model.quantize` is \"int8\" and was \"int4\""]);
    }

    #[test]
    fn files_are_compared_by_their_contents() {
        let then = identity(json!({}));
        let mut now = then.clone();
        now.tokenizer.name = "`moved`".into();
        assert_eq!(now.differences(&then), Differences::default());
        now.valid_data = digest("6 tokens", "4");
        now.base = Some(digest("`b`", "9"));
        let mut other = then.clone();
        other.base = Some(digest("`b`", "8"));
        let refused: Vec<_> = now.differences(&other).refused.iter().map(ToString::to_string).collect();
        assert_eq!(
            refused,
            ["the validation data is 6 tokens and was 5 tokens", "the base model is `b` (9) and was `b` (8)"]
        );
    }

    #[test]
    fn a_section_without_a_rule_is_fixed() {
        assert_eq!(rule("nonsense.key"), Rule::Fixed);
        assert_eq!(rule("train.freeze"), Rule::Fixed);
        assert_eq!(rule("train.steps"), Rule::Announced);
        assert_eq!(rule("optimizer.adaptive.kind"), Rule::Fixed);
        assert_eq!(rule("optimizer.momentum"), Rule::Announced);
    }
}
