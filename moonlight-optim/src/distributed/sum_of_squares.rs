//! Norms that do not depend on how a tensor is divided among ranks.

use burn::tensor::{DType, Tensor, Transaction};

/// Elements widened to f64 at a time: 8 MiB, so that the norm of a large embedding needs no f64 copy of it.
const CHUNK: usize = 1 << 20;

/// The sum of the squares of all elements, in f64 where the device has it, else in f32.
///
/// In f64 the order of summation changes about the 12th digit. However the tensor is divided among ranks, the sums of the parts
/// therefore add up to that of the whole within f32 precision, and every world size clips by the same f32 factor.
pub fn sum_of_squares<const D: usize>(tensor: Tensor<D>) -> f64 {
    let mut sums = SumsOfSquares::default();
    sums.add(tensor);
    sums.total()
}

/// [`sum_of_squares`] of several tensors. Their sums stay on the device until all are read at once, because each reading waits for the
/// device.
#[derive(Debug, Default)]
pub(crate) struct SumsOfSquares(Vec<Tensor<1>>);

impl SumsOfSquares {
    pub(crate) fn add<const D: usize>(&mut self, tensor: Tensor<D>) {
        let elements = tensor.shape().num_elements();
        let wide = if tensor.device().supports_dtype(DType::F64) { DType::F64 } else { DType::F32 };
        let flat = tensor.reshape([elements]);
        let sums = (0..elements).step_by(CHUNK).map(|start| {
            let part = flat.clone().narrow(0, start, CHUNK.min(elements - start)).cast(wide);
            part.clone().mul(part).sum()
        });
        self.0.extend(sums.reduce(|sum, part| sum.add(part)));
    }

    /// The sum over all tensors, in the order in which they were added.
    pub(crate) fn total(self) -> f64 {
        let read = self.0.into_iter().fold(Transaction::default(), Transaction::register).execute();
        read.iter().flat_map(|sum| sum.iter::<f64>()).fold(0.0, |total, sum| total + sum)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    #[test]
    fn the_sums_of_parts_add_up_to_the_sum_of_the_whole() {
        let device = Device::default();
        let whole = Tensor::<1>::random([3_000_001], Distribution::Default, &device);
        let exact: f64 = whole.clone().into_data().iter::<f64>().map(|value| value * value).sum();
        let sum = sum_of_squares(whole.clone());
        assert!((sum / exact - 1.0).abs() < 1e-12, "{sum} and {exact}");
        let parts: f64 = [(0, 7), (7, 1_400_000), (1_400_007, 1_599_994)]
            .iter()
            .map(|&(start, length)| sum_of_squares(whole.clone().narrow(0, start, length)))
            .sum();
        assert!((parts / sum - 1.0).abs() < 1e-12);
        assert_eq!(sum_of_squares(Tensor::<2>::zeros([0, 3], &device)), 0.0);
        assert!(sum_of_squares(Tensor::<1>::full([3], f32::NAN, &device)).is_nan());
        // These squares overflow f32.
        assert!(sum_of_squares(Tensor::<1>::full([3], 1e30, &device)).is_finite());
    }
}
