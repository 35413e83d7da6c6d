use std::path::Path;

use moonlight_infer::tokenizer::Tokenizer;

use super::*;
use crate::recipe::{Bos, BrokenRecords, DataConfig, DataFormat, LongRecords, TokenizerName};

const EOS: i32 = moonlight_infer::tokenizer::EOS as i32;

fn config(dir: &Path, glob: &str) -> DataConfig {
    DataConfig {
        train: vec![dir.join(glob).to_string_lossy().into_owned()],
        valid: Vec::new(),
        valid_fraction: 0.0,
        format: DataFormat::Text,
        chat_template: Default::default(),
        tokenizer: TokenizerName::Bytes,
        bos: Bos::Auto,
        sequence_length: 8,
        pack: true,
        shuffle: false,
        too_long: LongRecords::Error,
        broken: BrokenRecords::Error,
        max_bytes: 0,
        max_file_bytes: 0,
        max_tokens: 0,
        cache_dir: dir.join("cache"),
    }
}

fn open(config: &DataConfig) -> Result<Dataset, DataError> {
    Dataset::open(config, Some(&Tokenizer::open("bytes").unwrap()), 259, 3)
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

/// Records of different lengths: record `n` holds `n % 5 + 1` times the token `n`.
fn records(count: u32) -> String {
    let record = |n: u32| format!("{{\"tokens\": {:?}}}\n", vec![n; n as usize % 5 + 1]);
    (0..count).map(record).collect()
}

#[test]
fn packed_documents_are_concatenated_and_attend_to_themselves_only() {
    let dir = folder(&[("a.txt", "abc"), ("b.txt", "defgh"), ("c.txt", "ijklmno"), ("empty.txt", "")]);
    let dataset = open(&config(dir.path(), "*.txt")).unwrap();
    assert_eq!((dataset.train_tokens(), dataset.train_sequences()), (18, 3));
    let batch = dataset.train_stream(3).next_batch().unwrap();
    let text =
        |text: &str| text.bytes().map(|byte| if byte == b'$' { EOS } else { i32::from(byte) }).collect::<Vec<_>>();
    assert_eq!(batch.tokens, [text("abc$defg"), text("h$ijklmn"), text("o$"), vec![0; 6]].concat());
    let none = vec![0];
    assert_eq!(
        batch.targets,
        [text("bc$"), none.clone(), text("efgh"), text("$"), none.clone(), text("jklmno"), text("$"), vec![0; 7]]
            .concat()
    );
    let mask: Vec<f32> = batch.targets.iter().map(|&target| if target == 0 { 0.0 } else { 1.0 }).collect();
    assert_eq!(batch.loss_mask, mask);
    assert_eq!(
        batch.documents.clone().unwrap(),
        [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, -1, -1, -1, -1, -1, -1]].concat()
    );
    assert_eq!((batch.batch, batch.sequence, batch.predicted(), batch.token_count()), (3, 8, 15.0, 18));
}

#[test]
fn a_batch_of_one_long_document_has_no_document_numbers() {
    let dir = folder(&[("a.txt", "abcdefghijklmnopqrstuvw")]);
    let dataset = open(&config(dir.path(), "*.txt")).unwrap();
    let batch = dataset.train_stream(3).next_batch().unwrap();
    assert_eq!(batch.documents, None);
    assert_eq!(batch.predicted(), 23.0);
    assert_eq!(batch.targets[..23], batch.tokens[1..]);
}

#[test]
fn unpacked_records_keep_the_order_of_the_files_and_are_padded_on_the_right() {
    let dir = folder(&[("a.jsonl", "{\"tokens\": [1, 2, 3]}\n\n{\"tokens\": [4], \"id\": 7}\n{\"tokens\":[5,6]}")]);
    let mut config = config(dir.path(), "*.jsonl");
    config.format = DataFormat::Tokens;
    config.pack = false;
    let dataset = Dataset::open(&config, None, 10, 0).unwrap();
    let mut stream = dataset.train_stream(2);
    let first = stream.next_batch().unwrap();
    assert_eq!((first.batch, first.sequence), (2, 8));
    assert_eq!(first.tokens, [[1, 2, 3, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]].concat());
    assert_eq!(first.targets, [[2, 3, 0, 0, 0, 0, 0, 0], [0; 8]].concat());
    assert_eq!(first.loss_mask, [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0; 8]].concat());
    assert_eq!(first.documents.unwrap(), [[0, 0, 0, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1, -1, -1]].concat());
    let second = stream.next_batch().unwrap();
    assert_eq!([second.tokens[0], second.tokens[8]], [5, 1], "an epoch's end is filled up from the next");
    assert_eq!((stream.position().epoch, stream.position().sequence), (1, 1));
}

#[test]
fn wide_rows_are_padded_to_the_longest_of_the_batch() {
    let record = |length: usize| format!("{{\"tokens\": {:?}}}\n", vec![1; length]);
    let dir = folder(&[("a.jsonl", &[record(3), record(60), record(65), record(130)].concat())]);
    let mut config = config(dir.path(), "*.jsonl");
    (config.format, config.pack, config.sequence_length) = (DataFormat::Tokens, false, 150);
    let mut stream = Dataset::open(&config, None, 10, 0).unwrap().train_stream(1);
    let widths: Vec<usize> = (0..4).map(|_| stream.next_batch().unwrap().sequence).collect();
    assert_eq!(widths, [64, 64, 128, 150]);
}

#[test]
fn a_broken_record_is_an_error_with_file_and_line() {
    let fault = |text: &str| {
        let dir = folder(&[("a.jsonl", text)]);
        let mut config = config(dir.path(), "*.jsonl");
        (config.format, config.pack) = (DataFormat::Tokens, false);
        let error = Dataset::open(&config, None, 10, 0).err().unwrap();
        let message = error.to_string();
        message.strip_prefix(&format!("{}/a.jsonl:", dir.path().display())).unwrap_or(&message).to_owned()
    };
    assert_eq!(
        fault("{\"tokens\": [1]}\n\n{\"tokens\": [1,"),
        "3:14: the record is not JSON: EOF while parsing a value"
    );
    assert_eq!(fault("{\"tokens\": [1, -1]}"), "1:17: invalid value: integer `-1`, expected u32");
    assert_eq!(fault("{\"text\": \"x\"}"), "1: missing field `tokens`");
    assert_eq!(fault("{\"tokens\": []}"), "1: the record has no tokens");
    assert_eq!(fault("{\"tokens\": [1]}\n{\"tokens\": [10]}"), "2: token 10 is outside the model's vocabulary of 10");
    assert_eq!(
        fault("{\"tokens\": [1, 2]}\n{\"tokens\": [1,1,1,1,1,1,1,1,1]}"),
        "2: the record has 9 tokens, but `data.sequence_length` is 8"
    );
    assert!(fault("").starts_with("the files of `data.train` contain nothing to learn from"));
    assert!(fault("{\"tokens\": [1]}").starts_with("the files of `data.train` contain nothing to learn from"));
}

#[test]
fn a_long_record_can_be_truncated() {
    let dir = folder(&[("a.jsonl", "{\"tokens\": [1,2,3,4,5,6,7,8,9]}")]);
    let mut config = config(dir.path(), "*.jsonl");
    (config.format, config.pack, config.too_long) = (DataFormat::Tokens, false, LongRecords::Truncate);
    let batch = Dataset::open(&config, None, 10, 0).unwrap().train_stream(1).next_batch().unwrap();
    assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(batch.predicted(), 7.0);
}

#[test]
fn a_stream_that_seeks_equals_one_that_never_stopped() {
    let dir = folder(&[("a.jsonl", &records(50))]);
    for (pack, shuffle) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut config = config(dir.path(), "*.jsonl");
        (config.format, config.pack, config.shuffle) = (DataFormat::Tokens, pack, shuffle);
        let dataset = Dataset::open(&config, None, 100, 9).unwrap();
        let mut whole = dataset.train_stream(4);
        let mut seen = Vec::new();
        for _ in 0..40 {
            seen.push((whole.position(), whole.next_batch().unwrap()));
        }
        assert!(whole.position().epoch > 1);
        // A new process opens the dataset again, here from the cache, and reads the position from JSON.
        let again = Dataset::open(&config, None, 100, 9).unwrap();
        for at in [0, 1, 7, 23, 39] {
            let mut stream = again.train_stream(4);
            let position = serde_json::to_string(&seen[at].0).unwrap();
            stream.seek(serde_json::from_str(&position).unwrap()).unwrap();
            for (position, batch) in &seen[at..] {
                assert_eq!(stream.position(), *position);
                assert_eq!(stream.next_batch().unwrap(), *batch);
            }
        }
    }
}

#[test]
fn a_position_in_other_data_is_refused() {
    let dir = folder(&[("a.jsonl", &records(50))]);
    let mut config = config(dir.path(), "*.jsonl");
    (config.format, config.shuffle) = (DataFormat::Tokens, true);
    let position = Dataset::open(&config, None, 100, 9).unwrap().train_stream(4).position();
    let refused = |config: &DataConfig, seed| {
        let mut stream = Dataset::open(config, None, 100, seed).unwrap().train_stream(4);
        stream.seek(position) == Err(DataError::Changed)
    };
    assert!(!refused(&config, 9));
    assert!(refused(&config, 10));
    assert!(refused(&DataConfig { sequence_length: 16, ..config.clone() }, 9));
    // The same tokens in another folder and at another time are the same data.
    std::fs::rename(dir.path().join("a.jsonl"), dir.path().join("b.jsonl")).unwrap();
    assert!(!refused(&config, 9));
    std::fs::write(dir.path().join("b.jsonl"), records(49)).unwrap();
    assert!(refused(&config, 9));
}

#[test]
fn an_epoch_has_every_sequence_once_and_its_own_order() {
    let dir = folder(&[("a.jsonl", &records(60))]);
    let mut config = config(dir.path(), "*.jsonl");
    (config.format, config.pack, config.shuffle) = (DataFormat::Tokens, false, true);
    let mut stream = Dataset::open(&config, None, 100, 1).unwrap().train_stream(1);
    let mut epoch = || (0..60).map(|_| stream.next_batch().unwrap().tokens[0]).collect::<Vec<_>>();
    let (first, second) = (epoch(), epoch());
    assert_ne!(first, second);
    for mut order in [first, second] {
        assert_ne!(order, (0..60).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..60).collect::<Vec<_>>());
    }
}

#[test]
fn tokens_are_kept_for_the_next_run_and_written_again_when_files_change() {
    let dir = folder(&[("a.txt", "abc"), ("b.txt", "def")]);
    let config = config(dir.path(), "*.txt");
    open(&config).unwrap();
    let cached = |dir: &Path| -> Vec<_> {
        std::fs::read_dir(dir.join("cache")).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let [path] = cached(dir.path()).try_into().unwrap();
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    open(&config).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), written);
    // Half a cache, such as a full disk or a crash of an older program could leave, is written again.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(open(&config).unwrap().train_tokens(), 8);
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    std::fs::write(dir.path().join("a.txt"), "abcd").unwrap();
    assert_eq!(open(&config).unwrap().train_tokens(), 9);
    assert_eq!(cached(dir.path()).len(), 2);
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error() {
    let dir = folder(&[("a.txt", "abc"), ("file", "")]);
    let mut config = config(dir.path(), "*.txt");
    config.cache_dir = dir.path().join("file/cache");
    let error = open(&config).err().unwrap().to_string();
    assert!(
        error.starts_with(&format!("cannot read `{}", config.cache_dir.display())) || error.starts_with("cannot write"),
        "{error}"
    );
}

#[test]
fn validation_data_are_files_or_a_share_of_the_training_data() {
    let files: Vec<(String, String)> = (0..20).map(|n| (format!("{n:02}.txt"), "x".repeat(9))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let dir = folder(&files);
    let mut config = config(dir.path(), "*.txt");
    let dataset = open(&config).unwrap();
    assert!(!dataset.has_valid() && dataset.valid_batches(4).next().is_none() && dataset.bigram().is_none());
    config.valid = vec![dir.path().join("0*.txt").to_string_lossy().into_owned()];
    let dataset = open(&config).unwrap();
    assert_eq!((dataset.train_tokens(), dataset.valid_tokens()), (100, 100));
    let batches: Vec<HostBatch> = dataset.valid_batches(4).map(|batch| batch.unwrap()).collect();
    assert_eq!(batches.iter().map(|batch| batch.batch).collect::<Vec<_>>(), [4, 4, 4, 1]);
    assert_eq!(batches.iter().map(HostBatch::predicted).sum::<f64>(), 90.0);
    assert!(dataset.bigram().unwrap() < 0.5);
    (config.valid, config.valid_fraction) = (Vec::new(), 0.12);
    let dataset = open(&config).unwrap();
    assert_eq!((dataset.train_tokens(), dataset.valid_tokens()), (170, 30));
}

#[test]
fn the_end_of_a_single_text_is_used_for_validation() {
    let dir = folder(&[("a.txt", "abcdefghijklmnopqrs")]);
    let mut config = config(dir.path(), "*.txt");
    config.valid_fraction = 0.25;
    let dataset = open(&config).unwrap();
    assert_eq!((dataset.train_tokens(), dataset.valid_tokens()), (15, 5));
    let batch = dataset.valid_batches(1).next().unwrap().unwrap();
    assert_eq!(batch.tokens[..5], [112, 113, 114, 115, EOS]);
    let two = open(&DataConfig { valid_fraction: 0.99, ..config });
    assert!(matches!(two, Err(DataError::Nothing { key: "train", .. })));
}

#[test]
fn limits_on_bytes_and_tokens_are_kept() {
    let dir = folder(&[("a.txt", "aaaaé"), ("b.txt", "bbbbbbbbbbbbbbbb"), ("c.txt", "cc")]);
    let with = |change: fn(&mut DataConfig)| {
        let mut config = config(dir.path(), "*.txt");
        change(&mut config);
        open(&config).unwrap().train_tokens()
    };
    assert_eq!(with(|_| {}), 27);
    assert_eq!(with(|config| config.max_file_bytes = 10), 10);
    assert_eq!(with(|config| config.max_tokens = 8), 24);
    let mut one = config(dir.path(), "a.txt");
    one.max_bytes = 5; // ends in the middle of the é
    assert_eq!(open(&one).unwrap().train_tokens(), 4);
    let lines = folder(&[("a.jsonl", "{\"tokens\":[1,2]}\n{\"tokens\":[3,4]}\n")]);
    let mut some = config(lines.path(), "*.jsonl");
    (some.format, some.max_bytes) = (DataFormat::Tokens, 20);
    assert_eq!(Dataset::open(&some, None, 10, 0).unwrap().train_tokens(), 2);
}

#[test]
fn bytes_that_are_not_text_are_reported() {
    let dir = folder(&[("a.txt", "fine")]);
    std::fs::write(dir.path().join("b.txt"), [b'a', 0xff, b'b']).unwrap();
    for _ in 0..2 {
        let dataset = open(&config(dir.path(), "*.txt")).unwrap();
        assert_eq!(
            dataset.notes(),
            ["data.train: bytes that are not UTF-8 were read as U+FFFD; files with such bytes: 1"]
        );
    }
}

/// A text of several blocks and several groups of blocks has the same tokens as when it is tokenized at once.
#[test]
fn large_files_are_read_in_blocks() {
    let line = "let answer = 42; // 月光, é\n\n";
    let text = line.repeat((9 << 20) / line.len());
    let dir = folder(&[("a.txt", &text), ("b.txt", "b")]);
    let mut config = config(dir.path(), "*.txt");
    config.sequence_length = text.len() + 1;
    let dataset = open(&config).unwrap();
    assert_eq!(dataset.train_tokens(), text.len() as u64 + 3);
    let batch = dataset.train_stream(1).next_batch().unwrap();
    assert!(batch.tokens[..text.len()].iter().copied().eq(text.bytes().map(i32::from)));
    assert_eq!((batch.tokens[text.len()], &batch.documents), (EOS, &None));
}

#[test]
fn text_needs_a_tokenizer() {
    let dir = folder(&[("a.txt", "abc")]);
    let error = Dataset::open(&config(dir.path(), "*.txt"), None, 259, 0).err().unwrap();
    assert_eq!(error, DataError::NoTokenizer);
}

/// The config for conversations in `dir`, with a template that adds no system message.
fn chat_config(dir: &Path, glob: &str) -> DataConfig {
    std::fs::write(
        dir.join("template.jinja"),
        "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt \
         %}<|im_user|>{% endif %}",
    )
    .unwrap();
    DataConfig {
        format: DataFormat::Chat,
        tokenizer: TokenizerName::BytesChat,
        chat_template: dir.join("template.jinja"),
        sequence_length: 16,
        ..config(dir, glob)
    }
}

fn open_chat(config: &DataConfig) -> Result<Dataset, DataError> {
    Dataset::open(config, Some(&Tokenizer::bytes_chat()), 259, 3)
}

fn talk(question: &str, answer: &str) -> String {
    serde_json::json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        .to_string()
        + "\n"
}

/// The tokens of `_` for `<|im_user|>` and `.` for `<|im_end|>`.
fn chat_text(text: &str) -> Vec<i32> {
    let token = |byte| match byte {
        b'_' => 0xF6,
        b'.' => 0xF5,
        byte => i32::from(byte),
    };
    text.bytes().map(token).collect()
}

#[test]
fn only_the_assistants_messages_are_learned_by_their_weights() {
    let weighted = r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0},
        {"from": "human", "value": "c"}, {"from": "gpt", "value": "de", "weight": 0.5}]}"#
        .replace('\n', " ");
    let alpaca = r#"{"instruction": "f", "output": "g"}"#;
    let dir = folder(&[("a.jsonl", &format!("{weighted}\n{alpaca}\n"))]);
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.pack = false;
    for _ in 0..2 {
        // First tokenized, then from the cache.
        let dataset = open_chat(&config).unwrap();
        let batch = dataset.train_stream(2).next_batch().unwrap();
        assert_eq!(batch.tokens, [chat_text("_a._b._c._de."), vec![0; 3], chat_text("_f._g."), vec![0; 10]].concat());
        let mut mask = vec![0.0; 32];
        mask[9..12].fill(0.5); // d, e and the end
        mask[16 + 3..16 + 5].fill(1.0); // g and the end
        assert_eq!(batch.loss_mask, mask);
        assert_eq!(batch.predicted(), 3.5);
        assert_eq!(
            dataset.notes()[1..],
            [
                "data.train: conversations: 1 with `conversations` (ShareGPT), 1 with `instruction` (Alpaca)"
                    .to_owned(),
                "data.train: 5 of 19 tokens are learned (26.3 %)".into(),
            ]
        );
        assert_eq!(dataset.template().unwrap().name, "chat_template.jinja");
    }
}

#[test]
fn conversations_are_packed_without_cutting_any() {
    let lines: Vec<String> =
        (0..200u32).map(|n| talk(&"q".repeat(1 + n as usize % 3), &"a".repeat(1 + n as usize % 7))).collect();
    let dir = folder(&[("a.jsonl", &lines.concat())]);
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.shuffle = true;
    let dataset = open_chat(&config).unwrap();
    let mut stream = dataset.train_stream(1);
    let mut epoch = || {
        let mut documents = Vec::new();
        let mut rows = Vec::new();
        for _ in 0..dataset.train_sequences() {
            let batch = stream.next_batch().unwrap();
            let numbers = batch.documents.clone().unwrap_or(vec![0; 16]);
            for document in 0..=*numbers.iter().max().unwrap() {
                let of_document = (0..16).filter(|&at| numbers[at] == document);
                documents.push(of_document.map(|at| batch.tokens[at]).collect::<Vec<i32>>());
            }
            rows.push(batch.tokens);
        }
        documents.sort();
        (documents, rows)
    };
    let (first, rows) = epoch();
    let (second, other_rows) = epoch();
    let mut whole: Vec<Vec<i32>> = (0..200)
        .map(|n: usize| chat_text(&format!("_{}._{}.", "q".repeat(1 + n % 3), "a".repeat(1 + n % 7))))
        .collect();
    whole.sort();
    assert!(first == whole && second == whole, "each epoch has every conversation once, uncut");
    assert_ne!(rows, other_rows, "each epoch has its own order");
    assert!(dataset.notes().iter().any(|note| note.contains("% full")), "{:?}", dataset.notes());
    // A stream of packed sequences resumes from any position.
    let mut whole = dataset.train_stream(3);
    for _ in 0..50 {
        let position = whole.position();
        let mut other = dataset.train_stream(3);
        other.seek(position).unwrap();
        assert_eq!(other.next_batch().unwrap(), whole.next_batch().unwrap());
    }
}

#[test]
fn prefetched_batches_are_those_of_the_stream() {
    let dir = folder(&[("a.txt", &(0..90).map(|n| format!("text number {n}\n\n")).collect::<String>())]);
    let mut config = config(dir.path(), "*.txt");
    config.shuffle = true;
    let dataset = open(&config).unwrap();
    let want = |batches| BatchRequest { sequences: 3 * batches, share: 0..3 * batches, batches };
    let (mut plain, mut prefetcher) = (dataset.train_stream(3), Prefetcher::new(dataset.train_stream(3)));
    // Over several epochs. Two of the requests differ from the announced ones.
    for (passes, announced) in
        [(1, Some(1)), (1, Some(2)), (1, Some(2)), (2, None), (2, Some(1)), (2, Some(30)), (30, None)]
    {
        let expected: Vec<_> = (0..passes).map(|_| plain.next_batch().unwrap()).collect();
        assert_eq!(prefetcher.next(&want(passes), announced.map(want)).unwrap(), expected);
        assert_eq!(prefetcher.position(), plain.position());
    }
}

#[test]
fn broken_conversations_are_an_error_or_left_out() {
    let bad = [
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Q\"}]}\n",
        "{\"messages\": [{\"role\": \"robot\", \"content\": \"Q\"}]}\n",
        "{\"messages\": [\n",
        "{\"text\": \"x\"}\n",
        "{\"messages\": [{\"role\": \"assistant\"}]}\n",
    ];
    for (line, expected) in bad.iter().zip([
        "2: the conversation has no assistant message",
        "2: `messages[0]` has the unknown role `robot`",
        "2:14: the record is not JSON: EOF while parsing a list",
        "2: the record is not a conversation: it has `text`",
        "2: `messages[0]` has no content",
    ]) {
        let dir = folder(&[("a.jsonl", &format!("{}{line}", talk("q", "a")))]);
        let message = open_chat(&chat_config(dir.path(), "*.jsonl")).err().unwrap().to_string();
        assert!(message.ends_with(&format!("a.jsonl:{expected}")), "{message}");
    }
    let dir = folder(&[("a.jsonl", &[&talk("q", "a"), &bad.concat(), bad[0], bad[1], &talk("r", "b")].concat())]);
    let mut bytes = std::fs::read(dir.path().join("a.jsonl")).unwrap();
    bytes.extend(b"{\"messages\": \"\xff\"}\n");
    std::fs::write(dir.path().join("a.jsonl"), bytes).unwrap();
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.broken = BrokenRecords::Skip;
    for _ in 0..2 {
        let dataset = open_chat(&config).unwrap();
        assert_eq!(dataset.train_tokens(), 12);
        let note = &dataset.notes()[2];
        assert!(note.starts_with("data.train: 8 records were broken and left out: "), "{note}");
        assert!(note.contains("a.jsonl:2 (the conversation has no assistant message), "), "{note}");
        assert!(note.ends_with("a.jsonl:6 (`messages[0]` has no content), and 3 more"), "{note}");
    }
    // A token outside the vocabulary is an error even with `broken = "skip"`: every record would have it.
    let error = Dataset::open(&config, Some(&Tokenizer::bytes_chat()), 100, 0).err().unwrap().to_string();
    assert!(error.contains("token 246 is outside the model's vocabulary of 100"), "{error}");
}

#[test]
fn conversations_that_are_too_long() {
    let lines = [talk("q", "a"), talk("q", &"long".repeat(5)), talk(&"long".repeat(5), "a"), talk("r", "b")].concat();
    let dir = folder(&[("a.jsonl", &lines)]);
    let config = chat_config(dir.path(), "*.jsonl");
    let with = |too_long| open_chat(&DataConfig { too_long, ..config.clone() });
    let error = with(LongRecords::Error).err().unwrap();
    assert!(
        error.to_string().ends_with("a.jsonl:2: the record has 25 tokens, but `data.sequence_length` is 16"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("data.too_long"));
    let note = |dataset: &Dataset, what: &str| {
        let note = dataset.notes().iter().find(|note| note.contains(what));
        note.unwrap_or_else(|| panic!("{:?}", dataset.notes())).replace(&format!("{}/", dir.path().display()), "")
    };
    let skipped = with(LongRecords::Skip).unwrap();
    assert_eq!(
        note(&skipped, "left out"),
        "data.train: 2 records were longer than 16 tokens and left out: a.jsonl:2 (25 tokens), a.jsonl:3 (25 tokens)"
    );
    assert_eq!(skipped.train_tokens(), 12);
    let cut = with(LongRecords::Truncate).unwrap();
    assert!(
        note(&cut, "truncated").ends_with("1 record was longer than 16 tokens and truncated: a.jsonl:2 (25 tokens)")
    );
    assert!(note(&cut, "nothing in the first 16 tokens is learned").ends_with("a.jsonl:3 (25 tokens)"));
    assert_eq!(cut.train_tokens(), 12 + 16);
}

#[test]
fn conversations_need_a_template() {
    let dir = folder(&[("a.jsonl", &talk("q", "a"))]);
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.chat_template = Default::default();
    let error = open(&config).err().unwrap();
    assert_eq!(error.to_string(), "`bytes` has no chat template");
    assert!(error.hint().unwrap().contains("bytes-chat"));
    config.sequence_length = 200;
    let dataset = open_chat(&config).unwrap();
    assert!(dataset.template().is_none(), "it comes with the tokenizer");
    config.chat_template = dir.path().join("nowhere.jinja");
    let error = open_chat(&config).err().unwrap().to_string();
    assert!(error.contains("nowhere.jinja"), "{error}");
}

#[test]
fn compressed_files_give_the_same_data() {
    use std::io::Write;
    let lines: String = (0..30).map(|n| talk(&format!("q{n}"), "a")).collect();
    let dir = folder(&[("a.jsonl", &lines)]);
    let mut gzip = flate2::write::GzEncoder::new(
        std::fs::File::create(dir.path().join("a.jsonl.gz")).unwrap(),
        flate2::Compression::fast(),
    );
    gzip.write_all(lines.as_bytes()).unwrap();
    gzip.finish().unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(lines.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
    std::fs::write(dir.path().join("a.jsonl.zst"), zstd).unwrap();
    std::fs::write(dir.path().join("b.txt"), "some words").unwrap();
    let mut gzip = flate2::write::GzEncoder::new(
        std::fs::File::create(dir.path().join("b.txt.gz")).unwrap(),
        flate2::Compression::fast(),
    );
    gzip.write_all(b"some words").unwrap();
    gzip.finish().unwrap();
    let batch = |config: &DataConfig| open_chat(config).unwrap().train_stream(4).next_batch().unwrap();
    let plain = batch(&chat_config(dir.path(), "a.jsonl"));
    for name in ["a.jsonl.gz", "a.jsonl.zst"] {
        assert_eq!(batch(&chat_config(dir.path(), name)), plain);
    }
    assert_eq!(batch(&config(dir.path(), "b.txt")), batch(&config(dir.path(), "b.txt.gz")));
    std::fs::write(dir.path().join("a.jsonl.gz"), &std::fs::read(dir.path().join("a.jsonl.gz")).unwrap()[..40])
        .unwrap();
    let error = open_chat(&chat_config(dir.path(), "a.jsonl.gz")).err().unwrap().to_string();
    assert!(error.starts_with("cannot read `") && error.contains("a.jsonl.gz"), "{error}");
}

#[test]
fn inspect_counts_documents_tokens_and_sequences() {
    let lines: String = (0..40).map(|n| talk("q", &"a".repeat(1 + n % 9))).collect();
    let dir = folder(&[("a.jsonl", &lines)]);
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.valid_fraction = 0.2;
    let inspection = open_chat(&config).unwrap().inspect(3).unwrap();
    let SplitStats { documents, tokens, learned, lengths, histogram, fill, .. } = inspection.train.clone();
    assert_eq!(documents + inspection.valid.unwrap().documents, 40);
    assert_eq!(lengths, [6, 10, 14]);
    assert_eq!(histogram.iter().map(|(_, count)| *count as usize).sum::<usize>(), documents);
    assert_eq!(histogram.iter().map(|(bound, _)| *bound).collect::<Vec<_>>(), [8, 16]);
    // Four tokens of each conversation are not learned.
    assert_eq!(learned, tokens - 4 * documents as u64);
    assert!(fill.unwrap() > 0.5);
    assert_eq!(inspection.samples.len(), 3);
    for sample in &inspection.samples {
        let number = sample.line as usize - 1;
        let text = chat_text(&format!("_q._{}.", "a".repeat(1 + number % 9)));
        assert!(sample.tokens.iter().map(|&(token, _)| token as i32).eq(text));
        assert!(sample.tokens.iter().skip(4).all(|&(_, weight)| weight == 1.0));
    }
}

/// The file in the cache folder.
fn cache_file(config: &DataConfig) -> std::path::PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(&config.cache_dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

/// The log of this thread while `run` runs, without debug messages.
fn logged<T>(run: impl FnOnce() -> T) -> (T, String) {
    let buffer = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    struct Buffer(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let writer = buffer.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || Buffer(writer.clone())).finish();
    let result = tracing::subscriber::with_default(subscriber, run);
    let text = String::from_utf8(buffer.lock().unwrap().clone()).unwrap();
    (result, text)
}

#[test]
fn a_damaged_cache_is_a_warning_and_written_again() {
    let dir = folder(&[("a.txt", "some words to learn from, and some more of them")]);
    let config = config(dir.path(), "*.txt");
    let batch = |dataset: Dataset| dataset.train_stream(3).next_batch().unwrap();
    let whole = batch(open(&config).unwrap());
    let path = cache_file(&config);
    let bytes = std::fs::read(&path).unwrap();
    let zeros = [vec![0; 32], bytes[32..].to_vec()].concat();
    for damaged in [&zeros, &bytes[..bytes.len() / 2], &[][..]] {
        std::fs::write(&path, damaged).unwrap();
        let (dataset, log) = logged(|| open(&config).unwrap());
        assert_eq!(batch(dataset), whole);
        assert!(log.contains("is damaged and is written again") && log.contains(&*path.to_string_lossy()), "{log}");
        assert_eq!(std::fs::read(cache_file(&config)).unwrap(), bytes);
    }
    let (_, log) = logged(|| open(&config).unwrap());
    assert_eq!(log, "");
}

#[test]
fn a_cache_that_is_cut_while_it_is_read_is_an_error() {
    let dir = folder(&[("a.txt", &"some words ".repeat(500)), ("b.txt", "more")]);
    let mut config = config(dir.path(), "*.txt");
    config.valid_fraction = 0.1;
    let dataset = open(&config).unwrap();
    let mut stream = dataset.train_stream(4);
    stream.next_batch().unwrap();
    let path = cache_file(&config);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
    assert_eq!(stream.next_batch().unwrap_err(), DataError::CacheChanged { path });
    assert!(dataset.valid_batches(1).next().unwrap().is_err());
    assert!(dataset.inspect(1).is_err());
    let (bigram, log) = logged(|| dataset.bigram());
    assert!(bigram.is_none() && log.contains("was changed by another program"), "{log}");
}

#[test]
fn a_step_of_too_many_tokens_is_an_error() {
    let dir = folder(&[("a.txt", "some words")]);
    let mut stream = open(&config(dir.path(), "*.txt")).unwrap().train_stream(1);
    for sequences in [usize::MAX, 1 << 40] {
        let error = stream.next_share(sequences, 0..sequences, 1).unwrap_err();
        assert_eq!(error, DataError::StepTooLarge { sequences, length: 8 });
    }
    stream.next_batch().unwrap();
}

#[cfg(unix)]
#[test]
fn a_file_in_both_splits_is_used_for_validation_whatever_its_path() {
    let dir = folder(&[("1.txt", "aaaa"), ("2.txt", "bbbbbb"), ("3.txt", "cccccccc")]);
    std::fs::create_dir(dir.path().join("other")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("3.txt"), dir.path().join("other/link")).unwrap();
    std::fs::hard_link(dir.path().join("3.txt"), dir.path().join("other/hard")).unwrap();
    std::os::unix::fs::symlink("..", dir.path().join("other/up")).unwrap();
    for valid in ["3.txt", "./other/../3.txt", "other/link", "other/hard", "other/up/3.txt"] {
        let mut config = config(dir.path(), "[0-9].txt");
        config.valid = vec![dir.path().join(valid).to_string_lossy().into_owned()];
        let dataset = open(&config).unwrap();
        assert_eq!((dataset.train_tokens(), dataset.valid_tokens()), (5 + 7, 9), "{valid}");
    }
    // A loop of links is walked once.
    assert_eq!(open(&config(dir.path(), "**/[0-9].txt")).unwrap().train_tokens(), 5 + 7 + 9);
}

#[cfg(target_os = "linux")]
#[test]
fn a_name_that_is_not_utf_8_is_read() {
    use std::os::unix::ffi::OsStrExt;
    let dir = folder(&[("1.txt", "aaaa")]);
    std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"n\xff.txt")), "bbbbbb").unwrap();
    assert_eq!(open(&config(dir.path(), "*.txt")).unwrap().train_tokens(), 5 + 7);
}

/// A line longer than any record, in files that need little space: sparse and compressed.
#[test]
fn a_record_has_a_maximum_size() {
    let dir = folder(&[("first", "")]);
    let length = (256 << 20) + 100;
    let first = b"{\"tokens\": [1, 2]}\n";
    let sparse = dir.path().join("a.jsonl");
    std::fs::write(&sparse, first).unwrap();
    std::fs::File::options().write(true).open(&sparse).unwrap().set_len(length).unwrap();
    let gzip = dir.path().join("b.jsonl.gz");
    let mut writer = flate2::write::GzEncoder::new(std::fs::File::create(&gzip).unwrap(), flate2::Compression::fast());
    std::io::Write::write_all(&mut writer, first).unwrap();
    let blanks = vec![b' '; 1 << 20];
    (0..257).for_each(|_| std::io::Write::write_all(&mut writer, &blanks).unwrap());
    writer.finish().unwrap();
    for name in ["a.jsonl", "b.jsonl.gz"] {
        let mut config = config(dir.path(), name);
        config.format = DataFormat::Tokens;
        for broken in [BrokenRecords::Error, BrokenRecords::Skip] {
            config.broken = broken;
            let error = Dataset::open(&config, None, 10, 0).err().unwrap();
            assert!(error.to_string().ends_with(&format!("{name}:2: the record is longer than 256 MiB")), "{error}");
            assert!(error.hint().unwrap().contains("JSONL"));
        }
        // Beyond `max_bytes` nothing is read, so the line is no error.
        config.max_bytes = 1000;
        assert_eq!(Dataset::open(&config, None, 10, 0).unwrap().train_tokens(), 2, "{name}");
    }
}

/// The documents of a file with `format = "text"`, with `$` for the end of each, and the notes.
fn documents_of(name: &str, text: &[u8], change: fn(&mut DataConfig)) -> Result<(String, Vec<String>), DataError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(name), text).unwrap();
    let mut config = config(dir.path(), name);
    config.sequence_length = 1000;
    change(&mut config);
    let dataset = open(&config)?;
    let tokens = dataset.train_stream(1).next_batch()?.tokens;
    let bytes = tokens[..dataset.train_tokens() as usize].iter();
    let bytes = bytes.map(|&token| if token == EOS { b'$' } else { token as u8 }).collect();
    let shown = |note: &String| note.replace(&format!("{}/", dir.path().display()), "");
    Ok((String::from_utf8(bytes).unwrap(), dataset.notes().iter().map(shown).collect()))
}

#[test]
fn records_of_text_are_documents() {
    let lines = "{\"text\": \"one\", \"id\": NaN}\n\n{\"id\": 7, \"text\": \"two\\nthree\"}\n";
    let array = "[{\"text\": \"one\", \"id\": NaN},\n{\"id\": 7, \"text\": \"two\\nthree\"}]";
    let csv = "\u{feff}id,text\r\n,one\r\n7,\"two\nthree\"\r\n";
    for (name, text, kind, ids) in [
        ("a.jsonl", lines, "JSON Lines", 2),
        ("a.ndjson", lines, "JSON Lines", 2),
        ("a.json", lines, "JSON Lines", 2),
        ("a.json", array, "JSON array", 2),
        ("a.jsonl", array, "JSON array", 2),
        ("a.csv", csv, "CSV", 1),
    ] {
        let (documents, notes) = documents_of(name, text.as_bytes(), |_| {}).unwrap();
        assert_eq!(documents, "one$two\nthree$", "{name}");
        assert_eq!(
            notes,
            [
                format!("data.train: files by kind: 1 {kind} (a document in each `text`)"),
                format!("data.train: ignored fields (number of records): `id` ({ids})"),
            ]
        );
    }
    // Datasets of source code have `content`; a record with an empty text is no document.
    let code = b"{\"content\": \"a\"}\n{\"content\": null}\n{\"content\": \"b\"}\n{\"content\": \"\"}\n";
    let (documents, notes) = documents_of("a.jsonl", code, |_| {}).unwrap();
    assert_eq!(documents, "a$b$");
    assert_eq!(notes[1], "data.train: 2 records were empty and left out: a.jsonl:2, a.jsonl:4");
    let cut = b"{\"text\": \"a \\ud83d b\"}\n";
    let (documents, notes) = documents_of("a.jsonl", cut, |_| {}).unwrap();
    assert_eq!(documents, "a \u{fffd} b$");
    assert_eq!(notes[1], "data.train: 1 record was read with U+FFFD in place of half a surrogate pair: a.jsonl:1");
    let broken = b"{\"text\": \"a\"}\n{\"text\": 3}\n{\"text\": NaN}\n{\"txt\": \"b\"}\n{\n";
    let error = documents_of("a.jsonl", broken, |_| {}).unwrap_err();
    assert!(error.to_string().ends_with("a.jsonl:2: `text` is not a text"), "{error}");
    let (documents, notes) = documents_of("a.jsonl", broken, |config| config.broken = BrokenRecords::Skip).unwrap();
    assert_eq!(documents, "a$");
    assert_eq!(
        notes[1],
        "data.train: 4 records were broken and left out: a.jsonl:2 (`text` is not a text), a.jsonl:3 (`text` is not a \
         text), a.jsonl:4 (the record has no `text`), a.jsonl:5:1 (the record is not JSON: EOF while parsing an object)"
    );
}

#[test]
fn plain_text_is_one_document_even_if_it_looks_like_records() {
    let usual: &[String] = &[];
    for (name, text) in [
        ("a.txt", "some words"),
        ("a.py", "print([1])"),
        ("a.html", "<!doctype html>\n<p>Hi</p>"),
        ("a.txt", "[1] a note"),
        ("a", "{\n  not JSON"),
    ] {
        assert_eq!(
            documents_of(name, text.as_bytes(), |_| {}).unwrap(),
            (format!("{text}$"), usual.to_vec()),
            "{name}"
        );
    }
    let note = |kind: &str| vec![format!("data.train: files by kind: 1 {kind}")];
    for (name, text, kind) in [
        ("a.json", "{\n  \"name\": \"package\"\n}", "JSON as plain text"),
        ("a.json", "{\n  \"text\": \"package\"\n}", "JSON as plain text"),
        ("a.json", "[\"text\"]", "JSON as plain text"),
        ("a.csv", "a,b\n1,2", "CSV as plain text"),
        ("a.txt", "{\"text\": \"a\"}\n", "plain text that looks like JSON Lines (expected extension: .jsonl)"),
    ] {
        assert_eq!(documents_of(name, text.as_bytes(), |_| {}).unwrap(), (format!("{text}$"), note(kind)), "{name}");
    }
    assert_eq!(documents_of("a.txt", b"\xef\xbb\xbfwords", |_| {}).unwrap().0, "words$");
    assert_eq!(documents_of("a.txt", b"\xef\xbb\xbfwords", |config| config.max_bytes = 5).unwrap().0, "wo");
}

#[test]
fn a_file_without_texts_is_an_error_that_names_what_it_contains() {
    let lines = |value: serde_json::Value| format!("{value}\n").into_bytes();
    for (name, text, expected, hint) in [
        (
            "a.jsonl",
            lines(serde_json::json!({"messages": [], "id": 1})),
            "its records have neither `text` nor `content`; the first has `messages`, `id`",
            "data.format = \"chat\"",
        ),
        ("a.jsonl", lines(serde_json::json!({"tokens": [1]})), "the first has `tokens`", "data.format = \"tokens\""),
        ("a.jsonl", lines(serde_json::json!({"article": "x"})), "the first has `article`", "rename the field"),
        (
            "a.jsonl",
            lines(serde_json::json!({"text": ["a"]})),
            "`text` of its first record is a list, not a text",
            "{\"text\":",
        ),
        (
            "a.jsonl",
            lines(serde_json::json!({"content": 5})),
            "`content` of its first record is a number, not",
            "{\"text\":",
        ),
        ("a.jsonl", lines(serde_json::json!({"": 5})), "the first has a field without a name", "rename the field"),
        ("a.txt", b"PK\x03\x04".to_vec(), "it is a zip archive", "unpack"),
        ("a.txt", b"\xff\xfea\0b\0".to_vec(), "it is UTF-16 text", "UTF-8"),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid".to_vec(),
            "it is a git-lfs pointer",
            "git lfs pull",
        ),
        ("a.txt", b"%PDF-1.7".to_vec(), "it is a PDF document", "glob"),
    ] {
        for broken in [|_: &mut DataConfig| {}, |config: &mut DataConfig| config.broken = BrokenRecords::Skip] {
            let error = documents_of(name, &text, broken).unwrap_err();
            assert!(error.to_string().starts_with("cannot read `") && error.to_string().contains(expected), "{error}");
            assert!(error.hint().unwrap().contains(hint), "{error}");
        }
    }
}

#[test]
fn data_with_nothing_to_learn_from_are_an_error_with_the_reason() {
    let nothing = |text: &str, change: fn(&mut DataConfig)| {
        let dir = folder(&[("a.jsonl", text)]);
        let mut config = chat_config(dir.path(), "*.jsonl");
        change(&mut config);
        let error = open_chat(&config).err().unwrap();
        let message = error.to_string().replace(&format!("{}/", dir.path().display()), "");
        (message.replace("the files of `data.train` contain nothing to learn from: ", "... "), error.hint())
    };
    let long = talk(&"long".repeat(5), "a");
    let (message, hint) = nothing(&long, |config| config.too_long = LongRecords::Truncate);
    assert_eq!(
        message,
        "... 1 record was left out, because nothing in the first 16 tokens is learned: a.jsonl:1 (25 tokens)"
    );
    assert_eq!(hint.unwrap(), "raise `data.sequence_length`");
    let (message, _) = nothing(&long, |config| config.too_long = LongRecords::Skip);
    assert_eq!(message, "... 1 record was longer than 16 tokens and left out: a.jsonl:1 (25 tokens)");
    let (message, hint) = nothing("{\"a\" 1}\n", |config| config.broken = BrokenRecords::Skip);
    assert_eq!(message, "... 1 record was broken and left out: a.jsonl:1:6 (the record is not JSON: expected `:`)");
    assert!(hint.unwrap().contains("data.broken"));
    let (message, _) = nothing(&talk("q", "a"), |config| config.max_file_bytes = 9);
    assert_eq!(message, "... files larger than `data.max_file_bytes` were left out: 1, the first is `a.jsonl`");
    assert_eq!(nothing("", |_| {}).0, "... 0 tokens in all");
}

/// Elements of an array have no line breaks between them: after an element that is not JSON the next one cannot be found, so
/// it is an error whatever `data.broken` is.
#[test]
fn a_broken_record_of_an_array_ends_the_file_only_if_it_is_not_json() {
    let (good, bad) = (talk("q", "a"), "{\"messages\": 3}");
    let open = |text: &str| -> Result<(u64, String), String> {
        let dir = folder(&[("a.json", text)]);
        let mut config = chat_config(dir.path(), "*.json");
        config.broken = BrokenRecords::Skip;
        let dataset = open_chat(&config).map_err(|error| error.to_string())?;
        Ok((
            dataset.train_tokens(),
            dataset.notes().iter().find(|note| note.contains("broken")).cloned().unwrap_or_default(),
        ))
    };
    let (tokens, note) = open(&format!("[{good}, {bad}, {good}]")).unwrap();
    assert_eq!(tokens, 12);
    assert!(note.contains("a.json:2:3 (`messages` is not a list"), "{note}");
    let error = open(&format!("[{good},\n {{\"messages\": x}},\n{good}]")).unwrap_err();
    assert!(error.ends_with("a.json:3:15: the record is not JSON: expected value"), "{error}");
    // The array has two errors: a missing comma, which is reported, and no closing bracket.
    let error = open(&format!("[{good} {good}")).unwrap_err();
    assert!(error.ends_with("a.json:2:2: expected `,` or `]` after an element of the array"), "{error}");
}

#[test]
fn a_file_of_broken_records_only_is_noted() {
    let dir = folder(&[("a.jsonl", &talk("q", "a")), ("b.jsonl", "{\"a\": 1}\n{\"a\": 2}\n")]);
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.broken = BrokenRecords::Skip;
    for _ in 0..2 {
        let dataset = open_chat(&config).unwrap();
        let note = dataset.notes().iter().find(|note| note.contains("all 2 records of `")).unwrap();
        assert!(note.contains("b.jsonl` are broken"), "{note}");
    }
}

#[test]
fn documents_of_an_array_are_located_by_their_column() {
    let talks = [talk("q", "a"), talk("q", &"long".repeat(5))].map(|talk| talk.trim().to_owned());
    let dir = folder(&[("a.json", &format!("[{}, {}]", talks[0], talks[1]))]);
    let config = chat_config(dir.path(), "*.json");
    let error = open_chat(&config).err().unwrap().to_string();
    let column = talks[0].len() + 4;
    assert!(
        error.ends_with(&format!("a.json:1:{column}: the record has 25 tokens, but `data.sequence_length` is 16")),
        "{error}"
    );
    let config = DataConfig { too_long: LongRecords::Truncate, ..config };
    let samples = open_chat(&config).unwrap().inspect(2).unwrap().samples;
    assert_eq!(
        samples.iter().map(|sample| (sample.line, sample.column as usize)).collect::<Vec<_>>(),
        [(1, 2), (1, column)]
    );
}

/// Those of all records, and not only of the first.
#[test]
fn ignored_fields_of_texts_are_listed() {
    let lines = b"{\"content\": \"a\"}\n{\"content\": \"b\", \"text\": \"c\", \"n\": null, \"\": 1}\n";
    let (documents, notes) = documents_of("a.jsonl", lines, |_| {}).unwrap();
    assert_eq!(documents, "a$b$");
    let note = "data.train: ignored fields (number of records): a field without a name (1), `text` (1)";
    assert_eq!(notes[1], note);
}

#[test]
fn blank_rows_of_csv_are_counted() {
    let csv = b"sep=;\r\ntext;id\r\none;\r\n;\r\ntwo;\r\n;\r\n;\r\n";
    let (documents, notes) = documents_of("a.csv", csv, |_| {}).unwrap();
    assert_eq!(documents, "one$two$");
    assert_eq!(notes[1], "data.train: 3 rows of CSV were left out, because all fields are empty");
}

#[test]
fn fields_that_the_template_uses_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = chat_config(dir.path(), "*.jsonl");
    config.sequence_length = 100;
    let template = std::fs::read_to_string(&config.chat_template).unwrap();
    std::fs::write(&config.chat_template, format!("{{{{ date_string }}}}{template}")).unwrap();
    let with = |more: &str| talk("Q", "A").replace("}\n", more) + "}\n";
    let lines = with(", \"date_string\": \"May\"") + &with(", \"tools\": []") + &talk("R", "B");
    std::fs::write(dir.path().join("a.jsonl"), lines).unwrap();
    let notes = open_chat(&config).unwrap().notes().to_vec();
    let note = "data.train: fields used by the chat template (number of records): `date_string` (1)";
    assert!(notes.iter().any(|known| known == note), "{notes:?}");
}

#[test]
fn labels_next_to_tokens_are_refused_and_an_attention_mask_is_ignored() {
    let dir = folder(&[("a.jsonl", "{\"input_ids\": [1, 2], \"attention_mask\": [1, 1]}\n")]);
    let mut config = config(dir.path(), "*.jsonl");
    config.format = DataFormat::Tokens;
    let dataset = Dataset::open(&config, None, 10, 0).unwrap();
    assert_eq!(dataset.train_tokens(), 2);
    assert_eq!(dataset.notes(), ["data.train: ignored fields (number of records): `attention_mask` (1)"]);
    std::fs::write(dir.path().join("a.jsonl"), "{\"tokens\": [1, 2], \"labels\": [-100, 2]}\n").unwrap();
    let error = Dataset::open(&config, None, 10, 0).err().unwrap().to_string();
    assert!(error.contains("a.jsonl:1: the record has `labels`, which says what is learned"), "{error}");
}

#[test]
fn a_folder_instead_of_a_glob_is_an_error_with_a_hint() {
    let dir = folder(&[("a.txt", "x")]);
    let glob = dir.path().display().to_string();
    let mut config = config(dir.path(), "*.txt");
    config.train = vec![glob.clone()];
    assert_eq!(
        open(&config).err().unwrap().hint().unwrap(),
        format!("name the files in this folder, for example `{glob}/**/*.jsonl`")
    );
}
