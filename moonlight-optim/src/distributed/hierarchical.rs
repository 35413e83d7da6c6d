//! Groups within groups: devices in a process, processes on machines.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use burn::tensor::Tensor;

use super::collective::stretch;
use super::{Collective, CollectiveError, Traffic};

/// How often the other groups may get a sign of life.
const PULSE: Duration = Duration::from_millis(500);

/// Workers of several equal groups: `inner` joins those of this worker's group, `outer` those that have this worker's
/// rank in theirs. The worker's number is `outer.rank() * inner.size() + inner.rank()`.
///
/// What goes between groups goes once for a group: gradients are summed within each group before they leave it, and
/// parameters come in once and are handed around. `outer` is called from two threads at a time.
#[derive(Debug)]
pub struct Nested {
    inner: Arc<dyn Collective>,
    outer: Arc<dyn Collective>,
}

impl Nested {
    /// Joins the two.
    pub fn new(inner: Arc<dyn Collective>, outer: Arc<dyn Collective>) -> Self {
        // Signs of life to the other groups, also while this worker waits for its own.
        let pulse = Arc::downgrade(&outer);
        thread::spawn(move || {
            while let Some(outer) = pulse.upgrade() {
                outer.idle();
                drop(outer);
                thread::sleep(PULSE);
            }
        });
        Self { inner, outer }
    }

    /// An operation inside this worker's group, during which the other groups know that it waits.
    fn inside<T>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.outer.set_busy(true);
        let result = operation(&*self.inner);
        self.outer.set_busy(false);
        result
    }

    /// An operation between groups, during which this worker's own group knows that it waits.
    fn outside<T>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.inner.set_busy(true);
        let result = operation(&*self.outer);
        self.inner.set_busy(false);
        result
    }

    /// The worker with this place inside its group, of the group `group`.
    fn number(&self, group: usize, inside: usize) -> usize {
        group * self.inner.size() + inside
    }
}

/// Cuts a tensor into lengths.
fn cut(tensor: &Tensor<1>, lengths: &[usize]) -> Vec<Tensor<1>> {
    let mut start = 0;
    let mut parts = Vec::with_capacity(lengths.len());
    for &length in lengths {
        parts.push(stretch(tensor, start, length));
        start += length;
    }
    parts
}

impl Collective for Nested {
    fn rank(&self) -> usize {
        self.number(self.outer.rank(), self.inner.rank())
    }

    fn size(&self) -> usize {
        self.inner.size() * self.outer.size()
    }

    /// Each message goes to the worker of the own group that has the receiver's place, and from there to its group.
    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (insides, groups) = (self.inner.size(), self.outer.size());
        let lengths: Vec<f64> = outgoing.iter().map(|tensor| tensor.dims()[0] as f64).collect();
        // What each of the own group sends to whom.
        let lengths = self.inside(|inner| inner.numbers(&lengths))?;
        let by_group = |from: usize| -> Vec<usize> {
            (0..groups).map(|group| lengths[from][self.number(group, self.inner.rank())] as usize).collect()
        };
        let bundles = (0..insides).map(|inside| {
            Tensor::cat((0..groups).map(|group| outgoing[self.number(group, inside)].clone()).collect(), 0)
        });
        let totals: Vec<usize> = (0..insides).map(|from| by_group(from).iter().sum()).collect();
        let bundles = bundles.collect();
        let bundles = self.inside(|inner| inner.all_to_all(bundles, &totals))?;
        let parts: Vec<Vec<Tensor<1>>> =
            bundles.iter().enumerate().map(|(from, bundle)| cut(bundle, &by_group(from))).collect();
        let bundles =
            (0..groups).map(|group| Tensor::cat(parts.iter().map(|parts| parts[group].clone()).collect(), 0)).collect();
        let of_group =
            |group: usize| -> Vec<usize> { (0..insides).map(|inside| incoming[self.number(group, inside)]).collect() };
        let totals: Vec<usize> = (0..groups).map(|group| of_group(group).iter().sum()).collect();
        let bundles = self.outside(|outer| outer.all_to_all(bundles, &totals))?;
        Ok(bundles.iter().enumerate().flat_map(|(group, bundle)| cut(bundle, &of_group(group))).collect())
    }

    fn reduce_scatter(&self, parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError> {
        let groups = self.outer.size();
        let mine: Vec<usize> =
            (0..groups).map(|group| parts[self.number(group, self.inner.rank())].dims()[0]).collect();
        let bundles = (0..self.inner.size())
            .map(|inside| Tensor::cat((0..groups).map(|group| parts[self.number(group, inside)].clone()).collect(), 0));
        let bundles = bundles.collect();
        let sums = self.inside(|inner| inner.reduce_scatter(bundles))?;
        self.outside(|outer| outer.reduce_scatter(cut(&sums, &mine)))
    }

    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (insides, groups) = (self.inner.size(), self.outer.size());
        let of_inside =
            |inside: usize| -> Vec<usize> { (0..groups).map(|group| lengths[self.number(group, inside)]).collect() };
        let mine = of_inside(self.inner.rank());
        let column = self.outside(|outer| outer.all_gather(part, &mine))?;
        let totals: Vec<usize> = (0..insides).map(|inside| of_inside(inside).iter().sum()).collect();
        let columns = self.inside(|inner| inner.all_gather(Tensor::cat(column, 0), &totals))?;
        let columns: Vec<Vec<Tensor<1>>> =
            columns.iter().enumerate().map(|(inside, column)| cut(column, &of_inside(inside))).collect();
        Ok((0..self.size()).map(|worker| columns[worker % insides][worker / insides].clone()).collect())
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError> {
        let (group, inside) = (root / self.inner.size(), root % self.inner.size());
        let tensor = match self.inner.rank() == inside {
            true => self.outside(|outer| outer.broadcast(tensor, group))?,
            false => tensor,
        };
        self.inside(|inner| inner.broadcast(tensor, inside))
    }

    fn numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        let column = self.outside(|outer| outer.numbers(own))?.concat();
        let columns = self.inside(|inner| inner.numbers(&column))?;
        let of = |worker: usize| {
            let (group, inside) = (worker / self.inner.size(), worker % self.inner.size());
            columns[inside][group * own.len()..][..own.len()].to_vec()
        };
        Ok((0..self.size()).map(of).collect())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.inside(|inner| inner.barrier())?;
        self.outside(|outer| outer.barrier())?;
        self.inside(|inner| inner.barrier())
    }

    fn set_busy(&self, busy: bool) {
        self.inner.set_busy(busy);
        self.outer.set_busy(busy);
    }

    fn idle(&self) {
        self.inner.idle();
    }

    fn fail(&self, message: &str) {
        self.inner.fail(message);
        self.outer.fail(message);
    }

    fn fail_inside(&self, message: &str) {
        self.inner.fail_inside(message);
    }

    /// Within the group and between groups.
    fn traffic(&self) -> Traffic {
        self.inner.traffic() + self.outer.traffic()
    }
}
