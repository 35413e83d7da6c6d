//! Collective operations.

use std::fmt::Debug;

use burn::tensor::Tensor;

use super::{BytesSent, CollectiveError};

/// The collectives of a process group, as one rank sees them (PyTorch's `ProcessGroup` backend).
///
/// Every rank calls the same collectives in the same order with tensors of matching sizes; ranks count from 0. Tensors are
/// float and one-dimensional, on the rank's own device, and so are the results.
///
/// Sums are taken in f32 and in rank order, on any transport. They have the same bits as on one rank that accumulates the same
/// micro-batches in that order. Exceptions are [`HierarchicalCollective`](super::HierarchicalCollective), which sums within a
/// process first, and [`NcclCollective`](super::NcclCollective), where NCCL chooses the order.
pub trait Collective: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// The world size.
    fn size(&self) -> usize;

    /// Sends `outgoing[r]` to rank `r`. Returns what each rank sent to this one: `incoming[r]` elements from rank `r`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], as for every collective here.
    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError>;

    /// The sum over all ranks, in f32, of the part that is meant for this rank: their `parts[self.rank()]`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn reduce_scatter(&self, parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError>;

    /// The parts of all ranks, in rank order: `lengths[r]` elements of rank `r`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError>;

    /// The `tensor` of rank `root`. Of the other ranks' tensors only size and dtype are used.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError>;

    /// The scalars of all ranks, in rank order; every rank passes the same number of them. They stay f64 on the host, for
    /// norms, losses and counts.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn all_gather_f64(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// The sum over all ranks, in f32.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CollectiveError> {
        let [elements] = tensor.dims();
        let cuts = even_cuts(elements, self.size());
        let part = self.reduce_scatter(split(&tensor, &cuts))?;
        let lengths: Vec<usize> = cuts.windows(2).map(|cut| cut[1] - cut[0]).collect();
        Ok(Tensor::cat(self.all_gather(part, &lengths)?, 0))
    }

    /// Suspends this rank's timeout (`true`) during work that the others must wait for, such as saving, or restores it
    /// (`false`). Calls nest.
    fn set_busy(&self, busy: bool);

    /// Shows the other ranks that this one is alive, on transports where they could not see it otherwise. The communication thread
    /// calls it at intervals while no collective runs.
    fn heartbeat(&self) {}

    /// Ends the group: collectives of the other ranks return [`CollectiveError::RankFailed`]; ranks that are processes are
    /// aborted.
    fn abort(&self, message: &str);

    /// As [`abort`](Self::abort), for the ranks of this process only.
    fn abort_local(&self, message: &str) {
        let _ = message;
    }

    /// What this rank has sent so far.
    fn bytes_sent(&self) -> BytesSent;
}

/// The bounds of `parts` contiguous parts of `elements` elements, as even as possible, the larger ones first. Part `i` is
/// `cuts[i]..cuts[i + 1]`, so there are `parts + 1` bounds.
pub fn even_cuts(elements: usize, parts: usize) -> Vec<usize> {
    let (each, larger) = (elements / parts, elements % parts);
    (0..=parts).map(|part| part * each + part.min(larger)).collect()
}

/// The parts of a tensor between consecutive bounds.
pub(super) fn split(tensor: &Tensor<1>, cuts: &[usize]) -> Vec<Tensor<1>> {
    cuts.windows(2).map(|cut| slice(tensor, cut[0], cut[1] - cut[0])).collect()
}

/// `length` elements of a tensor from `start` on. A length of 0 needs its own case: `narrow` refuses it, and a rank may own
/// nothing in a bucket.
pub(super) fn slice(tensor: &Tensor<1>, start: usize, length: usize) -> Tensor<1> {
    match length {
        0 => Tensor::empty([0], (&tensor.device(), tensor.dtype())),
        _ => tensor.clone().narrow(0, start, length),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_even() {
        assert_eq!(even_cuts(10, 4), [0, 3, 6, 8, 10]);
        assert_eq!(even_cuts(2, 3), [0, 1, 2, 2]);
        assert_eq!(even_cuts(0, 2), [0, 0, 0]);
    }
}
