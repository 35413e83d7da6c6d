//! Data files of many kinds, as users have them.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use common::{Home, SHAPE, assert_fails, moonlight, text};
use serde_json::Value;

/// One conversation.
const RECORD: &str = r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#;

/// `moonlight data inspect` on a file of conversations.
struct Look {
    home: Home,
}

impl Look {
    fn new() -> Self {
        Self { home: Home::new() }
    }

    fn at(&self, name: &str, contents: impl AsRef<[u8]>, more: &[&str]) -> Output {
        let path = self.home.path(name);
        fs::write(&path, contents).unwrap();
        let sets = [
            &format!("data.train=[\"{}\"]", path.display()),
            "data.valid_fraction=0",
            "data.format=chat",
            "data.tokenizer=bytes-chat",
            "data.sequence_length=512",
            "model.max_position_embeddings=512",
        ];
        let mut command = moonlight(&["data", "inspect", "--samples", "9", "--json"]);
        command.arg(self.home.path("recipe.toml"));
        command.args(sets.iter().chain(more).flat_map(|set| ["--set", set])).output().unwrap()
    }

    fn seen(&self, name: &str, contents: impl AsRef<[u8]>, more: &[&str]) -> Value {
        let output = self.at(name, contents, more);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The tokens of each document.
    fn tokens(&self, name: &str, contents: impl AsRef<[u8]>, more: &[&str]) -> Vec<Value> {
        let seen = self.seen(name, contents, more);
        seen["samples"].as_array().unwrap().iter().map(|sample| sample["tokens"].clone()).collect()
    }
}

fn notes(seen: &Value) -> String {
    seen["notes"].as_array().unwrap().iter().map(|note| note.as_str().unwrap().to_owned() + "\n").collect()
}

#[test]
fn conversations_are_the_same_in_every_kind_of_file() {
    let look = Look::new();
    let expected = look.tokens("plain.jsonl", format!("{RECORD}\n{RECORD}\n"), &[]);
    assert_eq!(expected.len(), 2);
    let quoted =
        format!("\"{}\"", r#"[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]"#.replace('"', "\"\""));
    let pretty = serde_json::to_string_pretty(&serde_json::from_str::<Value>(RECORD).unwrap()).unwrap();
    for (name, contents) in [
        ("bom.jsonl", format!("\u{feff}{RECORD}\r\n{RECORD}\r\n")),
        ("blank.ndjson", format!("\n{RECORD}\n\n{RECORD}")),
        ("list.json", format!("[\n{RECORD},\n{RECORD}\n]\n")),
        ("line.json", format!("[{RECORD}, {RECORD}]")),
        ("list.jsonl", format!("[{RECORD},\n{RECORD}]")),
        ("pretty.json", format!("[{pretty},{pretty}]")),
        ("objects.json", format!("{pretty}\n{pretty}\n")),
        ("table.csv", format!("id,messages\n1,{quoted}\n2,{quoted}\n")),
        ("table.tsv", format!("\u{feff}messages\tid\r\n{quoted}\t1\r\n{quoted}\t2\r\n")),
        // An ignored field may contain what only Python calls JSON.
        (
            "nan.jsonl",
            RECORD
                .replace('{', "{\"score\":NaN,")
                .replace("{\"score\":NaN,\"role\"", "{\"role\"")
                .repeat(2)
                .replace("}{", "}\n{"),
        ),
    ] {
        assert_eq!(look.tokens(name, &contents, &[]), expected, "{name}: {contents}");
        assert_eq!(look.tokens(name, &contents, &["data.broken=skip"]), expected, "{name}");
    }
    let notes = notes(&look.seen("list.json", format!("[{RECORD}]"), &[]));
    assert!(notes.contains("data.train: files by kind: 1 JSON array\n"), "{notes}");
}

#[test]
fn alpaca_records_over_several_lines_are_read() {
    let look = Look::new();
    let expected = look.tokens("a.jsonl", r#"{"instruction":"I","output":"O"}"#, &[]);
    let pretty = "[\n  {\n    \"instruction\": \"I\",\n    \"output\": \"O\"\n  }\n]\n";
    assert_eq!(look.tokens("alpaca.json", pretty, &[]), expected);
    assert_eq!(look.tokens("alpaca.json", pretty, &["data.broken=skip"]), expected);
    assert_eq!(look.tokens("alpaca.csv", "instruction,input,output\nI,,O\n", &[]), expected);
}

#[test]
fn half_a_surrogate_pair_is_replaced_and_noted() {
    let look = Look::new();
    let seen = look.seen("lone.jsonl", RECORD.replace('Q', "cut \\ud83d here"), &[]);
    let expected = look.tokens("plain.jsonl", RECORD.replace('Q', "cut \u{fffd} here"), &[]);
    assert_eq!(seen["samples"][0]["tokens"], expected[0]);
    let notes = notes(&seen);
    assert!(notes.contains("1 record was read with U+FFFD in place of half a surrogate pair: "), "{notes}");
    assert!(notes.contains("lone.jsonl:1\n"), "{notes}");
}

/// With any value of `data.broken`.
#[test]
fn files_of_other_formats_are_refused_and_never_read_in_part() {
    let look = Look::new();
    let utf_16: Vec<u8> = format!("\u{feff}{RECORD}").encode_utf16().flat_map(u16::to_le_bytes).collect();
    let wrapped = format!("{{\"version\":1,\"data\":[{RECORD}]}}");
    for (name, contents, expected, hint) in [
        ("wide.jsonl", &utf_16[..], "it is UTF-16 text", "iconv"),
        ("page.jsonl", b"<!DOCTYPE html>\n<html>", "it is a page of HTML or XML", "log in"),
        (
            "lfs.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "it is a git-lfs pointer",
            "git lfs pull",
        ),
        ("set.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "it is an Arrow stream", "to_parquet"),
        ("all.zip", b"PK\x03\x04", "it is a zip archive", "unpack"),
        (
            "wrapped.json",
            wrapped.as_bytes(),
            "its records are a list within an object, under `data`",
            "jq -c '.data[]'",
        ),
        ("words.txt", b"Dear diary", "it begins with `Dear diary`", "JSON Lines"),
        ("lists.jsonl", b"[{\"role\":\"user\"}]\n[{\"role\":\"user\"}]\n", "each of its lines is a list", "messages"),
        ("packed.jsonl.gz", RECORD.as_bytes(), "its name says gzip", "ending"),
        ("cut.json", format!("[{RECORD},").as_bytes(), "cut.json:1:82: the array is not closed", ""),
        ("repr.csv", b"messages\n\"[{'role': 'user'}]\"\n", "repr.csv:2: column `messages` is not JSON", "json.dumps"),
        ("short.csv", b"instruction,output\nI,O\nI\n", "short.csv:3: the row has 1 columns", "quotation"),
    ] {
        for more in [&[][..], &["data.broken=skip"]] {
            let output = look.at(name, contents, more);
            assert_fails(&output, expected);
            assert!(text(&output.stderr).contains(hint), "{}", text(&output.stderr));
        }
    }
}

#[test]
fn an_error_in_a_record_has_its_line_and_column() {
    let look = Look::new();
    let wrong = RECORD.replace("\"Q\"}", "\"Q\";}");
    assert_fails(
        &look.at("a.jsonl", format!("{RECORD}\n{wrong}\n"), &[]),
        "a.jsonl:2:42: the record is not JSON: expected `,` or `}`",
    );
    assert_fails(
        &look.at("a.json", format!("[\n{RECORD},\n  {wrong}]"), &[]),
        "a.json:3:44: the record is not JSON: expected `,` or `}`",
    );
    let shape = RECORD.replace("\"A\"", "NaN");
    assert_fails(
        &look.at("a.json", format!("[{RECORD}, {shape}]"), &[]),
        "a.json:1:83: `messages[1]` has content that is not text",
    );
}

#[test]
fn a_run_without_anything_to_learn_from_names_the_reason() {
    let look = Look::new();
    let long = RECORD.replace('Q', &"w".repeat(600));
    let output = look.at("long.jsonl", &long, &["data.too_long=truncate"]);
    let why =
        "contain nothing to learn from: 1 record was left out, because nothing in the first 512 tokens is learned: ";
    assert_fails(&output, why);
    assert!(text(&output.stderr).contains("long.jsonl:1 ("), "{}", text(&output.stderr));
    let output = look.at("other.jsonl", "{\"a\": 1}\n{\"a\": 2}\n", &["data.broken=skip"]);
    assert_fails(&output, "contain nothing to learn from: 2 records were broken and left out: ");
    assert!(
        text(&output.stderr).contains("other.jsonl:1 (the record is not a conversation"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn each_text_is_a_document() {
    let look = Look::new();
    let as_text = ["data.format=text", "data.tokenizer=bytes"];
    let expected = look.tokens("a.jsonl", "{\"text\":\"one\"}\n{\"text\":\"two\"}\n", &as_text);
    assert_eq!(expected.len(), 2);
    assert_eq!(look.tokens("a.csv", "id,text\n1,one\n2,two\n", &as_text), expected);
    assert_eq!(look.tokens("a.json", "[{\"text\":\"one\"},{\"text\":\"two\"}]", &as_text), expected);
    let whole = look.tokens("a.txt", "{\"text\":\"one\"}\n{\"text\":\"two\"}\n", &as_text);
    assert_eq!(whole.len(), 1);
    assert_fails(&look.at("a.jsonl", RECORD, &as_text), "its records have neither `text` nor `content`");
}

/// `score` and `eval` read the files that training reads.
#[test]
fn score_and_eval_read_every_kind_of_file() {
    let home = Home::new();
    let run = home.trained("tiny", &["--set", "train.steps=1", "--set", "train.validate_every=0"]);
    assert!(SHAPE.contains("hidden_size"));
    let write = |name: &str, contents: &str| -> PathBuf {
        fs::write(home.path(name), contents).unwrap();
        home.path(name)
    };
    let files = [
        write("a.jsonl", "{\"text\":\"one\"}\n{\"text\":\"two\"}\n"),
        write("b.jsonl", "\u{feff}{\"text\":\"one\",\"x\":NaN}\r\n{\"text\":\"two\"}\r\n"),
        write("c.json", "[\n{\"text\":\"one\"},\n{\"text\":\"two\"}\n]"),
        write("d.csv", "id,text\n1,one\n2,two\n"),
    ];
    for command in [["score", "--data"], ["eval", "--task"]] {
        let output = |file: &PathBuf| {
            let [command, option] = command;
            let output = moonlight(&[command, option]).arg(file).arg("--model").arg(&run).output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
            // Lines of the table of `eval` start with the file's name.
            let name = file.file_name().unwrap().to_str().unwrap();
            text(&output.stdout).replace(&format!("{name:<8}"), "FILE    ")
        };
        let expected = output(&files[0]);
        for file in &files[1..] {
            assert_eq!(output(file), expected, "{}", file.display());
        }
        let zip = write("e.jsonl", "PK\u{3}\u{4}");
        let [command, option] = command;
        let output = moonlight(&[command, option]).arg(zip).arg("--model").arg(&run).output().unwrap();
        assert_fails(&output, "e.jsonl`: it is a zip archive");
    }
}
