//! `moonlight eval` and `moonlight plot`, by the commands of a user.

mod common;

use std::fs;

use common::{Home, assert_fails, moonlight, text};
use serde_json::{Value, json};

#[test]
fn a_checkpoint_is_evaluated_and_its_run_is_plotted() {
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
    let output = eval(&["--task", talk, "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(found["metrics"]["nll"]["value"].as_f64().unwrap() > 0.0, "{found}");
    assert!(found["metrics"]["exact_match"]["value"].is_number(), "{found}");
    fs::write(talk, format!("{{\"instruction\": \"{}\", \"output\": \"a\"}}\n", "q".repeat(70))).unwrap();
    assert_fails(&eval(&["--task", talk]), "talk.jsonl:1: ");
    let output = eval(&["--task", arc]);
    assert!(text(&output.stdout).contains("acc_norm"), "{}", text(&output.stdout));
    assert_fails(&eval(&["--task", arc, "--format", "mmlu"]), "arc.jsonl:1: `choices` is not a list of strings");
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
    assert_fails(&output, "none of the runs has the metric `nothing`");
}

#[test]
fn a_recipe_with_tasks_is_evaluated_before_and_after() {
    let home = Home::new();
    let talk = home.path("talk.jsonl");
    fs::write(&talk, "{\"text\": \"File 3 says 4 and 5 of 6.\"}\n{\"text\": \"File 4\"}\n").unwrap();
    let tasks = format!("eval.tasks=[\"{}\"]", talk.display());
    let sets = ["--set", &tasks, "--set", "train.steps=5", "--set", "schedule.total_steps=12"];
    let run = home.trained("evaluated", &sets);
    let evaluation =
        || -> Value { serde_json::from_str(&fs::read_to_string(run.join("evaluation.json")).unwrap()).unwrap() };
    let bits = |when: &str| evaluation()[when][0]["metrics"]["bits_per_byte"]["value"].as_f64().unwrap();
    let (before, after) = (bits("before"), bits("after"));
    assert!(after < before, "{after} is not below {before}");
    // A resumed run keeps the results from before the first step.
    let output = home.train("evaluated", &["--set", &tasks, "--resume"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(bits("before"), before);
    assert!(bits("after") < after);
    let stderr = text(&output.stderr);
    assert!(!stderr.contains("evaluation before:") && stderr.contains("evaluation after:"), "{stderr}");
    let nowhere = home.train("bad", &["--set", "eval.tasks=[\"nowhere.jsonl\"]"]).output().unwrap();
    assert_fails(&nowhere, "nowhere.jsonl");
    assert!(!home.run("bad").exists());
}

/// No token of the bytes tokenizer crosses the border between question and answer, so the flag changes nothing and no note is
/// printed.
#[test]
fn the_flag_for_the_harness_changes_nothing_with_bytes() {
    let home = Home::new();
    let model =
        home.trained("a", &["--set", "data.tokenizer=bytes-chat", "--set", "train.steps=1"]).display().to_string();
    let task = home.path("mmlu.jsonl");
    fs::write(&task, json!({"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 0}).to_string()).unwrap();
    let eval = |more: &[&str]| {
        let output = moonlight(&["eval", "--model", &model, "--json", "--task", task.to_str().unwrap()]);
        let output = { output }.args(more).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let plain = eval(&[]);
    assert_eq!((&eval(&["--fix-harness"]), &plain["notes"]), (&plain, &json!([])));
}
