//! `moonlight-convert download` against a local server that imitates faulty servers and connections: it drops
//! connections, ignores ranges, requires a token, sends damaged or wrong bytes, stops responding. Every run ends with a
//! complete cache, or with an error and no ref to the commit.

#![cfg(feature = "download")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

const COMMIT: &str = "4e735b07a89f73647dfab71ab91b840f362ede5b";
const OTHER_COMMIT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const REPO: &str = "moonshotai/Moonlight-tiny";
const TOKEN: &str = "hf_secret";
const WEIGHTS: &str = "model.safetensors";

/// The behavior of the server.
#[derive(Clone, Default)]
struct Behavior {
    /// Closes the connection after this many bytes of a response.
    cut: Option<usize>,
    /// Closes the connection at this offset of the file.
    never_past: Option<usize>,
    /// Ignores ranges and sends the whole file.
    no_ranges: bool,
    /// Answers with status 401 without the token.
    gated: bool,
    /// Changes a byte of the weights.
    damage: bool,
    /// Stops responding once, in the middle of the weights.
    silent_once: bool,
    /// Sends more bytes than the file has.
    longer: bool,
    /// Redirects files to another path, as the Hub does for LFS.
    redirect: bool,
    /// Redirects everything to this server.
    elsewhere: Option<String>,
    /// Sends the list a byte at a time, which would take minutes.
    drip: bool,
    /// Answers this many requests for the weights with status 503.
    busy: usize,
    /// A list of files to send instead of the true one.
    list: Option<Value>,
}

struct Server {
    address: String,
    /// The requests so far.
    seen: Arc<Mutex<Vec<Seen>>>,
    behavior: Arc<Mutex<Behavior>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    path: String,
    start: Option<usize>,
    token: bool,
}

/// The files of the repository: a checkpoint saved by transformers, and others that are not part of one.
fn files() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::from([
        ("README.md".to_owned(), b"# Moonlight".to_vec()),
        ("figures/banner.png".to_owned(), vec![7; 100]),
        ("tokenizer_config.json".to_owned(), b"{}".to_vec()),
        ("chat_template.jinja".to_owned(), Vec::new()),
    ]);
    for name in ["config.json", "generation_config.json", WEIGHTS] {
        files.insert(name.to_owned(), fs::read(common::fixture("moonlight-like").join(name)).unwrap());
    }
    files
}

fn git_digest(bytes: &[u8]) -> String {
    let digest = Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize();
    format!("{digest:x}")
}

/// The Hub's list of them: LFS for the weights, git for the rest.
fn list() -> Value {
    let siblings: Vec<Value> = files()
        .into_iter()
        .map(|(name, bytes)| {
            let size = bytes.len();
            let mut file = json!({"rfilename": name, "size": size, "blobId": git_digest(&bytes)});
            if name == WEIGHTS {
                let sha256 = format!("{:x}", Sha256::digest(&bytes));
                file["blobId"] = json!("0000000000000000000000000000000000000000");
                file["lfs"] = json!({"sha256": sha256, "size": size, "pointerSize": 134});
            }
            file
        })
        .collect();
    json!({"id": REPO, "sha": COMMIT, "siblings": siblings})
}

impl Server {
    fn new(behavior: Behavior) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let behavior = Arc::new(Mutex::new(behavior));
        let (shared, log) = (Arc::clone(&behavior), Arc::clone(&seen));
        // The thread ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, log) = (Arc::clone(&shared), Arc::clone(&log));
                // A client may close the connection.
                std::thread::spawn(move || drop(serve(stream, &shared, &log)));
            }
        });
        Self { address, seen, behavior }
    }

    fn behave(&self, behavior: Behavior) {
        *self.behavior.lock().unwrap() = behavior;
        self.seen.lock().unwrap().clear();
    }

    /// The start offsets of the requests for the weights.
    fn starts(&self) -> Vec<usize> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|seen| seen.path.ends_with(WEIGHTS)).filter_map(|seen| seen.start).collect()
    }
}

fn serve(mut stream: TcpStream, shared: &Mutex<Behavior>, log: &Mutex<Vec<Seen>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let target = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut start, mut token) = (None, false);
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            start = range.trim_end_matches('-').parse().ok();
        }
        token |= line == format!("authorization: bearer {TOKEN}");
    }
    let behavior = {
        let mut behavior = shared.lock().unwrap();
        let now = behavior.clone();
        if target.contains("/resolve/") && target.ends_with(WEIGHTS) {
            behavior.busy = behavior.busy.saturating_sub(1);
            behavior.silent_once = false;
        }
        now
    };
    log.lock().unwrap().push(Seen { path: target.clone(), start, token });
    let mut answer = |status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len())?;
        stream.write_all(body)
    };
    if behavior.gated && !token {
        return answer("401 Unauthorized", "X-Error-Code: GatedRepo\r\n", b"Access to this model is restricted.");
    }
    if let Some(server) = behavior.elsewhere {
        return answer("307 Temporary Redirect", &format!("Location: {server}{target}\r\n"), b"");
    }
    let api = format!("/api/models/{REPO}/revision/");
    if let Some(rest) = target.strip_prefix(&api) {
        assert!(rest.ends_with("?blobs=true"), "{rest}");
        return match rest.split('?').next() {
            Some("main" | "v1" | COMMIT | OTHER_COMMIT) => {
                let list = behavior.list.unwrap_or_else(list);
                if behavior.drip {
                    write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n")?;
                    loop {
                        stream.write_all(b"[")?;
                        stream.flush()?;
                        std::thread::sleep(Duration::from_millis(500));
                    }
                }
                answer("200 OK", "Content-Type: application/json\r\n", list.to_string().as_bytes())
            }
            _ => answer("404 Not Found", "X-Error-Code: RevisionNotFound\r\n", b"Invalid rev id"),
        };
    }
    let resolve = format!("/{REPO}/resolve/{COMMIT}/");
    let mut name = target.strip_prefix(&resolve);
    if name.is_none() {
        name = target.strip_prefix("/cdn/");
    } else if behavior.redirect {
        let location = format!("Location: /cdn/{}\r\n", name.unwrap_or_default());
        return answer("302 Found", &location, b"");
    }
    let Some((name, mut bytes)) = name.and_then(|name| Some((name, files().remove(name)?))) else {
        return answer("404 Not Found", "", b"");
    };
    if name == WEIGHTS && behavior.busy > 0 {
        return answer("503 Service Unavailable", "", b"later");
    }
    if name == WEIGHTS && behavior.damage {
        bytes[500] ^= 1;
    }
    if behavior.longer {
        bytes.extend_from_slice(b"more");
    }
    let from = start.filter(|_| !behavior.no_ranges).unwrap_or(0);
    if from > bytes.len() {
        return answer("416 Range Not Satisfiable", "", b"");
    }
    let part = &bytes[from..];
    let status = if start.is_some() && !behavior.no_ranges { "206 Partial Content" } else { "200 OK" };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\r\n",
        part.len(),
        bytes.len().saturating_sub(1),
        bytes.len()
    )?;
    let mut end = part.len();
    if name == WEIGHTS {
        end = end.min(behavior.cut.unwrap_or(end));
        end = end.min(behavior.never_past.map_or(end, |most| most.saturating_sub(from)));
        if behavior.silent_once {
            stream.write_all(&part[..part.len() / 2])?;
            stream.flush()?;
            std::thread::sleep(Duration::from_secs(20));
            return Ok(());
        }
    }
    stream.write_all(&part[..end])
}

struct Hub {
    server: Server,
    home: tempfile::TempDir,
}

impl Hub {
    fn new(behavior: Behavior) -> Self {
        Self { server: Server::new(behavior), home: tempfile::tempdir().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moonlight-convert"));
        for name in [
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_OFFLINE",
        ] {
            command.env_remove(name);
        }
        for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.home.path()).env("HF_ENDPOINT", &self.server.address);
        command.env("HF_HUB_DOWNLOAD_TIMEOUT", "2").args(arguments);
        command
    }

    fn download(&self, arguments: &[&str]) -> Output {
        self.command(&[&["download", REPO], arguments].concat()).output().unwrap()
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("hub").join("models--moonshotai--Moonlight-tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.folder().join("snapshots").join(COMMIT)
    }

    fn blob_of_weights(&self) -> PathBuf {
        self.folder().join("blobs").join(format!("{:x}", Sha256::digest(&files()[WEIGHTS])))
    }

    fn partial_of_weights(&self) -> PathBuf {
        let mut path = self.blob_of_weights().into_os_string();
        path.push(".incomplete");
        path.into()
    }

    /// The cache contains every file of the checkpoint, unchanged, and no others.
    #[track_caller]
    fn assert_complete(&self, output: &Output) {
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout).trim_end(), self.snapshot().display().to_string());
        let mut expected = files();
        expected.remove("README.md");
        expected.remove("figures/banner.png");
        let names = |folder: &Path| {
            let mut names: Vec<String> =
                fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.snapshot()), expected.keys().cloned().collect::<Vec<_>>());
        for (name, bytes) in &expected {
            assert!(fs::read(self.snapshot().join(name)).unwrap() == *bytes, "{name} is not the repository's");
            #[cfg(unix)]
            assert!(fs::read_link(self.snapshot().join(name)).unwrap().starts_with("../../blobs"));
        }
        let mut digests: Vec<String> = expected
            .iter()
            .map(
                |(name, bytes)| {
                    if name == WEIGHTS { format!("{:x}", Sha256::digest(bytes)) } else { git_digest(bytes) }
                },
            )
            .collect();
        digests.sort();
        digests.dedup();
        assert_eq!(names(&self.folder().join("blobs")), digests);
        assert_eq!(fs::read_to_string(self.folder().join("refs").join("main")).unwrap(), COMMIT);
    }

    /// Exit code 1, one line with the error and one with the hint, and no ref for the branch.
    #[track_caller]
    fn assert_fails(&self, output: &Output, error: &str, hint: &str) {
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let line = |start: &str| stderr.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>().join("\n");
        assert!(line("error: ").contains(error), "{stderr}");
        assert!(line("hint: ").contains(hint), "{stderr}");
        assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
        assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
        assert!(!self.folder().join("refs").join("main").exists());
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_checkpoint_is_downloaded_once_and_found_by_its_name() {
    let hub = Hub::new(Behavior::default());
    hub.assert_complete(&hub.download(&[]));
    hub.server.behave(Behavior::default());
    let again = hub.download(&[]);
    hub.assert_complete(&again);
    assert!(text(&again.stderr).contains(" 0 downloaded"), "{}", text(&again.stderr));
    let seen = hub.server.seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 1, "only the list is requested: {seen:?}");

    // Without network access: the server's address is not set.
    let inspect = |model: &str| hub.command(&["inspect", model]).env_remove("HF_ENDPOINT").output().unwrap();
    for model in [REPO, &format!("{REPO}@main"), &format!("{REPO}@{COMMIT}"), &hub.snapshot().display().to_string()] {
        let output = inspect(model);
        assert!(output.status.success(), "{model}: {}", text(&output.stderr));
        assert!(text(&output.stdout).contains("DeepseekV3ForCausalLM"));
    }
    let copy = hub.home.path().join("copy").display().to_string();
    assert!(hub.command(&["convert", REPO, &copy]).status().unwrap().success());
    assert!(hub.command(&["verify", REPO, &copy]).status().unwrap().success());
    let absent = inspect("moonshotai/Moonlight-huge");
    assert_eq!(absent.status.code(), Some(1));
    let stderr = text(&absent.stderr);
    assert!(stderr.contains("neither a directory nor a model in the Hub's cache"), "{stderr}");
    assert!(
        stderr.contains("hint: download it with `moonlight-convert download moonshotai/Moonlight-huge`"),
        "{stderr}"
    );

    let offline = hub.command(&["download", REPO]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    hub.assert_complete(&offline);
    let offline = hub.command(&["download", "moonshotai/other"]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_eq!(offline.status.code(), Some(1));
    assert!(text(&offline.stderr).contains("`HF_HUB_OFFLINE` forbids"), "{}", text(&offline.stderr));
}

#[test]
fn patterns_and_revisions_are_respected() {
    let hub = Hub::new(Behavior::default());
    let output = hub.download(&["--revision", "v1", "--include", "*.md", "--include", "figures/*"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(fs::read(hub.snapshot().join("figures").join("banner.png")).unwrap(), [7; 100]);
    assert!(hub.snapshot().join("README.md").exists() && !hub.snapshot().join("config.json").exists());
    assert_eq!(fs::read_to_string(hub.folder().join("refs").join("v1")).unwrap(), COMMIT);
    assert!(!hub.folder().join("refs").join("main").exists());
    hub.assert_fails(&hub.download(&["--include", "*.gguf"]), "no file that matches", "--include '*'");
    hub.assert_fails(&hub.download(&["--include", "***"]), "is not a pattern", "");
    hub.assert_fails(&hub.download(&["--revision", "../v1"]), "is not a branch, tag or commit", "");
}

#[test]
fn an_unreliable_connection_is_resumed() {
    let size = files()[WEIGHTS].len();
    let cut = size / 12;
    let hub = Hub::new(Behavior { cut: Some(cut), redirect: true, ..Behavior::default() });
    hub.assert_complete(&hub.download(&[]));
    let mut starts = hub.server.starts();
    starts.dedup();
    assert!(starts.len() >= 12 && starts.is_sorted() && starts[1] == cut, "{starts:?}");
}

#[test]
fn the_next_run_resumes_after_a_permanent_failure() {
    let size = files()[WEIGHTS].len();
    let hub = Hub::new(Behavior { never_past: Some(size / 2), ..Behavior::default() });
    hub.assert_fails(&hub.download(&[]), &format!("with {} of {size} bytes", size / 2), "run the same command again");
    assert!(!hub.snapshot().join(WEIGHTS).exists() && !hub.blob_of_weights().exists());
    assert_eq!(fs::metadata(hub.partial_of_weights()).unwrap().len() as usize, size / 2);
    hub.server.behave(Behavior::default());
    hub.assert_complete(&hub.download(&[]));
    assert_eq!(hub.server.starts(), [size / 2]);
}

#[test]
fn partial_files_of_every_kind_are_completed() {
    let good = files()[WEIGHTS].clone();
    let mut bad = good[..good.len() / 2].to_vec();
    bad[10] ^= 0xFF;
    let longer = [good.as_slice(), b"!"].concat();
    let kinds: [(&str, &[u8], bool); 5] = [
        ("all of it", &good, false),
        ("half of it, from a server without ranges", &good[..good.len() / 2], true),
        ("half of another file", &bad, false),
        ("half of another file, from a server without ranges", &bad, true),
        ("more than all of it", &longer, false),
    ];
    for (kind, part, no_ranges) in kinds {
        let hub = Hub::new(Behavior { no_ranges, ..Behavior::default() });
        fs::create_dir_all(hub.folder().join("blobs")).unwrap();
        fs::write(hub.partial_of_weights(), part).unwrap();
        let output = hub.download(&[]);
        assert!(output.status.success(), "{kind}: {}", text(&output.stderr));
        hub.assert_complete(&output);
    }
}

#[test]
fn damaged_files_are_not_linked() {
    let hub = Hub::new(Behavior { damage: true, ..Behavior::default() });
    hub.assert_fails(
        &hub.download(&[]),
        "`model.safetensors` is damaged: its digest is",
        "the damaged file has been removed",
    );
    assert!(!hub.blob_of_weights().exists() && !hub.partial_of_weights().exists());
    hub.server.behave(Behavior { longer: true, ..Behavior::default() });
    hub.assert_fails(&hub.download(&["--include", WEIGHTS]), "the server sent more bytes than listed", "again");
    hub.server.behave(Behavior::default());
    hub.assert_complete(&hub.download(&[]));
    // A blob that is damaged later is detected and downloaded again.
    let mut bytes = fs::read(hub.blob_of_weights()).unwrap();
    bytes[1000] ^= 4;
    fs::write(hub.blob_of_weights(), &bytes).unwrap();
    let output = hub.download(&[]);
    hub.assert_complete(&output);
    assert!(text(&output.stderr).contains(": 1 downloaded"), "{}", text(&output.stderr));
}

#[test]
fn busy_and_silent_servers_are_retried() {
    let hub = Hub::new(Behavior { busy: 2, ..Behavior::default() });
    let output = hub.download(&[]);
    hub.assert_complete(&output);
    assert!(text(&output.stderr).contains("status 503; retrying"), "{}", text(&output.stderr));
    let hub = Hub::new(Behavior { silent_once: true, ..Behavior::default() });
    let begun = Instant::now();
    hub.assert_complete(&hub.download(&[]));
    assert!(begun.elapsed() < Duration::from_secs(15), "it waited too long for a silent server");
}

#[test]
fn gated_missing_and_unreachable_repositories_are_errors() {
    let hub = Hub::new(Behavior { gated: true, ..Behavior::default() });
    hub.assert_fails(
        &hub.download(&[]),
        "denies access to `moonshotai/Moonlight-tiny` without a token (status 401)",
        "`HF_TOKEN`",
    );
    let wrong = hub.command(&["download", REPO]).env("HF_TOKEN", "hf_wrong").output().unwrap();
    hub.assert_fails(&wrong, "denies access to `moonshotai/Moonlight-tiny` with this token", "is valid");
    hub.assert_complete(&hub.command(&["download", REPO]).env("HF_TOKEN", TOKEN).output().unwrap());
    assert!(!text(&wrong.stderr).contains("hf_wrong"), "a token is not shown");

    let hub = Hub::new(Behavior::default());
    hub.assert_fails(
        &hub.download(&["--revision", "v9"]),
        "the model `moonshotai/Moonlight-tiny` with the revision `v9`",
        "name",
    );
    let absent = hub.command(&["download", "moonshotai/nothing"]).output().unwrap();
    hub.assert_fails(&absent, "the model `moonshotai/nothing` with the revision", "name");
    let name = hub.command(&["download", "../../etc"]).output().unwrap();
    hub.assert_fails(&name, "is not the name of a model", "organization/model");
    // A free port.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = hub.command(&["download", REPO]).env("HF_ENDPOINT", format!("http://{free}")).output().unwrap();
    hub.assert_fails(&unreachable, "cannot be reached", "`HF_ENDPOINT`");
}

#[test]
fn invalid_lists_are_refused() {
    let hub = Hub::new(Behavior::default());
    let digest = git_digest(b"x");
    let lists = [
        (
            json!({"sha": COMMIT, "siblings": [{"rfilename": "../../config.json", "size": 1, "blobId": digest}]}),
            "not a file below",
        ),
        (
            json!({"sha": COMMIT, "siblings": [{"rfilename": "config.json", "size": 1, "blobId": "../../evil"}]}),
            "no size or digest",
        ),
        (json!({"sha": "../../evil", "siblings": []}), "is not a commit"),
        (
            json!({"sha": COMMIT, "siblings": [{"rfilename": "config.json", "size": u64::MAX, "blobId": digest}]}),
            "free",
        ),
        (json!([1, 2, 3]), "cannot be used"),
    ];
    for (list, error) in lists {
        hub.server.behave(Behavior { list: Some(list), ..Behavior::default() });
        hub.assert_fails(&hub.download(&["--include", "*config.json"]), error, "");
        assert!(!hub.snapshot().exists());
    }
    // A file that is listed but does not exist.
    let list = json!({"sha": COMMIT, "siblings": [{"rfilename": "tiktoken.model", "size": 1, "blobId": digest}]});
    hub.server.behave(Behavior { list: Some(list), ..Behavior::default() });
    hub.assert_fails(&hub.download(&[]), "the file `tiktoken.model` in `moonshotai/Moonlight-tiny` does not exist", "");
}

/// A commit identifies its contents.
#[test]
fn a_list_for_another_commit_is_refused() {
    let hub = Hub::new(Behavior::default());
    let other = hub.download(&["--revision", OTHER_COMMIT]);
    hub.assert_fails(&other, &format!("it is for the commit {COMMIT}, not for the requested one"), "");
    assert!(!hub.folder().join("blobs").exists());
    let own = hub.download(&["--revision", &COMMIT.to_uppercase()]);
    assert!(!own.status.success(), "this server does not accept upper case");
    let own = hub.download(&["--revision", COMMIT]);
    assert!(own.status.success(), "{}", text(&own.stderr));
    assert!(hub.snapshot().join(WEIGHTS).exists());
}

/// Another port is another origin.
#[test]
fn a_token_is_sent_to_its_own_origin_only() {
    let other = Server::new(Behavior::default());
    let hub = Hub::new(Behavior { elsewhere: Some(other.address.clone()), ..Behavior::default() });
    hub.assert_complete(&hub.command(&["download", REPO]).env("HF_TOKEN", TOKEN).output().unwrap());
    let tokens = |server: &Server| -> Vec<bool> { server.seen.lock().unwrap().iter().map(|seen| seen.token).collect() };
    assert!(tokens(&hub.server).len() > 3 && tokens(&hub.server).iter().all(|token| *token));
    assert!(tokens(&other).len() > 3 && !tokens(&other).iter().any(|token| *token), "{:?}", tokens(&other));
    // The token is sent to redirects within its origin, as the Hub requires for renamed models.
    let hub = Hub::new(Behavior { redirect: true, gated: true, ..Behavior::default() });
    hub.assert_complete(&hub.command(&["download", REPO]).env("HF_TOKEN", TOKEN).output().unwrap());
    // A redirect loop ends.
    let hub = Hub::new(Behavior::default());
    hub.server.behave(Behavior { elsewhere: Some(hub.server.address.clone()), ..Behavior::default() });
    hub.assert_fails(&hub.download(&[]), "it redirects more than 10 times", "");
}

#[test]
fn passwords_and_tokens_are_never_shown() {
    let hub = Hub::new(Behavior { gated: true, ..Behavior::default() });
    let address = hub.server.address.replace("http://", "http://user:PASSWORD@");
    let unreachable = "http://user:PASSWORD@127.0.0.1:1";
    for endpoint in
        [&address, unreachable, "user:PASSWORD@nowhere", "ftp://user:PASSWORD@h", "http://user:PASSWORD@h/\u{7}"]
    {
        for arguments in [&["download", REPO][..], &["download", REPO, "--revision", "v9"]] {
            let output = hub.command(arguments).env("HF_ENDPOINT", endpoint).output().unwrap();
            let printed = format!("{}{}", text(&output.stderr), text(&output.stdout));
            assert_eq!(output.status.code(), Some(1), "{printed}");
            assert!(!printed.contains("PASSWORD") && printed.contains("error: "), "{printed}");
        }
    }
    let file = hub.home.path().join("my-token");
    fs::write(&file, "hf_SECRET\nhf_SECRET\n").unwrap();
    for (name, value, shown) in [
        ("HF_TOKEN", "hf_SEC\nRET", "the token in `HF_TOKEN` has more than one line"),
        (
            "HUGGING_FACE_HUB_TOKEN",
            "hf_SEC\u{1}RET",
            "the token in `HUGGING_FACE_HUB_TOKEN` contains control characters",
        ),
        ("HF_TOKEN_PATH", &file.display().to_string(), "my-token` has more than one line"),
    ] {
        let output = hub.command(&["download", REPO]).env(name, value).output().unwrap();
        hub.assert_fails(&output, shown, "copy the token again");
        assert!(!text(&output.stderr).contains("SEC"), "{}", text(&output.stderr));
    }
    assert!(hub.server.seen.lock().unwrap().iter().all(|seen| !seen.token));
}

#[test]
fn a_list_that_arrives_too_slowly_is_an_error() {
    let hub = Hub::new(Behavior { drip: true, ..Behavior::default() });
    let begun = Instant::now();
    let output = hub.command(&["download", REPO]).env("HF_HUB_DOWNLOAD_TIMEOUT", "1").output().unwrap();
    hub.assert_fails(&output, "cannot be used: ", "");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

/// Signals end a download immediately, and the next run resumes the partial file.
#[cfg(unix)]
#[test]
fn signals_end_a_download() {
    for signal in ["INT", "TERM", "HUP"] {
        if signal == "HUP" && moonlight_convert::hangup_is_ignored() {
            println!("SKIPPED: SIGHUP, which was ignored when the tests were started");
            continue;
        }
        let hub = Hub::new(Behavior { silent_once: true, ..Behavior::default() });
        let mut command = hub.command(&["download", REPO]);
        command.env("HF_HUB_DOWNLOAD_TIMEOUT", "60").stderr(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        while !fs::metadata(hub.partial_of_weights()).is_ok_and(|file| file.len() > 0) {
            assert!(begun.elapsed() < Duration::from_secs(20) && child.try_wait().unwrap().is_none(), "{signal}");
            std::thread::sleep(Duration::from_millis(5));
        }
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status().unwrap();
        let begun = Instant::now();
        assert!(sent.success() && !child.wait().unwrap().success());
        assert!(begun.elapsed() < Duration::from_secs(5), "{signal}");
        // A temporary file may be left by the signal; a download an hour later would remove it.
        let output = hub.download(&[]);
        for path in fs::read_dir(hub.snapshot()).unwrap().map(|entry| entry.unwrap().path()) {
            if path.file_name().unwrap().to_string_lossy().starts_with(".moonlight-") {
                fs::remove_file(path).unwrap();
            }
        }
        hub.assert_complete(&output);
        assert!(hub.server.starts().iter().any(|start| *start > 0), "{signal}: the file was not resumed");
    }
}
