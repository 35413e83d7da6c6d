//! Where the metrics of a run go.

use super::{Metrics, Split};
use crate::error::TrainError;

/// Receives the metrics of a run from the training loop: the dashboard, log lines, `metrics.jsonl`, TensorBoard.
///
/// A run that nobody watches, as on all ranks but the first, has an empty list of them.
pub(crate) trait Reporter {
    /// A step is about to start.
    fn begin_step(&mut self) {}

    /// A step or a validation is over.
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError>;

    /// The run is over.
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

/// Passes on every validation, but of the training steps only one in `every`, and the last.
pub(crate) struct LogEvery<R> {
    pub(crate) every: u64,
    pub(crate) last_step: u64,
    pub(crate) reporter: R,
}

impl<R: Reporter> Reporter for LogEvery<R> {
    fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let logged = metrics.step.is_multiple_of(self.every) || metrics.step == self.last_step;
        if metrics.split == Split::Valid || logged { self.reporter.report(metrics) } else { Ok(()) }
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

    struct Seen(Rc<RefCell<Vec<(Split, u64)>>>);

    impl Reporter for Seen {
        fn report(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
            self.0.borrow_mut().push((metrics.split, metrics.step));
            Ok(())
        }
    }

    #[test]
    fn one_step_in_so_many_is_logged_and_the_last_and_every_validation() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let reporters: Vec<Box<dyn Reporter>> = vec![Box::new(Seen(seen.clone()))];
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
