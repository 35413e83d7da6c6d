//! Collectives through host memory: tensors are copied off their device and sent as bytes.

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::{Bytes, DType, Tensor, TensorData};

use super::bytes_sent::SentCounter;
use super::collective::slice;
use super::{BytesSent, Collective, CollectiveError, CollectiveOp};

/// The bytes of a message. Shared, since several ranks of a process may get the same ones.
pub type Payload = Arc<Bytes>;

/// Carries messages between ranks. [`HostCollective`] builds collectives on it.
pub trait Transport: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// The world size.
    fn size(&self) -> usize;

    /// Sends `outgoing[r]` to rank `r`. Returns what each rank sent: `incoming[r]` bytes from rank `r`. A rank's own entry is
    /// empty in both.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    fn exchange(
        &self,
        operation: CollectiveOp,
        outgoing: Vec<Payload>,
        incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError>;

    /// See [`Collective::set_busy`].
    fn set_busy(&self, busy: bool);

    /// See [`Collective::heartbeat`].
    fn heartbeat(&self) {}

    /// See [`Collective::abort`].
    fn abort(&self, message: &str);

    /// See [`Collective::abort_local`].
    fn abort_local(&self, message: &str) {
        let _ = message;
    }
}

/// Collectives through host memory, over any [`Transport`]: tensors are copied off their device and sent as bytes.
///
/// In a reduce-scatter each of `N` ranks receives its part from every other rank and sums the parts itself. A rank sends
/// `(N - 1) / N` of the tensor, as in a ring, but the sum is taken in rank order, which a ring cannot do.
#[derive(Debug)]
pub struct HostCollective<T> {
    transport: T,
    sent: SentCounter,
}

impl<T: Transport> HostCollective<T> {
    /// The collectives of the transport's rank.
    pub fn new(transport: T) -> Self {
        Self { transport, sent: SentCounter::default() }
    }

    /// Counts the bytes and sends them. This rank's entry of `outgoing` is empty.
    fn exchange(
        &self,
        operation: CollectiveOp,
        outgoing: Vec<Payload>,
        incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError> {
        self.sent.add(operation, outgoing.iter().map(|payload| payload.len()).sum());
        self.transport.exchange(operation, outgoing, incoming)
    }

    /// Sends `outgoing`, whose own entry is empty, and returns the tensors received, with `own` as this rank's entry.
    fn exchange_tensors(
        &self,
        operation: CollectiveOp,
        outgoing: Vec<Payload>,
        lengths: &[usize],
        own: Tensor<1>,
    ) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let (device, dtype) = (own.device(), own.dtype());
        let rank = self.rank();
        let bytes = |(peer, length): (usize, &usize)| if peer == rank { 0 } else { length * dtype.size() };
        let incoming: Vec<usize> = lengths.iter().enumerate().map(bytes).collect();
        let received = self.exchange(operation, outgoing, &incoming)?;
        let mut own = Some(own);
        let tensors = received.into_iter().enumerate().map(|(peer, payload)| {
            own.take_if(|_| peer == rank).unwrap_or_else(|| {
                // A tensor owns its bytes. Those of a payload that other ranks of this process share must be copied.
                let bytes = Arc::try_unwrap(payload).unwrap_or_else(|shared| Bytes::clone(&shared));
                Tensor::from_data(TensorData::from_bytes(bytes, [lengths[peer]], dtype), (&device, dtype))
            })
        });
        Ok(tensors.collect())
    }

    /// The same payload for every other rank.
    fn to_others(&self, payload: &Payload) -> Vec<Payload> {
        let to = |peer: usize| if peer == self.rank() { empty_payload() } else { payload.clone() };
        (0..self.size()).map(to).collect()
    }
}

fn empty_payload() -> Payload {
    Arc::new(Bytes::from_bytes_vec(Vec::new()))
}

fn to_bytes(tensor: Tensor<1>) -> Bytes {
    tensor.into_data().into_parts().0
}

impl<T: Transport> Collective for HostCollective<T> {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.transport.size()
    }

    fn all_to_all(&self, mut outgoing: Vec<Tensor<1>>, incoming: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let rank = self.rank();
        let empty = slice(&outgoing[rank], 0, 0);
        let own = std::mem::replace(&mut outgoing[rank], empty);
        let outgoing = outgoing.into_iter().map(|tensor| Arc::new(to_bytes(tensor))).collect();
        self.exchange_tensors(CollectiveOp::AllToAll, outgoing, incoming, own)
    }

    fn reduce_scatter(&self, mut parts: Vec<Tensor<1>>) -> Result<Tensor<1>, CollectiveError> {
        let rank = self.rank();
        let [length] = parts[rank].dims();
        let empty = slice(&parts[rank], 0, 0);
        let own = std::mem::replace(&mut parts[rank], empty);
        let outgoing = parts.into_iter().map(|tensor| Arc::new(to_bytes(tensor))).collect();
        let parts = self.exchange_tensors(CollectiveOp::ReduceScatter, outgoing, &vec![length; self.size()], own)?;
        // Widened first and added in rank order, which gives the bits of one rank that accumulates the same micro-batches.
        let sum = parts.into_iter().map(|part| part.cast(DType::F32)).reduce(|sum, part| sum.add(part));
        Ok(sum.expect("a group has at least one rank"))
    }

    fn all_gather(&self, part: Tensor<1>, lengths: &[usize]) -> Result<Vec<Tensor<1>>, CollectiveError> {
        let outgoing = self.to_others(&Arc::new(to_bytes(part.clone())));
        self.exchange_tensors(CollectiveOp::AllGather, outgoing, lengths, part)
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CollectiveError> {
        let rank = self.rank();
        let mut lengths = vec![0; self.size()];
        lengths[root] = tensor.dims()[0];
        let outgoing = match rank == root {
            true => self.to_others(&Arc::new(to_bytes(tensor.clone()))),
            false => self.to_others(&empty_payload()),
        };
        let mut tensors = self.exchange_tensors(CollectiveOp::Broadcast, outgoing, &lengths, tensor)?;
        Ok(tensors.swap_remove(root))
    }

    fn all_gather_f64(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        let rank = self.rank();
        let payload = own.iter().flat_map(|scalar| scalar.to_le_bytes()).collect::<Vec<u8>>();
        let outgoing = self.to_others(&Arc::new(Bytes::from_bytes_vec(payload)));
        let bytes = |peer: usize| if peer == rank { 0 } else { 8 * own.len() };
        let incoming: Vec<usize> = (0..self.size()).map(bytes).collect();
        let received = self.exchange(CollectiveOp::AllGatherF64, outgoing, &incoming)?;
        let read = |(peer, payload): (usize, Payload)| match peer == rank {
            true => own.to_vec(),
            false => payload.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        };
        Ok(received.into_iter().enumerate().map(read).collect())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let outgoing = self.to_others(&empty_payload());
        self.exchange(CollectiveOp::Barrier, outgoing, &vec![0; self.size()]).map(|_| ())
    }

    fn set_busy(&self, busy: bool) {
        self.transport.set_busy(busy);
    }

    fn heartbeat(&self) {
        self.transport.heartbeat();
    }

    fn abort(&self, message: &str) {
        self.transport.abort(message);
    }

    fn abort_local(&self, message: &str) {
        self.transport.abort_local(message);
    }

    fn bytes_sent(&self) -> BytesSent {
        self.sent.read()
    }
}
