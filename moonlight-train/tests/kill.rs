//! Killing and interrupting `moonlight train`.

#![cfg(unix)]

mod common;

use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use common::{Home, assert_same_checkpoint, checkpoint, checkpoints, text};
use moonlight_convert::load;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: &str = "train.steps=150";
const LAST: u64 = 150;
const OFTEN: &[&str] = &["--set", STEPS, "--set", "train.checkpoint_every=3", "--set", "train.validate_every=50"];

fn start(home: &Home, name: &str) -> Child {
    let mut command = home.train(name, OFTEN);
    command.arg("--resume").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn killed_at_twenty_random_moments_it_always_resumes() {
    let home = Home::new();
    let started = Instant::now();
    let whole = home.trained("whole", OFTEN);
    let whole_run = started.elapsed();
    let mut random = ChaCha8Rng::seed_from_u64(started.elapsed().subsec_nanos().into());
    let device = Device::default();
    let run = home.run("killed");
    let mut kills = 0;
    let mut progress = Vec::new();
    while kills < 20 {
        let mut child = start(&home, "killed");
        // Long enough for start-up and some steps, short enough that twenty do not reach the end.
        sleep(whole_run.mul_f64(random.random_range(0.01..0.25)));
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none_or(|status| status.success()), "it did not resume: {ended:?}");
        if ended.is_some() {
            // It reached its end before the kill: begin again from nothing.
            std::fs::remove_dir_all(&run).unwrap();
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        // Whatever bears a step's name is whole.
        let names = checkpoints(&run);
        for name in names.iter().filter(|name| name.starts_with("step-")) {
            load(&run.join("checkpoints").join(name), &device, None).unwrap();
        }
        progress.push(names.last().cloned().unwrap_or_else(|| "none".into()));
    }
    println!("newest checkpoint behind each kill: {progress:?}");
    assert!(start(&home, "killed").wait().unwrap().success());
    assert_same_checkpoint(&checkpoint(&whole, LAST), &checkpoint(&run, LAST));
    assert!(checkpoints(&run).iter().all(|name| name.starts_with("step-")), "leftovers: {:?}", checkpoints(&run));
}

#[test]
fn ctrl_c_writes_a_checkpoint_and_the_run_goes_on() {
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
    assert!(stderr.contains("go on by `--resume`"), "{stderr}");
    assert_eq!(checkpoints(&home.run("stopped")).len(), 1);
    let mut rest = home.train("stopped", OFTEN);
    assert!(rest.arg("--resume").output().unwrap().status.success());
    assert_same_checkpoint(&checkpoint(&whole, LAST), &checkpoint(&home.run("stopped"), LAST));
}
