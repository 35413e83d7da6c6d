//! The ranks of a run: the devices of this process, the processes of an MPI job, or both. An ordinary run has one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use burn::train::Interrupter;
use moonlight_infer::device::{self, ComputeDevice, Workload};
use moonlight_model::CausalLm;
use moonlight_optim::distributed::{
    Collective, CollectiveError, Communicator, HierarchicalCollective, InProcess, NcclCollective, SingleRank,
    sum_of_squares, supports_nccl,
};

use super::exchange::{agree, all_gather, broadcast_number};
use super::in_loop::InLoop;
use super::nccl;
use super::outcome::Outcome;
use super::rank_trainer::RankTrainer;
use super::setup::{ReportInputs, ResumePoint, Setup};
use super::train_loop::train_loop;
use crate::error::TrainError;
use crate::metrics::{Dashboard, Progress, Reporter};
use crate::recipe::{DistributedRecipe, Recipe};

/// Environment variables with the number of processes, as launchers set them.
const WORLD_SIZE_VARIABLES: &[&str] = &["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];
/// Environment variables with the rank of this process. `srun` sets one of these, and the number of processes in
/// `SLURM_NTASKS`. `SLURM_NTASKS` alone does not mean that `srun` started this process, because `salloc` sets it too.
const RANK_VARIABLES: &[&str] = &["PMIX_RANK", "PMI_RANK"];
/// How long the other ranks of this process may take to end after the first error.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// Delay before a rank reports an error that a lower rank may report as well.
const REPORT_STAGGER: Duration = Duration::from_secs(5);

/// Where metrics are shown during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Display {
    Dashboard,
    /// Log lines, one a step.
    Lines,
}

/// The ranks of a run, as one process sees them.
pub(super) struct ProcessGroup {
    recipe: DistributedRecipe,
    /// Whether the user asked for several ranks, by the recipe or a launcher.
    distributed: bool,
    #[cfg(feature = "mpi")]
    processes: Option<moonlight_optim::distributed::Mpi>,
}

/// The number of processes that a launcher started; `None` without one.
fn launched_processes() -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    let ranked = RANK_VARIABLES.iter().any(|name| number(name).is_some());
    WORLD_SIZE_VARIABLES.iter().find_map(|name| number(name)).or_else(|| number("SLURM_NTASKS").filter(|_| ranked))
}

impl ProcessGroup {
    /// The ranks of a recipe in this process.
    ///
    /// # Errors
    ///
    /// Several processes in a build without MPI, and more ranks than a step has sequences.
    pub(super) fn open(recipe: &Recipe) -> Result<Self, TrainError> {
        let launched_processes = launched_processes();
        #[cfg(not(feature = "mpi"))]
        if let Some(processes) = launched_processes.filter(|&processes| processes > 1) {
            return Err(TrainError::Request {
                problem: format!("{processes} processes were started, but this build has no MPI"),
                hint: Some("build with `--features mpi`".into()),
            });
        }
        #[cfg(feature = "mpi")]
        let processes = launched_processes.map(|_| moonlight_optim::distributed::Mpi::open()).transpose()?;
        let mut group = Self {
            recipe: recipe.distributed.clone().unwrap_or_default(),
            distributed: recipe.distributed.is_some(),
            #[cfg(feature = "mpi")]
            processes,
        };
        let many = group.processes() > 1;
        group.distributed |= many;
        let (ranks, sequences) = (group.processes() * group.recipe.devices, group.fewest_sequences(recipe));
        if group.distributed && ranks > sequences {
            return Err(group.reported_once(TrainError::Request {
                problem: format!("there are {ranks} ranks, but a step has only {sequences} sequences"),
                hint: Some("raise `train.batch_size` or `train.gradient_accumulation`".into()),
            }));
        }
        if many && recipe.train.fuse_update {
            return Err(group.reported_once(TrainError::Request {
                problem: "`train.fuse_update` needs a world size of 1: it updates a layer before gradients are summed"
                    .into(),
                hint: Some("leave `train.fuse_update` out, or start a single process".into()),
            }));
        }
        Ok(group)
    }

    /// For an error that every process finds: process 0 returns it, so that it is reported once.
    fn reported_once(&self, error: TrainError) -> TrainError {
        if self.process() == 0 { error } else { TrainError::RemoteFailure }
    }

    /// Sequences of the run's smallest step; `schedule.accumulation` changes their number.
    fn fewest_sequences(&self, recipe: &Recipe) -> usize {
        let changes = recipe.schedule.accumulation.iter().map(|change| change.gradient_accumulation);
        let fewest = changes.chain([recipe.train.gradient_accumulation]).min().unwrap_or(1);
        fewest.saturating_mul(recipe.train.batch_size)
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

    /// Collectives between this process and the others: one for each device, and a last one for the setup, which each
    /// process does once for all its devices.
    fn collectives_between_processes(&self) -> Result<Vec<Arc<dyn Collective>>, TrainError> {
        let groups = self.recipe.devices + 1;
        #[cfg(feature = "mpi")]
        if let Some(processes) = self.processes.as_ref().filter(|processes| processes.size() > 1) {
            return Ok(processes.collectives(groups, self.recipe.timeout())?);
        }
        Ok((0..groups).map(|_| Arc::new(SingleRank) as Arc<dyn Collective>).collect())
    }

    /// The devices of this process's ranks: `first`, which the recipe names, and the ones after it. Processes on one host
    /// take consecutive devices.
    fn targets(&self, recipe: &Recipe, first: &ComputeDevice) -> Result<Vec<ComputeDevice>, TrainError> {
        #[cfg(feature = "mpi")]
        let before = self.processes.as_ref().map_or(0, |processes| processes.local_rank()) * self.recipe.devices;
        #[cfg(not(feature = "mpi"))]
        let before = 0;
        let target = |offset| match before + offset {
            0 => Ok(first.clone()),
            offset => {
                let name = device::nth_device_name(&recipe.run.device, offset);
                Ok(ComputeDevice::open_for(&name, Workload::Training)?)
            }
        };
        (0..self.recipe.devices).map(target).collect()
    }

    /// A communicator for each device of this process, over all ranks of the run.
    fn communicators(&self, targets: &[ComputeDevice], across: Vec<Arc<dyn Collective>>) -> Vec<Communicator> {
        let devices: Vec<Device> = targets.iter().map(|target| target.device.clone()).collect();
        if devices.len() == 1 {
            return across.into_iter().take(1).map(Communicator::new).collect();
        }
        let supported = supports_nccl(&devices[0]);
        let has_nccl = supported && nccl::is_installed();
        if supported && !has_nccl {
            tracing::warn!(
                "there is no `libnccl.so`, so the devices exchange gradients through the host's memory, which is slow; NCCL's \
                 development package has it"
            );
        }
        let inside = InProcess::collectives(devices.len(), self.recipe.timeout()).into_iter().map(|host| {
            if has_nccl { Arc::new(NcclCollective::new(host, devices.clone())) as Arc<dyn Collective> } else { host }
        });
        let nested = inside.zip(across).map(|(inside, across)| {
            if across.size() == 1 {
                inside
            } else {
                Arc::new(HierarchicalCollective::new(inside, across)) as Arc<dyn Collective>
            }
        });
        nested.map(Communicator::new).collect()
    }

    /// Trains with all ranks of this process, the first of them on `target`.
    pub(super) fn train(
        &self,
        recipe: &Recipe,
        target: &ComputeDevice,
        resume: bool,
        display: Display,
        interrupter: &Interrupter,
    ) -> Result<Outcome, TrainError> {
        let targets = self.targets(recipe, target)?;
        let mut across = self.collectives_between_processes()?;
        let between = across.pop().map_or_else(Communicator::single_rank, Communicator::new);
        let mut setup = open(recipe, &targets[0], resume, &between)?;
        let reporters = {
            let _busy = between.busy();
            (self.process() == 0).then(|| setup.begin(display == Display::Lines)).transpose()
        };
        let mut reporters = agree(&between, reporters)?.unwrap_or_default();
        let progress = Progress {
            label: setup.recipe.run.name.clone(),
            first: setup.state.step,
            steps: setup.recipe.train.steps,
            validate_every: setup.recipe.train.validate_every,
            log_every: setup.recipe.train.log_every,
        };
        let communicators = self.communicators(&targets, across);
        let ranks: Vec<(Communicator, ComputeDevice)> = communicators.into_iter().zip(targets).collect();
        let trainers = setup.into_trainers(&ranks, self.distributed);
        let (trainers, report_inputs) = agree(&between, trainers)?;
        drop(between);
        if display == Display::Dashboard && self.process() == 0 {
            reporters.push(Box::new(Dashboard::open(progress, interrupter.clone())));
        }
        self.run(trainers, reporters, report_inputs, interrupter)
    }

    /// Runs the training loop of each rank of this process, the first one's on this thread.
    fn run(
        &self,
        trainers: Vec<RankTrainer>,
        mut reporters: Vec<Box<dyn Reporter>>,
        report_inputs: ReportInputs,
        interrupter: &Interrupter,
    ) -> Result<Outcome, TrainError> {
        let _in_loop = InLoop::enter();
        let (sender, receiver) = mpsc::channel();
        let mut trainers = trainers.into_iter();
        let mut first = trainers.next().expect("a process has a rank");
        let others = trainers.len();
        for mut trainer in trainers {
            let sender = sender.clone();
            thread::spawn(move || {
                let comm = trainer.communicator().clone();
                // Only the first rank reports and sees the user's interrupt, which the loop passes on to all ranks.
                let mut no_reporters: Vec<Box<dyn Reporter>> = Vec::new();
                let result = run_guarded(&comm, || train_loop(&mut trainer, &mut no_reporters, &Interrupter::new()));
                // The receiver may be gone if another rank failed first.
                let _ = sender.send((comm.rank(), result));
            });
        }
        drop(sender);
        let comm = first.communicator().clone();
        let result = run_guarded(&comm, || train_loop(&mut first, &mut reporters, interrupter));
        drop(reporters); // a dashboard restores the terminal before an error is printed
        let mut results = vec![(comm.rank(), result)];
        // Other ranks may still be in a step, so the wait has no limit until a rank fails. Ranks that do not end in time after
        // that are abandoned: the run returns the error.
        let mut deadline: Option<Instant> = None;
        while results.len() <= others {
            if results.iter().any(|(_, result)| result.is_err()) {
                deadline.get_or_insert_with(|| Instant::now() + SHUTDOWN_TIMEOUT);
            }
            let timeout =
                deadline.map_or(SHUTDOWN_TIMEOUT, |deadline| deadline.saturating_duration_since(Instant::now()));
            match receiver.recv_timeout(timeout) {
                Ok(result) => results.push(result),
                Err(RecvTimeoutError::Timeout) if deadline.is_none() => {}
                Err(_) => break,
            }
        }
        let mut outcome = self.outcome(results, &comm)?;
        outcome.trained = (comm.rank() == 0).then(|| report_inputs.with_model(first.model.into_inner()));
        Ok(outcome)
    }

    /// The outcome of this process's first rank, or the error that caused all others. Other processes that do not know of
    /// the error yet are aborted.
    fn outcome(
        &self,
        results: Vec<(usize, Result<Outcome, TrainError>)>,
        comm: &Communicator,
    ) -> Result<Outcome, TrainError> {
        let mut first = None;
        let mut cause: Option<(u8, usize, TrainError)> = None;
        for (rank, result) in results {
            match result {
                Ok(outcome) => first = first.or(Some(outcome)),
                Err(error) => {
                    let priority = root_cause_priority(&error);
                    if cause.as_ref().is_none_or(|(highest, ..)| priority > *highest) {
                        cause = Some((priority, rank, error));
                    }
                }
            }
        }
        let Some((_, rank, error)) = cause else {
            return first.ok_or_else(|| TrainError::Internal("no rank has run".into()));
        };
        let error = with_rank(rank, error);
        if self.processes() > 1 && !is_known_to_all(&error) {
            // The lowest rank that can report the error does so, and aborts the job before the others report it too.
            thread::sleep(report_delay(&error, rank));
            error.report();
            comm.abort(&error.to_string());
        }
        Err(error)
    }
}

/// Opens the run in each process: first in process 0, which finds the checkpoint to resume from and renames damaged ones,
/// then in the others, from the same checkpoint.
fn open(recipe: &Recipe, target: &ComputeDevice, resume: bool, between: &Communicator) -> Result<Setup, TrainError> {
    let from = if resume { ResumePoint::Newest } else { ResumePoint::Start };
    let opened = {
        // Opening a large model takes longer than the timeout of the processes that wait for its result.
        let _busy = between.busy();
        (between.rank() == 0).then(|| Setup::open(recipe, target, from)).transpose()
    };
    let first = agree(between, opened)?;
    let step = first.as_ref().and_then(|setup| setup.resumed.as_ref()).map(|found| found.state.step);
    let step = broadcast_number(between, step)?;
    let setup = match first {
        Some(setup) => Ok(setup),
        None => {
            let _busy = between.busy();
            Setup::open(recipe, target, ResumePoint::AtStep(step))
        }
    };
    let setup = agree(between, setup.map_err(|error| with_rank(between.rank(), error)))?;
    check_weights(between, &setup.model)?;
    Ok(setup)
}

/// Fails unless all processes start from the same weights: otherwise the ranks would train different models.
fn check_weights(between: &Communicator, model: &CausalLm) -> Result<(), TrainError> {
    struct Fingerprint(Vec<f64>);
    impl ModuleVisitor for Fingerprint {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let squares = sum_of_squares(param.val().inner());
            self.0[0] += squares;
            // Weighted by the parameter's index, so that two swapped parameters are noticed.
            self.0[2] += 1.0;
            self.0[1] += squares * self.0[2];
        }
    }
    if between.size() == 1 {
        return Ok(());
    }
    let mut fingerprint = Fingerprint(vec![0.0; 3]);
    model.visit(&mut fingerprint);
    let all = all_gather(between, &fingerprint.0)?;
    match all.iter().position(|rank| rank != &all[0]) {
        None => Ok(()),
        Some(_) if between.rank() > 0 => Err(TrainError::RemoteFailure),
        Some(rank) => Err(TrainError::Request {
            problem: format!("rank {rank} starts from other weights than rank 0"),
            hint: Some("give all ranks the same files, and devices of the same kind".into()),
        }),
    }
}

/// Runs a rank's loop. If it ends in an error or a panic, the other ranks of the process leave their collectives.
fn run_guarded<T>(comm: &Communicator, run: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    if comm.size() == 1 {
        return run(); // no other rank waits for it, and a panic stays a panic
    }
    // The panic's message was printed by the thread that panicked.
    let result = catch_unwind(AssertUnwindSafe(run));
    let result = result.unwrap_or_else(|_| Err(TrainError::Internal("a rank panicked".into())));
    if let Err(error) = &result
        && !is_known_to_all(error)
    {
        comm.abort_local(&error.to_string());
    }
    result
}

/// Whether every rank has this error, each in its own form, so that none has to be notified.
fn is_known_to_all(error: &TrainError) -> bool {
    matches!(error, TrainError::RemoteFailure | TrainError::NonFinite { .. })
}

/// Of the errors of several ranks, the one with the highest priority is reported. A failed collective is the consequence of
/// another rank's error, so its priority is low.
fn root_cause_priority(error: &TrainError) -> u8 {
    match error {
        TrainError::RemoteFailure => 0,
        TrainError::Collective(CollectiveError::RankFailed { .. }) => 1,
        TrainError::Collective(_) => 2,
        _ => 3,
    }
}

/// The error with its rank, unless it names a rank already. Rank 0 needs no name: it is the one that reports.
fn with_rank(rank: usize, error: TrainError) -> TrainError {
    match error {
        TrainError::RemoteFailure | TrainError::NonFinite { .. } | TrainError::Collective(_) | TrainError::Killed => {
            error
        }
        error if rank == 0 => error,
        error => TrainError::Rank { rank, source: Box::new(error) },
    }
}

/// How long a rank waits before it reports an error that others may report as well.
fn report_delay(error: &TrainError, rank: usize) -> Duration {
    let lower_ranks = match error {
        TrainError::Collective(CollectiveError::Timeout { missing, .. }) => {
            (0..rank).filter(|rank| !missing.contains(rank)).count()
        }
        TrainError::Collective(_) => rank + 1, // the rank with the cause reports before any of these, rank 0 included
        _ => 0,
    };
    // One delay at most, and not one for each lower rank: once a rank aborts, the launcher asks the processes to end and kills
    // them four seconds later, so a second delay would never pass.
    REPORT_STAGGER * lower_ranks.min(1) as u32
}
