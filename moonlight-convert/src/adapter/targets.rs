//! Which modules an `adapter_config.json` targets, by peft's rules (`check_target_module_exists`, `_inject_parameters`
//! and `_set_trainable` of peft 0.21).

use std::collections::HashSet;

use fancy_regex::{Regex, RegexBuilder};
use serde_json::Value;

/// Length limit of an expression in bytes.
const LONGEST: usize = 20_000;
/// The most expressions in a list.
const MOST: usize = 10;
/// The most names in `modules_to_save`; each is compared with the end of each module name.
const MOST_SAVED: usize = 1_000;
/// Limit of backtracking steps per name, against expressions of exponential time.
const BACKTRACKING: usize = 20_000;
/// Size limit of a compiled expression in bytes.
const COMPILED: usize = 1 << 20;
/// peft's name for every linear layer except the head.
const ALL_LINEAR: &str = "all-linear";

/// `target_modules` or `exclude_modules`.
#[derive(Debug, Clone)]
pub(super) enum Names {
    /// Every linear layer except the head.
    AllLinear,
    /// Full names, and ends of names that begin after a dot.
    List(HashSet<String>),
    /// A regular expression for full names.
    Expression(Regex),
}

/// Which modules have adapters, and which were fully trained.
#[derive(Debug, Clone, Default)]
pub(super) struct Targets {
    pub(super) modules: Option<Names>,
    pub(super) exclude: Option<Names>,
    /// `layers_to_transform`.
    pub(super) layers: Option<HashSet<usize>>,
    /// `layers_pattern`.
    pub(super) layers_patterns: Vec<Regex>,
    /// `target_parameters`.
    pub(super) parameters: HashSet<String>,
    /// `modules_to_save`.
    pub(super) saved: Vec<String>,
}

fn expression(pattern: &str) -> Result<Regex, String> {
    if pattern.len() > LONGEST {
        return Err(format!("an expression of {} bytes; the limit is {LONGEST}", pattern.len()));
    }
    let mut builder = RegexBuilder::new(pattern);
    builder.backtrack_limit(BACKTRACKING).delegate_size_limit(COMPILED).delegate_dfa_size_limit(COMPILED);
    builder.build().map_err(|_| "an invalid or unsupported expression".to_owned())
}

impl Names {
    /// Reads a value of the config; `None` for null. The error is the end of "has KEY with ...".
    pub(super) fn read(value: &Value) -> Result<Option<Self>, String> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) if text.eq_ignore_ascii_case(ALL_LINEAR) => Ok(Some(Self::AllLinear)),
            Value::String(text) => Ok(Some(Self::Expression(expression(&format!(r"\A(?:{text})\z"))?))),
            value => Ok(Some(Self::List(texts(value)?.into_iter().collect()))),
        }
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::AllLinear => name != "lm_head" && !name.ends_with(".embed_tokens"),
            Self::List(names) => ends(name).any(|end| names.contains(end)),
            // An expression that exceeds the limit of backtracking steps does not match.
            Self::Expression(expression) => expression.is_match(name).unwrap_or(false),
        }
    }
}

/// A list of strings, empty for null. The error is the end of "has KEY with ...".
pub(super) fn texts(value: &Value) -> Result<Vec<String>, String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) => {
            list.iter().map(text).collect::<Option<_>>().ok_or("a list with entries that are not names".into())
        }
        _ => Err("a value that is not a list of names".into()),
    }
}

/// `modules_to_save`. The error is the end of "has KEY with ...".
pub(super) fn saved(value: &Value) -> Result<Vec<String>, String> {
    let list = texts(value)?;
    match list.len() {
        count if count > MOST_SAVED => Err(format!("{count} names; the limit is {MOST_SAVED}")),
        _ => Ok(list),
    }
}

/// `layers_pattern`, a string or a list of strings. The error is the end of "has KEY with ...".
pub(super) fn layer_patterns(value: &Value) -> Result<Vec<Regex>, String> {
    let list = match value {
        Value::String(text) if text.is_empty() => Vec::new(),
        Value::String(text) => vec![text.clone()],
        value => texts(value)?,
    };
    if list.len() > MOST {
        return Err(format!("{} expressions; the limit is {MOST}", list.len()));
    }
    list.iter().map(|pattern| expression(&format!(r"\A(?:|.*?\.)(?:{pattern})\.(\d+)\."))).collect()
}

/// `layers_to_transform`, a layer or a list of layers. The error is the end of "has KEY with ...".
pub(super) fn layers(value: &Value) -> Result<Option<HashSet<usize>>, String> {
    let number = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
    let read = match value {
        Value::Null => Some(None),
        Value::Array(list) if list.is_empty() => Some(None),
        Value::Array(list) => list.iter().map(number).collect::<Option<_>>().map(Some),
        value => number(value).map(|layer| Some(HashSet::from([layer]))),
    };
    read.ok_or_else(|| "a value that is not a list of layers".to_owned())
}

/// The name, and its ends after each of its dots.
fn ends(name: &str) -> impl Iterator<Item = &str> {
    std::iter::once(name).chain(name.match_indices('.').map(|(at, _)| &name[at + 1..]))
}

impl Targets {
    /// Whether the config targets the module, by its name in transformers (`model.layers.0.…`).
    pub(super) fn has_module(&self, name: &str) -> bool {
        let excluded = self.exclude.as_ref().is_some_and(|names| names.matches(name)) || self.saves(name);
        let Some(modules) = self.modules.as_ref().filter(|modules| !excluded && modules.matches(name)) else {
            return false;
        };
        // As in peft, `layers_to_transform` only restricts names that are listed by their end.
        match modules {
            Names::List(names) if !names.contains(name) => self.in_layers(name),
            _ => true,
        }
    }

    fn in_layers(&self, name: &str) -> bool {
        let Some(layers) = &self.layers else { return true };
        let number = match self.layers_patterns.as_slice() {
            // peft's default: the first number after the first two parts of the name.
            [] => name.split('.').skip(2).find(|part| part.bytes().all(|byte| byte.is_ascii_digit())),
            patterns => patterns
                .iter()
                .find_map(|pattern| pattern.captures(name).ok().flatten()?.get(1).map(|number| number.as_str())),
        };
        number.and_then(|number| number.parse().ok()).is_some_and(|layer: usize| layers.contains(&layer))
    }

    /// Whether the config targets the parameter, by its name in transformers.
    pub(super) fn has_parameter(&self, name: &str) -> bool {
        ends(name).any(|end| self.parameters.contains(end))
    }

    /// Whether the module, or one that contains it, was fully trained.
    pub(super) fn saves(&self, module: &str) -> bool {
        let starts = std::iter::once(module).chain(module.match_indices('.').map(|(at, _)| &module[..at]));
        // peft compares the end of the name, with or without a preceding dot: `norm` matches `input_layernorm`, too.
        starts.into_iter().any(|start| self.saved.iter().any(|saved| start.ends_with(saved.as_str())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn targets(modules: Value) -> Targets {
        Targets { modules: Names::read(&modules).unwrap(), ..Targets::default() }
    }

    const Q: &str = "model.layers.3.self_attn.q_proj";

    #[test]
    fn modules_are_targeted_by_name_end_or_expression() {
        for modules in [
            json!(["q_proj"]),
            json!(["x", "self_attn.q_proj"]),
            json!([Q]),
            json!("all-linear"),
            json!("ALL-LINEAR"),
            json!(r".*\.(q|k)_proj"),
            // As unsloth writes it.
            json!(
                r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
            ),
            json!(r"^(?!.*vision).*q_proj$"),
        ] {
            assert!(targets(modules.clone()).has_module(Q), "{modules}");
        }
        for modules in [json!(["proj"]), json!([]), json!(null), json!("q_proj"), json!(["v_proj"])] {
            assert!(!targets(modules.clone()).has_module(Q), "{modules}");
        }
        assert!(!targets(json!("all-linear")).has_module("lm_head"));
        assert!(targets(json!(["lm_head"])).has_module("lm_head"));
        for modules in [json!("(q"), json!([1]), json!(1), json!("a".repeat(30_000))] {
            assert!(Names::read(&modules).is_err(), "{modules}");
        }
    }

    #[test]
    fn layers_restrict_names_given_by_their_ends() {
        let limited = |modules: Value, layers: Value, pattern: Value| Targets {
            layers: super::layers(&layers).unwrap(),
            layers_patterns: layer_patterns(&pattern).unwrap(),
            ..targets(modules)
        };
        for (layers, pattern, expected) in [
            (json!([3]), json!(null), true),
            (json!(3), json!("layers"), true),
            (json!([0, 1]), json!(null), false),
            (json!([]), json!(null), true),
            (json!([3]), json!(["h", "layers"]), true),
            (json!([3]), json!("h"), false),
        ] {
            assert_eq!(limited(json!(["q_proj"]), layers.clone(), pattern).has_module(Q), expected, "{layers}");
        }
        assert!(limited(json!([Q]), json!([0]), json!(null)).has_module(Q), "a full name is not restricted to layers");
        assert!(super::layers(&json!(["x"])).is_err() && super::layers(&json!(-1)).is_err());
    }

    #[test]
    fn excluded_and_saved_modules_have_no_adapter() {
        let all = || targets(json!("all-linear"));
        let exclude = Names::read(&json!(["q_proj"])).unwrap();
        assert!(!Targets { exclude, ..all() }.has_module(Q));
        let saving = |name: &str| Targets { saved: vec![name.into()], ..all() };
        assert!(!saving("q_proj").has_module(Q) && !saving("self_attn").has_module(Q));
        assert!(saving("norm").saves("model.layers.0.input_layernorm") && !saving("norm").saves(Q));
    }

    #[test]
    fn an_exponential_expression_takes_little_time() {
        let begun = std::time::Instant::now();
        let names = targets(json!(r"(?:(a+)+)+\1(?=b).*"));
        assert!(!names.has_module(&"a".repeat(40)));
        assert!(begun.elapsed() < std::time::Duration::from_secs(2), "{:?}", begun.elapsed());
    }
}
