//! Tokenizers through GGUF metadata against the tokens of llama.cpp's own library
//! (`scripts/fixtures/make_tokenizer_fixtures.py`).

use std::fs;
use std::path::{Path, PathBuf};

use moonlight_convert::gguf::tokenizer::{TokenizerMetadata, tokenizer_metadata, tokenizer_texts};
use moonlight_convert::gguf::{Array, Metadata, Value};
use moonlight_model::ModelConfig;
use moonlight_model::config::{AttentionShape, GqaShape, ModelType};
use serde_json::Value as Json;
use tokenizers::Tokenizer;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tokenizers")
}

fn expected() -> Json {
    serde_json::from_slice(&fs::read(fixtures().join("llama_cpp.json")).unwrap()).unwrap()
}

fn exported(name: &str, vocab_size: usize) -> TokenizerMetadata {
    let attention = AttentionShape::Gqa(GqaShape::new(1, 8));
    let config = ModelConfig::new(ModelType::Llama, vocab_size, 16, 16, 1, 2, attention);
    tokenizer_metadata(&fixtures().join(name), &config).unwrap()
}

/// The tokenizer that is made of the metadata.
fn imported(metadata: &TokenizerMetadata) -> Tokenizer {
    let metadata: Metadata = metadata.entries.iter().cloned().collect();
    let texts = tokenizer_texts(Path::new("model.gguf"), &metadata).unwrap().unwrap();
    let (_, json) = texts.files.iter().find(|(name, _)| name == "tokenizer.json").unwrap();
    let mut tokenizer = Tokenizer::from_bytes(json).unwrap();
    tokenizer.set_encode_special_tokens(true);
    tokenizer
}

fn ids(value: &Json) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn tokens_are_those_of_llama_cpp_or_the_models_own() {
    for (name, differing) in [("moonlight", 8), ("sentence-piece", 0), ("qwen2", 1)] {
        let expected = &expected()[name];
        let count = expected["tokens"].as_u64().unwrap() as usize;
        let tokenizer = imported(&exported(name, count + 5));
        let mut marked = 0;
        for row in expected["texts"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let found = tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
            let own = row.get("own");
            marked += usize::from(own.is_some());
            assert_eq!(found, ids(own.unwrap_or(&row["llama_cpp"])), "{name}: {text:?}");
        }
        assert_eq!(marked, differing, "{name}");
    }
}

#[test]
fn the_user_is_informed_of_texts_with_other_tokens() {
    let notes = |name: &str| {
        let count = expected()[name]["tokens"].as_u64().unwrap() as usize;
        exported(name, count).notes.join("\n")
    };
    let moonlight = notes("moonlight");
    for kind in ["`getServer`", "combining mark", "`々`, `〇`"] {
        assert!(moonlight.contains(kind), "{moonlight}");
    }
    assert!(notes("qwen2").contains("does not normalize texts to NFC"));
    assert_eq!(notes("sentence-piece"), "");
}

#[test]
fn merges_of_ranks_and_scores_of_merges_have_the_order_that_llama_cpp_needs() {
    let value = |metadata: &TokenizerMetadata, key: &str| {
        metadata.entries.iter().find(|(other, _)| other == key).map(|(_, value)| value.clone()).unwrap()
    };
    let moonlight = exported("moonlight", 960);
    let merges = value(&moonlight, "tokenizer.ggml.merges");
    let merges = merges.as_strings().unwrap();
    // `tS` is the first token of two bytes.
    assert_eq!(merges[0], "t S");
    assert!(merges.iter().all(|merge| merge.matches(' ').count() == 1));
    let spm = exported("sentence-piece", 900);
    let (Value::Array(Array::F32(scores)), Value::Array(Array::I32(types))) =
        (value(&spm, "tokenizer.ggml.scores"), value(&spm, "tokenizer.ggml.token_type"))
    else {
        panic!("numbers");
    };
    assert_eq!(types[..4], [2, 3, 3, 6]);
    let normal: Vec<f32> = scores.iter().zip(&types).filter(|(_, kind)| **kind == 1).map(|(score, _)| *score).collect();
    let mut sorted = normal.clone();
    sorted.sort_by(f32::total_cmp);
    sorted.dedup();
    assert_eq!(sorted.len(), normal.len(), "every normal token has a score of its own");
}
