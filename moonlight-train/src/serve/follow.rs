//! Serves a training while it runs: watches its folder, and replaces the served model by each new checkpoint, without a
//! restart.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, SystemTime};

use moonlight_convert::adapter::{base_of, is_adapter, load_adapter_with_head};
use moonlight_convert::manifest::Depth;
use moonlight_convert::{Checkpoint, CheckpointError, Printable, TiedHead};
use moonlight_infer::engine::{Engine, EngineError};
use moonlight_infer::run_dir::{
    CheckpointStatus, LockAttempt, ReadLock, check_checkpoint, checkpoint_folders, checkpoint_name,
};
use moonlight_infer::{OpenOptions, OpenedModel};
use moonlight_model::CausalLm;

use crate::error::TrainError;

/// How often the folder of the run is looked at.
const EVERY: Duration = Duration::from_secs(2);

/// Serves the newest complete checkpoint of a run: full weights, or the adapter of a LoRA run over its base model, which is
/// loaded once.
///
/// The model has the name of the run. A second name, `run@step-00000100`, contains its step. Requests that are running when a new checkpoint appears finish on the old one.
#[derive(Debug)]
pub struct Follower {
    run: PathBuf,
    name: String,
    options: OpenOptions,
    base: Option<Base>,
    served: Option<Version>,
    /// The checkpoint that [`open`](Follower::open) returned.
    opened: Option<Version>,
    /// Problems that were logged, so that each is logged once and not at every look.
    logged: HashSet<String>,
    /// Checkpoints that could not be loaded or served. They are not tried again.
    failed: HashSet<Version>,
}

/// The model under the adapters of a LoRA run.
#[derive(Debug)]
struct Base {
    model: CausalLm,
    head: TiedHead,
}

/// A checkpoint, and when it was written: a run that starts again writes other weights under the same name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Version {
    step: u64,
    written: SystemTime,
}

/// A complete checkpoint that is locked for reading.
struct Found {
    version: Version,
    path: PathBuf,
    _lock: Option<ReadLock>,
}

impl Follower {
    /// Follows the run in the folder `run`. The checkpoints are opened with the device, dtype and quantization of `options`.
    pub fn new(run: &Path, options: OpenOptions) -> Self {
        let real = std::fs::canonicalize(run).unwrap_or_else(|_| run.to_owned());
        let name = real.file_name().map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned());
        Self {
            run: run.to_owned(),
            name,
            options,
            base: None,
            served: None,
            opened: None,
            logged: HashSet::new(),
            failed: HashSet::new(),
        }
    }

    /// The adapters of a LoRA run are applied to this model, which is already loaded, instead of the one that their config
    /// names.
    ///
    /// # Errors
    ///
    /// The files of the model cannot be opened again.
    pub fn with_base(mut self, base: &OpenedModel) -> Result<Self, TrainError> {
        self.base = Some(Base::of(base)?);
        Ok(self)
    }

    /// The name of the model: that of the run.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens the newest complete checkpoint, for a server that starts with it; `None` if the run has none yet.
    /// [`adopt`](Self::adopt) serves it.
    ///
    /// # Errors
    ///
    /// [`TrainError`]: files that cannot be read, or a model that cannot be opened.
    pub fn open(&mut self) -> Result<Option<OpenedModel>, TrainError> {
        let Some(found) = self.newest()? else { return Ok(None) };
        self.opened = Some(found.version);
        if !is_adapter(&found.path) {
            return Ok(Some(self.options.open(&found.path)?));
        }
        let base = self.options.open(base_of(&found.path)?)?;
        if self.base.is_none() {
            self.base = Some(Base::of(&base)?);
        }
        let model = self.load(&found.path)?;
        Ok(Some(OpenedModel { model, ..base }))
    }

    /// Serves what [`open`](Self::open) returned, under the name of the run and with its step.
    ///
    /// # Errors
    ///
    /// [`EngineError::OtherModel`].
    pub fn adopt(&mut self, engine: &Engine, opened: &OpenedModel) -> Result<(), EngineError> {
        let Some(version) = self.opened.take() else { return Ok(()) };
        self.serve(engine, opened.model.clone(), &version)
    }

    /// Serves the newest complete checkpoint, if it is not the one that is served, and returns its step. A checkpoint that is
    /// damaged or cannot be loaded is logged once as a warning, and the next one is tried.
    pub fn update(&mut self, engine: &Engine) -> Option<u64> {
        let found = match self.newest() {
            Ok(found) => found?,
            Err(error) => {
                let run = self.run.display().to_string();
                self.warn(format!("`{}` cannot be read: {}", Printable(&run), Printable(&error.to_string())));
                return None;
            }
        };
        let served = self.load(&found.path).map_err(|error| error.to_string());
        let served =
            served.and_then(|model| self.serve(engine, model, &found.version).map_err(|error| error.to_string()));
        match served {
            Ok(()) => {
                tracing::info!("serving step {} of `{}`", found.version.step, Printable(&self.name));
                Some(found.version.step)
            }
            Err(problem) => {
                let path = found.path.display().to_string();
                self.warn(format!("ignored `{}`: {}", Printable(&path), Printable(&problem)));
                self.failed.insert(found.version);
                None
            }
        }
    }

    /// Replaces the model, and the name with the step.
    fn serve(&mut self, engine: &Engine, model: CausalLm, version: &Version) -> Result<(), EngineError> {
        let numbered = |step| format!("{}@{}", self.name, checkpoint_name(step));
        engine.set_model(&self.name, model.clone())?;
        engine.set_model(&numbered(version.step), model)?;
        if let Some(old) = self.served.as_ref().filter(|old| old.step != version.step) {
            // Another user of the engine may have removed it.
            let _ = engine.remove_model(&numbered(old.step));
        }
        self.served = Some(version.clone());
        Ok(())
    }

    /// The newest complete checkpoint, unless it is served, or older than what is served.
    fn newest(&mut self) -> Result<Option<Found>, CheckpointError> {
        for path in checkpoint_folders(&self.run.join("checkpoints"))? {
            // The lock comes before the check, so that the checkpoint is not removed while it is checked and read.
            let lock = match ReadLock::acquire(&path) {
                LockAttempt::Held(lock) => Some(lock),
                // The run is removing it.
                LockAttempt::Busy => continue,
                LockAttempt::Unsupported => None,
            };
            let Some(written) = written(&path) else { continue };
            match check_checkpoint(&path, Depth::Sizes)? {
                CheckpointStatus::Complete { step } => {
                    let version = Version { step, written };
                    if self.failed.contains(&version) {
                        continue;
                    }
                    let is_new = self.served.as_ref().is_none_or(|served| {
                        version != *served && (step > served.step || version.written > served.written)
                    });
                    return Ok(is_new.then_some(Found { version, path, _lock: lock }));
                }
                // It was removed since it was listed.
                CheckpointStatus::Damaged(_) if !path.is_dir() => {}
                CheckpointStatus::Damaged(problem) => {
                    let path = path.display().to_string();
                    self.warn(format!(
                        "ignored the damaged checkpoint `{}`: {}",
                        Printable(&path),
                        Printable(&problem)
                    ));
                }
                CheckpointStatus::Newer { version } => {
                    let path = path.display().to_string();
                    self.warn(format!("ignored `{}`: a newer program wrote it (version {version})", Printable(&path)));
                }
            }
        }
        Ok(None)
    }

    /// Loads a checkpoint. For an adapter the base model is loaded the first time, and shared from then on.
    fn load(&mut self, path: &Path) -> Result<CausalLm, TrainError> {
        if !is_adapter(path) {
            return Ok(self.options.open(path)?.model);
        }
        let base = match self.base.take() {
            Some(base) => base,
            None => Base::of(&self.options.open(base_of(path)?)?)?,
        };
        let base = self.base.insert(base);
        Ok(load_adapter_with_head(base.model.clone(), base.head, path)?)
    }

    fn warn(&mut self, message: String) {
        if self.logged.insert(message.clone()) {
            tracing::warn!("{message}");
        }
    }

    /// Updates the engine from a thread of its own, until the returned value is dropped or the engine ends.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub fn start(mut self, engine: Engine) -> Result<Following, TrainError> {
        let (stop, stopped) = channel::<()>();
        let watch = move || {
            while matches!(stopped.recv_timeout(EVERY), Err(RecvTimeoutError::Timeout)) {
                self.update(&engine);
            }
        };
        let thread = std::thread::Builder::new().name("follow".into()).spawn(watch);
        thread
            .map_err(|error| TrainError::Internal(format!("the thread that follows the run cannot start: {error}")))?;
        Ok(Following { _stop: stop })
    }
}

impl Base {
    fn of(opened: &OpenedModel) -> Result<Self, TrainError> {
        // Only the headers of the files are read.
        let head = Checkpoint::open(&opened.dir).map_err(moonlight_infer::InferError::from)?.tied_head();
        Ok(Self { model: opened.model.clone(), head })
    }
}

/// A run that is followed. The thread ends when this is dropped, after a checkpoint that it may be loading.
#[derive(Debug)]
pub struct Following {
    /// The thread waits on the other end.
    _stop: Sender<()>,
}

/// When a checkpoint was written: its folder gets its name at the end.
fn written(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use burn::module::Module;
    use moonlight_convert::adapter::write_adapter;
    use moonlight_convert::manifest::Manifest;
    use moonlight_convert::{SaveOptions, save};
    use moonlight_infer::engine::{EngineOptions, Event, Request};
    use moonlight_infer::run_dir::TRAINER_STATE;
    use moonlight_model::ModelConfig;
    use moonlight_model::lora::LoraConfig;

    use super::*;

    /// Writes a complete checkpoint of random weights.
    fn checkpoint(run: &Path, step: u64, seed: u64) -> PathBuf {
        let mut config = ModelConfig::preset("bench-small").unwrap();
        (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (50, 2, 32);
        let device = burn::tensor::Device::default();
        device.seed(seed);
        let dir = run.join("checkpoints").join(checkpoint_name(step));
        save(&config.init(&device).materialize(), &dir, &SaveOptions::default()).unwrap();
        fs::write(dir.join(TRAINER_STATE), format!(r#"{{"version": 2, "step": {step}}}"#)).unwrap();
        Manifest::compute(&dir).unwrap().write(&dir).unwrap();
        dir
    }

    fn follower(run: &Path) -> Follower {
        Follower::new(run, OpenOptions::new().with_device("cpu"))
    }

    /// The tokens that a model of the engine writes.
    fn written_by(engine: &Engine, model: &str) -> Vec<u32> {
        let mut events = engine.submit(Request::new(model, vec![1, 2, 3], 8)).unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = events.blocking_next() {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        assert!(!tokens.is_empty());
        tokens
    }

    fn started(run: &Path) -> (Follower, Engine) {
        let mut follower = follower(run);
        let opened = follower.open().unwrap().unwrap();
        let options = EngineOptions { context: 64, ..EngineOptions::default() };
        let engine = Engine::start(follower.name(), opened.model.clone(), options).unwrap();
        follower.adopt(&engine, &opened).unwrap();
        (follower, engine)
    }

    #[test]
    fn each_new_checkpoint_is_served_without_a_restart() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("demo");
        assert!(follower(&run).open().unwrap().is_none());
        checkpoint(&run, 100, 1);
        let (mut follower, engine) = started(&run);
        assert_eq!(engine.models(), ["demo", "demo@step-00000100"]);
        let first = written_by(&engine, "demo");
        assert_eq!(follower.update(&engine), None);
        checkpoint(&run, 200, 2);
        assert_eq!(follower.update(&engine), Some(200));
        assert_eq!(engine.models(), ["demo", "demo@step-00000200"]);
        let second = written_by(&engine, "demo");
        assert!(second != first && second == written_by(&engine, "demo@step-00000200"));
        // An older checkpoint that is still there is not served again.
        assert_eq!(follower.update(&engine), None);
    }

    #[test]
    fn a_damaged_checkpoint_is_ignored_and_warned_of_once() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("demo");
        checkpoint(&run, 100, 1);
        let (mut follower, engine) = started(&run);
        fs::write(checkpoint(&run, 200, 2).join("config.json"), "{}").unwrap();
        fs::create_dir(run.join("checkpoints/.step-00000300.moonlight-saving")).unwrap();
        // Complete by its manifest, and no model.
        let broken = checkpoint(&run, 400, 3);
        fs::write(broken.join("config.json"), "{}").unwrap();
        Manifest::compute(&broken).unwrap().write(&broken).unwrap();
        for _ in 0..3 {
            assert_eq!(follower.update(&engine), None);
        }
        assert_eq!(follower.logged.len(), 2, "{:?}", follower.logged);
        assert_eq!(engine.models(), ["demo", "demo@step-00000100"]);
        checkpoint(&run, 500, 4);
        assert_eq!(follower.update(&engine), Some(500));
    }

    #[test]
    fn a_run_that_starts_again_is_served_from_its_first_checkpoint() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("demo");
        let old = checkpoint(&run, 500, 1);
        let (mut follower, engine) = started(&run);
        fs::remove_dir_all(old).unwrap();
        checkpoint(&run, 100, 2);
        assert_eq!(follower.update(&engine), Some(100));
        assert_eq!(engine.models(), ["demo", "demo@step-00000100"]);
    }

    /// Writes a complete checkpoint of a LoRA run. A new adapter changes no output.
    fn adapter_checkpoint(run: &Path, base: &Path, step: u64) {
        let model = OpenOptions::new().with_device("cpu").open(base).unwrap().model;
        let model = model.with_lora(&LoraConfig::new(), step).unwrap();
        let dir = run.join("checkpoints").join(checkpoint_name(step));
        fs::create_dir_all(&dir).unwrap();
        write_adapter(&model, &dir, base, None).unwrap();
        fs::write(dir.join(TRAINER_STATE), format!(r#"{{"version": 2, "step": {step}}}"#)).unwrap();
        Manifest::compute(&dir).unwrap().write(&dir).unwrap();
    }

    #[test]
    fn adapters_are_served_over_their_base() {
        let home = tempfile::tempdir().unwrap();
        let (run, base) = (home.path().join("demo"), checkpoint(&home.path().join("base"), 1, 1));
        adapter_checkpoint(&run, &base, 100);
        let (mut follower, engine) = started(&run);
        assert_eq!(engine.models(), ["demo", "demo@step-00000100"]);
        // The base is not read again.
        fs::remove_file(base.join("model.safetensors")).unwrap();
        let model = follower.base.as_ref().unwrap().model.clone();
        engine.set_model("base", model).unwrap();
        assert_eq!(written_by(&engine, "demo"), written_by(&engine, "base"));
        let other = checkpoint(&home.path().join("other"), 1, 1);
        adapter_checkpoint(&run, &other, 200);
        assert_eq!(follower.update(&engine), Some(200));
        assert_eq!(engine.models(), ["base", "demo", "demo@step-00000200"]);
        assert_eq!(written_by(&engine, "demo"), written_by(&engine, "base"));
    }

    #[test]
    fn adapters_are_served_over_a_model_that_is_loaded_already() {
        let home = tempfile::tempdir().unwrap();
        let (run, base) = (home.path().join("demo"), checkpoint(&home.path().join("base"), 1, 1));
        let opened = OpenOptions::new().with_device("cpu").open(&base).unwrap();
        let options = EngineOptions { context: 64, ..EngineOptions::default() };
        let engine = Engine::start("base", opened.model.clone(), options).unwrap();
        let mut follower = follower(&run).with_base(&opened).unwrap();
        assert_eq!(follower.update(&engine), None);
        adapter_checkpoint(&run, &base, 100);
        assert_eq!(follower.update(&engine), Some(100));
        assert_eq!(engine.models(), ["base", "demo", "demo@step-00000100"]);
        assert_eq!(written_by(&engine, "demo"), written_by(&engine, "base"));
    }

    #[test]
    fn a_checkpoint_is_locked_only_while_it_is_read() {
        let home = tempfile::tempdir().unwrap();
        let run = home.path().join("demo");
        let dir = checkpoint(&run, 100, 1);
        let (_follower, engine) = started(&run);
        assert!(fs::File::open(&dir).unwrap().try_lock().is_ok());
        fs::remove_dir_all(dir).unwrap();
        written_by(&engine, "demo");
    }
}
