//! Errors of collectives.

use thiserror::Error;

/// Why a collective operation failed. The group is lost; there is nothing to retry.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Workers that did not take part in an operation in time.
    #[error("{} did not answer worker {rank} for {seconds} s in {operation}", workers(missing))]
    Silent {
        /// The rank that waited.
        rank: usize,
        /// The ranks that it waited for.
        missing: Vec<usize>,
        /// The operation.
        operation: &'static str,
        /// The timeout, seconds.
        seconds: u64,
    },
    /// A worker that reported its failure.
    #[error("worker {rank} failed: {message}")]
    Failed {
        /// Its rank.
        rank: usize,
        /// The message.
        message: String,
    },
    /// The transport failed.
    #[error("worker {rank}: the transport failed: {message}")]
    Transport {
        /// The rank that saw it.
        rank: usize,
        /// The message.
        message: String,
    },
}

impl CollectiveError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            CollectiveError::Silent { .. } => Some(
                "look at that worker's machine and link; a run whose workers are slower than that needs a longer timeout"
                    .to_string(),
            ),
            CollectiveError::Failed { .. } | CollectiveError::Transport { .. } => None,
        }
    }
}

fn workers(ranks: &[usize]) -> String {
    let list = ranks.iter().map(usize::to_string).collect::<Vec<_>>();
    match list.as_slice() {
        [one] => format!("worker {one}"),
        _ => format!("workers {}", list.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_workers_are_named() {
        let error = |missing: &[usize]| {
            CollectiveError::Silent { rank: 0, missing: missing.to_vec(), operation: "an all-gather", seconds: 20 }
                .to_string()
        };
        assert_eq!(error(&[2]), "worker 2 did not answer worker 0 for 20 s in an all-gather");
        assert_eq!(error(&[1, 3]), "workers 1, 3 did not answer worker 0 for 20 s in an all-gather");
    }
}
