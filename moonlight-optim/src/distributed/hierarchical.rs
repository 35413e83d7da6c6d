//! Hierarchical collectives: within a process first, then between processes.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use burn::tensor::Tensor;

use super::collective::slice;
use super::{BytesSent, Collective, CollectiveError};

/// How often this rank may send a heartbeat to the other groups.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

/// The collectives of several equal groups, such as the devices of several machines. `inner` connects the ranks of this
/// rank's group, `outer` the ranks that have the same inner rank in each group. The global rank is
/// `outer.rank() * inner.size() + inner.rank()`.
///
/// Data crosses between groups once per group: gradients are summed within a group first, and parameters arrive once and
/// are passed on. A sum is therefore a sum of group sums, which rounds differently from the sum in rank order.
///
/// Two threads call `outer`, possibly at the same time: the communication thread, and one that sends heartbeats.
#[derive(Debug)]
pub struct HierarchicalCollective {
    inner: Arc<dyn Collective>,
    outer: Arc<dyn Collective>,
}

impl HierarchicalCollective {
    /// The collectives of one rank, and the thread that sends its heartbeats to the other groups.
    pub fn new(inner: Arc<dyn Collective>, outer: Arc<dyn Collective>) -> Self {
        // A thread besides the communication thread, which sends no heartbeat while it waits within this group. It holds only a
        // weak reference, so that it ends with the collective.
        let weak = Arc::downgrade(&outer);
        thread::spawn(move || {
            while let Some(outer) = weak.upgrade() {
                outer.heartbeat();
                drop(outer);
                thread::sleep(HEARTBEAT_INTERVAL);
            }
        });
        Self { inner, outer }
    }

    /// Runs a collective within this rank's group. Meanwhile the timeout in `outer` is suspended: waiting for a slow rank of this
    /// group must not look like silence to the other groups.
    fn within_group<T>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.outer.set_busy(true);
        let result = operation(&*self.inner);
        self.outer.set_busy(false);
        result
    }

    /// Runs a collective between groups. Meanwhile this rank's timeout in its own group is suspended.
    fn across_groups<T>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.inner.set_busy(true);
        let result = operation(&*self.outer);
        self.inner.set_busy(false);
        result
    }

    fn global_rank(&self, group: usize, inner_rank: usize) -> usize {
        group * self.inner.size() + inner_rank
    }
}

/// The consecutive parts of a tensor, `lengths[i]` elements each.
fn split_lengths(tensor: &Tensor<1>, lengths: &[usize]) -> Vec<Tensor<1>> {
    let mut start = 0;
    let mut parts = Vec::with_capacity(lengths.len());
    for &length in lengths {
        parts.push(slice(tensor, start, length));
        start += length;
    }
    parts
}

impl Collective for HierarchicalCollective {
    fn rank(&self) -> usize {
        self.global_rank(self.outer.rank(), self.inner.rank())
    }

    fn size(&self) -> usize {
        self.inner.size() * self.outer.size()
    }

    /// Each message goes first to the rank of this group that has the receiver's inner rank, and from there to the receiver.
    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (group_size, groups) = (self.inner.size(), self.outer.size());
        let lengths: Vec<f64> = outgoing.iter().map(|tensor| tensor.dims()[0] as f64).collect();
        // Only the senders know the lengths of what passes through this rank, so the group exchanges them first.
        let lengths = self.within_group(|inner| inner.all_gather_f64(&lengths))?;
        let by_group = |from: usize| -> Vec<usize> {
            (0..groups).map(|group| lengths[from][self.global_rank(group, self.inner.rank())] as usize).collect()
        };
        // First hop, within the group: to the rank with the receiver's inner rank, its messages for all groups in one tensor.
        let bundles = (0..group_size).map(|inner_rank| {
            Tensor::cat((0..groups).map(|group| outgoing[self.global_rank(group, inner_rank)].clone()).collect(), 0)
        });
        let totals: Vec<usize> = (0..group_size).map(|from| by_group(from).iter().sum()).collect();
        let bundles = bundles.collect();
        let bundles = self.within_group(|inner| inner.all_to_all(bundles, &totals))?;
        // Regroup by destination group; the senders of a bundle stay in the order of their inner ranks.
        let parts: Vec<Vec<Tensor<1>>> =
            bundles.iter().enumerate().map(|(from, bundle)| split_lengths(bundle, &by_group(from))).collect();
        let bundles =
            (0..groups).map(|group| Tensor::cat(parts.iter().map(|parts| parts[group].clone()).collect(), 0)).collect();
        let of_group = |group: usize| -> Vec<usize> {
            (0..group_size).map(|inner_rank| incoming[self.global_rank(group, inner_rank)]).collect()
        };
        // Second hop, between groups: one message for each group instead of one for each of its ranks.
        let totals: Vec<usize> = (0..groups).map(|group| of_group(group).iter().sum()).collect();
        let bundles = self.across_groups(|outer| outer.all_to_all(bundles, &totals))?;
        Ok(bundles.iter().enumerate().flat_map(|(group, bundle)| split_lengths(bundle, &of_group(group))).collect())
    }

    fn reduce_scatter(&self, parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError> {
        let groups = self.outer.size();
        // The group sums for the ranks that have this inner rank, one in each group, pass through this rank.
        let lengths: Vec<usize> =
            (0..groups).map(|group| parts[self.global_rank(group, self.inner.rank())].dims()[0]).collect();
        let bundles = (0..self.inner.size()).map(|inner_rank| {
            Tensor::cat((0..groups).map(|group| parts[self.global_rank(group, inner_rank)].clone()).collect(), 0)
        });
        let bundles = bundles.collect();
        let sums = self.within_group(|inner| inner.reduce_scatter(bundles))?;
        self.across_groups(|outer| outer.reduce_scatter(split_lengths(&sums, &lengths)))
    }

    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (group_size, groups) = (self.inner.size(), self.outer.size());
        let of_inner_rank = |inner_rank: usize| -> Vec<usize> {
            (0..groups).map(|group| lengths[self.global_rank(group, inner_rank)]).collect()
        };
        let column_lengths = of_inner_rank(self.inner.rank());
        // Each part crosses between groups once; then the ranks of a group exchange what they have received.
        let column = self.across_groups(|outer| outer.all_gather(part, &column_lengths))?; // by group
        let totals: Vec<usize> = (0..group_size).map(|inner_rank| of_inner_rank(inner_rank).iter().sum()).collect();
        let columns = self.within_group(|inner| inner.all_gather(Tensor::cat(column, 0), &totals))?; // by inner rank
        let columns: Vec<Vec<Tensor<1>>> = columns
            .iter()
            .enumerate()
            .map(|(inner_rank, column)| split_lengths(column, &of_inner_rank(inner_rank)))
            .collect();
        Ok((0..self.size()).map(|rank| columns[rank % group_size][rank / group_size].clone()).collect())
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError> {
        let (group, inner_root) = (root / self.inner.size(), root % self.inner.size());
        let tensor = match self.inner.rank() == inner_root {
            true => self.across_groups(|outer| outer.broadcast(tensor, group))?,
            false => tensor,
        };
        self.within_group(|inner| inner.broadcast(tensor, inner_root))
    }

    fn all_gather_f64(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        let column = self.across_groups(|outer| outer.all_gather_f64(own))?.concat();
        let columns = self.within_group(|inner| inner.all_gather_f64(&column))?;
        let of = |rank: usize| {
            let (group, inner_rank) = (rank / self.inner.size(), rank % self.inner.size());
            columns[inner_rank][group * own.len()..][..own.len()].to_vec()
        };
        Ok((0..self.size()).map(of).collect())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.within_group(|inner| inner.barrier())?;
        self.across_groups(|outer| outer.barrier())?;
        self.within_group(|inner| inner.barrier())
    }

    fn set_busy(&self, busy: bool) {
        self.inner.set_busy(busy);
        self.outer.set_busy(busy);
    }

    /// Within the group only; the thread of [`HierarchicalCollective::new`] serves the other groups.
    fn heartbeat(&self) {
        self.inner.heartbeat();
    }

    fn abort(&self, message: &str) {
        self.inner.abort(message);
        self.outer.abort(message);
    }

    fn abort_local(&self, message: &str) {
        self.inner.abort_local(message);
    }

    /// The sum of what was sent within the group and between groups.
    fn bytes_sent(&self) -> BytesSent {
        self.inner.bytes_sent() + self.outer.bytes_sent()
    }
}
