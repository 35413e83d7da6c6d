//! The routes under `/api/runs`: the runs of a folder, their recipes, metrics and samples, for the page and for other clients.
//!
//! Everything is read from the files that a training writes anyway, so a run needs no connection to the server, and runs of
//! other processes and earlier days are shown too. Nothing is written.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use moonlight_convert::{CheckpointError, FileError};
use moonlight_infer::run_dir::checkpoint_folders;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::records::{MetricsPart, Position, SamplesPart, read_metrics, read_samples};
use super::run_list::{self, METRICS, RunList, RunSummary, RunsFolder, SAMPLES};

/// Requests that read files at once; further ones wait. It bounds memory, and threads that wait for a disk.
const READERS: usize = 4;
/// A longer `evaluation.json` is not shown.
const MAX_EVALUATION_BYTES: u64 = 1 << 20;
/// The most checkpoints that are listed for a run, the newest ones.
const MAX_CHECKPOINTS: usize = 100;

struct Runs {
    folder: RunsFolder,
    readers: Arc<Semaphore>,
}

/// The routes that show the runs in `folder`, or the one run if `folder` is that of a run:
///
/// | route | answer |
/// |---|---|
/// | `GET /api/runs` | name, state, steps and last losses of each run; those that changed last are first |
/// | `GET /api/runs/{name}` | the same of one run, with its recipe, checkpoints and evaluations |
/// | `GET /api/runs/{name}/metrics?after=BYTES&file=ID` | records of `metrics.jsonl` after a position |
/// | `GET /api/runs/{name}/samples?after=BYTES&file=ID` | the newest samples, unless the file is unchanged |
///
/// `after` and `file` are `next` and `file` of the last answer. An error is `{"error": {"message": ..., "code": ...}}`.
pub fn router(folder: PathBuf) -> Router {
    let runs = Runs { folder: RunsFolder::new(folder), readers: Arc::new(Semaphore::new(READERS)) };
    Router::new()
        .route("/api/runs", get(list))
        .route("/api/runs/{name}", get(details))
        .route("/api/runs/{name}/metrics", get(metrics))
        .route("/api/runs/{name}/samples", get(samples))
        .with_state(Arc::new(runs))
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
enum RunsError {
    #[error("there is no run `{0}`")]
    NoRun(String),
    #[error("the run `{run}` has no `{file}`")]
    NoFile { run: String, file: &'static str },
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the file cannot be read: {0}")]
    Io(#[from] std::io::Error),
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl IntoResponse for RunsError {
    fn into_response(self) -> Response {
        let (status, code) = match &self {
            Self::NoRun(_) => (StatusCode::NOT_FOUND, "run_not_found"),
            Self::NoFile { .. } => (StatusCode::NOT_FOUND, "file_not_found"),
            Self::File(_) | Self::Checkpoint(_) | Self::Io(_) => {
                tracing::warn!("{self}");
                (StatusCode::INTERNAL_SERVER_ERROR, "file_unreadable")
            }
            Self::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        };
        let error = json!({"error": {"message": self.to_string(), "type": "invalid_request_error", "code": code}});
        (status, Json(error)).into_response()
    }
}

/// Where a client's copy of a file ends.
#[derive(Debug, Deserialize)]
struct After {
    #[serde(default)]
    after: u64,
    file: Option<String>,
}

impl From<After> for Position {
    fn from(After { after, file }: After) -> Self {
        Self { after, file }
    }
}

/// The state of one run, with what does not change often.
#[derive(Debug, Serialize)]
struct RunDetails {
    #[serde(flatten)]
    summary: RunSummary,
    /// The text of `recipe.toml`.
    recipe: Option<String>,
    /// Its values by section and key.
    settings: Option<Value>,
    /// The steps of the checkpoints, the newest first. They are not checked here, and may be damaged.
    checkpoints: Vec<u64>,
    /// Results of the recipe's tasks before and after the training.
    evaluation: Option<Value>,
}

/// Runs `read` on a thread that may wait for a disk.
async fn read<T: Serialize + Send + 'static>(
    runs: Arc<Runs>,
    read: impl FnOnce(&RunsFolder) -> Result<T, RunsError> + Send + 'static,
) -> Result<Response, RunsError> {
    // The permit moves into the task: if the client goes away, the reading continues to its end, and still counts.
    let permit = Arc::clone(&runs.readers).acquire_owned().await.map_err(|_| RunsError::ShuttingDown)?;
    let task = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        read(&runs.folder)
    });
    let answer = task.await.map_err(|_| RunsError::ShuttingDown)??;
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(answer)).into_response())
}

async fn list(State(runs): State<Arc<Runs>>) -> Result<Response, RunsError> {
    read(runs, |folder| Ok::<RunList, _>(folder.list()?)).await
}

async fn details(State(runs): State<Arc<Runs>>, Path(name): Path<String>) -> Result<Response, RunsError> {
    read(runs, move |folder| {
        let run = find(folder, &name)?;
        let recipe = run_list::recipe(&run)?;
        let settings = recipe.as_deref().and_then(run_list::settings);
        let mut checkpoints: Vec<u64> = checkpoint_folders(&run.join("checkpoints"))?
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok())
            .collect();
        checkpoints.truncate(MAX_CHECKPOINTS);
        let evaluation = run_list::read_text(&run, "evaluation.json", MAX_EVALUATION_BYTES)?;
        let evaluation = evaluation.and_then(|text| serde_json::from_str(&text).ok());
        let summary = run_list::summary_of(&name, &run);
        Ok(RunDetails { summary, recipe, settings, checkpoints, evaluation })
    })
    .await
}

async fn metrics(
    State(runs): State<Arc<Runs>>,
    Path(name): Path<String>,
    Query(after): Query<After>,
) -> Result<Response, RunsError> {
    read(runs, move |folder| {
        let run = find(folder, &name)?;
        match run_list::open(&run, METRICS)? {
            Some(file) => Ok::<MetricsPart, _>(read_metrics(file, &after.into())?),
            None => Err(RunsError::NoFile { run: name, file: METRICS }),
        }
    })
    .await
}

async fn samples(
    State(runs): State<Arc<Runs>>,
    Path(name): Path<String>,
    Query(after): Query<After>,
) -> Result<Response, RunsError> {
    read(runs, move |folder| {
        let run = find(folder, &name)?;
        match run_list::open(&run, SAMPLES)? {
            Some(file) => Ok(read_samples(file, &after.into())?),
            // A run without samples is no error: its recipe asks for none.
            None => Ok(SamplesPart::default()),
        }
    })
    .await
}

fn find(folder: &RunsFolder, name: &str) -> Result<PathBuf, RunsError> {
    folder.find(name)?.ok_or_else(|| RunsError::NoRun(shortened(name)))
}

/// The name of a client's request in a message: a name of any length would make a message of any length.
fn shortened(name: &str) -> String {
    name.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;

    /// A server for a folder, on a port of its own.
    struct Served {
        address: std::net::SocketAddr,
        _runtime: tokio::runtime::Runtime,
    }

    impl Served {
        fn new(folder: PathBuf) -> Self {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
            let address = listener.local_addr().unwrap();
            runtime.spawn(async move { axum::serve(listener, router(folder)).await });
            Self { address, _runtime: runtime }
        }

        fn get(&self, path: &str) -> (u16, Value) {
            let mut stream = TcpStream::connect(self.address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            let status = answer[9..12].parse().unwrap();
            let body = answer.split_once("\r\n\r\n").unwrap().1;
            (status, serde_json::from_str(body).unwrap_or(Value::Null))
        }
    }

    #[test]
    fn a_run_is_shown_while_it_is_written() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("runs/a b");
        fs::create_dir_all(run.join("checkpoints/step-00000004")).unwrap();
        fs::write(run.join("recipe.toml"), "[train]\nsteps = 8\n").unwrap();
        fs::write(run.join("metrics.jsonl"), "{\"split\":\"train\",\"step\":4,\"loss\":2.5}\n").unwrap();
        fs::write(run.join("samples.jsonl"), "{\"step\":4,\"prompt\":\"a\",\"text\":\"b\"}\n").unwrap();
        let server = Served::new(home.path().join("runs"));
        let (status, list) = server.get("/api/runs");
        assert_eq!((status, &list["runs"][0]["name"], &list["runs"][0]["steps"]), (200, &json!("a b"), &json!(8)));
        let (_, details) = server.get("/api/runs/a%20b");
        assert_eq!(details["settings"]["train"]["steps"], 8);
        assert_eq!((&details["recipe"], &details["checkpoints"]), (&json!("[train]\nsteps = 8\n"), &json!([4])));
        assert_eq!((&details["name"], &details["state"]), (&json!("a b"), &json!("stopped")));
        let (_, part) = server.get("/api/runs/a%20b/metrics");
        assert_eq!(part["records"], json!([{"split": "train", "step": 4, "loss": 2.5}]));
        let position = format!("after={}&file={}", part["next"], part["file"].as_str().unwrap());
        let mut file = fs::File::options().append(true).open(run.join("metrics.jsonl")).unwrap();
        file.write_all(b"{\"split\":\"train\",\"step\":5,\"loss\":2.25}\n").unwrap();
        let (_, part) = server.get(&format!("/api/runs/a%20b/metrics?{position}"));
        assert_eq!(part["records"], json!([{"split": "train", "step": 5, "loss": 2.25}]));
        let (_, samples) = server.get("/api/runs/a%20b/samples");
        assert_eq!(samples["samples"], json!([{"step": 4, "prompt": "a", "text": "b"}]));
    }

    #[test]
    fn every_error_has_a_status_a_code_and_a_sentence() {
        let missing = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let path = std::path::Path::new("runs/a");
        let errors = [
            RunsError::NoRun("a".into()),
            RunsError::NoFile { run: "a".into(), file: METRICS },
            RunsError::File(FileError::read(path)(missing())),
            RunsError::Checkpoint(CheckpointError::Link { path: path.to_owned() }),
            RunsError::Io(missing()),
            RunsError::ShuttingDown,
        ];
        let lines = errors.map(|error| {
            let sentence = error.to_string();
            format!("{} {sentence}", error.into_response().status().as_u16())
        });
        let expected = [
            "404 there is no run `a`",
            "404 the run `a` has no `metrics.jsonl`",
            "500 `runs/a` cannot be read: permission denied",
            "500 `runs/a` is a symbolic link that leads out of the directory",
            "500 the file cannot be read: permission denied",
            "503 the server is shutting down",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let home = tempfile::tempdir().unwrap();
        let (runs, outside) = (home.path().join("runs"), home.path().join("outside"));
        for run in [&runs.join("a"), &outside] {
            fs::create_dir_all(run).unwrap();
            fs::write(run.join("recipe.toml"), "[train]\n").unwrap();
        }
        let server = Served::new(runs);
        for name in ["..", "%2e%2e", "..%2foutside", "%2e%2e%2foutside", "a%2f..%2f..%2foutside", "%00", "nonsense"] {
            for path in ["", "/metrics", "/samples"] {
                let (status, body) = server.get(&format!("/api/runs/{name}{path}"));
                assert_eq!((status, &body["error"]["code"]), (404, &json!("run_not_found")), "{name}{path}");
            }
        }
        assert_eq!(server.get("/api/runs/../outside").0, 404);
        let (status, body) = server.get("/api/runs/a/metrics");
        assert_eq!((status, &body["error"]["message"]), (404, &json!("the run `a` has no `metrics.jsonl`")));
        assert_eq!(server.get("/api/runs/a/samples").1["samples"], json!([]));
        for query in ["after=-1", "after=x", "after=99999999999999999999999"] {
            assert_eq!(server.get(&format!("/api/runs/a/samples?{query}")).0, 400, "{query}");
        }
    }
}
