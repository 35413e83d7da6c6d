//! The pre-tokenizers of llama.cpp by name, and the same as steps of `tokenizer.json`.
//!
//! llama.cpp's own converter chooses the name by a hash of the ids of a fixed text, which depends on the vocabulary. Here the
//! name follows from the expressions that split a text, so that it is also found for a vocabulary that no one has listed. A
//! name stands for expressions, for whether a piece that is a token as a whole is not merged (`ignore_merges`), and for a
//! default of `add_bos_token`.

use serde_json::{Value, json};

use crate::printable::printable;
use crate::tokenizer::pattern;

/// GPT-2's, which `ByteLevel` applies with `use_regex`.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Each digit is a piece: `Digits` with `individual_digits`.
const DIGIT: &str = r"\p{N}";
/// A run of digits is a piece: `Digits` without `individual_digits`.
const DIGITS: &str = r"\p{N}+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const NEWLINE: &str = r"[\r\n]";
/// The letters of scripts with upper and lower case.
const CASED: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const PUNCTUATION: &str = "\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+";
/// Ideographs and the scripts between U+0800 and them, and Hangul.
const EAST_ASIAN: &str = "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";
const SPACE_AT_END: &str = r"\s+$";
const UP_TO_THREE_DIGITS: &str = r"\p{N}{1,3}";
/// Ideographs, Hiragana and Katakana.
const IDEOGRAPHS: &str = "[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// A pre-tokenizer of llama.cpp.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    /// The names with these expressions and this treatment of complete pieces; the first is written.
    pub(super) names: &'static [&'static str],
    /// The expressions, applied one after the other to the pieces of the one before. `None` is the pattern of Moonlight.
    splits: Option<&'static [&'static str]>,
    /// Whether llama.cpp does not merge a piece that is a token as a whole.
    pub(super) ignore_merges: bool,
    /// `add_bos_token` for a file without the key.
    pub(super) adds_bos: bool,
    /// Whether the models with this name normalize texts to NFC.
    pub(super) nfc: bool,
    /// Where llama.cpp's implementation differs from the expressions.
    pub(super) difference: Option<&'static str>,
}

const fn plain(names: &'static [&'static str], splits: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, splits: Some(splits), ignore_merges: false, adds_bos: false, nfc: false, difference: None }
}

const CASE_BY_ASCII: &str = "llama.cpp's pre-tokenizer knows the case of ASCII letters only, and ends a word at a combining \
                             mark: words with other letters get other tokens there than in the model's own tokenizer";

/// Those whose expressions are known. Of two with the same expressions the first that treats complete pieces as the model
/// does is written.
const KNOWN: [PreTokenizer; 13] = [
    PreTokenizer {
        names: &["kimi-k2"],
        splits: None,
        ignore_merges: false,
        adds_bos: false,
        nfc: false,
        difference: Some(
            "llama.cpp's pre-tokenizer `kimi-k2` is not the model's own: it does not split a word before an upper-case letter \
             that follows a lower-case one (`getServer`), ends a word at a combining mark (Indic scripts, decomposed \
             accents), and does not join `々`, `〇` and radicals with the Han characters next to them; such texts get other \
             tokens there than in training",
        ),
    },
    PreTokenizer {
        ignore_merges: true,
        adds_bos: true,
        ..plain(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
            &[LLAMA_3],
        )
    },
    plain(&["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], &[LLAMA_3]),
    PreTokenizer { nfc: true, ..plain(&["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"], &[QWEN_2]) },
    plain(&["stablelm2", "hunyuan", "solar-open", "grok-2"], &[QWEN_2]),
    PreTokenizer { nfc: true, ..plain(&["qwen35"], &[QWEN_35]) },
    plain(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[DIGIT, GPT_2],
    ),
    plain(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ],
        &[GPT_2],
    ),
    plain(&["deepseek-llm"], &[NEWLINE, CASED, PUNCTUATION, SPACE_AT_END, EAST_ASIAN, DIGIT]),
    plain(&["deepseek-coder"], &[NEWLINE, r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, DIGIT]),
    plain(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[UP_TO_THREE_DIGITS, IDEOGRAPHS, DEEPSEEK_V3]),
    PreTokenizer {
        ignore_merges: true,
        adds_bos: true,
        difference: Some(CASE_BY_ASCII),
        ..plain(&["tekken"], &[TEKKEN])
    },
    PreTokenizer { difference: Some(CASE_BY_ASCII), ..plain(&["gpt-4o", "llama4", "kanana2", "talkie"], &[GPT_4O]) },
];

/// The pre-tokenizer for a vocabulary without merges: every piece becomes single bytes, wherever a text is split.
pub(super) const WITHOUT_MERGES: &str = "gpt-2";

impl PreTokenizer {
    /// The one with this name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|known| known.names.contains(&name))
    }

    /// The one that splits texts as the `pre_tokenizer` of a `tokenizer.json` does, and treats complete pieces as the model
    /// does if there is such a one.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the tokenizer.
    pub(super) fn of(pre_tokenizer: &Value, ignore_merges: bool, nfc: bool) -> Result<&'static Self, String> {
        let splits = splits(pre_tokenizer)?;
        if splits.is_empty() {
            return Err("does not split texts before pairs are joined, which llama.cpp always does".into());
        }
        let mut alike: Vec<&'static Self> = KNOWN.iter().filter(|known| known.splits_as(&splits)).collect();
        // The same expressions: prefer the same treatment of complete pieces, then the same normalizer.
        alike.sort_by_key(|known| (known.ignore_merges != ignore_merges, known.nfc != nfc));
        alike.first().copied().ok_or_else(|| {
            let text: String = splits.join("`, `").chars().take(300).collect();
            format!("splits texts by `{}`, which is none of llama.cpp's pre-tokenizers", printable(&text))
        })
    }

    fn splits_as(&self, splits: &[String]) -> bool {
        match self.splits {
            None => splits.len() == 1 && splits[0] == pattern(),
            Some(own) => own.iter().eq(splits),
        }
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(super) fn to_json(&self) -> Value {
        let moonlight = pattern();
        let own: Vec<&str> = self.splits.map_or_else(|| vec![moonlight.as_str()], <[&str]>::to_vec);
        let (last, first) = own.split_last().expect("every pre-tokenizer has an expression");
        let by_byte_level = *last == GPT_2;
        let splits = if by_byte_level { first } else { &own };
        let mut steps: Vec<Value> = splits
            .iter()
            .map(|split| match *split {
                DIGIT => json!({"type": "Digits", "individual_digits": true}),
                split => {
                    json!({"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false})
                }
            })
            .collect();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": by_byte_level});
        if steps.is_empty() {
            return byte_level;
        }
        steps.push(byte_level);
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// Whether a `pre_tokenizer` adds a space before a text.
pub(super) fn adds_space(pre_tokenizer: &Value) -> bool {
    steps(pre_tokenizer).iter().any(|step| step["type"] == "ByteLevel" && step["add_prefix_space"] == true)
}

/// The steps of a `pre_tokenizer`, those of nested sequences included.
fn steps(pre_tokenizer: &Value) -> Vec<&Value> {
    let (mut open, mut steps) = (vec![pre_tokenizer], Vec::new());
    while let Some(step) = open.pop() {
        match step["pretokenizers"].as_array().filter(|_| step["type"] == "Sequence") {
            Some(inner) => open.extend(inner.iter().rev()),
            None => steps.push(step),
        }
    }
    steps
}

/// The expressions of a `pre_tokenizer` that ends with `ByteLevel`.
fn splits(pre_tokenizer: &Value) -> Result<Vec<String>, String> {
    let mut splits = Vec::new();
    let mut ended = false;
    for step in steps(pre_tokenizer) {
        if ended {
            return Err("splits texts after they have become bytes, which llama.cpp does not".into());
        }
        match step["type"].as_str().unwrap_or("null") {
            "ByteLevel" => {
                ended = true;
                if step["use_regex"] != false {
                    splits.push(GPT_2.to_owned());
                }
            }
            "Digits" if step["individual_digits"] == true => splits.push(DIGIT.into()),
            "Digits" => splits.push(DIGITS.into()),
            "Split" => splits.push(split(step)?),
            other => {
                let other = printable(other);
                return Err(format!("has the pre-tokenizer `{other}`, which llama.cpp does not have"));
            }
        }
    }
    match ended {
        true => Ok(splits),
        false => Err("is neither byte-level nor of the kind of SentencePiece".into()),
    }
}

/// The expression of a `Split` whose matches are pieces, with line ends spelled as escapes.
fn split(step: &Value) -> Result<String, String> {
    let behavior = step["behavior"].as_str().unwrap_or_default();
    let isolates = match step["invert"].as_bool().unwrap_or_default() {
        false => behavior == "Isolated",
        // Everything between the matches is removed, and the expressions match every character.
        true => behavior == "Removed" || behavior == "Isolated",
    };
    match step["pattern"]["Regex"].as_str() {
        Some(text) if isolates => Ok(text.replace('\r', r"\r").replace('\n', r"\n")),
        _ => {
            Err("has a `Split` that does not make pieces of the matches of an expression, as all of llama.cpp's do"
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_from_its_own_steps() {
        let mut names = std::collections::HashSet::new();
        for known in &KNOWN {
            assert!(known.names.iter().all(|name| names.insert(*name)), "{:?} is listed twice", known.names);
            let json = known.to_json();
            let found = PreTokenizer::of(&json, known.ignore_merges, known.nfc).unwrap();
            assert_eq!(found.names, known.names, "{json}");
            assert_eq!(PreTokenizer::named(known.names[0]), Some(known));
        }
        assert_eq!(PreTokenizer::named("viking"), None);
    }

    #[test]
    fn the_treatment_of_complete_pieces_distinguishes_equal_expressions() {
        let json = PreTokenizer::named("llama-bpe").unwrap().to_json();
        assert_eq!(PreTokenizer::of(&json, true, false).unwrap().names[0], "llama-bpe");
        assert_eq!(PreTokenizer::of(&json, false, false).unwrap().names[0], "smaug-bpe");
        // Moonlight's own has no such variant.
        let json = PreTokenizer::named("kimi-k2").unwrap().to_json();
        assert!(!PreTokenizer::of(&json, true, false).unwrap().ignore_merges);
    }

    #[test]
    fn other_steps_are_refused_by_name() {
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true});
        assert!(adds_space(&byte_level));
        assert_eq!(PreTokenizer::of(&byte_level, false, false).unwrap().names[0], "gpt-2");
        let sequence = |steps: Value| json!({"type": "Sequence", "pretokenizers": steps});
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"});
        let bytes = || json!({"type": "ByteLevel", "use_regex": false});
        let unknown = [
            (sequence(json!([split(r"\w+"), bytes()])), r"splits texts by `\w+`, which is none"),
            (json!({"type": "Whitespace"}), "has the pre-tokenizer `Whitespace`"),
            (json!(null), "has the pre-tokenizer `null`"),
            (sequence(json!([bytes(), split("a")])), "after they have become bytes"),
            (sequence(json!([])), "neither byte-level"),
            (
                sequence(json!([{"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"}, bytes()])),
                "has a `Split` that",
            ),
        ];
        for (json, expected) in unknown {
            let error = PreTokenizer::of(&json, false, false).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        // Line ends may be spelled as characters.
        let literal = sequence(json!([split(&QWEN_2.replace(r"\r\n", "\r\n")), bytes()]));
        assert_eq!(PreTokenizer::of(&literal, false, true).unwrap().names[0], "qwen2");
        assert_eq!(PreTokenizer::of(&literal, false, false).unwrap().names[0], "stablelm2");
    }
}
