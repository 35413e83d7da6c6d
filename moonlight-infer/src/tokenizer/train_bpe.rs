//! Trains a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2).
//!
//! The texts are split into words by the pre-tokenizer of the `tokenizers` crate, so that training and encoding split alike.
//! The merges are counted here and not by the crate's trainer: its queue contains a pair several times if two merges spell the
//! same token, and then the order of a hash table with random keys decides which entry is merged first. Here the same texts
//! give the same file in every process.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use moonlight_convert::tokenizer::{AddedToken, SpecialNames, TOKENIZER_JSON, byte_to_char};
use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::hugging_face::HuggingFace;
use super::{Kind, Tokenizer, TokenizerError, TokenizerFile, fingerprint};

/// The special token that ends a document, EOS of a trained tokenizer. Its id is 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The tokens of every trained tokenizer: [`END_OF_TEXT`] and 256 bytes.
pub const MIN_VOCAB: usize = 257;

/// A pair that occurs less often is not merged.
const MIN_COUNT: i64 = 2;

type Pair = (u32, u32);

/// Trains a tokenizer with up to `vocab_size` tokens on texts: [`END_OF_TEXT`], the 256 bytes, and the most frequent merges, of
/// two that are equally frequent the one of smaller ids. It has fewer tokens if no pair occurs twice, and at least [`MIN_VOCAB`].
///
/// The tokenizer's [`files`](Tokenizer::files) are a `tokenizer.json` and a `tokenizer_config.json`; transformers and the
/// `tokenizers` crate read them, too.
///
/// # Errors
///
/// [`TokenizerError::Encode`] for a text that the crate cannot split.
pub fn train_bpe<T: AsRef<str> + Sync>(texts: &[T], vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
    let failed = |problem: String| TokenizerError::Encode { tokenizer: "bpe".into(), problem };
    let words = count_words(texts).map_err(failed)?;
    let contents = tokenizer_json(&Merges::train(&words, vocab_size)).to_string().into_bytes();
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
    });
    let names = SpecialNames {
        eos: Some(END_OF_TEXT.into()),
        named: [END_OF_TEXT.to_owned()].into(),
        ..SpecialNames::default()
    };
    let kind = HuggingFace::parse(&contents, &names, &mut Vec::new()).map_err(failed)?;
    Ok(Tokenizer {
        vocab_size: kind.vocab_size(),
        bos: None,
        eos: kind.id(END_OF_TEXT),
        fingerprint: fingerprint("tokenizer.json", &contents, kind.added()),
        name: "bpe".into(),
        add_bos: None,
        prefix: kind.affixes().prefix.as_slice().into(),
        suffix: kind.affixes().suffix.as_slice().into(),
        parse_special: false,
        files: Arc::new(vec![
            TokenizerFile { name: TOKENIZER_JSON.into(), contents },
            TokenizerFile { name: "tokenizer_config.json".into(), contents: format!("{config:#}\n").into_bytes() },
        ]),
        kind: Kind::HuggingFace(Arc::new(kind)),
    })
}

/// The pre-tokenizer of GPT-2, without a space before the first word.
fn pre_tokenizer() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// How often each word occurs, in the byte alphabet of GPT-2.
fn count_words<T: AsRef<str> + Sync>(texts: &[T]) -> Result<BTreeMap<String, i64>, String> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let counts: Vec<Result<HashMap<String, i64>, String>> = thread::scope(|scope| {
        let counters: Vec<_> = texts
            .chunks(texts.len().div_ceil(threads).max(1))
            .map(|chunk| scope.spawn(move || count_words_of(chunk)))
            .collect();
        let joined = counters.into_iter().map(|counter| counter.join());
        joined.map(|counts| counts.unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    // Sorted, so that the words have the same numbers in every process.
    let mut words = BTreeMap::new();
    for counts in counts {
        for (word, count) in counts? {
            *words.entry(word).or_default() += count;
        }
    }
    Ok(words)
}

fn count_words_of<T: AsRef<str>>(texts: &[T]) -> Result<HashMap<String, i64>, String> {
    let pre_tokenizer = pre_tokenizer();
    let mut counts: HashMap<String, i64> = HashMap::new();
    for text in texts {
        let mut split = PreTokenizedString::from(text.as_ref());
        pre_tokenizer.pre_tokenize(&mut split).map_err(|error| error.to_string())?;
        for (word, ..) in split.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(word.to_owned(), 1);
                }
            }
        }
    }
    Ok(counts)
}

/// A vocabulary and its merges.
struct Merges {
    /// The spelling of each token in the byte alphabet; its index is the id.
    tokens: Vec<String>,
    /// The pairs in the order in which they are merged.
    merges: Vec<Pair>,
}

impl Merges {
    fn train(words: &BTreeMap<String, i64>, vocab_size: usize) -> Self {
        let mut alphabet: Vec<char> = (0..=u8::MAX).map(byte_to_char).collect();
        alphabet.sort_unstable();
        let mut tokens = vec![END_OF_TEXT.to_owned()];
        tokens.extend(alphabet.iter().map(char::to_string));
        let mut ids: FxHashMap<String, u32> =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();

        let mut words: Vec<(Vec<u32>, i64)> = words
            .iter()
            .map(|(word, &count)| {
                let symbols = word.chars().filter_map(|character| alphabet.binary_search(&character).ok());
                (symbols.map(|index| index as u32 + 1).collect(), count)
            })
            .collect();
        let mut counts: FxHashMap<Pair, i64> = FxHashMap::default();
        // The words that contain, or once contained, a pair.
        let mut places: FxHashMap<Pair, Vec<usize>> = FxHashMap::default();
        for (index, (word, count)) in words.iter().enumerate() {
            for pair in pairs(word) {
                *counts.entry(pair).or_default() += count;
                places.entry(pair).or_default().push(index);
            }
        }
        let mut queue: BinaryHeap<(i64, Reverse<Pair>)> =
            counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();

        let mut merges = Vec::new();
        let mut merged = FxHashSet::default();
        while tokens.len() < vocab_size
            && let Some((count, Reverse(pair))) = queue.pop()
        {
            // Counts fall without a change of the queue; the entry is then put back in its place.
            let now = counts.get(&pair).copied().unwrap_or(0);
            if now < MIN_COUNT {
                continue;
            }
            if now != count {
                queue.push((now, Reverse(pair)));
                continue;
            }
            let spelled = format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize]);
            // Two merges may spell the same token: `ab` and `c`, `a` and `bc`.
            let id = *ids.entry(spelled).or_insert_with_key(|spelled| {
                tokens.push(spelled.clone());
                tokens.len() as u32 - 1
            });
            if merged.insert(pair) {
                merges.push(pair);
            }
            let mut changed = places.remove(&pair).unwrap_or_default();
            changed.sort_unstable();
            changed.dedup();
            let mut grown = HashSet::new();
            for index in changed {
                let (word, count) = &mut words[index];
                let after = merge(word, pair, id);
                if after.len() == word.len() {
                    continue;
                }
                for pair in pairs(word) {
                    *counts.entry(pair).or_default() -= *count;
                }
                for pair in pairs(&after) {
                    *counts.entry(pair).or_default() += *count;
                    if pair.0 == id || pair.1 == id {
                        places.entry(pair).or_default().push(index);
                        grown.insert(pair);
                    }
                }
                *word = after;
            }
            // The order of equal entries does not matter, and different entries are ordered by the queue.
            queue.extend(grown.into_iter().map(|pair| (counts[&pair], Reverse(pair))));
        }
        Self { tokens, merges }
    }
}

/// The adjacent pairs of a word.
fn pairs(word: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    word.windows(2).map(|pair| (pair[0], pair[1]))
}

/// A word after a merge, from left to right.
fn merge(word: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let mut after = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        match tail.split_first() {
            Some((&second, tail)) if (first, second) == pair => {
                after.push(id);
                rest = tail;
            }
            _ => {
                after.push(first);
                rest = tail;
            }
        }
    }
    after
}

fn tokenizer_json(Merges { tokens, merges }: &Merges) -> Value {
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let spelled: Vec<[&str; 2]> =
        merges.iter().map(|pair| [tokens[pair.0 as usize].as_str(), tokens[pair.1 as usize].as_str()]).collect();
    let AddedToken { content, special, single_word, lstrip, rstrip, normalized } = AddedToken::named(END_OF_TEXT);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 0, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
            "normalized": normalized, "special": special,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": spelled,
        },
    })
}

#[cfg(test)]
mod tests {
    use tokenizers::Trainer;
    use tokenizers::models::bpe::{BPE, BpeTrainer};

    use super::*;

    const TEXTS: [&str; 3] = [
        "fn main() {\n    let value = 1;\n    let other = value + value;\n    println!(\"{value} {other}\");\n}\n",
        "fn value() -> u32 {\n    let other = 2;\n    other\n}\n\nfn other() {}\n",
        "größer größer, 日本日本\r\n\tmain main main\n",
    ];

    fn spelled(merges: &Merges) -> Vec<(String, String)> {
        let token = |id: u32| merges.tokens[id as usize].clone();
        merges.merges.iter().map(|pair| (token(pair.0), token(pair.1))).collect()
    }

    #[test]
    fn the_merges_are_those_of_the_tokenizers_crate() {
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(285)
            .min_frequency(MIN_COUNT as u64)
            .special_tokens(vec![tokenizers::AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet((0..=u8::MAX).map(byte_to_char).collect())
            .build();
        let words = |text: &str| {
            let mut split = PreTokenizedString::from(text);
            pre_tokenizer().pre_tokenize(&mut split)?;
            let words = split.get_splits(OffsetReferential::Normalized, OffsetType::None);
            Ok(words.into_iter().map(|(word, ..)| word.to_owned()).collect())
        };
        trainer.feed(TEXTS.iter(), words).unwrap();
        let mut model = BPE::default();
        trainer.train(&mut model).unwrap();
        let ours = Merges::train(&count_words(&TEXTS).unwrap(), 285);
        assert_eq!(ours.tokens.len(), 285);
        let vocab: HashMap<String, u32> =
            ours.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
        let theirs: HashMap<String, u32> = tokenizers::Model::get_vocab(&model).into_iter().collect();
        assert_eq!(vocab, theirs);
    }

    #[test]
    fn merges_are_by_count_and_then_by_the_smaller_ids() {
        let words = BTreeMap::from([("ab".to_owned(), 3), ("cd".to_owned(), 3), ("xyz".to_owned(), 4)]);
        let merges = spelled(&Merges::train(&words, 1000));
        let expected = [("x", "y"), ("xy", "z"), ("a", "b"), ("c", "d")];
        assert_eq!(merges, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        // Overlapping pairs are merged from the left: `aaa` is `aa` and `a`.
        let words = BTreeMap::from([("aaa".to_owned(), 2)]);
        let merges = spelled(&Merges::train(&words, 1000));
        assert_eq!(merges, [("a", "a"), ("aa", "a")].map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn a_pair_that_occurs_once_is_not_merged() {
        let tokenizer = train_bpe(&["abc"], 5000).unwrap();
        assert_eq!(tokenizer.vocab_size(), MIN_VOCAB);
        assert_eq!(train_bpe::<&str>(&[], 0).unwrap().vocab_size(), MIN_VOCAB);
    }

    #[test]
    fn a_trained_tokenizer_is_opened_from_its_files_and_round_trips_text() {
        let tokenizer = train_bpe(&TEXTS, 285).unwrap();
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let opened = Tokenizer::open(&dir.path().display().to_string()).unwrap();
        assert_eq!(opened.fingerprint(), tokenizer.fingerprint());
        assert_eq!((opened.vocab_size(), opened.eos(), opened.bos()), (285, Some(0), None));
        for text in TEXTS.iter().copied().chain(["", "\u{0}unseen\u{10FFFF} text\n\n  \t", END_OF_TEXT]) {
            let tokens = opened.encode(text).unwrap();
            assert_eq!(tokens, tokenizer.encode(text).unwrap());
            assert_eq!(opened.decode(&tokens), text);
        }
        // `value` was frequent enough for a token of its own, with the space before it.
        assert_eq!(opened.encode(" value").unwrap().len(), 1);
    }

    #[test]
    fn the_same_texts_give_the_same_file_whatever_their_order() {
        let file = |texts: &[&str]| train_bpe(texts, 400).unwrap().files();
        assert_eq!(file(&TEXTS), file(&[TEXTS[2], TEXTS[0], TEXTS[1]]));
    }
}
