//! Decoding of few tokens as one computation, from the embedding to the logits, for models in f32, in bf16 and quantized.
//!
//! A token of a small model takes about a millisecond, and a fork and join of all threads for each of twenty operations a layer, with a
//! tensor for each result, would be a good part of it. Here threads are started once ([`team`]), and a layer is seven or eight phases
//! with nothing but memory reads in them. Activations are in f32 whatever the dtype of the weights. The definition of the model is its
//! modules: composed of their operations they compute the same, and do so where this cannot (GPUs, gradients, adapters, other dtypes,
//! more tokens). Tests compare both.
//!
//! Every sum has an order that does not depend on the number of threads.

mod attention;
mod feed_forward;
mod gqa;
mod mla;
mod product;
mod run;
mod store;
mod team;
#[cfg(test)]
mod tests;
mod weights;

use std::sync::{Mutex, PoisonError};

use burn::backend::Flex;
use burn::tensor::{DType, Tensor, bf16};
use moonlight_simd::by_level;

use super::dtype::Element;
use super::math::dot;
use super::tensor::tensor_of;
use crate::disjoint::DisjointMut;
use product::{Rows, Sums};
use run::{Run, product};
use team::Team;
use weights::View;

pub(crate) use feed_forward::{FeedForward, Gated, Moe};
pub(crate) use gqa::{Gqa, GqaWidths};
pub(crate) use mla::{AbsorbedHalves, Mla, MlaQuery, MlaWidths};
pub(crate) use run::{Norm, Positions};
pub(crate) use store::Store;
pub(crate) use weights::{Matrix, Table, vector};

/// The most tokens of a call. With more, products are bound by arithmetic, for which Burn's operations have better kernels.
pub(crate) const MAX_TOKENS: usize = 8;

/// A model as decoding reads it. It shares its memory with the parameters, except for small ones.
#[derive(Debug)]
pub(crate) struct Decoder {
    embedding: Table,
    layers: Vec<Layer>,
    norm: Norm,
    /// `[hidden, vocab]`; `None` if it is the transposed embedding.
    head: Option<Matrix>,
    /// Threads that stay for the next token.
    team: Mutex<Team>,
}

/// A decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Norm,
    pub(crate) attention: Attention,
    pub(crate) feed_forward_norm: Norm,
    pub(crate) feed_forward: FeedForward,
}

/// The attention of a layer.
#[derive(Debug)]
pub(crate) enum Attention {
    Mla(Box<Mla>),
    Gqa(Box<Gqa>),
}

/// What [`Decoder::decode`] returns for the wanted tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// The output of the last layer, `[wanted, hidden]`.
    Hidden,
    /// `[wanted, vocab]`.
    Logits,
}

impl Decoder {
    pub(crate) fn new(embedding: Table, layers: Vec<Layer>, norm: Norm, head: Option<Matrix>) -> Self {
        Self { embedding, layers, norm, head, team: Mutex::new(Team::new()) }
    }

    /// Appends tokens to the cache and returns the output of those whose indices are `wanted`, in the dtype of the embedding.
    ///
    /// # Panics
    ///
    /// If `stores` are not those of the layers, or if a token exceeds the vocabulary.
    pub(crate) fn decode(
        &self,
        tokens: &[u32],
        positions: Positions<'_>,
        stores: &mut [Store],
        wanted: &[usize],
        output: Output,
    ) -> Tensor<2> {
        assert_eq!(stores.len(), self.layers.len(), "there must be a store for each layer");
        let mut hidden = Rows::default();
        hidden.resize(tokens.len(), self.embedding.width);
        for (row, &token) in tokens.iter().enumerate() {
            self.embedding.row(token as usize, hidden.row_mut(row));
        }
        let indices = self.indices(tokens.len());
        let mut team = self.team.lock().unwrap_or_else(PoisonError::into_inner);
        let (tokens, sums) = (tokens.len(), Sums::default());
        let mut run = Run { team: &mut team, positions, tokens, indices: &indices, sums, hidden };
        for (layer, store) in self.layers.iter().zip(stores) {
            layer.decode(&mut run, store);
        }
        let mut rows = Rows::default();
        rows.resize(wanted.len(), run.hidden.width);
        for (row, &token) in wanted.iter().enumerate() {
            rows.row_mut(row).copy_from_slice(run.hidden.row(token));
        }
        self.output(match output {
            Output::Hidden => rows,
            Output::Logits => self.logits(&mut run, rows),
        })
    }

    /// Final norm and head of `[rows, hidden]`.
    pub(crate) fn head(&self, hidden: &[f32]) -> Tensor<2> {
        let rows = Rows::new(hidden.to_vec(), self.embedding.width);
        let tokens = hidden.len() / rows.width;
        let indices = self.indices(tokens);
        let positions = Positions { spans: &[], cos: &[], sin: &[], interleave: false };
        let mut team = self.team.lock().unwrap_or_else(PoisonError::into_inner);
        let (sums, hidden) = (Sums::default(), Rows::default());
        let mut run = Run { team: &mut team, positions, tokens, indices: &indices, sums, hidden };
        self.output(self.logits(&mut run, rows))
    }

    /// 0, 1, 2, ...: as many as rows of any product for this number of tokens.
    fn indices(&self, tokens: usize) -> Vec<u32> {
        let of_layer = |layer: &Layer| {
            let heads = match &layer.attention {
                Attention::Mla(mla) => mla.widths.heads,
                Attention::Gqa(_) => 1,
            };
            let experts = match &layer.feed_forward {
                FeedForward::Dense(_) => 1,
                FeedForward::Moe(moe) => moe.rule.experts_per_token(),
            };
            heads.max(experts)
        };
        let rows = self.layers.iter().map(of_layer).max().unwrap_or(1) * tokens;
        (0..rows as u32).collect()
    }

    fn logits(&self, run: &mut Run<'_>, mut rows: Rows) -> Rows {
        rows.values.chunks_exact_mut(rows.width).for_each(|row| self.norm.apply(row));
        let count = rows.values.len() / rows.width;
        let Some(head) = &self.head else {
            let mut logits = Rows::default();
            logits.resize(count, self.embedding.rows);
            match self.embedding.view() {
                View::F32(table) => tied_logits(run.team, table, &rows, &mut logits),
                View::Bf16(table) => tied_logits(run.team, table, &rows, &mut logits),
                View::Quantized(_) => unreachable!("an embedding is not quantized"),
            }
            return logits;
        };
        if head.is_quantized() {
            rows.quantize();
        }
        run.multiply(&[product(head, 0, &rows, &run.indices[..count])]);
        run.read(0, count, head)
    }

    /// A tensor in the dtype of the model.
    fn output(&self, rows: Rows) -> Tensor<2> {
        let shape = [rows.values.len() / rows.width, rows.width];
        Tensor::from_primitive::<Flex>(match self.embedding.dtype() {
            DType::F32 => tensor_of(rows.values, shape),
            _ => tensor_of(bf16::rounded(rows.values), shape),
        })
    }
}

impl Layer {
    fn decode(&self, run: &mut Run<'_>, store: &mut Store) {
        let mut x = run.normalized(&self.attention_norm);
        match &self.attention {
            Attention::Mla(mla) => mla.decode(run, &mut x, store),
            Attention::Gqa(gqa) => gqa.decode(run, &mut x, store),
        }
        let mut x = run.normalized(&self.feed_forward_norm);
        self.feed_forward.decode(run, &mut x);
    }
}

/// Rows of an embedding in a chunk of [`tied_logits`].
const TIED_ROWS: usize = 256;

/// The products of rows and each row of an embedding.
fn tied_logits<E: Element>(team: &mut Team, table: &[E], rows: &Rows, logits: &mut Rows) {
    let (width, vocab) = (rows.width, logits.width);
    let target = DisjointMut::new(&mut logits.values);
    team.run(vocab.div_ceil(TIED_ROWS), &|chunk| {
        let range = chunk * TIED_ROWS..vocab.min((chunk + 1) * TIED_ROWS);
        let table = &table[range.start * width..range.end * width];
        for (row, x) in rows.values.chunks_exact(width).enumerate() {
            // SAFETY: each chunk has its own part of every row.
            let out = unsafe { target.row(row * vocab + range.start..row * vocab + range.end) };
            dots(out, x, table);
        }
    });
    target.finish();
}

by_level! {
    fn dots[E: Element](out: &mut [f32], x: &[f32], table: &[E]) {
        for (out, line) in out.iter_mut().zip(table.chunks_exact(x.len())) {
            *out = dot(line, x);
        }
    }
}
