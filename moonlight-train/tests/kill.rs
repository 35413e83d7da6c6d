//! Killing and interrupting `moonlight train`.

#![cfg(unix)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use common::{Home, Tuned, assert_same_adapter, assert_same_checkpoint, checkpoint, checkpoints, text};
use moonlight_convert::adapter::read_adapter;
use moonlight_convert::{Checkpoint, load};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: &str = "train.steps=150";
const LAST: u64 = 150;
const OFTEN: &[&str] = &["--set", STEPS, "--set", "train.checkpoint_every=3", "--set", "train.validate_every=50"];

/// Starts the run `killed` and kills it at a random moment, `kills` times, and then lets it end. `whole_run` is its duration
/// without kills; `open` reads a checkpoint and panics if it is damaged.
fn killed(home: &Home, arguments: &[&str], kills: usize, whole_run: Duration, open: impl Fn(&Path)) -> PathBuf {
    let start = || {
        let mut command = home.train("killed", arguments);
        command.arg("--resume").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut random = ChaCha8Rng::seed_from_u64(whole_run.subsec_nanos().into());
    let run = home.run("killed");
    let mut progress = Vec::new();
    while progress.len() < kills {
        let mut child = start();
        // Long enough to start and take some steps, short enough not to reach the end.
        sleep(whole_run.mul_f64(random.random_range(0.01..5.0 / kills as f64)));
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none_or(|status| status.success()), "it did not resume: {ended:?}");
        if ended.is_some() {
            // The run ended before it was killed: start again from the beginning.
            std::fs::remove_dir_all(&run).unwrap();
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // Every checkpoint with the name of a step is complete.
        let names = checkpoints(&run);
        for name in names.iter().filter(|name| name.starts_with("step-")) {
            open(&run.join("checkpoints").join(name));
        }
        progress.push(names.last().cloned().unwrap_or_else(|| "none".into()));
    }
    println!("newest checkpoint after each kill: {progress:?}");
    assert!(start().wait().unwrap().success());
    assert!(checkpoints(&run).iter().all(|name| name.starts_with("step-")), "leftovers: {:?}", checkpoints(&run));
    run
}

#[test]
fn a_run_killed_at_twenty_random_moments_always_resumes() {
    let home = Home::new();
    let started = Instant::now();
    let whole = home.trained("whole", OFTEN);
    let device = Device::default();
    let run = killed(&home, OFTEN, 20, started.elapsed(), |checkpoint| {
        load(checkpoint, &device, None).unwrap();
    });
    assert_same_checkpoint(&checkpoint(&whole, LAST), &checkpoint(&run, LAST));
}

#[test]
fn a_run_of_adapters_killed_at_random_moments_always_resumes() {
    for base in ["model.quantize=none", "model.quantize=int4"] {
        let Tuned { home, base: path } = Tuned::new();
        let files = files(&path);
        let arguments = [OFTEN, &["--set", base, "--set", "lora.dropout=0.1"]].concat();
        let started = Instant::now();
        let whole = home.trained("whole", &arguments);
        let config = Checkpoint::open(&path).unwrap().config().clone();
        let run = killed(&home, &arguments, 10, started.elapsed(), |checkpoint| {
            assert!(!read_adapter(&config, checkpoint).unwrap().is_empty());
        });
        assert_same_adapter(&checkpoint(&whole, LAST), &checkpoint(&run, LAST));
        // The base model is unchanged.
        assert!(self::files(&path) == files, "{base}");
    }
}

/// The files of a folder with their bytes.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn ctrl_c_writes_a_checkpoint_from_which_the_run_resumes() {
    let home = Home::new();
    let whole = home.trained("whole", OFTEN);
    let child = home
        .train("stopped", &["--set", STEPS, "--set", "train.checkpoint_every=0", "--set", "train.validate_every=50"]);
    let mut child = { child }.stderr(Stdio::piped()).spawn().unwrap();
    let metrics = home.run("stopped").join("metrics.jsonl");
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(&metrics).map_or(0, |lines| lines.lines().count()) < 5 {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "the run did not start");
        sleep(Duration::from_millis(2));
    }
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("resume with `--resume`"), "{stderr}");
    assert_eq!(checkpoints(&home.run("stopped")).len(), 1);
    let mut rest = home.train("stopped", OFTEN);
    assert!(rest.arg("--resume").output().unwrap().status.success());
    assert_same_checkpoint(&checkpoint(&whole, LAST), &checkpoint(&home.run("stopped"), LAST));
}
