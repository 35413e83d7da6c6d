use std::path::Path;

use moonlight_convert::tokenizer::byte_to_char;
use serde_json::json;

use super::*;

const TEXT: &str = "fn main() { println!(\"é 月光 🌙 <|eos|>\"); }\r\n\0";

fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut parts: Vec<String> = tokens.iter().map(|&token| stream.push(token)).collect();
    parts.push(stream.finish());
    parts
}

/// Writes a byte-level BPE with two merges and an added special token, and a `tokenizer_config.json` next to it.
fn write_tokenizer_json(dir: &Path) {
    let bytes = Tokenizer::bytes();
    let ours: serde_json::Value = serde_json::from_slice(&bytes.files()[0].contents).unwrap();
    let mut theirs = ours.clone();
    theirs["model"]["vocab"]["he"] = json!(256);
    theirs["model"]["vocab"]["Ġhe"] = json!(257);
    theirs["model"]["merges"] = json!([["h", "e"], ["Ġ", "he"]]);
    theirs["pre_tokenizer"]["use_regex"] = json!(true);
    theirs["added_tokens"] = json!([{"id": 258, "content": "<end>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}]);
    std::fs::write(dir.join("tokenizer.json"), theirs.to_string()).unwrap();
    let config = json!({"eos_token": {"content": "<end>"}, "bos_token": null});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn the_tokens_of_the_byte_tokenizer_are_bytes() {
    let tokenizer = Tokenizer::open("bytes").unwrap();
    let tokens = tokenizer.encode(TEXT).unwrap();
    assert_eq!(tokens, TEXT.bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.decode(&tokens), TEXT);
    assert_eq!(tokenizer.decode(&[BOS, 104, 105, EOS, PAD, 9999]), "hi");
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (259, Some(256), Some(257)));
    assert_eq!((tokenizer.special("<|eos|>"), tokenizer.special("a")), (Some(257), None));
}

#[test]
fn the_byte_tokenizer_is_saved_and_opened() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Tokenizer::from_model_dir(dir.path()).unwrap().is_none());
    Tokenizer::bytes().save(&dir.path().join("new")).unwrap();
    let again = Tokenizer::from_model_dir(&dir.path().join("new")).unwrap().unwrap();
    assert_eq!(again.fingerprint(), Tokenizer::bytes().fingerprint());
}

/// A `tokenizer.json` without other files.
fn parsed(contents: &[u8]) -> HuggingFace {
    HuggingFace::parse(contents, &SpecialNames::default(), &mut Vec::new()).unwrap()
}

/// The `tokenizers` crate, and therefore transformers, reads the saved file as the same tokenizer.
#[test]
fn the_file_of_the_byte_tokenizer_has_the_same_tokens() {
    let tokenizer = parsed(&Tokenizer::bytes().files()[0].contents);
    let tokens = tokenizer.encode(TEXT, false).unwrap();
    assert_eq!(tokens, Tokenizer::bytes().encode(TEXT).unwrap());
    assert_eq!(tokenizer.decode(&tokens, false), TEXT);
    assert_eq!(tokenizer.vocab_size(), 259);
    assert_eq!(tokenizer.added().id("<|eos|>"), Some(EOS));
    for byte in 0..=u8::MAX {
        assert_eq!(tokenizer.id(&byte_to_char(byte).to_string()), Some(byte.into()));
    }
}

/// `bytes-chat` has the same tokens as `bytes`, except for five bytes that never occur in UTF-8.
#[test]
fn the_chat_variant_of_the_byte_tokenizer() {
    let tokenizer = Tokenizer::open("bytes-chat").unwrap();
    assert_eq!(tokenizer.encode(TEXT).unwrap(), Tokenizer::bytes().encode(TEXT).unwrap());
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos()), (259, Some(257)));
    assert_eq!(tokenizer.special("<|im_end|>"), Some(0xF5));
    assert_eq!(tokenizer.specials().len(), 8);
    assert_eq!(tokenizer.decode(&[104, 0xF6, 105, 0xF9, EOS]), "hi");
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    let again = Tokenizer::from_model_dir(dir.path()).unwrap().unwrap();
    assert_eq!(again.fingerprint(), tokenizer.fingerprint());
    assert_ne!(again.fingerprint(), Tokenizer::bytes().fingerprint());
    // The `tokenizers` crate, and therefore transformers, reads the file as the same tokenizer.
    let theirs = Tokenizer::from_json(&tokenizer.files()[0].contents).unwrap();
    assert!(matches!(theirs.kind, Kind::HuggingFace(_)));
    assert_eq!(theirs.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
    assert_eq!((theirs.vocab_size(), theirs.specials()), (259, tokenizer.specials()));
    for (name, id) in tokenizer.specials() {
        assert_eq!((theirs.special(&name), theirs.added(&name)), (Some(id), Some(id)), "{name}");
    }
    assert_eq!(theirs.encode("<|im_end|>").unwrap(), "<|im_end|>".bytes().map(u32::from).collect::<Vec<_>>());
    let spelled = "<|<|im_user|>hé<|im_end|><|im_end|> <|eos|";
    for (ours, theirs) in [(tokenizer, theirs)].map(|(a, b)| (a.with_parse_special(true), b.with_parse_special(true))) {
        let tokens = ours.encode_text(spelled).unwrap();
        assert_eq!(tokens[2..6], [0xF6, 104, 0xC3, 0xA9]);
        assert_eq!(theirs.encode_text(spelled).unwrap(), tokens);
        assert_eq!(
            (ours.decode_with_special(&tokens).as_str(), ours.decode(&tokens).as_str()),
            (spelled, "<|hé <|eos|")
        );
        assert_eq!(theirs.decode_with_special(&tokens), spelled);
        assert_eq!(theirs.split_special(spelled), ours.split_special(spelled));
    }
}

#[test]
fn a_tokenizer_json_with_the_files_next_to_it() {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer_json(dir.path());
    let tokenizer = Tokenizer::open(&dir.path().join("tokenizer.json").display().to_string()).unwrap();
    assert_eq!(tokenizer.encode("he hex").unwrap(), [256, 257, 120]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos(), tokenizer.bos()), (259, Some(258), None));
    // A special token in a text is text.
    let spelled = tokenizer.encode("a<end>").unwrap();
    assert_eq!(spelled, "a<end>".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.decode(&[97, 258, 257]), "a he");
    let names: Vec<String> = tokenizer.files().into_iter().map(|file| file.name).collect();
    assert_eq!(names, ["tokenizer.json", "tokenizer_config.json"]);
}

#[test]
fn streams_hold_back_incomplete_characters() {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer_json(dir.path());
    for tokenizer in [Tokenizer::bytes(), Tokenizer::from_model_dir(dir.path()).unwrap().unwrap()] {
        let tokens = tokenizer.encode(TEXT).unwrap();
        let parts = streamed(&tokenizer, &tokens);
        assert_eq!(parts.concat(), TEXT);
        assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')), "{parts:?}");
        // The tokens end within a character.
        let cut = streamed(&tokenizer, &[104, 0xE6, 0x9C]);
        assert_eq!(cut, ["h", "", "", "\u{FFFD}"]);
    }
    let garbage = [0xFF, 0xE6, 0x41, 0x9C, 0xF0, 0x9F, 0x8C, 0x99];
    let tokenizer = Tokenizer::bytes();
    assert_eq!(streamed(&tokenizer, &garbage).concat(), tokenizer.decode(&garbage));
}

#[test]
fn errors_name_the_file_that_is_not_a_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for (name, contents) in [("a.json", "{}"), ("b.json", "not json"), ("c.model", "abc"), ("d.model", "")] {
        std::fs::write(dir.path().join(name), contents).unwrap();
        let error = Tokenizer::open(&path(name)).unwrap_err();
        assert!(error.to_string().contains(name) && !error.to_string().contains('\n'), "{error}");
    }
    let absent = Tokenizer::open(&path("absent")).unwrap_err();
    assert!(absent.hint().unwrap().contains("tiktoken.model"));
    assert!(matches!(Tokenizer::open(&dir.path().display().to_string()), Err(TokenizerError::NotFound(_))));
    // A word-level model without an unknown token would fail on the first new word.
    let words = json!({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}});
    std::fs::write(dir.path().join("w.json"), words.to_string()).unwrap();
    assert!(Tokenizer::open(&path("w.json")).unwrap_err().to_string().contains("no token for unknown characters"));
}

/// The `tokenizer.json` of `bytes`, changed.
fn with(change: impl FnOnce(&mut serde_json::Value)) -> Result<Tokenizer, String> {
    let mut json: serde_json::Value = serde_json::from_slice(&Tokenizer::bytes().files()[0].contents).unwrap();
    change(&mut json);
    let started = std::time::Instant::now();
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes());
    assert!(started.elapsed().as_secs() < 5);
    tokenizer.map_err(|error| error.to_string())
}

fn with_normalizer(normalizer: serde_json::Value) -> Result<Tokenizer, String> {
    with(|json| json["normalizer"] = normalizer)
}

fn replace(pattern: &str, content: &str) -> serde_json::Value {
    json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
}

#[test]
fn hostile_tokenizers_are_refused_before_the_library_parses_them() {
    let charsmap = |bytes: &[u8]| {
        use base64::Engine;
        let map = base64::engine::general_purpose::STANDARD.encode(bytes);
        with_normalizer(json!({"type": "Precompiled", "precompiled_charsmap": map}))
    };
    let long = "a".repeat(50_000_000);
    let sequence = |steps: Vec<serde_json::Value>| with_normalizer(json!({"type": "Sequence", "normalizers": steps}));
    for (refused, expected) in [
        (with_normalizer(replace("", &"a".repeat(36))), "has an empty pattern"),
        (with_normalizer(replace("a", &"a".repeat(36))), "36 times as long, past the limit of 16"),
        (with_normalizer(json!({"type": "Prepend", "prepend": long})), "writes a text of 50000000 bytes"),
        (with_normalizer(json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})), "a damaged table"),
        (charsmap(&[&b"\xff\xff\xff\x7f"[..], &[b'x'; 64]].concat()), "a damaged table"),
        (charsmap(&[&b"\x10\0\0\0"[..], &[0xff; 16], b"abc"].concat()), "the `tokenizers` library failed"),
        (charsmap(&[]), "a damaged table"),
        (sequence(vec![json!({"type": "NFC"}); 40]), "exceeds the limit of 32 steps"),
        (
            with(|json| {
                json["pre_tokenizer"] =
                    json!({"type": "Sequence", "pretokenizers": vec![json["pre_tokenizer"].clone(); 9]})
            }),
            "its pre_tokenizer can make a text 512 times as long",
        ),
        (
            with(|json| {
                json["decoder"] = json!({"type": "Sequence", "decoders": vec![replace("a", &"a".repeat(9)); 4]})
            }),
            "its decoder can make a text 6561 times as long",
        ),
        (with(|json| json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})), "pieces of length 0"),
        (
            with(|json| {
                json["model"] = json!({"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0},
                "continuing_subword_prefix": "##", "max_input_chars_per_word": u64::MAX})
            }),
            "more than the limit of 10000",
        ),
        (with(|json| json["model"]["vocab"][&long[..100_000]] = json!(300)), "a token of 100000 bytes"),
    ] {
        let error = refused.expect_err(expected);
        assert!(error.contains(expected), "{}", &error[..error.len().min(300)]);
    }
    // The checks and the library would read different values of a repeated key.
    let text = String::from_utf8(Tokenizer::bytes().files()[0].contents.clone()).unwrap();
    let repeated = text.replacen("\"normalizer\"", "\"normalizer\": {\"type\": \"NFC\"}, \"normalizer\"", 1);
    assert!(Tokenizer::from_json(repeated.as_bytes()).is_err());
    assert!(Tokenizer::from_json("[".repeat(1_000_000).as_bytes()).is_err());
}

#[test]
fn a_text_that_the_normalizer_expands_too_much_is_an_error() {
    // Each step is harmless, but twelve of them make a text 10^12 times as long.
    let steps = vec![replace("a", "aaaaaaaaaa"); 12];
    let refused = with_normalizer(json!({"type": "Sequence", "normalizers": steps}));
    match refused {
        Ok(tokenizer) => {
            let error = tokenizer.encode(&"a".repeat(10_000)).unwrap_err().to_string();
            assert!(error.contains("its normalizer makes"), "{error}");
        }
        Err(error) => assert!(error.contains("its normalizer makes"), "{error}"),
    }
    // An added token is normalized when the file is parsed.
    let steps = vec![replace("a", "aaaaaaaaaa"); 12];
    let refused = with(|json| {
        json["normalizer"] = json!({"type": "Sequence", "normalizers": steps});
        json["added_tokens"][0]["content"] = json!("a".repeat(100));
        json["added_tokens"][0]["normalized"] = json!(true);
    });
    assert!(refused.unwrap_err().contains("its normalizer makes"));
    // The normalizers of published tokenizers are accepted.
    let steps = vec![
        replace("``", "\""),
        json!({"type": "NFKD"}),
        json!({"type": "StripAccents"}),
        json!({"type": "Lowercase"}),
        json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
        replace(" ", "\u{2581}"),
        json!({"type": "Prepend", "prepend": "\u{2581}"}),
    ];
    let tokenizer = with_normalizer(json!({"type": "Sequence", "normalizers": steps})).unwrap();
    let text = "A  b\u{fdfa} ".repeat(10_000);
    assert!(tokenizer.encode(&text).is_ok());
    // A regular expression that backtracks exponentially is an error, and takes little time.
    let tokenizer = with(|json| {
        json["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(?=((a|a)*b))x|(\\w+)\\1"},
            "behavior": "Isolated", "invert": false});
    });
    if let Ok(tokenizer) = tokenizer {
        let started = std::time::Instant::now();
        let _ = tokenizer.encode(&"a".repeat(5_000));
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }
}

#[cfg(unix)]
#[test]
fn links_out_of_the_directory_and_devices_are_refused() {
    use std::os::unix::fs::symlink;

    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("secret"), "{}").unwrap();
    let dir = home.path().join("model");
    let names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "tokenization_moonshot.py",
    ];
    for name in names {
        for (target, problem) in
            [("../secret", "a symbolic link"), ("/dev/zero", "a symbolic link"), (".", "not a plain file")]
        {
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir(&dir).unwrap();
            if name != names[0] {
                write_tokenizer_json(&dir);
                let _ = std::fs::remove_file(dir.join(name));
            }
            symlink(target, dir.join(name)).unwrap();
            for error in
                [Tokenizer::from_model_dir(&dir).unwrap_err(), Tokenizer::open(&dir.display().to_string()).unwrap_err()]
            {
                let error = error.to_string();
                assert!(error.contains(&format!("{name}` cannot be read: ")) && error.contains(problem), "{error}");
            }
        }
    }
    let _ = std::fs::remove_file(dir.join("tokenization_moonshot.py"));
    let fifo = dir.join("special_tokens_map.json");
    let _ = std::fs::remove_file(&fifo);
    if std::process::Command::new("mkfifo").arg(&fifo).status().is_ok_and(|made| made.success()) {
        let error = Tokenizer::from_model_dir(&dir).unwrap_err().to_string();
        assert!(error.contains("special_tokens_map.json` cannot be read: it is not a plain file"), "{error}");
        assert!(Tokenizer::open(&fifo.display().to_string()).is_err());
    }
}

/// The tokenizers of a `tiktoken.model` with the bytes and some merges, and of the `tokenizer.json` converted from it.
fn tiktoken_and_json(home: &Path, config: &serde_json::Value) -> [Tokenizer; 2] {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    let merged = ["th", "the", " t", " the", "in", "ing", "  ", "\n\n", "月", "< ", "<t", "ink"];
    let tokens = (0..=u8::MAX).map(|byte| vec![byte]).chain(merged.iter().map(|text| text.as_bytes().to_vec()));
    let ranks: String =
        tokens.enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token))).collect();
    let [tiktoken, json] = ["t", "j"].map(|name| home.join(name));
    for dir in [&tiktoken, &json] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("tiktoken.model"), &ranks).unwrap();
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    }
    moonlight_convert::tokenizer::write_tokenizer_json(&json, true).unwrap();
    std::fs::remove_file(json.join("tiktoken.model")).unwrap();
    let tokenizers = [tiktoken, json].map(|dir| Tokenizer::from_model_dir(&dir).unwrap().unwrap());
    assert!(matches!(tokenizers[0].kind, Kind::Tiktoken(_)) && matches!(tokenizers[1].kind, Kind::HuggingFace(_)));
    tokenizers
}

/// Added tokens of each kind: special and not, whole words, with white space, normalized, and one that is a prefix of another.
fn added_tokens(first: u32) -> serde_json::Value {
    let token = |content: &str, special: bool, flags: &[&str]| {
        let flag = |name: &str| flags.contains(&name);
        json!({"content": content, "special": special, "lstrip": flag("lstrip"), "rstrip": flag("rstrip"),
            "single_word": flag("single_word"), "normalized": flag("normalized")})
    };
    let tokens = [
        (0, token("[BOS]", true, &[])),
        (1, token("[EOS]", true, &[])),
        (2, token("<|im_end|>", true, &[])),
        (3, token("<|im_user|>", true, &[])),
        (4, token("<|im_assistant|>", true, &[])),
        (5, token("<think>", false, &[])),
        (6, token("</think>", false, &["normalized"])),
        (7, token("<|tool|>", false, &["rstrip"])),
        (8, token("<|left|>", false, &["lstrip"])),
        (9, token("<|both|>", true, &["lstrip", "rstrip"])),
        (10, token("<|im_system|>", true, &[])),
        (11, token("word", false, &["single_word"])),
        (12, token("<think>x", true, &["normalized"])),
        (13, token("<thi", true, &[])),
        (14, token("月光", false, &["normalized", "single_word"])),
        (17, token("<|im_middle|>", true, &[])),
        (19, token(" ", false, &["normalized", "rstrip"])),
        (258, token("<|beyond|>", false, &[])),
    ];
    serde_json::Value::Object(tokens.into_iter().map(|(place, token)| ((first + place).to_string(), token)).collect())
}

/// Asserts that two tokenizers agree on the tokens of a text and on their decoding.
fn assert_equal([a, b]: &[Tokenizer; 2], text: &str) {
    let parsing = [a, b].map(|tokenizer| tokenizer.clone().with_parse_special(true));
    let bare = [a, b].map(|tokenizer| tokenizer.encode(text).unwrap());
    assert_eq!(bare[0], bare[1], "{text:?}");
    let parsed = parsing.each_ref().map(|tokenizer| tokenizer.encode_text(text).unwrap());
    assert_eq!(parsed[0], parsed[1], "{text:?}, special tokens as such");
    assert_eq!(a.split_special(text), b.split_special(text), "{text:?}");
    for tokens in [&bare[0], &parsed[0]] {
        assert_eq!(a.decode(tokens), b.decode(tokens), "{text:?}: {tokens:?}");
        assert_eq!(a.decode_with_special(tokens), b.decode_with_special(tokens), "{text:?}: {tokens:?}");
        for tokenizer in [a, b] {
            assert_eq!(streamed(tokenizer, tokens).concat(), tokenizer.decode(tokens), "{text:?}: {tokens:?}");
        }
    }
}

#[test]
fn added_tokens_have_the_same_meaning_in_both_kinds_of_file() {
    use rand::seq::IndexedRandom;
    use rand::{RngExt, SeedableRng};

    let home = tempfile::tempdir().unwrap();
    let config = json!({"bos_token": "[BOS]", "eos_token": "<|im_end|>", "add_bos_token": true,
        "added_tokens_decoder": added_tokens(268)});
    let both = tiktoken_and_json(home.path(), &config);
    let [a, b] = &both;
    assert_eq!((a.vocab_size(), a.specials(), a.bos(), a.eos()), (b.vocab_size(), b.specials(), b.bos(), b.eos()));
    assert_eq!((a.vocab_size(), a.bos(), a.eos(), a.prefix()), (527, Some(268), Some(270), &[268][..]));
    assert_eq!((a.prefix(), a.suffix()), (b.prefix(), b.suffix()));
    for (name, special) in
        [("<think>", false), ("<|both|>", true), ("<|beyond|>", false), ("<|reserved_token_500|>", true)]
    {
        for tokenizer in &both {
            let id = tokenizer.added(name);
            assert!(id.is_some_and(|id| tokenizer.is_added(id)), "{name}");
            assert_eq!(tokenizer.special(name), id.filter(|_| special), "{name}");
            assert_eq!(tokenizer.specials().iter().any(|(text, _)| text == name), special, "{name}");
        }
    }
    assert_eq!(a.encode("<think>t</think><|im_end|>").unwrap()[..3], [273, 116, 274]);
    assert_eq!(a.decode(&[273, 116, 274, 270]), "<think>t</think>");
    let mut pieces: Vec<String> = config["added_tokens_decoder"]
        .as_object()
        .unwrap()
        .values()
        .map(|token| token["content"].as_str().unwrap().to_owned())
        .collect();
    pieces.extend(
        [
            "the ",
            "thinking ",
            "é",
            "\n",
            "\t",
            " ",
            "  ",
            "月",
            "🌙",
            "_",
            "1",
            "<",
            "<|",
            "|>",
            "\u{3000}",
            "\u{301}",
            "'s",
        ]
        .map(String::from),
    );
    let mut draw = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    for _ in 0..4000 {
        let text: String = (0..draw.random_range(1..9)).map(|_| pieces.choose(&mut draw).unwrap().as_str()).collect();
        assert_equal(&both, &text);
    }
}

/// Tokens of reasoning and tools in a template are added tokens in both kinds of file.
#[test]
fn conversations_have_the_same_tokens_in_both_kinds_of_file() {
    use crate::chat::{ChatEncoder, ChatTemplate, Message};

    let home = tempfile::tempdir().unwrap();
    let both = tiktoken_and_json(home.path(), &json!({"added_tokens_decoder": added_tokens(268)}));
    let template = "{%- for m in messages -%}<|im_user|>{{ m['role'] }}<|im_middle|>  {{ m['content'] }}<|both|>\n  \
         {{ m['content'] }}<|beyond|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_assistant|><think>{%- endif -%}";
    let encoded = both.clone().map(|tokenizer| {
        let encoder = ChatEncoder::new(ChatTemplate::from_source(template).unwrap(), tokenizer);
        let messages =
            [Message::new("user", "a <think> b<|im_end|>"), Message::new("assistant", "<think>two</think>2")];
        encoder.tokens(&messages, true).unwrap()
    });
    assert_eq!(encoded[0], encoded[1]);
    let spelled = both[0].decode_with_special(&encoded[0]);
    // The white space around the special token belongs to it, as in transformers.
    assert!(spelled.starts_with("<|im_user|>user<|im_middle|>  a <think> b<|im_end|><|both|>a <think> b"), "{spelled}");
    // The generation prompt opens a reasoning block that no turn has, so that no turn starts with the prompt.
    let template = "{%- for m in messages -%}<|im_user|>{{ m['role'] }}<|im_middle|> {{ m['content'] }}<|beyond|>\n{%- endfor -%}\
         {%- if add_generation_prompt -%}<|im_user|>assistant<|im_middle|> <think>{%- endif -%}";
    for tokenizer in both {
        let encoder = ChatEncoder::new(ChatTemplate::from_source(template).unwrap(), tokenizer);
        assert_eq!(encoder.end_token(), Some(526), "the end token is not special");
    }
    let count = |id: u32| encoded[0].iter().filter(|&&token| token == id).count();
    assert_eq!((count(273), count(270)), (5, 0), "in a message `<think>` is a token, and `<|im_end|>` is text");
}

/// The expected values are those of transformers 5.24, `AutoTokenizer.from_pretrained(dir)("Hi")["input_ids"]`, which ignores
/// `add_bos_token` if there is a tokenizer.json.
#[test]
fn a_post_processor_adds_a_prefix_and_a_suffix() {
    let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    let template = |single: serde_json::Value| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {"<|bos|>": special("<|bos|>", 256), "<|eos|>": special("<|eos|>", 257)}})
    };
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let begins = template(json!([piece("<|bos|>"), text]));
    let bert = |kind: &str| json!({"type": kind, "sep": ["<|eos|>", 257], "cls": ["<|bos|>", 256], "trim_offsets": true, "add_prefix_space": false});
    for (processor, expected) in [
        (serde_json::Value::Null, &[72, 105][..]),
        (bytes.clone(), &[72, 105]),
        (begins.clone(), &[256, 72, 105]),
        (template(json!([piece("<|bos|>"), text, piece("<|eos|>")])), &[256, 72, 105, 257]),
        (json!({"type": "Sequence", "processors": [bytes, begins]}), &[256, 72, 105]),
        (bert("RobertaProcessing"), &[256, 72, 105, 257]),
        (bert("BertProcessing"), &[256, 72, 105, 257]),
    ] {
        let tokenizer = with(|json| json["post_processor"] = processor.clone()).unwrap();
        assert_eq!(tokenizer.encode_text("Hi").unwrap(), expected, "{processor}");
        assert_eq!(tokenizer.encode("Hi").unwrap(), [72, 105], "{processor}");
        assert_eq!([tokenizer.prefix(), &[72, 105], tokenizer.suffix()].concat(), expected);
        let prompt = tokenizer.clone().for_prompts().encode_text("Hi").unwrap();
        assert_eq!(prompt, expected[..expected.len() - tokenizer.suffix().len()]);
        let never = tokenizer.with_bos(AddBos::Never).unwrap();
        assert!(never.prefix().is_empty());
    }
    let two_parts = json!({"type": "Sequence", "processors": [begins, begins]});
    for (processor, expected) in [
        (two_parts, "two parts that each add tokens"),
        (template(json!([text, text])), "contains the text 2 times"),
        (template(json!([piece("<|bos|>")])), "contains the text 0 times"),
        (template(json!([piece("<s>"), text])), "adds the token `<s>` without an id"),
        (template(json!([piece("<|bos|>"), {"Sequence": {"id": "B", "type_id": 0}}])), "contains a second"),
        (template(json!(vec![piece("<|bos|>"); 65])), "adds more than 64 tokens"),
        (json!({"type": "Unheard"}), "the unknown type `Unheard`"),
        (json!({"type": "BertProcessing", "cls": ["a", 1]}), "has no `sep`"),
        (json!([]), "has no `type`"),
    ] {
        let error = with(|json| json["post_processor"] = processor).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn bos_is_added_on_request() {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer_json(dir.path());
    let open = |config: serde_json::Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Tokenizer::from_model_dir(dir.path()).unwrap().unwrap()
    };
    let none = open(json!({"eos_token": "<end>"}));
    let error = none.with_bos(AddBos::Always).unwrap_err();
    assert!(error.to_string().contains("has no BOS token") && error.hint().is_some(), "{error}");
    let unset = open(json!({"bos_token": "<end>"}));
    assert_eq!(unset.bos_conflict(), None);
    // As in DeepSeek's files, the config asks for BOS and the post-processor does not add it.
    let tokenizer = open(json!({"bos_token": "<end>", "add_bos_token": true}));
    assert_eq!(tokenizer.encode_text("a").unwrap(), [97]);
    assert!(tokenizer.bos_conflict().unwrap().contains("says `add_bos_token: true`, but the post-processor"));
    let always = tokenizer.with_bos(AddBos::Always).unwrap();
    assert_eq!(always.encode_text("a").unwrap(), [258, 97]);
    assert_eq!(always.clone().with_bos(AddBos::Always).unwrap().prefix(), [258], "once");
    assert_eq!(always.with_parse_special(true).encode_text("<end>a").unwrap(), [258, 258, 97], "as in transformers");
}

/// The expected values are those of transformers 5.24.
#[test]
fn files_next_to_a_tokenizer_json_name_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let added = |content: &str, special: bool, lstrip: bool| {
        json!({"content": content, "special": special, "lstrip": lstrip, "rstrip": false, "single_word": false,
            "normalized": false})
    };
    let mut json: serde_json::Value = serde_json::from_slice(&Tokenizer::bytes().files()[0].contents).unwrap();
    let mut open = |tokens: &[(u32, serde_json::Value)], files: &[(&str, serde_json::Value)]| {
        let tokens = tokens.iter().map(|(id, token)| {
            let mut token = token.clone();
            token["id"] = json!(id);
            token
        });
        json["added_tokens"] = tokens.collect();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        for name in ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"] {
            let _ = std::fs::remove_file(dir.path().join(name));
        }
        for (name, value) in files {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        Tokenizer::from_model_dir(dir.path()).unwrap().unwrap()
    };
    let end = (256, added("<e>", true, false));
    let config = |token: serde_json::Value| {
        [("tokenizer_config.json", json!({"eos_token": "<e>", "added_tokens_decoder": {"257": token}}))]
    };
    // A token in both files; one only in the config, with its flags; and one that another key names.
    let alone = [end.clone()];
    let both = [end.clone(), (257, added("<t>", true, false))];
    let plain = [end.clone(), (257, added("<t>", false, false))];
    let eos = |name: &str| [("tokenizer_config.json", json!({"eos_token": name}))];
    let map = [("special_tokens_map.json", json!({"eos_token": "<t>"}))];
    let legacy = [("added_tokens.json", json!({"<t>": 257}))];
    for (tokenizer, text, parsed, split, skipped) in [
        (open(&both, &config(added("<t>", false, false))), "a <t> b", 257, false, "a  b"),
        (open(&plain, &config(added("<t>", true, false))), "a <t> b", 257, false, "a  b"),
        (open(&alone, &config(added("<t>", false, false))), "a <t> b", 257, true, "a <t> b"),
        (open(&alone, &config(added("<t>", true, false))), "a <t> b", 257, false, "a  b"),
        (open(&plain, &config(added("<t>", false, true))), "a <t> b", 257, true, "a<t> b"),
        (open(&plain, &config(json!({"content": "<t>"}))), "a <t> b", 257, true, "a <t> b"),
        (open(&plain, &eos("<t>")), "a <t> b", 257, false, "a  b"),
        (open(&plain, &map), "a <t> b", 257, false, "a  b"),
        (open(&alone, &legacy), "a <t> b", 257, true, "a <t> b"),
        // There is a gap before the id, so the crate, and therefore transformers, assigns a different id.
        (open(&[end.clone(), (300, added("<t>", false, false))], &[]), "a <t> b", 257, true, "a <t> b"),
    ] {
        let tokens = tokenizer.clone().with_parse_special(true).encode_text(text).unwrap();
        assert!(tokens.contains(&parsed), "{tokens:?}");
        assert_eq!(tokenizer.encode(text).unwrap().contains(&parsed), split, "{text} {skipped}");
        assert_eq!(tokenizer.decode(&tokens), skipped);
    }
    let kept = |tokenizer: &Tokenizer| tokenizer.files().iter().any(|file| file.name == "added_tokens.json");
    assert!(kept(&open(&alone, &legacy)));
    // With an `added_tokens_decoder` the file is ignored, and is not part of the tokenizer's files.
    let [current] = config(added("<t>", false, false));
    assert!(!kept(&open(&plain, &[current, ("added_tokens.json", json!({"<x>": 257}))])));
    // A damaged file is an error, and not treated as absent.
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    let error = Tokenizer::from_model_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json` cannot be read: it is not JSON"), "{error}");
}

#[test]
fn the_fingerprint_changes_with_the_tokens_of_a_text() {
    let home = tempfile::tempdir().unwrap();
    let prints = |special: bool| {
        let token = json!({"content": "<think>", "special": special});
        tiktoken_and_json(home.path(), &json!({"added_tokens_decoder": {"273": token}}))
            .map(|t| t.fingerprint().to_owned())
    };
    let [before, after] = [prints(true), prints(false)];
    assert!(before[0] != after[0] && before[1] != after[1]);
    assert_eq!(after, prints(false));
}

/// transformers encodes the text of a template in the same way (Llama 2, Mistral).
#[test]
fn a_space_is_added_before_the_first_word_of_a_text_only() {
    use crate::chat::{ChatEncoder, ChatTemplate, Message};

    let tokenizer = with(|json| {
        json["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        json["decoder"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        json["model"]["vocab"]["▁"] = json!(256);
        json["model"]["vocab"]["<unk>"] = json!(257);
        json["model"]["unk_token"] = json!("<unk>");
    })
    .unwrap();
    let template = "{% for m in messages %}a<|bos|>{{ m.content }}<|eos|>{% endfor %}";
    let encoder = ChatEncoder::new(ChatTemplate::from_source(template).unwrap(), tokenizer.clone());
    let messages = [Message::new("user", "b c"), Message::new("assistant", "d")];
    // The three special tokens follow `▁` and `<unk>`.
    let [space, bos, eos] = [256, 258, 259];
    let expected = [space, 97, bos, 98, space, 99, eos, 97, bos, 100, eos];
    assert_eq!(encoder.tokens(&messages, false).unwrap(), expected);
    let parsed = tokenizer.with_parse_special(true).encode_text("a<|bos|>b c<|eos|>a<|bos|>d<|eos|>").unwrap();
    assert_eq!(parsed, expected);
}
