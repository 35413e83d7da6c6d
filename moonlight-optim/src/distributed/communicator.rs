//! A rank's handle on its process group. Collectives run on a separate thread, so that they overlap with computation.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::{BytesSent, Collective, CollectiveError, SingleRank};

/// How often the communication thread calls [`Collective::heartbeat`] while it has nothing to do.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);

type Job = Box<dyn FnOnce(&dyn Collective) + Send>;

/// A rank's handle on its process group, like a communicator of NCCL or MPI: its rank, the world size, and the collectives.
///
/// All ranks must issue the same collectives in the same order. One thread of this rank runs them in the order in which they
/// were started. With a world size of 1 they run on the calling thread, since there is nothing to wait for. Clones are handles
/// on the same rank.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use moonlight_optim::distributed::Communicator;
///
/// let communicator = Communicator::single_rank();
/// let gradient = Tensor::<1>::ones([4], &Device::default());
/// let pending = communicator.start(move |collective| collective.all_reduce(gradient));
/// // ... the rest of the backward pass ...
/// let sum = pending.wait()?;
/// assert_eq!((communicator.rank(), communicator.size(), sum.dims()), (0, 1, [4]));
/// # Ok::<(), moonlight_optim::distributed::CollectiveError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Communicator {
    collective: Arc<dyn Collective>,
    /// `None` with a world size of 1.
    queue: Option<Arc<Mutex<Sender<Job>>>>,
}

/// The result of a collective that was started and may still be running (PyTorch's `Work`).
#[derive(Debug)]
pub struct PendingCollective<T>(State<T>);

#[derive(Debug)]
enum State<T> {
    Ready(Result<T, CollectiveError>),
    Running(usize, Receiver<Result<T, CollectiveError>>),
}

impl<T> PendingCollective<T> {
    /// Waits for the result.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], if the collective failed.
    pub fn wait(self) -> Result<T, CollectiveError> {
        match self.0 {
            State::Ready(result) => result,
            State::Running(rank, receiver) => receiver.recv().unwrap_or_else(|_| {
                let message = "the communication thread has ended".to_string();
                Err(CollectiveError::Transport { rank, message })
            }),
        }
    }
}

/// Suspends this rank's timeout until it is dropped; see [`Communicator::busy`].
#[derive(Debug)]
pub struct BusyGuard(Arc<dyn Collective>);

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.set_busy(false);
    }
}

impl Communicator {
    /// The handle of one rank. Starts its communication thread, which ends when the last clone is dropped.
    pub fn new(collective: Arc<dyn Collective>) -> Self {
        if collective.size() == 1 {
            return Self { collective, queue: None };
        }
        let (sender, receiver) = mpsc::channel::<Job>();
        let shared = collective.clone();
        thread::spawn(move || {
            loop {
                match receiver.recv_timeout(IDLE_INTERVAL) {
                    Ok(job) => job(&*shared),
                    Err(RecvTimeoutError::Timeout) => shared.heartbeat(),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Self { collective, queue: Some(Arc::new(Mutex::new(sender))) }
    }

    /// A world size of 1.
    pub fn single_rank() -> Self {
        Self::new(Arc::new(SingleRank))
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// The world size.
    pub fn size(&self) -> usize {
        self.collective.size()
    }

    /// Queues a collective after those already started and returns without waiting.
    pub fn start<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError> + Send + 'static,
    ) -> PendingCollective<T> {
        let Some(queue) = &self.queue else { return PendingCollective(State::Ready(operation(&*self.collective))) };
        let (sender, receiver) = mpsc::channel();
        // The send fails if the caller has dropped its `PendingCollective`. The collective must run all the same, since the
        // other ranks take part in it.
        let job: Job = Box::new(move |collective| drop(sender.send(operation(collective))));
        // If the thread has ended, this drops the job with its sender, and `wait` returns an error.
        let _ = queue.lock().unwrap_or_else(PoisonError::into_inner).send(job);
        PendingCollective(State::Running(self.rank(), receiver))
    }

    /// Runs a collective and waits for its result.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`], if the collective failed.
    pub fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError> + Send + 'static,
    ) -> Result<T, CollectiveError> {
        self.start(operation).wait()
    }

    /// The scalars of all ranks, in rank order; every rank passes the same number of them.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    pub fn all_gather_f64(&self, own: Vec<f64>) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.run(move |collective| collective.all_gather_f64(&own))
    }

    /// Suspends this rank's timeout until the guard is dropped. For work that the other ranks wait for, such as a save.
    pub fn busy(&self) -> BusyGuard {
        self.collective.set_busy(true);
        BusyGuard(self.collective.clone())
    }

    /// See [`Collective::abort`].
    pub fn abort(&self, message: &str) {
        self.collective.abort(message);
    }

    /// See [`Collective::abort_local`].
    pub fn abort_local(&self, message: &str) {
        self.collective.abort_local(message);
    }

    /// What this rank has sent so far.
    pub fn bytes_sent(&self) -> BytesSent {
        self.collective.bytes_sent()
    }
}
