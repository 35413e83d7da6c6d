//! How commands end: by a signal, with a closed output, on a full disk; and which files they leave.

#![cfg(target_os = "linux")]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Home, assert_fails, checkpoint, hangup_ends_programs, moonlight, text};
use serde_json::json;

/// How long a program may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap().success());
}

fn ended(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the process has not ended");
        }
        sleep(Duration::from_millis(5));
    }
}

fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ready() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(2));
    }
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A home with a trained chat model.
fn talking() -> (Home, PathBuf) {
    let home = Home::new();
    let path = home.path("talk.jsonl");
    let talk = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    fs::write(&path, format!("{talk}\n").repeat(20)).unwrap();
    let glob = format!("data.train=[\"{}\"]", path.display());
    let sets = [
        &glob,
        "data.format=chat",
        "data.tokenizer=bytes-chat",
        "data.sequence_length=192",
        "model.max_position_embeddings=256",
        "train.steps=1",
    ];
    let run = home.trained("talk", &sets.map(|set| ["--set", set]).concat());
    let model = checkpoint(&run, 1);
    (home, model)
}

#[test]
fn a_chat_ends_at_every_signal() {
    let (_home, model) = talking();
    let signals = [("TERM", 15), ("HUP", 1), ("INT", 2)];
    for (name, number) in signals.into_iter().filter(|(name, _)| *name != "HUP" || hangup_ends_programs()) {
        let mut chat = moonlight(&["chat", "--max-new-tokens", "2", "--model"]);
        let mut child = chat.arg(&model).stdin(Stdio::piped()).spawn().unwrap();
        let mut keys = child.stdin.take().unwrap();
        keys.write_all(b"hello\n").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut answer).unwrap();
        // Now it waits for the next line.
        sleep(Duration::from_millis(100));
        signal(&child, name);
        assert_eq!(ended(&mut child).signal(), Some(number), "{name}");
    }
}

#[test]
fn under_nohup_the_end_of_the_terminal_is_ignored() {
    let (home, model) = talking();
    let mut nohup = Command::new("nohup");
    nohup.arg(env!("CARGO_BIN_EXE_moonlight")).args(["chat", "--device", "cpu", "--model"]).arg(&model);
    let mut child = nohup.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // By now it has opened the model and handles signals.
    std::thread::sleep(Duration::from_secs(2));
    signal(&child, "HUP");
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it ended");
    signal(&child, "TERM");
    assert_eq!(ended(&mut child).signal(), Some(15));
    drop(home);
}

/// Starts a run that tokenizes for a long time: its data are a sparse file of zeros.
fn tokenizing(home: &Home, run: &str) -> Child {
    let big = home.path("big.txt");
    File::create(&big).unwrap().set_len(2 << 30).unwrap();
    let glob = format!("data.train=[\"{}\"]", big.display());
    let cache = home.path("cache");
    let before = names(&cache);
    let mut child = home.train(run, &["--set", &glob]).spawn().unwrap();
    wait_for("nothing is tokenized", || {
        assert!(child.try_wait().unwrap().is_none());
        names(&cache).iter().any(|name| name.ends_with(".tmp") && !before.contains(name))
    });
    child
}

#[test]
fn tokenizing_ends_at_the_first_signal_and_leaves_nothing() {
    for name in ["TERM", "HUP", "INT"].into_iter().filter(|name| *name != "HUP" || hangup_ends_programs()) {
        let home = Home::new();
        let mut child = tokenizing(&home, "big");
        signal(&child, name);
        assert_eq!(ended(&mut child).code(), Some(130), "{name}");
        assert_eq!(names(&home.path("cache")), [""; 0], "{name}");
        assert!(!home.run("big").exists());
    }
}

#[test]
fn the_next_run_removes_what_a_killed_tokenization_left() {
    let home = Home::new();
    let mut child = tokenizing(&home, "killed");
    let mut other = tokenizing(&home, "other");
    signal(&child, "KILL");
    ended(&mut child);
    assert_eq!(names(&home.path("cache")).len(), 2);
    home.trained("small", &["--set", "train.steps=1", "--set", "schedule.warmup_steps=0"]);
    let left = names(&home.path("cache"));
    // The file of a process that still writes stays.
    assert_eq!(left.iter().filter(|name| name.ends_with(".tmp")).count(), 1, "{left:?}");
    signal(&other, "TERM");
    ended(&mut other);
    let left = names(&home.path("cache"));
    assert!(left.iter().all(|name| name.ends_with(".tokens")) && !left.is_empty(), "{left:?}");
}

/// A home with a model, a file of tokens to score, and a task to evaluate.
fn scoring() -> (Home, PathBuf) {
    let home = Home::new();
    let run = home.trained("tiny", &["--set", "train.steps=1", "--set", "schedule.warmup_steps=0"]);
    fs::write(home.path("data.jsonl"), "{\"tokens\": [1, 2, 3]}\n".repeat(50)).unwrap();
    fs::write(home.path("task.jsonl"), "{\"text\": \"abc\"}\n".repeat(20)).unwrap();
    let model = checkpoint(&run, 1);
    (home, model)
}

#[test]
fn an_output_that_is_an_input_is_refused() {
    let (home, model) = scoring();
    let model = model.display().to_string();
    fs::hard_link(home.path("data.jsonl"), home.path("hard.jsonl")).unwrap();
    std::os::unix::fs::symlink(home.path("task.jsonl"), home.path("link.jsonl")).unwrap();
    for (command, input, file, output) in [
        ("score", "--data", "data.jsonl", "data.jsonl"),
        ("score", "--data", "data.jsonl", "hard.jsonl"),
        ("eval", "--task", "task.jsonl", "link.jsonl"),
        ("generate", "--prompts", "data.jsonl", "hard.jsonl"),
    ] {
        let before = fs::read(home.path(file)).unwrap();
        let [file, output] = [file, output].map(|name| home.path(name).display().to_string());
        let arguments = [command, "--model", &model, input, &file, "--output", &output];
        assert_fails(&moonlight(&arguments).output().unwrap(), "is the input");
        assert!(fs::read(&file).unwrap() == before, "{arguments:?}");
    }
}

#[test]
fn an_output_file_is_complete_or_absent() {
    let (home, model) = scoring();
    let folder = home.path("out");
    fs::create_dir(&folder).unwrap();
    let output = folder.join("scores.jsonl");
    fs::write(&output, "before").unwrap();
    let mut score = moonlight(&["score", "--data", "/dev/stdin", "--model"]);
    let score = score.arg(&model).arg("--output").arg(&output).stdin(Stdio::piped());
    let mut child = score.spawn().unwrap();
    // The first record determines the format of the input; the pipe stays open.
    let mut records = child.stdin.take().unwrap();
    records.write_all(b"{\"tokens\": [1, 2, 3]}\n").unwrap();
    wait_for("nothing is written", || names(&folder).len() == 2);
    signal(&child, "TERM");
    assert_eq!(ended(&mut child).signal(), Some(15));
    assert_eq!(
        (names(&folder), fs::read_to_string(&output).unwrap().as_str()),
        (vec!["scores.jsonl".into()], "before")
    );
    // An error in the middle.
    fs::write(home.path("data.jsonl"), "{\"tokens\": [1, 2, 3]}\n{\"tokens\": [1, 999]}\n").unwrap();
    let mut score = moonlight(&["score", "--model"]);
    let score = score.arg(&model).arg("--output").arg(&output).arg("--data").arg(home.path("data.jsonl"));
    assert_fails(&score.output().unwrap(), "data.jsonl:2");
    assert_eq!((names(&folder).len(), fs::read_to_string(&output).unwrap().as_str()), (1, "before"));
}

/// Commands that print to stdout.
fn printing(home: &Home, model: &Path) -> Vec<Vec<String>> {
    let owned = |arguments: &[&str]| arguments.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let model = model.display().to_string();
    let place = |name: &str| home.path(name).display().to_string();
    vec![
        owned(&["--help"]),
        owned(&["score", "--model", &model, "--data", &place("data.jsonl")]),
        owned(&["eval", "--model", &model, "--task", &place("task.jsonl")]),
        owned(&["generate", "--model", &model, "--prompt", "ab", "--max-new-tokens", "3"]),
        owned(&["generate", "--model", &model, "--prompts", &place("data.jsonl"), "--max-new-tokens", "2"]),
        owned(&["data", "inspect", &place("recipe.toml")]),
        owned(&["data", "inspect", &place("recipe.toml"), "--json"]),
        owned(&["plan", &place("recipe.toml")]),
        owned(&["spectrum", "--model", &model]),
    ]
}

#[test]
fn a_closed_pipe_ends_a_command_without_an_error() {
    let (home, model) = scoring();
    for arguments in printing(&home, &model) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = moonlight(&arguments).spawn().unwrap();
        drop(child.stdout.take());
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let stderr = text(&stderr);
        assert!(status.success() && !stderr.contains("error"), "{arguments:?}: {status}, {stderr}");
    }
}

#[test]
fn a_full_disk_is_an_error_for_stdout_but_not_for_stderr() {
    let (home, model) = scoring();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for arguments in printing(&home, &model) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = moonlight(&arguments).stdout(full()).output().unwrap();
        if arguments != ["--help"] {
            assert_fails(&output, "`stdout` cannot be written");
            assert!(!text(&output.stderr).contains("--resume"), "{}", text(&output.stderr));
        }
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let output = moonlight(&arguments).stderr(full()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", output.status);
    }
    let svg = home.path("loss.svg");
    let mut plot = moonlight(&["plot", "--output"]);
    let plot = plot.arg(&svg).arg(home.run("tiny")).stderr(full());
    assert!(plot.status().unwrap().success() && svg.exists());
    assert_eq!(moonlight(&["fly"]).stderr(full()).status().unwrap().code(), Some(2));
    assert_eq!(moonlight(&["plan", "nowhere.toml"]).stderr(full()).status().unwrap().code(), Some(1));
}

#[test]
fn escape_sequences_in_files_and_models_are_not_sent_to_a_terminal() {
    let home = Home::new();
    let name = home.path("text/\x1b[2Jx.txt");
    fs::write(&name, "some \x1b[31mred\x1b[0m words\u{9b}2J\r\n".repeat(9)).unwrap();
    let recipe = home.path("recipe.toml");
    let glob = format!("data.train=[\"{}/text/*x.txt\"]", home.path("").display());
    let mut inspect =
        moonlight(&["data", "inspect", "--samples", "1", "--set", &glob, "--set", "data.valid_fraction=0"]);
    let output = inspect.arg(&recipe).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    assert!(shown.contains("\\u{1b}[2Jx.txt") && shown.contains("some \\u{1b}[31mred"), "{shown}");
    assert!(!shown.contains(['\x1b', '\u{9b}', '\r']), "{shown}");

    let talk = home.path("talk.jsonl");
    let glob = format!("data.train=[\"{}\"]", talk.display());
    for record in [
        json!({"messages": [{"role": "\x1b[2J", "content": "a"}]}),
        json!({"\x1b[2J": 1}),
        json!({"messages": [{"role": "user", "content": "a"}]}),
    ] {
        fs::write(&talk, format!("{record}\n")).unwrap();
        let sets = ["data.format=chat", "data.tokenizer=bytes-chat", "data.valid_fraction=0", &glob];
        let mut inspect = moonlight(&["data", "inspect"]);
        let output = inspect.arg(&recipe).args(sets.map(|set| ["--set", set]).concat()).output().unwrap();
        assert_fails(&output, "talk.jsonl:1");
        assert!(!text(&output.stderr).contains('\x1b'), "{}", text(&output.stderr));
    }
    // Nor those in a file name that is not UTF-8.
    use std::os::unix::ffi::OsStrExt;
    fs::write(home.path("text").join(std::ffi::OsStr::from_bytes(b"n\xff.txt")), "some words").unwrap();
    let glob = format!("data.train=[\"{}/text/n*.txt\"]", home.path("").display());
    let mut inspect = moonlight(&["data", "inspect", "--json", "--set", &glob, "--set", "data.valid_fraction=0"]);
    let output = inspect.arg(&recipe).output().unwrap();
    assert!(output.status.success() && text(&output.stdout).contains("n\u{fffd}.txt"), "{}", text(&output.stderr));
}
