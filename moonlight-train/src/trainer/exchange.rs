//! Collectives over values other than tensors: step totals, losses, errors, the name of a folder.
//!
//! A collective carries the same number of f64 from each rank. [`Exchange`] encodes a value as f64 and decodes it again,
//! field by field, so that no code counts indices. With one rank all of this is a copy.

use moonlight_optim::distributed::{CollectiveError, Communicator};

use crate::error::TrainError;

/// The numbers of one rank that are not decoded yet.
pub(super) type Numbers<'a> = std::iter::Copied<std::slice::Iter<'a, f64>>;

/// A value that has the same layout (lengths, and which options are set) on every rank.
pub(super) trait Exchange: Sized {
    fn encode(&self, numbers: &mut Vec<f64>);

    /// Decodes another rank's value, which has the layout of `local`.
    fn decode(local: &Self, numbers: &mut Numbers<'_>) -> Self;
}

impl Exchange for f64 {
    fn encode(&self, numbers: &mut Vec<f64>) {
        numbers.push(*self);
    }

    fn decode(_local: &Self, numbers: &mut Numbers<'_>) -> Self {
        numbers.next().expect("values have the same layout on every rank")
    }
}

/// Exact below 2^53, which all counts here are.
impl Exchange for u64 {
    fn encode(&self, numbers: &mut Vec<f64>) {
        numbers.push(*self as f64);
    }

    fn decode(_local: &Self, numbers: &mut Numbers<'_>) -> Self {
        f64::decode(&0.0, numbers) as u64
    }
}

impl Exchange for bool {
    fn encode(&self, numbers: &mut Vec<f64>) {
        numbers.push(f64::from(u8::from(*self)));
    }

    fn decode(_local: &Self, numbers: &mut Numbers<'_>) -> Self {
        f64::decode(&0.0, numbers) > 0.0
    }
}

impl<T: Exchange> Exchange for Option<T> {
    fn encode(&self, numbers: &mut Vec<f64>) {
        self.iter().for_each(|value| value.encode(numbers));
    }

    fn decode(local: &Self, numbers: &mut Numbers<'_>) -> Self {
        local.as_ref().map(|local| T::decode(local, numbers))
    }
}

impl<T: Exchange> Exchange for Vec<T> {
    fn encode(&self, numbers: &mut Vec<f64>) {
        self.iter().for_each(|value| value.encode(numbers));
    }

    fn decode(local: &Self, numbers: &mut Numbers<'_>) -> Self {
        local.iter().map(|local| T::decode(local, numbers)).collect()
    }
}

/// Implements [`Exchange`] for a struct, field by field.
macro_rules! exchange_fields {
    ($name:ident { $($field:ident),+ $(,)? }) => {
        impl $crate::trainer::exchange::Exchange for $name {
            fn encode(&self, numbers: &mut Vec<f64>) {
                $($crate::trainer::exchange::Exchange::encode(&self.$field, numbers);)+
            }

            fn decode(local: &Self, numbers: &mut $crate::trainer::exchange::Numbers<'_>) -> Self {
                // Fields are evaluated in the order in which they are written: that of `encode`.
                Self { $($field: $crate::trainer::exchange::Exchange::decode(&local.$field, numbers)),+ }
            }
        }
    };
}
pub(super) use exchange_fields;

/// The values of all ranks, in the order of the ranks.
pub(super) fn all_gather<T: Exchange>(comm: &Communicator, local: &T) -> Result<Vec<T>, CollectiveError> {
    let mut numbers = Vec::new();
    local.encode(&mut numbers);
    let all = comm.all_gather_f64(numbers)?;
    Ok(all.iter().map(|numbers| T::decode(local, &mut numbers.iter().copied())).collect())
}

/// Whether `local` is true on any rank.
pub(super) fn any(comm: &Communicator, local: bool) -> Result<bool, CollectiveError> {
    Ok(all_gather(comm, &local)?.contains(&true))
}

/// Succeeds if all ranks succeeded. A rank that failed returns its own error, the others [`TrainError::RemoteFailure`].
pub(super) fn agree<T>(comm: &Communicator, local: Result<T, TrainError>) -> Result<T, TrainError> {
    let failed = any(comm, local.is_err())?;
    match local {
        Ok(_) if failed => Err(TrainError::RemoteFailure),
        local => local,
    }
}

/// The number of rank 0, if it has one.
pub(super) fn broadcast_number(comm: &Communicator, local: Option<u64>) -> Result<Option<u64>, CollectiveError> {
    // Not as an `Option`, which would need to have the same layout on every rank.
    let is_some = all_gather(comm, &local.is_some())?[0];
    let number = all_gather(comm, &local.unwrap_or_default())?[0];
    Ok(is_some.then_some(number))
}

/// The text of rank 0, if it has one; an empty text counts as none.
pub(super) fn broadcast_text(comm: &Communicator, local: Option<&str>) -> Result<Option<String>, CollectiveError> {
    let local = local.unwrap_or_default().as_bytes();
    let length = all_gather(comm, &(local.len() as u64))?[0] as usize;
    // Collectives carry f64 and no bytes; an f64 holds every u32 exactly.
    let mut words: Vec<u64> = local.chunks(4).map(word).collect();
    words.resize(length.div_ceil(4), 0);
    let words = all_gather(comm, &words)?.swap_remove(0);
    let mut bytes: Vec<u8> = words.iter().flat_map(|&word| (word as u32).to_le_bytes()).collect();
    bytes.truncate(length);
    Ok((length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned()))
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 4];
    word[..bytes.len()].copy_from_slice(bytes);
    u32::from_le_bytes(word).into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use moonlight_optim::distributed::InProcess;

    use super::*;

    /// The results of `run` on each of three ranks.
    fn on_three<T: Send>(run: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
        let communicators: Vec<Communicator> =
            InProcess::collectives(3, Duration::from_secs(20)).into_iter().map(Communicator::new).collect();
        std::thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> = communicators.iter().map(|comm| scope.spawn(move || run(comm))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[derive(Debug, Clone, PartialEq)]
    struct Example {
        loss: f64,
        counts: Vec<Option<Vec<u64>>>,
        attention: Option<f64>,
        failed: bool,
    }

    exchange_fields!(Example { loss, counts, attention, failed });

    #[test]
    fn every_rank_gets_the_values_of_all() {
        let example = |rank: usize| Example {
            loss: rank as f64 / 3.0,
            counts: vec![None, Some(vec![rank as u64, (1 << 52) + 1]), Some(Vec::new())],
            attention: (rank < 9).then_some(-1.5),
            failed: rank == 1,
        };
        let expected: Vec<Example> = (0..3).map(example).collect();
        for all in on_three(|comm| all_gather(comm, &example(comm.rank())).unwrap()) {
            assert_eq!(all, expected);
        }
        assert_eq!(all_gather(&Communicator::single_rank(), &expected[1]).unwrap(), expected[1..2]);
    }

    #[test]
    fn every_rank_gets_the_value_of_rank_0() {
        for text in [None, Some("a"), Some("/a/folder with an ö, longer than a word")] {
            for received in on_three(|comm| broadcast_text(comm, text.filter(|_| comm.rank() == 0)).unwrap()) {
                assert_eq!(received.as_deref(), text);
            }
        }
        for number in [None, Some(0), Some(1 << 40)] {
            for received in on_three(|comm| broadcast_number(comm, number.filter(|_| comm.rank() == 0)).unwrap()) {
                assert_eq!(received, number);
            }
        }
    }

    #[test]
    fn if_one_rank_fails_all_of_them_do() {
        let failed = || TrainError::Killed;
        let results = on_three(|comm| agree(comm, if comm.rank() == 1 { Err(failed()) } else { Ok(()) }));
        for (rank, result) in results.into_iter().enumerate() {
            match result {
                Err(TrainError::Killed) => assert_eq!(rank, 1),
                Err(TrainError::RemoteFailure) => assert_ne!(rank, 1),
                other => panic!("rank {rank}: {other:?}"),
            }
        }
    }
}
