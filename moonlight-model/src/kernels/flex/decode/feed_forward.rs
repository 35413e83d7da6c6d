//! Dense and routed feed-forward parts of few tokens.

use std::ops::Range;

use moonlight_simd::by_level;

use super::super::math::sigmoid;
use super::product::{Product, Rows};
use super::run::{Run, Term, add_bias, fill, product};
use super::weights::Matrix;
use crate::moe::RoutingRule;

/// The feed-forward part of a layer as decoding reads it.
#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Box<Gated>),
    Moe(Box<Moe>),
}

/// The matrices of a gated MLP, or those of all routed experts.
#[derive(Debug)]
pub(crate) struct Gated {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

/// A mixture of experts.
#[derive(Debug)]
pub(crate) struct Moe {
    /// `[hidden, experts]`.
    pub(crate) router: Matrix,
    /// `[experts]`.
    pub(crate) correction_bias: Option<Vec<f32>>,
    pub(crate) rule: RoutingRule,
    pub(crate) experts: Gated,
    pub(crate) shared: Option<Gated>,
}

impl Gated {
    fn reads_quantized(&self) -> bool {
        self.gate.is_quantized() || self.up.is_quantized()
    }

    /// `silu(gate) * up` of rows whose products are given by `places`: for each row the products of gate and up, and the row in them.
    fn activate(&self, run: &mut Run<'_>, places: &[(usize, usize, usize)]) -> Rows {
        let mut rows = Rows::default();
        rows.resize(places.len(), self.gate.output);
        let parts: usize = places.iter().map(|&(gate, up, _)| run.sums.parts(gate) + run.sums.parts(up)).sum();
        // An activation takes about as long as reading ten values.
        let cost = (parts + 10 * places.len()) * rows.width;
        let sums = &run.sums;
        fill(run.team, &mut rows, cost, &|row, range: Range<usize>, out| {
            let (gate, up, place) = places[row];
            sums.read(gate, place, range.clone(), out);
            add_bias(out, &self.gate, range.clone());
            let mut other = vec![0.0; range.len()];
            sums.read(up, place, range.clone(), &mut other);
            add_bias(&mut other, &self.up, range);
            swiglu(out, &other);
        });
        if self.down.is_quantized() {
            rows.quantize();
        }
        rows
    }
}

by_level! {
    fn swiglu[](gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate * sigmoid(*gate) * up;
        }
    }
}

impl FeedForward {
    /// Adds the feed-forward part of the normalized tokens `x` to the residual stream.
    pub(super) fn decode(&self, run: &mut Run<'_>, x: &mut Rows) {
        match self {
            Self::Dense(mlp) => {
                if mlp.reads_quantized() {
                    x.quantize();
                }
                run.multiply(&[product(&mlp.gate, 0, x, run.all()), product(&mlp.up, 0, x, run.all())]);
                let places: Vec<_> = (0..run.tokens).map(|token| (0, 1, token)).collect();
                let gated = mlp.activate(run, &places);
                run.multiply(&[product(&mlp.down, 0, &gated, run.all())]);
                let terms: Vec<Term> =
                    (0..run.tokens).map(|token| Term { token, product: 0, row: token, factor: 1.0 }).collect();
                run.add(&terms, &[&mlp.down]);
            }
            Self::Moe(moe) => moe.decode(run, x),
        }
    }
}

impl Moe {
    fn decode(&self, run: &mut Run<'_>, x: &mut Rows) {
        if self.experts.reads_quantized() || self.shared.as_ref().is_some_and(Gated::reads_quantized) {
            x.quantize();
        }
        let (tokens, all) = (run.tokens, run.all());
        // The choice is needed for the experts, but not for the shared ones.
        let mut products = vec![product(&self.router, 0, x, all)];
        if let Some(shared) = &self.shared {
            products.extend([product(&shared.gate, 0, x, all), product(&shared.up, 0, x, all)]);
        }
        run.multiply(&products);
        let logits = run.read(0, tokens, &self.router);
        let (choices, weights) = self.rule.route(&logits.values, self.correction_bias.as_deref());
        let shared = self.shared.as_ref().map(|shared| {
            let places: Vec<_> = (0..tokens).map(|token| (1, 2, token)).collect();
            (&shared.down, shared.activate(run, &places))
        });

        // All tokens of an expert together, so that its weights are read once.
        let k = choices.len() / tokens;
        let mut pairs: Vec<(u32, usize)> = choices.iter().copied().zip(0..).collect();
        pairs.sort_unstable();
        let rows: Vec<u32> = pairs.iter().map(|&(_, pair)| (pair / k) as u32).collect();
        let groups: Vec<Range<usize>> = pairs
            .chunk_by(|(a, _), (b, _)| a == b)
            .scan(0, |start, group| {
                *start += group.len();
                Some(*start - group.len()..*start)
            })
            .collect();
        let products: Vec<Product<'_>> = groups
            .iter()
            .flat_map(|group| {
                let expert = pairs[group.start].0 as usize;
                [&self.experts.gate, &self.experts.up].map(|matrix| product(matrix, expert, x, &rows[group.clone()]))
            })
            .collect();
        run.multiply(&products);
        let places: Vec<_> = groups
            .iter()
            .enumerate()
            .flat_map(|(index, group)| (0..group.len()).map(move |row| (2 * index, 2 * index + 1, row)))
            .collect();
        let gated = self.experts.activate(run, &places);

        let mut products: Vec<Product<'_>> = groups
            .iter()
            .map(|group| {
                let expert = pairs[group.start].0 as usize;
                product(&self.experts.down, expert, &gated, &run.indices[group.clone()])
            })
            .collect();
        let mut terms: Vec<Term> = places
            .iter()
            .zip(&pairs)
            .map(|(&(gate, _, row), &(_, pair))| Term {
                token: pair / k,
                product: gate / 2,
                row,
                factor: weights[pair],
            })
            .collect();
        let mut biases = Vec::new();
        if let Some((down, gated)) = &shared {
            terms.extend((0..tokens).map(|token| Term { token, product: products.len(), row: token, factor: 1.0 }));
            products.push(product(down, 0, gated, all));
            biases.push(*down);
        }
        run.multiply(&products);
        run.add(&terms, &biases);
    }
}
