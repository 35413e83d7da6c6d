//! `rank_pattern` and `alpha_pattern`: maps from keys to numbers. Keys are Python regular expressions over module
//! names; in practice they consist of names, `.*` and digits. Matching a key takes time in proportion to its length
//! times the name's, and keys that are plain names are looked up in a map.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The most keys; a model of the family has about 70,000 projections.
const MOST_KEYS: usize = 100_000;
/// The most bytes of all keys that are not plain names, together.
const MOST_TEXT: usize = 200_000;
/// The most bytes of all keys with `*`, `+` or `?`, together. They take the most time to match.
const MOST_WILD: usize = 5_000;

/// Numbers by key, in the file's order: the first key that matches counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Patterns {
    names: HashMap<String, (usize, f64)>,
    expressions: Vec<(usize, Key, f64)>,
}

impl Patterns {
    /// The number of the first key that matches one of a module's names.
    pub(super) fn find(&self, names: &[String]) -> Option<f64> {
        let ends = names.iter().flat_map(|name| {
            let dots = name.match_indices('.').map(|(at, _)| &name[at + 1..]);
            std::iter::once(name.as_str()).chain(dots)
        });
        let named = ends.filter_map(|end| self.names.get(end)).min_by_key(|(at, _)| *at);
        // An expression can only come first if it is listed before that name.
        let before = self.expressions.iter().take_while(|(at, ..)| named.is_none_or(|(first, _)| at < first));
        let expressed = before.into_iter().find(|(_, key, _)| names.iter().any(|name| key.matches(name)));
        expressed.map(|(.., number)| *number).or(named.map(|(_, number)| *number))
    }

    /// All numbers.
    pub(super) fn numbers(&self) -> impl Iterator<Item = f64> {
        self.names.values().map(|(_, number)| *number).chain(self.expressions.iter().map(|(.., number)| *number))
    }
}

impl<'de> Deserialize<'de> for Patterns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Patterns;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of patterns to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Patterns, A::Error> {
                let mut patterns = Patterns::default();
                let (mut at, mut text, mut wild) = (0, 0, 0);
                while let Some((key, number)) = map.next_entry::<String, f64>()? {
                    let Some(compiled) = Key::new(&key) else {
                        let read = "supported are names, `.*`, `\\d+` and `[0-9]+`";
                        return Err(A::Error::custom(format!("the pattern `{key}`; {read}")));
                    };
                    if let Some(name) = compiled.literal() {
                        if patterns.names.insert(name, (at, number)).is_some() {
                            return Err(A::Error::custom(format!("the pattern `{key}` twice")));
                        }
                    } else {
                        text += key.len();
                        wild += if compiled.has_fixed_length() { 0 } else { key.len() };
                        patterns.expressions.push((at, compiled, number));
                    }
                    at += 1;
                    if at > MOST_KEYS || text > MOST_TEXT || wild > MOST_WILD {
                        return Err(A::Error::custom(format!(
                            "too many patterns; the limits are {MOST_KEYS} patterns, {MOST_TEXT} bytes of those that are not \
                             plain names, and {MOST_WILD} bytes of those with `*`, `+` or `?`"
                        )));
                    }
                }
                Ok(patterns)
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// A character class of a pattern, with its repetition.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    class: CharClass,
    least: usize,
    /// Whether it may be repeated.
    many: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum CharClass {
    Literal(char),
    Any,
    Digit,
}

/// A compiled key.
#[derive(Debug, Clone)]
struct Key {
    pieces: Vec<Piece>,
    /// Whether it must match from the name's beginning.
    from_start: bool,
}

impl Key {
    /// Compiles letters, escaped characters, `.`, `\d` and `[0-9]`, each optionally followed by `*`, `+` or `?`; `None`
    /// for any other expression.
    fn new(text: &str) -> Option<Self> {
        let (text, from_start) = text.strip_prefix('^').map_or((text, false), |text| (text, true));
        // A match always ends at the end of the name, so that `$` has no effect.
        let mut rest = text.strip_suffix('$').unwrap_or(text);
        let mut pieces = Vec::new();
        while let Some(first) = rest.chars().next() {
            let (class, length) = if rest.starts_with("[0-9]") {
                (CharClass::Digit, 5)
            } else if rest.starts_with("\\d") {
                (CharClass::Digit, 2)
            } else if let Some(escaped) = rest.strip_prefix('\\') {
                let escaped = escaped.chars().next().filter(|escaped| !escaped.is_alphanumeric())?;
                (CharClass::Literal(escaped), 1 + escaped.len_utf8())
            } else if first == '.' {
                (CharClass::Any, 1)
            } else if "()[]{}|^$*+?".contains(first) {
                return None;
            } else {
                (CharClass::Literal(first), first.len_utf8())
            };
            rest = &rest[length..];
            let (least, many, length) = match rest.chars().next() {
                Some('*') => (0, true, 1),
                Some('+') => (1, true, 1),
                Some('?') => (0, false, 1),
                _ => (1, false, 0),
            };
            rest = &rest[length..];
            pieces.push(Piece { class, least, many });
        }
        Some(Self { pieces, from_start })
    }

    /// The name that the key matches, if it is a plain name.
    fn literal(&self) -> Option<String> {
        let once = |piece: &Piece| match piece {
            Piece { class: CharClass::Literal(literal), least: 1, many: false } => Some(*literal),
            _ => None,
        };
        self.pieces.iter().map(once).collect::<Option<String>>().filter(|_| !self.from_start)
    }

    /// Whether all names that the key matches have the same length.
    fn has_fixed_length(&self) -> bool {
        self.pieces.iter().all(|piece| piece.least == 1 && !piece.many)
    }

    /// Whether the whole name matches, or its end after one of its dots, as in peft's `(.*\.)?(KEY)$`.
    fn matches(&self, name: &str) -> bool {
        if self.has_fixed_length() {
            // The match can begin at only one position, so that comparing from the end suffices.
            let mut name = name.chars().rev();
            return self
                .pieces
                .iter()
                .rev()
                .all(|piece| name.next().is_some_and(|character| piece.class.fits(character)))
                && name.next().is_none_or(|before| before == '.' && !self.from_start);
        }
        // The set of positions in the key that the characters so far may have reached, as in Thompson's simulation of a
        // nondeterministic automaton. Backtracking would take exponential time.
        let mut now = vec![false; self.pieces.len() + 1];
        let mut next = now.clone();
        let mut may_begin = true;
        for character in name.chars() {
            now[0] |= may_begin;
            self.skip(&mut now);
            next.fill(false);
            for (at, piece) in self.pieces.iter().enumerate().filter(|(at, _)| now[*at]) {
                if piece.class.fits(character) {
                    next[at + 1] = true;
                    // A repetition stays at the piece, whose remaining repetitions are optional.
                    next[at] |= piece.many;
                }
            }
            std::mem::swap(&mut now, &mut next);
            may_begin = character == '.' && !self.from_start;
        }
        self.skip(&mut now);
        now[self.pieces.len()]
    }

    /// Adds the positions that are reached by skipping optional pieces.
    fn skip(&self, places: &mut [bool]) {
        for (at, piece) in self.pieces.iter().enumerate() {
            places[at + 1] |= places[at] && piece.least == 0;
        }
    }
}

impl CharClass {
    fn fits(&self, character: char) -> bool {
        match self {
            Self::Literal(literal) => *literal == character,
            Self::Any => true,
            Self::Digit => character.is_ascii_digit(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(key: &str, name: &str) -> bool {
        Key::new(key).unwrap().matches(name)
    }

    #[test]
    fn keys_match_as_pefts_do() {
        let name = "model.layers.12.mlp.experts.gate_up_proj";
        for key in [
            "gate_up_proj",
            "experts.gate_up_proj",
            ".*\\.gate_up_proj",
            "model.layers.12.mlp.experts.gate_up_proj",
            "^model\\.layers\\.\\d+\\.mlp\\.experts\\.gate_up_proj",
            "layers.[0-9]+.mlp.experts.gate_up_proj$",
        ] {
            assert!(matches(key, name), "{key}");
        }
        for key in ["up_proj", "gate_up", "layers.1.mlp.experts.gate_up_proj", ".*\\.down_proj"] {
            assert!(!matches(key, name), "{key}");
        }
        assert!(matches("^model.*proj", name) && !matches("^layers.*proj", name), "`^` is the name's beginning");
        assert!(matches("lay.?.?rs..*", name) && !matches("laye.?.?.?s.12.mlp", name));
        assert!(matches("a+b*c", "x.aac") && !matches("a+b*c", "x.bc") && !matches("a+", ""));
        assert!(Key::new("(q|k)_proj").is_none());
        assert!(Key::new("a\\w").is_none());
    }

    /// With Python's `re.fullmatch` the time for these keys doubles with each star.
    #[test]
    fn many_stars_take_little_time() {
        let name = "model.layers.12.mlp.experts.gate_up_proj";
        let begun = std::time::Instant::now();
        for part in [".*", "a?", "[0-9]*", ".+"] {
            let key = Key::new(&format!("{}X", part.repeat(2_000))).unwrap();
            assert!(!key.matches(name), "{part}");
        }
        assert!(Key::new(&".*".repeat(2_000)).unwrap().matches(name));
        assert!(begun.elapsed() < std::time::Duration::from_secs(2), "{:?}", begun.elapsed());
    }

    #[test]
    fn the_first_key_that_matches_counts() {
        let patterns: Patterns =
            serde_json::from_str(r#"{"mlp\\.up_proj": 1, ".*up_proj": 2, "up_proj": 3, "layers.1.x": 4, "x": 5}"#)
                .unwrap();
        let find = |name: &str| patterns.find(&[name.to_owned(), format!("{name}.weight")]);
        assert_eq!(find("model.layers.1.mlp.up_proj"), Some(1.0));
        assert_eq!(find("model.layers.1.up_proj"), Some(2.0));
        assert_eq!(find("model.layers.1.x"), Some(4.0));
        assert_eq!(find("model.layers.2.x"), Some(5.0));
        assert_eq!(find("model.layers.2.y"), None);
        assert_eq!(patterns.numbers().count(), 5);
        for wrong in [r#"{"a": 1, "a": 2}"#, r#"{"a": "b"}"#, r#"{"a(": 1}"#, r#"[1]"#] {
            assert!(serde_json::from_str::<Patterns>(wrong).is_err(), "{wrong}");
        }
    }

    /// As many keys as are allowed, against as many names as a model has.
    #[test]
    fn many_keys_are_found_in_time_or_refused() {
        let map = |keys: &mut dyn Iterator<Item = String>| {
            let keys: Vec<String> = keys.map(|key| format!("{}:1", serde_json::json!(key))).collect();
            serde_json::from_str::<Patterns>(&format!("{{{}}}", keys.join(",")))
        };
        let names: Vec<String> = (0..2_000).map(|at| format!("model.layers.{at}.mlp.experts.7.up_proj")).collect();
        let begun = std::time::Instant::now();
        for patterns in [
            map(&mut (0..90_000).map(|at| format!("layers\\.x{at}\\.mlp\\.experts\\.7\\.up_proj"))),
            map(&mut (0..5_000).map(|at| format!("{at}.mlp.experts.7.up_proj.x"))),
            map(&mut (0..200).map(|at| format!(".*.*.*.*.*.*.*.*{at}X"))),
        ] {
            let patterns = patterns.unwrap();
            assert!(names.iter().all(|name| patterns.find(std::slice::from_ref(name)).is_none()));
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());
        for keys in [
            map(&mut (0..100_001).map(|at| format!("x{at}"))),
            map(&mut (0..3_000).map(|at| format!(".*{at}"))),
            map(&mut std::iter::once("a.".repeat(150_000))),
        ] {
            assert!(keys.unwrap_err().to_string().contains("too many patterns"));
        }
    }

    #[test]
    fn plain_names_are_distinguished_from_expressions() {
        let literal = |key: &str| Key::new(key).unwrap().literal();
        assert_eq!(literal("mlp\\.up_proj").as_deref(), Some("mlp.up_proj"));
        for key in ["mlp.up_proj", "up_proj+", "^up_proj", "\\d"] {
            assert_eq!(literal(key), None, "{key}");
        }
    }
}
