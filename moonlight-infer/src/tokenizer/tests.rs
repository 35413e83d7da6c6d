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

/// Byte-level BPE with a few merges, two added specials, and its neighbour files.
fn write_tokenizer_json(dir: &Path) {
    let bytes = Tokenizer::bytes();
    let ours: serde_json::Value = serde_json::from_slice(&bytes.companions()[0].contents).unwrap();
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
fn bytes_are_bytes() {
    let tokenizer = Tokenizer::open("bytes").unwrap();
    let tokens = tokenizer.encode(TEXT).unwrap();
    assert_eq!(tokens, TEXT.bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.decode(&tokens), TEXT);
    assert_eq!(tokenizer.decode(&[BOS, 104, 105, EOS, PAD, 9999]), "hi");
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (259, Some(256), Some(257)));
    assert_eq!((tokenizer.special("<|eos|>"), tokenizer.special("a")), (Some(257), None));
}

#[test]
fn bytes_come_back_from_a_checkpoint_folder() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Tokenizer::from_model_dir(dir.path()).unwrap().is_none());
    Tokenizer::bytes().save(&dir.path().join("new")).unwrap();
    let again = Tokenizer::from_model_dir(&dir.path().join("new")).unwrap().unwrap();
    assert_eq!(again.fingerprint(), Tokenizer::bytes().fingerprint());
}

/// What `tokenizers`, and so transformers, makes of the file that stands for the bytes.
#[test]
fn the_file_for_bytes_means_bytes() {
    let tokenizer = HuggingFace::parse(&Tokenizer::bytes().companions()[0].contents).unwrap();
    let tokens = tokenizer.encode(TEXT).unwrap();
    assert_eq!(tokens, Tokenizer::bytes().encode(TEXT).unwrap());
    assert_eq!(tokenizer.decode(&tokens), TEXT);
    assert_eq!(tokenizer.vocab_size(), 259);
    assert_eq!(tokenizer.special("<|eos|>"), Some(EOS));
    for byte in 0..=u8::MAX {
        assert_eq!(tokenizer.id(&byte_to_char(byte).to_string()), Some(byte.into()));
    }
}

/// The same tokens as `bytes`, but for five bytes that no text has.
#[test]
fn bytes_that_can_chat() {
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
    // What `tokenizers`, and so transformers, makes of the file.
    let theirs = HuggingFace::parse(&tokenizer.companions()[0].contents).unwrap();
    assert_eq!(theirs.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
    assert_eq!((theirs.vocab_size(), theirs.specials().len()), (259, 8));
    for (name, id) in tokenizer.specials() {
        assert_eq!(theirs.special(&name), Some(id), "{name}");
    }
    assert_eq!(theirs.encode("<|im_end|>").unwrap(), "<|im_end|>".bytes().map(u32::from).collect::<Vec<_>>());
}

#[test]
fn a_tokenizer_json_with_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer_json(dir.path());
    let tokenizer = Tokenizer::open(&dir.path().join("tokenizer.json").display().to_string()).unwrap();
    assert_eq!(tokenizer.encode("he hex").unwrap(), [256, 257, 120]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos(), tokenizer.bos()), (259, Some(258), None));
    // What spells the special token is text.
    let spelled = tokenizer.encode("a<end>").unwrap();
    assert_eq!(spelled, "a<end>".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.decode(&[97, 258, 257]), "a he");
    let names: Vec<String> = tokenizer.companions().into_iter().map(|file| file.name).collect();
    assert_eq!(names, ["tokenizer.json", "tokenizer_config.json"]);
}

#[test]
fn streams_never_give_half_a_character() {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer_json(dir.path());
    for tokenizer in [Tokenizer::bytes(), Tokenizer::from_model_dir(dir.path()).unwrap().unwrap()] {
        let tokens = tokenizer.encode(TEXT).unwrap();
        let parts = streamed(&tokenizer, &tokens);
        assert_eq!(parts.concat(), TEXT);
        assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')), "{parts:?}");
        // An end in the middle of a character.
        let cut = streamed(&tokenizer, &[104, 0xE6, 0x9C]);
        assert_eq!(cut, ["h", "", "", "\u{FFFD}"]);
    }
    let garbage = [0xFF, 0xE6, 0x41, 0x9C, 0xF0, 0x9F, 0x8C, 0x99];
    let tokenizer = Tokenizer::bytes();
    assert_eq!(streamed(&tokenizer, &garbage).concat(), tokenizer.decode(&garbage));
}

#[test]
fn what_is_not_a_tokenizer_is_named() {
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
    assert!(Tokenizer::open(&path("w.json")).unwrap_err().to_string().contains("no token for a character"));
}

/// A tokenizer of bytes with parts of others.
fn with(change: impl FnOnce(&mut serde_json::Value)) -> Result<Tokenizer, String> {
    let mut json: serde_json::Value = serde_json::from_slice(&Tokenizer::bytes().companions()[0].contents).unwrap();
    change(&mut json);
    let began = std::time::Instant::now();
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes());
    assert!(began.elapsed().as_secs() < 5);
    tokenizer.map_err(|error| error.to_string())
}

fn with_normalizer(normalizer: serde_json::Value) -> Result<Tokenizer, String> {
    with(|json| json["normalizer"] = normalizer)
}

fn replace(pattern: &str, content: &str) -> serde_json::Value {
    json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
}

#[test]
fn hostile_tokenizers_are_refused_before_the_library_sees_them() {
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
        (with_normalizer(json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})), "is damaged"),
        (charsmap(&[&b"\xff\xff\xff\x7f"[..], &[b'x'; 64]].concat()), "is damaged"),
        (charsmap(&[&b"\x10\0\0\0"[..], &[0xff; 16], b"abc"].concat()), "the `tokenizers` library failed"),
        (charsmap(&[]), "is damaged"),
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
        (with(|json| json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})), "pieces of no length"),
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
    // One twice in the file would be one for us and another for the library.
    let text = String::from_utf8(Tokenizer::bytes().companions()[0].contents.clone()).unwrap();
    let twice = text.replacen("\"normalizer\"", "\"normalizer\": {\"type\": \"NFC\"}, \"normalizer\"", 1);
    assert!(Tokenizer::from_json(twice.as_bytes()).is_err());
    assert!(Tokenizer::from_json("[".repeat(1_000_000).as_bytes()).is_err());
}

#[test]
fn a_text_that_runs_away_is_an_error_and_not_nothing() {
    // Each step is harmless, and twelve of them make 10^12 of one.
    let steps = vec![replace("a", "aaaaaaaaaa"); 12];
    let refused = with_normalizer(json!({"type": "Sequence", "normalizers": steps}));
    match refused {
        Ok(tokenizer) => {
            let error = tokenizer.encode(&"a".repeat(10_000)).unwrap_err().to_string();
            assert!(error.contains("its normalizer makes"), "{error}");
        }
        Err(error) => assert!(error.contains("its normalizer makes"), "{error}"),
    }
    // The normalizers of published tokenizers are not refused.
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
    // A regular expression that goes back too far has no tokens, which is said.
    let tokenizer = with(|json| {
        json["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(?=((a|a)*b))x|(\\w+)\\1"},
            "behavior": "Isolated", "invert": false});
    });
    if let Ok(tokenizer) = tokenizer {
        let began = std::time::Instant::now();
        let _ = tokenizer.encode(&"a".repeat(5_000));
        assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    }
}

#[cfg(unix)]
#[test]
fn links_out_of_a_folder_and_devices_are_refused_and_named() {
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
