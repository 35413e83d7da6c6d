//! Collectives through the host: tensors leave their device as bytes, and somebody carries these.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{Bytes, DType, Tensor, TensorData};

use super::collective::stretch;
use super::comm_stats::Counter;
use super::{Collective, CollectiveError, Operation, Traffic};

/// A message; shared where several workers of a process get the same.
pub type Payload = Arc<Bytes>;

/// Carries messages between workers.
pub trait Transport: Debug + Send + Sync {
    /// This worker's number.
    fn rank(&self) -> usize;

    /// How many workers there are.
    fn size(&self) -> usize;

    /// Gives `outgoing[w]` to worker `w` and returns what each worker gave, `incoming[w]` bytes; this worker's own place
    /// is empty in both.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn exchange(
        &self,
        operation: Operation,
        outgoing: Vec<Payload>,
        incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError>;

    /// See [`Collective::set_busy`].
    fn set_busy(&self, busy: bool);

    /// See [`Collective::idle`].
    fn idle(&self) {}

    /// See [`Collective::fail`].
    fn fail(&self, message: &str);

    /// See [`Collective::fail_inside`].
    fn fail_inside(&self, message: &str) {
        let _ = message;
    }
}

/// Collectives over a [`Transport`].
///
/// A reduce-scatter gives each worker its parts of all others, and it sums them itself: as many bytes as a ring sends,
/// `(N - 1) / N` of the tensor, and an order of summation that is that of the ranks.
#[derive(Debug)]
pub struct ByHost<T> {
    transport: T,
    sent: Counter,
}

impl<T: Transport> ByHost<T> {
    /// Collectives by this transport.
    pub fn new(transport: T) -> Self {
        Self { transport, sent: Counter::default() }
    }

    /// Every worker's own place stays empty: what it gives to itself does not travel.
    fn exchange(
        &self,
        operation: Operation,
        outgoing: Vec<Payload>,
        incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError> {
        self.sent.add(operation, outgoing.iter().map(|payload| payload.len()).sum());
        self.transport.exchange(operation, outgoing, incoming)
    }

    /// Sends `outgoing` (nothing to itself) and returns tensors, at this worker's place `own`.
    fn tensors(
        &self,
        operation: Operation,
        outgoing: Vec<Payload>,
        lengths: &[usize],
        own: Tensor<1>,
    ) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (device, dtype) = (own.device(), own.dtype());
        let rank = self.rank();
        let bytes = |(worker, length): (usize, &usize)| if worker == rank { 0 } else { length * dtype.size() };
        let incoming: Vec<usize> = lengths.iter().enumerate().map(bytes).collect();
        let received = self.exchange(operation, outgoing, &incoming)?;
        let mut own = Some(own);
        let tensors = received.into_iter().enumerate().map(|(worker, payload)| {
            own.take_if(|_| worker == rank).unwrap_or_else(|| {
                let bytes = Arc::try_unwrap(payload).unwrap_or_else(|shared| Bytes::clone(&shared));
                Tensor::from_data(TensorData::from_bytes(bytes, [lengths[worker]], dtype), (&device, dtype))
            })
        });
        Ok(tensors.collect())
    }

    /// A message to each other worker, and none to itself.
    fn to_others(&self, payload: &Payload) -> Vec<Payload> {
        let to = |worker: usize| if worker == self.rank() { nothing() } else { payload.clone() };
        (0..self.size()).map(to).collect()
    }
}

fn nothing() -> Payload {
    Arc::new(Bytes::from_bytes_vec(Vec::new()))
}

fn bytes_of(tensor: Tensor<1>) -> Bytes {
    tensor.into_data().into_parts().0
}

impl<T: Transport> Collective for ByHost<T> {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.transport.size()
    }

    fn all_to_all(&self, mut outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let rank = self.rank();
        let empty = stretch(&outgoing[rank], 0, 0);
        let own = std::mem::replace(&mut outgoing[rank], empty);
        let outgoing = outgoing.into_iter().map(|tensor| Arc::new(bytes_of(tensor))).collect();
        self.tensors(Operation::AllToAll, outgoing, incoming, own)
    }

    fn reduce_scatter(&self, mut parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError> {
        let rank = self.rank();
        let [length] = parts[rank].dims();
        let empty = stretch(&parts[rank], 0, 0);
        let own = std::mem::replace(&mut parts[rank], empty);
        let outgoing = parts.into_iter().map(|tensor| Arc::new(bytes_of(tensor))).collect();
        let parts = self.tensors(Operation::ReduceScatter, outgoing, &vec![length; self.size()], own)?;
        let sum = parts.into_iter().map(|part| part.cast(DType::F32)).reduce(|sum, part| sum.add(part));
        Ok(sum.expect("a group has a worker"))
    }

    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let outgoing = self.to_others(&Arc::new(bytes_of(part.clone())));
        self.tensors(Operation::AllGather, outgoing, lengths, part)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError> {
        let rank = self.rank();
        let mut lengths = vec![0; self.size()];
        lengths[root] = tensor.dims()[0];
        let outgoing = match rank == root {
            true => self.to_others(&Arc::new(bytes_of(tensor.clone()))),
            false => self.to_others(&nothing()),
        };
        let mut tensors = self.tensors(Operation::Broadcast, outgoing, &lengths, tensor)?;
        Ok(tensors.swap_remove(root))
    }

    fn numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        let rank = self.rank();
        let payload = own.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
        let outgoing = self.to_others(&Arc::new(Bytes::from_bytes_vec(payload)));
        let bytes = |worker: usize| if worker == rank { 0 } else { 8 * own.len() };
        let incoming: Vec<usize> = (0..self.size()).map(bytes).collect();
        let received = self.exchange(Operation::Numbers, outgoing, &incoming)?;
        let read = |(worker, payload): (usize, Payload)| match worker == rank {
            true => own.to_vec(),
            false => payload.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        };
        Ok(received.into_iter().enumerate().map(read).collect())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let outgoing = self.to_others(&nothing());
        self.exchange(Operation::Barrier, outgoing, &vec![0; self.size()]).map(|_| ())
    }

    fn set_busy(&self, busy: bool) {
        self.transport.set_busy(busy);
    }

    fn idle(&self) {
        self.transport.idle();
    }

    fn fail(&self, message: &str) {
        self.transport.fail(message);
    }

    fn fail_inside(&self, message: &str) {
        self.transport.fail_inside(message);
    }

    fn traffic(&self) -> Traffic {
        self.sent.read()
    }
}
