//! Collective operations.

use std::fmt::Debug;

use burn::tensor::Tensor;

use super::{CollectiveError, Traffic};

/// A worker's end of a process group.
///
/// Every worker calls the same operations in the same order with tensors of matching sizes; ranks count from 0. Tensors
/// are float and one-dimensional, on the worker's own device, and so are the results.
///
/// Sums are taken in f32 and in the order of the ranks, on any transport (except for [`Nested`](super::Nested),
/// which sums within a process first, and for NCCL): the same gradients give the
/// same sum bit for bit, that of one worker over as many micro-batches.
pub trait Collective: Debug + Send + Sync {
    /// This worker's rank.
    fn rank(&self) -> usize;

    /// The world size.
    fn size(&self) -> usize;

    /// Sends `outgoing[w]` to worker `w`; returns what each worker sent to this one, `incoming[w]` elements.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], as every operation here.
    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError>;

    /// The sum over all workers of their `parts[rank]`, with the rank of this one, in f32.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn reduce_scatter(&self, parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError>;

    /// The parts of all workers, in the order of the ranks; `lengths[w]` elements of worker `w`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError>;

    /// The `tensor` of the worker `root`; of the others' only size and type matter.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError>;

    /// The numbers of each worker, in the order of the ranks; all give equally many.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError>;

    /// Returns when every worker has called it.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// The sum over all workers, in f32.
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

    /// Suspends this worker's timeout (`true`) during work that the others must wait for, such as saving, or restores it.
    /// Calls nest.
    fn set_busy(&self, busy: bool);

    /// Called from time to time by the thread that runs the operations, while there is none: for heartbeats.
    fn idle(&self) {}

    /// Ends the group: the other workers get [`CollectiveError::Failed`]; workers that are processes are aborted.
    fn fail(&self, message: &str);

    /// As [`fail`](Self::fail), for the workers of this process only.
    fn fail_inside(&self, message: &str) {
        let _ = message;
    }

    /// Bytes sent so far.
    fn traffic(&self) -> Traffic;
}

/// The bounds of `parts` parts of `elements` elements, as even as possible, the larger ones first: `parts + 1` of them.
pub fn even_cuts(elements: usize, parts: usize) -> Vec<usize> {
    let (each, larger) = (elements / parts, elements % parts);
    (0..=parts).map(|part| part * each + part.min(larger)).collect()
}

/// The parts of a tensor between cuts.
pub(super) fn split(tensor: &Tensor<1>, cuts: &[usize]) -> Vec<Tensor<1>> {
    cuts.windows(2).map(|cut| stretch(tensor, cut[0], cut[1] - cut[0])).collect()
}

/// `length` elements of a tensor; `narrow` refuses 0.
pub(super) fn stretch(tensor: &Tensor<1>, start: usize, length: usize) -> Tensor<1> {
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
