//! Ranks that are threads of one process.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Bytes;

use super::transport::{Payload, Transport};
use super::{Collective, CollectiveError, CollectiveOp, HostCollective};

/// The transport between threads of one process, as one rank sees it. Payloads are moved, not copied, unless several ranks
/// get the same one.
///
/// A rank whose thread panics ends the group: the others get [`CollectiveError::RankFailed`] instead of waiting for the
/// timeout.
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
    /// Payloads not yet received, by collective and receiver: one entry per sender. Keyed by collective, since a fast rank may
    /// send for the next collective before a slow rank has received this one.
    mailboxes: HashMap<(u64, usize), Vec<Option<Payload>>>,
    /// How many collectives each rank has entered.
    entered: Vec<u64>,
    /// How often each rank has called `set_busy(true)` without `set_busy(false)`.
    busy: Vec<usize>,
    /// When each rank last entered a collective or changed its busy state.
    last_active: Vec<Instant>,
    /// The first rank that failed, and its message.
    failure: Option<(usize, String)>,
}

impl InProcess {
    /// The ranks of a group of `size`, in rank order, one for each thread. A collective fails if a rank that is not busy does
    /// not enter it within `timeout`.
    pub fn group(size: usize, timeout: Duration) -> Vec<Self> {
        let state = State {
            mailboxes: HashMap::new(),
            entered: vec![0; size],
            busy: vec![0; size],
            last_active: vec![Instant::now(); size],
            failure: None,
        };
        let group = Arc::new(Group { size, timeout, state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, group: group.clone() }).collect()
    }

    /// [`InProcess::group`] as collectives, ready for [`Communicator::new`](super::Communicator::new).
    pub fn collectives(size: usize, timeout: Duration) -> Vec<Arc<dyn Collective>> {
        let member = |member| Arc::new(HostCollective::new(member)) as Arc<dyn Collective>;
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
        operation: CollectiveOp,
        outgoing: Vec<Payload>,
        _incoming: &[usize],
    ) -> Result<Vec<Payload>, CollectiveError> {
        let Group { size, timeout, changed, .. } = &*self.group;
        let mut state = self.state();
        let number = state.entered[self.rank];
        state.entered[self.rank] += 1;
        state.last_active[self.rank] = Instant::now();
        for (receiver, payload) in outgoing.into_iter().enumerate() {
            state.mailboxes.entry((number, receiver)).or_insert_with(|| vec![None; *size])[self.rank] = Some(payload);
        }
        changed.notify_all();
        let entered_at = Instant::now();
        loop {
            if let Some((rank, message)) = &state.failure {
                return Err(CollectiveError::RankFailed { rank: *rank, message: message.clone() });
            }
            if state.entered.iter().all(|&entered| entered > number) {
                let received = state.mailboxes.remove(&(number, self.rank)).unwrap_or_default();
                let empty = || Arc::new(Bytes::from_bytes_vec(Vec::new()));
                return Ok(received.into_iter().map(|payload| payload.unwrap_or_else(empty)).collect());
            }
            // The timeout counts from when this rank entered or the other was last active, whichever is later, so that a rank
            // that has just finished a long save gets the full timeout.
            let late = |&peer: &usize| {
                state.entered[peer] <= number
                    && state.busy[peer] == 0
                    && state.last_active[peer].max(entered_at).elapsed() >= *timeout
            };
            let missing: Vec<usize> = (0..*size).filter(late).collect();
            if !missing.is_empty() {
                let (rank, seconds) = (self.rank, timeout.as_secs());
                return Err(CollectiveError::Timeout { rank, missing, operation: operation.name(), seconds });
            }
            // The condition variable wakes this thread when another rank enters. The pause bounds how late it sees a timeout.
            let pause = (*timeout / 10).clamp(Duration::from_millis(5), Duration::from_millis(500));
            state = changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn set_busy(&self, busy: bool) {
        let mut state = self.state();
        let depth = &mut state.busy[self.rank];
        *depth = if busy { *depth + 1 } else { depth.saturating_sub(1) };
        state.last_active[self.rank] = Instant::now();
    }

    fn abort(&self, message: &str) {
        self.state().failure.get_or_insert_with(|| (self.rank, message.to_string()));
        self.group.changed.notify_all();
    }

    fn abort_local(&self, message: &str) {
        self.abort(message);
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("its thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_does_not_enter_is_named() {
        // Long enough for both threads to start on a busy machine.
        let mut members = InProcess::collectives(3, Duration::from_secs(1));
        let absent = members.remove(1);
        let results: Vec<_> = std::thread::scope(|scope| {
            let waiting: Vec<_> = members.iter().map(|member| scope.spawn(|| member.barrier())).collect();
            waiting.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for result in results {
            let error = result.unwrap_err();
            assert!(matches!(&error, CollectiveError::Timeout { missing, .. } if missing == &[1]), "{error}");
        }
        drop(absent);
    }

    #[test]
    fn a_busy_rank_is_waited_for() {
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
    fn a_rank_that_fails_or_panics_ends_the_others() {
        let members = InProcess::collectives(2, Duration::from_secs(60));
        members[1].abort("no space left");
        let error = members[0].barrier().unwrap_err();
        assert_eq!(error, CollectiveError::RankFailed { rank: 1, message: "no space left".into() });

        let mut members = InProcess::collectives(2, Duration::from_secs(60));
        let other = members.pop().unwrap();
        let panicked = std::thread::spawn(move || {
            let _held = other;
            std::panic::resume_unwind(Box::new("a test panic"));
        });
        assert!(panicked.join().is_err());
        let error = members[0].barrier().unwrap_err();
        assert_eq!(error, CollectiveError::RankFailed { rank: 1, message: "its thread panicked".into() });
    }
}
