//! Comparing two checkpoints tensor by tensor, without building a model.

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

/// The result of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Number of tensors that both contain, counted by their names in the Hugging Face layout.
    pub tensors: usize,
    /// How many of them have different dtypes.
    pub dtypes_differ: usize,
    /// Bytes read from both together.
    pub bytes: u64,
    /// Every difference, sorted by tensor name.
    pub differences: Vec<TensorDifference>,
    /// Differences in tensors that the model does not use ([`SkipReason`]), sorted by tensor name.
    pub unused: Vec<UnusedTensor>,
}

impl Comparison {
    /// Whether both contain the same tensors with equal values. Redundant tensors ([`SkipReason::is_redundant`]) do not
    /// count.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty() && self.unused.iter().all(|unused| unused.reason.is_redundant())
    }
}

/// A difference in a tensor that the model does not use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnusedTensor {
    /// The tensor's name in the file.
    pub tensor: String,
    /// Why the model does not use it.
    pub reason: SkipReason,
    /// How the two checkpoints differ.
    pub difference: UnusedDifference,
}

/// How two checkpoints differ in a tensor that the model does not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnusedDifference {
    /// The second lacks it.
    OnlyInFirst,
    /// The first lacks it.
    OnlyInSecond,
    /// Both have it, with different dtypes, shapes or bytes.
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

/// How two checkpoints differ in a tensor of the model.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorDifference {
    /// The second lacks it.
    OnlyInFirst {
        /// The tensor's name.
        tensor: String,
    },
    /// The first lacks it.
    OnlyInSecond {
        /// The tensor's name.
        tensor: String,
    },
    /// The shapes differ.
    Shape {
        /// The tensor's name.
        tensor: String,
        /// The shapes in the first and the second.
        shapes: [Vec<usize>; 2],
    },
    /// The values differ: bitwise for equal dtypes, numerically otherwise.
    Values {
        /// The tensor's name.
        tensor: String,
        /// How far apart they are.
        distance: ValueDistance,
    },
}

/// The distance between two tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ValueDistance {
    /// The largest absolute difference; infinite if a value is NaN.
    pub largest: f64,
    /// The mean absolute difference.
    pub mean: f64,
    /// The cosine similarity; 1 if both are zero.
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

/// Partial sums over a tensor's values.
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

    fn from_values<S: Weight, T: Weight>(a: &[S], b: &[T]) -> Self {
        let mut sums = Self { bits_differ: true, ..Self::default() };
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (f64::from(a.widen()), f64::from(b.widen()));
            let difference = (a - b).abs();
            // `f64::max` ignores NaN, which would hide it.
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
    /// Compares with another checkpoint, whatever the files, names and layouts of either: a burnpack file with shards,
    /// stacks of experts with one tensor per expert, quantized weights with dequantized ones. With a `tolerance` of 0,
    /// tensors of the same dtype are equal if they are bitwise equal. In all other cases they are equal if no two values
    /// differ by more than `tolerance`.
    ///
    /// Tensors that loading ignores are compared bytewise and reported separately ([`Comparison::unused`]). Tensors
    /// that both lack are not reported; [`problems`](Checkpoint::problems) names them. Memory stays small, and all
    /// threads take part.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`], if one of them contains something that does not match its config, or `progress` stops the
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
        // In the order of the first checkpoint's files, which are then read sequentially.
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

    /// The differences in tensors that the model does not use.
    fn unused(&self, other: &Self, plans: &[LoadPlan; 2]) -> Result<Vec<UnusedTensor>, CheckpointError> {
        let unused_of = |checkpoint: &Self, plan: &LoadPlan| -> BTreeMap<String, (SkipReason, StoredTensor)> {
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
        let [first, mut second] = [unused_of(self, &plans[0]), unused_of(other, &plans[1])];
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
        /// Bytes read at a time.
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
            let (rows, columns) = a.dims(common_layout(a, b));
            // Chunks of both are in memory at once.
            (rows, columns * (a.dtype.size() + b.dtype.size()))
        }));
        let sources = |of: fn(&(&'p SourceTensor, &'p SourceTensor)) -> &'p SourceTensor| {
            pairs.iter().map(|pair| (of(pair), common_layout(pair.0, pair.1))).collect()
        };
        let our_reader = ChunkReader::new(self, sources(|pair| pair.0), &chunks);
        let their_reader = ChunkReader::new(other, sources(|pair| pair.1), &chunks);
        let sums = Mutex::new(vec![Sums::default(); pairs.len()]);
        in_order(&chunks, |at, chunk, [first, second]: &mut [Buffers; 2]| {
            our_reader.begin(&chunks, at);
            their_reader.begin(&chunks, at);
            let (a, b) = pairs[chunk.source];
            let chunk_sums = with_weight!(a.dtype, S => with_weight!(b.dtype, T => {
                // Non-finite values are compared like all others.
                let (ours, _) = our_reader.rows::<S>(chunk, first)?;
                let (theirs, _) = their_reader.rows::<T>(chunk, second)?;
                let equal = a.dtype == b.dtype && ours == theirs;
                if equal { sums_of_equal::<S>(ours) } else { sums_of::<S, T>(ours, theirs) }
            }));
            // Added in the order in which threads finish: the last digits of the mean and the cosine may differ
            // between runs. Whether two tensors are equal depends on neither.
            sums.lock().unwrap_or_else(PoisonError::into_inner)[chunk.source].add(&chunk_sums);
            our_reader.end(chunk);
            their_reader.end(chunk);
            let rows = a.dims(common_layout(a, b)).0;
            // A chunk's part of both files, whose encodings may differ.
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
        // Copied, because values in a file may be unaligned.
        bytemuck::cast_slice_mut(&mut left[..count]).copy_from_slice(a);
        bytemuck::cast_slice_mut(&mut right[..count]).copy_from_slice(b);
        sums.add(&Sums::from_values(&left[..count], &right[..count]));
    }
    sums
}

/// [`sums_of`] the same bytes twice. The cosine of a tensor that differs elsewhere needs the norm of this part, too.
fn sums_of_equal<S: Weight>(bytes: &[u8]) -> Sums {
    const VALUES: usize = 4096;
    let mut values = [S::default(); VALUES];
    // Independent sums, so that the additions do not wait for each other.
    let mut lanes = [0.0f64; 8];
    for bytes in bytes.chunks(VALUES * size_of::<S>()) {
        let count = bytes.len() / size_of::<S>();
        bytemuck::cast_slice_mut(&mut values[..count]).copy_from_slice(bytes);
        for values in values[..count].chunks(lanes.len()) {
            for (lane, value) in lanes.iter_mut().zip(values) {
                let value = f64::from(value.widen());
                *lane += value * value;
            }
        }
    }
    let square = lanes.iter().sum();
    Sums { product: square, squares: [square; 2], ..Sums::default() }
}

/// The layout in which neither file has to be transposed, or Hugging Face's if one of them has to.
fn common_layout(a: &SourceTensor, b: &SourceTensor) -> Layout {
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
    fn distances_are_between_values_of_any_dtypes() {
        let wide: Vec<u8> = [1.0f32, -2.0, 0.5].iter().flat_map(|value| value.to_le_bytes()).collect();
        let narrow: Vec<u8> =
            [1.0f32, -2.0, 1.5].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let found = sums_of::<f32, bf16>(&wide, &narrow).distance(3);
        assert_eq!((found.largest, found.mean), (1.0, 1.0 / 3.0));
        assert!((found.cosine - 5.75 / (5.25f64 * 7.25).sqrt()).abs() < 1e-12);
        // Two chunks: the second is equal in both tensors.
        let equal: Vec<u8> = (0..11u8).flat_map(|value| f32::from(value).to_le_bytes()).collect();
        let mut both = sums_of::<f32, bf16>(&wide, &narrow);
        both.add(&sums_of_equal::<f32>(&equal));
        assert!((both.distance(14).cosine - 390.75 / (390.25f64 * 392.25).sqrt()).abs() < 1e-12);
        assert!(!sums_of_equal::<f32>(&equal).bits_differ);
        assert_eq!(Sums::from_values::<f32, f32>(&[0.0], &[0.0]).distance(1).cosine, 1.0);
        assert_eq!(Sums::from_values::<f32, f32>(&[0.0], &[1.0]).distance(1).cosine, 0.0);
        assert_eq!(Sums::from_values::<f32, f32>(&[f32::NAN], &[1.0]).distance(1).largest, f64::INFINITY);
    }
}
