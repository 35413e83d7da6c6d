//! Tokenizers through GGUF metadata and back, compared by the `tokenizers` crate.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moonlight_model::ModelConfig;
use moonlight_model::config::{AttentionShape, GqaShape, ModelType};
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use super::*;
use crate::format::gguf::Array;
use crate::tokenizer::byte_to_char;

/// Texts in which the pre-tokenizers differ: words, code, digits, spaces, several scripts.
const TEXTS: [&str; 12] = [
    "The quick brown fox doesn't jump; it's 12345 and 3.14!",
    "def getServer(x_1):\n\treturn  x ** 2   # ok\r\n\r\n",
    "    four   spaces \n \n\n  at ends  ",
    "HELLO World WE'LL see, I'VE 'seen",
    "日本の人々と二〇二五年、中文混合English文字",
    "안녕하세요 мир привет Ωμέγα ß",
    "हिन्दी में क्या है — ক্যা",
    "cafe\u{301} na\u{ef}ve \u{1f680}\u{1f469}\u{200d}\u{1f680}",
    "½ ² Ⅷ ٣٤٥ 1,000,000",
    "<|end|> <s></s> <|user|>a<|end|>",
    "a",
    "",
];

fn config(vocab_size: usize) -> ModelConfig {
    let attention = AttentionShape::Gqa(GqaShape::new(1, 8));
    ModelConfig::new(ModelType::Llama, vocab_size, 16, 16, 1, 2, attention)
}

/// A byte-level `tokenizer.json` with some merges and three added tokens after the vocabulary.
fn byte_level(pre_tokenizer: Json, ignore_merges: bool, nfc: bool) -> Json {
    let bytes = (0..=u8::MAX).map(|byte| byte_to_char(byte).to_string());
    let pairs = [
        ("t", "h"),
        ("th", "e"),
        ("i", "n"),
        ("e", "r"),
        ("1", "2"),
        ("12", "3"),
        ("3", "4"),
        ("Ġ", "t"),
        ("Ġ", "Ġ"),
        ("Ġt", "o"),
        ("t", "S"),
        ("S", "er"),
        ("g", "e"),
        ("ge", "t"),
        ("Ġ", "a"),
        ("'", "s"),
        ("'", "S"),
        ("r", "e"),
        ("Ã", "©"),
        ("å", "Ľ"),
        ("e", "Ì"),
        ("eÌ", "ģ"),
        ("Ċ", "Ċ"),
        ("ĠĠ", "ĠĠ"),
        ("!", "!"),
        (".", "1"),
        ("3", "."),
    ];
    let merged = pairs.iter().map(|(left, right)| format!("{left}{right}"));
    let tokens: Vec<String> = bytes.chain(merged).collect();
    let count = tokens.len() as u32;
    let vocab: serde_json::Map<String, Json> =
        tokens.into_iter().zip(0u32..).map(|(token, id)| (token, id.into())).collect();
    let added = |place: u32, content: &str, special: bool| {
        json!({"id": count + place, "content": content, "special": special, "normalized": false, "single_word": false,
            "lstrip": false, "rstrip": false})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<s>", true), added(1, "<|end|>", true), added(2, "<|user|>", false)],
        "normalizer": if nfc { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs.map(|(left, right)| format!("{left} {right}")),
            "ignore_merges": ignore_merges},
    })
}

/// A tokenizer of SentencePiece's kind: bytes, characters and tokens, with all pairs as merges in the order of the tokens.
fn sentence_piece() -> Json {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    let formed = ["▁t", "th", "▁th", "▁the", "he", "in", "er", "re", "▁a", "12", "▁▁", "▁▁▁▁", "é1"];
    tokens.extend(formed.map(str::to_owned));
    tokens.extend(["▁", "t", "h", "e", "i", "n", "r", "a", "1", "2", "é"].map(str::to_owned));
    let id = |text: &str| tokens.iter().position(|token| token == text);
    let mut merges = Vec::new();
    for token in formed {
        let mut pairs: Vec<(usize, usize)> =
            token.char_indices().skip(1).filter_map(|(at, _)| Some((id(&token[..at])?, id(&token[at..])?))).collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|(left, right)| json!([tokens[left], tokens[right]])));
    }
    let (normalizer, decoder) = sentence_piece::sections(true);
    let added = |id: u32, content: &str| crate::tokenizer::AddedToken::named(content).to_json(id);
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().zip(0u32..).map(|(token, id)| (token.clone(), id.into())).collect();
    json!({
        "version": "1.0",
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": normalizer, "pre_tokenizer": null, "decoder": decoder,
        "post_processor": {"type": "TemplateProcessing",
            "single": [piece("<s>"), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [piece("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": merges},
    })
}

fn directory(files: &[(&str, Json)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        fs::write(dir.path().join(name), contents.to_string()).unwrap();
    }
    dir
}

fn export(json: &Json, vocab_size: usize) -> Result<TokenizerMetadata, String> {
    let dir = directory(&[("tokenizer.json", json.clone())]);
    tokenizer_metadata(dir.path(), &config(vocab_size)).map_err(|error| error.to_string())
}

fn import(entries: &[(String, Value)]) -> Result<TokenizerTexts, CheckpointError> {
    let metadata: Metadata = entries.iter().cloned().collect();
    tokenizer_texts(Path::new("model.gguf"), &metadata).map(|texts| texts.expect("a tokenizer"))
}

fn file<'a>(texts: &'a TokenizerTexts, name: &str) -> &'a [u8] {
    &texts.files.iter().find(|(other, _)| other == name).unwrap().1
}

fn json_file(texts: &TokenizerTexts, name: &str) -> Json {
    serde_json::from_slice(file(texts, name)).unwrap()
}

fn value<'a>(metadata: &'a TokenizerMetadata, key: &str) -> Option<&'a Value> {
    metadata.entries.iter().find(|(other, _)| other == key).map(|(_, value)| value)
}

/// Both tokenizers give the same tokens, texts and prefixes.
fn assert_same(original: &Json, texts: &TokenizerTexts, name: &str) {
    let before = Tokenizer::from_bytes(original.to_string()).unwrap();
    let after = Tokenizer::from_bytes(file(texts, "tokenizer.json")).unwrap();
    assert_eq!(before.get_vocab(true), after.get_vocab(true), "{name}");
    for text in TEXTS {
        for special in [false, true] {
            let [a, b] = [&before, &after].map(|tokenizer| tokenizer.encode(text, special).unwrap().get_ids().to_vec());
            assert_eq!(a, b, "{name}: {text:?}");
            let [a, b] = [&before, &after].map(|tokenizer| tokenizer.decode(&a, false).unwrap());
            assert_eq!(a, b, "{name}: {text:?}");
        }
    }
}

#[test]
fn byte_level_tokenizers_have_the_same_tokens_after_a_round_trip() {
    for name in [
        "gpt-2",
        "smollm",
        "llama-bpe",
        "smaug-bpe",
        "qwen2",
        "qwen35",
        "stablelm2",
        "deepseek-llm",
        "deepseek-coder",
        "deepseek-v3",
        "tekken",
        "gpt-4o",
    ] {
        let known = pre::PreTokenizer::named(name).unwrap();
        let json = byte_level(known.to_json(), known.ignore_merges, known.nfc);
        let exported = export(&json, 300).unwrap();
        assert_eq!(value(&exported, keys::PRE).unwrap().as_str(), Some(name));
        assert_eq!(exported.notes.iter().any(|note| note.contains("NFC")), known.nfc, "{name}");
        assert_same(&json, &import(&exported.entries).unwrap(), name);
    }
}

#[test]
fn every_id_of_the_model_has_a_text_and_a_type() {
    let known = pre::PreTokenizer::named("gpt-2").unwrap();
    let exported = export(&byte_level(known.to_json(), false, false), 290).unwrap();
    let texts = value(&exported, keys::TOKENS).unwrap().as_strings().unwrap();
    let Some(Value::Array(Array::I32(types))) = value(&exported, keys::TYPES) else { panic!("no types") };
    assert_eq!((texts.len(), types.len()), (290, 290));
    assert_eq!(&texts[283..288], ["<s>", "<|end|>", "<|user|>", "[PAD286]", "[PAD287]"]);
    assert_eq!(&types[281..288], [1, 1, 3, 3, 4, 5, 5]);
    assert_eq!(value(&exported, keys::MERGES).unwrap().as_strings().unwrap()[0], "t h");
    assert_eq!(value(&exported, keys::ADD_BOS), Some(&Value::Bool(false)));
    let few = export(&byte_level(known.to_json(), false, false), 285).unwrap_err();
    assert!(few.contains("has the token 285, but the model has a vocabulary of 285"), "{few}");
}

#[test]
fn sentence_piece_keeps_the_order_of_its_merges() {
    let json = sentence_piece();
    let exported = export(&json, 300).unwrap();
    assert_eq!(exported.notes, Vec::<String>::new());
    assert_eq!(value(&exported, keys::MODEL).unwrap().as_str(), Some("llama"));
    assert_eq!(value(&exported, keys::ADD_BOS), Some(&Value::Bool(true)));
    assert_eq!(value(&exported, keys::ADD_SPACE), Some(&Value::Bool(true)));
    let Some(Value::Array(Array::F32(scores))) = value(&exported, keys::SCORES) else { panic!("no scores") };
    let Some(Value::Array(Array::I32(types))) = value(&exported, keys::TYPES) else { panic!("no types") };
    assert_eq!((scores[259], scores[260], types[0], types[1], types[3], types[299]), (0.0, -1.0, 2, 3, 6, 5));
    let imported = import(&exported.entries).unwrap();
    assert_same(&json, &imported, "llama");
    assert_eq!(json_file(&imported, "tokenizer.json")["model"]["merges"], json["model"]["merges"]);
    // One merge for each token does not say all that scores do.
    let mut one = json.clone();
    one["model"]["merges"] = json["model"]["merges"].as_array().unwrap()[1..].into();
    assert!(export(&one, 300).unwrap().notes[0].contains("do not express the order"));
    let mut without = json;
    without["model"]["vocab"].as_object_mut().unwrap().remove("<0x41>");
    assert!(export(&without, 300).unwrap_err().contains("has no token for the byte 0x41"));
}

#[test]
fn moonlights_ranks_become_tokens_and_merges() {
    let dir = tempfile::tempdir().unwrap();
    let more = ["th", "the", " a", "get", "Server", "ge", "er", "Se", "Ser", "人々", "人", "々"];
    let tokens = (0..=u8::MAX).map(|byte| vec![byte]).chain(more.map(|text| text.as_bytes().to_vec()));
    let lines: String = tokens.zip(0..).map(|(token, rank)| format!("{} {rank}\n", STANDARD.encode(token))).collect();
    fs::write(dir.path().join("tiktoken.model"), lines).unwrap();
    let settings = json!({"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "chat_template": "t",
        "added_tokens_decoder": {"523": {"content": "[PAD]", "special": true}, "270": {"content": "<|im_end|>",
        "special": true}, "275": {"content": "<think>", "special": false}}});
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    let model = ModelConfig { eos_token_id: vec![270, 269], ..config(530) };
    let exported = tokenizer_metadata(dir.path(), &model).unwrap();
    let get = |key: &str| value(&exported, key).cloned();
    assert_eq!(get(keys::PRE), Some("kimi-k2".into()));
    let texts = value(&exported, keys::TOKENS).unwrap().as_strings().unwrap();
    assert_eq!(
        [&texts[256], &texts[258], &texts[268], &texts[270], &texts[275], &texts[524]],
        ["th", "Ġa", "[BOS]", "<|im_end|>", "<think>", "[PAD524]"]
    );
    // The id of the config that ends a turn, and then the other.
    assert_eq!(
        [get(keys::BOS), get(keys::EOS), get(keys::EOT), get(keys::PAD)],
        [268u32, 270, 269, 523].map(|id| Some(id.into()))
    );
    assert_eq!(get(keys::TEMPLATE), Some("t".into()));
    assert!(exported.notes[0].contains("`kimi-k2` is not the model's own"), "{:?}", exported.notes);
    // `Server` is no pair of tokens, and no token is a part of the bytes of `人` and `々`.
    assert!(exported.notes[1].starts_with("4 tokens that no merges form, such as `Server`"), "{:?}", exported.notes);

    let ranks = Ranks::parse(&fs::read(dir.path().join("tiktoken.model")).unwrap()).unwrap();
    let names = SpecialNames::next_to(&dir.path().join("tiktoken.model")).unwrap();
    let special = special_tokens(ranks.count(), &names.added).unwrap();
    let own = tokenizer_json(&ranks, &special, &BosEos::default()).unwrap();
    let imported = import(&exported.entries).unwrap();
    assert_same(&own, &imported, "kimi-k2");
    // Files without merges have the same.
    let without: Vec<_> = exported.entries.iter().filter(|(key, _)| key != keys::MERGES).cloned().collect();
    assert_same(&own, &import(&without).unwrap(), "kimi-k2 without merges");
    let generation = json_file(&imported, "generation_config.json");
    assert_eq!(generation, json!({"bos_token_id": 268, "eos_token_id": [270, 269], "pad_token_id": 523}));
    let settings = json_file(&imported, "tokenizer_config.json");
    assert_eq!((&settings["eos_token"], &settings["chat_template"]), (&json!("<|im_end|>"), &json!("t")));
}

#[test]
fn what_the_post_processor_adds_and_named_templates_are_kept() {
    let known = pre::PreTokenizer::named("llama-bpe").unwrap();
    let mut json = byte_level(known.to_json(), true, false);
    let ends = BosEos { bos: Some(283), eos: Some(284) };
    let special = [(283, "<s>"), (284, "<|end|>")].map(|(id, text)| (id, crate::tokenizer::AddedToken::named(text)));
    json["post_processor"] = ends.post_processor(&special.into());
    let templates = json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
    let settings = json!({"bos_token": "<s>", "eos_token": "<|user|>", "unk_token": "a", "chat_template": templates});
    let generation = json!({"eos_token_id": [285, 284, 97, 98, 99]});
    let dir = directory(&[
        ("tokenizer.json", json.clone()),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ]);
    let exported = tokenizer_metadata(dir.path(), &config(286)).unwrap();
    let get = |key: &str| value(&exported, key).cloned();
    assert_eq!([get(keys::ADD_BOS), get(keys::ADD_EOS)], [Some(Value::Bool(true)), Some(Value::Bool(true))]);
    // What is added after a text is EOS, and the named EOS still ends a generation.
    assert_eq!(get(keys::EOS), Some(284u32.into()));
    assert!(exported.notes.iter().any(|note| note.contains("EOS is `<|end|>`, which is added to texts")));
    assert_eq!([get(keys::TEMPLATE), get("tokenizer.chat_template.tool_use")], [Some("d".into()), Some("t".into())]);
    assert!(exported.notes.iter().any(|note| note.contains("left out: ")), "{:?}", exported.notes);
    let imported = import(&exported.entries).unwrap();
    assert_same(&json, &imported, "llama-bpe");
    assert_eq!(json_file(&imported, "tokenizer_config.json")["chat_template"], templates);
}

#[test]
fn a_tokenizer_without_merges_needs_no_known_split() {
    let mut json = byte_level(
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
        false,
        false,
    );
    assert!(export(&json, 300).unwrap_err().contains("does not split texts before pairs are joined"));
    json["model"]["merges"] = json!([]);
    let exported = export(&json, 300).unwrap();
    assert_eq!(value(&exported, keys::PRE).unwrap().as_str(), Some(pre::WITHOUT_MERGES));
    assert_same(&json, &import(&exported.entries).unwrap(), "bytes");
}

#[test]
fn what_llama_cpp_cannot_do_is_refused_or_noted() {
    let gpt_2 = || byte_level(pre::PreTokenizer::named("gpt-2").unwrap().to_json(), false, false);
    for (change, expected) in [
        (json!({"normalizer": {"type": "Lowercase"}}), "the normalizer `Lowercase`"),
        (json!({"pre_tokenizer": {"type": "Whitespace"}}), "the pre-tokenizer `Whitespace`"),
        (json!({"post_processor": {"type": "New"}}), "the post-processor `New`"),
        (json!({"model": {"type": "Unigram", "vocab": []}}), "is of the type `Unigram`"),
        (json!({"model": {"type": "BPE", "vocab": {"a": 0}, "dropout": 0.1}}), "drops merges at random"),
        (json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}), "two tokens with the same id"),
        (json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}), "with a part that is no token"),
        (
            json!({"model": {"type": "BPE", "vocab": {"a": 0}, "end_of_word_suffix": "</w>"}}),
            "has a `end_of_word_suffix`",
        ),
    ] {
        let mut json = gpt_2();
        for (key, value) in change.as_object().unwrap() {
            json[key] = value.clone();
        }
        let error = export(&json, 300).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let mut json = gpt_2();
    json["added_tokens"][0]["lstrip"] = true.into();
    json["added_tokens"][1]["single_word"] = true.into();
    json["pre_tokenizer"]["add_prefix_space"] = true.into();
    let notes = export(&json, 300).unwrap().notes.join("\n");
    for expected in [
        "white space that belongs to `<s>`",
        "within words the added tokens `<|end|>`",
        "does not add a space",
        "no EOS",
    ] {
        assert!(notes.contains(expected), "{notes}");
    }
    let empty = directory(&[]);
    let none = tokenizer_metadata(empty.path(), &config(300)).unwrap();
    assert_eq!(none.entries, [(keys::MODEL.to_owned(), Value::from("none"))]);
    assert!(none.notes[0].contains("has no tokenizer"));
    assert_eq!(tokenizer_texts(Path::new("x"), &none.entries.into_iter().collect()).unwrap(), None);
}

#[test]
fn damaged_metadata_is_an_error_with_a_hint_where_a_file_would_help() {
    let known = pre::PreTokenizer::named("gpt-2").unwrap();
    let byte_level = export(&byte_level(known.to_json(), false, false), 300).unwrap().entries;
    let spm = export(&sentence_piece(), 300).unwrap().entries;
    let changed = |entries: &[(String, Value)], key: &str, value: Option<Value>| {
        let mut entries: Vec<_> = entries.iter().filter(|(other, _)| other != key).cloned().collect();
        entries.extend(value.map(|value| (key.to_owned(), value)));
        import(&entries).map(|_| ()).unwrap_err()
    };
    let strings = |list: &[&str]| Value::from(list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>());
    let cases = [
        (&byte_level, keys::MODEL, Some("bert".into()), "of the kind `bert`", true),
        (&byte_level, keys::MODEL, Some(1u32.into()), "not a string", false),
        (&byte_level, keys::PRE, Some("viking".into()), "the pre-tokenizer `viking`", true),
        (&byte_level, keys::PRE, None, "does not name its pre-tokenizer", true),
        (&byte_level, keys::TOKENS, None, "no list of strings", false),
        (&byte_level, keys::TOKENS, Some(strings(&["a", "b"])), "2 tokens and 300 types", false),
        (&byte_level, keys::TYPES, Some(Value::Array(Array::I32(vec![9; 300]))), "a type that is not known", false),
        (&byte_level, keys::MERGES, None, "has no `tokenizer.ggml.merges`", false),
        (&byte_level, keys::MERGES, Some(strings(&["t zz"])), "the merge `t zz`", false),
        (&byte_level, keys::MERGES, Some(strings(&["th"])), "the merge `th`", false),
        (&byte_level, keys::BOS, Some(300u32.into()), "not one of its 300 tokens", false),
        (&byte_level, keys::ADD_BOS, Some(1u32.into()), "not a boolean", false),
        (&byte_level, keys::ADD_SEPARATOR, Some(true.into()), "not supported", true),
        (&byte_level, keys::TEMPLATE, Some(1u32.into()), "not a string", false),
        (&byte_level, keys::TEMPLATES, Some(1u32.into()), "no list of names", false),
        (&spm, keys::SCORES, None, "has no numbers", false),
        (&spm, keys::SCORES, Some(Value::Array(Array::F32(vec![0.0; 3]))), "300 tokens and 3 scores", false),
        (&spm, keys::SCORES, Some(Value::Array(Array::F32(vec![f32::NAN; 300]))), "the score NaN", false),
        (&spm, keys::CHARACTERS, Some(1u32.into()), "not supported", true),
    ];
    for (entries, key, value, expected, has_hint) in cases {
        let error = changed(entries, key, value);
        let text = error.to_string();
        assert!(text.starts_with("the tokenizer in `model.gguf` ") && text.contains(expected), "{text}");
        assert_eq!(error.hint().is_some(), has_hint, "{text}");
    }
    let mut twice = byte_level.clone();
    let Some((_, Value::Array(Array::String(texts)))) = twice.iter_mut().find(|(key, _)| key == keys::TOKENS) else {
        panic!("no tokens")
    };
    texts[0] = texts[1].clone();
    assert!(import(&twice).unwrap_err().to_string().contains("two tokens with the text"));
    let huge: Vec<String> = (0..20_000).map(|id| format!("{id}{}", "a".repeat(500))).collect();
    let huge =
        [(keys::MODEL, "llama".into()), (keys::TOKENS, Value::from(huge))].map(|(key, value)| (key.into(), value));
    assert!(import(&huge).unwrap_err().to_string().contains("more and longer tokens than any vocabulary"));
    let mut more = byte_level;
    more.push(("tokenizer.ggml.new_thing".into(), true.into()));
    assert_eq!(import(&more).unwrap().notes, ["the key `tokenizer.ggml.new_thing` is not known and was ignored"]);
}
