//! Limits of a `tokenizer.json`. They are checked before the `tokenizers` crate parses the file, because the crate
//! allocates and repeats as much as the file asks for.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::post_processor::AffixTokens;

/// The limit of a file in bytes; Gemma's, with 262,144 tokens, has 33 MB.
pub(super) const MAX_FILE_BYTES: u64 = 100_000_000;
/// The limit of a token in bytes.
pub(super) const MAX_TOKEN_BYTES: usize = 65_536;
/// The limit of a string that a step inserts or substitutes, in bytes.
const MAX_CONTENT_BYTES: usize = 1024;
/// The limit of a replacement in a table of characters, in bytes; the longest one in SentencePiece's table is that of U+FDFA,
/// with 33.
const MAX_REPLACEMENT_BYTES: usize = 64;
/// The limit of a post-processor in bytes of JSON; that of Whisper, with a token for each language, has 12 kB.
const MAX_PROCESSOR_BYTES: usize = 1 << 20;
/// The limit of steps in a normalizer, a pre-tokenizer or a decoder, including those of nested sequences.
const MAX_STEPS: usize = 32;
/// The factor by which a text may grow: in each step, in all pre-tokenizers or decoders together, and in a normalizer. A
/// normalizer may have a larger factor, but then its output is checked for each text.
pub(super) const MAX_GROWTH: usize = 16;
/// The number of bytes by which a text may grow in addition, so that short texts do not exceed the factor.
pub(super) const GROWTH_SLACK: usize = 65_536;
/// The limit of a word in characters; WordPiece takes quadratic time in it.
const MAX_WORD_CHARS: u64 = 10_000;

/// A file that is within the limits.
pub(super) struct CheckedFile {
    /// The JSON for the crate, without the post-processor. It is serialized from the parsed sections, so that the crate
    /// sees the same values as the checks.
    pub(super) json: Vec<u8>,
    /// Whether the normalizer can make a text more than [`MAX_GROWTH`] times as long.
    pub(super) may_expand: bool,
    /// Whether a space is added only before the first word of a text.
    pub(super) prepends_first_only: bool,
    /// The tokens that the post-processor adds to a text.
    pub(super) affixes: AffixTokens,
}

/// The sections of a file. Unknown sections are dropped; a repeated section is an error.
#[derive(Deserialize, Serialize)]
struct File<'a> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<Value>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    added_tokens: Option<&'a RawValue>,
    #[serde(default)]
    normalizer: Option<Value>,
    #[serde(default)]
    pre_tokenizer: Option<Value>,
    #[serde(default)]
    decoder: Option<Value>,
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(default, skip_serializing)]
    #[allow(dead_code, reason = "dropped, but must not be repeated")]
    truncation: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    #[allow(dead_code, reason = "dropped, but must not be repeated")]
    padding: Option<IgnoredAny>,
    #[serde(borrow, default, skip_serializing)]
    post_processor: Option<&'a RawValue>,
}

/// The only field of a model whose cost is not proportional to its length.
#[derive(Deserialize)]
struct Model {
    max_input_chars_per_word: Option<u64>,
}

/// Checks a file against the limits.
///
/// # Errors
///
/// The limit that the file exceeds, as part of a sentence.
pub(super) fn checked(contents: &[u8]) -> Result<CheckedFile, String> {
    if contents.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it has {} bytes, more than the limit of {MAX_FILE_BYTES}", contents.len()));
    }
    let file: File<'_> = serde_json::from_slice(contents).map_err(|error| error.to_string())?;
    let model: Model = serde_json::from_str(file.model.get()).map_err(|error| error.to_string())?;
    if let Some(length) = model.max_input_chars_per_word.filter(|&length| length > MAX_WORD_CHARS) {
        return Err(format!("its words have up to {length} characters, more than the limit of {MAX_WORD_CHARS}"));
    }
    let normalizer = growth("normalizer", file.normalizer.as_ref())?;
    for (name, part) in [("pre_tokenizer", &file.pre_tokenizer), ("decoder", &file.decoder)] {
        let growth = growth(name, part.as_ref())?;
        if growth > MAX_GROWTH {
            return Err(format!("its {name} can make a text {growth} times as long, past the limit of {MAX_GROWTH}"));
        }
    }
    let processor = file.post_processor.map(|raw| match raw.get().len() > MAX_PROCESSOR_BYTES {
        true => Err(format!("its post_processor has more than {MAX_PROCESSOR_BYTES} bytes")),
        false => serde_json::from_str(raw.get()).map_err(|error| error.to_string()),
    });
    let affixes = AffixTokens::read(processor.transpose()?.as_ref())?;
    let json = serde_json::to_vec(&file).map_err(|error| error.to_string())?;
    let prepends_first_only = prepends_first_only(file.pre_tokenizer.as_ref());
    Ok(CheckedFile { json, may_expand: normalizer > MAX_GROWTH, prepends_first_only, affixes })
}

/// Whether a pre-tokenizer is SentencePiece's `Metaspace` with `prepend_scheme = "first"`, or has one as a step.
fn prepends_first_only(part: Option<&Value>) -> bool {
    let Some(Value::Object(step)) = part else { return false };
    let steps = step.get("pretokenizers").and_then(Value::as_array).into_iter().flatten();
    step.get("prepend_scheme").is_some_and(|scheme| scheme == "first")
        || steps.into_iter().any(|step| prepends_first_only(Some(step)))
}

/// The largest factor by which a part can make a text longer.
fn growth(name: &str, part: Option<&Value>) -> Result<usize, String> {
    let (mut steps, mut growth) = (0, 1);
    match part {
        Some(part) => follow_steps(name, part, &mut steps, &mut growth).map(|()| growth),
        None => Ok(1),
    }
}

/// Counts the steps of a part, including those of nested sequences, and multiplies `growth` by the factor of each step.
fn follow_steps(name: &str, part: &Value, steps: &mut usize, growth: &mut usize) -> Result<(), String> {
    *steps += 1;
    if *steps > MAX_STEPS {
        return Err(format!("its {name} exceeds the limit of {MAX_STEPS} steps"));
    }
    let Value::Object(step) = part else { return Ok(()) };
    for list in ["normalizers", "pretokenizers", "decoders"] {
        if let Some(Value::Array(parts)) = step.get(list) {
            parts.iter().try_for_each(|part| follow_steps(name, part, steps, growth))?;
        }
    }
    let own = step_growth(name, step)?;
    if own > MAX_GROWTH && !step.contains_key("precompiled_charsmap") && !is_unicode(step) {
        return Err(format!(
            "a step of its {name} can make a text {own} times as long, past the limit of {MAX_GROWTH}"
        ));
    }
    *growth = growth.saturating_mul(own);
    Ok(())
}

/// Whether a step is a Unicode normalization form. These are allowed although their factor exceeds the limit, because few
/// characters reach the factor.
fn is_unicode(step: &Map<String, Value>) -> bool {
    matches!(step.get("type").and_then(Value::as_str), Some("NFC" | "NFD" | "NFKC" | "NFKD"))
}

/// The factor by which one step can make a text longer. It is derived from the keys of the step, because old files have no
/// `type`.
fn step_growth(name: &str, step: &Map<String, Value>) -> Result<usize, String> {
    let text = |key: &str| step.get(key).and_then(Value::as_str);
    for key in ["content", "prepend", "prefix", "suffix", "replacement"] {
        if let Some(content) = text(key).filter(|content| content.len() > MAX_CONTENT_BYTES) {
            let bytes = content.len();
            return Err(format!(
                "its {name} writes a text of {bytes} bytes, more than the limit of {MAX_CONTENT_BYTES}"
            ));
        }
    }
    if step.get("length").and_then(Value::as_u64) == Some(0) {
        return Err(format!("its {name} splits a text into pieces of length 0"));
    }
    let content = text("content").unwrap_or_default().len();
    if let Some(pattern) = step.get("pattern") {
        let is_split = step.contains_key("behavior");
        return match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
            (Some(""), _) | (_, Some("")) => Err(format!("its {name} has an empty pattern")),
            _ if is_split => Ok(1),
            (Some(pattern), _) => Ok(content.div_ceil(pattern.len()).max(1)),
            // A regular expression may match between any two bytes.
            _ => Ok(1 + content),
        };
    }
    if let Some(map) = step.get("precompiled_charsmap") {
        return charsmap(name, map);
    }
    Ok(match text("type") {
        // The prefix is added once, so only short texts double.
        _ if step.contains_key("prepend") => 2,
        Some("Metaspace" | "NFC" | "NFD") => 3,
        Some("NFKC" | "NFKD") => 18,
        Some(
            "Sequence" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit" | "UnicodeScripts"
            | "BertPreTokenizer" | "CharDelimiterSplit" | "FixedLength" | "Fuse" | "ByteFallback" | "Strip"
            | "StripAccents" | "Nmt" | "CTC",
        ) => 1,
        // `ByteLevel` writes two bytes for most bytes; `Lowercase` and `Bert` lengthen some characters.
        _ => 2,
    })
}

/// The factor of SentencePiece's table of characters, whose bytes are the length of a trie, the trie, and the replacements,
/// each terminated by a zero byte.
fn charsmap(name: &str, map: &Value) -> Result<usize, String> {
    let damaged = || format!("its {name} has a damaged table of characters (`precompiled_charsmap`)");
    let bytes = STANDARD.decode(map.as_str().ok_or_else(damaged)?).map_err(|_| damaged())?;
    let (length, rest) = bytes.split_first_chunk().ok_or_else(damaged)?;
    let length = u32::from_le_bytes(*length) as usize;
    // The crate allocates as many bytes as the length field asks for, and reads the first unit of the trie unchecked.
    if length < 4 || !length.is_multiple_of(4) || length > rest.len() {
        return Err(damaged());
    }
    let texts = std::str::from_utf8(&rest[length..]).map_err(|_| damaged())?;
    let longest = texts.split('\0').map(str::len).max().unwrap_or(0);
    match longest > MAX_REPLACEMENT_BYTES {
        true => Err(damaged()),
        false => Ok(longest.max(1)),
    }
}
