//! Assertions on the arguments of the public functions, made once, before an operation is dispatched.
//!
//! Each costs some nanoseconds beside operations of microseconds at least, but for the two that read an entry a token:
//! [`document_starts`], and where targets are read, on the CPU, `flex::cross_entropy`.

use burn::tensor::{DType, Tensor};

use super::{AttentionSpec, CachedAttentionSpec, QUANT_BLOCK, QuantizedSpec};

/// Names the operation in the messages.
#[derive(Clone, Copy)]
pub(super) struct Check(pub(super) &'static str);

impl Check {
    /// The shape of a tensor of floats without an empty dimension.
    #[track_caller]
    pub(super) fn float<const D: usize>(self, name: &str, tensor: &Tensor<D>) -> [usize; D] {
        let dtype = tensor.dtype();
        assert!(dtype.is_float(), "{}: `{name}` is {dtype:?}, not a float type", self.0);
        self.not_empty(name, tensor.dims())
    }

    /// `shape`, if no dimension of it is empty.
    #[track_caller]
    pub(super) fn not_empty<const D: usize>(self, name: &str, shape: [usize; D]) -> [usize; D] {
        assert!(!shape.contains(&0), "{}: `{name}` has an empty dimension: {shape:?}", self.0);
        shape
    }

    #[track_caller]
    pub(super) fn shape<const D: usize>(self, name: &str, found: [usize; D], expected: [usize; D]) {
        assert!(found == expected, "{}: `{name}` has the shape {found:?}, not {expected:?}", self.0);
    }

    #[track_caller]
    pub(super) fn dtype(self, name: &str, found: DType, expected: DType) {
        assert!(found == expected, "{}: `{name}` is {found:?}, not {expected:?}", self.0);
    }

    /// A rule that a name and a shape do not say.
    #[track_caller]
    pub(super) fn rule(self, holds: bool, rule: &str) {
        assert!(holds, "{}: {rule}", self.0);
    }

    /// Every start lies in its sequence at its query or before, and none before the one of the query before it.
    #[track_caller]
    pub(super) fn document_starts(self, spec: &AttentionSpec, batch: usize, sequence: usize) {
        let Some(starts) = &spec.starts else { return };
        self.rule(starts.len() == batch * sequence, "there is not one document start for each query");
        let mut valid = true;
        for starts in starts.chunks_exact(sequence) {
            let mut last = 0;
            for (query, &start) in starts.iter().enumerate() {
                valid &= start as usize <= query && start >= last;
                last = start;
            }
        }
        self.rule(valid, "document starts decrease along a sequence or lie after their query");
    }

    /// Spans hold all `tokens`, and lie in a cache of `batch` sequences of `capacity` tokens with rows of `row` values.
    #[track_caller]
    pub(super) fn cache_spans(self, spec: &CachedAttentionSpec, tokens: usize, [batch, _, capacity, row]: [usize; 4]) {
        self.rule(spec.window != Some(0), "a window has no key");
        let inside = |range: &std::ops::Range<usize>| range.start < range.end && range.end <= row;
        self.rule(inside(&spec.keys), "the key is no part of a row of the cache");
        self.rule(inside(&spec.values), "the value is no part of a row of the cache");
        let mut rest = tokens;
        let mut next = 0;
        for span in spec.spans.iter() {
            self.rule(span.sequence < batch, "a span's sequence is not in the cache");
            self.rule(span.sequence >= next, "spans are not in the order of their sequences, at most one of each");
            let end = span.start.checked_add(span.count);
            self.rule(end.is_some_and(|end| end <= capacity), "a span ends after the cache's capacity");
            self.rule(span.count > 0 && span.count <= rest, "spans have no token, or more than there are queries");
            rest -= span.count;
            next = span.sequence + 1;
        }
        self.rule(rest == 0, "spans have fewer tokens than there are queries");
    }

    /// The bytes and the blocks of one quantized matrix.
    #[track_caller]
    pub(super) fn quantized(self, spec: QuantizedSpec) -> [usize; 2] {
        self.not_empty("spec", [spec.input, spec.output]);
        let values = spec
            .input
            .checked_mul(spec.output)
            .filter(|&values| isize::try_from(values.saturating_add(QUANT_BLOCK)).is_ok());
        self.rule(values.is_some(), "a matrix has more values than memory can hold");
        let blocks = values.unwrap_or_default().div_ceil(QUANT_BLOCK);
        [blocks * spec.bits.bytes(QUANT_BLOCK), blocks]
    }
}
