//! `tokenizer.json`, read by `tokenizers`, compared with `tiktoken.model`, read by `tiktoken-rs`.
//!
//! Moonlight's own ranks are not available offline. The tests use the ranks in the `tiktoken-rs` crate instead:
//! `o200k_base` (199,998 tokens, more than Moonlight's 163,584) and `cl100k_base` (100,256), both trained on
//! multilingual text, with Moonlight's pattern and special tokens.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moonlight_convert::tokenizer::{
    Ranks, SpecialNames, TIKTOKEN_MODEL, pattern, special_tokens, write_tokenizer_json,
};
use proptest::prelude::*;
use rustc_hash::FxHashMap;
use tiktoken_rs::CoreBPE;
use tokenizers::Tokenizer;

/// Bytes of real text in the ordinary test.
const SAMPLE: usize = 3 << 20;

/// A set of ranks in both implementations.
struct Pair {
    tiktoken: CoreBPE,
    /// Text of special tokens becomes special tokens.
    special: Tokenizer,
    /// Text of special tokens stays text.
    plain: Tokenizer,
    ranks: u32,
}

static O200K: LazyLock<Pair> = LazyLock::new(|| Pair::new(tiktoken_rs::o200k_base_singleton()));
static CL100K: LazyLock<Pair> = LazyLock::new(|| Pair::new(tiktoken_rs::cl100k_base_singleton()));

/// `added_tokens_decoder` as published for the family.
fn tokenizer_config(ranks: u32) -> String {
    let named = [
        (0, "[BOS]"),
        (1, "[EOS]"),
        (2, "<|im_end|>"),
        (3, "<|im_user|>"),
        (4, "<|im_assistant|>"),
        (6, "<|start_header_id|>"),
        (10, "<|im_system|>"),
        (17, "<|im_middle|>"),
        (18, "<|media_start|>"),
        (254, "[UNK]"),
        (255, "[PAD]"),
    ];
    let added: BTreeMap<String, serde_json::Value> = named
        .into_iter()
        .map(|(distance, content)| {
            let token = serde_json::json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": true});
            ((ranks + distance).to_string(), token)
        })
        .collect();
    serde_json::json!({"bos_token": "[BOS]", "eos_token": "<|im_end|>", "added_tokens_decoder": added}).to_string()
}

/// The tokens of an encoding in the crate, by rank.
fn tokens_of(bpe: &CoreBPE) -> Vec<Vec<u8>> {
    (0..).map_while(|rank| bpe.decode_bytes(&[rank]).ok()).collect()
}

impl Pair {
    fn new(source: &CoreBPE) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tokens = tokens_of(source);
        let mut model = String::new();
        for (rank, token) in tokens.iter().enumerate() {
            writeln!(model, "{} {rank}", STANDARD.encode(token)).unwrap();
        }
        let path = dir.path().join(TIKTOKEN_MODEL);
        fs::write(&path, &model).unwrap();
        fs::write(dir.path().join("tokenizer_config.json"), tokenizer_config(tokens.len() as u32)).unwrap();
        let written = write_tokenizer_json(dir.path(), false).unwrap();

        let ranks = Ranks::parse(model.as_bytes()).unwrap();
        assert_eq!(ranks.tokens(), tokens);
        let names = special_tokens(ranks.count(), &SpecialNames::next_to(&path).unwrap().added).unwrap();
        let encoder: FxHashMap<Vec<u8>, u32> = tokens.into_iter().zip(0..).collect();
        let special = names.into_iter().map(|(id, token)| (token.content, id)).collect();
        let tiktoken = CoreBPE::new(encoder, special, &pattern()).unwrap();
        let special = Tokenizer::from_file(&written).unwrap();
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        Self { tiktoken, special, plain, ranks: ranks.count() }
    }

    /// Compares the encodings of a text; returns the number of tokens.
    fn agree(&self, text: &str) -> usize {
        let ids = |tokenizer: &Tokenizer| tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
        let (plain, special) = (ids(&self.plain), ids(&self.special));
        self.same(text, &plain, &self.tiktoken.encode_ordinary(text), "as text");
        self.same(text, &special, &self.tiktoken.encode_with_special_tokens(text), "as special tokens");
        assert_eq!(self.special.decode(&special, false).unwrap(), text);
        plain.len()
    }

    fn same(&self, text: &str, ours: &[u32], theirs: &[u32], how: &str) {
        if ours != theirs {
            let at = ours.iter().zip(theirs).position(|(a, b)| a != b).unwrap_or(ours.len().min(theirs.len()));
            let from = at.saturating_sub(3);
            let show = |ids: &[u32]| {
                let ids: Vec<u32> = ids.iter().skip(from).take(12).copied().collect();
                format!(
                    "{ids:?} {:?}",
                    self.tiktoken.decode_bytes(&ids).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                )
            };
            let start: String = text.chars().take(80).collect();
            panic!("{start:?}… {how}, from token {from} on:\n  {}\n  {}", show(ours), show(theirs));
        }
    }
}

fn both() -> [&'static Pair; 2] {
    [&O200K, &CL100K]
}

#[test]
fn special_tokens_have_the_published_ids_and_names() {
    let pair = &*O200K;
    assert_eq!(pair.ranks, 199_998);
    assert_eq!(pair.special.get_vocab_size(true), 199_998 + 256);
    for (name, id) in [("[BOS]", 0), ("<|im_end|>", 2), ("<|reserved_token_200003|>", 5), ("[PAD]", 255)] {
        assert_eq!(pair.special.token_to_id(name), Some(199_998 + id), "{name}");
    }
    assert_eq!(pair.special.token_to_id("<|reserved_token_200254|>"), None, "it has no row in the embedding");
    let chat = "<|im_user|>user<|im_middle|>月<|im_end|>";
    assert_eq!(pair.special.encode_fast(chat, false).unwrap().get_ids()[0], 199_998 + 3);
    assert_eq!(pair.special.decode(&pair.tiktoken.encode_with_special_tokens(chat), true).unwrap(), "user月");
}

#[test]
fn adversarial_texts_are_encoded_equally() {
    let long = [
        " ".repeat(20_000),
        "\t \u{3000}".repeat(3_000),
        "a".repeat(5_000),
        "ab".repeat(3_000),
        "月".repeat(3_000),
        "1".repeat(5_000),
        "\r\n".repeat(5_000),
        "!".repeat(5_000),
        "e\u{301}".repeat(3_000),
        "\u{301}".repeat(5_000),
        "🏳️‍🌈".repeat(500),
        "\u{0}".repeat(5_000),
        "<|im_end|>".repeat(500),
        "<|".repeat(2_000),
        "ǅ".repeat(1_000),
    ];
    let short = [
        "",
        " ",
        "\n",
        "\r",
        "\r\n",
        "a",
        "Hello, world's  end",
        "I'LL WE'VE don't 'S 's",
        "  indented\n\n\t\tcode {\r\n}\r\n   ",
        "trailing   ",
        "\u{a0}\u{2003}\u{200b}x\u{feff}",
        "x\u{85}\u{2028}\u{2029}y",
        "0123456789 １２３４ ٠١٢٣ ⅷ½²",
        "3.14159e-10 0x7fFF 1_000_000",
        "é e\u{301} ẹ́ Å A\u{30a} ﬁ ǆ ß ẞ İ ı",
        "月光下的凤尾竹 漢字かな交じり文 ｶﾀｶﾅ 한국어 조합형 \u{1112}\u{1161}\u{11ab}",
        "中文English混排123数字、标点。",
        "中Abc你Def好\u{20000}\u{2a6d6}",
        "Ελληνικά русский עברית العربية हिन्दी தமிழ் ไทย ქართული አማርኛ ខ្មែរ",
        "ÀÉÎÕÜ ÀÉÎõü McDonald iPhone ABCdefGHI",
        "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 🧑🏿‍🚀 ❤️ ❤ \u{e0067}\u{e007f}",
        "\u{202e}right to left\u{202c} \u{200d}\u{200c}",
        "\u{fffd}\u{ffff}\u{10ffff}\u{e000}",
        "[BOS][EOS][PAD][UNK]",
        "<|im_user|>user<|im_middle|>hi<|im_end|>",
        "a<|im_end|>b <|im_end|> <|im_end|>\n",
        "<|im_end|",
        "<|im_end |>",
        "<|IM_END|>",
        "<<|im_end|>>",
        "<|reserved_token_200003|><|reserved_token_100261|>",
        "<|reserved_token_163840|>",
        "<|endoftext|>",
        "Ġa Ċ ĠĠ",
        "\\u0000 %00 \u{7f}\u{80}\u{9f}\u{ad}",
    ];
    for pair in both() {
        for text in short.iter().copied().chain(long.iter().map(String::as_str)) {
            pair.agree(text);
        }
        // All pairs, for pieces that are never adjacent in one text.
        for (a, b) in short.iter().flat_map(|a| short.iter().map(move |b| (a, b))) {
            pair.agree(&format!("{a}{b}"));
        }
    }
}

/// Every token alone, and after a letter and a space: including the longest, the rarest and the unreachable ones.
#[test]
fn every_token_is_encoded_equally() {
    for pair in both() {
        for rank in 0..pair.ranks {
            if let Ok(token) = String::from_utf8(pair.tiktoken.decode_bytes(&[rank]).unwrap()) {
                pair.agree(&token);
                if rank % 8 == 0 {
                    pair.agree(&format!("x{token} {token}"));
                }
            }
        }
    }
}

/// Real texts, as far as available: this repository's, the sources of the crates it is built from (with their
/// translations), and Debian's documentation.
fn real_texts(most: usize) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .unwrap_or_default();
    // The repository itself is always available.
    let mut folders = vec![(root.join("moonlight-model/src"), most / 8), (root.join("configs"), most / 8)];
    folders.push((home.join("registry").join("src"), most / 2));
    folders.extend(
        ["/usr/share/doc", "/usr/share/i18n/locales", "/usr/share/common-licenses"].map(|path| (path.into(), most / 8)),
    );
    let mut texts = Vec::new();
    for (folder, share) in folders {
        let mut files = Vec::new();
        collect(&folder, &mut files);
        files.sort();
        // Translations first, then in a fixed pseudorandom order, so that files from the whole folder are taken.
        files.sort_by_key(|path| (path.extension().is_none_or(|ending| ending != "po"), spread(path)));
        let mut taken = 0;
        for path in files {
            if taken >= share {
                break;
            }
            if let Ok(text) = fs::read_to_string(&path) {
                taken += text.len();
                texts.push((path, text));
            }
        }
    }
    texts
}

/// FNV-1a with 64 bits.
fn spread(path: &Path) -> u64 {
    path.as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(&entry.path(), files),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}

/// Splits a text into parts, because tiktoken's regular expression fails on very long ones.
fn parts(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while rest.len() > 50_000 {
        let cut = (40_000..50_000).rev().find(|&at| rest.is_char_boundary(at)).unwrap();
        let (part, after) = rest.split_at(cut);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

fn agree_on_real_texts(most: usize) {
    let texts = real_texts(most);
    for (name, pair) in [("o200k_base", &*O200K), ("cl100k_base", &*CL100K)] {
        let (mut bytes, mut tokens) = (0, 0);
        for (_, text) in &texts {
            for part in parts(text) {
                tokens += pair.agree(part);
                bytes += part.len();
            }
        }
        println!("{name}: {} files, {bytes} bytes, {tokens} tokens, all equal", texts.len());
        assert!(tokens > 10_000, "there was hardly any text");
    }
}

#[test]
fn real_texts_are_encoded_equally() {
    agree_on_real_texts(SAMPLE);
}

/// `cargo test --release -p moonlight-convert --test tokenizer -- --ignored --nocapture`; `TEXT_MB` for another amount.
#[test]
#[ignore = "takes minutes"]
fn many_real_texts_are_encoded_equally() {
    let megabytes: usize = std::env::var("TEXT_MB").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    agree_on_real_texts(megabytes << 20);
}

/// Difficult characters: of each class in the pattern, and at the boundaries of the classes.
fn character() -> impl Strategy<Value = char> {
    prop_oneof![
        4 => proptest::char::any(),
        2 => proptest::char::range(' ', '~'),
        2 => proptest::char::range('\u{4e00}', '\u{9fff}'),
        1 => proptest::char::range('\u{300}', '\u{36f}'),
        1 => proptest::char::range('\u{a0}', '\u{24f}'),
        1 => proptest::char::range('\u{1f300}', '\u{1faff}'),
        3 => prop::sample::select(vec![' ', ' ', '\n', '\r', '\t', '\'', 's', 'T', '1', '\u{3000}', '\u{200d}', '\u{fe0f}', '\u{85}']),
    ]
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => prop::collection::vec(character(), 1..12).prop_map(String::from_iter),
        2 => (character(), 1_usize..40).prop_map(|(character, count)| String::from_iter(vec![character; count])),
        1 => prop::sample::select(vec!["[EOS]", "<|im_end|>", "<|im_end", "|>", "'ll", "'RE", "\r\n", "<|reserved_token_100262|>"])
            .prop_map(str::to_owned),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_texts_are_encoded_equally(pieces in prop::collection::vec(piece(), 0..20)) {
        let text = pieces.concat();
        for pair in both() {
            pair.agree(&text);
        }
    }
}
