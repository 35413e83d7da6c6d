//! The workers of a run: devices of this process, processes of an MPI job, or both.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use burn::train::Interrupter;
use moonlight_optim::OptimizerOptions;
use moonlight_optim::distributed::{
    Collective, CollectiveError, InProcess, Nested, OnDevices, Solo, Worker, devices_reduce,
};

use super::start::{self, From, Opened};
use super::stepper::Stepper;
use super::strategy::{Finished, Records, Run, Stage};
use super::together::{agree, check_weights, told_number};
use super::trainee::Trainee;
use crate::device::{self, Target};
use crate::error::TrainError;
use crate::recipe::{DistributedRecipe, Recipe};

/// What launchers tell a process: how many there are.
const SIZES: &[&str] = &["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];
/// What launchers tell a process where they do not say how many there are.
const RANKS: &[&str] = &["PMIX_RANK", "PMI_RANK"];
/// How long the other threads may take to end behind an error.
const FAREWELL: Duration = Duration::from_secs(3);
/// How long a worker that could say the same waits for the one before it.
const TURN: Duration = Duration::from_secs(5);

/// The workers of a run, as one process sees them.
pub(super) struct World {
    recipe: DistributedRecipe,
    #[cfg(feature = "mpi")]
    processes: Option<moonlight_optim::distributed::Mpi>,
}

/// Processes that a launcher started; `None` where none did.
fn launched() -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let ranked = RANKS.iter().any(|name| number(name).is_some());
    SIZES.iter().find_map(|name| number(name)).or_else(|| number("SLURM_NTASKS").filter(|_| ranked))
}

impl World {
    /// The world of a recipe in this process; `None` where one worker is alone and nothing else is asked for.
    pub(super) fn open(recipe: &Recipe) -> Result<Option<Self>, TrainError> {
        let launched = launched();
        #[cfg(not(feature = "mpi"))]
        if let Some(processes) = launched.filter(|&processes| processes > 1) {
            return Err(TrainError::Request {
                problem: format!("{processes} processes were launched, and this build of the program knows no MPI"),
                hint: Some("build with `--features mpi`".into()),
            });
        }
        #[cfg(feature = "mpi")]
        let processes = launched.map(|_| moonlight_optim::distributed::Mpi::open()).transpose()?;
        #[cfg(feature = "mpi")]
        let many = processes.as_ref().is_some_and(|processes| processes.size() > 1);
        #[cfg(not(feature = "mpi"))]
        let many = false;
        if recipe.distributed.is_none() && !many {
            return Ok(None);
        }
        let world = Self {
            recipe: recipe.distributed.clone().unwrap_or_default(),
            #[cfg(feature = "mpi")]
            processes,
        };
        let (workers, sequences) = (world.processes() * world.recipe.devices, world.fewest_sequences(recipe));
        if workers > sequences {
            return Err(world.said_once(TrainError::Request {
                problem: format!("there are {workers} workers, and a step has {sequences} sequences to share"),
                hint: Some("raise `train.batch_size` or `train.gradient_accumulation`".into()),
            }));
        }
        if many && recipe.train.fuse_update {
            return Err(world.said_once(TrainError::Request {
                problem: "`train.fuse_update` updates each layer by the gradients of one worker".into(),
                hint: Some("leave it out where there are several".into()),
            }));
        }
        Ok(Some(world))
    }

    /// An error that all processes find alike.
    fn said_once(&self, error: TrainError) -> TrainError {
        if self.process() == 0 { error } else { TrainError::Elsewhere }
    }

    fn fewest_sequences(&self, recipe: &Recipe) -> usize {
        let changes = recipe.schedule.accumulation.iter().map(|change| change.gradient_accumulation);
        let fewest = changes.chain([recipe.train.gradient_accumulation]).min().unwrap_or(1);
        fewest * recipe.train.batch_size
    }

    #[cfg(feature = "mpi")]
    fn processes(&self) -> usize {
        self.processes.as_ref().map_or(1, |processes| processes.size())
    }

    #[cfg(not(feature = "mpi"))]
    #[allow(clippy::unused_self, reason = "a build with MPI has several")]
    fn processes(&self) -> usize {
        1
    }

    #[cfg(feature = "mpi")]
    fn process(&self) -> usize {
        self.processes.as_ref().map_or(0, |processes| processes.rank())
    }

    #[cfg(not(feature = "mpi"))]
    #[allow(clippy::unused_self, reason = "a build with MPI has several")]
    fn process(&self) -> usize {
        0
    }

    /// Groups of this process and the others: one for each device, and one more.
    fn across(&self) -> Result<Vec<Arc<dyn Collective>>, TrainError> {
        let groups = self.recipe.devices + 1;
        #[cfg(feature = "mpi")]
        if let Some(processes) = &self.processes {
            return Ok(processes.collectives(groups, self.recipe.timeout())?);
        }
        Ok((0..groups).map(|_| Arc::new(Solo) as Arc<dyn Collective>).collect())
    }

    /// The devices of this process's workers.
    fn targets(&self, recipe: &Recipe) -> Result<Vec<Target>, TrainError> {
        #[cfg(feature = "mpi")]
        let before = self.processes.as_ref().map_or(0, |processes| processes.local_rank()) * self.recipe.devices;
        #[cfg(not(feature = "mpi"))]
        let before = 0;
        let target = |offset| Target::open(&device::behind(&recipe.run.device, before + offset));
        (0..self.recipe.devices).map(target).collect()
    }

    /// A worker for each device of this process.
    fn workers(&self, targets: &[Target], across: Vec<Arc<dyn Collective>>) -> Vec<Worker> {
        let devices: Vec<Device> = targets.iter().map(|target| target.device.clone()).collect();
        if devices.len() == 1 {
            return across.into_iter().take(1).map(Worker::new).collect();
        }
        let direct = devices_reduce(&devices[0]);
        let inside = InProcess::collectives(devices.len(), self.recipe.timeout()).into_iter().map(|host| {
            if direct { Arc::new(OnDevices::new(host, devices.clone())) as Arc<dyn Collective> } else { host }
        });
        let nested = inside.zip(across).map(|(inside, across)| {
            if across.size() == 1 { inside } else { Arc::new(Nested::new(inside, across)) as Arc<dyn Collective> }
        });
        nested.map(Worker::new).collect()
    }

    /// Trains with all workers. `lead` runs the loop of worker 0 where figures are shown.
    pub(super) fn train(
        &self,
        recipe: &Recipe,
        resume: bool,
        lines: bool,
        interrupter: &Interrupter,
        lead: impl FnOnce(Trainee, Run) -> Result<Finished, TrainError>,
    ) -> Result<Finished, TrainError> {
        let targets = self.targets(recipe)?;
        let mut across = self.across()?;
        let between = across.pop().map_or_else(Worker::alone, Worker::new);
        let opened = open(recipe, &targets[0], resume, &between)?;
        let records = {
            let _busy = between.busy();
            (self.process() == 0).then(|| opened.begin()).transpose()
        };
        let records = agree(&between, records)?;
        let workers = self.workers(&targets, across);
        let loops = workers
            .iter()
            .zip(&targets)
            .zip(std::iter::once(records).chain(std::iter::repeat_with(|| None)))
            .map(|((worker, target), records)| member(&opened, worker, target, records, lines))
            .collect::<Result<Vec<_>, _>>();
        let loops = agree(&between, loops)?;
        drop((opened, between));
        self.run(loops, &workers, interrupter, lead)
    }

    /// Runs the loops, the first one on this thread.
    fn run(
        &self,
        loops: Vec<(Trainee, Run)>,
        workers: &[Worker],
        interrupter: &Interrupter,
        lead: impl FnOnce(Trainee, Run) -> Result<Finished, TrainError>,
    ) -> Result<Finished, TrainError> {
        let (sender, receiver) = mpsc::channel();
        let mut loops = loops.into_iter();
        let first = loops.next().expect("a process has a worker");
        let others = loops.len();
        for ((mut trainee, mut run), worker) in loops.zip(workers[1..].iter().cloned()) {
            let sender = sender.clone();
            // Whether the user wants an end is for the first worker to see.
            let mut stage = Stage::silent(Interrupter::new());
            thread::spawn(move || {
                let result = guarded(&worker, || run.run(&mut trainee, &mut stage));
                // Nobody waits behind an error of another one.
                let _ = sender.send((worker.rank(), result));
            });
        }
        drop(sender);
        let worker = &workers[0];
        let (mut trainee, mut run) = first;
        let result = guarded(worker, || match worker.rank() {
            0 => lead(trainee, run),
            _ => run.run(&mut trainee, &mut Stage::silent(interrupter.clone())),
        });
        let mut results = vec![(worker.rank(), result)];
        let mut deadline: Option<Instant> = None;
        while results.len() <= others {
            if results.iter().any(|(_, result)| result.is_err()) {
                deadline.get_or_insert_with(|| Instant::now() + FAREWELL);
            }
            let patience = deadline.map_or(FAREWELL, |deadline| deadline.saturating_duration_since(Instant::now()));
            match receiver.recv_timeout(patience) {
                Ok(result) => results.push(result),
                Err(RecvTimeoutError::Timeout) if deadline.is_none() => {}
                Err(_) => break,
            }
        }
        self.conclude(results, worker)
    }

    /// The result of all of this process's workers: the first one's, or the error that led to all others. Where other
    /// processes do not know of it, they are ended.
    fn conclude(
        &self,
        results: Vec<(usize, Result<Finished, TrainError>)>,
        worker: &Worker,
    ) -> Result<Finished, TrainError> {
        let mut finished = None;
        let mut worst: Option<(u8, usize, TrainError)> = None;
        for (rank, result) in results {
            match result {
                Ok(of) => finished = finished.or(Some(of)),
                Err(error) => {
                    let weight = weight(&error);
                    if worst.as_ref().is_none_or(|(worst, ..)| weight > *worst) {
                        worst = Some((weight, rank, error));
                    }
                }
            }
        }
        let Some((_, rank, error)) = worst else {
            return finished.ok_or_else(|| TrainError::Stage("no worker has run".into()));
        };
        let error = named(rank, error);
        if self.processes() > 1 && !is_known(&error) {
            // The first that can speak does, and ends the rest before they do.
            thread::sleep(turn(&error, rank));
            error.report();
            worker.fail(&error.to_string());
        }
        Err(error)
    }
}

/// Opens the run in each process: the first one, then the others, which find what it has made.
fn open(recipe: &Recipe, target: &Target, resume: bool, between: &Worker) -> Result<Opened, TrainError> {
    let from = if resume { From::Newest } else { From::Start };
    let leads = between.rank() == 0;
    let opened = {
        let _busy = between.busy();
        leads.then(|| start::open(recipe, target, from)).transpose()
    };
    let first = agree(between, opened)?;
    let step = first.as_ref().and_then(|opened| opened.from.as_ref()).map(|found| found.state.step);
    let step = told_number(between, step)?;
    let opened = match first {
        Some(opened) => Ok(opened),
        None => {
            let _busy = between.busy();
            start::open(recipe, target, From::Found(step))
        }
    };
    let opened = agree(between, opened.map_err(|error| named(between.rank(), error)))?;
    check_weights(between, &opened.model)?;
    Ok(opened)
}

/// A worker's copy of the model, on its device and with a graph of its own, and its loop.
fn member(
    opened: &Opened,
    worker: &Worker,
    target: &Target,
    records: Option<Records>,
    lines: bool,
) -> Result<(Trainee, Run), TrainError> {
    let settings = opened.recipe.distributed.clone().unwrap_or_default();
    let options = OptimizerOptions::new().with_worker(worker.clone()).with_distributed(settings.config());
    let optimizer = match &opened.from {
        Some(found) => {
            let files = found.optimizer();
            opened.assignment.load(&files, options)?
        }
        None => opened.assignment.build(options)?,
    };
    let device = target.device.clone().autodiff();
    let model = opened.model.clone().fork(&device);
    let lines = lines && records.is_some();
    let run = opened.run(Stepper::Together(Box::new(optimizer)), device, records, lines)?;
    Ok((Trainee { model }, run))
}

/// Runs a worker's loop; where it ends in an error or a panic, the other workers of its process hear of it.
fn guarded<T>(worker: &Worker, run: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    // A panic's own message is on stderr already, from the thread that had it.
    let result = catch_unwind(AssertUnwindSafe(run));
    let result = result.unwrap_or_else(|_| Err(TrainError::Stage("a worker panicked".into())));
    if let Err(error) = &result
        && !is_known(error)
    {
        worker.fail_inside(&error.to_string());
    }
    result
}

/// Whether all workers know of an error, each in its own way.
fn is_known(error: &TrainError) -> bool {
    matches!(error, TrainError::Elsewhere | TrainError::NotFinite { .. })
}

/// How near to the cause an error is.
fn weight(error: &TrainError) -> u8 {
    match error {
        TrainError::Elsewhere => 0,
        TrainError::Collective(CollectiveError::Failed { .. }) => 1,
        TrainError::Collective(_) => 2,
        _ => 3,
    }
}

/// An error with the worker's number, where it does not say already which worker it is about.
fn named(rank: usize, error: TrainError) -> TrainError {
    match error {
        TrainError::Elsewhere | TrainError::NotFinite { .. } | TrainError::Collective(_) | TrainError::Killed => error,
        error if rank == 0 => error,
        error => TrainError::Worker { rank, source: Box::new(error) },
    }
}

/// How long a worker waits before it says what others may say as well.
fn turn(error: &TrainError, rank: usize) -> Duration {
    let before = match error {
        TrainError::Collective(CollectiveError::Silent { missing, .. }) => {
            (0..rank).filter(|worker| !missing.contains(worker)).count()
        }
        TrainError::Collective(_) => rank + 1,
        _ => 0,
    };
    // The launcher asks the others to end before it makes them, which takes four seconds.
    TURN * before.min(1) as u32
}
