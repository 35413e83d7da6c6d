//! A world size of 1.

use burn::tensor::{DType, Tensor};

use super::{BytesSent, Collective, CollectiveError};

/// A group of one rank: every collective returns its input. A reduce-scatter returns it in f32, as in a larger group.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
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

    fn all_gather_f64(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        Ok(vec![own.to_vec()])
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn set_busy(&self, _busy: bool) {}

    fn abort(&self, _message: &str) {}

    fn bytes_sent(&self) -> BytesSent {
        BytesSent::default()
    }
}
