//! Where the metrics of a run go.

use super::{Metrics, Split};
use crate::error::TrainError;

/// Receives the metrics of a run from the training loop: the dashboard, log lines, `metrics.jsonl`, TensorBoard.
///
/// The ranks after the first one report nothing: their list of reporters is empty.
pub(crate) trait Reporter {
    /// A step is about to start.
    fn begin_step(&mut self) {}

    /// A step or a validation has ended.
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError>;

    /// The run has ended.
    fn finish(&mut self) -> Result<(), TrainError> {
        Ok(())
    }
}

/// Reports to each in turn.
impl Reporter for Vec<Box<dyn Reporter>> {
    fn begin_step(&mut self) {
        self.iter_mut().for_each(|reporter| reporter.begin_step());
    }

    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        self.iter_mut().try_for_each(|reporter| reporter.report(metrics))
    }

    fn finish(&mut self) -> Result<(), TrainError> {
        self.iter_mut().try_for_each(|reporter| reporter.finish())
    }
}

/// Forwards every validation, but only one training step in `every`, and the last one.
pub(crate) struct LogEvery<R> {
    pub(crate) every: u64,
    pub(crate) last_step: u64,
    pub(crate) reporter: R,
}

impl<R: Reporter> Reporter for LogEvery<R> {
    fn begin_step(&mut self) {
        self.reporter.begin_step();
    }

    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let is_logged = metrics.step.is_multiple_of(self.every) || metrics.step == self.last_step;
        if metrics.split == Split::Valid || is_logged { self.reporter.report(metrics) } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), TrainError> {
        self.reporter.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    struct Recorder(Rc<RefCell<Vec<(Split, u64)>>>);

    impl Reporter for Recorder {
        fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
            self.0.borrow_mut().push((metrics.split, metrics.step));
            Ok(())
        }
    }

    #[test]
    fn every_nth_step_is_logged_and_the_last_one_and_every_validation() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let reporters: Vec<Box<dyn Reporter>> = vec![Box::new(Recorder(seen.clone()))];
        let mut log = LogEvery { every: 3, last_step: 7, reporter: reporters };
        for step in 1..=7 {
            log.report(&Metrics { step, ..Metrics::default() }).unwrap();
            if step == 4 {
                log.report(&Metrics { split: Split::Valid, step, ..Metrics::default() }).unwrap();
            }
        }
        let train = |step| (Split::Train, step);
        assert_eq!(*seen.borrow(), [train(3), (Split::Valid, 4), train(6), train(7)]);
    }
}
