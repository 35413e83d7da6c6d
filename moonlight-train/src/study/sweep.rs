//! `moonlight sweep`: trains the runs that a study still needs, several processes at once, and adds a row for each to its table.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::budget::{Budget, Used};
use super::cost::Cost;
use super::measure::measure;
use super::points::{Progress, Wanted};
use super::run_table::{Measured, RunRow, RunTable};
use super::settings::{RunSettings, base_runs, find_base, resolve};
use super::study_file::{Study, Tier};
use crate::data::text_digest;
use crate::error::TrainError;
use crate::recipe::Recipe;

/// How often ended processes are looked for.
const POLL: Duration = Duration::from_millis(100);

/// How long a run that another process trains is left alone.
const BUSY: Duration = Duration::from_secs(5);

/// The file in the folder of a run that ended and was measured.
const COMPLETE: &str = "complete";

/// The end of a run's stderr that an error quotes.
const QUOTED_BYTES: usize = 600;

/// How a study is run.
#[derive(Debug, Clone)]
pub struct SweepOptions {
    /// The devices that runs are divided among, one run at a time on each; a device may be listed several times.
    pub devices: Vec<String>,
    /// CPU threads of each run.
    pub threads: usize,
    /// A command before the program, such as `mpirun -n 4`.
    pub launcher: Vec<String>,
    /// After which no further run is started.
    pub budget: Budget,
}

/// How a sweep ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SweepOutcome {
    /// Runs that this sweep added.
    pub added: usize,
    /// Runs that are still missing, as far as they are known: a search may need more.
    pub missing: usize,
    /// Whether it was stopped by a signal.
    pub interrupted: bool,
}

/// A run in progress.
struct Running {
    child: Child,
    settings: RunSettings,
    /// What it is for; `None` for a run of another study, whose weights are needed and whose row exists.
    wanted: Option<Wanted>,
    recipe: Recipe,
    slot: usize,
    start: Instant,
}

/// What can be done for a run that is missing.
enum Next {
    /// Start it, with these settings.
    Start(Box<Job>),
    /// Wait for a run in progress.
    Wait,
}

/// A process to start.
struct Job {
    wanted: Option<Wanted>,
    settings: RunSettings,
    recipe: PathBuf,
    sets: Vec<String>,
}

/// A study, its table and what is running.
struct Sweep<'a> {
    study: &'a Study,
    options: &'a SweepOptions,
    table: RunTable,
    text: String,
    running: Vec<Running>,
    /// Names of runs that another process trains, and when to look again.
    busy: Vec<(String, Instant)>,
    added: usize,
    /// Of the budget.
    used: Used,
}

/// Trains what is missing until everything is done, the budget is used up, or `stop` is set.
///
/// # Errors
///
/// A run that fails for another reason than a non-finite loss, and files that cannot be read or written. Rows that were added before
/// are kept.
pub fn sweep(study: &Study, options: &SweepOptions, stop: &AtomicBool) -> Result<SweepOutcome, TrainError> {
    let text = study_text(study)?;
    let mut table = RunTable::read(study, Some(&text))?;
    table.lock()?;
    if table.other_text > 0 {
        tracing::warn!("{} rows are of another text, or repeated, and do not count", table.other_text);
    }
    let (running, busy, used) = (Vec::new(), Vec::new(), Used::default());
    let mut sweep = Sweep { study, options, table, text, running, busy, added: 0, used };
    let outcome = sweep.run(stop);
    if outcome.is_err() {
        sweep.end_all();
    }
    outcome
}

/// The hash of the text that the study's runs see.
fn study_text(study: &Study) -> Result<String, TrainError> {
    let table = RunTable::read(study, None)?;
    let first = Wanted {
        point: super::points::points(&study.tier.axes).swap_remove(0),
        tuned: None,
        seed: study.tier.seeds[0],
    };
    let sets = table.base().run(study, &first).sets;
    // The weights that a run starts from need not exist yet.
    let sets: Vec<_> = sets.into_iter().filter(|set| !set.contains("{run:")).collect();
    let draft = crate::recipe::Draft::load(&study.tier.recipe, &sets)?;
    text_digest(draft.data())
}

impl Sweep<'_> {
    fn run(&mut self, stop: &AtomicBool) -> Result<SweepOutcome, TrainError> {
        let start = Instant::now();
        let mut signaled = false;
        let mut progress = Progress::new(self.study, &self.table);
        let (done, ready, waiting) = (progress.done.len(), progress.ready.len(), progress.waiting);
        tracing::info!("{done} runs are done, {ready} can start, {waiting} points wait for their search");
        loop {
            let added = self.added;
            self.collect(stop)?;
            if self.added > added {
                progress = Progress::new(self.study, &self.table);
            }
            self.busy.retain(|(_, until)| *until > Instant::now());
            let stopped = stop.load(Ordering::Relaxed);
            if stopped && !signaled {
                self.running.iter().for_each(|run| ask_to_stop(&run.child));
                signaled = true;
            }
            self.used.time = start.elapsed();
            if !stopped {
                self.start_ready(&progress)?;
            }
            if self.running.is_empty() && self.busy.is_empty() {
                let missing = progress.ready.len() + progress.waiting * self.study.tier.seeds.len();
                return Ok(SweepOutcome { added: self.added, missing, interrupted: stopped });
            }
            sleep(POLL);
        }
    }

    /// Starts what is missing on the devices that are free.
    fn start_ready(&mut self, progress: &Progress) -> Result<(), TrainError> {
        for wanted in &progress.ready {
            if self.running.len() == self.options.devices.len() || self.options.budget.is_used_up(self.used) {
                break;
            }
            let settings = self.table.base().run(self.study, wanted);
            if self.is_in_progress(&settings.name) {
                continue;
            }
            if let Next::Start(job) = self.next(wanted, settings)? {
                self.spawn(*job)?;
            }
        }
        Ok(())
    }

    fn is_in_progress(&self, name: &str) -> bool {
        self.running.iter().any(|run| run.settings.name == name) || self.busy.iter().any(|(busy, _)| busy == name)
    }

    /// The job for a run: itself, or first the run of another study whose weights it starts from and which is not on this machine.
    fn next(&self, wanted: &Wanted, settings: RunSettings) -> Result<Next, TrainError> {
        let mut folders = Vec::new();
        for base in base_runs(self.study, &settings) {
            let study = Study::open(&base.study, &self.study.tier_name)?;
            let table = RunTable::read(&study, None)?;
            let Some(found) = find_base(&study, &table, &base.point, wanted.seed) else {
                return Err(TrainError::Request {
                    problem: format!(
                        "`{}` starts from a run of the study `{}`, whose best rate is not known",
                        settings.name, study.name
                    ),
                    hint: Some(format!("run `moonlight sweep {}` first", base.study.display())),
                });
            };
            let base_settings = table.base().run(&study, &found);
            let folder = study.run_dir().join(&base_settings.name);
            if self.is_in_progress(&base_settings.name) {
                return Ok(Next::Wait);
            }
            // Written at the end of a run.
            if !folder.join(COMPLETE).exists() {
                let sets = with_run(base_settings.sets.clone(), &base_settings.name, &study);
                let recipe = study.tier.recipe.clone();
                return Ok(Next::Start(Box::new(Job { wanted: None, settings: base_settings, recipe, sets })));
            }
            folders.push((base, folder));
        }
        let folder = |inside: &str| -> Option<PathBuf> {
            folders.iter().find(|(base, _)| base.reference == inside).map(|(_, folder)| folder.clone())
        };
        let sets =
            resolve(&settings.sets, folder).ok_or_else(|| TrainError::Internal("a base run has no folder".into()))?;
        let sets = with_run(sets, &settings.name, self.study);
        let recipe = self.study.tier.recipe.clone();
        Ok(Next::Start(Box::new(Job { wanted: Some(wanted.clone()), settings, recipe, sets })))
    }

    /// Starts the process of a run.
    fn spawn(&mut self, job: Job) -> Result<(), TrainError> {
        let Job { wanted, settings, recipe: path, mut sets } = job;
        let slot = (0..self.options.devices.len())
            .find(|slot| !self.running.iter().any(|run| run.slot == *slot))
            .ok_or_else(|| TrainError::Internal("no device is free".into()))?;
        sets.push(format!("run.device=\"{}\"", self.options.devices[slot]));
        let recipe = Recipe::load(&path, &sets)?;
        let cost = Cost::of(&path, &sets)?;
        let program = std::env::current_exe().map_err(|error| TrainError::Internal(error.to_string()))?;
        let mut command = match self.options.launcher.split_first() {
            Some((launcher, arguments)) => {
                let mut command = Command::new(launcher);
                command.args(arguments).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.arg("train").arg(&path).args(["--resume", "--quiet"]);
        for set in &sets {
            command.args(["--set", set]);
        }
        command.env("RAYON_NUM_THREADS", self.options.threads.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Ctrl-C reaches the sweep alone, which passes it to its runs: a run that got it twice would end without a checkpoint.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|error| TrainError::Request {
            problem: format!("`{}` cannot be started: {error}", command.get_program().to_string_lossy()),
            hint: Some("the launcher must be on the path".into()),
        })?;
        tracing::info!("started `{}`", settings.name);
        self.used.flops += cost.flops + cost.newton_schulz_flops;
        self.used.steps += recipe.train.steps as f64;
        self.running.push(Running { child, wanted, settings, recipe, slot, start: Instant::now() });
        Ok(())
    }

    /// Adds a row for each process that has ended.
    fn collect(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        let mut index = 0;
        while index < self.running.len() {
            let ended =
                self.running[index].child.try_wait().map_err(|error| TrainError::Internal(error.to_string()))?;
            let Some(status) = ended else {
                index += 1;
                continue;
            };
            let mut run = self.running.swap_remove(index);
            let mut stderr = String::new();
            if let Some(pipe) = &mut run.child.stderr {
                // A text that is not UTF-8 is shown as far as it was read.
                let _ = pipe.read_to_string(&mut stderr);
            }
            if status.success() {
                let folder = run.recipe.run.folder();
                let measured = match run.wanted {
                    Some(_) => Some(measure(&run.recipe, self.study.tier.spectra)?),
                    None => None,
                };
                fs::write(folder.join(COMPLETE), "").map_err(TrainError::write(&folder))?;
                self.add(run, None, measured)?;
            } else if stderr.contains(&format!("{}` is in use", run.settings.name)) {
                // Its sweep was killed, and the run itself was not.
                tracing::info!("`{}` is trained by another process", run.settings.name);
                self.busy.push((run.settings.name, Instant::now() + BUSY));
            } else if let Some(line) = stderr.lines().find(|line| is_divergence(line)) {
                let reason = line.trim_start_matches("error: ").to_owned();
                self.add(run, Some(reason), None)?;
            } else if !stop.load(Ordering::Relaxed) {
                let tail: String =
                    stderr.chars().rev().take(QUOTED_BYTES).collect::<Vec<_>>().into_iter().rev().collect();
                return Err(TrainError::Request {
                    problem: format!("the run `{}` failed ({status}): {}", run.settings.name, tail.trim()),
                    hint: Some(
                        "correct its recipe or the study, and start the sweep again: what is done is kept".into(),
                    ),
                });
            }
        }
        Ok(())
    }

    fn add(&mut self, run: Running, diverged: Option<String>, measured: Option<Measured>) -> Result<(), TrainError> {
        let Running { wanted, settings, slot, start, .. } = run;
        let Some(wanted) = wanted else {
            tracing::info!("`{}` is trained again, for its weights", settings.name);
            return Ok(());
        };
        let loss = measured.as_ref().map(|measured| format!("{:.4}", measured.valid_loss));
        let outcome = loss.unwrap_or_else(|| "diverged".into());
        tracing::info!("`{}`: {outcome}, {:.0} s", settings.name, start.elapsed().as_secs_f64());
        self.added += 1;
        self.table.append(RunRow {
            run: settings.name,
            key: settings.key,
            text: self.text.clone(),
            point: wanted.point.names(&self.study.tier.axes),
            tuned: wanted.tuned,
            seed: wanted.seed,
            date: chrono::Utc::now().format("%Y-%m-%d").to_string(),
            version: version(),
            machine: machine(&self.options.devices[slot]),
            threads: self.options.threads,
            diverged,
            measured,
        })
    }

    /// Ends what is running; a run that has checkpoints continues from its newest in the next sweep.
    fn end_all(&mut self) {
        for run in &mut self.running {
            let _ = run.child.kill();
            let _ = run.child.wait();
        }
    }
}

/// The settings with the name and folder of the run.
fn with_run(mut sets: Vec<String>, name: &str, study: &Study) -> Vec<String> {
    sets.push(format!("run.name=\"{name}\""));
    sets.push(format!("run.dir=\"{}\"", study.run_dir().display()));
    sets
}

/// Asks a process to write a checkpoint and end.
fn ask_to_stop(child: &Child) {
    #[cfg(unix)]
    if let Some(process) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        // A process that has ended needs no signal.
        let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
    }
    #[cfg(not(unix))]
    let _ = child;
}

/// Whether a line of stderr is the error of a run with a non-finite loss or gradient ([`TrainError::NonFinite`]).
fn is_divergence(line: &str) -> bool {
    ["the loss is ", "the gradient norm is "].iter().any(|what| {
        line.split_once(what).is_some_and(|(_, value)| ["NaN", "inf", "-inf"].iter().any(|bad| value.starts_with(bad)))
    })
}

fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let commit = Command::new("git").args(["rev-parse", "--short=9", "HEAD"]).stderr(Stdio::null()).output();
    match commit {
        Ok(output) if output.status.success() => {
            format!("{version} {}", String::from_utf8_lossy(&output.stdout).trim())
        }
        _ => version.to_owned(),
    }
}

fn machine(device: &str) -> String {
    if device != "cpu" {
        return device.to_owned();
    }
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned();
    #[cfg(feature = "cpu")]
    let model = format!("{model}, {}", moonlight_model::simd::level().name());
    model
}

/// What a study would take, from shapes alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// The point by its values.
    pub point: BTreeMap<String, String>,
    /// Runs: those of the search at least, and one for each seed.
    pub runs: usize,
    /// What one run takes.
    pub cost: Cost,
}

/// Estimates each point of a study. Weights and data need not exist, except for a tokenizer.
///
/// # Errors
///
/// A recipe or tokenizer that cannot be read.
pub fn estimate(study: &Study) -> Result<Vec<Estimate>, TrainError> {
    let table = RunTable::read(study, None)?;
    let Tier { axes, seeds, tune, recipe, .. } = &study.tier;
    let one = |point: super::points::Point| {
        let tuned = tune.as_ref().map(|tune| tune.start);
        let wanted = Wanted { point, tuned, seed: seeds[0] };
        let sets = table.base().run(study, &wanted).sets;
        let sets: Vec<_> = sets.into_iter().filter(|set| !set.contains("{run:")).collect();
        let cost = Cost::of(recipe, &sets)?;
        // A search tries at least three values; one of them is the best, whose first seeds are done.
        let is_tuned = tune.as_ref().is_some_and(|tune| {
            wanted
                .point
                .values(axes)
                .zip(&wanted.point.0)
                .all(|((axis, _), &index)| tune.by.contains(&axis.name) || index == 0)
        });
        let search = if is_tuned { 2 * tune.as_ref().map_or(0, |tune| tune.seeds) } else { 0 };
        Ok(Estimate { point: wanted.point.names(axes), runs: seeds.len() + search, cost })
    };
    super::points::points(axes).into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_non_finite_loss_or_gradient_is_a_divergence() {
        let error =
            |what, value| TrainError::NonFinite { step: 3, what, value, rank: None, last_checkpoint: None }.to_string();
        assert!(is_divergence(&error("loss", f64::NAN)));
        assert!(is_divergence(&error("gradient norm", f64::INFINITY)));
        assert!(!is_divergence(&error("loss", 2.0)));
        assert!(!is_divergence("error: `runs/a` cannot be read"));
    }
}
