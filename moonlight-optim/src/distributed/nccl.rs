//! Devices of one process that talk to each other directly, by Burn's `distributed::all_reduce`.

use std::sync::Arc;

use burn::tensor::distributed::{ReduceOperation, all_reduce};
use burn::tensor::{DType, Device, Tensor};

use super::collective::{split, stretch};
use super::comm_stats::Counter;
use super::{Collective, CollectiveError, Operation, Traffic};

/// Whether devices of this kind sum tensors among themselves.
///
/// In Burn 0.22.1 that is CUDA's with NCCL. Every other backend answers `all_reduce` by a panic or an error of its server
/// (`no_device_transport`), so that asking it is no way to find out.
pub fn devices_reduce(device: &Device) -> bool {
    // The name is all that is to be had without a backend's own types.
    format!("{device:?}").contains("Cuda")
}

/// A device's side of a group of devices in a process. All that Burn's devices do together is to sum a tensor: a
/// reduce-scatter is the own part of that sum, and a gather is the sum of tensors that are zero where others have their
/// parts. `host` carries the rest, and is asked first whether everybody is there, for a device that waits cannot be
/// called back.
#[derive(Debug)]
pub struct OnDevices {
    host: Arc<dyn Collective>,
    devices: Vec<Device>,
    sent: Counter,
}

impl OnDevices {
    /// Joins the devices of all workers of `host`, in the order of the ranks.
    pub fn new(host: Arc<dyn Collective>, devices: Vec<Device>) -> Self {
        Self { host, devices, sent: Counter::default() }
    }

    fn sum(&self, operation: Operation, tensor: Tensor<1>) -> Result<Tensor<1>, CollectiveError> {
        self.host.barrier()?;
        // What a ring sends for a sum: twice (N - 1) / N of the tensor.
        let bytes = tensor.dims()[0] * tensor.dtype().size();
        self.sent.add(operation, 2 * bytes * (self.size() - 1) / self.size());
        Ok(all_reduce(tensor, ReduceOperation::Sum, self.devices.clone()).resolve())
    }
}

impl Collective for OnDevices {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_to_all(&self, outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        self.host.all_to_all(outgoing, incoming)
    }

    fn reduce_scatter(&self, parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError> {
        let before: usize = parts[..self.rank()].iter().map(|part| part.dims()[0]).sum();
        let [length] = parts[self.rank()].dims();
        let whole = Tensor::cat(parts, 0).cast(DType::F32);
        Ok(stretch(&self.sum(Operation::ReduceScatter, whole)?, before, length))
    }

    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (device, dtype) = (part.device(), part.dtype());
        let mut part = Some(part);
        let places = lengths.iter().enumerate().map(|(worker, &length)| {
            let own = part.take_if(|_| worker == self.rank());
            own.unwrap_or_else(|| Tensor::zeros([length], (&device, dtype)))
        });
        let whole = self.sum(Operation::AllGather, Tensor::cat(places.collect(), 0))?;
        let mut cuts = vec![0];
        cuts.extend(lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        Ok(split(&whole, &cuts))
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError> {
        let tensor = if self.rank() == root { tensor } else { tensor.zeros_like() };
        self.sum(Operation::Broadcast, tensor)
    }

    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CollectiveError> {
        self.sum(Operation::ReduceScatter, tensor.cast(DType::F32))
    }

    fn numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.host.numbers(own)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.host.barrier()
    }

    fn set_busy(&self, busy: bool) {
        self.host.set_busy(busy);
    }

    fn idle(&self) {
        self.host.idle();
    }

    fn fail(&self, message: &str) {
        self.host.fail(message);
    }

    fn fail_inside(&self, message: &str) {
        self.host.fail_inside(message);
    }

    fn traffic(&self) -> Traffic {
        self.sent.read() + self.host.traffic()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_goes_by_the_host() {
        assert!(!devices_reduce(&Device::default()));
    }
}
