//! Grouped-query attention of few tokens.

use super::attention::{AttentionShape, attend};
use super::mla::add_output;
use super::product::Rows;
use super::run::{Run, product};
use super::store::Store;
use super::weights::Matrix;

/// A grouped-query attention as decoding reads it.
#[derive(Debug)]
pub(crate) struct Gqa {
    /// `[hidden, heads * width]`.
    pub(crate) query: Matrix,
    /// `[hidden, key heads * width]`.
    pub(crate) key: Matrix,
    /// `[hidden, key heads * width]`.
    pub(crate) value: Matrix,
    /// `[heads * width, hidden]`.
    pub(crate) output: Matrix,
    pub(crate) widths: GqaWidths,
}

/// Widths of a grouped-query attention, and its factor on scores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GqaWidths {
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) width: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
}

impl Gqa {
    /// Adds the attention of the normalized tokens `x` to the residual stream, and appends to the cache.
    pub(super) fn decode(&self, run: &mut Run<'_>, x: &mut Rows, store: &mut Store) {
        let GqaWidths { heads, key_heads, width, scale, window } = self.widths;
        let tokens = run.tokens;
        let matrices = [&self.query, &self.key, &self.value];
        if matrices.iter().any(|matrix| matrix.is_quantized()) {
            x.quantize();
        }
        run.multiply(&matrices.map(|matrix| product(matrix, 0, x, run.all())));
        let [mut queries, key, value] = [0, 1, 2].map(|index| run.read(index, tokens, matrices[index]));
        let mut rows = Rows::default(); // [tokens, key heads * (key and value)]
        rows.resize(tokens, key_heads * 2 * width);
        for token in 0..tokens {
            queries.row_mut(token).chunks_exact_mut(width).for_each(|head| run.rotate(token, head));
            let heads = key.row(token).chunks_exact(width).zip(value.row(token).chunks_exact(width));
            for (out, (key, value)) in rows.row_mut(token).chunks_exact_mut(2 * width).zip(heads) {
                out[..width].copy_from_slice(key);
                run.rotate(token, &mut out[..width]);
                out[width..].copy_from_slice(value);
            }
        }
        store.write(run.positions.spans, &rows.values); // first: a token attends to itself
        let queries = Rows::new(queries.values, width); // [tokens * heads, width]
        let shape = AttentionShape {
            heads,
            key_heads,
            capacity: store.capacity,
            row: store.row,
            keys: 0..width,
            values: width..2 * width,
            window,
            scale,
        };
        let mut attended = Rows::default(); // [heads * tokens, width]
        attend(run.team, &shape, run.positions.spans, &queries, store.view(), &mut attended);
        let mut output = Rows::default();
        output.resize(tokens, heads * width);
        for token in 0..tokens {
            for (head, out) in output.row_mut(token).chunks_exact_mut(width).enumerate() {
                out.copy_from_slice(attended.row(head * tokens + token));
            }
        }
        add_output(run, &self.output, &mut output);
    }
}
