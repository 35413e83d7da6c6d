//! The keys of `rank_pattern` and `alpha_pattern`: Python's regular expressions over names of modules, of which people
//! write names, `.*` and digits.

/// One piece of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    what: What,
    least: usize,
    /// Whether there may be more than one.
    many: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Literal(char),
    Any,
    Digit,
}

/// A compiled key.
#[derive(Debug, Clone)]
pub(super) struct Key(Vec<Piece>);

impl Key {
    /// Compiles letters, escaped characters, `.`, `\d` and `[0-9]`, each with `*`, `+` or `?` or nothing behind it; `None`
    /// for any other expression.
    pub(super) fn new(text: &str) -> Option<Self> {
        let text = text.strip_prefix('^').unwrap_or(text);
        let mut rest = text.strip_suffix('$').unwrap_or(text);
        let mut pieces = Vec::new();
        while let Some(first) = rest.chars().next() {
            let (what, length) = if rest.starts_with("[0-9]") {
                (What::Digit, 5)
            } else if rest.starts_with("\\d") {
                (What::Digit, 2)
            } else if let Some(escaped) = rest.strip_prefix('\\') {
                let escaped = escaped.chars().next().filter(|escaped| !escaped.is_alphanumeric())?;
                (What::Literal(escaped), 1 + escaped.len_utf8())
            } else if first == '.' {
                (What::Any, 1)
            } else if "()[]{}|^$*+?".contains(first) {
                return None;
            } else {
                (What::Literal(first), first.len_utf8())
            };
            rest = &rest[length..];
            let (least, many, length) = match rest.chars().next() {
                Some('*') => (0, true, 1),
                Some('+') => (1, true, 1),
                Some('?') => (0, false, 1),
                _ => (1, false, 0),
            };
            rest = &rest[length..];
            pieces.push(Piece { what, least, many });
        }
        Some(Self(pieces))
    }

    /// Whether the whole name matches, or what is behind one of its dots: peft's `(.*\.)?(KEY)$`.
    pub(super) fn matches(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        let starts = (0..name.len()).filter(|&at| at == 0 || name[at - 1] == '.');
        starts.into_iter().any(|at| whole(&self.0, &name[at..]))
    }
}

fn whole(pieces: &[Piece], name: &[char]) -> bool {
    let Some((piece, rest)) = pieces.split_first() else { return name.is_empty() };
    let fits = |character: &&char| match piece.what {
        What::Literal(literal) => **character == literal,
        What::Any => true,
        What::Digit => character.is_ascii_digit(),
    };
    let most = name.iter().take_while(fits).count().min(if piece.many { usize::MAX } else { 1 });
    (piece.least..=most).any(|count| whole(rest, &name[count..]))
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
        assert!(Key::new("(q|k)_proj").is_none());
        assert!(Key::new("a\\w").is_none());
    }
}
