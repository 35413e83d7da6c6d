//! Operations that all workers take part in.

use std::fmt::Debug;

use burn::tensor::Tensor;

use super::{CollectiveError, Traffic};

/// A worker's side of a group that works together.
///
/// Every worker calls the same operations in the same order with tensors of agreeing sizes; ranks count from 0. Tensors
/// are flat, float tensors on the worker's own device, and results are on it too.
///
/// Sums are taken in f32 and in the order of the ranks, whatever carries the messages (but for [`Nested`](super::Nested),
/// which sums the devices of a process first, and for what the devices sum by themselves): the same gradients give the
/// same sum bit for bit on any engine, and the sum that one worker takes over as many micro-batches.
pub trait Collective: Debug + Send + Sync {
    /// This worker's number.
    fn rank(&self) -> usize;

    /// How many workers there are.
    fn size(&self) -> usize;

    /// Gives `outgoing[w]` to worker `w` and returns what each worker gave to this one, which has `incoming[w]` elements.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], as every operation here.
    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError>;

    /// The sum over all workers of what each has at the place of this one in `parts`, in f32.
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

    /// The `tensor` of the worker `root`; the others' are only looked at for their size and type.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError>;

    /// The numbers of each worker, in the order of the ranks; as many of each.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError>;

    /// Returns when every worker has come here.
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

    /// Says that this worker is at something long that the others must wait for (`true`), or is through with it. Calls
    /// nest.
    fn set_busy(&self, busy: bool);

    /// Called now and then while nothing else is asked for, by the thread that runs the operations.
    fn idle(&self) {}

    /// Ends the group: the other workers get [`CollectiveError::Failed`], or where workers are processes they are ended.
    fn fail(&self, message: &str);

    /// As [`fail`](Self::fail), but for the workers of this process alone.
    fn fail_inside(&self, message: &str) {
        let _ = message;
    }

    /// Bytes sent so far.
    fn traffic(&self) -> Traffic;
}

/// Where `parts` parts of `elements` elements begin and the last one ends, as even as can be, the larger ones first.
pub fn even_cuts(elements: usize, parts: usize) -> Vec<usize> {
    let (each, larger) = (elements / parts, elements % parts);
    (0..=parts).map(|part| part * each + part.min(larger)).collect()
}

/// The parts of a tensor between cuts.
pub(super) fn split(tensor: &Tensor<1>, cuts: &[usize]) -> Vec<Tensor<1>> {
    cuts.windows(2).map(|cut| stretch(tensor, cut[0], cut[1] - cut[0])).collect()
}

/// `length` elements of a tensor; Burn's `narrow` wants one at least.
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
