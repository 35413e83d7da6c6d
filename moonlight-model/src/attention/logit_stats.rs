//! Statistics of attention logits, which the Muon report monitors for growth (arXiv 2502.16982, section 3.3).

use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::forward::ForwardContext;

/// A logit above this counts as large.
const THRESHOLD: f64 = 100.0;
/// Queries whose logits are in memory at once: `[batch, heads, QUERY_BLOCK, sequence]`.
const QUERY_BLOCK: usize = 128;

/// Statistics of the scaled attention logits of one layer, over all pairs of a query and a key visible to it.
#[derive(Debug, Clone)]
pub(crate) struct LogitStats {
    /// The largest logit of each head, f32 `[heads]`.
    pub(crate) max_logit: Tensor<1>,
    /// The share of logits above [`THRESHOLD`], f32 `[1]`.
    pub(crate) share_above_100: Tensor<1>,
}

/// Statistics of `scale * query key^T`; both are `[batch, sequence, heads, width]`. There is no gradient.
pub(crate) fn logit_stats(
    query: Tensor<4>,
    key: Tensor<4>,
    scale: f64,
    window: Option<usize>,
    context: &ForwardContext,
) -> LogitStats {
    let starts = context.first_keys(window);
    let starts = starts.as_ref().map(|starts| starts.as_slice());
    let device = query.device();
    let query = query.detach().swap_dims(1, 2); // [batch, heads, sequence, width]
    let key = key.detach().swap_dims(1, 2).swap_dims(2, 3); // [batch, heads, width, sequence]
    let heads = query.dims()[1];
    let mut max_logit: Option<Tensor<1>> = None;
    let mut large_count: Option<Tensor<1>> = None;
    let mut visible_pairs = 0u64;
    for first in (0..context.sequence()).step_by(QUERY_BLOCK) {
        let rows = first..context.sequence().min(first + QUERY_BLOCK);
        let (masked, visible) = masked(context, starts, rows.clone(), &device);
        visible_pairs += visible * heads as u64;
        let block = query.clone().slice_dim(2, rows).matmul(key.clone()).cast(burn::tensor::DType::F32) * scale;
        let shape = block.dims();
        let block = block.mask_fill(masked.expand(shape), f32::NEG_INFINITY);
        let count = block.clone().greater_elem(THRESHOLD).float().sum();
        let block = block.swap_dims(0, 1).reshape([heads as i32, -1]).max_dim(1).reshape([heads]); // over batch, rows, keys
        max_logit = Some(max_logit.map_or(block.clone(), |max_logit| max_logit.max_pair(block)));
        large_count = Some(large_count.map_or(count.clone(), |sum| sum + count));
    }
    LogitStats {
        max_logit: max_logit.expect("a sequence has at least one token"),
        share_above_100: large_count.expect("a sequence has at least one token") / visible_pairs as f64,
    }
}

/// A mask `[batch, 1, rows, sequence]` that is true where query `rows[i]` does not see a key, and the number of visible pairs.
fn masked(
    context: &ForwardContext,
    starts: Option<&[u32]>,
    rows: std::ops::Range<usize>,
    device: &Device,
) -> (Tensor<4, Bool>, u64) {
    let mut masked = Vec::with_capacity(context.batch() * rows.len() * context.sequence());
    let mut visible = 0;
    for batch in 0..context.batch() {
        for row in rows.clone() {
            let start = starts.map_or(0, |starts| starts[batch * context.sequence() + row] as usize);
            visible += (row - start + 1) as u64;
            masked.extend((0..context.sequence()).map(|key| key < start || key > row));
        }
    }
    let shape = [context.batch(), 1, rows.len(), context.sequence()];
    (Tensor::from_data(TensorData::new(masked, shape), device), visible)
}
