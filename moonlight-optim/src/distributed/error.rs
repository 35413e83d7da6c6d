//! Errors of collectives.

use thiserror::Error;

/// Why a collective failed. The process group is lost: there is nothing to retry, and the run resumes from a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Ranks that did not take part in a collective in time.
    #[error("{} did not answer rank {rank} for {seconds} s in {operation}", ranks(missing))]
    Timeout {
        /// The rank that waited.
        rank: usize,
        /// The ranks that it waited for, ascending.
        missing: Vec<usize>,
        /// The collective with its article, as [`CollectiveOp::name`](super::CollectiveOp::name) gives it.
        operation: &'static str,
        /// The timeout in seconds.
        seconds: u64,
    },
    /// A rank that reported its own failure.
    #[error("rank {rank} failed: {message}")]
    RankFailed {
        /// The rank that failed.
        rank: usize,
        /// What it reported.
        message: String,
    },
    /// The transport itself failed, such as MPI.
    #[error("rank {rank}: the transport failed: {message}")]
    Transport {
        /// The rank that saw it.
        rank: usize,
        /// What the transport reported.
        message: String,
    },
}

impl CollectiveError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            CollectiveError::Timeout { .. } => Some(
                "check the machine and the network of that rank; raise the timeout if its steps take longer than that"
                    .to_string(),
            ),
            CollectiveError::RankFailed { .. } | CollectiveError::Transport { .. } => None,
        }
    }
}

fn ranks(ranks: &[usize]) -> String {
    let list = ranks.iter().map(usize::to_string).collect::<Vec<_>>();
    match list.as_slice() {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", list.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{render, seen};

    #[test]
    fn messages() {
        let timeout = |missing: &[usize]| CollectiveError::Timeout {
            rank: 0,
            missing: missing.to_vec(),
            operation: "an all-gather",
            seconds: 20,
        };
        let errors = [
            timeout(&[2]),
            timeout(&[1, 3]),
            CollectiveError::RankFailed { rank: 1, message: "no space left on device".into() },
            CollectiveError::Transport { rank: 3, message: "MPI_Isend returned error code 15".into() },
        ];
        // A new variant does not compile until it has a name here, and fails the test until it has an example above.
        let name = |error: &CollectiveError| match error {
            CollectiveError::Timeout { .. } => "Timeout",
            CollectiveError::RankFailed { .. } => "RankFailed",
            CollectiveError::Transport { .. } => "Transport",
        };
        assert_eq!(seen(&errors, name).len(), 3);
        insta::assert_snapshot!(render(&errors, name, CollectiveError::hint));
    }
}
