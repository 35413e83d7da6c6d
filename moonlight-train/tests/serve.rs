//! `moonlight serve`: a process that answers over HTTP, from its start to its end by a signal.

#![cfg(all(unix, feature = "server"))]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Tuned, assert_fails, checkpoint, moonlight};
use serde_json::{Value, json};

/// How long a program may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(60);

struct Served {
    child: Child,
    address: String,
    /// Kept open: the program would not mind if it were closed.
    _stdout: BufReader<ChildStdout>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(arguments: &[&str]) -> Served {
    let arguments = [&["serve", "--port", "0", "--device", "cpu"], arguments].concat();
    let mut child = moonlight(&arguments).env_remove("MOONLIGHT_API_KEY").spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on http://").map(str::to_owned);
    let Some(address) = address else {
        let mut error = String::new();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        panic!("{line}{error}");
    };
    Served { child, address, _stdout: stdout }
}

impl Served {
    fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn get(&self, path: &str) -> (u16, Value) {
        answer(self.send(&format!("GET {path}"), ""))
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(self.send(&format!("POST {path}"), &body.to_string()))
    }

    fn models(&self) -> Vec<String> {
        let (status, list) = self.get("/v1/models");
        assert_eq!(status, 200);
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    }

    /// The greedy continuation of a text by a model.
    fn complete(&self, model: &str) -> String {
        let body = json!({"model": model, "prompt": "the cat", "max_tokens": 12, "temperature": 0});
        let (status, answer) = self.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success());
    }

    fn ended(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the process has not ended");
            sleep(Duration::from_millis(10));
        }
    }
}

/// The status and the JSON body of an answer.
fn answer(mut stream: TcpStream) -> (u16, Value) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

/// The text that `moonlight generate` writes.
fn generated(arguments: &[&str]) -> String {
    let common = ["generate", "--prompt", "the cat", "--max-new-tokens", "12", "--json", "--device", "cpu"];
    let output = moonlight(&[&common, arguments].concat()).output().unwrap();
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    value["text"].as_str().unwrap().to_owned()
}

#[test]
fn a_model_and_adapters_are_served_until_a_signal() {
    let tuned = Tuned::new();
    let run = tuned.home.trained("lora", &[]);
    let (base, adapter) = (display(&tuned.base), display(&checkpoint(&run, 12)));
    let named = format!("law={adapter}");
    let runs = display(run.parent().unwrap());
    let mut served = serve(&["--model", &base, "--name", "base", "--adapter", &named, "--runs", &runs]);
    assert_eq!(served.models(), ["base", "law"]);
    assert_eq!(served.complete("base"), generated(&["--model", &base]));
    assert_eq!(served.complete("law"), generated(&["--model", &base, "--adapter", &adapter]));
    let page = served.get("/api/runs");
    assert_eq!(page.0, 200, "{}", page.1);
    // The tokenizer of bytes has no chat template.
    let chat =
        served.post("/v1/chat/completions", &json!({"model": "base", "messages": [{"role": "user", "content": "x"}]}));
    assert_eq!(chat.0, 400);
    // A signal lets the running answer finish.
    let body = json!({"model": "base", "prompt": "x", "max_tokens": 60, "stream": true, "ignore_eos": true});
    let mut stream = served.send("POST /v1/completions", &body.to_string());
    let mut start = [0; 12];
    stream.read_exact(&mut start).unwrap();
    served.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(served.ended().success());
}

#[test]
fn a_run_is_served_while_it_is_trained() {
    let tuned = Tuned::new();
    let run = tuned.home.trained("lora", &["--set", "train.steps=4", "--set", "schedule.total_steps=12"]);
    let (base, run_path) = (display(&tuned.base), display(&run));
    let served = serve(&["--model", &base, "--name", "base", "--follow", &run_path]);
    assert_eq!(served.models(), ["base", "lora", "lora@step-00000004"]);
    let resumed = ["--resume", "--set", "train.steps=12"];
    tuned.home.trained("lora", &resumed);
    let started = Instant::now();
    while !served.models().contains(&"lora@step-00000012".to_owned()) {
        assert!(started.elapsed() < PATIENCE);
        sleep(Duration::from_millis(100));
    }
    let adapter = display(&checkpoint(&run, 12));
    let after = served.complete("lora");
    assert_eq!(after, generated(&["--model", &base, "--adapter", &adapter]));
    // Without `--model` the base model is the one that the adapter names.
    drop(served);
    let served = serve(&["--follow", &run_path]);
    assert_eq!(served.models(), ["lora", "lora@step-00000012"]);
    assert_eq!(served.complete("lora"), after);
}

#[test]
fn what_cannot_be_served_is_an_error_before_the_port_is_open() {
    let tuned = Tuned::new();
    let base = display(&tuned.base);
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port().to_string();
    let fails = |arguments: &[&str], expected: &str| {
        let arguments = [&["serve", "--model", &base, "--port", "0", "--device", "cpu"], arguments].concat();
        assert_fails(&moonlight(&arguments).output().unwrap(), expected);
    };
    let output = moonlight(&["serve", "--model", &base, "--port", &port, "--device", "cpu"]).output().unwrap();
    assert_fails(&output, "cannot be listened on");
    fails(&["--host", "no.such.host.invalid"], "there is no address `no.such.host.invalid`");
    fails(&["--api-key", "two words"], "an API key is empty, or has characters");
    fails(&["--cors-origin", "example.org"], "`example.org` is not an origin");
    fails(&["--adapter", "a=/nowhere"], "/nowhere");
    let name = format!("{}={base}", tuned.base.file_name().unwrap().to_str().unwrap());
    fails(&["--adapter", &name], "two models have the name");
    fails(&["--runs", "/nowhere"], "`/nowhere` cannot be read");
    fs::remove_file(tuned.base.join("tokenizer.json")).unwrap();
    fails(&[], "has no tokenizer");
}

#[test]
fn a_key_may_be_in_the_environment() {
    let tuned = Tuned::new();
    let base = display(&tuned.base);
    let mut child = moonlight(&["serve", "--model", &base, "--port", "0", "--device", "cpu"])
        .env("MOONLIGHT_API_KEY", "sk-secret")
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on http://").unwrap().to_owned();
    let served = Served { child, address, _stdout: stdout };
    assert_eq!(served.get("/health").0, 200);
    assert_eq!(served.get("/v1/models").0, 401);
    let mut with_key = TcpStream::connect(&served.address).unwrap();
    let head =
        "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer sk-secret\r\nconnection: close\r\n\r\n";
    with_key.write_all(head.as_bytes()).unwrap();
    assert_eq!(answer(with_key).0, 200);
}
