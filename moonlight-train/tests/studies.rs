//! `moonlight sweep` and `moonlight report`.

#![cfg(unix)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Home, moonlight, text};
use moonlight_train::study::report::report;
use moonlight_train::study::study_file::Study;
use serde_json::Value;

const STUDY: &str = r#"
title = "Tiny"
question = "Does it work?"
claim = "It does."
limits = "Everything."
recipe = "../recipe.toml"
budget = "1h"
seeds = [1, 2]

[set]
"train.checkpoint_every" = 0
"train.steps" = 8

[[axes]]
name = "size"
values = [
    { name = "narrow" },
    { name = "wide", set = { "model.hidden_size" = 32 } },
]

[[axes]]
name = "optimizer"
values = [
    { name = "adamw", set = { "optimizer.name" = "adamw" } },
    { name = "muon", set = { "optimizer.name" = "muon" } },
]

[tune]
by = ["optimizer"]
start = 2e-3

[[sections]]
kind = "table"
title = "Results"
columns = ["valid_loss", "train_loss", "query_rms"]

[[sections]]
kind = "difference"
title = "Muon minus AdamW"
axis = "optimizer"
baseline = "adamw"
columns = ["valid_loss"]

[[sections]]
kind = "scaling-law"
title = "Operations"
axis = "optimizer"
baseline = "adamw"
size = "size"

[[sections]]
kind = "spectra"
title = "Spectra"
axis = "optimizer"

[[sections]]
kind = "weights"
title = "Weights"
axis = "optimizer"
"#;

/// A study in the folder of its home.
fn study(home: &Home, text: &str) -> PathBuf {
    fs::create_dir_all(home.path("studies")).unwrap();
    let path = home.path("studies/tiny.toml");
    fs::write(&path, text).unwrap();
    path
}

fn sweep(home: &Home, study: &Path, arguments: &[&str]) -> Command {
    let mut command = moonlight(&["sweep"]);
    command.arg(study).args(["--jobs", "2"]).args(arguments).current_dir(home.path(""));
    command
}

/// The lines of the table, which a sweep may be writing.
fn complete_lines(home: &Home) -> usize {
    let table = fs::read_to_string(home.path("studies/results/tiny.small.jsonl")).unwrap_or_default();
    table.matches('\n').count()
}

/// The rows by their run, without what differs from one machine and moment to the next.
fn rows(home: &Home) -> BTreeMap<String, Value> {
    let text = fs::read_to_string(home.path("studies/results/tiny.small.jsonl")).unwrap_or_default();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let run = row["run"].as_str().unwrap().to_owned();
        row["date"].take();
        row["measured"]["seconds"].take();
        (run, row)
    };
    let rows: Vec<_> = text.lines().map(row).collect();
    let count = rows.len();
    let rows: BTreeMap<_, _> = rows.into_iter().collect();
    assert_eq!(rows.len(), count, "a run is in the table twice");
    rows
}

#[test]
fn a_sweep_that_is_killed_and_continued_has_the_table_of_one_that_was_not() {
    let whole = Home::new();
    let path = study(&whole, STUDY);
    let output = sweep(&whole, &path, &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let expected = rows(&whole);
    // Three rates at least for each optimizer, and two seeds at four points.
    assert!(expected.len() >= 12, "{:?}", expected.keys());
    let again = sweep(&whole, &path, &[]).output().unwrap();
    assert!(text(&again.stderr).contains("added 0 runs; the study is complete"), "{}", text(&again.stderr));

    // In the same folder, because the paths of the text are among the settings that identify a run.
    let killed = whole;
    fs::remove_dir_all(killed.path("studies/results")).unwrap();
    fs::remove_dir_all(killed.path("runs")).unwrap();
    for count in [3, 6] {
        let mut child = sweep(&killed, &path, &[]).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while complete_lines(&killed) < count {
            assert!(Instant::now() < deadline, "no run ends");
            sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let before = rows(&killed).len();
    let output = sweep(&killed, &path, &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(before < expected.len(), "the kills came too late");
    assert_eq!(rows(&killed), expected);

    let study = Study::open(&path, "small").unwrap();
    let page = report(&study).unwrap();
    for expected in
        ["# Tiny", "Does it work?", "## Tuning", "| narrow | muon |", "Muon minus AdamW", "AttnKV", "Everything."]
    {
        assert!(page.page.contains(expected), "`{expected}` is not in\n{}", page.page);
    }
    assert!(!page.page.contains("Incomplete"));
    assert!(page.figures.iter().all(|(name, svg)| page.page.contains(name.as_str()) && svg.starts_with(b"<svg")));
    assert!(page.figures.len() >= 6, "{}", page.figures.len());
}

#[test]
fn an_interrupted_sweep_waits_for_its_runs_and_says_so() {
    let home = Home::new();
    let path = study(&home, &STUDY.replace("\"train.steps\" = 8", "\"train.steps\" = 100000"));
    let child = sweep(&home, &path, &[]).stderr(Stdio::piped()).spawn().unwrap();
    let runs = home.path("runs/studies/tiny");
    wait_for_a_step(&runs);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(rows(&home).is_empty());
    let checkpoint = fs::read_dir(&runs).unwrap().any(|run| run.unwrap().path().join("checkpoints").exists());
    assert!(checkpoint, "a run that was interrupted has a checkpoint");
}

/// Waits until one of the runs in a folder has taken a step.
fn wait_for_a_step(runs: &Path) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let has_stepped = |run: PathBuf| run.join("metrics.jsonl").metadata().is_ok_and(|file| file.len() > 0);
    while !fs::read_dir(runs).is_ok_and(|mut runs| runs.any(|run| run.is_ok_and(|run| has_stepped(run.path())))) {
        assert!(Instant::now() < deadline, "no run takes a step");
        sleep(Duration::from_millis(50));
    }
}

fn interrupt(child: &Child) {
    let process = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
}

#[test]
fn a_sweep_that_waits_for_the_run_of_another_process_can_be_interrupted() {
    let home = Home::new();
    let path = study(&home, &STUDY.replace("\"train.steps\" = 8", "\"train.steps\" = 100000"));
    let runs = Runs(home.path("studies"));
    let mut first = sweep(&home, &path, &[]).stderr(Stdio::null()).spawn().unwrap();
    wait_for_a_step(&home.path("runs/studies/tiny"));
    // Its runs continue.
    first.kill().unwrap();
    first.wait().unwrap();

    let mut second = sweep(&home, &path, &[]).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(second.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("is trained by another process")));
    interrupt(&second);
    let start = Instant::now();
    let rest: Vec<_> = log.collect();
    assert_eq!(second.wait().unwrap().code(), Some(130), "{rest:?}");
    let took = start.elapsed();

    assert!(runs.kill(), "the runs have ended, so nothing was waited for");
    assert!(took < Duration::from_secs(30), "{took:?}");
}

/// The runs of a folder's studies, which is among the arguments of their processes. They are killed when the test ends.
struct Runs(PathBuf);

impl Runs {
    /// Whether there was one to kill.
    fn kill(&self) -> bool {
        let pattern = format!("train .*{}", self.0.display());
        Command::new("pkill").args(["-KILL", "-f", &pattern]).status().unwrap().success()
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn a_sweep_ends_at_its_budget_and_starts_runs_by_a_launcher() {
    let home = Home::new();
    let path = study(&home, STUDY);
    for (budget, added) in [("0s", 0), ("9steps", 2), ("1flop", 1)] {
        let output = sweep(&home, &path, &["--budget", budget, "--launcher", "env MOONLIGHT=1"]).output().unwrap();
        let log = text(&output.stderr);
        assert!(output.status.success() && log.contains(&format!("added {added} runs; ")), "{budget}: {log}");
    }
    let output = sweep(&home, &path, &["--launcher", "no-such-program"]).output().unwrap();
    let log = text(&output.stderr);
    assert!(output.status.code() == Some(1) && log.contains("`no-such-program` cannot be started"), "{log}");
}

#[test]
fn a_study_starts_from_the_weights_of_another_and_trains_them_again_if_they_are_gone() {
    let home = Home::new();
    let base = study(&home, STUDY);
    assert!(sweep(&home, &base, &[]).output().unwrap().status.success());
    let tuned = home.path("studies/tuned.toml");
    let text_of_study = STUDY
        .replace(
            "{ name = \"narrow\" }",
            "{ name = \"narrow\", set = { \"model.path\" = \"{run:tiny/size=narrow,optimizer=muon}\" } }",
        )
        .replace(
            "{ name = \"wide\", set = { \"model.hidden_size\" = 32 } }",
            "{ name = \"wide\", set = { \"model.path\" = \"{run:tiny/size=wide,optimizer=adamw}\" } }",
        )
        .replace("recipe = \"../recipe.toml\"", "recipe = \"../tune.toml\"");
    fs::write(&tuned, &text_of_study).unwrap();
    // The recipe without the shape: that of the weights.
    let recipe = fs::read_to_string(home.path("recipe.toml")).unwrap();
    let (before, rest) = recipe.split_once("[model]").unwrap();
    let (_, after) = rest.split_once("[data]").unwrap();
    fs::write(home.path("tune.toml"), format!("{before}[model]\npath = \"x\"\n[data]{after}")).unwrap();

    fs::remove_dir_all(home.path("runs/studies/tiny")).unwrap();
    let output = sweep(&home, &tuned, &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let log = text(&output.stderr);
    assert!(log.contains("is trained again, for its weights"), "{log}");
    assert!(log.contains("the study is complete"), "{log}");
}

#[test]
fn a_study_that_cannot_be_read_names_the_place() {
    let home = Home::new();
    for (from, to, expected) in [
        ("seeds = [1, 2]", "seeds = []", "`seeds` is empty"),
        ("seeds = [1, 2]", "seed = [1, 2]", "unknown field `seed`"),
        ("budget = \"1h\"", "budget = \"1\"", "the unit must be h, m, s, flop or steps"),
        ("by = [\"optimizer\"]", "by = [\"optim\"]", "the axis `optim`"),
        ("name = \"wide\"", "name = \"narrow\"", "the value `narrow` twice"),
        ("recipe = \"../recipe.toml\"", "recipe = \"none.toml\"", "none.toml"),
        ("start = 2e-3", "start = 0.0", "`tune.start` must be above 0"),
    ] {
        let path = study(&home, &STUDY.replace(from, to));
        let output = sweep(&home, &path, &["--dry-run"]).output().unwrap();
        let stderr = text(&output.stderr);
        assert!(output.status.code() == Some(1) && stderr.contains(expected), "{expected}: {stderr}");
    }
    let path = study(&home, STUDY);
    let output = sweep(&home, &path, &["--tier", "huge"]).output().unwrap();
    assert!(text(&output.stderr).contains("choose one of: small"), "{}", text(&output.stderr));
}

/// The pages of the manual are what `moonlight report` makes of the committed tables. On other systems the last digit of a logarithm
/// may differ.
#[cfg(target_os = "linux")]
#[test]
fn the_pages_of_the_manual_are_those_of_the_tables() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let pages = root.join("docs/src/evidence/studies");
    let mut count = 0;
    for entry in fs::read_dir(root.join("configs/studies")).unwrap() {
        let path = entry.unwrap().path();
        // The base recipes of the studies are in the same folder.
        if !path.is_file() || !fs::read_to_string(&path).unwrap().contains("[[axes]]") {
            continue;
        }
        let study = Study::open(&path, "small").unwrap();
        let name = &study.name;
        let made = report(&study).unwrap();
        let hint = format!("moonlight report configs/studies/{name}.toml --output docs/src/evidence/studies");
        assert_eq!(fs::read_to_string(pages.join(name).with_extension("md")).unwrap(), made.page, "run `{hint}`");
        for (figure, svg) in made.figures {
            assert!(fs::read(pages.join(&figure)).is_ok_and(|bytes| bytes == svg), "{figure}: run `{hint}`");
        }
        count += 1;
    }
    assert!(count > 0);
}
