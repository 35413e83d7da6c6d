use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::*;

/// A file with the 256 bytes and then the given tokens.
fn file(more: &[&str]) -> Vec<u8> {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let more = more.iter().map(|text| text.as_bytes().to_vec());
    let lines = bytes.chain(more).enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token)));
    lines.collect::<String>().into_bytes()
}

/// The pieces are those of Python's `regex` (version 1 behaviour) for the published pattern. Each piece is a token of
/// its own that no merge leads to, so it comes out only where the text falls into exactly these pieces.
#[test]
fn text_falls_into_the_published_pieces() {
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
        let tokenizer = Tiktoken::parse(&file(&tokens), &BTreeMap::new()).unwrap();
        let expected: Vec<u32> = pieces
            .iter()
            .map(|piece| match piece.as_bytes() {
                [byte] => u32::from(*byte),
                _ => 256 + tokens.iter().position(|token| token == piece).unwrap() as u32,
            })
            .collect();
        let text = pieces.concat();
        assert_eq!(tokenizer.encode(&text), expected, "{text:?}");
        assert_eq!(tokenizer.bytes(&expected), text.as_bytes());
    }
}

#[test]
fn pairs_of_the_lowest_rank_merge_first() {
    let tokenizer = Tiktoken::parse(&file(&["bc", "ab", "abc"]), &BTreeMap::new()).unwrap();
    assert_eq!(tokenizer.encode("abc"), [258]);
    assert_eq!(tokenizer.encode("abcab"), [258, 257]);
    assert_eq!(tokenizer.encode("xabcd"), [120, 258, 100]);
}

#[test]
fn specials_follow_the_ranks() {
    let named = |content: &str| {
        let content = content.to_owned();
        AddedToken { content, special: true, single_word: false, lstrip: false, rstrip: false }
    };
    let added = BTreeMap::from([(256 + 5, named("<|tool|>")), (9999, named("elsewhere"))]);
    let tokenizer = Tiktoken::parse(&file(&[]), &added).unwrap();
    assert_eq!(tokenizer.vocab_size(), 512);
    for (name, id) in [("[BOS]", 256), ("[EOS]", 257), ("<|im_end|>", 258), ("<|im_middle|>", 273), ("<|tool|>", 261)] {
        assert_eq!(tokenizer.special(name), Some(id), "{name}");
    }
    assert_eq!(tokenizer.special("<|reserved_token_500|>"), Some(500));
    // In a text they are characters, and in a decoded text they are nothing.
    assert_eq!(tokenizer.encode("[EOS]"), "[EOS]".bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.bytes(&[104, 257, 105, 4000]), b"hi");
}

#[test]
fn long_runs_are_cut() {
    let long = "a".repeat(RUN * 2 + 1);
    assert_eq!(pieces(&long).map(str::len).collect::<Vec<_>>(), [RUN, RUN, 1]);
    let text = "é ".repeat(CHUNK / 2) + "x";
    let cut: Vec<&str> = pieces(&text).collect();
    assert_eq!((cut.len(), cut[1], cut.concat() == text), (2, "x", true));
    assert_eq!(pieces("").count(), 0);
    let tokenizer = Tiktoken::parse(&file(&[]), &BTreeMap::new()).unwrap();
    assert_eq!(tokenizer.encode(&" ".repeat(30_000)).len(), 30_000);
}

#[test]
fn broken_files_say_where() {
    let error = Tiktoken::parse(b"YQ== 0\nYQ==\n", &BTreeMap::new()).err().unwrap();
    assert!(error.contains("line 2"), "{error}");
}
