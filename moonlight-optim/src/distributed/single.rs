//! One worker alone.

use burn::tensor::{DType, Tensor};

use super::{Collective, CollectiveError, Traffic};

/// A group of one: every operation gives back what it got.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, _incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        Ok(outgoing)
    }

    fn reduce_scatter(&self, mut parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError> {
        Ok(parts.swap_remove(0).cast(DType::F32))
    }

    fn all_gather(&self, part: Tensor<1>, _lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        Ok(vec![part])
    }

    fn broadcast(&self, tensor: Tensor<1>, _root: usize) -> Result<Tensor<1>, CollectiveError> {
        Ok(tensor)
    }

    fn numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        Ok(vec![own.to_vec()])
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn set_busy(&self, _busy: bool) {}

    fn fail(&self, _message: &str) {}

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
