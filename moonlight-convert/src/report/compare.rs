//! Two checkpoints, tensor by tensor, without loading either.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use crate::checkpoint::{Checkpoint, StoredTensor};
use crate::dtype::conversion::{Weight, with_weight};
use crate::dtype::dequantize::{Layout, SourceTensor};
use crate::error::CheckpointError;
use crate::format::shard::FileRange;
use crate::io::parallel_copy::{Buffers, ChunkReader, in_order, row_chunks};
use crate::mapping::load_plan::{LoadPlan, Scope};
use crate::mapping::names::{self, SkipReason};
use crate::progress::Progress;

/// What a comparison found.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Tensors that both hold, under the names that a Hugging Face directory has.
    pub tensors: usize,
    /// How many of them the two keep in different dtypes.
    pub dtypes_differ: usize,
    /// Bytes that were read of both together.
    pub bytes: u64,
    /// Every difference, in the order of the tensors' names.
    pub differences: Vec<TensorDifference>,
    /// Tensors that the model does not use ([`SkipReason`]) and in which the two differ, in the order of their names.
    pub unused: Vec<UnusedTensor>,
}

impl Comparison {
    /// Whether neither lacks a tensor that the other has, and all values agree. Tensors that hold nothing of their own
    /// ([`SkipReason::is_redundant`]) do not count.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty() && self.unused.iter().all(|unused| unused.reason.is_redundant())
    }
}

/// A tensor that the model does not use, and in which two checkpoints differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnusedTensor {
    /// Its name in the file.
    pub tensor: String,
    /// Why the model does not use it.
    pub reason: SkipReason,
    /// How the two differ in it.
    pub difference: UnusedDifference,
}

/// How two checkpoints differ in a tensor that the model does not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnusedDifference {
    /// The second does not have it.
    OnlyInFirst,
    /// The first does not have it.
    OnlyInSecond,
    /// Dtype, shape or bytes differ.
    Bytes,
}

impl fmt::Display for UnusedTensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let difference = match self.difference {
            UnusedDifference::OnlyInFirst => "only in the first",
            UnusedDifference::OnlyInSecond => "only in the second",
            UnusedDifference::Bytes => "differs",
        };
        write!(formatter, "{}: {difference}: {}", self.tensor, self.reason.describe())
    }
}

/// How two checkpoints differ in one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorDifference {
    /// The second does not have it.
    OnlyInFirst {
        /// Its name.
        tensor: String,
    },
    /// The first does not have it.
    OnlyInSecond {
        /// Its name.
        tensor: String,
    },
    /// Its shapes differ.
    Shape {
        /// Its name.
        tensor: String,
        /// The two shapes.
        shapes: [Vec<usize>; 2],
    },
    /// Its values differ: in any bit where the dtypes agree, in value where they do not.
    Values {
        /// Its name.
        tensor: String,
        /// How far apart they are.
        distance: ValueDistance,
    },
}

/// How far two tensors are apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ValueDistance {
    /// The largest difference of two values; infinite where one of them is no number.
    pub largest: f64,
    /// The mean of the differences' magnitudes.
    pub mean: f64,
    /// The cosine of the angle between the two; 1 where both are zero.
    pub cosine: f64,
}

impl fmt::Display for TensorDifference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyInFirst { tensor } => write!(formatter, "{tensor}: only in the first"),
            Self::OnlyInSecond { tensor } => write!(formatter, "{tensor}: only in the second"),
            Self::Shape { tensor, shapes: [a, b] } => write!(formatter, "{tensor}: {a:?} and {b:?}"),
            Self::Values { tensor, distance: ValueDistance { largest, mean, cosine } } => {
                write!(formatter, "{tensor}: largest difference {largest:.3e}, mean {mean:.3e}, cosine {cosine:.9}")
            }
        }
    }
}

/// Sums over some of a tensor's values.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    bits_differ: bool,
    largest: f64,
    differences: f64,
    product: f64,
    squares: [f64; 2],
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.bits_differ |= other.bits_differ;
        self.largest = self.largest.max(other.largest);
        self.differences += other.differences;
        self.product += other.product;
        self.squares[0] += other.squares[0];
        self.squares[1] += other.squares[1];
    }

    fn of<S: Weight, T: Weight>(a: &[S], b: &[T]) -> Self {
        let mut sums = Self { bits_differ: true, ..Self::default() };
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a.widen()), f64::from(b.widen()));
            let difference = (a - b).abs();
            // A value that is no number is as far away as can be.
            sums.largest = if difference.is_nan() { f64::INFINITY } else { sums.largest.max(difference) };
            sums.differences += difference;
            sums.product += a * b;
            sums.squares[0] += a * a;
            sums.squares[1] += b * b;
        }
        sums
    }

    fn distance(&self, count: usize) -> ValueDistance {
        let norms = (self.squares[0] * self.squares[1]).sqrt();
        let cosine = match (norms, self.squares) {
            (_, [0.0, 0.0]) => 1.0,
            (0.0, _) => 0.0,
            (norms, _) => self.product / norms,
        };
        ValueDistance { largest: self.largest, mean: self.differences / count.max(1) as f64, cosine }
    }
}

impl Checkpoint {
    /// Compares with another checkpoint, whatever files, names and layouts either has: a burnpack file with shards, stacks
    /// of experts with experts one by one, quantized weights with what they stand for. Tensors that both keep in the same
    /// dtype are equal when they are so bit by bit; others, and all where `tolerance` is above 0, when no value is further
    /// away than `tolerance`.
    ///
    /// What loading skips is compared byte by byte and reported apart ([`Comparison::unused`]). What both lack is left out;
    /// [`problems`](Checkpoint::problems) names it.
    /// Memory stays small, and all threads take part.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`] where one of them holds something that does not fit its model, or where `progress` ends the
    /// work.
    pub fn compare(
        &self,
        other: &Self,
        tolerance: f64,
        progress: &dyn Progress,
    ) -> Result<Comparison, CheckpointError> {
        let plans = [self.checked_plan(Scope::Present)?, other.checked_plan(Scope::Present)?];
        let [left, right] = [by_name(&plans[0]), by_name(&plans[1])];
        let mut differences: BTreeMap<&str, TensorDifference> = BTreeMap::new();
        let mut pairs: Vec<(&SourceTensor, &SourceTensor)> = Vec::new();
        // In the order of the first one's files.
        for source in plans[0].parameters.iter().flat_map(|planned| &planned.sources) {
            let tensor = source.tensor.name.clone();
            match right.get(tensor.as_str()) {
                None => drop(differences.insert(&source.tensor.name, TensorDifference::OnlyInFirst { tensor })),
                Some(theirs) if theirs.tensor.shape != source.tensor.shape => {
                    let shapes = [source.tensor.shape.clone(), theirs.tensor.shape.clone()];
                    differences.insert(&source.tensor.name, TensorDifference::Shape { tensor, shapes });
                }
                Some(theirs) => pairs.push((source, theirs)),
            }
        }
        for name in right.keys().filter(|name| !left.contains_key(*name)) {
            differences.insert(name, TensorDifference::OnlyInSecond { tensor: (*name).to_owned() });
        }
        let bytes = pairs.iter().map(|(a, b)| a.bytes() + b.bytes()).sum();
        let sums = self.sums(other, &pairs, bytes, progress)?;
        for ((a, b), sums) in pairs.iter().zip(&sums) {
            let distance = sums.distance(a.count());
            let bitwise = a.dtype == b.dtype && tolerance <= 0.0;
            let equal = if bitwise { !sums.bits_differ } else { distance.largest <= tolerance.max(0.0) };
            if !equal {
                let tensor = a.tensor.name.clone();
                differences.insert(&a.tensor.name, TensorDifference::Values { tensor, distance });
            }
        }
        Ok(Comparison {
            tensors: pairs.len(),
            dtypes_differ: pairs.iter().filter(|(a, b)| a.dtype != b.dtype).count(),
            bytes,
            differences: differences.into_values().collect(),
            unused: self.unused(other, &plans)?,
        })
    }

    /// The tensors that no model uses, as far as the two differ in them.
    fn unused(&self, other: &Self, plans: &[LoadPlan; 2]) -> Result<Vec<UnusedTensor>, CheckpointError> {
        let of = |checkpoint: &Self, plan: &LoadPlan| -> BTreeMap<String, (SkipReason, StoredTensor)> {
            let reasons: BTreeMap<&str, SkipReason> = plan
                .skipped
                .iter()
                .flat_map(|(reason, names)| names.iter().map(|name| (name.as_str(), *reason)))
                .collect();
            let stored = checkpoint.tensor_list().iter();
            stored
                .filter_map(|tensor| Some((tensor, *reasons.get(tensor.name.as_str())?)))
                .map(|(tensor, reason)| (names::key(&tensor.name).to_owned(), (reason, tensor.clone())))
                .collect()
        };
        let [first, mut second] = [of(self, &plans[0]), of(other, &plans[1])];
        let mut found = BTreeMap::new();
        for (key, (reason, tensor)) in first {
            let difference = match second.remove(&key) {
                None => Some(UnusedDifference::OnlyInFirst),
                Some((_, theirs)) => (!self.equal_bytes(&tensor, other, &theirs)?).then_some(UnusedDifference::Bytes),
            };
            if let Some(difference) = difference {
                found.insert(key, UnusedTensor { tensor: tensor.name, reason, difference });
            }
        }
        for (key, (reason, tensor)) in second {
            let difference = UnusedDifference::OnlyInSecond;
            found.insert(key, UnusedTensor { tensor: tensor.name, reason, difference });
        }
        Ok(found.into_values().collect())
    }

    fn equal_bytes(&self, ours: &StoredTensor, other: &Self, theirs: &StoredTensor) -> Result<bool, CheckpointError> {
        /// Bytes that are read at a time.
        const CHUNK: usize = 1 << 20;
        if ours.dtype != theirs.dtype || ours.shape != theirs.shape {
            return Ok(false);
        }
        for start in (0..ours.range.len()).step_by(CHUNK) {
            let length = CHUNK.min(ours.range.len() - start);
            let read = |checkpoint: &Self, tensor: &StoredTensor| {
                let first = tensor.range.start + start;
                let mut bytes = vec![0; length];
                checkpoint
                    .read_part(&FileRange { shard: tensor.shard, range: first..first + length }, &mut bytes)
                    .map(|()| bytes)
            };
            if read(self, ours)? != read(other, theirs)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn sums<'p>(
        &self,
        other: &Self,
        pairs: &[(&'p SourceTensor, &'p SourceTensor)],
        bytes: u64,
        progress: &dyn Progress,
    ) -> Result<Vec<Sums>, CheckpointError> {
        progress.begin(bytes);
        let chunks = row_chunks(pairs.iter().map(|(a, b)| {
            let (rows, columns) = a.dims(common(a, b));
            // Both are in memory at once.
            (rows, columns * (a.dtype.size() + b.dtype.size()))
        }));
        let sources = |of: fn(&(&'p SourceTensor, &'p SourceTensor)) -> &'p SourceTensor| {
            pairs.iter().map(|pair| (of(pair), common(pair.0, pair.1))).collect()
        };
        let reading = ChunkReader::new(self, sources(|pair| pair.0), &chunks);
        let theirs = ChunkReader::new(other, sources(|pair| pair.1), &chunks);
        let sums = Mutex::new(vec![Sums::default(); pairs.len()]);
        in_order(&chunks, |at, chunk, [first, second]: &mut [Buffers; 2]| {
            reading.begin(&chunks, at);
            theirs.begin(&chunks, at);
            let (a, b) = pairs[chunk.source];
            let of_panel = with_weight!(a.dtype, S => with_weight!(b.dtype, T => {
                // What is not finite is compared like everything else.
                let (ours, _) = reading.rows::<S>(chunk, first)?;
                let (theirs, _) = theirs.rows::<T>(chunk, second)?;
                let equal = a.dtype == b.dtype && ours == theirs;
                if equal { None } else { Some(sums_of::<S, T>(ours, theirs)) }
            }));
            if let Some(of_panel) = of_panel {
                sums.lock().unwrap_or_else(PoisonError::into_inner)[chunk.source].add(&of_panel);
            }
            reading.end(chunk);
            theirs.end(chunk);
            let rows = a.dims(common(a, b)).0;
            let share = (a.bytes() + b.bytes()) as f64 * chunk.rows.len() as f64 / rows.max(1) as f64;
            match progress.advance(share as u64) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
            }
        })?;
        Ok(sums.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

fn sums_of<S: Weight, T: Weight>(a: &[u8], b: &[u8]) -> Sums {
    const VALUES: usize = 4096;
    let (mut left, mut right) = (vec![S::default(); VALUES], vec![T::default(); VALUES]);
    let mut sums = Sums::default();
    for (a, b) in a.chunks(VALUES * size_of::<S>()).zip(b.chunks(VALUES * size_of::<T>())) {
        let count = a.len() / size_of::<S>();
        // Copied, since a file may keep its values at any address.
        bytemuck::cast_slice_mut(&mut left[..count]).copy_from_slice(a);
        bytemuck::cast_slice_mut(&mut right[..count]).copy_from_slice(b);
        sums.add(&Sums::of(&left[..count], &right[..count]));
    }
    sums
}

/// The layout in which the files need not be transposed, where there is one.
fn common(a: &SourceTensor, b: &SourceTensor) -> Layout {
    if [a, b].iter().all(|source| !source.transposed_in(Layout::Burn)) { Layout::Burn } else { Layout::HuggingFace }
}

fn by_name(plan: &LoadPlan) -> BTreeMap<&str, &SourceTensor> {
    plan.parameters
        .iter()
        .flat_map(|planned| &planned.sources)
        .map(|source| (source.tensor.name.as_str(), source))
        .collect()
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn distances_are_between_values_whatever_their_dtypes() {
        let wide: Vec<u8> = [1.0f32, -2.0, 0.5].iter().flat_map(|value| value.to_le_bytes()).collect();
        let narrow: Vec<u8> =
            [1.0f32, -2.0, 1.5].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let found = sums_of::<f32, bf16>(&wide, &narrow).distance(3);
        assert_eq!((found.largest, found.mean), (1.0, 1.0 / 3.0));
        assert!((found.cosine - 5.75 / (5.25f64 * 7.25).sqrt()).abs() < 1e-12);
        assert_eq!(Sums::of::<f32, f32>(&[0.0], &[0.0]).distance(1).cosine, 1.0);
        assert_eq!(Sums::of::<f32, f32>(&[0.0], &[1.0]).distance(1).cosine, 0.0);
        assert_eq!(Sums::of::<f32, f32>(&[f32::NAN], &[1.0]).distance(1).largest, f64::INFINITY);
    }
}
