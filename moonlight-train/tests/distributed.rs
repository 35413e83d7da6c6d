//! `moonlight train` with several ranks in one process.

mod common;

use std::fs;
use std::path::Path;

use common::{Home, assert_ends_at_non_finite_loss, assert_fails, checkpoint, metrics, moonlight, text};
use moonlight_convert::Checkpoint;

/// Arguments for steps of `micro_batches` micro-batches of `sequences` sequences.
fn step(micro_batches: usize, sequences: usize) -> Vec<String> {
    let sets = [format!("train.batch_size={sequences}"), format!("train.gradient_accumulation={micro_batches}")];
    sets.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect()
}

fn with(arguments: &[String], more: &[&str]) -> Vec<String> {
    let more = more.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]);
    arguments.iter().cloned().chain(more).collect()
}

fn trained(home: &Home, name: &str, arguments: &[String]) -> std::path::PathBuf {
    home.trained(name, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The largest difference of two runs' losses, and of their last weights relative to the largest element of each tensor.
fn differences(one: &Path, other: &Path, last: u64) -> (f64, f64) {
    let losses = |run: &Path| {
        let metrics = metrics(run);
        let train = metrics.iter().filter(|line| line["split"] == "train");
        train.map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let (left, right) = (losses(one), losses(other));
    assert_eq!(left.len(), right.len());
    let loss = left.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let (one, other) = (checkpoint(one, last), checkpoint(other, last));
    let (one, other) = (Checkpoint::open(&one).unwrap(), Checkpoint::open(&other).unwrap());
    let values = |bytes: &[u8]| {
        bytes.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect::<Vec<f64>>()
    };
    let mut weights = 0.0;
    for ((name, a), (other_name, b)) in one.tensors().zip(other.tensors()) {
        assert_eq!(name, other_name);
        let (a, b) = (values(&one.data(a).unwrap()), values(&other.data(b).unwrap()));
        let largest = a.iter().fold(1e-30, |largest, value| f64::max(largest, value.abs()));
        let far = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        weights = f64::max(weights, far / largest);
    }
    (loss, weights)
}

#[test]
fn ranks_with_one_micro_batch_each_equal_one_rank_that_accumulates_bit_for_bit() {
    let home = Home::new();
    for ranks in [2, 3, 4] {
        let step = step(ranks, 2);
        let alone = trained(&home, &format!("alone-{ranks}"), &step);
        let devices = format!("distributed.devices={ranks}");
        let together = trained(&home, &format!("together-{ranks}"), &with(&step, &[&devices]));
        assert_same_metrics(&alone, &together);
        assert_same_weights(&alone, &together, 12);
        // Algorithm 1 rounds the momentum that it gathers, with any world size.
        let flat = ["distributed.form=\"flat\"", devices.as_str()];
        let flat_alone = trained(&home, &format!("flat-1-{ranks}"), &with(&step, &flat[..1]));
        let flat_together = trained(&home, &format!("flat-{ranks}"), &with(&step, &flat));
        assert_same_metrics(&flat_alone, &flat_together);
        assert_same_weights(&flat_alone, &flat_together, 12);
        assert!(differences(&flat_alone, &alone, 12).1 > 0.0);
        let exact = trained(
            &home,
            &format!("exact-{ranks}"),
            &with(&step, &[flat[0], flat[1], "distributed.gather_dtype=\"f32\""]),
        );
        let (loss, weights) = differences(&exact, &alone, 12);
        assert!(loss < 1e-5 && weights < 1e-4, "{ranks} ranks: {loss}, {weights}");
    }
}

/// Asserts that all metrics are equal, except for the last digits of the gradient norm, which is summed in f64.
fn assert_same_metrics(one: &Path, other: &Path) {
    let (mut one, mut other) = (metrics(one), metrics(other));
    assert_eq!(one.len(), other.len());
    for (one, other) in one.iter_mut().zip(&mut other) {
        let norm = |line: &mut serde_json::Value| line.as_object_mut().unwrap().remove("grad_norm");
        if let (Some(one), Some(other)) = (norm(one), norm(other)) {
            let (one, other) = (one.as_f64().unwrap(), other.as_f64().unwrap());
            assert!((one / other - 1.0).abs() < 1e-12, "{one} and {other}");
        }
        assert_eq!(one, other);
    }
}

/// Asserts that all weights are equal bit for bit.
fn assert_same_weights(one: &Path, other: &Path, step: u64) {
    let (one, other) = (checkpoint(one, step), checkpoint(other, step));
    let (one, other) = (Checkpoint::open(&one).unwrap(), Checkpoint::open(&other).unwrap());
    for ((name, a), (other_name, b)) in one.tensors().zip(other.tensors()) {
        assert!(name == other_name && one.data(a).unwrap() == other.data(b).unwrap(), "{name} differs");
    }
}

#[test]
fn qk_clip_validation_and_other_parts_of_a_step_work_with_several_ranks() {
    let home = Home::new();
    let step = step(3, 1);
    let ways: [&[&str]; 3] = [
        &["train.activation_checkpointing=\"block\"", "train.loss_chunk_tokens=20"],
        // Every step clips, by the largest logit over all ranks.
        &["optimizer.qk_clip=0.02", "train.probe_every=1"],
        &["train.freeze=[\"model.layers.0.**\"]", "optimizer.name=\"adamw\""],
    ];
    for (way, sets) in ways.into_iter().enumerate() {
        let step = with(&step, sets);
        let alone = trained(&home, &format!("alone-{way}"), &step);
        let together = trained(&home, &format!("together-{way}"), &with(&step, &["distributed.devices=3"]));
        assert_same_metrics(&alone, &together);
        assert_same_weights(&alone, &together, 12);
    }
}

#[test]
fn ranks_with_uneven_shares_follow_one_rank() {
    let home = Home::new();
    let step = step(2, 5);
    let alone = trained(&home, "alone", &step);
    for ranks in [3, 4] {
        let devices = format!("distributed.devices={ranks}");
        let together = trained(&home, &format!("uneven-{ranks}"), &with(&step, &[&devices]));
        let (loss, weights) = differences(&alone, &together, 12);
        println!("{ranks} ranks: losses within {loss:.1e}, weights within {weights:.1e}");
        assert!(loss < 1e-5 && weights < 1e-3, "{ranks} ranks: {loss}, {weights}");
        let tokens = |run: &Path| metrics(run).iter().map(|line| line["tokens"].clone()).collect::<Vec<_>>();
        assert_eq!(tokens(&alone), tokens(&together));
    }
}

#[test]
fn a_checkpoint_of_four_ranks_resumes_with_any_world_size() {
    let home = Home::new();
    let step = step(4, 1);
    let schedule = with(&step, &["schedule.total_steps=12", "train.keep=0"]);
    for form in ["whole-matrix", "flat"] {
        let four = with(&schedule, &["distributed.devices=4", &format!("distributed.form=\"{form}\"")]);
        let whole = trained(&home, &format!("{form}-whole"), &four);
        let files = fs::read_dir(checkpoint(&whole, 12)).unwrap().map(|entry| entry.unwrap().file_name());
        let parts = files.filter(|name| name.to_string_lossy().starts_with("optimizer-")).count();
        assert_eq!(parts, 4);
        for ranks in [1, 2, 3] {
            let name = format!("{form}-{ranks}");
            trained(&home, &name, &with(&four, &["train.steps=8"]));
            let devices = format!("distributed.devices={ranks}");
            let mut rest = with(&schedule, &[&devices, &format!("distributed.form=\"{form}\"")]);
            rest.push("--resume".into());
            let run = trained(&home, &name, &rest);
            // Weights and state are equal; later steps sum the micro-batches in another order.
            assert_same_weights(&whole, &run, 8);
            let (loss, weights) = differences(&whole, &run, 12);
            assert!(loss < 1e-5 && weights < 1e-3, "{form} {ranks}: {loss}, {weights}");
        }
    }
    // A run without `[distributed]` resumes from a checkpoint of several ranks, and several ranks from one of such a run.
    let alone = trained(&home, "alone", &schedule);
    let plain = with(&schedule, &["train.steps=8"]);
    trained(&home, "to-alone", &with(&plain, &["distributed.devices=4"]));
    let mut rest = schedule.clone();
    rest.push("--resume".into());
    let run = trained(&home, "to-alone", &rest);
    assert_eq!(metrics(&alone).iter().filter(|line| line["split"] == "train").count(), 12);
    assert_same_weights(&alone, &run, 12);
    trained(&home, "from-alone", &plain);
    let mut rest = with(&schedule, &["distributed.devices=4"]);
    rest.push("--resume".into());
    assert_same_weights(&alone, &trained(&home, "from-alone", &rest), 12);
}

#[test]
fn a_missing_part_is_a_warning_and_the_checkpoint_before_is_used() {
    let home = Home::new();
    let four = with(&step(4, 1), &["distributed.devices=4"]);
    let run = trained(&home, "torn", &four);
    fs::remove_file(checkpoint(&run, 12).join("optimizer-00002-of-00004.bpk")).unwrap();
    let mut arguments = with(&four, &["train.steps=13"]);
    arguments.push("--resume".into());
    let output = home.train("torn", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("is damaged: `optimizer-00002-of-00004.bpk` is missing"), "{stderr}");
    assert!(stderr.contains("resumed after step 8"), "{stderr}");
}

#[test]
fn a_distributed_run_logs_what_it_sent_and_held() {
    let home = Home::new();
    let ratio_of = |form: &str| {
        let form = format!("distributed.form=\"{form}\"");
        let arguments = with(&step(4, 1), &["distributed.devices=4", &form]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = home.train(&form.replace(['"', '='], "-"), &arguments).output().unwrap();
        let stderr = text(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let after = |start: &str| {
            let line = stderr.lines().find(|line| line.starts_with(start));
            line.unwrap_or_else(|| panic!("no `{start}` in {stderr}"))[start.len()..].trim().to_owned()
        };
        let sent = after("sent by a rank in a step:");
        let sent = sent.split(", numbers").next().unwrap().to_owned();
        assert_eq!(sent, after("predicted from the shapes:"));
        let ratio = after("over a sharded AdamW:");
        ratio.split(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(ratio_of("whole-matrix"), 1.0);
    let flat = ratio_of("flat");
    assert!(flat > 1.0 && flat <= 1.25, "{flat}");
}

#[test]
fn a_non_finite_loss_ends_all_ranks_with_one_error() {
    assert_ends_at_non_finite_loss(&["--set", "distributed.devices=3"]);
}

#[test]
fn a_rank_without_a_sequence_is_refused() {
    let home = Home::new();
    let output = home.train("many", &["--set", "distributed.devices=9"]).output().unwrap();
    assert_fails(&output, "there are 9 ranks, but a step has only 4 sequences");
}

#[test]
fn a_plan_predicts_what_a_run_on_many_devices_needs() {
    let home = Home::new();
    let recipe = home.path("recipe.toml").display().to_string();
    let output = moonlight(&["plan", &recipe, "--gpus", "4", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |list: &str, name: &str| {
        let list = plan["scale"][list].as_array().unwrap();
        list.iter().find(|item| item["name"] == name).unwrap()["value"].as_f64().unwrap()
    };
    // All parameters except the bias of the one router, in f32.
    let trained = plan["parameters"]["total"].as_f64().unwrap() - 6.0;
    assert_eq!(of("memory", "weights"), 4.0 * trained);
    // A run on four ranks counts the same.
    assert_eq!(of("sent", "gradients"), 3.0 * trained);
    let run = with(&step(4, 1), &["distributed.devices=4"]);
    let output = home.train("counted", &run.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
    let expected = format!("gradients {:.3} MB", 3.0 * trained / 1e6);
    assert!(text(&output.stderr).contains(&expected), "{expected}: {}", text(&output.stderr));
    let output = moonlight(&["plan", &recipe, "--gpus", "4"]).output().unwrap();
    assert!(text(&output.stdout).contains("on 4 GPUs, a rank each"));
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_is_an_error_under_a_launcher() {
    let home = Home::new();
    let output = home.train("launched", &[]).env("OMPI_COMM_WORLD_SIZE", "4").output().unwrap();
    assert_fails(&output, "this build has no MPI");
    assert!(text(&output.stderr).contains("--features mpi"));
}
