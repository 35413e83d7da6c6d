//! The two narrow matrices of an adapter, and dropout whose masks can be drawn again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Distribution, Tensor};

use crate::kernels::{GroupLayout, grouped_matmul};

/// A low-rank change of a frozen weight: `s A B` (LoRA, arXiv 2106.09685).
///
/// For a matrix (`D` = 2) `a` is `[in, rank]` and `b` `[rank, out]`; for a stack of experts (`D` = 3) `[experts, in, rank]`
/// and `[experts, rank, out]`. Both are f32 whatever the weight's dtype, and are multiplied in the dtype of the input.
#[derive(Module, Debug)]
pub struct LowRank<const D: usize> {
    /// `[.., in, rank]`.
    pub a: Param<Tensor<D>>,
    /// `[.., rank, out]`.
    pub b: Param<Tensor<D>>,
    #[module(skip)]
    settings: LowRankSettings,
    #[module(skip)]
    dropout: Dropout,
}

/// The numbers of an adapter beside its matrices.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct LowRankSettings {
    /// `alpha`: the change is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732).
    #[config(default = false)]
    pub rslora: bool,
    /// The share of the adapter's inputs that is dropped in training.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl LowRankSettings {
    /// The factor on the product of the two matrices.
    pub fn scale(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// The seed of the masks, shared by all adapters of a model and its clones; 0 while nothing is dropped.
#[derive(Debug, Clone, Default)]
pub(crate) struct DropoutSeed(Arc<AtomicU64>);

impl DropoutSeed {
    pub(crate) fn set(&self, seed: Option<u64>) {
        // 0 means disabled, so a real seed of 0 is mapped to 1.
        self.0.store(seed.map_or(0, |seed| seed.max(1)), Ordering::Relaxed);
    }
}

/// Dropout of one adapter's input.
#[derive(Debug, Clone)]
struct Dropout {
    seed: DropoutSeed,
    /// The number of the adapter in its model: each draws masks of its own.
    adapter: u64,
}

impl Dropout {
    /// Drops a share of the values and scales the others up. The mask depends on the seed and the adapter only, so that
    /// recomputing a pass, for its gradients or after a resume, drops the same values.
    fn apply(&self, x: Tensor<2>, rate: f64) -> Tensor<2> {
        let seed = self.seed.0.load(Ordering::Relaxed);
        if rate == 0.0 || seed == 0 {
            return x;
        }
        x.device().seed(split_mix64(seed ^ split_mix64(self.adapter + 1)));
        let kept = x.random_like(Distribution::Bernoulli(1.0 - rate));
        x * kept.mul_scalar(1.0 / (1.0 - rate))
    }
}

/// A step of SplitMix64 (Steele, Lea and Flood 2014): close seeds become far ones.
pub(crate) fn split_mix64(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl<const D: usize> LowRank<D> {
    pub(super) fn new(
        a: Param<Tensor<D>>,
        b: Param<Tensor<D>>,
        settings: LowRankSettings,
        adapter: usize,
        seed: DropoutSeed,
    ) -> Self {
        Self { a, b, settings, dropout: Dropout { seed, adapter: adapter as u64 } }
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.a.lazy_shape()[D - 1]
    }

    /// `alpha`, how it becomes a factor, and the dropout.
    pub fn settings(&self) -> LowRankSettings {
        self.settings
    }

    pub(super) fn dropout_seed(&self) -> &DropoutSeed {
        &self.dropout.seed
    }

    fn scale(&self) -> f64 {
        self.settings.scale(self.rank())
    }

    /// `W + s A B` in the dtype of `W`, added in f32.
    pub(crate) fn merged_into(&self, weight: Tensor<D>) -> Tensor<D> {
        let dtype = weight.dtype();
        let change = self.a.val().matmul(self.b.val()).mul_scalar(self.scale());
        (weight.cast(DType::F32) + change).cast(dtype)
    }
}

impl LowRank<2> {
    /// `s x A B`: `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let dtype = x.dtype();
        let x = self.dropout.apply(x, self.settings.dropout);
        let narrow = x.matmul(self.a.val().cast(dtype)).mul_scalar(self.scale());
        narrow.matmul(self.b.val().cast(dtype))
    }
}

impl LowRank<3> {
    /// The same for rows that are sorted by expert as `layout` says, each by its expert's matrices.
    pub(crate) fn forward(&self, rows: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
        let dtype = rows.dtype();
        let rows = self.dropout.apply(rows, self.settings.dropout);
        let narrow = grouped_matmul(rows, self.a.val().cast(dtype), layout).mul_scalar(self.scale());
        grouped_matmul(narrow, self.b.val().cast(dtype), layout)
    }
}
