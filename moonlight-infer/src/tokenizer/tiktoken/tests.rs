use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moonlight_convert::tokenizer::AddedToken;

use super::*;

/// A file with the 256 bytes and then `more` tokens.
fn file(more: &[&str]) -> Vec<u8> {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let more = more.iter().map(|text| text.as_bytes().to_vec());
    let lines = bytes.chain(more).enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token)));
    lines.collect::<String>().into_bytes()
}

/// The pieces are those of Python's `regex` (`VERSION1`) for the published pattern. Each piece is a token that no sequence of
/// merges produces, so that it appears only if the text is split into exactly these pieces.
#[test]
fn text_is_split_by_the_published_pattern() {
    let cases: [&[&str]; 5] = [
        &[
            "Hello",
            ",",
            " world's",
            " ",
            " ",
            "123",
            "45",
            " ",
            "月光",
            "モデル",
            "!\n\n",
            " ",
            " fn",
            " Main",
            "Loop",
            "()",
            " {",
            "\t",
            "}",
        ],
        &["I'LL", " we've", "   \r\n", " x"],
        &["中文", "Abc", "你好", " é̀", " ", "２０２", "４", "年"],
        &["   "],
        &["<|", "im", "_end", "|>[", "EOS", "]"],
    ];
    for pieces in cases {
        let mut tokens: Vec<&str> = pieces.iter().copied().filter(|piece| piece.len() > 1).collect();
        tokens.sort_unstable();
        tokens.dedup();
        let tokenizer = Tiktoken::parse(&file(&tokens), &SpecialNames::default()).unwrap();
        let expected: Vec<u32> = pieces
            .iter()
            .map(|piece| match piece.as_bytes() {
                [byte] => u32::from(*byte),
                _ => 256 + tokens.iter().position(|token| token == piece).unwrap() as u32,
            })
            .collect();
        let text = pieces.concat();
        assert_eq!(tokenizer.encode(&text, false), expected, "{text:?}");
        assert_eq!(tokenizer.bytes(&expected, false), text.as_bytes());
    }
}

#[test]
fn pairs_of_the_lowest_rank_merge_first() {
    let tokenizer = Tiktoken::parse(&file(&["bc", "ab", "abc"]), &SpecialNames::default()).unwrap();
    assert_eq!(tokenizer.encode("abc", false), [258]);
    assert_eq!(tokenizer.encode("abcab", false), [258, 257]);
    assert_eq!(tokenizer.encode("xabcd", false), [120, 258, 100]);
}

#[test]
fn specials_follow_the_ranks() {
    let added = BTreeMap::from([(256 + 5, AddedToken::named("<|tool|>")), (256 + 300, AddedToken::named("<more>"))]);
    let tokenizer = Tiktoken::parse(&file(&[]), &SpecialNames { added, ..Default::default() }).unwrap();
    assert_eq!(tokenizer.vocab_size(), 557);
    let id = |name: &str| tokenizer.added().id(name);
    for (name, token) in [
        ("[BOS]", 256),
        ("[EOS]", 257),
        ("<|im_end|>", 258),
        ("<|im_middle|>", 273),
        ("<|tool|>", 261),
        ("<|reserved_token_500|>", 500),
        ("<|reserved_token_555|>", 555),
        ("<more>", 556),
    ] {
        assert_eq!(id(name), Some(token), "{name}");
    }
    // They are text when encoded and dropped when decoded, unless requested otherwise.
    assert_eq!(tokenizer.encode("[EOS]", false), "[EOS]".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.encode("a[EOS]b", true), [97, 257, 98]);
    assert_eq!(tokenizer.bytes(&[104, 257, 105, 4000], false), b"hi");
    assert_eq!(tokenizer.bytes(&[104, 257, 105, 4000], true), b"h[EOS]i");
    assert_eq!(Tiktoken::parse(&file(&[]), &SpecialNames::default()).unwrap().vocab_size(), 512);
}

#[test]
fn long_runs_are_cut() {
    let long = "a".repeat(RUN * 2 + 1);
    assert_eq!(pieces(&long).map(str::len).collect::<Vec<_>>(), [RUN, RUN, 1]);
    let text = "é ".repeat(CHUNK / 2) + "x";
    let cut: Vec<&str> = pieces(&text).collect();
    assert_eq!((cut.len(), cut[1], cut.concat() == text), (2, "x", true));
    assert_eq!(pieces("").count(), 0);
    let tokenizer = Tiktoken::parse(&file(&[]), &SpecialNames::default()).unwrap();
    assert_eq!(tokenizer.encode(&" ".repeat(30_000), false).len(), 30_000);
}

#[test]
fn errors_of_a_file_have_their_line() {
    let error = Tiktoken::parse(b"YQ== 0\nYQ==\n", &SpecialNames::default()).err().unwrap();
    assert!(error.contains("line 2"), "{error}");
}
