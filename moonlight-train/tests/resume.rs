//! Which checkpoint a run resumes from, when it refuses to, and which files it does not change.

#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use burn::train::Interrupter;
use common::{Home, Tuned, assert_fails, assert_same_checkpoint, checkpoint, checkpoints, moonlight, text};
use moonlight_infer::device::ComputeDevice;
use moonlight_train::recipe::Recipe;
use moonlight_train::trainer::{final_report, train};
use serde_json::Value;

const TOTAL: [&str; 2] = ["--set", "schedule.total_steps=12"];

/// A run of twelve steps with checkpoints after steps 8 and 12.
fn finished() -> (Home, PathBuf) {
    let home = Home::new();
    let run = home.trained("run", &TOTAL);
    (home, run)
}

fn resumed(home: &Home, sets: &[&str]) -> Output {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    home.train("run", &[&TOTAL[..], &["--resume"], &sets].concat()).output().unwrap()
}

fn assert_resumes(home: &Home, sets: &[&str], step: u64) -> String {
    let output = resumed(home, sets);
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains(&format!("resumed after step {step}\n")), "{stderr}");
    stderr
}

/// Every file of a run and its contents.
fn contents(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![run.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().unwrap() != "run.lock" {
                files.push((path.clone(), fs::read(path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn if_any_file_of_the_newest_checkpoint_is_damaged_the_one_before_is_used() {
    let (home, run) = finished();
    let pristine = contents(&run);
    let names: Vec<String> = fs::read_dir(checkpoint(&run, 12))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.len() >= 6, "{names:?}");
    for name in &names {
        for damage in ["gone", "cut", "bit"] {
            let path = checkpoint(&run, 12).join(name);
            let mut bytes = fs::read(&path).unwrap();
            match damage {
                "gone" => fs::remove_file(&path).unwrap(),
                "cut" => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
                _ => {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 1;
                    fs::write(&path, bytes).unwrap();
                }
            }
            let stderr = assert_resumes(&home, &[], 8);
            assert!(
                stderr.contains("step-00000012` is damaged: ") && stderr.contains(name),
                "{name} {damage}: {stderr}"
            );
            assert!(stderr.contains("renamed to `step-00000012.damaged`"), "{stderr}");
            // The resumed run wrote the same weights again, next to the damaged checkpoint.
            assert_eq!(checkpoints(&run), ["step-00000008", "step-00000012", "step-00000012.damaged"]);
            fs::remove_dir_all(run.join("checkpoints/step-00000012.damaged")).unwrap();
            let again = fs::read(checkpoint(&run, 12).join("model.safetensors")).unwrap();
            let (_, before) =
                pristine.iter().find(|(path, _)| path.ends_with("step-00000012/model.safetensors")).unwrap();
            assert!(again == *before, "{name} {damage}");
        }
    }
}

#[test]
fn rotation_does_not_count_damaged_checkpoints_and_keeps_the_one_resumed_from() {
    let (home, run) = finished();
    fs::write(checkpoint(&run, 12).join("model.safetensors"), "cut").unwrap();
    let sets = ["train.keep=1", "train.keep_best=false", "train.checkpoint_every=1", "train.steps=11"];
    assert_resumes(&home, &sets, 8);
    assert_eq!(checkpoints(&run), ["step-00000008", "step-00000011", "step-00000012.damaged"]);
    // A second damaged checkpoint of the same step gets another name.
    assert_resumes(&home, &["train.keep=1", "train.keep_best=false"], 11);
    assert_eq!(checkpoints(&run), ["step-00000011", "step-00000012", "step-00000012.damaged"]);
    fs::write(checkpoint(&run, 12).join("trainer.json"), "").unwrap();
    assert_resumes(&home, &["train.keep=1", "train.keep_best=false"], 11);
    let names = ["step-00000011", "step-00000012", "step-00000012.damaged", "step-00000012.damaged-2"];
    assert_eq!(checkpoints(&run), names);
}

#[test]
fn a_read_only_checkpoint_is_kept() {
    let (home, run) = finished();
    let protected = checkpoint(&run, 8);
    fs::set_permissions(&protected, fs::Permissions::from_mode(0o555)).unwrap();
    let sets = [
        "train.steps=16",
        "schedule.total_steps=16",
        "train.checkpoint_every=1",
        "train.keep=1",
        "train.keep_best=false",
    ];
    assert_resumes(&home, &sets, 12);
    assert_eq!(checkpoints(&run), ["step-00000008", "step-00000012", "step-00000016"]);
    fs::set_permissions(protected, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn if_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_changed() {
    let (home, run) = finished();
    for step in [8, 12] {
        fs::write(checkpoint(&run, step).join("trainer.json"), "").unwrap();
    }
    let before = contents(&run);
    let output = resumed(&home, &[]);
    assert_fails(&output, "no complete checkpoint to resume from");
    let stderr = text(&output.stderr);
    assert!(
        stderr.contains("step-00000008`: `trainer.json`") && stderr.contains("step-00000012`: `trainer.json`"),
        "{stderr}"
    );
    assert_eq!(contents(&run), before);
}

#[test]
fn a_checkpoint_of_a_newer_version_is_refused() {
    let (home, run) = finished();
    let path = checkpoint(&run, 12).join("trainer.json");
    let state = fs::read_to_string(&path).unwrap().replacen("\"version\": 2", "\"version\": 9", 1);
    fs::write(path, state).unwrap();
    let before = contents(&run);
    assert_fails(&resumed(&home, &[]), "was written by a newer version of this program");
    assert_eq!(contents(&run), before);
}

#[test]
fn the_checkpoint_of_another_run_is_refused_before_anything_is_written() {
    let (home, run) = finished();
    fs::write(home.path("other.txt"), "Other words, in another file, for the validation of the run.").unwrap();
    let other = format!("data.valid=[\"{}\"]", home.path("other.txt").display());
    let cases: &[(&[&str], &[&str])] = &[
        (&["model.hidden_size=48"], &["`model.hidden_size` is 48 and was 24"]),
        (
            &["model.num_hidden_layers=4", "model.vocab_size=300"],
            &["`model.num_hidden_layers` is 4 and was 2", "`model.vocab_size` is 300 and was 262"],
        ),
        (&["model.dtype=bf16"], &["the dtype of the weights is bf16 and was f32"]),
        (&["data.sequence_length=16"], &["`data.sequence_length` is 16 and was 32"]),
        (&["data.valid_fraction=0.4"], &["the training data is ", "the validation data is "]),
        (&[&other, "data.valid_fraction=0"], &["the validation data is "]),
        (&["data.shuffle=false"], &["`data.shuffle` is false and was true"]),
        (&["run.seed=8"], &["`run.seed` is 8 and was 7"]),
        (&["optimizer.name=adamw"], &["`optimizer.name` is \"adamw\" and was \"muon\""]),
        (&["train.freeze=[\"model.norm.*\"]"], &["`train.freeze` is [\"model.norm.*\"] and was []"]),
        (&["data.tokenizer=bytes-chat", "model.vocab_size=262"], &["the tokenizer is `bytes-chat` and was `bytes`"]),
    ];
    let before = contents(&run);
    for (sets, expected) in cases {
        let output = resumed(&home, sets);
        assert_fails(&output, "is a checkpoint of another run");
        for expected in *expected {
            assert!(text(&output.stderr).contains(expected), "{sets:?}: {}", text(&output.stderr));
        }
        assert!(contents(&run) == before, "{sets:?}: something was written");
    }
}

#[test]
fn changes_that_are_allowed_are_logged() {
    let (home, _run) = finished();
    let moved = format!("data.train=[\"{}/te?t/*.txt\"]", home.path("").display());
    let sets = [
        "train.steps=14",
        "train.batch_size=4",
        "train.gradient_accumulation=1",
        "train.checkpoint_every=1",
        "train.validate_every=3",
        "train.keep=1",
        "optimizer.learning_rate=1e-3",
        "distributed.devices=2",
        "schedule.total_steps=14",
        &moved,
    ];
    let stderr = assert_resumes(&home, &sets, 12);
    for said in [
        "changed since the checkpoint: `optimizer.learning_rate` is 0.001 and was 0.002",
        "changed since the checkpoint: `train.steps` is 14 and was 12",
        "changed since the checkpoint: `train.batch_size` is 4 and was 2",
    ] {
        assert!(stderr.contains(said), "{said}: {stderr}");
    }
    assert!(!stderr.contains("checkpoint_every") && !stderr.contains("data.train` is"), "{stderr}");
}

#[test]
fn adapters_do_not_resume_on_another_base() {
    let tuned = Tuned::new();
    let run_of_base = tuned.home.run("base");
    // The base is named by a run's folder, whose newest checkpoint changes.
    let path = format!("model.path={run_of_base:?}");
    let sets = ["--set", &path, "--set", "train.steps=4", "--set", "schedule.total_steps=8"];
    tuned.home.trained("lora", &sets);
    let adapter = tuned.home.run("lora");
    let recipe = run_of_base.join("recipe.toml");
    let mut more = moonlight(&["train"]);
    let more = more.arg(recipe).args(["--resume", "--set", "train.steps=9"]).output().unwrap();
    assert!(more.status.success(), "{}", text(&more.stderr));
    let before = contents(&adapter);
    let resume = ["--set", &path, "--set", "schedule.total_steps=8", "--resume"];
    let output = tuned.train("lora", &[&resume[..], &["--set", "train.steps=8"]].concat());
    assert_fails(&output, "the base model is ");
    let stderr = text(&output.stderr);
    assert!(
        stderr.contains("base/checkpoints/step-00000009`") && stderr.contains("base/checkpoints/step-00000006`"),
        "{stderr}"
    );
    assert_eq!(contents(&adapter), before);
    // With its original base the run resumes, even from another folder.
    let copy = tuned.home.path("copy");
    fs::create_dir(&copy).unwrap();
    for file in fs::read_dir(checkpoint(&run_of_base, 6)).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
    }
    let path = format!("model.path={copy:?}");
    let resume = ["--set", &path, "--set", "schedule.total_steps=8", "--set", "train.steps=8", "--resume"];
    let output = tuned.train("lora", &resume);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn of_two_runs_in_one_folder_one_is_refused() {
    let home = Home::new();
    let often = ["--set", "train.steps=60", "--set", "train.checkpoint_every=5"];
    for round in 0..6 {
        let name = format!("both-{round}");
        // Later rounds resume the existing run.
        let resume: &[&str] = if round % 2 == 1 { &["--resume"] } else { &[] };
        let arguments = [&often[..], resume].concat();
        let children: Vec<_> = (0..2).map(|_| home.train(&name, &arguments).spawn().unwrap()).collect();
        let outputs: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        let won = outputs.iter().filter(|output| output.status.success()).count();
        let stderr: Vec<String> = outputs.iter().map(|output| text(&output.stderr)).collect();
        // A process that starts after the other has ended resumes with no step left, or finds that the run exists.
        let refused = stderr
            .iter()
            .filter(|stderr| stderr.contains("is in use by process ") || stderr.contains("exists"))
            .count();
        assert!(won >= 1 && won + refused == 2, "round {round}: {stderr:?}");
        assert_eq!(common::metrics(&home.run(&name)).iter().filter(|line| line["split"] == "train").count(), 60);
        assert_eq!(checkpoints(&home.run(&name)).last().unwrap(), "step-00000060");
    }
}

#[test]
fn a_run_that_is_refused_leaves_no_folder() {
    let home = Home::new();
    let output = home.train("refused", &["--set", "data.train=[\"/nowhere/*.txt\"]"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(!home.run("refused").exists());
    home.trained("refused", &["--set", "train.steps=1"]);
}

#[test]
fn readers_during_a_run_change_nothing_and_read_complete_checkpoints() {
    let home = Home::new();
    let run = home.run("run");
    let often = ["--set", "train.steps=300", "--set", "train.checkpoint_every=2", "--set", "train.validate_every=0"];
    let mut child = home.train("run", &often).spawn().unwrap();
    while checkpoints(&run).iter().all(|name| name.starts_with('.')) {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let mut readings = 0;
    while child.try_wait().unwrap().is_none() {
        let path = run.display().to_string();
        for arguments in [
            &["plan", "--model", &path][..],
            &["generate", "--model", &path, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"],
        ] {
            let output = moonlight(arguments).output().unwrap();
            assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
            readings += 1;
        }
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(readings >= 2, "{readings}");
    println!("{readings} readings");
}

#[test]
fn an_interrupted_replacement_of_a_checkpoint_is_finished() {
    let (home, run) = finished();
    let checkpoints = run.join("checkpoints");
    let (newest, hidden) = (checkpoint(&run, 12), |state: &str| checkpoints.join(format!(".step-00000012.{state}")));
    fs::create_dir(hidden("old")).unwrap();
    fs::write(hidden("old").join("config.json"), "old").unwrap();
    fs::rename(&newest, hidden("new")).unwrap();
    fs::write(checkpoints.join(".step-notes"), "mine").unwrap();
    let path = run.display().to_string();
    // A reader uses the previous checkpoint, and changes nothing.
    let generate = ["generate", "--model", &path, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"];
    let before = contents(&run);
    assert!(moonlight(&generate).output().unwrap().status.success());
    assert_eq!(contents(&run), before);
    assert_resumes(&home, &[], 12);
    assert_eq!(common::checkpoints(&run), [".step-notes", "step-00000008", "step-00000012"]);
}

#[test]
fn a_non_finite_validation_loss_is_never_the_best() {
    let home = Home::new();
    let sets = [
        "train.steps=2",
        "train.validate_every=1",
        "train.checkpoint_every=1",
        "optimizer.learning_rate=1e16",
        "optimizer.weight_decay=0",
        "schedule.name=constant",
        "schedule.warmup_steps=0",
    ];
    let arguments: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    assert_fails(&home.train("run", &arguments).output().unwrap(), "step 2: the loss is NaN");
    let state: Value =
        serde_json::from_slice(&fs::read(checkpoint(&home.run("run"), 1).join("trainer.json")).unwrap()).unwrap();
    assert_eq!(state["best"], Value::Null);
    let output = home.train("run", &[&arguments[..], &["--resume"]].concat()).output().unwrap();
    assert!(text(&output.stderr).contains("resumed after step 1"), "{}", text(&output.stderr));
}

#[test]
fn a_model_whose_files_are_read_only_is_fine_tuned() {
    let tuned = Tuned::new();
    for file in fs::read_dir(&tuned.base).unwrap().map(|entry| entry.unwrap().path()) {
        fs::set_permissions(file, fs::Permissions::from_mode(0o444)).unwrap();
    }
    let recipe = fs::read_to_string(tuned.home.path("recipe.toml")).unwrap();
    let (head, rest) = recipe.split_once("[lora]").unwrap();
    let (_, rest) = rest.split_once("[data]").unwrap();
    fs::write(tuned.home.path("full.toml"), format!("{head}[data]{rest}")).unwrap();
    tuned.home.trained("lora", &["--set", "train.steps=4"]);
    let mut full = moonlight(&["train"]);
    let full = full.arg(tuned.home.path("full.toml")).args(["--set", "run.name=full", "--set", "train.steps=4"]);
    let output = full.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    for run in ["lora", "full"] {
        for file in fs::read_dir(checkpoint(&tuned.home.run(run), 4)).unwrap().map(|entry| entry.unwrap()) {
            // Root may write to read-only files, so the test checks the mode.
            let mode = file.metadata().unwrap().permissions().mode();
            assert!(mode & 0o200 != 0, "{run}: {:?} has the mode {mode:o}", file.file_name());
        }
    }
}

#[test]
fn the_final_report_does_not_need_the_data_files() {
    let home = Home::new();
    let sets = ["run.name=run".to_owned(), "train.steps=2".into(), "run.device=cpu".into(), "train.plots=true".into()];
    let recipe = Recipe::load(&home.path("recipe.toml"), &sets).unwrap();
    let outcome = train(&recipe, &ComputeDevice::open("cpu").unwrap(), false, &Interrupter::new()).unwrap();
    fs::remove_dir_all(home.path("text")).unwrap();
    fs::remove_dir_all(home.path("cache")).unwrap();
    final_report(&recipe, outcome).unwrap();
    assert!(home.run("run").join("plots").is_dir());
}

#[test]
fn a_resumed_run_repeats_the_run_bit_for_bit() {
    let (home, run) = finished();
    home.trained("half", &[&TOTAL[..], &["--set", "train.steps=6"]].concat());
    home.trained("half", &[&TOTAL[..], &["--resume"]].concat());
    assert_same_checkpoint(&checkpoint(&run, 12), &checkpoint(&home.run("half"), 12));
}
