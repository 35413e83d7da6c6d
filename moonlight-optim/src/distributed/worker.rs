//! A worker of a process group, whose collectives overlap with its computation.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::{Collective, CollectiveError, Solo, Traffic};

/// How often the thread calls [`Collective::idle`] while it has no operation.
const IDLE: Duration = Duration::from_millis(500);

type Job = Box<dyn FnOnce(&dyn Collective) + Send>;

/// A rank of a process group. Operations run in order on a thread of their own (with a world size of 1, where nothing is
/// waited for, on the caller's); clones are the same worker.
#[derive(Clone, Debug)]
pub struct Worker {
    collective: Arc<dyn Collective>,
    /// `None` with a world size of 1.
    queue: Option<Arc<Mutex<Sender<Job>>>>,
}

/// The result of an operation that was started.
#[derive(Debug)]
pub struct Pending<T>(State<T>);

#[derive(Debug)]
enum State<T> {
    Ready(Result<T, CollectiveError>),
    Running(usize, Receiver<Result<T, CollectiveError>>),
}

impl<T> Pending<T> {
    /// Waits for it.
    ///
    /// # Errors
    ///
    /// The operation's.
    pub fn wait(self) -> Result<T, CollectiveError> {
        match self.0 {
            State::Ready(result) => result,
            State::Running(rank, receiver) => receiver.recv().unwrap_or_else(|_| {
                let message = "the thread of the collectives has ended".to_string();
                Err(CollectiveError::Transport { rank, message })
            }),
        }
    }
}

/// While it lives, this worker's timeout is suspended.
#[derive(Debug)]
pub struct Busy(Arc<dyn Collective>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set_busy(false);
    }
}

impl Worker {
    /// This worker's end of a group.
    pub fn new(collective: Arc<dyn Collective>) -> Self {
        if collective.size() == 1 {
            return Self { collective, queue: None };
        }
        let (sender, receiver) = mpsc::channel::<Job>();
        let own = collective.clone();
        thread::spawn(move || {
            loop {
                match receiver.recv_timeout(IDLE) {
                    Ok(job) => job(&*own),
                    Err(RecvTimeoutError::Timeout) => own.idle(),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Self { collective, queue: Some(Arc::new(Mutex::new(sender))) }
    }

    /// A world size of 1.
    pub fn alone() -> Self {
        Self::new(Arc::new(Solo))
    }

    /// This worker's rank.
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// The world size.
    pub fn size(&self) -> usize {
        self.collective.size()
    }

    /// Queues an operation after those already started.
    pub fn start<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError> + Send + 'static,
    ) -> Pending<T> {
        let Some(queue) = &self.queue else { return Pending(State::Ready(operation(&*self.collective))) };
        let (sender, receiver) = mpsc::channel();
        // The receiver is gone if the caller dropped its `Pending`.
        let job: Job = Box::new(move |collective| drop(sender.send(operation(collective))));
        // If the thread has ended, the job is dropped with its sender, and `wait` reports that.
        let _ = queue.lock().unwrap_or_else(PoisonError::into_inner).send(job);
        Pending(State::Running(self.rank(), receiver))
    }

    /// Runs an operation and waits for it.
    ///
    /// # Errors
    ///
    /// The operation's.
    pub fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&dyn Collective) -> Result<T, CollectiveError> + Send + 'static,
    ) -> Result<T, CollectiveError> {
        self.start(operation).wait()
    }

    /// The numbers of each worker, in the order of the ranks; all give equally many.
    ///
    /// # Errors
    ///
    /// [`CollectiveError`].
    pub fn numbers(&self, own: Vec<f64>) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.run(move |collective| collective.numbers(&own))
    }

    /// Suspends this worker's timeout while the result lives: around work that the others must wait for.
    pub fn busy(&self) -> Busy {
        self.collective.set_busy(true);
        Busy(self.collective.clone())
    }

    /// See [`Collective::fail`].
    pub fn fail(&self, message: &str) {
        self.collective.fail(message);
    }

    /// As [`Worker::fail`], but for the workers of this process alone.
    pub fn fail_inside(&self, message: &str) {
        self.collective.fail_inside(message);
    }

    /// Bytes sent so far.
    pub fn traffic(&self) -> Traffic {
        self.collective.traffic()
    }
}
