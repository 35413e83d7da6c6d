//! `moonlight train`, from the first step to the last.

mod common;

use std::fs;

use common::{
    Home, assert_ends_at_non_finite_loss, assert_fails, assert_same_checkpoint, checkpoint, checkpoints, metrics,
    moonlight, text,
};
use serde_json::Value;

#[test]
fn a_run_writes_its_documented_files() {
    let home = Home::new();
    let run = home.trained("whole", &["--set", "train.plots=true", "--set", "train.tensorboard=true"]);
    let metrics = metrics(&run);
    let of = |split: &str| metrics.iter().filter(|line| line["split"] == split).collect::<Vec<_>>();
    let (train, valid) = (of("train"), of("valid"));
    assert_eq!(train.len(), 12);
    assert_eq!(valid.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [6, 12]);
    for key in ["step", "tokens", "loss", "perplexity", "lr", "grad_norm", "expert_imbalance", "dead_experts"] {
        assert!(train.iter().all(|line| line[key].is_number()), "{key}");
    }
    assert!(train[4]["max_attention_logit"].is_number() && train[4]["update_rms_muon"].is_number());
    assert!(train[3]["max_attention_logit"].is_null());
    // New weights are no better than chance (ln 262 = 5.57); a dozen steps improve them.
    assert!((train[0]["loss"].as_f64().unwrap() - 5.57).abs() < 0.3);
    assert!(valid[1]["loss"].as_f64().unwrap() < train[0]["loss"].as_f64().unwrap());
    // Every step reads two micro-batches of two sequences of 32 tokens with little padding.
    let (tokens, room) = (train[11]["tokens"].as_u64().unwrap(), 12 * 2 * 2 * 32);
    assert!(tokens <= room && tokens > room * 9 / 10, "{tokens} of {room}");
    // The two newest are kept; the best is the last one here.
    assert_eq!(checkpoints(&run), ["step-00000008", "step-00000012"]);
    for file in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "optimizer-00000-of-00001.bpk"]
    {
        assert!(checkpoint(&run, 12).join(file).exists(), "{file}");
    }
    let plots: Vec<_> = fs::read_dir(run.join("plots")).unwrap().collect();
    assert!(plots.len() >= 4, "{plots:?}");
    assert!(fs::read_dir(run.join("tensorboard")).unwrap().count() == 1);
    // The resolved recipe is a recipe with the same meaning.
    let resolved = fs::read_to_string(run.join("recipe.toml")).unwrap();
    let again = moonlight_train::recipe::Recipe::load(&run.join("recipe.toml"), &[]).unwrap();
    assert_eq!(again.to_toml(), resolved);
}

#[test]
fn the_same_recipe_gives_the_same_run() {
    let home = Home::new();
    let (a, b) = (home.trained("a", &[]), home.trained("b", &[]));
    assert_eq!(metrics(&a), metrics(&b));
    assert_same_checkpoint(&checkpoint(&a, 12), &checkpoint(&b, 12));
}

#[test]
fn an_interrupted_run_resumes_bit_for_bit() {
    let home = Home::new();
    let whole = home.trained("whole", &[]);
    // The schedule of the first part must be that of the whole run.
    let schedule = ["--set", "schedule.total_steps=12"];
    let parts = home.trained("parts", &[&schedule[..], &["--set", "train.steps=5"]].concat());
    // Lines that a killed run wrote after its last checkpoint, the last one in part.
    let path = parts.join("metrics.jsonl");
    let mut lines = fs::read_to_string(&path).unwrap();
    lines.push_str("{\"split\":\"train\",\"step\":6,\"loss\":99.0}\n{\"split\":\"tr");
    fs::write(&path, lines).unwrap();
    home.trained("parts", &["--resume"]);
    assert_same_checkpoint(&checkpoint(&whole, 12), &checkpoint(&parts, 12));
    let trained = |run| metrics(run).into_iter().filter(|line: &Value| line["split"] == "train").collect::<Vec<_>>();
    assert_eq!(trained(&whole), trained(&parts));
}

#[test]
fn epochs_determine_the_number_of_steps() {
    let home = Home::new();
    let recipe = fs::read_to_string(home.path("recipe.toml")).unwrap();
    fs::write(home.path("recipe.toml"), recipe.replace("steps = 12\n", "epochs = 1.5\n")).unwrap();
    let set = ["--set", "data.max_bytes=2000"];
    let output = home.train("epochs", &set).output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let run = home.run("epochs");
    let sequences: f64 = stderr.split(" sequences").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    let steps = (1.5 * sequences / 4.0).ceil() as u64;
    assert!(stderr.contains(&format!("steps: {steps} for 1.5 epochs")), "{stderr}");
    let recipe = moonlight_train::recipe::Recipe::load(&run.join("recipe.toml"), &[]).unwrap();
    assert_eq!((recipe.train.steps, recipe.train.epochs), (steps, 1.5));
    // The schedule ends with the run.
    let lines = metrics(&run);
    let last = lines.iter().rfind(|line| line["split"] == "train").unwrap();
    assert_eq!((last["step"].as_u64(), last["lr"].as_f64()), (Some(steps), Some(0.0)));
    assert!(checkpoint(&run, steps).exists());
    let sets = [&set[..], &["--set", "train.steps=3"]].concat();
    let expected = format!("`train.steps` is 3, but `train.epochs = 1.5` is {steps} steps with these data");
    assert_fails(&home.train("both", &sets).output().unwrap(), &expected);
    assert!(!home.run("both").exists());
}

#[test]
fn resume_without_a_checkpoint_starts_from_the_beginning() {
    let home = Home::new();
    let fresh = home.trained("fresh", &["--resume"]);
    assert_eq!(metrics(&fresh).len(), 14);
}

#[test]
fn an_existing_run_is_not_overwritten() {
    let home = Home::new();
    home.trained("there", &["--set", "train.steps=1"]);
    let output = home.train("there", &[]).output().unwrap();
    assert_fails(&output, "exists");
    assert!(text(&output.stderr).contains("hint: resume with `--resume`"));
}

#[test]
fn a_non_finite_loss_ends_the_run_with_an_error_that_names_the_step() {
    assert_ends_at_non_finite_loss(&[]);
}

#[test]
fn qk_clip_bounds_the_attention_logits() {
    let home = Home::new();
    let logits = |name: &str, clip: f64| -> Vec<f64> {
        let clip = format!("optimizer.qk_clip={clip}");
        let run = home.trained(name, &["--set", "train.probe_every=1", "--set", &clip]);
        let train = metrics(&run).into_iter().filter(|line| line["split"] == "train");
        train.map(|line| line["max_attention_logit"].as_f64().unwrap()).collect()
    };
    let free = logits("free", 0.0);
    // The logits of the first step are not clipped yet; those of the last one were clipped eleven times.
    let threshold = free[0] / 4.0;
    let clipped = logits("clipped", threshold);
    assert_eq!(clipped[0], free[0]);
    assert!(clipped[11] < free[11] / 2.0, "{clipped:?}, {free:?}");
    assert_eq!(logits("high", 1e6), free);
}

#[test]
fn the_best_checkpoint_is_kept() {
    let home = Home::new();
    // A learning rate that ruins the model after a good start, so that the first validation is the best.
    let run = home.trained(
        "best",
        &["--set", "train.keep=1", "--set", "train.validate_every=2", "--set", "train.checkpoint_every=2"],
    );
    let best = metrics(&run)
        .into_iter()
        .filter(|line| line["split"] == "valid")
        .min_by(|a, b| a["loss"].as_f64().unwrap().total_cmp(&b["loss"].as_f64().unwrap()))
        .unwrap()["step"]
        .as_u64()
        .unwrap();
    let mut expected = vec![format!("step-{best:08}"), "step-00000012".to_owned()];
    expected.dedup();
    assert_eq!(checkpoints(&run), expected);
}

#[test]
fn a_checkpoint_generates_and_scores() {
    let home = Home::new();
    let run = home.trained("speaker", &[]);
    let model = run.display().to_string();
    let generate = |arguments: &[&str]| {
        let output = moonlight(&["generate", "--model", &model, "--max-new-tokens", "8"]).args(arguments).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let json: Value = serde_json::from_str(&generate(&["--prompt", "File", "--json"])).unwrap();
    assert_eq!(json["prompt_tokens"], serde_json::json!([70, 105, 108, 101]));
    let tokens = json["tokens"].as_array().unwrap();
    assert!(tokens.len() == 8 && json["stop"] == "length" || json["stop"] == "eos", "{json}");
    // The same continuation as text and from tokens.
    assert_eq!(generate(&["--prompt", "File"]).trim_end_matches('\n'), json["text"].as_str().unwrap());
    let from_tokens: Value = serde_json::from_str(&generate(&["--prompt-tokens", "70,105,108,101", "--json"])).unwrap();
    assert_eq!(from_tokens, json);
    let drawn = |seed: &str| generate(&["--prompt", "File", "--temperature", "1.5", "--seed", seed, "--json"]);
    assert_eq!(drawn("3"), drawn("3"));
    // A batch of prompts gives the same as each of them alone.
    let prompts = home.path("prompts.jsonl");
    fs::write(&prompts, "{\"text\": \"File\"}\n{\"tokens\": [70]}\n{\"text\": \"A line\"}\n").unwrap();
    let texts = home.path("texts.jsonl");
    let many = [prompts.to_str().unwrap(), texts.to_str().unwrap()];
    generate(&["--prompts", many[0], "--output", many[1], "--batch", "2", "--temperature", "1.5", "--seed", "3"]);
    let texts = fs::read_to_string(&texts).unwrap();
    let texts: Vec<&str> = texts.lines().collect();
    assert_eq!((texts.len(), texts[0]), (3, drawn("3").trim_end()));
    let alone = generate(&["--prompt", "A line", "--temperature", "1.5", "--seed", "5", "--json"]);
    assert_eq!(texts[2], alone.trim_end());

    let data = home.path("data.jsonl");
    fs::write(&data, "{\"tokens\": [70, 105, 108]}\n\n{\"text\": \"File\"}\n{\"tokens\": []}\n").unwrap();
    let output = moonlight(&["score", "--model", &model, "--data"]).arg(&data).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[1]["tokens"], serde_json::json!([70, 105, 108, 101]));
    let logprobs = |line: &Value| line["logprobs"].as_array().unwrap().clone();
    assert!(logprobs(&lines[0])[0].is_null() && logprobs(&lines[0])[1].as_f64().unwrap() < 0.0);
    assert_eq!(logprobs(&lines[0])[1..], logprobs(&lines[1])[1..3]);
    assert_eq!(logprobs(&lines[2]).len(), 0);
}
