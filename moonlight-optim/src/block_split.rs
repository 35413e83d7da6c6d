//! Splitting a matrix into blocks that are orthogonalized separately: heads, the parts of fused projections.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// How a stored matrix is split into blocks. Each block is orthogonalized and scaled by itself.
///
/// Sizes are repeated until they fill the side, which they must do exactly: `[192]` splits a query projection into heads of
/// 192, `[q, k, v]` a fused projection into its three parts. In Burn's `Linear`, `[in, out]`, heads are blocks of columns.
///
/// The report orthogonalizes whole matrices, and so do the presets. torchtitan's Moonlight recipe has a block for each head of
/// `q_proj` and `kv_b_proj` (its `BlockShard`).
///
/// ```
/// use moonlight_optim::Blocks;
///
/// let heads = Blocks::Columns(vec![192]);
/// assert_eq!(heads.sizes(2048, 3 * 192), Some(vec![192, 192, 192]));
/// assert_eq!(heads.sizes(2048, 500), None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Blocks {
    /// The whole matrix is one block.
    #[default]
    Whole,
    /// Blocks of these numbers of rows.
    Rows(Vec<usize>),
    /// Blocks of these numbers of columns.
    Columns(Vec<usize>),
}

impl Blocks {
    /// The sizes of the blocks of a `[rows, columns]` matrix along the side that is split; `None` if they do not fill it.
    pub fn sizes(&self, rows: usize, columns: usize) -> Option<Vec<usize>> {
        let (pattern, side) = match self {
            Blocks::Whole => return Some(vec![rows]),
            Blocks::Rows(pattern) => (pattern, rows),
            Blocks::Columns(pattern) => (pattern, columns),
        };
        if pattern.is_empty() || pattern.contains(&0) {
            return None;
        }
        let mut sizes = Vec::new();
        let mut left = side;
        for &size in pattern.iter().cycle() {
            if left == 0 {
                break;
            }
            left = left.checked_sub(size)?;
            sizes.push(size);
        }
        // The pattern must be complete: half of a fused projection is a mistake.
        (sizes.len() % pattern.len() == 0).then_some(sizes)
    }

    /// The dimension of `[batch, rows, columns]` that is split.
    fn dimension(&self) -> usize {
        match self {
            Blocks::Whole | Blocks::Rows(_) => 1,
            Blocks::Columns(_) => 2,
        }
    }

    /// The blocks of a stack, in order. The `sizes` must fill the side.
    pub(crate) fn split(&self, stack: &Tensor<3>, sizes: &[usize]) -> Vec<Tensor<3>> {
        let mut start = 0;
        let mut blocks = Vec::with_capacity(sizes.len());
        for &size in sizes {
            blocks.push(stack.clone().narrow(self.dimension(), start, size));
            start += size;
        }
        blocks
    }

    /// The inverse of [`Blocks::split`].
    pub(crate) fn join(&self, mut blocks: Vec<Tensor<3>>) -> Tensor<3> {
        match (blocks.len(), blocks.pop()) {
            (1, Some(only)) => only,
            (_, Some(last)) => {
                blocks.push(last);
                Tensor::cat(blocks, self.dimension())
            }
            (_, None) => unreachable!("a matrix has at least one block"),
        }
    }

    /// The size of a block along the side that is split.
    pub(crate) fn extent(&self, block: &Tensor<3>) -> usize {
        block.dims()[self.dimension()]
    }
}

impl std::fmt::Display for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |sizes: &[usize]| sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Blocks::Whole => write!(f, "whole"),
            Blocks::Rows(sizes) => write!(f, "blocks of {} rows", list(sizes)),
            Blocks::Columns(sizes) => write!(f, "blocks of {} columns", list(sizes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_repeat_and_must_fill_the_side() {
        assert_eq!(Blocks::Whole.sizes(4, 6), Some(vec![4]));
        assert_eq!(Blocks::Columns(vec![2]).sizes(4, 6), Some(vec![2, 2, 2]));
        assert_eq!(Blocks::Columns(vec![3, 2, 1]).sizes(4, 6), Some(vec![3, 2, 1]));
        assert_eq!(Blocks::Rows(vec![3, 1]).sizes(8, 6), Some(vec![3, 1, 3, 1]));
        assert_eq!(Blocks::Columns(vec![4]).sizes(4, 6), None);
        assert_eq!(Blocks::Columns(vec![4, 2, 6]).sizes(4, 6), None);
        assert_eq!(Blocks::Rows(vec![]).sizes(4, 6), None);
        assert_eq!(Blocks::Rows(vec![0, 4]).sizes(4, 6), None);
    }
}
