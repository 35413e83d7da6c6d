//! Workers that are threads of one process.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Bytes;

use super::transport::{Payload, Transport};
use super::{ByHost, Collective, CollectiveError, Operation};

/// A thread's end of a group of threads. Messages are moved; only what several workers get is copied.
///
/// A worker that panics ends the group: the others get [`CollectiveError::Failed`] instead of waiting.
#[derive(Debug)]
pub struct InProcess {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Messages not yet received: by operation and receiver, of each sender.
    waiting: HashMap<(u64, usize), Vec<Option<Payload>>>,
    /// How many operations each worker has entered.
    operations: Vec<u64>,
    /// Nesting of each worker's `set_busy`.
    busy: Vec<usize>,
    /// When each worker was last active.
    seen: Vec<Instant>,
    failure: Option<(usize, String)>,
}

impl InProcess {
    /// The members of a group of `size` workers, each for its own thread. An operation fails if a worker that is not busy
    /// does not enter it within `timeout`.
    pub fn group(size: usize, timeout: Duration) -> Vec<Self> {
        let state = State {
            waiting: HashMap::new(),
            operations: vec![0; size],
            busy: vec![0; size],
            seen: vec![Instant::now(); size],
            failure: None,
        };
        let group = Arc::new(Group { size, timeout, state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, group: group.clone() }).collect()
    }

    /// [`InProcess::group`] as collectives through host memory.
    pub fn collectives(size: usize, timeout: Duration) -> Vec<Arc<dyn Collective>> {
        let member = |member| Arc::new(ByHost::new(member)) as Arc<dyn Collective>;
        Self::group(size, timeout).into_iter().map(member).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.group.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn exchange(
        &self,
        operation: Operation,
        outgoing: Vec<Payload>,
        _incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError> {
        let Group { size, timeout, changed, .. } = &*self.group;
        let mut state = self.state();
        let number = state.operations[self.rank];
        state.operations[self.rank] += 1;
        state.seen[self.rank] = Instant::now();
        for (worker, payload) in outgoing.into_iter().enumerate() {
            state.waiting.entry((number, worker)).or_insert_with(|| vec![None; *size])[self.rank] = Some(payload);
        }
        changed.notify_all();
        let came = Instant::now();
        loop {
            if let Some((rank, message)) = &state.failure {
                return Err(CollectiveError::Failed { rank: *rank, message: message.clone() });
            }
            if state.operations.iter().all(|&operations| operations > number) {
                let received = state.waiting.remove(&(number, self.rank)).unwrap_or_default();
                let nothing = || Arc::new(Bytes::from_bytes_vec(Vec::new()));
                return Ok(received.into_iter().map(|payload| payload.unwrap_or_else(nothing)).collect());
            }
            // The timeout counts from when this worker entered, or the other was last active, whichever is later.
            let late = |&worker: &usize| {
                state.operations[worker] <= number
                    && state.busy[worker] == 0
                    && state.seen[worker].max(came).elapsed() >= *timeout
            };
            let missing: Vec<usize> = (0..*size).filter(late).collect();
            if !missing.is_empty() {
                let (rank, seconds) = (self.rank, timeout.as_secs());
                return Err(CollectiveError::Silent { rank, missing, operation: operation.name(), seconds });
            }
            let patience = (*timeout / 10).clamp(Duration::from_millis(5), Duration::from_millis(500));
            state = changed.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn set_busy(&self, busy: bool) {
        let mut state = self.state();
        let times = &mut state.busy[self.rank];
        *times = if busy { *times + 1 } else { times.saturating_sub(1) };
        state.seen[self.rank] = Instant::now();
    }

    fn fail(&self, message: &str) {
        self.state().failure.get_or_insert_with(|| (self.rank, message.to_string()));
        self.group.changed.notify_all();
    }

    fn fail_inside(&self, message: &str) {
        self.fail(message);
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail("it panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_does_not_come_is_named() {
        let mut members = InProcess::collectives(3, Duration::from_millis(50));
        let absent = members.remove(1);
        let results: Vec<_> = std::thread::scope(|scope| {
            let waiting: Vec<_> = members.iter().map(|member| scope.spawn(|| member.barrier())).collect();
            waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for result in results {
            let error = result.unwrap_err();
            assert!(matches!(&error, CollectiveError::Silent { missing, .. } if missing == &[1]), "{error}");
        }
        drop(absent);
    }

    #[test]
    fn a_busy_worker_is_waited_for() {
        let members = InProcess::collectives(2, Duration::from_millis(40));
        std::thread::scope(|scope| {
            members[1].set_busy(true);
            let waiting = scope.spawn(|| members[0].barrier());
            std::thread::sleep(Duration::from_millis(200));
            members[1].set_busy(false);
            members[1].barrier().unwrap();
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_worker_that_fails_or_panics_ends_the_others() {
        let members = InProcess::collectives(2, Duration::from_secs(60));
        members[1].fail("no space left");
        let error = members[0].barrier().unwrap_err();
        assert_eq!(error, CollectiveError::Failed { rank: 1, message: "no space left".into() });

        let mut members = InProcess::collectives(2, Duration::from_secs(60));
        let other = members.pop().unwrap();
        let panicked = std::thread::spawn(move || {
            let _held = other;
            std::panic::resume_unwind(Box::new("broken"));
        });
        assert!(panicked.join().is_err());
        let error = members[0].barrier().unwrap_err();
        assert_eq!(error, CollectiveError::Failed { rank: 1, message: "it panicked".into() });
    }
}
