//! Files of every kind, read by [`RecordReader`].

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The position and the JSON of each record.
type Found = Vec<(String, Value)>;

fn read(path: &Path, limit: Option<u64>) -> Result<Found, RecordError> {
    let mut reader = RecordReader::open(path, &[], limit)?;
    let mut records = Vec::new();
    while let Some(Record { json, place }) = reader.next_record()? {
        records.push((place.to_string(), parse(&json).map_or(Value::Null, |parsed| parsed.value)));
    }
    Ok(records)
}

fn records_of(name: &str, bytes: &[u8]) -> Result<Found, (String, Option<String>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    read(&path, None).map_err(|error| {
        let message = error.to_string().replace(&format!("{}/", dir.path().display()), "");
        (message, error.hint())
    })
}

#[test]
fn every_kind_of_file_has_the_same_records() {
    let a = json!({"text": "one, \"two\"\nthree", "n": "1"});
    let b = json!({"text": "ü", "n": "2"});
    let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap();
    let list = json!([a, b]);
    let utf8 = "\u{feff}";
    for (name, text, places) in [
        ("a.jsonl", format!("{a}\n{b}\n"), ["1", "2"]),
        ("a.jsonl", format!("{utf8}{a}\r\n\r\n{b}"), ["1", "3"]),
        ("a.jsonl", format!("{utf8}{a}\n{utf8}{b}\n"), ["1", "2"]),
        ("a.ndjson", format!("\n{a}\n{b}\n"), ["2", "3"]),
        ("a.json", list.to_string(), ["1:2", "1:41"]),
        ("a.jsonl", format!("{utf8}[\r\n{a},\r\n{b}\r\n]\r\n"), ["2:1", "3:1"]),
        ("a.json", pretty(&list), ["2:3", "6:3"]),
        ("a.json", format!("{}\n{}", pretty(&a), pretty(&b)), ["1:1", "5:1"]),
        ("a.csv", format!("{utf8}text,n\r\n\"one, \"\"two\"\"\nthree\",1\r\nü,2\r\n"), ["2", "4"]),
        ("a.csv", "text;n\n\"one, \"\"two\"\"\nthree\";1\nü;2".into(), ["2", "4"]),
        ("a.tsv", "text\tn\n\"one, \"\"two\"\"\nthree\"\t1\nü\t2\n".into(), ["2", "4"]),
    ] {
        let expected = vec![(places[0].to_owned(), a.clone()), (places[1].to_owned(), b.clone())];
        assert_eq!(records_of(name, text.as_bytes()), Ok(expected), "{name}: {text}");
    }
    for empty in ["", "\n \n", "[]", " [\n]\n", "\u{feff}"] {
        assert_eq!(records_of("a.json", empty.as_bytes()), Ok(Vec::new()));
    }
}

#[test]
fn a_limit_drops_the_record_that_it_cuts() {
    let dir = tempfile::tempdir().unwrap();
    let count = |name: &str, text: &str, limit| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        read(&path, Some(limit)).unwrap().len()
    };
    let lines = "{\"a\":1}\n{\"a\":2}\n{\"a\":3}\n";
    for (limit, expected) in [(1, 0), (7, 0), (8, 1), (15, 1), (16, 2), (24, 3), (99, 3)] {
        assert_eq!(count("a.jsonl", lines, limit), expected, "{limit}");
        assert_eq!(count("a.jsonl", &format!("\u{feff}{lines}"), limit + 3), expected, "{limit}");
    }
    assert_eq!(count("a.jsonl", lines.trim_end(), 99), 3);
    let array = "[{\"a\":1}, {\"a\":2}, {\"a\":3}]";
    for (limit, expected) in [(5, 0), (8, 1), (16, 1), (17, 2), (99, 3)] {
        assert_eq!(count("a.json", array, limit), expected, "{limit}");
    }
    let csv = "a,b\n1,2\n3,4\n";
    for (limit, expected) in [(3, 0), (4, 0), (7, 0), (8, 1), (12, 2), (99, 2)] {
        assert_eq!(count("a.csv", csv, limit), expected, "{limit}");
    }
}

#[test]
fn files_that_wrap_their_records_are_errors_with_a_hint() {
    for (text, problem, hint) in [
        (
            json!({"version": "1.0", "data": [{"text": "x"}]}),
            "its records are a list within an object, under `data`",
            "'.data[]'",
        ),
        (
            json!({"features": [{"name": "text"}], "rows": [{"row_idx": 0, "row": {"text": "x"}}]}),
            "its records are a list within an object, under `rows`",
            "'.rows[].row'",
        ),
        (
            json!({"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}),
            "it has columns, not records: each value is an object keyed by row numbers",
            "orient=\"records\"",
        ),
    ] {
        for text in [text.to_string(), serde_json::to_string_pretty(&text).unwrap()] {
            let (message, help) = records_of("a.json", text.as_bytes()).unwrap_err();
            assert_eq!(message, format!("cannot read `a.json`: {problem}"));
            assert!(help.unwrap().contains(hint));
        }
    }
    // A record may itself have a field named `data`.
    for text in
        [json!({"messages": [], "data": [{"a": 1}]}), json!({"data": [1]}), json!({"data": []}), json!({"x": {}})]
    {
        assert_eq!(records_of("a.json", text.to_string().as_bytes()).unwrap().len(), 1);
    }
}

#[test]
fn files_that_end_early_are_errors() {
    for (name, text, expected) in [
        ("a.json", "[{\"a\": 1},\n{\"a\": 2}\n", "a.json:3:1: the array is not closed: the file ends too early"),
        ("a.json", "[{\"a\": 1},\n{\"a\": 2", "a.json:2:1: the record is not closed: the file ends too early"),
        ("a.json", "{\n\"a\": 1\n}\n{\n", "a.json:4:1: the record is not closed: the file ends too early"),
        ("a.csv", "a,b\n1,\"2\n", "a.csv:2: a quotation mark in this row is not closed before the end of the file"),
    ] {
        assert_eq!(records_of(name, text.as_bytes()).unwrap_err().0, expected);
    }
    // The last line of a truncated file is a broken record.
    assert_eq!(records_of("a.jsonl", b"{\"a\": 1}\n{\"a\":").unwrap()[1], ("2".into(), Value::Null));
}

/// The files are sparse: only their length is set.
#[cfg(unix)]
#[test]
fn records_beyond_the_limit_are_errors() {
    for (name, start, place, hint) in [
        ("a.jsonl", "{\"a\": 1}\n", "2", "JSONL"),
        ("a.json", "[1, {\"a\": \"", "1:5", "elements of an array"),
        ("a.csv", "text\n\"", "2", "quotation mark"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, start).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(2 * MAX_RECORD_BYTES as u64).unwrap();
        let error = read(&path, None).unwrap_err();
        assert!(error.to_string().ends_with(&format!("{name}:{place}: the record is longer than 256 MiB")), "{error}");
        assert!(error.hint().unwrap().contains(hint), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// A file with any bytes and any name is read or refused.
    #[test]
    fn any_file_is_read_or_refused(
        start in prop::sample::select(vec!["", "[", "{", "{\n", "a,b\n", "\u{feff}", "PAR1", "[{\"a\":1},"]),
        rest: Vec<u8>,
        name in prop::sample::select(vec!["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz"]),
    ) {
        drop(records_of(name, &[start.as_bytes(), &rest].concat()));
    }
}
