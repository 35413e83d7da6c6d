//! Latent attention of few tokens, with the halves of `kv_b_proj` absorbed into queries and outputs.

use super::attention::{AttentionShape, attend};
use super::product::Rows;
use super::run::{Norm, Run, Term, product};
use super::store::Store;
use super::weights::Matrix;

/// A latent attention as decoding reads it.
#[derive(Debug)]
pub(crate) struct Mla {
    pub(crate) query: MlaQuery,
    /// `[hidden, latent + rope]`.
    pub(crate) key_value_down: Matrix,
    pub(crate) latent_norm: Norm,
    pub(crate) absorbed: AbsorbedHalves,
    /// `[heads * value, hidden]`.
    pub(crate) output: Matrix,
    pub(crate) widths: MlaWidths,
}

/// Widths of a latent attention, and its factor on scores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MlaWidths {
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
    pub(crate) latent: usize,
    pub(crate) scale: f32,
}

/// The projections of queries.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are a few dozen, one a layer")]
pub(crate) enum MlaQuery {
    /// `[hidden, heads * (nope + rope)]`.
    Direct(Matrix),
    /// Through a latent.
    Latent { down: Matrix, norm: Norm, up: Matrix },
}

/// The halves of `kv_b_proj`.
#[derive(Debug)]
pub(crate) struct AbsorbedHalves {
    /// `[heads, nope, latent]`.
    pub(crate) key: Matrix,
    /// `[heads, latent, value]`.
    pub(crate) value: Matrix,
}

impl Mla {
    /// Adds the attention of the normalized tokens `x` to the residual stream, and appends to the cache.
    pub(super) fn decode(&self, run: &mut Run<'_>, x: &mut Rows, store: &mut Store) {
        let MlaWidths { heads, nope, rope, value, latent, scale } = self.widths;
        let tokens = run.tokens;
        let first = match &self.query {
            MlaQuery::Direct(query) => query,
            MlaQuery::Latent { down, .. } => down,
        };
        if first.is_quantized() || self.key_value_down.is_quantized() {
            x.quantize();
        }
        run.multiply(&[product(first, 0, x, run.all()), product(&self.key_value_down, 0, x, run.all())]);
        let mut query = run.read(0, tokens, first);
        let mut rows = run.read(1, tokens, &self.key_value_down); // [tokens, latent + rope]
        for token in 0..tokens {
            let (latent, shared_key) = rows.row_mut(token).split_at_mut(latent);
            self.latent_norm.apply(latent);
            run.rotate(token, shared_key);
        }
        // Written first, because a token attends to itself.
        store.write(run.positions.spans, &rows.values);
        if let MlaQuery::Latent { norm, up, .. } = &self.query {
            query.values.chunks_exact_mut(query.width).for_each(|row| norm.apply(row));
            if up.is_quantized() {
                query.quantize();
            }
            run.multiply(&[product(up, 0, &query, run.all())]);
            query = run.read(0, tokens, up);
        }

        let AbsorbedHalves { key: key_half, value: value_half } = &self.absorbed;
        let mut own = Rows::default(); // the parts of the queries without position, all tokens of one head after the other
        own.resize(heads * tokens, nope);
        for token in 0..tokens {
            for head in 0..heads {
                let query = &mut query.row_mut(token)[head * (nope + rope)..][..nope + rope];
                run.rotate(token, &mut query[nope..]);
                own.row_mut(head * tokens + token).copy_from_slice(&query[..nope]);
            }
        }
        if key_half.is_quantized() {
            own.quantize();
        }
        let of_head = |head: usize| &run.indices[head * tokens..(head + 1) * tokens];
        let products: Vec<_> = (0..heads).map(|head| product(key_half, head, &own, of_head(head))).collect();
        run.multiply(&products);
        let mut queries = Rows::default(); // as wide as a row of the cache
        queries.resize(tokens * heads, latent + rope);
        for token in 0..tokens {
            for head in 0..heads {
                let (own, shared) = queries.row_mut(token * heads + head).split_at_mut(latent);
                run.sums.read(head, token, 0..latent, own);
                shared.copy_from_slice(&query.row(token)[head * (nope + rope) + nope..][..rope]);
            }
        }
        let shape = AttentionShape {
            heads,
            key_heads: 1,
            capacity: store.capacity,
            row: store.row,
            keys: 0..latent + rope,
            values: 0..latent,
            window: None,
            scale,
        };
        let mut latents = Rows::default(); // [heads * tokens, latent]
        attend(run.team, &shape, run.positions.spans, &queries, store.view(), &mut latents);

        if value_half.is_quantized() {
            latents.quantize();
        }
        let products: Vec<_> = (0..heads).map(|head| product(value_half, head, &latents, of_head(head))).collect();
        run.multiply(&products);
        let mut output = Rows::default();
        output.resize(tokens, heads * value);
        for token in 0..tokens {
            for (head, out) in output.row_mut(token).chunks_exact_mut(value).enumerate() {
                run.sums.read(head, token, 0..value, out);
            }
        }
        add_output(run, &self.output, &mut output);
    }
}

/// Adds the output projection of `[tokens, heads * value]` to the residual stream.
pub(super) fn add_output(run: &mut Run<'_>, projection: &Matrix, output: &mut Rows) {
    if projection.is_quantized() {
        output.quantize();
    }
    run.multiply(&[product(projection, 0, output, run.all())]);
    let terms: Vec<Term> = (0..run.tokens).map(|token| Term { token, product: 0, row: token, factor: 1.0 }).collect();
    run.add(&terms, &[projection]);
}
