//! Collectives between the CUDA devices of one process, by NCCL through Burn's `distributed::all_reduce`.

use std::sync::Arc;

use burn::tensor::distributed::{ReduceOperation, all_reduce};
use burn::tensor::{DType, Device, Tensor};

use super::bytes_sent::SentCounter;
use super::collective::{slice, split};
use super::{BytesSent, Collective, CollectiveError, CollectiveOp};

/// Whether devices of this kind can reduce tensors among themselves, by NCCL.
///
/// In Burn 0.22.1 only CUDA devices can. Every other backend panics in `all_reduce` or returns an error of its server
/// (`no_device_transport`), so a probe is not possible.
pub fn supports_nccl(device: &Device) -> bool {
    // This crate does not depend on the CUDA backend and cannot name its device type, so the debug text decides.
    format!("{device:?}").contains("Cuda")
}

/// Collectives between the devices of one process, by NCCL. Never run on a physical GPU.
///
/// Burn offers an all-reduce only. A reduce-scatter takes this rank's part of the sum; an all-gather is the sum of tensors
/// that are zero where other ranks have their parts. `host` does the other collectives, and a barrier before each of NCCL's:
/// a device that waits in NCCL cannot be interrupted, so a missing rank has to be found first, by the barrier's timeout.
#[derive(Debug)]
pub struct NcclCollective {
    host: Arc<dyn Collective>,
    devices: Vec<Device>,
    sent: SentCounter,
}

impl NcclCollective {
    /// A rank of a group whose ranks `host` connects. `devices` has the device of each rank, in rank order.
    pub fn new(host: Arc<dyn Collective>, devices: Vec<Device>) -> Self {
        Self { host, devices, sent: SentCounter::default() }
    }

    fn sum(&self, operation: CollectiveOp, tensor: Tensor<1>) -> Result<Tensor<1>, CollectiveError> {
        self.host.barrier()?;
        // A ring all-reduce sends 2 (N - 1) / N of the tensor.
        let bytes = tensor.dims()[0] * tensor.dtype().size();
        self.sent.add(operation, 2 * bytes * (self.size() - 1) / self.size());
        Ok(all_reduce(tensor, ReduceOperation::Sum, self.devices.clone()).resolve())
    }
}

impl Collective for NcclCollective {
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
        let start: usize = parts[..self.rank()].iter().map(|part| part.dims()[0]).sum();
        let [length] = parts[self.rank()].dims();
        let whole = Tensor::cat(parts, 0).cast(DType::F32);
        Ok(slice(&self.sum(CollectiveOp::ReduceScatter, whole)?, start, length))
    }

    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (device, dtype) = (part.device(), part.dtype());
        let mut part = Some(part);
        let parts = lengths.iter().enumerate().map(|(peer, &length)| {
            let own = part.take_if(|_| peer == self.rank());
            own.unwrap_or_else(|| Tensor::zeros([length], (&device, dtype)))
        });
        let whole = self.sum(CollectiveOp::AllGather, Tensor::cat(parts.collect(), 0))?;
        let mut cuts = vec![0];
        cuts.extend(lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        Ok(split(&whole, &cuts))
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError> {
        let tensor = if self.rank() == root { tensor } else { tensor.zeros_like() };
        self.sum(CollectiveOp::Broadcast, tensor)
    }

    fn all_reduce(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CollectiveError> {
        self.sum(CollectiveOp::ReduceScatter, tensor.cast(DType::F32))
    }

    fn all_gather_f64(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.host.all_gather_f64(own)
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.host.barrier()
    }

    fn set_busy(&self, busy: bool) {
        self.host.set_busy(busy);
    }

    fn heartbeat(&self) {
        self.host.heartbeat();
    }

    fn abort(&self, message: &str) {
        self.host.abort(message);
    }

    fn abort_local(&self, message: &str) {
        self.host.abort_local(message);
    }

    fn bytes_sent(&self) -> BytesSent {
        self.sent.read() + self.host.bytes_sent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_devices_have_no_nccl() {
        assert!(!supports_nccl(&Device::default()));
    }
}
