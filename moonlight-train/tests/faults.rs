//! Each file-system call of a save, a rotation and a resume fails once, and the power is cut between any two of them. Afterwards
//! there is a complete checkpoint, from which the run resumes bit for bit.

#![cfg(unix)]

mod common;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use burn::train::Interrupter;
use common::{Home, checkpoint, state};
use moonlight_convert::manifest::Depth;
use moonlight_convert::storage::{Call, Observation, observe};
use moonlight_infer::device::ComputeDevice;
use moonlight_infer::run_dir::{CheckpointStatus, check_checkpoint, checkpoint_folders};
use moonlight_train::error::TrainError;
use moonlight_train::recipe::Recipe;
use moonlight_train::trainer::{Outcome, train};

mod disk;
use disk::Journal;

const STEPS: u64 = 4;

static ALONE: Mutex<()> = Mutex::new(());

/// A run that saves after each step and keeps one checkpoint, so that each save after the first also removes one.
fn run(home: &Home, name: &str, steps: u64, resume: bool) -> Result<Outcome, TrainError> {
    let sets = [
        format!("run.name={name}"),
        format!("train.steps={steps}"),
        format!("schedule.total_steps={STEPS}"),
        "train.checkpoint_every=1".into(),
        "train.validate_every=2".into(),
        "train.keep=1".into(),
        "train.keep_best=false".into(),
        "run.device=cpu".into(),
    ];
    let recipe = Recipe::load(&home.path("recipe.toml"), &sets).unwrap();
    // The device has one random number generator, which every run seeds, so runs must not overlap.
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    train(&recipe, &ComputeDevice::open("cpu").unwrap(), resume, &Interrupter::new())
}

/// How calls fail.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// One call fails, and later ones succeed.
    Once,
    /// One call and all later ones fail, as on a disk that stays full.
    FromThenOn,
}

/// Makes call number `position` below `root` fail, and counts all calls.
fn fail(root: PathBuf, position: usize, fault: Fault) -> (Observation, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let observer = move |call: Call<'_>| {
        let number = count.fetch_add(1, Ordering::SeqCst);
        let fails = number == position || (fault == Fault::FromThenOn && number > position);
        if !fails {
            return Ok(());
        }
        if let (Call::Write(path), 0) = (call, number % 2) {
            // With an even number, a failed write leaves a part of the file.
            let _ = fs::write(path, "a part");
        }
        Err(io::ErrorKind::StorageFull.into())
    };
    (observe(root, Arc::new(observer)), calls)
}

/// The step of the newest complete checkpoint. Asserts that all checkpoints with the name of a step are complete.
fn newest(run: &Path) -> Option<u64> {
    let mut newest = None;
    for folder in checkpoint_folders(&run.join("checkpoints")).unwrap() {
        match check_checkpoint(&folder, Depth::Digests).unwrap() {
            CheckpointStatus::Complete { step } => newest = newest.max(Some(step)),
            status => panic!("{}: {status:?}", folder.display()),
        }
    }
    newest
}

/// Asserts that weights, optimizer and trainer are byte for byte those at the end of an uninterrupted run.
fn assert_same_end(run: &Path, reference: &Path, when: &str) {
    let (ours, expected) = (checkpoint(run, STEPS), checkpoint(reference, STEPS));
    for file in ["model.safetensors", "optimizer-00000-of-00001.bpk", "config.json"] {
        assert!(fs::read(ours.join(file)).unwrap() == fs::read(expected.join(file)).unwrap(), "{when}: {file} differs");
    }
    assert_eq!(state(&ours), state(&expected), "{when}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn after_any_failed_call_of_a_save_or_a_rotation_the_run_resumes_bit_for_bit() {
    let home = Home::new();
    run(&home, "reference", STEPS, false).unwrap();
    let (observation, calls) = fail(home.run("counted"), usize::MAX, Fault::Once);
    run(&home, "counted", STEPS, false).unwrap();
    drop(observation);
    assert_same_end(&home.run("counted"), &home.run("reference"), "counted");
    let positions = calls.load(Ordering::SeqCst);
    assert!(positions > 100, "{positions} calls");
    let (mut survived, mut ended) = (0, 0);
    for fault in [Fault::Once, Fault::FromThenOn] {
        for position in 0..positions {
            let name = format!("broken-{position}-{}", fault == Fault::Once);
            let (observation, _) = fail(home.run(&name), position, fault);
            let result = run(&home, &name, STEPS, false);
            drop(observation);
            let folder = home.run(&name);
            let newest = newest(&folder);
            // The result of a run holds the lock on its folder.
            match result.map(drop) {
                Ok(_) => {
                    survived += 1;
                    assert_eq!(newest, Some(STEPS), "call {position}");
                }
                // One of four saves takes about a quarter of the calls, so the first one is complete by the middle.
                Err(_) => {
                    ended += 1;
                    assert!(newest.is_some() || position < positions / 2, "call {position}: nothing is left");
                }
            }
            run(&home, &name, STEPS, true).unwrap_or_else(|error| panic!("call {position}: {error}"));
            assert_same_end(&folder, &home.run("reference"), &format!("call {position}"));
            fs::remove_dir_all(folder).unwrap();
        }
    }
    println!("{positions} positions, twice: {survived} runs continued, {ended} ended and were resumed");
    assert!(survived > 0 && ended > 0);
}

#[test]
fn after_any_failed_call_of_a_resume_the_next_one_resumes_bit_for_bit() {
    let home = Home::new();
    run(&home, "reference", STEPS, false).unwrap();
    run(&home, "half", 2, false).unwrap();
    // The folder of a killed run: a checkpoint half saved, one half removed, and a damaged newest one.
    let checkpoints = home.run("half").join("checkpoints");
    copy(&checkpoint(&home.run("half"), 2), &checkpoint(&home.run("half"), 3));
    fs::write(checkpoint(&home.run("half"), 3).join("model.safetensors"), "cut").unwrap();
    for leftover in [".step-00000003.moonlight-saving", ".step-00000001.moonlight-removed"] {
        fs::create_dir(checkpoints.join(leftover)).unwrap();
        fs::write(checkpoints.join(leftover).join("config.json"), "half").unwrap();
    }
    copy(&home.run("half"), &home.run("counted"));
    let (observation, calls) = fail(home.run("counted"), usize::MAX, Fault::Once);
    run(&home, "counted", STEPS, true).unwrap();
    drop(observation);
    assert_same_end(&home.run("counted"), &home.run("reference"), "counted");
    assert!(checkpoint(&home.run("counted"), 3).with_extension("damaged").is_dir());
    let positions = calls.load(Ordering::SeqCst);
    for fault in [Fault::Once, Fault::FromThenOn] {
        for position in 0..positions {
            let name = format!("broken-{position}-{}", fault == Fault::Once);
            copy(&home.run("half"), &home.run(&name));
            let (observation, _) = fail(home.run(&name), position, fault);
            let _ = run(&home, &name, STEPS, true);
            drop(observation);
            run(&home, &name, STEPS, true).unwrap_or_else(|error| panic!("call {position}: {error}"));
            let folder = home.run(&name);
            assert!(newest(&folder).is_some());
            assert_same_end(&folder, &home.run("reference"), &format!("call {position}"));
            fs::remove_dir_all(folder).unwrap();
        }
    }
    println!("{positions} positions, twice");
}

#[test]
fn a_power_loss_at_any_moment_leaves_a_checkpoint_that_was_saved() {
    let losses: usize = std::env::var("MOONLIGHT_POWER_LOSSES").map_or(200, |losses| losses.parse().unwrap());
    let home = Home::new();
    run(&home, "reference", STEPS, false).unwrap();
    let journal = Arc::new(Journal::new(home.path("runs")));
    let observation = observe(home.path("runs"), journal.clone().observer());
    run(&home, "watched", STEPS, false).unwrap();
    drop(observation);
    let mut steps = [0; STEPS as usize + 1];
    for loss in 0..losses {
        let name = "lost";
        let _ = fs::remove_dir_all(home.run(name));
        let lost = journal.cut(loss as u64, &home.run("watched"), &home.run(name));
        let newest = if home.run(name).exists() { newest(&home.run(name)) } else { None };
        assert!(newest >= lost.saved, "loss {loss}: step {:?} was saved, and step {newest:?} is left", lost.saved);
        steps[newest.unwrap_or(0) as usize] += 1;
        run(&home, name, STEPS, true).unwrap_or_else(|error| panic!("loss {loss}: {error}"));
        assert_same_end(&home.run(name), &home.run("reference"), &format!("loss {loss}"));
    }
    println!("{losses} power losses; resumed after step 0 to {STEPS}: {steps:?}");
    assert!(steps.iter().filter(|&&count| count > 0).count() > 2);
}
