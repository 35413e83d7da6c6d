//! Python's string methods that differ from Rust's, and the harness's detokenizer for WikiText.

use regex::Regex;

/// `str.isspace` for one character: Unicode's white space and the four ASCII separators.
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

/// `str.capitalize`: the first character in title case, the others as in the lower case of the whole text (a sigma at the
/// end of a word is `ς`).
pub(super) fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    let lower = text.to_lowercase();
    // The first character has the same lower case, and so the same length, alone and in the text.
    let first_length: usize = first.to_lowercase().map(char::len_utf8).sum();
    title(first) + &lower[first_length..]
}

/// `str.title` of one character, by Unicode's title-case mappings (SpecialCasing and UnicodeData).
fn title(first: char) -> String {
    let one = match first {
        // Digraphs have a separate title-case form.
        'Ǆ' | 'ǅ' | 'ǆ' => 'ǅ',
        'Ǉ' | 'ǈ' | 'ǉ' => 'ǈ',
        'Ǌ' | 'ǋ' | 'ǌ' => 'ǋ',
        'Ǳ' | 'ǲ' | 'ǳ' => 'ǲ',
        // Georgian capitals are only used for whole words.
        '\u{10d0}'..='\u{10fa}' | '\u{10fd}'..='\u{10ff}' => first,
        // Greek letters with iota subscript.
        '\u{1f80}'..='\u{1faf}' => char::from_u32(u32::from(first) | 8).unwrap_or(first),
        'ᾳ' | 'ᾼ' => 'ᾼ',
        'ῃ' | 'ῌ' => 'ῌ',
        'ῳ' | 'ῼ' => 'ῼ',
        'ŉ' => return "ʼN".into(),
        _ => {
            // If the upper case has several letters (`ß`), only the first one remains upper case. An iota subscript remains a
            // subscript.
            let mut large = first.to_uppercase();
            let mut text: String = large.next().into_iter().collect();
            let greek = ('\u{1f00}'..='\u{1fff}').contains(&first);
            for letter in large {
                match letter {
                    'Ι' if greek => text.push('\u{345}'),
                    letter => text.extend(letter.to_lowercase()),
                }
            }
            return text;
        }
    };
    one.into()
}

/// `wikitext_detokenizer` of lm-evaluation-harness (0.4.13, `tasks/wikitext/preprocess_wikitext.py`), step by step: removes
/// the spaces around punctuation.
pub(super) fn wikitext_detokenizer(page: &str) -> String {
    // Python's `\s` also matches the four ASCII separators.
    const STEPS: [(Step, &str, &str); 24] = {
        use Step::{Pattern, Plain};
        [
            (Plain, "s '", "s'"),
            (Pattern, "/' [0-9]/", "/'[0-9]/"),
            (Plain, " @-@ ", "-"),
            (Plain, " @,@ ", ","),
            (Plain, " @.@ ", "."),
            (Plain, " : ", ": "),
            (Plain, " ; ", "; "),
            (Plain, " . ", ". "),
            (Plain, " ! ", "! "),
            (Plain, " ? ", "? "),
            (Plain, " , ", ", "),
            (Pattern, r"\([\s\x1c-\x1f]*([^)]*?)[\s\x1c-\x1f]*\)", "($1)"),
            (Pattern, r"\[[\s\x1c-\x1f]*([^\]]*?)[\s\x1c-\x1f]*\]", "[$1]"),
            (Pattern, r"\{[\s\x1c-\x1f]*([^}]*?)[\s\x1c-\x1f]*\}", "{$1}"),
            (Pattern, r#""[\s\x1c-\x1f]*([^"]*?)[\s\x1c-\x1f]*""#, r#""$1""#),
            (Pattern, r"'[\s\x1c-\x1f]*([^']*?)[\s\x1c-\x1f]*'", "'$1'"),
            (Plain, "= = = =", "===="),
            (Plain, "= = =", "==="),
            (Plain, "= =", "=="),
            (Plain, " \u{b0} ", "\u{b0}"),
            (Plain, " \n", "\n"),
            (Plain, "\n ", "\n"),
            (Plain, " N ", " 1 "),
            (Plain, " 's", "'s"),
        ]
    };
    let mut text = page.to_owned();
    for (step, from, to) in STEPS {
        text = match step {
            Step::Plain => text.replace(from, to),
            Step::Pattern => {
                let pattern = Regex::new(from).expect("the patterns are constants");
                pattern.replace_all(&text, to).into_owned()
            }
        };
    }
    text
}

/// What a step of [`wikitext_detokenizer`] searches for: a string or a regular expression.
#[derive(Clone, Copy)]
enum Step {
    Plain,
    Pattern,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strip_and_capitalize_are_those_of_python() {
        // The expected values are those of CPython 3.11.
        assert_eq!(strip("\x1c\u{85} \u{3000}a\u{200b}\x1f"), "a\u{200b}");
        assert_eq!(rstrip(" a\u{a0}\n"), " a");
        for (text, expected) in
            [("", ""), ("he Sits", "He sits"), ("ßA", "Ssa"), ("ﬁx", "Fix"), ("ǆX", "ǅx"), ("éÉ", "Éé"), ("1A", "1a")]
        {
            assert_eq!(capitalize(text), expected);
        }
        // Lower case depends on the word: a final sigma is another letter.
        for (text, expected) in [
            ("ΑΣ ΣΑΣ", "Ας σας"),
            ("ΣΑΣ", "Σας"),
            ("σ", "Σ"),
            ("İİ", "İi\u{307}"),
            ("\u{390}Σ", "\u{399}\u{308}\u{301}ς"),
        ] {
            assert_eq!(capitalize(text), expected);
        }
    }

    /// All characters whose title case is not the first letter of their upper case followed by lower case, in CPython 3.11
    /// (Unicode 14).
    #[test]
    fn special_title_cases_are_those_of_unicode() {
        for (text, expected) in [
            ("აბ", "აბ"),
            ("ჿ", "ჿ"),
            ("ŉ", "ʼN"),
            ("ǲ", "ǲ"),
            ("ᾀ", "ᾈ"),
            ("ᾈ", "ᾈ"),
            ("ᾗ", "ᾟ"),
            ("ᾧ", "ᾯ"),
            ("ᾳ", "ᾼ"),
            ("ῌ", "ῌ"),
            ("ῳα", "ῼα"),
            ("ᾲ", "\u{1fba}\u{345}"),
            ("ᾴ", "\u{386}\u{345}"),
            ("ᾷ", "\u{391}\u{342}\u{345}"),
            ("ῂ", "\u{1fca}\u{345}"),
            ("ῇ", "\u{397}\u{342}\u{345}"),
            ("ῴ", "\u{38f}\u{345}"),
            ("ῷ", "\u{3a9}\u{342}\u{345}"),
        ] {
            assert_eq!(capitalize(text), expected, "{text}");
        }
    }

    #[test]
    fn wikitext_is_detokenized_as_by_the_harness() {
        // The expected values are those of lm_eval 0.4.13.
        for (text, expected) in WIKITEXT {
            assert_eq!(wikitext_detokenizer(text), expected);
        }
    }

    const WIKITEXT: [(&str, &str); 4] = [
        (
            " = Robert = \n \n He was a 5 @,@ 000 @-@ metre runner ; \" a star \" , he said . \n",
            " = Robert =\n\nHe was a 5,000-metre runner; \"a star\", he said.\n",
        ),
        (
            " = = Early life = = \n ( born 1 @.@ 5 years ' before ) [ see ] { x } dogs ' tails ' s end ' N ' ! What ? \n = = = A = = = \n = = = = B = = = = \n",
            " == Early life ==\n(born 1.5 years'before) [see] {x} dogs' tails's end' 1 '! What?\n=== A ===\n==== B ====\n",
        ),
        (
            "25 ° C : N = 3 ( ) \" \" /' 5/ it 's \u{1c} ( \u{1f} a \u{1e} ) \u{a0}( \u{a0}b )",
            "25°C: 1 = 3 () \"\" /'[0-9]/ it's \u{1c} (a) \u{a0}(b)",
        ),
        ("", ""),
    ];
}
