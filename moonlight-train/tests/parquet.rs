//! Conversations in parquet files, with and without the feature `parquet`.

mod common;

use std::path::{Path, PathBuf};

use common::{Home, assert_fails, text};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/parquet").join(name)
}

/// `moonlight train` or `data inspect` on a file of conversations.
fn with_data(command: &mut std::process::Command, data: &Path, more: &[&str]) -> std::process::Output {
    let sets = [
        &format!("data.train=[\"{}\"]", data.display()),
        "data.format=chat",
        "data.tokenizer=bytes-chat",
        "data.sequence_length=192",
        "model.max_position_embeddings=512",
        "data.too_long=truncate",
    ];
    command.args(sets.iter().chain(more).flat_map(|set| ["--set", set])).output().unwrap()
}

#[cfg(not(feature = "parquet"))]
#[test]
fn without_the_feature_a_parquet_file_is_an_error_that_names_it() {
    let home = Home::new();
    let output = with_data(&mut home.train("parquet", &[]), &fixture("messages-snappy.parquet"), &[]);
    assert_fails(&output, "messages-snappy.parquet`: this build does not read parquet files");
    assert!(text(&output.stderr).contains("hint: build with `--features parquet`"), "{}", text(&output.stderr));
    assert!(!home.run("parquet").exists());
    let output = with_data(&mut home.train("parquet", &[]), &fixture("text.parquet"), &["data.format=text"]);
    assert_fails(&output, "text.parquet`: this build does not read parquet files");
}

// CI chooses these tests by the name of the module.
#[cfg(feature = "parquet")]
mod parquet_built_in {
    use std::fs;

    use super::*;
    use crate::common::moonlight;

    fn inspect(home: &Home, data: &Path, more: &[&str]) -> std::process::Output {
        let mut command = moonlight(&["data", "inspect", "--samples", "3", "--json"]);
        with_data(command.arg(home.path("recipe.toml")), data, more)
    }

    /// The output of `data inspect` for a file, without the file's name.
    fn seen(home: &Home, data: &Path) -> (serde_json::Value, Vec<u64>) {
        let output = inspect(home, data, &["data.valid_fraction=0"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let mut seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        seen.as_object_mut().unwrap().remove("notes");
        let samples = seen["samples"].as_array_mut().unwrap();
        let places = samples.iter_mut().map(|sample| {
            let sample = sample.as_object_mut().unwrap();
            assert_eq!(sample.remove("path").unwrap(), data.display().to_string());
            sample["line"].as_u64().unwrap()
        });
        let places = places.collect();
        (seen, places)
    }

    #[test]
    fn conversations_are_those_of_the_same_rows_in_jsonl() {
        let home = Home::new();
        for name in ["messages-snappy", "sharegpt-zstd", "alpaca-gzip"] {
            let of_parquet = seen(&home, &fixture(&format!("{name}.parquet")));
            assert_eq!(of_parquet, seen(&home, &fixture(&format!("{name}.jsonl"))), "{name}");
            // Rows are counted over all row groups.
            assert!(of_parquet.1.is_sorted() && of_parquet.1[0] == 1 && of_parquet.1[2] > 3, "{:?}", of_parquet.1);
        }
    }

    #[test]
    fn each_text_is_a_document() {
        let home = Home::new();
        let sets = ["data.valid_fraction=0", "data.format=text", "data.tokenizer=bytes"];
        let looked = |name: &str| {
            let output = inspect(&home, &fixture(name), &sets);
            assert!(output.status.success(), "{}", text(&output.stderr));
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
        };
        let [parquet, lines] = ["text.parquet", "text.jsonl"].map(looked);
        assert_eq!(parquet["train"], lines["train"]);
        let notes = parquet["notes"].to_string();
        assert!(notes.contains("files by kind: 1 parquet (a document in each `text`)"), "{notes}");
    }

    #[test]
    fn a_run_trains_on_parquet_and_is_evaluated_on_it() {
        let home = Home::new();
        let (data, task) = (fixture("messages-snappy.parquet"), fixture("sharegpt-zstd.parquet"));
        let task = format!("eval.tasks=[\"{}\"]", task.display());
        let mut command = home.train("parquet", &["--set", "train.steps=3"]);
        let output = with_data(&mut command, &data, &[&task]);
        let stderr = text(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert!(stderr.contains("conversations: 23 with `messages` (OpenAI)"), "{stderr}");
        let found = fs::read_to_string(home.run("parquet").join("evaluation.json")).unwrap();
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        assert_eq!(found["after"][0]["rows"], 9);
    }

    #[test]
    fn an_error_in_a_record_is_one_line_with_its_row() {
        let home = Home::new();
        let bad = fixture("bad-records.parquet");
        let train = |data: &Path, more: &[&str]| with_data(&mut home.train("bad", &[]), data, more);
        assert_fails(&train(&bad, &[]), "bad-records.parquet:3: the conversation has no assistant message");
        let output = inspect(&home, &bad, &["data.broken=skip"]);
        let notes = text(&output.stdout) + &text(&output.stderr);
        for expected in [
            "3 records were broken and left out",
            "bad-records.parquet:4 (`messages[1]` has the unknown role `robot`",
            "bad-records.parquet:5 (the record is not a conversation: it has `prompt_id`)",
        ] {
            assert!(notes.contains(expected), "{expected}\n{notes}");
        }
        assert_fails(&train(&fixture("not-utf8.parquet"), &[]), "not-utf8.parquet:2: the row cannot be read: ");
        assert_fails(
            &train(&fixture("text.parquet"), &[]),
            "text.parquet`: it has none of the columns `messages`, `conversations`, `prompt`, `instruction`; it has `id`, `text`",
        );
        assert_fails(
            &train(&fixture("messages-snappy.parquet"), &["data.format=text"]),
            "messages-snappy.parquet`: it has none of the columns `text`, `content`; it has ",
        );
        let whole = fs::read(fixture("messages-snappy.parquet")).unwrap();
        let half = home.path("half.parquet");
        fs::write(&half, &whole[..whole.len() / 2]).unwrap();
        assert_fails(&train(&half, &[]), "cannot read `");
        // Damage in the middle of a page, at which the reader panics: the panic's message must not be printed.
        let mut damaged = whole;
        damaged[4..2000].fill(0xA5);
        fs::write(&half, damaged).unwrap();
        assert_fails(&train(&half, &[]), "half.parquet");
        assert!(!home.run("bad").exists());
    }
}
