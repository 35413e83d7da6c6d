//! The runs in a folder, and the state of each.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use moonlight_convert::{CheckpointError, ConfinedDir, FileError};
use serde::Serialize;
use serde_json::Value;

use super::records;
use crate::trainer::LOCK_FILE;

/// The runs of a list. Of more runs, those that changed last are listed.
const MAX_RUNS: usize = 200;
/// The end of `metrics.jsonl` that is read for the list.
const TAIL_BYTES: u64 = 64 << 10;
/// A longer recipe is not read.
pub(super) const MAX_RECIPE_BYTES: u64 = 1 << 20;
pub(super) const RECIPE: &str = "recipe.toml";
pub(super) const METRICS: &str = "metrics.jsonl";
pub(super) const SAMPLES: &str = "samples.jsonl";

/// Whether a run is in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RunState {
    /// A process trains in the folder.
    Running,
    /// The last step was taken.
    Finished,
    /// It ended before its last step, and can be resumed.
    Stopped,
}

/// A run in the list.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct RunSummary {
    pub(super) name: String,
    pub(super) state: RunState,
    /// Steps taken.
    pub(super) step: u64,
    /// The steps of the recipe; absent if the recipe cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) steps: Option<u64>,
    /// The last training loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) loss: Option<f64>,
    /// The last validation loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) valid_loss: Option<f64>,
    /// When the metrics were last written, in seconds since 1970.
    pub(super) modified: u64,
}

/// The list of runs.
#[derive(Debug, Serialize)]
pub(super) struct RunList {
    pub(super) runs: Vec<RunSummary>,
    /// Runs that are not listed, because there are too many.
    pub(super) left_out: usize,
}

/// A folder with runs; or the folder of one run, which is then the only one.
#[derive(Debug, Clone)]
pub(super) struct RunsFolder(PathBuf);

impl RunsFolder {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// The names and folders of all runs. A name that is hidden or not UTF-8 is left out.
    fn entries(&self) -> Result<Vec<(String, PathBuf)>, FileError> {
        if is_run(&self.0) {
            let real = fs::canonicalize(&self.0).map_err(FileError::read(&self.0))?;
            let name = real.file_name().and_then(|name| name.to_str()).unwrap_or("run").to_owned();
            return Ok(vec![(name, self.0.clone())]);
        }
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            // The first training creates it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(FileError::read(&self.0)(error)),
        };
        let named = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            (!name.starts_with('.')).then(|| (name, entry.path()))
        });
        Ok(named.filter(|(_, path)| is_run(path)).collect())
    }

    /// The folder of a run. The name comes from a client: it is compared with the names that exist, and never becomes part of
    /// a path.
    pub(super) fn find(&self, name: &str) -> Result<Option<PathBuf>, FileError> {
        Ok(self.entries()?.into_iter().find(|(known, _)| known == name).map(|(_, path)| path))
    }

    /// All runs, those that changed last first.
    pub(super) fn list(&self) -> Result<RunList, FileError> {
        let mut entries: Vec<_> =
            self.entries()?.into_iter().map(|(name, path)| (modified(&path), name, path)).collect();
        entries.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        let left_out = entries.len().saturating_sub(MAX_RUNS);
        entries.truncate(MAX_RUNS);
        let runs = entries.into_iter().map(|(modified, name, path)| summary(name, &path, modified)).collect();
        Ok(RunList { runs, left_out })
    }
}

fn is_run(folder: &Path) -> bool {
    folder.join(METRICS).is_file() || folder.join(RECIPE).is_file()
}

/// When the metrics of a run were last written; before the first step, when its recipe was.
fn modified(run: &Path) -> u64 {
    let time = |name: &str| fs::metadata(run.join(name)).and_then(|metadata| metadata.modified()).ok();
    let time: Option<SystemTime> = time(METRICS).or_else(|| time(RECIPE));
    time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |time| time.as_secs())
}

/// The summary of a run. A file that cannot be read leaves its values out: one damaged run does not hide the others.
pub(super) fn summary(name: String, run: &Path, modified: u64) -> RunSummary {
    let steps = recipe(run).ok().flatten().and_then(|text| settings(&text)).and_then(|settings| steps(&settings));
    let (mut step, mut loss, mut valid_loss) = (0, None, None);
    let end = open(run, METRICS).ok().flatten().and_then(|mut file| {
        let size = file.metadata().ok()?.len();
        records::tail(&mut file, size, TAIL_BYTES).ok()
    });
    for line in records::lines(&end.unwrap_or_default()).rev() {
        let Ok(record) = serde_json::from_slice::<Value>(line) else { continue };
        step = step.max(record["step"].as_u64().unwrap_or(0));
        let last = match record["split"].as_str() {
            Some("train") => &mut loss,
            Some("valid") => &mut valid_loss,
            _ => continue,
        };
        *last = last.or(record["loss"].as_f64());
        if loss.is_some() && valid_loss.is_some() {
            break;
        }
    }
    let state = match (is_locked(run), steps) {
        (true, _) => RunState::Running,
        (false, Some(steps)) if step >= steps => RunState::Finished,
        (false, _) => RunState::Stopped,
    };
    RunSummary { name, state, step, steps, loss, valid_loss, modified }
}

/// The summary of one run by its folder.
pub(super) fn summary_of(name: &str, run: &Path) -> RunSummary {
    summary(name.to_owned(), run, modified(run))
}

/// Whether a process trains in the folder. The check holds a shared lock for an instant, which a process that claims the
/// folder waits for (`trainer/run_folder.rs`).
fn is_locked(run: &Path) -> bool {
    let Ok(file) = File::open(run.join(LOCK_FILE)) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Opens a file of a run; `None` if it does not exist. Links out of the run's folder are refused.
pub(super) fn open(run: &Path, name: &str) -> Result<Option<File>, CheckpointError> {
    let dir = ConfinedDir::new(run).map_err(FileError::read::<CheckpointError>(run))?;
    Ok(dir.open(name, u64::MAX)?.map(|(file, _)| file))
}

/// The text of a small file of a run.
pub(super) fn read_text(run: &Path, name: &str, most: u64) -> Result<Option<String>, CheckpointError> {
    let dir = ConfinedDir::new(run).map_err(FileError::read::<CheckpointError>(run))?;
    Ok(dir.read(name, most)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// The recipe of a run, with every default.
pub(super) fn recipe(run: &Path) -> Result<Option<String>, CheckpointError> {
    read_text(run, RECIPE, MAX_RECIPE_BYTES)
}

/// The values of a recipe by section and key; `None` if it cannot be parsed.
pub(super) fn settings(recipe: &str) -> Option<Value> {
    toml::from_str::<toml::Table>(recipe).ok().and_then(|table| serde_json::to_value(table).ok())
}

fn steps(settings: &Value) -> Option<u64> {
    settings["train"]["steps"].as_u64().filter(|steps| *steps > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(folder: &Path, name: &str, metrics: &str) -> PathBuf {
        let run = folder.join(name);
        fs::create_dir_all(&run).unwrap();
        fs::write(run.join(RECIPE), "[train]\nsteps = 3\n").unwrap();
        fs::write(run.join(METRICS), metrics).unwrap();
        run
    }

    const LINES: &str =
        "{\"split\":\"valid\",\"step\":1,\"loss\":9}\n{\"split\":\"train\",\"step\":2,\"loss\":2.5}\n{\"sp";

    #[test]
    fn a_run_is_listed_with_its_state_and_last_losses() {
        let home = tempfile::tempdir().unwrap();
        let runs = RunsFolder::new(home.path().to_owned());
        let stopped = run(home.path(), "b", LINES);
        run(home.path(), "finished", "{\"split\":\"train\",\"step\":3,\"loss\":1}\n");
        run(home.path(), "new", "");
        fs::write(run(home.path(), "damaged", "\u{0}\n[]\n{}\n").join(RECIPE), "= =").unwrap();
        run(home.path(), ".hidden", LINES);
        fs::create_dir(home.path().join("not-a-run")).unwrap();
        fs::write(home.path().join("file"), "").unwrap();
        let list = runs.list().unwrap();
        let found = |name: &str| list.runs.iter().find(|run| run.name == name).unwrap().clone();
        assert_eq!((list.runs.len(), list.left_out), (4, 0));
        let b = found("b");
        assert_eq!(
            (b.state, b.step, b.steps, b.loss, b.valid_loss),
            (RunState::Stopped, 2, Some(3), Some(2.5), Some(9.0))
        );
        assert!(b.modified > 1_600_000_000);
        assert_eq!((found("finished").state, found("finished").valid_loss), (RunState::Finished, None));
        assert_eq!((found("new").state, found("new").step), (RunState::Stopped, 0));
        assert_eq!((found("damaged").steps, found("damaged").loss), (None, None));
        let lock = File::create(stopped.join(LOCK_FILE)).unwrap();
        lock.lock().unwrap();
        assert_eq!(summary_of("b", &stopped).state, RunState::Running);
        drop(lock);
        assert_eq!(summary_of("b", &stopped).state, RunState::Stopped);
    }

    #[test]
    fn a_name_is_never_a_path() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("runs");
        run(&folder, "a", LINES);
        run(home.path(), "outside", LINES);
        let runs = RunsFolder::new(folder);
        assert!(runs.find("a").unwrap().is_some());
        for name in ["../outside", "..", ".", "", "a/", "./a", "a/../a", "/etc", "outside", "a\0"] {
            assert_eq!(runs.find(name).unwrap(), None, "{name:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_links_out_of_the_run_is_not_read() {
        let home = tempfile::tempdir().unwrap();
        let path = run(home.path(), "a", LINES);
        fs::write(home.path().join("secret"), "secret").unwrap();
        fs::remove_file(path.join(RECIPE)).unwrap();
        std::os::unix::fs::symlink(home.path().join("secret"), path.join(RECIPE)).unwrap();
        assert!(matches!(recipe(&path), Err(CheckpointError::Link { .. })));
        assert_eq!(summary_of("a", &path).steps, None);
    }

    #[test]
    fn the_folder_may_be_one_run_or_absent_and_long_lists_are_cut() {
        let home = tempfile::tempdir().unwrap();
        assert!(RunsFolder::new(home.path().join("absent")).list().unwrap().runs.is_empty());
        let path = run(home.path(), "only", LINES);
        let one = RunsFolder::new(path.clone());
        assert_eq!(one.list().unwrap().runs[0].name, "only");
        assert_eq!(one.find("only").unwrap(), Some(path));
        for index in 0..MAX_RUNS + 5 {
            run(&home.path().join("many"), &format!("{index:04}"), "");
        }
        let list = RunsFolder::new(home.path().join("many")).list().unwrap();
        assert_eq!((list.runs.len(), list.left_out), (MAX_RUNS, 5));
    }
}
