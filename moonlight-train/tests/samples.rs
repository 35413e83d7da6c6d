//! Samples of a run's validations: they are written, resume with the run, and do not change the training.

mod common;

use std::fs;
use std::path::Path;

use common::{Home, assert_same_checkpoint, checkpoint, metrics, text};
use serde_json::Value;

const SAMPLED: [&str; 8] = [
    "--set",
    "sample.prompt=File 3",
    "--set",
    "sample.max_new_tokens=12",
    "--set",
    "train.validate_every=3",
    "--set",
    "schedule.total_steps=12",
];

fn samples(run: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(run.join("samples.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn steps(samples: &[Value]) -> Vec<u64> {
    samples.iter().map(|sample| sample["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_run_with_samples_takes_the_same_steps_bit_for_bit() {
    let home = Home::new();
    let run = home.trained("with", &SAMPLED);
    let without = home.trained("without", &[&SAMPLED[..], &["--set", "sample.at_validation=false"]].concat());
    let written = samples(&run);
    assert_eq!(steps(&written), [3, 6, 9, 12]);
    for sample in &written {
        assert_eq!(sample["prompt"], "File 3");
        assert!(!sample["text"].as_str().unwrap().is_empty(), "{sample}");
    }
    assert!(!without.join("samples.jsonl").exists());
    assert_eq!(metrics(&run), metrics(&without));
    for step in [8, 12] {
        assert_same_checkpoint(&checkpoint(&run, step), &checkpoint(&without, step));
    }
}

#[test]
fn the_last_sample_is_the_one_that_the_run_prints() {
    let home = Home::new();
    let output = home.train("run", &SAMPLED).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let last = samples(&home.run("run")).pop().unwrap();
    let printed = format!("File 3{}\n", last["text"].as_str().unwrap());
    assert_eq!(text(&output.stdout), printed);
}

#[test]
fn a_resumed_run_writes_the_samples_of_the_run_that_was_not_stopped() {
    let home = Home::new();
    let run = home.trained("run", &SAMPLED);
    let all = samples(&run);
    // As after a crash between the last validation and its checkpoint.
    fs::remove_dir_all(checkpoint(&run, 12)).unwrap();
    fs::write(run.join("samples.jsonl"), fs::read_to_string(run.join("samples.jsonl")).unwrap() + "{\"step\":9,")
        .unwrap();
    let resume = |sets: &[&str]| {
        let output = home.train("run", &[&SAMPLED[..], &["--resume"], sets].concat()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("resumed after step 8\n"), "{}", text(&output.stderr));
    };
    resume(&[]);
    assert_eq!(samples(&run), all);
    // Without new samples, those of the steps that are taken again are removed nevertheless.
    fs::remove_dir_all(checkpoint(&run, 12)).unwrap();
    resume(&["--set", "sample.at_validation=false"]);
    assert_eq!(steps(&samples(&run)), [3, 6]);
}
