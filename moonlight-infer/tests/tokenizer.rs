//! A `tiktoken.model` and the `tokenizer.json` converted from it yield the tokens of tiktoken. The files have the real
//! ranks of `cl100k_base` (which the `tiktoken-rs` crate contains), Moonlight's pattern, and added tokens, special and not.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moonlight_convert::tokenizer::{pattern, write_tokenizer_json};
use moonlight_infer::Tokenizer;
use serde_json::{Value, json};
use tiktoken_rs::CoreBPE;

/// Special tokens of Kimi K2. The ids are relative to the first one after the ranks.
const SPECIAL: [(u32, &str); 7] = [
    (0, "[BOS]"),
    (1, "[EOS]"),
    (2, "<|im_end|>"),
    (3, "<|im_user|>"),
    (4, "<|im_assistant|>"),
    (10, "<|im_system|>"),
    (17, "<|im_middle|>"),
];
const PLAIN: [(u32, &str); 4] =
    [(11, "<|tool_calls_section_begin|>"), (13, "<|tool_call_begin|>"), (22, "<think>"), (23, "</think>")];

/// Code and pages of this repository, and scripts and symbols that it does not contain.
fn texts() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut texts: Vec<String> = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/src/reference/recipe.md"]
        .iter()
        .filter_map(|name| fs::read_to_string(root.join(name)).ok())
        .collect();
    for folder in
        ["infer/src/tokenizer", "infer/src/chat", "infer/src/chat/tests", "infer/src/records", "train/src/data"]
    {
        let folder = format!("moonlight-{folder}");
        for entry in fs::read_dir(root.join(folder)).into_iter().flatten().flatten() {
            texts.extend(fs::read_to_string(entry.path()));
        }
    }
    assert!(texts.iter().map(String::len).sum::<usize>() > 200_000, "the files of the repository are found");
    texts.push("月光下的凤尾竹，轻柔啊美丽的像绿色的雾。中文English混排123数字、标点。".repeat(200));
    texts.push("漢字かな交じり文 ｶﾀｶﾅ 한국어 русский עברית العربية हिन्दी ไทย e\u{301} 👩‍👩‍👧‍👦 🇩🇪👍🏽 ❤️\n".repeat(200));
    texts.extend((0x1F300..0x1FB00).step_by(64).map(|first| (first..first + 64).filter_map(char::from_u32).collect()));
    texts.extend(["", " ", "\r\n\r\n", "  x\t", "<thi", "<think", "< think>", "<|im_end", "[EOS"].map(String::from));
    texts
}

#[test]
fn both_files_give_the_tokens_of_tiktoken() {
    let home = tempfile::tempdir().unwrap();
    let [ranks_only, json_only] = ["ranks", "json"].map(|name| home.path().join(name));
    let source = tiktoken_rs::cl100k_base_singleton();
    let tokens: Vec<Vec<u8>> = (0..).map_while(|rank| source.decode_bytes(&[rank]).ok()).collect();
    let first = tokens.len() as u32;
    let mut model = String::new();
    for (rank, token) in tokens.iter().enumerate() {
        writeln!(model, "{} {rank}", STANDARD.encode(token)).unwrap();
    }
    let named = SPECIAL.iter().map(|token| (token, true)).chain(PLAIN.iter().map(|token| (token, false)));
    let added: serde_json::Map<String, Value> = named
        .map(|((place, content), special)| {
            let token = json!({"content": content, "special": special, "lstrip": false, "rstrip": false,
                "single_word": false, "normalized": false});
            ((first + place).to_string(), token)
        })
        .collect();
    for dir in [&ranks_only, &json_only] {
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("tiktoken.model"), &model).unwrap();
        fs::write(dir.join("tokenizer_config.json"), json!({"added_tokens_decoder": added}).to_string()).unwrap();
    }
    write_tokenizer_json(&json_only, false).unwrap();
    fs::remove_file(json_only.join("tiktoken.model")).unwrap();
    let ours = [ranks_only, json_only].map(|dir| Tokenizer::from_model_dir(&dir).unwrap().unwrap());
    assert_eq!(ours[0].specials(), ours[1].specials());
    let parsing = ours.each_ref().map(|tokenizer| tokenizer.clone().with_parse_special(true));
    let all = SPECIAL.iter().chain(&PLAIN).map(|(place, name)| ((*name).to_owned(), first + place));
    let theirs = CoreBPE::new(tokens.into_iter().zip(0..).collect(), all.collect(), &pattern()).unwrap();
    let plain: HashSet<&str> = PLAIN.iter().map(|(_, name)| *name).collect();

    let names: Vec<&str> = SPECIAL.iter().chain(&PLAIN).map(|(_, name)| *name).collect();
    let (mut bytes, mut count) = (0, 0);
    for (number, text) in texts().iter().enumerate() {
        // Added tokens at the start and in the middle, next to each other and with white space between them.
        let at = text.floor_char_boundary(text.len() / 2);
        let added = |offset: usize| names[(number + offset) % names.len()];
        let marked = format!("{}{} {}{}\n{}{}", added(0), &text[..at], added(1), added(2), added(3), &text[at..]);
        for text in [text, &marked] {
            let (unparsed, _) = theirs.encode(text, &plain).unwrap();
            let parsed = theirs.encode_with_special_tokens(text);
            for (ours, parsing) in ours.iter().zip(&parsing) {
                assert_eq!(ours.encode(text).unwrap(), unparsed);
                assert_eq!(parsing.encode_text(text).unwrap(), parsed);
                assert_eq!(ours.decode(&unparsed), *text);
                assert_eq!(ours.decode_with_special(&parsed), *text);
                let mut stream = ours.stream();
                let mut streamed: String = parsed.iter().map(|&token| stream.push(token)).collect();
                streamed.push_str(&stream.finish());
                let without: String = SPECIAL.iter().fold(text.clone(), |text, (_, name)| text.replace(name, ""));
                // Removing one name after the other is correct, because no text spells a name around another one.
                assert_eq!((&ours.decode(&parsed), &streamed), (&without, &without));
            }
            (bytes, count) = (bytes + text.len(), count + parsed.len());
        }
    }
    println!("{bytes} bytes, {count} tokens, all equal");
}
