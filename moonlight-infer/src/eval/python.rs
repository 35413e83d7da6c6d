//! What Python makes of texts, where Rust makes something else of them.

/// `str.isspace`: Unicode's white space, and the four separators of ASCII.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// `str.strip`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.rstrip`.
pub(super) fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `str.capitalize`: the first character in title case, the others small.
pub(super) fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let first = match characters.next() {
        // One character for two letters has a form with the first of them large.
        Some('Ǆ' | 'ǅ' | 'ǆ') => "ǅ".to_owned(),
        Some('Ǉ' | 'ǈ' | 'ǉ') => "ǈ".to_owned(),
        Some('Ǌ' | 'ǋ' | 'ǌ') => "ǋ".to_owned(),
        Some('Ǳ' | 'ǲ' | 'ǳ') => "ǲ".to_owned(),
        Some(first) => {
            // Of `ß`, which becomes two letters, one is large.
            let mut large = first.to_uppercase();
            let head: String = large.next().into_iter().collect();
            head + &large.collect::<String>().to_lowercase()
        }
        None => String::new(),
    };
    first + &characters.as_str().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_and_capitals_are_pythons() {
        // Of CPython 3.11.
        assert_eq!(strip("\x1c\u{85} \u{3000}a\u{200b}\x1f"), "a\u{200b}");
        assert_eq!(rstrip(" a\u{a0}\n"), " a");
        for (text, expected) in
            [("", ""), ("he Sits", "He sits"), ("ßA", "Ssa"), ("ﬁx", "Fix"), ("ǆX", "ǅx"), ("éÉ", "Éé"), ("1A", "1a")]
        {
            assert_eq!(capitalize(text), expected);
        }
    }
}
