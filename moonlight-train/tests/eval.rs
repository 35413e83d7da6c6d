//! `moonlight eval` and `moonlight plot`, as a user would.

mod common;

use std::fs;

use common::{Home, assert_fails, moonlight, text};
use serde_json::{Value, json};

#[test]
fn a_checkpoint_is_evaluated_and_drawn() {
    let home = Home::new();
    let sets = ["--set", "data.tokenizer=bytes-chat"];
    let (a, b) = (home.trained("a", &sets), home.trained("b", &sets));
    let model = a.display().to_string();
    let arc = home.path("arc.jsonl");
    let row = |question: &str, key: &str| json!({"question": question, "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": key});
    fs::write(&arc, format!("{}\n{}\n{}\n", row("a", "A"), row("b", "B"), row("c", "A"))).unwrap();
    let talk = home.path("talk.jsonl");
    fs::write(&talk, "{\"instruction\": \"q\", \"output\": \"a\"}\n").unwrap();
    let eval = |more: &[&str]| moonlight(&["eval", "--model", &model]).args(more).output().unwrap();
    let records = home.path("records.jsonl");
    let paths = [arc.display().to_string(), records.display().to_string(), talk.display().to_string()];
    let [arc, records, talk] = paths.each_ref().map(String::as_str);
    let output = eval(&["--task", arc, "--shots", "1", "--limit", "2", "--json", "--output", records]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["format"], &found["rows"], &found["shots"]), (&json!("arc"), &json!(2), &json!(1)));
    let acc = found["metrics"]["acc"]["value"].as_f64().unwrap();
    assert!([0.0, 0.5, 1.0].contains(&acc) && found["metrics"]["acc"]["stderr"].is_number(), "{found}");
    assert_eq!(fs::read_to_string(records).unwrap().lines().count(), 2);
    // A conversation is longer than this model's 64 tokens with the template's system message.
    assert_fails(&eval(&["--task", talk]), "talk.jsonl:1: ");
    let output = eval(&["--task", arc]);
    assert!(text(&output.stdout).contains("acc_norm"), "{}", text(&output.stdout));
    assert_fails(&eval(&["--task", arc, "--format", "mmlu"]), "arc.jsonl:1: `choices` is not a list of texts");
    assert_eq!(eval(&["--task", arc, "--format", "xyz"]).status.code(), Some(2));

    let plot = |file: &str| {
        let path = home.path(file);
        let output = moonlight(&["plot", "--x", "tokens", "--output"]).arg(&path).arg(&a).arg(&b).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        fs::read(path).unwrap()
    };
    assert!(text(&plot("x.svg")).starts_with("<svg"));
    assert!(plot("x.png").starts_with(b"\x89PNG"));
    let output = moonlight(&["plot", "--metric", "nothing"]).arg(&a).output().unwrap();
    assert_fails(&output, "none of the runs has the figure `nothing`");
}
