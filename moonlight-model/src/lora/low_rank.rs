//! [`LowRank`]: the two matrices of an adapter, with dropout masks that a seed reproduces.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Distribution, Tensor};

use crate::kernels::{GroupLayout, grouped_matmul};

/// A low-rank update of a frozen weight: `s A B` (LoRA, arXiv 2106.09685).
///
/// `D` = 2 for a matrix, 3 for a stack of experts. Both factors are kept in f32, as an optimizer needs them, and cast to the
/// dtype of the input for the product.
#[derive(Module, Debug)]
pub struct LowRank<const D: usize> {
    /// `A`: `[in, rank]`, or `[experts, in, rank]`.
    pub a: Param<Tensor<D>>,
    /// `B`: `[rank, out]`, or `[experts, rank, out]`.
    pub b: Param<Tensor<D>>,
    #[module(skip)]
    settings: LowRankSettings,
    #[module(skip)]
    dropout: Dropout,
}

/// Scale and dropout of an adapter.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct LowRankSettings {
    /// The update is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` with `rslora`.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` (rsLoRA, arXiv 2312.03732).
    #[config(default = false)]
    pub rslora: bool,
    /// Probability that an input value of the adapter is dropped in training, in `0..1`.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl LowRankSettings {
    /// The factor `s` on the product of the two matrices.
    pub fn scale(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// The seed of the dropout masks, shared by all adapters of a model and its clones; 0 turns dropout off.
#[derive(Debug, Clone, Default)]
pub(crate) struct DropoutSeed(Arc<AtomicU64>);

impl DropoutSeed {
    pub(crate) fn set(&self, seed: Option<u64>) {
        // 0 means disabled, so a real seed of 0 is mapped to 1.
        self.0.store(seed.map_or(0, |seed| seed.max(1)), Ordering::Relaxed);
    }
}

/// Dropout on the input of one adapter.
#[derive(Debug, Clone)]
struct Dropout {
    seed: DropoutSeed,
    /// Index of the adapter in its model, mixed into the seed so that each adapter draws other masks.
    adapter: u64,
}

impl Dropout {
    /// Drops values with probability `rate` and scales the others by `1 / (1 - rate)`. The mask depends on the seed and the adapter
    /// only, so the same values are dropped when a layer is run again for its gradients, and in a resumed run.
    fn apply(&self, x: Tensor<2>, rate: f64) -> Tensor<2> {
        let seed = self.seed.0.load(Ordering::Relaxed);
        if rate == 0.0 || seed == 0 {
            return x;
        }
        // The device's generator is seeded for every mask, so that earlier draws do not matter.
        x.device().seed(split_mix64(seed ^ split_mix64(self.adapter + 1)));
        let kept = x.random_like(Distribution::Bernoulli(1.0 - rate));
        x * kept.mul_scalar(1.0 / (1.0 - rate))
    }
}

/// A step of SplitMix64 (Steele, Lea and Flood 2014), which maps nearby seeds to unrelated ones.
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

    /// Columns of `A` and rows of `B`.
    pub fn rank(&self) -> usize {
        self.a.lazy_shape()[D - 1]
    }

    /// Scale and dropout.
    pub fn settings(&self) -> LowRankSettings {
        self.settings
    }

    pub(super) fn dropout_seed(&self) -> &DropoutSeed {
        &self.dropout.seed
    }

    fn scale(&self) -> f64 {
        self.settings.scale(self.rank())
    }

    /// `W + s A B` in the dtype of `W`. The sum is taken in f32, so that a half-precision weight is rounded once.
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
        // The scale is applied here because this is the narrowest tensor.
        let narrow = x.matmul(self.a.val().cast(dtype)).mul_scalar(self.scale()); // [rows, rank]
        narrow.matmul(self.b.val().cast(dtype))
    }
}

impl LowRank<3> {
    /// `s x A B` for rows sorted by expert as in `layout`, each with the matrices of its expert.
    pub(crate) fn forward(&self, rows: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
        let dtype = rows.dtype();
        let rows = self.dropout.apply(rows, self.settings.dropout);
        let narrow = grouped_matmul(rows, self.a.val().cast(dtype), layout).mul_scalar(self.scale()); // [rows, rank]
        grouped_matmul(narrow, self.b.val().cast(dtype), layout)
    }
}
