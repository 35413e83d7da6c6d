//! burn-train's terminal dashboard, driven through its renderer interface.
//!
//! burn-train counts epochs. Here an "epoch" is the steps between two validations, so that the progress bar shows how far
//! the next validation is. Schedule, validation, checkpoints and resuming all count steps.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use burn::train::Interrupter;
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    MetricDefinition, MetricEntry, MetricId, MetricName, NumericAttributes, NumericEntry, SerializedEntry,
};
use burn::train::renderer::{MetricState, MetricsRenderer, default_renderer};

use super::stderr::HeldStderr;
use super::{ConsoleLines, LogEvery, METRICS, Metric, Metrics, Reporter, Split};
use crate::error::TrainError;
use crate::trainer::terminal;

/// The steps of a run, as the dashboard's progress bars show them.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    /// `run.name`.
    pub(crate) label: String,
    /// Steps taken before the run started or resumed.
    pub(crate) first: u64,
    /// Steps of the whole run.
    pub(crate) steps: u64,
    /// Steps between two validations; 0 for a single one at the end.
    pub(crate) validate_every: u64,
    /// Steps between two log lines, in case the dashboard fails.
    pub(crate) log_every: u64,
}

impl Progress {
    fn epoch_steps(&self) -> u64 {
        let steps = self.steps.max(1);
        if self.validate_every == 0 { steps } else { self.validate_every.min(steps) }
    }
}

/// The dashboard of a run. Dropping it restores the terminal.
///
/// The renderer runs on its own thread, because its key `k` (kill the run) makes the next call of the renderer panic, and does
/// nothing else. The panic ends only that thread, and the training loop sees a closed channel. Any other panic means that the
/// terminal is gone, which does not end the run.
///
/// The renderer's thread may also never end: it reads keys, and the library that it uses reads in an endless loop once the
/// terminal is gone, or waits for the rest of a key if only its start has arrived. So nothing waits for it without a limit.
///
/// While the dashboard is open, stderr is held back: its lines would garble the screen, and libraries that print to stderr
/// panic once the terminal is gone.
pub(crate) struct Dashboard {
    /// `None` once the dashboard is closed.
    metrics: Option<Sender<Metrics>>,
    thread: Option<JoinHandle<()>>,
    stderr: Option<HeldStderr>,
    lines: LogEvery<ConsoleLines>,
    /// Whether the dashboard has failed and log lines replace it.
    failed: bool,
}

/// How long the renderer may take to restore the terminal.
const PATIENCE: Duration = Duration::from_secs(5);

/// The start of the message with which the renderer panics after the key `k`.
const KILL_MESSAGE: &str = "Killing training";

impl Dashboard {
    /// Takes over the terminal. Its `s` stops the run through `interrupter`.
    pub(crate) fn open(progress: Progress, interrupter: Interrupter) -> Self {
        terminal::remember();
        let stderr = HeldStderr::hold();
        let (metrics, received) = channel();
        let console = ConsoleLines::new(progress.first, progress.steps);
        let lines = LogEvery { every: progress.log_every, last_step: progress.steps, reporter: console };
        // The renderer is created on its thread, since it panics if the terminal is already gone.
        let thread = spawn(move || show(default_renderer(interrupter, None), &progress, &received));
        Self { metrics: Some(metrics), thread: Some(thread), stderr, lines, failed: false }
    }

    /// Restores the terminal.
    fn close(&mut self) -> Result<(), TrainError> {
        self.metrics = None;
        let Some(thread) = self.thread.take() else { return Ok(()) };
        if terminal::is_gone() {
            terminal::stop_reading_keys();
        }
        let joined = if ends_within(&thread, PATIENCE) { thread.join() } else { Err(Box::new("it does not end") as _) };
        if joined.is_err() {
            // Before stderr is released: its lines would vanish with the alternate screen.
            terminal::leave_screen();
        }
        self.stderr = None;
        let Err(panic) = joined else { return Ok(()) };
        // `keep_interrupt_key` may have changed the mode while the renderer restored it.
        terminal::restore_mode();
        let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        if message.is_some_and(|message| message.starts_with(KILL_MESSAGE)) {
            return Err(TrainError::Killed);
        }
        self.failed = true;
        let reason = message.unwrap_or("no reason given");
        tracing::warn!("the dashboard stopped ({reason}); the run continues with log lines");
        Ok(())
    }
}

impl Reporter for Dashboard {
    fn begin_step(&mut self) {
        if self.thread.is_some() && terminal::is_gone() {
            terminal::stop_reading_keys();
        }
        terminal::keep_interrupt_key();
        self.lines.begin_step(); // for its clock, in case log lines replace the dashboard
    }

    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let sent = self.metrics.as_ref().is_some_and(|sender| sender.send(metrics.clone()).is_ok());
        if !sent {
            self.close()?;
        }
        if self.failed { self.lines.report(metrics) } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), TrainError> {
        self.close()
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

fn ends_within(thread: &JoinHandle<()>, patience: Duration) -> bool {
    let started = Instant::now();
    while !thread.is_finished() && started.elapsed() < patience {
        sleep(Duration::from_millis(2));
    }
    thread.is_finished()
}

/// Shows metrics until the sender is dropped.
fn show(mut renderer: Box<dyn MetricsRenderer>, progress: &Progress, received: &Receiver<Metrics>) {
    let epoch_steps = progress.epoch_steps();
    let mut tracked: Vec<Tracked> = METRICS.iter().map(Tracked::new).collect();
    tracked.iter().for_each(|tracked| renderer.register_metric(tracked.definition()));
    let (epochs, first) = (progress.steps.div_ceil(epoch_steps), progress.first / epoch_steps + 1);
    renderer.start(epochs as usize, first as usize, None, Some(&progress.label));
    let mut started = None;
    for metrics in received {
        let step = metrics.step.max(1);
        let epoch = (step - 1) / epoch_steps + 1;
        let done = (step - 1) % epoch_steps + 1;
        if metrics.split == Split::Valid {
            renderer.start_split("valid", 1);
            let mut validated: Vec<Tracked> = METRICS.iter().filter(|m| m.validated).map(Tracked::new).collect();
            for tracked in &mut validated {
                renderer.update_valid(tracked.update(&metrics));
            }
            renderer.update_split(1);
            renderer.log_event_training("Iteration".into());
            validated.iter_mut().for_each(|tracked| renderer.update_valid(tracked.finish()));
            renderer.end_split();
            continue;
        }
        if started != Some(epoch) {
            if started.is_some() {
                renderer.update_epoch(epoch as usize - 1);
            }
            let left = progress.steps.saturating_sub((epoch - 1) * epoch_steps);
            renderer.start_split("train", epoch_steps.min(left) as usize);
            started = Some(epoch);
        }
        tracked.iter_mut().for_each(|tracked| renderer.update_train(tracked.update(&metrics)));
        renderer.update_split(done as usize);
        // The dashboard counts events of one name and shows them as iterations per second.
        renderer.log_event_training("Iteration".into());
        if done == epoch_steps || step == progress.steps {
            tracked.iter_mut().for_each(|tracked| renderer.update_train(tracked.finish()));
            renderer.end_split();
        }
    }
    renderer.end();
    let _ = renderer.on_train_end(None);
}

/// One metric over the steps of an epoch, with its mean.
struct Tracked {
    metric: &'static Metric,
    name: MetricName,
    id: MetricId,
    state: NumericMetricState,
    /// Whether this epoch has a value; some metrics are measured every `train.probe_every` steps only.
    has_value: bool,
}

impl Tracked {
    fn new(metric: &'static Metric) -> Self {
        let name: MetricName = Arc::new(metric.title.to_owned());
        let id = MetricId::new(name.clone());
        Self { metric, name, id, state: NumericMetricState::new(), has_value: false }
    }

    fn definition(&self) -> MetricDefinition {
        let unit = self.metric.unit.map(str::to_owned);
        let attributes = NumericAttributes { unit, higher_is_better: self.metric.higher_is_better };
        MetricDefinition {
            metric_id: self.id.clone(),
            name: self.name.clone(),
            description: None,
            attributes: attributes.into(),
        }
    }

    /// The state after one more step.
    fn update(&mut self, metrics: &Metrics) -> MetricState {
        if let Some(value) = (self.metric.value)(metrics) {
            self.state.update(value, 1);
            self.has_value = true;
        }
        self.rendered(self.state.compute_update(self.format()), self.state.current_value())
    }

    /// The epoch's mean; resets the state for the next epoch.
    fn finish(&mut self) -> MetricState {
        let state = self.rendered(self.state.compute_final(self.format()), self.state.final_value());
        self.state.reset();
        self.has_value = false;
        state
    }

    fn rendered(&self, entry: SerializedEntry, value: NumericEntry) -> MetricState {
        let unit = self.metric.unit;
        let entry = if self.has_value { entry } else { SerializedEntry::not_available(unit) };
        MetricState::Numeric(MetricEntry::new(self.id.clone(), entry), self.has_value.then_some(value))
    }

    fn format(&self) -> FormatOptions {
        let format = FormatOptions::new(self.name.clone()).precision(4);
        match self.metric.unit {
            Some(unit) => format.unit(unit),
            None => format,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
    use burn::train::renderer::{EvaluationName, MetricsRendererEvaluation, MetricsRendererTraining};

    use super::*;

    /// Records every call.
    #[derive(Clone, Default)]
    struct Recorder(Arc<Mutex<Vec<String>>>);

    impl Recorder {
        fn note(&self, line: String) {
            self.0.lock().unwrap().push(line);
        }

        fn state(&self, split: &str, state: &MetricState) {
            if let MetricState::Numeric(entry, Some(value)) = state
                && entry.metric_id == MetricId::new(Arc::new("Loss".into()))
            {
                self.note(format!("{split} loss {}", value.serialize()));
            }
        }
    }

    impl MetricsRendererTraining for Recorder {
        fn update_train(&mut self, state: MetricState) {
            self.state("train", &state);
        }
        fn update_valid(&mut self, state: MetricState) {
            self.state("valid", &state);
        }
    }

    impl MetricsRendererEvaluation for Recorder {
        fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
    }

    impl TrainingProgressLogger for Recorder {
        fn start(&mut self, epochs: usize, first: usize, _items: Option<usize>, label: Option<&str>) {
            self.note(format!("start {first} of {epochs}: {}", label.unwrap_or_default()));
        }
        fn update_epoch(&mut self, epoch: usize) {
            self.note(format!("epoch {epoch} ended"));
        }
        fn start_split(&mut self, split: &str, items: usize) {
            self.note(format!("{split} of {items}"));
        }
        fn update_split(&mut self, items: usize) {
            self.note(format!("at {items}"));
        }
        fn end_split(&mut self) {
            self.note("split ended".into());
        }
        fn end(&mut self) {
            self.note("end".into());
        }
        fn log_event_training(&mut self, _event: String) {}
    }

    impl EvaluationProgressLogger for Recorder {
        fn start_global_progress(&mut self, _tests: usize) {}
        fn start_test(&mut self, _name: &str, _items: usize) {}
        fn update_test_progress(&mut self, _items: usize) {}
        fn end_test(&mut self) {}
        fn end_global_progress(&mut self) {}
        fn log_event_evaluation(&mut self, _event: String) {}
    }

    impl MetricsRenderer for Recorder {
        fn manual_close(&mut self) {}
        fn register_metric(&mut self, definition: MetricDefinition) {
            if definition.name.as_str() == "Loss" {
                self.note("registered".into());
            }
        }
    }

    #[test]
    fn an_epoch_is_the_steps_between_two_validations() {
        let recorder = Recorder::default();
        let progress = Progress { label: "run".into(), first: 2, steps: 5, validate_every: 2, log_every: 1 };
        let (sender, received) = channel();
        let metrics = |split, step, loss| Metrics { split, step, loss: Some(loss), ..Metrics::default() };
        for (split, step, loss) in [
            (Split::Train, 3, 3.0),
            (Split::Train, 4, 1.0),
            (Split::Valid, 4, 2.5),
            (Split::Train, 5, 0.5),
            (Split::Valid, 5, 0.25),
        ] {
            sender.send(metrics(split, step, loss)).unwrap();
        }
        drop(sender);
        show(Box::new(recorder.clone()), &progress, &received);
        let expected = [
            "registered",
            "start 2 of 3: run",
            "train of 2",
            "train loss 3,1",
            "at 1",
            "train loss 1,1",
            "at 2",
            "train loss 2,final",
            "split ended",
            "valid of 1",
            "valid loss 2.5,1",
            "at 1",
            "valid loss 2.5,final",
            "split ended",
            "epoch 2 ended",
            "train of 1",
            "train loss 0.5,1",
            "at 1",
            "train loss 0.5,final",
            "split ended",
            "valid of 1",
            "valid loss 0.25,1",
            "at 1",
            "valid loss 0.25,final",
            "split ended",
            "end",
        ];
        assert_eq!(*recorder.0.lock().unwrap(), expected);
    }

    fn dashboard(metrics: Sender<Metrics>, thread: JoinHandle<()>) -> Dashboard {
        let lines = LogEvery { every: 1, last_step: 1, reporter: ConsoleLines::new(0, 1) };
        Dashboard { metrics: Some(metrics), thread: Some(thread), stderr: None, lines, failed: false }
    }

    #[test]
    fn the_kill_key_ends_the_run() {
        let (metrics, received) = channel::<Metrics>();
        let thread = spawn(move || {
            let _received = received;
            std::panic::resume_unwind(Box::new("Killing training from user input.")); // without the panic's message
        });
        let mut dashboard = dashboard(metrics, thread);
        let error = loop {
            if let Err(error) = dashboard.report(&Metrics::default()) {
                break error;
            }
        };
        assert!(matches!(error, TrainError::Killed));
    }

    #[test]
    fn a_terminal_that_is_gone_does_not_end_the_run() {
        let (metrics, received) = channel::<Metrics>();
        let thread = spawn(move || {
            let _received = received;
            std::panic::resume_unwind(Box::new("Input/output error".to_owned()));
        });
        let mut dashboard = dashboard(metrics, thread);
        while dashboard.thread.is_some() {
            assert!(!dashboard.failed);
            dashboard.report(&Metrics::default()).unwrap();
        }
        assert!(dashboard.failed, "log lines replace it");
        dashboard.report(&Metrics::default()).unwrap();
        dashboard.finish().unwrap();
    }
}
