//! Assertions on the arguments of the public functions, made once before an operation is dispatched.
//!
//! An assertion takes nanoseconds, an operation at least microseconds. Only two checks grow with the number of tokens:
//! [`Check::document_starts`], and that of cross-entropy's targets, which `flex::cross_entropy` makes on the CPU.

use burn::tensor::{DType, Tensor};

use super::{AttentionSpec, CachedAttentionSpec, QUANT_BLOCK, QUANT_TILE, QuantizedShape};

/// The checks of one operation, whose name begins every message.
#[derive(Clone, Copy)]
pub(super) struct Check(pub(super) &'static str);

impl Check {
    /// Asserts that a tensor has a float dtype and no empty dimension, and returns its shape.
    #[track_caller]
    pub(super) fn float<const D: usize>(self, name: &str, tensor: &Tensor<D>) -> [usize; D] {
        let dtype = tensor.dtype();
        assert!(dtype.is_float(), "{}: `{name}` is {dtype:?}, not a float type", self.0);
        self.not_empty(name, tensor.dims())
    }

    /// Asserts that no dimension is empty, and returns the shape.
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

    /// Asserts a condition that is not about one shape or dtype.
    #[track_caller]
    pub(super) fn rule(self, holds: bool, rule: &str) {
        assert!(holds, "{}: {rule}", self.0);
    }

    /// Asserts the rules of [`AttentionSpec::starts`].
    #[track_caller]
    pub(super) fn document_starts(self, spec: &AttentionSpec, batch: usize, sequence: usize) {
        let Some(starts) = &spec.starts else { return };
        self.rule(starts.len() == batch * sequence, "there must be one document start for each query");
        // One flag, asserted once, instead of a branch for each token.
        let mut valid = true;
        for starts in starts.chunks_exact(sequence) {
            let mut last = 0;
            for (query, &start) in starts.iter().enumerate() {
                valid &= start as usize <= query && start >= last;
                last = start;
            }
        }
        self.rule(valid, "a document start is after its query, or decreases along the sequence");
    }

    /// Asserts the rules of [`CachedAttentionSpec`]; the cache is `[batch, key heads, capacity, row]`.
    #[track_caller]
    pub(super) fn cache_spans(self, spec: &CachedAttentionSpec, tokens: usize, [batch, _, capacity, row]: [usize; 4]) {
        self.rule(spec.window != Some(0), "the window is 0");
        let inside = |range: &std::ops::Range<usize>| range.start < range.end && range.end <= row;
        self.rule(inside(&spec.keys), "the key is not a part of a cache row");
        self.rule(inside(&spec.values), "the value is not a part of a cache row");
        let mut remaining = tokens;
        let mut next_sequence = 0;
        for span in spec.spans.iter() {
            self.rule(span.sequence < batch, "a span's sequence is not in the cache");
            self.rule(
                span.sequence >= next_sequence,
                "spans must be in the order of their sequences, at most one for each",
            );
            let end = span.start.checked_add(span.count);
            self.rule(end.is_some_and(|end| end <= capacity), "a span exceeds the capacity of the cache");
            self.rule(
                span.count > 0 && span.count <= remaining,
                "a span has no token, or spans have more tokens than there are queries",
            );
            remaining -= span.count;
            next_sequence = span.sequence + 1;
        }
        self.rule(remaining == 0, "spans have fewer tokens than there are queries");
    }

    /// Asserts that the matrix is not empty and can be addressed.
    #[track_caller]
    pub(super) fn quantized(self, spec: QuantizedShape) {
        self.not_empty("spec", [spec.input, spec.output]);
        let filled = |count: usize, unit| count.checked_next_multiple_of(unit);
        let values = filled(spec.input, QUANT_BLOCK)
            .zip(filled(spec.output, QUANT_TILE))
            .and_then(|(input, output)| input.checked_mul(output))
            .filter(|&values| isize::try_from(values).is_ok());
        self.rule(values.is_some(), "a matrix has more values than memory can hold");
    }
}
